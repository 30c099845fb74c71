"""nerf.volume: sampling along a ray and blending, against closed forms and slow references."""

import math

import pytest
import torch

from nerf.volume import (
    blend_weights,
    composite,
    disparity,
    importance_resample_packed,
    interval_lengths,
    sample_pdf,
    stratified_t,
)

ROUNDING = {"rtol": 0, "atol": 1e-5}  # float32, numbers of order 1


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def bounds(num_rays):
    near = 0.5 + torch.rand(num_rays, 1, generator=generator(1))
    return near, near + 0.5 + torch.rand(num_rays, 1, generator=generator(2))


# -------------------------------------------------------------------------------- stratified_t


@pytest.mark.parametrize("lindisp", [False, True])
def test_samples_ascend_one_per_bin_within_bounds(lindisp):
    near, far = bounds(200)
    bins = stratified_t(near, far, 16, lindisp=lindisp)
    middle = 0.5 * (bins[:, 1:] + bins[:, :-1])
    for u in (torch.rand(200, 16, generator=generator(3)), torch.zeros(200, 16)):
        t = stratified_t(near, far, 16, u=u, lindisp=lindisp)
        assert (t[:, 1:] >= t[:, :-1]).all()
        assert (t >= near - 1e-6).all() and (t <= far + 1e-6).all()  # float32, up to 2
        # The bins meet half-way between neighbors: exactly one sample lies in each.
        assert (t[:, 1:] >= middle - 1e-6).all() and (t[:, :-1] <= middle + 1e-6).all()


def test_jitter_is_uniform_within_its_bin():
    near, far = torch.zeros(20000, 1), torch.ones(20000, 1)
    t = stratified_t(near, far, 4, u=torch.rand(20000, 4, generator=generator(4)))
    assert t.mean(0).tolist() == pytest.approx([1 / 12, 1 / 3, 2 / 3, 11 / 12], abs=5e-3)
    second = t[:, 1]  # uniform in [1/6, 1/2]: deviation width / sqrt(12)
    assert second.std().item() == pytest.approx(1 / 3 / math.sqrt(12), abs=2e-3)


def test_without_noise_bins_are_even_and_reach_both_ends():
    t = stratified_t(torch.tensor([[2.0]]), torch.tensor([[6.0]]), 5)
    torch.testing.assert_close(t, torch.tensor([[2.0, 3.0, 4.0, 5.0, 6.0]]), **ROUNDING)


def test_lindisp_is_even_in_inverse_distance():
    near, far = bounds(50)
    t = stratified_t(near, far, 9, lindisp=True)
    steps = (1 / t).diff(dim=-1)
    torch.testing.assert_close(steps, steps[:, :1].expand_as(steps), **ROUNDING)
    torch.testing.assert_close(t[:, [0, -1]], torch.cat([near, far], -1), **ROUNDING)


# ----------------------------------------------------------------------------------- sample_pdf


def test_uniform_weights_make_the_identity_map():
    edges = torch.linspace(0, 1, 11).expand(3, 11)
    u = torch.rand(3, 500, generator=generator(5))
    torch.testing.assert_close(sample_pdf(edges, torch.ones(3, 10), 500, u), u, **ROUNDING)


def test_zero_weights_spread_evenly_over_the_bins():
    edges = torch.tensor([[0.0, 1.0, 3.0, 7.0]])
    found = sample_pdf(edges, torch.zeros(1, 3), 7)
    expected = torch.tensor([[0.0, 0.5, 1.0, 2.0, 3.0, 5.0, 7.0]])
    torch.testing.assert_close(found, expected, **ROUNDING)


