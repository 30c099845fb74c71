"""Imported first by every program: a sentence, not a traceback, where an installation is missing.

Importing this file ends the program with exit code 2 on a Python that is too old, and from then on
a package that is not installed does so too, whenever it is first imported. Written for every
Python 3.8 or newer, with the standard library alone, as are the files that import it.
"""

import os
import sys
from pathlib import Path
from types import TracebackType
from typing import Optional, Type  # noqa: UP035

OLDEST = (3, 11)
OURS = ("nerf", "guidance")
REPOSITORY = Path(__file__).resolve().parents[2]


def missing(what: str, cure: str) -> str:
    """The sentence of a program that cannot start for the want of ``what``."""
    made = REPOSITORY / ".venv"  # by the Makefile
    if (made / "ready").exists() and Path(sys.prefix).resolve() != made:
        python = os.path.relpath(str(made / "bin" / "python"))
        cure = f"run it with {python}, for which make has installed everything"
    return f"{Path(sys.argv[0]).name}: {what}; {cure}"


def explain(
    kind: Type[BaseException],  # noqa: UP006
    error: BaseException,
    traceback: Optional[TracebackType],  # noqa: UP045
) -> None:
    """``sys.excepthook``: a package that is not installed is one line and exit code 2."""
    package = (getattr(error, "name", None) or "").partition(".")[0]
    if not isinstance(error, ModuleNotFoundError) or package in ("", *OURS):
        sys.__excepthook__(kind, error, traceback)
        return
    requirements = os.path.relpath(str(REPOSITORY / "requirements.txt"))
    cure = f"make demo installs all into .venv, or: python -m pip install -r {requirements}"
    print(missing(f"the package {package} is not installed", cure), file=sys.stderr)
    raise SystemExit(2)


if sys.version_info < OLDEST:  # noqa: UP036
    version = ".".join(map(str, sys.version_info[:2]))
    cure = "install one, and name it: make demo PYTHON=python3.11"
    print(missing(f"this is Python {version}, 3.11 or newer is needed", cure), file=sys.stderr)
    raise SystemExit(2)
sys.excepthook = explain

from nerf.training import interrupts  # noqa: E402  its syntax needs that Python

interrupts.begin()
