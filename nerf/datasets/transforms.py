"""transforms.json of instant-ngp and nerfstudio, or transforms_{train,val,test}.json with its keys.

Poses are camera-to-world in the axes of ``nerf.rays``. Intrinsics (fl_x fl_y cx cy w h, or
camera_angle_x) and the lens (k1 k2 k3 k4 p1 p2; OPENCV, OPENCV_FISHEYE) are keys at the top level
or of a frame; a frame's own keys take precedence. Pixel centers lie at half numbers. aabb_scale,
scale and offset are instant-ngp's: its unit cube becomes the cube from -1 to 1 here, and the scene
fills aabb_scale times that.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from nerf import lenses
from nerf.datasets import capture
from nerf.datasets.blender import number, read_frames, read_splits, table
from nerf.datasets.images import EXIF_ORIENTATION, IMAGE_SUFFIXES, inside
from nerf.datasets.scene import SPLITS, Scene, check_pose
from nerf.datasets.store import Store

PERSPECTIVE_MODELS = ("OPENCV", "PINHOLE", "SIMPLE_PINHOLE", "SIMPLE_RADIAL", "RADIAL")
FISHEYE_MODELS = ("OPENCV_FISHEYE",)
NGP_SCALE, NGP_OFFSET = 0.33, 0.5  # instant-ngp's defaults for keys that the file lacks
NGP_KEYS = ("aabb_scale", "scale", "offset")
Splits = dict[str, list[int]]
UNSUPPORTED = ("ftheta_p0", "latlong", "equirectangular", "orthographic")


class Capture(NamedTuple):
    """The content of one or several transforms files."""

    top: dict[str, Any]  # top-level keys of the first file
    frames: list[dict[str, Any]]  # each with its file's top-level keys, and "where" for messages
    poses: np.ndarray  # c2w [V, 3, 4]
    splits: Splits | None  # None: the files name none


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
    near, far: in scene units; 0: from the box or the cameras. background: gray level in [0, 1]
    behind transparent pixels. store: see ``images.read_images``.
    """
    top, frames, poses, splits = read(datadir, testskip)
    views = views_of(datadir, frames, poses)
    frames, views, splits = _without_repeats(frames, views, splits, warn)
    if splits is None:
        order = sorted(range(len(views.names)), key=lambda view: views.names[view])
        held = capture.hold_out(len(order), llffhold)
        splits = {name: [order[index] for index in indices] for name, indices in held.items()}
    for file, pose in zip(views.files, views.c2w, strict=True):
        check_pose(pose, str(file))
    if any(key in top for key in NGP_KEYS):
        layout, box, bounds = ngp_layout(top, views.c2w, str(datadir))
    else:
        layout, box, bounds = capture.around(views.c2w), None, (capture.NEAR, capture.FAR)
    layout = layout._replace(to_world=_undo_applied_transform(top, str(datadir)) @ layout.to_world)
    bounds = near or bounds[0], far or bounds[1]
    return capture.scene_of(
        views, layout, splits, bounds, factor=factor, background=background, box=box, store=store
    )


def read(datadir: Path, testskip: int) -> Capture:
    """transforms.json, or else the transforms files of the splits (see ``read_splits``)."""
    path = datadir / "transforms.json"
    splits: Splits | None
    if path.exists():
        top, frames, poses = read_frames(path, 1)
        where = [f"{path}: frame {index}" for index in range(len(frames))]
        splits = _listed_splits(top, frames, str(path))
    else:
        frames, poses, where, splits, top = [], [], [], {}, {}
        for split, (content, found, found_poses) in read_splits(datadir, testskip).items():
            splits[split] = list(range(len(frames), len(frames) + len(found)))
            shared = {key: value for key, value in content.items() if key != "frames"}
            where += [f"{datadir}/transforms_{split}.json: frame {i}" for i in range(len(found))]
            frames += [{**shared, **frame} for frame in found]
            poses += found_poses
            top = top or content
        if "val" not in splits and "test" in splits:
            splits["val"] = splits["test"]
    shared = {key: value for key, value in top.items() if key != "frames"}
    frames = [
        {**shared, **frame, "where": f"{prefix} ({frame['file_path']})"}
        for frame, prefix in zip(frames, where, strict=True)
    ]
    return Capture(top, frames, np.stack(poses), splits)


