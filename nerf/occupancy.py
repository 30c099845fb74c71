"""Occupancy grid, scene contraction, and ray marching that skips empty cells.

Unit coordinates: every ``Space`` maps its scene into the cube [-1, 1]^3, the coordinates of the
occupancy grid's cells and of the field's encodings. Samples are packed: those of all rays are in
one list, sorted by ray, then by t, with the ray's number beside each sample.

Static shapes: the number of samples is known only on the device, and the host would have to wait
for it to size the list. With a ``capacity`` the list always has that many rows: unused rows have
length 0, so their weight is 0, and rays whose samples do not all fit have none.
(Mueller et al. 2022, Instant-NGP, section 5.2 and appendix E; Li et al. 2023, NerfAcc.)
"""

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nerf.rays import Rays

DECAY = 0.95  # factor on a cell's density per update, so that it can become empty again
# Cells below the mean density are empty, since every scene starts as thin fog. These bound that
# threshold, as the optical depth of one marching step: cells above the first are always occupied,
# cells below the second always empty.
MIN_OPTICAL_DEPTH = 0.01
ALWAYS_EMPTY = 1e-4
WARM_UP = 256  # steps during which an update evaluates every cell


class Samples(NamedTuple):
    """Packed samples of R rays, N in all."""

    ray_indices: Tensor  # [N] number of the sample's ray, ascending
    t: Tensor  # [N] midpoint of the sample's interval
    lengths: Tensor  # [N] of the intervals, scene units
    points: Tensor  # [N, 3] unit coordinates
    found: Tensor | None = None  # [] of static shapes: samples found, whether or not they fit

    @property
    def num_found(self) -> Tensor:
        """How many samples were found [], also where not all of them fit."""
        if self.found is not None:
            return self.found
        return torch.full((), len(self.t), device=self.t.device)

    def at(self, index: Tensor) -> "Samples":
        """The samples at ``index`` [M]."""
        return Samples(*(member.index_select(0, index) for member in self[:4]))

    def select(self, mask: Tensor, num_rays: int, capacity: int | None = None) -> "Samples":
        """The samples where ``mask`` [N] is True, of ``num_rays`` rays; in ``capacity`` rows."""
        if capacity is None:
            return self.at(mask.nonzero()[:, 0])
        index, count = first_true(mask, capacity)
        ray_indices, t, lengths, points = self.at(index)[:4]
        ray_indices, used = rows_in_use(ray_indices, count, num_rays)
        return Samples(ray_indices, t, torch.where(used, lengths, 0.0), points, count)


