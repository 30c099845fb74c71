"""nerf.datasets end to end: the demo scene in every format, and files with something wrong."""

import errno
import json
import os
import pickle
import shutil
import tempfile

import demo_scene
import make_demo
import numpy as np
import pytest
import torch
from helpers import DEMO_COUNTS, DEMO_SIZE, run_script
from PIL import Image

from nerf.build import load_scene
from nerf.cameras import nearest_point_to_axes
from nerf.flags import nerf as nerf_flags
from nerf.rays import rays_to_ndc

NUM_VIEWS = sum(DEMO_COUNTS.values())
FLAGS = {
    "blender": ("--dataset_type", "blender", "--white_bkgd"),
    "linemod": ("--dataset_type", "LINEMOD", "--white_bkgd"),
    "deepvoxels": ("--dataset_type", "deepvoxels", "--shape", "demo", "--white_bkgd"),
    "llff": ("--dataset_type", "llff", "--factor", "1", "--no_ndc", "--llffhold", "3"),
}


def load(folder, kind, *flags, warn=None):
    """The scene at ``folder``, through the flags a user would give; warnings fail by default."""
    argv = ["--datadir", str(folder), "--testskip", "1", "--pixel_center", *FLAGS[kind], *flags]
    args = nerf_flags.parse(argv)
    before = dict(vars(args))
    scene = load_scene(args, warn or pytest.fail)
    assert vars(args) == before
    return scene


@pytest.fixture
def demo(request, tmp_path):
    """A function: kind -> a copy of the demo scene in that format, to be changed."""

    def copy(kind):
        folder = tmp_path / kind
        shutil.copytree(request.getfixturevalue(f"demo_{kind}"), folder)
        return folder

    return copy


# ------------------------------------------------ pose axes, intrinsics, pixels: against the caster


def seen(scene, view, shift=0.0, solids=demo_scene.SOLIDS, samples=3):
    """What the caster sees through ``scene``'s own rays: area averages [H, W, 3] over white."""
    y, x = (g.flatten() for g in torch.meshgrid(*[torch.arange(DEMO_SIZE)] * 2, indexing="ij"))
    total = torch.zeros(len(x), 3)
    steps = (torch.arange(samples) + 0.5) / samples - 0.5  # the rays pass pixel centers already
    for dy in steps:
        for dx in steps:
            rays = scene.rays(
                x + dx + shift, y + dy + shift, scene.c2w[view], scene.intrinsics[view]
            )
            rgba, _ = demo_scene.cast(rays, solids)
            total += rgba[:, :3] * rgba[:, 3:] + 1 - rgba[:, 3:]
    return (total / samples**2).view(DEMO_SIZE, DEMO_SIZE, 3)


@pytest.mark.parametrize("kind", ["blender", "linemod", "deepvoxels"])
def test_rays_of_the_scene_see_the_stored_pictures(request, kind):
    scene = load(request.getfixturevalue(f"demo_{kind}"), kind)
    errors, shifted, on_smooth = [], [], []
    for view in range(0, NUM_VIEWS, 3):  # of every split
        picture = scene.picture(view)
        one_ray, many_rays = seen(scene, view, samples=1), seen(scene, view)
        # Pixels were made with one ray or nine; where both agree, on a solid, so must the picture.
        smooth = ((one_ray - many_rays).abs().amax(-1) < 0.005) & (one_ray.amin(-1) < 0.99)
        on_smooth.append((one_ray - picture).abs()[smooth])
        errors.append((many_rays - picture).abs().mean())
        shifted.append((seen(scene, view, 0.5) - picture).abs().mean())
    on_smooth = torch.cat(on_smooth)
    assert len(on_smooth) > 50 and on_smooth.max() <= 0.005 + 0.5 / 255 + 1e-5
    # Whole pictures, edges included: half a pixel off would be seen.
    assert max(errors) < 0.006 and min(shifted) > 5 * max(errors)


