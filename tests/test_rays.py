"""nerf.rays: pixels to rays and back, axes, and normalized device coordinates."""

import numpy as np
import pytest
import torch

from nerf.cameras import look_at
from nerf.rays import pixel_directions, pixels_to_rays, rays_to_ndc

INTRINSICS = torch.tensor([40.0, 44.0, 15.0, 17.0], dtype=torch.float64)
BOUNDS = (2.0, 6.0)
EXACT = {"rtol": 0, "atol": 1e-9}  # all in float64, numbers up to about 100


def some_pixels(count=50, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.rand(2, count, generator=generator, dtype=torch.float64) * 32
    t = 0.5 + 5 * torch.rand(count, 1, generator=generator, dtype=torch.float64)
    return x, y, t


def some_cameras(count=50, seed=0):
    random = np.random.default_rng(seed)
    places, targets = random.normal(size=(2, count, 3)) + [[[0.0, 0.0, 3.0]], [[0.0, 0.0, 0.0]]]
    return torch.tensor(np.stack([look_at(p, t) for p, t in zip(places, targets, strict=True)]))


def project(points, c2w, intrinsics):
    """World points [B, 3] -> pixel coordinates, written from the pinhole model."""
    local = torch.einsum("bji,bj->bi", c2w[:, :, :3], points - c2w[:, :, 3])
    fx, fy, cx, cy = intrinsics
    return fx * local[:, 0] / -local[:, 2] + cx, cy - fy * local[:, 1] / -local[:, 2]


@pytest.mark.parametrize(("pixel_center", "shift"), [(False, 0.0), (True, 0.5)])
def test_a_point_on_a_pixels_ray_projects_to_that_pixel(pixel_center, shift):
    x, y, t = some_pixels()
    c2w = some_cameras()
    rays = pixels_to_rays(x, y, INTRINSICS, c2w, BOUNDS, pixel_center=pixel_center)
    back_x, back_y = project(rays.origins + t * rays.directions, c2w, INTRINSICS)
    torch.testing.assert_close(back_x, x + shift, **EXACT)
    torch.testing.assert_close(back_y, y + shift, **EXACT)


def test_camera_looks_along_minus_z_with_x_right_and_row_0_on_top():
    x = torch.tensor([15.0, 31.0, 15.0], dtype=torch.float64)
    y = torch.tensor([17.0, 17.0, 0.0], dtype=torch.float64)
    c2w = torch.eye(4, dtype=torch.float64)[:3]
    middle, right, top = pixels_to_rays(x, y, INTRINSICS, c2w, BOUNDS).directions
    assert middle.tolist() == [0, 0, -1]
    assert right[0] > 0 and right[1] == 0
    assert top[1] > 0 and top[0] == 0


def test_pixel_center_is_half_a_pixel():
    x, y, _ = some_pixels()
    centered = pixel_directions(x, y, INTRINSICS, True)
    shifted = pixel_directions(x + 0.5, y + 0.5, INTRINSICS, False)
    torch.testing.assert_close(centered, shifted, **EXACT)
    assert (centered - pixel_directions(x, y, INTRINSICS, False)).abs().min(0).values[0] > 0


def test_t_is_depth_along_the_cameras_axis():
    x, y, _ = some_pixels()
    c2w = some_cameras()
    rays = pixels_to_rays(x, y, INTRINSICS, c2w, BOUNDS)
    depth = -(rays.directions * c2w[:, :, 2]).sum(-1)
    torch.testing.assert_close(depth, torch.ones_like(depth), **EXACT)
    torch.testing.assert_close(rays.origins, c2w[:, :, 3], rtol=0, atol=0)
    assert (rays.near == 2).all() and (rays.far == 6).all() and rays.near.shape == (50, 1)


def test_viewdirs_are_unit_directions():
    x, y, _ = some_pixels()
    rays = pixels_to_rays(x, y, INTRINSICS, some_cameras(), BOUNDS)
    length = rays.directions.norm(dim=-1, keepdim=True)
    torch.testing.assert_close(rays.viewdirs * length, rays.directions, **EXACT)
    torch.testing.assert_close(rays.viewdirs.norm(dim=-1), torch.ones(50).double(), **EXACT)


def test_one_camera_serves_many_pixels_as_many_copies_do():
    x, y, _ = some_pixels()
    c2w = some_cameras(1)
    one = pixels_to_rays(x, y, INTRINSICS, c2w[0], BOUNDS)
    many = pixels_to_rays(x, y, INTRINSICS.expand(50, 4), c2w.expand(50, 3, 4), BOUNDS)
    for a, b in zip(one, many, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_part_keeps_members_together():
    x, y, _ = some_pixels()
    rays = pixels_to_rays(x, y, INTRINSICS, some_cameras(), BOUNDS)
    index = torch.tensor([7, 3, 3])
    for whole, part in zip(rays, rays.part(index), strict=True):
        assert torch.equal(whole[index], part)


# ------------------------------------------------------------------------------------------ NDC

HEIGHT, WIDTH = 30, 40


def forward_facing():
    """Rays of cameras near the origin that look roughly along -z, in the world and in NDC."""
    generator = torch.Generator().manual_seed(3)
    x = torch.rand(50, generator=generator, dtype=torch.float64) * WIDTH
    y = torch.rand(50, generator=generator, dtype=torch.float64) * HEIGHT
    c2w = torch.eye(4, dtype=torch.float64)[:3].repeat(50, 1, 1)
    c2w[:, :, 3] = 0.3 * torch.randn(50, 3, generator=generator, dtype=torch.float64)
    intrinsics = torch.tensor([50.0, 55.0, WIDTH / 2, HEIGHT / 2], dtype=torch.float64)
    rays = pixels_to_rays(x, y, intrinsics, c2w, (0.0, 1.0))
    return rays, rays_to_ndc(rays, HEIGHT, WIDTH, intrinsics), intrinsics


def to_ndc(points, intrinsics):
    """The paper's projection (appendix C, eq. 19) with the near plane at n = 1."""
    x, y, z = points.unbind(-1)
    fx, fy = intrinsics[:2]
    return torch.stack([-fx / (WIDTH / 2) * x / z, -fy / (HEIGHT / 2) * y / z, 1 + 2 / z], -1)


def test_ndc_point_is_the_projected_world_point():
    rays, ndc, intrinsics = forward_facing()
    on_plane = rays.origins + (-1 - rays.origins[:, 2:]) / rays.directions[:, 2:] * rays.directions
    for t in (0.0, 0.1, 1.0, 10.0, 1000.0):
        points = on_plane + t * rays.directions
        t_ndc = 1 - on_plane[:, 2:] / points[:, 2:]  # eq. 23: t' = 1 - o_z / (o_z + t d_z)
        found = ndc.origins + t_ndc * ndc.directions
        torch.testing.assert_close(found, to_ndc(points, intrinsics), **EXACT)


def test_ndc_runs_from_the_near_plane_to_infinity():
    rays, ndc, intrinsics = forward_facing()
    torch.testing.assert_close(ndc.origins[:, 2], -torch.ones(50).double(), **EXACT)
    assert (ndc.near == 0).all() and (ndc.far == 1).all()
    distant = to_ndc(rays.origins + 1e12 * rays.directions, intrinsics)
    torch.testing.assert_close(ndc.origins + ndc.directions, distant, **EXACT)
    torch.testing.assert_close(distant[:, 2], torch.ones(50).double(), **EXACT)


def test_ndc_leaves_viewdirs_in_world_axes():
    rays, ndc, _ = forward_facing()
    assert torch.equal(rays.viewdirs, ndc.viewdirs)
