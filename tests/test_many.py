"""Captures of thousands of pictures: work grows with their number, and memory is not needed twice.

Whatever was made faster gives what the plain way gives, bit for bit.
"""

import json
import os
import struct
import tracemalloc
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import REPOSITORY, run_python
from PIL import Image
from small_captures import colmap as small_colmap
from small_captures import load, poses

from nerf import lenses
from nerf.datasets import capture, checks, colmap, frames, masks, pictures
from nerf.datasets.arrays import padded, with_alpha
from nerf.datasets.colmap_model import Camera, Model, read_model
from nerf.datasets.colmap_write import write_model
from nerf.datasets.images import read_image, read_padded

CAMERA = Camera("PINHOLE", 40, 30, (50.0, 50.0, 20.0, 15.0))


def random_model(count=12, points=300, seed=0):
    """A model with random tracks, in any order; some name a picture twice."""
    random = np.random.default_rng(seed)
    tracks = np.stack([random.integers(0, points, 2000), random.integers(0, count, 2000)], -1)
    return Model(
        cameras={1: CAMERA},
        names=[f"v{number:03d}.png" for number in range(count)],
        camera_ids=[1] * count,
        c2w=poses(count)[:, :3],
        points=random.normal(size=(points, 3)) * 0.3,
        colors=random.integers(0, 255, (points, 3), dtype=np.uint8),
        tracks=tracks,
    )


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("many") / "sparse"
    write_model(folder, random_model())
    return folder


# ------------------------------------------------------------------------------------ the model


def points_one_by_one(path):
    """points3D.bin value by value: places, colors, and (number of a point, image) of its tracks."""
    content, position, rows, tracks = path.read_bytes(), 8, [], []
    for number in range(struct.unpack("<Q", content[:8])[0]):
        values = struct.unpack_from("<Q3d3BdQ", content, position)
        position += 51
        rows.append(values)
        for _ in range(values[8]):
            tracks.append((number, struct.unpack_from("<2i", content, position)[0]))
            position += 8
    assert position == len(content)
    return [row[1:4] for row in rows], [row[4:7] for row in rows], tracks


def test_points_and_tracks_are_those_of_the_file(model_folder, tmp_path):
    xyz, rgb, tracks = points_one_by_one(model_folder / "points3D.bin")
    known = [(point, image - 1) for point, image in tracks]  # names are sorted by image here
    write_model(tmp_path / "text", random_model(), text=True)
    for folder in (model_folder, tmp_path / "text"):
        found = read_model(folder)
        np.testing.assert_array_equal(found.points, np.array(xyz))
        np.testing.assert_array_equal(found.colors, np.array(rgb, np.uint8))
        np.testing.assert_array_equal(found.tracks, np.array(known))
        assert found.points.dtype == float and found.tracks.dtype == int


def test_observations_in_unregistered_images_are_left_out(tmp_path):
    write_model(tmp_path, random_model(), text=True)
    lines = (tmp_path / "images.txt").read_text().split("\n")
    gone = next(index for index, line in enumerate(lines) if line.endswith("v004.png"))
    (tmp_path / "images.txt").write_text("\n".join(lines[:gone] + lines[gone + 2 :]))
    before, after = random_model(), read_model(tmp_path)
    order = np.argsort(before.tracks[:, 0], kind="stable")
    kept = [(p, v - (v > 4)) for p, v in before.tracks[order].tolist() if v != 4]
    np.testing.assert_array_equal(after.tracks, np.array(kept))


