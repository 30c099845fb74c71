"""run_nerf.py as a user runs it: train, resume, stop, render, measure, refuse. Tiny networks."""

import csv
import fcntl
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
import torch
from helpers import (
    NERF_TINY,
    REPOSITORY,
    assert_same_training,
    newest,
    run_main,
    run_python,
    run_script,
    torchrun,
)

import run_nerf
from nerf import build
from nerf.flags import nerf as nerf_flags
from nerf.metrics import psnr
from nerf.training import system
from nerf.training.checkpoint import list_checkpoints, load_checkpoint


def test_a_run_leaves_everything_the_readme_names(tiny, tmp_path):
    flags = [*tiny, "--N_iters", 20, "--i_img", 10, "--i_video", 20, "--ema_decay", 0.9]
    result = run_python("run_nerf.py", *flags)
    assert result.returncode == 0, result.stderr
    run = tmp_path / "tiny"
    for name in ("args.json", "args.txt", "cmd.txt", "log.txt", "metrics.csv", "val_strip.png"):
        assert (run / name).stat().st_size > 0, name
    assert list((run / "tb").glob("events*"))
    with open(run / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == [5, 10, 15, 20]
    assert all(np.isfinite(float(value)) for row in rows for value in row.values())

    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["split"] == "test" and metrics["num_views"] == 3 and metrics["step"] == 20
    assert metrics["resolution"] == [20, 20] and metrics["background"] == 1.0
    assert metrics["weights"] == "ema" and metrics["seconds_per_view"] > 0
    assert metrics["psnr"] == pytest.approx(np.mean([v["psnr"] for v in metrics["views"]]))
    assert abs(metrics["psnr"] - metrics["psnr_8bit"]) < 0.2
    assert {"name", "psnr", "ssim"} <= metrics["views"][0].keys()
    # The pictures in the folder are the ones that were measured.
    test = run / "render_test_000020"
    assert json.loads((test / "metrics.json").read_text()) == metrics
    for number, view in enumerate(metrics["views"]):
        picture = iio.imread(test / f"{number:03d}.png") / 255.0
        truth = iio.imread(Path(metrics["args"]["datadir"]) / f"{view['name']}.png") / 255.0
        target = np.round((truth[..., :3] * truth[..., 3:] + 1 - truth[..., 3:]) * 255) / 255
        assert -10 * np.log10(np.mean((picture - target) ** 2)) == pytest.approx(
            view["psnr_8bit"], abs=0.02
        )
    video = run / "render_path_000020"
    assert iio.imread(video / "rgb.mp4").shape[1:] == (20, 20, 3)
    assert len(iio.imread(video / "depth.mp4")) == len(list(video.glob("*.png"))) == 40


MODES = {
    "plain": [],
    "fp16 with scaler and EMA": ["--amp", "fp16", "--ema_decay", "0.95"],
    "bf16": ["--amp", "bf16"],
    "noise, one image, crop boundary": (
        "--raw_noise_std 1 --no_batching --precrop_iters 6 --lrate_warmup 8 --grad_clip 0.1"
    ).split(),
    "coarse only": ["--N_importance", "0"],
    "fast, tri-plane": "--fast --target_samples 512 --occ_res 16".split(),
    "fast, hash grid and EMA": (
        "--fast --field hashgrid --target_samples 512 --occ_res 16 --ema_decay 0.9 "
        "--composite padded"
    ).split(),
    "fast, MLP": (
        "--occ_grid --random_bg --hull_init on --target_samples 512 --occ_res 16 --amp fp16"
    ).split(),
}


@pytest.mark.parametrize("mode", MODES)
def test_stop_and_resume_equals_an_uninterrupted_run_bit_for_bit(tiny, tmp_path, mode):
    flags = [*MODES[mode], *tiny] if "fast" in mode else [*tiny, *MODES[mode]]
    if "fast" in mode:  # past an update of the grid, with the schedule's end where it would be
        flags += ["--lr_schedule", "exp"]
    last = "20" if "fast" in mode else "9"
    assert run_nerf.main([*flags, "--expname", "whole", "--N_iters", last]) == 0
    assert run_nerf.main([*flags, "--expname", "parts", "--N_iters", "4"]) == 0
    assert run_nerf.main([*flags, "--expname", "parts", "--N_iters", last]) == 0
    assert "resumed from" in (tmp_path / "parts" / "log.txt").read_text()
    assert_same_training(newest(tmp_path / "whole"), newest(tmp_path / "parts"))
    assert [
        line.split(",")[:3] for line in (tmp_path / "whole" / "metrics.csv").read_text().split()
    ][-1] == [
        line.split(",")[:3] for line in (tmp_path / "parts" / "metrics.csv").read_text().split()
    ][-1]


def test_another_seed_gives_other_weights(tiny, tmp_path):
    for seed in ("1", "2"):
        run_nerf.main([*tiny, "--expname", seed, "--seed", seed, "--N_iters", "2"])
    first, second = (newest(tmp_path / s)["network_fn_state_dict"] for s in ("1", "2"))
    assert not torch.equal(first["pts_linears.0.weight"], second["pts_linears.0.weight"])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_that_very_step_and_the_run_goes_on_from_it(tiny, tmp_path, number):
    flags = [sys.executable, "run_nerf.py", *tiny, "--N_iters", "100000", "--i_print", "1"]
    process = subprocess.Popen(flags, cwd=REPOSITORY, stderr=subprocess.PIPE, text=True)
    for line in process.stderr:
        if line.startswith("step 3/"):
            break
    process.send_signal(number)
    rest = process.stderr.read()
    assert process.wait(timeout=60) == 128 + number
    assert "Traceback" not in rest
    state = newest(tmp_path / "tiny")
    step = state["global_step"]
    assert f"step {step} is saved" in rest and step >= 3
    assert run_nerf.main([*tiny, "--N_iters", str(step + 2)]) == 0
    assert run_nerf.main([*tiny, "--expname", "whole", "--N_iters", str(step + 2)]) == 0
    assert_same_training(newest(tmp_path / "whole"), newest(tmp_path / "tiny"))


def test_a_signal_while_rendering_stops_at_the_next_picture(tiny, tmp_path):
    flags = [sys.executable, "run_nerf.py", *tiny, "--N_iters", "2", "--N_samples", "2000"]
    flags += ["--i_video", "2"]
    process = subprocess.Popen(flags, cwd=REPOSITORY, stderr=subprocess.PIPE, text=True)
    while not list(tmp_path.rglob("render_test_000002/*.png")) and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    error = process.stderr.read()
    assert process.wait(timeout=60) == 143
    assert "while rendering" in error and "Traceback" not in error
    run = tmp_path / "tiny"
    assert newest(run)["global_step"] == 2 and not (run / "metrics.json").exists()
    # The same command makes up for the test, the video and the report.
    assert run_nerf.main([*tiny, "--N_iters", "2", "--i_video", "2"]) == 0
    made = ["metrics.json", "report.html", "render_path_000002/000.png"]
    assert all((run / name).exists() for name in made)


def test_two_processes_train_as_one(tiny, tmp_path):
    flags = [*tiny, "--N_iters", "6", "--ema_decay", "0.9"]
    result = run_python(*torchrun(2), "run_nerf.py", *flags, "--expname", "two")
    assert result.returncode == 0, result.stderr
    assert run_nerf.main([*flags, "--expname", "one"]) == 0
    one, two = newest(tmp_path / "one"), newest(tmp_path / "two")
    for key in ("network_fn_state_dict", "network_fine_state_dict"):
        for name, value in one[key].items():
            # Sums in another order: Adam's first steps turn 1e-7 in a gradient into about 1e-5.
            torch.testing.assert_close(two[key][name], value, rtol=1e-4, atol=2e-5)
    metrics = [json.loads((tmp_path / n / "metrics.json").read_text()) for n in ("one", "two")]
    assert [v["name"] for v in metrics[0]["views"]] == [v["name"] for v in metrics[1]["views"]]
    assert metrics[0]["psnr"] == pytest.approx(metrics[1]["psnr"], abs=1e-3)
    assert (tmp_path / "two" / "log.txt").read_text().count("test: PSNR") == 1


def test_two_processes_train_the_fast_path_as_one(tiny, tmp_path):
    flags = ["--fast", "--amp", "off", "--target_samples", "512", "--occ_res", "16", *tiny]
    flags += ["--N_iters", "20"]
    result = run_script([*flags, "--expname", "two"], ranks=2)
    assert result.returncode == 0, result.stderr
    assert run_nerf.main([*flags, "--expname", "one"]) == 0
    one, two = newest(tmp_path / "one"), newest(tmp_path / "two")
    grids = [state["occupancy_state_dict"]["occupied"] for state in (one, two)]
    assert torch.equal(*grids) and one["num_rays"] == two["num_rays"]
    metrics = [json.loads((tmp_path / n / "metrics.json").read_text()) for n in ("one", "two")]
    assert metrics[0]["psnr"] == pytest.approx(metrics[1]["psnr"], abs=0.05)


def test_float16_overflow_is_skipped_counted_and_recovered_from(tiny, tmp_path, monkeypatch):
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**60)
    monkeypatch.setattr(system, "grad_scaler", lambda device, amp: scaler)
    assert run_nerf.main([*tiny, "--amp", "fp16", "--N_iters", "80"]) == 0
    with open(tmp_path / "tiny" / "metrics.csv") as file:
        skipped = [int(row["skipped"]) for row in csv.DictReader(file)]
    assert 0 < skipped[-1] < 79 and skipped[-1] == skipped[-2]
    for value in newest(tmp_path / "tiny")["network_fn_state_dict"].values():
        assert value.isfinite().all()