def test_many_samples_follow_the_density():
    weights = torch.tensor([[0.1, 0.0, 2.0, 0.5, 0.7]])
    edges = torch.tensor([[0.0, 0.5, 0.6, 1.0, 2.0, 2.2]])
    count = 200000
    u = torch.rand(1, count, generator=generator(6))
    samples = sample_pdf(edges, weights, count, u)[0]
    found = torch.histogram(samples, edges[0]).hist / count
    expected = weights[0] / weights.sum()
    # Five deviations of a binomial count, and the 1e-5 added to the weights.
    tolerance = 5 * (expected * (1 - expected) / count).sqrt() + 2e-5
    assert ((found - expected).abs() <= tolerance).all()
    # Within a bin the density is constant: the mean sample is the bin's midpoint.
    inside = samples[(samples > 0.6) & (samples < 1.0)]
    assert inside.mean().item() == pytest.approx(0.8, abs=2e-3)


def test_samples_stay_within_the_edges_and_ascend_with_u():
    edges = torch.rand(100, 9, generator=generator(7)).sort(-1).values
    weights = 10 ** (12 * torch.rand(100, 8, generator=generator(8)) - 10)
    weights[:20] = 0
    weights[20:40, 3:] = 0
    for u in (None, torch.linspace(0, 1, 33).expand(100, 33).contiguous()):
        samples = sample_pdf(edges, weights, 33, u)
        assert samples.shape == (100, 33) and samples.isfinite().all()
        assert (samples >= edges[:, :1] - 1e-6).all() and (samples <= edges[:, -1:] + 1e-6).all()
        assert (samples.diff(dim=-1) >= -1e-6).all()


# -------------------------------------------------------------------------------- blend_weights


def slow_weights(sigma, lengths):
    """NeRF eq. 3, term by term."""
    rows = []
    for i in range(sigma.shape[0]):
        row = []
        for j in range(sigma.shape[1]):
            before = sigma.new_zeros(())
            for k in range(j):
                before = before + sigma[i, k] * lengths[i, k]
            row.append(torch.exp(-before) * (1 - torch.exp(-sigma[i, j] * lengths[i, j])))
        rows.append(torch.stack(row))
    return torch.stack(rows)


def test_weights_and_gradient_equal_the_slow_reference():
    sigma = (3 * torch.rand(5, 7, generator=generator(9))).double().requires_grad_()
    lengths = torch.rand(5, 7, generator=generator(10)).double().requires_grad_()
    along = torch.randn(5, 7, generator=generator(11)).double()
    fast, slow = blend_weights(sigma, lengths), slow_weights(sigma, lengths)
    torch.testing.assert_close(fast, slow, rtol=0, atol=1e-13)  # float64
    for a, b in zip(
        torch.autograd.grad((fast * along).sum(), (sigma, lengths)),
        torch.autograd.grad((slow * along).sum(), (sigma, lengths)),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-13)


@pytest.mark.parametrize("density", [1e-4, 0.3, 5.0])
def test_homogeneous_medium_follows_beer_lamberts_law(density):
    lengths = torch.rand(1, 40, generator=generator(12))  # any partition gives the same sum
    opacity = blend_weights(torch.full((1, 40), density), lengths).sum()
    expected = -math.expm1(-density * lengths.double().sum().item())
    assert opacity.item() == pytest.approx(expected, rel=1e-5)  # float32 over 40 terms


def test_empty_ray_has_no_weights():
    lengths = interval_lengths(torch.linspace(2, 6, 8)[None], torch.tensor([[0.0, 0.0, -1.0]]))
    assert (blend_weights(torch.zeros(1, 8), lengths) == 0).all()


def test_one_sample_is_a_wall_if_there_is_anything():
    lengths = interval_lengths(torch.tensor([[3.0], [3.0]]), torch.ones(2, 3))
    assert blend_weights(torch.tensor([[0.5], [0.0]]), lengths).tolist() == [[1.0], [0.0]]


def test_weights_behind_an_opaque_sample_are_zero():
    sigma = torch.rand(1, 10, generator=generator(13))
    sigma[0, 4] = 1e6
    weights = blend_weights(sigma, torch.ones(1, 10))
    assert (weights[0, 5:] == 0).all()
    assert weights.sum().item() == pytest.approx(1, abs=1e-6)
    assert weights[0, 4] > 0


