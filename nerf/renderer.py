"""Rays -> colours: NeRF's two levels of volume rendering, and whole pictures in flat memory."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nerf.rays import Rays
from nerf.volume import blend_weights, composite, interval_lengths, sample_pdf, stratified_t


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

    def part(self, index) -> "RayNoise":
        """The rows at ``index``."""
        return RayNoise(*(None if member is None else member[index] for member in self))


class NeRFRenderer(nn.Module):
    """Coarse and fine field, and the sampling between them (NeRF section 5.2).

    background: grey level behind everything, 1 for white. perturb: stratified jitter in training.
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

    def forward(self, rays: Rays, noise: RayNoise | None = None) -> tuple[Rendered, ...]:
        """Every level of rays [B]: (coarse, fine), or (coarse,) without importance samples."""
        noise = noise or RayNoise(None, None, None, None)
        t = stratified_t(
            rays.near, rays.far, self.num_samples, u=noise.jitter, lindisp=self.lindisp
        )
        coarse, weights = self._level(self.coarse, rays, t, noise.density_coarse)
        if self.fine is None:
            return (coarse,)
        t = self._refine(t, weights, noise.u)
        fine, _ = self._level(self.fine, rays, t, noise.density_fine)
        return coarse, fine

    @torch.no_grad()
    def render(self, rays: Rays) -> Rendered:
        """The final level of rays [B] alone: the coarse field is asked for its density only."""
        t = stratified_t(rays.near, rays.far, self.num_samples, lindisp=self.lindisp)
        if self.fine is None:
            return self._level(self.coarse, rays, t, None)[0]
        sigma = F.relu(self.coarse.density(self._points(rays, t)))
        weights = blend_weights(sigma, interval_lengths(t, rays.directions))
        return self._level(self.fine, rays, self._refine(t, weights, None), None)[0]

    @staticmethod
    def _points(rays: Rays, t: Tensor) -> Tensor:
        return rays.origins[:, None] + rays.directions[:, None] * t[..., None]  # [B, S, 3]

    def _refine(self, t: Tensor, weights: Tensor, u: Tensor | None) -> Tensor:
        """Coarse distances t [B, S] joined by importance samples -> [B, S + N], sorted."""
        middle = 0.5 * (t[..., 1:] + t[..., :-1])
        extra = sample_pdf(middle, weights[..., 1:-1].detach(), self.num_importance, u)
        return torch.sort(torch.cat([t, extra], dim=-1), dim=-1).values

    def _level(self, field, rays, t, density_noise) -> tuple[Rendered, Tensor]:
        raw_sigma, raw_rgb = field(self._points(rays, t), rays.viewdirs)
        if density_noise is not None:
            raw_sigma = raw_sigma + density_noise * self.raw_noise_std
        weights = blend_weights(F.relu(raw_sigma), interval_lengths(t, rays.directions))
        rgb, opacity, depth = composite(torch.sigmoid(raw_rgb), weights, t, self.background)
        return Rendered(rgb, opacity, depth), weights


def block_size(samples_per_ray: int, width: int, chunk: int, netchunk: int, device) -> int:
    """Rays that go through the network together.

    ``chunk`` (rays) and ``netchunk`` (points) are the user's upper bounds. On a CPU the block is
    kept small enough that one layer's activations stay in the second-level cache; that alone made
    training 1.5x faster than one large batch.
    """
    limit = min(chunk, netchunk // samples_per_ray)
    if torch.device(device).type == "cpu":
        limit = min(limit, (1 << 21) // (width * samples_per_ray))
    return max(1, limit)


def render_view(
    render: Callable[[Rays], Rendered],
    rays_of: Callable[[Tensor], Rays],
    size: tuple[int, int],
    block: int,
    device,
) -> Rendered:
    """A whole picture of (height, width), ``block`` rays at a time, on the CPU.

    render: rays [B] -> Rendered. rays_of: flat pixel numbers [B] (row by row) -> Rays. Rays are
    made block by block too, so working memory does not grow with the picture.
    """
    height, width = size
    picture = Rendered(
        torch.empty(height * width, 3), torch.empty(height * width), torch.empty(height * width)
    )
    for start in range(0, height * width, block):
        stop = min(start + block, height * width)
        rendered = render(rays_of(torch.arange(start, stop, device=device)))
        for whole, part in zip(picture, rendered, strict=True):
            whole[start:stop] = part
    return Rendered(*(member.view(height, width, *member.shape[1:]) for member in picture))


def compile_fields(renderer: NeRFRenderer, rays: Rays, warn=print) -> bool:
    """Compile both networks in place, if that works here and gives the same numbers.

    rays [B]: a few to try it on. Otherwise one warning, the networks stay as they were, and False.
    """
    fields = [field for field in (renderer.coarse, renderer.fine) if field is not None]
    with torch.no_grad():
        expected = renderer(rays)[-1].rgb
    try:
        for field in fields:
            field.compile()
        compiled = renderer(rays)[-1].rgb
        compiled.sum().backward()
        difference = (compiled - expected).abs().max().item()
        problem = f"colours differ by {difference:.2g}" if difference > 1e-3 else None
    except Exception as error:  # a compiler can fail in any way; training must not
        problem = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
    renderer.zero_grad(set_to_none=True)
    if problem:
        for field in fields:
            field._compiled_call_impl = None
        warn(f"--compile: not used, {problem}")
    return problem is None
