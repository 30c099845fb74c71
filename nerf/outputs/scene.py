"""Pictures of a scene's renderer: test views with metrics, camera paths, validation, free views.

Views are split over the ranks and metrics gathered, so that no rank waits at a barrier while
another renders. The caller swaps in the weights to render with.
"""

import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from nerf.datasets.scene import Scene
from nerf.media import colorize, labeled_grid, nearness, write_png, write_videos
from nerf.metrics import psnr, psnr_from_mse, ssim, to_8bit
from nerf.outputs.depth import depth_errors, write_depth_unit
from nerf.outputs.render import averaged, clip_rays, normals_from_points, render_view
from nerf.rays import Rays, ndc_to_world
from nerf.renderer import Rendered
from nerf.training.distributed import World
from nerf.training.progress import frames
from nerf.training.recovery import halve_until_it_fits
from nerf.training.system import Interrupted, StopSignal

VAL_PIXELS = 4096  # the same at every step, so that validation PSNRs can be compared
STRIP = 1 << 20  # pixels of a large picture that are converted to floats together
STRIP_SIDE = 200  # approximate pixels of the longer side of a validation strip's panels

T = TypeVar("T")


class SceneOutputs:
    """Renders cameras of one scene, for all functions of this file.

    render: rays [B] -> Rendered. block: rays rendered together, halved for good when memory runs
    out, which does not change the pictures. stop: once it has caught a signal, the next
    ``render_camera`` raises Interrupted.
    """

    seconds_per_pixel: float | None = None  # of the latest picture

    def __init__(
        self,
        render: Callable[[Rays], Rendered],
        scene: Scene,
        block: int,
        world: World,
        stop: StopSignal | None = None,
        log: Callable[[str], None] = print,
    ) -> None:
        self.render, self.scene, self.block, self.world = render, scene, block, world
        self.stop, self.log = stop, log

    def render_camera(
        self, scene: Scene, c2w: Tensor, intrinsics: Tensor, size: tuple[int, int] | None = None
    ) -> Rendered:
        """Render one camera: c2w [3, 4], intrinsics [4] or with the lens' numbers too.

        scene: its bounds, NDC and pixel centers apply. size: height and width; None: the scene's.
        """
        if self.stop is not None:
            self.stop.check()
        size = size or (scene.height, scene.width)
        rays_of, start = scene.view_rays(c2w, intrinsics, size[1]), time.perf_counter()
        picture = self.halve_block_until_it_fits(
            lambda block: render_view(self.render, rays_of, size, block, self.world.device)
        )
        self.seconds_per_pixel = (time.perf_counter() - start) / math.prod(size)
        return picture

    def rendering_seconds(self, factor: int, *, video: bool) -> float | None:
        """How long the test views and the path's frames would take; None: nothing to go by yet."""
        scene = self.scene.resized(factor)
        sizes = [scene.view_size(view) for view in scene.splits.get("test", [])]
        sizes += [scene.view_size(0)] * len(scene.render_poses) * video
        if sizes and self.seconds_per_pixel is None:
            return None
        return (self.seconds_per_pixel or 0.0) * sum(map(math.prod, sizes)) / self.world.size

    def own_frames(self, count: int, what: str) -> Iterator[int]:
        """The numbers of this rank among ``count`` pictures; rank 0 shows the progress."""
        world = self.world
        numbers = range(world.rank, count, world.size)
        return frames(numbers, what, self.log, total=count, stride=world.size, show=world.is_main)

    def halve_block_until_it_fits(self, job: Callable[[int], T]) -> T:
        """job(block), with the block halved until it fits; the job must not talk to other ranks."""
        result, self.block = halve_until_it_fits(job, self.block, self.log)
        return result

    def render_dataset_view(self, scene: Scene, view: int) -> Rendered:
        """Render view number ``view`` of ``scene`` at its own size, through its own lens."""
        return self.render_camera(
            scene, scene.c2w[view], scene.intrinsics[view], scene.view_size(view)
        )

    def z_depth(self, rendered: Rendered, scene: Scene, view: int) -> np.ndarray:
        """Depth [H, W] along the camera's axis in scene units; 0 where the opacity is 0."""
        c2w, intrinsics = scene.c2w[view], scene.intrinsics[view]
        if not scene.ndc and len(intrinsics) == 4:  # a pinhole's t is z depth, see nerf.rays
            return rendered.depth.numpy()
        height, width = rendered.depth.shape
        pixels = torch.arange(height * width, device=c2w.device)
        rays = scene.view_rays(c2w, intrinsics, width)(pixels)
        t = rendered.depth.flatten().to(c2w.device)
        if scene.ndc:  # t = 1 is infinity: points there get a large finite depth
            t = t.clamp(max=1 - 1e-4)
        points = rays.origins + rays.directions * t[:, None]
        if scene.ndc:
            points = ndc_to_world(points, scene.height, scene.width, scene.intrinsics[0])
        z = -((points - c2w[:, 3]) * c2w[:, 2]).sum(-1).cpu().view(height, width)
        return torch.where(rendered.opacity > 0, z, 0.0).numpy()

    def depth_map(self, rendered: Rendered) -> np.ndarray:
        """Depth in color [H, W, 3] in [0, 1]: near is bright, empty space dark."""
        scene = self.scene
        near = nearness(rendered.depth.numpy(), scene.near, scene.far, scene.ndc)
        return colorize(near * np.clip(rendered.opacity.numpy(), 0, 1))


