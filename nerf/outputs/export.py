"""A trained scene as a mesh or a point cloud: the box to export, the density level, the colors.

Both start from random pixels of the training pictures: each is rendered, and where its ray is
opaque, the ray's mean depth gives a point on the surface. These points show where the scene is and
how soft its surfaces are. A mesh's surface has the density at which 1/32 of the box's longest side
has opacity 0.5, so it depends neither on the scene's units nor on the field's scale; RESULTS.md
compares other levels on the demo scene.

Files are in the world of the data's own files, or in the scene's if ``TrainedScene.file_world`` is
False: a capture is scaled, rotated and shifted for training (``Scene.to_world``). Scenes in
normalized device coordinates (NDC) are converted back first. No file holds what no ray has hit.
Colors depend on the viewing direction: a vertex has the mean color from the three training cameras
that face it most squarely, a point of a cloud the color of its pixel.
"""

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from nerf.datasets.scene import Scene
from nerf.metrics import to_8bit
from nerf.occupancy import Box, Contraction, OccupancyGrid
from nerf.outputs import mesh
from nerf.outputs.point_cloud import NEIGHBORS, PointCloud, estimate_normals, write_points
from nerf.rays import Rays, ndc_to_world
from nerf.renderer import Rendered
from nerf.scene_bounds import carve, scene_space
from nerf.training.system import map_on_threads

if TYPE_CHECKING:
    from trimesh import Trimesh

PROBE_RAYS = 4096  # rendered to find where the scene is and how soft its surfaces are
STEPS_PER_BOX = 32  # a step of 1/32 of the box's longest side has opacity 0.5 at the surface
MIN_PIECE_VOLUME = 0.01  # of the largest piece's; smaller pieces are left out of a mesh
CAMERAS_PER_VERTEX = 3  # whose mean color a vertex has
MAX_CAMERAS = 128  # considered for that, evenly spread over the training views
UNBOUNDED_HALF_SIDE = 1.0  # of the exported cube; space beyond 1 is contracted
MARGIN = 0.05  # around the surface points, as a part of their extent
CHUNK = 1 << 14  # points in one call: activations of wide networks stay small


class FieldRenderer(Protocol):
    """A renderer's field, at points [N, 3] in the rays' coordinates.

    With an occupancy grid it also has ``space``, a Box or Contraction, and ``grid``.
    """

    def density(self, points: Tensor) -> Tensor: ...

    def color(self, points: Tensor, viewdirs: Tensor) -> Tensor: ...


class SurfacePoints(NamedTuple):
    """Points on the surface, one for each opaque pixel of those rendered."""

    points: Tensor  # [N, 3] in the rays' coordinates, NDC where the scene has them
    rgb: Tensor  # [N, 3] in [0, 1], without the background's share
    cameras: Tensor  # [N, 3] position of the pixel's camera, world


class TrainedScene(NamedTuple):
    """What an export needs of a trained scene."""

    renderer: FieldRenderer
    scene: Scene
    render: Callable[[Rays], Rendered]
    block: int  # rays rendered together
    bound: float  # half side of the cube around the origin to export; 0: fit a box to the surface
    log: Callable[[str], None]  # of progress and of what may surprise
    file_world: bool = True  # exports are in the world of the data's files, not in the scene's

    @property
    def unit(self) -> str:
        """The unit of exported files, for the log."""
        own = self.file_world and self.scene.has_own_world
        return "in the world of its files" if own else "scene units"


@torch.no_grad()
def visible_surface_points(trained: TrainedScene, num_rays: int) -> SurfacePoints:
    """Surface points of ``num_rays`` random training pixels, without those that are transparent.

    Pixels with alpha up to 127 and those that a mask leaves out are not rendered. The generator's
    seed is fixed. ValueError where fewer than 16 pixels are opaque.
    """
    scene = trained.scene
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
    if scene.usable is not None:  # leaves out padding and masked pixels
        solid &= scene.usable[view, y, x]
    view, x, y = view[solid], x[solid], y[solid]
    parts: dict[int, SurfacePoints] = {}

    def render_block(start: int) -> None:
        part = slice(start, start + trained.block)
        rays, _ = scene.pick(view[part], x[part], y[part])
        rendered = trained.render(rays)
        hit = (rendered.opacity > 0.5).nonzero()[:, 0]
        opacity = rendered.opacity[hit, None]
        rgb = (rendered.rgb[hit] - scene.background * (1 - opacity)) / opacity
        points = rays.origins[hit] + rays.directions[hit] * rendered.depth[hit, None]
        parts[start] = SurfacePoints(points, rgb.clamp(0, 1), scene.c2w[view[part][hit], :, 3])

    map_on_threads(render_block, range(0, len(x), trained.block), scene.c2w.device)
    found = [parts[start] for start in sorted(parts)]
    if sum(len(part.points) for part in found) < 16:
        raise ValueError(
            f"nothing to export: fewer than 16 of {num_rays} pixels are rendered opaque; train "
            "longer, and check the rendered pictures"
        )
    return SurfacePoints(*(torch.cat(members).float() for members in zip(*found, strict=True)))


