"""transforms.json and COLMAP captures: the demo scene read back, mixed sizes, masks, bad files."""

import json
import re
import shutil

import demo_scene
import make_demo
import numpy as np
import pytest
import torch
from helpers import DEMO_COUNTS, DEMO_SIZE, REPOSITORY, run_script
from PIL import Image

from nerf.build import load_scene
from nerf.cameras import orbit_path
from nerf.datasets import capture, colmap, llff, recognize
from nerf.datasets.colmap_model import OPENCV_TO_OPENGL, read_model
from nerf.datasets.colmap_write import quaternion, write_model
from nerf.flags import nerf as nerf_flags
from nerf.lenses import from_colmap
from nerf.rays import Rays, pixels_to_rays
from nerf.scene_bounds import scene_space

NUM_VIEWS = sum(DEMO_COUNTS.values())
SHARED = REPOSITORY.parent / "shared" / "data"


def load(folder, *flags, kind="auto", warn=None):
    argv = [
        "--datadir",
        str(folder),
        "--dataset_type",
        kind,
        "--factor",
        "1",
        "--white_bkgd",
        *flags,
    ]
    args = nerf_flags.parse(argv)
    said = []
    scene = load_scene(args, said.append)
    if warn is not None:
        warn += said
    return scene


def edit(folder, change):
    """Change transforms.json: its content is handed to ``change``."""
    path = folder / "transforms.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def as_text(folder):
    model = read_model(folder / "sparse" / "0")
    shutil.rmtree(folder / "sparse")
    write_model(folder / "sparse", model, text=True)  # and without the 0/
    return folder


# --------------------------------------------------------- the demo's exporters, read back


def world_rays(scene, x, y, view):
    """The scene's rays in the coordinates that the demo was made in."""
    rays = scene.rays(x, y, scene.c2w[view], scene.intrinsics[view])
    matrix = scene.to_world.float()
    turned = rays.directions @ matrix[:3, :3].T
    places = rays.origins @ matrix[:3, :3].T + matrix[:3, 3]
    unit = torch.nn.functional.normalize(turned, dim=-1)
    return Rays(places, turned, unit, rays.near, rays.far)


def seen(scene, view, shift=0.0, samples=3):
    """What the caster sees through the scene's rays: area averages [H, W, 3] over white."""
    height, width = scene.view_size(view)
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    total = torch.zeros(height * width, 3)
    steps = (torch.arange(samples) + 0.5) / samples - 0.5
    for dy in steps:
        for dx in steps:
            places = (x.flatten() + dx + shift, y.flatten() + dy + shift)
            rgba, _ = demo_scene.cast(world_rays(scene, *places, view))
            total += rgba[:, :3] * rgba[:, 3:] + 1 - rgba[:, 3:]
    return (total / samples**2).view(height, width, 3)


@pytest.mark.parametrize("kind", ["transforms", "colmap", "colmap as text"])
def test_rays_of_the_scene_see_the_stored_pictures(demo_copy, kind):
    folder = demo_copy(kind.split()[0])
    scene = load(as_text(folder) if "text" in kind else folder)
    errors, shifted = [], []
    for view in (0, 2, 9):  # both lenses
        picture = scene.picture(view)
        errors.append((seen(scene, view) - picture).abs().mean())
        shifted.append((seen(scene, view, 0.5, samples=1) - picture).abs().mean())
    assert max(errors) < 0.01 and min(shifted) > 3 * max(errors)  # half a pixel off is seen


