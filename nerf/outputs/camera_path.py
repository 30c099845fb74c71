"""A camera path with key frames: its JSON file, and the interpolated cameras.

The file: {"seconds": total, "fps": 30, "keys": [{"c2w": [3][4], "fov_deg": vertical}, ...]}, in the
axes of ``nerf.rays``. Key frames are evenly spaced in time.
"""

import json
import math
from pathlib import Path

import numpy as np
from scipy.interpolate import CubicSpline
from scipy.spatial.transform import Rotation, RotationSpline


def write_path(path: Path, keys: list[tuple[np.ndarray, float]], seconds: float) -> None:
    """Write key frames (c2w [3, 4], vertical field of view in degrees); creates the folder."""
    listed = [{"c2w": np.asarray(c2w).tolist(), "fov_deg": float(fov)} for c2w, fov in keys]
    content = {"seconds": float(seconds), "fps": 30, "keys": listed}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1), encoding="utf-8")


def read_path(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """The frames of a path file: c2w [F, 3, 4], vertical fov_deg [F].

    ValueError for a file that cannot be read or whose cameras are not valid.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        keys = content["keys"]
        poses = np.array([key["c2w"] for key in keys], dtype=np.float64).reshape(len(keys), 3, 4)
        fovs = np.array([float(key["fov_deg"]) for key in keys])
        seconds, fps = float(content["seconds"]), float(content.get("fps", 30))
    except OSError as error:
        raise ValueError(
            f"--camera_path {path}: cannot be read ({error.strerror}); check the path"
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"--camera_path {path}: is no camera path ({type(error).__name__}: {error}); expected "
            "a JSON file with seconds and keys of c2w [3][4] and fov_deg, as --viewer saves it"
        ) from None
    if len(keys) < 2:
        raise ValueError(
            f"--camera_path {path}: {len(keys)} key frame; expected 2 or more, added in --viewer"
        )
    rotations = poses[:, :, :3]
    proper = np.allclose(rotations @ rotations.transpose(0, 2, 1), np.eye(3), atol=1e-3)
    if not np.isfinite(poses).all() or not proper or (np.linalg.det(rotations) < 0).any():
        raise ValueError(
            f"--camera_path {path}: the c2w of a key is not a rotation and a position; save the "
            "path in --viewer again"
        )
    if not ((fovs > 0) & (fovs < 180)).all():
        raise ValueError(f"--camera_path {path}: a fov_deg is not between 0 and 180; change it")
    if not (0 < seconds * fps <= 100_000 and math.isfinite(fps) and fps > 0):
        raise ValueError(
            f"--camera_path {path}: {seconds:g} s at {fps:g} fps; expected up to 100000 frames"
        )
    return interpolate(poses, fovs, max(2, round(seconds * fps)))


def interpolate(poses: np.ndarray, fovs: np.ndarray, frames: int) -> tuple[np.ndarray, np.ndarray]:
    """Smooth frames through K key frames: poses [K, 3, 4], fovs [K] -> [frames, 3, 4], [frames]."""
    knots = np.arange(len(poses), dtype=np.float64)
    times = np.linspace(0.0, len(poses) - 1, frames)
    rotations = RotationSpline(knots, Rotation.from_matrix(poses[:, :, :3]))(times).as_matrix()
    positions = CubicSpline(knots, poses[:, :, 3], bc_type="natural")(times)
    # Fields of view are interpolated linearly: a spline would overshoot those of the key frames.
    return np.concatenate([rotations, positions[..., None]], axis=-1), np.interp(times, knots, fovs)
