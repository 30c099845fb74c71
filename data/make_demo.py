"""The embedded scene: a small ray caster of textured solids, and its pictures in every format.

    python data/make_demo.py --out data/demo                     # 100 + 8 + 25 views, 128x128
    python data/make_demo.py --out data/demo_llff --format llff  # the same solids, another layout
    python data/make_demo.py --out data/demo_colmap --format colmap   # two lenses, wide and upright

The world is z-up and fits in a box of half-width 1.2 around the origin. Light is one distant lamp
with hard shadows, an ambient term, and a Blinn highlight on glossy things. Pictures are averages
over each pixel's area; depth is exact, along the ray through the pixel's center.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from nerf.cameras import look_at, orbit_path
from nerf.datasets.colmap_model import Camera, Model, write_model
from nerf.lenses import from_colmap
from nerf.media import write_png
from nerf.rays import Rays, pixels_to_rays

CAMERA_ANGLE_X = 0.80  # radians
RADIUS = 4.0
LIGHT = torch.nn.functional.normalize(torch.tensor([0.5, -0.55, 1.0]), dim=0)
SUPERSAMPLES = 3  # squared per pixel
FORMATS = ("blender", "llff", "deepvoxels", "linemod", "transforms", "colmap")
NO_HIT = float("inf")


class Solid(NamedTuple):
    """One object. ``size``: sphere (r,), box half-widths, cylinder and cone (r, half height)."""

    shape: str
    center: tuple[float, float, float]
    size: tuple[float, ...]
    colors: tuple[tuple[float, float, float], tuple[float, float, float]]
    texture: str = "plain"
    frequency: float = 1.0
    gloss: float = 0.0
    yaw_deg: float = 0.0
    axis: int = 2  # of a cylinder


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


# Inside the caster vectors are components first, [3, B]: sums over a last axis of 3 are slow.


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]


def _round_roots(o: Tensor, d: Tensor, radius: float, rows: slice) -> tuple[Tensor, Tensor]:
    """Where rays cross a sphere (all three ``rows``) or an upright cylinder (the first two).

    From the point of closest approach outwards: the textbook b^2 - ac loses all digits on a thin
    rod seen from afar. NaN where there is no crossing.
    """
    flat_o, flat_d = o[rows], d[rows]
    length = (flat_d * flat_d).sum(0)
    middle = -(flat_o * flat_d).sum(0) / length
    nearest = flat_o + middle * flat_d
    half_chord = torch.sqrt((radius**2 - (nearest * nearest).sum(0)) / length)
    return middle - half_chord, middle + half_chord


def _nearest(candidates: list[Tensor]) -> Tensor:
    """The smallest positive number [B] among the candidates; infinity where there is none."""
    best = torch.full_like(candidates[0], NO_HIT)
    for t in candidates:
        best = torch.where((t > 1e-4) & (t < best), t, best)  # NaN compares false: no hit
    return best


def _hit_sphere(o: Tensor, d: Tensor, size) -> Tensor:
    return _nearest(_round_roots(o, d, size[0], slice(3)))


def _hit_box(o: Tensor, d: Tensor, size) -> Tensor:
    half = o.new_tensor(size)[:, None]
    inverse = 1.0 / torch.where(d.abs() < 1e-9, 1e-9, d)
    low, high = (-half - o) * inverse, (half - o) * inverse
    enter, leave = torch.minimum(low, high).amax(0), torch.maximum(low, high).amin(0)
    return torch.where((enter < leave) & (enter > 1e-4), enter, NO_HIT)


def _cap(o: Tensor, d: Tensor, height: float, radius: float) -> Tensor:
    """A horizontal disc at z = height."""
    t = (height - o[2]) / d[2]
    inside = (o[0] + t * d[0]) ** 2 + (o[1] + t * d[1]) ** 2 <= radius**2
    return torch.where(inside, t, NO_HIT)


def _within(o: Tensor, d: Tensor, t: Tensor, half: float) -> Tensor:
    return torch.where((o[2] + t * d[2]).abs() <= half, t, NO_HIT)


def _hit_cylinder(o: Tensor, d: Tensor, size) -> Tensor:
    radius, half = size
    roots = _round_roots(o, d, radius, slice(2))
    sides = [_within(o, d, t, half) for t in roots]
    return _nearest([*sides, _cap(o, d, half, radius), _cap(o, d, -half, radius)])


def _hit_cone(o: Tensor, d: Tensor, size) -> Tensor:
    """Apex up at z = half; at z = -half a disc of radius r closes it."""
    radius, half = size
    slope = radius / (2 * half)
    below_apex, fall = slope * (half - o[2]), -slope * d[2]
    a = d[0] ** 2 + d[1] ** 2 - fall**2
    b = o[0] * d[0] + o[1] * d[1] - below_apex * fall
    root = torch.sqrt(b * b - a * (o[0] ** 2 + o[1] ** 2 - below_apex**2))
    roots = ((-b - root) / a, (-b + root) / a)
    return _nearest([*(_within(o, d, t, half) for t in roots), _cap(o, d, -half, radius)])


def _round_normal(point: Tensor, size) -> Tensor:
    return point / size[0]


def _box_normal(point: Tensor, size) -> Tensor:
    relative = point / point.new_tensor(size)[:, None]
    face = torch.nn.functional.one_hot(relative.abs().argmax(0), 3).T
    return face * torch.sign(relative)


def _cylinder_normal(point: Tensor, size) -> Tensor:
    on_side = point[0] ** 2 + point[1] ** 2 > (size[0] * (1 - 1e-4)) ** 2
    on_side &= point[2].abs() < size[1] * (1 - 1e-6)
    side = torch.stack([point[0], point[1], torch.zeros_like(point[2])]) / size[0]
    cap = torch.stack([torch.zeros_like(point[0])] * 2 + [torch.sign(point[2])])
    return torch.where(on_side, side, cap)


def _cone_normal(point: Tensor, size) -> Tensor:
    radius, half = size
    slope = radius / (2 * half)
    side = torch.stack([point[0], point[1], slope**2 * (half - point[2])])
    base = torch.tensor([0.0, 0.0, -1.0])[:, None]
    side = side / _dot(side, side).sqrt().clamp(min=1e-9)
    return torch.where(point[2] < -half * (1 - 1e-5), base, side)


HITS = {"sphere": _hit_sphere, "box": _hit_box, "cylinder": _hit_cylinder, "cone": _hit_cone}
NORMALS = {
    "sphere": _round_normal,
    "box": _box_normal,
    "cylinder": _cylinder_normal,
    "cone": _cone_normal,
}


def _frame(solid: Solid) -> Tensor:
    """World -> object rotation [3, 3]; the rows are the object's axes."""
    c, s = np.cos(np.radians(solid.yaw_deg)), np.sin(np.radians(solid.yaw_deg))
    rotation = torch.tensor([[c, s, 0.0], [-s, c, 0.0], [0.0, 0.0, 1.0]], dtype=torch.float32)
    return rotation.roll(2 - solid.axis, dims=0)  # a cylinder's own z becomes the chosen axis


