"""Labeled pictures, and what they show of a guidance step."""

import numpy as np
import pytest
import torch

from guidance import sds
from guidance.gaussian import Gaussian
from guidance.prompts import view_word
from guidance.sheets import attention_rows, guidance_rows, view_names
from nerf.media import MIN_CELL, labeled_grid

CPU = torch.device("cpu")


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("size", [(8, 12), (MIN_CELL, 2 * MIN_CELL), (200, 130)])
def test_a_grid_holds_the_pictures_and_room_for_their_names(size):
    pictures = (noise(2, 3, *size, 3) * 255).round().to(torch.uint8).numpy()
    sheet = labeled_grid(list(pictures), ["rgb", "normal"], ["a", "b\nc", ""], "step 5")
    factor = -(-MIN_CELL // min(size))
    height, width = factor * size[0], factor * size[1]
    above, left = sheet.shape[0] - 2 * height, sheet.shape[1] - 3 * width
    assert 0 < above < MIN_CELL and 0 < left < MIN_CELL and sheet.dtype == np.uint8
    for row in range(2):
        for column in range(3):
            y, x = above + row * height, left + column * width
            seen = sheet[y : y + height : factor, x : x + width : factor]
            np.testing.assert_array_equal(seen, pictures[row, column])
    margins = [sheet[:above, :left], sheet[:above, left:], sheet[above:, :left]]
    assert all(margin.max() > 150 for margin in margins)  # title, columns, rows
    assert not sheet[:above, left + 2 * width :].any()  # the last column has no name


def test_names_that_the_font_lacks_do_no_harm():
    picture = np.zeros((4, 4, 3))
    assert labeled_grid([[picture]], ["\u4e16\u754c"], ["\U0001f600"], "\u2028").any()


def test_attention_is_bright_where_it_is():
    images, maps = noise(2, 3, 8, 8), torch.zeros(2, 1, 4, 4)
    maps[:, :, :2] = 1.0  # attention to the token in the upper half
    for row, image in zip(attention_rows(images, maps), images, strict=True):
        assert row.shape == (2, 128, 128, 3)
        np.testing.assert_array_equal(row[0, ::16, ::16], image.permute(1, 2, 0).numpy())
        assert row[1, :40, :, 0].mean() > row[1, -40:, :, 0].mean() + 0.3


def test_a_guidance_step_is_shown_as_it_is_computed():
    """Render, noisy latents, and both predictions of x0, from the noise prediction instead."""
    prior, t = Gaussian(CPU), torch.tensor([300, 800])
    images, target, other = noise(2, 3, 24, 24), noise(2, 3, 24, 24, seed=1), noise(2, 3, 24, 24)
    epsilon = torch.randn(2, 3, 24, 24, generator=torch.Generator().manual_seed(2))
    conditions = sds.Conditions(other, target, words=("front", "back"))
    recipe = sds.Recipe("sds", scale=3.0, weighting="sds", rescale=0.5)
    latents = prior.encode(images, None)
    rows = guidance_rows(prior, images, latents, t, epsilon, conditions, recipe)
    a = prior.alphas_cumprod[t]
    noisy = sds.add_noise(latents, epsilon, a)
    text = prior.predict(noisy, t, target)
    guided = sds.guide(prior.predict(noisy, t, other), text, 3.0)
    guided = sds.rescaled(guided, text, noisy, a, 0.5)
    expected = [images, *(prior.decode(x) for x in (
        noisy, sds.predict_x0(text, noisy, a), sds.predict_x0(guided, noisy, a)))]  # fmt: skip
    wanted = torch.stack(expected, 1).permute(0, 1, 3, 4, 2).numpy()
    np.testing.assert_allclose(np.stack(rows), wanted, rtol=0, atol=1e-5)


def test_views_are_named_by_noise_level_word_and_angles():
    angles = torch.tensor([0.0, 190.0]), torch.tensor([0.0, 70.0])
    assert view_names(*angles)[1] == "azimuth -170°\nelevation 70°"
    words = [view_word(0.0, 0.0), view_word(190.0, 70.0)]
    assert view_names(*angles, words, torch.tensor([5, 20])) == [
        "t 5\nfront view\nazimuth 0°\nelevation 0°",
        "t 20\noverhead view\nazimuth -170°\nelevation 70°",
    ]