def export_box(
    trained: TrainedScene, surface: SurfacePoints
) -> tuple[Box, Callable[[Tensor], Tensor]]:
    """The box to export, in the rays' coordinates, and a function that rules out points in it.

    The function returns 0 for points [N, 3] outside the visual hull, 1 for others. The box is the
    first of these that applies: the cube of ``bound``; the uncontracted cube of an unbounded scene;
    without an occupancy grid, a box around the visual hull of alpha masks; with one, the box of its
    occupied cells; a box around the surface points, in NDC inside that of the occupied cells.
    ValueError for ``bound`` in an NDC scene.
    """
    renderer, scene = trained.renderer, trained.scene
    if scene.ndc and trained.bound:
        raise ValueError(
            "--export_bound is in scene units, but this scene is in NDC, where the box is fitted "
            "to the surface; leave it out, or train with --no_ndc"
        )
    space, grid = getattr(renderer, "space", None), getattr(renderer, "grid", None)

    def anywhere(points: Tensor) -> Tensor:
        return torch.ones_like(points[:, 0])

    if isinstance(space, Contraction) or trained.bound:
        half = trained.bound or UNBOUNDED_HALF_SIDE
        if not trained.bound:
            trained.log(
                f"unbounded scene: only the cube of half side {half:g} around the origin is "
                "exported, in which space is not contracted; --export_bound sets another size"
            )
        edge = torch.full((3,), float(half), device=surface.points.device)
        return Box(-edge, edge, 1), anywhere
    if space is None and scene.images.shape[-1] == 4 and not scene.ndc:
        hull = OccupancyGrid().to(scene.c2w.device)
        wide = scene_space(scene, 1, bound=0.0, contract=False, cone_angle=0.0)
        assert isinstance(wide, Box)
        tight, warning = carve(scene, hull, wide)
        if warning is None:
            return tight, lambda points: hull.occupied_at(tight.to_unit(points)).float()
    low, high = _quantiles(surface.points)
    margin = MARGIN * (high - low).max()
    low, high = low - margin, high + margin
    if isinstance(space, Box) and grid is not None:
        grid_low, grid_high = space.from_unit(grid.bounds)
        low, high = (grid_low, grid_high) if not scene.ndc else (low, high)
        low, high = low.maximum(grid_low), high.minimum(grid_high)
    if scene.ndc:  # the plane at infinity stays outside
        high[2] = high[2].clamp(max=float(surface.points[:, 2].quantile(0.99)))
    return Box(low, high, 1), anywhere


