"""Everything that a GPU must show, in one command of at most eight minutes.

    python benchmarks/gpu.py --lego path/to/lego --peer path/to/nerf-pytorch --out gpu.json
    python benchmarks/gpu.py --stages ceilings vanilla      # these alone; --skip leaves some out
    python benchmarks/gpu.py --quick                        # every stage, tiny, on a CPU

Stages: ceilings (matrix products and copies), vanilla (rays/s and a frame, beside nerf-pytorch's),
fast (Lego at 800x800 to known levels of PSNR), text3d (steps/s), guidance (a step with a model of
Stable Diffusion 1.5's sizes beside stable-dreamfusion's formula), profile (kernel time, launches
and waits of a step), tests (those marked gpu). Each runs in a process of its own with a time limit:
one that fails is noted in one line and the next goes on. The JSON file is written after each stage.
Exit code: 0 all done or skipped; 1 a stage failed or passed its limit; 2 a mistake in flags, or no
GPU. docs/gpu.md explains the figures.
"""

import argparse
import ctypes
import json
import multiprocessing
import os
import shlex
import shutil
import signal
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # so that nothing has to be installed but requirements.txt

from benchmarks import gpu_child  # noqa: E402

# Seconds that a stage may take; all of them together stay below --minutes.
LIMITS = {
    "ceilings": 30, "vanilla": 180, "fast": 210, "text3d": 75, "guidance": 90, "profile": 75,
    "tests": 90,
}  # fmt: skip
NEEDED = {"configargparse": "ConfigArgParse", "diffusers": "diffusers", "pytest": "pytest"}
OFFLINE = "without a network: pip install --no-index --find-links wheels -r requirements.txt"
QUICK = "--quick runs every stage on a CPU"
SHORTEST = 5.0  # seconds: with less time left a stage is not started


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The flags; a mistake ends the program with one line and exit code 2."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = list(LIMITS)
    parser.add_argument("--stages", nargs="+", choices=names, default=names, help="run these")
    parser.add_argument("--skip", nargs="+", choices=names, default=[], help="leave these out")
    parser.add_argument("--quick", action="store_true", help="tiny sizes on a CPU: a smoke test")
    parser.add_argument("--out", type=Path, default=ROOT / "logs" / "gpu.json", help="JSON file")
    parser.add_argument("--minutes", type=float, default=8.0, help="limit of all stages together")
    parser.add_argument(
        "--limit", nargs="+", default=[], metavar="STAGE=SECONDS", help="other limits of stages"
    )
    parser.add_argument("--lego", type=Path, help="Lego at 800x800, frames in PNG or WebP")
    parser.add_argument("--peer", type=Path, help="unchanged clone of nerf-pytorch")
    parser.add_argument(
        "--fast_seconds", type=float, default=100.0, help="training time of the stage fast"
    )
    parser.add_argument(
        "--fast_flags", type=shlex.split, default=[], help="more flags of run_nerf.py for it"
    )
    parser.add_argument(
        "--test_views", type=int, default=25, help="about how many it renders at its end; 0: all"
    )
    args = parser.parse_args(argv)
    args.limits = {name: 240 for name in LIMITS} if args.quick else dict(LIMITS)
    for word in args.limit:
        name, _, seconds = word.partition("=")
        if name not in LIMITS or not seconds.replace(".", "", 1).isdigit():
            parser.error(f"--limit {word}: expected STAGE=SECONDS, as in fast=300")
        args.limits[name] = float(seconds)
    try:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.touch()
    except OSError as error:
        parser.error(f"--out {args.out}: cannot be written ({error.strerror}); name another file")
    return args


class Stages:
    """Runs stages one after the other, each in a process group that ends with it.

    Processes are forks of a server that has imported torch and both scripts once, since that takes
    seconds. CUDA does not survive a fork: should an import have touched it, ``spawn`` helps.
    """

    def __init__(self, settings: dict[str, Any], work: Path, minutes: float) -> None:
        self.settings, self.work = settings, work
        self.end = time.monotonic() + 60 * minutes
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        os.environ["PYTHONPATH"] = os.pathsep.join(paths)  # the server's, and of what stages start
        os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # asks without starting CUDA
        os.environ["TRANSFORMERS_VERBOSITY"] = "error"  # no hints about packages it can do without
        if settings["quick"]:  # tiny tensors: a second thread costs more than it gains
            os.environ["OMP_NUM_THREADS"] = "1"
        self.context: Any = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["benchmarks.gpu_preload"])

    def machine(self) -> dict[str, Any]:
        """What ``run`` finds about the machine; without a usable GPU its status is "failed"."""
        if self.settings["device"] == "cuda" and not has_driver():
            return {"status": "failed", "why": f"no GPU: there is no driver; {QUICK}"}
        found = self.run("machine", 240)  # waits for the server's imports
        if found["status"] != "done" and self.settings["device"] == "cuda":
            self.context = multiprocessing.get_context("spawn")
            found = self.run("machine", 240)
        return found

    def run(self, name: str, limit: float) -> dict[str, Any]:
        """What a stage found: status, why (one line), seconds, rows, and the log if it failed."""
        left = self.end - time.monotonic()
        limit = min(limit, left)
        if left < SHORTEST:
            return {"status": "skipped", "why": "no time is left", "seconds": 0.0, "rows": []}
        result, log = self.work / f"{name}.json", self.work / f"{name}.log"
        settings = {**self.settings, "result": str(result), "log": str(log)}
        process = self.context.Process(target=gpu_child.run, args=(name, settings))
        started = time.monotonic()
        process.start()
        try:
            process.join(limit)
            ended = process.exitcode is not None
        finally:
            kill_group(process.pid)  # also what a stage that has ended may have left running
            process.join()
        found = json.loads(result.read_text()) if result.exists() else {"rows": []}
        found["seconds"] = time.monotonic() - started
        if not ended:
            found |= {"status": "time limit", "why": f"stopped after its {limit:.0f} s"}
        elif "status" not in found:
            found |= {"status": "failed", "why": f"ended with exit code {process.exitcode}"}
        if found["status"] in ("failed", "time limit") and log.exists():
            found["log"] = log.read_text(errors="replace").splitlines()[-40:]
        return found


