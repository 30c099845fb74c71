"""The exact surface of the embedded scene: points on it, and how far any point is from it.

    python data/demo_surface.py demo.ply                # a mesh or a point cloud against the truth

Solids are those of ``make_demo.py``. The surface is that of their union: what lies inside another
solid does not count, nor does the lowest part of the plate, whose underside no camera sees.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
from make_demo import SOLIDS, Solid, _frame

CLOSE = (0.02, 0.05)  # distances, scene units, within which points count as found
SAMPLES = 400_000
LOWEST = -0.78  # middle of the plate's lower half: no camera sees its underside


def signed_distance(solid: Solid, points: np.ndarray) -> np.ndarray:
    """Distance [N] of world points [N, 3] to one solid's surface, negative inside."""
    local = (points - np.array(solid.center)) @ _frame(solid).numpy().astype(np.float64).T
    if solid.shape == "sphere":
        return np.linalg.norm(local, axis=1) - solid.size[0]
    if solid.shape == "box":
        return _inside_corner(np.abs(local) - np.array(solid.size))
    radius, half = solid.size
    around = np.linalg.norm(local[:, :2], axis=1)
    if solid.shape == "cylinder":
        return _inside_corner(np.stack([around - radius, np.abs(local[:, 2]) - half], axis=1))
    # A cone is a triangle turned around its axis: the nearest of slope and base.
    height = local[:, 2]
    along = np.clip(
        ((half - height) * 2 * half + around * radius) / (4 * half**2 + radius**2), 0, 1
    )
    slope = np.hypot(around - along * radius, height - half + along * 2 * half)
    base = np.hypot(np.maximum(around - radius, 0), height + half)
    inside = (height > -half) & (around < radius * (half - height) / (2 * half))
    return np.where(inside, -1, 1) * np.minimum(slope, base)


def _inside_corner(beyond: np.ndarray) -> np.ndarray:
    """Signed distance to a corner region from the distances beyond its sides [N, axes]."""
    return np.linalg.norm(np.maximum(beyond, 0), axis=1) + np.minimum(beyond.max(1), 0)


def distance(points: np.ndarray) -> np.ndarray:
    """Distance [N] of world points [N, 3] to the nearest solid's surface, scene units."""
    return np.abs([signed_distance(solid, points) for solid in SOLIDS]).min(0)


def _on_solid(solid: Solid, count: int, random) -> tuple[np.ndarray, float]:
    """Points [count, 3] even over a solid's surface, in its own axes, and its area."""
    turn = random.uniform(0, 2 * np.pi, count)
    circle = np.stack([np.cos(turn), np.sin(turn)], axis=1)
    if solid.shape == "sphere":
        height = random.uniform(-1, 1, count)
        flat = np.sqrt(1 - height**2)[:, None] * circle
        area = 4 * np.pi * solid.size[0] ** 2
        return solid.size[0] * np.concatenate([flat, height[:, None]], axis=1), area
    if solid.shape == "box":
        half = np.array(solid.size)
        areas = 8 * half.prod() / half  # of both sides across each axis
        axis = random.choice(3, count, p=areas / areas.sum())
        points = random.uniform(-1, 1, (count, 3)) * half
        points[np.arange(count), axis] = random.choice([-1, 1], count) * half[axis]
        return points, areas.sum()
    radius, half = solid.size
    cone = solid.shape == "cone"
    side = np.pi * radius * np.hypot(radius, 2 * half) if cone else 4 * np.pi * radius * half
    cap = np.pi * radius**2
    part = random.uniform(0, side + cap * (1 if cone else 2), count)
    place = random.uniform(0, 1, count)
    width = np.sqrt(place) if cone else np.ones(count)  # of the apex, at place 0: the area's law
    width = np.where(part < side, width, np.sqrt(place))
    height = half - 2 * half * (width if cone else place)
    height = np.where(part < side, height, np.where(part < side + cap, -half, half))
    flat = radius * width[:, None] * circle
    return np.concatenate([flat, height[:, None]], axis=1), side + cap * (1 if cone else 2)


def sample(count: int, seed: int = 0) -> np.ndarray:
    """About ``count`` points [N, 3], even by area, on the surface that a camera may see."""
    random = np.random.default_rng(seed)
    areas = [_on_solid(solid, 1, random)[1] for solid in SOLIDS]
    found = []
    for solid, area in zip(SOLIDS, areas, strict=True):
        local, _ = _on_solid(solid, round(count * area / sum(areas)), random)
        points = local @ _frame(solid).numpy().astype(np.float64) + np.array(solid.center)
        others = [other for other in SOLIDS if other is not solid]
        free = np.min([signed_distance(other, points) for other in others], axis=0) > 1e-6
        found.append(points[free & (points[:, 2] > LOWEST)])
    return np.concatenate(found)


def compare(points: np.ndarray) -> dict[str, float]:
    """How well points [N, 3], even over a surface, agree with the truth; scene units.

    accuracy: mean distance from them to the truth, exact; what lies lower than LOWEST is left
    out. completeness: mean distance from the truth to the nearest of them. chamfer: their mean.
    found_0.02 and so on: part of the true surface that has a point so near.
    """
    from scipy.spatial import cKDTree

    points = points[points[:, 2] > LOWEST]
    accuracy = distance(points).mean()
    nearest, _ = cKDTree(points).query(sample(SAMPLES))
    result = {"accuracy": accuracy, "completeness": nearest.mean()}
    result["chamfer"] = 0.5 * (accuracy + nearest.mean())
    return result | {f"found_{near:g}": (nearest < near).mean() for near in CLOSE}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", type=Path, nargs="+", help="meshes or point clouds, .ply or .obj")
    args = parser.parse_args()
    import trimesh

    for file in args.files:
        try:
            loaded = trimesh.load(file, process=False)
            points = loaded.vertices
        except Exception as error:  # a broken file can fail anywhere inside a reader
            print(f"demo_surface.py: {file} is no mesh or point cloud ({error})", file=sys.stderr)
            return 2
        if hasattr(loaded, "faces") and len(loaded.faces):
            points = trimesh.sample.sample_surface(loaded, SAMPLES, seed=0)[0]
        figures = compare(np.asarray(points))
        print(f"{file}: " + ", ".join(f"{name} {value:.4f}" for name, value in figures.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
