"""Ordinary mistakes and other programs' files: read rightly, or named in one line with the cure."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from small_captures import (
    FOCAL,
    HEIGHT,
    WIDTH,
    colmap,
    edit,
    exported,
    llff,
    load,
    make,
    picture,
    read_back,
)

from nerf.datasets.colmap_model import read_model
from nerf.datasets.colmap_write import write_model

FILE = "transforms.json"


def frames(**change):
    """A change of all frames of transforms.json: values, or functions of the frame."""

    def apply(top):
        for frame in top["frames"]:
            frame.update({key: f(frame) if callable(f) else f for key, f in change.items()})

    return lambda folder: edit(folder, apply, FILE)


def top(**change):
    return lambda folder: edit(folder, lambda content: content.update(change), FILE)


def pose(change):
    return frames(transform_matrix=lambda f: change(np.array(f["transform_matrix"])).tolist())


def path(change):
    return frames(file_path=lambda frame: change(frame["file_path"]))


def encoded(encoding):
    def change(folder):
        text = (folder / FILE).read_text().replace("\n", "\r\n")
        (folder / FILE).write_text(text, encoding=encoding)

    return change


def renamed(change):
    def apply(folder):
        for file in (folder / "images").iterdir():
            file.rename(file.with_name(change(file.name)))

    return apply


# ------------------------------------------------------------------- read as if nothing were wrong

HARMLESS = {
    "byte order mark": encoded("utf-8-sig"),
    "UTF-16 of Windows": encoded("utf-16"),
    "backward slashes": path(lambda name: name.replace("/", "\\")),
    "a leading dot": path(lambda name: "./" + name),
    "no ending": path(lambda name: name.removesuffix(".png")),
    "capitals on disk": renamed(str.upper),
    "capitals in the file": path(lambda name: name.replace(".png", ".PNG")),
    "poses of three rows": pose(lambda matrix: matrix[:3]),
    "unknown keys": top(software="X", n_frames=6, exposure=[1, 2]),
    "depth pictures in another folder": lambda folder: shutil.copytree(
        folder / "images", folder / "depth"
    ),
}


@pytest.mark.parametrize("name", HARMLESS)
def test_what_does_not_matter_changes_nothing(tmp_path, name):
    folder = exported(tmp_path, FILE)
    expected = load(folder)
    HARMLESS[name](folder)
    said = []
    scene = load(folder, said=said)
    assert torch.equal(scene.images, expected.images) and len(said) == 1
    torch.testing.assert_close(scene.c2w, expected.c2w)
    torch.testing.assert_close(scene.intrinsics, expected.intrinsics)


def text_model(change):
    """A change of the lines of a text model's images.txt, or of all its files' bytes."""

    def apply(folder):
        model = read_model(folder / "sparse" / "0")
        shutil.rmtree(folder / "sparse" / "0")
        write_model(folder / "sparse" / "0", model, text=True)
        for file in (folder / "sparse" / "0").iterdir():
            file.write_bytes(change(file.name, file.read_text()).encode())

    return apply


def without_features(name, text):
    if name != "images.txt":
        return text
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    return "\n".join(lines[::2]) + "\n"


HARMLESS_MODELS = {
    "Windows lines": text_model(lambda _, text: text.replace("\n", "\r\n")),
    "byte order mark": text_model(lambda _, text: "\ufeff" + text),
    "no lines of features": text_model(without_features),
    "names begin with the folder": text_model(
        lambda name, text: text.replace(" v", " images/v") if name == "images.txt" else text
    ),
    "capitals on disk": renamed(str.upper),
    "a folder in capitals": lambda folder: (folder / "images").rename(folder / "Images"),
}


@pytest.mark.parametrize("name", HARMLESS_MODELS)
def test_what_does_not_matter_in_colmaps_files_changes_nothing(tmp_path, name):
    expected, _ = read_back(colmap(tmp_path), "colmap")
    HARMLESS_MODELS[name](tmp_path)
    scene, said = read_back(tmp_path, "colmap")
    assert torch.equal(scene.images, expected.images) and not said
    torch.testing.assert_close(scene.c2w, expected.c2w, atol=1e-5, rtol=0)


# ----------------------------------------------------------------------------- refused in one line

REFUSED = {
    "transposed": (pose(lambda matrix: matrix.T), "is transposed"),
    "flattened": (pose(np.ravel), "not a 4x4 table"),
    "decimal commas": (top(camera_angle_x="0,69"), "expected a finite number"),
    "a Windows path": (path(lambda name: "C:\\Users\\me\\" + name), "leads out of the data folder"),
    "another machine's path": (path(lambda name: "/home/me/" + name), "leads out"),
    "another ending": (path(lambda name: name.replace("png", "exr")), "v0.png is there"),
    "lens terms": (top(k5=0.1), 'lens term "k5"'),
    "Mitsuba's axes": (top(from_mitsuba=True), "other axes"),
    "width and height swapped": (top(w=HEIGHT, h=WIDTH), "camera is for 24x32"),
    "two focal lengths": (top(fl_x=70, w=WIDTH, h=HEIGHT), '"fl_x" is 70 pixels, but'),
    "no frames": (top(frames=[]), '"frames" is missing or empty'),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_right_is_refused(tmp_path, name):
    change, words = REFUSED[name]
    change(exported(tmp_path, FILE))
    with pytest.raises(ValueError, match=words) as caught:
        load(tmp_path)
    assert "\n" not in str(caught.value)


FOREIGN = {
    "Polycam": ["keyframes/images/1.jpg", "keyframes/cameras/1.json"],
    "Record3D": ["EXR_RGBD/metadata.json", "EXR_RGBD/rgb/0.jpg"],
    "NSVF": ["rgb/0_0.png", "pose/0_0.txt", "intrinsics.txt", "bbox.txt"],
    "NeRF\\+\\+": ["train/rgb/1.png", "train/pose/1.txt", "train/intrinsics/1.txt"],
    "NeuS": ["image/0.png", "mask/0.png", "cameras_sphere.npz"],
    "MVSNet": ["cams/00000000_cam.txt", "images/00000000.jpg", "pair.txt"],
    "Metashape": ["images/0.jpg", "cameras.xml"],
    "RealityCapture": ["images/0.jpg", "cameras.csv"],
    "OpenSfM": ["images/0.jpg", "reconstruction.json"],
    "without a model": ["images/0.jpg", "database.db"],
}


@pytest.mark.parametrize("name", FOREIGN)
def test_formats_without_a_loader_are_named(tmp_path, name):
    for file in FOREIGN[name]:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_bytes(b"")
    with pytest.raises(ValueError, match=f"{name}.*not read: ") as caught:
        load(tmp_path)
    assert ("from_photos.py" in str(caught.value)) == (tmp_path / "images").is_dir() or (
        name == "without a model"
    )


PLACES = {
    "a file of it": (lambda folder: folder / FILE, "give the folder that it is in"),
    "its pictures": (lambda folder: folder / "images", "is a part of a scene"),
}


@pytest.mark.parametrize("name", PLACES)
def test_a_part_of_a_scene_leads_to_the_whole(tmp_path, name):
    place, words = PLACES[name]
    with pytest.raises(ValueError, match=f"{words}.*--datadir {tmp_path}$"):
        load(place(exported(tmp_path, FILE)))


def test_another_shape_is_named(tmp_path):
    with pytest.raises(ValueError, match="it holds cube"):
        load(make(tmp_path, "deepvoxels"), kind="deepvoxels")


CONTENTS = {
    "HEIC": b"\0\0\0\x18ftypheic" + bytes(200),
    "Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
    "web page": b"<!DOCTYPE html><html>Not found</html>",
}


@pytest.mark.parametrize("name", CONTENTS)
def test_files_that_only_have_a_pictures_name_are_told(tmp_path, name):
    for file in (exported(tmp_path) / "images").iterdir():
        file.write_bytes(CONTENTS[name])
    with pytest.raises(ValueError, match=f"6 of 6 pictures are unreadable .*{name}"):
        load(tmp_path)


def test_a_scene_in_an_inner_folder_is_named(tmp_path):
    exported(tmp_path / "lego")
    with pytest.raises(ValueError, match=f"give --datadir {tmp_path}/lego"):
        load(tmp_path)


def test_parallel_cameras_with_spherify_are_one_line(tmp_path):
    with pytest.raises(ValueError, match="--spherify is for cameras around"):
        load(llff(tmp_path), "--factor", "1", "--spherify", "--no_ndc", kind="llff")


# ------------------------------------------------------------------------- used, with a word to it

FLIP = np.diag([1.0, -1.0, -1.0, 1.0])
NAMED = {
    "world-to-camera": (pose(np.linalg.inv), "if the poses were world-to-camera;"),
    "OpenCV's axes": (pose(lambda m: m @ FLIP), "camera-to-world in OpenCV's axes"),
    "both": (pose(lambda m: np.linalg.inv(m @ FLIP)), "world-to-camera in OpenCV's axes"),
    "transposed rotations": (
        pose(lambda m: np.block([[m[:3, :3].T, m[:3, 3:]], [m[3:]]])),
        "beside transposed rotations;",
    ),
    "transposed rotations in OpenCV's axes": (
        pose(lambda m: np.block([[(m @ FLIP)[:3, :3].T, m[:3, 3:]], [m[3:]]])),
        "beside transposed rotations in OpenCV's axes",
    ),
    "translations of world-to-camera": (
        pose(lambda m: np.block([[m[:3, :3], np.linalg.inv(m)[:3, 3:]], [m[3:]]])),
        "beside world-to-camera translations",
    ),
    "intrinsics of a unit picture": (
        lambda folder: [
            edit(folder, lambda content: content.pop("camera_angle_x"), FILE),
            top(fl_x=1.1, cx=0.5, cy=0.5)(folder),
        ],
        "focal lengths of 1.1 pixels",
    ),
    "another size": (
        lambda folder: [
            edit(folder, lambda content: content.pop("camera_angle_x"), FILE),
            top(fl_x=2 * FOCAL, cx=WIDTH, cy=HEIGHT)(folder),
        ],
        r"principal points lie at \(32, 24\)",
    ),
    "depth": (frames(depth_file_path="depth/1.png"), "depth_file_path: not used"),
    "a camera matrix": (frames(intrinsic_matrix=[[1]]), "intrinsic_matrix: not used"),
    "rolling shutter": (top(rolling_shutter=[0, 0, 1, 0]), "rolling_shutter: not used"),
    "white is transparent": (top(white_transparent=True), "white_transparent: not used"),
    "listed twice": (
        lambda folder: edit(folder, lambda c: c.update(frames=c["frames"] * 2), FILE),
        "6 frames repeat another",
    ),
    "two kinds of files": (
        lambda folder: shutil.copy(folder / FILE, folder / "transforms_train.json"),
        "transforms.json is read, not transforms_train.json",
    ),
    "tested on training pictures": (
        top(
            train_filenames=[f"images/v{n}.png" for n in range(6)],
            test_filenames=["images/v0.png", "images/v3.png"],
        ),
        "2 of 2 val views are training views",
    ),
}


@pytest.mark.parametrize("name", NAMED)
def test_what_gives_a_false_result_is_named_at_the_start(tmp_path, name):
    change, words = NAMED[name]
    said = []
    load(exported(tmp_path, FILE), said=said)
    assert len(said) == 1, said
    change(tmp_path)
    load(tmp_path, said=said)
    assert [line for line in said if re.search(words, line)], said


@pytest.mark.parametrize("number", [0, 1])
def test_cameras_that_look_outward_or_one_way_have_a_layout(tmp_path, number):
    """A turn on the spot, and parallel cameras: no common point, and finite poses."""

    def change(matrix):
        matrix[:3, 3] = [0.5, 0.2, 0.1] if number == 0 else matrix[:3, 3]
        matrix[:3, :3] = matrix[:3, :3] if number == 0 else np.eye(3)
        return matrix

    pose(change)(exported(tmp_path, FILE))
    said = []
    scene = load(tmp_path, said=said)
    assert scene.c2w.isfinite().all() and scene.file_units > 0.1
    assert scene.c2w[:, :, 3].abs().max() < 10
    assert number == 0 or not any("no common point" in line for line in said)


def test_empty_and_short_splits(tmp_path):
    folder = exported(tmp_path)
    content = json.loads((folder / "transforms_train.json").read_text())
    (folder / "transforms_test.json").write_text(json.dumps({**content, "frames": []}))
    one = {**content, "frames": [{**content["frames"][0], "file_path": "val/a.png"}]}
    (folder / "transforms_val.json").write_text(json.dumps(one))
    (folder / "val").mkdir()
    picture(50).save(folder / "val" / "a.png")
    scene = load(folder)
    assert {name: len(views) for name, views in scene.splits.items()} == {"train": 6, "val": 1}


def test_repeated_training_pictures_are_named(tmp_path):
    folder, said = exported(tmp_path), []

    def repeat(content):
        again = {**content["frames"][0], "file_path": "images/v1.png"}
        content["frames"] += [content["frames"][2], again]

    edit(folder, repeat)
    load(folder, said=said)
    assert any("2 of 8 training views repeat" in line and "1 of them" in line for line in said)


def test_a_picture_whose_background_was_not_removed_is_named(tmp_path):
    folder, said = exported(tmp_path, mode="RGBA"), []
    picture(3).save(folder / "images" / "v3.png")
    load(folder, "--white_bkgd", said=said)
    assert any("1 of 6 pictures have no transparent pixel" in line for line in said)


def test_an_explicit_blender_type_reads_the_split_files(tmp_path):
    folder = exported(tmp_path)
    shutil.copy(folder / "transforms_train.json", folder / FILE)
    edit(folder, lambda content: content.update(frames=content["frames"][:4]), FILE)
    assert len(load(folder, kind="blender").images) == 6
    assert len(load(folder, kind="transforms").images) == 4


def test_the_capture_config_works_for_every_posed_capture(tmp_path):
    """configs/capture360_fast.txt has LLFF's spherify: a Blender file is laid out so, too."""
    said = []
    words = ["--config", "configs/capture360_fast.txt", "--factor", "1", "--expname", "x"]
    scene = load(exported(tmp_path, distance=9.0), *words, said=said)
    assert "format transforms" in said[0]
    assert 0.8 < scene.c2w[:, :, 3].norm(dim=-1).mean() < 1.2


