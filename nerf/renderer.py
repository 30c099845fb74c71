"""Rays -> colors: NeRF's two levels of volume rendering, and whole pictures in flat memory."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nerf.field import color_packed, density_packed, query_packed
from nerf.rays import Rays
from nerf.volume import blend_weights, composite, interval_lengths, sample_pdf, stratified_t

SKIP_BELOW = 0.6  # part of the samples with density, up to which the others are worth finding


class Rendered(NamedTuple):
    """What one level sees along each ray; leading dimensions are the rays'."""

    rgb: Tensor  # [..., 3] in [0, 1], background included
    opacity: Tensor  # [...] in [0, 1]
    depth: Tensor  # [...] mean t of what was hit, 0 where nothing was


class RayNoise(NamedTuple):
    """Every random number one training step needs, one row per ray.

    Drawn once for the whole batch: splitting the batch over ranks or micro-batches then changes
    nothing about the result. None members mean "deterministic".
    """

    jitter: Tensor | None  # [B, N_samples] uniform
    u: Tensor | None  # [B, N_importance] uniform
    density_coarse: Tensor | None  # [B, N_samples] normal
    density_fine: Tensor | None  # [B, N_samples + N_importance] normal
    background: Tensor | None = None  # [B, 3] behind each ray, instead of the renderer's own

    def part(self, index) -> "RayNoise":
        """The rows at ``index``."""
        return RayNoise(*(None if member is None else member[index] for member in self))


