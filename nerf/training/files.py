"""Files that are replaced as a whole: a reader finds the old content or the new, never a part.

No function here writes through a symbolic link at the file's name.
"""

import errno
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO


def replace_file(path: Path, content: bytes) -> None:
    """Replace ``path`` by ``content``: write a file beside it, flush it, and rename it.

    Creates the folder. If that fails, OSError, and ``path`` is as it was before.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary.unlink(missing_ok=True)  # what a kill left, or a link
    try:
        with open(temporary, "xb") as file:
            file.write(content)
            file.flush()
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def open_append(path: Path) -> TextIO:
    """Open a text file to append to it. OSError if that fails, or if ``path`` is a link."""

    def opener(name: str, flags: int) -> int:
        return os.open(name, flags | getattr(os, "O_NOFOLLOW", 0), 0o666)

    return open(path, "a", encoding="utf-8", opener=opener)


def why_not_written(error: BaseException, folder: Path) -> str:
    """Why a file in ``folder`` could not be written, in words: a full disk, or the system's reason.

    torch raises errors of its own while one of the system is handled: that one is the reason.
    """
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__cause__ or cause.__context__
    if cause is None:
        return (str(error) or repr(error)).splitlines()[0]
    if cause.errno == errno.EDQUOT:
        return f"the quota of this user on the disk of {folder} is used up"
    if cause.errno != errno.ENOSPC:
        return cause.strerror or str(cause) or repr(cause)
    try:
        free = shutil.disk_usage(next(p for p in (folder, *folder.parents) if p.exists())).free
    except OSError:
        return f"the disk of {folder} is full"
    if free > 1 << 30:
        return f"the disk of {folder} takes no more files, with {free >> 20} MB free: see df -i"
    return f"the disk of {folder} is full, {free >> 10} KB free"


@contextmanager
def writing_to(folder: Path) -> Iterator[None]:
    """Inside the block an OSError names ``folder``, the reason and the cure."""
    try:
        yield
    except OSError as error:
        reason = why_not_written(error, folder)
        cure = "make room, or choose another --basedir"
        raise OSError(f"{folder}: cannot be written to ({reason}); {cure}") from error


def describe_lost(failed: dict[str, str], *, has_checkpoint: bool) -> str:
    """One line about what a run could not write, and how to make up for it.

    failed: kind of file -> reason, of ``why_not_written``, which is often the same for several.
    """
    kinds: dict[str, list[str]] = {}
    for kind, reason in failed.items():
        kinds.setdefault(reason, []).append(kind)
    lost = "; ".join(f"{', '.join(names)} ({reason})" for reason, names in kinds.items())
    again = "goes on from the newest checkpoint" if has_checkpoint else "starts again"
    cure = f"; make room, then the same command {again}" if "the disk of" in lost else ""
    return f"not everything is on the disk: {lost}{cure}"


@contextmanager
def folders_above(target: Path) -> Iterator[None]:
    """Make the folders above ``target``; after the block those are removed that stayed empty."""
    made = [folder for folder in target.parents if not folder.exists()]
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield
    finally:
        for folder in made:  # the innermost first
            with suppress(OSError):  # it is not empty
                folder.rmdir()


@contextmanager
def unfinished_folder(target: Path) -> Iterator[Path]:
    """A new hidden folder beside ``target``, to be filled and renamed; removed after the block.

    A killed process leaves its folder behind. The next call for this ``target`` removes it: a
    folder in use is locked, and the system releases the locks of a process that ends. OSError if
    it cannot be made.
    """
    with _locked(target.parent):  # no other process may look before the new folder is locked
        for old in target.parent.glob(f".{_literal(target.name)}.*.unfinished"):
            if lock := _try_lock(old):
                shutil.rmtree(old, ignore_errors=True)
                os.close(lock)
        name = tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".unfinished", dir=target.parent)
        lock = _try_lock(Path(name))
    try:
        yield Path(name)
    finally:  # also when interrupted
        shutil.rmtree(name, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def _literal(name: str) -> str:
    """A glob pattern that only ``name`` matches."""
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in name)


def _try_lock(folder: Path) -> int | None:
    """Lock a folder until the number returned is closed; None if another process has it."""
    number = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(number)
        return None
    return number


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Inside the block no other process is; not on file systems without locks of folders."""
    number = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(number, fcntl.LOCK_EX)
        yield
    finally:
        os.close(number)