def _listed_splits(top: dict[str, Any], frames: list[dict[str, Any]], where: str) -> Splits | None:
    """Splits by the lists train_filenames, val_filenames and test_filenames; None without them."""
    given = {split: top.get(f"{split}_filenames") for split in SPLITS}
    if not any(given.values()):
        return None
    for frame in frames:  # a path out of the folder is reported as such, not as missing in a list
        find_picture(Path(where).parent, frame["file_path"], where)
    index_of = {_normalized(frame["file_path"]): index for index, frame in enumerate(frames)}
    splits: Splits = {}
    for split, names in given.items():
        if names is None:
            continue
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ValueError(f'{where}: "{split}_filenames" is not a list of file paths')
        unknown = [name for name in names if _normalized(name) not in index_of]
        if unknown:
            raise ValueError(
                f'{where}: "{split}_filenames" names {unknown[0]}, which no frame has; use the '
                '"file_path" of a frame'
            )
        splits[split] = [index_of[_normalized(name)] for name in names]
    if not splits.get("test"):
        splits["test"] = splits.get("val", [])
    if not splits.get("val"):
        splits["val"] = splits["test"]
    return splits


def _normalized(file_path: str) -> str:
    """A path without extension, to compare frames and lists, either of which may omit it."""
    path = os.path.normpath(file_path.replace("\\", "/"))
    stem, suffix = os.path.splitext(path)
    return stem if suffix.lower() in IMAGE_SUFFIXES else path


def _without_repeats(
    frames: list[dict[str, Any]],
    views: capture.Views,
    splits: Splits | None,
    warn: Callable[[str], object],
) -> tuple[list[dict[str, Any]], capture.Views, Splits | None]:
    """The arguments without frames that repeat an earlier frame's picture.

    Frames stay as they are if the files name splits.
    """
    first: dict[Path, int] = {}
    for index, file in enumerate(views.files):
        first.setdefault(file, index)
    kept = sorted(first.values())
    if len(kept) == len(frames) or splits is not None:
        return frames, views, splits
    warn(f"{len(frames) - len(kept)} frames repeat another frame's picture and are left out")
    views = capture.Views(
        files=[views.files[i] for i in kept],
        names=[views.names[i] for i in kept],
        c2w=views.c2w[kept],
        intrinsics=views.intrinsics[kept],
        sizes=views.sizes[kept],
        masks=[views.masks[i] for i in kept],
    )
    return [frames[i] for i in kept], views, splits


# ---------------------------------------------------------------------------------- cameras


def views_of(datadir: Path, frames: list[dict[str, Any]], poses: np.ndarray) -> capture.Views:
    """Files, cameras and masks of ``frames``. ValueError names the frame and what is wrong."""
    files = [find_picture(datadir, frame["file_path"], frame["where"]) for frame in frames]
    missing = [file for file in files if not file.is_file()]
    if missing:
        raise ValueError(
            f"{datadir}: {len(missing)} of {len(files)} pictures are missing, the first is "
            f"{missing[0]}; is the data folder complete?"
        )
    masks = [
        find_picture(datadir, frame["mask_path"], frame["where"])
        if frame.get("mask_path")
        else None
        for frame in frames
    ]
    cameras = [camera_of(frame, file) for frame, file in zip(frames, files, strict=True)]
    return capture.Views(
        files=files,
        names=[os.path.splitext(os.path.relpath(file, datadir))[0] for file in files],
        c2w=poses.copy(),
        intrinsics=np.array([row for row, _ in cameras]),
        sizes=np.array([size for _, size in cameras]),
        masks=masks,
    )


