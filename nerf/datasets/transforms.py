"""transforms.json of instant-ngp and nerfstudio, or transforms_{train,val,test}.json with its keys.

Poses are camera-to-world in our axes. Intrinsics (fl_x fl_y cx cy w h, or camera_angle_x) and the
lens (k1 k2 k3 k4 p1 p2; OPENCV, OPENCV_FISHEYE) stand at the top or in a frame, which then wins.
Pixel centers lie at half numbers. aabb_scale, scale and offset are instant-ngp's: its unit cube
becomes the cube from -1 to 1 here, and the scene fills aabb_scale times that.
"""

import os
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from nerf import lenses
from nerf.datasets import capture
from nerf.datasets.blender import number, read_frames, read_splits, table
from nerf.datasets.images import EXIF_ORIENTATION, IMAGE_SUFFIXES, inside
from nerf.datasets.scene import SPLITS, Scene, check_pose

PERSPECTIVE_MODELS = ("OPENCV", "PINHOLE", "SIMPLE_PINHOLE", "SIMPLE_RADIAL", "RADIAL")
FISHEYE_MODELS = ("OPENCV_FISHEYE",)
NGP_SCALE, NGP_OFFSET = 0.33, 0.5  # what instant-ngp takes where the file is silent
NGP_KEYS = ("aabb_scale", "scale", "offset")
UNSUPPORTED = ("ftheta_p0", "latlong", "equirectangular", "orthographic")


def load(
    datadir: Path,
    *,
    factor: int,
    testskip: int,
    llffhold: int,
    near: float,
    far: float,
    background: float,
    warn=print,
    store=None,
) -> Scene:
    """The capture at ``datadir``, its pictures ``factor`` times smaller.

    Splits are those of the file's lists or of several files (of which testskip keeps every n-th val
    and test view), else every ``llffhold``-th view by name is for validation and testing.
    near, far: in scene units; 0: from the box or the cameras.
    """
    top, frames, poses, splits = read(datadir, testskip)
    views = views_of(datadir, frames, poses)
    frames, views, splits = _without_repeats(frames, views, splits, warn)
    if splits is None:
        order = sorted(range(len(views.names)), key=lambda view: views.names[view])
        held = capture.hold_out(len(order), llffhold)
        splits = {name: [order[place] for place in places] for name, places in held.items()}
    for file, pose in zip(views.files, views.c2w, strict=True):
        check_pose(pose, str(file))
    if any(key in top for key in NGP_KEYS):
        layout, box, bounds = ngp_layout(top, views.c2w, str(datadir))
    else:
        layout, box, bounds = capture.around(views.c2w), None, (capture.NEAR, capture.FAR)
    layout = layout._replace(to_world=_unapplied(top, str(datadir)) @ layout.to_world)
    bounds = near or bounds[0], far or bounds[1]
    return capture.scene_of(
        views, layout, splits, bounds, factor=factor, background=background, box=box, store=store
    )


def read(datadir: Path, testskip: int):
    """Top-level keys, frames (with the keys of their file's top), poses [3, 4], splits or None."""
    path = datadir / "transforms.json"
    if path.exists():
        top, frames, poses = read_frames(path, 1)
        where = [f"{path}: frame {index}" for index in range(len(frames))]
        splits = _listed(top, frames, str(path))
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
        {**shared, **frame, "where": f"{place} ({frame['file_path']})"}
        for frame, place in zip(frames, where, strict=True)
    ]
    return top, frames, np.stack(poses), splits


