"""Speed and memory of the unchanged NeRF algorithm, compared with a checkout of nerf-pytorch.

    python benchmarks/vanilla.py                                # this project alone
    python benchmarks/vanilla.py --peer path/to/nerf-pytorch    # side by side, in turn
    python benchmarks/vanilla.py --peer ... --network paper     # 8x256, 64 + 128 samples
    python benchmarks/vanilla.py --peer ... --warm 600          # both start from a trained network

Both programs train the demo scene with the same flags for a few steps, then render test views.
Runs alternate, each in its own process; the table has medians and the ratio of medians. Timings are
noisy: compare ratios within one run of this script, not absolute times of two.
"""

import argparse
import csv
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import types
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

DATA = ROOT / "data" / "demo"
NETWORKS = {
    "small": dict(depth=4, width=128, samples=32, importance=32, rays=1024, steps=20, testskip=8),
    "paper": dict(depth=8, width=256, samples=64, importance=128, rays=1024, steps=3, testskip=25),
}
OURS = ("fp32", "bf16")


def flags(size: dict, start: Path | None) -> list[str]:
    """The flags of both programs; start: a checkpoint that both continue from."""
    depth, width = str(size["depth"]), str(size["width"])
    return [
        *("--datadir", str(DATA), "--use_viewdirs", "--white_bkgd", "--no_batching"),
        *("--netdepth", depth, "--netwidth", width, "--netdepth_fine", depth),
        *("--netwidth_fine", width, "--N_samples", str(size["samples"])),
        *("--N_importance", str(size["importance"]), "--N_rand", str(size["rays"])),
        *("--expname", "bench", "--i_weights", "100000", "--testskip", str(size["testskip"])),
        *(("--ft_path", str(start)) if start else ()),
    ]


def train(size: dict, steps: int, folder: Path) -> Path:
    """Train ``steps`` updates with run_nerf.py; the checkpoint, which nerf-pytorch can read."""
    command = [sys.executable, str(ROOT / "run_nerf.py"), *flags(size, None), "--amp", "bf16"]
    command += ["--dataset_type", "demo", "--basedir", str(folder), "--device", "cpu"]
    command += ["--N_iters", str(steps), "--i_img", "0", "--i_video", "0", "--expname", "warm"]
    subprocess.run(command, check=True, capture_output=True)
    return folder / "warm" / f"{steps:06d}.tar"


