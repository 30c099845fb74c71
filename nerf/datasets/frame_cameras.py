"""The camera of a frame of transforms*.json: focal lengths, principal point and lens, in pixels."""

from pathlib import Path
from typing import Any

import numpy as np

from nerf import lenses
from nerf.datasets.images import picture_sizes

PERSPECTIVE_MODELS = ("OPENCV", "PINHOLE", "SIMPLE_PINHOLE", "SIMPLE_RADIAL", "RADIAL")
FISHEYE_MODELS = ("OPENCV_FISHEYE",)
UNSUPPORTED = ("ftheta_p0", "latlong", "equirectangular", "orthographic")
SIZE, CENTER, LENS = ("w", "h"), ("cx", "cy"), ("k1", "k2", "k3", "k4", "p1", "p2")


def number(content: dict[str, Any], key: str, where: str) -> float:
    """content[key] as a finite float. ValueError begins with ``where``, names key and value."""
    if key not in content:
        raise ValueError(f'{where}: has no "{key}"; expected a number')
    value = content[key]
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e30:
        raise ValueError(f'{where}: "{key}" is {value!r}; expected a finite number')
    return float(value)


def table(rows: object) -> np.ndarray | None:
    """Nested lists of numbers as a float64 array; None if ``rows`` is anything else."""
    try:
        values = np.array(rows)
    except ValueError:  # rows of different lengths
        return None
    return values.astype(np.float64) if values.dtype.kind in "if" else None


def camera_of(frame: dict[str, Any], file: Path) -> tuple[list[float], tuple[float, float]]:
    """fx fy cx cy and lens [4 + LENS] of a frame, and the height and width that they are for.

    Without "w" and "h" these are the size of the picture ``file``.
    """
    where = frame["where"]
    given = {key: number(frame, key, where) for key in SIZE if key in frame}
    if len(given) < 2:
        upright_width, upright_height = upright_size(file)
        given = {"w": float(upright_width), "h": float(upright_height)}
    width, height = given["w"], given["h"]
    if width < 1 or height < 1:
        raise ValueError(f"{where}: pictures of {width:g}x{height:g}; expected 1x1 or more")
    fx = _focal(frame, "x", width, where)
    fy = _focal(frame, "y", height, where) or fx
    if fx is None and "fl_y" not in frame:  # the vertical angle alone: square pixels
        fx = fy
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
    if frame.get("is_fisheye") and model not in FISHEYE_MODELS:
        raise ValueError(
            f'{where}: "camera_model" is {model} and "is_fisheye" is true, which contradict each '
            "other; remove the one that is wrong"
        )
    k, p = (
        [number(frame, key, where) if key in frame else 0.0 for key in keys]
        for keys in (("k1", "k2", "k3", "k4"), ("p1", "p2"))
    )
    if model in FISHEYE_MODELS:
        return lenses.lens(lenses.EQUIDISTANT, k)
    return lenses.lens(lenses.PERSPECTIVE, k, tangential=p)


def upright_size(file: Path) -> tuple[int, int]:
    """Width and height of a picture after its EXIF rotation, without decoding it."""
    return picture_sizes(file)[-1]
