"""What exporters of posed pictures write: every item is used, or named where it is not.

The small scenes are those of ``small_captures``. What is left out: test_left_out.py.
"""

import shutil
import unicodedata

import numpy as np
import photos
import pytest
import torch
from PIL import Image
from small_captures import (
    FOCAL,
    HEIGHT,
    MAKERS,
    WIDTH,
    colmap,
    edit,
    exported,
    llff,
    load,
    make,
    picture,
    poses,
    read_back,
)

from nerf.occupancy import Box, OccupancyGrid
from nerf.scene_bounds import carve

# --------------------------------------------------------------------- 1. one reader for all keys


def test_center_lens_shift_is_read_whoever_wrote_the_file(tmp_path):
    folder = exported(tmp_path, cx=20.0, cy=9.0, w=WIDTH, h=HEIGHT)
    expected = [FOCAL, FOCAL, 20.0, 9.0]
    for kind in ("auto", "transforms", "blender"):
        scene = load(folder, kind=kind)
        np.testing.assert_allclose(scene.intrinsics[0, :4], expected, rtol=1e-5)
        assert scene.pixel_center


def test_angles_of_single_frames_and_of_the_height_are_read(tmp_path):
    zoom = 2 * np.arctan(WIDTH / 2 / 55.0)
    folder = exported(tmp_path)
    edit(folder, lambda top: top["frames"][2].update(camera_angle_x=zoom))
    for kind in ("auto", "blender"):
        focal = load(folder, kind=kind).intrinsics[:, :2]
        np.testing.assert_allclose(focal[2], 55.0, rtol=1e-5)
        np.testing.assert_allclose(focal[[0, 1, 3, 4, 5]], FOCAL, rtol=1e-5)
    angle_y = 2 * np.arctan(HEIGHT / 2 / 50.0)  # pixels that are not square
    folder = exported(tmp_path / "tall", camera_angle_y=angle_y)
    np.testing.assert_allclose(load(folder).intrinsics[0, :2], [FOCAL, 50.0], rtol=1e-5)
    folder = exported(tmp_path / "only", camera_angle_x=None, camera_angle_y=angle_y)
    np.testing.assert_allclose(load(folder).intrinsics[0, :2], 50.0, rtol=1e-5)


def test_a_box_is_read_from_transforms_train(tmp_path):
    scene = load(exported(tmp_path, aabb_scale=4, scale=0.25, offset=[0.5, 0.5, 0.5]))
    assert scene.box.tolist() == [[-4.0] * 3, [4.0] * 3]
    assert scene.file_units == pytest.approx(2.0)
    scene = load(tmp_path, kind="blender")  # in the file's own world
    torch.testing.assert_close(scene.box, torch.tensor([[-8.0] * 3, [8.0] * 3]))


def test_near_and_far_of_the_file_are_read(tmp_path):
    folder = exported(tmp_path, near=2.5, far=7.5)
    for kind in ("blender", "transforms"):
        scene = load(folder, kind=kind)
        bounds = np.array([scene.near, scene.far]) * scene.file_units
        np.testing.assert_allclose(bounds, [2.5, 7.5], rtol=1e-6)


def test_plain_blender_scenes_stay_as_they_are(tmp_path):
    said = []
    scene = load(exported(tmp_path), "--white_bkgd", said=said)
    assert (scene.near, scene.far) == (2.0, 6.0) and not scene.pixel_center
    np.testing.assert_allclose(scene.c2w, poses(6)[:, :3], atol=1e-6)
    assert len(said) == 1 and "format blender" in said[0]
    centered = exported(tmp_path / "b", cx=WIDTH / 2, cy=HEIGHT / 2, w=WIDTH, h=HEIGHT)
    torch.testing.assert_close(load(centered).intrinsics, scene.intrinsics)


@pytest.mark.parametrize("distance", [0.4, 12.0, 400.0])
def test_near_and_far_reach_what_far_and_close_cameras_look_at(tmp_path, distance):
    said = []
    scene = load(exported(tmp_path, distance=distance), said=said)
    assert scene.near < 0.7 * distance and 1.3 * distance < scene.far < 2 * distance
    assert any("do not reach" in line for line in said)


@pytest.mark.parametrize("kind", ["blender", "transforms", "colmap", "llff"])
def test_typed_near_and_far_are_obeyed_in_every_format(tmp_path, kind):
    folder = make(tmp_path, kind)
    flags = ("--near", "1.5", "--far", "7", "--factor", "1", "--no_ndc")
    scene = load(folder, *flags, kind=kind)
    assert (scene.near, scene.far) == (1.5, 7.0)