def test_rays_are_the_exporters_own(demo_colmap, demo_transforms):
    x, y = torch.tensor([3.0, 20.0]), torch.tensor([2.0, 17.0])
    lenses = [
        torch.tensor(from_colmap(m, k)) for m, _, _, k in make_demo.capture_cameras(DEMO_SIZE)
    ]
    poses = make_demo.hemisphere(NUM_VIEWS, seed=4)
    turns = orbit_path(DEMO_COUNTS["test"], radius=make_demo.RADIUS)
    for scene, view, c2w, which in (
        (load(demo_colmap), 4, poses[4], 0),
        (load(demo_colmap), 5, poses[5], 1),
        (load(demo_transforms), 8, turns[0], 0),
        (load(demo_transforms), 9, turns[1], 0),
    ):
        found = world_rays(scene, x, y, view)
        row = lenses[which].float()
        expected = pixels_to_rays(x, y, row, torch.tensor(c2w).float(), (0, 1), pixel_center=True)
        torch.testing.assert_close(found.origins, expected.origins, rtol=0, atol=1e-4)
        torch.testing.assert_close(found.viewdirs, expected.viewdirs, rtol=0, atol=1e-5)


def test_binary_and_text_hold_the_same_model(demo_copy):
    folder = demo_copy("colmap")
    binary = read_model(folder / "sparse" / "0")
    text = read_model(as_text(folder) / "sparse")
    for one, other in zip(binary, text, strict=True):
        if isinstance(one, np.ndarray):
            np.testing.assert_allclose(one, other, rtol=0, atol=1e-12)
        else:
            assert one == other
    np.testing.assert_allclose(binary.c2w, make_demo.hemisphere(NUM_VIEWS, seed=4), atol=1e-12)


def test_pycolmap_reads_what_we_write_and_we_read_the_same_poses(demo_copy):
    pycolmap = pytest.importorskip("pycolmap", reason="needs pycolmap")
    folder = demo_copy("colmap")
    for place in ("sparse/0", "sparse"):
        theirs = pycolmap.Reconstruction(str(folder / place))
        ours = read_model(folder / place)
        poses = {image.name: image.cam_from_world() for image in theirs.images.values()}
        for name, c2w in zip(ours.names, ours.c2w, strict=True):
            expected = poses[name].inverse().matrix() @ np.diag([1.0, -1.0, -1.0, 1.0])
            np.testing.assert_allclose(c2w, expected, rtol=0, atol=1e-9)
        theirs.update_point_3d_errors()
        assert theirs.compute_mean_reprojection_error() < 1e-6  # of the features that we wrote
        assert len(theirs.points3D) == len(ours.points)
        if place == "sparse/0":
            as_text(folder)


def test_quaternions_of_any_turn_come_back():
    random = np.random.default_rng(0)
    for _ in range(50):
        q = random.normal(size=4)
        q *= np.sign(q[0]) / np.linalg.norm(q)
        w, v = q[0], q[1:]
        cross = np.array([[0, -v[2], v[1]], [v[2], 0, -v[0]], [-v[1], v[0], 0]])
        rotation = (w * w - v @ v) * np.eye(3) + 2 * np.outer(v, v) + 2 * w * cross
        np.testing.assert_allclose(quaternion(rotation), q, rtol=0, atol=1e-9)
    assert OPENCV_TO_OPENGL[0, 0] == 1 and np.linalg.det(OPENCV_TO_OPENGL) == 1


def test_splits_are_the_files_lists_or_every_nth_view(demo_transforms, demo_colmap, demo_copy):
    scene = load(demo_transforms)
    assert {name: len(views) for name, views in scene.splits.items()} == DEMO_COUNTS
    assert [scene.names[view] for view in scene.splits["test"]] == [
        "images/test_0",
        "images/test_1",
    ]
    splits = load(demo_colmap, "--llffhold", "4").splits
    assert splits["test"] == splits["val"] == [0, 4, 8] and len(splits["train"]) == NUM_VIEWS - 3
    folder = demo_copy("transforms")

    def without_lists(content):
        for split in ("train", "val", "test"):
            del content[f"{split}_filenames"]

    edit(folder, without_lists)
    scene = load(folder, "--llffhold", "5")
    held = [scene.names[view] for view in scene.splits["test"]]
    assert held == sorted(scene.names)[::5]  # by name, whatever the frames' order


