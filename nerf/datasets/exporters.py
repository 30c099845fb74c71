"""What other programs write that is not read here: formats without a loader, keys without a use.

Each is named in one line, with the way to a format that is read. Nothing here reads a scene.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

# Files that give a format away -> what it is, and what to do. Patterns are for Path.glob.
FORMATS = (
    ("keyframes/*cameras", "Polycam's raw data", "convert it with nerfstudio's ns-process-data"),
    ("EXR_RGBD", "Record3D's EXR sequence", "convert it with nerfstudio's ns-process-data"),
    ("*.r3d", "Record3D's archive", "convert it with nerfstudio's ns-process-data"),
    ("cameras*.npz", "NeuS' format", "convert its world matrices to a transforms.json"),
    ("train/intrinsics/*.txt", "NeRF++'s format", "convert it to a transforms.json"),
    ("pose/*.txt", "NSVF's format", "convert it to a transforms.json"),
    ("cams/*_cam.txt", "MVSNet's format", "convert it to a transforms.json"),
    ("Cameras/*_cam.txt", "MVSNet's format", "convert it to a transforms.json"),
    ("dataset.json", "Nerfies' format", "convert it to a transforms.json"),
    ("*.sfm", "Meshroom's format", "export it as COLMAP or to a transforms.json"),
    ("reconstruction.json", "OpenSfM's format", "export it as COLMAP (opensfm export_colmap)"),
    ("opensfm/reconstruction.json", "ODM's format", "convert it with nerfstudio's ns-process-data"),
    ("*.out", "Bundler's format", "export it as COLMAP"),
    ("*.nvm", "VisualSFM's format", "export it as COLMAP"),
    ("*.xml", "Metashape's cameras", "convert it with nerfstudio's ns-process-data metashape"),
    ("*.csv", "RealityCapture's cameras", "convert it with ns-process-data realitycapture"),
    ("*.db", "COLMAP's database without a model", "run COLMAP's mapper, or data/from_photos.py"),
)
# Keys of transforms files that change what pictures or poses mean, and are not carried out.
AXES = ("from_mitsuba", "from_na")
TERMS = ("k5", "k6", "s1", "s2", "s3", "s4")
COLORS = ("white_transparent", "black_transparent", "mask_color")
CAMERAS = ("intrinsics", "intrinsic_matrix", "K", "focal", "focal_length")
CONTRADICTION = 1.05  # ratio of two statements of one focal length
READ_PATHS = ("file_path", "mask_path")
Warn = Callable[[str], object]


def foreign_format(folder: Path) -> str:
    """Which known format without a loader a folder holds, and what to do; "" for none."""
    for pattern, name, cure in FORMATS:
        if next(iter(folder.glob(pattern)), None) is not None:
            return f"{name} ({pattern.replace('*cameras', 'cameras')}), not read: {cure}"
    return ""


def check_keys(top: dict[str, Any], frames: Sequence[dict[str, Any]], where: str) -> None:
    """ValueError for keys that contradict each other, turn the axes, or add terms to the lens."""
    for key in AXES:
        if top.get(key):
            raise ValueError(
                f'{where}: "{key}" says that the poses have other axes, which are not read; '
                "convert them to x right, y up, z backward, and remove the key"
            )
    focal, angle, width = (_number(top, key) for key in ("fl_x", "camera_angle_x", "w"))
    if focal and width and 0 < angle < math.pi and not _is_fisheye(top):
        stated = 0.5 * width / math.tan(0.5 * angle)
        if not 1 / CONTRADICTION < focal / stated < CONTRADICTION:
            raise ValueError(
                f'{where}: "fl_x" is {focal:g} pixels, but "camera_angle_x" {angle:g} with "w" '
                f"{width:g} means {stated:.5g}; remove the one that is wrong"
            )
    for frame in frames:
        for key in TERMS:
            if frame.get(key):
                raise ValueError(
                    f'{frame["where"]}: the lens term "{key}" is not supported in transforms '
                    "files; undistort the pictures first, or use COLMAP's model"
                )


def _number(content: dict[str, Any], key: str) -> float:
    """content[key]; 0 where it is missing or no number."""
    value = content.get(key)
    return float(value) if isinstance(value, int | float) and abs(value) < 1e30 else 0.0


def _is_fisheye(top: dict[str, Any]) -> bool:
    return bool(top.get("is_fisheye")) or "FISHEYE" in str(top.get("camera_model"))


def name_unused(
    top: dict[str, Any], frames: Sequence[dict[str, Any]], where: str, warn: Warn
) -> None:
    """Warn about keys that would change the result and are not used."""
    unused = [key for key in COLORS if top.get(key)]
    if unused:
        warn(f"{where}: {', '.join(unused)}: not used, no color is made transparent")
    rolling = top.get("rolling_shutter")
    if isinstance(rolling, list) and any(rolling):
        warn(f"{where}: rolling_shutter: not used, cameras are taken to stand still")
    cameras = sorted({key for frame in frames for key in CAMERAS if key in frame})
    if cameras:
        warn(f"{where}: {', '.join(cameras)}: not used, focal lengths are read from fl_x, fl_y")
    paths = {key for frame in frames for key in frame if key.endswith("_path")}
    paths -= {*READ_PATHS, "ply_file_path"}
    if paths:
        warn(f"{where}: {', '.join(sorted(paths))}: not used, only pictures and masks are read")
