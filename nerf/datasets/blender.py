"""Blender scenes (NeRF synthetic): transforms_{train,val,test}.json beside RGBA pictures.

The files are read by ``nerf.datasets.frames``, like those of any other exporter. What makes the
format is the scene's place: it stays in the file's own world, and cameras stand 4 units from
objects about 1.5 units in radius, unless the cameras themselves say otherwise.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nerf import lenses
from nerf.cameras import orbit_path
from nerf.datasets import capture, pictures
from nerf.datasets.frame_cameras import LENS, camera_of, number
from nerf.datasets.frames import (
    NGP_KEYS,
    Capture,
    expected_sizes,
    find_pictures,
    present,
    read,
    subset,
    views_of,
)
from nerf.datasets.images import picture_sizes, read_images, why_unreadable
from nerf.datasets.masks import DYNAMIC, refuse_with_store, usable_pixels
from nerf.datasets.scene import Scene
from nerf.datasets.store import Store, as_tensor
from nerf.datasets.stored_file import file_of
from nerf.datasets.transforms import BOUND_KEYS, ngp_layout, undo_applied_transform

NEAR, FAR = 2.0, 6.0
DISTANCE = 4.0  # of the synthetic cameras from their object
SEEN = 0.75  # part of what half of the frame covers at the object that must lie in [near, far]
Warn = Callable[[str], object]


def load(
    datadir: Path,
    *,
    testskip: int,
    downscale: int,
    background: float,
    near: float = 0.0,
    far: float = 0.0,
    warn: Warn = print,
    store: Store | None = None,
) -> Scene:
    """The scene at ``datadir``; its val and test splits may be missing.

    testskip: keep every n-th val and test view (0 or 1: all). downscale: make pictures this many
    times smaller by area averaging. near, far: in scene units; 0: from the file, else 2 and 6, or
    from the cameras where these do not reach what they look at. background: gray level in [0, 1]
    behind transparent pixels. store: see ``read_images``.
    """
    found, files = present(datadir, read(datadir, testskip, splits_first=True), warn)
    views = views_of(datadir, found, files, warn)
    sizes = [picture_sizes(file) for file in files]
    kept = pictures.of_their_cameras(files, expected_sizes(found, views, sizes), sizes, warn)
    found, views = subset(found, kept), views.subset(kept)
    mixed = len({sizes[index][-1] for index in kept}) > 1
    mixed |= not lenses.is_ideal(torch.tensor(views.intrinsics, dtype=torch.float32))
    pictures_of = capture.pictures_of if mixed else _pictures
    low, high, box = _bounds(found.top, views, datadir, warn, near, far)
    return Scene(
        **pictures_of(views, downscale, store),
        c2w=torch.tensor(views.c2w, dtype=torch.float32),
        splits=found.splits or {"train": list(range(len(views.files)))},
        names=views.names,
        near=low,
        far=high,
        render_poses=torch.tensor(_path(views.c2w), dtype=torch.float32),
        background=background,
        box=box,
        pixel_center=not is_plain(datadir, found),  # other exporters count from pixels' corners
        to_world=torch.tensor(undo_applied_transform(found.top, str(datadir))),
    )


def _pictures(views: capture.Views, downscale: int, store: Store | None) -> dict[str, Any]:
    """The Scene's images, stored, intrinsics and usable, for pictures of one size."""
    images = read_images(views.files, factor=downscale, store=store)
    height, width = images.shape[1:3]
    stored = file_of(images)
    if stored is not None:
        refuse_with_store(views.masks, views.files[0].parent)
    intrinsics = views.intrinsics[:, :4].copy()
    intrinsics *= (np.array([[height, width]]) / views.sizes)[:, [1, 0, 1, 0]]
    return {
        "images": as_tensor(images),
        "stored": stored,
        "intrinsics": torch.tensor(intrinsics, dtype=torch.float32),
        "usable": usable_pixels(views.masks, height, width),
    }


def _bounds(
    top: dict[str, Any], views: capture.Views, datadir: Path, warn: Warn, near: float, far: float
) -> tuple[float, float, torch.Tensor | None]:
    """near, far and box of the scene: as typed, as the file states, or by the cameras."""
    stated = [number(top, key, str(datadir)) if key in top else 0.0 for key in BOUND_KEYS]
    near, far = near or stated[0], far or stated[1]
    box = None
    if any(key in top for key in NGP_KEYS):
        layout, cube, (low, high) = ngp_layout(top, views.c2w, str(datadir))
        shift = torch.tensor(layout.to_world[:3, 3], dtype=torch.float32)
        box = cube * layout.scale + shift
        return near or low * layout.scale, far or high * layout.scale, box
    if near and far:
        return near, far, box
    low, high = NEAR, FAR
    center, reached = capture.focus(views.c2w)
    distance = np.linalg.norm(views.c2w[:, :, 3] - center, axis=-1)
    half = 0.5 * views.sizes.max(-1) / views.intrinsics[:, :2].min(-1)
    radius = SEEN * distance * np.minimum(half, 0.5)
    outside = (distance - radius < low) | (distance + radius > high)
    if reached and np.mean(outside) > 0.25:
        low, high = NEAR / DISTANCE * float(distance.min()), FAR / DISTANCE * float(distance.max())
        warn(
            f"{datadir}: the cameras look at something {distance.mean():.3g} units away, where "
            f"Blender scenes' near {NEAR:g} and far {FAR:g} do not reach: near {near or low:.3g} "
            f"and far {far or high:.3g} are used (--near and --far set others)"
        )
    return near or low, far or high, None


def _path(c2w: np.ndarray) -> np.ndarray:
    """nerf-pytorch's orbit of radius 4; for cameras at quite another distance, one of theirs."""
    distance = float(np.linalg.norm(c2w[:, :, 3], axis=-1).mean())
    path = orbit_path()
    if not 0.67 < distance / DISTANCE < 1.5:
        path = path.copy()
        path[:, :, 3] *= distance / DISTANCE
    return path


def is_plain(datadir: Path, found: Capture) -> bool:
    """Whether transforms files state no more than Blender's: one angle of view, square pixels."""
    top, frames = found.top, found.frames
    if any(key in top for key in NGP_KEYS):
        return False
    files = find_pictures(datadir, frames)
    for frame in frames:
        if "fl_x" in frame or "fl_y" in frame or frame.get("mask_path"):
            return False
        if frame.get("is_fisheye") or frame.get("camera_model", "OPENCV") != "OPENCV":
            return False
        if any(frame.get(key) for key in LENS):
            return False
        if frame.get("camera_angle_x") != frames[0].get("camera_angle_x"):
            return False
    if any(files[0].parent.glob(f"{DYNAMIC}*.png")):
        return False
    if not {"cx", "cy", "camera_angle_y", "w", "h"} & set(frames[0]):
        return True
    whole = (i for i, file in enumerate(files) if file.is_file() and not why_unreadable(file))
    first = next(whole, None)
    if first is None:
        return True
    row, (height, width) = camera_of(frames[first], files[first])
    fx, fy, cx, cy = row[:4]
    square = abs(fx / fy - 1) < 1e-3
    return square and abs(cx - width / 2) < 0.01 and abs(cy - height / 2) < 0.01
