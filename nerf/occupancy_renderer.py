"""Volume rendering with one field and an occupancy grid: only occupied cells are sampled.

A ``nerf.renderer.Renderer``. Samples are packed (see ``nerf.occupancy``), and the number of rays
per step varies so that the number of samples stays near a target.
(Mueller et al. 2022, Instant-NGP; Li et al. 2023, NerfAcc.)
"""

from typing import Any

import torch
from torch import Tensor, nn

from nerf.encodings import TriPlane
from nerf.field import BUCKET, Field, density_packed, query_packed
from nerf.occupancy import Box, OccupancyGrid, Samples, Space
from nerf.rays import Rays
from nerf.renderer import LoadStateDict, RayNoise, Rendered, is_on
from nerf.volume import PACKED_WEIGHTS, importance_resample_packed, scale_gradient, sum_per_ray

UPDATE_EVERY = 16  # steps between updates of the occupancy grid
DENSITY_SHIFT = 3.0  # in exp(raw - 3): untrained fields are a thin, nearly transparent fog
FEWEST_RAYS, MOST_RAYS = 256, 1 << 15
# Step from which importance resampling is on. Earlier, the initial fog near the cameras would take
# all samples, and would then persist.
RESAMPLE_AFTER = 500
# Samples per ray, in ``render``, between two checks for opaque rays. A GPU waits for each check.
SAMPLES_PER_ROUND = {"cpu": 8, "cuda": 64}
# With static shapes: numbers of rays of a step, so that few of them occur; room for samples as a
# multiple of ``target_samples``, and how many more there may be before occluded ones are culled.
RAY_COUNTS = (
    *(64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 5120, 6144, 7168, 8192),
    *(10240, 12288, 14336, 16384, 20480, 24576, 28672, 32768),
)
SPARE_ROOM = 1.125
MARCHED_PER_SAMPLE, MARCHED_PER_RESAMPLE = 2, 4


def density_of(raw: Tensor) -> Tensor:
    """Density exp(raw - 3), at most e^12: its gradient vanishes nowhere below that bound."""
    return torch.exp((raw - DENSITY_SHIFT).clamp(max=12.0))


