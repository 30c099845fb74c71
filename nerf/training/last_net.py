"""What nobody expected: the traceback goes into a file, and one line says where that is."""

import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path

from nerf.training import interrupts
from nerf.training.plain_text import indented, one_line

MISTAKE, UNEXPECTED = 2, 1  # exit codes


def exit_code(
    program: str,
    body: Callable[[], int | None],
    *,
    mistakes: tuple[type[Exception], ...] = (ValueError, OSError),
    after_stop: str = "",
) -> int:
    """The exit code of a program that is no training run; ``entry.exit_code`` is that of one.

    What ``body`` returns, or 0; 2 after an error of ``mistakes`` and its one line; 130 after
    Ctrl-C, where ``after_stop`` says how to go on; 1 after an error that nobody expected.
    """
    try:
        with interrupts.interruptible():
            return body() or 0
    except mistakes as error:
        print(f"{program}: {one_line(error)}", file=sys.stderr)
        return MISTAKE
    except KeyboardInterrupt:
        print(f"{program}: stopped by Ctrl-C{after_stop}", file=sys.stderr)
        return interrupts.CODE
    except ModuleNotFoundError:  # the hook of nerf.training.installed says how to install it
        raise
    except Exception as error:
        return report(program, error)


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