def run_ours(size: dict, precision: str, threads: int, start=None, done=0) -> dict[str, float]:
    """Train and render with run_nerf.py: rays/s, rendered pixels/s, peak MB."""
    folder = tempfile.mkdtemp(prefix="bench_")
    try:
        amp = "off" if precision == "fp32" else precision
        steps = size["steps"]
        subprocess.run(
            [
                *(sys.executable, str(ROOT / "run_nerf.py"), *flags(size, start), "--amp", amp),
                *("--dataset_type", "demo", "--basedir", folder, "--device", "cpu"),
                *("--N_iters", str(done + 2 * steps), "--i_print", str(steps), "--i_img", "0"),
                *("--i_video", "0", "--ckpt_secs", "0"),
            ],
            check=True,
            capture_output=True,
            env=_environment(threads),
        )
        with open(Path(folder) / "bench" / "metrics.csv", encoding="utf-8") as file:
            last = list(csv.DictReader(file))[-1]  # the second window; the first is warm-up
        metrics = json.loads((Path(folder) / "bench" / "metrics.json").read_text())
        width, height = metrics["resolution"]
        return {
            "rays_per_second": float(last["rays_per_second"]),
            "pixels_per_second": width * height / metrics["seconds_per_view"],
            "memory_mb": float(last["memory_mb"]),
        }
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def run_peer(size: dict, checkout: Path, threads: int, start=None) -> dict[str, float]:
    """The same with nerf-pytorch's own code, in a separate process."""
    folder = tempfile.mkdtemp(prefix="bench_")
    try:
        result = subprocess.run(
            [
                *(sys.executable, __file__, "--drive_peer", str(size["steps"])),
                *(*flags(size, start), "--dataset_type", "blender", "--basedir", folder),
            ],
            check=True,
            capture_output=True,
            text=True,
            env=_environment(threads) | {"PYTHONPATH": str(checkout)},
            cwd=checkout,
        )
        return json.loads(result.stdout.strip().splitlines()[-1])
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def drive_peer(steps: int, argv: list[str]) -> None:
    """Run nerf-pytorch's train() for 2 x steps iterations, timing the second half, then a render.

    Its code is unchanged: its progress bar is replaced to take the times, and two libraries that it
    imports but does not need here are stubbed. PYTHONPATH names its checkout.
    """
    import resource

    import torch

    for name in ("matplotlib", "matplotlib.pyplot", "cv2"):
        sys.modules.setdefault(name, types.ModuleType(name))
    sys.argv = ["run_nerf.py", *argv]
    import run_nerf as peer

    captured = {}
    create = peer.create_nerf

    def create_and_keep(args):
        captured["made"] = create(args)
        captured["args"] = args
        return captured["made"]

    def timed(start, stop):
        for step in range(start, start + 2 * steps):
            if step == start + steps:
                captured["since"] = time.perf_counter()
            yield step
        seconds = time.perf_counter() - captured["since"]
        args, render = captured["args"], captured["made"][1]
        _, poses, _, (height, width, focal), split = peer.load_blender_data(
            args.datadir, False, args.testskip
        )
        matrix = [[focal, 0, width / 2], [0, focal, height / 2], [0, 0, 1]]
        views = torch.tensor(poses[split[2]])
        hwf = [height, width, focal]
        began = time.perf_counter()
        with torch.no_grad():
            peer.render_path(views, hwf, matrix, args.chunk, render)
        figures = {
            "rays_per_second": steps * args.N_rand / seconds,
            "pixels_per_second": len(views) * height * width / (time.perf_counter() - began),
            "memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        }
        print(json.dumps(figures), flush=True)
        sys.exit(0)

    peer.create_nerf, peer.trange = create_and_keep, timed
    peer.train()


def _environment(threads: int) -> dict[str, str]:
    import os

    return {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}


def main() -> None:
    if sys.argv[1:2] == ["--drive_peer"]:
        return drive_peer(int(sys.argv[2]), sys.argv[3:])
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peer", type=Path, help="checkout of nerf-pytorch to compare with")
    parser.add_argument("--network", choices=sorted(NETWORKS), default="small")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each program")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--warm", type=int, default=0, help="updates to train before the comparison"
    )
    args = parser.parse_args()
    if not DATA.exists():
        subprocess.run([sys.executable, str(ROOT / "data/make_demo.py"), "--out", DATA], check=True)
    size, rows, start = NETWORKS[args.network], {}, None
    if args.warm:
        args.warm -= args.warm % size["steps"]  # windows of speed start at multiples
        start = train(size, args.warm, Path(tempfile.mkdtemp(prefix="bench_")))
    for number in range(args.rounds):
        for precision in OURS:
            figures = run_ours(size, precision, args.threads, start, args.warm)
            rows.setdefault(f"ours {precision}", []).append(figures)
        if args.peer:
            rows.setdefault("nerf-pytorch", []).append(
                run_peer(size, args.peer.resolve(), args.threads, start)
            )
        report(args, rows, number + 1)  # so that an interrupted run has printed its results


def report(args, rows: dict[str, list[dict[str, float]]], rounds: int) -> None:
    """Print medians with their range, and ratios to nerf-pytorch if it ran."""
    keys = ("rays_per_second", "pixels_per_second", "memory_mb")
    medians = {
        name: {key: statistics.median(run[key] for run in runs) for key in keys}
        for name, runs in rows.items()
    }
    print(f"network {args.network}, {args.threads} threads, {rounds} rounds, step {args.warm}")
    print("| program | train rays/s (range) | render pixels/s (range) | peak MB |")
    print("|---|---|---|---|")
    for name, runs in rows.items():
        cells = []
        for key in keys:
            values = [run[key] for run in runs]
            cell = f"{medians[name][key]:.0f} ({min(values):.0f}-{max(values):.0f})"
            if "nerf-pytorch" in medians and name != "nerf-pytorch":
                cell += f", **{medians[name][key] / medians['nerf-pytorch'][key]:.2f}x**"
            cells.append(cell)
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
