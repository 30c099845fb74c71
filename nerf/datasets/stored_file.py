"""An open store of pictures: a .npy, uint8 [V, H, W, C], with a checksum of sampled rows behind it.

A mapped file that becomes shorter kills the process that touches what is gone (SIGBUS). So training
reads through ``read``, which then is an error of one line, and other places ask ``check`` before
they touch the mapping.
"""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np

from nerf.training.distributed import World

SAMPLED_ROWS = 1024  # rows of pixels whose checksum is compared whenever a store is opened
FOOTER = len(hashlib.sha256().hexdigest())  # bytes


class StoredFile:
    """A store that stays open. ValueError if the file is no store or not whole.

    before_lost: called once before the error that the file has become unreadable; it says whether
    it has saved the training.
    """

    before_lost: Callable[[], bool] | None = None

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = open(path, "rb")
        try:
            version = np.lib.format.read_magic(self._file)
            if version != (1, 0):
                raise ValueError(f"version {version} of .npy; expected (1, 0)")
            shape, fortran, dtype = np.lib.format.read_array_header_1_0(self._file)
        except (ValueError, SyntaxError, RecursionError, MemoryError) as error:
            raise ValueError(f"is no .npy file ({error})") from None
        sides = len(shape) == 4 and all(0 < side < 1 << 40 for side in shape)
        if dtype != np.uint8 or fortran or not sides:
            raise ValueError(f"holds {dtype} {shape}; expected uint8 [V, H, W, C]")
        self.shape: tuple[int, ...] = shape
        self.offset = self._file.tell()
        self.end = self.offset + int(np.prod(shape, dtype=object))
        size = os.fstat(self._file.fileno()).st_size
        if size < self.end:
            raise ValueError(f"has {size} bytes; expected {self.end}")

    def sample(self) -> str:
        """SHA-256, in hexadecimal, of the shape and of SAMPLED_ROWS rows from all over the file."""
        views, height, width, channels = self.shape
        rows = np.unique(np.linspace(0, views * height - 1, SAMPLED_ROWS).astype(int))
        digest, row = hashlib.sha256(repr(self.shape).encode()), np.empty(width * channels, "u1")
        for number in rows.tolist():
            self.read(row, number * width * channels)
            digest.update(row.tobytes())
        return digest.hexdigest()

    def why_other(self, count: int, first: np.ndarray) -> str | None:
        """Why this is no store of ``count`` pictures, ``first`` the first of them; None: it is."""
        channels = self.shape[-1]
        if self.shape[:3] != (count, *first.shape[:2]) or channels not in (first.shape[-1], 4):
            expected = (count, *first.shape)
            return f"holds pictures {list(self.shape)}; expected {list(expected)}"
        opaque = np.full_like(first[..., :1], 255)
        own = first if channels == first.shape[-1] else np.concatenate([first, opaque], axis=-1)
        stored = np.empty(own.size, "u1")
        self.read(stored, 0)
        if not np.array_equal(stored, own.ravel()):
            return "its first picture is another"
        noted = os.pread(self._file.fileno(), FOOTER, self.end).decode("ascii", "replace")
        return None if noted == self.sample() else "the checksum of its rows is wrong"

    def map(self) -> np.memmap:
        """The pictures as a read-only mapping that knows this file (``stored_file``)."""
        try:
            pictures = np.memmap(self._file, np.uint8, "r", self.offset, self.shape)
        except (OSError, MemoryError, OverflowError) as error:
            raise ValueError(
                f"{self.path}: its {self.end / 2**30:.1f} GiB cannot be mapped ({error}); allow "
                "more address space (ulimit -v), or make the pictures smaller (--factor, "
                "--downscale)"
            ) from None
        pictures.stored_file = self  # type: ignore[attr-defined]
        return pictures

    def check(self) -> None:
        """ValueError if the file has become shorter. 1 us; call it before the mapping is read."""
        if (size := self._size()) < self.end:
            self._lost(f"has become shorter, {size} of {self.end} bytes")

    def check_on_all_ranks(self, world: World) -> None:
        """``check``, at the start of a step: ValueError on every rank if it fails on any.

        A rank that left alone would take the others with it before the first one could save.
        """
        if world.all_reduce_max(float(self._size() < self.end))[0]:
            self.check()
            self._lost("has become shorter for another process")

    def _size(self) -> int:
        return os.fstat(self._file.fileno()).st_size

    def read(self, out: np.ndarray, start: int) -> None:
        """Fill ``out``, uint8 [N], with what follows byte ``start`` of the pixels."""
        done, view = 0, out.data
        while done < len(view):
            try:
                got = os.preadv(self._file.fileno(), [view[done:]], self.offset + start + done)
            except OSError as error:
                self._lost(f"cannot be read ({error.strerror})")
            if not got:
                self.check()
                self._lost(f"ends at byte {self.offset + start + done}")
            done += got

    def read_pixels(self, numbers: np.ndarray) -> np.ndarray:
        """The pixels, uint8 [N, C], of flat numbers [N] that come in long consecutive pieces."""
        channels = self.shape[-1]
        pixels = np.empty((len(numbers), channels), np.uint8)
        flat = pixels.reshape(-1)
        edges = [0, *(np.flatnonzero(np.diff(numbers) != 1) + 1).tolist(), len(numbers)]
        for low, high in zip(edges, edges[1:], strict=False):
            self.read(flat[low * channels : high * channels], int(numbers[low]) * channels)
        return pixels

    def _lost(self, what: str) -> None:
        hook, self.before_lost = self.before_lost, None
        saved = "training is saved; " if hook is not None and hook() else ""
        raise ValueError(
            f"{self.path}: {what} while it was in use; {saved}run the same command again, which "
            "writes the file anew"
        )


def file_of(pictures: np.ndarray) -> StoredFile | None:
    """The open store that pictures are mapped from; None: they are in memory."""
    return getattr(pictures, "stored_file", None)
