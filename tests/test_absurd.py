"""Absurd sizes, files that never end and data that have no size: one line each."""

import json
import os

import pytest
from helpers import DREAM_TINY, FAST_TINY, NERF_TINY, run_main

import run_dreamfusion
import run_nerf
from nerf.datasets.colmap_model import read_model
from nerf.datasets.colmap_write import write_model

HUGE = [
    (run_nerf.main, "--N_rand 9223372036854775808"),
    (run_nerf.main, "--N_samples 10000000000000"),
    (run_nerf.main, f"--chunk {'9' * 4000}"),
    (run_nerf.main, f"--chunk {'9' * 5000}"),
    (run_nerf.main, f"--i_print -{'9' * 4000}"),
    (run_nerf.main, "--netdepth 1001"),
    (run_nerf.main, "--fast --grid_res 1000000"),
    (run_nerf.main, "--fast --occ_res 100000"),
    (run_dreamfusion.main, "--batch_views 9223372036854775808"),
    (run_dreamfusion.main, "--train_res 9223372036854775808"),
    (run_dreamfusion.main, "--n_particles 1000000000000"),
    (run_dreamfusion.main, "--occ_res 100000"),
]


def one_line(result, words: str, code: int = 2) -> None:
    assert result.returncode == code and "Traceback" not in result.stderr, result.stderr
    last = result.stderr.splitlines()[-1]
    assert last.startswith("run_") and words in last, last


@pytest.mark.parametrize(("main", "flags"), HUGE, ids=[flags[:40] for _, flags in HUGE])
def test_a_flag_of_absurd_size_is_one_line(tiny, tiny_dream, tmp_path, main, flags):
    own = tiny if main is run_nerf.main else tiny_dream
    flag = [word for word in flags.split() if word.startswith("--")][-1]
    one_line(run_main(main, *own, *flags.split()), flag)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["/dev/zero", "/dev/null/x", "folder", "pipe", "large"])
@pytest.mark.parametrize("way", ["flag", "variable"])
def test_a_config_that_is_no_file_is_one_line(tiny, tmp_path, monkeypatch, kind, way):
    path = tmp_path / kind if "/" not in kind else kind
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "large":
        path.write_text("# comment\n" * 200_000)
    flags = ["--config", path] if way == "flag" else []
    if way == "variable":
        monkeypatch.setenv("NERF_CONFIG", str(path))
    one_line(run_main(run_nerf.main, *tiny, *flags), f"--config {path}: cannot be read")


@pytest.mark.parametrize("kind", ["/dev/zero", "pipe"])
def test_a_checkpoint_that_is_no_file_is_one_line(tiny, tmp_path, kind):
    path = tmp_path / "pipe"
    os.mkfifo(path)
    path = path if kind == "pipe" else kind
    one_line(run_main(run_nerf.main, *tiny, "--ft_path", path), "is not a file")


def test_cameras_at_one_point_have_no_box(demo_copy, tmp_path):
    folder = demo_copy("blender")
    for path in folder.glob("transforms_*.json"):
        content = json.loads(path.read_text())
        for frame in content["frames"]:
            for row in range(3):
                frame["transform_matrix"][row][3] = 0.5
        path.write_text(json.dumps(content))
    words = [*NERF_TINY, *FAST_TINY, "--datadir", folder, "--basedir", tmp_path / "logs"]
    words += ["--N_iters", 1]
    one_line(run_main(run_nerf.main, *words), "all training cameras stand at one point")
    assert run_main(run_nerf.main, *words, "--scene_bound", 2).returncode == 0


SIDES = ["9" * 4000, "9" * 5000, "9" * 20, "0", "-5"]


@pytest.mark.parametrize("number", SIDES, ids=[f"{len(text)} digits {text[:2]}" for text in SIDES])
def test_sides_and_colors_of_any_number_of_digits(demo_copy, tmp_path, number):
    flags = [*NERF_TINY, "--basedir", tmp_path / "logs", "--N_iters", 1]
    folder = demo_copy("transforms")
    path = folder / "transforms.json"
    content = json.loads(path.read_text())
    for place, key in ((content, "h"), (content["frames"][0], "w"), (content["frames"][0], "h")):
        before, place[key] = place.get(key), "HERE"
        path.write_text(json.dumps(content).replace('"HERE"', number))
        words = ["--dataset_type", "transforms", "--datadir", folder]
        result = run_main(run_nerf.main, *flags, *words)
        if result.returncode or "left out" not in result.stderr:  # a single picture is left out
            one_line(result, "")
        place[key] = before if before is not None else place.pop(key)
        if before is None:
            place.pop(key, None)
    folder = demo_copy("colmap")
    model = folder / "sparse" / "0"
    content = read_model(model)
    for path in model.iterdir():
        path.unlink()
    write_model(model, content, text=True)
    for name, column in (("cameras.txt", 2), ("cameras.txt", 3), ("points3D.txt", 4)):
        whole = (model / name).read_text()
        rows = whole.splitlines()
        first = next(i for i, row in enumerate(rows) if row and not row.startswith("#"))
        cells = rows[first].split()
        cells[column] = "300" if name == "points3D.txt" and number == "0" else number
        rows[first] = " ".join(cells)
        (model / name).write_text("\n".join(rows) + "\n")
        words = ["--dataset_type", "colmap", "--datadir", folder]
        one_line(run_main(run_nerf.main, *flags, *words), str(model))
        (model / name).write_text(whole)


def test_dream_flags_of_a_tiny_run_are_still_accepted():
    assert run_dreamfusion.dream_flags.parse([*DREAM_TINY, "--n_particles", "2"]).n_particles == 2
