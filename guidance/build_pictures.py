"""Pictures of what guidance sees, made from the flags and the tensors of a step."""

import argparse
from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor

from guidance import sheets
from guidance.attention import picked_tokens
from guidance.build import Guide, make_recipe, shown_size
from guidance.sds import Distilled, GuidanceNoise, add_noise, resized
from guidance.stable_diffusion import StableDiffusion

# Rows of pictures, their names, the names of columns, and a title
Grid = tuple[list[np.ndarray], list[str], list[str], str]


def attention_grid(
    args: argparse.Namespace,
    guide: Guide,
    step: int,
    cameras: Any,
    distilled: Distilled,
    noise: GuidanceNoise,
    images: Tensor,
    text: Tensor,
) -> Grid:
    """``--i_attn``: each view, and where in it each word of the prompt attends to.

    images [V, 3, H, W] in [0, 1], text [V, ...]: of the step's views.
    """
    prior = guide.prior
    assert isinstance(prior, StableDiffusion), "the closed form has no words"
    words = prior.tokens(args.prompt)
    positions = picked_tokens(words, args.attn_tokens)
    noisy = add_noise(distilled.latents, noise.epsilon, prior.alphas_cumprod[distilled.t])
    maps = prior.attention(noisy, distilled.t, text)
    maps = maps[:, [position + 1 for position in positions]]  # the first token starts the text
    names = ["render", *(words[position] for position in positions)]
    views = sheets.view_names(cameras.azimuth_deg, cameras.elevation_deg)
    return sheets.attention_rows(images, maps), views, names, f"step {step}"


def guidance_grid(
    args: argparse.Namespace,
    guide: Guide,
    step: int,
    now: Mapping[str, float],
    cameras: Any,
    distilled: Distilled,
    noise: GuidanceNoise,
    images: Tensor,
    background: Tensor,
) -> Grid:
    """``--i_guidance``: each view as the model is shown it, noisy, and as it predicts it.

    now: the flags that are schedules, at this step; background [V, 3] of the views.
    """
    size = int(now["train_res"])
    shown = resized(images, shown_size(args, guide.prior, size))
    conditions = guide.conditions(cameras, size, background)
    recipe = make_recipe(args, now, progress=min(1.0, (step - 1) / args.N_iters))
    rows = sheets.guidance_rows(
        guide.prior, shown, distilled.latents, distilled.t, noise.epsilon, conditions, recipe
    )
    angles = cameras.azimuth_deg, cameras.elevation_deg
    views = sheets.view_names(*angles, conditions.words, distilled.t)
    return (
        rows,
        views,
        list(sheets.GUIDANCE_COLUMNS),
        (f"step {step}, guidance scale {recipe.scale:g}"),
    )
