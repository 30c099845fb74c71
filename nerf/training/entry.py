"""Exit of a training script: every mistake gives one line and an exit code, not a traceback."""

import os
import sys
from collections.abc import Callable

from nerf.training import distributed

NOTHING_LEARNED = 4  # exit code of a run that ended, but whose start was dead, or guidance NaN


def report_mistakes(program: str, body: Callable[[], int]) -> int:
    """The exit code of ``body``; on an error print one line to stderr.

    ValueError, a mistake in flags or data, gives 2; OSError, such as a full disk, gives 3.
    """
    try:
        return body()
    except ValueError as error:
        print(f"{program}: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"{program}: {error}", file=sys.stderr)
        return 3


def exit_code(program: str, body: Callable[[], int]) -> int:
    """``report_mistakes``, and then leave the process group."""
    try:
        return report_mistakes(program, body)
    finally:
        distributed.cleanup()


def exit_process(code: int) -> None:
    """End this process with ``code``; call it after all files and the process group are closed.

    One of several processes skips the interpreter's teardown. DDP and gloo leave threads behind
    that may still want Python's lock, and once the interpreter is gone they abort the process
    ("terminate called without an active exception", SIGABRT: on busy machines about once in a
    hundred exits), so that torchrun takes a finished run for a failed one.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
