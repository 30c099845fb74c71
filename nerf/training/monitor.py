"""Checks every step: are its numbers finite, is the start dead, must the run stop?"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from nerf.training.distributed import World
from nerf.training.progress import Clock
from nerf.training.system import StopSignal

MAX_SKIPPED = 100  # float16's loss scale alone may need about 40 updates to come down
DEAD_STEPS = 200  # steps of one color in a row: a live run leaves that state after about 50
WATCHED_STEPS = 2000  # a run that has learned something by then does not die this way


class Verdict(NamedTuple):
    """What the loop must know about a step after backward; equal on all ranks except ``loss``."""

    finite: bool  # loss and gradients are finite on all ranks: make the update
    diverged: bool  # MAX_SKIPPED updates in a row were not finite
    dead: bool  # for DEAD_STEPS steps every rank's batch was rendered in one single color
    signal: int  # number of the signal that stops the run; 0: none
    time_up: bool  # --max_minutes have passed
    samples: float  # of the step, over all ranks
    loss: float  # of this rank
    grad_norm: float


class Monitor:
    """One verdict per step, from one device read, the same on every rank.

    If a rank alone skipped an update, stopped or started again, the others would wait for it in
    their next collective, so every decision is reduced over the ranks first. max_minutes: 0: no
    limit. ``skipped``: the number of updates skipped because a number was not finite.
    """

    def __init__(self, world: World, stop: StopSignal, clock: Clock, max_minutes: float) -> None:
        self.world, self.stop, self.clock = world, stop, clock
        self.max_seconds = max_minutes * 60
        self.skipped = self.skipped_in_row = self.flat_steps = 0

    def check(
        self, loss: Tensor, grad_norm: Tensor, *, flat: Tensor | None = None, samples: int = 0
    ) -> Verdict:
        """Judge a step by its loss [] and gradient norm [], before the optimizer uses them.

        flat: bool [], whether this rank's batch was rendered in one single color; None: do not
        watch for a dead start. samples: of this rank.
        """
        numbers = [loss.detach().float(), grad_norm.detach().float()]
        numbers += [] if flat is None else [flat.float()]
        loss_value, norm, *flat_value = torch.stack(numbers).tolist()  # the step's only device read
        if flat is not None:
            self.flat_steps = self.flat_steps + 1 if any(flat_value) else 0
        broken = not (math.isfinite(loss_value) and math.isfinite(norm))
        alive = self.flat_steps < DEAD_STEPS
        time_up = bool(self.max_seconds) and self.clock.seconds >= self.max_seconds
        signal, any_time_up, any_alive, any_broken = self.world.all_reduce_max(
            self.stop.number, time_up, alive, broken
        )
        self.skipped += bool(any_broken)
        self.skipped_in_row = self.skipped_in_row + 1 if any_broken else 0
        return Verdict(
            finite=not any_broken,
            diverged=self.skipped_in_row >= MAX_SKIPPED,
            dead=not any_alive,
            signal=int(signal),
            time_up=bool(any_time_up),
            samples=self.world.all_reduce_sum(samples),
            loss=loss_value,
            grad_norm=norm,
        )
