"""The small inputs of ../shared/cases: as people's tools wrote them, with the right value of each.

What is essential in each is also built in test_exporters.py, which needs no such folder.
"""

import json
import shutil

import numpy as np
import pytest
import torch
from helpers import REPOSITORY, run_main

import run_nerf
from nerf.build import load_scene
from nerf.flags import nerf as nerf_flags

CASES = REPOSITORY.parent / "shared" / "cases"
pytestmark = pytest.mark.skipif(not CASES.is_dir(), reason="needs ../shared/cases")
FAST = "--dataset_type auto --fast --white_bkgd --occ_res 32 --grid_res 32 --N_iters 200".split()
QUIET = "--device cpu --i_img 0 --i_video 0 --i_print 50 --amp off".split()


@pytest.fixture
def case(tmp_path):
    """A function: name -> a copy of the case's data."""

    def copy(name):
        shutil.copytree(CASES / name / "data", tmp_path / name)
        return tmp_path / name

    return copy


def load(folder, *flags, kind="auto"):
    said = []
    words = ["--datadir", str(folder), "--dataset_type", kind, "--factor", "1", *flags]
    return load_scene(nerf_flags.parse(words), said.append), said


def run(folder, *flags):
    """Train 200 updates; the process and the log."""
    logs = folder.parent / "logs"
    words = ["--datadir", str(folder), "--basedir", str(logs), "--expname", folder.name]
    result = run_main(run_nerf.main, *words, *FAST, *QUIET, *flags)
    return result, logs / folder.name


def test_b02a_b02c_b03a_cameras(case):
    for name, focal in (("B02a", [70] * 9), ("B02c", None), ("B03a", None)):
        folder = case(name)
        found, expected = load(folder)[0], load(folder, kind="transforms")[0]
        torch.testing.assert_close(found.intrinsics, expected.intrinsics)
        focal = focal or [110 if view % 3 == 0 else 70 for view in range(9)]
        np.testing.assert_allclose(found.intrinsics[:, 0], focal, rtol=1e-3)
    scene = load(CASES / "B02a" / "data")[0]
    np.testing.assert_allclose(scene.intrinsics[0, 2:4], [40, 18])


def test_b04_masks(case):
    scene, said = load(case("B04"))
    assert 0.6 < scene.usable.float().mean() < 0.8
    assert any("dynamic_mask" in line for line in said)


@pytest.mark.parametrize("factor", ["1", "2"])
def test_b06_the_removed_background(case, factor):
    scene, _ = load(case("B06"), "--white_bkgd", "--factor", factor)
    assert scene.picture(0)[0, 0].tolist() == [1.0, 1.0, 1.0]


def test_b08_the_larger_model(case):
    scene, said = load(case("B08"))
    assert len(scene.images) == 8 and any("0/ (3)" in line for line in said)


def test_b15_white_behind(case):
    assert any("add --white_bkgd" in line for line in load(case("B15"))[1])


def test_b17a_names_with_a_dot(case):
    scene, said = load(case("B17a"))
    assert len(scene.images) == 8 and not any("left out" in line for line in said)


def test_b13_photos(case, tmp_path):
    from photos import take_photos

    said = []
    found = take_photos(case("B13") / "photos", tmp_path / "out", 1000, said.append)
    assert len(found) == 4 and not any("duplicates" in line for line in said)


@pytest.mark.slow
def test_b01_and_b09_train(case):
    for name, least in (("B01", 38), ("B09", 36)):
        result, folder = run(case(name), "--testskip", "1")
        assert result.returncode == 0, result.stderr
        log = (folder / "log.txt").read_text()
        if name == "B09":
            assert "0003 (wholly transparent)" in log
        if (folder / "metrics.json").exists():
            assert json.loads((folder / "metrics.json").read_text())["psnr"] > least


def test_b10_is_one_line(case):
    folder = case("B10")
    path = folder / "transforms_train.json"
    content = json.loads(path.read_text())
    for key in ("cx", "cy"):  # with these, which used to be dropped, the silhouettes meet
        del content[key]
    path.write_text(json.dumps(content))
    result, _ = run(folder)
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert "check the poses" in result.stderr.strip().splitlines()[-1]
