"""run_nerf.py as a user runs it: train, resume, stop, render, measure, refuse. Tiny networks."""

import csv
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import imageio.v3 as iio
import make_demo
import numpy as np
import pytest
import torch
from conftest import run_script

import run_nerf
from nerf import build
from nerf.flags import nerf as nerf_flags
from nerf.training import distributed, rng, system
from nerf.training.checkpoint import list_checkpoints, load_checkpoint

ROOT = Path(__file__).resolve().parents[1]
TINY = (
    "--use_viewdirs --white_bkgd --netdepth 2 --netwidth 16 --netdepth_fine 2 --netwidth_fine 16 "
    "--N_samples 8 --N_importance 8 --multires 4 --N_rand 64 --lrate 5e-3 --device cpu --i_img 0 "
    "--i_video 0 --i_print 5 --ckpt_secs 0 --expname tiny --dataset_type blender --testskip 1"
).split()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scene") / "demo"
    make_demo.make(folder, "blender", 20, {"train": 5, "val": 2, "test": 3})
    return folder


@pytest.fixture
def tiny(data, tmp_path):
    """Flags of a tiny run in a folder of its own."""
    return [*TINY, "--datadir", str(data), "--basedir", str(tmp_path)]


def script(*arguments, launcher=()):
    return run_script(arguments, launcher=launcher, timeout=180)


def newest(folder: Path) -> dict:
    return load_checkpoint(list_checkpoints(folder)[0])


def flat(value, prefix="") -> dict:
    """Every tensor and number of a nested state, by path."""
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list):
        items = enumerate(value)
    else:
        return {prefix: value}
    return {k: v for name, item in items for k, v in flat(item, f"{prefix}/{name}").items()}


def assert_same_training(first: dict, second: dict) -> None:
    names = ["network_fn_state_dict", "network_fine_state_dict", "optimizer_state_dict"]
    names += ["occupancy_state_dict", "num_rays", "box"]
    names += ["ema_state_dict", "scaler_state_dict", "global_step"]
    for name in names:
        one, other = flat(first.get(name)), flat(second.get(name))
        assert one.keys() == other.keys()
        for key, value in one.items():
            same = torch.equal(value, other[key]) if torch.is_tensor(value) else value == other[key]
            assert same, f"{name}{key} differs"


