"""Pictures of a scene in one file that is mapped into memory, for sets larger than memory.

The file is a plain .npy, uint8 [V, H, W, C]. Its name holds a digest of what it was made from
(names, sizes and times of the picture files, and how they were reduced), so a store of other
pictures is never taken; it is written under another name, flushed and renamed, so half of one
neither. Rays are drawn from it block by block (``BlockOrder``), because single pixels from all over
the file would read a page of 4096 bytes each.
"""

import fcntl
import hashlib
import json
import math
import os
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from nerf.training.rng import step_generator

BLOCK = 1024  # pixels in a row that are read together: 3 to 4 KiB, about a page
SHARDS = 8  # parts of the set, in the order of the file, that every batch takes equally from
WINDOW = 128  # blocks of a shard that are mixed: over all shards 3 to 4 MiB at a time


class Store:
    """Where stores of pictures lie, and when one is wanted.

    kind: mmap, or auto: when the pictures would take more than half of the free memory.
    """

    def __init__(self, folder: Path, kind: str, warn=print):
        self.folder, self.kind, self.warn = folder, kind, warn

    def wanted(self, num_bytes: int) -> bool:
        return self.kind == "mmap" or num_bytes > free_memory() / 2

    def keep(self, paths: list[Path], read: Callable[[int], np.ndarray], how: dict) -> np.ndarray:
        """Pictures ``read(0)`` ... of one size: uint8 [V, H, W, C], mapped; made unless there.

        how: everything besides the files that decides what is read. C is 4 if any has alpha.
        """
        path = self.folder / f".pictures_{_digest(paths, how)}.npy"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = open(self.folder / ".pictures.lock", "a")
        except OSError as error:
            raise ValueError(_cannot(self.folder, error)) from None
        with lock:  # of several processes one makes it, the others wait here
            fcntl.flock(lock, fcntl.LOCK_EX)
            if path.exists():
                try:
                    return _open(path)
                except ValueError as error:
                    self.warn(f"{path}: {error}; it is made again")
            for old in self.folder.glob(".pictures_*.npy*"):
                self.warn(f"{old}: of other pictures or unfinished; removed")
                old.unlink()
            self.warn(f"putting {len(paths)} pictures into {path}")
            _write(path, len(paths), read)
            return _open(path)


def free_memory() -> int:
    """Bytes that this process may still take, by the system and by its control group."""
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.exists() and (text := limit.read_text().strip()).isdigit():
        free = min(free, int(text))
    return free


def _digest(paths: list[Path], how: dict) -> str:
    rows = []
    for path in paths:
        try:
            stat = path.stat()
        except OSError:
            raise ValueError(f"{path}: no such image; is the data folder complete?") from None
        rows.append([str(path), stat.st_size, stat.st_mtime_ns])
    return hashlib.sha256(json.dumps([rows, how], sort_keys=True).encode()).hexdigest()[:16]


def _open(path: Path) -> np.ndarray:
    """ValueError if the file is shorter than it says, as after a copy that broke off."""
    try:
        pictures = np.load(path, mmap_mode="r", allow_pickle=False)
    except EOFError as error:
        raise ValueError(str(error)) from None
    if pictures.dtype != np.uint8 or pictures.ndim != 4:
        raise ValueError("is no store of pictures")
    return pictures


def as_tensor(pictures: np.ndarray) -> Tensor:
    """The same memory or mapped file as a tensor, which nobody may write to."""
    with warnings.catch_warnings():
        # A private, writable mapping would silence it too, and count as memory in use.
        warnings.filterwarnings("ignore", message=".*not writable.*")
        return torch.from_numpy(pictures)


def _cannot(path: Path, error: OSError) -> str:
    return (
        f"{path}: cannot hold the store of pictures ({error.strerror}); "
        "make room, name another folder (--store_dir), or use --data_store memory"
    )