def test_several_transforms_files_are_splits_with_intrinsics_of_their_own(demo_copy):
    folder = demo_copy("transforms")
    whole = load(folder)
    content = json.loads((folder / "transforms.json").read_text())
    (folder / "transforms.json").unlink()
    for split in ("train", "test"):
        names = content.pop(f"{split}_filenames")
        frames = [frame for frame in content["frames"] if frame["file_path"] in names]
        top = {key: value for key, value in content.items() if "filenames" not in key}
        (folder / f"transforms_{split}.json").write_text(json.dumps({**top, "frames": frames}))
    scene = load(folder, "--testskip", "1")
    assert recognize(folder) == "transforms"
    assert [len(scene.splits[name]) for name in ("train", "val", "test")] == [6, 2, 2]
    for view, name in enumerate(scene.names):
        torch.testing.assert_close(
            scene.intrinsics[view], whole.intrinsics[whole.names.index(name)]
        )


def test_the_box_is_what_instant_ngp_makes_of_scale_and_offset(demo_copy):
    folder = demo_copy("transforms")
    edit(folder, lambda content: content.update(aabb_scale=2, scale=0.25, offset=[0.5, 0.4, 0.6]))
    scene = load(folder)
    box = scene_space(scene, 64, bound=0, contract=False, cone_angle=0)
    torch.testing.assert_close(
        torch.stack([box.low, box.high]), torch.tensor([[-2.0] * 3, [2.0] * 3])
    )
    # instant-ngp: scale p + offset lies in [0, 1] in its unit cube, here in [-1, 1].
    point = torch.tensor([0.3, -0.2, 0.1, 1.0], dtype=torch.float64)
    inside = torch.linalg.inv(scene.to_world) @ point
    expected = 2 * (0.25 * point[:3] + torch.tensor([0.5, 0.4, 0.6]).double()) - 1
    torch.testing.assert_close(inside[:3], expected, rtol=0, atol=1e-6)


def test_poses_without_a_stated_place_are_set_upright_around_what_they_show(demo_copy):
    folder = demo_copy("transforms")
    turn = np.linalg.qr(np.random.default_rng(1).normal(size=(3, 3)))[0]
    turn *= np.sign(np.linalg.det(turn))
    shift = np.array([5.0, -7.0, 2.0])

    def move(content):
        for key in ("aabb_scale", "scale", "offset"):
            del content[key]
        for frame in content["frames"]:
            matrix = np.array(frame["transform_matrix"])
            matrix[:3, :3], matrix[:3, 3] = turn @ matrix[:3, :3], turn @ matrix[:3, 3] * 3 + shift
            frame["transform_matrix"] = matrix.tolist()

    edit(folder, move)
    scene = load(folder)
    # All cameras look at the demo's origin from a distance of 4 and upright.
    torch.testing.assert_close(
        scene.c2w[:, :, 3].norm(dim=-1), torch.ones(NUM_VIEWS), atol=1e-4, rtol=0
    )
    np.testing.assert_allclose(scene.to_world[:3, 3], shift, rtol=0, atol=1e-3)
    up = torch.tensor(turn).T @ scene.to_world[:3, :3] @ torch.tensor([0.0, 0.0, 1.0]).double()
    torch.testing.assert_close(up / 12, torch.tensor([0.0, 0.0, 1.0]).double(), atol=1e-3, rtol=0)
    assert (scene.render_poses[:, :, 3].norm(dim=-1) - 1).abs().max() < 0.2


def test_applied_transform_leads_back_to_the_captures_own_world(demo_copy):
    folder = demo_copy("transforms")
    applied = [[1, 0, 0, 1], [0, 0, 1, 2], [0, -1, 0, 3]]
    plain = load(folder)
    edit(folder, lambda content: content.update(applied_transform=applied))
    moved = load(folder)
    assert torch.equal(plain.c2w, moved.c2w)  # the frames' poses hold it already
    whole = torch.tensor([*applied, [0, 0, 0, 1]], dtype=torch.float64)
    torch.testing.assert_close(whole @ moved.to_world, plain.to_world)


