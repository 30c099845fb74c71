"""Checks every step: are its numbers finite, is the start dead, must the run stop?"""

from typing import NamedTuple

import torch
from torch import Tensor

from nerf.training.distributed import World
from nerf.training.progress import Clock
from nerf.training.system import StopSignal

MAX_SKIPPED = 100  # float16's loss scale alone may need about 40 updates to come down
DEAD_STEPS = 200  # steps of one color in a row: a live run leaves that state after about 50
WATCHED_STEPS = 2000  # a run that has learned something by then does not die this way
# Steps from one device read to the next where reading costs more than a step: on a GPU the host
# would wait until all its work is done, and the GPU then for the host.
READ_EVERY = 16


class Verdict(NamedTuple):
    """What the loop must know about a step after backward; equal on all ranks except ``loss`` and
    ``samples``.

    On a step that is not read (``read``), only ``finite`` is known; nothing else asks for anything.
    """

    finite: Tensor  # bool [] on the device: loss and gradients are finite on all ranks
    read: bool  # whether the numbers below were read from the device at this step
    diverged: bool = False  # MAX_SKIPPED updates in a row were not finite
    dead: bool = False  # for DEAD_STEPS steps every rank's batch was rendered in one single color
    signal: int = 0  # number of the signal that stops the run; 0: none
    time_up: bool = False  # --max_minutes have passed
    samples: float = 0.0  # of the step, of this rank
    total_samples: float = 0.0  # over all ranks
    loss: float = 0.0  # of this rank
    grad_norm: float = 0.0
    more: tuple[float, ...] = ()  # of this rank, the numbers that were passed to ``check``


class Monitor:
    """One verdict per step, the same on every rank, from at most one device read.

    If a rank alone skipped an update, stopped or started again, the others would wait for it in
    their next collective, so every decision is reduced over the ranks first. max_minutes: 0: no
    limit. read_every: steps from one read to the next; what must be decided at once, whether the
    update is made, is decided on the device. ``skipped``: the number of updates skipped because a
    number was not finite, at the last read.
    """

    def __init__(
        self,
        world: World,
        stop: StopSignal,
        clock: Clock,
        max_minutes: float,
        read_every: int = 1,
    ) -> None:
        self.world, self.stop, self.clock = world, stop, clock
        self.max_seconds, self.read_every = max_minutes * 60, read_every
        self.skipped = 0
        zero = torch.zeros((), device=world.device)
        self._skipped, self._skipped_in_row, self._flat_steps = zero, zero.clone(), zero.clone()

    def check(
        self,
        step: int,
        loss: Tensor,
        grad_norm: Tensor,
        *,
        flat: Tensor | None = None,
        samples: int | Tensor = 0,
        more: Tensor | None = None,
        read: bool = False,
    ) -> Verdict:
        """Judge update ``step`` by its loss [] and gradient norm [], before it is made.

        flat: bool [], whether this rank's batch was rendered in one single color; None: do not
        watch for a dead start. samples: of this rank. more [N]: read these too. read: read this
        step's numbers in any case.
        """
        read = read or step % self.read_every == 0
        numbers = torch.stack([loss.detach().float(), grad_norm.detach().float()])
        if flat is not None:
            self._flat_steps = (self._flat_steps + 1) * flat
        facts = torch.stack([~numbers.isfinite().all(), self._flat_steps < DEAD_STEPS]).float()
        time_up = bool(self.max_seconds) and self.clock.seconds >= self.max_seconds
        facts = self.world.reduce_max(facts, (self.stop.number, time_up) if read else (0, 0))
        broken = facts[0]
        self._skipped = self._skipped + broken
        self._skipped_in_row = (self._skipped_in_row + 1) * broken
        finite = broken == 0
        if not read:
            return Verdict(finite, read=False)
        count = torch.as_tensor(samples, dtype=torch.float32, device=numbers.device)
        counts = torch.stack([self._skipped, self._skipped_in_row, count])
        parts = [numbers, facts, counts] + ([] if more is None else [more.detach().float()])
        values = torch.cat(parts).tolist()  # the step's only device read
        loss_value, norm, _, alive, signal, any_time_up, skipped, in_row, own_samples = values[:9]
        self.skipped = int(skipped)
        return Verdict(
            finite=finite,
            read=True,
            diverged=in_row >= MAX_SKIPPED,
            dead=not alive,
            signal=int(signal),
            time_up=bool(any_time_up),
            samples=own_samples,
            total_samples=self.world.all_reduce_sum(own_samples),
            loss=loss_value,
            grad_norm=norm,
            more=tuple(values[9:]),
        )
