"""Score distillation: the maths, for any prior (Poole et al. 2022, DreamFusion, and after it).

Notation: x0 clean latents; x_t = sqrt(a) x0 + sqrt(1 - a) eps noisy ones; a = alphas_cumprod[t]
in (0, 1), falling in t = 0 ... T - 1; eps standard normal. Views come first: latents [V, C, h, w].
A prior has ``alphas_cumprod`` [T], ``prediction_type`` (a key of TO_EPSILON), ``latent_shape``,
``encode`` and ``predict``; see ``guidance.stable_diffusion`` and ``guidance.gaussian``.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class GuidanceNoise(NamedTuple):
    """Every random number that guiding V views takes, one row per view."""

    u: Tensor  # [V] uniform: place of t in its range
    epsilon: Tensor  # [V, C, h, w] normal: the noise that is added
    posterior: Tensor  # [V, C, h, w] normal: of the encoder's sample
    lora_u: Tensor  # [V] uniform, [V, C, h, w] normal and [V] uniform: t, noise and dropped
    lora_epsilon: Tensor  # cameras where guidance.vsd teaches its copy
    lora_drop: Tensor

    def part(self, index) -> "GuidanceNoise":
        """The rows at ``index``."""
        return GuidanceNoise(*(member[index] for member in self))


class Conditions(NamedTuple):
    """What V views are asked for, each as the prior's ``predict`` takes it: [V, ...]."""

    negative: Tensor
    text: Tensor
    others: tuple[Tensor, ...] = ()  # what the views should not be, for ``perp_neg``
    weights: tuple[Tensor, ...] = ()  # [V] of each of those, not positive


class Scores(NamedTuple):
    """The noise in x_t as each side sees it, [V, C, h, w]."""

    epsilon: Tensor  # what was added
    negative: Tensor  # the model, told the negative prompt
    text: Tensor  # the model, told the prompt
    others: tuple[Tensor, ...] = ()  # the model, told ``Conditions.others``
    weights: tuple[Tensor, ...] = ()
    lora: Tensor | None = None  # the copy that has learned how the renders look (guidance.vsd)


class Recipe(NamedTuple):
    """How views are guided at one step."""

    kind: str = "sds"  # of RESIDUALS
    scale: float = 100.0  # guidance scale
    weighting: str = "sds"  # of WEIGHTINGS
    t_range: tuple[float, float] = (0.02, 0.98)  # parts of T
    t_anneal: str = "none"  # of ANNEALS
    progress: float = 0.0  # part of the run that is done, in [0, 1]
    rescale: float = 0.0  # part of ``rescaled``, in [0, 1]
    clip: float = 0.0  # largest number in the latents' gradient, 0: no limit


class Distilled(NamedTuple):
    """One step's outcome."""

    loss: Tensor  # [] whose gradient is the SDS gradient; its value is no measure of quality
    t: Tensor  # [V] timesteps
    latents: Tensor  # [V, C, h, w] of the images, without a graph
    gradient: Tensor  # [V, C, h, w] that the latents received
    skipped: Tensor  # [] views left out because their gradient was not finite


def draw_noise(num_views: int, latent_shape, generator: torch.Generator) -> GuidanceNoise:
    """The random numbers for ``num_views`` views, from ``generator`` alone."""
    options = {"generator": generator, "device": generator.device}
    size = (num_views, *latent_shape)
    rows = {"u": torch.rand(num_views, **options)}
    rows["epsilon"], rows["posterior"] = (torch.randn(size, **options) for _ in range(2))
    rows["lora_u"] = torch.rand(num_views, **options)
    rows["lora_epsilon"] = torch.randn(size, **options)
    return GuidanceNoise(**rows, lora_drop=torch.rand(num_views, **options))


def timesteps(u: Tensor, t_range: tuple[float, float], num_timesteps: int) -> Tensor:
    """u [V] in [0, 1) -> whole timesteps [V], even over t_range = (low, high), parts of T."""
    low, high = (int(part * num_timesteps) for part in t_range)
    high = max(low + 1, min(high + 1, num_timesteps))  # the upper end is included
    return (low + (u * (high - low)).long()).clamp(max=num_timesteps - 1)


