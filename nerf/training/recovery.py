"""Recovery from numbers that are not finite, from a dead start, and from running out of memory.

An update is skipped on all ranks if its loss or gradient is NaN or infinite on any of them. After
``monitor.MAX_SKIPPED`` skipped updates in a row the run rolls back to its last good checkpoint and
continues with other random numbers. If the same happens again before it has passed that step, it
stops with a diagnosis and a dump. A dead start (NeRF's ReLU density can be negative everywhere, and
then no gradient flows) starts again from another seed.

For both, the loop raises a ``Restart``, and ``next_attempt`` turns it into an ``Attempt``: the
checkpoint and the random numbers with which to train.
"""

import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple, Self, TypeVar

import torch
from torch import Tensor, nn

from nerf.training import checkpoint, monitor, rng
from nerf.training.checkpoint import SavedState
from nerf.training.checkpoint_choice import BEST
from nerf.training.distributed import World, print_to_stderr
from nerf.training.run_folder import RunFolder

T = TypeVar("T")

# How attempts after the first make their seeds, as checkpoints tell it. Those without it added to
# the seed, so that a restart of seed 1 was the first attempt of seed 2.
MIXED_SEEDS = "mixed"
OLD_ROLLBACK_STEP = 1_000_003  # what they added for every rollback


class StepTensors(NamedTuple):
    """The tensors of one step, in the order of their computation, and the trained module."""

    named: dict[str, Tensor]
    module: nn.Module

    def first_non_finite(self) -> str:
        """Name the first tensor or gradient that is not finite, and count; "" if all are finite."""
        return first_non_finite(**self.named) or non_finite_gradients(self.module)


class Restart(Exception):
    """This attempt cannot go on; ``next_attempt`` returns the one that replaces it."""


class DeadStart(Restart):
    """All rays have had one color since the first steps, so nothing more can be learned.

    diagnosis: what each level renders.
    """

    def __init__(self, step: int, diagnosis: str) -> None:
        super().__init__(diagnosis)
        self.step, self.diagnosis = step, diagnosis


class NonFinite(Restart):
    """Too many updates in a row were skipped.

    cause: the first tensor that was not finite, on any rank. dump: that rank's tensors; None on the
    others.
    """

    def __init__(self, step: int, cause: str, dump: dict[str, Tensor] | None) -> None:
        super().__init__(cause)
        self.step, self.cause, self.dump = step, cause, dump

    @classmethod
    def diagnose(cls, step: int, world: World, tensors: StepTensors) -> Self:
        """The exception to raise, with the cause on the first rank that finds one; collective."""
        causes = world.gather(tensors.first_non_finite())
        rank = next((number for number, text in enumerate(causes) if text), 0)
        cause = causes[rank] or "the gradient"
        if world.size > 1:
            cause += f" on rank {rank}"
        return cls(step, cause, tensors.named if world.rank == rank else None)


def first_non_finite(**tensors: Tensor | None) -> str:
    """Name the first tensor that is not finite, and count its numbers; "" if all are finite."""
    for name, value in tensors.items():
        if value is None:
            continue
        bad = ~value.detach().isfinite()
        if bad.any():
            kind = "NaN" if value.detach().isnan().any() else "infinity"
            return f"{name.replace('_', ' ')} ({kind} in {int(bad.sum())} of {bad.numel()} numbers)"
    return ""


def non_finite_gradients(module: nn.Module) -> str:
    """Name the weights whose gradients are not finite; "" if all are finite."""
    names = [
        name
        for name, parameter in module.named_parameters()
        if parameter.grad is not None and not parameter.grad.isfinite().all()
    ]
    return f"the gradients of {len(names)} weights, such as {names[0]}" if names else ""


# --------------------------------------------------------------------------------- starting again


