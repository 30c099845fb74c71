"""Random captioned images of the solids in ``shapes``: the embedded model's training data.

Each image is described by one row of integers (``Facts``), from which a new random caption is made
every time the image is used. About one image in twelve is textureless: it is gray, and its caption
names no color ("a cube", "a textureless cube"). Colors are RGB in [0, 1].
"""

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from guidance.prompts import (
    FINE_VIEW_WORDS,
    HIGHEST_DEG,
    LOWEST_DEG,
    VIEW_WORDS,
    fine_view_word,
    pull_to_view_center,
    view_word,
)
from guidance.tiny.shapes import DETAIL_RGB, SHAPES, View, orbit_cameras, view_shape

COLORS: dict[str, tuple[float, float, float]] = {
    "red": (0.86, 0.08, 0.08),
    "orange": (1.00, 0.50, 0.05),
    "yellow": (0.96, 0.88, 0.10),
    "green": (0.12, 0.60, 0.16),
    "cyan": (0.15, 0.85, 0.90),
    "blue": (0.10, 0.20, 0.85),
    "purple": (0.48, 0.12, 0.68),
    "pink": (1.00, 0.52, 0.74),
    "brown": (0.42, 0.24, 0.12),
    "white": (0.94, 0.94, 0.94),
}
PHRASES = (
    "{}", "{}", "{bare}", "a photo of {}", "a 3d render of {}", "a DSLR photo of {}",
    "a picture of {}", "an image of {}",
)  # fmt: skip
NAMES, COLOR_NAMES = tuple(SHAPES), tuple(COLORS)
TEXTURELESS_RGB = 0.8
# Fractions of the captions: with a view word, with a fine one where possible, and empty
VIEW_RATE, FINE_VIEW_RATE, DROPOUT_RATE = 0.2, 0.6, 0.12
CENTER_RATE = 0.8  # fraction of the images that are near the center of a fine view
FINE_VIEW_FRACTION = 0.3  # ``pull_to_view_center``'s fraction for those
TEXTURELESS_RATE, TWO_COLOR_RATE, ALBEDO_RATE = 0.08, 0.4, 0.2
# Sampling weights of shapes with corners, which look different from every side
SHAPE_WEIGHTS = {"cube": 3.0, "pyramid": 3.0}
CHUNK = 512  # number of images from one generator
BOX = 2  # rays along each side of a pixel


class Facts(NamedTuple):
    """What the captions of N images can name: each [N] indices into tuples of names, or -1."""

    shape: Tensor  # of NAMES
    color: Tensor  # of COLOR_NAMES; -1: textureless
    second: Tensor  # of COLOR_NAMES, the second part's color; -1: the same as the rest
    view: Tensor  # of VIEW_WORDS
    fine: Tensor  # of FINE_VIEW_WORDS; -1: not near the center of one


def article(words: str) -> str:
    """``words`` with the article a or an."""
    return ("an " if words[0] in "aeiou" else "a ") + words


def describe(shape: str, color: str | None, second: str | None = None) -> str:
    """A description without article, such as "red mushroom with a white stem".

    color: None leaves it out. second: the second part's color; None leaves that part out.
    """
    words = shape if color is None else f"{color} {shape}"
    if second is None:
        return words
    part = SHAPES[shape].second
    assert part is not None, f"{shape} has no second part"
    # A plural, "legs", takes no article.
    return f"{words} with {second if part.endswith('s') else article(second)} {part}"


def caption(facts: Sequence[int], draws: Sequence[float]) -> str:
    """The caption of one image, from its row of ``Facts`` and three random numbers in [0, 1)."""
    shape, color, second, view, fine = facts
    phrase, with_view, dropped = draws
    if dropped < DROPOUT_RATE:
        return ""
    words = describe(
        NAMES[shape],
        None if color < 0 else COLOR_NAMES[color],
        None if second < 0 else COLOR_NAMES[second],
    )
    if color < 0 and int(phrase * 1000) % 2:
        words = f"textureless {words}"
    text = PHRASES[int(phrase * len(PHRASES))].format(article(words), bare=words)
    if with_view < FINE_VIEW_RATE and fine >= 0:
        return f"{text}, {FINE_VIEW_WORDS[fine]} view"
    return f"{text}, {VIEW_WORDS[view]} view" if with_view < FINE_VIEW_RATE + VIEW_RATE else text