def has_driver() -> bool:
    """Whether the driver of a GPU, NVIDIA's or AMD's, is installed."""
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return Path("/dev/kfd").exists()
    return True


def kill_group(group: int) -> None:
    """End every process of a group at once; one that has ended already is no mistake."""
    try:
        os.killpg(group, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        pass  # nobody is left


def cell(label: str, value: Any) -> str:
    """A figure as a person reads it: "12.3 ms/step (12.1 - 12.9)"."""

    def short(number: float) -> str:
        if abs(number) >= 1000:
            return f"{number:,.0f}"
        return f"{number:.3g}" if abs(number) < 100 else f"{number:.0f}"

    if isinstance(value, dict):
        low, middle, high = (short(value[key]) for key in ("low", "median", "high"))
        return f"{middle} {label}" + (f" ({low} - {high})" if low != high else "")
    if isinstance(value, int | float):
        text = f"{value:.2f}" if label.startswith("dB") else short(value)
        return f"{text} {label}"
    return f"{label}: {value}"


def table(stages: dict[str, dict[str, Any]]) -> str:
    """All stages as a Markdown table: a line for each row, and one for what did not run."""
    lines = ["| stage | what | result | peak MB |", "|---|---|---|---|"]
    for name, found in stages.items():
        for row in found["rows"]:
            figures = ", ".join(cell(label, value) for label, value in row["results"].items())
            memory = f"{row['memory_mb']:.0f}" if row.get("memory_mb") else ""
            lines.append(f"| {name} | {row['what']} | {figures} | {memory} |")
        for text in found.get("notes", []):
            lines.append(f"| {name} | note | {text} | |")
        if found["status"] != "done":
            lines.append(f"| {name} | **{found['status']}** | {found['why']} | |")
    return "\n".join(lines)


def write(path: Path, results: dict[str, Any]) -> None:
    """Replace the JSON file by a complete new one."""
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(json.dumps(results, indent=1) + "\n")
    os.replace(temporary, path)


def settings_of(args: argparse.Namespace, work: Path) -> dict[str, Any]:
    """What the stages need to know, as plain values."""
    return {
        "quick": args.quick,
        "device": "cpu" if args.quick else "cuda",
        "work": str(work),
        "lego": str(args.lego.resolve()) if args.lego else None,
        "peer": str(args.peer.resolve()) if args.peer else None,
        "fast_seconds": args.fast_seconds,
        "fast_flags": args.fast_flags,
        "test_views": args.test_views,
    }


def measure(args: argparse.Namespace, work: Path) -> int:
    """Run the chosen stages; the exit code."""
    missing = [package for module, package in NEEDED.items() if find_spec(module) is None]
    if missing:
        print(f"not installed: {', '.join(missing)}; {OFFLINE}", flush=True)
    runner = Stages(settings_of(args, work), work, args.minutes)
    machine = runner.machine()
    if machine["status"] != "done":
        print(f"gpu.py: {machine['why']}", file=sys.stderr)
        return 2
    command = shlex.join(["benchmarks/gpu.py", *args.argv])
    results = {"command": command, "machine": machine["rows"][0]["results"], "stages": {}}
    print(", ".join(str(value) for value in results["machine"].values()), flush=True)
    stages = results["stages"]
    for name in [name for name in LIMITS if name in args.stages and name not in args.skip]:
        print(f"{name} ...", flush=True)
        found = stages[name] = runner.run(name, args.limits[name])
        write(args.out, results)
        print(table({name: found}).split("\n", 2)[-1], flush=True)
        print(f"{name}: {found['status']} after {found['seconds']:.0f} s", flush=True)
    print(f"\n{table(stages)}\n\nfull numbers: {args.out}", flush=True)
    return int(any(found["status"] in ("failed", "time limit") for found in stages.values()))


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    args.argv = sys.argv[1:] if argv is None else argv
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that a running stage is ended too
    work = Path(tempfile.mkdtemp(prefix="gpu_benchmark_"))
    try:
        return measure(args, work)
    except KeyboardInterrupt:
        print(f"stopped; what was measured is in {args.out}", file=sys.stderr)
        return 130
    finally:
        shutil.rmtree(work, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
