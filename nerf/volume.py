"""Sampling distances along rays and compositing samples (NeRF, sections 4 and 5.2). In float32,
but for sums over all samples of a batch.

Notation: t [..., S] sample distances; sigma [..., S] density >= 0; weights [..., S] with sum <= 1.
Random numbers are arguments, uniform in [0, 1); None means deterministic.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def stratified_t(
    near: Tensor, far: Tensor, num_samples: int, *, u: Tensor | None = None, lindisp: bool = False
) -> Tensor:
    """Stratified samples t [..., S], ascending, between near and far [..., 1] (NeRF eq. 2).

    u [..., S] in [0, 1) draws each sample between the midpoints to its two neighbors, so that the
    first and the last have half a bin, as in nerf-pytorch; None leaves them
    evenly spaced, near and far included. lindisp: evenly spaced in 1 / t; near must be positive.
    """
    fraction = torch.linspace(0.0, 1.0, num_samples, dtype=near.dtype, device=near.device)
    if lindisp:
        t = 1.0 / (1.0 / near * (1.0 - fraction) + 1.0 / far * fraction)
    else:
        t = near * (1.0 - fraction) + far * fraction
    if u is None:
        return t
    midpoints = 0.5 * (t[..., 1:] + t[..., :-1])
    upper = torch.cat([midpoints, t[..., -1:]], dim=-1)
    lower = torch.cat([t[..., :1], midpoints], dim=-1)
    return lower + (upper - lower) * u


def sample_pdf(edges: Tensor, weights: Tensor, num_samples: int, u: Tensor | None = None) -> Tensor:
    """Samples [..., num_samples] of a piecewise constant density by its inverse CDF.

    (NeRF, section 5.2.) edges [..., S + 1] ascending; weights [..., S] >= 0, not normalized.
    u [..., num_samples] in [0, 1]; None: evenly spaced. Bins of a ray whose weights are all zero
    get equal mass.
    """
    weights = weights + 1e-5  # nerf-pytorch's epsilon; without it empty rays divide 0 by 0
    pdf = weights / weights.sum(-1, keepdim=True)
    cdf = torch.cumsum(pdf, dim=-1)
    cdf = torch.cat([torch.zeros_like(cdf[..., :1]), cdf], dim=-1)  # [..., S + 1]
    if u is None:
        u = torch.linspace(0.0, 1.0, num_samples, dtype=cdf.dtype, device=cdf.device)
        u = u.expand(*cdf.shape[:-1], num_samples).contiguous()
    index = torch.searchsorted(cdf, u, right=True)
    below, above = (index - 1).clamp(min=0), index.clamp(max=cdf.shape[-1] - 1)
    cdf_below, cdf_above = cdf.gather(-1, below), cdf.gather(-1, above)
    width = cdf_above - cdf_below
    # A bin with less mass than the epsilon counts as empty; 1 keeps the division finite.
    fraction = (u - cdf_below) / torch.where(width < 1e-5, torch.ones_like(width), width)
    start, end = edges.gather(-1, below), edges.gather(-1, above)
    return start + fraction * (end - start)


def interval_lengths(t: Tensor, directions: Tensor) -> Tensor:
    """Lengths [..., S] of the intervals from each sample to the next, in scene units.

    t [..., S]; directions [..., 3], whose length converts t to scene units. The last interval
    reaches infinity, 1e10 as in nerf-pytorch: any density there makes the ray opaque.
    """
    steps = t[..., 1:] - t[..., :-1]
    steps = torch.cat([steps, torch.full_like(t[..., :1], 1e10)], dim=-1)
    return steps * directions.norm(dim=-1, keepdim=True)


def blend_weights(sigma: Tensor, lengths: Tensor) -> Tensor:
    """w_i = T_i (1 - exp(-sigma_i d_i)), T_i = exp(-sum_{j<i} sigma_j d_j) (NeRF eq. 3 and 5).

    sigma, lengths [..., S] -> [..., S]. The transmittance T is the exp of a sum of optical depths,
    so it needs no epsilon, and the weights behind an opaque sample are exactly 0.
    """
    optical_depth = sigma * lengths
    # The sum excludes the sample itself, so that the last interval, 1e10 long, never enters it.
    before = torch.cumsum(optical_depth[..., :-1], dim=-1)
    before = torch.cat([torch.zeros_like(optical_depth[..., :1]), before], dim=-1)
    return torch.exp(-before) * -torch.expm1(-optical_depth)


def composite(
    rgb: Tensor, weights: Tensor, t: Tensor, background: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Blend samples along each ray (NeRF eq. 3 and 5).

    rgb [..., S, 3] in [0, 1]; weights, t [..., S]; background: gray level in [0, 1]. Returns rgb
    [..., 3], opacity [...] and depth [...], the weighted mean of t, 0 where opacity is 0.
    """
    opacity = weights.sum(-1)
    blended = (weights[..., None] * rgb).sum(-2)
    if background:
        blended = blended + background * (1.0 - opacity[..., None])
    hit = opacity > 0
    mass = torch.where(hit, opacity, torch.ones_like(opacity))
    depth = (weights * t).sum(-1) / mass
    return blended, opacity, depth


