"""The scene's bounds, from its cameras, and its visual hull, from alpha masks."""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from nerf import lenses
from nerf.cameras import nearest_point_to_axes
from nerf.datasets.scene import Scene
from nerf.occupancy import Box, Contraction, OccupancyGrid, Space

MAX_REACH = 64  # pixels that half a cell may cover in a picture which excludes it
MOST_VIEWS = 0.8  # that have a cell in their frames, so that the hull tells whether it is solid
MOST_KEPT = 0.7  # of the box is inside a visual hull that is of use


def scene_space(
    scene: Scene, num_steps: int, *, bound: float, contract: bool, cone_angle: float
) -> Box | Contraction:
    """The region that the training cameras see: a Box, or for ``contract`` a Contraction.

    num_steps, cone_angle: see ``Box`` and ``Contraction``. bound: half the side of a cube around
    the origin. 0: in NDC, the box around the rays of the corner pixels; else the dataset's own box;
    else a cube around the point nearest to all optical axes, as wide as the widest frame is there.
    ValueError if all cameras are at one point, without any of these.
    """
    if contract:
        return Contraction(scene.near, scene.far, num_steps, cone_angle).to(scene.c2w.device)
    views = scene.splits["train"]
    c2w, intrinsics = scene.c2w[views], scene.intrinsics[views]
    if scene.ndc:
        corners = torch.tensor([[0, 0], [1, 0], [0, 1], [1, 1]], device=c2w.device)
        size = torch.tensor([scene.width, scene.height], device=c2w.device)
        x, y = (corners * size).float().unbind(-1)
        ends = []
        for pose, camera in zip(c2w, intrinsics, strict=True):
            rays = scene.rays(x, y, pose, camera)
            ends += [rays.origins, rays.origins + rays.directions]
        points = torch.cat(ends)
        low, high = points.amin(0), points.amax(0)
        low[2], high[2] = -1.0, 1.0
        return Box(low, high, num_steps)
    if bound:
        edge = torch.full((3,), float(bound), device=c2w.device)
        return Box(-edge, edge, num_steps)
    if scene.box is not None:
        low, high = scene.box
        return Box(low, high, num_steps)
    center = torch.tensor(nearest_point_to_axes(c2w.double().cpu().numpy())).to(c2w)
    distance = (c2w[:, :, 3] - center).norm(dim=-1)
    sizes = torch.tensor([max(scene.view_size(view)) for view in views]).to(c2w)
    half = 0.5 * sizes / intrinsics[:, :2].amin(1)
    radius = (distance * half).max().clamp(max=float(distance.max()))
    if not bool((center + radius > center).all()):
        raise ValueError(
            "all training cameras stand at one point, which tells no size of the scene; give "
            "--scene_bound, half the side of a cube around the origin, or --contract"
        )
    return Box(center - radius, center + radius, num_steps)


@torch.no_grad()
def visual_hull(scene: Scene, grid: OccupancyGrid, box: Box) -> Tensor:
    """Cells [R^3] bool that project into no transparent pixel (VaxNeRF, Kondo et al. 2021).

    Alpha masks are dilated by half of a cell's diagonal, so that a cell stays if any part of it may
    be visible. A picture excludes no cell outside of its frame, and none that is too close to it.
    """
    device = scene.c2w.device
    possible = torch.ones(grid.resolution**3, dtype=torch.bool, device=device)
    for view in scene.splits["train"]:
        cells = possible.nonzero()[:, 0]
        if not len(cells):
            break
        height, width = scene.view_size(view)
        x, y, depth, pixels = _project(scene, view, grid, box, cells)
        alpha = (scene.images[view, :height, :width, 3] > 0).to(device)
        if scene.usable is not None:  # masked pixels exclude nothing
            alpha = alpha | ~scene.usable[view, :height, :width]
        alpha = alpha.float()[None, None]
        inside = (x >= 0) & (x < width) & (y >= 0) & (y < height) & (depth > 0)
        x, y = x.clamp(0, width - 1), y.clamp(0, height - 1)
        for part, reach in _by_reach(depth, pixels):
            opaque = F.max_pool2d(alpha, 2 * reach + 1, stride=1, padding=reach)[0, 0] > 0
            possible[cells[part & inside & ~opaque[y, x]]] = False
    return possible


