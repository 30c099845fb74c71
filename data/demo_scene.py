"""The embedded scene: textured solids, and a small ray caster that renders them.

The world is z-up and fits in a box of half-width 1.2 around the origin. Light is one directional
lamp with hard shadows, an ambient term, and a Blinn highlight on glossy solids. Pixels are averages
over their area; depth is exact, along the ray through the pixel's center.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from nerf.rays import Rays, pixels_to_rays

CAMERA_ANGLE_X = 0.80  # radians
LIGHT = torch.nn.functional.normalize(torch.tensor([0.5, -0.55, 1.0]), dim=0)
SUPERSAMPLES = 3  # squared per pixel
NO_HIT = float("inf")
Size = tuple[float, ...]


class Solid(NamedTuple):
    """One object. ``size``: sphere (r,), box half-widths, cylinder and cone (r, half height)."""

    shape: str  # a key of HITS
    center: tuple[float, float, float]
    size: Size
    colors: tuple[tuple[float, float, float], tuple[float, float, float]]
    texture: str = "plain"  # or "checker", "rings"
    frequency: float = 1.0
    gloss: float = 0.0
    yaw_deg: float = 0.0
    axis: int = 2  # world axis of a cylinder


STEEL = ((0.75, 0.76, 0.80), (0.75, 0.76, 0.80))
POSTS = [
    Solid("cylinder", (x, y, -0.14), (0.03, 0.55), STEEL, gloss=0.3)
    for x in (-1, 1)
    for y in (-1, 1)
]
BARS = [Solid("cylinder", (0, y, 0.41), (0.03, 1.03), STEEL, axis=0) for y in (-1, 1)]
BARS += [Solid("cylinder", (x, 0, 0.41), (0.03, 1.03), STEEL, axis=1) for x in (-1, 1)]
SOLIDS = [
    Solid("box", (0, 0, -0.75), (1.15, 1.15, 0.06), ((0.86, 0.80, 0.68), (0.45, 0.38, 0.34)),
          texture="checker", frequency=2.2),
    Solid("sphere", (-0.42, -0.35, -0.29), (0.40,), ((0.85, 0.16, 0.12), (0.97, 0.90, 0.82)),
          texture="rings", frequency=4.0, gloss=0.8),
    Solid("box", (0.45, 0.38, -0.36), (0.28, 0.28, 0.33), ((0.13, 0.30, 0.75), (0.90, 0.86, 0.30)),
          texture="checker", frequency=3.5, yaw_deg=30.0),
    Solid("cylinder", (-0.50, 0.55, -0.24), (0.22, 0.45), ((0.16, 0.58, 0.26), (0.08, 0.30, 0.16)),
          texture="rings", frequency=5.0),
    Solid("cone", (0.52, -0.48, -0.34), (0.30, 0.35), ((0.98, 0.72, 0.10), (0.90, 0.38, 0.08)),
          texture="rings", frequency=4.5),
    Solid("sphere", (0.45, 0.38, 0.15), (0.18,), ((0.60, 0.25, 0.70), (0.60, 0.25, 0.70)),
          gloss=0.6),
    *POSTS,
    *BARS,
]  # fmt: skip
BACKDROP = [
    Solid("box", (0, 2.6, 0.6), (6.0, 0.1, 3.0), ((0.55, 0.70, 0.85), (0.35, 0.48, 0.66)),
          texture="checker", frequency=1.1),
    Solid("box", (0, 0, -0.95), (6.0, 4.0, 0.1), ((0.52, 0.60, 0.42), (0.42, 0.50, 0.33)),
          texture="checker", frequency=0.9),
]  # fmt: skip


# The caster's vectors have components first, [3, B]: sums over a last axis of size 3 are slow.
# o and d are ray origins and directions in a solid's own axes, size is that of the Solid.


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]


def _round_roots(o: Tensor, d: Tensor, radius: float, rows: slice) -> tuple[Tensor, Tensor]:
    """Both t [B] of rays with a sphere (all ``rows``) or an upright cylinder (the first two).

    Computed from the point of closest approach, because the textbook's b^2 - ac loses all digits
    on a thin rod far away. NaN where there is no crossing.
    """
    flat_o, flat_d = o[rows], d[rows]
    length = (flat_d * flat_d).sum(0)
    middle = -(flat_o * flat_d).sum(0) / length
    nearest = flat_o + middle * flat_d
    half_chord = torch.sqrt((radius**2 - (nearest * nearest).sum(0)) / length)
    return middle - half_chord, middle + half_chord


def _nearest(candidates: Sequence[Tensor]) -> Tensor:
    """The smallest positive t [B] among the candidates; infinity where there is none."""
    best = torch.full_like(candidates[0], NO_HIT)
    for t in candidates:
        best = torch.where((t > 1e-4) & (t < best), t, best)  # NaN compares false: no hit
    return best


def _hit_sphere(o: Tensor, d: Tensor, size: Size) -> Tensor:
    return _nearest(_round_roots(o, d, size[0], slice(3)))


def _hit_box(o: Tensor, d: Tensor, size: Size) -> Tensor:
    half = o.new_tensor(size)[:, None]
    inverse = 1.0 / torch.where(d.abs() < 1e-9, 1e-9, d)
    low, high = (-half - o) * inverse, (half - o) * inverse
    enter, leave = torch.minimum(low, high).amax(0), torch.maximum(low, high).amin(0)
    return torch.where((enter < leave) & (enter > 1e-4), enter, NO_HIT)


def _cap(o: Tensor, d: Tensor, height: float, radius: float) -> Tensor:
    """t [B] at which rays cross a horizontal disc at z = height."""
    t = (height - o[2]) / d[2]
    inside = (o[0] + t * d[0]) ** 2 + (o[1] + t * d[1]) ** 2 <= radius**2
    return torch.where(inside, t, NO_HIT)


def _within(o: Tensor, d: Tensor, t: Tensor, half: float) -> Tensor:
    """t where the point at t has abs(z) <= half, else infinity."""
    return torch.where((o[2] + t * d[2]).abs() <= half, t, NO_HIT)


def _hit_cylinder(o: Tensor, d: Tensor, size: Size) -> Tensor:
    radius, half = size
    roots = _round_roots(o, d, radius, slice(2))
    sides = [_within(o, d, t, half) for t in roots]
    return _nearest([*sides, _cap(o, d, half, radius), _cap(o, d, -half, radius)])


def _hit_cone(o: Tensor, d: Tensor, size: Size) -> Tensor:
    """t [B] on a cone with its apex at z = half, closed by a disc of radius r at z = -half."""
    radius, half = size
    slope = radius / (2 * half)
    below_apex, fall = slope * (half - o[2]), -slope * d[2]
    a = d[0] ** 2 + d[1] ** 2 - fall**2
    b = o[0] * d[0] + o[1] * d[1] - below_apex * fall
    root = torch.sqrt(b * b - a * (o[0] ** 2 + o[1] ** 2 - below_apex**2))
    roots = ((-b - root) / a, (-b + root) / a)
    return _nearest([*(_within(o, d, t, half) for t in roots), _cap(o, d, -half, radius)])


def _sphere_normal(point: Tensor, size: Size) -> Tensor:
    return point / size[0]


def _box_normal(point: Tensor, size: Size) -> Tensor:
    relative = point / point.new_tensor(size)[:, None]
    face = torch.nn.functional.one_hot(relative.abs().argmax(0), 3).T
    return face * torch.sign(relative)


def _cylinder_normal(point: Tensor, size: Size) -> Tensor:
    on_side = point[0] ** 2 + point[1] ** 2 > (size[0] * (1 - 1e-4)) ** 2
    on_side &= point[2].abs() < size[1] * (1 - 1e-6)
    side = torch.stack([point[0], point[1], torch.zeros_like(point[2])]) / size[0]
    cap = torch.stack([torch.zeros_like(point[0])] * 2 + [torch.sign(point[2])])
    return torch.where(on_side, side, cap)


def _cone_normal(point: Tensor, size: Size) -> Tensor:
    radius, half = size
    slope = radius / (2 * half)
    side = torch.stack([point[0], point[1], slope**2 * (half - point[2])])
    base = torch.tensor([0.0, 0.0, -1.0])[:, None]
    side = side / _dot(side, side).sqrt().clamp(min=1e-9)
    return torch.where(point[2] < -half * (1 - 1e-5), base, side)


HITS: dict[str, Callable[[Tensor, Tensor, Size], Tensor]] = {
    "sphere": _hit_sphere,
    "box": _hit_box,
    "cylinder": _hit_cylinder,
    "cone": _hit_cone,
}
NORMALS: dict[str, Callable[[Tensor, Size], Tensor]] = {
    "sphere": _sphere_normal,
    "box": _box_normal,
    "cylinder": _cylinder_normal,
    "cone": _cone_normal,
}


def rotation_of(solid: Solid) -> Tensor:
    """The rotation [3, 3] from the world to a solid's own axes, which are its rows."""
    c, s = np.cos(np.radians(solid.yaw_deg)), np.sin(np.radians(solid.yaw_deg))
    rotation = torch.tensor([[c, s, 0.0], [-s, c, 0.0], [0.0, 0.0, 1.0]], dtype=torch.float32)
    return rotation.roll(2 - solid.axis, dims=0)  # a cylinder's own z becomes the chosen axis


