"""Pictures of a scene in one memory-mapped file, for sets larger than memory.

The file is a plain .npy, uint8 [V, H, W, C]. Its name holds a digest of what it was made from
(names, sizes and times of the picture files, and how they were reduced), so a store of other
pictures is never used. It is written under a temporary name, flushed and renamed, so a half-written
store is never used either. When it is opened, its shape and channels, the whole first picture, and
a checksum of rows from all over the file (``stored_file``) are compared. Rays are drawn from it
block by block (``BlockOrder``), because reading single pixels from all over the file would read a
page of 4096 bytes for each.
"""

import fcntl
import hashlib
import json
import math
import os
import resource
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from nerf.datasets.stored_file import StoredFile
from nerf.training.rng import step_generator

BLOCK = 1024  # consecutive pixels that are read together: 3 to 4 KiB, about a page
SHARDS = 8  # consecutive parts of the file; every batch draws equally from each
WINDOW = 128  # blocks of a shard that are shuffled together: 3 to 4 MiB over all shards


class Store:
    """The folder of mapped picture files, and the rule for using one.

    kind: "mmap": always; "auto": if the pictures would take more than half of the free memory.
    """

    def __init__(self, folder: Path, kind: str, warn: Callable[[str], object] = print):
        self.folder, self.kind, self.warn = folder, kind, warn

    def wanted(self, num_bytes: int) -> bool:
        """Whether pictures of ``num_bytes`` in total belong in a mapped file."""
        return self.kind == "mmap" or num_bytes > free_memory() / 2

    def keep(self, paths: list[Path], read: Callable[[int], np.ndarray], how: dict) -> np.ndarray:
        """The pictures ``read(0)``, ``read(1)``, ... as a mapped uint8 [V, H, W, C].

        The file is written unless it exists. paths: the picture files. how: the settings besides
        the files that decide what is read. C is 4 if any picture has alpha. ValueError if the file
        cannot be written, or the pictures differ in size.
        """
        path = self.folder / f".pictures_{_digest(paths, how)}.npy"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = open(self.folder / ".pictures.lock", "a")
        except OSError as error:
            raise ValueError(_cannot(self.folder, error)) from None
        with lock:  # one process writes the file, the others wait here
            fcntl.flock(lock, fcntl.LOCK_EX)
            if path.exists():
                try:
                    stored = StoredFile(path)
                    why = stored.why_other(len(paths), read(0))
                except (OSError, ValueError) as error:
                    why = str(error)
                if why is None:
                    return stored.map()
                self.warn(f"{path}: {why}; writing it again")
            for old in self.folder.glob(".pictures_*.npy*"):
                self.warn(f"{old}: holds other pictures or is unfinished; removed")
                old.unlink()
            self.warn(f"writing {len(paths)} pictures to {path}")
            _write(path, len(paths), read)
            return StoredFile(path).map()