def vocabulary() -> dict[str, Any]:
    """All that a caption can contain: objects with their second part, colors, views, words."""
    texts = [text.format("a", bare="") for text in PHRASES] + ["an", "with", "view", "textureless"]
    texts += [*SHAPES, *COLORS, *VIEW_WORDS, *FINE_VIEW_WORDS]
    texts += [shape.second for shape in SHAPES.values() if shape.second]
    words = sorted({word for text in texts for word in re.findall(r"[a-z0-9]+", text.lower())})
    return {
        "objects": {name: shape.second for name, shape in SHAPES.items()},
        "colors": list(COLORS),
        "views": [*VIEW_WORDS, *FINE_VIEW_WORDS],
        "phrases": sorted({text.format("...", bare="...") for text in PHRASES}),
        "words": words,
    }


# ------------------------------------------------------------------------------------------ draws


def _uniform(generator: torch.Generator, count: int, low: float, high: float) -> Tensor:
    return low + (high - low) * torch.rand(count, generator=generator)


def draw_facts(generator: torch.Generator, count: int) -> tuple[Facts, dict[str, Tensor]]:
    """Random ``Facts`` of ``count`` images, and their cameras by the names of the parameters."""
    # Composed shapes are harder, and most asymmetric shapes are composed: they come more often.
    composed = torch.tensor([shape.second is not None for shape in SHAPES.values()])
    weight = torch.where(composed, 1.5, 1.0)
    for name, shape_weight in SHAPE_WEIGHTS.items():
        weight[NAMES.index(name)] = shape_weight
    shape = torch.multinomial(weight, count, replacement=True, generator=generator)
    color = torch.randint(len(COLORS), (count,), generator=generator)
    other = (color + torch.randint(1, len(COLORS), (count,), generator=generator)) % len(COLORS)
    two = (torch.rand(count, generator=generator) < TWO_COLOR_RATE) & composed[shape]
    plain = torch.rand(count, generator=generator) < TEXTURELESS_RATE
    low, high = torch.sin(torch.deg2rad(torch.tensor([LOWEST_DEG, HIGHEST_DEG])))
    height = low + (high - low) * torch.rand(count, generator=generator)
    camera = {
        "azimuth_deg": _uniform(generator, count, -180.0, 180.0),
        "elevation_deg": torch.rad2deg(torch.asin(height)),  # uniform over the sphere's area
        "radius": _uniform(generator, count, 2.5, 3.0),
        "fov_deg": _uniform(generator, count, 36.0, 46.0),
        # The larger of two draws from 0.6 to 1.1: thin parts are mostly large enough to see.
        "scale": torch.maximum(*_uniform(generator, 2 * count, 0.6, 1.1).view(2, count)),
    }
    # A word for a whole range of views teaches their average. So most images are near the center
    # of a fine view, and only their captions use its word.
    centered = torch.rand(count, generator=generator) < CENTER_RATE
    pulled = pull_to_view_center(camera["azimuth_deg"], camera["elevation_deg"], FINE_VIEW_FRACTION)
    for name, angle in zip(("azimuth_deg", "elevation_deg"), pulled, strict=True):
        camera[name] = torch.where(centered, angle, camera[name])
    angles = (camera["azimuth_deg"].tolist(), camera["elevation_deg"].tolist())
    views = [VIEW_WORDS.index(view_word(*view)) for view in zip(*angles, strict=True)]
    fine = [FINE_VIEW_WORDS.index(fine_view_word(*view)) for view in zip(*angles, strict=True)]
    facts = Facts(
        shape,
        torch.where(plain, -1, color),
        torch.where(two & ~plain, other, -1),
        torch.tensor(views),
        torch.where(centered, torch.tensor(fine), -1),
    )
    return facts, camera


def draw_colors(generator: torch.Generator, facts: Facts) -> Tensor:
    """The RGB of MAIN, SECOND and DETAIL for every image [N, 3, 3]: the named colors, jittered."""
    count = len(facts.shape)
    named = torch.tensor([*COLORS.values(), (TEXTURELESS_RGB,) * 3])  # index -1: the last row
    jitter = 0.05 * torch.randn(count, 2, 3, generator=generator)
    main = named[facts.color] + jitter[:, 0]
    second = torch.where(facts.second[:, None] < 0, main, named[facts.second] + jitter[:, 1])
    detail = torch.tensor(DETAIL_RGB).expand(count, 3)
    plain = (facts.color < 0)[:, None, None]
    rgb = torch.stack([main, second, detail], 1).clamp(0.0, 1.0)
    return torch.where(plain, TEXTURELESS_RGB, rgb)


