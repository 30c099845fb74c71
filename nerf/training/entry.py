"""How a training script ends."""

import os
import sys


def exit_process(code: int) -> None:
    """End this process with ``code``, everything being closed and ``cleanup`` done.

    One of several processes goes without the interpreter's own end: DDP and gloo leave threads
    behind that may still ask for Python's lock, and where it is gone they abort the process
    ("terminate called without an active exception", SIGABRT: on busy machines about once in a
    hundred ends), so that torchrun calls a finished run a failure.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
