"""The process of one stage of ``gpu.py``: its report, its log and its one line on failure.

This file imports neither torch nor the project, so that the command itself starts at once.
"""

import importlib
import json
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
# name of a stage: the module of the function with that name, imported where it runs
STAGES = {
    "machine": "benchmarks.gpu_machine",
    "ceilings": "benchmarks.gpu_machine",
    "tests": "benchmarks.gpu_machine",
    "vanilla": "benchmarks.gpu_scene",
    "fast": "benchmarks.gpu_scene",
    "text3d": "benchmarks.gpu_text",
    "guidance": "benchmarks.gpu_text",
    "profile": "benchmarks.gpu_profile",
}


class Skip(Exception):
    """The stage cannot run as it was called; no failure."""


class Report:
    """Rows and notes of a stage, in a file that is complete after every row.

    A stage that is ended by its time limit so keeps what it has measured.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.content: dict[str, Any] = {"rows": [], "notes": []}

    def add(self, what: str, results: dict[str, Any], memory_mb: float | None = None) -> None:
        """A row of the table. results: label -> number, text, or dict of median, low and high."""
        row = {"what": what, "results": results, "memory_mb": memory_mb}
        rows = self.content["rows"]
        known = next((n for n, other in enumerate(rows) if other["what"] == what), len(rows))
        rows[known : known + 1] = [row]  # a row measured again, with more blocks, replaces itself
        self.write()

    def note(self, text: str) -> None:
        """A line below the rows."""
        self.content["notes"].append(text)
        self.write()

    def end(self, status: str, why: str = "") -> None:
        """How the stage ended, with a reason in one line."""
        self.content |= {"status": status, "why": why}
        self.write()

    def write(self) -> None:
        """Replace the file."""
        temporary = self.path.with_suffix(".part")
        temporary.write_text(json.dumps(self.content))
        os.replace(temporary, self.path)


def run(name: str, settings: dict[str, Any]) -> None:
    """Run a stage in this process; report to settings["result"], print to settings["log"]."""
    os.setsid()  # a group of its own: all that it starts can be ended with it
    file = os.open(settings["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for number in (1, 2):
        os.dup2(file, number)
    os.chdir(ROOT)
    sys.argv = ["gpu.py"]
    report = Report(Path(settings["result"]))
    try:
        stage: Callable[..., None] = getattr(importlib.import_module(STAGES[name]), name)
        stage(settings, report)
    except Skip as reason:
        report.end("skipped", str(reason))
    except Exception as error:
        traceback.print_exc()
        report.end("failed", one_line(error))
    else:
        report.end("done")


def one_line(error: Exception) -> str:
    """An error in one line."""
    if isinstance(error, ModuleNotFoundError) and error.name:
        return f"the package {error.name} is not installed"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else "no message"
    if isinstance(error, RuntimeError | SystemExit):
        return text
    return f"{type(error).__name__}: {text}"
