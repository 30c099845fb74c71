"""A trained scene as a mesh or a point cloud: what to export, at which density, in which colors.

Both start from what the training pictures show: random pixels are rendered, and where a ray is
opaque the mean depth of what it hit is a point of the surface. They say where the scene is, and how
soft. A mesh's surface is where a 32nd of the box has opacity 0.5, so it does not depend on the
field's scale, in units or in training; see RESULTS.md for others on the demo scene.

Files are in scene units and the scene's axes (``nerf.outputs.mesh``); scenes in normalized device
coordinates (NDC) are brought back to the world. What a ray never met is in no file.
Colors depend on the direction: a vertex has the mean of those that the three training cameras
which face it most squarely see, a point of a cloud what its pixel shows.
"""

import math
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from nerf.datasets.scene import Scene
from nerf.metrics import to_8bit
from nerf.occupancy import Box, Contraction, OccupancyGrid
from nerf.outputs import mesh
from nerf.rays import ndc_to_world
from nerf.scene_bounds import carve, scene_space
from nerf.training.system import map_on_threads

FEW_RAYS = 4096  # rendered to find out where the scene is and how soft
THICKNESS = 32  # of the box's longest side, in which a surface stops half of the light
SMALLEST_PIECE = 0.01  # of the largest one's volume
FACING = 3  # cameras that give a vertex its color
MOST_CAMERAS = 128  # asked for that, evenly taken
UNBOUNDED = 1.0  # half side of the exported cube, where space beyond 1 is contracted
NEIGHBORS = 16  # of a point, for its normal and for whether it stands alone
ALONE = 2.0  # standard deviations beyond the mean distance to neighbors
MARGIN = 0.05  # around what pictures show, of its size
CHUNK = 1 << 14  # points in one call: activations of wide networks stay small


class Seen(NamedTuple):
    """Points of the surface that pixels of training pictures show."""

    points: Tensor  # [N, 3] in the rays' coordinates, NDC where the scene has them
    rgb: Tensor  # [N, 3] in [0, 1], without the background's share
    cameras: Tensor  # [N, 3] where they were seen from, world


class Capture(NamedTuple):
    """A trained scene, as exports need it."""

    renderer: torch.nn.Module
    scene: Scene
    render: object  # rays [B] -> Rendered
    block: int  # rays rendered together
    bound: float  # half side of the cube around the origin to export; 0: as wide as is seen
    log: object  # of progress and of what may surprise