def free_memory() -> int:
    """Bytes this process may still allocate: of the system, its control group, ``ulimit -v``."""
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.exists() and (text := limit.read_text().strip()).isdigit():
        free = min(free, int(text))
    space, status = resource.getrlimit(resource.RLIMIT_AS)[0], Path("/proc/self/statm")
    if space != resource.RLIM_INFINITY and status.exists():
        used = int(status.read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        free = min(free, max(0, space - used))
    return free


def _digest(paths: list[Path], how: dict) -> str:
    """16 hexadecimal digits of SHA-256 over the files' names, sizes and times, and ``how``."""
    rows = []
    for path in paths:
        try:
            stat = path.stat()
        except OSError:
            raise ValueError(f"{path}: no such picture; is the data folder complete?") from None
        rows.append([str(path), stat.st_size, stat.st_mtime_ns])
    return hashlib.sha256(json.dumps([rows, how], sort_keys=True).encode()).hexdigest()[:16]


def as_tensor(pictures: np.ndarray) -> Tensor:
    """A tensor on the same memory or mapped file; do not write to it."""
    with warnings.catch_warnings():
        # A private, writable mapping would also avoid the warning, but count as memory in use.
        warnings.filterwarnings("ignore", message=".*not writable.*")
        return torch.from_numpy(pictures)


def _cannot(path: Path, error: OSError) -> str:
    return (
        f"{path}: cannot write the mapped picture file ({error.strerror}); free some space, "
        "choose another folder (--store_dir), or use --data_store memory"
    )


def _write(path: Path, count: int, read: Callable[[int], np.ndarray]) -> None:
    """Write the pictures ``read(0)`` to ``read(count - 1)`` as one .npy file.

    It uses write(), not a mapping: on a full disk write() raises, a mapping kills the process.
    """
    channels = read(0).shape[-1]
    shape: tuple[int, ...] = ()
    temporary = path.with_name(path.name + ".part")
    try:
        with open(temporary, "wb") as file:
            number = 0
            while number < count:
                picture = read(number)
                if picture.shape[-1] > channels:  # the first with alpha: restart with 4 channels
                    channels, number = 4, 0
                    file.seek(0)
                    file.truncate()
                    continue
                if picture.shape[-1] < channels:
                    opaque = np.full_like(picture[..., :1], 255)
                    picture = np.concatenate([picture, opaque], axis=-1)
                if number == 0:
                    shape = (count, *picture.shape)
                    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
                    np.lib.format.write_array_header_1_0(file, header)
                if picture.shape != shape[1:]:
                    raise ValueError(
                        f"picture {number} is {picture.shape[1]}x{picture.shape[0]}, the first "
                        f"{shape[2]}x{shape[1]}; a mapped picture file needs one size, use "
                        "--data_store memory"
                    )
                file.write(np.ascontiguousarray(picture).data)
                number += 1
            file.flush()
            file.write(StoredFile(temporary).sample().encode())
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise ValueError(_cannot(path, error)) from None
    finally:
        temporary.unlink(missing_ok=True)


class BlockOrder:
    """The order in which training pixels are drawn: each once per epoch, keyed by (seed, epoch).

    The pixels are cut into ``SHARDS`` consecutive shards (fewer if their number is not divisible),
    and a batch holds the rows of the first shard, then of the second, and so on: a process that
    draws part of the rows reads only that part of the views. Within a shard, blocks of neighboring
    pixels are shuffled; then ``WINDOW`` blocks at a time are read and their pixels shuffled. The
    number of pixels drawn so far is the whole state, so resuming needs nothing else.

    images: uint8 [V, H, W, C]. views: view numbers to draw from. device: of the returned tensors.
    file: the store that images are mapped from; pixels are then read from it, not from the mapping.
    """

    def __init__(
        self,
        images: Tensor,
        views: list[int],
        seed: int,
        device: torch.device | str,
        file: StoredFile | None = None,
    ) -> None:
        self.file = file
        self.pixels = images.reshape(-1, images.shape[-1])  # shares memory: nothing is read
        self.per_view = images.shape[1] * images.shape[2]
        self.views, self.seed, self.device = torch.tensor(views), seed, device
        self.shards = math.gcd(len(views) * self.per_view, SHARDS)
        self.per_shard = len(views) * self.per_view // self.shards
        self._epochs: dict[int, tuple[int, Tensor, Tensor]] = {}
        self._windows: dict[int, tuple[tuple[int, int], Tensor, Tensor]] = {}

    def draw(self, position: int, count: int, rows: slice | None = None) -> tuple[Tensor, Tensor]:
        """Flat pixel numbers [B] and colors uint8 [B, C] of ``count`` rows from ``position`` on.

        rows: which of the ``count`` rows to return, by default all.
        """
        rows = rows or slice(0, count)
        parts: list[tuple[Tensor, Tensor]] = []
        row = 0
        for shard in range(self.shards):
            # Row n, counted over the whole run, belongs to shard n % shards.
            first, end = (-((shard - n) // self.shards) for n in (position, position + count))
            low, high = max(rows.start, row), min(rows.stop, row + end - first)
            parts += self._draw(shard, first + low - row, high - low)
            row += end - first
        numbers, colors = (torch.cat(column) for column in zip(*parts, strict=True))
        return numbers, colors

    def _draw(self, shard: int, position: int, count: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Numbers and colors, in pieces, of ``count`` pixels of a shard from ``position`` on."""
        while count > 0:
            epoch, offset = divmod(position, self.per_shard)
            blocks, ends = self._blocks(shard, epoch)
            window = int(torch.searchsorted(ends, offset, right=True))
            first = int(ends[window - 1]) if window else 0
            numbers, colors = self._read(shard, epoch, window, blocks)
            part = slice(offset - first, min(offset - first + count, len(numbers)))
            yield numbers[part], colors[part]
            position, count = position + part.stop - part.start, count - part.stop + part.start

    def _generator(self, shard: int, epoch: int, number: int = 0) -> torch.Generator:
        # Negative, because training steps use 0 and above.
        key = -1 - epoch * self.shards - shard
        return step_generator(self.seed + number, key, "cpu")

    def _blocks(self, shard: int, epoch: int) -> tuple[Tensor, Tensor]:
        """An epoch's shuffled blocks [N, 2] (start, length), and the ends [W] of its windows."""
        if shard not in self._epochs or self._epochs[shard][0] != epoch:
            count = -(-self.per_shard // BLOCK)
            start = torch.randperm(count, generator=self._generator(shard, epoch)) * BLOCK
            length = (self.per_shard - start).clamp(max=BLOCK)
            ends = length.cumsum(0)
            ends = torch.cat([ends[WINDOW - 1 : -1 : WINDOW], ends[-1:]])
            blocks = torch.stack([start + shard * self.per_shard, length], -1)
            self._epochs[shard] = epoch, blocks, ends
        return self._epochs[shard][1:]

    def _read(self, shard: int, epoch: int, window: int, blocks: Tensor) -> tuple[Tensor, Tensor]:
        """Pixel numbers [N] and colors [N, C] of one window, shuffled; the last one is cached."""
        if shard not in self._windows or self._windows[shard][0] != (epoch, window):
            start, length = blocks[window * WINDOW : (window + 1) * WINDOW].unbind(-1)
            numbers = torch.arange(int(length.sum()))
            numbers += (start - length.cumsum(0) + length).repeat_interleave(length)
            numbers = self.views[numbers // self.per_view] * self.per_view + numbers % self.per_view
            # Read block by block, shuffled only afterwards.
            if self.file is None:
                colors = self.pixels[numbers]
            else:
                colors = torch.from_numpy(self.file.read_pixels(numbers.numpy()))
            generator = self._generator(shard, epoch, 1 + window)
            order = torch.randperm(len(numbers), generator=generator)
            found = numbers[order].to(self.device), colors[order].to(self.device)
            self._windows[shard] = (epoch, window), *found
        return self._windows[shard][1:]
