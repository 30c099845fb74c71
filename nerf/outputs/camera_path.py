"""A camera path by key frames: its JSON file, and the cameras between them.

The file: {"seconds": total, "fps": 30, "keys": [{"c2w": [3][4], "fov_deg": vertical}, ...]}, in the
axes of ``nerf.rays``. Keys are evenly spaced in time.
"""

import json
import math
from pathlib import Path

import numpy as np
from scipy.interpolate import CubicSpline
from scipy.spatial.transform import Rotation, RotationSpline


def write_path(path: Path, keys: list[tuple[np.ndarray, float]], seconds: float) -> None:
    """Save key frames (c2w [3, 4], vertical field of view in degrees)."""
    listed = [{"c2w": np.asarray(c2w).tolist(), "fov_deg": float(fov)} for c2w, fov in keys]
    content = {"seconds": float(seconds), "fps": 30, "keys": listed}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1), encoding="utf-8")


def read_path(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """The frames of a path file: c2w [F, 3, 4], fov_deg [F]. ValueError says what is wrong."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        keys = content["keys"]
        poses = np.array([key["c2w"] for key in keys], dtype=np.float64).reshape(len(keys), 3, 4)
        fovs = np.array([float(key["fov_deg"]) for key in keys])
        seconds, fps = float(content["seconds"]), float(content.get("fps", 30))
    except OSError as error:
        raise ValueError(f"--camera_path {path}: cannot be read ({error.strerror})") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"--camera_path {path}: is no camera path with seconds and keys of c2w [3][4] and "
            f"fov_deg ({type(error).__name__}: {error}); save it from --viewer again"
        ) from None
    if len(keys) < 2:
        raise ValueError(f"--camera_path {path}: {len(keys)} key frame; add 2 or more in --viewer")
    turns = poses[:, :, :3]
    proper = np.allclose(turns @ turns.transpose(0, 2, 1), np.eye(3), atol=1e-3)
    if not np.isfinite(poses).all() or not proper or (np.linalg.det(turns) < 0).any():
        raise ValueError(f"--camera_path {path}: a key's c2w is no rotation and position")
    if not ((fovs > 0) & (fovs < 180)).all():
        raise ValueError(f"--camera_path {path}: fov_deg must lie between 0 and 180")
    if not (0 < seconds * fps <= 100_000 and math.isfinite(fps) and fps > 0):
        raise ValueError(f"--camera_path {path}: {seconds:g} s at {fps:g} fps; expected 1 frame on")
    return interpolate(poses, fovs, max(2, round(seconds * fps)))


def interpolate(poses: np.ndarray, fovs: np.ndarray, frames: int) -> tuple[np.ndarray, np.ndarray]:
    """Smooth frames through the keys: poses [K, 3, 4], fovs [K] -> [frames, 3, 4], [frames]."""
    knots = np.arange(len(poses), dtype=np.float64)
    times = np.linspace(0.0, len(poses) - 1, frames)
    turns = RotationSpline(knots, Rotation.from_matrix(poses[:, :, :3]))(times).as_matrix()
    places = CubicSpline(knots, poses[:, :, 3], bc_type="natural")(times)
    # A field of view must stay between its keys, where a spline would overshoot.
    return np.concatenate([turns, places[..., None]], axis=-1), np.interp(times, knots, fovs)
