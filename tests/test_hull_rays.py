"""Training rays that may meet the visual hull (--hull_rays)."""

from dataclasses import replace

import make_demo
import pytest
import torch
from helpers import FAST_TINY, assert_same_training, newest, run_main

import run_nerf
from nerf import build
from nerf.flags import nerf as nerf_flags
from nerf.occupancy import OccupancyGrid
from nerf.scene_bounds import carve, hull_scene, scene_space


@pytest.fixture(scope="module")
def scene(data):
    return build.load_scene(nerf_flags.parse(["--datadir", str(data), "--dataset_type", "blender"]))


def hull_of(scene, resolution=24):
    grid = OccupancyGrid(resolution)
    space = scene_space(scene, 400, bound=0.0, contract=False, cone_angle=0.0)
    return grid, carve(scene, grid, space)[0]


@pytest.mark.parametrize("centers", [True, False])
@pytest.mark.parametrize("zoom", [0.3, 1.0, 2.5])  # with 2.5 the frame cuts through the object
def test_no_ray_into_the_hull_is_left_out(scene, centers, zoom):
    intrinsics = scene.intrinsics.clone()
    intrinsics[:, :2] *= zoom
    grid, box = hull_of(replace(scene, pixel_center=centers))
    looked = replace(scene, intrinsics=intrinsics, pixel_center=centers)
    lines = []
    pool = hull_scene(looked, grid, box, lines.append)
    share = pool.usable[scene.splits["train"]].float().mean()
    assert 0.02 < share < (0.5 if zoom < 1 else 1.01) and "may see the visual hull" in lines[0]
    view, y, x = (~pool.usable).nonzero().unbind(-1)
    rays, _ = looked.pick(view, x, y)
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        u = torch.rand(len(view), 1, generator=generator)
        assert not len(grid.march(rays, box, u).ray_indices)
    generator = torch.Generator().manual_seed(1)
    rays, target = pool.sample_rays(500, generator)
    hits = torch.bincount(grid.march(rays, box, None).ray_indices, minlength=500) > 0
    assert hits.float().mean() > 0.4 and target.shape == (500, 3)


def test_masks_of_the_data_stay_masked(scene):
    usable = torch.rand(scene.images.shape[:3]) > 0.5
    grid, box = hull_of(scene)
    pool = hull_scene(replace(scene, usable=usable), grid, box, print)
    assert not (pool.usable & ~usable).any()
    others = [view for view in range(len(usable)) if view not in scene.splits["train"]]
    assert torch.equal(pool.usable[others], usable[others])


def test_a_camera_inside_the_hull_keeps_all_of_its_pixels(scene):
    grid, box = hull_of(scene)
    c2w = scene.c2w.clone()
    c2w[scene.splits["train"][0], :, 3] = (box.low + box.high) / 2
    intrinsics = scene.intrinsics * torch.tensor([0.3, 0.3, 1.0, 1.0])
    pool = hull_scene(replace(scene, c2w=c2w, intrinsics=intrinsics), grid, box, print)
    first, second = scene.splits["train"][:2]
    assert pool.usable[first].all() and not pool.usable[second].all()


def test_without_a_hull_all_rays_stay_and_the_log_says_so(scene):
    lines, grid = [], OccupancyGrid(8)
    space = scene_space(scene, 64, bound=0.0, contract=False, cone_angle=0.0)
    assert hull_scene(scene, grid, space, lines.append) is scene
    space = scene_space(scene, 64, bound=0.0, contract=True, cone_angle=0.01)
    assert hull_scene(scene, grid, space, lines.append) is scene
    assert len(lines) == 2 and "there is no visual hull" in lines[0]