def find_picture(datadir: Path, file_path: object, where: str) -> Path:
    """The file at ``file_path``, whose extension may be missing and slashes may be backward.

    ValueError, beginning with ``where``, if it is not a path inside ``datadir``.
    """
    if not isinstance(file_path, str):
        raise ValueError(f"{where}: {file_path!r} is not a file path")
    path = inside(datadir, file_path, where)
    if not path.is_file():
        for suffix in (*IMAGE_SUFFIXES, *(suffix.upper() for suffix in IMAGE_SUFFIXES)):
            if path.with_name(path.name + suffix).is_file():
                return path.with_name(path.name + suffix)
    return path


def camera_of(frame: dict[str, Any], file: Path) -> tuple[list[float], tuple[float, float]]:
    """fx fy cx cy and lens [4 + LENS] of a frame, and the height and width that they are for.

    Without "w" and "h" these are the size of the picture ``file``.
    """
    where = frame["where"]
    given = {key: number(frame, key, where) for key in ("w", "h") if key in frame}
    if len(given) < 2:
        upright_width, upright_height = _upright_size(file)
        given = {"w": float(upright_width), "h": float(upright_height)}
    width, height = given["w"], given["h"]
    if width < 1 or height < 1:
        raise ValueError(f"{where}: pictures of {width:g}x{height:g}; expected 1x1 or more")
    fx = _focal(frame, "x", width, where)
    fy = _focal(frame, "y", height, where) or fx
    if fx is None or fy is None:
        raise ValueError(
            f'{where}: has neither "fl_x" nor "camera_angle_x", in the frame or at the top level; '
            "expected the focal length in pixels or the angle of view in radians"
        )
    cx = number(frame, "cx", where) if "cx" in frame else width / 2
    cy = number(frame, "cy", where) if "cy" in frame else height / 2
    return [fx, fy, cx, cy, *_lens(frame, where)], (height, width)


def _focal(frame: dict[str, Any], axis: str, size: float, where: str) -> float | None:
    """Focal length along "x" or "y" in pixels, for ``size`` pixels; None without a key for it."""
    if f"fl_{axis}" in frame:
        focal = number(frame, f"fl_{axis}", where)
        if focal <= 0:
            raise ValueError(f'{where}: "fl_{axis}" is {focal:g}; expected pixels > 0')
        return focal
    if f"camera_angle_{axis}" in frame:
        angle = number(frame, f"camera_angle_{axis}", where)
        if not 0 < angle < np.pi:
            raise ValueError(
                f'{where}: "camera_angle_{axis}" is {angle:g}; expected radians in (0, pi)'
            )
        return 0.5 * size / np.tan(0.5 * angle)
    return None


def _lens(frame: dict[str, Any], where: str) -> list[float]:
    """The numbers [LENS] of ``nerf.lenses`` for a frame. ValueError for an unsupported model."""
    for key in UNSUPPORTED:
        if frame.get(key):
            raise ValueError(
                f'{where}: the lens of "{key}" is not supported; undistort the pictures first'
            )
    model = frame.get("camera_model", "OPENCV_FISHEYE" if frame.get("is_fisheye") else "OPENCV")
    if model not in PERSPECTIVE_MODELS + FISHEYE_MODELS:
        known = ", ".join(PERSPECTIVE_MODELS + FISHEYE_MODELS)
        raise ValueError(f'{where}: "camera_model" is {model!r}; expected one of {known}')
    k, p = (
        [number(frame, key, where) if key in frame else 0.0 for key in keys]
        for keys in (("k1", "k2", "k3", "k4"), ("p1", "p2"))
    )
    if model in FISHEYE_MODELS:
        return lenses.lens(lenses.EQUIDISTANT, k)
    return lenses.lens(lenses.PERSPECTIVE, k, tangential=p)


def _upright_size(file: Path) -> tuple[int, int]:
    """Width and height of a picture after its EXIF rotation, without decoding it."""
    try:
        with Image.open(file) as image:
            swapped = image.getexif().get(EXIF_ORIENTATION, 1) in (5, 6, 7, 8)
            return (image.height, image.width) if swapped else image.size
    except (OSError, ValueError, SyntaxError) as error:
        raise ValueError(f"{file}: cannot be read as an image ({error}); replace it") from None


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


def _undo_applied_transform(top: dict[str, Any], where: str) -> np.ndarray:
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