def test_a_run_leaves_everything_the_readme_names(tiny, tmp_path):
    result = script(*tiny, "--N_iters", 20, "--i_img", 10, "--i_video", 20, "--ema_decay", 0.9)
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
    process = subprocess.Popen(flags, cwd=ROOT, stderr=subprocess.PIPE, text=True)
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
    process = subprocess.Popen(flags, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    while not list(tmp_path.rglob("render_path_000002/*.png")) and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    error = process.stderr.read()
    assert process.wait(timeout=60) == 143
    assert "while rendering" in error and "Traceback" not in error
    assert newest(tmp_path / "tiny")["global_step"] == 2


def test_two_processes_train_as_one(tiny, tmp_path):
    flags = [*tiny, "--N_iters", "6", "--ema_decay", "0.9"]
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=29571"]
    result = script(*flags, "--expname", "two", launcher=launcher)
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
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=29573"]
    result = script(*flags, "--expname", "two", launcher=launcher)
    assert result.returncode == 0, result.stderr
    assert run_nerf.main([*flags, "--expname", "one"]) == 0
    one, two = newest(tmp_path / "one"), newest(tmp_path / "two")
    grids = [state["occupancy_state_dict"]["occupied"] for state in (one, two)]
    assert torch.equal(*grids) and one["num_rays"] == two["num_rays"]
    metrics = [json.loads((tmp_path / n / "metrics.json").read_text()) for n in ("one", "two")]
    assert metrics[0]["psnr"] == pytest.approx(metrics[1]["psnr"], abs=0.05)


def two_rank_gradients(rank: int, port: int, folder: str) -> None:
    """Process body: the gradients of one step of half a batch under DDP, saved by each rank."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    world = distributed.setup("cpu")
    renderer, rays, target, noise = gradient_case()
    model = torch.nn.parallel.DistributedDataParallel(renderer)
    share = world.shard(len(target))
    levels = model(rays.part(share), noise.part(share))
    sum(((level.rgb - target[share]) ** 2).mean() for level in levels).backward()
    torch.save([p.grad for p in renderer.parameters()], f"{folder}/{rank}.pt")
    distributed.cleanup()


def gradient_case():
    """A small renderer and one global batch, the same in every process."""
    args = nerf_flags.parse(TINY)
    rng.seed_everything(3)
    renderer = build.build_renderer(args)
    generator = rng.step_generator(3, 0, "cpu")
    from nerf.rays import Rays

    directions = torch.randn(32, 3, generator=generator)
    unit = directions / directions.norm(dim=-1, keepdim=True)
    near, far = torch.full((32, 1), 2.0), torch.full((32, 1), 6.0)
    rays = Rays(-4 * unit, unit, unit, near, far)
    target = torch.rand(32, 3, generator=generator)
    return renderer, rays, target, renderer.draw_noise(32, generator)


def test_gradients_of_two_ranks_equal_one_process(tmp_path):
    torch.multiprocessing.spawn(two_rank_gradients, args=(29572, str(tmp_path)), nprocs=2)
    renderer, rays, target, noise = gradient_case()
    levels = renderer(rays, noise)
    sum(((level.rgb - target) ** 2).mean() for level in levels).backward()
    both = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    for parameter, first, second in zip(renderer.parameters(), *both, strict=True):
        assert torch.equal(first, second)
        assert (first - parameter.grad).abs().max() <= 1e-6 * max(1, parameter.grad.abs().max())


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
    assert "stuck, every ray of the fine level is all background" in log and "seed 1" in log
    assert len(built) == 2 and newest(tmp_path / "tiny")["attempt"] == 1
    built.clear()
    # Told not to restart, it goes on as it is.
    quiet = [*tiny, "--expname", "stay", "--N_iters", "210", "--dead_restarts", "0"]
    assert run_nerf.main(quiet) == 0 and len(built) == 1


def test_render_only_uses_the_checkpoint_and_scales_intrinsics(tiny, tmp_path):
    assert run_nerf.main([*tiny, "--N_iters", "30", "--ema_decay", "0.9"]) == 0
    trained = json.loads((tmp_path / "tiny" / "metrics.json").read_text())
    result = script(*tiny, "--render_only", "--render_test")
    assert result.returncode == 0, result.stderr
    again = json.loads((tmp_path / "tiny" / "metrics.json").read_text())
    assert again["weights"] == "ema"  # also without the flag: it is what training measured
    assert again["psnr"] == pytest.approx(trained["psnr"], abs=1e-4)
    small = [*tiny, "--render_only", "--render_test", "--render_factor", "2"]
    assert run_nerf.main(small) == 0
    half = json.loads((tmp_path / "tiny" / "metrics.json").read_text())
    assert half["resolution"] == [10, 10]
    # Same field of view: about the same error against area-averaged pictures, not a crop's.
    assert abs(half["psnr"] - trained["psnr"]) < 3


def test_render_only_without_a_checkpoint_is_an_error(tiny, tmp_path):
    result = script(*tiny, "--render_only")
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
    peer = ROOT.parent / "shared" / "peer" / "lego_small" / "004251.tar"
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
    "--half_res --downscale 2": "leave one out",
    "--downscale 3": "cannot be reduced 3 times",
    "--N_samples 2": "too few",
    "--keep_ckpts 1": "at least 2",
    "--ft_path nowhere.tar": "nowhere.tar",
    "--datadir nowhere": "download.py",
    "--precrop_frac 2": "precrop_frac",
    "--lrate nan": "lrate",
    "--netdepth 5": "depth 5",
    "--N_smples 4": "N_samples",
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_that_names_it(tiny, capsys, mistake):
    try:
        code = run_nerf.main([*tiny, "--N_iters", "1", *mistake.split()])
    except SystemExit as stop:  # argparse ends the program itself
        code = stop.code
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert code == 2
    assert MISTAKES[mistake] in error


def test_rays_that_do_not_divide_by_the_processes_are_refused(data):
    args = nerf_flags.parse([*TINY, "--N_rand", "100"])
    with pytest.raises(ValueError, match="N_rand 100 does not divide by 3 processes"):
        nerf_flags.check_nerf_flags(args, 3)
