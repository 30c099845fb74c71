"""A judge of pictures, independent of the model that it judges: object, color and silhouette.

    python benchmarks/judge.py --out logs/judge.pt    # trains it in a few CPU minutes; not in git

A small classifier of object and color, trained on procedural renders with another seed than the
embedded model's. Its class "none" stands for pictures that are blurred, foggy or lumpy, and for
solids whose holes are filled. And silhouettes: the overlap of a mask with the exact outline of
every object.
"""

import argparse
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from guidance.tiny import pictures
from guidance.tiny.shapes import (
    SHAPES,
    Part,
    Shape,
    box,
    cylinder,
    orbit_cameras,
    rod,
    silhouettes,
    view_shape,
)
from nerf.training.rng import seed_everything, step_generator
from nerf.training.system import autocast

SIZE = 32  # pixels; other pictures are resized
OBJECTS = (*pictures.NAMES, "none")
COLORS = pictures.COLOR_NAMES
SEED = 4021  # the embedded model is trained with other seeds
# Shapes whose holes an optimizer has filled; rendered from above only, where that is visible.
FILLED = {
    "torus": Shape((*SHAPES["torus"].parts, Part(cylinder(0.56, -0.2, 0.2)))),
    "mug": Shape(
        (Part(cylinder(0.42, -0.5, 0.5)), Part(rod(0.12, (0.42, 0, -0.2), (0.42, 0, 0.2))))
    ),
    "table": Shape((*SHAPES["table"].parts, Part(box((0.62, 0.44, 0.42), (0, 0, -0.12))))),
    "chair": Shape((*SHAPES["chair"].parts, Part(box((0.38, 0.38, 0.36), (0, 0, -0.42))))),
}


class Verdict(NamedTuple):
    """The judge's probabilities for N pictures."""

    objects: Tensor  # [N, 17] probabilities, in the order of OBJECTS
    colors: Tensor  # [N, 10], in the order of COLORS


class Judge(nn.Module):
    """A classifier of pictures [N, 3, H, W] in [0, 1]; returns a Verdict."""

    def __init__(self, width: int = 32):
        super().__init__()
        layers, before = [], 3
        for after, stride in ((1, 1), (2, 2), (3, 2), (4, 2)):
            convolution = nn.Conv2d(before, after * width, 3, stride, 1, bias=False)
            layers += [convolution, nn.BatchNorm2d(after * width), nn.ReLU()]
            before = after * width
        self.features = nn.Sequential(*layers)
        hidden = 4 * width * 16
        self.objects = nn.Sequential(nn.Dropout(0.2), nn.Linear(hidden, len(OBJECTS)))
        self.colors = nn.Sequential(nn.Dropout(0.2), nn.Linear(hidden, len(COLORS)))

    def forward(self, images: Tensor) -> Verdict:
        if images.shape[-2:] != (SIZE, SIZE):
            images = F.interpolate(images, (SIZE, SIZE), mode="area")
        # 4x4 cells keep the layout, which tells a tree from a mushroom.
        features = F.adaptive_avg_pool2d(self.features(images * 2 - 1), 4).flatten(1)
        return Verdict(
            *(head(features).float().softmax(-1) for head in (self.objects, self.colors))
        )


# ------------------------------------------------------------------------------- training pictures


def blur(images: Tensor, sigma: float) -> Tensor:
    """Gaussian blur of [N, 3, H, W], sigma in pixels."""
    reach = max(1, round(3 * sigma))
    x = torch.arange(-reach, reach + 1, dtype=images.dtype)
    kernel = torch.softmax(-(x**2) / (2 * sigma**2), 0).expand(3, 1, 1, -1)
    images = F.pad(images, [reach] * 4, mode="replicate")
    images = F.conv2d(images, kernel, groups=3)
    return F.conv2d(images, kernel.transpose(2, 3), groups=3)


def lumpy(images: Tensor, strength: Tensor, generator) -> Tensor:
    """Bend [N, 3, H, W] by a smooth random field; strength [N] in half widths."""
    coarse = torch.randn(len(images), 2, 6, 6, generator=generator)
    field = F.interpolate(coarse, (SIZE, SIZE), mode="bicubic").permute(0, 2, 3, 1)
    straight = F.affine_grid(
        torch.eye(2, 3).expand(len(images), -1, -1), list(images.shape), align_corners=False
    )
    grid = straight + strength[:, None, None, None] * field
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


def spoil(images: Tensor, generator: torch.Generator) -> Tensor:
    """Pictures made unrecognizable: a third each blurred, foggy and lumpy."""
    thirds = [part.contiguous() for part in images.chunk(3)]
    thirds[0] = blur(thirds[0], 3.0 + 2.0 * torch.rand(1, generator=generator).item())
    rest = 0.1 + 0.2 * torch.rand(len(thirds[1]), 1, 1, 1, generator=generator)
    fog = thirds[1][:, :, :1, :1]  # the corner is background
    thirds[1] = blur(fog + rest * (thirds[1] - fog), 1.5)
    strength = 0.12 + 0.15 * torch.rand(len(thirds[2]), generator=generator)
    thirds[2] = lumpy(thirds[2], strength, generator)
    return torch.cat(thirds)


def draw_filled(generator: torch.Generator, count: int) -> Tensor:
    """Pictures [count, 3, SIZE, SIZE] in [0, 1] of solids whose holes are closed, from above."""
    facts, camera = pictures.draw_facts(generator, count)
    colors = pictures.draw_colors(generator, facts)
    background = pictures.draw_background(generator, colors)
    elevation = 25 + 50 * torch.rand(count, generator=generator)
    c2w = orbit_cameras(camera["azimuth_deg"], elevation, camera["radius"])
    light, ambient = pictures.draw_light(generator, c2w)
    parts = []
    order = torch.arange(count).chunk(len(FILLED))
    for shape, mine in zip(FILLED.values(), order, strict=True):
        fov, scale = camera["fov_deg"][mine], camera["scale"][mine]
        view = view_shape(shape, c2w[mine], fov, 2 * SIZE, scale)
        rgb = pictures.shade(view, colors[mine], light[mine], ambient[mine], background[mine])
        parts.append(F.avg_pool2d(rgb.permute(0, 3, 1, 2), 2))
    return torch.cat(parts)


