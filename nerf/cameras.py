"""Camera poses in numpy: frames of reference and preview paths.

c2w [3, 4], conventions of ``nerf.rays``. Orbits run around the world's z axis. Azimuth 0 lies on +y
and turns towards +x, so 90 degrees sees the right side of someone who looks along +y.
"""

import numpy as np
from numpy.typing import ArrayLike


def normalize(vector: np.ndarray) -> np.ndarray:
    """vector [..., 3] scaled to length 1."""
    return vector / np.linalg.norm(vector, axis=-1, keepdims=True)


def view_matrix(backward: np.ndarray, up: np.ndarray, position: np.ndarray) -> np.ndarray:
    """c2w [3, 4] of a camera at ``position`` that looks along -``backward``; all arguments [3].

    ``up`` need not be orthogonal to ``backward``.
    """
    z = normalize(backward)
    x = normalize(np.cross(up, z))
    y = normalize(np.cross(z, x))
    return np.stack([x, y, z, position], axis=1)


def look_at(position: ArrayLike, target: ArrayLike, up: ArrayLike = (0.0, 0.0, 1.0)) -> np.ndarray:
    """c2w [3, 4] of a camera at ``position`` [3] with ``target`` [3] at the image's center."""
    position = np.asarray(position, dtype=np.float64)
    return view_matrix(position - np.asarray(target), np.asarray(up), position)


def orbit_path(num_views: int = 40, elevation_deg: float = 30.0, radius: float = 4.0) -> np.ndarray:
    """Cameras [num_views, 3, 4] on a circle around the z axis that look at the origin.

    nerf-pytorch's path for Blender scenes: azimuths from -180 to 180 degrees, evenly spaced.
    """
    azimuth = np.linspace(-np.pi, np.pi, num_views + 1)[:-1]
    elevation = np.radians(elevation_deg)
    # Azimuth 0 lies on +y and turns towards +x, as in nerf-pytorch's pose_spherical.
    positions = radius * np.stack(
        [
            np.cos(elevation) * np.sin(azimuth),
            np.cos(elevation) * np.cos(azimuth),
            np.full_like(azimuth, np.sin(elevation)),
        ],
        axis=-1,
    )
    return np.stack([look_at(position, np.zeros(3)) for position in positions])


def average_pose(c2w: np.ndarray) -> np.ndarray:
    """The mean camera [3, 4] of c2w [V, 3, 4]: mean position, viewing direction and up vector."""
    return view_matrix(c2w[:, :, 2].sum(0), c2w[:, :, 1].sum(0), c2w[:, :, 3].mean(0))


def homogeneous(c2w: np.ndarray) -> np.ndarray:
    """Poses [..., 3, 4] as matrices [..., 4, 4] whose last row is 0 0 0 1."""
    row = np.broadcast_to(np.array([0.0, 0.0, 0.0, 1.0]), (*c2w.shape[:-2], 1, 4))
    return np.concatenate([c2w, row], axis=-2)


def recenter(c2w: np.ndarray) -> np.ndarray:
    """Poses [V, 3, 4] in the frame of their mean camera (``average_pose``)."""
    to_center = np.linalg.inv(homogeneous(average_pose(c2w)))
    return (to_center @ homogeneous(c2w))[:, :3]


def spiral_path(c2w: np.ndarray, near: float, far: float, num_views: int = 120) -> np.ndarray:
    """Cameras [num_views, 3, 4] on two turns of a spiral around the mean camera of c2w [V, 3, 4].

    LLFF's preview path: the radii are the 90th percentile of the camera positions; the depth of
    the point looked at is the harmonic mean of 0.9 near and 5 far, weighted 1 : 3.
    """
    average = average_pose(c2w)
    up = normalize(c2w[:, :, 1].sum(0))
    focus = 1.0 / (0.25 / (0.9 * near) + 0.75 / (5.0 * far))
    radii = np.percentile(np.abs(c2w[:, :, 3]), 90, axis=0)
    poses = []
    for theta in np.linspace(0.0, 4.0 * np.pi, num_views + 1)[:-1]:
        offset = radii * np.array([np.cos(theta), -np.sin(theta), -np.sin(0.5 * theta)])
        position = average @ np.append(offset, 1.0)
        target = average @ np.array([0.0, 0.0, -focus, 1.0])
        poses.append(view_matrix(position - target, up, position))
    return np.stack(poses)


def nearest_point_to_axes(c2w: np.ndarray) -> np.ndarray:
    """The point [3] nearest, by squared distances, to the optical axes of c2w [V, 3, 4]."""
    axis, position = c2w[:, :, 2], c2w[:, :, 3]
    across = np.eye(3) - axis[:, :, None] * axis[:, None, :]  # projection orthogonal to each axis
    # LLFF weighs each camera by (A^T A) on the left and A on the right; A is a projection.
    return np.linalg.solve(across.mean(0), (across @ position[..., None]).mean(0))[:, 0]


def spherify(
    c2w: np.ndarray, bounds: np.ndarray, num_views: int = 120
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Inward-facing poses on a unit sphere, a circle of preview poses, and scaled bounds.

    c2w [V, 3, 4] -> poses [V, 3, 4], path [num_views, 3, 4]. The origin becomes the point nearest
    to the optical axes, z points to the mean camera, and the mean squared camera distance is 1
    (LLFF's ``spherify``). bounds: any array of distances.
    """
    center = nearest_point_to_axes(c2w)
    z = normalize((c2w[:, :, 3] - center).mean(0))
    x = normalize(np.cross([0.1, 0.2, 0.3], z))
    y = normalize(np.cross(z, x))
    frame = homogeneous(np.stack([x, y, z, center], axis=1))
    poses = (np.linalg.inv(frame) @ homogeneous(c2w))[:, :3]
    scale = 1.0 / np.sqrt((poses[:, :, 3] ** 2).sum(-1).mean())
    poses[:, :, 3] *= scale
    height = poses[:, 2, 3].mean()
    radius = np.sqrt(max(0.0, 1.0 - height**2))
    path = [
        _inward(np.array([radius * np.cos(theta), radius * np.sin(theta), height]))
        for theta in np.linspace(0.0, 2.0 * np.pi, num_views)
    ]
    return poses, np.stack(path), bounds * scale


def _inward(position: np.ndarray) -> np.ndarray:
    """c2w [3, 4] of a camera at ``position`` that looks at the origin, its y axis towards +z."""
    z = normalize(position)
    x = normalize(np.cross(z, [0.0, 0.0, -1.0]))  # LLFF calls this vector up; y is its negative
    y = normalize(np.cross(z, x))
    return np.stack([x, y, z, position], axis=1)
