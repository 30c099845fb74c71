"""nerf.occupancy_renderer: culling, early stopping and resampling against all samples."""

import pytest
import torch
from helpers import random_rays

from nerf.encodings import TriPlane
from nerf.field import FeatureField
from nerf.occupancy import Box, OccupancyGrid
from nerf.occupancy_renderer import RESAMPLE_AFTER, OccupancyRenderer
from nerf.volume import scale_gradient


class Ball(torch.nn.Module):
    """Density exp(raw - 3), high inside radius 0.5 and low outside; raw color is the position."""

    def __init__(self, inside: float):
        super().__init__()
        self.inside = torch.nn.Parameter(torch.tensor(inside))
        self.tint = torch.nn.Parameter(torch.tensor(2.0))

    def density(self, points):
        return torch.where(points.norm(dim=-1) < 0.5, self.inside, self.inside - 9.0)

    def forward(self, points, viewdirs, ray_indices):
        return self.density(points), points * self.tint


def make(field, **options) -> OccupancyRenderer:
    torch.manual_seed(0)
    space = Box(torch.full((3,), -1.0), torch.full((3,), 1.0), 100)
    return OccupancyRenderer(field, OccupancyGrid(16), space, background=1.0, **options)


def learn(renderer, rays):
    """The rendered rays and the gradient of a loss on them."""
    (rendered,) = renderer(rays)
    loss = (rendered.rgb - 0.3).square().mean()
    return rendered, torch.autograd.grad(loss, list(renderer.field.parameters()))


def test_samples_behind_a_surface_change_neither_color_nor_gradient():
    rays = random_rays(300)
    every, seen = make(Ball(8.0), early_stop=0.0), make(Ball(8.0), early_stop=1e-3)
    (expected, slopes), (found, own) = learn(every, rays), learn(seen, rays)
    assert 0 < seen.batch_samples < 0.9 * every.batch_samples
    assert (
        found.rgb - expected.rgb
    ).abs().max() < 2e-3  # twice the transmittance at which culling starts
    for a, b in zip(own, slopes, strict=True):
        torch.testing.assert_close(a, b, rtol=0.02, atol=1e-6)


@pytest.mark.parametrize("composite", ["cumsum", "padded"])
def test_rendering_in_rounds_equals_the_forward_of_training(composite):
    rays = random_rays(300)
    torch.manual_seed(1)
    for field in (Ball(5.0), FeatureField(TriPlane(16))):
        renderer = make(field, early_stop=0.0, composite=composite)
        with torch.no_grad():
            (expected,) = renderer(rays)
        for a, b in zip(renderer.render(rays), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


def test_rays_without_samples_have_the_background_color_and_keep_every_gradient():
    renderer, rays = make(Ball(5.0)), random_rays(20)
    renderer.grid.carve(torch.zeros(16**3, dtype=torch.bool))
    rendered, slopes = learn(renderer, rays)
    assert torch.equal(rendered.rgb, torch.ones(20, 3)) and not rendered.opacity.any()
    assert all(torch.equal(slope, torch.zeros_like(slope)) for slope in slopes)
    assert torch.equal(renderer.render(rays).rgb, torch.ones(20, 3))


def test_the_penalty_is_the_mean_squared_step_between_neighbors():
    field = FeatureField(TriPlane(16, channels=1))
    for plane in field.encoding.planes:  # rows rise by 2 each, columns by 3
        size = plane.shape[-1]
        ramp = 2.0 * torch.arange(size)[:, None] + 3.0 * torch.arange(size)
        plane.data.copy_(ramp.expand_as(plane))
    assert make(field, lambda_tv=0.1).penalties()["tv"].item() == pytest.approx(0.1 * 3 * (4 + 9))
    assert make(field).penalties() == {}


def test_near_scaling_leaves_values_and_scales_gradients_by_distance_squared():
    factor = torch.tensor([0.25, 1.0])
    values = torch.tensor([3.0, -2.0], requires_grad=True)
    scaled = scale_gradient(values, factor)
    assert torch.equal(scaled, values)
    (slope,) = torch.autograd.grad(scaled.sum(), values)
    assert torch.equal(slope, factor)
    rays = random_rays(50)  # they start at distance 4 from the center, so 3.5 from the ball
    slopes = []
    for distance in (0.0, 1.0, 8.0):
        renderer = make(Ball(2.0), near_scaling=distance)
        (rendered,) = renderer(rays)
        slopes += torch.autograd.grad(rendered.opacity.sum(), renderer.field.inside)
    assert slopes[0] > 0 and slopes[1] == slopes[0]
    assert (3.4 / 8) ** 2 < slopes[2] / slopes[0] < (4.6 / 8) ** 2


def test_smooth_planes_are_planes_blurred_beforehand():
    sharp, smooth = TriPlane(16), TriPlane(16, smooth=True)
    kernel = torch.tensor([0.25, 0.5, 0.25])
    for plane, own in zip(sharp.planes, smooth.planes, strict=True):
        wide = torch.nn.functional.pad(own.detach(), (1, 1, 1, 1), mode="replicate")
        windows = wide.unfold(-2, 3, 1).unfold(-2, 3, 1)  # [3, C, H, W, 3, 3]
        plane.data = torch.einsum("pchwab,a,b->pchw", windows, kernel, kernel)
    points = torch.rand(50, 3) * 2 - 1
    torch.testing.assert_close(smooth(points), sharp(points), rtol=1e-5, atol=1e-5)


def test_resampled_samples_find_a_surface_that_marching_smears():
    """The depth of an opaque ball, with marching steps of more than a quarter of its radius."""
    rays = random_rays(400)
    scale = rays.directions.norm(dim=-1)
    along = -(rays.origins * rays.directions).sum(-1) / scale
    inside = 0.25 - (rays.origins.square().sum(-1) - along**2)  # half a chord, squared
    hit, exact = inside > 0.02, (along - inside.clamp(min=0).sqrt()) / scale
    space, errors = Box(torch.full((3,), -1.0), torch.full((3,), 1.0), 24), []  # steps of 0.14
    for resample in (0, 32):
        renderer = OccupancyRenderer(
            Ball(9.0), OccupancyGrid(16), space, background=1.0, resample=resample
        )
        rendered = renderer.render(rays)
        assert hit.sum() > 20 and (rendered.opacity[hit] > 0.99).all()
        errors.append((rendered.depth - exact)[hit].abs().mean() * scale.mean())
    assert errors[0] > 0.03 and errors[1] < errors[0] / 3


def test_resampled_samples_train_the_field_and_have_the_given_number():
    rays = random_rays(50)
    renderer = make(FeatureField(TriPlane(16)), resample=12)
    noise = renderer.draw_noise(50, torch.Generator().manual_seed(0))
    (rendered,) = renderer(rays, noise)
    assert renderer.batch_samples % 12 == 0 and 0 < renderer.batch_samples <= 600
    rendered.rgb.sum().backward()
    renderer.begin_step(RESAMPLE_AFTER - 1, torch.Generator().manual_seed(0))
    renderer(rays, noise)
    assert renderer.batch_samples > 600  # the marched samples
    renderer.begin_step(RESAMPLE_AFTER, torch.Generator().manual_seed(0))
    renderer(rays, noise)
    assert renderer.batch_samples <= 600
    assert all(parameter.grad.abs().sum() > 0 for parameter in renderer.field.parameters())
