"""The sampling grid of a mesh: points in a box, and a field's density at them.

Where a field is slow, only points near the surface are evaluated: those in blocks of cells whose
corners lie on both sides of it, and in neighboring blocks that the surface enters.
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


class SamplingGrid(NamedTuple):
    """Points in a box, its sides included, about equally far apart along all axes."""

    low: Tensor  # [3] corner of the box
    high: Tensor  # [3] corner of the box
    counts: tuple[int, int, int]  # points along x, y, z

    @classmethod
    def over(cls, low: Tensor, high: Tensor, resolution: int) -> "SamplingGrid":
        """A grid of ``resolution`` points along the longest side, at the same spacing on others."""
        sides = (high - low).tolist()
        spacing = max(sides) / (resolution - 1)
        x, y, z = (max(1, round(side / spacing)) + 1 for side in sides)
        return cls(low, high, (x, y, z))

    @property
    def spacing(self) -> Tensor:
        """Distance [3] between neighboring points along each axis."""
        return (self.high - self.low) / (self.low.new_tensor(self.counts) - 1)

    def points(self, numbers: Tensor) -> Tensor:
        """The points [M, 3] with flat numbers [M], z fastest."""
        size_y, size_z = self.counts[1:]
        index = [numbers // (size_y * size_z), numbers // size_z % size_y, numbers % size_z]
        return self.low + torch.stack(index, dim=-1) * self.spacing

    def box_around(self, solid: np.ndarray) -> tuple[Tensor, Tensor]:
        """Corners [3] of a box around the solid points [X, Y, Z], a cell wider, inside the grid."""
        low, high = self.low.clone(), self.high.clone()
        for axis, used in enumerate(used_slices(solid)):
            first, last = used[0] - 1, used[-1] + 1
            if first > 0:
                low[axis] += first * self.spacing[axis]
            if last < self.counts[axis] - 1:
                high[axis] = self.low[axis] + last * self.spacing[axis]
        return low, high

    def sides_touched(self, solid: np.ndarray) -> Tensor:
        """Whether solid points [X, Y, Z] lie on the grid's lower and upper sides, bool [2, 3]."""
        ends = [
            (used[0] == 0, used[-1] == n - 1)
            for used, n in zip(used_slices(solid), self.counts, strict=True)
        ]
        return torch.from_numpy(np.array(ends)).to(self.low.device).T


def sample_density(
    density_at: Callable[[Tensor], Tensor],
    chunk: int,
    grid: SamplingGrid,
    numbers: Tensor | None = None,
) -> np.ndarray:
    """The density [X, Y, Z] at a grid's points, or [M] at those with flat ``numbers`` [M].

    density_at: scene points [M, 3] -> density [M], at most ``chunk`` points a call. ValueError
    where a density is not finite.
    """
    shape: tuple[int, ...] = grid.counts if numbers is None else numbers.shape
    if numbers is None:
        numbers = torch.arange(math.prod(grid.counts))
    density = torch.empty(len(numbers))

    def sample_chunk(start: int) -> None:
        part = slice(start, start + chunk)
        with torch.no_grad():  # a setting of each thread
            values = density_at(grid.points(numbers[part].to(grid.low.device)))  # [M]
        assert values.shape == numbers[part].shape, values.shape
        density[part] = values.float().cpu()

    map_on_threads(sample_chunk, range(0, len(numbers), chunk), grid.low.device)
    if bad := int((~density.isfinite()).sum()):
        raise ValueError(
            f"the density is NaN or infinite at {bad} of {len(density)} points: the network "
            "diverged, export an earlier checkpoint"
        )
    return density.view(shape).numpy()


def sample_near_surface(value_at: Callable[[Tensor], np.ndarray], grid: SamplingGrid) -> np.ndarray:
    """Values [X, Y, Z], positive inside, evaluated only where the surface may be.

    value_at: flat numbers of points [M] -> values [M]. Wherever the sign changes between neighbors,
    both were evaluated: the surface is that of the whole grid, except for pieces so small that they
    miss every corner of the blocks near them. Points that are not evaluated have the value of a
    corner of their block.
    """
    ticks = [torch.tensor(sorted({*range(0, n, BLOCK), n - 1})) for n in grid.counts]
    corners = [len(tick) for tick in ticks]
    values = torch.from_numpy(value_at(_flat(ticks, grid.counts))).view(corners)
    # The block of each point along each axis; a corner belongs to the block before it, too.
    axes = list(zip(grid.counts, corners, strict=True))
    after = [(torch.arange(n) // BLOCK).clamp(max=c - 2) for n, c in axes]
    before = [((torch.arange(n) - 1) // BLOCK).clamp(0, c - 2) for n, c in axes]
    nearest = [torch.searchsorted(tick, torch.arange(int(tick[-1]) + 1), right=True) - 1
               for tick in ticks]  # fmt: skip
    solid = (values > 0).float()[None, None]
    mixed = F.max_pool3d(solid, 2, 1) != -F.max_pool3d(-solid, 2, 1)  # [1, 1, blocks ...]
    values = values[_cross(nearest)].contiguous()  # [X, Y, Z]
    known = torch.zeros(grid.counts, dtype=torch.bool)
    while mixed.any():
        active = F.max_pool3d(mixed.float(), 3, 1, padding=1)[0, 0] > 0
        needed = torch.zeros_like(known)
        for x in (after[0], before[0]):
            for y in (after[1], before[1]):
                for z in (after[2], before[2]):
                    needed |= active[_cross([x, y, z])]
        numbers = (needed & ~known).flatten().nonzero()[:, 0]
        values.view(-1)[numbers] = torch.from_numpy(value_at(numbers))
        known |= needed
        x, y, z = _unknown_at_sign_change(values > 0, known).nonzero().unbind(-1)
        mixed = torch.zeros_like(mixed)
        mixed[0, 0, after[0][x], after[1][y], after[2][z]] = True
    return values.numpy()


def _cross(rows: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of numbers along three axes as an index for all their combinations."""
    return rows[0][:, None, None], rows[1][None, :, None], rows[2][None, None, :]


def _flat(rows: list[Tensor], counts: tuple[int, int, int]) -> Tensor:
    """Flat numbers of the points where rows of three axes cross."""
    x, y, z = _cross(rows)
    return ((x * counts[1] + y) * counts[2] + z).flatten()


def _unknown_at_sign_change(solid: Tensor, known: Tensor) -> Tensor:
    """Which points [X, Y, Z] are not known although the sign changes to a neighbor, bool."""
    changes = torch.zeros_like(known)
    for axis in range(3):
        size = solid.shape[axis] - 1
        low, high = (solid.narrow(axis, start, size) for start in (0, 1))
        for start in (0, 1):
            changes.narrow(axis, start, size).logical_or_(low != high)
    return changes & ~known


def used_slices(solid: np.ndarray) -> list[np.ndarray]:
    """For each axis the numbers of the slices that hold a solid point."""
    others = ((1, 2), (0, 2), (0, 1))
    return [np.flatnonzero(solid.any(axis=axes)) for axes in others]
