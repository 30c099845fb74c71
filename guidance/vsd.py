"""VSD's LoRA score network: epsilon_phi of ProlificDreamer, section 3 (Wang et al. 2023).

Variational score distillation follows eps_guided - epsilon_phi. epsilon_phi is the frozen
diffusion model (or a second one) with LoRA adapters and a camera embedding. After each update of
the scene it takes one step of ordinary diffusion training on the renders. Its text is the prompt
without view words: it knows the view from the camera.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from guidance.attention import fast_attention
from guidance.lora import LoRA
from guidance.schedule import network_target
from guidance.sds import GuidanceNoise, add_noise, guide, to_epsilon
from guidance.stable_diffusion import StableDiffusion

CAMERA = 16  # entries of a 4 x 4 camera-to-world matrix


class GradientAverager(Protocol):
    """What ``train_step`` needs of ``nerf.training.distributed.World``."""

    def average_gradients(self, parameters: Iterable[nn.Parameter], /) -> None: ...


class CameraEmbedding(nn.Module):
    """An MLP from c2w [V, 16] to an addition to the time embedding [V, D]; zero at the start."""

    def __init__(self, width: int):
        super().__init__()
        first, last = nn.Linear(CAMERA, width), nn.Linear(width, width)
        self.layers = nn.Sequential(first, nn.SiLU(), last)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.dtype = torch.float32  # of the output: set it to the U-Net's

    def forward(self, camera: Tensor) -> Tensor:
        return self.layers(camera.float()).to(self.dtype)


@contextmanager
def unet_class_embedding(unet: Any, embedding: nn.Module | None) -> Iterator[Any]:
    """The U-Net with this ``class_embedding`` inside the block; it is restored afterwards."""
    before, unet.class_embedding = unet.class_embedding, embedding
    try:
        yield unet
    finally:
        unet.class_embedding = before


def flat_cameras(c2w: Tensor) -> Tensor:
    """Flatten c2w [V, 3, 4] to [V, 16]: a 4 x 4 matrix whose last row is 0 0 0 1."""
    last = (torch.arange(4, device=c2w.device) == 3).to(c2w.dtype).expand(len(c2w), 4)
    return torch.cat([c2w.flatten(1), last], dim=1)


class LoRAScoreNetwork(nn.Module):
    """epsilon_phi: trainable LoRA adapters and a camera embedding on a frozen U-Net.

    base: the ``StableDiffusion`` that guides the scene, or another one with the same latents.
    text [1, L, D]: the prompt's embedding by ``base``. rank: of the adapters. lrate: of the AdamW
    in ``optimizer``. camera_dropout: the fraction of training cameras that are replaced by zeros.
    views: the number of views of a step to train on; 0: all. cfg: guidance scale of the network's
    own prediction; 1: none. The U-Net belongs to ``base`` and is not part of this module's
    parameters and state.
    """

    steps: Tensor  # [] optimizer steps taken

    def __init__(
        self,
        base: StableDiffusion,
        text: Tensor,
        *,
        rank: int,
        lrate: float,
        camera_dropout: float,
        views: int = 0,
        cfg: float = 1.0,
    ):
        super().__init__()
        # The adapters' initial values come from torch's global seed on the CPU, on every device.
        unet = base.unet
        self.lora = LoRA(unet, rank).to(base.device)
        self.camera = CameraEmbedding(unet.time_embedding.linear_2.out_features).to(base.device)
        self.camera.dtype = base.dtype
        self.camera_dropout, self.views, self.cfg = camera_dropout, views, cfg
        self.base, self._text = base, text
        # Fused, it leaves out an update on the device, see ``train_step``.
        fused = base.device.type == "cuda"
        self.optimizer = torch.optim.AdamW(
            self.parameters(), lr=lrate, weight_decay=0.0, fused=fused
        )
        self.scaler = torch.amp.GradScaler(base.device.type, enabled=base.dtype == torch.float16)
        self.register_buffer("steps", torch.zeros((), dtype=torch.long, device=base.device))
        self.grad_norm = torch.zeros((), device=base.device)  # [] of the latest step

    def _output(self, noisy: Tensor, t: Tensor, camera: Tensor) -> Tensor:
        """The network's raw output [V, C, h, w] float32; differentiable if gradients are on."""
        base = self.base
        text = self._text.expand(len(noisy), -1, -1).to(base.dtype)
        with (
            torch.autocast(base.device.type, enabled=False),
            self.lora.switched(),
            unet_class_embedding(base.unet, self.camera) as unet,
            fast_attention(base.device),
        ):
            output = unet(noisy.to(base.dtype), t, encoder_hidden_states=text, class_labels=camera)
            return output.sample.float()

    @torch.no_grad()
    def epsilon(self, noisy: Tensor, t: Tensor, c2w: Tensor) -> Tensor:
        """epsilon_phi(x_t, t, c2w): noisy [V, C, h, w], t [V], c2w [V, 3, 4] -> [V, C, h, w].

        With guidance (``cfg``) u + cfg (c - u), where u is the prediction for the zero camera that
        ``camera_dropout`` trains, as in threestudio.
        """
        cameras = flat_cameras(c2w)
        if self.cfg == 1.0:
            output = self._output(noisy, t, cameras)
        else:
            both = torch.cat([torch.zeros_like(cameras), cameras])
            outputs = self._output(noisy.repeat(2, 1, 1, 1), t.repeat(2), both)
            unconditional, conditional = outputs.chunk(2)
            output = guide(unconditional, conditional, self.cfg)
        return to_epsilon(output, noisy, self.base.alphas_cumprod[t], self.base.prediction_type)

    def epsilon_at(self, c2w: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
        """The function (x_t, t) -> epsilon_phi for fixed c2w [V, 3, 4], for ``sds.distill``."""
        return lambda noisy, t: self.epsilon(noisy, t, c2w)

    def train_step(
        self, latents: Tensor, c2w: Tensor, noise: GuidanceNoise, world: GradientAverager
    ) -> Tensor:
        """Take one diffusion training step on the renders' latents [V, C, h, w]; the loss [].

        t is uniform over all of T and independent of the scene's t. Gradients are averaged over
        all processes; if the average is not finite, every process skips the optimizer step.
        """
        base, some = self.base, slice(self.views or None)
        latents, c2w, noise = latents[some], c2w[some], noise.part(some)
        num_timesteps = len(base.alphas_cumprod)
        t = (noise.lora_u * num_timesteps).long().clamp(max=num_timesteps - 1)
        alpha_bar = base.alphas_cumprod[t]
        noisy = add_noise(latents, noise.lora_epsilon, alpha_bar)
        kept = (noise.lora_drop >= self.camera_dropout).float()
        output = self._output(noisy, t, flat_cameras(c2w) * kept[:, None])
        loss = F.mse_loss(
            output, network_target(latents, noise.lora_epsilon, alpha_bar, base.prediction_type)
        )
        self.scaler.scale(loss).backward()
        world.average_gradients(self.parameters())
        self.scaler.unscale_(self.optimizer)
        self.grad_norm = torch.nn.utils.clip_grad_norm_(self.parameters(), 1.0)
        self._update_if_finite(self.grad_norm.isfinite())
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def _update_if_finite(self, finite: Tensor) -> None:
        """An update of the weights where ``finite`` [] is True; a GPU decides that by itself."""
        if self.optimizer.param_groups[0].get("fused"):
            self.optimizer.found_inf = (~finite).float()  # type: ignore[attr-defined]  # as GradScaler
            self.optimizer.step()
            del self.optimizer.found_inf  # type: ignore[attr-defined]
        elif bool(finite):
            self.optimizer.step()
        self.steps += finite

    @property
    def lrate(self) -> float:
        """The learning rate."""
        return float(self.optimizer.param_groups[0]["lr"])

    def set_schedule(self, lrate: float, camera_dropout: float) -> None:
        """Train the next step with these."""
        self.camera_dropout = camera_dropout
        for group in self.optimizer.param_groups:
            group["lr"] = lrate

    def state(self) -> dict[str, Any]:
        """The state dicts of the weights, the optimizer and the scaler, for the checkpoint."""
        return {
            "weights": self.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
        }

    def restore(self, state: dict[str, Any] | None, where: str) -> None:
        """Load what ``state`` returned; ValueError, which names ``where``, if it does not fit."""
        misfit = ValueError(
            f"{where}: its LoRA score network (VSD) does not fit this run; keep --guidance, "
            "--sd_model, --lora_model and --lora_rank as they were, or use another --expname"
        )
        if state is None:
            raise misfit
        try:
            self.load_state_dict(state["weights"])
            self.optimizer.load_state_dict(state["optimizer"])
            if self.scaler.is_enabled() and state["scaler"]:
                self.scaler.load_state_dict(state["scaler"])
        except (TypeError, KeyError, RuntimeError, ValueError):
            raise misfit from None