def test_endless_nan_stops_with_a_diagnosis(tiny, tmp_path, capsys):
    assert run_nerf.main([*tiny, "--lrate", "1e30", "--N_iters", "400"]) == 2
    said = capsys.readouterr().err
    assert "rolling back to the start" in said and "again after rolling back: " in said
    dump = torch.load(next((tmp_path / "tiny").glob("broken_*.pt")), weights_only=True)
    assert dump["target_colors"].shape == (64, 3) and dump["trouble"] in said


@pytest.mark.slow
def test_a_dead_start_is_noticed_and_tried_again_with_another_seed(tiny, tmp_path, monkeypatch):
    build_renderer, built = build.build_renderer, []

    def dead_at_first(*given):
        renderer = build_renderer(*given)
        if not built:
            torch.nn.init.constant_(renderer.fine.alpha_linear.bias, -100.0)
        built.append(renderer)
        return renderer

    monkeypatch.setattr(build, "build_renderer", dead_at_first)
    assert run_nerf.main([*tiny, "--N_iters", "230", "--i_weights", "50"]) == 0
    log = (tmp_path / "tiny" / "log.txt").read_text()
    assert "stuck, every ray of the fine level is all background" in log and "restart 1" in log
    assert len(built) == 2 and newest(tmp_path / "tiny")["attempt"] == 1
    built.clear()
    # Told not to restart, it goes on as it is.
    quiet = [*tiny, "--expname", "stay", "--N_iters", "210", "--dead_restarts", "0"]
    assert run_nerf.main(quiet) == 4 and len(built) == 1  # and says that nothing was learned


