"""Pictures of what guidance sees, made from the flags and the tensors of a step."""

import argparse
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from guidance import sheets
from guidance.attention import picked_tokens
from guidance.build import Guide, make_recipe, shown_size
from guidance.sds import Distilled, GuidanceNoise, add_noise, resized
from guidance.stable_diffusion import StableDiffusion

# Rows of pictures, their names, the names of columns, and a title
Grid = tuple[list[np.ndarray], list[str], list[str], str]


class Seen(NamedTuple):
    """What a step's views were, and what guidance made of them."""

    cameras: Any  # orbit cameras, with azimuth_deg and elevation_deg [V]
    background: Tensor  # [V, 3]
    images: Tensor  # [V, 3, H, W] in [0, 1]
    text: Tensor  # [V, ...] embedded prompt of each view
    distilled: Distilled
    noise: GuidanceNoise


def attention_grid(args: argparse.Namespace, guide: Guide, step: int, seen: Seen) -> Grid:
    """``--i_attn``: each view, and where in it each word of the prompt attends to."""
    prior, cameras, distilled = guide.prior, seen.cameras, seen.distilled
    assert isinstance(prior, StableDiffusion), "the closed form has no words"
    words = prior.tokens(args.prompt)
    positions = picked_tokens(words, args.attn_tokens)
    alpha_bar = prior.alphas_cumprod[distilled.t]
    noisy = add_noise(distilled.latents, seen.noise.epsilon, alpha_bar)
    maps = prior.attention(noisy, distilled.t, seen.text)
    maps = maps[:, [position + 1 for position in positions]]  # the first token starts the text
    names = ["render", *(words[position] for position in positions)]
    views = sheets.view_names(cameras.azimuth_deg, cameras.elevation_deg)
    return sheets.attention_rows(seen.images, maps), views, names, f"step {step}"


def guidance_grid(
    args: argparse.Namespace, guide: Guide, step: int, now: Mapping[str, float], seen: Seen
) -> Grid:
    """``--i_guidance``: each view as the model is shown it, noisy, and as it predicts it.

    now: the flags that are schedules, at this step.
    """
    size, cameras, distilled = int(now["train_res"]), seen.cameras, seen.distilled
    shown = resized(seen.images, shown_size(args, guide.prior, size))
    conditions = guide.conditions(cameras, size, seen.background)
    recipe = make_recipe(args, now, progress=min(1.0, (step - 1) / args.N_iters))
    noisy = distilled.latents, distilled.t, seen.noise.epsilon
    rows = sheets.guidance_rows(guide.prior, shown, *noisy, conditions, recipe)
    angles = cameras.azimuth_deg, cameras.elevation_deg
    views = sheets.view_names(*angles, conditions.words, distilled.t)
    title = f"step {step}, guidance scale {recipe.scale:g}"
    return rows, views, list(sheets.GUIDANCE_COLUMNS), title
