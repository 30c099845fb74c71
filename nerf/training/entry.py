"""How a training script runs its body and ends: one line and an exit code for every mistake."""

import os
import sys
from collections.abc import Callable

from nerf.training import distributed


def exit_code(program: str, body: Callable[[], int]) -> int:
    """body()'s exit code. A mistake in flags or data is one line on stderr and 2, a disk's 3."""
    try:
        return body()
    except ValueError as error:
        print(f"{program}: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"{program}: {error}", file=sys.stderr)
        return 3
    finally:
        distributed.cleanup()


def exit_process(code: int) -> None:
    """End this process with ``code``, once everything is closed and the process group is left.

    One of several processes skips the interpreter's own teardown: DDP and gloo leave threads
    behind that may still ask for Python's lock, and once it is gone they abort the process
    ("terminate called without an active exception", SIGABRT: on busy machines about once in a
    hundred exits), so that torchrun calls a finished run a failure.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
