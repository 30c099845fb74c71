"""Where a run comes from: the command, library versions, git commit and local changes."""

import platform
import shlex
import subprocess
import sys
from datetime import datetime
from importlib import metadata
from pathlib import Path

from nerf import __version__

LIBRARIES = (
    "torch numpy ConfigArgParse imageio pillow scikit-image tensorboard "
    "diffusers transformers trimesh"
).split()


def describe_start() -> str:
    """The entry of this process in cmd.txt, which ends with an empty line."""
    libraries = ", ".join(_version(library) for library in LIBRARIES)
    lines = [
        f"# {datetime.now():%Y-%m-%d %H:%M:%S}, version {__version__}",
        shlex.join([Path(sys.executable).name, *sys.argv]),
        f"# python {platform.python_version()}, {libraries}",
        f"# commit {_git('rev-parse', 'HEAD') or 'unknown'}",
    ]
    difference = _git("diff", "HEAD")
    if difference:
        lines.append("# local changes:\n" + difference)
    return "\n".join(lines) + "\n\n"


def _version(library: str) -> str:
    try:
        return f"{library} {metadata.version(library)}"
    except metadata.PackageNotFoundError:
        return f"{library} absent"


def _git(*words: str) -> str:
    """What a git command prints; "" without git or outside of a repository."""
    folder = Path(__file__).resolve().parent
    try:
        result = subprocess.run(
            ["git", *words], cwd=folder, capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return result.stdout.strip() if result.returncode == 0 else ""
