"""Rays, and how pixels become rays.

Axes: the world is right-handed. A camera looks along its own -z, x points right, y up (OpenGL and
Blender). ``c2w`` [3, 4] maps camera to world, its last column is the camera's position.
Pixels: (x, y) counts columns and rows from the top left. By default a ray passes through the
pixel's corner, as nerf-pytorch has it; ``pixel_center`` moves it to the middle (+0.5).
Distance: directions are not normalized. Their camera-z is -1, so t is depth along the camera's
axis, in scene units; behind fisheye lenses they have length 1, so t is distance. In normalized
device coordinates (NDC) t runs from 0 (near) to 1 (infinity).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from nerf import lenses


class Rays(NamedTuple):
    """A batch of rays; every member has the same leading dimensions."""

    origins: Tensor  # [..., 3]
    directions: Tensor  # [..., 3], not normalized
    viewdirs: Tensor  # [..., 3], unit, in world axes also when origins and directions are NDC
    near: Tensor  # [..., 1] first t
    far: Tensor  # [..., 1] last t

    def part(self, index) -> "Rays":
        """The rays at ``index`` (a slice, mask or index tensor) of the leading dimension."""
        return Rays(*(member[index] for member in self))


def pixel_directions(x: Tensor, y: Tensor, intrinsics: Tensor, pixel_center: bool) -> Tensor:
    """Directions in camera axes with z = -1: x, y [...] pixels; intrinsics [..., 4] -> [..., 3].

    intrinsics holds fx, fy, cx, cy in pixels, and with 4 + LENS numbers a lens (``nerf.lenses``).
    """
    fx, fy, cx, cy = intrinsics[..., :4].unbind(-1)
    shift = 0.5 if pixel_center else 0.0
    if intrinsics.shape[-1] > 4:
        plane = torch.stack([(x + shift - cx) / fx, (y + shift - cy) / fy], dim=-1)
        seen = lenses.directions(plane, intrinsics[..., 4:])
        return seen * seen.new_tensor([1.0, -1.0, -1.0])
    return torch.stack(
        [(x + shift - cx) / fx, -(y + shift - cy) / fy, -torch.ones_like(x + cx)], dim=-1
    )


def pixels_to_rays(
    x: Tensor,
    y: Tensor,
    intrinsics: Tensor,
    c2w: Tensor,
    bounds: tuple[float, float],
    *,
    pixel_center: bool = False,
) -> Rays:
    """World-space rays through pixels x, y [...] of cameras c2w [..., 3, 4].

    intrinsics [..., 4], or with a lens [..., 4 + LENS]. ``bounds`` is (near, far) in units of t.
    """
    local = pixel_directions(x, y, intrinsics, pixel_center)
    # A sum rather than a matmul: autocast must never round a direction to 8 bits.
    directions = (local[..., None, :] * c2w[..., :3]).sum(-1)  # [..., 3]
    origins = c2w[..., 3].expand_as(directions)
    viewdirs = directions / directions.norm(dim=-1, keepdim=True)
    near, far = (torch.full_like(directions[..., :1], bound) for bound in bounds)
    return Rays(origins, directions, viewdirs, near, far)


def rays_to_ndc(rays: Rays, height: int, width: int, intrinsics: Tensor) -> Rays:
    """Forward-facing world rays in normalized device coordinates (NeRF, appendix C).

    The near plane is at z = -1. Afterwards t = 0 lies on it and t = 1 at infinity. intrinsics
    [..., 4]; the principal point is taken to be the picture's center.
    """
    fx, fy = intrinsics[..., 0], intrinsics[..., 1]
    origins, directions = rays.origins, rays.directions
    to_plane = -(1.0 + origins[..., 2]) / directions[..., 2]
    origins = origins + to_plane[..., None] * directions
    ox, oy, oz = origins.unbind(-1)
    dx, dy, dz = directions.unbind(-1)
    scale_x, scale_y = -2.0 * fx / width, -2.0 * fy / height
    ndc_origins = torch.stack([scale_x * ox / oz, scale_y * oy / oz, 1.0 + 2.0 / oz], dim=-1)
    ndc_directions = torch.stack(
        [scale_x * (dx / dz - ox / oz), scale_y * (dy / dz - oy / oz), -2.0 / oz], dim=-1
    )
    return rays._replace(
        origins=ndc_origins,
        directions=ndc_directions,
        near=torch.zeros_like(rays.near),
        far=torch.ones_like(rays.far),
    )


def ndc_to_world(points: Tensor, height: int, width: int, intrinsics: Tensor) -> Tensor:
    """Points [..., 3] in normalized device coordinates back in the world; z = 1 is infinity.

    The inverse of ``rays_to_ndc``; intrinsics [4]. Left and right, up and down stay as they are,
    depth runs the other way: the map mirrors.
    """
    z = 2.0 / (points[..., 2] - 1.0)
    x = -points[..., 0] * z * width / (2.0 * intrinsics[0])
    y = -points[..., 1] * z * height / (2.0 * intrinsics[1])
    return torch.stack([x, y, z], dim=-1)
