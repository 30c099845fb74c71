"""Quality against time of the fast path on the real Lego scene, and what rendering costs.

    python benchmarks/fast.py --data path/to/lego                       # every row, three seeds
    python benchmarks/fast.py --data ... --rows tri100 mlp100 --seeds 0
    python benchmarks/fast.py --data ... --rows frames --peer path/to/nerf-pytorch

Runs run_nerf.py. Seconds are training time by the run's own clock, which stops while test views are
rendered; PSNR is the mean over all 25 test views. A level is reached at the first evaluation at or
above it. No setting was chosen by these results: settings were tuned on the validation views.
"""

import argparse
import csv
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks import vanilla

ROOT = Path(__file__).resolve().parents[1]

SMALL = "--netdepth 4 --netwidth 128 --netdepth_fine 4 --netwidth_fine 128"
# name: (flags besides those of the scene, steps, evaluations, PSNR levels in dB to time)
ROWS = {
    "tri100short": ("--fast --downscale 8", 480, 8, (27, 28)),
    "tri100": ("--fast --downscale 8", 1200, 12, (28, 30)),
    "tri100long": ("--fast --downscale 8", 12000, 6, (30, 32)),
    "mlp100": (
        f"--fast --field mlp {SMALL} --lrate 8e-3 --lrate_warmup 100 --downscale 8 "
        "--target_samples 4096",
        1200,
        10,
        (22, 24),
    ),
    "tri200": ("--fast --downscale 4 --march_steps 192", 3500, 14, (28, 30)),
    "tri400": ("--fast --downscale 2 --march_steps 256 --grid_res 256", 12000, 6, (28, 29)),
    "vanilla100": (
        f"--downscale 8 {SMALL} --N_samples 32 --N_importance 32 --lrate 2e-3 --lrate_decay 6 "
        "--lrate_warmup 100 --pixel_center --ema_decay 0.99 --batching "
        "--precrop_iters 100 --N_rand 1024 --amp bf16",
        2400,
        12,
        (22, 24),
    ),
}
FRAMES = {"mlp": "mlp100", "triplane": "tri100"}