def disparity(depth: Tensor) -> Tensor:
    """1 / depth, and 0 where depth is 0: an empty ray counts as infinitely deep."""
    hit = depth > 0
    return torch.where(hit, 1.0 / torch.where(hit, depth, torch.ones_like(depth)), 0.0)


# ------------------------------------------------------------------------------- packed samples
# The samples [N] of all rays in one list, sorted by ray, then by t. ray_indices [N] holds the
# number of each sample's ray.


def packed_weights_cumsum(
    sigma: Tensor, lengths: Tensor, ray_indices: Tensor, num_rays: int
) -> Tensor:
    """``blend_weights`` of packed samples [N], with one cumulative sum over all rays.

    The sum is float64: in float32 a sum over 10^6 samples has too few digits left for the first
    sample of the last ray. Apple's GPUs (MPS) have no float64: they sum each ray by itself.
    """
    if not len(ray_indices):
        return sigma * lengths
    if sigma.device.type == "mps":
        return packed_weights_padded(sigma, lengths, ray_indices, num_rays)
    optical_depth = (sigma * lengths).double()
    total = torch.cumsum(optical_depth, dim=0) - optical_depth  # exclusive
    first = torch.searchsorted(ray_indices, torch.arange(num_rays, device=ray_indices.device))
    first = first.clamp(max=len(ray_indices) - 1).index_select(0, ray_indices)
    before = total - total.index_select(0, first)
    return torch.exp(-before.float()) * -torch.expm1(-(sigma * lengths))


def packed_weights_padded(
    sigma: Tensor, lengths: Tensor, ray_indices: Tensor, num_rays: int
) -> Tensor:
    """``blend_weights`` of packed samples [N], on a table [rays, most samples of a ray]."""
    if not len(ray_indices):
        return sigma * lengths
    counts = torch.bincount(ray_indices, minlength=num_rays)
    first = torch.cumsum(counts, dim=0) - counts
    column = torch.arange(len(ray_indices), device=ray_indices.device) - first[ray_indices]
    most = int(counts.max())
    optical_depth = sigma.new_zeros(num_rays, most + 1).index_put(
        (ray_indices, column + 1), sigma * lengths
    )
    before = torch.cumsum(optical_depth, dim=-1)  # exclusive: the first column is 0
    return torch.exp(-before[ray_indices, column]) * -torch.expm1(-(sigma * lengths))


PackedWeights = Callable[[Tensor, Tensor, Tensor, int], Tensor]
PACKED_WEIGHTS: dict[str, PackedWeights] = {
    "cumsum": packed_weights_cumsum,
    "padded": packed_weights_padded,
}


def sum_per_ray(values: Tensor, ray_indices: Tensor, num_rays: int) -> Tensor:
    """Sums of values [N] or [N, C] over each ray's samples -> [num_rays] or [num_rays, C]."""
    return values.new_zeros(num_rays, *values.shape[1:]).index_add(0, ray_indices, values)


def scale_gradient(values: Tensor, factor: Tensor) -> Tensor:
    """``values`` unchanged; their gradient is multiplied by ``factor``, broadcast to them."""
    return values * factor + (values * (1 - factor)).detach()


