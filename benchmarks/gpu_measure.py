"""Clocks for ``gpu.py``: blocks of equal work, the real training loops, pictures, memory.

A block is timed between two waits for the device. Comparisons alternate: a block of each side in
turn, so that a clock frequency or another job that changes meanwhile meets both.
"""

import gc
import os
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from nerf.outputs.scene import SceneOutputs
from nerf.training.state import TrainState
from nerf.training.system import peak_memory_mb

STOPPED = 128 + signal.SIGUSR1  # exit code of a run that ``BlockTimer`` has stopped


class Enough(BaseException):
    """Ends a run once its measurement is complete; every Exception would be taken for a fault."""


def now(device: torch.device) -> float:
    """The time in seconds, after all work on the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Median, range and number of blocks."""
    return {
        "median": statistics.median(values),
        "low": min(values),
        "high": max(values),
        "blocks": len(values),
    }


def start_memory(device: torch.device) -> None:
    """Free what earlier measurements left, and count the peak from here on."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.init()  # the peak of a device that was never used cannot be reset
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def alternate(
    sides: dict[str, Callable[[], object]],
    device: torch.device,
    *,
    blocks: int = 5,
    seconds: float = 0.1,
) -> dict[str, list[float]]:
    """Seconds per call of each side, in ``blocks`` blocks of about ``seconds``, in turn.

    One call of each warms up, a second one decides how many calls make a block.
    """
    calls, found = {}, {name: [] for name in sides}
    for name, side in sides.items():
        side()
        start = now(device)
        side()
        calls[name] = max(1, round(seconds / max(now(device) - start, 1e-6)))
    for _ in range(blocks):
        for name, side in sides.items():
            start = now(device)
            for _ in range(calls[name]):
                side()
            found[name].append((now(device) - start) / calls[name])
    return found


class BlockTimer:
    """Times blocks of a training loop; call ``step`` after every update.

    warm_up: updates before the first block; the second half of them decides how many updates make
    a block of about ``seconds``. updates: of a block; None: by ``seconds``. ``times``: seconds per
    update, block by block; ``rates``: rays/s. ``done``: all blocks are there.
    """

    def __init__(
        self,
        device: torch.device,
        *,
        blocks: int = 5,
        seconds: float = 0.3,
        warm_up: int = 20,
        updates: int | None = None,
    ) -> None:
        self.device, self.blocks, self.seconds = device, blocks, seconds
        self.warm_up, self.updates = warm_up, updates
        self.times: list[float] = []
        self.rates: list[float] = []
        self.count = self._rays = self._block_rays = 0
        self._start = 0.0

    @property
    def done(self) -> bool:
        return len(self.times) == self.blocks

    def step(self, rays: int) -> None:
        """Count an update of ``rays`` rays."""
        self.count, self._rays = self.count + 1, self._rays + rays
        if self.done:
            return
        if self.count == self.warm_up // 2:
            self._start = now(self.device)
        elif self.count == self.warm_up:
            taken = (now(self.device) - self._start) / (self.warm_up - self.warm_up // 2)
            self.updates = self.updates or max(3, round(self.seconds / taken))
            self._start, self._block_rays = now(self.device), self._rays
        elif self.count > self.warm_up and (self.count - self.warm_up) % self.updates == 0:
            taken = now(self.device) - self._start
            self.times.append(taken / self.updates)
            self.rates.append((self._rays - self._block_rays) / taken)
            self._start, self._block_rays = now(self.device), self._rays


def stop_run() -> None:
    """Stop the training loop of this process as a user would: it saves a checkpoint and returns."""
    os.kill(os.getpid(), signal.SIGUSR1)


@contextmanager
def after_updates(call: Callable[[TrainState, int], object]) -> Iterator[None]:
    """Inside, ``call(state, rays of the update)`` follows every update of either script's loop."""
    advance = TrainState.advance

    def advance_and_call(self: TrainState, num_rays: int) -> None:
        advance(self, num_rays)
        call(self, num_rays)

    with patch.object(TrainState, "advance", advance_and_call):
        yield


@contextmanager
def timed_frames(device: torch.device, most: int | None = None) -> Iterator[list[float]]:
    """Inside, the list yielded gets the seconds of every picture of full size that is rendered.

    most: raise ``Enough`` after as many.
    """
    render, seconds = SceneOutputs.render_dataset_view, []

    def render_and_time(self: SceneOutputs, scene: Any, view: int) -> Any:
        start = now(device)
        rendered = render(self, scene, view)
        if scene.view_size(view) == self.scene.view_size(view):
            seconds.append(now(device) - start)
        if len(seconds) == most:
            raise Enough
        return rendered

    with patch.object(SceneOutputs, "render_dataset_view", render_and_time):
        yield seconds


def drive(main: Callable[[list[str]], int], argv: Sequence[object], log: str) -> None:
    """Run a script's ``main`` in this process; RuntimeError with its last line if it fails.

    log: the file that this process prints to.
    """
    before = Path(log).stat().st_size
    try:
        code = main([str(word) for word in argv])
    except SystemExit as stop:
        code = stop.code
    except Enough:
        code = 0
    if code in (0, STOPPED):
        return
    sys.stdout.flush()
    sys.stderr.flush()
    with open(log, errors="replace") as file:
        file.seek(before)
        lines = [line.strip() for line in file if line.strip()]
    raise RuntimeError(lines[-1] if lines else f"ended with exit code {code}")


def train_blocks(
    main: Callable[[list[str]], int],
    argv: Sequence[object],
    timer: BlockTimer,
    log: str,
    after: Callable[[TrainState], bool] | None = None,
) -> float:
    """Train by a script until ``timer`` has its blocks; the peak memory in MiB until then.

    after(state): called after every later update, until it returns True: what else to measure.
    """
    start_memory(timer.device)
    peak, stopped = 0.0, False

    def count(state: TrainState, rays: int) -> None:
        nonlocal peak, stopped
        was_done = timer.done
        timer.step(rays)
        if not timer.done or stopped:
            return
        peak = peak or peak_memory_mb(timer.device)
        if after is None or (was_done and after(state)):
            stopped = True
            stop_run()

    with after_updates(count):
        drive(main, argv, log)
    if not timer.done:
        raise RuntimeError(f"the run ended after {timer.count} updates, before it was measured")
    return peak