def draw_background(generator: torch.Generator, colors: Tensor) -> Tensor:
    """Background colors [N, 3]: white, black, gray or any color.

    colors [N, 3, 3] of ``draw_colors``: of eight tries the first that differs clearly from the main
    and the second part's color is taken, else the last.
    """
    count = len(colors)
    kind = torch.rand(count, 1, generator=generator)
    tries = torch.rand(8, count, 3, generator=generator)
    gray = tries[:, :, :1].expand(-1, -1, 3)
    tries = torch.where(kind < 0.55, gray, tries)
    tries[0] = torch.where(kind < 0.28, 1.0, torch.where(kind < 0.40, 0.0, tries[0]))
    best = tries[-1]
    for choice in reversed(tries[:-1]):
        apart = (choice[:, None] - colors[:, :2]).norm(dim=-1).amin(1, keepdim=True) > 0.35
        best = torch.where(apart, choice, best)
    return best


def shade(view: View, colors: Tensor, light: Tensor, ambient: Tensor, background: Tensor) -> Tensor:
    """Lambertian shading: RGB [V, H, W, 3].

    colors [V, 3, 3] of the slots; light [V, 3] unit vectors towards the light; ambient [V] the
    ambient fraction of the light; background [V, 3].
    """
    albedo = colors[torch.arange(len(colors))[:, None, None], view.slot]
    lit = torch.einsum("vhwc,vc->vhw", view.normal, light).clamp(min=0)
    strength = ambient[:, None, None] + (1 - ambient[:, None, None]) * lit
    rgb = albedo * strength[..., None]
    return torch.where(view.mask[..., None], rgb, background[:, None, None])


def draw_light(generator: torch.Generator, c2w: Tensor) -> tuple[Tensor, Tensor]:
    """Light directions [N, 3] within 70 degrees of the camera's; ambient fractions [N].

    c2w [N, 3, 4]. A fraction of 1 shows the albedo alone.
    """
    count = len(c2w)
    away = torch.deg2rad(70.0 * torch.rand(count, generator=generator).sqrt())
    around = 2 * torch.pi * torch.rand(count, generator=generator)
    sin = torch.sin(away)
    local = torch.stack([sin * torch.cos(around), sin * torch.sin(around), torch.cos(away)], -1)
    ambient = _uniform(generator, count, 0.25, 0.6)
    albedo_only = torch.rand(count, generator=generator) < ALBEDO_RATE
    return torch.einsum("vij,vj->vi", c2w[:, :, :3], local), torch.where(albedo_only, 1.0, ambient)


def draw_pictures(generator: torch.Generator, count: int, size: int) -> tuple[Tensor, Facts]:
    """Random images, uint8 [N, 3, size, size], and their ``Facts``."""
    facts, camera = draw_facts(generator, count)
    colors = draw_colors(generator, facts)
    background = draw_background(generator, colors)
    target = 0.16 * torch.rand(count, 3, generator=generator) - 0.08
    c2w = orbit_cameras(camera["azimuth_deg"], camera["elevation_deg"], camera["radius"], target)
    light, ambient = draw_light(generator, c2w)
    # A textureless image with ambient light alone would be a flat silhouette.
    ambient = torch.where((facts.color < 0) & (ambient == 1), 0.3, ambient)
    pictures = torch.empty(count, 3, size, size, dtype=torch.uint8)
    for number, name in enumerate(NAMES):
        for rows in (facts.shape == number).nonzero()[:, 0].split(32):
            fov, scale = camera["fov_deg"][rows], camera["scale"][rows]
            view = view_shape(SHAPES[name], c2w[rows], fov, BOX * size, scale)
            rgb = shade(view, colors[rows], light[rows], ambient[rows], background[rows])
            small = F.avg_pool2d(rgb.permute(0, 3, 1, 2), BOX)
            pictures[rows] = (small * 255).round().to(torch.uint8)
    return pictures, facts
