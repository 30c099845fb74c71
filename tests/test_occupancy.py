"""The occupancy grid and its packed samples, against closed forms and slow loops."""

import math

import pytest
import torch
from helpers import random_rays

from nerf.occupancy import Box, Contraction, OccupancyGrid
from nerf.volume import PACKED_WEIGHTS, blend_weights, sum_per_ray


def unit_box(num_steps: int = 100) -> Box:
    return Box(torch.full((3,), -1.0), torch.full((3,), 1.0), num_steps)


def test_from_unit_inverts_to_unit():
    torch.manual_seed(0)
    box = Box(torch.tensor([-1.0, 2.0, 0.0]), torch.tensor([1.0, 5.0, 0.5]), 10)
    points = torch.rand(50, 3) * 4
    torch.testing.assert_close(box.from_unit(box.to_unit(points)), points)
    assert torch.equal(box.to_unit(box.low), torch.full((3,), -1.0))


def test_contraction_is_the_papers():
    space = Contraction(0.1, 50.0, 100, 0.01)
    points = torch.tensor([[0.3, -0.2, 0.1], [4.0, 0.0, 0.0], [0.0, 1e6, 0.0]])
    expected = torch.tensor([[0.3, -0.2, 0.1], [2 - 1 / 4, 0.0, 0.0], [0.0, 2.0, 0.0]]) / 2
    torch.testing.assert_close(space.to_unit(points), expected, rtol=1e-5, atol=1e-5)
    steps = space.t_edges.diff()
    assert (steps >= 0.02 - 1e-6).all() and steps[-1] > 10 * steps[0]


@pytest.mark.parametrize("jitter", [False, True])
def test_a_full_grid_covers_each_rays_way_through_the_box(jitter):
    rays, box, grid = random_rays(), unit_box(), OccupancyGrid(8)
    u = torch.rand(len(rays.origins), 1) if jitter else None
    samples = grid.march(rays, box, u)
    assert (samples.points.abs() <= 1 + box.step).all()
    assert (samples.ray_indices.diff() >= 0).all()
    same_ray = samples.ray_indices.diff() == 0
    assert (samples.t.diff()[same_ray] > 0).all()
    # The exact chord by the slab method; sampling may be off by a step at either end.
    inverse = 1 / rays.directions
    one, other = (-1 - rays.origins) * inverse, (1 - rays.origins) * inverse
    enter, leave = torch.minimum(one, other).amax(-1), torch.maximum(one, other).amin(-1)
    chord = ((leave - enter).clamp(min=0)) * rays.directions.norm(dim=-1)
    sums = sum_per_ray(samples.lengths, samples.ray_indices, len(rays.origins))
    assert (sums - chord).abs().max() < 1.001 * box.step


def test_samples_lie_exactly_in_the_occupied_cells():
    rays, box, grid = random_rays(), unit_box(), OccupancyGrid(8)
    every = grid.march(rays, box, None)
    torch.manual_seed(1)
    grid.carve(torch.rand(8**3) < 0.2)
    some = grid.march(rays, box, None)

    def cells(points):
        place = ((points + 1) / 2 * 8).long().clamp(0, 7)
        return (place[:, 0] * 8 + place[:, 1]) * 8 + place[:, 2]

    inside = grid.occupied[cells(every.points)]
    assert 0 < inside.sum() < len(inside)
    key = torch.stack([every.ray_indices.float(), every.t], -1)[inside]
    torch.testing.assert_close(torch.stack([some.ray_indices.float(), some.t], -1), key)


def test_march_takes_no_rays_and_an_empty_grid():
    box, grid = unit_box(), OccupancyGrid(8)
    assert len(grid.march(random_rays(0), box, None).ray_indices) == 0
    grid.carve(torch.zeros(8**3, dtype=torch.bool))
    assert len(grid.march(random_rays(20), box, None).ray_indices) == 0


def ball_density(points: torch.Tensor) -> torch.Tensor:
    return 50.0 * (points.norm(dim=-1) < 0.5).float()