def _table_places(
    ray_indices: Tensor, lengths: Tensor, num_rays: int, most: int | None
) -> tuple[Tensor, Tensor, Tensor, tuple[int, int]]:
    """Where packed samples [N] lie in a table with a row per ray.

    Returns the rays [R] of the table, row and column [N] of each sample, and the table's shape: the
    rays that have samples and the most that one has, or ``num_rays`` and ``most`` + 1.
    """
    numbers = torch.arange(len(ray_indices), device=ray_indices.device)
    if most is None:
        counts = torch.bincount(ray_indices, minlength=num_rays)
        rows = counts.nonzero()[:, 0]
        first = torch.cumsum(counts, dim=0) - counts
        column = numbers - first.index_select(0, ray_indices)
        every = torch.arange(len(rows), device=ray_indices.device)
        row = torch.repeat_interleave(every, counts[rows])
        return rows, row, column, (len(rows), int(counts.max()))
    rows = torch.arange(num_rays, device=ray_indices.device)
    first = torch.searchsorted(ray_indices, rows).clamp(max=len(ray_indices) - 1)
    column = numbers - first.index_select(0, ray_indices)
    # Unused rows of the list, of length 0, go to a column of their own.
    column = torch.where(lengths > 0, column, most).clamp(max=most)
    return rows, ray_indices, column, (num_rays, most + 1)


def importance_resample_packed(
    weights: Tensor,
    t: Tensor,
    lengths: Tensor,
    ray_indices: Tensor,
    num_rays: int,
    count: int,
    u: Tensor | None = None,
    *,
    floor: float = 0.05,
    blur: bool = True,
    most: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Importance samples by the inverse CDF of packed weights, ``count`` per ray (NeRF, 5.2).

    weights, t, lengths, ray_indices [N] of packed samples, lengths in units of t: each is the
    interval from t - length / 2 to t + length / 2; gaps between intervals are empty. A ray's
    weights, plus ``floor`` > 0 spread evenly over its intervals, are divided into ``count`` parts
    of equal mass. A new sample is the median of its part; its length is the part's without gaps, so
    the lengths of a ray keep their sum. Rays without samples get none.
    u [num_rays, 1] in [0, 1) shifts the boundaries of the parts; None: no shift. blur: first blur
    weights over neighbors (Barron et al. 2021, mip-NeRF, eq. 18), because a surface may lie before
    the first sample that has weight. most: the most samples that a ray can have, for a result of
    static shape: M = num_rays x count, where rays without samples get lengths of 0 (see
    ``nerf.occupancy``). Returns ray_indices, t and lengths [M].
    """
    if not len(ray_indices):
        return ray_indices, t, lengths
    rows, row, column, shape = _table_places(ray_indices, lengths, num_rays, most)
    if most is not None:
        weights = torch.where(lengths > 0, weights, 0.0)  # of unused rows of the list

    def as_table(values: Tensor) -> Tensor:  # [R, K], zeros after a ray's last sample
        return values.new_zeros(shape).index_put((row, column), values)

    start, width, mass = (as_table(values) for values in (t - lengths / 2, lengths, weights))
    if blur:
        larger = torch.maximum(mass[:, 1:], mass[:, :-1])  # of two neighbors
        mass = (F.pad(larger, (0, 1)).maximum(mass) + F.pad(larger, (1, 0)).maximum(mass)) / 2
        mass = torch.where(width > 0, mass, 0.0)
    total = width.sum(-1, keepdim=True)
    if most is not None:
        total = torch.where(total > 0, total, 1.0)  # rays without samples
    mass = mass + floor * width / total
    cdf, end = (torch.cumsum(values, dim=-1) for values in (mass, width))  # end: gaps excluded
    edges = torch.arange(count + 1, device=ray_indices.device).expand(len(rows), -1) / count
    if u is not None:
        edges = edges + (u.index_select(0, rows) - 0.5) / count
        edges[:, 0], edges[:, -1] = 0.0, 1.0
    quantiles = torch.cat([edges, (edges[:, 1:] + edges[:, :-1]) / 2], dim=-1) * cdf[:, -1:]
    index = torch.searchsorted(cdf, quantiles.contiguous()).clamp(max=shape[1] - 1)
    mass, cdf = mass.gather(-1, index), cdf.gather(-1, index)
    # The clamp keeps rounding inside the interval. Columns after a ray's last sample are never
    # found: searchsorted takes the first column that reaches a quantile.
    share = (cdf - quantiles) / (mass if most is None else torch.where(mass > 0, mass, 1.0))
    inside = (1 - share).clamp(0, 1) * width.gather(-1, index)
    ends = (end - width).gather(-1, index) + inside
    new_t = (start.gather(-1, index) + inside)[:, count + 1 :]
    new_lengths = ends[:, : count + 1].diff(dim=-1)
    return rows.repeat_interleave(count), new_t.flatten(), new_lengths.flatten()