@dataclass(frozen=True)
class Attempt:
    """The checkpoint and the random numbers with which a run is trained.

    seed: of the run (--seed). saved: the checkpoint to start from; None: new weights. dead_starts,
    rollback_count: how often the run has started again for either reason. mixed_seeds: False where
    the checkpoint to go on from is of an earlier version. All three are in checkpoints (as
    "attempt", "draws" and "attempt_seeds"), so that a resumed run continues with the same random
    numbers.
    """

    seed: int
    saved: SavedState | None = None
    dead_starts: int = 0
    rollback_count: int = 0
    failed_at: float = -math.inf  # step of the last rollback of this process
    mixed_seeds: bool = True

    @classmethod
    def from_checkpoint(cls, seed: int, saved: SavedState | None) -> Self:
        """The attempt that wrote the checkpoint ``saved``, to continue it; None: the first one."""
        state = saved[1] if saved else {}
        dead_starts, rollback_count = state.get("attempt", 0), state.get("draws", 0)
        # Without a restart there is nothing to keep: the first attempt's seed is the run's.
        mixed = state.get("attempt_seeds") == MIXED_SEEDS or not (dead_starts or rollback_count)
        return cls(seed, saved, dead_starts, rollback_count, mixed_seeds=mixed)

    def checkpoint_state(self) -> dict[str, Any]:
        """The entries of a checkpoint from which ``from_checkpoint`` makes this attempt again."""
        state: dict[str, Any] = {"attempt": self.dead_starts, "draws": self.rollback_count}
        return state | ({"attempt_seeds": MIXED_SEEDS} if self.mixed_seeds else {})

    @property
    def finished_updates(self) -> int:
        """Updates that the checkpoint to start from holds; 0 without one."""
        return checkpoint.finished_updates(self.saved[1]) if self.saved else 0

    @property
    def weights_seed(self) -> int:
        """The seed of the initial weights, another one after every dead start."""
        if self.mixed_seeds:
            return attempt_seed(self.seed, self.dead_starts)
        return self.seed + self.dead_starts

    @property
    def rng_seed(self) -> int:
        """The seed of the steps' random numbers, another one after every dead start or rollback."""
        if self.mixed_seeds:
            return attempt_seed(self.seed, self.dead_starts, self.rollback_count)
        return self.seed + self.dead_starts + self.rollback_count * OLD_ROLLBACK_STEP


def attempt_seed(seed: int, dead_starts: int, rollback_count: int = 0) -> int:
    """The seed of an attempt: ``seed`` of the first one, unrelated numbers for all others.

    Mixed as the generators of steps are, so that no attempt repeats one of another seed. Steps are
    not negative, so none of theirs is repeated either.
    """
    number = dead_starts + (rollback_count << 20)
    return rng.step_generator(seed, -number, "cpu").initial_seed() if number else seed


def next_attempt(
    attempt: Attempt,
    reason: Restart,
    run: RunFolder,
    world: World,
    find: Callable[[], SavedState | None],
) -> Attempt:
    """The attempt that replaces ``attempt``, which ended with ``reason``.

    find: returns the newest good checkpoint. ValueError with the diagnosis, and a dump in the run
    folder, if the last rollback did not help.
    """
    if isinstance(reason, NonFinite):
        return _roll_back(attempt, reason, run, find)
    assert isinstance(reason, DeadStart)
    run.warn(
        f"step {reason.step}: stuck, {reason.diagnosis}; starting again with other weights, "
        f"restart {attempt.dead_starts + 1} (--dead_restarts 0 trains on without restarts)"
    )
    # The dead attempt's checkpoints cannot learn either.
    if world.is_main:
        for path in [*checkpoint.list_checkpoints(run.folder), run.folder / BEST]:
            path.unlink(missing_ok=True)
    _forget_outputs(run, 0)
    run.close_tables()
    world.barrier()
    # Nothing of an earlier version goes on.
    return replace(attempt, saved=None, dead_starts=attempt.dead_starts + 1, mixed_seeds=True)