def falling_timestep(part: float, num_timesteps: int, alphas_cumprod: Tensor) -> int:
    """DreamTime's t: non-increasing, and longest where content forms (Huang et al. 2023).

    t is where the weights sqrt((1 - a) / a) x prior(t), summed from the top, reach ``part`` of
    their whole. The prior is 1 from 0.5 T to 0.8 T with Gaussian ends of deviation 0.1 T, 0.3 T.
    """
    place = torch.arange(num_timesteps, device=alphas_cumprod.device) / num_timesteps
    above, below = (place - 0.8).clamp(min=0) / 0.3, (place - 0.5).clamp(max=0) / 0.1
    prior = torch.exp(-0.5 * (above**2 + below**2))
    weight = ((1 - alphas_cumprod) / alphas_cumprod).sqrt() * prior
    reached = weight.flip(0).cumsum(0) / weight.sum()
    return num_timesteps - 1 - int((reached < part).sum().clamp(max=num_timesteps - 1))


ANNEALS = ("none", "linear", "sqrt", "falling")


def pick_timesteps(u: Tensor, recipe: Recipe, alphas_cumprod: Tensor) -> Tensor:
    """Timesteps [V] by ``recipe``: drawn with u [V], or one that falls as the run goes on.

    linear and sqrt: t_max - (t_max - t_min) p, p the progress or its root (HiFA, Zhu and Zhuang
    2023). falling: ``falling_timestep``, kept inside the range.
    """
    num_timesteps = len(alphas_cumprod)
    if recipe.t_anneal == "none":
        return timesteps(u, recipe.t_range, num_timesteps)
    low, high = recipe.t_range
    part = math.sqrt(recipe.progress) if recipe.t_anneal == "sqrt" else recipe.progress
    t = int((high - (high - low) * part) * num_timesteps)
    if recipe.t_anneal == "falling":
        t = falling_timestep(part, num_timesteps, alphas_cumprod)
        t = min(max(t, int(low * num_timesteps)), int(high * num_timesteps))
    return torch.full_like(u, min(t, num_timesteps - 1), dtype=torch.long)


def per_view(alpha_bar: Tensor, latents: Tensor) -> Tensor:
    return alpha_bar.view(-1, *[1] * (latents.dim() - 1))


def add_noise(clean: Tensor, epsilon: Tensor, alpha_bar: Tensor) -> Tensor:
    """x_t = sqrt(a) x0 + sqrt(1 - a) eps (DDPM eq. 4); alpha_bar [V]."""
    a = per_view(alpha_bar, clean)
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
    return TO_EPSILON[prediction_type](output, noisy, per_view(alpha_bar, noisy))


def predict_x0(epsilon: Tensor, noisy: Tensor, alpha_bar: Tensor) -> Tensor:
    """The clean latents if ``epsilon`` is the noise in x_t (DDIM eq. 9)."""
    a = per_view(alpha_bar, noisy)
    return (noisy - (1 - a).sqrt() * epsilon) / a.sqrt()


def guide(unconditional: Tensor, conditional: Tensor, scale: float) -> Tensor:
    """u + s (c - u) (Ho and Salimans 2022); s = 1 is the text alone, threestudio's is one less."""
    return unconditional + scale * (conditional - unconditional)


def perpendicular(vector: Tensor, axis: Tensor) -> Tensor:
    """``vector`` [V, ...] without its part along ``axis``, view by view."""
    dims = tuple(range(1, vector.dim()))
    along = (vector * axis).sum(dims, keepdim=True)
    return vector - along / (axis * axis).sum(dims, keepdim=True).clamp(min=1e-12) * axis


def perp_neg(scores: Scores, scale: float) -> Tensor:
    """u + s (d + sum_i w_i perp(n_i - u, d)), d = c - u (Armandpour et al. 2023, Perp-Neg).

    The w_i are not positive. Only what another view has and this one lacks is pushed away; what
    both share lies along d and stays.
    """
    direction = scores.text - scores.negative
    total = direction
    for other, weight in zip(scores.others, scores.weights, strict=True):
        away = perpendicular(other - scores.negative, direction)
        total = total + per_view(weight, away) * away
    return scores.negative + scale * total


def guided(scores: Scores, scale: float) -> Tensor:
    """The noise that the model sees, guided by its text, and by Perp-Neg where it is asked for."""
    if scores.others:
        return perp_neg(scores, scale)
    return guide(scores.negative, scores.text, scale)


