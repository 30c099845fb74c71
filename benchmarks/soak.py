"""Does a killed run lose anything? Real runs, killed at random moments and started again.

    python benchmarks/soak.py --kills 100                      # run_nerf.py
    python benchmarks/soak.py --kills 100 --script dreamfusion
    python benchmarks/soak.py --kills 20 --ranks 2              # one rank at a time, under torchrun

A tiny run is killed with SIGKILL, which no handler sees, at a random moment and started again by
the same command until it finishes; further runs follow until --kills kills are done. Every second
run writes slowly, so that kills fall into saves. After each kill the newest checkpoint must verify
and be at most the saving cadence behind the last logged step. At the end weights, optimizer state
and averaged weights must equal those of an uninterrupted run bit for bit. With --ranks, one of
torchrun's processes is killed at random; torchrun ends the others and restarts all. Exits with 1 if
anything was lost.
"""

import argparse
import csv
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from nerf.training import checkpoint, checkpoint_choice

ROOT = Path(__file__).resolve().parents[1]

CADENCE, STEPS = 4, 60
COMMON = (
    f"--device cpu --N_iters {STEPS} --i_weights {CADENCE} --i_print 1 --i_img 0 --i_video 0 "
    "--ckpt_secs 0 --keep_ckpts 2 --netdepth 2 --netwidth 32 --multires 4 --ema_decay 0.9"
)
COMMANDS = {
    "nerf": "run_nerf.py --config configs/demo_vanilla.txt --datadir {data} --N_samples 8 "
    "--N_importance 8 --N_rand 256 --netdepth_fine 2 --netwidth_fine 32 --testskip 25 "
    "--dead_restarts 0 --i_testset 0 --amp off",
    "dreamfusion": "run_dreamfusion.py --guidance gaussian --prompt ball --train_res 16 "
    "--batch_views 2 --march_steps 24 --occ_res 16 --eval_res 16 --video_frames 2",
}
# Delays fsync: kills then fall between writing a file and renaming it.
SLOWLY = (
    "import os, runpy, sys, time; fsync = os.fsync; "
    "os.fsync = lambda file: (time.sleep({pause}), fsync(file))[1]; "
    "sys.argv = sys.argv[1:]; "
    "runpy.run_path(sys.argv[0], run_name='__main__')"
)
KEPT = ("network_fn_state_dict", "network_fine_state_dict", "optimizer_state_dict")
KEPT += ("ema_state_dict", "occupancy_state_dict", "global_step")


def start(args, folder: Path, name: str, pause: float) -> subprocess.Popen:
    """Start training, under torchrun for several ranks; every write takes ``pause`` s longer."""
    words = COMMANDS[args.script].format(data=args.data).split()
    flags = [*COMMON.split(), "--basedir", str(folder), "--expname", name]
    launcher = []
    if args.ranks > 1:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--max-restarts=100000"]
        launcher += [f"--nproc_per_node={args.ranks}"]
    if pause:
        slowly = folder / "slowly.py"
        slowly.write_text(SLOWLY.format(pause=pause), encoding="utf-8")
        launcher += [str(slowly)]
    log = open(folder / f"{name}.out", "a", encoding="utf-8")  # noqa: SIM115
    command = [sys.executable, *launcher, *words, *flags]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}  # slowly.py lies elsewhere
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)


def logged_step(run: Path) -> int:
    """The last step in metrics.csv, without a line that the kill cut short; 0 without a file."""
    try:
        rows = list(csv.DictReader((run / "metrics.csv").read_text().splitlines(keepends=True)))
    except OSError:
        return 0
    steps = [int(row["step"]) for row in rows if row["step"].isdigit() and None not in row.values()]
    return max(steps, default=0)


def after_kill(run: Path) -> tuple[int, str]:
    """The step of the newest valid checkpoint, and a sentence about what was lost, or ""."""
    reached, complaints = logged_step(run), []
    found = checkpoint_choice.newest_checkpoint(run, complaints.append) if run.is_dir() else None
    step = checkpoint.finished_updates(found[1]) if found else 0
    if complaints:
        return step, f"a broken checkpoint: {'; '.join(complaints)}"
    # The last logged step may still be saving.
    if reached - step > CADENCE:
        return step, f"step {reached} was logged, the newest checkpoint is {step}"
    return step, ""


