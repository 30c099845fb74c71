"""Rays -> colors with one field and an occupancy grid: samples only where something is.

The same interface as ``nerf.renderer.NeRFRenderer``. Samples are packed (see ``nerf.occupancy``),
and every step takes as many rays as fill a fixed number of samples.
"""

import torch
from torch import Tensor, nn

from nerf.field import density_packed, query_packed
from nerf.occupancy import Box, OccupancyGrid, Samples
from nerf.rays import Rays
from nerf.renderer import RayNoise, Rendered
from nerf.volume import PACKED_WEIGHTS, importance_resample_packed, scale_gradient, sum_per_ray

UPDATE_EVERY = 16  # steps between looks at the occupancy grid
DENSITY_SHIFT = 3.0  # of exp: fields start as a thin fog that light gets through
FEWEST_RAYS, MOST_RAYS = 256, 1 << 15
RESAMPLE_AFTER = 500  # steps; before, fog at the cameras would draw all samples to itself, and stay
SAMPLES_A_ROUND = 8  # per ray, between two looks at which rays are already opaque


def density_of(raw: Tensor) -> Tensor:
    """exp(raw - 3), at most e^12: positive everywhere, so its gradient never dies."""
    return torch.exp((raw - DENSITY_SHIFT).clamp(max=12.0))