def test_render_only_uses_the_checkpoint_and_scales_intrinsics(tiny, tmp_path):
    assert run_nerf.main([*tiny, "--N_iters", "30", "--ema_decay", "0.9"]) == 0
    trained = json.loads((tmp_path / "tiny" / "metrics.json").read_text())
    result = run_main(run_nerf.main, *tiny, "--render_only", "--render_test")
    assert result.returncode == 0, result.stderr
    again = json.loads((tmp_path / "tiny" / "metrics.json").read_text())
    assert again["weights"] == "ema"  # also without the flag: it is what training measured
    assert again["psnr"] == pytest.approx(trained["psnr"], abs=1e-4)
    small = [*tiny, "--render_only", "--render_test", "--render_factor", "2"]
    assert run_nerf.main(small) == 0
    # Smaller pictures go beside the run's own evaluation, and have no PSNR.
    assert json.loads((tmp_path / "tiny" / "metrics.json").read_text())["psnr"] == again["psnr"]
    folder = tmp_path / "tiny" / "render_test_000030_f2"
    half = json.loads((folder / "metrics.json").read_text())
    assert half["resolution"] == [10, 10] and "psnr" not in half and "psnr" not in half["views"][0]
    # Same field of view: about the same error against area-averaged pictures, not a crop's.
    pairs = [(iio.imread(folder / f"{n:03d}.png"), iio.imread(folder / "target" / f"{n:03d}.png"))
             for n in range(half["num_views"])]  # fmt: skip
    reduced = float(np.mean([psnr(picture / 255.0, target / 255.0) for picture, target in pairs]))
    assert abs(reduced - trained["psnr"]) < 3