@torch.no_grad()
def look(capture: Capture, num_rays: int) -> Seen:
    """Render random pixels of training pictures: opaque ones, where there is alpha."""
    scene = capture.scene
    generator = torch.Generator().manual_seed(0)
    views = torch.tensor(scene.splits["train"])
    number = torch.randint(
        len(views) * scene.height * scene.width, (num_rays,), generator=generator
    )
    view = views[number // (scene.height * scene.width)].to(scene.c2w.device)
    number = number.to(scene.c2w.device)
    x, y = number % scene.width, number // scene.width % scene.height
    solid = torch.ones_like(x, dtype=torch.bool)
    if scene.images.shape[-1] == 4:
        solid &= scene.pixels(view, x, y)[:, 3] > 127
    if scene.usable is not None:  # not padding, nor what a mask covers
        solid &= scene.usable[view, y, x]
    view, x, y = view[solid], x[solid], y[solid]
    parts = {}

    def render(start: int) -> None:
        part = slice(start, start + capture.block)
        rays, _ = scene.pick(view[part], x[part], y[part])
        rendered = capture.render(rays)
        hit = (rendered.opacity > 0.5).nonzero()[:, 0]
        opacity = rendered.opacity[hit, None]
        rgb = (rendered.rgb[hit] - scene.background * (1 - opacity)) / opacity
        points = rays.origins[hit] + rays.directions[hit] * rendered.depth[hit, None]
        parts[start] = Seen(points, rgb.clamp(0, 1), scene.c2w[view[part][hit], :, 3])

    map_on_threads(render, range(0, len(x), capture.block), scene.c2w.device)
    found = [parts[start] for start in sorted(parts)]
    if sum(len(part.points) for part in found) < 16:
        raise ValueError(
            f"nothing to export: of {num_rays} pixels rendered almost none is opaque; train "
            "longer, or look at the rendered pictures"
        )
    return Seen(*(torch.cat(members).float() for members in zip(*found, strict=True)))


def box_of(capture: Capture, seen: Seen) -> tuple[Box, object]:
    """The box to export, in the rays' coordinates, and points [N, 3] in them -> may hold something.

    In this order: the cube asked for; the uncontracted cube of an unbounded scene; the visual hull
    of alpha masks; what the pictures show. A grid's own box is never left.
    """
    renderer, scene = capture.renderer, capture.scene
    if scene.ndc and capture.bound:
        raise ValueError(
            "--export_bound is in world units, and an NDC scene is cut where its pictures end; "
            "leave it out, or train with --no_ndc"
        )
    space = getattr(renderer, "space", None)

    def anywhere(points: Tensor) -> Tensor:
        return torch.ones_like(points[:, 0])

    if isinstance(space, Contraction) or capture.bound:
        half = capture.bound or UNBOUNDED
        if not capture.bound:
            capture.log(
                f"unbounded scene: the cube of half side {half:g} around the origin is exported, "
                "where space is not contracted; --export_bound sets another"
            )
        edge = torch.full((3,), float(half), device=seen.points.device)
        return Box(-edge, edge, 1), anywhere
    if space is None and scene.images.shape[-1] == 4 and not scene.ndc:
        grid = OccupancyGrid().to(scene.c2w.device)
        wide = scene_space(scene, 1, bound=0.0, contract=False, cone_angle=0.0)
        tight, warning = carve(scene, grid, wide)
        if warning is None:
            return tight, lambda points: grid.occupied_at(tight.to_unit(points)).float()
    low, high = _quantiles(seen.points)
    margin = MARGIN * (high - low).max()
    low, high = low - margin, high + margin
    if isinstance(space, Box):
        grid_low, grid_high = space.from_unit(renderer.grid.bounds)
        low, high = (grid_low, grid_high) if not scene.ndc else (low, high)
        low, high = low.maximum(grid_low), high.minimum(grid_high)
    if scene.ndc:  # the plane at infinity stays outside
        high[2] = high[2].clamp(max=float(seen.points[:, 2].quantile(0.99)))
    return Box(low, high, 1), anywhere


def _quantiles(points: Tensor) -> tuple[Tensor, Tensor]:
    """Corners [3] around all but the outermost hundredth of points [N, 3] on each side."""
    some = points[:: max(1, len(points) // 100_000)]
    low, high = some.quantile(torch.tensor([0.01, 0.99], device=points.device), dim=0)
    return low, high


# -------------------------------------------------------------------------------------- the mesh


@torch.no_grad()
def scene_mesh(capture: Capture, *, resolution: int, level: float) -> "trimesh.Trimesh":  # noqa: F821
    """The scene's surface in world axes and scene units, colored; see ``mesh.extract_mesh``.

    resolution: points along the box's longest side. level: the surface's density; 0:
    from opacity.
    """
    renderer, scene = capture.renderer, capture.scene
    seen = look(capture, FEW_RAYS)
    box, possible = box_of(capture, seen)
    level = level or _level_of(capture, seen, box)
    surface = mesh.extract_mesh(
        lambda points: renderer.density(points) * possible(points),
        None,
        box.low,
        box.high,
        resolution=resolution,
        level=level,
        chunk=CHUNK,
        smallest_piece=SMALLEST_PIECE,
        near_surface=True,
        warn=capture.log,
    )
    here = torch.from_numpy(surface.vertices).to(seen.points)
    if scene.ndc:
        surface.vertices = _to_world(scene, here).double().cpu().numpy()
        surface.invert()  # depth runs the other way in NDC: what was outside would be inside
    colors = [
        _color_from_cameras(renderer, scene, *part)
        for part in zip(
            here.split(CHUNK),
            torch.from_numpy(surface.vertices.copy()).to(here).split(CHUNK),
            torch.from_numpy(surface.vertex_normals.copy()).to(here).split(CHUNK),
            strict=True,
        )
    ]
    surface.visual.vertex_colors = mesh.rgba(torch.cat(colors))
    return surface


def _level_of(capture: Capture, seen: Seen, box: Box) -> float:
    """The surface's density: opacity 0.5 in 1 / THICKNESS of the box, or less in a soft scene.

    There it is the median where pictures show surfaces; light goes deep into them, which is said.
    """
    inside = ((seen.points >= box.low) & (seen.points <= box.high)).all(-1)
    points = seen.points[inside] if inside.any() else seen.points
    density = torch.cat([capture.renderer.density(part) for part in points.split(CHUNK)])
    side = float((box.high - box.low).max())
    hard, soft = mesh.surface_level(side / THICKNESS), float(density[density > 0].median())
    if not soft > 0:  # also NaN, of nothing
        raise ValueError(
            "nothing to export: the density is 0 where pictures show surfaces; train longer, or "
            "set --mesh_level"
        )
    if soft < hard:
        capture.log(
            f"surfaces are soft: half of the light goes {math.log(2) / soft:.2g} deep into them "
            f"(box: {side:.3g}); the mesh will show fog, a point cloud may serve better"
        )
    return min(hard, soft)


def _color_from_cameras(renderer, scene: Scene, points, world, normals) -> Tensor:
    """RGB [M, 3] of points [M, 3], also given in world axes: the mean from FACING cameras."""
    views = scene.splits["train"]
    cameras = scene.c2w[views[:: -(-len(views) // MOST_CAMERAS)], :, 3]
    towards = F.normalize(cameras - world[:, None], dim=-1)  # [M, cameras, 3]
    facing = (towards * normals[:, None]).sum(-1).topk(min(FACING, len(cameras))).indices
    rows = torch.arange(len(points), device=points.device)
    return torch.stack(
        [renderer.color(points, -towards[rows, column]) for column in facing.unbind(-1)]
    ).mean(0)


def _to_world(scene: Scene, points: Tensor) -> Tensor:
    return ndc_to_world(points, scene.height, scene.width, scene.intrinsics[0])


def export_mesh(capture: Capture, path: Path, *, resolution: int, level: float) -> None:
    """``scene_mesh`` to a file, and a line about it."""
    start = time.perf_counter()
    surface = scene_mesh(capture, resolution=resolution, level=level)
    mesh.write_mesh(path, surface)
    closed = "watertight" if surface.is_watertight else "not watertight"
    capture.log(
        f"mesh: {path} ({len(surface.vertices)} vertices, {len(surface.faces)} triangles, {closed},"
        f" scene units, {time.perf_counter() - start:.0f} s)"
    )


# --------------------------------------------------------------------------------- the point cloud


class Cloud(NamedTuple):
    """Points in world axes and scene units."""

    points: np.ndarray  # [N, 3]
    normals: np.ndarray  # [N, 3] unit, towards where each was seen from
    rgb: np.ndarray  # [N, 3] uint8, sRGB


@torch.no_grad()
def scene_points(capture: Capture, num_points: int) -> Cloud:
    """About ``num_points`` points of the surface, those that stand alone left out.

    A pixel at the rim of an object sees part of what is behind, and its mean depth lies between:
    such points have few neighbors (Rusu et al. 2008, statistical outlier removal). Normals: the
    plane through the nearest neighbors, by principal components.
    """
    scene = capture.scene
    seen = look(capture, FEW_RAYS)
    box, possible = box_of(capture, seen)
    if scene.images.shape[-1] == 4:
        views = scene.splits["train"]  # one after the other: all may not fit into memory
        shown = sum(float((scene.images[view, ..., 3] > 127).float().mean()) for view in views)
        num_points = int(num_points / max(shown / len(views), 1e-3))
    seen = look(capture, num_points)
    inside = ((seen.points >= box.low) & (seen.points <= box.high)).all(-1)
    density = torch.cat([capture.renderer.density(part) for part in seen.points.split(CHUNK)])
    inside &= (density > 0) & (possible(seen.points) > 0)
    points, rgb, cameras = (member[inside] for member in seen)
    if len(points) <= NEIGHBORS:
        raise ValueError(
            f"only {len(points)} points are inside the exported box; set a larger --export_bound"
        )
    points = _to_world(scene, points) if scene.ndc else points
    points, cameras = points.double().cpu().numpy(), cameras.double().cpu().numpy()
    normals, kept = normals_of(points, cameras)
    return Cloud(points[kept], normals[kept], to_8bit(rgb.cpu().numpy())[kept])


def normals_of(points: np.ndarray, cameras: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Unit normals [N, 3] towards ``cameras`` [N, 3], and which points [N] do not stand alone."""
    try:
        from scipy.spatial import cKDTree
    except ImportError as error:
        raise ValueError(
            f"a point cloud needs another package ({error}): pip install scikit-image"
        ) from error
    distance, near = cKDTree(points).query(points, NEIGHBORS)
    mean = distance[:, 1:].mean(1)
    kept = mean <= mean.mean() + ALONE * mean.std()
    normals = np.empty_like(points)
    for start in range(0, len(points), CHUNK):
        part = slice(start, start + CHUNK)
        around = points[near[part]]
        around = around - around.mean(1, keepdims=True)
        _, axes = np.linalg.eigh(around.transpose(0, 2, 1) @ around)
        normals[part] = axes[:, :, 0]  # of the least spread
    facing = (normals * (cameras - points)).sum(1)
    return normals * np.where(facing < 0, -1.0, 1.0)[:, None], kept


def write_points(path: Path, cloud: Cloud) -> None:
    """A binary .ply: x y z, nx ny nz as float32, red green blue as uint8."""
    names = [(name, "<f4") for name in ("x", "y", "z", "nx", "ny", "nz")]
    names += [(name, "u1") for name in ("red", "green", "blue")]
    rows = np.empty(len(cloud.points), dtype=names)
    columns = np.concatenate([cloud.points, cloud.normals, cloud.rgb], axis=1).T
    for (name, _), column in zip(names, columns, strict=True):
        rows[name] = column
    kinds = {"<f4": "float", "u1": "uchar"}
    header = ["ply", "format binary_little_endian 1.0", f"element vertex {len(rows)}"]
    header += [f"property {kinds[kind]} {name}" for name, kind in names] + ["end_header", ""]
    mesh.replace_file(path, "\n".join(header).encode() + rows.tobytes())


def export_points(capture: Capture, path: Path, num_points: int) -> None:
    """``scene_points`` to a .ply, and a line about it."""
    start = time.perf_counter()
    cloud = scene_points(capture, num_points)
    write_points(path, cloud)
    capture.log(
        f"point cloud: {path} ({len(cloud.points)} points with colors and normals, scene units, "
        f"{time.perf_counter() - start:.0f} s)"
    )
