"""Files that are replaced as a whole: a reader finds the old content or the new, never a part."""

import os
from pathlib import Path


def replace_file(path: Path, content: bytes) -> None:
    """Replace ``path`` by ``content``: write a file beside it, flush it, and rename it.

    Creates the folder. If that fails, OSError, and ``path`` is as it was before.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
