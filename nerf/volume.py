"""One-dimensional maths along a ray: where to sample, and how samples blend. All float32.

Alphabet: t [..., S] sample distances; sigma [..., S] density >= 0; weights [..., S] with sum <= 1.
Functions that draw take their uniform numbers as an argument; None means deterministic.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def stratified_t(
    near: Tensor, far: Tensor, num_samples: int, *, u: Tensor | None = None, lindisp: bool = False
) -> Tensor:
    """One distance per bin between near and far [..., 1] (NeRF eq. 2) -> t [..., S], ascending.

    u [..., S] in [0, 1) places each sample between the midpoints to its neighbors; None gives
    the bin positions themselves. ``lindisp`` spaces them evenly in 1 / t; near must be positive.
    """
    fraction = torch.linspace(0.0, 1.0, num_samples, dtype=near.dtype, device=near.device)
    if lindisp:
        t = 1.0 / (1.0 / near * (1.0 - fraction) + 1.0 / far * fraction)
    else:
        t = near * (1.0 - fraction) + far * fraction
    if u is None:
        return t
    middle = 0.5 * (t[..., 1:] + t[..., :-1])
    upper = torch.cat([middle, t[..., -1:]], dim=-1)
    lower = torch.cat([t[..., :1], middle], dim=-1)
    return lower + (upper - lower) * u


def sample_pdf(edges: Tensor, weights: Tensor, num_samples: int, u: Tensor | None = None) -> Tensor:
    """Inverse-CDF samples of a piecewise constant density (NeRF section 5.2).

    edges [..., S + 1] ascending; weights [..., S] >= 0, not normalized. u [..., num_samples] in
    [0, 1], or None for evenly spaced ones. Returns [..., num_samples] within the edges. Where all
    weights are zero the samples spread evenly over the bins.
    """
    weights = weights + 1e-5  # nerf-pytorch's floor: empty rays must not divide 0 by 0
    pdf = weights / weights.sum(-1, keepdim=True)
    cdf = torch.cumsum(pdf, dim=-1)
    cdf = torch.cat([torch.zeros_like(cdf[..., :1]), cdf], dim=-1)  # [..., S + 1]
    if u is None:
        u = torch.linspace(0.0, 1.0, num_samples, dtype=cdf.dtype, device=cdf.device)
        u = u.expand(*cdf.shape[:-1], num_samples).contiguous()
    found = torch.searchsorted(cdf, u, right=True)
    below, above = (found - 1).clamp(min=0), found.clamp(max=cdf.shape[-1] - 1)
    cdf_below, cdf_above = cdf.gather(-1, below), cdf.gather(-1, above)
    width = cdf_above - cdf_below
    # Bins thinner than the floor itself carry no mass; 1 keeps the division finite.
    fraction = (u - cdf_below) / torch.where(width < 1e-5, torch.ones_like(width), width)
    start, end = edges.gather(-1, below), edges.gather(-1, above)
    return start + fraction * (end - start)


def interval_lengths(t: Tensor, directions: Tensor) -> Tensor:
    """Lengths in scene units of the intervals behind each sample; the last one reaches infinity.

    t [..., S]; directions [..., 3], whose length converts t to scene units. nerf-pytorch writes
    1e10 for infinity and parity needs the same: any density in the last sample is a wall.
    """
    steps = t[..., 1:] - t[..., :-1]
    steps = torch.cat([steps, torch.full_like(t[..., :1], 1e10)], dim=-1)
    return steps * directions.norm(dim=-1, keepdim=True)


def blend_weights(sigma: Tensor, lengths: Tensor) -> Tensor:
    """w_i = T_i (1 - exp(-sigma_i d_i)), T_i = exp(-sum_{j<i} sigma_j d_j) (NeRF eq. 3).

    sigma, lengths [..., S] -> [..., S]. Transmittance is kept as a sum of logarithms, so it needs
    no epsilon and an opaque sample gives exact zeros behind it.
    """
    optical = sigma * lengths
    # Exclusive sum: the last interval, possibly 1e10 long, must not enter it at all.
    before = torch.cumsum(optical[..., :-1], dim=-1)
    before = torch.cat([torch.zeros_like(optical[..., :1]), before], dim=-1)
    return torch.exp(-before) * -torch.expm1(-optical)


def composite(rgb: Tensor, weights: Tensor, t: Tensor, background: float):
    """Blend samples along each ray (NeRF eq. 3).

    rgb [..., S, 3] in [0, 1]; weights [..., S]; t [..., S]; background gray level in [0, 1].
    Returns rgb [..., 3], opacity [...], and depth [...]: the mean t of what the ray hit, 0 where
    it hit nothing.
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
    """1 / depth, and 0 where depth is 0 (a ray that hit nothing sees infinitely far)."""
    hit = depth > 0
    return torch.where(hit, 1.0 / torch.where(hit, depth, torch.ones_like(depth)), 0.0)


# ------------------------------------------------------------------------------- packed samples
# One flat list of samples [N] over all rays, sorted by ray; ray_indices [N] holds the number
# of each sample's ray.


