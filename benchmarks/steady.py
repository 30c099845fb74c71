"""Does memory or disk use grow over hours? A long run, measured from outside.

    python benchmarks/steady.py --minutes 120                        # run_nerf.py
    python benchmarks/steady.py --minutes 120 --script dreamfusion

The script trains with previews, videos, test sets and checkpoints far more often than usual, and
with a viewer, whose one client comes, turns its camera and goes again and again. Every few seconds
its resident memory, threads and open files are read from Linux's /proc, and the files and bytes of
its run folder are counted. The first third is warm-up; the slope of a line fitted to the rest is
the growth per hour. Every save is timed, and its share of the time at the default --ckpt_secs is
printed. At the end the run gets SIGTERM and must save and exit with code 143.
"""

import argparse
import csv
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from nerf.flags.nerf import nerf_parser

ROOT = Path(__file__).resolve().parents[1]
VISIT = "--clients 1 --rate 20 --stay 20"  # of benchmarks/viewer_clients.py

COMMANDS = {
    "nerf": "run_nerf.py --config configs/demo.txt --N_iters 100000000 --i_print 20 --i_img 200 "
    "--i_video 1000 --i_testset 1000 --i_weights 200 --ckpt_secs 30 --lr_schedule exp",
    "dreamfusion": "run_dreamfusion.py --config configs/dream_tiny.txt --prompt 'a red cone' "
    "--N_iters 100000000 --i_print 20 --i_img 50 --i_video 200 --i_weights 50 --ckpt_secs 30",
}
# Runs the script and writes the seconds of each save to a file.
TIMED = (
    "import json, runpy, sys, time; sys.argv = sys.argv[1:]; "
    "from nerf.training import checkpoint_choice; save = checkpoint_choice.save_run\n"
    "def timed(*args, **kwargs):\n"
    "    began = time.perf_counter(); done = save(*args, **kwargs)\n"
    "    with open({log!r}, 'a') as file: print(time.perf_counter() - began, file=file)\n"
    "    return done\n"
    "checkpoint_choice.save_run = timed\n"
    "runpy.run_path(sys.argv[0], run_name='__main__')"
)
READINGS = ("MB", "threads", "open files", "files", "folder MB")


def read(pid: int, run: Path) -> list[float]:
    """The current values of READINGS; OSError when the process has ended."""
    status = Path(f"/proc/{pid}/status").read_text()
    field = dict(line.split(":", 1) for line in status.splitlines())
    sizes = []
    for path in run.rglob("*"):
        try:
            sizes.append(path.stat().st_size)
        except OSError:  # just replaced by the run
            continue
    handles = len(os.listdir(f"/proc/{pid}/fd"))
    memory = int(field["VmRSS"].split()[0]) / 1024
    return [memory, int(field["Threads"]), handles, len(sizes), sum(sizes) / 2**20]


def summary(times: np.ndarray, values: np.ndarray) -> dict:
    """First value and median after the warm-up third, last value, maximum, growth per hour.

    times [N] in seconds, values [N]; growth is the slope of a least-squares line.
    """
    late = times >= times[0] + (times[-1] - times[0]) / 3
    hours, late_values = times[late] / 3600, values[late]
    slope = float(np.polyfit(hours, late_values, 1)[0]) if late.sum() > 1 else 0.0
    return {
        "warm": float(late_values[0]),
        "median": float(np.median(late_values)),
        "end": float(values[-1]),
        "most": float(values.max()),
        "per hour": slope,
    }


def watch(process, run: Path, minutes: float, every: float) -> np.ndarray:
    """Rows [N, 1 + readings] of seconds and READINGS until the time is over or the run ends."""
    rows, began = [], time.monotonic()
    while time.monotonic() - began < 60 * minutes and process.poll() is None:
        time.sleep(every)
        try:
            rows.append([time.monotonic() - began, *read(process.pid, run)])
        except OSError:
            break
    return np.array(rows)


def free_port() -> int:
    """A port of this machine that nobody uses now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def last_step(run: Path) -> int:
    """The last step in metrics.csv."""
    rows = list(csv.DictReader((run / "metrics.csv").read_text().splitlines()))
    return max((int(row["step"]) for row in rows if row["step"].isdigit()), default=0)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--script", choices=list(COMMANDS), default="nerf")
    parser.add_argument("--minutes", type=float, default=120.0)
    parser.add_argument("--every", type=float, default=10.0, help="seconds between readings")
    parser.add_argument("--flags", default="", help="further flags for the script")
    parser.add_argument("--json", type=Path, help="file to write the results to")
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="steady_"))
    saves, run = folder / "saves.txt", folder / "run"
    words = shlex.split(f"{COMMANDS[args.script]} {args.flags}")
    port = str(free_port())
    launcher = [sys.executable, "-c", TIMED.format(log=str(saves)), *words]
    launcher += ["--viewer", "--viewer_port", port, "--basedir", str(folder), "--expname", "run"]
    visitor = [sys.executable, "benchmarks/viewer_clients.py", "--port", port, *VISIT.split()]
    try:
        with open(folder / "out.txt", "w") as log:
            process = subprocess.Popen(launcher, cwd=ROOT, stdout=log, stderr=log)
            visits = subprocess.Popen(visitor, cwd=ROOT, stdout=subprocess.PIPE, text=True)
            try:
                rows = watch(process, run, args.minutes, args.every)
                process.send_signal(signal.SIGTERM)
                code = process.wait(timeout=600)
                seen = json.loads(visits.communicate(timeout=60)[0])
            finally:
                process.kill()
                visits.kill()
        if code != 128 + signal.SIGTERM or len(rows) < 3:
            print((folder / "out.txt").read_text()[-3000:], file=sys.stderr)
            print(f"exit code {code} after {len(rows)} readings", file=sys.stderr)
            return 1
        print(f"{seen['visits']} visits to the viewer, {seen['pictures']} pictures")
        report(args, rows, [float(line) for line in saves.read_text().split()], last_step(run))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return 0


def report(args, rows: np.ndarray, saves: list[float], steps: int) -> None:
    """Print the table and the cost of saving; write --json if given."""
    cadence = nerf_parser().get_default("ckpt_secs")
    share = 100 * float(np.median(saves)) / cadence
    found = {name: summary(rows[:, 0], rows[:, 1 + n]) for n, name in enumerate(READINGS)}
    print(f"{args.script}: {rows[-1, 0] / 60:.0f} minutes, {steps} steps, {len(saves)} saves")
    print("| reading | after a third | median | end | most | growth per hour |")
    print("|---|---|---|---|---|---|")
    for name, row in found.items():
        print(f"| {name} | " + " | ".join(f"{value:.1f}" for value in row.values()) + " |")
    print(
        f"a save takes {1000 * float(np.median(saves)):.0f} ms (median; most "
        f"{1000 * max(saves):.0f}): {share:.3f} % of the time at one in {cadence:g} s"
    )
    if args.json:
        result = {"script": args.script, "steps": steps, "saves": saves, "readings": found}
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
