"""Lambert's law, how often views are lit, and where cameras on orbits stand."""

import pytest
import torch

from guidance.prompts import view_word
from nerf.text3d.orbit import OrbitRanges, orbit_cameras, random_orbit_cameras
from nerf.text3d.shading import LightingSettings, draw_lighting, preview_lighting, shade


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def lighting(light, ambient, textureless=0.0, count=1):
    plain = preview_lighting(torch.tensor([light] * count), "white", ambient=ambient)
    return plain._replace(textureless=torch.full((count, 1), textureless))


def test_lamberts_law_by_hand():
    albedo, normal = torch.tensor([[0.5, 0.2, 0.8]]), torch.tensor([[0.0, 0.0, 1.0]])
    point = torch.tensor([[0.0, 0.0, 1.0]])
    above = shade(albedo, normal, point, lighting([0.0, 0.0, 3.0], 0.1))
    torch.testing.assert_close(above, albedo)  # straight light: all of it
    grazing = shade(albedo, normal, point, lighting([5.0, 0.0, 1.0], 0.1))
    torch.testing.assert_close(grazing, 0.1 * albedo)
    behind = shade(albedo, normal, point, lighting([0.0, 0.0, -3.0], 0.1))
    torch.testing.assert_close(behind, 0.1 * albedo)
    slanted = shade(albedo, normal, point, lighting([1.0, 0.0, 2.0], 0.0))
    torch.testing.assert_close(slanted, albedo * 0.5**0.5)
    assert (shade(albedo, normal, point, lighting([9.0, 0.0, 0.0], 1.0)) == albedo).all()


def test_textureless_is_white_under_the_same_light():
    normal = torch.tensor([[0.0, 0.0, 1.0]])
    albedo = torch.tensor([[0.5, 0.2, 0.8]])
    seen = shade(albedo, normal, 0 * normal, lighting([0.0, 0.0, 2.0], 0.3, textureless=1.0))
    torch.testing.assert_close(seen, torch.ones(1, 3))


def test_shares_of_shading_are_the_papers():
    cameras = torch.tensor([[0.0, 2.0, 1.0]]).expand(20000, 3)
    drawn = draw_lighting(cameras, LightingSettings(), generator(), lit=True)
    lit = drawn.ambient < 1
    # Three standard deviations of a share of 20,000 are below 0.011.
    assert lit.float().mean() == pytest.approx(0.75, abs=0.011)
    assert drawn.textureless.mean() == pytest.approx(0.375, abs=0.011)
    assert not (drawn.textureless.bool() & ~lit).any()
    far = drawn.light.norm(dim=-1) / cameras.norm(dim=-1)
    assert 0.8 <= far.min() < 0.81 and 1.49 < far.max() <= 1.5
    # Drawn around the camera, so mostly on its side.
    assert ((drawn.light * cameras).sum(-1) > 0).float().mean() > 0.9


def test_without_light_all_is_albedo():
    drawn = draw_lighting(torch.ones(50, 3), LightingSettings(), generator(), lit=False)
    assert not drawn.is_lit and drawn.textureless.sum() == 0


@pytest.mark.parametrize(
    ("background", "expected"), [("white", 1.0), ("black", 0.0), ("learned", None)]
)
def test_backgrounds(background, expected):
    settings = LightingSettings(background=background, p_random=0.0)
    drawn = draw_lighting(torch.ones(10, 3), settings, generator(), lit=False)
    assert (drawn.use_background_net == float(background == "learned")).all()
    if expected is not None:
        assert (drawn.background == expected).all()
    random = draw_lighting(torch.ones(10, 3), LightingSettings(), generator(), lit=False)
    assert len(random.background.unique(dim=0)) == 10 and random.use_background_net.sum() == 0


# ------------------------------------------------------------------------------ orbit cameras


@pytest.mark.parametrize("num_views", [1, 2, 3, 4])
def test_random_cameras_are_rotations_within_their_ranges(num_views):
    """Also for three: torch.cross without a dimension takes the wrong one there."""
    ranges = OrbitRanges(jitter_position=0.0)
    for seed in range(20):
        cameras = random_orbit_cameras(num_views, ranges, generator(seed))
        turn = cameras.c2w[:, :, :3]
        eye = torch.eye(3).expand(num_views, 3, 3)
        torch.testing.assert_close(turn.mT @ turn, eye, atol=1e-5, rtol=0)
        torch.testing.assert_close(torch.linalg.det(turn), torch.ones(num_views), atol=1e-5, rtol=0)
        radius = cameras.c2w[:, :, 3].norm(dim=-1)
        assert (radius > 1 - 1e-5).all() and (radius < 1.5 + 1e-5).all()
        assert ((cameras.elevation_deg >= -10) & (cameras.elevation_deg <= 90)).all()
        assert ((cameras.fov_deg >= 40) & (cameras.fov_deg <= 70)).all()


