"""Low-rank adapters on a frozen U-Net's attention (Hu et al. 2021, LoRA).

Each of to_q, to_k, to_v and to_out computes y = W x + lora_scale B A x with A [rank, in] normal and
B [out, rank] zero, so that a new adapter changes nothing, bit for bit. The adapters are forward
hooks: the U-Net's own modules, names and attention processors do not change, so attention slicing
and swapped processors work with them. A and B are float32 whatever the U-Net's precision.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from guidance.lora_files import Pair, read_lora

TARGETS = ("to_q", "to_k", "to_v", "to_out.0")


class Adapter(nn.Module):
    """The low-rank product B A for one linear layer."""

    def __init__(self, inputs: int, outputs: int, rank: int):
        super().__init__()
        self.a = nn.Parameter(torch.randn(rank, inputs) / rank)
        self.b = nn.Parameter(torch.zeros(outputs, rank))

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out] in float32."""
        return x.float() @ self.a.T @ self.b.T


def attention_layers(unet: nn.Module) -> dict[str, nn.Linear]:
    """The projections of every attention block by module name, in the U-Net's order."""
    return {
        name: module
        for name, module in unet.named_modules()
        if name.endswith(TARGETS) and isinstance(module, nn.Linear)
    }


class LoRA(nn.Module):
    """Adapters for all attention layers of ``unet``; they act only inside ``switched``.

    Freezes the U-Net but does not register it as a child: this module's parameters, training mode
    and state are those of the adapters alone. ValueError if rank < 1.
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
        adapters = [
            Adapter(layer.in_features, layer.out_features, rank) for layer in layers.values()
        ]
        self.adapters = nn.ModuleList(adapters)
        self._hooks = [
            layer.register_forward_hook(self._make_hook(adapter))
            for layer, adapter in zip(layers.values(), adapters, strict=True)
        ]

    def _make_hook(
        self, adapter: Adapter
    ) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor | None]:
        def add(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            if not self.lora_scale:
                return None
            return output + (self.lora_scale * adapter(inputs[0])).to(output.dtype)

        return add

    def train(self, mode: bool = True) -> "LoRA":
        """Also set requires_grad of the adapters: on in training mode, off in evaluation mode."""
        return super().train(mode).requires_grad_(mode)

    @contextmanager
    def switched(self, lora_scale: float = 1.0) -> Iterator[None]:
        """Run the U-Net with the adapters inside the block, multiplied by ``lora_scale``."""
        before, self.lora_scale = self.lora_scale, lora_scale
        try:
            yield
        finally:
            self.lora_scale = before

    def remove(self) -> None:
        """Remove the hooks, which leaves the U-Net as it was before."""
        for hook in self._hooks:
            hook.remove()

    def tensors(self) -> dict[str, Tensor]:
        """A and B of every layer, under the names that diffusers and peft use."""
        named: dict[str, Tensor] = {}
        for name, adapter in zip(self.names, self.adapters, strict=True):
            assert isinstance(adapter, Adapter)
            named[f"unet.{name}.lora_A.weight"] = adapter.a
            named[f"unet.{name}.lora_B.weight"] = adapter.b
        return named


def save_lora(path: Path, lora: LoRA) -> None:
    """Write the adapters as a safetensors file that diffusers and peft can read."""
    from safetensors.torch import save_file

    tensors = {name: value.detach().cpu().contiguous() for name, value in lora.tensors().items()}
    temporary = path.with_name(f".{path.name}.tmp")
    save_file(tensors, temporary, metadata={"format": "pt", "rank": str(lora.rank)})
    temporary.replace(path)


@torch.no_grad()
def load_lora(path: Path, lora: LoRA) -> None:
    """Load a LoRA file, in any spelling of ``guidance.lora_files``, into the adapters.

    Layers that the file lacks get B = 0, which changes nothing. ValueError if the file does not fit
    this U-Net.
    """
    pairs = read_lora(path, lora.names)
    adapters = dict(zip(lora.names, lora.adapters, strict=True))
    for name, pair in pairs.items():
        adapter = adapters[name]
        assert isinstance(adapter, Adapter)
        _check_fit(path, name, pair, adapter.b.shape[0], adapter.a.shape[1])
    ranks = sorted({len(pair.a) for pair in pairs.values()})
    if len(ranks) > 1:
        raise ValueError(f"{path}: its layers have ranks {ranks}; expected one rank for all")
    if ranks != [lora.rank]:
        raise ValueError(
            f"{path}: has rank {ranks[0]}, expected {lora.rank}; use --lora_rank {ranks[0]}"
        )
    for name, adapter in adapters.items():
        assert isinstance(adapter, Adapter)
        if name in pairs:
            adapter.a.copy_(pairs[name].a)
            adapter.b.copy_(pairs[name].b.float() * pairs[name].scale)
        else:
            adapter.b.zero_()


@torch.no_grad()
def merge_lora(path: Path, unet: nn.Module, scale: float = 1.0) -> None:
    """Add scale x alpha / rank x B A of a LoRA file to the weights of the U-Net's attention layers.

    path: in any spelling of ``guidance.lora_files``. ValueError, with nothing changed, if the file
    does not fit this U-Net.
    """
    layers = attention_layers(unet)
    pairs = read_lora(path, layers)
    for name, pair in pairs.items():
        _check_fit(path, name, pair, layers[name].out_features, layers[name].in_features)
    for name, pair in pairs.items():
        weight = layers[name].weight
        weight.copy_(weight.float() + scale * pair.scale * (pair.b.float() @ pair.a.float()))


def _check_fit(path: Path, name: str, pair: Pair, outputs: int, inputs: int) -> None:
    """ValueError unless the matrices of a file fit a layer."""
    sizes, wanted = [pair.b.shape[0], *pair.a.shape[1:]], [outputs, inputs]
    if sizes != wanted or pair.b.shape[1:] != pair.a.shape[:1]:
        raise ValueError(
            f"{path}: a LoRA of another model: {name} has A {list(pair.a.shape)} and B "
            f"{list(pair.b.shape)}, expected a layer of {wanted}; use the --sd_model that it "
            "was trained with"
        )


def lora_and_scale(text: str) -> tuple[Path, float]:
    """The file and the scale of ``FILE[:SCALE]``; ValueError if the scale is not finite."""
    name, colon, last = text.rpartition(":")
    try:
        scale = float(last) if colon else 1.0
    except ValueError:  # a colon of the file's name
        return Path(text), 1.0
    if not math.isfinite(scale):
        raise ValueError(f"--sd_lora {text}: expected FILE or FILE:SCALE with a finite scale")
    return Path(name or last), scale if colon else 1.0
