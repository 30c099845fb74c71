"""A run's evaluation is its own: nothing smaller, other or from elsewhere replaces it."""

import json
import os
import shutil
import signal

import pytest
from helpers import NERF_TINY, newest, run_main

import run_dreamfusion
import run_nerf
from nerf.outputs.evaluation import Evaluation


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
    assert result.returncode == 0 and "they describe the run's own full test" in result.stderr
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
    if "this scene has no test views" in result.stderr:
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


# ------------------------------------------- what a step is owed is made up for, also in the middle


def artifacts(folder):
    """Every file's bytes, but those of times."""
    times = (".tar", ".csv", ".json", ".html", ".txt", ".lock")
    files = [path for path in folder.rglob("*") if path.is_file() and "tb" not in path.parts]
    files = [path for path in files if not path.name.endswith(times) and "code" not in path.parts]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """An unbroken run that validates, tests, films and saves at steps 2 and 4, and its flags."""
    every = [word for name in ("img", "testset", "video", "weights") for word in (f"--i_{name}", 2)]
    flags, folder = [*NERF_TINY, "--datadir", data, *every], tmp_path_factory.mktemp("whole")
    flags += ["--N_samples", 4, "--N_importance", 4, "--N_iters", 4]
    assert nerf(*flags, "--basedir", folder).returncode == 0
    return folder / "tiny", flags


def test_a_kill_in_the_middle_costs_no_validation_test_or_video(whole, tmp_path):
    run = shutil.copytree(whole[0], tmp_path / "tiny")
    mid = [*whole[1], "--basedir", tmp_path]
    before, rows = artifacts(run), (run / "val.csv").read_text()
    # As a kill at step 2 leaves it, just after its save: half of the test, some frames.
    (run / "000004.tar").unlink()
    (run / "render_test_000002" / "metrics.json").unlink()
    (run / "render_test_000002" / "002.png").write_bytes(b"half")
    (run / "render_path_000002" / "depth.mp4").unlink()
    (run / "render_path_000002" / "007.png").unlink()
    (run / "val.csv").write_text("step,val_psnr\n")
    (run / "report.html").unlink()
    result = nerf(*mid)
    assert result.returncode == 0, result.stderr
    assert artifacts(run) == before and (run / "val.csv").read_text() == rows
    assert (run / "render_test_000002" / "metrics.json").exists()
    # Of a finished run the report alone is made again, where it is missing or older than its parts.
    (run / "report.html").unlink()
    again = nerf(*mid)
    assert "nothing is left to do" in again.stderr and (run / "report.html").exists()


@pytest.mark.parametrize("where", ["validate", "measure_test", "render_camera_path"])
def test_a_signal_while_rendering_in_the_middle_saves_that_step(
    whole, tmp_path, monkeypatch, where
):
    mid = [*whole[1], "--basedir", tmp_path]
    make, calls = getattr(Evaluation, where), []

    def stopped(self, step):
        if not calls:
            os.kill(os.getpid(), signal.SIGTERM)
        calls.append(step)
        return make(self, step)

    monkeypatch.setattr(Evaluation, where, stopped)
    result = nerf(*mid)
    assert result.returncode == 143 and newest(tmp_path / "tiny")["global_step"] == 2
    assert "step 2 is saved" in result.stderr
    assert nerf(*mid).returncode == 0 and calls[:2] == [2, 2]
    assert artifacts(tmp_path / "tiny") == artifacts(whole[0])
    tables = [(folder / "val.csv").read_text() for folder in (tmp_path / "tiny", whole[0])]
    assert tables[0] == tables[1]


def test_a_kill_costs_no_turntable_and_no_report(tiny_dream, tmp_path):
    flags = [*tiny_dream, "--N_iters", 4, "--i_video", 2, "--i_weights", 2]
    assert run_main(run_dreamfusion.main, *flags).returncode == 0
    run = tmp_path / "ball"
    before = artifacts(run)
    for name in ("000004.tar", "metrics.json", "report.html", "render_path_000002/opacity.mp4"):
        (run / name).unlink()
    (run / "render_path_000002" / "001.png").write_bytes(b"half")
    result = run_main(run_dreamfusion.main, *flags)
    assert result.returncode == 0, result.stderr
    assert artifacts(run) == before and (run / "report.html").exists()
    (run / "report.html").unlink()
    assert run_main(run_dreamfusion.main, *flags).returncode == 0
    assert (run / "report.html").exists()
