"""Score distillation: the maths, for any diffusion prior (Poole et al. 2022, DreamFusion).

Notation: x0 clean latents; x_t = sqrt(a) x0 + sqrt(1 - a) eps noisy latents; a = alphas_cumprod[t]
in (0, 1), decreasing over t = 0 ... T - 1; eps standard normal noise. u is the network's noise
prediction (epsilon) for the negative prompt, c for the prompt. Views come first in all shapes:
latents [V, C, h, w]. The priors are ``guidance.stable_diffusion`` and ``guidance.gaussian``.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from guidance.schedule import TO_EPSILON as TO_EPSILON  # also public as names of this file
from guidance.schedule import add_noise, per_view, predict_x0, to_epsilon


class Prior(Protocol):
    """The part of a diffusion model that score distillation uses."""

    alphas_cumprod: Tensor  # [T]
    prediction_type: str  # a key of TO_EPSILON

    def encode(self, images: Tensor, noise: Tensor | None, /) -> Tensor:
        """Images [V, 3, H, W] in [0, 1] -> latents [V, C, h, w], differentiable."""

    def predict(self, noisy: Tensor, t: Tensor, condition: Tensor, /) -> Tensor:
        """The network's raw output for x_t [B, C, h, w], t [B] and condition [B, ...]."""


class GuidanceNoise(NamedTuple):
    """All random numbers that the guidance of V views uses, one row per view."""

    u: Tensor  # [V] uniform in [0, 1): the position of t in its range
    epsilon: Tensor  # [V, C, h, w] normal: the noise in x_t
    posterior: Tensor  # [V, C, h, w] normal: samples the encoder's posterior
    lora_u: Tensor  # [V] uniform: t of the LoRA score network's training step (guidance.vsd)
    lora_epsilon: Tensor  # [V, C, h, w] normal: the noise of that training step
    lora_drop: Tensor  # [V] uniform: below the dropout rate, the LoRA is given a zero camera

    def part(self, index: slice) -> "GuidanceNoise":
        """The noise of the views in ``index``."""
        return GuidanceNoise(*(member[index] for member in self))


class Conditions(NamedTuple):
    """Text embeddings (or what else the prior's ``predict`` takes) of V views, [V, ...] each."""

    negative: Tensor  # of the negative prompt
    text: Tensor  # of the prompt
    others: tuple[Tensor, ...] = ()  # of the prompts that ``perp_neg`` pushes the views away from
    weights: tuple[Tensor, ...] = ()  # [V] for each of ``others``, 0 or negative
    words: tuple[str, ...] = ()  # the view word of each view, if its prompt has one

    def part(self, index: slice) -> "Conditions":
        """Those of the views in ``index``."""
        others, weights = (tuple(x[index] for x in each) for each in (self.others, self.weights))
        own = self.negative[index], self.text[index]
        return Conditions(*own, others, weights, self.words[index])


class Scores(NamedTuple):
    """The noise in x_t and its predictions, [V, C, h, w]."""

    epsilon: Tensor  # the true noise
    negative: Tensor  # u, predicted from the negative prompt
    text: Tensor  # c, predicted from the prompt
    others: tuple[Tensor, ...] = ()  # predicted from ``Conditions.others``
    weights: tuple[Tensor, ...] = ()
    lora: Tensor | None = None  # predicted by the LoRA score network (guidance.vsd)


class Recipe(NamedTuple):
    """The settings of one guidance step."""

    kind: str = "sds"  # a key of RESIDUALS
    scale: float = 100.0  # guidance scale
    weighting: str = "sds"  # a key of WEIGHTINGS
    t_range: tuple[float, float] = (0.02, 0.98)  # fractions of T
    t_anneal: str = "none"  # one of ANNEALS
    progress: float = 0.0  # finished fraction of the run, in [0, 1]
    rescale: float = 0.0  # strength of ``rescaled``, in [0, 1]
    clip: float = 0.0  # largest absolute value in a view's gradient; 0: no limit


class Distilled(NamedTuple):
    """The result of one guidance step."""

    loss: Tensor  # [] whose gradient is the SDS gradient; its value does not measure quality
    t: Tensor  # [V] timesteps
    latents: Tensor  # [V, C, h, w] of the images, detached
    gradient: Tensor  # [V, C, h, w] of the loss with respect to the latents
    skipped: Tensor  # [] number of views left out because their gradient was not finite


