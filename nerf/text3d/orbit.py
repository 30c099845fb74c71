"""Random and evenly spaced cameras on orbits around an object at the origin.

c2w [3, 4], conventions of ``nerf.rays``. Orbits run around the world's z axis. Azimuth 0 lies on +y
and turns towards +x, so 90 degrees sees the right side of someone who looks along +y.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from nerf.rays import Rays, pixels_to_rays
from nerf.training.system import upload


class OrbitCameras(NamedTuple):
    """V cameras that look approximately at the origin."""

    c2w: Tensor  # [V, 3, 4]
    fov_deg: Tensor  # [V] vertical field of view
    azimuth_deg: Tensor  # [V], on the CPU where the view words are chosen
    elevation_deg: Tensor  # [V], as azimuth_deg

    def part(self, index: slice | Tensor) -> "OrbitCameras":
        """The cameras at ``index`` (slice, mask or indices)."""
        return OrbitCameras(*(member[index] for member in self))

    def on(self, device: torch.device) -> "OrbitCameras":
        """The cameras with what rays need on ``device``; angles stay, they choose view words."""
        return self._replace(c2w=upload(self.c2w, device), fov_deg=upload(self.fov_deg, device))

    def rays(self, height: int, width: int) -> Rays:
        """Rays [V * H * W] through the pixels' centers, ordered by view, then row, then column."""
        device = self.c2w.device
        focal = 0.5 * height / torch.tan(torch.deg2rad(self.fov_deg) / 2)
        center = torch.full_like(focal, width / 2), torch.full_like(focal, height / 2)
        intrinsics = torch.stack([focal, focal, *center], dim=-1)  # [V, 4]
        y, x = torch.meshgrid(
            torch.arange(height, device=device), torch.arange(width, device=device), indexing="ij"
        )
        rays = pixels_to_rays(
            x.float(),
            y.float(),
            intrinsics[:, None, None],
            self.c2w[:, None, None],
            (1e-2, 1e3),  # the object's cube is always in between
            pixel_center=True,
        )
        return Rays(*(member.reshape(-1, member.shape[-1]) for member in rays))


class OrbitRanges(NamedTuple):
    """Distribution of random cameras (DreamFusion, section 3.2). Distances in scene units."""

    azimuth_deg: tuple[float, float] = (-180.0, 180.0)
    elevation_deg: tuple[float, float] = (-10.0, 90.0)
    radius: tuple[float, float] = (1.0, 1.5)
    fov_deg: tuple[float, float] = (40.0, 70.0)
    sphere_rate: float = 0.5  # share of elevations uniform on the sphere; others uniform in angle
    jitter_position: float = 0.1  # of the position, uniform along each axis up to this
    jitter_target: float = 0.2  # standard deviation of the point looked at
    jitter_up: float = 0.02  # standard deviation of the up vector
    # Replaces azimuths and elevations [V] in degrees, for example nearer to the center of a view.
    settle: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None


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
    """Cameras at spherical coordinates [V] around the origin that look at ``target``.

    shift, target, tilt [V, 3] or a number: added to the position, the origin and the up vector.
    """
    azimuth, elevation = torch.deg2rad(azimuth_deg), torch.deg2rad(elevation_deg)
    flat = torch.cos(elevation)
    outward = torch.stack(
        [flat * torch.sin(azimuth), flat * torch.cos(azimuth), torch.sin(elevation)], dim=-1
    )
    position = radius[:, None] * outward + shift
    backward = torch.nn.functional.normalize(position - target, dim=-1)
    # Up is the direction of rising elevation, which has a limit at the poles.
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
    """Random cameras [num_views]; their azimuths are stratified over the range."""
    device = generator.device

    def between(limits: Sequence[float], fraction: Tensor) -> Tensor:
        return limits[0] + (limits[1] - limits[0]) * fraction

    def uniform(*size: int) -> Tensor:
        return torch.rand(num_views, *size, generator=generator, device=device)

    def normal(*size: int) -> Tensor:
        return torch.randn(num_views, *size, generator=generator, device=device)

    # A common random turn makes azimuths independent of a view's number, and so of its rank.
    strata = torch.arange(num_views, device=device) + uniform()
    turn = torch.rand(1, generator=generator, device=device)
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
        target=ranges.jitter_target * normal(3),
        tilt=ranges.jitter_up * normal(3),
    )
