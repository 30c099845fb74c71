"""Camera poses: preview paths of posed pictures, in numpy; cameras on orbits, in torch.

c2w [3, 4], conventions of ``nerf.rays``. Orbits run around the world's z axis. Azimuth 0 lies on +y
and turns towards +x, so 90 degrees sees the right side of someone who looks along +y.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from nerf.rays import Rays, pixels_to_rays


def normalize(vector: np.ndarray) -> np.ndarray:
    """vector [..., 3] at length 1."""
    return vector / np.linalg.norm(vector, axis=-1, keepdims=True)


def view_matrix(backward: np.ndarray, up: np.ndarray, position: np.ndarray) -> np.ndarray:
    """c2w [3, 4] of a camera at ``position`` looking against ``backward``, ``up`` about upwards."""
    z = normalize(backward)
    x = normalize(np.cross(up, z))
    y = normalize(np.cross(z, x))
    return np.stack([x, y, z, position], axis=1)


def look_at(position: np.ndarray, target: np.ndarray, up=(0.0, 0.0, 1.0)) -> np.ndarray:
    """c2w [3, 4] of a camera at ``position`` that sees ``target`` in its middle."""
    position = np.asarray(position, dtype=np.float64)
    return view_matrix(position - np.asarray(target), np.asarray(up), position)


def orbit_path(num_views: int = 40, elevation_deg: float = 30.0, radius: float = 4.0) -> np.ndarray:
    """A full turn around the world's z axis, looking at the origin -> [V, 3, 4].

    The path nerf-pytorch renders for Blender scenes: azimuth -180 to 180 degrees, evenly spaced.
    """
    azimuth = np.linspace(-np.pi, np.pi, num_views + 1)[:-1]
    elevation = np.radians(elevation_deg)
    # Azimuth 0 lies on +y and turns towards +x, as the transform chain of the original does.
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
    """The mean camera of c2w [V, 3, 4] -> [3, 4]: mean position, mean viewing and up direction."""
    return view_matrix(c2w[:, :, 2].sum(0), c2w[:, :, 1].sum(0), c2w[:, :, 3].mean(0))


def homogeneous(c2w: np.ndarray) -> np.ndarray:
    """[..., 3, 4] -> [..., 4, 4] with the last row 0 0 0 1."""
    row = np.broadcast_to(np.array([0.0, 0.0, 0.0, 1.0]), (*c2w.shape[:-2], 1, 4))
    return np.concatenate([c2w, row], axis=-2)


def recenter(c2w: np.ndarray) -> np.ndarray:
    """Poses [V, 3, 4] in the frame of their average camera."""
    to_center = np.linalg.inv(homogeneous(average_pose(c2w)))
    return (to_center @ homogeneous(c2w))[:, :3]


def spiral_path(c2w: np.ndarray, near: float, far: float, num_views: int = 120) -> np.ndarray:
    """Two turns of a spiral around the average camera of c2w [V, 3, 4] -> [num_views, 3, 4].

    LLFF's preview path: radii from the 90th percentile of the camera positions, looking at a depth
    between 0.9 near and 5 far, harmonically weighted 1 : 3.
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
    """The point [3] with the least squared distance to all optical axes of c2w [V, 3, 4]."""
    axis, position = c2w[:, :, 2], c2w[:, :, 3]
    across = np.eye(3) - axis[:, :, None] * axis[:, None, :]  # projects an axis' direction out
    # LLFF weighs each camera by (A^T A) on the left and A on the right; A is a projection.
    return np.linalg.solve(across.mean(0), (across @ position[..., None]).mean(0))[:, 0]