def draw_noise(num_views: int, latent_shape: Sequence[int], generator: Generator) -> GuidanceNoise:
    """The random numbers for ``num_views`` views, all from ``generator``."""
    options: dict[str, Any] = {"generator": generator, "device": generator.device}
    size = (num_views, *latent_shape)
    rows = {"u": torch.rand(num_views, **options)}
    rows["epsilon"], rows["posterior"] = (torch.randn(size, **options) for _ in range(2))
    rows["lora_u"] = torch.rand(num_views, **options)
    rows["lora_epsilon"] = torch.randn(size, **options)
    return GuidanceNoise(**rows, lora_drop=torch.rand(num_views, **options))


def timesteps(u: Tensor, t_range: tuple[float, float], num_timesteps: int) -> Tensor:
    """Map u [V] in [0, 1) to integer timesteps [V], uniform over t_range (fractions of T)."""
    low, high = (int(fraction * num_timesteps) for fraction in t_range)
    high = max(low + 1, min(high + 1, num_timesteps))  # the upper end is included
    return (low + (u * (high - low)).long()).clamp(max=num_timesteps - 1)


def falling_timestep(fraction: float, num_timesteps: int, alphas_cumprod: Tensor) -> Tensor:
    """DreamTime's t [] after ``fraction`` of the run: non-increasing (Huang et al. 2023).

    t is where the weights sqrt((1 - a) / a) x prior(t), summed from T - 1 down, reach ``fraction``
    of their total. The prior is 1 from 0.5 T to 0.8 T and falls off below and above like Gaussians
    of deviation 0.1 T and 0.3 T, so that most steps are spent at the t that form the content.
    """
    place = torch.arange(num_timesteps, device=alphas_cumprod.device) / num_timesteps
    above, below = (place - 0.8).clamp(min=0) / 0.3, (place - 0.5).clamp(max=0) / 0.1
    prior = torch.exp(-0.5 * (above**2 + below**2))
    weight = ((1 - alphas_cumprod) / alphas_cumprod).sqrt() * prior
    # At zero terminal SNR, a = 0, the last weight would be infinite and t would never fall.
    weight = torch.where(alphas_cumprod > 0, weight, 0.0)
    reached = weight.flip(0).cumsum(0) / weight.sum()
    return num_timesteps - 1 - (reached < fraction).sum().clamp(max=num_timesteps - 1)


ANNEALS = ("none", "linear", "sqrt", "falling")


def pick_timesteps(u: Tensor, recipe: Recipe, alphas_cumprod: Tensor) -> Tensor:
    """Timesteps [V]: random (``recipe.t_anneal`` none), or the same decreasing t for all views.

    linear and sqrt: t_max - (t_max - t_min) p, with p the progress or its square root (HiFA, Zhu
    and Zhuang 2023). falling: ``falling_timestep``, clamped to the range.
    """
    num_timesteps = len(alphas_cumprod)
    if recipe.t_anneal == "none":
        return timesteps(u, recipe.t_range, num_timesteps)
    low, high = recipe.t_range
    fraction = math.sqrt(recipe.progress) if recipe.t_anneal == "sqrt" else recipe.progress
    if recipe.t_anneal == "falling":
        falling = falling_timestep(fraction, num_timesteps, alphas_cumprod)
        falling = falling.clamp(int(low * num_timesteps), int(high * num_timesteps))
        return falling.clamp(max=num_timesteps - 1).expand(len(u))
    t = int((high - (high - low) * fraction) * num_timesteps)
    return torch.full_like(u, min(t, num_timesteps - 1), dtype=torch.long)


