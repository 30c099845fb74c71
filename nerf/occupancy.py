"""Where the scene is not empty: a grid of occupied cells, and marching rays through it.

Unit coordinates: every space below maps its scene into the cube [-1, 1]^3, where the grid's cells
and the field's features live. A ray's samples are packed: one flat list over all rays, sorted by
ray and distance, with the number of its ray beside each sample.
(Mueller et al. 2022, Instant-NGP, section 5.2 and appendix E; Li et al. 2023, NerfAcc.)
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from nerf.rays import Rays

DECAY = 0.95  # of a cell's density per update, so that a cell can become empty again
MIN_OPTICAL_DEPTH = 0.01  # of one step, below which a cell counts as empty ...
ALWAYS_EMPTY = 1e-4  # ... at the latest; before, below the mean: all start as thin fog
WARM_UP = 256  # steps during which every cell is looked at


class Samples(NamedTuple):
    """Packed samples of R rays, N in all."""

    ray: Tensor  # [N] number of the sample's ray, ascending
    t: Tensor  # [N] middle of the sample's interval
    length: Tensor  # [N] length of the interval in scene units
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

    def edges(self, rays: Rays, bounds: Tensor, u: Tensor | None) -> tuple[Tensor, ...]:
        """Interval edges t [R, K + 1] of rays, and first and last t [R, 1] inside ``bounds``.

        bounds: unit coordinates [2, 3] of the part that is not empty. u [R, 1] in [0, 1) shifts
        each ray's intervals by that part of one step (None: half).
        """
        low, high = self.from_unit(bounds)
        inverse = 1.0 / torch.where(rays.directions.abs() < 1e-9, 1e-9, rays.directions)
        first, second = (low - rays.origins) * inverse, (high - rays.origins) * inverse
        enter = torch.minimum(first, second).amax(-1, keepdim=True).maximum(rays.near)
        leave = torch.maximum(first, second).amin(-1, keepdim=True).minimum(rays.far)
        step = self.step / rays.directions.norm(dim=-1, keepdim=True)
        count = int(((leave - enter) / step).amax().clamp(min=0).ceil()) + 1 if len(enter) else 1
        shift = 0.5 if u is None else u
        numbers = torch.arange(count + 1, device=step.device, dtype=step.dtype)
        return enter + (numbers + shift - 1) * step, enter, leave


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
        self.ladder = torch.tensor(edges)
        self.step = smallest

    def to(self, device) -> "Contraction":
        self.ladder = self.ladder.to(device)
        return self

    def __str__(self) -> str:
        return f"contracted space, {len(self.ladder) - 1} steps of {self.step:.4f} and up"

    def to_unit(self, points: Tensor) -> Tensor:
        radius = points.norm(dim=-1, keepdim=True).clamp(min=1.0)
        return points * (2.0 - 1.0 / radius) / radius / 2

    def edges(self, rays: Rays, bounds: Tensor, u: Tensor | None) -> tuple[Tensor, ...]:
        """As ``Box.edges``; one ladder of distances serves all rays."""
        shift = torch.full_like(rays.near, 0.5) if u is None else u
        scale = 1.0 / rays.directions.norm(dim=-1, keepdim=True)
        ladder = torch.lerp(self.ladder[:-1], self.ladder[1:], shift) * scale
        return ladder, rays.near * scale, rays.far * scale


class OccupancyGrid(nn.Module):
    """Cells of the unit cube that hold density.

    ``density``: the largest density seen lately in each cell, scene units. ``occupied``: cells
    worth sampling. Both start full, and both are in the checkpoint.
    """

    def __init__(self, resolution: int = 64):
        super().__init__()
        self.resolution = resolution
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
        """Unit points in cells [M] (numbers) -> [M, 3]: the centres, or at u [M, 3] in [0, 1)."""
        size = self.resolution
        place = torch.stack([cells // size**2, cells // size % size, cells % size], dim=-1)
        return (place + (0.5 if u is None else u)) / size * 2 - 1

    @torch.no_grad()
    def update(
        self, density_at: Callable[[Tensor], Tensor], step: int, length: float, generator
    ) -> None:
        """Look at some cells and decide anew which are occupied.

        density_at: unit points [M, 3] -> density [M]. length: of one marching step. All cells
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
        self.density[cells] = torch.maximum(self.density[cells] * DECAY, fresh.float())
        mean = self.density[possible].mean()
        threshold = mean.clamp(ALWAYS_EMPTY / length, MIN_OPTICAL_DEPTH / length)
        self.occupied.copy_((self.density > threshold) & self.possible)
        self._tighten()

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
        """The samples of rays [R] that lie in occupied cells. u [R, 1]: see ``Box.edges``."""
        edges, enter, leave = space.edges(rays, self.bounds, u)
        middle = 0.5 * (edges[:, 1:] + edges[:, :-1])  # [R, K]
        flat = self._cells_along(rays, space, middle)
        inside = (middle > enter) & (middle < leave)
        ray, number = (inside & self.occupied[flat]).nonzero(as_tuple=True)
        t = middle[ray, number]
        length = (edges[ray, number + 1] - edges[ray, number]) * rays.directions.norm(dim=-1)[ray]
        points = space.to_unit(rays.origins[ray] + rays.directions[ray] * t[:, None])
        return Samples(ray, t, length, points)

    def _cells_along(self, rays: Rays, space, t: Tensor) -> Tensor:
        """The cell number of each ray's place at t [R, K] -> [R, K]; outside ones are clamped."""
        size = self.resolution
        if isinstance(space, Box):  # linear: axis by axis, without ever making [R, K, 3]
            scale = size / (space.high - space.low)
            start, slope = (rays.origins - space.low) * scale, rays.directions * scale
            places = [
                torch.addcmul(start[:, axis, None], slope[:, axis, None], t) for axis in range(3)
            ]
        else:
            points = rays.origins[:, None] + rays.directions[:, None] * t[..., None]
            places = ((space.to_unit(points) + 1) / 2 * size).unbind(-1)
        x, y, z = (place.to(torch.int32).clamp(0, size - 1) for place in places)
        return (x * size + y) * size + z
