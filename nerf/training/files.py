"""Files that are replaced as a whole: a reader finds the old content or the new, never a part.

Neither function writes through a symbolic link at the file's name.
"""

import os
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
