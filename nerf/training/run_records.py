"""The records of a run in its folder: what was run, written at the start and again if removed.

Also what a run folder must not hold: links and pipes where a run writes, which would carry what it
writes elsewhere.
"""

import fnmatch
import json
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from nerf.training import logged
from nerf.training.files import open_append, replace_file
from nerf.training.provenance import CODE, copy_unknown, describe_start

# What is written before the first update: of a start that was refused, nobody needs it.
RECORDS = ("args.json", "args.txt", "config.txt", "cmd.txt", "world.json", CODE)
# Names at which runs write. Checkpoints are not among them: a file that is renamed to a link's name
# takes its place.
WRITTEN = (
    *RECORDS, "log.txt", ".lock", "*.json", "*.csv", "*.png", "*.html", "*.glb", "*.safetensors",
    "*.pt", "*.tmp", "tb", "wandb*", "render_*", "previews", "attentions", "guidances",
)  # fmt: skip


def refuse_links(folder: Path) -> None:
    """ValueError if something that a run would write is a link, a pipe or a device.

    ``folder`` itself may be a link, such as to a larger disk; so may checkpoints, which are only
    ever replaced.
    """
    for entry in os.scandir(folder):
        if any(fnmatch.fnmatchcase(entry.name, pattern) for pattern in WRITTEN):
            for path, kind in _strange(entry):
                raise ValueError(
                    f"{path} is {kind}, and a run would write through it; move it away, or use "
                    "another --expname (the run folder itself may be a link)"
                )


def _strange(entry: os.DirEntry[str]) -> Iterator[tuple[str, str]]:
    """(path, what it is) of what is neither a file nor a folder: ``entry``, or inside it."""
    if entry.is_symlink():
        yield entry.path, "a symbolic link"
    elif entry.is_dir(follow_symlinks=False):
        with os.scandir(entry.path) as inside:
            for other in inside:
                yield from _strange(other)
    elif not entry.is_file(follow_symlinks=False):
        yield entry.path, "neither a file nor a folder"


class Records:
    """What ``write`` and ``write_json`` have put into a run folder, to put it there again."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files: dict[str, bytes] = {}
        self._start = ""  # this start's entry in cmd.txt
        self.flags: dict[str, Any] = {}  # of this start

    def write_json(self, name: str, content: Any) -> None:
        """Write a JSON file, replaced as a whole; numbers that are not finite become null."""
        text = json.dumps(logged.finite(content), indent=1, allow_nan=False)
        self._write(name, text.encode("utf-8"))

    def _write(self, name: str, content: bytes) -> None:
        if name in RECORDS:
            self._files[name] = content
        replace_file(self.folder / name, content)

    def write(
        self,
        flags: dict[str, Any],
        as_config: str,
        guard: Callable[[str], AbstractContextManager[None]],
    ) -> None:
        """Write args.json, args.txt, config.txt, this start's entry in cmd.txt, and code/.

        as_config: the flags as a config file. guard: of the copies in code/, which may fail.
        """
        self.flags = flags
        self.write_json("args.json", flags)
        self._write("args.txt", as_config.encode("utf-8"))
        if flags.get("config"):
            self._write("config.txt", Path(flags["config"]).read_bytes())
        copies: list[str] = []
        with guard(f"a copy of the program in {CODE}/"):
            copies = copy_unknown(self.folder)
        self._start = describe_start(copies)
        self._append_start()

    def _append_start(self) -> None:
        with open_append(self.folder / "cmd.txt") as file:
            file.write(self._start)

    def removed(self) -> list[str]:
        """The names of files that were written and are not there any more."""
        names = [*self._files, *(["cmd.txt"] if self._start else [])]
        return [name for name in names if not (self.folder / name).exists()]

    def write_again(self) -> None:
        """Write what was removed. OSError if that fails."""
        removed = self.removed()
        for name in removed:
            if name in self._files:
                replace_file(self.folder / name, self._files[name])
        if "cmd.txt" in removed:
            self._append_start()
            copy_unknown(self.folder)
