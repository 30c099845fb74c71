"""A diffusion prior in closed form, to test the whole training loop against algebra.

Images are normally distributed around a known one: x0 ~ N(mu, s^2). Then x_t is normal too, and
the noise prediction of a perfect network is

    E[eps | x_t] = sqrt(1 - a) (x_t - sqrt(a) mu) / (a s^2 + 1 - a).

Score distillation from it pulls every image towards mu, and a scene towards one whose every view
is mu. The latents are the images themselves, scaled to [-1, 1].
"""

import torch
from torch import Tensor

from guidance.sds import add_noise

RADIUS, RGB = 0.6, (0.90, 0.40, 0.10)  # of the ball in the 3-D target images


class Gaussian:
    """The prior N(mu, deviation^2) with Stable Diffusion's noise schedule.

    Its condition, in place of a text embedding, is mu.
    """

    prediction_type = "epsilon"
    native_size = 0  # images of any size

    def __init__(self, device: torch.device, deviation: float = 0.1, num_timesteps: int = 1000):
        beta = torch.linspace(0.00085**0.5, 0.012**0.5, num_timesteps, device=device) ** 2
        self.alphas_cumprod = torch.cumprod(1 - beta, dim=0)
        self.deviation = deviation
        self.fingerprint = f"gaussian {deviation}"

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """(C, h, w) of the latents of height x width pixels."""
        return (3, height, width)

    def encode(self, images: Tensor, noise: Tensor | None) -> Tensor:
        """Scale images [V, 3, H, W] from [0, 1] to [-1, 1]; ``noise`` is not used."""
        return images * 2 - 1

    def decode(self, latents: Tensor) -> Tensor:
        """Scale latents [V, 3, H, W] from [-1, 1] to images in [0, 1]."""
        return ((latents + 1) / 2).clamp(0, 1)

    def predict(self, noisy: Tensor, t: Tensor, mu: Tensor) -> Tensor:
        """E[eps | x_t] for images around ``mu`` [V, 3, H, W] in [0, 1]."""
        a = self.alphas_cumprod[t].view(-1, 1, 1, 1)
        off = noisy - add_noise(self.encode(mu, None), torch.zeros_like(noisy), a.flatten())
        return (1 - a).sqrt() * off / (a * self.deviation**2 + 1 - a)


def ball(origins: Tensor, directions: Tensor, background: Tensor) -> Tensor:
    """Render a ball of one color around the origin: rays [..., 3] -> RGB [..., 3].

    The directions need not be unit vectors; rays that miss the ball get background [..., 3].
    """
    unit = directions / directions.norm(dim=-1, keepdim=True)
    along = (origins * unit).sum(-1)
    hit = (along < 0) & ((origins**2).sum(-1) - along**2 < RADIUS**2)
    return torch.where(hit[..., None], origins.new_tensor(RGB), background)
