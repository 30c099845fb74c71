"""The process: ranks, device, seeds, precision, signals. Correct with no process group at all."""

import os
import random
import signal
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

AMP_DTYPES = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class World:
    """This process among ``size`` of them; rank 0 writes."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def share(self, total: int) -> slice:
        """This rank's contiguous part of ``total`` items, which must divide evenly."""
        part = total // self.size
        return slice(self.rank * part, (self.rank + 1) * part)

    def gather(self, item) -> list:
        """Every rank's ``item`` (anything picklable), in rank order, on every rank."""
        if self.size == 1:
            return [item]
        items: list = [None] * self.size
        dist.all_gather_object(items, item)
        return items

    def largest(self, *values: float) -> list[float]:
        """The element-wise maximum of ``values`` over all ranks."""
        if self.size == 1:
            return list(values)
        numbers = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(numbers, dist.ReduceOp.MAX)
        return numbers.tolist()

    def total(self, value: float) -> float:
        """The sum of ``value`` over all ranks."""
        if self.size == 1:
            return value
        number = torch.tensor(value, dtype=torch.float64, device=self.device)
        dist.all_reduce(number)
        return number.item()

    @contextmanager
    def together(self):
        """What a disk refuses to one rank inside the block is an OSError on all of them.

        Or that rank would go on alone, while the others wait for it in their next message. Nothing
        inside the block may talk to other ranks.
        """
        error = None
        try:
            yield
        except OSError as caught:
            error = caught
        reasons = self.gather(None if error is None else error.strerror or str(error))
        if error is not None:
            raise error
        for rank, reason in enumerate(reasons):
            if reason is not None:
                raise OSError(f"{reason}, on rank {rank}")

    def average_gradients(self, parameters) -> None:
        """Replace every gradient by its mean over all ranks, in one message."""
        if self.size == 1:
            return
        gradients = [p.grad for p in parameters if p.grad is not None]
        flat = torch.cat([gradient.flatten() for gradient in gradients]) / self.size
        dist.all_reduce(flat)
        for gradient, mean in zip(
            gradients, flat.split([g.numel() for g in gradients]), strict=True
        ):
            gradient.copy_(mean.view_as(gradient))

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()


def setup(device: str) -> World:
    """Join the process group that ``torchrun`` announces, if any, and choose the device.

    device: auto, cpu, cuda, cuda:1 or mps. Under torchrun each process takes the GPU of its local
    rank (nccl), or the CPU (gloo).
    """
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    chosen = choose_device(device)
    if chosen.type == "cuda":
        chosen = torch.device("cuda", local_rank if size > 1 else chosen.index or 0)
        if chosen.index >= torch.cuda.device_count():
            raise ValueError(
                f"--device {device}: GPU {chosen.index} of {torch.cuda.device_count()}; "
                "start as many processes as there are GPUs"
            )
        torch.cuda.set_device(chosen)
    if size > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // size))
    return World(rank, size, chosen)


def choose_device(device: str) -> torch.device:
    """The torch device that a ``--device`` value names; "auto" takes cuda, then mps, then cpu."""
    if device == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise ValueError(f"--device {device}: expected auto, cpu, cuda, cuda:N or mps") from None
    missing = {
        "cuda": not torch.cuda.is_available(),
        "mps": not torch.backends.mps.is_available(),
        "cpu": False,
    }
    if missing.get(chosen.type, True):
        raise ValueError(f"--device {device}: not available here; use --device cpu or auto")
    return chosen


def cleanup() -> None:
    """Leave the process group, if one was joined."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def leave(code: int) -> None:
    """End this process with ``code``, everything being closed and ``cleanup`` done.

    One of several processes goes without the interpreter's own end: DDP and gloo leave threads
    behind that may still ask for Python's lock, and where it is gone they abort the process
    ("terminate called without an active exception", SIGABRT: on busy machines about once in a
    hundred ends), so that torchrun calls a finished run a failure.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def seed_everything(seed: int) -> None:
    """Seed python, numpy and torch. The same on every rank: it decides the initial weights.

    Draws of the training loop never come from these global states, see ``step_generator``.
    """
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def step_generator(seed: int, step: int, device) -> torch.Generator:
    """The source of every random number of one step: a pure function of (seed, step).

    Resuming needs no saved state. All ranks draw the same global batch and keep their share, so
    the result does not depend on how many there are.
    """
    generator = torch.Generator(device=device)
    # Consecutive seeds are unrelated in Philox (CUDA) but not in the CPU's Mersenne twister, whose
    # seeding mixes 32 bits; spread (seed, step) over them (Knuth's multiplicative hash).
    mixed = (seed * 0x9E3779B97F4A7C15 + step * 0xD1B54A32D192ED03 + 0x2545F4914F6CDD1D) % 2**64
    mixed ^= mixed >> 29
    return generator.manual_seed(mixed % 2**63)


def autocast(device: torch.device, amp: str):
    """Half precision for matrix products; a no-op for ``amp`` = "off"."""
    dtype = AMP_DTYPES[amp]
    if dtype is None:
        return nullcontext()
    return torch.autocast(device.type, dtype=dtype)


def grad_scaler(device: torch.device, amp: str) -> torch.amp.GradScaler:
    """Loss scaling, which float16's narrow range needs; a no-op for other precisions."""
    return torch.amp.GradScaler(device.type, enabled=amp == "fp16")


def map_on_threads(function: Callable, items: Iterable, device: torch.device) -> None:
    """Call ``function`` on every item; on a CPU on as many items at a time as it has threads.

    Each call then computes on one thread of its own. For work in small pieces that is far better
    than splitting every operation over all threads: those wait for one another at each.
    """
    threads = torch.get_num_threads()
    if device.type != "cpu" or threads == 1:
        for item in items:
            function(item)
        return
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            for _ in pool.map(function, items):
                pass  # raises what a call raised
    finally:
        torch.set_num_threads(threads)  # a part of that setting is global


def give_memory_back() -> None:
    """Hand what the C library keeps of freed memory back to the system (glibc; else nothing).

    Pictures and steps ask for blocks of other sizes. Between them its heap grows holes, for hours,
    though what is in use stays the same. Takes milliseconds.
    """
    import ctypes

    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim is not None:
        trim(0)


def peak_memory_mb(device: torch.device) -> float:
    """Peak memory so far: of the GPU where there is one, else of this process (resident)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    import resource

    status = Path("/proc/self/status")
    if status.exists():  # getrusage's figure includes that of the process which started this one
        for line in status.read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 2**10
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


class StopSignal:
    """Notes a signal of ``KINDS`` instead of dying; the loop looks at ``number`` once a step.

    SIGUSR1 is what SLURM sends ahead of a time limit (``--signal=USR1@60``).

    A second signal meets the default handler and ends the process at once.
    """

    KINDS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)

    def __init__(self) -> None:
        self.number = 0
        self._previous = {}

    def __enter__(self) -> "StopSignal":
        for number in self.KINDS:
            self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *exc) -> None:
        self._restore()

    def _note(self, number, frame) -> None:
        self.number = number
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()