def test_azimuths_of_a_batch_are_spread():
    for seed in range(20):
        azimuth = random_orbit_cameras(4, OrbitRanges(), generator(seed)).azimuth_deg
        gaps = torch.cat([azimuth, azimuth[:1]]).diff() % 360
        assert (gaps < 180).all() and gaps.sum() == pytest.approx(360, abs=1e-3)


def test_settled_angles_are_where_the_cameras_stand():
    settle = OrbitRanges(
        jitter_position=0.0, settle=lambda azimuth, elevation: (0 * azimuth + 45, elevation / 2)
    )
    free = random_orbit_cameras(4, settle._replace(settle=None), generator())
    cameras = random_orbit_cameras(4, settle, generator())
    assert (cameras.azimuth_deg == 45).all()
    torch.testing.assert_close(cameras.elevation_deg, free.elevation_deg / 2)
    x, y, z = cameras.c2w[:, :, 3].unbind(-1)
    torch.testing.assert_close(x, y)
    sine = torch.sin(torch.deg2rad(cameras.elevation_deg))
    torch.testing.assert_close(z, sine * free.c2w[:, :, 3].norm(dim=-1))


def test_elevations_even_by_area_or_by_angle():
    by_area = random_orbit_cameras(20000, OrbitRanges(sphere_rate=1.0), generator()).elevation_deg
    by_angle = random_orbit_cameras(20000, OrbitRanges(sphere_rate=0.0), generator()).elevation_deg
    sine = torch.sin(torch.deg2rad(torch.tensor([-10.0, 30.0, 90.0])))
    share = ((sine[1] - sine[0]) / (sine[2] - sine[0])).item()
    assert (by_area < 30).float().mean() == pytest.approx(share, abs=0.011)
    assert (by_angle < 30).float().mean() == pytest.approx(0.4, abs=0.011)


def place(azimuth, elevation):
    one = torch.ones(1)
    return orbit_cameras(azimuth * one, elevation * one, 2 * one, 40 * one)


@pytest.mark.parametrize(
    ("azimuth", "position", "word"),
    [
        (0.0, [0, 2, 0], "front"),
        (90.0, [2, 0, 0], "right side"),
        (180.0, [0, -2, 0], "back"),
        (-90.0, [-2, 0, 0], "left side"),
    ],
)
def test_azimuths_and_their_words_agree(azimuth, position, word):
    camera = place(azimuth, 0.0)
    torch.testing.assert_close(
        camera.c2w[0, :, 3], torch.tensor(position).float(), atol=1e-6, rtol=0
    )
    assert view_word(azimuth, 0.0) == word
    # It looks at the origin, with z upwards in the picture.
    rays = camera.rays(3, 3)
    at_origin = rays.origins[4] + 2 * rays.directions[4]
    torch.testing.assert_close(at_origin, torch.zeros(3), atol=1e-6, rtol=0)
    assert rays.directions[1, 2] > 0 > rays.directions[7, 2]


def test_right_of_the_picture_is_right():
    """From the front (+y) the object's own right side (+x) is on the left of the picture."""
    rays = place(0.0, 0.0).rays(1, 3)
    assert rays.directions[0, 0] > 0 > rays.directions[2, 0]


@pytest.mark.parametrize("elevation", [90.0, -90.0])
def test_the_poles_are_no_special_case(elevation):
    at_pole, near = place(30.0, elevation), place(30.0, elevation * 0.9999)
    assert at_pole.c2w.isfinite().all()
    torch.testing.assert_close(at_pole.c2w, near.c2w, atol=1e-3, rtol=0)


def test_field_of_view_is_the_pictures_height():
    rays = place(0.0, 0.0).rays(200, 100)
    top, bottom = rays.viewdirs.view(200, 100, 3)[0, 50], rays.viewdirs.view(200, 100, 3)[-1, 50]
    angle = torch.rad2deg(torch.arccos((top * bottom).sum()))
    assert angle == pytest.approx(40, abs=0.3)
