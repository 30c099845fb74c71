"""The state of a run: everything that a checkpoint holds, saved and restored in one place."""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import torch

from nerf.training import checkpoint
from nerf.training.ema import EMA
from nerf.training.progress import Clock
from nerf.training.recovery import Attempt
from nerf.training.run_folder import RunFolder

R = TypeVar("R", bound=checkpoint.Restorable)


@dataclass
class TrainState(Generic[R]):
    """The parts of a run that training changes, and its counters.

    step: number of updates so far, including those skipped because they were not finite.
    rays_drawn: training rays so far, over all ranks. best: step and PSNR of the best validation so
    far. clock: seconds of training. saved_at: ``time.monotonic()`` of the last save.
    """

    renderer: R  # an nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    ema: EMA
    attempt: Attempt
    step: int = 0
    rays_drawn: int = 0
    best: dict[str, Any] = field(default_factory=lambda: {"step": None, "psnr": -math.inf})
    clock: Clock = field(default_factory=Clock)
    saved_at: float = field(default_factory=time.monotonic)

    def restore(self, log: Callable[[str], None], rays_per_step: int = 0) -> dict[str, Any]:
        """Restore the attempt's checkpoint and return its content; {} if it has none.

        rays_per_step: for checkpoints without ``rays_drawn``, such as nerf-pytorch's.
        """
        if self.attempt.saved is None:
            return {}
        path, saved = self.attempt.saved
        checkpoint.restore(path, saved, log, self.renderer, self.optimizer, self.scaler, self.ema)
        self.step = checkpoint.finished_updates(saved)
        self.rays_drawn = saved.get("rays_drawn", self.step * rays_per_step)
        self.best = saved.get("best") or self.best
        self.clock = Clock(saved.get("train_seconds", 0.0))
        return saved

    def replace_parameters(
        self,
        new: Mapping[torch.nn.Parameter, torch.nn.Parameter],
        resized: Callable[[torch.Tensor, Any], torch.Tensor],
    ) -> None:
        """Train the parameters ``new`` instead of the old ones, its keys, with new Adam moments.

        resized(average, shape): an average of old weights in a new shape.
        """
        for group in self.optimizer.param_groups:
            group["params"] = [new.get(parameter, parameter) for parameter in group["params"]]
        for parameter in new:
            self.optimizer.state.pop(parameter, None)
        self.ema.replace(new, resized)

    def save(self, run: RunFolder, keep: int, **extra: Any) -> bool:
        """Write a checkpoint, on rank 0; then remove all but the newest ``keep`` and the best.

        extra: further entries of the file, such as args. A failed write is tried once more, then
        logged; earlier checkpoints then stay. Returns False after a failed write, else True.
        """
        if not run.is_main:
            return True
        content = {
            "global_step": self.step,
            **self.renderer.checkpoint_state(),
            "optimizer_state_dict": self.optimizer.state_dict(),
            "scaler_state_dict": self.scaler.state_dict(),
            **self.attempt.checkpoint_state(),
            "best": self.best,
            "train_seconds": self.clock.seconds,
            "rays_drawn": self.rays_drawn,
            **extra,
        }
        if self.ema.enabled:
            content["ema_state_dict"] = self.ema.state_dict()
        saved = checkpoint.save_run(run, self.step, content, keep=keep, best_step=self.best["step"])
        self.saved_at = time.monotonic()
        return saved

    def save_and_stop(self, run: RunFolder, signal: int, keep: int, **extra: Any) -> int:
        """Save after a stop signal; the exit code, which is 128 + signal as in shells."""
        saved = "saved" if self.save(run, keep, **extra) else "not saved"
        run.log(f"stopped by signal {signal}; step {self.step} is {saved}")
        return 128 + signal

    def due(self, seconds: float) -> bool:
        """Whether to save now: the step has the best PSNR, or the last save is ``seconds`` ago."""
        if self.best["step"] == self.step:
            return True
        return seconds > 0 and time.monotonic() - self.saved_at >= seconds

    def advance(self, num_rays: int) -> None:
        """Count an update, made or skipped, with ``num_rays`` rays over all ranks."""
        self.step += 1
        self.rays_drawn += num_rays

    def record_validation(self, psnr: float) -> None:
        """Remember this validation if it is the best so far; ``save`` keeps its checkpoint."""
        if psnr > self.best["psnr"]:
            self.best = {"step": self.step, "psnr": psnr}