def test_the_grid_finds_a_ball_and_forgets_it():
    grid, generator = OccupancyGrid(16), torch.Generator().manual_seed(0)
    for step in range(0, 256, 16):
        grid.update(ball_density, step, 0.05, generator)
    centers = grid.cell_points(torch.arange(16**3))
    certain = (centers.norm(dim=-1) < 0.4) | (centers.norm(dim=-1) > 0.65)
    assert torch.equal(grid.occupied[certain], centers[certain].norm(dim=-1) < 0.5)
    assert grid.bounds.abs().max() <= 0.625 + 1e-6  # tightened around it
    for step in range(0, 256, 16):
        for _ in range(25):
            grid.update(lambda points: torch.zeros(len(points)), step, 0.05, generator)
    # 400 decays of 0.95 leave 50 x 1e-9: below the threshold of one step.
    assert grid.fraction == 0


def test_fog_too_thin_to_matter_empties_the_grid():
    """A grid that starts from large values, or never decays, would stay full forever."""
    grid, generator = OccupancyGrid(8), torch.Generator().manual_seed(0)
    spiky = torch.rand(4096, generator=generator) * 0.05
    for step in range(0, 4000, 16):
        grid.update(lambda points: spiky[: len(points)], step, 0.02, generator)
    assert grid.fraction < 1


def slow_weights(sigma, lengths, ray_indices, num_rays):
    """One ray after another in float64 python numbers."""
    weights, optical = [], [0.0] * num_rays
    for s, d, r in zip(sigma.tolist(), lengths.tolist(), ray_indices.tolist(), strict=True):
        weights.append(math.exp(-optical[r]) * -math.expm1(-s * d))
        optical[r] += s * d
    return torch.tensor(weights)


def packed_case(seed: int = 0):
    """Rays with 0, 1 and many samples, an opaque wall among them."""
    torch.manual_seed(seed)
    counts = torch.tensor([0, 1, 7, 0, 30, 1, 12, 0])
    ray_indices = torch.repeat_interleave(torch.arange(len(counts)), counts)
    sigma = torch.rand(len(ray_indices)) * 5
    sigma[12] = 1e6
    return sigma, torch.rand(len(ray_indices)) * 0.2, ray_indices, len(counts)


@pytest.mark.parametrize("kind", PACKED_WEIGHTS)
def test_packed_weights_equal_a_slow_loop_and_the_dense_form(kind):
    sigma, lengths, ray_indices, num_rays = packed_case()
    sigma.requires_grad_(True)
    weights = PACKED_WEIGHTS[kind](sigma, lengths, ray_indices, num_rays)
    torch.testing.assert_close(
        weights, slow_weights(sigma, lengths, ray_indices, num_rays), rtol=1e-5, atol=1e-7
    )
    wanted = torch.rand(len(ray_indices))
    (gradient,) = torch.autograd.grad((weights * wanted).sum(), sigma)
    expected = torch.zeros_like(sigma)
    for number in range(num_rays):
        mine = ray_indices == number
        if mine.any():
            part = sigma.detach()[mine].requires_grad_(True)
            (blend_weights(part, lengths[mine]) * wanted[mine]).sum().backward()
            expected[mine] = part.grad
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6)
    wall = (ray_indices == ray_indices[12]) & (torch.arange(len(ray_indices)) > 12)
    assert (weights[wall] == 0).all()


@pytest.mark.parametrize("kind", PACKED_WEIGHTS)
def test_packed_weights_of_nothing_and_of_a_million(kind):
    nothing = torch.zeros(0)
    index = torch.zeros(0, dtype=torch.long)
    assert PACKED_WEIGHTS[kind](nothing, nothing, index, 0).shape == (0,)
    assert PACKED_WEIGHTS[kind](nothing, nothing, index, 3).shape == (0,)
    # 20,000 equal rays of 50 samples: the last must come out as the first.
    num_rays, each = 20_000, 50
    torch.manual_seed(0)
    one = torch.rand(each) * 20
    ray_indices = torch.arange(num_rays).repeat_interleave(each)
    lengths = torch.full((num_rays * each,), 0.01)
    weights = PACKED_WEIGHTS[kind](one.repeat(num_rays), lengths, ray_indices, num_rays)
    expected = blend_weights(one, lengths[:each])
    torch.testing.assert_close(
        weights.view(num_rays, each), expected.expand(num_rays, each), rtol=1e-5, atol=1e-6
    )


def test_sum_per_ray_leaves_empty_rays_at_zero():
    values, ray_indices = (
        torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]),
        torch.tensor([1, 1, 3]),
    )
    expected = torch.tensor([[0.0, 0.0], [4.0, 6.0], [0.0, 0.0], [5.0, 6.0], [0.0, 0.0]])
    assert torch.equal(sum_per_ray(values, ray_indices, 5), expected)