def test_interval_lengths_are_in_scene_units_and_the_last_is_endless():
    lengths = interval_lengths(torch.tensor([[1.0, 2.0, 4.0]]), torch.tensor([[0.0, 3.0, -4.0]]))
    assert lengths[0, :2].tolist() == [5.0, 10.0]
    assert lengths[0, 2] >= 1e10


def test_weights_sum_to_at_most_one():
    sigma = 10 ** (12 * torch.rand(500, 32, generator=generator(14)) - 6)
    t = (6 * torch.rand(500, 32, generator=generator(15))).sort(-1).values
    weights = blend_weights(sigma, interval_lengths(t, torch.ones(500, 3)))
    assert (weights >= 0).all()
    assert weights.sum(-1).max() <= 1 + 1e-5  # 32 float32 roundings


@pytest.mark.parametrize("exponent", range(-6, 7))
def test_gradients_are_finite_at_every_density(exponent):
    sigma = 10.0**exponent * (0.5 + torch.rand(4, 16, generator=generator(16)))
    sigma[0] = 0
    sigma.requires_grad_()
    t = (2 + 4 * torch.rand(4, 16, generator=generator(17))).sort(-1).values
    t[1, 4] = t[1, 3]  # a bin without width
    weights = blend_weights(sigma, interval_lengths(t, torch.ones(4, 3)))
    rgb, opacity, depth = composite(torch.rand(4, 16, 3), weights, t, 1.0)
    (rgb.sum() + opacity.sum() + disparity(depth).sum()).backward()
    assert weights.isfinite().all() and depth.isfinite().all()
    assert sigma.grad.isfinite().all()


# ------------------------------------------------------------------------------------ composite


