"""Solids as signed distance functions (SDFs), rendered by sphere tracing.

Axes as in ``nerf.rays`` and ``nerf.cameras``: z is up, a camera at azimuth 0 is on +y, at 90 on +x.
Every shape faces +y, so azimuth 0 sees its front and 90 its own right side (``guidance.prompts``).
At scale 1, shapes lie inside a sphere of radius BOUND around the origin.

A shape is a union of parts. A part's slot selects its color: MAIN, SECOND (the part that a
two-color caption names: "a red mushroom with a white stem") or DETAIL (always dark). SDFs take
points as three tensors x, y, z, because sums over a last axis of 3 are slow.
"""

import math
from collections.abc import Callable
from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor

MAIN, SECOND, DETAIL = 0, 1, 2
BOUND = 1.0
DETAIL_RGB = (0.10, 0.10, 0.12)
HIT_DISTANCE = 1e-3  # where a ray hits: a thirtieth of a pixel of a 64x64 image
MAX_STEPS = 64  # of sphere tracing

Distance = Callable[[Tensor, Tensor, Tensor], Tensor]
Point = tuple[float, float, float]


class Part(NamedTuple):
    distance: Distance  # x, y, z [N] -> signed distance [N], negative inside
    slot: int = MAIN


class Shape(NamedTuple):
    parts: tuple[Part, ...]
    second: str | None = None  # the name of the SECOND part, if there is one


# ------------------------------------------------------------------------------------ primitives


def _length(*components: Tensor) -> Tensor:
    return torch.sqrt(reduce(torch.add, (component * component for component in components)))


def _outside(*sides: Tensor) -> Tensor:
    """Signed distance to the intersection of slabs at right angles, from those to each slab."""
    beyond = _length(*(side.clamp(min=0) for side in sides))
    nearest = sides[0]
    for side in sides[1:]:
        nearest = torch.maximum(nearest, side)
    return beyond + nearest.clamp(max=0)


def sphere(radius: float, x0: float = 0.0, y0: float = 0.0, z0: float = 0.0) -> Distance:
    """A sphere around (x0, y0, z0)."""
    return lambda x, y, z: _length(x - x0, y - y0, z - z0) - radius


def box(half: Point, center: Point = (0.0, 0.0, 0.0)) -> Distance:
    """An axis-aligned box; half: its half-widths along x, y, z."""
    (a, b, c), (x0, y0, z0) = half, center
    return lambda x, y, z: _outside((x - x0).abs() - a, (y - y0).abs() - b, (z - z0).abs() - c)


def cylinder(radius: float, bottom: float, top: float) -> Distance:
    """An upright cylinder around the z axis."""
    middle, half = 0.5 * (bottom + top), 0.5 * (top - bottom)
    return lambda x, y, z: _outside(_length(x, y) - radius, (z - middle).abs() - half)


