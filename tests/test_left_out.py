"""Pictures that are missing, broken or without a pose are left out by name; training goes on."""

import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from small_captures import (
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
    pictures_in,
    read_back,
)

from nerf.datasets.colmap_model import Camera, Model
from nerf.datasets.colmap_write import write_model
from nerf.datasets.identity import scene_difference, scene_identity
from nerf.datasets.images import why_unreadable


def by_name(scene):
    """Picture's name -> its pixels, camera position and focal length."""
    return {
        name.rpartition("v")[2]: (scene.images[view], scene.c2w[view], scene.intrinsics[view])
        for view, name in enumerate(scene.names)
    }


def same_views(first, second, poses=True):
    """Whether the views of ``first`` have the pictures and cameras of their names in ``second``."""
    found, expected = by_name(first), by_name(second)
    for name, (image, c2w, intrinsics) in found.items():
        assert torch.equal(image[..., :3], expected[name][0][..., :3]), name
        torch.testing.assert_close(intrinsics, expected[name][2])
        if poses:
            place = [scene.file_world(values[:, 3].numpy()) for scene, values in
                     ((first, c2w), (second, expected[name][1]))]  # fmt: skip
            np.testing.assert_allclose(*place, atol=1e-4)
    return set(expected) - set(found)


def cut(path):
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


DAMAGES = {
    "missing": lambda path: path.unlink(),
    "cut off": cut,
    "empty": lambda path: path.write_bytes(b""),
    "a web page": lambda path: path.write_text("<html>404</html>"),
    "an animation": lambda path: picture(1).save(
        path, save_all=True, append_images=[picture(2)], duration=100
    ),
}


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("damage", DAMAGES)
def test_one_bad_picture_is_left_out_by_name(tmp_path, kind, damage):
    folder = make(tmp_path, kind)
    whole = read_back(folder, kind)[0]
    DAMAGES[damage](pictures_in(folder, kind) / "v4.png")
    scene, said = read_back(folder, kind)
    assert same_views(scene, whole) == {"4"} and len(scene.images) == 5
    assert sorted(set(sum(scene.splits.values(), []))) == list(range(5))
    assert [line for line in said if "1 of 6" in line and "left out" in line and "v4.png" in line]
    identity = scene_identity(scene)  # a run goes on with what is used, in every process
    assert not scene_difference(identity, read_back(folder, kind)[0])
    for number in (1, 2, 3):
        cut(pictures_in(folder, kind) / f"v{number}.png")
    with pytest.raises(ValueError, match=r"4 of 6 pictures are .*too few"):
        read_back(folder, kind)