def _hit_all(o: Tensor, d: Tensor, solids: Sequence[Solid]) -> tuple[Tensor, Tensor]:
    """The nearest hit of rays o, d [3, B]: t [B] (inf: none) and the number of the solid [B]."""
    best, which = torch.full_like(o[0], NO_HIT), torch.zeros(o.shape[1], dtype=torch.long)
    for number, solid in enumerate(solids):
        frame, center = rotation_of(solid), o.new_tensor(solid.center)[:, None]
        t = HITS[solid.shape](frame @ (o - center), frame @ d, solid.size)
        closer = t < best
        best, which = torch.where(closer, t, best), torch.where(closer, number, which)
    return best, which


def _texture(local: Tensor, solid: Solid) -> Tensor:
    """Albedo [3, B] at points [3, B] in the solid's own axes."""
    first, second = (local.new_tensor(color)[:, None] for color in solid.colors)
    if solid.texture == "checker":
        pick = torch.floor(local * solid.frequency + 0.01).sum(0) % 2
    elif solid.texture == "rings":
        pick = torch.floor(local[2] * solid.frequency * 2) % 2
    else:
        pick = torch.zeros_like(local[0])
    return torch.where(pick > 0.5, second, first)


def cast(rays: Rays, solids: Sequence[Solid] = tuple(SOLIDS)) -> tuple[Tensor, Tensor]:
    """Straight RGBA [B, 4] of rays [B], alpha 0 or 1, and t [B] of their hits (inf: none)."""
    o, d = rays.origins.T.contiguous(), rays.directions.T.contiguous()
    t, which = _hit_all(o, d, solids)
    index = torch.isfinite(t).nonzero()[:, 0]
    points, which = o[:, index] + t[index] * d[:, index], which[index]
    normal, albedo, gloss = torch.zeros_like(points), torch.zeros_like(points), points[0] * 0
    for number, solid in enumerate(solids):
        own = (which == number).nonzero()[:, 0]
        frame = rotation_of(solid)
        local = frame @ (points[:, own] - points.new_tensor(solid.center)[:, None])
        normal[:, own] = frame.T @ NORMALS[solid.shape](local, solid.size)
        albedo[:, own], gloss[own] = _texture(local, solid), solid.gloss
    light = LIGHT[:, None]
    blocked, _ = _hit_all(points + 1e-3 * normal, light.expand_as(points), solids)
    lit = (~torch.isfinite(blocked)).float()
    diffuse = _dot(normal, light).clamp(min=0) * lit
    half = torch.nn.functional.normalize(light - rays.viewdirs[index].T, dim=0)
    highlight = gloss * lit * _dot(normal, half).clamp(min=0) ** 40
    sky = 0.5 + 0.5 * normal[2]
    rgb = (albedo * (0.25 + 0.15 * sky + 0.60 * diffuse) + highlight).clamp(0, 1)
    rgba = torch.zeros(len(t), 4)
    rgba[index] = torch.cat([rgb, torch.ones_like(rgb[:1])]).T
    return rgba, t


