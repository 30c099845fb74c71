"""Pictures of a trained renderer: test views with metrics, camera paths, validation strips.

Views are split over the ranks and metrics gathered, so no rank waits at a barrier while another
renders. Everything here runs under the weights that the caller has put in place.
"""

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from nerf.datasets.scene import Scene
from nerf.media import colorize, nearness, write_png, write_videos
from nerf.metrics import depth_error, psnr, psnr_from_mse, ssim, to_8bit
from nerf.outputs.render import clip_rays, normals_from_points, render_view
from nerf.rays import Rays, ndc_to_world
from nerf.renderer import Rendered
from nerf.training.distributed import World
from nerf.training.recovery import halve_until_it_fits
from nerf.training.system import StopSignal

VAL_PIXELS = 4096  # a fixed set, the same at every step, so that "best" compares like with like
STRIP_SIDE = 200  # pixels of a validation strip's longer side, about

T = TypeVar("T")


class Interrupted(Exception):
    """A signal came while pictures were being rendered."""


class SceneOutputs:
    """Renders cameras of one scene: what the functions below need to know, in one place.

    stop: a StopSignal; once it has noted one, the next picture raises Interrupted. block: rays at
    a time, halved for good when memory runs out: the pictures are the same.
    """

    def __init__(
        self,
        render: Callable[[Rays], Rendered],
        scene: Scene,
        block: int,
        world: World,
        stop: StopSignal | None = None,
        log: Callable[[str], None] = print,
    ):
        self.render, self.scene, self.block, self.world = render, scene, block, world
        self.stop, self.log = stop, log

    def render_camera(
        self, scene: Scene, c2w: Tensor, intrinsics: Tensor, size: tuple[int, int] | None = None
    ) -> Rendered:
        """Render one camera: c2w [3, 4], intrinsics [4] or with the lens' numbers too.

        scene: its bounds, NDC and pixel centers apply. size: height and width; None: the scene's.
        """
        if self.stop is not None and self.stop.number:
            raise Interrupted
        size = size or (scene.height, scene.width)
        rays_of = scene.view_rays(c2w, intrinsics, size[1])
        return self.halve_block_until_it_fits(
            lambda block: render_view(self.render, rays_of, size, block, self.world.device)
        )

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
        """Depth [H, W] of a view along its camera's axis in scene units; 0: nothing hit."""
        c2w, intrinsics = scene.c2w[view], scene.intrinsics[view]
        if not scene.ndc and len(intrinsics) == 4:  # t is that, see nerf.rays
            return rendered.depth.numpy()
        height, width = rendered.depth.shape
        pixels = torch.arange(height * width, device=c2w.device)
        rays = scene.view_rays(c2w, intrinsics, width)(pixels)
        t = rendered.depth.flatten().to(c2w.device)
        if scene.ndc:  # short of infinity, so that what lies there keeps a number
            t = t.clamp(max=1 - 1e-4)
        points = rays.origins + rays.directions * t[:, None]
        if scene.ndc:
            points = ndc_to_world(points, scene.height, scene.width, scene.intrinsics[0])
        z = -((points - c2w[:, 3]) * c2w[:, 2]).sum(-1).cpu().view(height, width)
        return torch.where(rendered.opacity > 0, z, 0.0).numpy()

    def depth_map(self, rendered: Rendered) -> np.ndarray:
        """Depth in color [H, W, 3]; near is bright, nothing is dark."""
        scene = self.scene
        near = nearness(rendered.depth.numpy(), scene.near, scene.far, scene.ndc)
        return colorize(near * np.clip(rendered.opacity.numpy(), 0, 1))


def target_picture(scene: Scene, view: int, factor: int) -> np.ndarray:
    """View ``view`` [H, W, 3] at 1 / factor of its size, by area averaging of whole blocks."""
    return _averaged(scene.picture(view).numpy(), factor)


