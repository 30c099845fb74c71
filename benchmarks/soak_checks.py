"""What must hold after each kill of ``soak.py``: progress, whole files, no process left behind."""

import csv
import ctypes
import os
import re
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from benchmarks import soak_compare
from nerf.training import checkpoint, checkpoint_choice

# Below a run's folder: files and folders that are complete, or are not there.
WHOLE = {
    "demo": ("demo",),
    "download": ("root/example.zip", "root/nerf_synthetic/lego"),
    "finetune": ("own_run/*/*.png",),
    "llff": ("data/images_2",),
    "photos": ("scene",),
    "tiny": ("model",),
}
PATIENCE = 10.0  # seconds in which the children of a killed program must have ended


def logged_step(run: Path) -> int:
    """The last step in metrics.csv, without a line that the kill cut short; 0 without a file."""
    try:
        rows = list(csv.DictReader((run / "metrics.csv").read_text().splitlines(keepends=True)))
    except OSError:
        return 0
    steps = [int(row["step"]) for row in rows if row["step"].isdigit() and None not in row.values()]
    return max(steps, default=0)


def progress_lost(run: Path, cadence: int) -> tuple[int, str]:
    """The step of a run's newest valid checkpoint, and a sentence about what was lost, or ""."""
    reached, complaints = logged_step(run), []
    found = checkpoint_choice.newest_checkpoint(run, complaints.append) if run.is_dir() else None
    step = checkpoint.finished_updates(found[1]) if found else 0
    if complaints:
        return step, f"a broken checkpoint: {'; '.join(complaints)}"
    # The last logged step may still be saving.
    if reached - step > cadence:
        return step, f"step {reached} was logged, the newest checkpoint is {step}"
    return step, ""


def fine_tuning_lost(home: Path, cadence: int) -> str:
    """What ``guidance.finetune`` lost or broke, or ""."""
    said = re.findall(r"^step (\d+)/", home.with_suffix(".out").read_text(), re.MULTILINE)
    reached, step = int(said[-1]) if said else 0, 0
    state, out = home / "own_run" / "state.pt", home / "own.safetensors"
    try:
        if state.exists():
            step = torch.load(state, weights_only=True)["step"]
        lora: dict[str, Any] = soak_compare.tensors(out) if out.exists() else {}
    except Exception as error:
        return f"a broken file: {error}"
    if reached - step > cadence:
        return f"step {reached} was logged, the saved state is {step}"
    return "" if lora or not step else f"the state is that of step {step}, {out.name} is missing"


def half_written(script: str, unbroken: Path, home: Path) -> list[str]:
    """One line for each file or folder of WHOLE that is there and is not what it should be."""
    found = []
    for pattern in WHOLE.get(script, ()):
        for expected in sorted(unbroken.glob(pattern)):
            name = expected.relative_to(unbroken)
            if (home / name).exists():
                lines = soak_compare.differences(expected, home / name)
                found += [f"after a kill {name}/{line}" for line in lines]
    return found


# ------------------------------------------------------------------------------- other processes


def adopt_orphans() -> None:
    """Make processes whose parent is killed children of this one (on Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(36, 1)  # PR_SET_CHILD_SUBREAPER


def children(pid: int) -> set[int]:
    """The processes that ``pid`` has started, or adopted, and that still run."""
    lists = Path(f"/proc/{pid}/task").glob("*/children")
    return {int(word) for path in lists for word in path.read_text().split()}


def left_running(others: set[int]) -> str:
    """Which processes a program left behind, after PATIENCE seconds; "" if all have ended.

    others: children of this process that have nothing to do with it.
    """
    deadline = time.monotonic() + PATIENCE
    while left := children(os.getpid()) - others:
        for pid in left:
            with suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)  # it may have ended
        if time.monotonic() > deadline:
            break
        time.sleep(0.02)
    commands = [Path(f"/proc/{pid}/cmdline") for pid in left]
    if not commands:
        return ""
    texts = [path.read_bytes().replace(b"\0", b" ").decode()[:200] for path in commands]
    return f"{len(texts)} processes still run: {'; '.join(texts)}"