@pytest.mark.parametrize("suffix", [".png", ".jpg"])
def test_a_file_cut_anywhere_is_unreadable_and_a_whole_one_is_not(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    pixels = np.random.default_rng(0).integers(0, 255, (48, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    assert why_unreadable(path) is None
    content = path.read_bytes()
    path.write_bytes(content + b"trailer of a phone")
    assert why_unreadable(path) is None
    for part in (0.0, 0.01, 0.3, 0.7, 0.95):
        path.write_bytes(content[: int(part * len(content))])
        assert why_unreadable(path), part
    if suffix == ".png":
        middle = len(content) // 2
        path.write_bytes(content[:middle] + bytes(40) + content[middle + 40 :])
        assert why_unreadable(path)


@pytest.mark.parametrize("damage", ["missing", "cut off"])
def test_test_pictures_may_all_be_bad(tmp_path, damage):
    folder, said = exported(tmp_path), []
    shutil.copy(folder / "transforms_train.json", folder / "transforms_test.json")
    shutil.copytree(folder / "images", folder / "test")

    def rename(top):
        for frame in top["frames"]:
            frame["file_path"] = frame["file_path"].replace("images/", "test/")

    edit(folder, rename, "transforms_test.json")
    for path in (folder / "test").iterdir():
        DAMAGES[damage](path)
    scene = load(folder, "--testskip", "1", said=said)
    assert len(scene.images) == 6 and not scene.splits.get("test")
    assert any("none of the 6 test pictures" in line for line in said)


def test_deepvoxels_pictures_without_a_pose_are_left_out_by_name(tmp_path):
    folder = make(tmp_path, "deepvoxels")
    whole = read_back(folder, "deepvoxels")[0]
    (folder / "train" / "cube" / "pose" / "v2.txt").unlink()
    scene, said = read_back(folder, "deepvoxels")
    assert same_views(scene, whole) == {"2"}
    assert any("no pose" in line and "v2.png" in line for line in said)


# ------------------------------------------------------------------- LLFF's rows have no names


def rename(folder, form):
    """LLFF's pictures by another pattern; the order stays."""
    for number, path in enumerate(sorted((folder / "images").iterdir())):
        path.rename(path.with_name(form.format(number)))


def with_model(folder):
    """A COLMAP model beside an LLFF capture, of the same cameras."""
    rows = np.load(folder / "poses_bounds.npy")
    matrices = rows[:, :15].reshape(-1, 3, 5)
    c2w = np.stack([matrices[..., 1], -matrices[..., 0], matrices[..., 2], matrices[..., 3]], -1)
    names = [path.name for path in sorted((folder / "images").iterdir())]
    camera = Camera("PINHOLE", WIDTH, HEIGHT, (35.0, 35.0, WIDTH / 2, HEIGHT / 2))
    points = np.zeros((1, 3)), np.zeros((1, 3), np.uint8), np.zeros((0, 2), int)
    write_model(folder / "sparse" / "0", Model({1: camera}, names, [1] * 6, c2w, *points))


def with_list(folder):
    names = [path.name for path in sorted((folder / "images").iterdir())]
    (folder / "view_imgs.txt").write_text("\n".join(names) + "\n")


def with_reduced(folder):
    load(folder, "--factor", "2", kind="llff")


WITNESSES = {"model": with_model, "list": with_list, "reduced": with_reduced}


@pytest.mark.parametrize(
    ("witness", "change"),
    [(w, c) for w in WITNESSES for c in ("fewer", "more", "another")][:-1],
)  # but not: reduced pictures and as many others, which they may have been made from
def test_what_names_the_rows_decides_which_pictures_belong_to_them(tmp_path, witness, change):
    """A picture is missing, one more is there that was not registered, or both: equal numbers."""
    folder = llff(tmp_path)
    whole = load(folder, "--factor", "1", kind="llff")
    WITNESSES[witness](folder)
    if change != "more":
        (folder / "images" / "v1.png").unlink()
    if change != "fewer":
        picture(77).save(folder / "images" / "v3b.png")
    for factor in ("1", "2") if witness != "reduced" else ("1",):
        said = []
        scene = load(folder, "--factor", factor, kind="llff", said=said)
        if factor == "1":
            assert same_views(scene, whole) == (set() if change == "more" else {"1"})
        assert len(scene.images) == (6 if change == "more" else 5)
        assert change == "fewer" or any("no pose" in line and "v3b.png" in line for line in said)
        assert change == "more" or any("missing" in line and "v1.png" in line for line in said)


def test_a_model_of_other_cameras_names_nothing(tmp_path):
    folder = llff(tmp_path)
    with_model(folder)
    rows = np.load(folder / "poses_bounds.npy")
    rows[:, 3] += 0.3 * np.arange(6)
    np.save(folder / "poses_bounds.npy", rows)
    (folder / "images" / "v1.png").unlink()
    rename(folder, "photo of {} things.png")
    with pytest.raises(ValueError, match="5 pictures but 6 poses"):
        load(folder, "--factor", "1", kind="llff")


@pytest.mark.parametrize(
    ("form", "gone", "decided"),
    [
        ("image{:03d}.png", [2], True),
        ("image{:03d}.png", [0], False),  # the first or the one after the last
        ("image{:03d}.png", [5], False),
        ("view{}_a.png", [2, 3], True),
    ],
)
def test_numbers_in_names_decide_where_no_other_numbers_may_have_been(
    tmp_path, form, gone, decided
):
    folder = llff(tmp_path)
    rename(folder, form)
    whole = load(folder, "--factor", "1", kind="llff")
    for number in gone:
        (folder / "images" / form.format(number)).unlink()
    if not decided:
        with pytest.raises(ValueError, match="5 pictures but 6 poses"):
            load(folder, "--factor", "1", kind="llff")
        return
    said = []
    scene = load(folder, "--factor", "1", kind="llff", said=said)
    kept = [number for number in range(6) if number not in gone]
    assert torch.equal(scene.images, whole.images[kept])
    place = [scene.file_world(scene.c2w[:, :, 3].numpy()), whole.file_world(whole.c2w[:, :, 3])]
    np.testing.assert_allclose(place[0], place[1][kept], atol=1e-4)
    assert any("numbers in their names" in line for line in said)
    assert any("missing" in line and form.format(gone[0]) in line for line in said)


@pytest.mark.parametrize("originals", [True, False])
def test_a_broken_reduced_picture_is_made_again_or_left_out(tmp_path, originals):
    folder, said = llff(tmp_path), []
    whole = load(folder, "--factor", "2", kind="llff")
    cut(folder / "images_2" / "v3.png")
    if not originals:
        shutil.rmtree(folder / "images")
    scene = load(folder, "--factor", "2", kind="llff", said=said)
    assert len(scene.images) == (6 if originals else 5)
    kept = list(range(6)) if originals else [0, 1, 2, 4, 5]
    assert torch.equal(scene.images, whole.images[kept])
    assert any("v3.png" in line for line in said)


def test_colmap_without_originals_uses_what_is_reduced_or_names_the_factor(tmp_path):
    folder, said = colmap(tmp_path), []
    (folder / "images").rename(folder / "images_2")
    for path in (folder / "images_2").iterdir():
        Image.open(path).reduce(2).save(path)
    (folder / "images_2" / "v1.png").unlink()
    assert len(load(folder, "--factor", "2", kind="colmap", said=said).images) == 5
    assert any("v1.png" in line for line in said)
    with pytest.raises(ValueError, match="give --factor 2"):
        load(folder, "--factor", "4", kind="colmap")


# --------------------------------------------------------------------------------------- masks


def black(path):
    Image.new("L", (WIDTH, HEIGHT), 0).save(path)


MASK_DAMAGES = {"black": black, "cut off": cut, "empty": lambda path: path.write_bytes(b"")}


@pytest.mark.parametrize("kind", ["blender", "transforms", "colmap", "llff", "deepvoxels"])
@pytest.mark.parametrize("damage", MASK_DAMAGES)
def test_a_picture_with_a_bad_mask_is_left_out_by_name(tmp_path, kind, damage):
    folder = make(tmp_path, kind, count=7)
    masks = pictures_in(folder, kind).parent / "masks"
    masks.mkdir()
    for number in range(7):
        Image.new("L", (WIDTH, HEIGHT), 255).save(masks / f"v{number}.png")
    MASK_DAMAGES[damage](masks / "v4.png")
    scene, said = read_back(folder, kind)
    left = {scene.names[view][-2:] for views in scene.splits.values() for view in views}
    assert left == {f"v{number}" for number in range(7) if number != 4}
    assert any("leaves no pixel of 1 picture" in line and "v4" in line for line in said)
    assert damage == "black" or any("masks cannot be read: " in line for line in said)
    for number in range(6):
        black(masks / f"v{number}.png")
    with pytest.raises(ValueError, match="wholly masked"):
        read_back(folder, kind)


def test_a_frames_missing_mask_leaves_its_picture_out(tmp_path):
    folder = edit(exported(tmp_path), lambda top: top["frames"][1].update(mask_path="m.png"))
    said = []
    scene = load(folder, kind="transforms", said=said)
    assert all(scene.names[v] != "images/v1" for views in scene.splits.values() for v in views)
    assert any("m.png (missing)" in line for line in said)


def test_other_folders_of_masks_are_named(tmp_path):
    folder, said = exported(tmp_path), []
    (folder / "segmentation").mkdir()
    black(folder / "segmentation" / "v1.png")
    assert load(folder, said=said).usable is None
    assert any("segmentation: not used" in line for line in said)


# ------------------------------------------------------------------------- splits and reductions


@pytest.mark.parametrize("kind", ["colmap", "llff"])
def test_another_split_of_the_same_views_is_named_as_such(tmp_path, kind):
    folder = make(tmp_path, kind, count=9)
    saved = scene_identity(read_back(folder, kind, "--llffhold", "8")[0])
    for hold in ("2", "9", "0"):
        difference = scene_difference(saved, read_back(folder, kind, "--llffhold", hold)[0])
        assert "another split of the same views" in difference and "--llffhold" in difference
    other = make(tmp_path / "other", kind, count=12)
    difference = scene_difference(saved, read_back(other, kind)[0])
    assert difference and "another split" not in difference


def test_a_resumed_run_that_lost_a_picture_says_so(tmp_path):
    folder = exported(tmp_path, count=8)
    saved = scene_identity(load(folder, kind="blender"))
    cut(folder / "images" / "v3.png")
    difference = scene_difference(saved, load(folder, kind="blender", said=[]))
    assert "8 training views -> 7" in difference and "cannot be read any more" in difference


@pytest.mark.parametrize("kind", ["blender", "transforms"])
def test_llffs_factor_on_another_format_is_said(tmp_path, kind):
    said = []
    scene = load(exported(tmp_path), "--factor", "4", kind=kind, said=said)
    assert (scene.width, scene.height) == (WIDTH // 4, HEIGHT // 4)
    assert any("reduced 4 times, to 8x6" in line and "--factor 1" in line for line in said)
    said.clear()
    load(tmp_path, kind=kind, said=said)
    assert not any("reduced" in line for line in said)


def test_a_default_factor_that_leaves_little_is_said(tmp_path):
    said = []
    scene = load(colmap(tmp_path), kind="colmap", said=said)
    assert scene.width == WIDTH // 8
    assert any("--factor 8, the default" in line for line in said)
