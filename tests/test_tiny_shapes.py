"""guidance.tiny.shapes and pictures: distances, which side is which, and captions.

Cameras are compared with nerf.cameras, whose azimuth the view words count by.
"""

import re

import numpy as np
import pytest
import torch

from guidance.prompts import FINE_VIEW_WORDS, VIEW_WORDS, fine_view_word, view_word
from guidance.tiny import pictures
from guidance.tiny.shapes import (
    BOUND,
    DETAIL,
    SECOND,
    SHAPES,
    orbit_cameras,
    signed_distance,
    silhouettes,
    view_shape,
)
from nerf.cameras import orbit_path

EXACT = {"rtol": 0, "atol": 1e-6}  # float32, numbers around 1


def seen(name, azimuth, elevation=0.0, size=64, scale=1.0):
    """The View of one camera at distance 2.7."""
    one = torch.ones(1)
    c2w = orbit_cameras(azimuth * one, elevation * one, 2.7 * one)
    return view_shape(SHAPES[name], c2w, 40 * one, size, scale * one)


def center_of(mask):
    """Mean (column, row) of a mask [1, H, W], from the middle, right and up positive."""
    _, row, column = mask.nonzero().float().mean(0) - 0.5 * (mask.shape[-1] - 1)
    return column.item(), -row.item()


@pytest.mark.parametrize(
    "name, point, distance",
    [
        ("sphere", (0, 0, 0), -0.68),
        ("sphere", (0, 2, 0), 1.32),
        ("cube", (0.5, 0, 0), 0),
        ("cube", (1.5, 1.5, 0.5), 2**0.5),
        ("cube", (0, 0, 0.4), -0.1),
        ("cylinder", (0.42, 0, 0), 0),
        ("cylinder", (0, 0, 0.72), 0.1),
        ("cylinder", (1.42, 0, 1.62), 2**0.5),
        ("cone", (0, 0, 0.7), 0),
        ("cone", (0, 0, -0.7), 0.1),
        ("torus", (0, 0, 0), 0.34),
        ("torus", (0.56, 0, 0), -0.22),
        ("torus", (0, 0.56, 1.22), 1.0),
        ("pyramid", (0, 0, 0.6), 0),
        ("pyramid", (0.6, 0.3, -0.45), 0),
        ("capsule", (0, 0, 1.74), 1.0),
        ("capsule", (0.32, 0, 0.2), 0),
        ("mug", (0, 0, 0), 0.32),
        ("dumbbell", (-0.52, 0, 0), -0.32),
    ],
)
def test_distances_known_in_closed_form(name, point, distance):
    found, _ = signed_distance(name, torch.tensor([point], dtype=torch.float32))
    np.testing.assert_allclose(found.numpy(), [distance], **EXACT)


@pytest.mark.parametrize("name", sorted(SHAPES))
def test_no_distance_is_larger_than_the_way_to_the_surface(name):
    """Else a ray could step through: two points' distances differ at most by how far they are."""
    torch.manual_seed(0)
    points = 3 * torch.rand(2, 20000, 3) - 1.5
    points[1] = points[0] + 0.1 * torch.randn(20000, 3)
    here, _ = signed_distance(name, points[0])
    there, _ = signed_distance(name, points[1])
    assert ((here - there).abs() <= (points[0] - points[1]).norm(dim=-1) + 1e-5).all()


@pytest.mark.parametrize("name", sorted(SHAPES))
def test_shapes_lie_inside_their_bound_and_have_the_slots_they_name(name):
    torch.manual_seed(0)
    points = BOUND * torch.nn.functional.normalize(torch.randn(20000, 3), dim=-1)
    assert (signed_distance(name, points)[0] > 0).all()
    slots = {part.slot for part in SHAPES[name].parts}
    assert (SECOND in slots) == (SHAPES[name].second is not None)


def test_cameras_are_those_of_nerf_cameras():
    azimuth = torch.linspace(-180, 180, 13)[:-1]
    ours = orbit_cameras(azimuth, torch.full_like(azimuth, 20.0), torch.full_like(azimuth, 2.5))
    np.testing.assert_allclose(ours, orbit_path(12, 20.0, 2.5), **EXACT)


def test_a_sphere_is_as_large_as_geometry_says():
    mask = seen("sphere", 0.0, size=256).mask
    radius = np.tan(np.arcsin(0.68 / 2.7)) / np.tan(np.radians(20)) * 128
    assert mask.sum().item() == pytest.approx(np.pi * radius**2, rel=0.005)
    view = seen("sphere", 0.0, size=65)
    np.testing.assert_allclose(view.normal[0, 32, 32], [0, 1, 0], rtol=0, atol=2e-3)


def test_scale_and_yaw_of_silhouettes():
    one = torch.ones(1)
    camera = (90 * one, 0 * one, 2.7 * one, 40 * one)
    small = silhouettes("cube", *camera, size=64, scale=0.6)
    large = silhouettes("cube", *camera, size=64)
    assert (large & small).sum() == small.sum() < 0.5 * large.sum()
    # A mug turned a quarter counter-clockwise shows its handle, on +x before, towards +y.
    turned = silhouettes("mug", *camera, size=64, yaw_deg=90.0)
    assert center_of(turned)[0] > 1
    assert torch.equal(turned, seen("mug", 180.0).mask)


# ------------------------------------------------------------------------- which side is which