def guide(unconditional: Tensor, conditional: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance u + s (c - u) (Ho and Salimans 2022); threestudio's s is 1 less."""
    return unconditional + scale * (conditional - unconditional)


def perpendicular(vector: Tensor, axis: Tensor) -> Tensor:
    """The component of ``vector`` [V, ...] perpendicular to ``axis``, for each view."""
    dims = tuple(range(1, vector.dim()))
    along = (vector * axis).sum(dims, keepdim=True)
    # The clamp only guards a zero axis, whose component along itself is zero.
    return vector - along / (axis * axis).sum(dims, keepdim=True).clamp(min=1e-12) * axis


def perp_neg(scores: Scores, scale: float) -> Tensor:
    """u + s (d + sum_i w_i perp(n_i - u, d)), d = c - u (Armandpour et al. 2023, Perp-Neg).

    n_i are the predictions for the other prompts; the weights w_i are 0 or negative. Only what is
    perpendicular to d is pushed away: what another view's prompt shares with this one's stays.
    """
    direction = scores.text - scores.negative
    total = direction
    for other, weight in zip(scores.others, scores.weights, strict=True):
        away = perpendicular(other - scores.negative, direction)
        total = total + per_view(weight, away) * away
    return scores.negative + scale * total


def guided(scores: Scores, scale: float) -> Tensor:
    """The noise prediction with classifier-free guidance, and Perp-Neg if there are ``others``."""
    if scores.others:
        return perp_neg(scores, scale)
    return guide(scores.negative, scores.text, scale)


def rescaled_x0(x0: Tensor, text_x0: Tensor, fraction: float) -> Tensor:
    """Clean latents with their contrast moved towards that of the text's alone.

    x0 <- x0 (1 - f + f std(x0_text) / std(x0)) for each view, f = ``fraction``: large guidance
    scales make latents too strong, which oversaturates colors (Lin et al. 2024, section 3.4, for
    the prediction; for x0 as in MVDream, Shi et al. 2024).
    """
    own, wanted = (each.flatten(1).std(1) for each in (x0, text_x0))
    # Latents have a deviation of about 1: the clamp only guards constant ones.
    factor = 1 - fraction + fraction * wanted / own.clamp(min=1e-6)
    return per_view(factor, x0) * x0


def rescaled(
    epsilon: Tensor, text: Tensor, noisy: Tensor, alpha_bar: Tensor, fraction: float
) -> Tensor:
    """The noise prediction ``epsilon`` after ``rescaled_x0`` of its clean latents.

    text: the prediction from the prompt. A view with alpha_bar 0 (zero terminal SNR) keeps its
    epsilon: x_t is nothing but noise there, so no x0 changes the noise in it.
    """
    has_x0 = alpha_bar > 0
    a = torch.where(has_x0, alpha_bar, 1.0)  # 1: any number that does not divide by zero
    guided_x0, text_x0 = (predict_x0(each, noisy, a) for each in (epsilon, text))
    found = to_epsilon(rescaled_x0(guided_x0, text_x0, fraction), noisy, alpha_bar, "sample")
    return torch.where(per_view(has_x0, noisy), found, epsilon)


def sds_residual(epsilon: Tensor, scores: Scores) -> Tensor:
    """eps_guided - eps: score distillation sampling (Poole et al. 2022, eq. 3)."""
    return epsilon - scores.epsilon


def csd_residual(epsilon: Tensor, scores: Scores) -> Tensor:
    """eps_guided - u = s (c - u): classifier score distillation, without eps (Yu et al. 2023)."""
    return epsilon - scores.negative


def vsd_residual(epsilon: Tensor, scores: Scores) -> Tensor:
    """eps_guided - eps_phi: variational score distillation (Wang et al. 2023).

    eps_phi is the LoRA score network's prediction, trained on the renders; the gradient vanishes
    where it agrees with the guided prediction.
    """
    assert scores.lora is not None, "vsd needs the argument lora_epsilon of distill"
    return epsilon - scores.lora


RESIDUALS: dict[str, Callable[[Tensor, Scores], Tensor]] = {
    "sds": sds_residual,
    "csd": csd_residual,
    "vsd": vsd_residual,
}
# w(t) from alpha_bar and the run's progress
WEIGHTINGS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "sds": lambda a, progress: 1 - a,  # sigma_t^2, DreamFusion's
    "uniform": lambda a, progress: torch.ones_like(a),  # "performed similarly" (section 3)
    "annealed": lambda a, progress: (1 - a).pow(1 - progress),  # from "sds" to "uniform"
    "fantasia3d": lambda a, progress: a.sqrt() * (1 - a),  # Chen et al. 2023
}