def spherify(
    c2w: np.ndarray, bounds: np.ndarray, num_views: int = 120
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Inward-facing poses [V, 3, 4] on a unit sphere, a circle of preview poses, scaled bounds.

    The origin is where the optical axes nearly meet, z points to the mean camera and the mean
    squared camera distance is 1 (LLFF's ``spherify``). bounds: any array of distances.
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
        # "down" is +z here, as in LLFF: cameras hang above the scene along the mean direction.
        _inward(np.array([radius * np.cos(theta), radius * np.sin(theta), height]))
        for theta in np.linspace(0.0, 2.0 * np.pi, num_views)
    ]
    return poses, np.stack(path), bounds * scale


def _inward(position: np.ndarray) -> np.ndarray:
    z = normalize(position)
    x = normalize(np.cross(z, [0.0, 0.0, -1.0]))
    y = normalize(np.cross(z, x))
    return np.stack([x, y, z, position], axis=1)


class OrbitCameras(NamedTuple):
    """V cameras that look about at the origin."""

    c2w: Tensor  # [V, 3, 4]
    fov_deg: Tensor  # [V] vertical field of view
    azimuth_deg: Tensor  # [V]
    elevation_deg: Tensor  # [V]

    def part(self, index) -> "OrbitCameras":
        """The cameras at ``index``."""
        return OrbitCameras(*(member[index] for member in self))

    def rays(self, height: int, width: int) -> Rays:
        """Rays [V * H * W] through the pixels' centres, view by view, row by row."""
        device, num_views = self.c2w.device, len(self.c2w)
        focal = 0.5 * height / torch.tan(torch.deg2rad(self.fov_deg) / 2)
        center = torch.tensor([width / 2, height / 2], device=device).expand(num_views, 2)
        intrinsics = torch.cat([focal[:, None].expand(-1, 2), center], dim=-1)  # [V, 4]
        y, x = torch.meshgrid(
            torch.arange(height, device=device), torch.arange(width, device=device), indexing="ij"
        )
        rays = pixels_to_rays(
            x.float(),
            y.float(),
            intrinsics[:, None, None],
            self.c2w[:, None, None],
            (1e-2, 1e3),  # the scene's box decides
            pixel_center=True,
        )
        return Rays(*(member.reshape(-1, member.shape[-1]) for member in rays))


class OrbitRanges(NamedTuple):
    """Where random cameras stand (DreamFusion, section 3.2). Distances in scene units."""

    azimuth_deg: tuple[float, float] = (-180.0, 180.0)
    elevation_deg: tuple[float, float] = (-10.0, 90.0)
    radius: tuple[float, float] = (1.0, 1.5)
    fov_deg: tuple[float, float] = (40.0, 70.0)
    sphere_rate: float = 0.5  # of elevations even by area; the others are even by angle
    jitter_position: float = 0.1  # largest shift along each axis
    jitter_target: float = 0.2  # deviation of what is looked at
    jitter_up: float = 0.02
    settle: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None  # moves both angles


def orbit_cameras(
    azimuth_deg: Tensor,
    elevation_deg: Tensor,
    radius: Tensor,
    fov_deg: Tensor,
    *,
    shift: Tensor | float = 0.0,
    target: Tensor | float = 0.0,
    tilt: Tensor | float = 0.0,
) -> OrbitCameras:
    """Cameras at these places [V]; shift, target and tilt [V, 3] move position, aim and up."""
    azimuth, elevation = torch.deg2rad(azimuth_deg), torch.deg2rad(elevation_deg)
    flat = torch.cos(elevation)
    outward = torch.stack(
        [flat * torch.sin(azimuth), flat * torch.cos(azimuth), torch.sin(elevation)], dim=-1
    )
    position = radius[:, None] * outward + shift
    backward = torch.nn.functional.normalize(position - target, dim=-1)
    # At the pole "up" is away from the viewer, as it is just before it.
    towards = torch.stack([-torch.sin(azimuth), -torch.cos(azimuth), 0 * azimuth], dim=-1)
    up = (
        towards * torch.sin(elevation)[:, None]
        + outward.new_tensor([0.0, 0.0, 1.0]) * flat[:, None]
    )
    right = torch.nn.functional.normalize(torch.linalg.cross(up + tilt, backward, dim=-1), dim=-1)
    upward = torch.linalg.cross(backward, right, dim=-1)
    c2w = torch.stack([right, upward, backward, position], dim=-1)
    return OrbitCameras(c2w, fov_deg, azimuth_deg, elevation_deg)


def random_orbit_cameras(
    num_views: int, ranges: OrbitRanges, generator: torch.Generator
) -> OrbitCameras:
    """Random cameras; their azimuths are spread evenly over the range."""
    options = {"generator": generator, "device": generator.device}

    def between(limits, place) -> Tensor:
        return limits[0] + (limits[1] - limits[0]) * place

    def uniform(*size) -> Tensor:
        return torch.rand(num_views, *size, **options)

    # A common turn keeps a view's number, and so its rank, from deciding where it looks from.
    strata = torch.arange(num_views, device=generator.device) + uniform()
    turn = torch.rand(1, **options)
    azimuth = between(ranges.azimuth_deg, (strata / num_views + turn) % 1.0)
    by_angle = between(ranges.elevation_deg, uniform())
    sine = torch.sin(torch.deg2rad(torch.tensor(ranges.elevation_deg)))
    by_area = torch.rad2deg(torch.asin(between(sine.tolist(), uniform())))
    elevation = torch.where(uniform() < ranges.sphere_rate, by_area, by_angle)
    if ranges.settle is not None:
        azimuth, elevation = ranges.settle(azimuth, elevation)
    radius, fov = between(ranges.radius, uniform()), between(ranges.fov_deg, uniform())
    return orbit_cameras(
        azimuth,
        elevation,
        radius,
        fov,
        shift=ranges.jitter_position * (2 * uniform(3) - 1),
        target=ranges.jitter_target * torch.randn(num_views, 3, **options),
        tilt=ranges.jitter_up * torch.randn(num_views, 3, **options),
    )