class NeRFRenderer(nn.Module):
    """Coarse and fine field, and the sampling between them (NeRF section 5.2).

    background: gray level behind everything, 1 for white. perturb: stratified jitter in training.
    raw_noise_std: deviation of the noise on training densities.
    """

    def __init__(
        self,
        coarse: nn.Module,
        fine: nn.Module | None,
        *,
        num_samples: int,
        num_importance: int,
        background: float = 0.0,
        perturb: bool = True,
        raw_noise_std: float = 0.0,
        lindisp: bool = False,
    ):
        super().__init__()
        assert (fine is not None) == (num_importance > 0), "a fine field needs importance samples"
        self.coarse, self.fine = coarse, fine
        self.num_samples, self.num_importance = num_samples, num_importance
        self.background, self.perturb = background, perturb
        self.raw_noise_std, self.lindisp = raw_noise_std, lindisp
        self._skip_empty = False

    @property
    def fields(self) -> list[nn.Module]:
        """The networks."""
        return [field for field in (self.coarse, self.fine) if field is not None]

    def density(self, points: Tensor) -> Tensor:
        """Density [N] of the final level at points [N, 3] in the rays' coordinates, per unit."""
        return F.relu(density_packed(self.fields[-1], points))

    def color(self, points: Tensor, viewdirs: Tensor) -> Tensor:
        """RGB [N, 3] in [0, 1] of the final level at points [N, 3] seen along viewdirs [N, 3]."""
        number = torch.arange(len(points), device=points.device)
        return torch.sigmoid(query_packed(self.fields[-1], points, viewdirs, number)[1])

    @property
    def samples_per_ray(self) -> int:
        """Samples in the largest network call for one ray."""
        return self.num_samples + self.num_importance

    def draw_noise(self, num_rays: int, generator: torch.Generator) -> RayNoise:
        """The random numbers for ``num_rays`` training rays, from ``generator`` alone."""

        def draw(function, count, wanted):
            if not wanted:
                return None
            return function(num_rays, count, generator=generator, device=generator.device)

        noisy = self.raw_noise_std > 0
        total = self.samples_per_ray
        return RayNoise(
            jitter=draw(torch.rand, self.num_samples, self.perturb),
            u=draw(torch.rand, self.num_importance, self.perturb and self.fine is not None),
            density_coarse=draw(torch.randn, self.num_samples, noisy),
            density_fine=draw(torch.randn, total, noisy and self.fine is not None),
        )

    def rays_per_step(self, wanted: int, num_ranks: int) -> int:
        """Rays of the next step over all ranks: as many as the user asks for."""
        return wanted

    def begin_step(self, step: int, generator: torch.Generator) -> None:
        """Look again, with the step's first block, whether empty samples are worth skipping.

        Only on a CPU: on a GPU the look itself, a wait for the count, costs as much.
        """
        self._skip_empty = next(self.parameters()).device.type == "cpu"

    def end_step(self, num_rays: int, num_samples: float) -> None:
        """Nothing to learn from a step's size."""

    def penalty(self) -> float:
        """Nothing in the loss but the colors' error."""
        return 0.0

    def warning(self, step: int) -> str | None:
        """Nothing to watch."""

    def report(self) -> dict[str, float]:
        """No figures of its own."""
        return {}

    def checkpoint_state(self) -> dict:
        """What a checkpoint must hold of this renderer, under nerf-pytorch's keys."""
        state = {"network_fn_state_dict": self.coarse.state_dict()}
        if self.fine is not None:
            state["network_fine_state_dict"] = self.fine.state_dict()
        return state

    def load_checkpoint_state(self, state: dict, load, where: str) -> None:
        """Put ``checkpoint_state`` back. load(module, state, where) is strict."""
        if "occupancy_state_dict" in state:
            raise ValueError(f"{where}: was made with --occ_grid; use that flag")
        load(self.coarse, state["network_fn_state_dict"], f"{where}: coarse")
        if self.fine is not None:
            if state.get("network_fine_state_dict") is None:
                raise ValueError(f"{where}: has no fine network; train with --N_importance 0")
            load(self.fine, state["network_fine_state_dict"], f"{where}: fine")

    def forward(self, rays: Rays, noise: RayNoise | None = None) -> tuple[Rendered, ...]:
        """Every level of rays [B]: (coarse, fine), or (coarse,) without importance samples."""
        noise = noise or RayNoise(None, None, None, None)
        t = stratified_t(
            rays.near, rays.far, self.num_samples, u=noise.jitter, lindisp=self.lindisp
        )
        coarse, weights = self._level(self.coarse, rays, t, noise.density_coarse)
        levels = (coarse,)
        if self.fine is not None:
            t = self._refine(t, weights, noise.u)
            levels += (self._level(self.fine, rays, t, noise.density_fine)[0],)
        return levels

    @torch.no_grad()
    def render(self, rays: Rays) -> Rendered:
        """The final level of rays [B] alone: the coarse field is asked for its density only."""
        t = stratified_t(rays.near, rays.far, self.num_samples, lindisp=self.lindisp)
        if self.fine is not None:
            sigma = F.relu(self.coarse.density(self._points(rays, t)))
            weights = blend_weights(sigma, interval_lengths(t, rays.directions))
            t = self._refine(t, weights, None)
        field = self.fine or self.coarse
        hidden = field.hidden(self._points(rays, t))
        sigma = F.relu(field.density_of(hidden)).view(t.shape)
        weights = blend_weights(sigma, interval_lengths(t, rays.directions))
        seen = weights.flatten().nonzero()[:, 0]  # the others' color is never asked for
        raw_rgb = color_packed(field, hidden, rays.viewdirs, seen, seen // t.shape[1])
        rgb = raw_rgb.new_zeros(weights.numel(), 3).index_copy_(0, seen, torch.sigmoid(raw_rgb))
        return Rendered(*composite(rgb.view(*t.shape, 3), weights, t, self.background))

    @staticmethod
    def _points(rays: Rays, t: Tensor) -> Tensor:
        return rays.origins[:, None] + rays.directions[:, None] * t[..., None]  # [B, S, 3]

    def _refine(self, t: Tensor, weights: Tensor, u: Tensor | None) -> Tensor:
        """Coarse distances t [B, S] joined by importance samples -> [B, S + N], sorted."""
        middle = 0.5 * (t[..., 1:] + t[..., :-1])
        extra = sample_pdf(middle, weights[..., 1:-1].detach(), self.num_importance, u)
        return torch.sort(torch.cat([t, extra], dim=-1), dim=-1).values

    def _level(self, field, rays, t, density_noise) -> tuple[Rendered, Tensor]:
        points = self._points(rays, t)
        if self._skip_empty:
            sigma, rgb = self._query_where_dense(field, rays, points, density_noise)
        else:
            raw_sigma, raw_rgb = field(points, rays.viewdirs)
            sigma = self._sigma(raw_sigma, density_noise)
            rgb = torch.sigmoid(raw_rgb)
        weights = blend_weights(sigma, interval_lengths(t, rays.directions))
        rgb, opacity, depth = composite(rgb, weights, t, self.background)
        return Rendered(rgb, opacity, depth), weights

    def _sigma(self, raw: Tensor, noise: Tensor | None) -> Tensor:
        return F.relu(raw if noise is None else raw + noise * self.raw_noise_std)

    def _query_where_dense(self, field, rays, points, density_noise) -> tuple[Tensor, Tensor]:
        """Density and color at points [B, S, 3], asking for a graph only where there is density.

        A sample with density 0 has weight 0, and the ReLU stops its gradient: it adds exactly
        nothing to any result, so it needs neither color nor backward pass. One pass without a
        graph finds the others. This pays when fewer than about half are left.
        """
        shape = points.shape[:2]
        with torch.no_grad():
            filled = self._sigma(field.density(points), density_noise) > 0
        index = filled.flatten().nonzero()[:, 0]
        ray_indices = index // shape[1]
        points = points.flatten(0, 1)[index]
        raw_sigma, raw_rgb = query_packed(field, points, rays.viewdirs, ray_indices)
        noise = None if density_noise is None else density_noise.flatten()[index]
        sigma = raw_sigma.new_zeros(filled.numel())
        sigma = sigma.index_copy(0, index, self._sigma(raw_sigma, noise)).view(shape)
        rgb = raw_rgb.new_zeros(filled.numel(), 3)
        rgb = rgb.index_copy(0, index, torch.sigmoid(raw_rgb)).view(*shape, 3)
        self._skip_empty = len(index) < SKIP_BELOW * filled.numel()
        return sigma, rgb


def squared_error(rgb: Tensor, target: Tensor) -> Tensor:
    """Mean squared error over rays and channels: rgb, target [..., 3] -> [] (NeRF eq. 6)."""
    return ((rgb - target) ** 2).mean()
