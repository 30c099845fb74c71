"""transforms.json of instant-ngp and nerfstudio, or transforms_{train,val,test}.json with its keys.

Poses are camera-to-world in the axes of ``nerf.rays``. Intrinsics (fl_x fl_y cx cy w h, or
camera_angle_x) and the lens (k1 k2 k3 k4 p1 p2; OPENCV, OPENCV_FISHEYE) are keys at the top level
or of a frame; a frame's own keys take precedence. Pixel centers lie at half numbers. aabb_scale,
scale and offset are instant-ngp's: its unit cube becomes the cube from -1 to 1 here, and the scene
fills aabb_scale times that.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nerf.datasets import capture, pictures
from nerf.datasets.frame_cameras import number, table
from nerf.datasets.frames import (
    NGP_KEYS,
    Capture,
    Splits,
    expected_sizes,
    present,
    read,
    subset,
    views_of,
)
from nerf.datasets.images import picture_sizes
from nerf.datasets.scene import SPLITS, Scene, check_pose
from nerf.datasets.store import Store

BOUND_KEYS = ("near", "far")  # in the file's units; LINEMOD and some exporters write them
NGP_SCALE, NGP_OFFSET = 0.33, 0.5  # instant-ngp's defaults for keys that the file lacks


def load(
    datadir: Path,
    *,
    factor: int,
    testskip: int,
    llffhold: int,
    near: float,
    far: float,
    background: float,
    warn: Callable[[str], object] = print,
    store: Store | None = None,
) -> Scene:
    """The capture at ``datadir``, its pictures ``factor`` times smaller.

    Splits are those that transforms.json lists, or one per file (of val and test every testskip-th
    view is kept); otherwise every ``llffhold``-th view by name is held out for val and test.
    near, far: in scene units; 0: from the file, the box or the cameras. background: gray level in
    [0, 1] behind transparent pixels. store: see ``images.read_images``.
    """
    if all((datadir / f"{name}.json").exists() for name in ("transforms", "transforms_train")):
        warn(
            f"{datadir}: transforms.json is read, not transforms_train.json beside it "
            "(--dataset_type blender reads that)"
        )
    found, files = present(datadir, read(datadir, testskip), warn)
    views = views_of(datadir, found, files, warn)
    sizes = [picture_sizes(file) for file in files]
    expected = expected_sizes(found, views, sizes)
    kept = pictures.of_their_cameras(files, expected, sizes, warn)
    found, views = subset(found, kept), views.subset(kept)
    found, views = _without_repeats(found, views, warn)
    top = found.top
    for file, pose in zip(views.files, views.c2w, strict=True):
        check_pose(pose, str(file))
    if any(key in top for key in NGP_KEYS):
        layout, box, bounds = ngp_layout(top, views.c2w, str(datadir))
    else:
        layout, box, bounds = capture.around(views.c2w), None, (capture.NEAR, capture.FAR)
    stated = [number(top, k, str(datadir)) / layout.scale if k in top else 0 for k in BOUND_KEYS]
    layout = layout._replace(to_world=undo_applied_transform(top, str(datadir)) @ layout.to_world)
    bounds = near or stated[0] or bounds[0], far or stated[1] or bounds[1]
    return capture.scene_of(
        views,
        layout,
        splits_of(found, views, llffhold),
        bounds,
        factor=factor,
        background=background,
        box=box,
        store=store,
    )


def splits_of(found: Capture, views: capture.Views, llffhold: int) -> Splits:
    """The splits that the files name, with val for a missing test and the reverse.

    Where they name none, every ``llffhold``-th view by name is held out.
    """
    if found.splits is None:
        order = sorted(range(len(views.names)), key=lambda view: views.names[view])
        held = capture.hold_out(len(order), llffhold)
        return {name: [order[index] for index in indices] for name, indices in held.items()}
    splits = dict(found.splits)
    if any(f"{split}_filenames" in found.top for split in SPLITS) and not splits.get("test"):
        splits["test"] = splits.get("val", [])
    if not splits.get("val") and splits.get("test"):
        splits["val"] = splits["test"]
    return splits


def _without_repeats(
    found: Capture, views: capture.Views, warn: Callable[[str], object]
) -> tuple[Capture, capture.Views]:
    """The arguments without frames that repeat an earlier frame's picture.

    Frames stay as they are if the files name splits.
    """
    first: dict[Path, int] = {}
    for index, file in enumerate(views.files):
        first.setdefault(file, index)
    kept = sorted(first.values())
    count = len(views.files) - len(kept)
    if not count or found.splits is not None:
        return found, views
    warn(f"{count} frames repeat another frame's picture and are left out")
    return subset(found, kept), views.subset(kept)


# ------------------------------------------------------------------------------------ layout


def ngp_layout(
    top: dict[str, Any], c2w: np.ndarray, where: str
) -> tuple[capture.Layout, torch.Tensor, tuple[float, float]]:
    """Layout, box [2, 3] and (near, far) by instant-ngp's keys scale, offset and aabb_scale."""
    scale = number(top, "scale", where) if "scale" in top else NGP_SCALE
    half = number(top, "aabb_scale", where) if "aabb_scale" in top else 1.0
    offset = top.get("offset", NGP_OFFSET)
    offset = table([offset] * 3 if isinstance(offset, int | float) else offset)
    if not (scale > 0 and half > 0) or offset is None or offset.shape != (3,):
        raise ValueError(
            f'{where}: "scale" {scale:g}, "aabb_scale" {half:g}, "offset" {top.get("offset")}; '
            "expected scale and aabb_scale > 0, and three numbers as offset"
        )
    # instant-ngp's unit cube holds scale * p + offset; 2 (scale * p + offset) - 1 is in [-1, 1].
    to_world = np.diag([0.5 / scale] * 3 + [1.0])
    to_world[:3, 3] = (0.5 - offset) / scale
    moved = capture.to_scene(c2w, to_world)
    distance = np.linalg.norm(moved[:, :, 3], axis=-1)
    corner = half * np.sqrt(3.0)
    bounds = max(0.1, float(distance.min() - corner)), float(distance.max() + corner)
    box = torch.tensor([[-half] * 3, [half] * 3], dtype=torch.float32)
    return capture.Layout(moved, capture.arc_path(moved, True), to_world), box, bounds


def undo_applied_transform(top: dict[str, Any], where: str) -> np.ndarray:
    """[4, 4] from the file's world to the world before its "applied_transform" and scale."""
    if "applied_transform" not in top:
        return np.eye(4)
    rows = table(top["applied_transform"])
    if rows is None or rows.shape not in ((3, 4), (4, 4)) or not np.isfinite(rows).all():
        raise ValueError(f'{where}: "applied_transform" is not a 3x4 or 4x4 table of numbers')
    whole = np.vstack([rows[:3], [0.0, 0.0, 0.0, 1.0]])
    if abs(np.linalg.det(whole[:3, :3])) < 1e-12:
        raise ValueError(
            f'{where}: "applied_transform" is singular; expected a rotation and a translation'
        )
    scale = number(top, "applied_scale", where) if "applied_scale" in top else 1.0
    if scale <= 0:
        raise ValueError(f'{where}: "applied_scale" is {scale:g}; expected a number above 0')
    return np.linalg.inv(whole) @ np.diag([1 / scale] * 3 + [1.0])
