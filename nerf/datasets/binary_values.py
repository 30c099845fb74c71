"""Read a binary file value by value, without keeping in memory what is skipped."""

import os
import struct
from typing import Any, BinaryIO


class BinaryValues:
    """A reader of consecutive little-endian values; struct.error at the end of the file."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.size = file, file.seek(0, os.SEEK_END)
        file.seek(0)

    def take(self, layout: str) -> tuple[Any, ...]:
        """The next values, in a ``struct`` layout."""
        return struct.unpack("<" + layout, self.take_bytes(struct.calcsize("<" + layout)))

    def take_bytes(self, count: int) -> bytes:
        """The next ``count`` bytes."""
        self._check(count)
        return self.file.read(count)

    def skip(self, count: int) -> None:
        """Go on behind the next ``count`` bytes, which are not read."""
        self._check(count)
        self.file.seek(count, os.SEEK_CUR)

    def take_rest(self) -> bytes:
        """All bytes that are left."""
        return self.file.read()

    def take_string(self) -> str:
        """The next zero-terminated string."""
        start, parts, end = self.file.tell(), [], -1
        while end < 0:
            parts.append(self.file.read(256))
            if not parts[-1]:
                raise ValueError("a name without an end")
            end = parts[-1].find(b"\0")
        name = b"".join([*parts[:-1], parts[-1][:end]])
        self.file.seek(start + len(name) + 1)
        return name.decode("utf-8")

    def _check(self, count: int) -> None:
        end = self.file.tell() + count
        if end > self.size:
            raise struct.error(f"{end} bytes needed, the file has {self.size}")
