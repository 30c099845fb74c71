"""Where a run comes from: the command, library versions, git commit, local changes and files.

What git does not know is copied into the run folder: new .py and .txt files of the project, or all
of its .py files where there is no git.
"""

import filecmp
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from datetime import datetime
from importlib import metadata
from pathlib import Path

import torch

from nerf import __version__
from nerf.training.plain_text import one_line, shell_command

LIBRARIES = (
    "torch numpy ConfigArgParse imageio pillow scikit-image tensorboard "
    "diffusers transformers trimesh"
).split()
PROJECT = Path(__file__).resolve().parents[2]
PROGRAM = ("run_*.py", "nerf/**/*.py", "guidance/**/*.py")  # without git; all else is not run
COPIED = (".py", ".txt")
CODE = "code"  # folder of the copies, one inside it for each start with other files
MAX_FILE, MAX_TOTAL = 1 << 20, 8 << 20  # bytes of a copied file, and of all
NAMED = 3  # files left out that are named


def describe_start(copies: Sequence[str] = (), project: Path = PROJECT) -> str:
    """The entry of this process in cmd.txt, which ends with an empty line.

    copies: the lines of ``copy_unknown``.
    """
    libraries = ", ".join(_version(library) for library in LIBRARIES)
    lines = [
        f"# {datetime.now():%Y-%m-%d %H:%M:%S}, version {__version__}",
        shell_command([Path(sys.executable).name, *sys.argv]),
        f"# in {one_line(Path.cwd())}, on {gpu_names()}",
        f"# python {platform.python_version()}, {libraries}",
        f"# commit {_git(project, 'rev-parse', 'HEAD') or 'unknown'}",
    ]
    lines += copies
    difference = _git(project, "diff", "HEAD")
    if difference:
        lines.append("# local changes:\n" + difference[:MAX_FILE])
    if len(difference) > MAX_FILE:
        lines.append("# (cut off after 1 MB)")
    return "\n".join(lines) + "\n\n"


def gpu_names() -> str:
    """The GPUs that this process sees, such as "2 x NVIDIA H100 80GB HBM3"; or "no GPU"."""
    if not torch.cuda.is_available():
        return "Apple's GPU (mps)" if torch.backends.mps.is_available() else "no GPU"
    names = [torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count())]
    kinds = dict.fromkeys(names)
    counts = (f"{names.count(kind)} x " if names.count(kind) > 1 else "" for kind in kinds)
    return ", ".join(count + kind for count, kind in zip(counts, kinds, strict=True))


# ---------------------------------------------------------------------------------------- copies


def copy_unknown(folder: Path, project: Path = PROJECT) -> list[str]:
    """Copy what git does not know of ``project`` into the run's ``folder``; lines for cmd.txt.

    A start with the files of an earlier one names that one's copies.
    """
    has_git = bool(_git(project, "ls-files", "--", "nerf/__init__.py"))
    files, left_out = _bounded(project, _unknown_files(project, has_git))
    what = "files unknown to git" if has_git else "no git: the program's files"
    lines = []
    if files:
        place = _copied(project, files, folder / CODE)
        lines.append(f"# {what}: {len(files)}, in {place.relative_to(folder)}/")
    if left_out:
        more = f" and {len(left_out) - NAMED} more" if len(left_out) > NAMED else ""
        names = ", ".join(left_out[:NAMED])
        lines.append(f"# {what}, not copied (at most 1 MB a file, 8 MB in all): {names}{more}")
    return lines


def _unknown_files(project: Path, has_git: bool) -> list[str]:
    """Paths inside ``project``, .py first: new and not ignored; without git the whole program.

    Run folders are left out, which have .txt files and copies of their own.
    """
    if has_git:
        listed = _git(project, "ls-files", "--others", "--exclude-standard", "-z").split("\0")
    else:
        found = (path for pattern in PROGRAM for path in project.glob(pattern))
        listed = [path.relative_to(project).as_posix() for path in found]
    runs: dict[Path, bool] = {}

    def in_run(name: str) -> bool:
        above = [parent for parent in Path(name).parents if parent.parts]
        for parent in above:
            if parent not in runs:
                runs[parent] = (project / parent / "args.json").exists()
        return any(runs[parent] for parent in above)

    kept = [name for name in listed if name.endswith(COPIED) and not in_run(name)]
    return sorted(kept, key=lambda name: (not name.endswith(".py"), name))


def _bounded(project: Path, names: Iterable[str]) -> tuple[list[str], list[str]]:
    """(files to copy, files left out): at most MAX_FILE bytes each and MAX_TOTAL together."""
    kept: list[str] = []
    left_out: list[str] = []
    total = 0
    for name in names:
        path = project / name
        if path.is_symlink() or not path.is_file():
            continue
        size = path.stat().st_size
        fits = size <= MAX_FILE and total + size <= MAX_TOTAL and os.access(path, os.R_OK)
        (kept if fits else left_out).append(name)
        total += size if fits else 0
    return kept, left_out


def _copied(project: Path, names: list[str], code: Path) -> Path:
    """The folder inside ``code`` with copies of ``names``: the newest if it has the same files.

    OSError, with no copies left, if they cannot be written.
    """
    earlier = sorted(path for path in code.glob("*") if path.is_dir())
    if earlier and _same(project, names, earlier[-1]):
        return earlier[-1]
    number = int(earlier[-1].name) + 1 if earlier and earlier[-1].name.isdigit() else 1
    place = code / f"{number:03d}"
    try:
        for name in names:
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(project / name, place / name)
    except OSError:
        shutil.rmtree(place, ignore_errors=True)  # room for what matters more
        raise
    return place


def _same(project: Path, names: list[str], place: Path) -> bool:
    """Whether ``place`` holds the files ``names`` and no other, as they are now."""
    there = {
        os.path.relpath(os.path.join(folder, file), place)
        for folder, _, files in os.walk(place)
        for file in files
    }
    if there != set(names):
        return False
    _, different, unreadable = filecmp.cmpfiles(project, place, names, shallow=False)
    return not different and not unreadable


# ------------------------------------------------------------------------------------- questions


def _version(library: str) -> str:
    try:
        return f"{library} {metadata.version(library)}"
    except metadata.PackageNotFoundError:
        return f"{library} absent"


def _git(project: Path, *words: str) -> str:
    """What a git command prints; "" without git or outside of a repository."""
    try:
        result = subprocess.run(
            ["git", *words],
            cwd=project,
            capture_output=True,
            timeout=10,
            encoding="utf-8",
            errors="replace",
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return result.stdout.strip() if result.returncode == 0 else ""