def test_each_observation_names_its_feature(model_folder):
    """Of several features of a point in an image, as before, its track names the last."""
    model = random_model()
    content, position, features = (model_folder / "images.bin").read_bytes(), 8, []
    for _ in range(len(model.names)):
        position = content.index(b"\0", position + 64) + 1
        (count,) = struct.unpack_from("<Q", content, position)
        rows = [struct.unpack_from("<2dq", content, position + 8 + 24 * i) for i in range(count)]
        features.append([point for _, _, point in rows])
        position += 8 + 24 * count
    for view, own in enumerate(features):
        assert own == model.tracks[model.tracks[:, 1] == view, 0].tolist()
    content, position = (model_folder / "points3D.bin").read_bytes(), 8
    for point in range(len(model.points)):
        (length,) = struct.unpack_from("<Q", content, position + 43)
        pairs = np.frombuffer(content, "<i4", 2 * length, position + 51).reshape(-1, 2)
        views = model.tracks[model.tracks[:, 0] == point, 1]
        assert pairs[:, 0].tolist() == (views + 1).tolist()
        for view, feature in zip(views, pairs[:, 1], strict=True):
            last = len(features[view]) - 1 - features[view][::-1].index(point)
            assert feature == last
        position += 51 + 8 * length


def test_features_are_not_read(model_folder, tmp_path):
    """Most of a real images.bin are features that no point has; the names may be long."""
    model, loose = random_model(), 20_000
    write_model(tmp_path, model._replace(names=[f"{'a' * 150}/{n:0200d}.png" for n in range(12)]))
    path = tmp_path / "images.bin"
    content, position, parts = path.read_bytes(), 8, [path.read_bytes()[:8]]
    for _ in model.names:
        end = content.index(b"\0", position + 64) + 1
        (own,) = struct.unpack_from("<Q", content, end)
        parts += [content[position:end], struct.pack("<Q", own + loose)]
        position = end + 8 + 24 * own
        parts += [content[end + 8 : position], bytes(24 * loose)]
    path.write_bytes(b"".join(parts))
    size = path.stat().st_size
    del content, parts
    tracemalloc.start()
    found = read_model(tmp_path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    np.testing.assert_array_equal(found.c2w, read_model(model_folder).c2w)
    np.testing.assert_array_equal(found.tracks, read_model(model_folder).tracks)
    assert found.names[3].endswith("3.png") and len(found.names[3]) == 355
    assert peak < size / 4, (peak, size)


@pytest.mark.parametrize("name", ["cameras", "images", "points3D"])
def test_a_cut_file_is_named(model_folder, tmp_path, name):
    for file in model_folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    path = tmp_path / f"{name}.bin"
    content = path.read_bytes()
    for size in (0, 7, 60, len(content) // 2, len(content) - 1):
        path.write_bytes(content[: min(size, len(content) - 1)])
        with pytest.raises(ValueError, match=f"{name}.bin: is truncated"):
            read_model(tmp_path)


def test_depths_of_each_view_are_those_of_its_own_points():
    model = random_model(count=40)  # and a view of few points, which gets those of all
    keep = (model.tracks[:, 1] != 7) | (np.arange(len(model.tracks)) < 50)
    model = model._replace(tracks=model.tracks[keep])
    point, view = model.tracks.T
    c2w = model.c2w[view]
    depth = -((model.points[point] - c2w[:, :, 3]) * c2w[:, :, 2]).sum(-1)
    own = [depth[(view == number) & (depth > 0)] for number in range(40)]
    assert 0 < len(own[7]) < 10
    rows = [np.percentile(d if len(d) >= 10 else depth[depth > 0], (0.1, 99.9)) for d in own]
    np.testing.assert_array_equal(colmap.depth_bounds(model), np.array(rows))


# ------------------------------------------------------------------------------------ the files


@pytest.fixture
def listings(monkeypatch):
    """The folders that are listed."""
    seen, real = [], os.listdir
    monkeypatch.setattr(os, "listdir", lambda path=".": (seen.append(Path(path)), real(path))[1])
    return seen


def test_a_folder_is_listed_once_for_all_pictures(tmp_path, listings):
    """Names that differ in their capital letters, and masks named without the picture's ending."""
    for folder, ending in (("images", ".JPG"), ("masks", ".png")):
        (tmp_path / folder).mkdir()
        for number in range(30):
            Image.new("RGB", (8, 8), "white").save(tmp_path / folder / f"v{number}{ending}")
    rows = [{"file_path": f"images/V{number}.jpg", "where": "f"} for number in range(30)]
    files = frames.find_pictures(tmp_path, rows)
    assert files == [tmp_path / "images" / f"v{number}.JPG" for number in range(30)]
    assert len(listings) == 1
    listings.clear()
    found = masks.find_masks(tmp_path, files, lambda line: None)
    assert [mask.path.name for (mask,) in found] == [f"v{number}.png" for number in range(30)]
    assert len(listings) == 1


def test_names_are_found_as_one_by_one(tmp_path):
    for name in ("a.png", "B.png", "b.PNG", "c\u0327.png", "D.png"):
        (tmp_path / name).touch()
    names = pictures.Names()
    wanted = {
        "a.png": "a.png",
        "A.PNG": "a.png",
        "b.png": "b.png",  # either of two: neither
        "\u00e7.png": "c\u0327.png",
        "d.png": "D.png",
        "e.png": "e.png",
    }
    for name, there in wanted.items():
        for shared in (names, None):
            assert pictures.existing(tmp_path / name, shared) == tmp_path / there


def test_the_most_common_size_is_the_smaller_of_two():
    assert pictures.most_common([(5, 4), (3, 2), (5, 4), (3, 2), (9, 9)]) == (3, 2)


# --------------------------------------------------------------------------------- the pictures


def write_pictures(folder, sizes, modes):
    files = []
    for number, (size, mode) in enumerate(zip(sizes, modes, strict=True)):
        pixels = np.random.default_rng(number).integers(0, 255, (*size, 4), dtype=np.uint8)
        files.append(folder / f"{number:03d}.png")
        Image.fromarray(pixels[..., : len(mode)]).save(files[-1])
    return files


@pytest.mark.parametrize("modes", [["RGB"] * 6, ["RGB", "RGB", "RGBA", "RGB", "RGB", "RGBA"]])
@pytest.mark.parametrize("odd", [[], [3], [0, 4]])
def test_pictures_of_any_sizes_in_one_array(tmp_path, modes, odd):
    sizes = [(36, 48) if number in odd else (30, 40) for number in range(6)]
    files = write_pictures(tmp_path, sizes, modes)
    images, found = read_padded(files, np.array(sizes), 1)
    single = [read_image(file) for file in files]
    if "RGBA" in modes:
        single = [with_alpha(picture) for picture in single]
    expected, expected_sizes = padded(single)
    np.testing.assert_array_equal(images, expected)
    np.testing.assert_array_equal(found, expected_sizes)
    assert images.shape[-1] == len(max(modes, key=len))


def test_pictures_are_in_memory_once(tmp_path):
    files = write_pictures(tmp_path, [(200, 200)] * 24, ["RGB"] * 24)
    tracemalloc.start()
    images, _ = read_padded(files, np.array([(200, 200)] * 24), 1)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1.5 * images.nbytes


def views_of(count, intrinsics, sizes=None):
    files = [Path(f"{number}.png") for number in range(count)]
    sizes = np.tile((30, 40), (count, 1)) if sizes is None else sizes
    return capture.Views(
        files, [file.stem for file in files], poses(count)[:, :3], intrinsics, sizes, [()] * count
    )


def test_a_lens_is_examined_once_for_all_pictures(monkeypatch):
    calls, sees = [], lenses.sees
    monkeypatch.setattr(lenses, "sees", lambda *args: (calls.append(1), sees(*args))[1])
    row = lenses.from_colmap("RADIAL", [50.0, 20.0, 15.0, -0.1, 0.0])
    counts = []
    for count in (3, 30):
        calls.clear()
        views = views_of(count, np.array([row] * count))
        cameras = torch.tensor(views.intrinsics, dtype=torch.float32)
        assert capture._usable(views, cameras, 30, 40, views.sizes) is None
        counts.append(len(calls))
    assert counts[0] == counts[1] > 0


def test_usable_pixels_are_those_of_each_picture():
    """A lens with an end, pictures of two sizes: as computed one by one."""
    bad = lenses.from_colmap("RADIAL", [25.0, 20.0, 15.0, -0.6, 0.0])
    good = lenses.from_colmap("RADIAL", [50.0, 20.0, 15.0, 0.0, 0.0])
    sizes = np.array([(30, 40), (30, 40), (20, 30), (30, 40)])
    views = views_of(4, np.array([good, bad, good, bad]), sizes)
    cameras = torch.tensor(views.intrinsics, dtype=torch.float32)
    found = capture._usable(views, cameras, 30, 40, sizes)
    assert found is not None
    y, x = torch.meshgrid(torch.arange(30.0), torch.arange(40.0), indexing="ij")
    for view, camera in enumerate(cameras):
        plane = (torch.stack([x, y], -1) + 0.5 - camera[2:4]) / camera[:2]
        valid = lenses.sees(plane, camera[4:].expand(30, 40, -1))
        valid &= (y < sizes[view, 0]) & (x < sizes[view, 1])
        assert torch.equal(found[view], valid)
    assert found[0].all() and not found[1].all() and not found[2].all()


def test_numbers_of_usable_pixels_take_four_bytes_each(tmp_path):
    scene = load(small_colmap(tmp_path), "--factor", "1", "--no_ndc")
    usable = torch.rand(scene.images.shape[:3], generator=torch.Generator().manual_seed(0)) > 0.5
    pool, starts = replace(scene, usable=usable).usable_pixels("train")
    numbers = torch.arange(usable.numel()).view(usable.shape)
    parts = [numbers[view][usable[view]] for view in scene.splits["train"]]
    assert pool.dtype == torch.int32 and torch.equal(pool.long(), torch.cat(parts))
    assert starts == [0, *np.cumsum([len(part) for part in parts]).tolist()]


# -------------------------------------------------------------------------------- repeated views


def test_test_views_among_training_views_are_found_without_comparing_all(monkeypatch):
    count = 200
    c2w = torch.tensor(poses(count)[:, :3], dtype=torch.float32)
    c2w[150:153] = c2w[10:13] + 5e-7  # the same cameras, but for rounding
    c2w[153:156] = c2w[13:16]
    images = torch.arange(count, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 2, 2, 3).clone()
    images[150:153] = images[10:13]  # of the next three, pictures differ
    scene = SimpleNamespace(c2w=c2w, images=images)
    train, test = list(range(150)), list(range(140, count))
    calls, same = [], checks._is_same
    monkeypatch.setattr(checks, "_is_same", lambda *a: (calls.append(1), same(*a))[1])
    assert checks._repeats(scene, test, train) == [*range(140, 150), 150, 151, 152]
    assert len(calls) < 3 * len(test)


def test_held_out_views_are_every_nth():
    assert capture.hold_out(9, 4) == {
        "train": [1, 2, 3, 5, 6, 7],
        "val": [0, 4, 8],
        "test": [0, 4, 8],
    }
    assert capture.hold_out(5, 0)["test"] == [2]


# ---------------------------------------------------------------------------------- the benchmark


@pytest.mark.slow
def test_the_benchmark_measures_a_real_run(tmp_path):
    words = "--pictures 12 --points 200 --features 20 --side 32 --steps 2 --test_views 4".split()
    script = str(REPOSITORY / "benchmarks" / "many.py")
    done = run_python(
        script, *words, "--json", tmp_path / "many.json", timeout=400, OMP_NUM_THREADS="1"
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "many.json").read_text())
    assert [row["run"] for row in rows] == ["colmap", "colmap, mmap", "transforms"]
    for row in rows:
        phases = [phase["phase"] for phase in row["phases"]]
        assert {"read the model", "decode pictures", "first step", "test views"} <= set(phases)
        assert row["test_views"] == 4 and row["report_mb"] > 0
        assert all(phase["peak"] >= phase["now"] > 0 for phase in row["phases"])
