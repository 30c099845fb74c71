"""Ordinary diffusion training of LoRA adapters: what a step draws, and its loss.

The network's own target (epsilon, v or x0) and noise schedule are those of the model, also where
it has zero terminal SNR. Latents and embeddings are computed once: VAE and text encoder are frozen.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from guidance.attention import fast_attention
from guidance.schedule import add_noise, network_target
from guidance.stable_diffusion import StableDiffusion

AT_ONCE = 8  # pictures in the VAE


class Examples(NamedTuple):
    """Pictures as the U-Net is trained on them."""

    mean: Tensor  # [N, C, h, w] of the VAE's posterior, scaled
    std: Tensor  # [N, C, h, w]
    text: Tensor  # [N, L, D] the captions' embeddings

    def draw(self, count: int, generator: Generator) -> tuple[Tensor, Tensor]:
        """``count`` of them at random: latents [count, C, h, w], sampled, and embeddings."""
        options: dict[str, Any] = {"generator": generator, "device": self.mean.device}
        rows = torch.randint(len(self.mean), (count,), **options)
        noise = torch.randn(count, *self.mean.shape[1:], **options)
        return self.mean[rows] + self.std[rows] * noise, self.text[rows]


@torch.no_grad()
def encode(model: StableDiffusion, images: Tensor, captions: list[str]) -> Examples:
    """Examples of images [N, 3, H, W] in [0, 1] and their captions."""
    means, stds = [], []
    for batch in images.split(AT_ONCE):
        batch = batch.to(model.device)
        mean = model.encode(batch, None)
        means.append(mean)
        stds.append(model.encode(batch, torch.ones_like(mean)) - mean)
    return Examples(torch.cat(means), torch.cat(stds), model.embed(captions))


def check_length(model: StableDiffusion, text: str, source: str) -> None:
    """ValueError, which names ``source``, if the text encoder would cut words of ``text`` off."""
    room = model.embed([""]).shape[1]
    ids = model.tokenizer(text[: 64 * room], verbose=False).input_ids
    if len(ids) > room:
        raise ValueError(
            f"{source}: {len(ids)} tokens with start and end, the text encoder reads {room}; "
            f'shorten "{text[:60]}..."'
        )


def denoising_losses(
    model: StableDiffusion, clean: Tensor, text: Tensor, generator: Generator
) -> Tensor:
    """Mean squared error of the U-Net's output for each of B latents [B, C, h, w]: [B].

    text [B, L, D]. t is uniform over all timesteps of the model. Differentiable with respect to
    adapters that are switched on.
    """
    options: dict[str, Any] = {"generator": generator, "device": clean.device}
    t = torch.randint(len(model.alphas_cumprod), (len(clean),), **options)
    epsilon = torch.randn(clean.shape, **options)
    alpha_bar = model.alphas_cumprod[t]
    noisy = add_noise(clean, epsilon, alpha_bar)
    with fast_attention(model.device):
        output = model.unet(
            noisy.to(model.dtype), t, encoder_hidden_states=text.to(model.dtype)
        ).sample
    wanted = network_target(clean, epsilon, alpha_bar, model.prediction_type)
    return F.mse_loss(output.float(), wanted, reduction="none").flatten(1).mean(1)


def training_loss(
    model: StableDiffusion,
    own: Examples,
    others: Examples | None,
    batch: int,
    prior_weight: float,
    generator: Generator,
) -> Tensor:
    """The loss [] of one step: of ``batch`` own pictures, and of as many of their class.

    others: pictures that the model drew of the class, which it shall go on to draw (prior
    preservation, Ruiz et al. 2023, DreamBooth, eq. 2); None: without them.
    """
    clean, text = own.draw(batch, generator)
    if others is None:
        return denoising_losses(model, clean, text, generator).mean()
    more, more_text = others.draw(batch, generator)
    both = (torch.cat([clean, more]), torch.cat([text, more_text]))
    mine, kept = denoising_losses(model, *both, generator).chunk(2)
    return mine.mean() + prior_weight * kept.mean()
