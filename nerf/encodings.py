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
    distillation then leave no woven pattern on surfaces.
    (Chan et al. 2022, EG3D, section 4; products as in Fridovich-Keil et al. 2023, K-Planes,
    section 3.1.)
    """

    def __init__(self, finest: int = 128, channels: int = 8, *, smooth: bool = False):
        super().__init__()
        self.smooth = smooth
        resolutions = (finest // 4, finest // 2, finest)
        self.planes = nn.ParameterList(
            nn.Parameter(torch.empty(3, channels, size, size).uniform_(0.5, 1.5))
            for size in resolutions
        )
        self.out_dim = channels * len(resolutions)

    def forward(self, points: Tensor) -> Tensor:
        x, y, z = points.unbind(-1)
        coordinates = torch.stack(
            [torch.stack(pair, dim=-1) for pair in ((x, y), (x, z), (y, z))]
        )  # [3, N, 2]
        features = []
        for plane in self.planes:
            plane = _binomial(plane) if self.smooth else plane
            values = F.grid_sample(
                plane, coordinates[:, :, None], padding_mode="border", align_corners=True
            )  # [3, C, N, 1]
            xy, xz, yz = values[..., 0].unbind(0)
            features.append(xy * xz * yz)
        return torch.cat(features).T  # [N, F]

    def variation(self) -> Tensor:
        """Total variation []: mean squared difference of neighboring entries, summed over planes
        and both axes (K-Planes, section 3.2)."""
        terms = [plane.diff(dim=axis).square().mean() for plane in self.planes for axis in (-1, -2)]
        return sum(terms[1:], start=terms[0])


def _binomial(plane: Tensor) -> Tensor:
    """Planes [P, C, H, W] blurred with weights (1, 2, 1) / 4 along both sides."""
    padded = F.pad(plane, (1, 1, 1, 1), mode="replicate")
    rows = (padded[..., :-2, :] + padded[..., 2:, :]) / 4 + padded[..., 1:-1, :] / 2
    return (rows[..., :-2] + rows[..., 2:]) / 4 + rows[..., 1:-1] / 2


class HashGrid(nn.Module):
    """Multi-resolution feature grids: coarse ones dense, fine ones hashed (Instant-NGP, section 3).

    Points [N, 3] in [-1, 1] -> [N, levels x channels], float32. log2_size: base-2 logarithm of the
    largest number of entries per level. Resolutions grow geometrically from ``coarsest`` to
    ``finest``.
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
            rows = self._rows(corner, size, len(table))
            features.append((F.embedding(rows, table) * weight[..., None]).sum(1))
        return torch.cat(features, dim=-1)

    def _rows(self, corner: Tensor, size: int, count: int) -> Tensor:
        """Rows [N, 8] of a table of ``count`` entries for grid corners [N, 8, 3]."""
        x, y, z = corner.unbind(-1)
        if (size + 1) ** 3 <= count:
            return (x * (size + 1) + y) * (size + 1) + z
        return (x ^ (y * 2654435761) ^ (z * 805459861)) % count  # Instant-NGP eq. 4


ENCODINGS = {"triplane": TriPlane, "hashgrid": HashGrid}