class SpecifyGradient(torch.autograd.Function):
    """A loss whose gradient with respect to the latents is given.

    Forward: 1/2 |gradient|^2. Backward: ``gradient`` times the incoming gradient, which carries the
    loss weight and GradScaler's scale, so both take effect. In float32 under CUDA's autocast too.
    """

    @staticmethod
    @torch.amp.custom_fwd(device_type="cuda", cast_inputs=torch.float32)
    def forward(ctx: Any, latents: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        ctx.dtype = latents.dtype
        return 0.5 * gradient.float().square().sum()

    @staticmethod
    @torch.amp.custom_bwd(device_type="cuda")
    def backward(ctx: Any, incoming: Tensor) -> tuple[Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return (incoming * gradient).to(ctx.dtype), None


def resized(images: Tensor, size: int) -> Tensor:
    """Resize images [V, 3, H, W] to [V, 3, size, size]: bilinear, antialiased when shrinking.

    A prior knows only images of the size it was trained on: a 64 x 64 render goes to Stable
    Diffusion as 512 x 512, which gives 64 x 64 latents instead of 8 x 8.
    """
    if images.shape[-2:] == (size, size):
        return images
    shrinks = size < min(images.shape[-2:])
    return F.interpolate(
        images, (size, size), mode="bilinear", align_corners=False, antialias=shrinks
    )


def score(
    prior: Prior, noisy: Tensor, t: Tensor, epsilon: Tensor, conditions: Conditions
) -> Scores:
    """The prior's noise predictions for x_t under every condition, in one batched call."""
    all_conditions = [conditions.negative, conditions.text, *conditions.others]
    count, alpha_bar = len(all_conditions), prior.alphas_cumprod[t]
    output = prior.predict(noisy.repeat(count, 1, 1, 1), t.repeat(count), torch.cat(all_conditions))
    negative, text, *others = (
        to_epsilon(chunk, noisy, alpha_bar, prior.prediction_type)
        for chunk in output.float().chunk(count)
    )
    return Scores(epsilon, negative, text, tuple(others), conditions.weights)


def distill(
    prior: Prior,
    images: Tensor,
    conditions: Conditions,
    noise: GuidanceNoise,
    recipe: Recipe,
    lora_epsilon: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> Distilled:
    """One guidance step: w(t) x residual, passed to the images through the encoder (eq. 3).

    images [V, 3, H, W] in [0, 1]. lora_epsilon: (x_t, t) -> eps_phi, the LoRA score network's
    prediction, for kind "vsd". The gradient is a mean over views and a sum over latents. As in
    DreamFusion, the U-Net is not differentiated; the encoder is, with respect to the images.
    """
    latents = prior.encode(images, noise.posterior)
    with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
        t = pick_timesteps(noise.u, recipe, prior.alphas_cumprod)
        alpha_bar = prior.alphas_cumprod[t]
        noisy = add_noise(latents.detach(), noise.epsilon, alpha_bar)
        scores = score(prior, noisy, t, noise.epsilon, conditions)
        if lora_epsilon is not None:
            scores = scores._replace(lora=lora_epsilon(noisy, t))
        epsilon = guided(scores, recipe.scale)
        if recipe.rescale:
            epsilon = rescaled(epsilon, scores.text, noisy, alpha_bar, recipe.rescale)
        weight = per_view(WEIGHTINGS[recipe.weighting](alpha_bar, recipe.progress), noisy)
        gradient = weight * RESIDUALS[recipe.kind](epsilon, scores)
        # A view that overflowed gets a zero gradient: nan_to_num would turn its infinities into
        # huge numbers, and that one step would ruin the scene.
        finite = gradient.flatten(1).isfinite().all(1)
        gradient = torch.where(per_view(finite, gradient), gradient, 0.0)
        if recipe.clip:  # as in Debiased-SDS (Hong et al. 2023)
            gradient = gradient.clamp(-recipe.clip, recipe.clip)
        gradient = gradient / len(gradient)  # so that the step does not grow with the views
    loss = SpecifyGradient.apply(latents, gradient)
    return Distilled(loss, t, latents.detach(), gradient, (~finite).sum())


def join(pieces: Sequence[Distilled], fractions: Sequence[float]) -> Distilled:
    """The outcome for all views from those of micro-batches; fractions: their shares, sum 1."""
    parts = zip(pieces, fractions, strict=True)
    gradient = torch.cat([piece.gradient * fraction for piece, fraction in parts])
    return Distilled(
        0.5 * gradient.float().square().sum(),
        torch.cat([piece.t for piece in pieces]),
        torch.cat([piece.latents for piece in pieces]),
        gradient,
        torch.stack([piece.skipped for piece in pieces]).sum(),
    )