def target_picture(scene: Scene, view: int, factor: int) -> np.ndarray:
    """A view's picture [H, W, 3] at 1 / factor of its size, by averaging whole blocks of pixels."""
    height, width = scene.view_size(view)
    if factor <= 1 or height * width <= STRIP:
        return averaged(scene.picture(view).numpy(), factor)
    rows = factor * max(1, STRIP // (factor * width))
    starts = range(0, height // factor * factor, rows)
    strips = (scene.picture(view, slice(y, y + rows)) for y in starts)
    return np.concatenate([averaged(strip.numpy(), factor) for strip in strips])


def target_mask(scene: Scene, view: int, factor: int) -> np.ndarray | None:
    """Pixels of ``target_picture`` that count, those of whole blocks: bool [H, W]; None: all."""
    mask = scene.mask(view)
    if mask is None:
        return None
    return averaged(mask.numpy()[..., None].astype(np.float32), factor)[..., 0] == 1.0


def measure_views(
    outputs: SceneOutputs,
    split: str,
    folder: Path,
    factor: int = 0,
    *,
    lpips: Callable[[np.ndarray, np.ndarray], float] | None = None,
    true_depth: Path | None = None,
    metres_per_unit: float = 0.0,
) -> dict[str, Any]:
    """Metrics of every view of ``split``, on every rank; pictures and depth go to ``folder``.

    The metrics are means over views, and "views" holds those of each view; docs/outputs.md lists
    the keys. ``psnr_8bit`` is measured on the pictures as saved. factor: render pictures this many
    times smaller, without metrics: one ray through a large pixel is not its average. lpips: of
    ``metrics.load_lpips``. true_depth: folder with the exact depth of views, NAME.npy [H, W].
    metres_per_unit: length of a unit of the data's files; 0: depth files are in those units.
    """
    scene = outputs.scene.resized(factor)
    world, views = outputs.world, outputs.scene.splits[split]
    own_rows = []
    with world.raise_on_all_ranks():
        for number in outputs.own_frames(len(views), f"{split} view"):
            view, start = views[number], time.perf_counter()
            rendered = outputs.render_dataset_view(scene, view)
            seconds = time.perf_counter() - start
            picture = rendered.rgb.clamp(0, 1).numpy()
            target = target_picture(outputs.scene, view, factor)
            mask = target_mask(outputs.scene, view, factor)
            depth = outputs.z_depth(rendered, scene, view)
            write_view(folder, number, picture, target)
            write_png(folder / "depth" / f"{number:03d}.png", outputs.depth_map(rendered))
            depth = depth * scene.file_units  # in the units of the data's files
            np.save(folder / "depth" / f"{number:03d}.npy", depth * (metres_per_unit or 1.0))
            row: dict[str, Any] = {"name": scene.names[view], "seconds": seconds, "number": number}
            if factor <= 1:
                saved = to_8bit(picture) / 255.0
                row["psnr"] = psnr(picture, target, mask)
                row["psnr_8bit"] = psnr(saved, to_8bit(target) / 255.0, mask)
                row["ssim"] = ssim(picture, target, mask)
                if lpips is not None:
                    row["lpips"] = lpips(picture, target)
                row |= depth_errors(depth, true_depth, scene.names[view])
            own_rows.append(row)
        if world.is_main and views:
            write_depth_unit(folder / "depth", outputs.scene, metres_per_unit, values=True)
    gathered = (row for rows_of_rank in world.gather(own_rows) for row in rows_of_rank)
    rows = sorted(gathered, key=lambda row: row["number"])
    all_seconds = [row.pop("seconds") for row in rows]
    for row in rows:
        row.pop("number")
    names = [name for name in rows[0] if name != "name"]
    return {
        **{name: _mean([row.get(name) for row in rows]) for name in names},
        "split": split,
        "num_views": len(rows),
        "resolution": [scene.width, scene.height],
        "background": scene.background,
        "seconds_per_view": sum(all_seconds) / len(all_seconds),
        "views": rows,
    }


def write_view(folder: Path, number: int, picture: np.ndarray, target: np.ndarray) -> None:
    """Write the rendered picture, its target into target/ and ``error_map`` into error/."""
    write_png(folder / f"{number:03d}.png", picture)
    write_png(folder / "target" / f"{number:03d}.png", target)
    write_png(folder / "error" / f"{number:03d}.png", error_map(picture, target))


def error_map(picture: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Four times the mean absolute difference of two pictures [H, W, 3], in color [H, W, 3]."""
    return colorize(np.abs(picture - target).mean(-1) * 4)


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if len(known) == len(values) else None


def render_path(
    outputs: SceneOutputs,
    folder: Path,
    factor: int = 0,
    warn: Callable[[str], None] = print,
    metres_per_unit: float = 0.0,
    *,
    key_path: tuple[np.ndarray, np.ndarray] | None = None,
) -> list[Path]:
    """Render the scene's camera path: 000.png ..., depth/, rgb.mp4, depth.mp4 in ``folder``.

    key_path: another path, c2w [F, 3, 4] and vertical fov_deg [F] of ``camera_path.read_path``.
    Returns the videos that were made.
    """
    scene, world = outputs.scene.resized(factor), outputs.world
    poses = scene.render_poses
    # All frames have one pinhole camera: that of the first view, without its lens distortion.
    camera, size = scene.intrinsics[0, :4], scene.view_size(0)
    cameras = list(camera.expand(len(poses), 4))
    if key_path is not None:
        poses = torch.tensor(key_path[0], dtype=torch.float32, device=camera.device)
        focal = 0.5 * size[0] / np.tan(np.radians(key_path[1]) / 2)
        cameras = [camera.new_tensor([f, f, 0.5 * size[1], 0.5 * size[0]]) for f in focal]
    with world.raise_on_all_ranks():
        for number in outputs.own_frames(len(poses), "frame"):
            rendered = outputs.render_camera(scene, poses[number], cameras[number], size)
            write_png(folder / f"{number:03d}.png", rendered.rgb.clamp(0, 1).numpy())
            write_png(folder / "depth" / f"{number:03d}.png", outputs.depth_map(rendered))
    if not world.is_main:
        return []
    write_depth_unit(folder / "depth", outputs.scene, metres_per_unit, values=False)
    return write_videos(folder, ("rgb", "depth"), len(poses), warn)


def render_free_view(
    outputs: SceneOutputs,
    c2w: np.ndarray,
    fov: float,
    size: tuple[int, int],
    mode: str,
    box: np.ndarray | None,
    stopped: Callable[[], bool] = lambda: False,
) -> np.ndarray:
    """The scene from any camera as [H, W, 3] in [0, 1], for ``viewer.Viewer``.

    c2w [3, 4]; fov: vertical, radians; size: height, width; mode of ``viewer.MODES``; box: corners
    [2, 3] of the part shown, None: all; an NDC scene is never cropped. Interrupted if stopped().
    """
    scene, device = outputs.scene, outputs.world.device
    height, width = size
    focal = 0.5 * height / math.tan(0.5 * fov)
    pose = torch.tensor(c2w, dtype=torch.float32, device=device)
    intrinsics = pose.new_tensor([focal, focal, 0.5 * width, 0.5 * height])
    rays = scene.view_rays(pose, intrinsics, width)(torch.arange(height * width, device=device))
    in_box = torch.ones(height, width, dtype=torch.bool)
    if box is not None and not scene.ndc:
        corners = torch.as_tensor(box, dtype=torch.float32, device=device)
        rays, meets_box = clip_rays(rays, corners)
        in_box = meets_box.view(height, width).cpu()
    parts = []
    with torch.no_grad():
        for start in range(0, height * width, outputs.block):
            if stopped():
                raise Interrupted
            parts.append(outputs.render(rays.part(slice(start, start + outputs.block))))
    rgb, opacity, depth = (torch.cat(m).cpu().float() for m in zip(*parts, strict=True))
    rgb, depth = rgb.view(height, width, 3), depth.view(height, width) * in_box
    opacity = opacity.view(height, width).clamp(0, 1) * in_box
    if mode == "rgb":
        return torch.where(in_box[..., None], rgb, scene.background).clamp(0, 1).numpy()
    if mode == "opacity":
        return opacity[..., None].expand(-1, -1, 3).numpy()
    if mode == "depth":
        near = nearness(depth.numpy(), scene.near, scene.far, scene.ndc)
        return colorize(near * opacity.numpy())
    points = rays.origins.cpu() + rays.directions.cpu() * depth.view(-1, 1)
    normals = normals_from_points(points.view(height, width, 3))
    return (normals * opacity[..., None] * 0.5 + 0.5).numpy()


def validation_psnr(outputs: SceneOutputs) -> float:
    """PSNR of a fixed random set of pixels of all validation views, or training views if none."""
    scene, world = outputs.scene, outputs.world
    views = scene.splits.get("val") or scene.splits["train"]
    generator = torch.Generator().manual_seed(0)
    pool = None
    if scene.usable is not None:
        pool = scene.usable_pixels("val" if scene.splits.get("val") else "train")[0]
    count = len(views) * scene.height * scene.width if pool is None else len(pool)
    pixels = torch.randint(count, (VAL_PIXELS,), generator=generator)
    pixels = pixels[world.rank :: world.size].to(world.device)
    view, x, y = scene.place(pixels if pool is None else pool[pixels])
    if pool is None:  # view is an index into the split's list of views
        view = torch.tensor(views, device=world.device)[view]

    def error_of(block: int) -> float:
        error = 0.0
        for start in range(0, len(pixels), block):
            part = slice(start, start + block)
            rays, target = scene.pick(view[part], x[part], y[part])
            error += ((outputs.render(rays).rgb - target) ** 2).sum().item()
        return error

    error = outputs.halve_block_until_it_fits(error_of)
    return psnr_from_mse(sum(world.gather(error)) / (VAL_PIXELS * 3))


def validation_strip(outputs: SceneOutputs, step: int) -> np.ndarray:
    """rgb, target, error, depth and opacity of one small validation view, with names; uint8.

    The view changes with ``step``; the error is that of ``error_map``.
    """
    scene = outputs.scene
    views = scene.splits.get("val") or scene.splits["train"]
    view = views[step * 7919 % len(views)]
    factor = max(1, max(scene.height, scene.width) // STRIP_SIDE)
    rendered = outputs.render_dataset_view(scene.resized(factor), view)
    picture = rendered.rgb.clamp(0, 1).numpy()
    target = target_picture(scene, view, factor)
    opacity = rendered.opacity.clamp(0, 1).numpy()[..., None].repeat(3, -1)
    panels = [picture, target, error_map(picture, target), outputs.depth_map(rendered), opacity]
    names = ["rendered", "target", "error x 4", "depth", "opacity"]
    return labeled_grid([panels], [""], names, f"step {step}, view {scene.names[view]}")
