"""The state of a run: everything that a checkpoint holds, saved and restored in one place."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import torch

from nerf.column_order import keep_file_order
from nerf.training import checkpoint, checkpoint_choice
from nerf.training.checkpoint_choice import Ranking, describe_best, write_best
from nerf.training.ema import EMA
from nerf.training.progress import Clock
from nerf.training.recovery import Attempt
from nerf.training.run_folder import RunFolder
from nerf.training.weights import load_weights

Log = Callable[[str], None]
R = TypeVar("R", bound=checkpoint.Restorable)


@dataclass
class TrainState(Generic[R]):
    """The parts of a run that training changes, and its counters.

    step: number of updates so far, including those skipped because they were not finite.
    rays_drawn: training rays so far, over all ranks. ranking: the best checkpoints so far.
    weights_only: leave the optimizer's state out of checkpoints. clock: seconds of training.
    saved_at: ``time.monotonic()`` of the last save.
    """

    renderer: R  # an nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    ema: EMA
    attempt: Attempt
    step: int = 0
    rays_drawn: int = 0
    ranking: Ranking = field(default_factory=Ranking)
    weights_only: bool = False
    clock: Clock = field(default_factory=Clock)
    saved_at: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        keep_file_order(self.optimizer)

    def restore(self, run: RunFolder, rays_per_step: int = 0) -> dict[str, Any]:
        """Restore the attempt's checkpoint and return its content; {} if it has none.

        Best checkpoints that are not in the run folder are forgotten, and best.json made to agree.
        rays_per_step: for checkpoints without ``rays_drawn``, such as nerf-pytorch's.
        """
        if self.attempt.saved is None:
            return {}
        path, saved = self.attempt.saved
        checkpoint.restore(
            path, saved, run.log, self.renderer, self.optimizer, self.scaler, self.ema
        )
        self.step = checkpoint.finished_updates(saved)
        self.rays_drawn = saved.get("rays_drawn", self.step * rays_per_step)
        self.ranking = self.ranking.restored(saved, str(path)).existing(run.folder)
        write_best(run, self.ranking)
        self.clock = Clock(saved.get("train_seconds", 0.0))
        return saved

    def start_from_weights(self, given: str, ignored: Sequence[str], log: Log) -> None:
        """Begin with weights of another run, see ``weights.load_weights``; all else is new."""
        assert isinstance(self.renderer, torch.nn.Module)
        load_weights(self.renderer, given, ignored, log)
        self.ema.reset()

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
            self.ranking = self.ranking.written()
            return True
        content = {
            "global_step": self.step,
            **self.renderer.checkpoint_state(),
            **self._optimizer_state(),
            **self.attempt.checkpoint_state(),
            "train_seconds": self.clock.seconds,
            "rays_drawn": self.rays_drawn,
            **extra,
        }
        if self.ema.enabled:
            content["ema_state_dict"] = self.ema.state_dict()
        is_new = self.step in self.ranking.steps
        ranking = checkpoint_choice.save_run(
            run, self.step, content, keep=keep, ranking=self.ranking
        )
        self.ranking = ranking or self.ranking.existing(run.folder).written()
        self.saved_at = time.monotonic()
        best = self.ranking.best
        if ranking and is_new and best and best.step == self.step:
            run.log(f"best so far: {describe_best(self.ranking.as_json())}")
        return ranking is not None

    def _optimizer_state(self) -> dict[str, Any]:
        """The entries of a checkpoint that only training needs."""
        if self.weights_only:
            return {"weights_only": True}
        return {
            "optimizer_state_dict": self.optimizer.state_dict(),
            "scaler_state_dict": self.scaler.state_dict(),
        }

    def save_and_stop(self, run: RunFolder, signal: int, keep: int, **extra: Any) -> int:
        """Save after a stop signal; the exit code, which is 128 + signal as in shells."""
        saved = "saved" if self.save(run, keep, **extra) else "not saved"
        run.log(f"stopped by signal {signal}; step {self.step} is {saved}")
        return 128 + signal

    def due(self, seconds: float) -> bool:
        """Whether to save now: the step is among the best, or the last save is ``seconds`` ago."""
        if self.step in self.ranking.steps:
            return True
        return seconds > 0 and time.monotonic() - self.saved_at >= seconds

    def advance(self, num_rays: int) -> None:
        """Count an update, made or skipped, with ``num_rays`` rays over all ranks."""
        self.step += 1
        self.rays_drawn += num_rays

    def record_score(self, score: float, split: str | None = None) -> None:
        """Remember this step's score if it is among the best so far; ``save`` keeps its checkpoint.

        split: the views that were measured.
        """
        self.ranking = self.ranking.recorded(self.step, score, split)
