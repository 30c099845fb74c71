"""Volume rendering of rays: what every renderer of a scene provides, and NeRF's coarse and fine."""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nerf.field import Field, NeRFField, color_packed, density_packed, query_packed
from nerf.rays import Rays
from nerf.volume import blend_weights, composite, interval_lengths, sample_pdf, stratified_t

# Finding the samples with density > 0 first pays where they are fewer than this share of all.
SKIP_BELOW = 0.6

# load(module, state_dict, where) is strict and names ``where`` in its errors.
LoadStateDict = Callable[[nn.Module, dict[str, Any], str], None]


def is_on(weight: Tensor | float) -> bool:
    """Whether a weight may be above 0: one on the device, which may change, is never read."""
    return isinstance(weight, Tensor) or weight > 0


class Rendered(NamedTuple):
    """Colors, opacity and depth of rays, rendered from one field."""

    rgb: Tensor  # [..., 3] in [0, 1], background included
    opacity: Tensor  # [...] in [0, 1]
    depth: Tensor  # [...] weighted mean of t, 0 where opacity is 0


class RayNoise(NamedTuple):
    """All random numbers that rendering a training batch needs, one row per ray.

    They are drawn once for the whole batch, so results do not depend on how the batch is split
    over ranks or micro-batches. A member that is None means no noise.
    """

    jitter: Tensor | None  # [B, N_samples] uniform
    u: Tensor | None  # [B, N_importance] uniform
    density_coarse: Tensor | None  # [B, N_samples] normal
    density_fine: Tensor | None  # [B, N_samples + N_importance] normal
    background: Tensor | None = None  # [B, 3] each ray's, instead of the renderer's gray level

    def part(self, index: slice | Tensor) -> "RayNoise":
        """The rows at ``index`` (slice, mask or indices)."""
        return RayNoise(*(None if member is None else member[index] for member in self))


@runtime_checkable
class Renderer(Protocol):
    """What training, outputs and checkpoints need of a scene's renderer, which is an nn.Module.

    Per training step, with ``generator`` a function of (seed, step) alone and equal on all ranks:
    ``begin_step``, ``rays_per_step``, ``draw_noise``, ``forward`` with its loss plus ``penalties``,
    and after the update ``end_step``.
    """

    background: float  # gray level in [0, 1] of empty rays, 1 for white
    batch_samples: int | Tensor  # number of samples of the latest ``forward``

    static_shapes: bool  # whether the shapes in a training step follow from its number of rays

    def graph_kind(self) -> Any:
        """What a step recorded as a CUDA graph depends on, besides its inputs; hashable."""

    @property
    def fields(self) -> list[Field]:
        """The networks."""

    def compiled_parts(self) -> list[tuple[nn.Module, str]]:
        """Modules and names of the methods that torch.compile is applied to."""

    def density(self, points: Tensor) -> Tensor:
        """Density [N] of the final level at points [N, 3], in the rays' coordinates and unit."""

    def color(self, points: Tensor, viewdirs: Tensor) -> Tensor:
        """RGB [N, 3] in [0, 1] of the final level at points [N, 3] from unit viewdirs [N, 3]."""

    def rays_per_step(self, N_rand: int, num_ranks: int) -> int:
        """Number of rays of the next step over all ranks, a multiple of ``num_ranks``.

        N_rand: the number that the user chose.
        """

    def begin_step(self, step: int, generator: torch.Generator) -> None:
        """Update what is not trained by gradients, before update ``step`` (0 is the first)."""

    def draw_noise(self, num_rays: int, generator: torch.Generator) -> RayNoise:
        """All random numbers of a step with ``num_rays`` rays over all ranks."""

    def forward(self, rays: Rays, noise: RayNoise | None = None) -> tuple[Rendered, ...]:
        """Rays [B] at every level, the final one last; the loss sums over levels.

        noise: of training, one row per ray; None: deterministic.
        """

    def penalties(self) -> dict[str, Tensor | float]:
        """What is added to the loss after a ``forward``: terms [], weights included, by name."""

    def end_step(self, num_rays: int, samples: float, total_samples: float) -> None:
        """Adapt ``rays_per_step`` after a step.

        num_rays and total_samples: rays and samples of the step over all ranks. samples: of this
        rank, summed over micro-batches.
        """

    def render(self, rays: Rays) -> Rendered:
        """The final level of rays [B], deterministic and without gradients."""

    def warning(self, step: int) -> str | None:
        """A message if the state after ``step`` updates suggests a wrong setting, else None."""

    def report(self) -> dict[str, float]:
        """Measurements for the log, by name."""

    def checkpoint_state(self) -> dict[str, Any]:
        """The entries of a checkpoint that hold this renderer, by nerf-pytorch's keys."""

    def load_checkpoint_state(self, state: dict[str, Any], load: LoadStateDict, where: str) -> None:
        """Restore what ``checkpoint_state`` returned; ValueError if ``state`` has other parts.

        where: the file that errors name.
        """


