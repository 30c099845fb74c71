"""Encodings of positions and directions as features; ``out_dim`` is the number of features."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class FrequencyEncoding(nn.Module):
    """x, then sin and cos of 2^0 x ... 2^(L-1) x (NeRF eq. 4; like its code, without the pi).

    [..., 3] -> [..., 3 + 6 L], always float32: at 2^9 x bfloat16 has no fraction bits left.
    All sines come before all cosines, each in long runs, which is twice as fast as nerf-pytorch's
    interleaved order; ``columns`` [3 + 6 L] holds each feature's index in nerf-pytorch's order.
    """

    frequencies: Tensor  # [L]
    columns: Tensor

    def __init__(self, num_frequencies: int, num_dims: int = 3):
        super().__init__()
        self.num_frequencies = num_frequencies
        self.out_dim = num_dims * (1 + 2 * num_frequencies)
        frequencies = 2.0 ** torch.arange(num_frequencies, dtype=torch.float32)
        self.register_buffer("frequencies", frequencies, persistent=False)
        dims, level = torch.arange(num_dims), torch.arange(num_frequencies)
        sines = (num_dims * (1 + 2 * level) + dims[:, None]).flatten()
        columns = torch.cat([dims, sines, sines + num_dims])
        self.register_buffer("columns", columns, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        angles = (x[..., None] * self.frequencies).flatten(-2)  # [..., 3 L]
        return torch.cat([x, angles.sin(), angles.cos()], dim=-1)


class IdentityEncoding(nn.Module):
    """The input itself, no encoding (``--i_embed -1``)."""

    columns: Tensor  # [num_dims], as in FrequencyEncoding

    def __init__(self, num_dims: int = 3):
        super().__init__()
        self.out_dim = num_dims
        self.register_buffer("columns", torch.arange(num_dims), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return x


class TriPlane(nn.Module):
    """Products of features from three axis-aligned planes, at three resolutions.

    Points [N, 3] in [-1, 1] -> [N, 3 channels], float32. The planes' resolutions are ``finest``,
    half and a quarter of it. smooth: planes are blurred with a 3x3 binomial filter before they are
    sampled, so that every gradient also reaches neighboring entries; the noisy gradients of score
    distillation then leave no woven pattern on surfaces. lookup: how planes are read, a key of
    PLANE_LOOKUPS, or "auto": by rows on a GPU and by grid_sample on a CPU, the faster one there.
    (Chan et al. 2022, EG3D, section 4; products as in Fridovich-Keil et al. 2023, K-Planes,
    section 3.1.)
    """

    def __init__(
        self,
        finest: int = 128,
        channels: int = 8,
        *,
        smooth: bool = False,
        lookup: str = "auto",
    ):
        super().__init__()
        self.smooth, self.lookup = smooth, lookup
        self.planes = nn.ParameterList(
            nn.Parameter(torch.empty(3, channels, size, size).uniform_(0.5, 1.5))
            for size in _sizes(finest)
        )
        self.out_dim = channels * len(self.planes)

    @property
    def finest(self) -> int:
        """Entries per side of the finest planes."""
        return self.planes[-1].shape[-1]

    def resize(self, finest: int) -> dict[nn.Parameter, nn.Parameter]:
        """Replace the planes by interpolated ones, the finest with ``finest`` entries per side.

        Returns the new parameter of each old one. (Coarse to fine: Chen et al. 2022, TensoRF,
        section 4.4.)
        """
        replaced = {}
        for level, size in enumerate(_sizes(finest)):
            old = self.planes[level]
            assert isinstance(old, nn.Parameter)
            replaced[old] = nn.Parameter(resized_planes(old.detach(), (size, size)))
            self.planes[level] = replaced[old]
        return replaced

    def forward(self, points: Tensor) -> Tensor:
        x, y, z = points.unbind(-1)
        coordinates = torch.stack(
            [torch.stack(pair, dim=-1) for pair in ((x, y), (x, z), (y, z))]
        )  # [3, N, 2]
        lookup = self.lookup
        if lookup == "auto":
            lookup = "rows" if points.device.type == "cuda" else "grid_sample"
        features = []
        for plane in self.planes:
            plane = _binomial(plane) if self.smooth else plane
            xy, xz, yz = PLANE_LOOKUPS[lookup](plane, coordinates).unbind(0)
            features.append(xy * xz * yz)
        if lookup == "rows":
            return torch.cat(features, dim=-1)  # [N, F]
        return torch.cat([part.T for part in features]).T  # the same, as the parts lie in memory

    def variation(self) -> Tensor:
        """Total variation []: mean squared difference of neighboring entries, summed over planes
        and both axes (K-Planes, section 3.2)."""
        terms = [plane.diff(dim=axis).square().mean() for plane in self.planes for axis in (-1, -2)]
        return sum(terms[1:], start=terms[0])


def _sizes(finest: int) -> tuple[int, int, int]:
    """Entries per side of the planes at all three resolutions."""
    return finest // 4, finest // 2, finest


def resized_planes(planes: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Planes [P, C, H, W] interpolated to ``shape`` [4]; entries at the corners stay the same."""
    return F.interpolate(planes, shape[-2:], mode="bilinear", align_corners=True)