class OccupancyRenderer(nn.Module):
    """One field, sampled in the occupied cells of an occupancy grid.

    background: gray level of empty rays. random_background: train with a random background color
    per ray, so that transparent regions cannot take on the background's color. target_samples:
    samples per training step over all ranks; first_rays: rays of the first step. composite: a key
    of PACKED_WEIGHTS. early_stop: transmittance below which samples are culled (0: none).
    near_scaling: distance d below which gradients are multiplied by (distance / d)^2 (0: off).
    lambda_tv: weight of the feature planes' total variation in ``penalties``; lambda_l1: of a ray's
    summed sample opacities, the mean over rays. resample: importance samples per ray, from the
    weights of a first no-grad pass over the marched samples, from step ``RESAMPLE_AFTER`` on (0:
    train on the marched samples). static_shapes: train with lists of samples of constant length
    (``nerf.occupancy``): a GPU is never waited for; the number of rays is then of RAY_COUNTS.
    """

    def __init__(
        self,
        field: Field,
        grid: OccupancyGrid,
        space: Space,
        *,
        background: float,
        random_background: bool = False,
        target_samples: int = 8192,
        first_rays: int = 1024,
        composite: str = "cumsum",
        early_stop: float = 1e-3,
        near_scaling: float = 0.0,
        lambda_tv: Tensor | float = 0.0,
        lambda_l1: Tensor | float = 0.0,
        resample: int = 0,
        static_shapes: bool = False,
    ):
        super().__init__()
        self.field, self.grid, self.space = field, grid, space
        self.background, self.random_background = background, random_background
        self.target_samples, self.num_rays = target_samples, first_rays
        self.packed_weights, self.early_stop = PACKED_WEIGHTS[composite], early_stop
        self.near_scaling, self.lambda_tv, self.resample = near_scaling, lambda_tv, resample
        self.lambda_l1 = lambda_l1
        self._opacities: Tensor | float = 0.0  # of the latest forward, see lambda_l1
        # Of the latest forward, after ``end_step`` of the whole step. With static shapes a tensor
        # [], the share of the room that was used, times target_samples.
        self.batch_samples: int | Tensor = 0
        self.resamples = resample > 0  # whether it is on at the current step
        # The table of "padded" is as wide as the longest ray.
        self.static_shapes, self._num_ranks = static_shapes and composite == "cumsum", 1

    @property
    def capacity(self) -> int | None:
        """Rows of a training batch's samples with static shapes; None: as many as needed."""
        if not (self.static_shapes and self.training and torch.is_grad_enabled()):
            return None
        return -int(-SPARE_ROOM * self.target_samples / self._num_ranks // BUCKET) * BUCKET

    def graph_kind(self) -> tuple[bool, int]:
        """Whether samples are resampled, and the room for them, which is no tensor's shape."""
        return self.resamples, self.target_samples

    @property
    def fields(self) -> list[Field]:
        """The one field."""
        return [self.field]

    def compiled_parts(self) -> list[tuple[nn.Module, str]]:
        """See ``Renderer.compiled_parts``."""
        parts: list[tuple[nn.Module, str]] = [(self.field, "forward"), (self.field, "density")]
        if self.static_shapes:  # marching: a dozen passes over [rays, steps] become one
            parts.append((self.grid, "march"))
        return parts

    def density(self, points: Tensor) -> Tensor:
        """Density [N] per scene unit at points [N, 3] in the rays' coordinates; 0 in empty cells.

        The field is neither trained nor rendered in empty cells; its values there are arbitrary.
        """
        unit = self.space.to_unit(points)
        index = self.grid.occupied_at(unit).nonzero()[:, 0]
        density = density_of(density_packed(self.field, unit.index_select(0, index)))
        return density.new_zeros(len(points)).index_copy_(0, index, density)

    def color(self, points: Tensor, viewdirs: Tensor) -> Tensor:
        """RGB [N, 3] in [0, 1] at points [N, 3] from unit viewdirs [N, 3]."""
        ray_indices = torch.arange(len(points), device=points.device)
        unit = self.space.to_unit(points)
        return torch.sigmoid(query_packed(self.field, unit, viewdirs, ray_indices)[1])

    def draw_noise(self, num_rays: int, generator: torch.Generator) -> RayNoise:
        """A shift of the samples of each ray, and its background color if that is random."""

        def uniform(count: int) -> Tensor:
            return torch.rand(num_rays, count, generator=generator, device=generator.device)

        background = uniform(3) if self.random_background else None
        return RayNoise(uniform(1), None, None, None, background)

    def rays_per_step(self, N_rand: int, num_ranks: int) -> int:
        """Rays that take about ``target_samples`` samples; ``N_rand`` is ignored."""
        self._num_ranks, num_rays = num_ranks, self.num_rays
        if self.static_shapes:
            num_rays = max(c for c in RAY_COUNTS if c <= max(num_rays, RAY_COUNTS[0]))
        return max(num_ranks, num_rays // num_ranks * num_ranks)

    def begin_step(self, step: int, generator: torch.Generator) -> None:
        """Update the occupancy grid, every ``UPDATE_EVERY`` steps; equal on all ranks."""
        self.resamples = self.resample > 0 and step >= RESAMPLE_AFTER
        if step % UPDATE_EVERY == 0:
            self.grid.update(
                lambda points: density_of(self.field.density(points)),
                step,
                self.space.step,
                generator,
                static=self.static_shapes,
            )

    def end_step(self, num_rays: int, samples: float, total_samples: float) -> None:
        """Choose the next step's number of rays for ``target_samples`` samples."""
        num_wanted = int(num_rays * self.target_samples / max(1.0, total_samples))
        self.batch_samples = int(total_samples)  # of all ranks, for ``report``
        fewest = RAY_COUNTS[0] if self.static_shapes else FEWEST_RAYS
        self.num_rays = min(MOST_RAYS, max(fewest, num_wanted))

    def penalties(self) -> dict[str, Tensor | float]:
        """The regularization of the latest forward: "l1" and "tv", where their weights are on."""
        terms: dict[str, Tensor | float] = {}
        if is_on(self.lambda_l1):
            terms["l1"] = self.lambda_l1 * self._opacities
        self._opacities = 0.0
        if is_on(self.lambda_tv):
            assert isinstance(self.field.encoding, TriPlane), "lambda_tv is for feature planes"
            terms["tv"] = self.lambda_tv * self.field.encoding.variation()
        return terms

    def forward(self, rays: Rays, noise: RayNoise | None = None) -> tuple[Rendered, ...]:
        """Rays [R] rendered from the field, as a tuple of one level."""
        jitter, background = (noise.jitter, noise.background) if noise else (None, None)
        num_rays, room = len(rays.origins), self.capacity
        culls = self.early_stop > 0 and self.training and not self.resamples
        per_sample = MARCHED_PER_RESAMPLE if self.resamples else MARCHED_PER_SAMPLE if culls else 1
        marched = None if room is None else room * per_sample
        samples = self.grid.march(rays, self.space, None if self.resamples else jitter, marched)
        marched_found = samples.found
        if self.resamples:
            samples = self._importance_resample(samples, rays, jitter, static=room is not None)
        elif culls:
            samples = self._cull_occluded(samples, num_rays, room)
        self.batch_samples = len(samples.ray_indices)
        if room and marched and marched_found is not None:
            used = torch.maximum(samples.num_found / room, marched_found / marched)
            self.batch_samples = used * room
        if background is None:
            background = rays.origins.new_full((num_rays, 3), self.background)
        if not len(samples.ray_indices):  # DDP needs a gradient of every parameter even so
            connected_zero = 0.0 * sum(parameter.sum() for parameter in self.field.parameters())
            zero = rays.origins.new_zeros(num_rays)
            return (Rendered(background + connected_zero, zero, zero),)
        raw_sigma, raw_rgb = query_packed(
            self.field, samples.points, rays.viewdirs, samples.ray_indices
        )
        if self.near_scaling:
            factor = self._near_factor(rays, samples)
            raw_sigma = scale_gradient(raw_sigma, factor)
            raw_rgb = scale_gradient(raw_rgb, factor[:, None])
        sigma = density_of(raw_sigma)
        if is_on(self.lambda_l1) and self.training:
            self._opacities = -torch.expm1(-sigma * samples.lengths).sum() / num_rays
        weights = self.packed_weights(sigma, samples.lengths, samples.ray_indices, num_rays)
        values = torch.cat(
            [torch.sigmoid(raw_rgb), torch.ones_like(samples.t[:, None]), samples.t[:, None]], -1
        )
        sums = sum_per_ray(weights[:, None] * values, samples.ray_indices, num_rays)  # [R, 5]
        return (_rendered(sums, background),)

    def _near_factor(self, rays: Rays, samples: Samples) -> Tensor:
        """Factors [N] on the samples' gradients: min(1, (distance / near_scaling)^2).

        A camera's rays are denser near it by the inverse square of the distance, and fog grows
        there; the factor evens the density out (Philip and Deschaintre 2023, eq. 5).
        """
        distance = samples.t * rays.directions.norm(dim=-1).index_select(0, samples.ray_indices)
        return (distance / self.near_scaling).square().clamp(max=1.0)

    @torch.no_grad()
    def _cull_occluded(self, samples: Samples, num_rays: int, room: int | None) -> Samples:
        """``samples`` without occluded ones, those with transmittance up to ``early_stop``.

        A no-grad pass over the density alone: once there are surfaces about half of a ray's samples
        are occluded, and training on them costs several times this pass (NerfAcc, section 3.2).
        """
        sigma = density_of(density_packed(self.field, samples.points))
        weights = self.packed_weights(sigma, samples.lengths, samples.ray_indices, num_rays)
        alpha = -torch.expm1(-sigma * samples.lengths)
        # weights = transmittance * alpha, compared without a division by 0
        return samples.select(weights > self.early_stop * alpha, num_rays, room)

    @torch.no_grad()
    def _importance_resample(
        self, samples: Samples, rays: Rays, u: Tensor | None, *, static: bool
    ) -> Samples:
        """``resample`` samples per ray, importance resampled from the weights of ``samples``.

        The weights are from a no-grad pass. For scenes so large that marching steps are longer than
        surfaces are thick.
        """
        num_rays, scale = len(rays.origins), rays.directions.norm(dim=-1)
        sigma = density_of(density_packed(self.field, samples.points))
        weights = self.packed_weights(sigma, samples.lengths, samples.ray_indices, num_rays)
        lengths = samples.lengths / scale.index_select(0, samples.ray_indices)
        packed = weights, samples.t, lengths, samples.ray_indices
        most = self.space.num_steps if static else None
        ray_indices, t, lengths = importance_resample_packed(
            *packed, num_rays, self.resample, u, most=most
        )
        origins, directions = (part.index_select(0, ray_indices) for part in rays[:2])
        points = self.space.to_unit(torch.addcmul(origins, directions, t[:, None]))
        return Samples(ray_indices, t, lengths * scale.index_select(0, ray_indices), points)

    @torch.no_grad()
    def render(self, rays: Rays) -> Rendered:
        """Rays [R], rendered front to back until they are opaque, deterministic, no gradients."""
        if self.resamples:
            return self(rays)[0]
        num_rays = len(rays.origins)
        samples = self.grid.march(rays, self.space, None)
        sums = rays.origins.new_zeros(num_rays, 5)
        counts = torch.bincount(samples.ray_indices, minlength=num_rays)
        first = torch.cumsum(counts, dim=0) - counts
        alive = counts.nonzero()[:, 0]
        transmittance = torch.ones_like(sums[:, 0])
        done, round_size = 0, SAMPLES_PER_ROUND.get(rays.origins.device.type, 64)
        while len(alive):
            left = (counts[alive] - done).clamp(max=round_size)
            rows = torch.repeat_interleave(torch.arange(len(alive), device=left.device), left)
            starts = torch.cumsum(left, dim=0) - left
            numbers = torch.arange(len(rows), device=left.device)
            index = (first[alive] - starts + done).index_select(0, rows) + numbers
            part = samples.at(index)
            raw_sigma, raw_rgb = query_packed(self.field, part.points, rays.viewdirs[alive], rows)
            optical_depth = density_of(raw_sigma) * part.lengths
            weights = self.packed_weights(
                optical_depth, torch.ones_like(optical_depth), rows, len(alive)
            )
            weights = weights * transmittance[alive].index_select(0, rows)
            values = torch.cat(
                [torch.sigmoid(raw_rgb), torch.ones_like(part.t[:, None]), part.t[:, None]], -1
            )
            sums.index_add_(0, part.ray_indices, weights[:, None] * values)
            transmittance[alive] *= torch.exp(-sum_per_ray(optical_depth, rows, len(alive)))
            done += round_size
            alive = alive[(counts[alive] > done) & (transmittance[alive] > self.early_stop)]
        return _rendered(sums, rays.origins.new_full((num_rays, 3), self.background))

    def checkpoint_state(self) -> dict[str, Any]:
        """The field, the occupancy grid, its box, and the number of rays of the next step."""
        state = {
            "network_fn_state_dict": self.field.state_dict(),
            "occupancy_state_dict": self.grid.state_dict(),
            "num_rays": self.num_rays,
        }
        if isinstance(self.space, Box):
            state["box"] = torch.stack([self.space.low, self.space.high])
        return state

    def load_checkpoint_state(self, state: dict[str, Any], load: LoadStateDict, where: str) -> None:
        """Restore ``checkpoint_state``; ValueError if ``state`` has no occupancy grid."""
        if "occupancy_state_dict" not in state:
            raise ValueError(
                f"{where}: this checkpoint was made without --occ_grid; leave that flag out"
            )
        load(self.field, state["network_fn_state_dict"], f"{where}: field")
        load(self.grid, state["occupancy_state_dict"], f"{where}: occupancy grid")
        self.num_rays = state["num_rays"]
        if isinstance(self.space, Box):
            low, high = state["box"].to(self.space.low)
            self.space = Box(low, high, self.space.num_steps)

    def report(self) -> dict[str, float]:
        """Rays of the next step, samples per ray, and the fraction of cells that are occupied."""
        return {
            "rays": self.num_rays,
            "samples_per_ray": float(self.batch_samples) / self.num_rays,
            "occupied": self.grid.fraction,
        }

    def warning(self, step: int) -> str | None:
        """A message if the occupancy grid is empty, or still full after 2000 steps."""
        fraction = self.grid.fraction
        if fraction == 0:
            return "the occupancy grid is empty: the scene lies outside its box; see --scene_bound"
        # Not for a contracted scene: most of its cells are far away and seen by few rays.
        if step >= 2000 and fraction > 0.9 and isinstance(self.space, Box):
            return (
                f"{fraction:.0%} of the occupancy grid is still full: no empty space was found; "
                "check the poses, or leave --occ_grid out"
            )
        return None


def _rendered(sums: Tensor, background: Tensor) -> Rendered:
    """Rendered from the sums over each ray of weight * (rgb, 1, t) [R, 5] and background [R, 3]."""
    opacity = sums[:, 3]
    hit = opacity > 0
    depth = sums[:, 4] / torch.where(hit, opacity, torch.ones_like(opacity))
    return Rendered(sums[:, :3] + background * (1.0 - opacity[:, None]), opacity, depth)
