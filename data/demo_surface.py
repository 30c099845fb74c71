"""The exact surface of the embedded scene: sample points on it, measure distances to it.

    python data/demo_surface.py demo.ply                # compare a mesh or point cloud with it

Solids are those of ``demo_scene.py``. The surface is that of their union, without parts inside
another solid and without the lowest part of the plate, whose underside no camera sees.
"""

import checkout  # noqa: F401  first: finds nerf/, says in a sentence what is missing

# isort: split
import sys
from pathlib import Path
from typing import Any

import numpy as np
from demo_scene import SOLIDS, Solid, rotation_of

from nerf.training import last_net
from nerf.training.arguments import ArgumentParser

CLOSE = (0.02, 0.05)  # distances in scene units for the completeness ratios
SAMPLES = 400_000  # points on a surface
LOWEST = -0.78  # z; surfaces below it (the plate's underside) are left out


def signed_distance(solid: Solid, points: np.ndarray) -> np.ndarray:
    """Distance [N] of world points [N, 3] to one solid's surface, negative inside."""
    local = (points - np.array(solid.center)) @ rotation_of(solid).numpy().astype(np.float64).T
    if solid.shape == "sphere":
        return np.linalg.norm(local, axis=1) - solid.size[0]
    if solid.shape == "box":
        return _inside_corner(np.abs(local) - np.array(solid.size))
    radius, half = solid.size
    around = np.linalg.norm(local[:, :2], axis=1)
    if solid.shape == "cylinder":
        return _inside_corner(np.stack([around - radius, np.abs(local[:, 2]) - half], axis=1))
    # A cone is a triangle rotated around its axis: the nearer of its slope and its base.
    height = local[:, 2]
    along = np.clip(
        ((half - height) * 2 * half + around * radius) / (4 * half**2 + radius**2), 0, 1
    )
    slope = np.hypot(around - along * radius, height - half + along * 2 * half)
    base = np.hypot(np.maximum(around - radius, 0), height + half)
    inside = (height > -half) & (around < radius * (half - height) / (2 * half))
    return np.where(inside, -1, 1) * np.minimum(slope, base)


def _inside_corner(beyond: np.ndarray) -> np.ndarray:
    """Signed distance [N] to an intersection of half-spaces at right angles.

    beyond: [N, axes] signed distance to the plane of each half-space.
    """
    return np.linalg.norm(np.maximum(beyond, 0), axis=1) + np.minimum(beyond.max(1), 0)


def distance(points: np.ndarray) -> np.ndarray:
    """Distance [N] of world points [N, 3] to the nearest solid's surface, scene units."""
    return np.abs([signed_distance(solid, points) for solid in SOLIDS]).min(0)


def _on_solid(solid: Solid, count: int, random: np.random.Generator) -> tuple[np.ndarray, float]:
    """Points [count, 3] uniform over a solid's surface, in its own axes, and its area."""
    turn = random.uniform(0, 2 * np.pi, count)
    circle = np.stack([np.cos(turn), np.sin(turn)], axis=1)
    if solid.shape == "sphere":
        height = random.uniform(-1, 1, count)
        flat = np.sqrt(1 - height**2)[:, None] * circle
        points = solid.size[0] * np.concatenate([flat, height[:, None]], axis=1)
        return points, float(4 * np.pi * solid.size[0] ** 2)
    if solid.shape == "box":
        half_widths = np.array(solid.size)
        areas = 8 * half_widths.prod() / half_widths  # of the two sides perpendicular to each axis
        axis = random.choice(3, count, p=areas / areas.sum())
        points = random.uniform(-1, 1, (count, 3)) * half_widths
        points[np.arange(count), axis] = random.choice([-1, 1], count) * half_widths[axis]
        return points, float(areas.sum())
    radius, half = solid.size
    cone = solid.shape == "cone"
    side = np.pi * radius * np.hypot(radius, 2 * half) if cone else 4 * np.pi * radius * half
    cap = np.pi * radius**2
    part = random.uniform(0, side + cap * (1 if cone else 2), count)
    uniform = random.uniform(0, 1, count)
    # Area grows with the square of the distance from a cone's apex or a disc's center.
    width = np.sqrt(uniform) if cone else np.ones(count)
    width = np.where(part < side, width, np.sqrt(uniform))
    height = half - 2 * half * (width if cone else uniform)
    height = np.where(part < side, height, np.where(part < side + cap, -half, half))
    flat = radius * width[:, None] * circle
    area = float(side + cap * (1 if cone else 2))
    return np.concatenate([flat, height[:, None]], axis=1), area


def sample(count: int, seed: int = 0) -> np.ndarray:
    """At most ``count`` points [N, 3], uniform by area, on the visible surface of the scene."""
    random = np.random.default_rng(seed)
    areas = [_on_solid(solid, 1, random)[1] for solid in SOLIDS]
    visible = []
    for solid, area in zip(SOLIDS, areas, strict=True):
        local, _ = _on_solid(solid, round(count * area / sum(areas)), random)
        points = local @ rotation_of(solid).numpy().astype(np.float64) + np.array(solid.center)
        others = [other for other in SOLIDS if other is not solid]
        outside = np.min([signed_distance(other, points) for other in others], axis=0) > 1e-6
        visible.append(points[outside & (points[:, 2] > LOWEST)])
    return np.concatenate(visible)


def compare(points: np.ndarray) -> dict[str, float]:
    """Distances, in scene units, between points [N, 3], uniform over a surface, and the scene's.

    Points below LOWEST are left out. accuracy: mean exact distance from the points to the true
    surface. completeness: mean distance from the true surface to the nearest point. chamfer: mean
    of the two. found_0.02, found_0.05: fraction of the true surface with a point within that
    distance.
    """
    from scipy.spatial import cKDTree

    points = points[points[:, 2] > LOWEST]
    accuracy = distance(points).mean()
    nearest, _ = cKDTree(points).query(sample(SAMPLES))
    result = {"accuracy": accuracy, "completeness": nearest.mean()}
    result["chamfer"] = 0.5 * (accuracy + nearest.mean())
    return result | {f"found_{near:g}": (nearest < near).mean() for near in CLOSE}


def main() -> int:
    """Print the distances of each file's surface; the process's exit code."""
    parser = ArgumentParser("demo_surface.py", __doc__)
    parser.add_argument("files", type=Path, nargs="+", help="meshes or point clouds, .ply or .obj")
    args = parser.parse_args()
    return last_net.exit_code("demo_surface.py", lambda: print_distances(args.files))


def print_distances(files: list[Path]) -> None:
    """Print the distances of each file's surface; ValueError for what is none."""
    import trimesh

    for file in files:
        try:
            loaded: Any = trimesh.load(file, process=False)
            points = loaded.vertices
        except Exception as error:  # a broken file may raise anything inside trimesh's readers
            raise ValueError(
                f"{file}: is not a mesh or point cloud ({error}); give a .ply or .obj file"
            ) from None
        if hasattr(loaded, "faces") and len(loaded.faces):
            points = trimesh.sample.sample_surface(loaded, SAMPLES, seed=0)[0]
        figures = compare(np.asarray(points))
        print(f"{file}: " + ", ".join(f"{name} {value:.4f}" for name, value in figures.items()))


if __name__ == "__main__":
    sys.exit(main())