def _listed(top: dict, frames: list[dict], where: str) -> dict[str, list[int]] | None:
    """Splits by the lists train_filenames, val_filenames and test_filenames; None without them."""
    given = {split: top.get(f"{split}_filenames") for split in SPLITS}
    if not any(given.values()):
        return None
    for frame in frames:  # before a wrong path is reported as one that no list names
        find_picture(Path(where).parent, frame["file_path"], where)
    place = {_plain(frame["file_path"]): index for index, frame in enumerate(frames)}
    splits = {}
    for split, names in given.items():
        if names is None:
            continue
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ValueError(f'{where}: "{split}_filenames" is not a list of file paths')
        unknown = [name for name in names if _plain(name) not in place]
        if unknown:
            raise ValueError(
                f'{where}: "{split}_filenames" names {unknown[0]}, which no frame has; use the '
                "frames' own file_path"
            )
        splits[split] = [place[_plain(name)] for name in names]
    if not splits.get("test"):
        splits["test"] = splits.get("val", [])
    if not splits.get("val"):
        splits["val"] = splits["test"]
    return splits


def _plain(file_path: str) -> str:
    """A path by which frames and lists meet: one may have the extension, the other not."""
    path = os.path.normpath(file_path.replace("\\", "/"))
    stem, suffix = os.path.splitext(path)
    return stem if suffix.lower() in IMAGE_SUFFIXES else path


def _without_repeats(frames, views: capture.Views, splits, warn):
    """The same without frames whose picture another has already: they would be counted twice."""
    first = {}
    for index, file in enumerate(views.files):
        first.setdefault(file, index)
    kept = sorted(first.values())
    if len(kept) == len(frames) or splits is not None:
        return frames, views, splits
    warn(f"{len(frames) - len(kept)} frames name a picture again; the first of each counts")
    parts = [
        [member[i] for i in kept] if isinstance(member, list) else member[kept] for member in views
    ]
    return [frames[i] for i in kept], capture.Views(*parts), splits


# ---------------------------------------------------------------------------------- cameras


def views_of(datadir: Path, frames: list[dict], poses: np.ndarray) -> capture.Views:
    """Files, cameras and masks of ``frames``; ValueError names the frame and what is wrong."""
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


def find_picture(datadir: Path, file_path, where: str) -> Path:
    """The file that ``file_path`` means: its extension may be missing, slashes may be backward."""
    if not isinstance(file_path, str):
        raise ValueError(f"{where}: {file_path!r} is not a file path")
    path = inside(datadir, file_path, where)
    if not path.is_file():
        for suffix in (*IMAGE_SUFFIXES, *(suffix.upper() for suffix in IMAGE_SUFFIXES)):
            if path.with_name(path.name + suffix).is_file():
                return path.with_name(path.name + suffix)
    return path


def camera_of(frame: dict, file: Path) -> tuple[list[float], tuple[float, float]]:
    """fx fy cx cy and lens [4 + LENS] of a frame, and the height and width that they are for."""
    where = frame["where"]
    given = {key: number(frame, key, where) for key in ("w", "h") if key in frame}
    if len(given) < 2:
        width, height = _stored_size(file)
        given = {"w": float(width), "h": float(height)}
    width, height = given["w"], given["h"]
    if width < 1 or height < 1:
        raise ValueError(f"{where}: pictures of {width:g}x{height:g}; expected 1 or more")
    fx = _focal(frame, "x", width, where)
    fy = _focal(frame, "y", height, where) or fx
    if fx is None:
        raise ValueError(
            f'{where}: has neither "fl_x" nor "camera_angle_x", here or at the top; expected the '
            "focal length in pixels or the angle of view in radians"
        )
    cx = number(frame, "cx", where) if "cx" in frame else width / 2
    cy = number(frame, "cy", where) if "cy" in frame else height / 2
    return [fx, fy, cx, cy, *_lens(frame, where)], (height, width)


def _focal(frame: dict, axis: str, size: float, where: str) -> float | None:
    if f"fl_{axis}" in frame:
        focal = number(frame, f"fl_{axis}", where)
        if focal <= 0:
            raise ValueError(f'{where}: "fl_{axis}" is {focal:g}; expected pixels, above 0')
        return focal
    if f"camera_angle_{axis}" in frame:
        angle = number(frame, f"camera_angle_{axis}", where)
        if not 0 < angle < np.pi:
            raise ValueError(
                f'{where}: "camera_angle_{axis}" is {angle:g}; expected radians in (0, pi)'
            )
        return 0.5 * size / np.tan(0.5 * angle)
    return None