def _by_reach(depth: Tensor, pixels: float) -> Iterator[tuple[Tensor, int]]:
    """Groups of cells, bool [M], and how many pixels one of them may reach from its center's pixel.

    pixels: half a cell's diagonal at depth 1, in pixels. All are one group, unless there are some
    that reach further than MAX_REACH; these are in no group.
    """
    nearest = float(depth.min())
    if nearest * MAX_REACH >= pixels:
        yield torch.ones_like(depth, dtype=torch.bool), int(pixels / nearest) + 1
        return
    end = math.inf
    for reach in (MAX_REACH >> 3, MAX_REACH >> 2, MAX_REACH >> 1, MAX_REACH):
        start = pixels / reach
        yield (depth >= start) & (depth < end), reach + 1
        end = start


def _project(
    scene: Scene, view: int, grid: OccupancyGrid, box: Box, cells: Tensor
) -> tuple[Tensor, Tensor, Tensor, float]:
    """Pixel column and row, long, and depth [M] of the centers of cells [M] in a view.

    Last, half a cell's diagonal at depth 1, in pixels.
    """
    points = box.from_unit(grid.cell_points(cells))
    local = (points - scene.c2w[view, :, 3]) @ scene.c2w[view, :, :3]
    depth = -local[:, 2]
    fx, fy, cx, cy = scene.intrinsics[view, :4].tolist()
    radius = float(((box.high - box.low) / grid.resolution).norm()) / 2
    x, y = fx * local[:, 0] / depth, -fy * local[:, 1] / depth
    if scene.intrinsics.shape[-1] > 4:
        points = local * local.new_tensor([1.0, -1.0, -1.0])
        right, down = lenses.project(points, scene.intrinsics[view, 4:]).unbind(-1)
        x, y = fx * right, fy * down
    shift = 0.0 if scene.pixel_center else 0.5
    column, row = (x + cx + shift).floor().long(), (y + cy + shift).floor().long()
    return column, row, depth, max(fx, fy) * radius


@torch.no_grad()
def hull_scene(
    scene: Scene, grid: OccupancyGrid, space: Space, log: Callable[[str], None]
) -> Scene:
    """The scene with only those pixels for training whose rays may meet the visual hull.

    The others show background alone: their rays have no samples, but they are marched (TensoRF
    filters its rays likewise). A view that sees no cell, or has one too close to it or behind it,
    keeps all pixels.
    Without a visual hull in a box, or with a mapped file, ``log`` says so, and all are kept.
    """
    if scene.stored or not isinstance(space, Box) or bool(grid.possible.all()):
        log("--hull_rays: not used, there is no visual hull or pictures are in a mapped file")
        return scene
    kept = torch.ones(scene.images.shape[:3], dtype=torch.bool, device=scene.c2w.device)
    cells = grid.possible.nonzero()[:, 0]
    for view in scene.splits["train"]:
        height, width = scene.view_size(view)
        x, y, depth, pixels = _project(scene, view, grid, space, cells)
        nearest = float(depth.min())
        if nearest * MAX_REACH < pixels:  # the camera is among the cells
            continue
        reach = int(pixels / nearest) + 1
        x, y = x + reach, y + reach  # cells just outside of the frame reach into it
        seen = (x >= 0) & (x < width + 2 * reach) & (y >= 0) & (y < height + 2 * reach)
        frame = torch.zeros(height + 2 * reach, width + 2 * reach, device=depth.device)
        frame[y[seen], x[seen]] = 1.0
        near = F.max_pool2d(frame[None, None], 2 * reach + 1, stride=1)[0, 0] > 0
        if bool(near.any()):
            kept[view, :height, :width] = near
    kept = kept if scene.usable is None else kept & scene.usable
    share = kept[scene.splits["train"]].float().mean().item()
    log(f"--hull_rays: {share:.1%} of the training pixels may see the visual hull")
    return replace(scene, usable=kept)


