"""A diffusion prior that is known in closed form, to test the whole loop against algebra.

Pictures are normal around a known one: x0 ~ N(mu, s^2). Then x_t is normal too and the noise that
a perfect network would find is

    E[eps | x_t] = sqrt(1 - a) (x_t - sqrt(a) mu) / (a s^2 + 1 - a).

Its score distillation pulls every picture towards mu, and a scene towards one that looks like mu
from everywhere. Latents are the pictures themselves, in [-1, 1].
"""

import torch
from torch import Tensor

from guidance.sds import add_noise

RADIUS, RGB = 0.6, (0.90, 0.40, 0.10)  # of the ball that 3-D targets show


class Gaussian:
    """The prior N(mu, deviation^2) with Stable Diffusion's noise schedule; conditions are mu."""

    prediction_type = "epsilon"
    native_size = 0  # any

    def __init__(self, device: torch.device, deviation: float = 0.1, num_timesteps: int = 1000):
        beta = torch.linspace(0.00085**0.5, 0.012**0.5, num_timesteps, device=device) ** 2
        self.alphas_cumprod = torch.cumprod(1 - beta, dim=0)
        self.deviation = deviation
        self.fingerprint = f"gaussian {deviation}"

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        return (3, height, width)

    def encode(self, images: Tensor, noise: Tensor | None) -> Tensor:
        """[V, 3, H, W] in [0, 1] -> in [-1, 1]; ``noise`` is not needed."""
        return images * 2 - 1

    def decode(self, latents: Tensor) -> Tensor:
        return ((latents + 1) / 2).clamp(0, 1)

    def predict(self, noisy: Tensor, t: Tensor, mu: Tensor) -> Tensor:
        """E[eps | x_t] for pictures around ``mu`` [V, 3, H, W] in [0, 1]."""
        a = self.alphas_cumprod[t].view(-1, 1, 1, 1)
        off = noisy - add_noise(self.encode(mu, None), torch.zeros_like(noisy), a.flatten())
        return (1 - a).sqrt() * off / (a * self.deviation**2 + 1 - a)


def ball(origins: Tensor, directions: Tensor, background: Tensor) -> Tensor:
    """What rays [..., 3] see of a ball of one color around the origin -> RGB [..., 3]."""
    unit = directions / directions.norm(dim=-1, keepdim=True)
    along = (origins * unit).sum(-1)
    hit = (along < 0) & ((origins**2).sum(-1) - along**2 < RADIUS**2)
    return torch.where(hit[..., None], origins.new_tensor(RGB), background)
