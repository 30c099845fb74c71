"""nerf.cameras: preview paths and frames of reference, against plain matrices and their purpose."""

import numpy as np
import pytest

from nerf.cameras import (
    average_pose,
    homogeneous,
    look_at,
    nearest_point_to_axes,
    orbit_path,
    recenter,
    spherify,
    spiral_path,
)

EXACT = {"rtol": 0, "atol": 1e-12}  # float64, numbers up to about 10


def assert_rotations(c2w):
    rotation = c2w[:, :, :3]
    identity = np.broadcast_to(np.eye(3), rotation.shape)
    np.testing.assert_allclose(rotation.swapaxes(1, 2) @ rotation, identity, **EXACT)
    np.testing.assert_allclose(np.linalg.det(rotation), 1, **EXACT)


def around(target, count=12, seed=0, spread=0.0):
    """Cameras [V, 3, 4] on one side of ``target`` that look at it, or past it by ``spread``."""
    random = np.random.default_rng(seed)
    places = random.normal(size=(count, 3)) + [0.0, -4.0, 2.0] + target
    targets = target + spread * random.normal(size=(count, 3))
    return np.stack([look_at(p, t) for p, t in zip(places, targets, strict=True)])


def moved(c2w, seed=1):
    """The same cameras in another world: rotated and shifted."""
    rotation, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(3, 3)))
    rotation *= np.sign(np.linalg.det(rotation))
    out = rotation @ c2w
    out[:, :, 3] += [1.0, -2.0, 3.0]
    return out


def test_look_at_sees_its_target_in_the_middle_with_up_upwards():
    random = np.random.default_rng(0)
    for position, target in random.normal(size=(20, 2, 3)):
        c2w = look_at(position, target)
        assert_rotations(c2w[None])
        np.testing.assert_allclose(c2w[:, 3], position, **EXACT)
        local = c2w[:, :3].T @ (target - position)
        np.testing.assert_allclose(local, [0, 0, -np.linalg.norm(target - position)], **EXACT)
        assert c2w[2, 1] > 0  # y points up
        assert abs(c2w[2, 0]) < 1e-12  # x is level


def pose_spherical(theta_deg, phi_deg, radius):
    """nerf-pytorch's chain, matrix by matrix."""
    phi, theta = np.radians(phi_deg), np.radians(theta_deg)
    move = np.eye(4)
    move[2, 3] = radius
    tilt = np.eye(4)
    tilt[1:3, 1:3] = [[np.cos(phi), -np.sin(phi)], [np.sin(phi), np.cos(phi)]]
    c, s = np.cos(theta), np.sin(theta)
    turn = np.array([[c, 0, -s, 0], [0, 1, 0, 0], [s, 0, c, 0], [0, 0, 0, 1]])
    swap = np.array([[-1, 0, 0, 0], [0, 0, 1, 0], [0, 1, 0, 0], [0, 0, 0, 1]])
    return (swap @ turn @ tilt @ move)[:3]


def test_orbit_is_nerf_pytorchs_chain_of_matrices():
    angles = np.linspace(-180, 180, 41)[:-1]
    expected = np.stack([pose_spherical(angle, -30.0, 4.0) for angle in angles])
    np.testing.assert_allclose(orbit_path(), expected, **EXACT)
    wide = np.stack([pose_spherical(angle, -10.0, 2.5) for angle in (-180, -90, 0, 90)])
    np.testing.assert_allclose(orbit_path(4, 10.0, 2.5), wide, **EXACT)


def test_average_pose_of_one_camera_is_that_camera():
    c2w = moved(around(np.zeros(3), count=1))
    np.testing.assert_allclose(average_pose(c2w), c2w[0], **EXACT)


def test_recenter_makes_the_average_pose_the_identity():
    c2w = moved(around(np.zeros(3)))
    found = recenter(c2w)
    np.testing.assert_allclose(average_pose(found), np.eye(4)[:3], **EXACT)
    assert_rotations(found)


def test_recenter_keeps_cameras_relative_to_one_another():
    def seen_from_the_first(c2w):
        return np.linalg.inv(homogeneous(c2w[0])) @ homogeneous(c2w)

    c2w = moved(around(np.zeros(3)))
    found, expected = seen_from_the_first(recenter(c2w)), seen_from_the_first(c2w)
    np.testing.assert_allclose(found, expected, **EXACT)


def test_nearest_point_is_where_axes_meet():
    target = np.array([0.3, -0.2, 0.5])
    np.testing.assert_allclose(nearest_point_to_axes(around(target)), target, rtol=0, atol=1e-9)


def test_nearest_point_has_the_least_squared_distance():
    c2w = around(np.zeros(3), spread=0.2)

    def distance(point):
        offset = point - c2w[:, :, 3]
        along = (offset * c2w[:, :, 2]).sum(-1, keepdims=True) * c2w[:, :, 2]
        return ((offset - along) ** 2).sum()

    best = nearest_point_to_axes(c2w)
    for step in 1e-3 * np.concatenate([np.eye(3), -np.eye(3)]):
        assert distance(best + step) > distance(best)


