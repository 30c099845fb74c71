"""Score distillation sampling: the maths, for any prior (Poole et al. 2022, DreamFusion).

Notation: x0 clean latents; x_t = sqrt(a) x0 + sqrt(1 - a) eps noisy ones; a = alphas_cumprod[t]
in (0, 1), falling in t = 0 ... T - 1; eps standard normal. Views come first: latents [V, C, h, w].
A prior has ``alphas_cumprod`` [T], ``prediction_type`` (a key of TO_EPSILON), ``latent_shape``,
``encode`` and ``predict``; see ``guidance.stable_diffusion`` and ``guidance.gaussian``.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class GuidanceNoise(NamedTuple):
    """Every random number that guiding V views takes, one row per view."""

    u: Tensor  # [V] uniform: place of t in its range
    epsilon: Tensor  # [V, C, h, w] normal: the noise that is added
    posterior: Tensor  # [V, C, h, w] normal: of the encoder's sample

    def part(self, index) -> "GuidanceNoise":
        """The rows at ``index``."""
        return GuidanceNoise(*(member[index] for member in self))


class Distilled(NamedTuple):
    """One step's outcome."""

    loss: Tensor  # [] whose gradient is the SDS gradient; its value is no measure of quality
    t: Tensor  # [V] timesteps
    skipped: Tensor  # [] views left out because their gradient was not finite


def draw_noise(num_views: int, latent_shape, generator: torch.Generator) -> GuidanceNoise:
    """The random numbers for ``num_views`` views, from ``generator`` alone."""
    options = {"generator": generator, "device": generator.device}
    size = (num_views, *latent_shape)
    u = torch.rand(num_views, **options)
    return GuidanceNoise(u, torch.randn(size, **options), torch.randn(size, **options))


def timesteps(u: Tensor, t_range: tuple[float, float], num_timesteps: int) -> Tensor:
    """u [V] in [0, 1) -> whole timesteps [V], even over t_range = (low, high), parts of T."""
    low, high = (int(part * num_timesteps) for part in t_range)
    high = max(low + 1, min(high + 1, num_timesteps))  # the upper end is included
    return (low + (u * (high - low)).long()).clamp(max=num_timesteps - 1)


def _like(alpha_bar: Tensor, latents: Tensor) -> Tensor:
    return alpha_bar.view(-1, *[1] * (latents.dim() - 1))


def add_noise(clean: Tensor, epsilon: Tensor, alpha_bar: Tensor) -> Tensor:
    """x_t = sqrt(a) x0 + sqrt(1 - a) eps (DDPM eq. 4); alpha_bar [V]."""
    a = _like(alpha_bar, clean)
    return a.sqrt() * clean + (1 - a).sqrt() * epsilon


def _from_v(output: Tensor, noisy: Tensor, a: Tensor) -> Tensor:
    """v = sqrt(a) eps - sqrt(1 - a) x0 (Salimans and Ho 2022), solved for eps."""
    return a.sqrt() * output + (1 - a).sqrt() * noisy


def _from_sample(output: Tensor, noisy: Tensor, a: Tensor) -> Tensor:
    return (noisy - a.sqrt() * output) / (1 - a).sqrt()


TO_EPSILON = {
    "epsilon": lambda output, noisy, a: output,
    "v_prediction": _from_v,
    "sample": _from_sample,
}


def to_epsilon(output: Tensor, noisy: Tensor, alpha_bar: Tensor, prediction_type: str) -> Tensor:
    """The noise that a network's ``output`` for x_t says is in it."""
    return TO_EPSILON[prediction_type](output, noisy, _like(alpha_bar, noisy))


def predict_x0(epsilon: Tensor, noisy: Tensor, alpha_bar: Tensor) -> Tensor:
    """The clean latents if ``epsilon`` is the noise in x_t (DDIM eq. 9)."""
    a = _like(alpha_bar, noisy)
    return (noisy - (1 - a).sqrt() * epsilon) / a.sqrt()


def guide(unconditional: Tensor, conditional: Tensor, scale: float) -> Tensor:
    """u + s (c - u) (Ho and Salimans 2022); s = 1 is the text alone, threestudio's is one less."""
    return unconditional + scale * (conditional - unconditional)


WEIGHTINGS = {
    "sds": lambda alpha_bar: 1 - alpha_bar,  # sigma_t^2, DreamFusion's
    "uniform": torch.ones_like,  # "performed similarly" (DreamFusion, section 3)
    "fantasia3d": lambda alpha_bar: alpha_bar.sqrt() * (1 - alpha_bar),  # Chen et al. 2023
}


class SpecifyGradient(torch.autograd.Function):
    """forward: 1/2 |gradient|^2; backward: ``gradient`` times the gradient that arrives.

    The arriving gradient carries the loss' weight and GradScaler's scale, so both work. In float32
    whatever autocast says.
    """

    @staticmethod
    @torch.amp.custom_fwd(device_type="cuda", cast_inputs=torch.float32)
    def forward(ctx, latents: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        ctx.dtype = latents.dtype
        return 0.5 * gradient.float().square().sum()

    @staticmethod
    @torch.amp.custom_bwd(device_type="cuda")
    def backward(ctx, arriving: Tensor):
        (gradient,) = ctx.saved_tensors
        return (arriving * gradient).to(ctx.dtype), None


def distill(
    prior,
    images: Tensor,
    conditions: tuple[Tensor, Tensor],
    noise: GuidanceNoise,
    *,
    t_range: tuple[float, float],
    scale: float,
    weighting: str,
) -> Distilled:
    """w(t) (eps_guided - eps), handed to the images through the encoder (DreamFusion eq. 3).

    images [V, 3, H, W] in [0, 1]. conditions: (negative, text), each [V, ...] as the prior's
    ``predict`` takes them. The loss is a mean over views and a sum over latents. The prior is never
    differentiated: only the encoder is, with respect to its input.
    """
    latents = prior.encode(images, noise.posterior)
    with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
        t = timesteps(noise.u, t_range, len(prior.alphas_cumprod))
        alpha_bar = prior.alphas_cumprod[t]
        noisy = add_noise(latents.detach(), noise.epsilon, alpha_bar)
        output = prior.predict(torch.cat([noisy, noisy]), torch.cat([t, t]), torch.cat(conditions))
        negative, text = (
            to_epsilon(half, noisy, alpha_bar, prior.prediction_type)
            for half in output.float().chunk(2)
        )
        weight = _like(WEIGHTINGS[weighting](alpha_bar), noisy)
        gradient = weight * (guide(negative, text, scale) - noise.epsilon)
        # A view that overflowed teaches nothing; turning its infinities into huge numbers, as
        # nan_to_num would, makes one step that ruins the scene.
        finite = gradient.flatten(1).isfinite().all(1)
        gradient = torch.where(_like(finite, gradient), gradient, 0.0) / len(gradient)
    loss = SpecifyGradient.apply(latents, gradient)
    return Distilled(loss, t, (~finite).sum())
