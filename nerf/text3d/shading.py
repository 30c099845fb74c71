"""Light: what turns albedo and normals into colors (DreamFusion, section 3.1).

A point light and an ambient one: color = albedo (ambient + (1 - ambient) max(0, n l)). Some
pictures are albedo alone (ambient 1), some show the shape alone (albedo white): a scene that looks
right only when painted gives itself away there.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Lighting(NamedTuple):
    """How each ray [R] is lit, and what is behind it."""

    light: Tensor  # [R, 3] position of the point light, scene units
    ambient: Tensor  # [R, 1] share of light from everywhere; 1: albedo only
    textureless: Tensor  # [R, 1] 1: as if all were white
    background: Tensor  # [R, 3] color of what is behind ...
    use_background_net: Tensor  # [R, 1] ... unless this is 1: then the renderer's own background

    def part(self, index) -> "Lighting":
        """The rows at ``index``."""
        return Lighting(*(member[index] for member in self))

    def per_pixel(self, num_pixels: int) -> "Lighting":
        """A row per view -> a row per ray, ``num_pixels`` of them for each view."""
        return Lighting(*(member.repeat_interleave(num_pixels, dim=0) for member in self))

    @property
    def is_lit(self) -> bool:
        """Whether any ray needs normals."""
        return bool((self.ambient < 1).any())


class LightingSettings(NamedTuple):
    """The laws that ``draw_look`` draws by."""

    ambient: float = 0.1
    p_diffuse: float = 0.75  # of views that are lit at all
    p_textureless: float = 0.5  # of those
    background: str = "random"  # or white, black, learned
    p_random: float = 0.5  # of views before a random color although the background is another


GREYS = {"white": 1.0, "black": 0.0}


def draw_lighting(
    cameras: Tensor, settings: LightingSettings, generator: torch.Generator, *, lit: bool
) -> Lighting:
    """A random look for each of V cameras at [V, 3]. lit False: albedo only.

    The light's direction is that of N(camera, I), its distance 0.8 to 1.5 times the camera's.
    """
    num_views, options = len(cameras), {"generator": generator, "device": generator.device}
    uniform = torch.rand(num_views, 7, **options)
    around = cameras + torch.randn(num_views, 3, **options)
    # differs from the paper: its 0.8 to 1.5 are scene units, with cameras at 1 to 1.5.
    far = cameras.norm(dim=-1, keepdim=True) * (0.8 + 0.7 * uniform[:, :1])
    shaded = (uniform[:, 1:2] < settings.p_diffuse) & lit
    textureless = shaded & (uniform[:, 2:3] < settings.p_textureless)
    random = settings.background == "random"
    own = (uniform[:, 3:4] < settings.p_random) | random
    plain = torch.full_like(cameras, GREYS.get(settings.background, 0.0))
    return Lighting(
        light=F.normalize(around, dim=-1) * far,
        ambient=torch.where(shaded, settings.ambient, 1.0),
        textureless=textureless.float(),
        background=torch.where(own, uniform[:, 4:7], plain),
        use_background_net=(~own).float() * (settings.background == "learned"),
    )


def preview_lighting(cameras: Tensor, background: str, *, ambient: float = 1.0) -> Lighting:
    """The look of previews: a light at each camera [V, 3]; ambient 1 shows the albedo."""
    one = torch.ones_like(cameras[:, :1])
    return Lighting(
        light=cameras,
        ambient=ambient * one,
        textureless=0 * one,
        background=torch.full_like(cameras, GREYS.get(background, 1.0)),
        use_background_net=one * (background == "learned"),
    )


def shade(albedo: Tensor, normals: Tensor, points: Tensor, lighting: Lighting) -> Tensor:
    """Lambert's law at points [N, 3] with albedo and unit normals [N, 3], look per point."""
    towards = F.normalize(lighting.light - points, dim=-1)
    lambert = (normals * towards).sum(-1, keepdim=True).clamp(min=0)
    albedo = torch.lerp(albedo, torch.ones_like(albedo), lighting.textureless)
    return albedo * (lighting.ambient + (1 - lighting.ambient) * lambert)
