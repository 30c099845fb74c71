"""Cross-attention maps of a diffusers U-Net: recording them, and replacing them in a pass.

A map is softmax(q k^T / sqrt(d)) of one cross-attention layer, [B, pixels, tokens], averaged over
heads (Hertz et al. 2022, Prompt-to-Prompt): which pixels attend to which token. Fused attention
never stores these probabilities, so slower processors replace it for single passes only.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

# (whether it is cross-attention, probabilities [B x heads, pixels, tokens]) -> the ones to use
Edit = Callable[[bool, Tensor], Tensor]


def fast_attention(device: torch.device) -> AbstractContextManager[None]:
    """Unfused attention inside the block when training on a CPU; elsewhere no change.

    On a CPU, in bfloat16, the fused backward pass is ten times slower than plain matmuls.
    """
    if device.type == "cpu" and torch.is_grad_enabled():
        return sdpa_kernel(SDPBackend.MATH)
    return nullcontext()


class MapAttention:
    """A diffusers attention processor that stores its layer's cross-attention probabilities.

    name: of the layer; kept: the dict to store them in, under ``name``; edit: changes all
    probabilities, those of self-attention too. A pass can replace probabilities by
    ``cross_attention_kwargs={"attention_maps": maps}``, where maps is a dict from layer names to
    [B x heads, pixels, tokens].
    """

    def __init__(self, name: str, kept: dict[str, Tensor], edit: Edit | None = None):
        self.name, self.kept, self.edit = name, kept, edit

    def __call__(
        self,
        attn: Any,  # a diffusers Attention
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        *,
        attention_maps: dict[str, Tensor] | None = None,
        **others: Any,
    ) -> Tensor:
        is_cross = encoder_hidden_states is not None
        text = encoder_hidden_states if is_cross else hidden_states
        query, key, value = (
            attn.head_to_batch_dim(layer(x))
            for layer, x in ((attn.to_q, hidden_states), (attn.to_k, text), (attn.to_v, text))
        )
        probabilities = attn.get_attention_scores(query, key, attention_mask)
        if self.edit is not None:
            probabilities = self.edit(is_cross, probabilities)
        if is_cross:
            replacement = (attention_maps or {}).get(self.name)
            if replacement is not None:
                probabilities = replacement.to(probabilities)
            self.kept[self.name] = probabilities
        output = attn.batch_to_head_dim(torch.bmm(probabilities, value))
        output = attn.to_out[1](attn.to_out[0](output))
        if attn.residual_connection:
            output = output + hidden_states
        return output / attn.rescale_output_factor


@contextmanager
def swap_attn_processors(unet: Any, new: Mapping[str, Any]) -> Iterator[None]:
    """Give the U-Net the processors ``new``, by layer name, inside the block; restore them after.

    ``set_attn_processor`` empties its argument, so it gets a copy of ``new``.
    """
    before = dict(unet.attn_processors)
    try:
        unet.set_attn_processor(dict(new))
        yield
    finally:
        unet.set_attn_processor(before)


@contextmanager
def recorded_attention(unet: Any) -> Iterator[dict[str, Tensor]]:
    """A dict that holds, after each pass in the block, that pass's probabilities by layer name.

    Each value is [B x heads, pixels, tokens].
    """
    kept: dict[str, Tensor] = {}
    processors = {name: MapAttention(name, kept) for name in unet.attn_processors}
    with swap_attn_processors(unet, processors):
        yield kept


@contextmanager
def edited_attention(unet: Any, edit: Edit, *, self_too: bool) -> Iterator[None]:
    """Every pass in the block uses the attention probabilities that ``edit`` returns.

    self_too: edit self-attention as well as cross-attention; layers that are not edited keep their
    fused processors.
    """
    processors = {
        name: MapAttention(name, {}, edit) if self_too or "attn2" in name else processor
        for name, processor in unet.attn_processors.items()
    }
    with swap_attn_processors(unet, processors):
        yield


def token_maps(kept: dict[str, Tensor], batch: int, side: int | None = None) -> Tensor:
    """Average the maps over heads and all layers of one resolution: [B, tokens, side, side].

    kept: of ``recorded_attention``; side: the resolution, None for the finest. Square latents only.
    """
    sides = {name: round(value.shape[1] ** 0.5) for name, value in kept.items()}
    if not kept:
        raise ValueError("no attention maps were recorded; run the U-Net inside recorded_attention")
    side = max(sides.values()) if side is None else side
    chosen = [kept[name].float() for name in kept if sides[name] == side]
    if not chosen or chosen[0].shape[1] != side * side:
        raise ValueError(
            f"no attention maps of {side} x {side}; expected one of {sorted(set(sides.values()))}"
        )
    # [B x heads, pixels, tokens] -> mean over heads [B, pixels, tokens]
    means = [value.view(batch, -1, *value.shape[1:]).mean(1) for value in chosen]
    mean = torch.stack(means).mean(0)
    return mean.transpose(1, 2).reshape(batch, -1, side, side)


def picked_tokens(words: list[str], wanted: str | None) -> list[int]:
    """Positions in ``words``, a prompt's tokens, of the comma-separated ``wanted``; None: all."""
    if not wanted:
        return list(range(len(words)))
    places = []
    for word in wanted.split(","):
        found = [n for n, token in enumerate(words) if token == word.strip().lower()]
        if not found:
            raise ValueError(
                f"--attn_tokens {word.strip()}: not in the prompt, whose tokens are "
                f"{' '.join(words)}; name some of them"
            )
        places += found
    return places
