"""Low-rank adapters on a frozen U-Net's attention (Hu et al. 2021, LoRA).

Each of to_q, to_k, to_v and to_out gets y = W x + lora_scale B A x with A [rank, in] normal and
B [out, rank] zero, so that a fresh adapter changes nothing, to the bit. They hang on forward hooks:
the U-Net's own modules, names and attention processors stay as they are, and slicing, swapped
processors and this go together. A and B are float32 masters whatever the U-Net's precision.
"""

from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

TARGETS = ("to_q", "to_k", "to_v", "to_out.0")


class Adapter(nn.Module):
    """B A of one linear layer."""

    def __init__(self, inputs: int, outputs: int, rank: int):
        super().__init__()
        self.a = nn.Parameter(torch.randn(rank, inputs) / rank)
        self.b = nn.Parameter(torch.zeros(outputs, rank))

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out] in float32."""
        return x.float() @ self.a.T @ self.b.T


def attention_layers(unet: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers of every attention block by name, in the U-Net's order."""
    return {
        name: module
        for name, module in unet.named_modules()
        if name.endswith(TARGETS) and isinstance(module, nn.Linear)
    }


class LoRA(nn.Module):
    """Adapters for all attention layers of ``unet``, off until ``switched``.

    The U-Net is frozen here and never registered as a child: this module's parameters, modes and
    state are the adapters' alone.
    """

    def __init__(self, unet: nn.Module, rank: int):
        super().__init__()
        if rank < 1:
            raise ValueError(f"--lora_rank {rank}: expected at least 1")
        layers = attention_layers(unet)
        if not layers:
            raise ValueError("LoRA: the U-Net has no attention layers to adapt")
        unet.requires_grad_(False)
        self.rank, self.lora_scale, self.names = rank, 0.0, list(layers)
        self.adapters = nn.ModuleList(
            Adapter(layer.in_features, layer.out_features, rank) for layer in layers.values()
        )
        self._hooks = [
            layer.register_forward_hook(self._hook_of(adapter))
            for layer, adapter in zip(layers.values(), self.adapters, strict=True)
        ]

    def _hook_of(self, adapter: Adapter):
        def add(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            if not self.lora_scale:
                return None
            return output + (self.lora_scale * adapter(inputs[0])).to(output.dtype)

        return add

    def train(self, mode: bool = True) -> "LoRA":
        """Training mode takes gradients, evaluation mode none."""
        return super().train(mode).requires_grad_(mode)

    @contextmanager
    def switched(self, lora_scale: float = 1.0):
        """Inside the block the U-Net runs with the adapters, ``lora_scale`` times."""
        before, self.lora_scale = self.lora_scale, lora_scale
        try:
            yield
        finally:
            self.lora_scale = before

    def remove(self) -> None:
        """Take the hooks off: the U-Net is as it was."""
        for hook in self._hooks:
            hook.remove()

    def tensors(self) -> dict[str, Tensor]:
        """A and B by the names that diffusers and peft give them."""
        found = {}
        for name, adapter in zip(self.names, self.adapters, strict=True):
            found[f"unet.{name}.lora_A.weight"] = adapter.a
            found[f"unet.{name}.lora_B.weight"] = adapter.b
        return found


def save_lora(path: Path, lora: LoRA) -> None:
    """The adapters alone, as safetensors, by the names that diffusers and peft read."""
    from safetensors.torch import save_file

    tensors = {name: value.detach().cpu().contiguous() for name, value in lora.tensors().items()}
    temporary = path.with_name(f".{path.name}.tmp")
    save_file(tensors, temporary, metadata={"format": "pt", "rank": str(lora.rank)})
    temporary.replace(path)


@torch.no_grad()
def load_lora(path: Path, lora: LoRA) -> None:
    """Fill the adapters from a file of ``save_lora``; ValueError if it is not for this U-Net."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        found = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path}: cannot read it as safetensors ({error})") from None
    wanted = lora.tensors()
    odd = sorted(wanted.keys() ^ found.keys())
    if odd:
        raise ValueError(
            f"{path}: a LoRA of another model ({len(odd)} layers are in one of both only, such as "
            f"{odd[0]}); use the --sd_model that it was trained with"
        )
    for name, value in wanted.items():
        if found[name].shape != value.shape:
            raise ValueError(
                f"{path}: {name} is {list(found[name].shape)}, expected {list(value.shape)}; use "
                "the --sd_model and --lora_rank that it was trained with"
            )
    for name, value in wanted.items():
        value.copy_(found[name])