def packed_weights_cumsum(
    sigma: Tensor, lengths: Tensor, ray_indices: Tensor, num_rays: int
) -> Tensor:
    """``blend_weights`` of packed samples [N] by one running sum over all rays.

    In float64: the sum of 10^6 samples has no digits left for the first sample of the last ray in
    float32.
    """
    if not len(ray_indices):
        return sigma * lengths
    optical = (sigma * lengths).double()
    total = torch.cumsum(optical, dim=0) - optical  # exclusive
    first = torch.searchsorted(ray_indices, torch.arange(num_rays, device=ray_indices.device))
    before = total - total[first.clamp(max=len(ray_indices) - 1)][ray_indices]
    return torch.exp(-before.float()) * -torch.expm1(-(sigma * lengths))


def packed_weights_padded(
    sigma: Tensor, lengths: Tensor, ray_indices: Tensor, num_rays: int
) -> Tensor:
    """The same by laying the samples out as [rays, most samples of one ray]."""
    if not len(ray_indices):
        return sigma * lengths
    counts = torch.bincount(ray_indices, minlength=num_rays)
    first = torch.cumsum(counts, dim=0) - counts
    column = torch.arange(len(ray_indices), device=ray_indices.device) - first[ray_indices]
    most = int(counts.max())
    optical = sigma.new_zeros(num_rays, most + 1).index_put(
        (ray_indices, column + 1), sigma * lengths
    )
    before = torch.cumsum(optical, dim=-1)  # exclusive: the first column is 0
    return torch.exp(-before[ray_indices, column]) * -torch.expm1(-(sigma * lengths))


PACKED_WEIGHTS = {"cumsum": packed_weights_cumsum, "padded": packed_weights_padded}


def sum_per_ray(values: Tensor, ray_indices: Tensor, num_rays: int) -> Tensor:
    """Sums of values [N] or [N, C] over each ray's samples -> [num_rays] or [num_rays, C]."""
    return values.new_zeros(num_rays, *values.shape[1:]).index_add(0, ray_indices, values)


def scale_gradient(values: Tensor, factor: Tensor) -> Tensor:
    """``values`` unchanged, whose gradient is multiplied by ``factor`` (broadcast to them)."""
    return values * factor + (values * (1 - factor)).detach()


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
) -> tuple[Tensor, Tensor, Tensor]:
    """``count`` samples on every ray that has any, drawn where its light ends (NeRF section 5.2).

    weights, t, lengths, ray_indices [N] describe packed samples; each is the interval from
    t - length / 2 to t + length / 2, and the gaps between intervals are empty. A ray's weights,
    plus ``floor`` > 0 spread evenly over its intervals, are cut into parts of equal weight. A new
    sample is the midpoint of its part. Its length is the part's, gaps excluded, so that a ray's
    lengths have the same sum as before.
    u [num_rays, 1] in [0, 1) shifts a ray's cuts; None: none. blur: share weights with neighbors
    first (Barron et al. 2021, mip-NeRF, eq. 18): a surface may lie before the first sample that
    tells of it. Returns ray_indices, t and lengths [M].
    """
    if not len(ray_indices):
        return ray_indices, t, lengths
    counts = torch.bincount(ray_indices, minlength=num_rays)
    rows = counts.nonzero()[:, 0]
    first = torch.cumsum(counts, dim=0) - counts
    column = torch.arange(len(ray_indices), device=ray_indices.device) - first.index_select(
        0, ray_indices
    )
    row = torch.repeat_interleave(torch.arange(len(rows), device=ray_indices.device), counts[rows])
    shape = len(rows), int(counts.max())

    def laid_out(values: Tensor) -> Tensor:  # [R, K], zeros behind a ray's last sample
        return values.new_zeros(shape).index_put((row, column), values)

    start, width, mass = (laid_out(values) for values in (t - lengths / 2, lengths, weights))
    if blur:
        larger = torch.maximum(mass[:, 1:], mass[:, :-1])  # of two neighbors
        mass = (F.pad(larger, (0, 1)).maximum(mass) + F.pad(larger, (1, 0)).maximum(mass)) / 2
        mass = torch.where(width > 0, mass, 0.0)
    mass = mass + floor * width / width.sum(-1, keepdim=True)
    behind, reach = (torch.cumsum(values, dim=-1) for values in (mass, width))
    cuts = torch.arange(count + 1, device=ray_indices.device).expand(len(rows), -1) / count
    if u is not None:
        cuts = cuts + (u.index_select(0, rows) - 0.5) / count
        cuts[:, 0], cuts[:, -1] = 0.0, 1.0
    places = torch.cat([cuts, (cuts[:, 1:] + cuts[:, :-1]) / 2], dim=-1) * behind[:, -1:]
    index = torch.searchsorted(behind, places.contiguous()).clamp(max=shape[1] - 1)
    mass, behind = mass.gather(-1, index), behind.gather(-1, index)
    # A cut may lie on the end of the last interval; columns without mass are never found before.
    inside = (1 - (behind - places) / mass).clamp(0, 1) * width.gather(-1, index)
    ends = (reach - width).gather(-1, index) + inside
    new_t = (start.gather(-1, index) + inside)[:, count + 1 :]
    new_lengths = ends[:, : count + 1].diff(dim=-1)
    return rows.repeat_interleave(count), new_t.flatten(), new_lengths.flatten()
