"""guidance.prompts: the word for a viewpoint, at every border."""

import math

import pytest

from guidance.prompts import VIEW_WORDS, view_word


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
    with pytest.raises(ValueError, match="expected numbers"):
        view_word(bad, 0.0)
    with pytest.raises(ValueError, match="expected numbers"):
        view_word(0.0, bad)
