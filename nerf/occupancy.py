"""Where the scene is not empty: a grid of occupied cells, and marching rays through it.

Unit coordinates: every space below maps its scene into the cube [-1, 1]^3, where the grid's cells
and the field's features live. A ray's samples are packed: one flat list over all rays, sorted by
ray and distance, with the number of its ray beside each sample.
(Mueller et al. 2022, Instant-NGP, section 5.2 and appendix E; Li et al. 2023, NerfAcc.)
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nerf.rays import Rays

DECAY = 0.95  # of a cell's density per look, so that a cell can become empty again
MIN_OPTICAL_DEPTH = 0.01  # of one step, below which a cell counts as empty ...
ALWAYS_EMPTY = 1e-4  # ... at the latest; before, below the mean: all start as thin fog
WARM_UP = 256  # steps during which every cell is looked at


class Samples(NamedTuple):
    """Packed samples of R rays, N in all."""

    ray_indices: Tensor  # [N] number of the sample's ray, ascending
    t: Tensor  # [N] middle of the sample's interval
    lengths: Tensor  # [N] length of the interval in scene units
    points: Tensor  # [N, 3] unit coordinates


class Box:
    """A bounded scene: the box from ``low`` to ``high`` [3], mapped linearly to the cube."""

    def __init__(self, low: Tensor, high: Tensor, num_steps: int):
        self.low, self.high, self.num_steps = low, high, num_steps
        self.step = float((high - low).norm()) / num_steps  # scene units

    def __str__(self) -> str:
        corners = (",".join(f"{value:.2f}" for value in corner) for corner in (self.low, self.high))
        return f"box ({') to ('.join(corners)}), step {self.step:.4f}"

    def to_unit(self, points: Tensor) -> Tensor:
        return (points - self.low) / (self.high - self.low) * 2 - 1

    def from_unit(self, unit: Tensor) -> Tensor:
        return (unit + 1) / 2 * (self.high - self.low) + self.low

    def span(self, rays: Rays, bounds: Tensor) -> tuple[Tensor, Tensor]:
        """The t [R, 1] at which rays enter and leave ``bounds``, unit coordinates [2, 3].

        A ray that misses leaves before it enters.
        """
        low, high = self.from_unit(bounds)
        inverse = 1.0 / torch.where(rays.directions.abs() < 1e-9, 1e-9, rays.directions)
        first, second = (low - rays.origins) * inverse, (high - rays.origins) * inverse
        enter = torch.minimum(first, second).amax(-1, keepdim=True).maximum(rays.near)
        leave = torch.maximum(first, second).amin(-1, keepdim=True).minimum(rays.far)
        return enter, leave

    def midpoints(self, rays: Rays, enter: Tensor, leave: Tensor, u) -> tuple[Tensor, Tensor]:
        """Where rays are sampled: middles t [R, K] of intervals, and their lengths [R, K or 1].

        enter, leave: see ``span``. u [R, 1] or a number in [0, 1): where in its first interval
        a ray's first middle lies.
        """
        step = self.step / rays.directions.norm(dim=-1, keepdim=True)
        count = int(((leave - enter) / step).amax().ceil()) if len(enter) else 0
        numbers = torch.arange(count, device=step.device, dtype=step.dtype)
        return torch.addcmul(enter + u * step, numbers, step), step

    def cell_coordinates(self, rays: Rays, t: Tensor, size: int) -> list[Tensor]:
        """Cell coordinates in [0, size] of each ray at t [R, K], axis by axis."""
        scale = size / (self.high - self.low)
        start, slope = (rays.origins - self.low) * scale, rays.directions * scale
        return [torch.addcmul(start[:, axis, None], slope[:, axis, None], t) for axis in range(3)]


class Contraction:
    """An unbounded scene: what is farther than 1 from the origin is drawn into a ball of radius 2.

    x -> (2 - 1 / |x|) x / |x| for |x| > 1 (Barron et al. 2022, Mip-NeRF 360, eq. 10). Steps grow
    with distance: ``cone_angle`` times t, at least 2 / num_steps.
    """

    def __init__(self, near: float, far: float, num_steps: int, cone_angle: float):
        edges, t, smallest = [near], near, 2.0 / num_steps
        while t < far:
            t += max(smallest, t * cone_angle)
            edges.append(t)
        self.t_edges = torch.tensor(edges)
        self.step = smallest

    def to(self, device) -> "Contraction":
        self.t_edges = self.t_edges.to(device)
        return self

    def __str__(self) -> str:
        return f"contracted space, {len(self.t_edges) - 1} steps of {self.step:.4f} and up"

    def to_unit(self, points: Tensor) -> Tensor:
        radius = points.norm(dim=-1, keepdim=True).clamp(min=1.0)
        return points * (2.0 - 1.0 / radius) / radius / 2

    def span(self, rays: Rays, bounds: Tensor) -> tuple[Tensor, Tensor]:
        """As ``Box.span``: everything from near to far."""
        scale = 1.0 / rays.directions.norm(dim=-1, keepdim=True)
        return rays.near * scale, rays.far * scale

    def midpoints(self, rays: Rays, enter: Tensor, leave: Tensor, u) -> tuple[Tensor, Tensor]:
        """As ``Box.middles``; one ladder of distances serves all rays."""
        scale, rungs = 1.0 / rays.directions.norm(dim=-1, keepdim=True), self.t_edges.diff()
        return (self.t_edges[:-1] + rungs * u) * scale, rungs * scale

    def cell_coordinates(self, rays: Rays, t: Tensor, size: int) -> list[Tensor]:
        """As ``Box.places``."""
        points = rays.origins[:, None] + rays.directions[:, None] * t[..., None]
        return [(axis + 1) * (size / 2) for axis in self.to_unit(points).unbind(-1)]


class OccupancyGrid(nn.Module):
    """Cells of the unit cube that hold density. decay: of what a cell held, per look at it.

    ``density``: the largest density seen lately in each cell, scene units. ``occupied``: cells
    worth sampling. Both start full, and both are in the checkpoint.
    """

    def __init__(self, resolution: int = 64, decay: float = DECAY):
        super().__init__()
        self.resolution, self.decay = resolution, decay
        cells = resolution**3
        self.register_buffer("density", torch.zeros(cells))
        self.register_buffer("occupied", torch.ones(cells, dtype=torch.bool))
        self.register_buffer("bounds", torch.tensor([[-1.0] * 3, [1.0] * 3]))
        # Cells that can never hold anything, known from the alpha masks; see ``carve``.
        self.register_buffer("possible", torch.ones(cells, dtype=torch.bool))

    @property
    def fraction(self) -> float:
        """Part of the cells that is occupied."""
        return self.occupied.float().mean().item()

    def cell_points(self, cells: Tensor, u: Tensor | None = None) -> Tensor:
        """Unit points in cells [M] (numbers) -> [M, 3]: the centers, or at u [M, 3] in [0, 1)."""
        size = self.resolution
        place = torch.stack([cells // size**2, cells // size % size, cells % size], dim=-1)
        return (place + (0.5 if u is None else u)) / size * 2 - 1

    @torch.no_grad()
    def update(
        self, density_at: Callable[[Tensor], Tensor], step: int, step_length: float, generator
    ) -> None:
        """Look at some cells and decide anew which are occupied.

        density_at: unit points [M, 3] -> density [M]. step_length: of one marching step. All cells
        while ``step`` < 256; later an eighth of them, half anywhere and half where it is occupied.
        """
        device = self.density.device
        possible = self.possible.nonzero()[:, 0]
        if step < WARM_UP:
            cells = possible
        else:
            count = max(1, len(possible) // 16)
            anywhere = possible[self._draw(len(possible), count, generator)]
            occupied = self.occupied.nonzero()[:, 0]
            cells = anywhere
            if len(occupied):
                cells = torch.cat([cells, occupied[self._draw(len(occupied), count, generator)]])
        u = torch.rand(len(cells), 3, generator=generator, device=device)
        fresh = torch.cat([density_at(part) for part in self.cell_points(cells, u).split(1 << 15)])
        self.density[cells] = torch.maximum(self.density[cells] * self.decay, fresh.float())
        mean = self.density[possible].mean()
        threshold = mean.clamp(ALWAYS_EMPTY / step_length, MIN_OPTICAL_DEPTH / step_length)
        self.occupied.copy_((self.density > threshold) & self.possible)
        self._tighten()

    def occupied_at(self, unit: Tensor) -> Tensor:
        """Whether unit points [N, 3] lie in occupied cells, [N]; outside the cube nothing does."""
        inside = (unit.abs() <= 1).all(-1)
        places = ((unit.clamp(-1, 1) + 1) * (self.resolution / 2)).unbind(-1)
        return self._occupied_at(list(places)) & inside

    @torch.no_grad()
    def carve(self, possible: Tensor) -> None:
        """Rule cells out for good: possible [R^3] bool."""
        self.possible.copy_(possible)
        self.occupied &= possible
        self._tighten()

    def _tighten(self) -> None:
        """Bounds around the occupied cells; the whole cube while there are none."""
        size = self.resolution
        grid = self.occupied.view(size, size, size)
        if not grid.any():
            self.bounds.copy_(torch.tensor([[-1.0] * 3, [1.0] * 3]))
            return
        for axis in range(3):
            others = [other for other in range(3) if other != axis]
            used = grid.any(others[1]).any(others[0]).nonzero()
            self.bounds[0, axis] = used.min() / size * 2 - 1
            self.bounds[1, axis] = (used.max() + 1) / size * 2 - 1

    @staticmethod
    def _draw(high: int, count: int, generator) -> Tensor:
        return torch.randint(high, (count,), generator=generator, device=generator.device)

    @torch.no_grad()
    def march(self, rays: Rays, space, u: Tensor | None) -> Samples:
        """The samples of rays [R] that lie in occupied cells. u [R, 1]: see ``Box.middles``."""
        enter, leave = space.span(rays, self.bounds)
        hits = (leave > enter)[:, 0].nonzero()[:, 0]
        rays, enter, leave = rays.part(hits), enter[hits], leave[hits]
        t, lengths = space.midpoints(rays, enter, leave, 0.5 if u is None else u[hits])  # [R, K]
        occupied = self._occupied_at(
            space.cell_coordinates(rays, t.minimum(leave), self.resolution)
        )
        row, number = (occupied & (t < leave)).nonzero(as_tuple=True)
        # index_select, here and wherever samples are picked: 3 times as fast as brackets on a CPU.
        sample = row * t.shape[1] + number
        t = t.flatten().index_select(0, sample)
        lengths = lengths * rays.directions.norm(dim=-1, keepdim=True)
        per_sample = sample if lengths.shape[1] > 1 else row
        lengths = lengths.flatten().index_select(0, per_sample)
        origins, directions = (part.index_select(0, row) for part in rays[:2])
        points = space.to_unit(torch.addcmul(origins, directions, t[:, None]))
        return Samples(hits.index_select(0, row), t, lengths, points)

    def _occupied_at(self, places: list[Tensor]) -> Tensor:
        """Whether the cells at three coordinates in [0, resolution] are occupied, same shape.

        A rim of empty cells takes what rounding puts outside.
        """
        size = self.resolution
        padded = F.pad(self.occupied.view(size, size, size), (1, 1, 1, 1, 1, 1)).flatten()
        x, y, z = ((place + 1).to(torch.int32) for place in places)
        row = torch.add(y, x, alpha=size + 2)
        cell = torch.add(z, row, alpha=size + 2)
        return padded.index_select(0, cell.flatten()).view(cell.shape)