def test_extensions_slashes_and_sizes_may_be_missing(demo_copy):
    folder = demo_copy("transforms")
    expected = load(folder)

    def change(content):
        for key in ("w", "h"):
            del content[key]
        for number, frame in enumerate(content["frames"]):
            frame.pop("w", None), frame.pop("h", None)
            name = frame["file_path"]
            frame["file_path"] = (name[:-4], "./" + name, name.replace("/", "\\"))[number % 3]

    edit(folder, change)
    found = load(folder)
    assert torch.equal(found.images, expected.images) and found.names == expected.names
    torch.testing.assert_close(found.intrinsics, expected.intrinsics)


def test_fisheye_frames_get_the_equidistant_lens(demo_copy):
    folder = demo_copy("transforms")
    lens = {
        "fl_x": 12.0,
        "fl_y": 13.0,
        "cx": 15.0,
        "cy": 12.0,
        "k1": 0.05,
        "k2": -0.01,
        "k3": 0.002,
    }
    edit(folder, lambda content: content["frames"][0].update(camera_model="OPENCV_FISHEYE", **lens))
    edit(folder, lambda content: content["frames"][1].update(is_fisheye=True, **lens, p1=0.0))
    edit(folder, lambda content: [content.pop("camera_model"), content["frames"][1].pop("p1")])
    scene = load(folder)
    row = torch.tensor(from_colmap("OPENCV_FISHEYE", [12, 13, 15, 12, 0.05, -0.01, 0.002, 0.0]))
    torch.testing.assert_close(scene.intrinsics[0, :7], row[:7])
    torch.testing.assert_close(scene.intrinsics[1, :7], row[:7])
    rays = scene.rays(torch.tensor([30.0]), torch.tensor([20.0]), scene.c2w[0], scene.intrinsics[0])
    torch.testing.assert_close(rays.directions.norm(dim=-1), torch.ones(1))


