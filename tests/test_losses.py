"""The losses on colors, and the penalty on the opacities of samples."""

import pytest
import torch
from helpers import FAST_TINY, newest, random_rays, run_main

import run_nerf
from nerf.encodings import TriPlane
from nerf.field import FeatureField
from nerf.losses import PIXEL_LOSSES
from nerf.occupancy import Box, OccupancyGrid
from nerf.occupancy_renderer import OccupancyRenderer, density_of
from nerf.renderer import squared_error

BOX = Box(-torch.ones(3), torch.ones(3), 64)


def by_hand(name, difference, delta):
    """The loss of one difference of colors, as the papers have it."""
    size = abs(difference)
    if name == "mse":
        return size**2
    huber = size**2 / 2 if size < delta else delta * (size - delta / 2)
    return huber if name == "huber" else huber / delta


@pytest.mark.parametrize("name", PIXEL_LOSSES)
@pytest.mark.parametrize("delta", [0.05, 0.1, 1.0])
def test_a_loss_is_the_mean_of_its_formula(name, delta):
    torch.manual_seed(0)
    rgb, target = torch.rand(40, 3, dtype=torch.float64), torch.rand(40, 3, dtype=torch.float64)
    expected = [by_hand(name, x, delta) for x in (rgb - target).flatten().tolist()]
    found = PIXEL_LOSSES[name](rgb, target, delta)
    assert found.item() == pytest.approx(sum(expected) / len(expected), rel=1e-12)


def test_with_delta_1_the_robust_losses_are_half_of_mse():
    torch.manual_seed(1)
    rgb, target = torch.rand(40, 3), torch.rand(40, 3)
    for name in ("huber", "smooth_l1"):
        torch.testing.assert_close(
            PIXEL_LOSSES[name](rgb, target, 1.0), squared_error(rgb, target) / 2
        )


@pytest.mark.parametrize("static", [False, True])
def test_the_opacity_penalty_is_the_sum_over_a_rays_samples(static):
    torch.manual_seed(2)
    field, rays = FeatureField(TriPlane(16)), random_rays(50)
    renderer = OccupancyRenderer(
        field, OccupancyGrid(8), BOX, background=1.0, lambda_l1=0.5, early_stop=0.0,
        target_samples=8192, static_shapes=static,
    )  # fmt: skip
    renderer(rays)
    samples = renderer.grid.march(rays, BOX, None)
    sigma = density_of(field.density(samples.points))
    opacities = [0.0] * len(rays.origins)
    for ray, s, length in zip(samples.ray_indices, sigma, samples.lengths, strict=True):
        opacities[ray] += 1 - torch.exp(-s * length).item()
    expected = 0.5 * sum(opacities) / len(opacities)
    penalty = renderer.penalties()["l1"]
    assert expected > 0 and penalty.item() == pytest.approx(expected, rel=1e-4)
    penalty.backward()
    assert all(plane.grad.abs().sum() > 0 for plane in field.encoding.planes)
    assert renderer.penalties()["l1"] == 0.0  # it belongs to one forward pass


def test_the_opacity_penalty_thins_fog():
    found = []
    for weight in (0.0, 1.0):
        torch.manual_seed(3)
        renderer = OccupancyRenderer(
            FeatureField(TriPlane(16)), OccupancyGrid(8), BOX, background=1.0, lambda_l1=weight
        )
        optimizer, rays = torch.optim.Adam(renderer.parameters(), lr=1e-2), random_rays(100)
        for _ in range(20):
            optimizer.zero_grad()
            (rendered,) = renderer(rays)
            ((rendered.rgb - 1.0).square().mean() + sum(renderer.penalties().values())).backward()
            optimizer.step()
        found.append(rendered.opacity.mean().item())
    assert found[1] < 0.5 * found[0]


def test_huber_trains_and_psnr_stays_that_of_the_squared_error(data, tiny, tmp_path):
    fast = [*FAST_TINY, *tiny, "--N_iters", 5, "--i_print", 1]
    for name in ("mse", "huber"):
        done = run_main(run_nerf.main, *fast, "--loss", name, "--expname", name)
        assert done.returncode == 0, done.stderr
    tables = [
        [line.split(",") for line in (tmp_path / name / "metrics.csv").read_text().split()]
        for name in ("mse", "huber")
    ]
    loss, psnr = tables[0][0].index("loss"), tables[0][0].index("psnr")
    (mse, huber) = (table[1] for table in tables)  # the first step: the same weights and rays
    assert float(mse[psnr]) == float(huber[psnr])
    assert float(huber[loss]) < 0.5 * float(mse[loss])
    first, second = (newest(tmp_path / name)["network_fn_state_dict"] for name in ("mse", "huber"))
    assert not torch.equal(first["encoding.planes.0"], second["encoding.planes.0"])


def test_the_opacity_penalty_needs_an_occupancy_grid(tiny):
    done = run_main(run_nerf.main, *tiny, "--lambda_l1", "1e-4")
    assert done.returncode == 2 and "--lambda_l1 needs --occ_grid" in done.stderr