def _hit_all(o: Tensor, d: Tensor, solids) -> tuple[Tensor, Tensor]:
    """Nearest hit of rays [3, B]: t [B] (inf: none) and the number of the solid [B]."""
    best, which = torch.full_like(o[0], NO_HIT), torch.zeros(o.shape[1], dtype=torch.long)
    for number, solid in enumerate(solids):
        frame, center = _frame(solid), o.new_tensor(solid.center)[:, None]
        t = HITS[solid.shape](frame @ (o - center), frame @ d, solid.size)
        closer = t < best
        best, which = torch.where(closer, t, best), torch.where(closer, number, which)
    return best, which


def _texture(local: Tensor, solid: Solid) -> Tensor:
    """Color [3, B] at points [3, B] in the object's axes."""
    first, second = (local.new_tensor(color)[:, None] for color in solid.colors)
    if solid.texture == "checker":
        pick = torch.floor(local * solid.frequency + 0.01).sum(0) % 2
    elif solid.texture == "rings":
        pick = torch.floor(local[2] * solid.frequency * 2) % 2
    else:
        pick = torch.zeros_like(local[0])
    return torch.where(pick > 0.5, second, first)


def cast(rays: Rays, solids=tuple(SOLIDS)) -> tuple[Tensor, Tensor]:
    """What rays [B] see: color and alpha [B, 4] (straight, alpha 0 or 1), t [B] (inf: nothing)."""
    o, d = rays.origins.T.contiguous(), rays.directions.T.contiguous()
    t, which = _hit_all(o, d, solids)
    index = torch.isfinite(t).nonzero()[:, 0]
    points, which = o[:, index] + t[index] * d[:, index], which[index]
    normal, albedo, gloss = torch.zeros_like(points), torch.zeros_like(points), points[0] * 0
    for number, solid in enumerate(solids):
        mine = (which == number).nonzero()[:, 0]
        frame = _frame(solid)
        local = frame @ (points[:, mine] - points.new_tensor(solid.center)[:, None])
        normal[:, mine] = frame.T @ NORMALS[solid.shape](local, solid.size)
        albedo[:, mine], gloss[mine] = _texture(local, solid), solid.gloss
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
    c2w: np.ndarray, size: int, solids=tuple(SOLIDS), camera=None
) -> tuple[np.ndarray, np.ndarray]:
    """From c2w [3, 4]: straight RGBA in [0, 1] [size, size, 4], exact depth [size, size].

    Depth is t, the distance along the camera's axis, through the pixel's center; infinite where
    nothing is. Pixels that differ
    from a neighbor are averages over their area, the others are flat enough for one ray.
    camera: (height, width, intrinsics [4 + LENS]) instead of the square pinhole.
    """
    height, width, intrinsics = camera or (size, size, intrinsics_of(size))
    pose = torch.tensor(c2w, dtype=torch.float32)
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    y, x = y.flatten(), x.flatten()

    def look(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        rays = pixels_to_rays(x, y, intrinsics, pose, (0.0, NO_HIT))
        rgba, depth = cast(rays, solids)
        return torch.cat([rgba[:, :3] * rgba[:, 3:], rgba[:, 3:]], dim=-1), depth

    color, depth = look(x + 0.5, y + 0.5)
    picture = color.view(height, width, 4).permute(2, 0, 1)
    padded = torch.nn.functional.pad(picture[None], [1] * 4, mode="replicate")
    pool = torch.nn.functional.max_pool2d
    contrast = (pool(padded, 3, 1) + pool(-padded, 3, 1))[0].amax(0).flatten()
    edge = (contrast > 0.04).nonzero()[:, 0]
    steps = (torch.arange(SUPERSAMPLES) + 0.5) / SUPERSAMPLES
    dy, dx = (grid.flatten() for grid in torch.meshgrid(steps, steps, indexing="ij"))
    fine, _ = look((x[edge, None] + dx).flatten(), (y[edge, None] + dy).flatten())
    color[edge] = fine.view(len(edge), -1, 4).mean(1)
    color[:, :3] /= color[:, 3:].clamp(min=1e-6)
    return color.view(height, width, 4).numpy(), depth.view(height, width).numpy()


def hemisphere(count: int, seed: int) -> np.ndarray:
    """Random cameras [count, 3, 4] on the upper hemisphere, even by area, facing the origin."""
    random = np.random.default_rng(seed)
    azimuth, height = random.uniform(-np.pi, np.pi, count), random.uniform(0.03, 0.97, count)
    flat = np.sqrt(1 - height**2)
    places = RADIUS * np.stack([flat * np.cos(azimuth), flat * np.sin(azimuth), height], axis=-1)
    return np.stack([look_at(place, np.zeros(3)) for place in places])


def facing(count: int, seed: int) -> np.ndarray:
    """Forward-facing cameras [count, 3, 4]: small random offsets in front of the scene."""
    random = np.random.default_rng(seed)
    places = np.stack(
        [random.uniform(-0.7, 0.7, count), np.full(count, -4.2), random.uniform(0.1, 1.1, count)],
        -1,
    )
    return np.stack([look_at(place, [0.15 * place[0], 0.0, -0.2]) for place in places])


def cameras(counts: dict[str, int]) -> dict[str, np.ndarray]:
    """The standard cameras by split; the test views are one turn at varying height."""
    return {
        "train": hemisphere(counts["train"], seed=1),
        "val": hemisphere(counts["val"], seed=2),
        "test": orbit_path(counts["test"], elevation_deg=30.0, radius=RADIUS),
    }


def _rgba(picture: np.ndarray) -> np.ndarray:
    return np.round(picture * 255).astype(np.uint8)


def _over_white(picture: np.ndarray) -> np.ndarray:
    return _rgba(picture[..., :3] * picture[..., 3:] + 1 - picture[..., 3:])


def write_blender(out: Path, size: int, counts: dict[str, int], progress) -> None:
    """With depth/test/*.npy: exact z [H, W] float32, scene units, infinite where nothing is."""
    for split, poses in cameras(counts).items():
        frames = []
        for number, c2w in enumerate(poses):
            picture, depth = render_view(c2w, size)
            write_png(out / split / f"r_{number}.png", _rgba(picture))
            if split == "test":
                (out / "depth" / split).mkdir(parents=True, exist_ok=True)
                np.save(out / "depth" / split / f"r_{number}.npy", depth)
            matrix = np.vstack([c2w, [0, 0, 0, 1]]).tolist()
            frames.append({"file_path": f"./{split}/r_{number}", "transform_matrix": matrix})
            progress()
        content = {"camera_angle_x": CAMERA_ANGLE_X, "frames": frames}
        (out / f"transforms_{split}.json").write_text(json.dumps(content, indent=1))


def write_linemod(out: Path, size: int, counts: dict[str, int], progress) -> None:
    fx, fy, cx, cy = intrinsics_of(size).tolist()
    matrix = [[fx, 0, cx], [0, fy, cy], [0, 0, 1]]
    for split, poses in cameras(counts).items():
        frames = []
        for number, c2w in enumerate(poses):
            picture, _ = render_view(c2w, size)
            write_png(out / split / f"{number:04d}.png", _over_white(picture))
            frames.append(
                {
                    "file_path": f"{split}/{number:04d}.png",
                    "transform_matrix": np.vstack([c2w, [0, 0, 0, 1]]).tolist(),
                    "intrinsic_matrix": matrix,
                }
            )
            progress()
        content = {"near": 2.3, "far": 5.7, "frames": frames}
        (out / f"transforms_{split}.json").write_text(json.dumps(content, indent=1))


def write_deepvoxels(out: Path, size: int, counts: dict[str, int], progress) -> None:
    focal = intrinsics_of(size)[0].item()
    folders = {"train": "train", "val": "validation", "test": "test"}
    for split, poses in cameras(counts).items():
        base = out / folders[split] / "demo"
        (base / "pose").mkdir(parents=True)
        (base / "intrinsics.txt").write_text(
            f"{focal!r} {size / 2} {size / 2} 0.\n0. 0. 0.\n1.\n1.\n{size} {size}\n"
        )
        for number, c2w in enumerate(poses):
            picture, _ = render_view(c2w, size)
            write_png(base / "rgb" / f"{number:06d}.png", _over_white(picture))
            opencv = np.vstack([c2w, [0, 0, 0, 1]]) @ np.diag([1.0, -1.0, -1.0, 1.0])
            text = " ".join(f"{value!r}" for value in opencv.ravel().tolist())
            (base / "pose" / f"{number:06d}.txt").write_text(text)
            progress()


def write_llff(out: Path, size: int, counts: dict[str, int], progress) -> None:
    """Forward-facing views before a backdrop; opaque, so every pixel has a depth."""
    focal, rows = intrinsics_of(size)[0].item(), []
    for number, c2w in enumerate(facing(sum(counts.values()), seed=3)):
        picture, depth = render_view(c2w, size, (*SOLIDS, *BACKDROP))
        write_png(out / "images" / f"image{number:03d}.png", _rgba(picture[..., :3]))
        right, up, back, place = c2w.T
        matrix = np.stack([-up, right, back, place, [size, size, focal]], axis=1)
        finite = depth[np.isfinite(depth)]
        rows.append(np.concatenate([matrix.ravel(), [finite.min(), finite.max()]]))
        progress()
    np.save(out / "poses_bounds.npy", np.stack(rows))


def capture_cameras(size: int) -> list[tuple[str, int, int, list[float]]]:
    """COLMAP's model, height, width and parameters of two lenses: one wide, one held upright."""
    wide, tall = (3 * size // 4, size), (size, 3 * size // 4)
    focal = intrinsics_of(size)[0].item()
    opencv = [focal, 1.02 * focal, 0.51 * wide[1], 0.48 * wide[0], -0.12, 0.03, 0.002, -0.003]
    return [
        ("OPENCV", *wide, opencv),
        ("SIMPLE_RADIAL", *tall, [0.9 * focal, tall[1] / 2, tall[0] / 2, -0.08]),
    ]


def _captured(size: int, poses: np.ndarray):
    """View by view: the number of its lens (every third is the upright one), RGBA, c2w."""
    rows = [(h, w, from_colmap(model, k)) for model, h, w, k in capture_cameras(size)]
    for number, c2w in enumerate(poses):
        which = int(number % 3 == 2)
        height, width, row = rows[which]
        picture, _ = render_view(c2w, size, camera=(height, width, torch.tensor(row)))
        yield which, picture, c2w


def write_transforms(out: Path, size: int, counts: dict[str, int], progress) -> None:
    """One transforms.json with a lens for all, another one in some frames, and lists of splits."""
    opencv, radial = (
        {"fl_x": row[0], "fl_y": row[1], "cx": row[2], "cy": row[3], "w": w, "h": h}
        | {"k1": row[5], "k2": row[6], "p1": row[12], "p2": row[13]}
        for model, h, w, k in capture_cameras(size)
        for row in [from_colmap(model, k)]
    )
    # instant-ngp's unit cube is 1 / scale wide: the scene and nothing else.
    content = {
        "camera_model": "OPENCV",
        **opencv,
        "aabb_scale": 1,
        "scale": 0.35,
        "offset": [0.5] * 3,
    }
    frames: list[dict] = []
    for split, poses in cameras(counts).items():
        names = [f"images/{split}_{number}.png" for number in range(len(poses))]
        for name, (which, picture, c2w) in zip(names, _captured(size, poses), strict=True):
            write_png(out / name, _rgba(picture))
            matrix = np.vstack([c2w, [0, 0, 0, 1]]).tolist()
            frames.append(
                {"file_path": name, "transform_matrix": matrix} | (radial if which else {})
            )
            progress()
        content[f"{split}_filenames"] = names
    (out / "transforms.json").write_text(json.dumps({**content, "frames": frames}, indent=1))


def write_colmap(out: Path, size: int, counts: dict[str, int], progress) -> None:
    """images/ and a binary sparse model whose points are exact, seen where nothing hides them."""
    poses = hemisphere(sum(counts.values()), seed=4)
    names, ids = [f"photo_{number:03d}.png" for number in range(len(poses))], []
    for name, (which, picture, _) in zip(names, _captured(size, poses), strict=True):
        write_png(out / "images" / name, _over_white(picture))
        ids.append(which + 1)
        progress()
    known = {
        number: Camera(model, w, h, tuple(k))
        for number, (model, h, w, k) in enumerate(capture_cameras(size), start=1)
    }
    points, colors, tracks = surface_points(poses, 40)
    write_model(out / "sparse" / "0", Model(known, names, ids, poses, points, colors, tracks))


def surface_points(poses: np.ndarray, per_view: int):
    """Points on the solids [P, 3], colors [P, 3] uint8, and [T, 2]: which camera sees which."""
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
        seen = ((t - 1).abs() < 1e-3).nonzero()[:, 0]
        pairs.append(torch.stack([seen, torch.full_like(seen, view)], dim=-1))
    return points.double().numpy(), _rgba(rgba[hit, :3].numpy()), torch.cat(pairs).numpy()


def _rays(origins: Tensor, directions: Tensor) -> Rays:
    unit = torch.nn.functional.normalize(directions, dim=-1)
    return Rays(origins, directions, unit, *[torch.zeros_like(origins[:, :1])] * 2)


WRITERS = {
    "transforms": write_transforms,
    "colmap": write_colmap,
    "blender": write_blender,
    "llff": write_llff,
    "deepvoxels": write_deepvoxels,
    "linemod": write_linemod,
}


def make(out: Path, kind: str, size: int, counts: dict[str, int], show: bool = False) -> None:
    """Write the scene in format ``kind`` to ``out``, which appears whole or not at all."""
    from tqdm import tqdm

    if out.exists():
        raise ValueError(f"{out}: already there; remove it first")
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        with tqdm(total=sum(counts.values()), disable=not show, desc="demo scene") as bar:
            WRITERS[kind](temporary, size, counts, bar.update)
        os.chmod(temporary, 0o755)
        temporary.rename(out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("data/demo"), help="folder to make")
    parser.add_argument("--format", choices=FORMATS, default="blender", help="layout of the files")
    parser.add_argument("--size", type=int, default=128, help="pixels per side")
    parser.add_argument("--train", type=int, default=100, help="training views")
    parser.add_argument("--val", type=int, default=8, help="validation views")
    parser.add_argument("--test", type=int, default=25, help="test views")
    args = parser.parse_args()
    counts = {"train": args.train, "val": args.val, "test": args.test}
    try:
        make(args.out, args.format, args.size, counts, show=sys.stderr.isatty())
    except (ValueError, OSError) as error:
        print(f"make_demo.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