def draw_examples(generator: torch.Generator, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Pictures in [0, 1], object indices and color indices; about a quarter show no object.

    Color -1 is not scored: that of textureless objects and of pictures without an object.
    """
    images, facts = pictures.draw_pictures(generator, count, SIZE)
    images, objects, colors = images.float() / 255, facts.shape, facts.color
    # A good render may be slightly soft or bent and must still be recognized.
    half = count // 2
    images[:half] = blur(images[:half], 0.6)
    slight = 0.03 * torch.rand(half, generator=generator)
    images[:half] = lumpy(images[:half], slight, generator)
    pick = torch.randperm(count, generator=generator)[: count // 5]
    bad, filled = spoil(images[pick], generator), draw_filled(generator, count // 8)
    none = torch.full((len(bad) + len(filled),), len(OBJECTS) - 1)
    unseen = torch.full((len(none),), -1)
    return (
        torch.cat([images, bad, filled]),
        torch.cat([objects, none]),
        torch.cat([colors, unseen]),
    )


def loss_of(verdict: Verdict, objects: Tensor, colors: Tensor) -> Tensor:
    """Sum of the cross entropies of object and color; color -1 is ignored."""
    tiny = 1e-8  # a float32 probability may round to 0
    object_loss = F.nll_loss((verdict.objects + tiny).log(), objects)
    return object_loss + F.nll_loss((verdict.colors + tiny).log(), colors, ignore_index=-1)


def train(count: int = 32768, epochs: int = 4, batch: int = 128, seed: int = SEED) -> Judge:
    """A judge trained on ``count`` renders and the spoiled ones made from them."""
    seed_everything(seed)
    chunks = [draw_examples(step_generator(seed, n, "cpu"), 512) for n in range(count // 512)]
    images, objects, colors = (torch.cat(part) for part in zip(*chunks, strict=True))
    judge = Judge()
    optimizer = torch.optim.AdamW(judge.parameters(), weight_decay=1e-2)
    steps = epochs * (len(images) // batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    for step in range(steps):
        generator = step_generator(seed + 1, step, "cpu")
        pick = torch.randint(len(images), (batch,), generator=generator)
        noisy = images[pick] + 0.02 * torch.randn(batch, 3, SIZE, SIZE, generator=generator)
        with autocast(torch.device("cpu"), "bf16"):
            verdict = judge(noisy)
        loss = loss_of(verdict, objects[pick], colors[pick])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
    return judge.eval()


@torch.no_grad()
def accuracy(judge: Judge, count: int = 2048, seed: int = SEED + 100) -> dict[str, float]:
    """Accuracy on new renders: of objects, of colors, and of "none" on spoiled pictures."""
    images, objects, colors = draw_examples(step_generator(seed, 0, "cpu"), count)
    verdict = judge(images)
    right = verdict.objects.argmax(-1) == objects
    real, colored = objects < len(OBJECTS) - 1, colors >= 0
    return {
        "object": right[real].float().mean().item(),
        "color": (verdict.colors.argmax(-1) == colors)[colored].float().mean().item(),
        "none": right[~real].float().mean().item(),
    }


def load(path: Path) -> Judge:
    """The judge saved at ``path``; if the file is missing, train one and save it."""
    if not path.exists():
        judge = train()
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(judge.state_dict(), path)
    judge = Judge()
    judge.load_state_dict(torch.load(path, weights_only=True))
    return judge.eval()


# ------------------------------------------------------------------------------------ silhouettes


class Outlines(NamedTuple):
    """Exact masks of every object in V views, at each scale and turned by each yaw."""

    names: tuple[str, ...]
    masks: Tensor  # [objects, scales, yaws, V, H, W], bool


def outlines(azimuth_deg, elevation_deg: float, radius: float, fov_deg: float, size: int,
             scales=(0.6, 0.725, 0.85, 0.975, 1.1), yaws: int = 24) -> Outlines:  # fmt: skip
    """Masks of all objects for cameras at azimuth_deg [V] and one elevation, at 5 scales, 24 yaws.

    Views that coincide for several yaws are traced once.
    """
    turned = (azimuth_deg[None] + torch.arange(yaws)[:, None] * (360.0 / yaws)) % 360.0
    angles, place = torch.unique(turned.round(decimals=3), return_inverse=True)
    same = torch.ones_like(angles)
    masks = torch.stack([
        torch.stack([
            silhouettes(name, angles, elevation_deg * same, radius * same, fov_deg * same,
                        size=size, scale=scale)[place]
            for scale in scales
        ])
        for name in SHAPES
    ])  # fmt: skip
    return Outlines(tuple(SHAPES), masks)


def overlap(mask: Tensor, exact: Outlines) -> dict[str, float]:
    """IoU of mask [V, H, W] with every object: mean over views at the best scale and yaw."""
    both = (exact.masks & mask).sum((-1, -2))
    either = (exact.masks | mask).sum((-1, -2)).clamp(min=1)
    best = (both / either).mean(-1).amax((1, 2))
    return dict(zip(exact.names, best.tolist(), strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("logs/judge.pt"))
    args = parser.parse_args()
    shares = accuracy(load(args.out))
    print(", ".join(f"{name} {share:.1%}" for name, share in shares.items()))


if __name__ == "__main__":
    main()