def target_mask(scene: Scene, view: int, factor: int) -> np.ndarray | None:
    """Pixels of ``target_picture`` that count, those of whole blocks: bool [H, W]; None: all."""
    mask = scene.mask(view)
    if mask is None:
        return None
    return _averaged(mask.numpy()[..., None].astype(np.float32), factor)[..., 0] == 1.0


def _averaged(picture: np.ndarray, factor: int) -> np.ndarray:
    if factor <= 1:
        return picture
    height, width = picture.shape[0] // factor, picture.shape[1] // factor
    blocks = picture[: height * factor, : width * factor]
    return blocks.reshape(height, factor, width, factor, -1).mean((1, 3))


def measure_views(
    outputs: SceneOutputs,
    split: str,
    folder: Path,
    factor: int = 0,
    *,
    lpips=None,
    true_depth: Path | None = None,
    metres_per_unit: float = 0.0,
) -> dict:
    """Render and measure every view of ``split``; pictures and depth go to ``folder``.

    Returns the metrics on every rank (see README for the schema): means over views; ``psnr_8bit``
    is measured on the pictures as saved. lpips: of ``metrics.load_lpips``. true_depth: folder of
    exact depth, <view's name>.npy [H, W], see ``depth_unit``. metres_per_unit: 0: not known.
    """
    scene = outputs.scene.resized(factor)
    world, views = outputs.world, outputs.scene.splits[split]
    mine = []
    with world.raise_on_all_ranks():
        for number in range(world.rank, len(views), world.size):
            view, start = views[number], time.perf_counter()
            rendered = outputs.render_dataset_view(scene, view)
            seconds = time.perf_counter() - start
            picture = rendered.rgb.clamp(0, 1).numpy()
            target, mask = (of(outputs.scene, view, factor) for of in (target_picture, target_mask))
            depth = outputs.z_depth(rendered, scene, view)
            write_view(folder, number, picture, target)
            write_png(folder / "depth" / f"{number:03d}.png", outputs.depth_map(rendered))
            np.save(folder / "depth" / f"{number:03d}.npy", depth * (metres_per_unit or 1.0))
            saved = to_8bit(picture) / 255.0
            row = {
                "name": scene.names[view],
                "psnr": psnr(picture, target, mask),
                "psnr_8bit": psnr(saved, to_8bit(target) / 255.0, mask),
                "ssim": ssim(picture, target, mask),
                "seconds": seconds,
                "number": number,
            }
            if lpips is not None:
                row["lpips"] = lpips(picture, target)
            mine.append(row | _against_truth(depth, true_depth, scene.names[view]))
        if world.is_main and views:
            write_depth_unit(folder / "depth", outputs.scene, metres_per_unit, values=True)
    rows = sorted((row for part in world.gather(mine) for row in part), key=lambda r: r["number"])
    seconds = [row.pop("seconds") for row in rows]
    for row in rows:
        row.pop("number")
    names = [name for name in rows[0] if name != "name"]
    return {
        **{name: _mean([row.get(name) for row in rows]) for name in names},
        "split": split,
        "num_views": len(rows),
        "resolution": [scene.width, scene.height],
        "background": scene.background,
        "seconds_per_view": sum(seconds) / len(seconds),
        "views": rows,
    }


def write_view(folder: Path, number: int, picture: np.ndarray, target: np.ndarray) -> None:
    """A view as rendered, target/ and error/: the mean absolute difference, times 4, in color."""
    write_png(folder / f"{number:03d}.png", picture)
    write_png(folder / "target" / f"{number:03d}.png", target)
    error = np.abs(picture - target).mean(-1) * 4
    write_png(folder / "error" / f"{number:03d}.png", colorize(error))