def _lens(frame: dict, where: str) -> list[float]:
    for key in UNSUPPORTED:
        if frame.get(key):
            raise ValueError(f'{where}: "{key}" is a lens that is not supported; undistort first')
    model = frame.get("camera_model", "OPENCV_FISHEYE" if frame.get("is_fisheye") else "OPENCV")
    if model not in PERSPECTIVE_MODELS + FISHEYE_MODELS:
        known = ", ".join(PERSPECTIVE_MODELS + FISHEYE_MODELS)
        raise ValueError(f'{where}: "camera_model" is {model!r}; known are {known}')
    k, p = (
        [number(frame, key, where) if key in frame else 0.0 for key in keys]
        for keys in (("k1", "k2", "k3", "k4"), ("p1", "p2"))
    )
    if model in FISHEYE_MODELS:
        return lenses.lens(lenses.EQUIDISTANT, k)
    return lenses.lens(lenses.PERSPECTIVE, k, tangential=p)


def _stored_size(file: Path) -> tuple[int, int]:
    """Width and height of a picture, upright, without decoding it."""
    try:
        with Image.open(file) as image:
            turned = image.getexif().get(EXIF_ORIENTATION, 1) in (5, 6, 7, 8)
            return image.size[::-1] if turned else image.size
    except (OSError, ValueError, SyntaxError) as error:
        raise ValueError(f"{file}: cannot be read as an image ({error}); replace it") from None


# ------------------------------------------------------------------------------------ layout


def ngp_layout(top: dict, c2w: np.ndarray, where: str):
    """Layout, box [2, 3] and (near, far) of a file that says where instant-ngp puts the scene."""
    scale = number(top, "scale", where) if "scale" in top else NGP_SCALE
    half = number(top, "aabb_scale", where) if "aabb_scale" in top else 1.0
    offset = top.get("offset", NGP_OFFSET)
    offset = table([offset] * 3 if isinstance(offset, int | float) else offset)
    if not (scale > 0 and half > 0) or offset is None or offset.shape != (3,):
        raise ValueError(
            f'{where}: "scale" {scale:g}, "aabb_scale" {half:g}, "offset" {top.get("offset")}; '
            "expected numbers above 0 and three numbers"
        )
    # instant-ngp: scale p + offset, in the unit cube. Twice that, less 1: from -1 to 1.
    to_world = np.diag([0.5 / scale] * 3 + [1.0])
    to_world[:3, 3] = (0.5 - offset) / scale
    moved = capture.to_scene(c2w, to_world)
    distance = np.linalg.norm(moved[:, :, 3], axis=-1)
    corner = half * np.sqrt(3.0)
    bounds = max(0.1, float(distance.min() - corner)), float(distance.max() + corner)
    box = torch.tensor([[-half] * 3, [half] * 3], dtype=torch.float32)
    return capture.Layout(moved, capture.arc_path(moved, True), to_world), box, bounds


def _unapplied(top: dict, where: str) -> np.ndarray:
    """[4, 4] from the file's world to the one before its ``applied_transform``."""
    if "applied_transform" not in top:
        return np.eye(4)
    rows = table(top["applied_transform"])
    if rows is None or rows.shape not in ((3, 4), (4, 4)) or not np.isfinite(rows).all():
        raise ValueError(f'{where}: "applied_transform" is not a 3x4 or 4x4 table of numbers')
    whole = np.vstack([rows[:3], [0.0, 0.0, 0.0, 1.0]])
    if abs(np.linalg.det(whole[:3, :3])) < 1e-12:
        raise ValueError(f'{where}: "applied_transform" is singular; expected a turn and a shift')
    scale = number(top, "applied_scale", where) if "applied_scale" in top else 1.0
    if scale <= 0:
        raise ValueError(f'{where}: "applied_scale" is {scale:g}; expected a number above 0')
    return np.linalg.inv(whole) @ np.diag([1 / scale] * 3 + [1.0])
