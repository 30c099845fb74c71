"""Rays, and how pixels become rays.

Axes: the world is right-handed. A camera looks along its own -z, x points right, y up (OpenGL and
Blender). ``c2w`` [3, 4] maps camera to world; its last column is the camera's position.
Pixels: (x, y) counts columns and rows from the top left. By default a ray passes through the
pixel's corner, as in nerf-pytorch; ``pixel_center`` moves it to the pixel's middle (+0.5).
Distance: directions are not normalized. Their z in camera axes is -1, so t is depth along the
camera's axis, in scene units. Fisheye cameras have directions of length 1, so t is distance. In
normalized device coordinates (NDC) t runs from 0 (near plane) to 1 (infinity).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from nerf import lenses


class Rays(NamedTuple):
    """A batch of rays r(t) = origin + t direction; all members have the same leading dimensions."""

    origins: Tensor  # [..., 3]
    directions: Tensor  # [..., 3], not normalized
    viewdirs: Tensor  # [..., 3], unit length, in world axes even if the rest is NDC
    near: Tensor  # [..., 1] smallest t
    far: Tensor  # [..., 1] largest t

    def part(self, index: slice | Tensor) -> "Rays":
        """The rays at ``index`` (slice, mask or indices) of the first dimension."""
        return Rays(*(member[index] for member in self))


def pixel_directions(x: Tensor, y: Tensor, intrinsics: Tensor, pixel_center: bool) -> Tensor:
    """Directions [..., 3] in camera axes of the rays through pixels x, y [...].

    intrinsics [..., 4] holds fx, fy, cx, cy in pixels; [..., 4 + LENS] adds a lens
    (``nerf.lenses``). z is -1, except that directions through fisheye lenses have length 1.
    """
    fx, fy, cx, cy = intrinsics[..., :4].unbind(-1)
    shift = 0.5 if pixel_center else 0.0
    if intrinsics.shape[-1] > 4:
        plane = torch.stack([(x + shift - cx) / fx, (y + shift - cy) / fy], dim=-1)
        opencv = lenses.directions(plane, intrinsics[..., 4:])  # y down, z forward
        return torch.cat([opencv[..., :1], -opencv[..., 1:]], dim=-1)
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

    intrinsics [..., 4], or with a lens [..., 4 + LENS]; bounds: (near, far) in units of t.
    """
    local = pixel_directions(x, y, intrinsics, pixel_center)
    # A sum rather than a matmul: autocast must never round a direction to bfloat16.
    directions = (local[..., None, :] * c2w[..., :3]).sum(-1)  # [..., 3]
    origins = c2w[..., 3].expand_as(directions)
    viewdirs = directions / directions.norm(dim=-1, keepdim=True)
    near, far = (torch.full_like(directions[..., :1], bound) for bound in bounds)
    return Rays(origins, directions, viewdirs, near, far)


def rays_to_ndc(rays: Rays, height: int, width: int, intrinsics: Tensor) -> Rays:
    """Forward-facing world rays in normalized device coordinates (NeRF, appendix C).

    The near plane is z = -1: t = 0 of the result lies on it, t = 1 at infinity. intrinsics
    [..., 4]; the principal point is assumed to be the image's center.
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
    """World positions [..., 3] of points [..., 3] in NDC, where z = 1 is infinity.

    The inverse of ``rays_to_ndc``; intrinsics [4]. x and y keep their sign and z changes it, so
    the map mirrors.
    """
    z = 2.0 / (points[..., 2] - 1.0)
    x = -points[..., 0] * z * width / (2.0 * intrinsics[0])
    y = -points[..., 1] * z * height / (2.0 * intrinsics[1])
    return torch.stack([x, y, z], dim=-1)