@pytest.mark.parametrize("kind", ["blender", "linemod", "deepvoxels"])
def test_splits_and_bounds_of_the_demo(request, kind):
    scene = load(request.getfixturevalue(f"demo_{kind}"), kind)
    assert {name: len(views) for name, views in scene.splits.items()} == DEMO_COUNTS
    assert sorted(sum(scene.splits.values(), [])) == list(range(NUM_VIEWS))
    assert len(set(scene.names)) == NUM_VIEWS
    expected = {"blender": (2, 6), "linemod": (2, 6), "deepvoxels": (3, 5)}[kind]
    assert (scene.near, scene.far) == pytest.approx(expected, abs=1e-6)
    assert scene.render_poses.shape[1:] == (3, 4)
    half = load(request.getfixturevalue(f"demo_{kind}"), kind, "--testskip", "2")
    assert [len(half.splits[name]) for name in ("train", "val", "test")] == [6, 1, 1]
    assert [half.names[i] for i in half.splits["test"]] == [scene.names[scene.splits["test"][0]]]


@pytest.mark.parametrize("kind", ["blender", "linemod"])
@pytest.mark.parametrize("flags", [("--half_res",), ("--downscale", "4")])
def test_smaller_pictures_keep_their_rays(request, kind, flags):
    folder = request.getfixturevalue(f"demo_{kind}")
    factor = int(flags[-1]) if len(flags) > 1 else 2
    whole, small = load(folder, kind), load(folder, kind, *flags)
    assert (small.height, small.width) == (DEMO_SIZE // factor,) * 2
    x, y = torch.tensor([0.0, 3.0]), torch.tensor([1.0, 2.0])
    # The center of a block of pixels is the center of the pixel that replaces it.
    middle = [factor * grid + (factor - 1) / 2 for grid in (x, y)]
    expected = whole.rays(*middle, whole.c2w[0], whole.intrinsics[0]).directions
    found = small.rays(x, y, small.c2w[0], small.intrinsics[0]).directions
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_deepvoxels_focal_length_follows_the_pictures_height(demo):
    folder = demo("deepvoxels")
    whole = load(folder, "deepvoxels")
    path = folder / "train" / "demo" / "intrinsics.txt"
    numbers = path.read_text().split()
    path.write_text(path.read_text().replace(f"{DEMO_SIZE} {DEMO_SIZE}", "64 64"))
    path.write_text(path.read_text().replace(numbers[0], str(2 * float(numbers[0]))))
    torch.testing.assert_close(load(folder, "deepvoxels").intrinsics, whole.intrinsics)


# ----------------------------------------------------------------------------------------- LLFF


def original_cameras(folder):
    """c2w [V, 3, 4] and focal length as make_demo drew and wrote them."""
    rows = np.load(folder / "poses_bounds.npy")
    return make_demo.facing(NUM_VIEWS, seed=3), rows[0, 14], rows[:, 15:]


def similarity(before, after):
    """(scale, rotation, shift) with after = scale rotation before + shift, from the cameras."""
    rotation = after[0, :, :3] @ before[0, :, :3].T
    spread = [np.linalg.norm(c2w[:, :, 3] - c2w[:, :, 3].mean(0)) for c2w in (before, after)]
    scale = spread[1] / spread[0]
    shift = after[:, :, 3].mean(0) - scale * rotation @ before[:, :, 3].mean(0)
    return scale, rotation, shift


@pytest.mark.parametrize("flags", [(), ("--spherify",)], ids=["recentered", "spherified"])
def test_llff_world_is_a_similarity_of_the_captured_one(demo_llff, flags):
    scene = load(demo_llff, "llff", *flags)
    before, _, bounds = original_cameras(demo_llff)
    after = scene.c2w.double().numpy()
    scale, rotation, shift = similarity(before, after)
    assert np.linalg.det(rotation) == pytest.approx(1, abs=1e-5)
    exact = {"rtol": 0, "atol": 1e-5}  # poses are float32
    np.testing.assert_allclose(after[:, :, :3], rotation @ before[:, :, :3], **exact)
    positions = scale * before[:, :, 3] @ rotation.T + shift
    np.testing.assert_allclose(after[:, :, 3], positions, **exact)
    assert scene.near == pytest.approx(0.9 * scale * bounds.min(), rel=1e-5)
    assert scene.far == pytest.approx(scale * bounds.max(), rel=1e-5)
    if flags:
        assert (after[:, :, 3] ** 2).sum(-1).mean() == pytest.approx(1, abs=1e-5)
        np.testing.assert_allclose(nearest_point_to_axes(after), 0, rtol=0, atol=1e-4)
    else:
        assert scale * bounds.min() * 0.75 == pytest.approx(1, rel=1e-5)


@pytest.mark.parametrize("flags", [(), ("--spherify",)], ids=["recentered", "spherified"])
def test_llff_points_of_known_depth_project_to_their_pixels(demo_llff, flags):
    scene = load(demo_llff, "llff", *flags)
    before, focal, _ = original_cameras(demo_llff)
    after = scene.c2w.double().numpy()
    scale, rotation, shift = similarity(before, after)
    solids = (*demo_scene.SOLIDS, *demo_scene.BACKDROP)
    x, y = np.array([3, 16, 20, 29]), np.array([5, 12, 25, 8])
    for view in (0, 7):
        depth = demo_scene.render_view(before[view], DEMO_SIZE, solids)[1][y, x]
        middle = DEMO_SIZE / 2
        local = np.stack([(x + 0.5 - middle) / focal, -(y + 0.5 - middle) / focal, -np.ones(4)], -1)
        points = (depth[:, None] * local) @ before[view, :, :3].T + before[view, :, 3]
        points = scale * points @ rotation.T + shift
        seen_by = (points - after[view, :, 3]) @ after[view, :, :3]
        fx, fy, cx, cy = scene.intrinsics[view].tolist()
        found = [fx * seen_by[:, 0] / -seen_by[:, 2] + cx, cy - fy * seen_by[:, 1] / -seen_by[:, 2]]
        np.testing.assert_allclose(found, [x + 0.5, y + 0.5], rtol=0, atol=1e-3)  # pixels
        rays = scene.rays(*torch.tensor(np.stack([x, y])).float(), scene.c2w[view],
                          scene.intrinsics[view])  # fmt: skip
        t = torch.tensor(scale * depth)[:, None]
        np.testing.assert_allclose(rays.origins + t * rays.directions, points, rtol=0, atol=1e-4)


def test_llff_pictures_match_their_poses(demo_llff):
    scene = load(demo_llff, "llff")
    before, _, _ = original_cameras(demo_llff)
    solids = (*demo_scene.SOLIDS, *demo_scene.BACKDROP)
    for view in (1, 8):
        picture, _ = demo_scene.render_view(before[view], DEMO_SIZE, solids)
        np.testing.assert_allclose(scene.picture(view), picture[..., :3], rtol=0, atol=0.003)


def test_llff_ndc_rays_are_the_world_rays_in_ndc(demo_llff):
    world = load(demo_llff, "llff")
    scene = load(demo_llff, "llff", "--no-no_ndc")
    assert (scene.ndc, scene.near, scene.far) == (True, 0.0, 1.0)
    views, x, y = torch.randint(DEMO_SIZE, (3, 40), generator=torch.Generator().manual_seed(0))
    views = views % NUM_VIEWS
    ndc, colors = scene.pick(views, x, y)
    rays, same_colors = world.pick(views, x, y)
    expected = rays_to_ndc(rays, DEMO_SIZE, DEMO_SIZE, world.intrinsics[views])
    for found, reference in zip(ndc, expected, strict=True):
        torch.testing.assert_close(found, reference, rtol=0, atol=1e-5)
    assert torch.equal(colors, same_colors)
    torch.testing.assert_close(ndc.origins[:, 2], torch.full((40,), -1.0), rtol=0, atol=1e-5)
    assert scene.describe() != world.describe()


@pytest.mark.parametrize(("hold", "test"), [(3, [0, 3, 6, 9]), (8, [0, 8]), (100, [0])])
def test_llff_holds_out_every_nth_view(demo_llff, hold, test):
    splits = load(demo_llff, "llff", "--llffhold", str(hold)).splits
    assert splits["test"] == splits["val"] == test
    assert splits["train"] == [view for view in range(NUM_VIEWS) if view not in test]


def test_llff_hold_0_leaves_the_most_central_view_out(demo_llff):
    scene = load(demo_llff, "llff", "--llffhold", "0")
    before, _, _ = original_cameras(demo_llff)
    offset = np.linalg.norm(before[:, :, 3] - before[:, :, 3].mean(0), axis=-1)
    assert scene.splits["test"] == [int(offset.argmin())]


def test_llff_focal_length_scales_with_the_factor(demo):
    folder = demo("llff")
    whole, small = load(folder, "llff"), load(folder, "llff", "--factor", "4")
    assert (small.height, small.width) == (8, 8)
    torch.testing.assert_close(small.intrinsics, whole.intrinsics / 4)
    torch.testing.assert_close(small.c2w, whole.c2w)
    blocks = whole.images.float().view(NUM_VIEWS, 8, 4, 8, 4, 3).mean((2, 4))
    assert (small.images - blocks).abs().max() <= 1  # area averages; Pillow rounds twice


def test_llff_cache_is_whole_and_used(demo):
    folder = demo("llff")
    first = load(folder, "llff", "--factor", "4")
    files = sorted((folder / "images_4").iterdir())
    assert [file.stem for file in files] == first.names
    assert sorted(p.name for p in folder.iterdir()) == [
        ".images_4.made_from",
        "images",
        "images_4",
        "poses_bounds.npy",
    ]
    np.testing.assert_array_equal([np.asarray(Image.open(file)) for file in files], first.images)
    shutil.rmtree(folder / "images")  # the cache alone is enough
    second = load(folder, "llff", "--factor", "4")
    assert torch.equal(first.images, second.images) and first.names == second.names


def too_large(cache):
    for file in cache.iterdir():
        Image.open(file).resize((16, 16)).save(file)


def one_less(cache):
    next(cache.iterdir()).unlink()


def one_more(cache):
    shutil.copyfile(next(cache.iterdir()), cache / "zzz.png")


def empty(cache):
    shutil.rmtree(cache)
    cache.mkdir()


@pytest.mark.parametrize("poison", [too_large, one_less, one_more, empty])
def test_llff_poisoned_cache_is_ignored_with_a_warning(demo, poison):
    folder = demo("llff")
    expected = load(folder, "llff", "--factor", "4")
    cache = folder / "images_4"
    poison(cache)
    left = sorted(file.read_bytes() for file in cache.iterdir())
    warnings = []
    found = load(folder, "llff", "--factor", "4", warn=warnings.append)
    assert torch.equal(found.images, expected.images)
    assert len(warnings) == 1 and "images_4" in warnings[0]
    assert sorted(file.read_bytes() for file in cache.iterdir()) == left  # it may be the user's
    shutil.rmtree(folder / "images")
    with pytest.raises(ValueError, match="images_4"):
        load(folder, "llff", "--factor", "4")


def test_llff_cache_that_breaks_off_leaves_nothing(demo, monkeypatch):
    folder = demo("llff")
    expected = load(folder, "llff")
    save, count = Image.Image.save, []

    def full_disk(self, *args, **settings):
        count.append(1)
        if len(count) > 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save(self, *args, **settings)

    monkeypatch.setattr(Image.Image, "save", full_disk)
    warnings = []
    scene = load(folder, "llff", "--factor", "2", warn=warnings.append)
    assert scene.height == expected.height // 2
    assert len(count) == 4 and len(warnings) == 1 and "No space" in warnings[0]
    assert sorted(path.name for path in folder.iterdir()) == ["images", "poses_bounds.npy"]


def test_llff_without_leave_to_write_still_loads(demo, monkeypatch):
    def refuse(*args, **settings):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    folder = demo("llff")
    monkeypatch.setattr(tempfile, "mkdtemp", refuse)
    warnings = []
    assert load(folder, "llff", "--factor", "2", warn=warnings.append).height == 16
    assert len(warnings) == 1 and "Permission denied" in warnings[0]


def test_llff_read_only_folder_still_loads(demo):
    folder = demo("llff")
    folder.chmod(0o555)
    warnings = []
    try:
        if os.access(folder, os.W_OK):
            pytest.skip("this user (root?) may write into read-only folders")
        assert load(folder, "llff", "--factor", "2", warn=warnings.append).height == 16
    finally:
        folder.chmod(0o755)
    assert len(warnings) == 1


# ------------------------------------------------------------------------------ files that differ


@pytest.mark.parametrize("split", ["val", "test"])
@pytest.mark.parametrize("kind", ["blender", "linemod"])
def test_a_missing_split_is_fine(demo, kind, split):
    folder = demo(kind)
    (folder / f"transforms_{split}.json").unlink()
    scene = load(folder, kind)
    assert not scene.splits.get(split)
    assert len(scene.images) == NUM_VIEWS - DEMO_COUNTS[split]


@pytest.mark.parametrize("split", ["validation", "test"])
def test_a_missing_deepvoxels_split_is_fine(demo, split):
    folder = demo("deepvoxels")
    shutil.rmtree(folder / split)
    assert len(load(folder, "deepvoxels").images) == NUM_VIEWS - 2


def test_blender_scene_under_the_llff_loaders_name_is_refused(demo_blender):
    with pytest.raises(ValueError, match="is in format blender, not llff"):
        load(demo_blender, "blender", "--dataset_type", "llff")


def test_file_path_may_lack_its_extension_or_hold_backslashes(demo):
    folder = demo("blender")
    expected = load(folder, "blender")
    Image.open(folder / "train" / "r_0.png").save(folder / "first.v2.png")
    edit(folder, file_path="first.v2")
    assert torch.equal(load(folder, "blender").images, expected.images)
    edit(folder, file_path=".\\first.v2.png")
    assert torch.equal(load(folder, "blender").images, expected.images)


# ------------------------------------------------------------------------------------ bad input


def edit(folder, split="train", top=None, drop=(), **frame):
    """Change a transforms file: ``top`` level entries, entries to ``drop``, those of frame 0."""
    path = folder / f"transforms_{split}.json"
    content = json.loads(path.read_text())
    content.update(top or {})
    for key in drop:
        (content if key in content else content["frames"][0]).pop(key)
    if frame:
        content["frames"][0].update(frame)
    path.write_text(json.dumps(content))


def table(edit_rows):
    """A change of the rows of poses_bounds.npy; in place, or the new array returned."""

    def change(folder):
        rows = np.load(folder / "poses_bounds.npy")
        returned = edit_rows(rows)
        np.save(folder / "poses_bounds.npy", rows if returned is None else returned)

    return change


def put(column, value, row=2):
    def change(rows):
        rows[row, column] = value

    return table(change)


def column_scaled(column, factor):
    def change(rows):
        rows[2, :15].reshape(3, 5)[:, column] *= factor

    return table(change)


def truncate(name):
    def change(folder):
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: len(content) // 2])

    return change


def write(name, text):
    content = text if isinstance(text, bytes) else text.encode()
    return lambda folder: (folder / name).write_bytes(content)


def remove(name):
    def change(folder):
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    return change


def escape(folder):
    Image.open(folder / "train" / "r_0.png").save(folder.parent / "outside.png")
    edit(folder, file_path="../outside")


def escape_absolutely(folder):
    Image.open(folder / "train" / "r_0.png").save(folder.parent / "outside.png")
    edit(folder, file_path=str(folder.parent / "outside.png"))


def savez(folder):
    rows = np.load(folder / "poses_bounds.npy")
    with open(folder / "poses_bounds.npy", "wb") as file:
        np.savez(file, rows)


def rename_poses(folder):
    for path in (folder / "train/demo/pose").iterdir():
        path.rename(path.with_stem(f"pose_{path.stem}"))


POSE = np.eye(4)
POSE[:3] = make_demo.hemisphere(1, seed=0)[0]
NAN_POSE, SINGULAR, LEFT_HANDED, SCALED = POSE.copy(), POSE.copy(), POSE.copy(), POSE.copy()
NAN_POSE[1, 3] = np.nan
SINGULAR[:, 1] = SINGULAR[:, 0]
LEFT_HANDED[:, 0] *= -1
SCALED[:3, :3] *= 1.1
WORDS = [[str(value) for value in row] for row in POSE.tolist()]
LETTERS = [["a"] * 4] * 4
DEEP = "train/demo/pose/000002.txt"


def matrix(value):
    return lambda folder: edit(folder, transform_matrix=value)


def top(**values):
    return lambda folder: edit(folder, top=values)


BROKEN_HEADER = "\x93NUMPY\x01\x00\x0a\x00{'descr': (".encode("latin-1")

BLENDER = {
    "JSON invalid": (write("transforms_train.json", '{"frames": ['), "transforms_train.json"),
    "JSON invalid in val": (write("transforms_val.json", "nope"), "transforms_val.json"),
    "JSON is a list": (write("transforms_train.json", "[]"), "transforms_train.json"),
    "JSON is binary": (
        lambda folder: (folder / "transforms_train.json").write_bytes(b"\xff\xfe\x00"),
        "transforms_train.json",
    ),
    "JSON missing": (remove("transforms_train.json"), "transforms_train.json"),
    "frames missing": (lambda folder: edit(folder, drop=["frames"]), "frames"),
    "frames empty": (top(frames=[]), "frames"),
    "frames of a wrong kind": (top(frames={"a": 1}), "frames"),
    "frame of a wrong kind": (top(frames=["r_0"]), "frame 0"),
    "angle missing": (lambda folder: edit(folder, drop=["camera_angle_x"]), "camera_angle_x"),
    "angle a string": (top(camera_angle_x="0.8"), "camera_angle_x"),
    "angle null": (top(camera_angle_x=None), "camera_angle_x"),
    "angle NaN": (top(camera_angle_x=float("nan")), "camera_angle_x"),
    "angle zero": (top(camera_angle_x=0), "camera_angle_x"),
    "angle in degrees": (top(camera_angle_x=45.8), "camera_angle_x"),
    "angle huge": (top(camera_angle_x=10**400), "camera_angle_x"),
    "matrix missing": (lambda folder: edit(folder, drop=["transform_matrix"]), "transform_matrix"),
    "matrix ragged": (matrix([[1, 2], [3]]), "transform_matrix"),
    "matrix 3x3": (matrix(np.eye(3).tolist()), "transform_matrix"),
    "matrix of huge numbers": (matrix([[10**400] * 4] * 4), "transform_matrix"),
    "matrix of letters": (matrix(LETTERS), "transform_matrix"),
    "matrix of numbers as strings": (matrix(WORDS), "transform_matrix"),
    "pose NaN": (matrix(NAN_POSE.tolist()), "train/r_0"),
    "pose null": (matrix([[None] * 4] * 4), "r_0"),
    "pose singular": (matrix(SINGULAR.tolist()), "train/r_0"),
    "pose zero": (matrix(np.zeros((4, 4)).tolist()), "train/r_0"),
    "pose left-handed": (matrix(LEFT_HANDED.tolist()), "train/r_0"),
    "pose scaled": (matrix(SCALED.tolist()), "train/r_0"),
    "file_path missing": (lambda folder: edit(folder, drop=["file_path"]), "file_path"),
    "file_path a number": (lambda folder: edit(folder, file_path=7), "file_path"),
    "file_path outside": (escape, "outside"),
    "file_path absolute": (escape_absolutely, "outside.png"),
}
LINEMOD = {
    "near missing": (lambda folder: edit(folder, drop=["near"]), '"near"'),
    "far a string": (lambda folder: edit(folder, "test", {"far": "5.7"}), '"far"'),
    "near beyond far": (
        lambda folder: [edit(folder, split, {"near": 9.0}) for split in ("train", "test")],
        "near",
    ),
    "intrinsics missing": (
        lambda folder: edit(folder, "test", drop=["intrinsic_matrix"]),
        "intrinsic_matrix",
    ),
    "intrinsics of letters": (
        lambda folder: edit(folder, "test", intrinsic_matrix=[["a"] * 3] * 3),
        "intrinsic_matrix",
    ),
    "intrinsics ragged": (
        lambda folder: edit(folder, "test", intrinsic_matrix=[[1], [2, 3]]),
        "intrinsic_matrix",
    ),
    "focal length zero": (
        lambda folder: edit(folder, "test", intrinsic_matrix=[[0, 0, 1], [0, 0, 1], [0, 0, 1]]),
        "focal",
    ),
    "pose NaN": (matrix(NAN_POSE.tolist()), "train/0000"),
    "a name too long for a file": (lambda folder: edit(folder, file_path="n" * 300), "file name"),
}
DEEPVOXELS = {
    "training folder missing": (remove("train"), "train"),
    "poses of other pictures": (rename_poses, "none of the same name"),
    "pose of 15 numbers": (write(DEEP, "1 " * 15), "000002.txt"),
    "pose of words": (write(DEEP, "one " * 16), "000002.txt"),
    "pose NaN": (write(DEEP, "nan " * 16), "000002"),
    "pose zero": (write(DEEP, "0 " * 16), "000002"),
    "intrinsics missing": (remove("train/demo/intrinsics.txt"), "intrinsics.txt"),
    "intrinsics short": (write("train/demo/intrinsics.txt", "40 16 16 0\n"), "intrinsics.txt"),
    "focal length negative": (
        write("train/demo/intrinsics.txt", "-40 16 16 0\n0 0 0\n1\n1\n32 32\n"),
        "intrinsics.txt",
    ),
    "focal length NaN": (
        write("train/demo/intrinsics.txt", "nan 16 16 0\n0 0 0\n1\n1\n32 32\n"),
        "intrinsics.txt",
    ),
}
LLFF = {
    "poses missing": (remove("poses_bounds.npy"), "poses_bounds.npy"),
    "poses truncated": (truncate("poses_bounds.npy"), "poses_bounds.npy"),
    "poses empty": (write("poses_bounds.npy", ""), "poses_bounds.npy"),
    "poses are text": (write("poses_bounds.npy", "1 2 3"), "poses_bounds.npy"),
    "poses with a broken header": (write("poses_bounds.npy", BROKEN_HEADER), "poses_bounds.npy"),
    "poses are an npz": (savez, "poses_bounds.npy"),
    "poses of 16 columns": (table(lambda rows: rows[:, :16]), "poses_bounds.npy"),
    "poses of one axis": (table(lambda rows: rows[0]), "poses_bounds.npy"),
    "poses without rows": (table(lambda rows: rows[:0]), "poses_bounds.npy"),
    "poses of integers": (table(lambda rows: rows.astype(int)), "poses_bounds.npy"),
    "poses too few": (table(lambda rows: rows[:-1]), "poses_bounds.npy"),
    "pictures too few": (remove("images/image009.png"), "poses_bounds.npy"),
    "pictures missing": (remove("images"), "images"),
    "pose NaN": (put(3, np.nan), "row 2"),
    "pose singular": (column_scaled(0, 0), "image002"),
    "pose left-handed": (column_scaled(0, -1), "image002"),
    "bounds swapped": (put(slice(15, 17), [5, 4]), "row 2"),
    "bounds negative": (put(15, -1), "row 2"),
    "focal length zero": (put(14, 0), "row 2"),
}
CASES = [
    pytest.param(kind, *case, id=f"{kind}: {name}")
    for kind, cases in (
        ("blender", BLENDER),
        ("linemod", LINEMOD),
        ("deepvoxels", DEEPVOXELS),
        ("llff", LLFF),
    )
    for name, case in cases.items()
]


@pytest.mark.parametrize(("kind", "change", "named"), CASES)
def test_bad_input_is_refused_in_one_line_that_names_it(demo, kind, change, named):
    folder = demo(kind)
    change(folder)
    with pytest.raises(ValueError) as caught:
        load(folder, kind)
    message = str(caught.value)
    assert named in message and "\n" not in message


def test_missing_folder_says_how_to_fetch_it(tmp_path):
    for kind in FLAGS:
        with pytest.raises(ValueError, match=r"python data/download\.py fern") as caught:
            load(tmp_path / "fern", kind)
        assert str(tmp_path / "fern") in str(caught.value)


def test_no_training_view_left_is_refused(demo_llff):
    with pytest.raises(ValueError, match="llffhold"):
        load(demo_llff, "llff", "--llffhold", "1")


class Canary:
    """Pickles to a command that makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("how", ["object array", "bare pickle"])
def test_pickled_poses_run_nothing(demo, tmp_path, how):
    folder, canary = demo("llff"), tmp_path / "canary"
    with open(folder / "poses_bounds.npy", "wb") as file:
        if how == "object array":
            np.save(file, np.array([Canary(canary)], dtype=object), allow_pickle=True)
        else:
            pickle.dump(Canary(canary), file)
    with pytest.raises(ValueError, match=r"poses_bounds\.npy") as caught:
        load(folder, "llff")
    assert "\n" not in str(caught.value)
    assert not canary.exists()


def test_the_script_ends_with_2_and_one_line(tmp_path):
    words = ["--datadir", tmp_path / "fern", "--basedir", tmp_path / "logs", "--device", "cpu"]
    result = run_script(words)
    assert result.returncode == 2
    assert "python data/download.py fern" in result.stderr
    assert "Traceback" not in result.stderr and len(result.stderr.splitlines()) == 1


# ---------------------------------------------------------------------------------- ray batches


def pixels_of(scene, rays):
    """(view, x, y) of world rays [B], from their geometry alone."""
    offset = (rays.origins[:, None] - scene.c2w[None, :, :, 3]).norm(dim=-1)
    view = offset.argmin(-1)
    local = torch.einsum("bji,bj->bi", scene.c2w[view][:, :, :3], rays.directions)
    fx, fy, cx, cy = scene.intrinsics[view].unbind(-1)
    x = local[:, 0] / -local[:, 2] * fx + cx - 0.5
    y = cy - local[:, 1] / -local[:, 2] * fy - 0.5
    grid = torch.stack([x, y]).round()
    assert (torch.stack([x, y]) - grid).abs().max() < 1e-3  # pixels; float32
    return view, *grid.long()


def draw(scene, count=3000, seed=0, **settings):
    return scene.sample_rays(count, torch.Generator().manual_seed(seed), **settings)


@pytest.mark.parametrize("kind", ["blender", "deepvoxels", "llff"])
def test_sampled_colors_are_the_pictures_pixels(request, kind):
    scene = load(request.getfixturevalue(f"demo_{kind}"), kind)
    rays, colors = draw(scene)
    view, x, y = pixels_of(scene, rays)
    assert set(view.tolist()) == set(scene.splits["train"])  # all of them, and no others
    pictures = torch.stack([scene.picture(i) for i in range(NUM_VIEWS)])
    assert torch.equal(colors, pictures[view, y, x])
    # 3000 draws from 1024 places: nearly all are met, also the border.
    assert len(set(zip(x.tolist(), y.tolist(), strict=True))) > 900
    assert (x.min(), x.max(), y.min(), y.max()) == (0, 31, 0, 31)


def test_crop_stays_in_the_crop_and_fills_it(demo_blender):
    scene = load(demo_blender, "blender")
    for crop, low, high in ((0.5, 8, 23), (0.25, 12, 19), (1.0, 0, 31)):
        _, x, y = pixels_of(scene, draw(scene, crop=crop)[0])
        assert (x.min(), x.max(), y.min(), y.max()) == (low, high, low, high)
    assert len(draw(scene, 4, crop=1e-3)[1]) == 4  # less than a pixel: still one


def test_one_image_uses_one_view_which_changes(demo_blender):
    scene = load(demo_blender, "blender")
    used = set()
    for seed in range(40):
        view, _, _ = pixels_of(scene, draw(scene, 50, seed, one_image=True)[0])
        assert len(set(view.tolist())) == 1
        used.add(view[0].item())
    assert used == set(scene.splits["train"])


def test_the_generator_alone_decides_the_rays(demo_blender):
    scene = load(demo_blender, "blender")
    torch.manual_seed(0)
    rays, colors = draw(scene, seed=1)
    torch.manual_seed(1)
    same_rays, same_colors = draw(scene, seed=1)
    assert torch.equal(colors, same_colors)
    assert all(torch.equal(a, b) for a, b in zip(rays, same_rays, strict=True))
    assert not torch.equal(colors, draw(scene, seed=2)[1])


@pytest.mark.parametrize("center", ["--pixel_center", "--no-pixel_center"])
@pytest.mark.parametrize("factor", [2, 3, 5])
def test_a_resized_pixel_looks_through_the_middle_of_its_block(demo_blender, factor, center):
    scene = load(demo_blender, "blender", center)
    small = scene.resized(factor)
    assert small.height == small.width == DEMO_SIZE // factor
    x, y = torch.tensor([0, 3, 5]), torch.tensor([1, 0, 4])
    found = small.rays(x.float(), y.float(), small.c2w[0], small.intrinsics[0])
    inner = torch.arange(factor)
    blocks = [
        scene.rays((x * factor + dx).float(), (y * factor + dy).float(), *camera).directions
        for dx in inner
        for dy in inner
        for camera in [(scene.c2w[0], scene.intrinsics[0])]
    ]
    mean = torch.stack(blocks).mean(0)
    torch.testing.assert_close(found.directions, mean, rtol=0, atol=1e-5)
    assert scene.resized(100).height == 1
    assert scene.height == DEMO_SIZE  # the scene itself is as it was
    assert scene.resized(0) is scene and scene.resized(1) is scene


def test_background_shows_behind_transparent_pixels(demo_blender):
    white, said = load(demo_blender, "blender"), []
    black = load(demo_blender, "blender", "--no-white_bkgd", warn=said.append)
    assert len(said) == 1 and "--white_bkgd" in said[0]
    alpha = white.images[0, ..., 3:].float() / 255
    assert alpha.min() == 0 and alpha.max() == 1
    rgb = black.images[0, ..., :3].float() / 255
    torch.testing.assert_close(black.picture(0), rgb * alpha, rtol=0, atol=1e-6)
    torch.testing.assert_close(white.picture(0), rgb * alpha + 1 - alpha, rtol=0, atol=1e-6)