def intrinsics_of(size: int) -> Tensor:
    """fx, fy, cx, cy [4] in pixels of a square picture."""
    focal = 0.5 * size / np.tan(0.5 * CAMERA_ANGLE_X)
    return torch.tensor([focal, focal, size / 2, size / 2], dtype=torch.float32)


def render_view(
    c2w: np.ndarray,
    size: int,
    solids: Sequence[Solid] = tuple(SOLIDS),
    camera: tuple[int, int, Tensor] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Straight RGBA in [0, 1] [size, size, 4] and exact depth [size, size] of a pose c2w [3, 4].

    Depth is t, the distance along the camera's axis, for the ray through the pixel's center;
    infinite where it hits nothing. Pixels that differ from a neighbor are averages over their area;
    the others need only one ray.
    camera: (height, width, intrinsics [4 + LENS]) instead of the square pinhole.
    """
    height, width, intrinsics = camera or (size, size, intrinsics_of(size))
    pose = torch.tensor(c2w, dtype=torch.float32)
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    y, x = y.flatten(), x.flatten()

    def premultiplied(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        rays = pixels_to_rays(x, y, intrinsics, pose, (0.0, NO_HIT))
        rgba, depth = cast(rays, solids)
        return torch.cat([rgba[:, :3] * rgba[:, 3:], rgba[:, 3:]], dim=-1), depth

    color, depth = premultiplied(x + 0.5, y + 0.5)
    picture = color.view(height, width, 4).permute(2, 0, 1)
    padded = torch.nn.functional.pad(picture[None], [1] * 4, mode="replicate")
    pool = torch.nn.functional.max_pool2d
    contrast = (pool(padded, 3, 1) + pool(-padded, 3, 1))[0].amax(0).flatten()
    edge = (contrast > 0.04).nonzero()[:, 0]
    steps = (torch.arange(SUPERSAMPLES) + 0.5) / SUPERSAMPLES
    dy, dx = (grid.flatten() for grid in torch.meshgrid(steps, steps, indexing="ij"))
    fine, _ = premultiplied((x[edge, None] + dx).flatten(), (y[edge, None] + dy).flatten())
    color[edge] = fine.view(len(edge), -1, 4).mean(1)
    color[:, :3] /= color[:, 3:].clamp(min=1e-6)
    return color.view(height, width, 4).numpy(), depth.view(height, width).numpy()


def surface_points(poses: np.ndarray, per_view: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Points on the solids [P, 3], their colors [P, 3] uint8, and tracks [T, 2].

    poses: [V, 3, 4]; each casts ``per_view`` random rays. A track is (number of a point, number of
    a pose from which the point is visible).
    """
    random = torch.Generator().manual_seed(5)
    centers = torch.tensor(poses[:, :, 3], dtype=torch.float32)
    aims = torch.rand(len(poses), per_view, 3, generator=random) * 1.6 - 0.8
    starts = centers[:, None].expand_as(aims).reshape(-1, 3)
    rgba, t = cast(_rays(starts, aims.reshape(-1, 3) - starts))
    hit = torch.isfinite(t)
    points = (starts + t[:, None] * (aims.reshape(-1, 3) - starts))[hit]
    pairs = []
    for view, center in enumerate(centers):
        _, t = cast(_rays(center.expand_as(points), points - center))
        visible = ((t - 1).abs() < 1e-3).nonzero()[:, 0]
        pairs.append(torch.stack([visible, torch.full_like(visible, view)], dim=-1))
    colors = np.round(rgba[hit, :3].numpy() * 255).astype(np.uint8)
    return points.double().numpy(), colors, torch.cat(pairs).numpy()


def _rays(origins: Tensor, directions: Tensor) -> Rays:
    unit = torch.nn.functional.normalize(directions, dim=-1)
    return Rays(origins, directions, unit, *[torch.zeros_like(origins[:, :1])] * 2)
