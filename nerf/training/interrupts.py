"""Ctrl-C at any moment of a program: one line and exit code 130, never a traceback.

``begin``, called by what a program imports first, begins it: while PyTorch is imported, and again
when all is done, nothing is to be saved, so the process ends at once. ``interruptible`` raises
KeyboardInterrupt instead, once, so that a run can clean up; a second Ctrl-C ends that too. Inside
``system.StopSignal`` a step is saved first. Standard library alone.
"""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

CODE = 128 + signal.SIGINT
REPOSITORY = Path(__file__).resolve().parents[2]
PROGRAMS = (  # all of them use ``interruptible`` where there is something to clean up
    "run_nerf.py", "run_dreamfusion.py", "data/make_demo.py", "data/download.py",
    "data/from_photos.py", "data/demo_surface.py", "nerf/report.py", "nerf/compare.py",
    "guidance/sample.py", "guidance/finetune.py", "guidance/tiny/train.py",
)  # fmt: skip


def end_at_once(number: int, frame: FrameType | None) -> None:
    """A handler of SIGINT: one line, and the process ends without any clean-up."""
    line = f"{Path(sys.argv[0]).name}: stopped by Ctrl-C\n"
    os.write(2, line.encode("utf-8", "backslashreplace"))  # print could be what was interrupted
    os._exit(CODE)


def raise_once(number: int, frame: FrameType | None) -> None:
    """A handler of SIGINT: KeyboardInterrupt, and from then on ``end_at_once``."""
    signal.signal(signal.SIGINT, end_at_once)
    raise KeyboardInterrupt


def _may_set() -> bool:
    """Not in a thread, and not where SIGINT is ignored (nohup) or somebody else's."""
    own = (signal.default_int_handler, end_at_once, raise_once)
    in_main_thread = threading.current_thread() is threading.main_thread()
    return in_main_thread and signal.getsignal(signal.SIGINT) in own


def begin() -> None:
    """From now on end at once, if the program is one of PROGRAMS."""
    program = getattr(sys.modules.get("__main__"), "__file__", None)
    programs = [REPOSITORY / name for name in PROGRAMS]
    if program and Path(program).resolve() in programs and _may_set():
        signal.signal(signal.SIGINT, end_at_once)


@contextmanager
def interruptible() -> Iterator[None]:
    """Inside the block the first Ctrl-C raises KeyboardInterrupt, the second ends the process."""
    before = signal.getsignal(signal.SIGINT)
    if not _may_set():
        yield
        return
    signal.signal(signal.SIGINT, raise_once)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