def run(flags: list[str], threads: int) -> None:
    """Run run_nerf.py on the CPU; exit with its message if it fails."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    command = [sys.executable, str(ROOT / "run_nerf.py"), *flags, "--device", "cpu"]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if result.returncode:
        sys.exit(f"{' '.join(command)}\n{result.stderr}")


def scene_flags(args) -> list[str]:
    config = str(ROOT / "configs" / "lego.txt")
    return [*("--config", config, "--datadir", str(args.data.resolve()), "--no-half_res")]


def curve(args, row: str, seed: int, folder: str) -> tuple[list[tuple[float, float]], float]:
    """One run: (training seconds, test PSNR) at its evaluations, and its peak memory in MB."""
    flags, steps, evaluations, _ = ROWS[row]
    every = str(steps // evaluations)
    run(
        [
            *(*scene_flags(args), *flags.split(), "--testskip", "1", "--seed", str(seed)),
            *("--basedir", folder, "--expname", row, "--N_iters", str(steps), "--i_print", every),
            *("--i_testset", every, "--i_img", "0", "--i_video", "0", "--ckpt_secs", "0"),
        ],
        args.threads,
    )
    with open(Path(folder) / row / "metrics.csv", encoding="utf-8") as file:
        logged = {int(line["step"]): line for line in csv.DictReader(file)}
    points = []
    for step, line in logged.items():
        metrics = Path(folder) / row / f"render_test_{step:06d}" / "metrics.json"
        points.append((float(line["train_seconds"]), json.loads(metrics.read_text())["psnr"]))
    return points, float(line["memory_mb"])


def seconds_to(points: list[tuple[float, float]], level: float) -> float:
    """Training seconds at the first evaluation of at least ``level`` dB, or infinity."""
    return next((seconds for seconds, psnr in points if psnr >= level), float("inf"))


def median_and_range(values: list[float], form: str) -> str:
    """Values as "median (smallest - largest)", or the only value."""
    middle, low, high = (
        form.format(value) for value in (statistics.median(values), min(values), max(values))
    )
    return f"{middle} ({low} - {high})" if len(values) > 1 else middle


def measure_row(args, row: str) -> None:
    """Train with each seed; print the curves, then one line of the table."""
    curves, memory = [], []
    for seed in args.seeds:
        folder = tempfile.mkdtemp(prefix="fast_")
        try:
            points, megabytes = curve(args, row, seed, folder)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        curves.append(points)
        memory.append(megabytes)
        line = ", ".join(f"{seconds:.1f} s {psnr:.2f}" for seconds, psnr in points)
        print(f"  {row} seed {seed}: {line}", flush=True)
    cells = [f"| {row} | {ROWS[row][1]}"]
    for level in ROWS[row][3]:
        cells.append(
            f"{level} dB: {median_and_range([seconds_to(c, level) for c in curves], '{:.1f}')} s"
        )
    cells.append(f"end: {median_and_range([c[-1][1] for c in curves], '{:.2f}')} dB")
    cells.append(f"{median_and_range([c[-1][0] for c in curves], '{:.0f}')} s")
    cells.append(f"{median_and_range(memory, '{:.0f}')} MB |")
    print(" | ".join(cells), flush=True)


def measure_frames(args) -> None:
    """Pixels per second of 100x100 and 800x800 test views, beside nerf-pytorch's own renderer."""
    rates: dict[str, list[float]] = {}
    folder = tempfile.mkdtemp(prefix="fast_")
    try:
        for row in FRAMES.values():
            flags, steps = ROWS[row][:2]
            common = [*scene_flags(args), *flags.split(), "--basedir", folder, "--expname", row]
            common += ["--i_img", "0", "--i_video", "0"]
            run([*common, "--testskip", "25", "--N_iters", str(steps)], args.threads)
        for _ in args.seeds:
            for field, row in FRAMES.items():
                for downscale, skip in (("8", "3"), ("1", "12")):
                    flags = [*scene_flags(args), *ROWS[row][0].split(), "--basedir", folder]
                    flags += ["--expname", row, "--downscale", downscale, "--testskip", skip]
                    run([*flags, "--render_only", "--render_test"], args.threads)
                    metrics = json.loads((Path(folder) / row / "metrics.json").read_text())
                    pixels = metrics["resolution"][0] * metrics["resolution"][1]
                    name = f"{field} {metrics['resolution'][0]}"
                    rates.setdefault(name, []).append(pixels / metrics["seconds_per_view"])
                    print(f"  {name}: PSNR {metrics['psnr']:.2f} dB", flush=True)
            if args.peer:
                figures = vanilla.run_peer(
                    vanilla.NETWORKS["small"], args.peer.resolve(), args.threads
                )
                rates.setdefault("nerf-pytorch 4x128", []).append(figures["pixels_per_second"])
                print(f"  nerf-pytorch: peak {figures['memory_mb']:.0f} MB", flush=True)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    peer = statistics.median(rates.get("nerf-pytorch 4x128", [float("nan")]))
    for name, values in rates.items():
        ratio = statistics.median(values) / peer
        print(
            f"| render {name} | {median_and_range(values, '{:.0f}')} pixels/s | {ratio:.1f}x |",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of the Lego scene")
    parser.add_argument("--rows", nargs="+", choices=[*ROWS, "frames"], default=[*ROWS, "frames"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--peer", type=Path, help="checkout of nerf-pytorch to compare with")
    args = parser.parse_args()
    print(
        f"{args.threads} threads, seeds {args.seeds} | row | steps | levels | end | time | memory |"
    )
    for row in args.rows:
        if row == "frames":
            measure_frames(args)
        else:
            measure_row(args, row)


if __name__ == "__main__":
    main()