def differences(first: Path, second: Path) -> list[str]:
    """The keys in KEPT whose values differ between two checkpoints."""
    one, other = (checkpoint.load_checkpoint(path) for path in (first, second))
    return [key for key in KEPT if not same(one.get(key), other.get(key))]


def same(one, other) -> bool:
    """Whether two values of a checkpoint are equal bit for bit."""
    if torch.is_tensor(one):
        return torch.is_tensor(other) and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def children(pid: int) -> set[int]:
    """Ids of the living child processes of ``pid``."""
    try:
        numbers = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        return {
            int(number)
            for number in numbers
            if Path(f"/proc/{number}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
        }
    except OSError:
        return set()


def kill_run(process, ranks: int, draw: random.Random):
    """Kill the process, or one of its ranks; returns it if torchrun restarts, otherwise None."""
    if ranks == 1:
        process.kill()
        process.wait()
        return None
    victims = children(process.pid)
    if victims:
        os.kill(draw.choice(sorted(victims)), signal.SIGKILL)
    deadline = time.monotonic() + 120
    while victims & children(process.pid):  # until torchrun has ended the others
        if time.monotonic() > deadline:
            raise SystemExit("the other ranks hang after one was killed")
        time.sleep(0.02)
    return process


def one_run(args, folder: Path, name: str, kills: int, draw: random.Random, pause: float) -> dict:
    """Kill and restart a run up to ``kills`` times, then let it finish; counts and losses."""
    result = {"kills": 0, "in_a_save": 0, "lost": []}
    run, process = folder / name, None
    while True:
        if process is None:
            process = start(args, folder, name, pause)
        if result["kills"] < kills:
            wait_for_progress(process, run)
            try:
                process.wait(timeout=draw.uniform(0.0, args.longest + 3 * pause))
            except subprocess.TimeoutExpired:
                process = kill_run(process, args.ranks, draw)
                result["kills"] += 1
                result["in_a_save"] += any(run.glob(".*.tmp"))
                lost = after_kill(run)[1]
                result["lost"] += [f"{name}, kill {result['kills']}: {lost}"] if lost else []
                continue
        if process.wait():
            result["lost"].append(f"{name}: exit code {process.returncode}")
        return result


def wait_for_progress(process, run: Path) -> None:
    """Wait until the process has logged a new step or has ended."""
    stamp = (run / "metrics.csv").stat().st_mtime if (run / "metrics.csv").exists() else 0.0
    while process.poll() is None:
        path = run / "metrics.csv"
        if path.exists() and path.stat().st_mtime > stamp:
            return
        time.sleep(0.02)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--script", choices=list(COMMANDS), default="nerf")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--ranks", type=int, default=1, help="processes of a run, under torchrun")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random moments")
    parser.add_argument(
        "--longest", type=float, default=0.6, help="most seconds of training before a kill"
    )
    parser.add_argument("--pause", type=float, default=0.5, help="seconds added to each slow write")
    parser.add_argument("--data", type=Path, default=ROOT / "data" / "demo")
    parser.add_argument("--json", type=Path, help="file to write the counts to")
    args = parser.parse_args()
    draw, total = random.Random(args.seed), {"kills": 0, "in_a_save": 0, "runs": 0, "lost": []}
    folder = Path(tempfile.mkdtemp(prefix="soak_"))
    try:
        if start(args, folder, "untouched", 0.0).wait():
            sys.exit((folder / "untouched.out").read_text())
        end = f"{STEPS:06d}.tar"
        while total["kills"] < args.kills:
            name = f"killed_{total['runs']}"
            pause = args.pause if total["runs"] % 2 else 0.0
            result = one_run(args, folder, name, args.kills - total["kills"], draw, pause)
            apart = differences(folder / "untouched" / end, folder / name / end)
            result["lost"] += [f"{name}: {', '.join(apart)} differ at the end"] if apart else []
            for key, value in result.items():
                total[key] += value
            total["runs"] += 1
            print(f"{args.script}: {total}", flush=True)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if args.json:
        args.json.write_text(json.dumps({"script": args.script, **total}, indent=1) + "\n")
    return 1 if total["lost"] else 0


if __name__ == "__main__":
    sys.exit(main())