def test_composite_is_the_weighted_sum_over_its_background():
    weights = torch.tensor([[0.25, 0.5], [0.0, 0.0]])
    rgb = torch.tensor([[[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]] * 2)
    t = torch.tensor([[2.0, 5.0]] * 2)
    for background in (0.0, 0.5, 1.0):
        color, opacity, depth = composite(rgb, weights, t, background)
        rest = 0.25 * background
        expected = torch.tensor([[0.25 + rest, 0.5 + rest, rest], [background] * 3])
        torch.testing.assert_close(color, expected, **ROUNDING)
        torch.testing.assert_close(opacity, torch.tensor([0.75, 0.0]), **ROUNDING)
        torch.testing.assert_close(depth, torch.tensor([4.0, 0.0]), **ROUNDING)


def test_depth_is_that_of_what_was_hit_however_faint():
    t = torch.linspace(2, 6, 5)[None].expand(20, 5)
    faint = 10.0 ** -torch.arange(20.0)[:, None]
    weights = faint * torch.tensor([0.0, 0.0, 0.0, 0.5, 0.0])
    depth = composite(torch.zeros(20, 5, 3), weights, t, 0.0)[2]
    torch.testing.assert_close(depth, torch.full((20,), 5.0), **ROUNDING)


def test_disparity_inverts_depth_and_is_zero_at_infinity():
    depth = torch.tensor([0.0, 0.5, 4.0], requires_grad=True)
    found = disparity(depth)
    assert found.tolist() == [0.0, 2.0, 0.25]
    found.sum().backward()
    assert depth.grad.tolist() == [0.0, -4.0, -0.0625]


def test_resampled_intervals_have_equal_weight_and_keep_the_total_length():
    """Two rays with a gap each, and one without samples, against the definition."""
    ray_indices = torch.tensor([0, 0, 0, 2, 2])
    t = torch.tensor([1.5, 2.5, 5.5, 3.0, 4.0])  # intervals 1-2, 2-3, gap, 5-6; 2.5-3.5, 3.5-4.5
    weights = torch.tensor([0.1, 0.2, 0.6, 0.0, 0.9])
    exactly = {"floor": 1e-6, "blur": False}
    rows, where, length = importance_resample_packed(
        weights, t, torch.ones(5), ray_indices, 3, 9, **exactly
    )
    assert rows.tolist() == [0] * 9 + [2] * 9
    # Ray 0: nine parts of 0.1: one in the first interval, two in the second, six in the third.
    midpoints = [1.5, 2.25, 2.75, *(5 + (n + 0.5) / 6 for n in range(6))]
    torch.testing.assert_close(where[:9], torch.tensor(midpoints), atol=1e-5, rtol=0)
    exact = torch.tensor([1.0, 0.5, 0.5, *[1 / 6] * 6])
    torch.testing.assert_close(length[:9], exact, atol=1e-5, rtol=0)
    # Ray 2: all weight is in its second interval. The first part includes the first interval.
    assert where[9:].min() > 3.5 and where[9:].max() < 4.5
    torch.testing.assert_close(length[9:].sum(), torch.tensor(2.0), atol=1e-5, rtol=0)


def test_resampling_blurs_weights_over_neighbors_of_the_same_ray():
    """Weights 0 0 1 0 are blurred to 0 1/2 1 1/2, which gives eight parts of 1/4."""
    t, ray_indices = torch.tensor([0.5, 1.5, 2.5, 3.5, 9.0]), torch.tensor([0, 0, 0, 0, 1])
    weights = torch.tensor([0.0, 0.0, 1.0, 0.0, 5.0])
    _, where, _ = importance_resample_packed(
        weights, t, torch.ones(5), ray_indices, 2, 8, floor=1e-6
    )
    expected = [1.25, 1.75, 2.125, 2.375, 2.625, 2.875, 3.25, 3.75]
    torch.testing.assert_close(where[:8], torch.tensor(expected), atol=1e-3, rtol=0)


@pytest.mark.parametrize("shifted", [False, True])
def test_resampled_t_stay_in_the_intervals_and_ascend(shifted):
    generator = torch.Generator().manual_seed(0)
    num_rays, count = 50, 7
    counts = torch.randint(0, 6, (num_rays,), generator=generator)
    ray_indices = torch.repeat_interleave(torch.arange(num_rays), counts)
    length = 0.1 + torch.rand(len(ray_indices), generator=generator)
    gaps = torch.rand(len(ray_indices), generator=generator)
    t = torch.cumsum(length + gaps, 0) - length / 2
    weights = torch.rand(len(ray_indices), generator=generator) ** 8
    u = torch.rand(num_rays, 1, generator=generator) if shifted else None
    rows, where, lengths = importance_resample_packed(
        weights, t, length, ray_indices, num_rays, count, u
    )
    assert rows.tolist() == [r for r in range(num_rays) if counts[r] for _ in range(count)]
    close = (where[:, None] - t).abs() <= length / 2 + 1e-4
    assert (close & (rows[:, None] == ray_indices)).any(1).all()
    assert (where.view(-1, count).diff(dim=-1) > 0).all() and (lengths >= 0).all()
    whole = torch.zeros(num_rays).index_add(0, ray_indices, length)
    torch.testing.assert_close(torch.zeros(num_rays).index_add(0, rows, lengths), whole)


def test_zero_weights_resample_evenly_and_no_samples_give_none():
    rows, where, length = importance_resample_packed(
        torch.zeros(2), torch.tensor([0.5, 1.5]), torch.ones(2), torch.zeros(2, dtype=torch.long),
        1, 4,
    )  # fmt: skip
    torch.testing.assert_close(where, torch.tensor([0.25, 0.75, 1.25, 1.75]))
    torch.testing.assert_close(length, torch.full((4,), 0.5))
    none = torch.zeros(0)
    assert all(
        len(part) == 0 for part in importance_resample_packed(none, none, none, none.long(), 5, 4)
    )
