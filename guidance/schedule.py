"""Noise levels, and what a network's output for x_t says of its noise and of its clean latents.

x_t = sqrt(a) x0 + sqrt(1 - a) eps with a = alphas_cumprod[t] in [0, 1), decreasing over t. A
schedule of zero terminal SNR (Lin et al. 2024) ends with a = 0: x_t is pure noise there.
Depending on its prediction type, a network predicts eps, v = sqrt(a) eps - sqrt(1 - a) x0 (Salimans
and Ho 2022), or x0, called sample. Latents are [V, C, h, w], alpha_bar is [V].
"""

from collections.abc import Callable

from torch import Tensor

Conversion = Callable[[Tensor, Tensor, Tensor], Tensor]  # output, noisy, a that broadcasts


def per_view(values: Tensor, latents: Tensor) -> Tensor:
    """Reshape values [V] to [V, 1, ...] so that they broadcast over ``latents`` [V, ...]."""
    return values.view(-1, *[1] * (latents.dim() - 1))


def add_noise(clean: Tensor, epsilon: Tensor, alpha_bar: Tensor) -> Tensor:
    """x_t = sqrt(a) x0 + sqrt(1 - a) eps (DDPM eq. 4); alpha_bar [V]."""
    a = per_view(alpha_bar, clean)
    return a.sqrt() * clean + (1 - a).sqrt() * epsilon


TO_EPSILON: dict[str, Conversion] = {
    "epsilon": lambda output, noisy, a: output,
    "v_prediction": lambda output, noisy, a: a.sqrt() * output + (1 - a).sqrt() * noisy,
    "sample": lambda output, noisy, a: (noisy - a.sqrt() * output) / (1 - a).sqrt(),
}
TO_X0: dict[str, Conversion] = {
    "epsilon": lambda output, noisy, a: (noisy - (1 - a).sqrt() * output) / a.sqrt(),  # DDIM eq. 9
    "v_prediction": lambda output, noisy, a: a.sqrt() * noisy - (1 - a).sqrt() * output,
    "sample": lambda output, noisy, a: output,
}


def to_epsilon(output: Tensor, noisy: Tensor, alpha_bar: Tensor, prediction_type: str) -> Tensor:
    """The noise prediction that corresponds to a network's ``output`` for x_t."""
    return TO_EPSILON[prediction_type](output, noisy, per_view(alpha_bar, noisy))


def to_x0(output: Tensor, noisy: Tensor, alpha_bar: Tensor, prediction_type: str) -> Tensor:
    """The clean latents that correspond to a network's ``output`` for x_t.

    Finite at alpha_bar 0 too, unless the network predicts epsilon, which says nothing of x0 there.
    """
    return TO_X0[prediction_type](output, noisy, per_view(alpha_bar, noisy))


def network_target(
    clean: Tensor, epsilon: Tensor, alpha_bar: Tensor, prediction_type: str
) -> Tensor:
    """The output that a network is trained to give for x_t of ``clean`` and ``epsilon``."""
    a = per_view(alpha_bar, clean)
    return {
        "epsilon": lambda: epsilon,
        "v_prediction": lambda: a.sqrt() * epsilon - (1 - a).sqrt() * clean,
        "sample": lambda: clean,
    }[prediction_type]()


def predict_x0(epsilon: Tensor, noisy: Tensor, alpha_bar: Tensor) -> Tensor:
    """The clean latents if ``epsilon`` is the noise in x_t; alpha_bar > 0."""
    return to_x0(epsilon, noisy, alpha_bar, "epsilon")