# ------------------------------------------------------------------------ kinds of picture files


def saved(folder, name, image, **settings):
    image.save(folder / "images" / name, **settings)


KINDS = {
    "palette": lambda image: image.convert("P", palette=Image.Palette.ADAPTIVE),
    "gray": lambda image: image.convert("L"),
    "16-bit gray": lambda image: Image.fromarray(np.asarray(image.convert("L"), np.uint16) * 257),
    "with alpha": lambda image: image.convert("RGBA"),
    "gray with alpha": lambda image: image.convert("LA"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_one_picture_of_another_kind_has_the_right_colors(tmp_path, kind):
    folder = exported(tmp_path, FILE)
    image = picture(2)
    saved(folder, "v2.png", KINDS[kind](image))
    scene = load(folder)
    expected = image.convert("L").convert("RGB") if "gray" in kind else image
    tolerance = 40 if kind == "palette" else 1
    found = scene.picture(2) * 255
    assert (found - torch.tensor(np.array(expected))).abs().max() <= tolerance
    torch.testing.assert_close(scene.picture(3) * 255, torch.tensor(np.array(picture(3))).float())


def test_names_with_spaces_and_accents(tmp_path):
    names = [f"mon été n° {number}.png" for number in range(6)]
    scene, said = read_back(colmap(tmp_path, names=names), "colmap")
    assert len(scene.images) == 6 and not said