def test_a_run_on_rays_of_the_hull_resumes_bit_for_bit(tiny, tmp_path):
    flags = [*FAST_TINY, *tiny, "--hull_rays", "--lr_schedule", "exp"]
    for name, last in (("whole", 9), ("parts", 4), ("parts", 9)):
        done = run_main(run_nerf.main, *flags, "--expname", name, "--N_iters", last)
        assert done.returncode == 0, done.stderr
    assert "may see the visual hull" in (tmp_path / "whole" / "log.txt").read_text()
    assert_same_training(newest(tmp_path / "whole"), newest(tmp_path / "parts"))


def test_flags_that_contradict_it_are_refused(tiny):
    for words, message in (
        (["--hull_rays"], "--hull_rays needs --occ_grid"),
        ([*FAST_TINY, "--hull_rays", "--precrop_iters", "5"], "leave out --precrop_iters"),
    ):
        done = run_main(run_nerf.main, *tiny, *words)
        assert done.returncode == 2 and message in done.stderr


# ------------------------------------------------------------------- what is said about the box


@pytest.fixture(scope="module")
def around(tmp_path_factory):
    """The demo scene from 14 sides; its widest coordinate is 1.3."""
    folder = tmp_path_factory.mktemp("around") / "demo"
    make_demo.make(folder, "blender", 40, {"train": 14, "val": 1, "test": 1})
    return build.load_scene(
        nerf_flags.parse(["--datadir", str(folder), "--dataset_type", "blender"])
    )


def carved(scene, bound, resolution=32):
    grid = OccupancyGrid(resolution)
    box = scene_space(scene, 64, bound=bound, contract=False, cone_angle=0.0)
    return (grid, *carve(scene, grid, box))


def test_a_box_that_cuts_the_scene_is_said_with_a_bound_that_does_not(around):
    warning = carved(around, 0.6)[2]
    assert "may be cut" in warning
    enough = float(warning.rpartition(" ")[2])
    assert 1.3 < enough < 2.5 and "cut" not in (carved(around, 1.1 * enough)[2] or "")


def test_sides_that_few_pictures_see_are_no_scene(around):
    grid, box, warning = carved(around, 3.0)
    assert float(box.high.max()) == 3.0  # nothing excludes the corners, which few frames hold
    assert "cut" not in (warning or "")


def test_a_hull_that_excludes_nearly_nothing_is_said(around):
    warning = carved(around, 60.0, 16)[2]
    assert "excludes only" in warning and "smaller --scene_bound" in warning


def test_cameras_inside_the_box_carve_what_is_far_from_them(around):
    """And lose nothing of the hull of a box that they are outside of."""
    grid, box, _ = carved(around, 2.4, 48)
    wide, outer, _ = carved(around, 5.0, 48)  # cameras are 4 from the origin
    solid = box.from_unit(grid.cell_points(grid.possible.nonzero()[:, 0]))
    solid = solid[(solid.abs() < 1.2).all(-1)]
    x, y, z = ((outer.to_unit(solid) + 1) / 2 * 48).long().unbind(-1)
    # A cell at the hull's rim is kept for a part of it that may lie in the next wide cell.
    assert wide.possible[(x * 48 + y) * 48 + z].float().mean() > 0.99
    assert wide.fraction < 0.96


def test_one_smaller_picture_does_not_change_the_box(scene):
    """Its camera has half the focal length in pixels, and half the frame."""
    whole = scene_space(scene, 64, bound=0.0, contract=False, cone_angle=0.0)
    intrinsics, sizes = scene.intrinsics.clone(), torch.tensor([[scene.height, scene.width]])
    sizes = sizes.repeat(len(intrinsics), 1)
    first = scene.splits["train"][0]
    intrinsics[first], sizes[first] = intrinsics[first] / 2, sizes[first] // 2
    usable = torch.ones(scene.images.shape[:3], dtype=torch.bool)
    usable[first, scene.height // 2 :] = usable[first, :, scene.width // 2 :] = False
    mixed = replace(scene, intrinsics=intrinsics, sizes=sizes, usable=usable)
    space = scene_space(mixed, 64, bound=0.0, contract=False, cone_angle=0.0)
    torch.testing.assert_close(space.high, whole.high)
