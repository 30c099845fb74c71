"""The copy of the model that learns what the renders look like (Wang et al. 2023, ProlificDreamer).

Variational score distillation pulls along eps_model - eps_copy. The copy is the frozen model, or a
second one, with LoRA and a camera embedding; after every step of the scene it takes one step of
ordinary diffusion training on the renders. Text for the copy is the prompt without view words.
"""

from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from guidance.attention import fast_attention
from guidance.lora import LoRA
from guidance.sds import GuidanceNoise, add_noise, per_view, to_epsilon

CAMERA = 16  # numbers of a camera-to-world matrix


class CameraEmbedding(nn.Module):
    """Camera-to-world [V, 16] -> what is added to the time embedding [V, D]; zero at first."""

    def __init__(self, width: int):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(CAMERA, width), nn.SiLU(), nn.Linear(width, width))
        nn.init.zeros_(self.layers[2].weight)
        nn.init.zeros_(self.layers[2].bias)
        self.dtype = torch.float32  # of what comes out: the U-Net's

    def forward(self, camera: Tensor) -> Tensor:
        return self.layers(camera.float()).to(self.dtype)


@contextmanager
def unet_class_embedding(unet: nn.Module, embedding: nn.Module | None):
    """Inside the block ``unet.class_embedding`` is ``embedding``; afterwards what it was."""
    before, unet.class_embedding = unet.class_embedding, embedding
    try:
        yield
    finally:
        unet.class_embedding = before


def disable_unet_class_embedding(unet: nn.Module):
    """Inside the block the U-Net asks for no camera, as it was pretrained."""
    return unet_class_embedding(unet, None)


def flat_cameras(c2w: Tensor) -> Tensor:
    """[V, 3, 4] -> [V, 16], with the row 0 0 0 1."""
    last = c2w.new_tensor([0.0, 0.0, 0.0, 1.0]).expand(len(c2w), 4)
    return torch.cat([c2w.flatten(1), last], dim=1)


class LoRAScoreNetwork(nn.Module):
    """The copy: adapters and camera embedding, which it owns, on a U-Net, which it borrows.

    base: a ``StableDiffusion``; the same as guides the scene, or another whose latents and text
    fit. text [1, L, D]: its embedding of the prompt. views: so many views of a step are learned
    from, the published code's one or more; 0: all. Its own AdamW is ``optimizer``.
    """

    def __init__(
        self, base, text: Tensor, *, rank: int, lrate: float, camera_dropout: float, views: int = 0
    ):
        super().__init__()
        # The adapters' first values come from torch's seed on the CPU, whatever the device.
        unet = base.unet
        self.lora = LoRA(unet, rank).to(base.device)
        self.camera = CameraEmbedding(unet.time_embedding.linear_2.out_features).to(base.device)
        self.camera.dtype = base.dtype
        self.camera_dropout, self.views = camera_dropout, views
        self._borrowed, self._text = (base,), text  # a tuple: not a child, not in the state
        self.optimizer = torch.optim.AdamW(self.parameters(), lr=lrate, weight_decay=0.0)
        self.scaler = torch.amp.GradScaler(base.device.type, enabled=base.dtype == torch.float16)
        self.register_buffer("steps", torch.zeros((), dtype=torch.long, device=base.device))

    def _output(self, noisy: Tensor, t: Tensor, camera: Tensor) -> Tensor:
        """The copy's raw output [V, C, h, w] float32, with a graph if gradients are on."""
        base = self._borrowed[0]
        text = self._text.expand(len(noisy), -1, -1).to(base.dtype)
        with (
            torch.autocast(base.device.type, enabled=False),
            self.lora.switched(),
            unet_class_embedding(base.unet, self.camera),
            fast_attention(base.device),
        ):
            found = base.unet(
                noisy.to(base.dtype), t, encoder_hidden_states=text, class_labels=camera
            )
            return found.sample.float()

    @torch.no_grad()
    def epsilon(self, noisy: Tensor, t: Tensor, c2w: Tensor) -> Tensor:
        """The noise that the copy sees in ``noisy`` [V, C, h, w] under cameras [V, 3, 4]."""
        base = self._borrowed[0]
        output = self._output(noisy, t, flat_cameras(c2w))
        return to_epsilon(output, noisy, base.alphas_cumprod[t], base.prediction_type)

    def epsilon_at(self, c2w: Tensor):
        """(x_t, t) -> ``epsilon`` under these cameras, as ``guidance.sds.distill`` asks for it."""
        return lambda noisy, t: self.epsilon(noisy, t, c2w)

    def train_step(self, latents: Tensor, c2w: Tensor, noise: GuidanceNoise, world) -> float:
        """One step of denoising the renders' latents [V, C, h, w]; the loss.

        t is drawn from all of T apart from the scene's. ``camera_dropout`` of the cameras become
        zeros. Gradients are averaged over ``world``'s processes; one that is not finite is left
        out on all of them.
        """
        base, some = self._borrowed[0], slice(self.views or None)
        latents, c2w, noise = latents[some], c2w[some], noise.part(some)
        num_timesteps = len(base.alphas_cumprod)
        t = (noise.lora_u * num_timesteps).long().clamp(max=num_timesteps - 1)
        alpha_bar = base.alphas_cumprod[t]
        noisy = add_noise(latents, noise.lora_epsilon, alpha_bar)
        kept = (noise.lora_drop >= self.camera_dropout).float()
        output = self._output(noisy, t, flat_cameras(c2w) * kept[:, None])
        loss = F.mse_loss(output, target(base, latents, noise.lora_epsilon, alpha_bar))
        self.scaler.scale(loss).backward()
        world.average_gradients(self.parameters())
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters(), 1.0)
        if torch.isfinite(norm):
            self.scaler.step(self.optimizer)
            self.steps += 1
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.item()

    def state(self) -> dict:
        """Everything to go on from."""
        parts = {"weights": self, "optimizer": self.optimizer, "scaler": self.scaler}
        return {name: part.state_dict() for name, part in parts.items()}

    def restore(self, state: dict | None, where: str) -> None:
        """Undo ``state``; ValueError if it is of another copy."""
        try:
            self.load_state_dict(state["weights"])
            self.optimizer.load_state_dict(state["optimizer"])
            if self.scaler.is_enabled() and state["scaler"]:
                self.scaler.load_state_dict(state["scaler"])
        except (TypeError, KeyError, RuntimeError, ValueError):
            raise ValueError(
                f"{where}: its copy of the model (VSD) does not fit; keep --guidance, --sd_model, "
                "--lora_model and --lora_rank as they were, or use another --expname"
            ) from None


def target(base, clean: Tensor, epsilon: Tensor, alpha_bar: Tensor) -> Tensor:
    """What the network should put out for x_t of ``clean`` and ``epsilon``."""
    a = per_view(alpha_bar, clean)
    return {
        "epsilon": lambda: epsilon,
        "v_prediction": lambda: a.sqrt() * epsilon - (1 - a).sqrt() * clean,
        "sample": lambda: clean,
    }[base.prediction_type]()
