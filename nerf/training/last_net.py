"""What nobody expected: the traceback goes into a file, and one line says where that is."""

import os
import sys
import tempfile
import traceback
from pathlib import Path

from nerf.training.plain_text import indented, one_line

UNEXPECTED = 1  # exit code


def written_to(error: BaseException, path: Path | None) -> None:
    """Remember that the traceback of ``error`` is in the file ``path``; None: in no file yet."""
    error.__dict__["traceback_file"] = path


def report(program: str, error: Exception) -> int:
    """Print one line about ``error``, with the file that has its traceback; the exit code.

    That is the log of the run in which it was raised, else a new file for temporary files.
    """
    place = error.__dict__.get("traceback_file") or _write(program, error)
    what = one_line(str(error).strip().split("\n")[0][:300])
    what = f"{type(error).__name__}{': ' * bool(what)}{what}"
    line = f"unexpected {what}; its traceback is in {one_line(place)}; please report it"
    print(f"{program}: {line}", file=sys.stderr)
    return UNEXPECTED


def _write(program: str, error: Exception) -> str:
    """The traceback in a new file; the name of the file, or why there is none."""
    try:
        number, name = tempfile.mkstemp(prefix=f"{program}.", suffix=".traceback.txt")
        with os.fdopen(number, "w", encoding="utf-8") as file:
            file.write(indented("".join(traceback.format_exception(error))))
    except OSError as failed:
        return f"no file ({failed.strerror})"
    return name
