"""One object in a cube: against a ball that is known exactly, and the losses on shape."""

import math

import pytest
import torch
from helpers import BALL_RADIUS, BALL_SHARPNESS, Ball, ball_renderer
from torch import nn

from nerf import build
from nerf.encodings import TriPlane
from nerf.field import FeatureField
from nerf.flags import dreamfusion as dream_flags
from nerf.text3d import losses
from nerf.text3d.orbit import orbit_cameras
from nerf.text3d.particles import Particles
from nerf.text3d.shading import preview_lighting


def camera(azimuth=0.0, elevation=0.0, fov=40.0):
    one = torch.ones(1)
    return orbit_cameras(azimuth * one, elevation * one, 3.0 * one, fov * one)


def lighting(cameras, num_pixels, ambient=1.0, background="white"):
    plain = preview_lighting(cameras.c2w[:, :, 3], background, ambient=ambient)
    return plain.per_pixel(num_pixels)


def picture(module, size=33, ambient=1.0, background="white", **place):
    cameras = camera(**place)
    with torch.no_grad():
        return module(cameras.rays(size, size), lighting(cameras, size * size, ambient, background))


def test_a_ball_looks_like_a_ball():
    size = 65
    seen = picture(ball_renderer(), size)
    silhouette = (seen.opacity > 0.5).float().mean().item()
    # A ball of radius r at distance d covers a disc of radius f r / sqrt(d^2 - r^2).
    focal = 0.5 / math.tan(math.radians(20))
    disc = math.pi * (focal * BALL_RADIUS / math.sqrt(9 - BALL_RADIUS**2)) ** 2
    assert silhouette == pytest.approx(disc, rel=0.03)  # half opaque a little inside
    middle = size * size // 2
    assert seen.opacity[middle] == pytest.approx(1, abs=1e-3)
    assert seen.depth[middle] == pytest.approx(3 - BALL_RADIUS, abs=0.03)
    torch.testing.assert_close(seen.rgb[0], torch.ones(3))  # the corner is background
    assert seen.depth[0] == 0 and seen.opacity[0] < 1e-4
    red = seen.rgb.view(size, size, 3)[size // 2, :, 0]
    # From the front +x is on the left of the picture.
    assert red[size // 2 - 10] > red[size // 2] > red[size // 2 + 10]


@pytest.mark.parametrize("kind", ["analytic", "fd"])
@pytest.mark.parametrize("place", [{"azimuth": 0.0}, {"azimuth": 130.0, "elevation": 50.0}])
def test_normals_of_a_ball_point_outwards(kind, place):
    seen = picture(ball_renderer(normals=kind), ambient=0.0, **place)
    rays = camera(**place).rays(33, 33)
    solid = seen.opacity > 0.99
    points = (rays.origins + seen.depth[:, None] * rays.directions)[solid]
    normal = nn.functional.normalize(seen.normal[solid], dim=-1)
    cosine = (normal * nn.functional.normalize(points, dim=-1)).sum(-1)
    # Differences over half a cell of a density with a kink are 10 to 25 degrees off at most.
    least, mean = {"analytic": (0.999, 0.999), "fd": (0.9, 0.97)}[kind]
    assert cosine.min() > least and cosine.mean() > mean
    assert seen.backfacing.max() < {"analytic": 0.02, "fd": 0.15}[kind]
    assert seen.normal[0].abs().max() < 1e-3


def test_light_follows_lamberts_law():
    """The light at the camera meets the middle of the ball head-on, its edge at right angles."""
    lit, plain = picture(ball_renderer(), ambient=0.2), picture(ball_renderer())
    share = (lit.rgb / plain.rgb)[:, 1].view(33, 33)
    assert share[16, 16] == pytest.approx(1.0, abs=0.01)
    inside = (plain.opacity > 0.99).view(33, 33)[16].nonzero()
    assert 0.2 < share[16, inside.min()] < 0.65
    assert (plain.rgb[0] == lit.rgb[0]).all()


def test_albedo_alone_computes_no_normals():
    assert picture(ball_renderer()).normal.abs().max() == 0


def test_culling_occluded_samples_changes_nothing():
    whole, culled = ball_renderer(early_stop=0.0), ball_renderer(early_stop=1e-3)
    torch.testing.assert_close(picture(whole).rgb, picture(culled).rgb, atol=2e-3, rtol=0)
    assert culled.batch_samples < 0.7 * whole.batch_samples


def test_background_network_is_used_only_where_lighting_selects_it():
    module = ball_renderer(learned_background=True)
    plain, learned = picture(module), picture(module, background="learned")
    assert (plain.rgb[0] == 1).all() and (learned.rgb[0] != 1).any()
    middle = 33 * 33 // 2
    torch.testing.assert_close(plain.rgb[middle], learned.rgb[middle], atol=1e-3, rtol=0)


def test_an_empty_grid_shows_background_and_still_has_a_gradient_path():
    module = ball_renderer()
    module.grid.occupied.zero_()
    cameras = camera()
    seen = module(cameras.rays(9, 9), lighting(cameras, 81, ambient=0.1))
    assert (seen.rgb == 1).all() and (seen.opacity == 0).all()
    assert all(member.isfinite().all() for member in seen)
    seen.rgb.sum().backward()  # zero gradients, but no error


def test_the_first_picture_is_a_blob_in_the_middle():
    """Corner rays start empty: a cube full of fog is how text to 3D most often collapses."""
    for field in ("mlp", "triplane", "hashgrid"):
        flags = ["--prompt", "x", "--field", field, "--grid_res", "32"]
        args = dream_flags.parse(flags)
        torch.manual_seed(0)
        module = build.object_renderer(args)
        seen = picture(module, fov=60.0)
        assert seen.opacity[0] < 0.05, field
        assert seen.opacity[33 * 33 // 2] > 0.5, field


@pytest.mark.parametrize("field", ["mlp", "triplane", "hashgrid"])
def test_shading_trains_the_density(field):
    """Through the normals: with white albedo nothing else can change."""
    flags = ["--prompt", "x", "--field", field, "--grid_res", "32"]
    args = dream_flags.parse(flags)
    torch.manual_seed(0)
    module = build.object_renderer(args)
    cameras = camera()
    white = lighting(cameras, 256, ambient=0.0)
    white = white._replace(textureless=torch.ones_like(white.textureless))
    seen = module(cameras.rays(16, 16), white)
    seen.rgb.sum().backward()
    gradients = [p.grad.abs().sum() for p in module.field.parameters() if p.grad is not None]
    assert torch.stack(gradients).isfinite().all() and sum(gradients) > 0


def test_a_checkpoint_gives_the_same_picture():
    flags = ["--prompt", "x", "--background", "learned"]
    args = dream_flags.parse(flags)
    torch.manual_seed(0)
    first = build.object_renderer(args)
    torch.manual_seed(1)
    second = build.object_renderer(args)
    first.begin_step(0, torch.Generator().manual_seed(0))
    state = first.checkpoint_state()
    second.load_checkpoint_state(
        state, lambda module, state, where: module.load_state_dict(state), ""
    )
    assert (
        picture(first, background="learned").rgb == picture(second, background="learned").rgb
    ).all()


def test_surface_density_is_that_where_transmittance_is_a_half():
    """The ball's density rises by s = BALL_SHARPNESS per unit inwards: transmittance is 1/2 at the
    depth x with s x^2 / 2 = ln 2, where the density is s x."""
    found = ball_renderer(num_steps=1024).surface_density(camera(fov=4.0).rays(8, 8))
    assert len(found) == 64
    expected = math.sqrt(2 * BALL_SHARPNESS * math.log(2))
    assert found.median() == pytest.approx(expected, rel=0.08)


# ------------------------------------------------------------------------------------- losses


def test_shape_losses_by_hand():
    half, ends = torch.full((7,), 0.5), torch.tensor([0.0, 1.0])
    assert losses.entropy_loss(half) == pytest.approx(math.log(2))
    assert losses.entropy_loss(ends) < 0.01
    assert losses.opacity_loss(ends) == pytest.approx((0.1 + math.sqrt(1.01)) / 2)
    assert losses.orientation_loss(torch.tensor([0.0, 0.5])) == pytest.approx(0.25)
    assert losses.spread_loss(torch.tensor([4.0, 2.0]), torch.tensor([0.0, 1.0])) == pytest.approx(
        1
    )


def test_total_variation_of_particles_is_that_of_the_current_member():
    members = []
    for slope in (0.0, 3.0):
        field = FeatureField(TriPlane(16, channels=1), use_viewdirs=False)
        for plane in field.encoding.planes:
            plane.data.copy_((slope * torch.arange(plane.shape[-1])).expand_as(plane))
        members.append(ball_renderer(field))
    particles = Particles(members)
    assert losses.total_variation(particles) == 0
    particles.current = 1
    assert losses.total_variation(particles).item() == pytest.approx(3 * 9)
    assert losses.total_variation(members[1]).item() == pytest.approx(3 * 9)


def test_shape_losses_do_not_depend_on_the_number_of_rays():
    opacity = torch.rand(50, generator=torch.Generator().manual_seed(0))
    for loss in (losses.opacity_loss, losses.entropy_loss, losses.orientation_loss):
        torch.testing.assert_close(loss(opacity), loss(opacity.repeat(4)))


def test_entropy_is_finite_where_opacity_is_exact():
    opacity = torch.tensor([0.0, 1.0], requires_grad=True)
    losses.entropy_loss(opacity).backward()
    assert opacity.grad.isfinite().all()


def test_spread_is_the_variance_of_depth():
    """A thin shell has none; fog over a length L has L^2 / 12 in the limit of no opacity."""

    class Fog(Ball):
        def density(self, points):
            return torch.full_like(points[:, 0], -7.0)  # softplus: 9e-4 per unit

    module = ball_renderer(Fog(), num_steps=512)
    rays = camera().rays(1, 1)
    with torch.no_grad():
        seen = module(rays, lighting(camera(), 1))
    assert seen.spread[0] == pytest.approx(4 / 12, rel=0.01)  # the cube is 2 deep
    assert picture(ball_renderer()).spread[33 * 33 // 2] < 2e-3
