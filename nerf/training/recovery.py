"""What a run does about numbers that are not finite, and about memory that does not suffice.

An update with NaN or infinity anywhere is left out, on all ranks together. After ``MAX_SKIPPED``
in a row the run goes back to its last good checkpoint and draws other random numbers from there;
if that does not lead past the place, it stops, with a diagnosis and a dump.
"""

import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

MAX_SKIPPED = 100  # float16's loss scale alone may need some 40 to come down
OTHER_DRAWS = 1_000_003  # added to the seed at every return; seeds tried for dead starts are near


class NonFinite(Exception):
    """Too many updates in a row were left out. trouble: what was not finite first, of any rank."""

    def __init__(self, step: int, cause: str, dump: dict | None):
        super().__init__(cause)
        self.step, self.cause, self.dump = step, cause, dump


class FiniteWatch:
    """Counts the updates that were left out; all of them are in ``skipped``."""

    def __init__(self) -> None:
        self.skipped = self.in_row = 0

    def count(self, broken: bool, step: int, world, found: Callable[[], tuple[str, dict]]) -> None:
        """After update ``step``, which was ``broken`` (on all ranks alike) or not.

        found(): what is not finite on this rank ("" if nothing is) and the tensors to dump; asked
        for at the last one only. NotFinite after MAX_SKIPPED in a row.
        """
        self.in_row = self.in_row + 1 if broken else 0
        self.skipped += bool(broken)
        if self.in_row < MAX_SKIPPED:
            return
        own, dump = found()
        said = world.gather(own)
        rank = next((number for number, text in enumerate(said) if text), 0)
        cause = said[rank] or "the gradient"
        if world.size > 1:
            cause += f" on rank {rank}"
        raise NonFinite(step, cause, dump if world.rank == rank else None)


def first_non_finite(**tensors: Tensor | None) -> str:
    """The name of the first that is not finite, and how much of it; "" if all are."""
    for name, value in tensors.items():
        if value is None:
            continue
        bad = ~value.detach().isfinite()
        if bad.any():
            kind = "NaN" if value.detach().isnan().any() else "infinity"
            return f"{name.replace('_', ' ')} ({kind} in {int(bad.sum())} of {bad.numel()} numbers)"
    return ""


def non_finite_gradients(module: nn.Module) -> str:
    """Which weights' gradients are not finite, of those that a backward pass has left."""
    names = [
        name
        for name, parameter in module.named_parameters()
        if parameter.grad is not None and not parameter.grad.isfinite().all()
    ]
    return f"the gradients of {len(names)} weights, such as {names[0]}" if names else ""


class Rollback:
    """Ways back: how often the run may go back to its last good checkpoint, and what it then says.

    draws: returns so far, saved in checkpoints; they choose the random numbers.
    """

    def __init__(self, draws: int = 0):
        self.rollback_count, self._failed_at = draws, -math.inf

    def offset(self) -> int:
        """What to add to the seed of every step."""
        return self.rollback_count * OTHER_DRAWS

    def roll_back(self, error: NonFinite, run, find: Callable):
        """The checkpoint (path, state) to go on from, or None: anew; with other draws from now on.

        find(): the newest good one. ValueError with the diagnosis, and a dump in the run folder,
        if the last return did not lead past this place.
        """
        again = error.step <= self._failed_at + MAX_SKIPPED
        if again:
            dumped = _write_dump(error, run)
            raise ValueError(
                f"{MAX_SKIPPED} updates in a row had NaN or infinite numbers, up to step "
                f"{error.step}, again after going back: {error.trouble}{dumped}; lower --lrate, "
                "set --grad_clip 1, use --amp bf16 or off, or mend the data it names"
            )
        found = find()
        self._failed_at = error.step
        self.rollback_count = max(self.rollback_count, found[1].get("draws", 0) if found else 0) + 1
        place = f"{found[0].name}" if found else "the start: there is no checkpoint yet"
        run.log(
            f"step {error.step}: {MAX_SKIPPED} updates in a row left out, {error.trouble}; going "
            f"back to {place}, with other random numbers"
        )
        run.close_tables()
        return found


def _write_dump(error: NonFinite, run) -> str:
    """The tensors of the broken step beside the checkpoints, by the rank that has them."""
    if error.dump is None:
        return ""
    path = Path(run.folder) / f"broken_{error.step:06d}.pt"
    tensors = {
        name: value.detach().cpu() if isinstance(value, Tensor) else value
        for name, value in error.dump.items()
    }
    try:
        torch.save({"step": error.step, "trouble": error.cause, **tensors}, path)
    except (OSError, RuntimeError):
        return ""
    return f" (its batch is in {path})"


# ----------------------------------------------------------------------------------- memory


def out_of_memory(error: BaseException) -> bool:
    """Whether ``error`` says that memory ran out, on a GPU or a CPU."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


def too_large(error: BaseException) -> str:
    """What to say where nothing can be halved."""
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return (
        f"out of memory ({reason}); make something smaller: --N_rand, --chunk, --netwidth, "
        "--N_samples, --N_importance, --grid_res, --occ_res, --mesh_res or the pictures"
    )


def halve_until_it_fits(
    job: Callable,
    size: int,
    log=print,
    *,
    may_halve: bool = True,
    unit: str = "rays",
    advice: str = "lower --chunk, --N_rand, --netwidth or --N_samples",
):
    """(job(size), size), with ``size``, rays at a time, halved whenever memory runs out.

    job must give the same whatever the size, and bear being broken off and called again. ValueError
    with ``advice`` at one, or without ``may_halve``: of several processes the others would wait.
    """
    while True:
        try:
            return job(size), size
        except Exception as error:
            if not out_of_memory(error):
                raise
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        # Out of the handler: the error's traceback held what filled the memory.
        if size <= 1 or not may_halve:
            raise ValueError(f"out of memory with {size} {unit} at a time ({reason}); {advice}")
        size //= 2
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        log(f"out of memory ({reason}); going on with {size} {unit} at a time")
