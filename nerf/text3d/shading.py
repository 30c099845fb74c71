"""Lighting: colors from albedo and normals (DreamFusion, section 3.1).

With ambient light and a point light, color = albedo (ambient + (1 - ambient) max(0, n l)). A view
is rendered lit, as albedo alone (ambient 1), or textureless (albedo white). Textureless views
penalize an object whose shape is wrong and that looks right only by its colors.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from nerf.training.system import upload


class Lighting(NamedTuple):
    """The lighting and background of each ray [R]."""

    light: Tensor  # [R, 3] position of the point light, scene units
    ambient: Tensor  # [R, 1] share of ambient light; 1: albedo only
    textureless: Tensor  # [R, 1] 1: albedo is replaced by white
    background: Tensor  # [R, 3] color
    use_background_net: Tensor  # [R, 1] 1: the background network's color instead

    def part(self, index: slice | Tensor) -> "Lighting":
        """The rows at ``index`` (slice, mask or indices)."""
        return Lighting(*(member[index] for member in self))

    def on(self, device: torch.device) -> "Lighting":
        """The same on ``device``."""
        return Lighting(*(upload(member, device) for member in self))

    def per_pixel(self, num_pixels: int) -> "Lighting":
        """One row per view repeated for each of its ``num_pixels`` rays, view by view."""
        return Lighting(*(member.repeat_interleave(num_pixels, dim=0) for member in self))

    @property
    def is_lit(self) -> bool:
        """Whether any ray needs normals: not all are albedo only."""
        return bool((self.ambient < 1).any())


class LightingSettings(NamedTuple):
    """The distribution that ``draw_lighting`` draws from."""

    ambient: float = 0.1
    p_diffuse: float = 0.75  # probability that a view is lit
    p_textureless: float = 0.5  # probability that a lit view is textureless
    background: str = "random"  # random, white, black or learned
    p_random: float = 0.5  # probability of a random color if ``background`` is not random


GRAY_LEVELS = {"white": 1.0, "black": 0.0}


def draw_lighting(
    cameras: Tensor, settings: LightingSettings, generator: torch.Generator, *, lit: bool
) -> Lighting:
    """Random lighting for each of V cameras at positions [V, 3]. lit False: albedo only.

    The light's direction is that of a sample of N(camera, I), its distance from the origin 0.8 to
    1.5 times the camera's.
    """
    num_views, device = len(cameras), generator.device
    uniform = torch.rand(num_views, 7, generator=generator, device=device)
    around = cameras + torch.randn(num_views, 3, generator=generator, device=device)
    # differs from the paper: its 0.8 to 1.5 are scene units, with cameras at 1 to 1.5.
    far = cameras.norm(dim=-1, keepdim=True) * (0.8 + 0.7 * uniform[:, :1])
    shaded = (uniform[:, 1:2] < settings.p_diffuse) & lit
    textureless = shaded & (uniform[:, 2:3] < settings.p_textureless)
    random = settings.background == "random"
    random_color = (uniform[:, 3:4] < settings.p_random) | random
    plain = torch.full_like(cameras, GRAY_LEVELS.get(settings.background, 0.0))
    return Lighting(
        light=F.normalize(around, dim=-1) * far,
        ambient=torch.where(shaded, settings.ambient, 1.0),
        textureless=textureless.float(),
        background=torch.where(random_color, uniform[:, 4:7], plain),
        use_background_net=(~random_color).float() * (settings.background == "learned"),
    )


def preview_lighting(cameras: Tensor, background: str, *, ambient: float = 1.0) -> Lighting:
    """Lighting of previews: a point light at each camera [V, 3]; ambient 1: albedo only."""
    one = torch.ones_like(cameras[:, :1])
    return Lighting(
        light=cameras,
        ambient=ambient * one,
        textureless=0 * one,
        background=torch.full_like(cameras, GRAY_LEVELS.get(background, 1.0)),
        use_background_net=one * (background == "learned"),
    )


def shade(albedo: Tensor, normals: Tensor, points: Tensor, lighting: Lighting) -> Tensor:
    """RGB [N, 3] by Lambert's law of albedo, unit normals and points [N, 3]; a light per point."""
    towards = F.normalize(lighting.light - points, dim=-1)
    lambert = (normals * towards).sum(-1, keepdim=True).clamp(min=0)
    albedo = torch.lerp(albedo, torch.ones_like(albedo), lighting.textureless)
    return albedo * (lighting.ambient + (1 - lighting.ambient) * lambert)