def _against_truth(depth: np.ndarray, folder: Path | None, name: str) -> dict[str, float]:
    """The depth's error, in scene units, where the exact one of the same size is known."""
    path = folder / f"{name}.npy" if folder is not None else None
    if path is None or not path.is_file():
        return {}
    try:
        truth = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"{path}: is no depth, a numpy array [H, W] ({error})") from None
    return depth_error(depth, truth) if truth.shape == depth.shape else {}


def write_depth_unit(folder: Path, scene: Scene, metres_per_unit: float, *, values: bool) -> None:
    """unit.json beside depth files: what their numbers and colors mean."""
    scale = metres_per_unit or 1.0
    content = {
        "depth": "z: along the camera's axis, not the distance to the camera",
        "unit": "meters" if metres_per_unit else "scene units; their length in meters is not known",
        "metres_per_scene_unit": metres_per_unit or None,
        "png": "color: bright is near, black nothing; even in "
        + ("NDC depth" if scene.ndc else "1 / z" if scene.near > 0 else "z")
        + f" from {scene.near * (1 if scene.ndc else scale):g}"
        + f" to {scene.far * (1 if scene.ndc else scale):g}",
    }
    if values:
        content["npy"] = (
            "float32 [height, width] in that unit, mean over what the ray met; 0: nothing"
        )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "unit.json").write_text(json.dumps(content, indent=1), encoding="utf-8")


def _mean(values: list[float | None]) -> float | None:
    return None if None in values else float(np.mean(values))


def render_path(
    outputs: SceneOutputs,
    folder: Path,
    factor: int = 0,
    warn=print,
    metres_per_unit: float = 0.0,
    *,
    key_path: tuple[np.ndarray, np.ndarray] | None = None,
) -> list[Path]:
    """Render the scene's camera path: 000.png ..., depth/, rgb.mp4, depth.mp4 in ``folder``.

    key_path: c2w [F, 3, 4] and vertical fov_deg [F] instead, of ``camera_path.read_path``.
    Returns the videos that were made.
    """
    scene, world = outputs.scene.resized(factor), outputs.world
    poses = scene.render_poses
    # One camera model serves the whole path: the first view's, without its lens' distortion.
    camera, size = scene.intrinsics[0, :4], scene.view_size(0)
    cameras = camera.expand(len(poses), 4)
    if key_path is not None:
        poses = torch.tensor(key_path[0], dtype=torch.float32, device=camera.device)
        focal = 0.5 * size[0] / np.tan(np.radians(key_path[1]) / 2)
        cameras = [camera.new_tensor([f, f, 0.5 * size[1], 0.5 * size[0]]) for f in focal]
    with world.raise_on_all_ranks():
        for number in range(world.rank, len(poses), world.size):
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
) -> np.ndarray:
    """The scene from any camera as [H, W, 3] in [0, 1], for ``viewer.Viewer``.

    c2w [3, 4]; fov: vertical, radians; size: height and width; mode of ``viewer.MODES``; box:
    corners [2, 3] of the part that is shown, None: all; an NDC scene is never cropped.
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
    """PSNR of a fixed random set of pixels over all validation views (training ones if none)."""
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
    if pool is None:  # numbers count through the split's views, in their order
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
    """rgb | target | error | depth | opacity of one validation view, small -> uint8 [H, 5 W, 3].

    The view changes with ``step``. The error is the mean absolute one, times 4.
    """
    scene = outputs.scene
    views = scene.splits.get("val") or scene.splits["train"]
    view = views[step * 7919 % len(views)]
    factor = max(1, max(scene.height, scene.width) // STRIP_SIDE)
    rendered = outputs.render_dataset_view(scene.resized(factor), view)
    picture = rendered.rgb.clamp(0, 1).numpy()
    target = target_picture(scene, view, factor)
    error = colorize(np.abs(picture - target).mean(-1) * 4)
    opacity = rendered.opacity.clamp(0, 1).numpy()[..., None].repeat(3, -1)
    panels = [picture, target, error, outputs.depth_map(rendered), opacity]
    return to_8bit(np.concatenate(panels, axis=1))