def test_typed_near_and_far_are_refused_in_ndc(tmp_path):
    with pytest.raises(ValueError, match="--near and --far are for world coordinates"):
        load(llff(tmp_path), "--near", "1", "--factor", "1", kind="llff")


def test_bounds_and_boxes_that_miss_the_scene_are_named(tmp_path):
    said = []
    load(exported(tmp_path), "--near", "9", "--far", "15", said=said)
    assert any("set --near and --far around 4" in line for line in said)
    load(exported(tmp_path / "far", distance=4.0, aabb_scale=128), said=said)
    assert any("lower aabb_scale" in line for line in said)
    load(exported(tmp_path / "off", aabb_scale=1, offset=[9, 9, 9]), said=said)
    assert any("outside of the box" in line for line in said)


# ------------------------------------------------------------- 2. two spellings of one quantity


def test_a_frame_replaces_every_spelling_of_the_top_level(tmp_path):
    size = {"w": WIDTH, "h": HEIGHT}
    folder = exported(tmp_path, "transforms.json", camera_angle_x=None, fl_x=70, fl_y=70, **size)

    def change(top):
        top["frames"][0]["camera_angle_x"] = 2 * np.arctan(WIDTH / 2 / 110.0)
        top["frames"][1]["fl_x"] = 90  # the top level's fl_y is of another lens
        top["frames"][2].update(w=WIDTH // 2, h=HEIGHT // 2)
        top.update(cx=20, cy=8)
        size = (WIDTH // 2, HEIGHT // 2)
        picture(2, size=size).save(folder / top["frames"][2]["file_path"])

    edit(folder, change, "transforms.json")
    scene = load(folder)
    np.testing.assert_allclose(scene.intrinsics[0], [110, 110, 20, 8], rtol=1e-5)
    np.testing.assert_allclose(scene.intrinsics[1], [90, 90, 20, 8], rtol=1e-5)
    np.testing.assert_allclose(scene.intrinsics[2], [35, 35, 10, 4], rtol=1e-5)
    np.testing.assert_allclose(scene.intrinsics[3], [70, 70, 20, 8], rtol=1e-5)


def test_contradicting_lens_models_are_refused(tmp_path):
    folder = exported(tmp_path, "transforms.json", camera_model="OPENCV", is_fisheye=True)
    with pytest.raises(ValueError, match="contradict each other"):
        load(folder)


# ------------------------------------------------------------------------------------- 3. masks


def left_black(path, mode="L"):
    """A mask whose left half is black, or transparent."""
    mask = np.full((HEIGHT, WIDTH), 255, np.uint8)
    mask[:, : WIDTH // 2] = 0
    if mode == "RGBA":
        mask = np.concatenate([np.full((HEIGHT, WIDTH, 3), 255, np.uint8), mask[..., None]], -1)
    path.parent.mkdir(exist_ok=True, parents=True)
    Image.fromarray(mask).save(path)


MASKS = {
    "COLMAP": ("masks/v1.png.png", "L"),
    "by name": ("masks/v1.png", "L"),
    "in its alpha": ("masks/v1.png", "RGBA"),
    "dynamic": ("images/dynamic_mask_v1.png", "inverted"),
}


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("form", MASKS)
def test_masks_of_every_form_are_used_in_every_format(tmp_path, kind, form):
    folder = make(tmp_path, kind)
    name, mode = MASKS[form]
    if kind == "deepvoxels":
        name = f"train/cube/{name.replace('images/', 'rgb/')}"
    left_black(folder / name, "RGBA" if mode == "RGBA" else "L")
    if mode == "inverted":
        Image.open(folder / name).point(lambda level: 255 - level).save(folder / name)
    scene, said = read_back(folder, kind)
    view = next(index for index, name in enumerate(scene.names) if name.endswith("v1"))
    assert scene.usable[view, :, WIDTH // 2 :].all() and not scene.usable[view, :, :16].any()
    assert scene.usable.sum() == (6 - 0.5) * WIDTH * HEIGHT
    assert any("mask" in line and "1 picture" in line for line in said)


def test_mask_path_in_transforms_train_is_used(tmp_path):
    left_black(exported(tmp_path) / "m.png")
    edit(tmp_path, lambda top: top["frames"][1].update(mask_path="m.png"))
    for kind in ("auto", "blender"):
        assert not load(tmp_path, kind=kind).usable[1, :, :16].any()


def test_masks_that_fit_no_picture_are_named(tmp_path):
    left_black(exported(tmp_path) / "masks" / "other.png")
    said = []
    assert load(tmp_path, said=said).usable is None
    assert any("not used" in line for line in said)


@pytest.mark.parametrize("factor", [1, 2])
def test_the_removed_background_of_llff_pictures_stays_removed(tmp_path, factor):
    folder = llff(tmp_path, mode="RGBA")
    for _ in range(2):  # the second time from images_2/
        scene = load(folder, "--white_bkgd", "--factor", str(factor), kind="llff")
        assert scene.images.shape[-1] == 4
        torch.testing.assert_close(scene.picture(0)[0, 0], torch.ones(3))


def test_opaque_alpha_of_llff_pictures_changes_nothing(tmp_path):
    folder = llff(tmp_path)
    before = load(folder, "--factor", "1", kind="llff").images
    for path in (folder / "images").iterdir():
        Image.open(path).convert("RGBA").save(path)
    assert torch.equal(load(folder, "--factor", "1", kind="llff").images, before)


# ------------------------------------------------------------------------- 4. stale derived data


def test_reduced_pictures_are_made_again_when_the_originals_changed(tmp_path):
    folder, said = llff(tmp_path), []
    before = load(folder, "--factor", "2", kind="llff").images
    picture(99).save(folder / "images" / "v3.png")
    after = load(folder, "--factor", "2", kind="llff", said=said).images
    assert not torch.equal(after[3], before[3]) and torch.equal(after[:3], before[:3])
    assert any("have changed since" in line for line in said)
    said.clear()
    assert torch.equal(load(folder, "--factor", "2", kind="llff", said=said).images, after)
    assert not said


@pytest.mark.parametrize("kind", ["llff", "colmap"])
def test_reduced_pictures_of_others_are_compared_with_the_originals(tmp_path, kind):
    folder, said = make(tmp_path, kind), []
    (folder / "images_2").mkdir()
    for path in (folder / "images").iterdir():
        Image.open(path).reduce(2).save(folder / "images_2" / path.name)
    load(folder, "--factor", "2", kind=kind, said=said)
    assert not [line for line in said if "ignored" in line]
    Image.new("RGB", (WIDTH, HEIGHT), (250, 40, 10)).save(folder / "images" / "v3.png")
    scene = load(folder, "--factor", "2", kind=kind, said=said)
    assert [line for line in said if "ignored" in line and "v3.png" in line]
    assert scene.images[3, 0, 0, 0] == 250


# ------------------------------------------------------------------- 5. pictures that are missing


def test_test_poses_without_pictures_leave_the_training_pictures(tmp_path):
    folder, said = exported(tmp_path), []
    shutil.copy(folder / "transforms_train.json", folder / "transforms_test.json")

    def rename(top):
        for frame in top["frames"]:
            frame["file_path"] = frame["file_path"].replace("images/", "test/")

    edit(folder, rename, "transforms_test.json")
    scene = load(folder, "--testskip", "1", said=said)
    assert len(scene.images) == 6 and not scene.splits.get("test")
    assert any("none of the 6 test pictures exists" in line for line in said)


@pytest.mark.parametrize("kind", ["blender", "colmap"])
def test_accents_may_be_composed_or_decomposed(tmp_path, kind):
    composed = [unicodedata.normalize("NFC", f"é{number}.png") for number in range(6)]
    folder = colmap(tmp_path, names=composed) if kind == "colmap" else exported(tmp_path)
    if kind == "blender":
        for number, name in enumerate(composed):
            (folder / "images" / f"v{number}.png").rename(folder / "images" / name)

        def rename(top):
            for frame, name in zip(top["frames"], composed, strict=True):
                frame["file_path"] = f"images/{name}"

        edit(folder, rename)
    for name in composed:
        path = folder / "images" / name
        path.rename(path.with_name(unicodedata.normalize("NFD", name)))
    said = []
    assert len(load(folder, "--factor", "1", kind=kind, said=said).images) == 6
    assert not any("left out" in line for line in said)


def test_the_model_with_most_pictures_is_used(tmp_path):
    colmap(tmp_path / "a", 6)
    colmap(tmp_path / "b", 4)
    # The smaller model has the larger file: more features.
    shutil.copytree(tmp_path / "b" / "sparse" / "0", tmp_path / "a" / "sparse" / "1")
    path = tmp_path / "a" / "sparse" / "1" / "images.bin"
    path.write_bytes(path.read_bytes() + bytes(10000))
    said = []
    assert len(load(tmp_path / "a", "--factor", "1", said=said).images) == 6
    assert any("2 sparse models" in line and "1/ (4)" in line for line in said)


def test_names_with_a_dot_and_of_several_cameras_are_those_of_the_files(tmp_path):
    names = [f"./cam{number % 2}/v{number // 2}.png" for number in range(6)]
    said = []
    scene = load(colmap(tmp_path, names=names), "--factor", "1", said=said)
    assert len(scene.images) == 6 and len(set(scene.names)) == 6
    assert not any("left out" in line for line in said)


# ------------------------------------------------------------------------ 6. one bad picture


@pytest.mark.parametrize("kind", ["blender", "transforms", "colmap", "llff"])
def test_one_picture_of_another_size_is_left_out_by_name(tmp_path, kind):
    folder, said = make(tmp_path, kind), []
    picture(4, size=(WIDTH, HEIGHT - 8)).save(folder / "images" / "v4.png")
    for flags in (("--factor", "1"), ("--factor", "2")):
        scene = load(folder, *flags, kind=kind, said=said)
        assert len(scene.images) == 5 and not any(name.endswith("v4") for name in scene.names)
        assert any("1 of 6" in line and "v4.png" in line for line in said)


@pytest.mark.parametrize("kind", ["blender", "transforms"])
def test_blank_pictures_are_left_out_of_training_by_name(tmp_path, kind):
    folder, said = exported(tmp_path, count=8, mode="RGBA"), []
    with Image.open(folder / "images" / "v3.png") as image:
        image.putalpha(0)
        image.save(folder / "images" / "v3.png")
    Image.new("RGBA", (WIDTH, HEIGHT), "white").save(folder / "images" / "v5.png")
    scene = load(folder, kind=kind, said=said)
    left = [scene.names[view] for view in scene.splits["train"]]
    assert len(left) == 6 and "images/v3" not in left and "images/v5" not in left
    assert any("v3 (wholly transparent)" in line and "v5 (one color" in line for line in said)


def test_scenes_that_are_mostly_empty_stay(tmp_path):
    folder, said = exported(tmp_path, mode="RGBA"), []
    for number in range(3):
        with Image.open(folder / "images" / f"v{number}.png") as image:
            image.putalpha(0)
            image.save(folder / "images" / f"v{number}.png")
    assert len(load(folder, said=said).splits["train"]) == 6
    assert any("so many" in line for line in said)


def test_silhouettes_that_never_meet_end_in_one_line(tmp_path):
    scene = load(exported(tmp_path, mode="RGBA"), kind="blender")
    box = Box(-0.5 * torch.ones(3), 0.5 * torch.ones(3), 64)
    scene.images[..., 3] = 0
    with pytest.raises(ValueError, match="check the poses") as caught:
        carve(scene, OccupancyGrid(16), box)
    assert "\n" not in str(caught.value)


def test_16_bit_photos_are_scaled_and_transparent_ones_stay_so(tmp_path):
    source, said = tmp_path / "photos", []
    source.mkdir()
    for number in range(3):
        gray = np.asarray(picture(number).convert("L"), np.uint16) * 257
        Image.fromarray(gray).save(source / f"gray{number}.png")
    picture(7, "RGBA").save(source / "cut.png")
    found = photos.take_photos(source, tmp_path / "out", 1000, said.append)
    assert [photo.name for photo in found] == ["cut.png", "gray0.jpg", "gray1.jpg", "gray2.jpg"]
    assert any("1 photos are transparent" in line for line in said)
    with Image.open(tmp_path / "out" / "gray0.jpg") as image:
        expected = np.asarray(picture(0).convert("L"), float)
        assert np.abs(np.asarray(image.convert("L"), float) - expected).mean() < 8
    with Image.open(tmp_path / "out" / "cut.png") as image:
        assert image.mode == "RGBA" and image.getpixel((0, 0))[3] == 0


# ------------------------------------------------------------------- 7. colors behind the object


@pytest.mark.parametrize(
    ("color", "flags", "cure"),
    [
        ((255, 255, 255), (), "add --white_bkgd"),
        ((0, 0, 0), ("--white_bkgd",), "leave --white_bkgd out"),
        ((255, 255, 255), ("--white_bkgd",), None),
        ((0, 0, 0), (), None),
    ],
)
def test_a_plain_background_is_noticed(tmp_path, color, flags, cure):
    folder, said = exported(tmp_path), []
    for number in range(6):
        image = Image.new("RGB", (WIDTH, HEIGHT), color)
        image.paste(picture(number, size=(10, 10)), (10, 8))
        image.save(folder / "images" / f"v{number}.png")
    load(folder, *flags, said=said)
    assert [line for line in said if "--white_bkgd" in line] == [
        line for line in said if cure and cure in line
    ]
    assert bool(cure) == any("border of one color" in line for line in said)


def test_transparent_pictures_without_white_bkgd_are_noticed(tmp_path):
    folder, said = exported(tmp_path, mode="RGBA"), []
    load(folder, said=said)
    assert sum("--white_bkgd" in line for line in said) == 1
    said.clear()
    load(folder, "--white_bkgd", said=said)
    assert not any("--white_bkgd" in line for line in said)


# -------------------------------------------------------------------------------- 8. the flags


@pytest.mark.parametrize(
    ("kind", "flag", "value"),
    [
        ("blender", "shape", "cube"),
        ("blender", "spherify", None),
        ("blender", "llffhold", "3"),
        ("llff", "testskip", "3"),
        ("colmap", "shape", "cube"),
    ],
)
def test_flags_of_another_loader_are_refused(tmp_path, kind, flag, value):
    words = [f"--{flag}", *([value] if value else []), "--factor", "1"]
    with pytest.raises(ValueError, match=f"--{flag}.* is for data in format") as caught:
        load(make(tmp_path, kind), *words, kind=kind)
    assert f"this is {kind}" in str(caught.value)


@pytest.mark.parametrize("kind", ["blender", "transforms", "colmap", "llff"])
def test_every_format_obeys_both_reductions(tmp_path, kind):
    folder = make(tmp_path, kind)
    for flag in (("--factor", "2"), ("--downscale", "2"), ("--half_res",)):
        scene = load(folder, *flag, kind=kind)
        assert (scene.height, scene.width) == (HEIGHT // 2, WIDTH // 2)
    with pytest.raises(ValueError, match="both reduce"):
        load(folder, "--factor", "4", "--downscale", "2", kind=kind)


def test_an_explicit_type_is_obeyed_or_refused(tmp_path):
    folder, said = colmap(tmp_path), []
    with pytest.raises(ValueError, match="is in format colmap, not llff"):
        load(folder, kind="llff")
    assert len(load(folder, "--factor", "1", kind=None, said=said).images) == 6
    assert "format colmap" in said[0] and "--dataset_type" in said[0]


def test_without_a_type_llff_stays_the_default(tmp_path):
    folder, said = llff(tmp_path), []
    assert load(folder, "--factor", "1", kind=None, said=said).ndc
    assert not said


# ------------------------------------------------------------------- 9. the capture's own world


@pytest.mark.parametrize("flags", [("--no_ndc",), ("--no_ndc", "--spherify"), ()])
def test_llff_scenes_know_their_own_world(tmp_path, flags):
    folder = llff(tmp_path)
    rows = np.load(folder / "poses_bounds.npy")
    turn = np.linalg.qr(np.random.default_rng(3).normal(size=(3, 3)))[0]
    turn *= np.sign(np.linalg.det(turn))
    matrices = rows[:, :15].reshape(-1, 3, 5)
    matrices[..., :3] = turn @ matrices[..., :3]
    matrices[..., 3] = 3 * matrices[..., 3] @ turn.T
    if "--spherify" in flags:  # cameras that look at one point
        for index, pose in enumerate(poses(6)):
            matrices[index, :, 0], matrices[index, :, 1] = -pose[:3, 1], pose[:3, 0]
            matrices[index, :, 2], matrices[index, :, 3] = pose[:3, 2], 5 * pose[:3, 3] + 2
    rows[:, :15] = matrices.reshape(-1, 15)
    np.save(folder / "poses_bounds.npy", rows)
    scene = load(folder, "--factor", "1", *flags, kind="llff")
    found = scene.file_world(scene.c2w[:, :, 3].numpy())
    np.testing.assert_allclose(found, matrices[..., 3], atol=1e-4)


@pytest.mark.parametrize("kind", ["blender", "transforms", "colmap", "llff"])
def test_every_loader_leads_back_to_the_files_world(tmp_path, kind):
    scene = load(make(tmp_path, kind), "--factor", "1", kind=kind)
    assert scene.to_world.shape == (4, 4)
    if kind != "llff":
        found = scene.file_world(scene.c2w[:, :, 3].numpy())
        places = {name: pose[:3, 3] for name, pose in zip(range(6), poses(6), strict=True)}
        for name, place in zip(scene.names, found, strict=True):
            np.testing.assert_allclose(place, places[int(name[-1])], atol=1e-4)