def sample_planes(planes: Tensor, coordinates: Tensor) -> Tensor:
    """Bilinear interpolation of planes [P, C, H, W] at coordinates [P, N, 2] -> [P, N, C].

    Coordinates are (column, row) in [-1, 1], from the centers of the first to the centers of the
    last entries; those outside are clamped. By ``grid_sample``.
    """
    values = F.grid_sample(
        planes, coordinates[:, :, None], padding_mode="border", align_corners=True
    )  # [P, C, N, 1]
    return values[..., 0].transpose(1, 2)


def sample_rows(planes: Tensor, coordinates: Tensor) -> Tensor:
    """The same as ``sample_planes``, from planes rearranged as rows [P H W, C].

    An entry's channels then lie side by side, so a GPU reads and adds 32 bytes at a time where
    ``grid_sample`` touches as many places as there are channels. Rearranging costs two copies of
    the planes per call. With double backward, which ``grid_sample`` does not have.
    """
    num_planes, channels, height, width = planes.shape
    rows = planes.permute(0, 2, 3, 1).reshape(-1, channels)
    x, y = ((axis + 1) / 2 for axis in coordinates.unbind(-1))  # [P, N]
    x, y = x.clamp(0, 1) * (width - 1), y.clamp(0, 1) * (height - 1)
    # The last cell is closed: at its far side the fraction is 1, so no index is out of range.
    left, top = x.floor().clamp(max=width - 2), y.floor().clamp(max=height - 2)
    number = torch.arange(num_planes, device=planes.device)[:, None]
    first = ((number * height + top.long()) * width + left.long()).flatten()  # [P N]
    corners = torch.cat([first, first + 1, first + width, first + width + 1])
    values = rows.index_select(0, corners).view(4, -1, channels).unbind(0)
    right, down = (x - left).view(-1, 1), (y - top).view(-1, 1)
    above = torch.lerp(values[0], values[1], right)
    below = torch.lerp(values[2], values[3], right)
    return torch.lerp(above, below, down).view(num_planes, -1, channels)


# What ``TriPlane`` interpolates with.
PLANE_LOOKUPS = {"grid_sample": sample_planes, "rows": sample_rows}


def _binomial(plane: Tensor) -> Tensor:
    """Planes [P, C, H, W] blurred with weights (1, 2, 1) / 4 along both sides."""
    padded = F.pad(plane, (1, 1, 1, 1), mode="replicate")
    rows = (padded[..., :-2, :] + padded[..., 2:, :]) / 4 + padded[..., 1:-1, :] / 2
    return (rows[..., :-2] + rows[..., 2:]) / 4 + rows[..., 1:-1] / 2


class HashGrid(nn.Module):
    """Multi-resolution feature grids: coarse ones dense, fine ones hashed (Instant-NGP, section 3).

    Points [N, 3] in [-1, 1] -> [N, levels x channels], float32. log2_size: base-2 logarithm of the
    largest number of entries per level, Instant-NGP's log2_hashmap_size. Resolutions grow
    geometrically from ``coarsest`` to ``finest``.
    """

    corners: Tensor  # [8, 3] of a cell, 0 or 1

    def __init__(
        self,
        finest: int = 256,
        *,
        levels: int = 8,
        channels: int = 4,
        log2_size: int = 17,
        coarsest: int = 16,
    ):
        super().__init__()
        growth = (finest / coarsest) ** (1 / max(1, levels - 1))
        self.sizes = [round(coarsest * growth**level) for level in range(levels)]
        self.channels, self.capacity = channels, 2**log2_size
        rows = [min((size + 1) ** 3, self.capacity) for size in self.sizes]
        self.tables = nn.ParameterList(
            nn.Parameter(torch.empty(count, channels).uniform_(-1e-4, 1e-4)) for count in rows
        )
        self.out_dim = levels * channels
        corners = [[i >> 2 & 1, i >> 1 & 1, i & 1] for i in range(8)]
        self.register_buffer("corners", torch.tensor(corners), persistent=False)

    def forward(self, points: Tensor) -> Tensor:
        features = []
        for size, table in zip(self.sizes, self.tables, strict=True):
            scaled = ((points + 1) / 2).clamp(0, 1) * size
            base = scaled.floor().clamp(max=size - 1)
            fraction = (scaled - base)[:, None]  # [N, 1, 3]
            corner = base.long()[:, None] + self.corners  # [N, 8, 3]
            weight = torch.where(self.corners.bool(), fraction, 1 - fraction).prod(-1)  # [N, 8]
            rows = self._rows(corner, size, len(table)).flatten()
            # index_select: F.embedding's backward is half as fast, with the same gradients.
            entries = table.index_select(0, rows).view(*weight.shape, self.channels)
            features.append((entries * weight[..., None]).sum(1))
        return torch.cat(features, dim=-1)

    def _rows(self, corner: Tensor, size: int, count: int) -> Tensor:
        """Rows [N, 8] of a table of ``count`` entries for grid corners [N, 8, 3]."""
        x, y, z = corner.unbind(-1)
        if (size + 1) ** 3 <= count:
            return (x * (size + 1) + y) * (size + 1) + z
        return (x ^ (y * 2654435761) ^ (z * 805459861)) % count  # Instant-NGP eq. 4


ENCODINGS = {"triplane": TriPlane, "hashgrid": HashGrid}