class NeRFRenderer(nn.Module):
    """A coarse field, and a fine field at importance samples of the coarse one's weights.

    NeRF's eq. 2 (stratified samples) is ``nerf.volume.stratified_t``, eq. 3 (compositing) is
    ``blend_weights`` and ``composite``, eq. 5 (importance sampling of the coarse weights) is
    ``_importance_sample`` with ``sample_pdf``, and eq. 6 (the loss) is ``squared_error`` summed
    over both levels that ``forward`` returns.

    background: gray level of empty rays, 1 for white. perturb: draw stratified samples in training.
    raw_noise_std: standard deviation of noise added to densities in training. static_shapes: never
    skip empty samples, which would have to be counted.
    """

    def __init__(
        self,
        coarse: NeRFField,
        fine: NeRFField | None,
        *,
        num_samples: int,
        num_importance: int,
        background: float = 0.0,
        perturb: bool = True,
        raw_noise_std: Tensor | float = 0.0,
        lindisp: bool = False,
        static_shapes: bool = False,
    ):
        super().__init__()
        assert (fine is not None) == (num_importance > 0), "a fine field needs importance samples"
        self.coarse, self.fine = coarse, fine
        self.num_samples, self.num_importance = num_samples, num_importance
        self.background, self.perturb = background, perturb
        self.raw_noise_std, self.lindisp = raw_noise_std, lindisp
        self.static_shapes, self._skip_empty = static_shapes, False
        self.batch_samples: int | Tensor = 0  # of the latest forward

    @property
    def fields(self) -> list[Field]:
        """The coarse and, if there is one, the fine field."""
        return [field for field in (self.coarse, self.fine) if field is not None]

    def density(self, points: Tensor) -> Tensor:
        """Density [N] of the final level at points [N, 3] in the rays' coordinates and unit."""
        return F.relu(density_packed(self.fields[-1], points))

    def color(self, points: Tensor, viewdirs: Tensor) -> Tensor:
        """RGB [N, 3] in [0, 1] of the final level at points [N, 3] from unit viewdirs [N, 3]."""
        ray_indices = torch.arange(len(points), device=points.device)
        return torch.sigmoid(query_packed(self.fields[-1], points, viewdirs, ray_indices)[1])

    def graph_kind(self) -> None:
        """Nothing."""

    def compiled_parts(self) -> list[tuple[nn.Module, str]]:
        """See ``Renderer.compiled_parts``."""
        names = ("forward", "density", "hidden", "density_of", "color_of")
        parts: list[tuple[nn.Module, str]] = [(f, name) for f in self.fields for name in names]
        if self.static_shapes:  # sampling and compositing; else there is a count in between
            parts += [(self, "_importance_sample"), (self, "_level")]
        return parts

    @property
    def samples_per_ray(self) -> int:
        """Samples per ray in the largest call of a network."""
        return self.num_samples + self.num_importance

    def draw_noise(self, num_rays: int, generator: torch.Generator) -> RayNoise:
        """The random numbers for ``num_rays`` training rays, on the generator's device."""

        def draw(function: Callable[..., Tensor], count: int, enabled: bool) -> Tensor | None:
            if not enabled:
                return None
            return function(num_rays, count, generator=generator, device=generator.device)

        noisy = is_on(self.raw_noise_std)
        total = self.samples_per_ray
        return RayNoise(
            jitter=draw(torch.rand, self.num_samples, self.perturb),
            u=draw(torch.rand, self.num_importance, self.perturb and self.fine is not None),
            density_coarse=draw(torch.randn, self.num_samples, noisy),
            density_fine=draw(torch.randn, total, noisy and self.fine is not None),
        )

    def rays_per_step(self, N_rand: int, num_ranks: int) -> int:
        """``N_rand``, unchanged; the flags check that the ranks divide it."""
        return N_rand

    def begin_step(self, step: int, generator: torch.Generator) -> None:
        """Measure again, from now on, whether skipping empty samples pays.

        Not with static shapes: on a GPU, reading the number of such samples costs what it saves.
        """
        self._skip_empty = not self.static_shapes

    def end_step(self, num_rays: int, samples: float, total_samples: float) -> None:
        """Do nothing: the number of rays is fixed."""

    def penalties(self) -> dict[str, Tensor | float]:
        """None: the loss is the colors' error alone."""
        return {}

    def warning(self, step: int) -> str | None:
        """None: this renderer has no state that training could spoil."""
        return None

    def report(self) -> dict[str, float]:
        """No measurements."""
        return {}

    def checkpoint_state(self) -> dict[str, Any]:
        """The state dicts of both fields, by nerf-pytorch's keys."""
        state = {"network_fn_state_dict": self.coarse.state_dict()}
        if self.fine is not None:
            state["network_fine_state_dict"] = self.fine.state_dict()
        return state

    def load_checkpoint_state(self, state: dict[str, Any], load: LoadStateDict, where: str) -> None:
        """Restore both fields; ValueError if ``state`` has an occupancy grid or no fine field."""
        if "occupancy_state_dict" in state:
            raise ValueError(f"{where}: this checkpoint was made with --occ_grid; add that flag")
        load(self.coarse, state["network_fn_state_dict"], f"{where}: coarse")
        if self.fine is not None:
            if state.get("network_fine_state_dict") is None:
                raise ValueError(
                    f"{where}: this checkpoint has no fine network; use --N_importance 0"
                )
            load(self.fine, state["network_fine_state_dict"], f"{where}: fine")

    def forward(self, rays: Rays, noise: RayNoise | None = None) -> tuple[Rendered, ...]:
        """Rays [B] rendered by (coarse, fine), or by (coarse,) alone without importance samples."""
        noise = noise or RayNoise(None, None, None, None)
        t = stratified_t(
            rays.near, rays.far, self.num_samples, u=noise.jitter, lindisp=self.lindisp
        )
        coarse, weights = self._level(self.coarse, rays, t, noise.density_coarse)
        self.batch_samples = t.numel()
        if self.fine is None:
            return (coarse,)
        t = self._importance_sample(t, weights, noise.u)
        self.batch_samples += t.numel()
        return coarse, self._level(self.fine, rays, t, noise.density_fine)[0]

    @torch.no_grad()
    def render(self, rays: Rays) -> Rendered:
        """The final level of rays [B]; of the coarse field only densities are computed."""
        t = stratified_t(rays.near, rays.far, self.num_samples, lindisp=self.lindisp)
        if self.fine is not None:
            sigma = F.relu(self.coarse.density(self._points(rays, t)))
            weights = blend_weights(sigma, interval_lengths(t, rays.directions))
            t = self._importance_sample(t, weights, None)
        field = self.fine or self.coarse
        hidden = field.hidden(self._points(rays, t))
        sigma = F.relu(field.density_of(hidden)).view(t.shape)
        weights = blend_weights(sigma, interval_lengths(t, rays.directions))
        visible = weights.flatten().nonzero()[:, 0]  # only these need a color
        raw_rgb = color_packed(field, hidden, rays.viewdirs, visible, visible // t.shape[1])
        rgb = raw_rgb.new_zeros(weights.numel(), 3).index_copy_(0, visible, torch.sigmoid(raw_rgb))
        return Rendered(*composite(rgb.view(*t.shape, 3), weights, t, self.background))

    @staticmethod
    def _points(rays: Rays, t: Tensor) -> Tensor:
        return rays.origins[:, None] + rays.directions[:, None] * t[..., None]  # [B, S, 3]

    def _importance_sample(self, t: Tensor, weights: Tensor, u: Tensor | None) -> Tensor:
        """Coarse samples t [B, S] and importance samples from their weights, sorted [B, S + N]."""
        # The midpoints are the edges of intervals around all samples but the first and the last,
        # hence weights[1:-1]. Where to sample is not learned: the coarse loss alone trains them.
        midpoints = 0.5 * (t[..., 1:] + t[..., :-1])
        extra = sample_pdf(midpoints, weights[..., 1:-1].detach(), self.num_importance, u)
        return torch.sort(torch.cat([t, extra], dim=-1), dim=-1).values

    def _level(
        self, field: NeRFField, rays: Rays, t: Tensor, density_noise: Tensor | None
    ) -> tuple[Rendered, Tensor]:
        """Rays [B] rendered from ``field`` at t [B, S], and the weights [B, S] of the samples."""
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

    def _query_where_dense(
        self, field: NeRFField, rays: Rays, points: Tensor, density_noise: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Density [B, S] and color [B, S, 3] at points [B, S, 3]; color only where density > 0.

        A sample with density 0 has weight 0 and the ReLU stops its gradient, so it contributes
        exactly nothing and needs neither color nor backward pass. A no-grad pass finds the other
        samples; it pays if they are fewer than ``SKIP_BELOW`` of all.
        """
        shape = points.shape[:2]
        with torch.no_grad():
            dense = self._sigma(field.density(points), density_noise) > 0
        index = dense.flatten().nonzero()[:, 0]
        ray_indices = index // shape[1]
        points = points.flatten(0, 1)[index]
        raw_sigma, raw_rgb = query_packed(field, points, rays.viewdirs, ray_indices)
        noise = None if density_noise is None else density_noise.flatten()[index]
        sigma = raw_sigma.new_zeros(dense.numel())
        sigma = sigma.index_copy(0, index, self._sigma(raw_sigma, noise)).view(shape)
        rgb = raw_rgb.new_zeros(dense.numel(), 3)
        rgb = rgb.index_copy(0, index, torch.sigmoid(raw_rgb)).view(*shape, 3)
        self._skip_empty = len(index) < SKIP_BELOW * dense.numel()
        return sigma, rgb


def squared_error(rgb: Tensor, target: Tensor) -> Tensor:
    """Mean squared error [] over rays and channels of rgb and target [..., 3] (NeRF eq. 6,
    which sums over rays instead)."""
    return ((rgb - target) ** 2).mean()