def first_true(mask: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Indices [count] of the first True of mask [N], ascending, and how many there are, [].

    Where there are fewer than ``count``, the last indices are N - 1. Nothing is read on the host.
    """
    total = mask.cumsum(0, dtype=torch.int32)
    wanted = torch.arange(1, count + 1, dtype=torch.int32, device=mask.device)
    return torch.searchsorted(total, wanted).clamp(max=len(mask) - 1), total[-1]


def rows_in_use(ray_indices: Tensor, count: Tensor, num_rays: int) -> tuple[Tensor, Tensor]:
    """Ray indices of a list with static shape, still ascending, and which rows are used, bool.

    ray_indices [capacity] of the first rows, of ``count`` [] in all. A ray of which some samples do
    not fit has none: those that do would be trained as if nothing were behind them.
    """
    capacity = len(ray_indices)
    used = torch.arange(capacity, device=ray_indices.device) < count
    ray_indices = torch.where(used, ray_indices, num_rays - 1)
    cut = torch.where(count > capacity, ray_indices[-1], -1)
    return ray_indices, used & (ray_indices != cut)


class Space(Protocol):
    """A map from the scene to unit coordinates, and where rays are sampled in it."""

    step: float  # shortest length of a marching step, scene units
    num_steps: int  # most marching steps along a ray

    def to_unit(self, points: Tensor) -> Tensor:
        """Unit coordinates of points [..., 3] of the scene."""

    def span(self, rays: Rays, bounds: Tensor) -> tuple[Tensor, Tensor]:
        """The t [R, 1] at which rays enter and leave ``bounds``, unit coordinates [2, 3].

        A ray that misses has leave <= enter.
        """

    def midpoints(
        self, rays: Rays, enter: Tensor, leave: Tensor, u: Tensor | float, *, static: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Midpoints t [R, K] of the intervals of rays, and the intervals' lengths in t.

        enter, leave: see ``span``. u [R, 1] or a number, in [0, 1): where in its first interval a
        ray's first midpoint lies. Lengths are [R, K], or [R, 1] if they are equal along a ray. K is
        as large as these rays need, or ``num_steps`` if ``static``.
        """

    def cell_coordinates(self, rays: Rays, t: Tensor, size: int) -> list[Tensor]:
        """Coordinates x, y, z [R, K] in [0, size] of rays at t [R, K], in cells of size^3."""


class Box:
    """A bounded scene: the box from ``low`` to ``high`` [3], mapped linearly to the cube.

    num_steps: marching steps along the box's diagonal. step: their length, if it is known; else it
    is read from the device.
    """

    def __init__(self, low: Tensor, high: Tensor, num_steps: int, step: float | None = None):
        self.low, self.high, self.num_steps = low, high, num_steps
        # In scene units
        self.step = float((high - low).norm()) / num_steps if step is None else step

    def __str__(self) -> str:
        corners = (",".join(f"{value:.2f}" for value in corner) for corner in (self.low, self.high))
        return f"box ({') to ('.join(corners)}), step {self.step:.4f}"

    def to_unit(self, points: Tensor) -> Tensor:
        """Unit coordinates of points [..., 3] of the scene."""
        return (points - self.low) / (self.high - self.low) * 2 - 1

    def from_unit(self, unit: Tensor) -> Tensor:
        """Points of the scene at unit coordinates [..., 3]."""
        return (unit + 1) / 2 * (self.high - self.low) + self.low

    def span(self, rays: Rays, bounds: Tensor) -> tuple[Tensor, Tensor]:
        """See ``Space.span``; never outside of the rays' near and far."""
        low, high = self.from_unit(bounds)
        inverse = 1.0 / torch.where(rays.directions.abs() < 1e-9, 1e-9, rays.directions)
        first, second = (low - rays.origins) * inverse, (high - rays.origins) * inverse
        enter = torch.minimum(first, second).amax(-1, keepdim=True).maximum(rays.near)
        leave = torch.maximum(first, second).amin(-1, keepdim=True).minimum(rays.far)
        return enter, leave

    def midpoints(
        self, rays: Rays, enter: Tensor, leave: Tensor, u: Tensor | float, *, static: bool = False
    ) -> tuple[Tensor, Tensor]:
        """See ``Space.midpoints``; equal steps from where a ray enters, lengths [R, 1]."""
        step = self.step / rays.directions.norm(dim=-1, keepdim=True)
        if static:
            count = self.num_steps
        else:
            count = int(((leave - enter) / step).amax().ceil()) if len(enter) else 0
        numbers = torch.arange(count, device=step.device, dtype=step.dtype)
        return torch.addcmul(enter + u * step, numbers, step), step

    def cell_coordinates(self, rays: Rays, t: Tensor, size: int) -> list[Tensor]:
        """See ``Space.cell_coordinates``."""
        scale = size / (self.high - self.low)
        start, slope = (rays.origins - self.low) * scale, rays.directions * scale
        return [torch.addcmul(start[:, axis, None], slope[:, axis, None], t) for axis in range(3)]


class Contraction:
    """An unbounded scene: all space contracted into a ball of radius 2, scaled to the unit ball.

    x -> (2 - 1 / |x|) x / |x| for |x| > 1 (Barron et al. 2022, Mip-NeRF 360, eq. 10). Marching
    steps grow with distance: ``cone_angle`` times the distance, at least 2 / num_steps. near, far:
    of all rays, as distances.
    """

    def __init__(self, near: float, far: float, num_steps: int, cone_angle: float):
        edges, t, smallest = [near], near, 2.0 / num_steps
        while t < far:
            t += max(smallest, t * cone_angle)
            edges.append(t)
        self.t_edges = torch.tensor(edges)
        self.step, self.num_steps = smallest, len(edges) - 1

    def to(self, device: torch.device | str) -> "Contraction":
        """This space, with its step edges moved to ``device``."""
        self.t_edges = self.t_edges.to(device)
        return self

    def __str__(self) -> str:
        return f"contracted space, {self.num_steps} steps of {self.step:.4f} and up"

    def to_unit(self, points: Tensor) -> Tensor:
        """Unit coordinates of points [..., 3] of the scene."""
        radius = points.norm(dim=-1, keepdim=True).clamp(min=1.0)
        return points * (2.0 - 1.0 / radius) / radius / 2

    def span(self, rays: Rays, bounds: Tensor) -> tuple[Tensor, Tensor]:
        """See ``Space.span``; from near to far, whatever ``bounds`` is."""
        scale = 1.0 / rays.directions.norm(dim=-1, keepdim=True)
        return rays.near * scale, rays.far * scale

    def midpoints(
        self, rays: Rays, enter: Tensor, leave: Tensor, u: Tensor | float, *, static: bool = False
    ) -> tuple[Tensor, Tensor]:
        """See ``Space.midpoints``; all rays have the same steps, lengths [R, K]."""
        scale, steps = 1.0 / rays.directions.norm(dim=-1, keepdim=True), self.t_edges.diff()
        return (self.t_edges[:-1] + steps * u) * scale, steps * scale

    def cell_coordinates(self, rays: Rays, t: Tensor, size: int) -> list[Tensor]:
        """See ``Space.cell_coordinates``."""
        points = rays.origins[:, None] + rays.directions[:, None] * t[..., None]
        return [(axis + 1) * (size / 2) for axis in self.to_unit(points).unbind(-1)]


class OccupancyGrid(nn.Module):
    """Which of resolution^3 cells of the unit cube are not empty (Instant-NGP, appendix E.2).

    decay: factor on a cell's density at each update of it. All buffers are in the checkpoint.
    """

    density: Tensor  # [R^3] decaying maximum of the densities found in each cell, per scene unit
    occupied: Tensor  # [R^3] bool, cells in which rays are sampled; at first all
    bounds: Tensor  # [2, 3] corners of a box around the occupied cells, unit coordinates
    possible: Tensor  # [R^3] bool, cells that ``carve`` has not ruled out

    def __init__(self, resolution: int = 64, decay: float = DECAY):
        super().__init__()
        self.resolution, self.decay = resolution, decay
        cells = resolution**3
        self.register_buffer("density", torch.zeros(cells))
        self.register_buffer("occupied", torch.ones(cells, dtype=torch.bool))
        self.register_buffer("bounds", torch.tensor([[-1.0] * 3, [1.0] * 3]))
        self.register_buffer("possible", torch.ones(cells, dtype=torch.bool))
        self._possible_cells: Tensor | None = None  # indices of ``possible``, once they are needed
        self.register_load_state_dict_post_hook(lambda grid, keys: grid._forget_possible_cells())

    def _forget_possible_cells(self) -> None:
        self._possible_cells = None

    @property
    def fraction(self) -> float:
        """Fraction of the cells that are occupied."""
        return self.occupied.float().mean().item()

    def cell_points(self, cells: Tensor, u: Tensor | None = None) -> Tensor:
        """Unit points [M, 3] in cells [M] (indices): their centers, or at u [M, 3] in [0, 1)."""
        size = self.resolution
        corner = torch.stack([cells // size**2, cells // size % size, cells % size], dim=-1)
        return (corner + (0.5 if u is None else u)) / size * 2 - 1

    @torch.no_grad()
    def update(
        self,
        density_at: Callable[[Tensor], Tensor],
        step: int,
        step_length: float,
        generator: torch.Generator,
        *,
        static: bool = False,
    ) -> None:
        """Evaluate the density at random points of some cells and recompute ``occupied``.

        density_at: unit points [M, 3] -> density [M]. step_length: of marching, scene units. All
        cells while ``step`` < WARM_UP; later 1/8 of them, half drawn from all, half from occupied
        ones. static: nothing is read on the host, with other draws.
        """
        device = self.density.device
        if self._possible_cells is None:
            self._possible_cells = self.possible.nonzero()[:, 0]
        possible = self._possible_cells
        if step < WARM_UP:
            cells = possible
        else:
            count = max(1, len(possible) // 16)
            cells = possible[self._draw(len(possible), count, generator)]
            if static:
                cells = torch.cat([cells, self._draw_occupied(count, generator)])
            elif len(occupied := self.occupied.nonzero()[:, 0]):
                cells = torch.cat([cells, occupied[self._draw(len(occupied), count, generator)]])
        u = torch.rand(len(cells), 3, generator=generator, device=device)
        found = torch.cat([density_at(part) for part in self.cell_points(cells, u).split(1 << 15)])
        self.density[cells] = torch.maximum(self.density[cells] * self.decay, found.float())
        mean = self.density[possible].mean()
        threshold = mean.clamp(ALWAYS_EMPTY / step_length, MIN_OPTICAL_DEPTH / step_length)
        self.occupied.copy_((self.density > threshold) & self.possible)
        self._tighten()

    def occupied_at(self, unit: Tensor) -> Tensor:
        """Whether unit points [N, 3] lie in occupied cells -> [N] bool; False outside the cube."""
        inside = (unit.abs() <= 1).all(-1)
        coordinates = ((unit.clamp(-1, 1) + 1) * (self.resolution / 2)).unbind(-1)
        return self._occupied_at(list(coordinates)) & inside

    @torch.no_grad()
    def carve(self, possible: Tensor) -> None:
        """Exclude cells permanently: those where ``possible`` [R^3] bool is False."""
        self.possible.copy_(possible)
        self._forget_possible_cells()
        self.occupied &= possible
        self._tighten()

    def _tighten(self) -> None:
        """Set ``bounds`` to the box around the occupied cells, or to the cube if there are none."""
        size = self.resolution
        occupied = self.occupied.view(size, size, size)
        for axis in range(3):
            others = [other for other in range(3) if other != axis]
            used = occupied.any(others[1]).any(others[0]).to(torch.uint8)
            # argmax is 0 where none is used: then the bounds are the cube's.
            self.bounds[0, axis] = used.argmax() / size * 2 - 1
            self.bounds[1, axis] = (size - used.flip(0).argmax()) / size * 2 - 1

    @staticmethod
    def _draw(high: int, count: int, generator: torch.Generator) -> Tensor:
        return torch.randint(high, (count,), generator=generator, device=generator.device)

    def _draw_occupied(self, count: int, generator: torch.Generator) -> Tensor:
        """``count`` random occupied cells, by the inverse of their cumulative number."""
        total = self.occupied.cumsum(0, dtype=torch.int32)
        u = torch.rand(count, generator=generator, device=generator.device)
        wanted = (u * total[-1]).to(torch.int32).minimum(total[-1] - 1) + 1
        return torch.searchsorted(total, wanted).clamp(max=len(total) - 1)

    @torch.no_grad()
    def march(
        self, rays: Rays, space: Space, u: Tensor | None, capacity: int | None = None
    ) -> Samples:
        """The samples of rays [R] in occupied cells.

        u [R, 1] in [0, 1) shifts each ray's samples, see ``Space.midpoints``; None: 0.5. capacity:
        the number of rows of the result with static shapes, see the module.
        """
        static, num_rays = capacity is not None, len(rays.origins)
        enter, leave = space.span(rays, self.bounds)
        hits = None
        if not static:  # rays that miss the box are left out at once
            hits = (leave > enter)[:, 0].nonzero()[:, 0]
            rays, enter, leave = rays.part(hits), enter[hits], leave[hits]
            u = None if u is None else u[hits]
        t, lengths = space.midpoints(
            rays, enter, leave, 0.5 if u is None else u, static=static
        )  # [R, K]
        cells = space.cell_coordinates(rays, t.minimum(leave), self.resolution)
        if static:  # rays that miss the box: into the empty cells around the grid
            cells = [axis.clamp(-0.5, self.resolution + 0.5) for axis in cells]
        inside = self._occupied_at(cells) & (t < leave)
        # index_select, here and wherever samples are selected: 3 times as fast as [] on a CPU.
        used = found = None
        if capacity is None:
            row, number = inside.nonzero(as_tuple=True)
            sample = row * t.shape[1] + number
        else:
            sample, found = first_true(inside.flatten(), capacity)
            row, used = rows_in_use(sample // t.shape[1], found, num_rays)
        t = t.flatten().index_select(0, sample)
        lengths = lengths * rays.directions.norm(dim=-1, keepdim=True)
        per_sample = sample if lengths.shape[1] > 1 else row
        lengths = lengths.flatten().index_select(0, per_sample)
        if used is not None:
            lengths = torch.where(used, lengths, 0.0)
        origins, directions = (part.index_select(0, row) for part in rays[:2])
        points = space.to_unit(torch.addcmul(origins, directions, t[:, None]))
        ray_indices = row if hits is None else hits.index_select(0, row)
        return Samples(ray_indices, t, lengths, points, found)

    def _occupied_at(self, coordinates: list[Tensor]) -> Tensor:
        """Whether the cells at coordinates x, y, z in [0, resolution] are occupied, same shape.

        The grid is padded by one empty cell for points that rounding puts outside.
        """
        size = self.resolution
        padded = F.pad(self.occupied.view(size, size, size), (1, 1, 1, 1, 1, 1)).flatten()
        x, y, z = ((axis + 1).to(torch.int32) for axis in coordinates)
        row = torch.add(y, x, alpha=size + 2)
        cell = torch.add(z, row, alpha=size + 2)
        return padded.index_select(0, cell.flatten()).view(cell.shape)
