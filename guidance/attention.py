"""Where a text is looked at: cross-attention maps of a diffusers U-Net, and how to put them back.

A map is the softmax of q k^T / sqrt(d) of one cross-attention layer, [B, pixels, tokens], averaged
over heads (Hertz et al. 2022, Prompt-to-Prompt). It needs the probabilities that fused attention
never writes down, so that the processors here are swapped in for single passes only.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel


def fast_attention(device: torch.device):
    """Plain matmuls on a CPU: there the fused backward is ten times slower in bfloat16."""
    if device.type == "cpu" and torch.is_grad_enabled():
        return sdpa_kernel(SDPBackend.MATH)
    return nullcontext()


class MapAttention:
    """A processor of diffusers that keeps its layer's probabilities; put into every layer.

    Run-time parameter, through ``cross_attention_kwargs``: ``attention_maps``, a dict by layer
    name of [B x heads, pixels, tokens] that take the place of the layer's own probabilities.
    """

    def __init__(self, name: str, kept: dict[str, Tensor]):
        self.name, self.kept = name, kept

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        *,
        attention_maps: dict[str, Tensor] | None = None,
        **others,
    ) -> Tensor:
        crosses = encoder_hidden_states is not None
        text = encoder_hidden_states if crosses else hidden_states
        query, key, value = (
            attn.head_to_batch_dim(layer(x))
            for layer, x in ((attn.to_q, hidden_states), (attn.to_k, text), (attn.to_v, text))
        )
        probabilities = attn.get_attention_scores(query, key, attention_mask)
        if crosses:
            given = (attention_maps or {}).get(self.name)
            if given is not None:
                probabilities = given.to(probabilities)
            self.kept[self.name] = probabilities
        found = attn.batch_to_head_dim(torch.bmm(probabilities, value))
        found = attn.to_out[1](attn.to_out[0](found))
        if attn.residual_connection:
            found = found + hidden_states
        return found / attn.rescale_output_factor


@contextmanager
def swap_attn_processors(unet: nn.Module, new: dict) -> Iterator[None]:
    """Inside the block the U-Net has the processors ``new``, by name; then its previous ones again.

    ``set_attn_processor`` empties the dict that it is given; ``new`` stays as it was.
    """
    before = dict(unet.attn_processors)
    try:
        unet.set_attn_processor(dict(new))
        yield
    finally:
        unet.set_attn_processor(before)


@contextmanager
def recorded_attention(unet: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Gives a dict that holds, after each pass in the block, its probabilities by layer name."""
    kept: dict[str, Tensor] = {}
    processors = {name: MapAttention(name, kept) for name in unet.attn_processors}
    with swap_attn_processors(unet, processors):
        yield kept


def token_maps(kept: dict[str, Tensor], batch: int, side: int | None = None) -> Tensor:
    """[B, tokens, side, side]: the mean over heads and all layers of one resolution.

    side: of the layers to use; None takes the finest. Square latents only.
    """
    sides = {name: round(value.shape[1] ** 0.5) for name, value in kept.items()}
    if not kept:
        raise ValueError("no attention maps: no pass has run yet")
    side = max(sides.values()) if side is None else side
    chosen = [kept[name].float() for name in kept if sides[name] == side]
    if not chosen or chosen[0].shape[1] != side * side:
        raise ValueError(f"no attention maps of {side} x {side}; there are {set(sides.values())}")
    # [B x heads, pixels, tokens] -> mean over heads [B, pixels, tokens]
    means = [value.view(batch, -1, *value.shape[1:]).mean(1) for value in chosen]
    mean = torch.stack(means).mean(0)
    return mean.transpose(1, 2).reshape(batch, -1, side, side)


def picked_tokens(words: list[str], wanted: str | None) -> list[int]:
    """Places in ``words`` (a prompt's tokens) of the comma-separated ``wanted``; None: all."""
    if not wanted:
        return list(range(len(words)))
    places = []
    for word in wanted.split(","):
        found = [n for n, token in enumerate(words) if token == word.strip().lower()]
        if not found:
            raise ValueError(
                f"--attn_tokens {word.strip()}: not in the prompt; its tokens are {' '.join(words)}"
            )
        places += found
    return places


def attention_sheet(images: Tensor, maps: Tensor, labels: list[str], side: int = 128) -> np.ndarray:
    """One row per view: the view, then each token's map over it -> uint8 [H, W, 3].

    images [V, 3, H, W] in [0, 1]; maps [V, K, s, s], each scaled to its own largest value, which
    is bright where the token is looked at; labels: K words.
    """
    from PIL import Image, ImageDraw

    views = F.interpolate(images.float().cpu(), (side, side), mode="nearest")
    maps = F.interpolate(maps.float().cpu(), (side, side), mode="bilinear", align_corners=False)
    strength = (maps / maps.amax((2, 3), keepdim=True).clamp(min=1e-12))[:, :, None]
    gray = views.mean(1, keepdim=True)[:, None]  # [V, 1, 1, side, side]
    warm = views.new_tensor([1.0, 0.55, 0.1]).view(1, 1, 3, 1, 1)
    cells = torch.cat([views[:, None], 0.35 * gray + 0.65 * strength * warm], dim=1)
    rows = cells.clamp(0, 1).permute(0, 3, 1, 4, 2).reshape(len(views) * side, -1, 3)
    sheet = np.zeros((len(views) * side + 16, rows.shape[1], 3), np.uint8)
    sheet[16:] = (rows * 255).round().to(torch.uint8).numpy()
    picture = Image.fromarray(sheet)
    draw = ImageDraw.Draw(picture)
    for number, label in enumerate(["render", *labels]):
        draw.text((number * side + 3, 2), label, fill=(255, 255, 255))
    return np.asarray(picture)
