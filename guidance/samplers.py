"""Sample latents with diffusers' own schedulers, as its StableDiffusionPipeline does.

A scheduler is made from the model's own scheduler config, and its ``step`` is called. Whether it
can sample this model is tried on one pixel first, so that a sampler that cannot is refused before
any image is computed.
"""

import inspect
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor

from guidance.model_files import make_scheduler
from guidance.model_kinds import one_line, read_json
from guidance.sds import Prior, guide, rescaled_x0

SAMPLERS = {  # --scheduler -> diffusers' class
    "ddim": "DDIMScheduler",
    "ddpm": "DDPMScheduler",
    "pndm": "PNDMScheduler",
    "dpm++": "DPMSolverMultistepScheduler",
    "euler": "EulerDiscreteScheduler",
    "unipc": "UniPCMultistepScheduler",
}


def make_sampler(folder: Path, name: str, steps: int, prior: Prior) -> Any:
    """diffusers' scheduler ``name``, a key of SAMPLERS, for the model ``prior`` in ``folder``.

    steps: for which it must work. As in StableDiffusionPipeline, latents are not clipped and
    steps_offset is 1. ValueError, in one line, if it cannot sample this model.
    """
    source, prediction = f"--scheduler {name}", prior.prediction_type
    if name not in SAMPLERS:
        raise ValueError(f"{source}: expected one of {', '.join(SAMPLERS)}")
    check_steps(prior, steps)
    config = read_json(folder / "scheduler" / "scheduler_config.json")
    config |= {"clip_sample": False, "steps_offset": 1, "prediction_type": prediction}
    sampler = make_scheduler(SAMPLERS[name], config, source)
    schedules = (prior.alphas_cumprod.cpu(), sampler.alphas_cumprod.float())
    if not torch.allclose(*schedules, atol=1e-6):  # some schedulers end with 2^-24 in place of 0
        raise ValueError(
            f"{source}: {SAMPLERS[name]} cannot have the noise schedule that the model was trained "
            "with, such as one of zero terminal SNR; use another --scheduler"
        )
    _try(make_scheduler(SAMPLERS[name], config, source), steps, f"{source} --steps {steps}")
    return sampler


def check_steps(prior: Prior, steps: int) -> None:
    """ValueError if the model has fewer timesteps, or cannot start from pure noise."""
    total = len(prior.alphas_cumprod)
    if steps > total:
        raise ValueError(f"--steps {steps}: the model has {total} timesteps; use at most {total}")
    if prior.prediction_type == "epsilon" and not prior.alphas_cumprod[-1] > 0:
        raise ValueError(
            "the scheduler's config has zero terminal SNR, but a model that predicts epsilon "
            "cannot start a picture from pure noise; set prediction_type to what the model "
            "predicts (v_prediction?), or rescale_betas_zero_snr to false"
        )


def _try(sampler: Any, steps: int, source: str) -> None:
    """ValueError if all steps on one pixel do not end with a finite number."""
    pixel = torch.ones(1, 4, 1, 1)
    try:
        sampler.set_timesteps(steps)
        for t in sampler.timesteps:
            sampler.scale_model_input(pixel, t)
            pixel = sampler.step(torch.zeros_like(pixel), t, pixel, **_generator(sampler, 0))[0]
    except (ValueError, NotImplementedError, TypeError, IndexError, RuntimeError) as error:
        kind = type(sampler).__name__
        prediction = sampler.config.prediction_type
        raise ValueError(
            f"{source}: {kind} cannot sample this model, which predicts {prediction} "
            f"({one_line(error)}); use another --scheduler"
        ) from None
    if not pixel.isfinite().all():
        raise ValueError(f"{source}: gives NaN for this model; use another --scheduler or --steps")


def _generator(sampler: Any, generator: Generator | list[Generator] | int) -> dict[str, Any]:
    """The argument ``generator`` of ``sampler.step``, where it has one: a generator or a seed."""
    if "generator" not in inspect.signature(sampler.step).parameters:
        return {}
    seeded = Generator().manual_seed(generator) if isinstance(generator, int) else generator
    return {"generator": seeded}


def sample_with(
    sampler: Any,
    prior: Prior,
    noise: Tensor,
    negative: Tensor,
    text: Tensor,
    scale: float,
    steps: int,
    rescale: float = 0.0,
    generators: list[Generator] | None = None,
) -> Tensor:
    """Sample latents [V, C, h, w] from ``noise`` by a scheduler of ``make_sampler``.

    negative, text [V, L, D]: embeddings. scale: guidance scale. rescale: diffusers'
    guidance_rescale, which acts on the network's output. generators: one for each of V, for the
    noise that ddpm adds at every step. StableDiffusionPipeline's own loop.
    """
    sampler.set_timesteps(steps, device=noise.device)
    own_noise = _generator(sampler, generators or 0)
    latents = noise * sampler.init_noise_sigma
    for t in sampler.timesteps:
        scaled = sampler.scale_model_input(latents, t)
        both = torch.cat([negative, text])
        output = prior.predict(scaled.repeat(2, 1, 1, 1), t.expand(len(both)), both)
        unconditional, conditional = output.chunk(2)
        output = guide(unconditional, conditional, scale)
        if rescale:
            output = rescaled_x0(output, conditional, rescale)
        latents = sampler.step(output, t, latents, **own_noise).prev_sample
    return latents
