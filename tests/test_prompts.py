"""guidance.prompts: the word for a viewpoint, at every border, and the prompts."""

import math

import pytest
import torch

from guidance.prompts import (
    FINE_VIEW_WORDS,
    VIEW_WORDS,
    ViewPrompts,
    fine_view_word,
    perp_neg_weights,
    pull_to_view_center,
    view_texts,
    view_word,
)


@pytest.mark.parametrize(
    "azimuth, word",
    [
        (0, "front"),
        (44, "front"),
        (45, "front"),
        (45.001, "right side"),
        (46, "right side"),
        (90, "right side"),
        (134, "right side"),
        (134.999, "right side"),
        (135, "back"),
        (136, "back"),
        (179, "back"),
        (180, "back"),
        (-180, "back"),
        (-179, "back"),
        (-135, "back"),
        (-134.999, "left side"),
        (-134, "left side"),
        (-90, "left side"),
        (-46, "left side"),
        (-45.001, "left side"),
        (-45, "front"),
        (-44, "front"),
    ],
)
def test_words_around_the_horizon(azimuth, word):
    for turn in (-720, -360, 0, 360, 720):
        assert view_word(azimuth + turn, 0.0) == word
    assert view_word(azimuth, 60.0) == word
    assert view_word(azimuth, -30.0) == word
    assert view_word(azimuth, 60.001) == "overhead"
    assert view_word(azimuth, 90.0) == "overhead"


def test_every_word_is_used_and_mirrored_views_swap_the_sides():
    swapped = {"left side": "right side", "right side": "left side"}
    seen = set()
    for azimuth in range(-180, 180):
        word = view_word(azimuth, 20.0)
        seen.add(word)
        assert view_word(-azimuth, 20.0) == swapped.get(word, word)
    assert seen | {"overhead"} == set(VIEW_WORDS)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_viewpoint_that_is_no_number_is_refused(bad):
    with pytest.raises(ValueError, match="expected finite numbers"):
        view_word(bad, 0.0)
    with pytest.raises(ValueError, match="expected finite numbers"):
        view_word(0.0, bad)


@pytest.mark.parametrize(
    "azimuth, direction",
    [
        (0, "front"), (22.4, "front"), (22.5, "front right"), (67.4, "front right"),
        (67.5, "right side"), (90, "right side"), (112.5, "back right"), (157.5, "back"),
        (180, "back"), (-180, "back"), (-157.6, "back"), (-157.5, "back left"),
        (-112.5, "left side"), (-90, "left side"), (-67.5, "front left"), (-22.6, "front left"),
        (-22.5, "front"),
    ],
)  # fmt: skip
def test_fine_words_name_eighths_of_the_circle(azimuth, direction):
    for turn in (-720, 0, 360):
        assert fine_view_word(azimuth + turn, 20.0) == f"{direction} raised"


@pytest.mark.parametrize(
    "elevation, height",
    [(-90, "low"), (0, "low"), (10, "low"), (10.01, "raised"), (40, "raised"), (40.01, "high"),
     (60, "high"), (60.01, "overhead"), (90, "overhead"), (90.1, "overhead")],
)  # fmt: skip
def test_fine_words_name_the_height(elevation, height):
    assert fine_view_word(0.0, elevation) == f"front {height}"
    assert (view_word(0.0, elevation) == "overhead") == (height == "overhead")


def test_every_fine_word_is_used_and_mirrored():
    swap = {"right": "left", "left": "right"}
    seen = set()
    for azimuth in range(-180, 180):
        for elevation in (0, 20, 50, 80):
            word = fine_view_word(azimuth + 0.1, elevation)
            mirrored = " ".join(swap.get(part, part) for part in word.split())
            assert fine_view_word(-azimuth - 0.1, elevation) == mirrored
            seen.add(word)
    assert seen == set(FINE_VIEW_WORDS)


def embed(texts):
    """Each text's length and its last word's, as a stand-in for an embedding [N, 1, 2]."""
    return torch.tensor([[[float(len(text)), float(hash(text) % 97)]] for text in texts])