def _quantiles(points: Tensor) -> tuple[Tensor, Tensor]:
    """Corners [3] of a box around points [N, 3], without the outermost 1% on each side."""
    some = points[:: max(1, len(points) // 100_000)]
    low, high = some.quantile(torch.tensor([0.01, 0.99], device=points.device), dim=0)
    return low, high


# -------------------------------------------------------------------------------------- the mesh


@torch.no_grad()
def scene_mesh(trained: TrainedScene, *, resolution: int, level: float) -> "Trimesh":
    """The scene's surface, colored, in the exported world; see ``mesh.extract_mesh``.

    resolution: points along the box's longest side. level: the surface's density; 0: the density
    at which 1 / STEPS_PER_BOX of the box has opacity 0.5, or less in a soft scene.
    """
    renderer, scene = trained.renderer, trained.scene
    probes = visible_surface_points(trained, PROBE_RAYS)
    box, may_be_solid = export_box(trained, probes)
    level = level or _surface_level(trained, probes, box)
    surface = mesh.extract_mesh(
        lambda points: renderer.density(points) * may_be_solid(points),
        None,
        box.low,
        box.high,
        resolution=resolution,
        level=level,
        chunk=CHUNK,
        smallest_piece=MIN_PIECE_VOLUME,
        near_surface=True,
        warn=trained.log,
    )
    vertices = torch.from_numpy(surface.vertices).to(probes.points)  # in the rays' coordinates
    if scene.ndc:
        surface.vertices = _to_world(scene, vertices).double().cpu().numpy()
        surface.invert()  # NDC depth runs the other way, which turns the faces inside out
    colors = [
        _color_from_cameras(renderer, scene, *part)
        for part in zip(
            vertices.split(CHUNK),
            torch.from_numpy(surface.vertices.copy()).to(vertices).split(CHUNK),
            torch.from_numpy(surface.vertex_normals.copy()).to(vertices).split(CHUNK),
            strict=True,
        )
    ]
    visual: Any = surface.visual  # ColorVisuals, as ``mesh.extract_mesh`` makes them
    visual.vertex_colors = mesh.rgba(torch.cat(colors))
    if trained.file_world:
        surface.apply_transform(scene.file_matrix)
    return surface


def _surface_level(trained: TrainedScene, surface: SurfacePoints, box: Box) -> float:
    """The surface's density: opacity 0.5 in 1 / STEPS_PER_BOX of the box, or less if it is soft.

    A soft scene's level is the median density at its surface points, and a warning is logged.
    """
    inside = ((surface.points >= box.low) & (surface.points <= box.high)).all(-1)
    points = surface.points[inside] if inside.any() else surface.points
    density = torch.cat([trained.renderer.density(part) for part in points.split(CHUNK)])
    side = float((box.high - box.low).max())
    hard, soft = mesh.surface_level(side / STEPS_PER_BOX), float(density[density > 0].median())
    if not soft > 0:  # also NaN, the median of no density at all
        raise ValueError(
            "nothing to export: the density is 0 at all surface points of the pictures; train "
            "longer, or set --mesh_level"
        )
    if soft < hard:
        trained.log(
            f"surfaces are soft: opacity reaches 0.5 only {math.log(2) / soft:.2g} below them "
            f"(box: {side:.3g}); the mesh will show fog, so a point cloud (--export_points) may be "
            "better"
        )
    return min(hard, soft)


def _color_from_cameras(
    renderer: FieldRenderer, scene: Scene, points: Tensor, world: Tensor, normals: Tensor
) -> Tensor:
    """Mean RGB [M, 3] of vertices from the CAMERAS_PER_VERTEX cameras that face them most squarely.

    points [M, 3] in the rays' coordinates, world [M, 3] the same points and normals in world axes.
    """
    views = scene.splits["train"]
    cameras = scene.c2w[views[:: -(-len(views) // MAX_CAMERAS)], :, 3]
    towards = F.normalize(cameras - world[:, None], dim=-1)  # [M, cameras, 3]
    cosine = (towards * normals[:, None]).sum(-1)
    facing = cosine.topk(min(CAMERAS_PER_VERTEX, len(cameras))).indices
    rows = torch.arange(len(points), device=points.device)
    return torch.stack(
        [renderer.color(points, -towards[rows, column]) for column in facing.unbind(-1)]
    ).mean(0)


def _to_world(scene: Scene, points: Tensor) -> Tensor:
    return ndc_to_world(points, scene.height, scene.width, scene.intrinsics[0])


def export_mesh(trained: TrainedScene, path: Path, *, resolution: int, level: float) -> None:
    """Write ``scene_mesh`` to a file and log its size."""
    start = time.perf_counter()
    surface = scene_mesh(trained, resolution=resolution, level=level)
    mesh.write_mesh(path, surface)
    closed = "watertight" if surface.is_watertight else "not watertight"
    trained.log(
        f"mesh: {path} ({len(surface.vertices)} vertices, {len(surface.faces)} triangles, {closed},"
        f" {trained.unit}, {time.perf_counter() - start:.0f} s)"
    )


# --------------------------------------------------------------------------------- the point cloud


@torch.no_grad()
def scene_points(trained: TrainedScene, num_points: int) -> PointCloud:
    """About ``num_points`` points of the surface, without outliers.

    A pixel at an object's silhouette also sees what is behind it, and its mean depth lies between
    the two: such points have few neighbors and are removed (Rusu et al. 2008, statistical outlier
    removal). ValueError where too few points are inside the box.
    """
    scene = trained.scene
    box, may_be_solid = export_box(trained, visible_surface_points(trained, PROBE_RAYS))
    if scene.images.shape[-1] == 4:
        views = scene.splits["train"]  # one at a time: all may not fit into memory
        opaque = sum(float((scene.images[view, ..., 3] > 127).float().mean()) for view in views)
        num_points = int(num_points / max(opaque / len(views), 1e-3))
    surface = visible_surface_points(trained, num_points)
    inside = ((surface.points >= box.low) & (surface.points <= box.high)).all(-1)
    density = torch.cat([trained.renderer.density(part) for part in surface.points.split(CHUNK)])
    inside &= (density > 0) & (may_be_solid(surface.points) > 0)
    points, rgb, cameras = (member[inside] for member in surface)
    if len(points) <= NEIGHBORS:
        raise ValueError(
            f"only {len(points)} points are inside the exported box; set a larger --export_bound"
        )
    world = (_to_world(scene, points) if scene.ndc else points).double().cpu().numpy()
    normals, kept = estimate_normals(world, cameras.double().cpu().numpy())
    if trained.file_world:
        world = scene.file_world(world)
        normals = normals @ (scene.file_matrix[:3, :3] / scene.file_units).T
    return PointCloud(world[kept], normals[kept], to_8bit(rgb.cpu().numpy())[kept])


def export_points(trained: TrainedScene, path: Path, num_points: int) -> None:
    """Write ``scene_points`` to a .ply file and log its size."""
    start = time.perf_counter()
    cloud = scene_points(trained, num_points)
    write_points(path, cloud)
    trained.log(
        f"point cloud: {path} ({len(cloud.points)} points with colors and normals, {trained.unit}, "
        f"{time.perf_counter() - start:.0f} s)"
    )