def test_smaller_pictures_keep_their_rays(demo_transforms):
    whole, small = load(demo_transforms), load(demo_transforms, "--downscale", "2")
    for view in (0, 2):
        assert small.view_size(view) == tuple(side // 2 for side in whole.view_size(view))
        x, y = torch.tensor([1.0, 7.0]), torch.tensor([2.0, 9.0])
        found = small.rays(x, y, small.c2w[view], small.intrinsics[view]).viewdirs
        middle = whole.rays(2 * x + 0.5, 2 * y + 0.5, whole.c2w[view], whole.intrinsics[view])
        torch.testing.assert_close(found, middle.viewdirs, rtol=0, atol=1e-5)


# ------------------------------------------------------------------------- mixed sizes, masks


def pixels_drawn(scene, count, **settings):
    """Views and flat places of drawn rays, told by colors that name their pixel."""
    height, width = scene.images.shape[1:3]
    flat = torch.arange(scene.images[..., 0].numel()).view(scene.images.shape[:3])
    scene.images = torch.stack([flat % 256, flat // 256 % 256, flat // 65536], -1).to(torch.uint8)
    _, colors = scene.sample_rays(count, torch.Generator().manual_seed(0), **settings)
    code = (colors * 255).round().long() @ torch.tensor([1, 256, 65536])
    return code // (height * width), code % (height * width) // width, code % width


def test_rays_come_from_all_of_every_picture_and_never_from_padding(demo_colmap):
    scene = load(demo_colmap)
    assert {scene.view_size(view) for view in range(NUM_VIEWS)} == {(24, 32), (32, 24)}
    view, y, x = pixels_drawn(scene, 40000)
    assert set(view.tolist()) == set(scene.splits["train"])
    for number in scene.splits["train"]:
        height, width = scene.view_size(number)
        mine = view == number
        assert (int(y[mine].max()), int(x[mine].max())) == (height - 1, width - 1)
        assert len(set(zip(y[mine].tolist(), x[mine].tolist(), strict=True))) > 0.99 * 24 * 32
    view, y, x = pixels_drawn(scene, 2000, one_image=True, crop=0.5)
    height, width = scene.view_size(int(view[0]))
    assert (view == view[0]).all()
    assert (y.min(), y.max()) == (height // 4, height * 3 // 4 - 1)
    assert (x.min(), x.max()) == (width // 4, width * 3 // 4 - 1)


def masked(folder):
    """Masks for two frames: the left half, and all but one row."""
    mask = np.full((24, 32), 255, np.uint8)
    mask[:, :16] = 0
    Image.fromarray(mask).save(folder / "left.png")
    mask[:] = 0
    mask[5] = 255
    Image.fromarray(mask).save(folder / "row.png")

    def change(content):
        content["frames"][0]["mask_path"] = "left.png"
        content["frames"][1]["mask_path"] = "./row"

    edit(folder, change)
    return folder


def test_masked_pixels_are_not_drawn(demo_copy):
    scene = load(masked(demo_copy("transforms")))
    view, y, x = pixels_drawn(scene, 20000)
    assert x[view == 0].min() == 16 and (view == 0).sum() > 500
    assert set(y[view == 1].tolist()) == {5}
    assert scene.mask(2) is None and scene.mask(0).float().mean() == 0.5
    # Every usable pixel counts the same.
    shard = (view == 1).float().mean() * (4.5 * 24 * 32 + 32)
    assert shard == pytest.approx(32, rel=0.2)


@pytest.mark.slow
def test_a_run_on_mixed_sizes_and_masks_trains_measures_and_renders(demo_copy, tmp_path):
    folder = masked(demo_copy("transforms"))
    edit(folder, lambda content: content["frames"][-1].update(mask_path="left.png", w=32, h=24))
    flags = (
        "--dataset_type auto --white_bkgd --fast --occ_res 16 --target_samples 512 --N_iters 3 "
        "--grid_res 32 --device cpu --i_img 3 --i_video 3 --expname run"
    ).split()
    result = run_script([*flags, "--datadir", folder, "--basedir", tmp_path])
    assert result.returncode == 0, result.stderr
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["num_views"] == 2 and all(0 < view["psnr"] < 60 for view in metrics["views"])
    pictures = sorted((tmp_path / "run" / "render_test_000003").glob("*.png"))
    assert [Image.open(path).size for path in pictures] == [(32, 24), (32, 24)]
    said = "transforms (--dataset_type auto)"
    assert said in (tmp_path / "run" / "log.txt").read_text()
    assert said in (tmp_path / "run" / "report.html").read_text()  # notes, but no progress
    assert not re.search(r"ETA \d", (tmp_path / "run" / "report.html").read_text())
    world = json.loads((tmp_path / "run" / "world.json").read_text())
    np.testing.assert_allclose(world["to_file_world"], load(folder).file_matrix)
    unit = json.loads((tmp_path / "run/render_test_000003/depth/unit.json").read_text())
    assert unit["file_units_per_scene_unit"] == world["file_units_per_scene_unit"] != 1


# ------------------------------------------------------------------------------ COLMAP folders


def test_pictures_without_a_pose_are_left_out_by_name(demo_copy):
    folder, said = demo_copy("colmap"), []
    model = read_model(folder / "sparse" / "0")
    kept = [view for view in range(NUM_VIEWS) if view not in (2, 7)]
    number = {view: place for place, view in enumerate(kept)}
    tracks = [(p, number[v]) for p, v in model.tracks.tolist() if v in number]
    parts = model._replace(
        names=[model.names[view] for view in kept],
        camera_ids=[model.camera_ids[view] for view in kept],
        c2w=model.c2w[kept],
        tracks=np.array(tracks),
    )
    write_model(folder / "sparse" / "0", parts)
    scene = load(folder, warn=said)
    assert len(scene.images) == NUM_VIEWS - 2
    assert any("photo_002.png, photo_007.png" in line for line in said)


def test_near_and_far_hold_the_points_and_obey_their_flags(demo_colmap):
    scene = load(demo_colmap)
    unit = float(scene.to_world[:3, 0].norm())
    assert 4 - 1.9 < scene.near * unit < 4 - 0.5 and 4 + 0.5 < scene.far * unit < 4 + 1.7
    scene = load(demo_colmap, "--near", "0.25", "--far", "3")
    assert (scene.near, scene.far) == (0.25, 3.0)


def test_forward_facing_captures_are_laid_out_for_ndc_unless_told(demo_copy):
    folder, said = demo_copy("colmap"), []
    model = read_model(folder / "sparse" / "0")
    poses = make_demo.facing(NUM_VIEWS, seed=3)
    write_model(folder / "sparse" / "0", model._replace(c2w=poses))
    scene = load(folder, warn=said)
    assert scene.ndc and any("--no_ndc" in line for line in said)
    world = load(folder, "--no_ndc")
    assert not world.ndc and not load(folder, "--spherify").ndc
    assert not capture.faces_forward(model.c2w)
    for one in (scene, world):  # the way back is exact for both layouts
        places = one.c2w[:, :, 3].double() @ one.to_world[:3, :3].T + one.to_world[:3, 3]
        np.testing.assert_allclose(places, poses[:, :, 3], rtol=0, atol=1e-5)


def test_a_folder_of_smaller_pictures_is_used_when_it_is_complete(demo_copy):
    folder = demo_copy("colmap")
    expected = load(folder, "--factor", "2")
    (folder / "images_2").mkdir()
    for path in (folder / "images").iterdir():
        with Image.open(path) as image:
            small = image.reduce(2).point(lambda level: max(0, level - 3))
            small.save(folder / "images_2" / path.name)
    found = load(folder, "--factor", "2")
    torch.testing.assert_close(found.intrinsics, expected.intrinsics)
    assert not torch.equal(found.images, expected.images)
    (folder / "images_2" / "photo_003.png").unlink()
    assert torch.equal(load(folder, "--factor", "2").images, expected.images)


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs ../shared/data")
def test_the_real_capture_agrees_with_its_llff_poses():
    folder = SHARED / "llff_beer"
    model = read_model(folder / "sparse" / "0")
    poses, _, bounds = llff.read_poses_bounds(folder / "poses_bounds.npy")
    np.testing.assert_allclose(model.c2w, poses, rtol=0, atol=1e-6)
    # LLFF took its bounds from the same points by about the same percentiles.
    np.testing.assert_allclose(colmap.depth_bounds(model), bounds, rtol=0.01)  # other rounding
    views = colmap.views_of(folder, folder, model, 8, pytest.fail)
    assert len(set(views.intrinsics[:, 0])) == 71 and views.intrinsics[:, 5].any()


# ----------------------------------------------------------------------------------- recognize


@pytest.mark.parametrize(
    "kind", ["blender", "llff", "deepvoxels", "linemod", "transforms", "colmap"]
)
def test_a_folder_tells_its_format(request, kind):
    expected = "LINEMOD" if kind == "linemod" else kind
    assert recognize(request.getfixturevalue(f"demo_{kind}")) == expected


def test_a_folder_without_poses_says_what_to_run(tmp_path):
    with pytest.raises(ValueError, match=r"no known format; expected transforms\.json"):
        recognize(tmp_path)
    Image.new("RGB", (4, 4)).save(tmp_path / "a.jpg")
    with pytest.raises(ValueError, match=r"python data/from_photos\.py"):
        recognize(tmp_path)


# ---------------------------------------------------------------------------------------- EXIF


def rotate_by_exif(path, orientation, keep_pixels):
    """Mark a picture as rotated; keep_pixels False: store it so that upright it is as before."""
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("RGB"))
    if not keep_pixels:
        pixels = np.rot90(pixels, {6: 1, 8: -1, 3: 2}[orientation])
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(np.ascontiguousarray(pixels)).save(path, exif=exif)


@pytest.mark.parametrize("kind", ["transforms", "colmap"])
@pytest.mark.parametrize("keep_pixels", [True, False])
@pytest.mark.parametrize("orientation", [6, 8])
def test_exif_rotation_follows_the_cameras_size(demo_copy, kind, keep_pixels, orientation):
    folder = demo_copy(kind)
    expected = load(folder, "--no-white_bkgd").picture(0)
    name = "train_0.png" if kind == "transforms" else "photo_000.png"
    rotate_by_exif(folder / "images" / name, orientation, keep_pixels)
    found = load(folder, "--no-white_bkgd").picture(0)
    if kind == "transforms":  # its alpha was dropped by this test
        expected, found = (expected > 0).float(), (found > 0).float()
        assert (expected != found).float().mean() < 0.05
    else:
        assert torch.equal(found, expected)


def test_exif_rotation_that_no_size_settles_is_refused(demo_copy):
    folder = demo_copy("colmap")
    rotate_by_exif(folder / "images" / "photo_000.png", 3, True)
    with pytest.raises(
        ValueError, match=r"photo_000\.png: its EXIF data.*save all pictures upright"
    ):
        load(folder)


def test_exif_rotation_of_llff_and_blender_pictures(demo_copy):
    folder = demo_copy("blender")
    args = ["--dataset_type", "blender", "--testskip", "1"]
    expected = load(folder, *args, kind="blender").images[0, ..., :3]
    exif = Image.Exif()
    exif[0x0112] = 6
    with Image.open(folder / "train" / "r_0.png") as image:
        image.transpose(Image.Transpose.ROTATE_90).save(folder / "train" / "r_0.png", exif=exif)
    assert torch.equal(load(folder, *args, kind="blender").images[0, ..., :3], expected)
    folder = demo_copy("llff")  # square pictures: the poses may be those of either
    rotate_by_exif(folder / "images" / "image003.png", 6, True)
    with pytest.raises(ValueError, match=r"image003\.png"):
        load(folder, kind="llff")


# ----------------------------------------------------------------------------------- bad input


def frame(**values):
    return lambda folder: edit(folder, lambda content: content["frames"][1].update(values))


def top(**values):
    return lambda folder: edit(folder, lambda content: content.update(values))


def drop(*keys):
    def change(content):
        for key in keys:
            content.pop(key, None)
            for part in content["frames"]:
                part.pop(key, None)

    return lambda folder: edit(folder, change)


def pose(change):
    def edit_pose(content):
        matrix = np.array(content["frames"][1]["transform_matrix"])
        change(matrix)
        content["frames"][1]["transform_matrix"] = matrix.tolist()

    return lambda folder: edit(folder, edit_pose)


def scaled(matrix):
    matrix[:3, :3] *= 1.1


def flipped(matrix):
    matrix[:3, 0] *= -1


def not_a_number(matrix):
    matrix[0, 3] = np.nan


def half_of(name):
    def change(folder):
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: len(content) // 2])

    return change


def bytes_of(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def without(name):
    return lambda folder: (folder / name).unlink()


def small_mask(folder):
    Image.new("L", (40, 10), 255).save(folder / "mask.png")
    frame(mask_path="mask.png")(folder)


def text_model(name, old, new):
    def change(folder):
        path = as_text(folder) / "sparse" / name
        path.write_text(path.read_text().replace(old, new))

    return change


def first_color(value):
    def change(folder):
        path = as_text(folder) / "sparse" / "points3D.txt"
        lines = path.read_text().splitlines()
        row = next(index for index, line in enumerate(lines) if not line.startswith("#"))
        words = lines[row].split()
        lines[row] = " ".join([*words[:4], value, *words[5:]])
        path.write_text("\n".join(lines) + "\n")

    return change


TRANSFORMS = {
    "no intrinsics": (drop("fl_x", "camera_angle_x"), 'neither "fl_x" nor "camera_angle_x"'),
    "focal length of 0": (frame(fl_x=0), '"fl_x" is 0'),
    "focal length a word": (top(fl_x="long"), "\"fl_x\" is 'long'"),
    "angle in degrees": (lambda f: [drop("fl_x")(f), top(camera_angle_x=50)(f)], "radians"),
    "lens NaN": (frame(k1=float("nan")), '"k1" is nan'),
    "lens unknown": (frame(camera_model="EQUIRECTANGULAR"), "EQUIRECTANGULAR"),
    "size of 0": (frame(w=0), "0x"),
    "left-handed": (pose(flipped), "train_1.png: its pose is not a rotation"),
    "scaled rotation": (pose(scaled), "train_1.png: its pose is not a rotation"),
    "pose NaN": (pose(not_a_number), "train_1.png"),
    "path outside": (frame(file_path="../out/train_1.png"), "leads out of the data folder"),
    "path absolute": (frame(file_path="/etc/hostname"), "leads out of the data folder"),
    "path a number": (frame(mask_path=7), "7 is not a file path"),
    "mask of another shape": (small_mask, "40x10"),
    "list of unknown names": (top(test_filenames=["images/none.png"]), "none.png"),
    "list a number": (top(train_filenames=3), "train_filenames"),
    "scale 0": (top(scale=0), '"scale" 0'),
    "scale a word": (top(scale="big"), "\"scale\" is 'big'"),
    "offset of two": (top(offset=[0, 1]), "three numbers"),
    "applied_transform ragged": (top(applied_transform=[[1, 2], [3]]), "applied_transform"),
    "applied_transform singular": (top(applied_transform=[[0] * 4] * 3), "singular"),
    "JSON invalid": (bytes_of("transforms.json", b'{"frames": ['), "not valid JSON"),
    "frames empty": (top(frames=[]), "frames"),
}
MODEL = "sparse/0/"
COLMAP = {
    "images missing": (lambda folder: shutil.rmtree(folder / "images"), "no such folder"),
    "cameras truncated": (half_of(MODEL + "cameras.bin"), "cameras.bin: is truncated"),
    "images truncated": (half_of(MODEL + "images.bin"), "images.bin: is truncated"),
    "points truncated": (half_of(MODEL + "points3D.bin"), "points3D.bin: is truncated"),
    "images empty": (bytes_of(MODEL + "images.bin", b""), "images.bin: is truncated"),
    "none registered": (bytes_of(MODEL + "images.bin", bytes(8)), "no image is registered"),
    "count absurd": (bytes_of(MODEL + "points3D.bin", b"\xff" * 8), "points3D.bin: is truncated"),
    "images gone": (without(MODEL + "images.bin"), "has no images.bin or images.txt"),
    "lens unknown": (text_model("cameras.txt", "OPENCV", "MAGIC"), "MAGIC"),
    "lens refused": (
        text_model("cameras.txt", "2 SIMPLE", "2 EQUIRECTANGULAR 24 32 24 32\n3 SIMPLE"),
        "EQUIRECTANGULAR",
    ),
    "parameters missing": (text_model("cameras.txt", "SIMPLE_RADIAL", "OPENCV"), "4 parameters"),
    "camera gone": (text_model("images.txt", " 2 photo", " 9 photo"), "camera 9"),
    "color below 0": (first_color("-1"), "points3D.txt"),
    "text is words": (text_model("images.txt", " 1 photo", " one photo"), "images.txt"),
}
CASES = [
    pytest.param(kind, *case, id=f"{kind}: {name}")
    for kind, cases in (("transforms", TRANSFORMS), ("colmap", COLMAP))
    for name, case in cases.items()
]


@pytest.mark.parametrize(("kind", "change", "named"), CASES)
def test_bad_input_is_refused_in_one_line_that_names_it(demo_copy, kind, change, named):
    folder = demo_copy(kind)
    change(folder)
    with pytest.raises(ValueError) as caught:
        load(folder, kind=kind)
    message = str(caught.value)
    assert named in message and "\n" not in message and str(folder) in message


def test_the_script_ends_with_2_and_one_line(demo_copy, tmp_path):
    folder = demo_copy("transforms")
    drop("fl_x")(folder)
    words = ["--datadir", folder, "--dataset_type", "auto", "--basedir", tmp_path / "logs"]
    result = run_script([*words, "--device", "cpu"])
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert 'neither "fl_x"' in result.stderr.splitlines()[-1]