def carve(scene: Scene, grid: OccupancyGrid, box: Box) -> tuple[Box, str | None]:
    """The box around the visual hull, with the cells of ``grid`` outside of the hull excluded.

    Returns that box, and a warning: if cells at a side of the old ``box`` are solid, which may then
    cut the scene, or if nearly nothing is excluded. ValueError if the pictures have no alpha or the
    hull is empty.
    """
    if scene.ndc:
        return box, "--hull_init: not used, the scene is in NDC"
    if scene.images.shape[-1] != 4:
        raise ValueError(
            "--hull_init needs pictures with transparency, and these have none; leave it out"
        )
    cells = visual_hull(scene, grid, box).nonzero()[:, 0]
    if not len(cells):
        raise ValueError(
            "the silhouettes of the pictures never meet: no point is opaque in all pictures that "
            "see it; check the poses and the principal point, or give --hull_init off"
        )
    centers, half = grid.cell_points(cells), 1.0 / grid.resolution
    low, high = centers.amin(0) - half, centers.amax(0) + half
    warning = None
    if bool((low < -1 + half).any() or (high > 1 - half).any()):
        warning = _cut_by(scene, grid, box, cells)
    kept = len(cells) / grid.resolution**3
    if warning is None and kept > MOST_KEPT:
        warning = (
            f"the visual hull excludes only {1 - kept:.0%} of the box, since few pictures see the "
            "rest or its cells are too large for them; give a smaller --scene_bound"
        )
    tight = Box(box.from_unit(low), box.from_unit(high), box.num_steps)
    grid.carve(visual_hull(scene, grid, tight))
    return tight, warning


def _cut_by(scene: Scene, grid: OccupancyGrid, box: Box, cells: Tensor) -> str | None:
    """A warning if solid cells are at a side of ``box``: those that MOST_VIEWS see.

    Where fewer see them, the pictures do not say whether anything is there.
    """
    if not _reaches_sides(scene, grid, box, cells)[0]:
        return None
    needed = 0.0
    for factor in (2, 4, 8):
        middle, half = (box.low + box.high) / 2, factor * (box.high - box.low) / 2
        wide = Box(middle - half, middle + half, box.num_steps)
        cells = visual_hull(scene, grid, wide).nonzero()[:, 0]
        cut, needed = _reaches_sides(scene, grid, wide, cells)
        if not cut:
            break
    advice = f", such as {needed:.2g}" if needed and not cut else ""
    return (
        "the scene reaches the sides of its box and may be cut; give a larger --scene_bound"
        f"{advice}"
    )


def _reaches_sides(
    scene: Scene, grid: OccupancyGrid, box: Box, cells: Tensor
) -> tuple[bool, float]:
    """Whether solid ones of the cells are at a side of ``box``, and their largest coordinate."""
    solid = cells[_is_seen(scene, grid, box, cells)]
    if not len(solid):
        return False, 0.0
    centers, half = grid.cell_points(solid), 1.0 / grid.resolution
    edge = (box.high - box.low).max() * half
    largest = box.from_unit(centers).abs().max() + edge
    return bool((centers.abs() > 1 - 1.5 * half).any()), float(largest)


def _is_seen(scene: Scene, grid: OccupancyGrid, box: Box, cells: Tensor) -> Tensor:
    """Which of the cells [M] lie in the frames of MOST_VIEWS of the training views, bool [M]."""
    views, count = scene.splits["train"], torch.zeros_like(cells)
    for view in views:
        height, width = scene.view_size(view)
        x, y, depth, _ = _project(scene, view, grid, box, cells)
        count += (x >= 0) & (x < width) & (y >= 0) & (y < height) & (depth > 0)
    return count >= MOST_VIEWS * len(views)