def test_the_mugs_handle_is_on_its_right():
    assert view_word(90, 0) == "right side"
    handle = {word: (seen("mug", a).slot == SECOND).sum() for a, word in ((90, "r"), (-90, "l"))}
    assert handle["r"] > 100 and handle["l"] == 0
    assert center_of(seen("mug", 0.0).mask)[0] < -1  # its right is left in a front view
    assert center_of(seen("mug", 180.0).mask)[0] > 1


def test_the_chairs_back_is_behind():
    """From its right a chair looks to the right of the picture, so its back is on the left."""

    def upper(view):
        mask = view.mask.clone()
        mask[:, 32:] = False
        return center_of(mask)[0]

    assert view_word(90, 0) == "right side" and upper(seen("chair", 90.0)) < -5
    assert view_word(-90, 0) == "left side" and upper(seen("chair", -90.0)) > 5
    assert abs(upper(seen("chair", 0.0))) < 1


@pytest.mark.parametrize("name", ["house", "snowman", "rocket"])
def test_details_are_in_front(name):
    count = {a: (seen(name, a).slot == DETAIL).sum() for a in (0.0, 180.0)}
    assert count[0.0] > 20 and count[180.0] == 0


def test_the_torus_has_a_hole_and_the_table_stands_on_legs():
    assert not seen("torus", 0.0, 75.0).mask[0, 30:34, 30:34].any()
    low = seen("table", 0.0).mask[0, 44]
    assert low.any() and not low[30:34].any()


# --------------------------------------------------------------------------------- captions


def drawn(count=512, seed=0, size=8):
    return pictures.draw_pictures(torch.Generator().manual_seed(seed), count, size)


def test_pictures_follow_from_their_seed():
    (first, facts), (again, same), (other, _) = drawn(64), drawn(64), drawn(64, seed=1)
    assert torch.equal(first, again) and all(map(torch.equal, facts, same))
    assert not torch.equal(first, other)


def test_view_words_are_those_of_the_camera():
    facts, camera = pictures.draw_facts(torch.Generator().manual_seed(0), 400)
    for number in range(400):
        at = camera["azimuth_deg"][number].item(), camera["elevation_deg"][number].item()
        assert VIEW_WORDS[facts.view[number]] == view_word(*at)
        if facts.fine[number] < 0:
            continue
        assert FINE_VIEW_WORDS[facts.fine[number]] == fine_view_word(*at)
        off = abs((at[0] + 22.5) % 45.0 - 22.5)
        assert off <= pictures.FINE_VIEW_FRACTION * 22.5 + 1e-3
    assert 0.7 < (facts.fine >= 0).float().mean() < 0.9
    assert camera["elevation_deg"].min() >= -15 and camera["elevation_deg"].max() <= 85
    assert camera["scale"].min() >= 0.6 and camera["scale"].max() <= 1.1
    assert len(facts.view.unique()) == len(VIEW_WORDS)


def test_captions_state_the_facts_in_known_words():
    facts, _ = pictures.draw_facts(torch.Generator().manual_seed(0), 2000)
    generator = torch.Generator().manual_seed(1)
    draws = torch.rand(2000, 3, generator=generator).tolist()
    known, empty = set(pictures.vocabulary()["words"]), 0
    for row, draw in zip(torch.stack(tuple(facts), -1).tolist(), draws, strict=True):
        text = pictures.caption(row, draw)
        words = re.findall(r"[a-z0-9]+", text.lower())
        assert set(words) <= known
        empty += not text
        if not text:
            continue
        shape, color, second, view, fine = row
        assert pictures.NAMES[shape] in words
        named = [word for word in words if word in pictures.COLORS]
        expected = [pictures.COLOR_NAMES[n] for n in (color, second) if n >= 0]
        assert [word for word in named] == expected
        view_words = re.search(r", (.*) view$", text)
        assert view_words is None or view_words[1] in (VIEW_WORDS[view], FINE_VIEW_WORDS[fine])
        assert view_words or "view" not in words
        assert ("an" in words) == bool(re.search(r"\ban [aeiou]", text))
    assert empty / 2000 == pytest.approx(pictures.DROPOUT_RATE, abs=0.03)


@pytest.mark.parametrize(
    "args, text",
    [
        (("cube", "red"), "red cube"),
        (("mushroom", "red", "white"), "red mushroom with a white stem"),
        (("tree", "green", "orange"), "green tree with an orange trunk"),
        (("table", "brown", "blue"), "brown table with blue legs"),
        (("mug", None), "mug"),
    ],
)
def test_descriptions(args, text):
    assert pictures.describe(*args) == text


def test_colors_of_a_picture_are_those_of_its_caption():
    """The hue of the pixels that are object, in pictures shaded by ambient light alone."""
    generator = torch.Generator().manual_seed(0)
    facts, _ = pictures.draw_facts(generator, 600)
    colors = pictures.draw_colors(generator, facts)
    named = torch.tensor([*pictures.COLORS.values(), (pictures.TEXTURELESS_RGB,) * 3])
    nearest = torch.cdist(colors[:, 0], named).argmin(-1)
    right = nearest == facts.color % len(named)
    assert right.float().mean() > 0.98  # jitter may take a brown to a dark red
    one = facts.second < 0
    assert torch.equal(colors[one, 0], colors[one, 1])
    assert (colors[facts.color < 0] == pictures.TEXTURELESS_RGB).all()
    background = pictures.draw_background(generator, colors)
    far = (background[:, None] - colors[:, :2]).norm(dim=-1).amin(1) > 0.35
    assert far.float().mean() > 0.99  # an object the color of its background would not be seen


def test_issue_counts():
    words = pictures.vocabulary()
    assert len(words["objects"]) >= 16 and len(words["colors"]) >= 10
