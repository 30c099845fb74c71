"""A run's evaluation is its own: nothing smaller, other or from elsewhere replaces it."""

import json
import shutil

import pytest
from helpers import NERF_TINY, run_main

import run_dreamfusion
import run_nerf


def nerf(*words):
    return run_main(run_nerf.main, *words)


@pytest.fixture(scope="module")
def runs(tmp_path_factory, demo_blender):
    """Two finished runs, a and b; the folder that holds them, and their flags."""
    folder = tmp_path_factory.mktemp("own")
    data = shutil.copytree(demo_blender, folder / "data")
    flags = [*NERF_TINY, "--datadir", data, "--basedir", folder / "logs", "--N_iters", 4]
    for name in ("a", "b"):
        extra = ["--lrate", 1e-3] if name == "b" else []
        assert nerf(*flags, *extra, "--expname", name).returncode == 0
    return folder, flags


def state(folder):
    """What must not change: the run's metrics, report and test pictures."""
    files = [folder / "metrics.json", *sorted((folder / "render_test_000004").rglob("*.png"))]
    return {path: path.read_bytes() for path in files}


def fewer_views(folder):
    """The same scene with one test view less."""
    data = folder / "fewer"
    if not data.exists():
        shutil.copytree(folder / "data", data)
        file = data / "transforms_test.json"
        content = json.loads(file.read_text())
        content["frames"] = content["frames"][:1]
        file.write_text(json.dumps(content))
    return data


READ = ["--render_only", "--render_test"]
OTHERS = {
    "fewer test views": (lambda f: ["--datadir", fewer_views(f)], "_1views"),
    "another checkpoint": (lambda f: ["--ft_path", f / "logs/b/000004.tar"], "_b_000004"),
    "another far": (lambda f: ["--far", "5"], "_far5"),
    "other samples": (lambda f: ["--N_samples", "12"], "_N_samples12"),
    "smaller": (lambda f: ["--render_factor", "2"], "_f2"),
}


@pytest.mark.parametrize("case", OTHERS)
def test_other_pictures_go_to_a_folder_of_their_own(runs, case):
    folder, flags = runs
    change, ending = OTHERS[case]
    before = state(folder / "logs" / "a")
    result = nerf(*flags, "--expname", "a", *READ, *change(folder))
    assert result.returncode == 0, result.stderr
    assert (folder / "logs" / "a" / f"render_test_000004{ending}" / "metrics.json").exists()
    assert state(folder / "logs" / "a") == before


def test_training_on_measures_the_same_views_or_says_that_it_does_not(runs):
    folder, flags = runs
    shutil.copytree(folder / "logs" / "a", folder / "logs" / "c")
    before = (folder / "logs" / "c" / "metrics.json").read_bytes()
    own = [*flags, "--expname", "c", "--datadir", fewer_views(folder)]
    result = nerf(*own, "--N_iters", 6)
    assert result.returncode == 0 and "stay those of the run's own full test" in result.stderr
    again = nerf(*own, "--N_iters", 6, *READ)  # the checkpoint still knows the first test views
    assert again.returncode == 0 and "own full test" in again.stderr
    assert (folder / "logs" / "c" / "metrics.json").read_bytes() == before


def test_a_run_is_read_with_its_own_flags_when_it_is_named(runs, tmp_path):
    folder, _ = runs
    words = ["--basedir", folder / "logs", "--expname", "b", "--device", "cpu"]
    before = json.loads((folder / "logs" / "b" / "metrics.json").read_text())
    result = nerf(*words, *READ)
    assert result.returncode == 0 and "taking the flags of b" in result.stderr, result.stderr
    after = json.loads((folder / "logs" / "b" / "metrics.json").read_text())
    assert after["psnr"] == pytest.approx(before["psnr"], abs=1e-3)
    config = tmp_path / "other.txt"
    data = f"datadir = {folder / 'data'}\ndataset_type = blender\n"
    config.write_text(f"{data}netwidth = 32\nwhite_bkgd = True\nuse_viewdirs = True\n")
    result = nerf(*words, "--config", config, *READ)
    assert result.returncode == 2 and "leave --config out" in result.stderr


def test_a_run_without_a_checkpoint_is_not_the_newest(runs):
    folder, _ = runs
    (folder / "logs" / "empty").mkdir()
    shutil.copy(folder / "logs" / "b" / "args.json", folder / "logs" / "empty")
    result = nerf("--basedir", folder / "logs", *READ, "--device", "cpu")
    assert result.returncode == 0 and "trained last, empty" not in result.stderr


def test_without_test_views_the_report_is_written_and_it_is_said(runs, tmp_path):
    folder, flags = runs
    data = shutil.copytree(folder / "data", tmp_path / "data")
    (data / "transforms_test.json").unlink()
    words = [*flags, "--basedir", tmp_path, "--datadir", data, "--expname", "no_test"]
    result = nerf(*words)
    assert result.returncode == 0, result.stderr
    if "there are no test views" in result.stderr:
        assert (tmp_path / "no_test" / "report.html").exists()
        assert not (tmp_path / "no_test" / "metrics.json").exists()
    else:  # the validation views stand in, by name
        assert "test" in result.stderr and (tmp_path / "no_test" / "metrics.json").exists()


def test_a_turntable_of_other_settings_or_another_prompt_replaces_none(tiny_dream, tmp_path):
    assert run_main(run_dreamfusion.main, *tiny_dream, "--N_iters", 2).returncode == 0
    own = sorted((tmp_path / "ball" / "render_path_000002").rglob("*.png"))
    result = run_main(run_dreamfusion.main, *tiny_dream, "--render_only", "--video_frames", 2)
    assert result.returncode == 0, result.stderr
    assert sorted((tmp_path / "ball" / "render_path_000002").rglob("*.png")) == own
    assert (tmp_path / "ball" / "render_path_000002_video_frames_2").is_dir()
    words = [*tiny_dream, "--expname", "ball", "--prompt", "a red mug", "--render_only"]
    result = run_main(run_dreamfusion.main, *words)
    assert result.returncode == 2 and "is of --prompt 'ball', not 'a red mug'" in result.stderr
