"""How far a run is: the progress bar, speed and the training clock."""

import sys
import time


class Progress:
    """A tqdm bar on a terminal; elsewhere nothing, the printed lines are enough."""

    def __init__(self, total: int, start: int, *, show: bool):
        from tqdm import tqdm

        self.on_terminal = show and sys.stderr.isatty()
        self.bar = tqdm(
            total=total,
            initial=start,
            disable=not self.on_terminal,
            dynamic_ncols=True,
            unit="step",
        )

    def advance(self) -> None:
        self.bar.update()

    def describe(self, text: str) -> None:
        self.bar.set_postfix_str(text, refresh=False)

    def close(self) -> None:
        self.bar.close()


class Speed:
    """Rays and steps per second since the last time it was asked."""

    def __init__(self, step: int, seconds: float):
        self._step, self._rays, self._seconds = step, 0, seconds
        self.seconds_per_step = 0.0

    def rays_per_second(self, step: int, rays: int, seconds: float) -> float:
        """step, rays: done so far; seconds: of training so far."""
        passed = max(seconds - self._seconds, 1e-9)
        speed = (rays - self._rays) / passed
        self.seconds_per_step = passed / max(1, step - self._step)
        self._step, self._rays, self._seconds = step, rays, seconds
        return speed


class Clock:
    """Seconds spent training: it runs on from ``seconds`` and stands still while paused."""

    def __init__(self, seconds: float = 0.0):
        self._before, self._since = seconds, time.perf_counter()

    @property
    def seconds(self) -> float:
        running = 0.0 if self._since is None else time.perf_counter() - self._since
        return self._before + running

    def __enter__(self) -> "Clock":
        """Pause: what runs inside the with-block is not training."""
        self._before, self._since = self.seconds, None
        return self

    def __exit__(self, *exc) -> None:
        self._since = time.perf_counter()