def test_fewer_test_views_or_another_path_never_replace_the_runs_evaluation(tiny, tmp_path):
    assert run_nerf.main([*tiny, "--N_iters", "3", "--i_video", "3"]) == 0
    run = tmp_path / "tiny"
    files = [path for path in run.rglob("*") if path.is_file() and path.suffix != ".txt"]
    before = {path: path.read_bytes() for path in files}
    assert run_nerf.main([*tiny, "--render_only", "--render_test", "--testskip", "2"]) == 0
    keys = [{"c2w": np.eye(4)[:3].tolist(), "fov_deg": 50.0}] * 2
    (tmp_path / "mine.json").write_text(json.dumps({"seconds": 0.1, "keys": keys}))
    own = ["--render_only", "--camera_path", str(tmp_path / "mine.json")]
    assert run_nerf.main([*tiny, *own]) == 0
    assert {path: path.read_bytes() for path in before} == before
    few = json.loads((run / "render_test_000003_testskip2" / "metrics.json").read_text())
    assert few["num_views"] < json.loads((run / "metrics.json").read_text())["num_views"]
    assert (run / "render_path_000003_mine" / "002.png").exists()


def test_another_scene_is_refused_and_a_moved_one_is_not(tiny, tmp_path):
    assert run_nerf.main([*tiny, "--N_iters", "3"]) == 0
    run = tmp_path / "tiny"
    shutil.copytree(tiny[tiny.index("--datadir") + 1], tmp_path / "elsewhere")
    assert run_nerf.main([*tiny, "--datadir", str(tmp_path / "elsewhere"), "--N_iters", "4"]) == 0
    other = tmp_path / "elsewhere" / "transforms_train.json"
    content = json.loads(other.read_text())
    for frame in content["frames"]:
        frame["transform_matrix"][0][3] += 0.5
    other.write_text(json.dumps(content))
    before = (run / "metrics.json").read_bytes()
    for mode in (["--N_iters", "5"], ["--render_only", "--render_test"]):
        result = run_main(run_nerf.main, *tiny, "--datadir", tmp_path / "elsewhere", *mode)
        assert result.returncode == 2 and "other camera positions" in result.stderr
    assert (run / "metrics.json").read_bytes() == before


def test_a_finished_run_with_other_flags_changes_nothing(tiny, tmp_path):
    assert run_nerf.main([*tiny, "--N_iters", "3"]) == 0
    before = (tmp_path / "tiny" / "args.json").read_bytes()
    result = run_main(run_nerf.main, *tiny, "--N_iters", "2", "--lrate", "0.5")
    assert result.returncode == 0 and "changed since the checkpoint: lrate" in result.stderr
    assert "set --N_iters to more" in result.stderr and "nothing is left to do" in result.stderr
    assert (tmp_path / "tiny" / "args.json").read_bytes() == before


def test_render_only_without_a_checkpoint_is_an_error(tiny, tmp_path):
    result = run_main(run_nerf.main, *tiny, "--render_only")
    assert result.returncode == 2
    assert "no checkpoint to render or export" in result.stderr and "Traceback" not in result.stderr
    assert not list(tmp_path.rglob("*.png"))