def _roll_back(
    attempt: Attempt, error: NonFinite, run: RunFolder, find: Callable[[], SavedState | None]
) -> Attempt:
    """The attempt from the newest checkpoint with other random numbers; see ``next_attempt``."""
    if error.step <= attempt.failed_at + monitor.MAX_SKIPPED:
        dumped = _write_dump(error, run)
        raise ValueError(
            f"{monitor.MAX_SKIPPED} updates in a row had NaN or infinite numbers, up to step "
            f"{error.step}, again after rolling back: {error.cause}{dumped}; lower --lrate, "
            "set --grad_clip 1, use --amp bf16 or off, or correct the data if the message names it"
        )
    saved = find()
    count = max(attempt.rollback_count, saved[1].get("draws", 0) if saved else 0) + 1
    target = saved[0].name if saved else "the start: there is no checkpoint yet"
    run.warn(
        f"step {error.step}: {monitor.MAX_SKIPPED} updates in a row were skipped because of "
        f"{error.cause}; rolling back to {target}, with other random numbers"
    )
    _forget_outputs(run, checkpoint.finished_updates(saved[1]) if saved else 0)
    run.close_tables()
    return replace(attempt, saved=saved, rollback_count=count, failed_at=error.step)


def _forget_outputs(run: RunFolder, step: int) -> None:
    """Remove what marks tests and videos of later steps as complete: they show other weights."""
    for folder in run.folder.glob("render_*_[0-9]*") if run.is_main else ():
        found = re.search(r"_(\d{6,})", folder.name)
        if found and int(found[1]) > step:
            for mark in [folder / "metrics.json", *folder.glob("*.mp4"), *folder.glob("*.gif")]:
                mark.unlink(missing_ok=True)


def _write_dump(error: NonFinite, run: RunFolder) -> str:
    """Save the tensors of the failed step, on the rank that has them; a note for the message."""
    if error.dump is None:
        return ""
    path = run.folder / f"broken_{error.step:06d}.pt"
    tensors = {name: value.detach().cpu() for name, value in error.dump.items()}
    try:
        torch.save({"step": error.step, "trouble": error.cause, **tensors}, path)
    except (OSError, RuntimeError):
        return ""
    return f" (its batch is in {path})"


# ----------------------------------------------------------------------------------------- memory


def out_of_memory(error: BaseException) -> bool:
    """Whether ``error`` means that the memory of a GPU or CPU is used up."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


def _reason(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@contextmanager
def explain_out_of_memory(advice: str) -> Iterator[None]:
    """Inside the block, an out-of-memory error becomes a ValueError of one line with ``advice``."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        raise ValueError(f"out of memory ({_reason(error)}); {advice}") from None


def halve_until_it_fits(
    job: Callable[[int], T],
    size: int,
    log: Callable[[str], None] = print,
    *,
    unit: str = "rays",
    advice: str = "lower --chunk, --N_rand, --netwidth or --N_samples",
) -> tuple[T, int]:
    """job(size), called again with half the size whenever memory runs out, and the size used.

    job must give the same result for every size, and work when it is called again after an error.
    It must not talk to other processes. ValueError with ``advice`` if memory runs out at size 1.
    """
    while True:
        try:
            return job(size), size
        except Exception as error:
            if not out_of_memory(error):
                raise
            reason = _reason(error)
        # Outside of the handler, because the error's traceback keeps the tensors alive.
        if size <= 1:
            raise ValueError(f"out of memory with {size} {unit} at a time ({reason}); {advice}")
        size //= 2
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        log(f"out of memory ({reason}); going on with {size} {unit} at a time")


class MicroBatches:
    """Accumulates a step's gradients over micro-batches, which are halved when memory runs out.

    Of several ranks each halves its own: the others wait for it in the all-reduce that averages the
    gradients, of which there is one a step however many micro-batches a rank needs.

    size: number of rays or views (``unit``) in a micro-batch; up to rounding, the gradients are
    those of the whole batch for every size. advice: see ``halve_until_it_fits``.
    """

    def __init__(
        self, size: int, world: World, log: Callable[[str], None], unit: str, advice: str
    ) -> None:
        self.size, self.unit, self.advice = size, unit, advice
        self.log, self.world = log, world

    def run(self, accumulate: Callable[..., T], *inputs: Any) -> T:
        """accumulate(*inputs, size), called again with half the size if memory runs out."""
        result, self.size = halve_until_it_fits(
            partial(accumulate, *inputs),
            self.size,
            self._say,
            unit=self.unit,
            advice=self.advice,
        )
        return result

    def _say(self, message: str) -> None:
        """Log it; other ranks than 0, whose log goes nowhere, print it with their number."""
        if self.world.is_main:
            self.log(message)
        else:
            print_to_stderr(f"rank {self.world.rank}: {message}")