def _write(path: Path, count: int, read: Callable[[int], np.ndarray]) -> None:
    """With write(), not through a mapping: on a full disk that raises instead of killing."""
    channels = read(0).shape[-1]
    temporary = path.with_name(path.name + ".part")
    try:
        with open(temporary, "wb") as file:
            number = 0
            while number < count:
                picture = read(number)
                if picture.shape[-1] > channels:  # the first with alpha: begin again, with room
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
                        f"{shape[2]}x{shape[1]}; a store of pictures needs one size, use "
                        "--data_store memory"
                    )
                file.write(np.ascontiguousarray(picture))
                number += 1
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise ValueError(_cannot(path, error)) from None
    finally:
        temporary.unlink(missing_ok=True)


class BlockOrder:
    """The order in which training pixels are drawn: every one once an epoch, by (seed, epoch).

    The set is cut into ``SHARDS`` parts (fewer where its size has not that divisor), and a batch's
    rows are those of the first shard, then of the second, ...: a process that makes a share of
    the rows reads that share of the views. In a shard, blocks of neighbors are shuffled; the
    pixels of ``WINDOW`` blocks at a time are read, and shuffled among them. Where a run stands is
    one number, the pixels drawn so far.

    images: uint8 [V, H, W, C]. views: those to draw from. device: where colors are wanted.
    """

    def __init__(self, images: Tensor, views: list[int], seed: int, device):
        self.pixels = images.reshape(-1, images.shape[-1])  # a view: nothing is read
        self.per_view = images.shape[1] * images.shape[2]
        self.views, self.seed, self.device = torch.tensor(views), seed, device
        self.shards = math.gcd(len(views) * self.per_view, SHARDS)
        self.per_shard = len(views) * self.per_view // self.shards
        self._epochs: dict[int, tuple] = {}
        self._windows: dict[int, tuple] = {}

    def draw(self, position: int, count: int, rows: slice | None = None) -> tuple[Tensor, Tensor]:
        """Flat pixel numbers [B] and colors uint8 [B, C] at ``position`` and after.

        rows: which of the ``count`` rows to return, by default all.
        """
        rows, parts, row = rows or slice(0, count), [], 0
        for shard in range(self.shards):
            # Of all rays of the run, number n is of shard n % shards.
            first, end = (-((shard - n) // self.shards) for n in (position, position + count))
            low, high = max(rows.start, row), min(rows.stop, row + end - first)
            parts += self._draw(shard, first + low - row, high - low)
            row += end - first
        return tuple(torch.cat(column) for column in zip(*parts, strict=True))

    def _draw(self, shard: int, position: int, count: int):
        """Numbers and colors, in pieces, of a shard's pixels at ``position`` and after."""
        while count > 0:
            epoch, place = divmod(position, self.per_shard)
            blocks, ends = self._blocks(shard, epoch)
            window = int(torch.searchsorted(ends, place, right=True))
            first = int(ends[window - 1]) if window else 0
            numbers, colors = self._read(shard, epoch, window, blocks)
            part = slice(place - first, min(place - first + count, len(numbers)))
            yield numbers[part], colors[part]
            position, count = position + part.stop - part.start, count - part.stop + part.start

    def _generator(self, shard: int, epoch: int, number: int = 0) -> torch.Generator:
        place = -1 - epoch * self.shards - shard  # steps of training are 0 and more
        return step_generator(self.seed + number, place, "cpu")

    def _blocks(self, shard: int, epoch: int) -> tuple[Tensor, Tensor]:
        """Starts and lengths [N, 2] of an epoch's blocks in order; where its windows end."""
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
        if shard not in self._windows or self._windows[shard][0] != (epoch, window):
            start, length = blocks[window * WINDOW : (window + 1) * WINDOW].unbind(-1)
            numbers = torch.arange(int(length.sum()))
            numbers += (start - length.cumsum(0) + length).repeat_interleave(length)
            numbers = self.views[numbers // self.per_view] * self.per_view + numbers % self.per_view
            colors = self.pixels[numbers]  # in the order of the blocks, then shuffled
            generator = self._generator(shard, epoch, 1 + window)
            order = torch.randperm(len(numbers), generator=generator)
            found = numbers[order].to(self.device), colors[order].to(self.device)
            self._windows[shard] = (epoch, window), *found
        return self._windows[shard][1:]