def test_a_model_that_knows_the_fine_words_gets_them():
    coarse = view_texts("a cup", "suffix", known_views=list(VIEW_WORDS))
    assert coarse["left side"] == "a cup, left side view" and set(coarse) == set(VIEW_WORDS)
    fine = view_texts("a cup", "suffix", known_views=[*VIEW_WORDS, *FINE_VIEW_WORDS])
    assert fine["back left high"] == "a cup, back left high view"
    assert set(fine) == set(FINE_VIEW_WORDS)
    assert view_texts("a cup", "prefix")["left side"] == "side view of a cup"


def test_an_override_for_a_side_replaces_the_fine_words():
    known = [*VIEW_WORDS, *FINE_VIEW_WORDS]
    texts = view_texts("a cup", "suffix", known_views=known, overrides={"back": "B", "front": ""})
    prompts = ViewPrompts(embed, texts, dict.fromkeys(VIEW_WORDS, ""))
    azimuth = torch.tensor([180.0, 140.0, 130.0, 0.0])
    chosen = prompts.at(azimuth, torch.full((4,), 20.0)).text
    wanted = ["B", "B", "a cup, back right raised view", "a cup, front raised view"]
    assert torch.equal(chosen, embed(wanted))


def test_each_view_has_its_negative_prompt():
    negatives = {word: f"no {word}" for word in VIEW_WORDS}
    prompts = ViewPrompts(embed, view_texts("a cup", "suffix"), negatives)
    conditions = prompts.at(torch.tensor([0.0, 180.0, -90.0]), torch.tensor([20.0, 20.0, 70.0]))
    assert torch.equal(conditions.negative, embed(["no front", "no back", "no overhead"]))
    assert conditions.others == () and conditions.weights == ()


@pytest.mark.parametrize(
    "azimuth, first, second",
    [  # weights of front and side; from 90 degrees on, of side and front
        (0, 0.0, -1.574),  # all front: nothing against front, most against the side
        (89.999, -1.574, 0.0),  # all side
        (90, 0.0, -1.5735),  # the back half: against side, and against front
        (180, -0.394, -1.967),
        (-180, -0.394, -1.967),
        (45, -0.6892, -0.6892),
        (-45, -0.6892, -0.6892),
    ],
)
def test_perp_neg_weights_at_every_border(azimuth, first, second):
    assert perp_neg_weights(azimuth) == pytest.approx((first, second), abs=1e-3)
    assert perp_neg_weights(azimuth + 360) == pytest.approx(perp_neg_weights(azimuth), abs=1e-9)


def test_perp_neg_pushes_away_from_front_and_the_side_that_is_near():
    texts = view_texts("a cup", "suffix", known_views=list(VIEW_WORDS))
    none = dict.fromkeys(VIEW_WORDS, "")
    prompts = ViewPrompts(embed, texts, none, coarse=texts)
    azimuth, elevation = torch.tensor([30.0, -150.0, 30.0]), torch.tensor([20.0, 20.0, 80.0])
    conditions = prompts.at(azimuth, elevation)
    front, right, left = (texts[word] for word in ("front", "right side", "left side"))
    assert torch.equal(conditions.others[0], embed([front, left, front]))
    assert torch.equal(conditions.others[1], embed([right, front, right]))
    assert conditions.weights[0][2] == conditions.weights[1][2] == 0.0  # no Perp-Neg overhead
    assert (torch.stack(conditions.weights)[:, :2] < 0).all()


def test_viewpoints_pulled_to_the_center_keep_their_word():
    generator = torch.Generator().manual_seed(0)
    azimuth = 1080 * torch.rand(2000, generator=generator) - 540
    elevation = 100 * torch.rand(2000, generator=generator) - 15
    before = list(map(fine_view_word, azimuth.tolist(), elevation.tolist()))
    for fraction in (1.0, 0.3, 1e-6):
        near, height = pull_to_view_center(azimuth, elevation, fraction)
        assert list(map(fine_view_word, near.tolist(), height.tolist())) == before
        if fraction == 1.0:
            torch.testing.assert_close((near, height), (azimuth, elevation))
        off = (near + 22.5) % 45.0 - 22.5
        assert off.abs().max() <= 22.5 * fraction + 1e-3
    # fraction 0 in the limit: 8 directions, 4 heights
    assert len(near.round().remainder(360.0).unique()) == 8
    assert sorted(height.round(decimals=1).unique().tolist()) == [-2.5, 25.0, 50.0, 72.5]
