"""Progress of a run: the training clock, speeds, the ETA, and the progress of what is rendered."""

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Protocol, Self, TypeVar

T = TypeVar("T")


class Clock:
    """Seconds of training, counted from ``seconds`` on. It is paused inside its with-block."""

    def __init__(self, seconds: float = 0.0) -> None:
        self._before = seconds
        self._since: float | None = time.perf_counter()

    @property
    def seconds(self) -> float:
        """Seconds of training so far."""
        running = 0.0 if self._since is None else time.perf_counter() - self._since
        return self._before + running

    def paused(self) -> Self:
        """For a with-block in which the clock stands still."""
        return self

    def __enter__(self) -> Self:
        """Pause: the with-block does not count as training."""
        self._before, self._since = self.seconds, None
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._since = time.perf_counter()


def duration(seconds: float) -> str:
    """Seconds as a person says them: "45 s", "3.2 min", "5.1 h", "25 days"."""
    for unit, length in (("days", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= (2 if unit == "days" else 1) * length:
            return f"{seconds / length:.{0 if unit == 'days' else 1}f} {unit}"
    return f"{seconds:.0f} s"


def amount(number: float) -> str:
    """A large number as a person says it: "1.2 M", "53 k", "310"."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            digits = 1 if number < 10 * size else 0
            return f"{number / size:.{digits}f} {unit}"
    return f"{number:.0f}"


SECONDS_BETWEEN = 10.0  # lines about frames, where there is no terminal


def frames(
    items: Sequence[T],
    what: str,
    log: Callable[[str], None],
    *,
    total: int = 0,
    stride: int = 1,
    show: bool = True,
) -> Iterator[T]:
    """The items one by one, with "test view 12/60" and the time left: a bar, or a line in the log.

    total: their number over all ranks, of which every ``stride``-th is here; 0: all are here. The
    log gets a line at most every SECONDS_BETWEEN seconds, a terminal a bar. show: on rank 0.
    """
    from tqdm import tqdm

    total, start = total or len(items), time.monotonic()
    on_terminal, said = show and sys.stderr.isatty(), start
    bar = tqdm(
        total=total, desc=what, leave=False, mininterval=0, disable=not on_terminal,
        bar_format="{desc} {n_fmt}/{total_fmt} |{bar}| {elapsed} < {remaining}",
    )  # fmt: skip
    with bar:
        for number, item in enumerate(items, start=1):
            yield item
            done, now = min(number * stride, total), time.monotonic()
            bar.update(done - bar.n)
            if show and not on_terminal and now - said >= SECONDS_BETWEEN and done < total:
                left = (now - start) / done * (total - done)
                log(f"{what} {done}/{total}, {duration(left)} left")
                said = now


FIRST_STEPS = 10  # after these the time of the whole run is estimated,
FIRST_SECONDS = 20.0  # or after these
TRIED_SECONDS = 2.0  # of updates, at least, in a dry run
LONG_SECONDS = 2 * 3600.0  # of a run that ought to be told of a faster way


class Counters(Protocol):
    """The part of ``nerf.training.state.TrainState`` that ``Progress`` reads."""

    step: int
    rays_drawn: int
    clock: Clock


class Progress:
    """Speeds since the last report, and a tqdm bar on a terminal or else a logged line.

    total: the number of updates (--N_iters). state: the run's counters, which change meanwhile.
    show: whether to show the bar if there is a terminal. hint: said about a run that takes hours.
    machine: CPU or GPU, for the same line. ceiling: samples/s that the machine could train at most;
    0: unknown. read_every: steps from one device read to the next, between which the host runs
    ahead. Set ``rendering`` to the seconds that the pictures after the last update will take, once
    they can be estimated: the ETA counts them, and says that it does not while they are not known.
    """

    rendering: float | None = None

    def __init__(
        self,
        total: int,
        state: Counters,
        *,
        show: bool,
        hint: str = "",
        machine: str = "CPU",
        ceiling: float = 0.0,
        read_every: int = 1,
    ) -> None:
        from tqdm import tqdm

        self.total, self.state, self.hint = total, state, hint
        self.machine, self.ceiling = machine, ceiling
        self.first_step = state.step
        # The first updates are slower: memory is allocated, and on a GPU kernels are chosen and
        # graphs are recorded. Both ends of what is timed lie equally far from a device read.
        self.warm_up = 1 if read_every == 1 else 2 * read_every
        self.first_steps = max(FIRST_STEPS, 2 * self.warm_up)
        self._start = self._warm = state.clock.seconds
        self._told = False
        self.on_terminal = show and sys.stderr.isatty()
        self.bar = tqdm(
            total=total,
            initial=state.step,
            disable=not self.on_terminal,
            dynamic_ncols=True,
            unit="step",
        )
        self._step, self._rays, self._seconds = state.step, state.rays_drawn, state.clock.seconds
        self._samples, self._sampled = 0.0, 0  # their number, and of how many steps it is
        self.seconds_per_step = self.rays_per_second = self.steps_per_second = 0.0
        self.samples_per_second = 0.0

    def count(self, samples: float) -> None:
        """Count the samples of a step over all ranks, at every step at which they are read."""
        self._samples, self._sampled = self._samples + samples, self._sampled + 1

    def measure(self) -> None:
        """Set the speeds to their means since the last call of this method."""
        state, seconds = self.state, self.state.clock.seconds
        passed = max(seconds - self._seconds, 1e-9)
        self.rays_per_second = (state.rays_drawn - self._rays) / passed
        self.steps_per_second = (state.step - self._step) / passed
        seconds_per_step = passed / max(1, state.step - self._step)
        samples_per_step = self._samples / max(1, self._sampled)
        self.samples_per_second = samples_per_step * self.steps_per_second
        self._samples, self._sampled = 0.0, 0
        # Smoothed for the ETA: steps of one run differ, as when the occupancy grid empties.
        self.seconds_per_step = (
            self.seconds_per_step or seconds_per_step
        ) / 2 + seconds_per_step / 2
        self._step, self._rays, self._seconds = state.step, state.rays_drawn, seconds

    def advance(self, log: Callable[[str], None]) -> None:
        """Advance the bar by one step; after the first steps, log how long the run will take."""
        self.bar.update()
        if self.state.step - self.first_step == self.warm_up:
            self._warm = self.state.clock.seconds
        if not self._told and self.settled(self.first_steps, 0.0):
            self._told, seconds = True, self.seconds_left()
            left = self.total - self.state.step
            hint = self.hint if seconds > LONG_SECONDS else ""
            if left:
                took = f"{left} updates will take about {duration(seconds)}"
                log(f"{took} on this {self.machine}{hint}")

    def settled(self, fewest: int, seconds: float) -> bool:
        """Whether ``fewest`` steps were made and took ``seconds``, or more than FIRST_SECONDS."""
        done, passed = self.state.step - self.first_step, self.state.clock.seconds - self._start
        if done <= self.warm_up:
            return False
        return (done >= fewest and passed >= seconds) or passed >= FIRST_SECONDS

    def tried(self) -> bool:
        """Whether enough updates were made to foretell the whole run (--dry_run)."""
        on_gpu = self.warm_up > 1
        return self.settled(self.first_steps if on_gpu else FIRST_STEPS // 2, TRIED_SECONDS)

    def seconds_left(self) -> float:
        """Of the updates to come, at the mean speed since the first few."""
        done = self.state.step - self.first_step - self.warm_up
        passed = self.state.clock.seconds - self._warm
        return passed / max(1, done) * (self.total - self.state.step)

    def usage(self) -> str:
        """Samples/s at the last ``measure``, and their share of what the machine could do."""
        said = f"{amount(self.samples_per_second)} samples/s"
        if not self.ceiling:
            return said
        share = self.samples_per_second / self.ceiling
        if share > 1:  # vanilla on a CPU: a sample without density needs no color and no gradient
            return f"{said}, empty ones skipped (limit without skipping: {amount(self.ceiling)})"
        return f"{said}, {share:.0%} of this machine's {amount(self.ceiling)}"

    def eta(self) -> str:
        """The time until the run ends: that of its updates, and of the rendering after them."""
        left = (self.total - self.state.step) * self.seconds_per_step
        if self.rendering is None:
            return f"ETA {duration(left)}, without rendering"
        return f"ETA {duration(left + self.rendering)}"

    def report(self, log: Callable[[str], None], line: str, more: str = "") -> None:
        """Show ``line`` beside the bar; without a bar, log it, ``more``, the step and the ETA."""
        then = f", then {duration(self.rendering)} of rendering" if self.rendering else ""
        self.bar.set_postfix_str(line + then, refresh=False)
        if not self.on_terminal:
            more = f"  {more}" if more else ""
            log(f"step {self.state.step}/{self.total}  {line}{more}  {self.eta()}")

    def close(self) -> None:
        """Close the bar."""
        self.bar.close()