def cone(radius: float, bottom: float, top: float) -> Distance:
    """An upright cone around the z axis with its apex at ``top``; far away, a lower bound."""
    slant = math.hypot(radius, top - bottom)
    out, up = (top - bottom) / slant, radius / slant  # normal of the side in (rho, z)

    def distance(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
        return torch.maximum(out * _length(x, y) + up * (z - top), bottom - z)

    return distance


def torus(ring: float, tube: float) -> Distance:
    """A flat torus around the z axis; ring and tube are its radii."""
    return lambda x, y, z: _length(_length(x, y) - ring, z) - tube


def rod(radius: float, start: Point, end: Point) -> Distance:
    """A capsule: all points within ``radius`` of the segment from start to end."""
    (x0, y0, z0), (x1, y1, z1) = start, end
    dx, dy, dz = x1 - x0, y1 - y0, z1 - z0
    square = dx * dx + dy * dy + dz * dz

    def distance(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
        x, y, z = x - x0, y - y0, z - z0
        along = ((x * dx + y * dy + z * dz) / square).clamp(0, 1)
        return _length(x - along * dx, y - along * dy, z - along * dz) - radius

    return distance


def pyramid(half: float, bottom: float, top: float) -> Distance:
    """An upright pyramid, its base 2 ``half`` wide; away from the faces, a lower bound."""
    slant = math.hypot(half, top - bottom)
    out, up = (top - bottom) / slant, half / slant

    def distance(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
        return torch.maximum(out * torch.maximum(x.abs(), y.abs()) + up * (z - top), bottom - z)

    return distance


def gable(half_x: float, half_y: float, bottom: float, top: float) -> Distance:
    """A roof, its ridge along x at height ``top``; away from the faces, a lower bound."""
    slant = math.hypot(half_y, top - bottom)
    out, up = (top - bottom) / slant, half_y / slant

    def distance(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
        sides = torch.maximum(out * y.abs() + up * (z - top), x.abs() - half_x)
        return torch.maximum(sides, bottom - z)

    return distance


def pair(distance: Distance) -> Distance:
    """A solid at x > 0 and its mirror image, such as eyes or weights."""
    return lambda x, y, z: distance(x.abs(), y, z)


def four(distance: Distance) -> Distance:
    """A solid at x, y > 0 and its three mirror images, such as legs or fins."""
    return lambda x, y, z: distance(x.abs(), y.abs(), z)


def without(solid: Distance, hole: Distance) -> Distance:
    """``solid`` minus ``hole``."""
    return lambda x, y, z: torch.maximum(solid(x, y, z), -hole(x, y, z))


def _handle(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    """The mug's handle, on its right: half a ring outside the wall."""
    ring = _length(_length(x - 0.36, z) - 0.26, y) - 0.085
    return torch.maximum(ring, 0.34 - x)


SHAPES: dict[str, Shape] = {
    "sphere": Shape((Part(sphere(0.68)),)),
    "cube": Shape((Part(box((0.5, 0.5, 0.5))),)),
    "cylinder": Shape((Part(cylinder(0.42, -0.62, 0.62)),)),
    "cone": Shape((Part(cone(0.6, -0.6, 0.7)),)),
    "torus": Shape((Part(torus(0.56, 0.22)),)),
    "pyramid": Shape((Part(pyramid(0.6, -0.45, 0.6)),)),
    "capsule": Shape((Part(rod(0.32, (0, 0, -0.42), (0, 0, 0.42))),)),
    "mushroom": Shape(
        (
            Part(without(sphere(0.58, z0=0.05), box((1, 1, 1), (0, 0, -0.95)))),
            Part(cylinder(0.20, -0.65, 0.12), SECOND),
        ),
        "stem",
    ),
    "snowman": Shape(
        (
            Part(sphere(0.42, z0=-0.38)),
            Part(sphere(0.29, z0=0.22)),
            Part(rod(0.075, (0, 0.25, 0.22), (0, 0.46, 0.20)), DETAIL),
            Part(pair(sphere(0.07, 0.12, 0.22, 0.34)), DETAIL),
            Part(cylinder(0.34, 0.42, 0.50), SECOND),
            Part(cylinder(0.21, 0.42, 0.80), SECOND),
        ),
        "hat",
    ),
    "tree": Shape(
        (
            Part(cone(0.56, -0.35, 0.35)),
            Part(cone(0.42, 0.08, 0.80)),
            Part(cylinder(0.14, -0.75, -0.2), SECOND),
        ),
        "trunk",
    ),
    "rocket": Shape(
        (
            Part(cylinder(0.26, -0.6, 0.35)),
            Part(four(box((0.15, 0.15, 0.16), (0.22, 0.22, -0.62)))),
            Part(cone(0.26, 0.35, 0.88), SECOND),
            Part(sphere(0.13, y0=0.22, z0=0.08), DETAIL),
        ),
        "nose",
    ),
    "table": Shape(
        (
            Part(box((0.68, 0.50, 0.07), (0, 0, 0.33))),
            Part(four(box((0.075, 0.075, 0.42), (0.56, 0.38, -0.12))), SECOND),
        ),
        "legs",
    ),
    "chair": Shape(
        (
            Part(box((0.40, 0.07, 0.40), (0, -0.33, 0.42))),
            Part(four(box((0.075, 0.075, 0.36), (0.32, 0.32, -0.42)))),
            Part(box((0.40, 0.40, 0.07), (0, 0, -0.04)), SECOND),
        ),
        "seat",
    ),
    "mug": Shape(
        (
            Part(without(cylinder(0.42, -0.5, 0.5), cylinder(0.32, -0.38, 0.6))),
            Part(_handle, SECOND),
        ),
        "handle",
    ),
    "house": Shape(
        (
            Part(box((0.52, 0.42, 0.34), (0, 0, -0.26))),
            Part(box((0.09, 0.09, 0.24), (0.34, -0.16, 0.42))),
            Part(gable(0.60, 0.52, 0.06, 0.58), SECOND),
            Part(box((0.13, 0.05, 0.21), (0, 0.40, -0.39)), DETAIL),
        ),
        "roof",
    ),
    "dumbbell": Shape(
        (
            Part(pair(sphere(0.32, x0=0.52))),
            Part(rod(0.11, (-0.5, 0, 0), (0.5, 0, 0)), SECOND),
        ),
        "bar",
    ),
}


def signed_distance(name: str, points: Tensor) -> tuple[Tensor, Tensor]:
    """Signed distance (or a lower bound) and slot of the nearest part, [...], at [..., 3]."""
    return _nearest_part(SHAPES[name], *points.unbind(-1))


def _nearest_part(shape: Shape, x: Tensor, y: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    best = shape.parts[0].distance(x, y, z)
    slot = torch.full_like(best, shape.parts[0].slot, dtype=torch.long)
    for part in shape.parts[1:]:
        distance = part.distance(x, y, z)
        slot = torch.where(distance < best, part.slot, slot)
        best = torch.minimum(best, distance)
    return best, slot


def _union(shape: Shape, x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    best = shape.parts[0].distance(x, y, z)
    for part in shape.parts[1:]:
        best = torch.minimum(best, part.distance(x, y, z))
    return best


def orbit_cameras(
    azimuth_deg: Tensor, elevation_deg: Tensor, radius: Tensor, target: Tensor | None = None
) -> Tensor:
    """Cameras c2w [V, 3, 4] that look at ``target`` [V, 3] (None: the origin) from angles [V]."""
    azimuth, elevation = torch.deg2rad(azimuth_deg), torch.deg2rad(elevation_deg)
    sin, cos, zero = torch.sin(azimuth), torch.cos(azimuth), torch.zeros_like(azimuth)
    flat, height = torch.cos(elevation), torch.sin(elevation)
    backward = torch.stack([flat * sin, flat * cos, height], -1)
    right = torch.stack([-cos, sin, zero], -1)
    up = torch.stack([-height * sin, -height * cos, flat], -1)
    position = radius[:, None] * backward
    position = position if target is None else position + target
    return torch.stack([right, up, backward, position], -1)


def _rays(c2w: Tensor, fov_deg: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Rays through all pixel centers: origins and unit directions, both [3, V * size * size]."""
    edge = torch.tan(torch.deg2rad(fov_deg) / 2)
    grid = (torch.arange(size, device=c2w.device, dtype=c2w.dtype) + 0.5) * (2 / size) - 1
    right = (edge[:, None, None] * grid[None, None, :]).expand(-1, size, -1)
    up = (edge[:, None, None] * -grid[None, :, None]).expand(-1, -1, size)
    local = torch.stack([right, up, -torch.ones_like(up)], -1)  # [V, H, W, 3]
    directions = torch.einsum("vij,vhwj->ivhw", c2w[:, :, :3], local).reshape(3, -1)
    origins = c2w[:, :, 3].T[:, :, None].expand(-1, -1, size * size).reshape(3, -1)
    return origins, directions / _length(*directions)


def _trace(shape: Shape, origins: Tensor, directions: Tensor) -> tuple[Tensor, Tensor]:
    """Trace rays [3, N], with unit directions: indices [K] of those that hit, hit points [3, K]."""
    along = (origins * directions).sum(0)
    root = along**2 - (origins**2).sum(0) + BOUND**2
    index = (root > 0).nonzero()[:, 0]
    half_chord = root[index].sqrt()
    t, end = -along[index] - half_chord, -along[index] + half_chord
    o, d = origins[:, index], directions[:, index]
    hits, points = [], []
    for _ in range(MAX_STEPS):
        point = o + t * d
        distance = _union(shape, *point)
        hit, t = distance < HIT_DISTANCE, t + distance
        hits.append(index[hit])
        points.append(point[:, hit])
        active = (~hit & (t < end)).nonzero()[:, 0]
        if not len(active):
            break
        index, t, end, o, d = index[active], t[active], end[active], o[:, active], d[:, active]
    return torch.cat(hits), torch.cat(points, 1)


def _normals(shape: Shape, points: Tensor) -> Tensor:
    """The unit gradient [3, K] of the distance, by finite differences along a tetrahedron."""
    normal = torch.zeros_like(points)
    for corner in ((1, -1, -1), (-1, -1, 1), (-1, 1, -1), (1, 1, 1)):
        step = points.new_tensor(corner)[:, None]
        normal = normal + step * _union(shape, *(points + 1e-3 * step))
    return torch.nn.functional.normalize(normal, dim=0)


class View(NamedTuple):
    """The geometry of V images of a shape, before shading."""

    mask: Tensor  # [V, H, W] true where a ray hits the shape
    normal: Tensor  # [V, H, W, 3] unit normals in world axes; 0 where no ray hits
    slot: Tensor  # [V, H, W] MAIN, SECOND or DETAIL


def view_shape(shape: Shape, c2w: Tensor, fov_deg: Tensor, size: int, scale: Tensor) -> View:
    """Render a shape, enlarged by scale [V], for c2w [V, 3, 4] and fields of view fov_deg [V]."""
    count = len(c2w)
    shrunk = torch.cat([c2w[:, :, :3], c2w[:, :, 3:] / scale[:, None, None]], -1)
    origins, directions = _rays(shrunk, fov_deg, size)
    index, points = _trace(shape, origins, directions)
    mask = torch.zeros(origins.shape[1], dtype=torch.bool, device=c2w.device)
    mask[index] = True
    normal = torch.zeros(len(mask), 3, dtype=c2w.dtype, device=c2w.device)
    normal[index] = _normals(shape, points).T
    slot = torch.zeros(len(mask), dtype=torch.long, device=c2w.device)
    slot[index] = _nearest_part(shape, *points)[1]
    square = (count, size, size)
    return View(mask.view(square), normal.view(*square, 3), slot.view(square))


def silhouettes(
    name: str,
    azimuth_deg: Tensor,
    elevation_deg: Tensor,
    radius: Tensor,
    fov_deg: Tensor,
    *,
    size: int,
    scale: float = 1.0,
    yaw_deg: float = 0.0,
) -> Tensor:
    """The masks [V, H, W] of a shape rotated by ``yaw_deg``, counter-clockwise seen from above."""
    # Rotating the shape counter-clockwise is moving the camera clockwise, in which azimuth grows.
    c2w = orbit_cameras(azimuth_deg + yaw_deg, elevation_deg, radius)
    return view_shape(SHAPES[name], c2w, fov_deg, size, torch.full_like(radius, scale)).mask
