"""Pictures of what guidance sees: attention to each word, and one step of a guided prediction.

All are rows of pictures [K, H, W, 3] in [0, 1], a row for each view, and the names of columns.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from guidance.gaussian import Gaussian
from guidance.schedule import add_noise, to_x0
from guidance.sds import Conditions, Recipe, Scores, guided, rescaled_x0
from guidance.stable_diffusion import StableDiffusion

CELL = 128  # pixels per side of a picture of ``attention_rows``
GUIDANCE_COLUMNS = ("render", "noisy", "x0 (text only)", "x0 (guided)")


def attention_rows(images: Tensor, maps: Tensor) -> list[np.ndarray]:
    """Each view, then each token's map over it, CELL pixels a side.

    images [V, 3, H, W] in [0, 1]; maps [V, K, s, s], each divided by its own maximum: bright means
    much attention.
    """
    size = (CELL, CELL)
    shown = F.interpolate(images.float().cpu(), size, mode="nearest")
    maps = F.interpolate(maps.float().cpu(), size, mode="bilinear", align_corners=False)
    strength = (maps / maps.amax((2, 3), keepdim=True).clamp(min=1e-12))[:, :, None]
    gray = shown.mean(1, keepdim=True)[:, None]  # [V, 1, 1, side, side]
    warm = shown.new_tensor([1.0, 0.55, 0.1]).view(1, 1, 3, 1, 1)
    return _pictures(torch.cat([shown[:, None], 0.35 * gray + 0.65 * strength * warm], dim=1))


def guidance_rows(
    prior: StableDiffusion | Gaussian,
    images: Tensor,
    latents: Tensor,
    t: Tensor,
    epsilon: Tensor,
    conditions: Conditions,
    recipe: Recipe,
) -> list[np.ndarray]:
    """A guidance step of each view, with GUIDANCE_COLUMNS.

    The render as the prior is shown it (images [V, 3, H, W]), its noisy latents, and the clean
    image that one step predicts from them, of the text alone and guided. latents, epsilon
    [V, C, h, w] and t [V]: of the step.
    """
    rows = []
    for view in range(len(images)):  # one by one: a step's memory may be all there is
        part = slice(view, view + 1)
        step = (latents[part], t[part], epsilon[part], conditions.part(part))
        rows.append(torch.cat([images[part].float(), *_predictions(prior, *step, recipe)]))
    return _pictures(torch.stack(rows))


def view_names(
    azimuth_deg: Tensor, elevation_deg: Tensor, words: Sequence[str] = (), t: Tensor | None = None
) -> list[str]:
    """What is written beside views [V]: noise level, view word and angles, those that are given."""
    names = []
    for view, (azimuth, elevation) in enumerate(
        zip(azimuth_deg.tolist(), elevation_deg.tolist(), strict=True)
    ):
        lines = [] if t is None else [f"t {int(t[view])}"]
        lines += [f"{words[view]} view"] if words else []
        lines += [f"azimuth {(azimuth + 180) % 360 - 180:.0f}°", f"elevation {elevation:.0f}°"]
        names.append("\n".join(lines))
    return names


@torch.no_grad()
def _predictions(
    prior: StableDiffusion | Gaussian,
    latents: Tensor,
    t: Tensor,
    epsilon: Tensor,
    conditions: Conditions,
    recipe: Recipe,
) -> tuple[Tensor, Tensor, Tensor]:
    """Noisy, predicted from the text, and guided: images [1, 3, H, W] of one view's latents."""
    alpha_bar = prior.alphas_cumprod[t]
    noisy = add_noise(latents, epsilon, alpha_bar)
    inputs = [conditions.negative, conditions.text, *conditions.others]
    outputs = [prior.predict(noisy, t, condition) for condition in inputs]
    # In x0 the guidance is the same as in the noise, and no noise level divides by zero.
    negative, text, *others = (
        to_x0(output.float(), noisy, alpha_bar, prior.prediction_type) for output in outputs
    )
    scores = Scores(epsilon, negative, text, tuple(others), conditions.weights)
    x0 = guided(scores, recipe.scale)
    if recipe.rescale:
        x0 = rescaled_x0(x0, text, recipe.rescale)
    noisy_image, text_image, guided_image = (prior.decode(each) for each in (noisy, text, x0))
    return noisy_image, text_image, guided_image


def _pictures(cells: Tensor) -> list[np.ndarray]:
    """Images [V, K, 3, H, W] as rows of pictures [K, H, W, 3] in [0, 1]."""
    return list(cells.float().clamp(0, 1).permute(0, 1, 3, 4, 2).cpu().numpy())