# ------------------------------------------------------------------------------------ spherify


def spherified():
    c2w = moved(around(np.array([0.5, 0.5, 0.5]), spread=0.1))
    return c2w, *spherify(c2w, np.array([1.0, 8.0]), 24)


def test_spherify_puts_cameras_on_a_unit_sphere_looking_inward():
    _, poses, _, _ = spherified()
    places, forward = poses[:, :, 3], -poses[:, :, 2]
    assert_rotations(poses)
    assert (places**2).sum(-1).mean() == pytest.approx(1, abs=1e-12)
    np.testing.assert_allclose(nearest_point_to_axes(poses), np.zeros(3), rtol=0, atol=1e-9)
    assert ((places * forward).sum(-1) < 0).all()
    np.testing.assert_allclose(places.mean(0)[:2], 0, rtol=0, atol=1e-9)
    assert places.mean(0)[2] > 0


def test_spherify_is_a_similarity_and_bounds_follow_it():
    before, after, _, bounds = spherified()

    def distances(c2w):
        return np.linalg.norm(c2w[:, None, :, 3] - c2w[None, :, :, 3], axis=-1)

    scale = distances(after).sum() / distances(before).sum()
    np.testing.assert_allclose(distances(after), scale * distances(before), **EXACT)
    np.testing.assert_allclose(bounds, scale * np.array([1.0, 8.0]), **EXACT)
    turns = after[:, :, :3] @ before[:, :, :3].swapaxes(1, 2)
    np.testing.assert_allclose(turns, np.broadcast_to(turns[0], turns.shape), **EXACT)


def test_spherify_path_is_a_unit_circle_that_looks_at_the_origin():
    _, poses, path, _ = spherified()
    assert path.shape == (24, 3, 4)
    assert_rotations(path)
    np.testing.assert_allclose(np.linalg.norm(path[:, :, 3], axis=-1), 1, **EXACT)
    np.testing.assert_allclose(path[:, 2, 3], poses[:, 2, 3].mean(), **EXACT)
    np.testing.assert_allclose(path[:, :, 2], path[:, :, 3], **EXACT)  # backward = outward


def unit(vector):
    return vector / np.linalg.norm(vector)


def test_spherify_is_nerf_pytorchs_step_by_step():
    c2w, poses, path, bounds = spherified()
    # The point nearest to all axes, solved as a plain least-squares problem.
    across = [np.eye(3) - np.outer(c[:, 2], c[:, 2]) for c in c2w]
    offsets = [a @ c[:, 3] for a, c in zip(across, c2w, strict=True)]
    center = np.linalg.lstsq(np.concatenate(across), np.concatenate(offsets), rcond=None)[0]
    up = unit((c2w[:, :, 3] - center).mean(0))
    first = unit(np.cross([0.1, 0.2, 0.3], up))
    frame = np.eye(4)
    frame[:3] = np.stack([first, unit(np.cross(up, first)), up, center], axis=1)
    reset = np.stack([np.linalg.inv(frame) @ homogeneous(c) for c in c2w])[:, :3]
    scale = 1 / np.sqrt(np.mean(np.sum(reset[:, :, 3] ** 2, -1)))
    reset[:, :, 3] *= scale
    np.testing.assert_allclose(poses, reset, rtol=0, atol=1e-9)
    np.testing.assert_allclose(bounds, scale * np.array([1.0, 8.0]), rtol=0, atol=1e-9)
    height = reset[:, :, 3].mean(0)[2]
    radius = np.sqrt(1 - height**2)
    for found, theta in zip(path, np.linspace(0, 2 * np.pi, 24), strict=True):
        place = np.array([radius * np.cos(theta), radius * np.sin(theta), height])
        side = unit(np.cross(unit(place), [0, 0, -1.0]))
        expected = np.stack([side, unit(np.cross(unit(place), side)), unit(place), place], axis=1)
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-9)


# -------------------------------------------------------------------------------------- spiral


def test_spiral_poses_are_rotations_that_look_at_one_point():
    c2w = recenter(moved(around(np.zeros(3), spread=0.5)))
    path = spiral_path(c2w, near=1.2, far=9.0, num_views=30)
    assert path.shape == (30, 3, 4)
    assert_rotations(path)
    focus = 1 / (0.25 / (0.9 * 1.2) + 0.75 / (5 * 9.0))
    np.testing.assert_allclose(
        nearest_point_to_axes(path), average_pose(c2w) @ [0, 0, -focus, 1], rtol=0, atol=1e-9
    )


def test_spiral_winds_twice_within_its_radii():
    c2w = recenter(moved(around(np.zeros(3), spread=0.5)))
    places = spiral_path(c2w, near=1.2, far=9.0, num_views=40)[:, :, 3]
    radii = np.percentile(np.abs(c2w[:, :, 3]), 90, axis=0)
    assert (np.abs(places) <= radii + 1e-12).all()
    np.testing.assert_allclose(places[:20, :2], places[20:, :2], **EXACT)  # x, y: twice around
    np.testing.assert_allclose(places[:20, 2], -places[20:, 2], **EXACT)  # z: once
