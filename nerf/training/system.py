"""The machine under a run: precision, threads, memory and signals."""

import os
import signal
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path

import torch

AMP_DTYPES = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(device: torch.device, amp: str):
    """Half precision for matrix products; a no-op for ``amp`` = "off"."""
    dtype = AMP_DTYPES[amp]
    if dtype is None:
        return nullcontext()
    return torch.autocast(device.type, dtype=dtype)


def cpu_has_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 matrices by instructions of its own.

    It is PyTorch's own test, for its oneDNN kernels: AVX512 on x86, BF16 on ARM. Without them a
    matrix product in bfloat16 takes about 20 times as long as in float32.
    """
    return torch.backends.mkldnn.is_available() and bool(
        torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


def usable_amp(amp: str, device: torch.device, log: Callable[[str], None]) -> str:
    """``amp``; but "off", with a line in the log, where it would only make the run slower."""
    if amp == "bf16" and device.type == "cpu" and not cpu_has_bfloat16():
        log("--amp bf16 -> off: this CPU has no bfloat16 arithmetic, float32 is 20 times as fast")
        return "off"
    return amp


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


def release_memory() -> None:
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

    def is_set(self) -> bool:
        """Whether a signal has come."""
        return self.number != 0

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