class OccupancyRenderer(nn.Module):
    """One field, sampled where an occupancy grid says that something is.

    space: Box or Contraction, scene -> unit coordinates. target_samples: per training step; the
    number of rays follows. random_background: train over a color of its own per ray, so that
    nothing transparent can pass for the background. composite: a key of PACKED_WEIGHTS.
    early_stop: transmittance at which a ray ends (0: never). near_scaling: distance up to which
    gradients are scaled down by its square (0: not at all). lambda_tv: weight of the planes'
    variation in ``penalty``. resample: samples a ray, redrawn where a first look, without a graph,
    finds density (0: those that were marched); from step ``RESAMPLE_AFTER`` on.
    """

    def __init__(
        self,
        field: nn.Module,
        grid: OccupancyGrid,
        space,
        *,
        background: float,
        random_background: bool = False,
        target_samples: int = 8192,
        first_rays: int = 1024,
        composite: str = "cumsum",
        early_stop: float = 1e-3,
        near_scaling: float = 0.0,
        lambda_tv: float = 0.0,
        resample: int = 0,
    ):
        super().__init__()
        self.field, self.grid, self.space = field, grid, space
        self.background, self.random_background = background, random_background
        self.target_samples, self.num_rays = target_samples, first_rays
        self.packed_weights, self.early_stop = PACKED_WEIGHTS[composite], early_stop
        self.near_scaling, self.lambda_tv, self.resample = near_scaling, lambda_tv, resample
        self.num_samples = 0  # of the latest batch
        self.resamples = resample > 0  # now: not during the first steps

    @property
    def fields(self) -> list[nn.Module]:
        """The network."""
        return [self.field]

    def density(self, points: Tensor) -> Tensor:
        """Density [N] per scene unit at points [N, 3] in the rays' coordinates; 0 in empty cells.

        What the field says there was never seen by training, nor is it by pictures.
        """
        unit = self.space.to_unit(points)
        index = self.grid.occupied_at(unit).nonzero()[:, 0]
        found = density_of(density_packed(self.field, unit.index_select(0, index)))
        return found.new_zeros(len(points)).index_copy_(0, index, found)

    def color(self, points: Tensor, viewdirs: Tensor) -> Tensor:
        """RGB [N, 3] in [0, 1] at points [N, 3] seen along viewdirs [N, 3]."""
        number = torch.arange(len(points), device=points.device)
        unit = self.space.to_unit(points)
        return torch.sigmoid(query_packed(self.field, unit, viewdirs, number)[1])

    def draw_noise(self, num_rays: int, generator: torch.Generator) -> RayNoise:
        """One shift per ray, and its background color where that is random."""

        def uniform(count: int) -> Tensor:
            return torch.rand(num_rays, count, generator=generator, device=generator.device)

        background = uniform(3) if self.random_background else None
        return RayNoise(uniform(1), None, None, None, background)

    def rays_per_step(self, wanted: int, num_ranks: int) -> int:
        """Rays of the next step over all ranks; ``wanted`` is ignored, samples are what counts."""
        return max(num_ranks, self.num_rays // num_ranks * num_ranks)

    def begin_step(self, step: int, generator: torch.Generator) -> None:
        """Keep the grid up to date. The same on every rank: same weights, same draws."""
        self.resamples = self.resample > 0 and step >= RESAMPLE_AFTER
        if step % UPDATE_EVERY == 0:
            self.grid.update(
                lambda points: density_of(self.field.density(points)),
                step,
                self.space.step,
                generator,
            )

    def end_step(self, num_rays: int, num_samples: float) -> None:
        """Choose the next step's rays from how many samples ``num_rays`` of them took."""
        wanted = int(num_rays * self.target_samples / max(1.0, num_samples))
        self.num_rays = min(MOST_RAYS, max(FEWEST_RAYS, wanted))

    def penalty(self) -> Tensor | float:
        """What the loss gets beside the colors' error."""
        return self.lambda_tv * self.field.encoding.variation() if self.lambda_tv else 0.0

    def forward(self, rays: Rays, noise: RayNoise | None = None) -> tuple[Rendered, ...]:
        """The one level there is, of rays [R]."""
        jitter, background = (noise.jitter, noise.background) if noise else (None, None)
        samples = self.grid.march(rays, self.space, None if self.resamples else jitter)
        num_rays = len(rays.origins)
        if self.resamples:
            samples = self._importance_resample(samples, rays, jitter)
        elif self.early_stop and self.training:
            samples = self._cull_occluded(samples, num_rays)
        self.num_samples = len(samples.ray_indices)
        if background is None:
            background = rays.origins.new_full((num_rays, 3), self.background)
        if not self.num_samples:  # nothing to see; every parameter still needs a gradient under DDP
            nothing = 0.0 * sum(parameter.sum() for parameter in self.field.parameters())
            zero = rays.origins.new_zeros(num_rays)
            return (Rendered(background + nothing, zero, zero),)
        raw_sigma, raw_rgb = query_packed(
            self.field, samples.points, rays.viewdirs, samples.ray_indices
        )
        if self.near_scaling:
            factor = self._near_factor(rays, samples)
            raw_sigma = scale_gradient(raw_sigma, factor)
            raw_rgb = scale_gradient(raw_rgb, factor[:, None])
        weights = self.packed_weights(
            density_of(raw_sigma), samples.lengths, samples.ray_indices, num_rays
        )
        values = torch.cat(
            [torch.sigmoid(raw_rgb), torch.ones_like(samples.t[:, None]), samples.t[:, None]], -1
        )
        sums = sum_per_ray(weights[:, None] * values, samples.ray_indices, num_rays)  # [R, 5]
        return (_rendered(sums, background),)

    def _near_factor(self, rays: Rays, samples: Samples) -> Tensor:
        """min(1, (distance / near_scaling)^2) of samples -> [N].

        What lies close to a camera is sampled more densely by its rays, by the square of the
        distance, and fog grows there; this evens it out (Philip and Deschaintre 2023, eq. 5).
        """
        distance = samples.t * rays.directions.norm(dim=-1).index_select(0, samples.ray_indices)
        return (distance / self.near_scaling).square().clamp(max=1.0)

    @torch.no_grad()
    def _cull_occluded(self, samples: Samples, num_rays: int) -> Samples:
        """The samples that light gets through to; found without a graph, by density alone.

        About half of a ray's samples lie behind a surface once there are surfaces, and a graph
        costs several times this look (NerfAcc, section 3.2).
        """
        sigma = density_of(density_packed(self.field, samples.points))
        weights = self.packed_weights(sigma, samples.lengths, samples.ray_indices, num_rays)
        alpha = -torch.expm1(-sigma * samples.lengths)
        index = (weights > self.early_stop * alpha).nonzero()[:, 0]  # by transmittance
        return Samples(*(member.index_select(0, index) for member in samples))

    @torch.no_grad()
    def _importance_resample(self, samples: Samples, rays: Rays, u: Tensor | None) -> Samples:
        """``resample`` samples a ray where the field has light end, of those that were marched.

        Steps across a scene that reaches far are longer than its surfaces are thick.
        """
        num_rays, scale = len(rays.origins), rays.directions.norm(dim=-1)
        sigma = density_of(density_packed(self.field, samples.points))
        weights = self.packed_weights(sigma, samples.lengths, samples.ray_indices, num_rays)
        lengths = samples.lengths / scale.index_select(0, samples.ray_indices)
        packed = weights, samples.t, lengths, samples.ray_indices
        ray_indices, t, lengths = importance_resample_packed(*packed, num_rays, self.resample, u)
        origins, directions = (part.index_select(0, ray_indices) for part in rays[:2])
        points = self.space.to_unit(torch.addcmul(origins, directions, t[:, None]))
        return Samples(ray_indices, t, lengths * scale.index_select(0, ray_indices), points)

    @torch.no_grad()
    def render(self, rays: Rays) -> Rendered:
        """Rays [R] front to back, ``SAMPLES_A_ROUND`` samples at a time, until they are opaque."""
        if self.resamples:
            return self(rays)[0]
        num_rays = len(rays.origins)
        samples = self.grid.march(rays, self.space, None)
        sums = rays.origins.new_zeros(num_rays, 5)
        counts = torch.bincount(samples.ray_indices, minlength=num_rays)
        first = torch.cumsum(counts, dim=0) - counts
        alive = counts.nonzero()[:, 0]
        through = torch.ones_like(sums[:, 0])  # transmittance so far
        done = 0
        while len(alive):
            left = (counts[alive] - done).clamp(max=SAMPLES_A_ROUND)
            rows = torch.repeat_interleave(torch.arange(len(alive), device=left.device), left)
            starts = torch.cumsum(left, dim=0) - left
            numbers = torch.arange(len(rows), device=left.device)
            index = (first[alive] - starts + done).index_select(0, rows) + numbers
            part = Samples(*(member.index_select(0, index) for member in samples))
            raw_sigma, raw_rgb = query_packed(self.field, part.points, rays.viewdirs[alive], rows)
            optical = density_of(raw_sigma) * part.lengths
            weights = self.packed_weights(optical, torch.ones_like(optical), rows, len(alive))
            weights = weights * through[alive].index_select(0, rows)
            values = torch.cat(
                [torch.sigmoid(raw_rgb), torch.ones_like(part.t[:, None]), part.t[:, None]], -1
            )
            sums.index_add_(0, part.ray_indices, weights[:, None] * values)
            through[alive] *= torch.exp(-sum_per_ray(optical, rows, len(alive)))
            done += SAMPLES_A_ROUND
            alive = alive[(counts[alive] > done) & (through[alive] > self.early_stop)]
        return _rendered(sums, rays.origins.new_full((num_rays, 3), self.background))

    def checkpoint_state(self) -> dict:
        """What a checkpoint must hold of this renderer."""
        state = {
            "network_fn_state_dict": self.field.state_dict(),
            "occupancy_state_dict": self.grid.state_dict(),
            "num_rays": self.num_rays,
        }
        if isinstance(self.space, Box):
            state["box"] = torch.stack([self.space.low, self.space.high])
        return state

    def load_checkpoint_state(self, state: dict, load, where: str) -> None:
        """Put ``checkpoint_state`` back. load(module, state, where) is strict."""
        if "occupancy_state_dict" not in state:
            raise ValueError(f"{where}: was made without --occ_grid; leave that flag out")
        load(self.field, state["network_fn_state_dict"], f"{where}: field")
        load(self.grid, state["occupancy_state_dict"], f"{where}: occupancy grid")
        self.num_rays = state["num_rays"]
        if isinstance(self.space, Box):
            low, high = state["box"].to(self.space.low)
            self.space = Box(low, high, self.space.num_steps)

    def report(self) -> dict[str, float]:
        """Figures for the log: rays and samples of the latest step, and how full the grid is."""
        return {
            "rays": self.num_rays,
            "samples_per_ray": self.num_samples / self.num_rays,
            "occupied": self.grid.fraction,
        }

    def warning(self, step: int) -> str | None:
        """What is wrong with the grid, if something is."""
        fraction = self.grid.fraction
        if fraction == 0:
            return "the occupancy grid is empty: the scene lies outside its box; see --scene_bound"
        # Most of a contracted space is far away, where hardly anything is known to be empty.
        if step >= 2000 and fraction > 0.9 and isinstance(self.space, Box):
            return (
                f"{fraction:.0%} of the occupancy grid is still full: no empty space was found; "
                "check the poses, or leave --occ_grid out"
            )
        return None


def _rendered(sums: Tensor, background: Tensor) -> Rendered:
    """Sums over each ray of weight x (rgb, 1, t) [R, 5] and the background [R, 3]."""
    opacity = sums[:, 3]
    hit = opacity > 0
    depth = sums[:, 4] / torch.where(hit, opacity, torch.ones_like(opacity))
    return Rendered(sums[:, :3] + background * (1.0 - opacity[:, None]), opacity, depth)
