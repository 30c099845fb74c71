"""The points at which a mesh's surface is looked for, and density there.

A grid of points fills a box. Where a field is slow, its density is asked for only near the surface:
in blocks of cells whose corners differ, or that the surface turns out to enter.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from nerf.training.system import map_on_threads

BLOCK = 4  # cells per side of a block


class Grid(NamedTuple):
    """Points in a box, its sides included, about equally far apart along all axes."""

    low: Tensor  # [3]
    high: Tensor  # [3]
    counts: tuple[int, int, int]

    @classmethod
    def over(cls, low: Tensor, high: Tensor, resolution: int) -> "Grid":
        """``resolution`` points along the longest side, as many on the others as that spacing."""
        sides = (high - low).tolist()
        spacing = max(sides) / (resolution - 1)
        return cls(low, high, tuple(max(1, round(side / spacing)) + 1 for side in sides))

    @property
    def spacing(self) -> Tensor:
        return (self.high - self.low) / (self.low.new_tensor(self.counts) - 1)

    def points(self, numbers: Tensor) -> Tensor:
        """Points of flat numbers [M], the last axis fastest -> [M, 3]."""
        size_y, size_z = self.counts[1:]
        place = [numbers // (size_y * size_z), numbers // size_z % size_y, numbers % size_z]
        return self.low + torch.stack(place, dim=-1) * self.spacing

    def around(self, solid: np.ndarray) -> tuple[Tensor, Tensor]:
        """The corners [3] of the box around solid points, a cell wider, inside this grid."""
        low, high = self.low.clone(), self.high.clone()
        for axis, used in enumerate(used_slices(solid)):
            first, last = used[0] - 1, used[-1] + 1
            if first > 0:
                low[axis] += first * self.spacing[axis]
            if last < self.counts[axis] - 1:
                high[axis] = self.low[axis] + last * self.spacing[axis]
        return low, high

    def touched(self, solid: np.ndarray) -> Tensor:
        """Whether solid points lie on the grid's lower and upper sides, [2, 3] bool."""
        ends = [
            (used[0] == 0, used[-1] == n - 1)
            for used, n in zip(used_slices(solid), self.counts, strict=True)
        ]
        return torch.from_numpy(np.array(ends)).to(self.low.device).T


def sample_density(
    density_at: Callable[[Tensor], Tensor], chunk: int, grid: Grid, numbers: Tensor | None = None
) -> np.ndarray:
    """The density at a grid's points [X, Y, Z], or at those of flat ``numbers`` [M] -> [M].

    density_at: scene points [M, 3] -> density [M], at most ``chunk`` a call. ValueError where it is
    not finite.
    """
    shape = grid.counts if numbers is None else numbers.shape
    if numbers is None:
        numbers = torch.arange(math.prod(grid.counts))
    density = torch.empty(len(numbers))

    def ask(start: int) -> None:
        part = slice(start, start + chunk)
        with torch.no_grad():  # a setting of each thread
            found = density_at(grid.points(numbers[part].to(grid.low.device)))  # [M]
        assert found.shape == numbers[part].shape, found.shape
        density[part] = found.float().cpu()

    map_on_threads(ask, range(0, len(numbers), chunk), grid.low.device)
    if bad := int((~density.isfinite()).sum()):
        raise ValueError(
            f"the density is NaN or infinite at {bad} of {len(density)} points: the field is "
            "broken, export an earlier checkpoint"
        )
    return density.view(shape).numpy()


def heights_near_surface(height_at: Callable[[Tensor], np.ndarray], grid: Grid) -> np.ndarray:
    """Heights [X, Y, Z], positive inside, asked for only where the surface may be.

    height_at: flat numbers of points [M] -> heights [M]. Every change of sign between neighbors is
    between points that were asked for, so the surface is the same as on the whole grid, but for
    pieces so small that they miss every corner of the blocks near them. Elsewhere heights are those
    of a block's corner.
    """
    ticks = [torch.tensor(sorted({*range(0, n, BLOCK), n - 1})) for n in grid.counts]
    corners = [len(tick) for tick in ticks]
    height = torch.from_numpy(height_at(_flat(ticks, grid.counts))).view(corners)
    # The block that a point lies in, along each axis; a corner lies in the one before it, too.
    after = [(torch.arange(n) // BLOCK).clamp(max=c - 2) for n, c in _pairs(grid, corners)]
    before = [((torch.arange(n) - 1) // BLOCK).clamp(0, c - 2) for n, c in _pairs(grid, corners)]
    nearest = [torch.searchsorted(tick, torch.arange(int(tick[-1]) + 1), right=True) - 1
               for tick in ticks]  # fmt: skip
    solid = (height > 0).float()[None, None]
    mixed = F.max_pool3d(solid, 2, 1) != -F.max_pool3d(-solid, 2, 1)  # [1, 1, blocks ...]
    height = height[_mesh(nearest)].contiguous()  # [X, Y, Z]
    known = torch.zeros(grid.counts, dtype=torch.bool)
    while mixed.any():
        active = F.max_pool3d(mixed.float(), 3, 1, padding=1)[0, 0] > 0
        wanted = torch.zeros_like(known)
        for x in (after[0], before[0]):
            for y in (after[1], before[1]):
                for z in (after[2], before[2]):
                    wanted |= active[_mesh([x, y, z])]
        numbers = (wanted & ~known).flatten().nonzero()[:, 0]
        height.view(-1)[numbers] = torch.from_numpy(height_at(numbers))
        known |= wanted
        place = _unknown_at_sign_change(height > 0, known).nonzero().unbind(-1)
        mixed = torch.zeros_like(mixed)
        mixed[0, 0, after[0][place[0]], after[1][place[1]], after[2][place[2]]] = True
    return height.numpy()


def _pairs(grid: Grid, corners: list[int]):
    return zip(grid.counts, corners, strict=True)


def _mesh(rows: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    return rows[0][:, None, None], rows[1][None, :, None], rows[2][None, None, :]


def _flat(rows: list[Tensor], counts) -> Tensor:
    """Flat numbers of the points where rows of three axes cross."""
    x, y, z = _mesh(rows)
    return ((x * counts[1] + y) * counts[2] + z).flatten()


def _unknown_at_sign_change(solid: Tensor, known: Tensor) -> Tensor:
    """The points [X, Y, Z] not known whose neighbor along a grid line is of the other kind."""
    found = torch.zeros_like(known)
    for axis in range(3):
        size = solid.shape[axis] - 1
        low, high = (solid.narrow(axis, start, size) for start in (0, 1))
        for start in (0, 1):
            found.narrow(axis, start, size).logical_or_(low != high)
    return found & ~known


def used_slices(solid: np.ndarray) -> list[np.ndarray]:
    """For each axis the numbers of the slices that hold a solid point."""
    axes = range(3)
    return [
        solid.any(tuple(other for other in axes if other != axis)).nonzero()[0] for axis in axes
    ]
