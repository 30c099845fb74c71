"""Exit of a training script: every mistake gives one line and an exit code, not a traceback."""

import os
import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType

from nerf.training import distributed, interrupts, last_net, launch
from nerf.training.plain_text import one_line

NOTHING_LEARNED = 4  # exit code of a run that ended, but whose start was dead, or guidance NaN
LOST_A_PROCESS = 1  # exit code of a process that another process of the run has left alone


def report_mistakes(program: str, body: Callable[[], int]) -> int:
    """The exit code of ``body``; on an error print one line to stderr.

    ValueError, a mistake in flags or data, gives 2; OSError, such as a full disk, gives 3; the
    end of another process of the run 1.
    """
    try:
        return body()
    except ValueError as error:
        print(f"{program}: {one_line(error)}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"{program}: {one_line(error)}", file=sys.stderr)
        return 3
    except RuntimeError as error:
        if not (reason := distributed.lost_process(error)):
            return last_net.report(program, error)
        print(
            f"{program}: another process of this run has ended or cannot be reached ({reason}); "
            "see its messages; the same command goes on from the newest checkpoint",
            file=sys.stderr,
        )
        return LOST_A_PROCESS
    except ModuleNotFoundError:  # the hook of nerf.training.installed says how to install it
        raise
    except Exception as error:  # nobody's mistake but the program's
        return last_net.report(program, error)


class Stopped(BaseException):
    """A SIGTERM outside of training, where no step has to be saved (``system.StopSignal``)."""


def _stop(number: int, frame: FrameType | None) -> None:
    raise Stopped


def exit_code(program: str, body: Callable[[], int]) -> int:
    """``report_mistakes``, and then leave the process group.

    SIGINT and SIGTERM while data are read, or in a mode that only reads a run, give one line and
    the exit code 130 or 143; a run folder that holds nothing yet is removed again.
    """
    in_main_thread = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, _stop) if in_main_thread else None
    try:
        with interrupts.interruptible():
            return report_mistakes(program, body)
    except KeyboardInterrupt:
        print(f"{program}: stopped by Ctrl-C", file=sys.stderr)
        return 128 + signal.SIGINT
    except Stopped:
        print(f"{program}: stopped by SIGTERM", file=sys.stderr)
        return 128 + signal.SIGTERM
    finally:
        if in_main_thread:
            signal.signal(signal.SIGTERM, before if before is not None else signal.SIG_DFL)
        distributed.cleanup()


def exit_process(code: int) -> None:
    """End this process with ``code``; call it after all files and the process group are closed.

    One of several processes skips the interpreter's teardown. gloo leaves threads behind
    that may still want Python's lock, and once the interpreter is gone they abort the process
    ("terminate called without an active exception", SIGABRT: on busy machines about once in a
    hundred exits), so that torchrun takes a finished run for a failed one. A process that a signal
    stopped skips it too: a second Ctrl-C would meet it half torn down.
    """
    try:
        several = launch.find_place().size > 1
    except ValueError:  # what was said before
        several = False
    if several or code > 128:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