def test_ft_path_starts_from_given_weights_and_the_run_resumes_its_own(tiny, tmp_path):
    assert run_nerf.main([*tiny, "--N_iters", "5"]) == 0
    source = tmp_path / "tiny" / "000005.tar"
    flags = [*tiny, "--expname", "fine_tuned", "--ft_path", str(source)]
    assert run_nerf.main([*flags, "--N_iters", "8"]) == 0
    assert run_nerf.main([*flags, "--N_iters", "12"]) == 0
    log = (tmp_path / "fine_tuned" / "log.txt").read_text()
    assert f"resumed from {source} at step 5" in log
    assert "fine_tuned/000008.tar at step 8" in log
    assert run_nerf.main([*tiny, "--expname", "whole", "--N_iters", "12"]) == 0
    assert_same_training(newest(tmp_path / "whole"), newest(tmp_path / "fine_tuned"))


def test_a_start_that_would_not_be_read_is_refused(tiny, tmp_path, capsys):
    """Of a run that has checkpoints of its own: it would train on from those."""
    assert run_nerf.main([*tiny, "--N_iters", "2"]) == 0
    record = (tmp_path / "tiny" / "args.json").read_text()
    for flag in ("--ft_path", "--ft_weights"):
        assert run_nerf.main([*tiny, "--N_iters", "4", flag, "nowhere.tar"]) == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert f"{flag} nowhere.tar: it would not be read" in error and "--expname" in error
    assert (tmp_path / "tiny" / "args.json").read_text() == record
    own = str(tmp_path / "tiny" / "000002.tar")
    assert run_nerf.main([*tiny, "--N_iters", "3", "--ft_path", own]) == 0