def rescaled(
    epsilon: Tensor, text: Tensor, noisy: Tensor, alpha_bar: Tensor, part: float
) -> Tensor:
    """``epsilon`` whose clean latents have the contrast that the text alone gives, by ``part``.

    x0 <- x0 (1 - part + part std(x0_text) / std(x0)), view by view: large guidance scales make
    latents, so colors, too strong (Lin et al. 2024, section 3.4, there on the prediction; on x0
    as Shi et al. 2024, MVDream, do). text: the noise that the model sees, told the prompt.
    """
    guided_x0, text_x0 = (predict_x0(each, noisy, alpha_bar) for each in (epsilon, text))
    own, wanted = (x0.flatten(1).std(1) for x0 in (guided_x0, text_x0))
    factor = 1 - part + part * wanted / own.clamp(min=1e-6)  # latents' deviation is about 1
    return _from_sample(per_view(factor, noisy) * guided_x0, noisy, per_view(alpha_bar, noisy))


def sds_residual(epsilon: Tensor, scores: Scores) -> Tensor:
    """eps_guided - eps: score distillation sampling (Poole et al. 2022, eq. 3)."""
    return epsilon - scores.epsilon


def csd_residual(epsilon: Tensor, scores: Scores) -> Tensor:
    """eps_guided - u = s (c - u): the text's part alone, without the noise (Yu et al. 2023)."""
    return epsilon - scores.negative


def vsd_residual(epsilon: Tensor, scores: Scores) -> Tensor:
    """eps_guided - eps_copy: variational score distillation (Wang et al. 2023).

    The copy has learned what the renders look like; where it agrees with the model nothing pulls.
    """
    return epsilon - scores.lora


RESIDUALS: dict[str, Callable[[Tensor, Scores], Tensor]] = {
    "sds": sds_residual,
    "csd": csd_residual,
    "vsd": vsd_residual,
}
# w(t) from alpha_bar and the run's progress
WEIGHTINGS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "sds": lambda a, progress: 1 - a,  # sigma_t^2, DreamFusion's
    "uniform": lambda a, progress: torch.ones_like(a),  # "performed similarly" (section 3 there)
    "annealed": lambda a, progress: (1 - a).pow(1 - progress),  # from the first to the second
    "fantasia3d": lambda a, progress: a.sqrt() * (1 - a),  # Chen et al. 2023
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


def resized(images: Tensor, size: int) -> Tensor:
    """images [V, 3, H, W] -> [V, 3, size, size], bilinear; averaged where they shrink.

    A prior only knows pictures of the size it was trained on: a 64 x 64 render is shown to Stable
    Diffusion as 512 x 512, which is 64 x 64 latents, not 8 x 8.
    """
    if images.shape[-2:] == (size, size):
        return images
    shrinks = size < min(images.shape[-2:])
    return F.interpolate(
        images, (size, size), mode="bilinear", align_corners=False, antialias=shrinks
    )


def score(prior, noisy: Tensor, t: Tensor, epsilon: Tensor, conditions: Conditions) -> Scores:
    """What the prior sees in ``noisy`` under each condition, in one call."""
    asked = [conditions.negative, conditions.text, *conditions.others]
    count, alpha_bar = len(asked), prior.alphas_cumprod[t]
    output = prior.predict(noisy.repeat(count, 1, 1, 1), t.repeat(count), torch.cat(asked))
    negative, text, *others = (
        to_epsilon(part, noisy, alpha_bar, prior.prediction_type)
        for part in output.float().chunk(count)
    )
    return Scores(epsilon, negative, text, tuple(others), conditions.weights)


def distill(
    prior,
    images: Tensor,
    conditions: Conditions,
    noise: GuidanceNoise,
    recipe: Recipe,
    lora_epsilon: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> Distilled:
    """w(t) x residual, handed to the images through the encoder (DreamFusion eq. 3 and kin).

    images [V, 3, H, W] in [0, 1]. lora_epsilon: (x_t, t) -> epsilon of the LoRA score network,
    for ``vsd``. The loss is a mean over views and a sum over latents. The prior is never
    differentiated: only the encoder is, with respect to its input.
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
        # A view that overflowed teaches nothing; turning its infinities into huge numbers, as
        # nan_to_num would, makes one step that ruins the scene.
        finite = gradient.flatten(1).isfinite().all(1)
        gradient = torch.where(per_view(finite, gradient), gradient, 0.0)
        if recipe.clip:  # as D-SDS does (Hong et al. 2023)
            gradient = gradient.clamp(-recipe.clip, recipe.clip)
        gradient = gradient / len(gradient)
    loss = SpecifyGradient.apply(latents, gradient)
    return Distilled(loss, t, latents.detach(), gradient, (~finite).sum())
