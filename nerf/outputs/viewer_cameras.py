"""The viewer's cameras between viser's axes and ours, the sizes of pictures, and addresses."""

import math
import socket
from typing import Any

import numpy as np

from nerf.datasets.scene import Scene
from nerf.metrics import to_8bit

THUMBNAIL = 64  # pixels of a training picture's longer side
MAX_FRUSTA = 100  # training cameras shown at most


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


def camera_radius(scene: Scene) -> float:
    """The largest coordinate of a camera of the scene."""
    return float(scene.c2w[:, :, 3].abs().max())


def add_training_cameras(server: Any, scene: Scene) -> None:
    """Show the training cameras with their pictures in viser's server, and start at the first."""
    views, radius = scene.splits["train"][:MAX_FRUSTA], camera_radius(scene)
    up = scene.c2w[:, :, 1].sum(0).cpu().numpy()
    server.scene.set_up_direction(tuple(up / np.linalg.norm(up)))
    scale = 0.04 * radius
    for view in views:
        height, width = scene.view_size(view)
        pose, focal = scene.c2w[view].cpu().numpy(), float(scene.intrinsics[view, 1])
        step = max(1, max(height, width) // THUMBNAIL)
        picture = to_8bit(scene.picture(view, step=step).numpy())
        server.scene.add_camera_frustum(
            f"/cameras/{scene.names[view]}", 2 * math.atan(0.5 * height / focal),
            width / height, scale=scale, image=picture, wxyz=quaternion(pose),
            position=pose[:, 3], thickness=0.02 * scale,
        )  # fmt: skip
    first = scene.c2w[views[0]].cpu().numpy()
    server.initial_camera.position = tuple(first[:, 3] - 0.2 * radius * first[:, 2])
    server.initial_camera.look_at = tuple(first[:, 3] - radius * first[:, 2])


def address(host: str, port: int) -> str:
    """The viewer's address in a browser; by this machine's name if it listens on all addresses."""
    if host in ("0.0.0.0", "::"):
        host = socket.gethostname()
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