def test_changed_structural_flags_are_refused_with_both_values(tiny, tmp_path, capsys):
    assert run_nerf.main([*tiny, "--N_iters", "2"]) == 0
    record = (tmp_path / "tiny" / "args.json").read_text()
    assert run_nerf.main([*tiny, "--N_iters", "4", "--netwidth", "32", "--multires", "5"]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "netwidth: 16 -> 32" in error and "multires: 4 -> 5" in error
    assert (tmp_path / "tiny" / "args.json").read_text() == record  # still that of the weights
    assert run_nerf.main([*tiny, "--N_iters", "4", "--lrate", "1e-3"]) == 0
    assert "lrate: 0.005 -> 0.001" in capsys.readouterr().err


def test_a_second_process_on_the_same_folder_is_refused(tiny, tmp_path, capsys):
    (tmp_path / "tiny").mkdir()
    with open(tmp_path / "tiny" / ".lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert run_nerf.main([*tiny, "--N_iters", "2"]) == 2
    assert "another process is training here" in capsys.readouterr().err
    assert run_nerf.main([*tiny, "--N_iters", "2"]) == 0  # a leftover file locks nothing


def test_a_bad_newest_checkpoint_is_named_and_the_one_before_used(tiny, tmp_path):
    assert run_nerf.main([*tiny, "--N_iters", "6", "--i_weights", "3"]) == 0
    bad = tmp_path / "tiny" / "000006.tar"
    bad.write_bytes(bad.read_bytes()[:3000])
    assert run_nerf.main([*tiny, "--N_iters", "8"]) == 0
    log = (tmp_path / "tiny" / "log.txt").read_text()
    assert "skipping a bad checkpoint" in log and "000006.tar" in log
    assert "resumed from" in log and "000003.tar at step 3" in log


def test_time_limit_and_timed_checkpoints(tiny, tmp_path):
    flags = [*tiny, "--N_iters", "1000000", "--max_minutes", "0.05", "--ckpt_secs", "0.5"]
    began = time.monotonic()
    assert run_nerf.main(flags) == 0
    assert time.monotonic() - began < 60
    state = newest(tmp_path / "tiny")
    assert 3.0 <= state["train_seconds"] < 10
    assert len(list_checkpoints(tmp_path / "tiny")) == 2
    steps = state["global_step"]
    assert run_nerf.main(flags) == 0  # the time is used up: one more step at most
    assert newest(tmp_path / "tiny")["global_step"] <= steps + 1


def test_a_checkpoint_from_nerf_pytorch_resumes(tmp_path, data):
    peer = REPOSITORY.parent / "shared" / "peer" / "lego_small" / "004251.tar"
    if not peer.exists():
        pytest.skip("needs ../shared/peer")
    flags = [
        *("--config", str(peer.parent / "config.txt"), "--datadir", str(data)),
        *("--basedir", str(tmp_path), "--i_video", "0", "--i_img", "0", "--N_rand", "32"),
    ]
    run = tmp_path / "lego_small"
    run.mkdir()
    (run / peer.name).write_bytes(peer.read_bytes())
    assert run_nerf.main([*flags, "--N_iters", "4253"]) == 0
    assert "004251.tar at step 4251" in (run / "log.txt").read_text()
    # What we write has its keys and shapes: nerf-pytorch loads it by plain torch.load.
    ours, theirs = torch.load(run / "004253.tar"), load_checkpoint(peer)
    for key in ("network_fn_state_dict", "network_fine_state_dict"):
        assert {k: v.shape for k, v in ours[key].items()} == {
            k: v.shape for k, v in theirs[key].items()
        }
    assert ours["optimizer_state_dict"]["state"].keys() == (
        theirs["optimizer_state_dict"]["state"].keys()
    )


MISTAKES = {
    "--N_rand 0": "N_rand",
    "--N_rand many": "N_rand",
    "--dataset_type castle": "castle",
    "--device quantum": "quantum",
    "--device cuda:7": "cuda:7",
    "--no_reload --render_only": "contradict",
    "--half_res --downscale 2": "leave out --half_res, or leave out --downscale",
    "--downscale 3": "cannot be reduced 3 times",
    "--N_samples 2": "3 or more",
    "--keep_ckpts 1": "at least 2",
    "--ft_path nowhere.tar": "nowhere.tar",
    "--datadir nowhere": "no such data folder",
    "--precrop_frac 2": "precrop_frac",
    "--lrate nan": "lrate",
    "--netdepth 5": "depth 5",
    "--N_smples 4": "N_samples",
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_that_names_it(tiny, mistake):
    result = run_main(run_nerf.main, *tiny, "--N_iters", 1, *mistake.split())
    assert result.returncode == 2
    assert MISTAKES[mistake] in result.stderr.strip().splitlines()[-1]


def test_rays_that_do_not_divide_by_the_processes_are_refused(data):
    args = nerf_flags.parse([*NERF_TINY, "--N_rand", "100"])
    with pytest.raises(ValueError, match="N_rand 100 does not divide by 3 processes"):
        nerf_flags.check_nerf_flags(args, 3)


def tiny_data(tiny) -> str:
    return tiny[tiny.index("--datadir") + 1]


def test_an_export_without_a_name_takes_the_run_trained_last(tiny, tmp_path):
    assert run_nerf.main([*tiny, "--N_iters", "3"]) == 0
    words = ["--export_points", tmp_path / "cloud.ply", "--basedir", tmp_path, "--device", "cpu"]
    result = run_main(run_nerf.main, *words)
    assert "taking the run trained last, tiny" in result.stderr
    assert "000003.tar: step 3" in result.stderr  # what it then exports depends on the weights
    assert not (tmp_path / "fern").exists()
    # A name that was typed is never answered with another run.
    result = run_main(run_nerf.main, *words, "--expname", "mine", "--datadir", tiny_data(tiny))
    assert result.returncode == 2 and "no checkpoint to render or export" in result.stderr
    assert "trained last" not in result.stderr


def test_the_record_of_a_run_can_be_run_again(tiny, tmp_path):
    """args.txt lists every flag, also those of other formats: they are not taken for wishes."""
    assert run_nerf.main([*tiny, "--N_iters", "2"]) == 0
    record = tmp_path / "tiny" / "args.txt"
    assert run_nerf.main(["--config", str(record), "--N_iters", "3"]) == 0
    assert newest(tmp_path / "tiny")["global_step"] == 3
