"""The viewer's cameras between viser's axes and ours, the sizes of pictures, and addresses."""

import socket
from typing import Any

import numpy as np


def quaternion(c2w: np.ndarray) -> np.ndarray:
    """Quaternion wxyz in viser's camera axes (y down, z forward) for c2w in those of nerf.rays."""
    from scipy.spatial.transform import Rotation

    return np.roll(Rotation.from_matrix(c2w[:, :3] * [1, -1, -1]).as_quat(), 1)


def camera_pose(camera: Any) -> np.ndarray:
    """c2w [3, 4] of a viser camera, in the axes of ``nerf.rays``."""
    from scipy.spatial.transform import Rotation

    turn = Rotation.from_quat(np.roll(camera.wxyz, -1)).as_matrix() * [1, -1, -1]
    return np.concatenate([turn, np.asarray(camera.position)[:, None]], axis=1)


def picture_size(longer: int, aspect: float) -> tuple[int, int]:
    """Height and width with this longer side, whatever the aspect (width / height) is."""
    shorter = max(2, round(longer * min(aspect, 1 / aspect)))
    return (shorter, longer) if aspect >= 1 else (longer, shorter)


def address(host: str, port: int) -> str:
    """The viewer's address in a browser; by this machine's name if it listens on all addresses."""
    if host in ("0.0.0.0", "::"):
        host = socket.gethostname()
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
