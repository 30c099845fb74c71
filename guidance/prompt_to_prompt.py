"""Prompt-to-Prompt (Hertz et al. 2022): the picture of one prompt, edited by another prompt.

Pairs of latents start from the same noise. During the first steps the second one's attention
probabilities are replaced by the first one's: cross-attention token by token, which keeps where
things are, and self-attention, which keeps their layout in more detail.
"""

from difflib import SequenceMatcher

import torch
from torch import Tensor

from guidance.attention import edited_attention
from guidance.stable_diffusion import StableDiffusion

MOST_PIXELS = 32 * 32  # of self-attention maps that are replaced, as in the authors' code


def token_sources(source: list[str], target: list[str], length: int) -> Tensor:
    """For each of ``length`` token positions of the target, the source's position to take, or -1.

    source, target: the prompts' tokens; token n is at position n + 1, after the start token. Equal
    tokens go together, and so do as many replaced tokens as they replace. -1: a token that is new,
    which keeps its own map (Hertz et al. 2022, section 3.2, prompt refinement).
    """
    places = [-1] * length
    places[0] = 0  # start
    for kind, a, a_end, b, b_end in SequenceMatcher(None, source, target, False).get_opcodes():
        if kind == "equal" or (kind == "replace" and a_end - a == b_end - b):
            for n in range(b_end - b):
                places[b + n + 1] = a + n + 1
    ends = (len(source) + 1, len(target) + 1)  # the end token and the padding after it
    for n in range(length - max(ends)):
        places[ends[1] + n] = ends[0] + n
    return torch.tensor(places)


class PromptToPrompt:
    """A prior that denoises pairs: the second half of its views is the edit of the first half.

    cross_steps, self_steps: fractions of the steps, from pure noise on, during which the edit takes
    the maps of cross-attention and of self-attention. With both at 0 it is the model itself.
    new_tokens: those of the target that have no counterpart, and keep maps of their own.
    """

    def __init__(
        self,
        model: StableDiffusion,
        prompt: str,
        target: str,
        cross_steps: float,
        self_steps: float,
    ):
        self.model = model
        self.alphas_cumprod, self.prediction_type = model.alphas_cumprod, model.prediction_type
        self.cross_steps, self.self_steps = cross_steps, self_steps
        length = model.embed([target]).shape[1]
        words = model.tokens(target)
        self.sources = token_sources(model.tokens(prompt), words, length)
        self.new_tokens = [w for w, n in zip(words, self.sources[1:], strict=False) if n < 0]

    def encode(self, images: Tensor, noise: Tensor | None) -> Tensor:
        """The model's own."""
        return self.model.encode(images, noise)

    def predict(self, noisy: Tensor, t: Tensor, embeddings: Tensor) -> Tensor:
        """The U-Net's raw output; rows: negative of A, of B, prompt A, prompt B, each n views."""
        done = 1 - (t[0].item() + 1) / len(self.alphas_cumprod) + 1e-6  # of rounding
        cross, layout = done < self.cross_steps, done < self.self_steps
        if not (cross or layout):
            return self.model.predict(noisy, t, embeddings)
        sources = self.sources.to(noisy.device)

        def edit(is_cross: bool, probabilities: Tensor) -> Tensor:
            *others, first, second = probabilities.chunk(4)
            if is_cross and cross:
                taken = first[..., sources.clamp(min=0)]
                second = torch.where(sources >= 0, taken, second)
            elif not is_cross and layout and first.shape[1] <= MOST_PIXELS:
                second = first
            return torch.cat([*others, first, second])

        with edited_attention(self.model.unet, edit, self_too=layout):
            return self.model.predict(noisy, t, embeddings)
