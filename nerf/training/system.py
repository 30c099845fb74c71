"""The machine under a run: precision, threads, memory and signals."""

import os
import signal
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import FrameType
from typing import Any, Self, TypeVar

import torch

T = TypeVar("T")

AMP_DTYPES = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(device: torch.device, amp: str) -> AbstractContextManager[Any]:
    """The context of matrix products in half precision; of no effect for ``amp`` "off"."""
    dtype = AMP_DTYPES[amp]
    if dtype is None:
        return nullcontext()
    return torch.autocast(device.type, dtype=dtype)


def cpu_has_bfloat16() -> bool:
    """Whether this CPU has the instructions for fast matrix products in bfloat16.

    PyTorch's own test for its oneDNN kernels: AVX512 on x86, BF16 on ARM. Without them a matrix
    product in bfloat16 takes about 20 times as long as in float32.
    """
    return torch.backends.mkldnn.is_available() and bool(
        torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


def usable_amp(amp: str, device: torch.device, log: Callable[[str], None]) -> str:
    """``amp``; but "off", with a line in the log, for bf16 on a CPU that is slower with it."""
    if amp == "bf16" and device.type == "cpu" and not cpu_has_bfloat16():
        log(
            "--amp bf16 is ignored: this CPU has no bfloat16 arithmetic, so float32 is used, which "
            "is 20 times as fast"
        )
        return "off"
    return amp


def configure_gpu(tf32: bool, device: torch.device, log: Callable[[str], None]) -> None:
    """Settings of an NVIDIA GPU: whether float32 products may round their inputs to TF32."""
    if device.type != "cuda":
        return
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = tf32
    # Sizes of pictures hardly change during a run; what is fastest may differ between two runs.
    torch.backends.cudnn.benchmark = not torch.are_deterministic_algorithms_enabled()
    if tf32:
        log("float32 matrix products use TF32 (10-bit mantissa); --tf32 off: full float32")


def grad_scaler(device: torch.device, amp: str) -> torch.amp.GradScaler:
    """Loss scaling, which float16's narrow range needs; of no effect for other precisions."""
    return torch.amp.GradScaler(device.type, enabled=amp == "fp16")


def update_if_finite(optimizer: torch.optim.Optimizer, finite: torch.Tensor) -> None:
    """``optimizer.step()`` with unscaled gradients, of no effect where ``finite`` [] is False.

    A fused optimizer decides that on the device by ``found_inf``, as in GradScaler.step, so that
    the host does not wait. Other optimizers wait.
    """
    if all(group.get("fused") for group in optimizer.param_groups):
        optimizer.found_inf = (~finite).float()  # type: ignore[attr-defined]  # torch sets it so
        optimizer.step()
        del optimizer.found_inf  # type: ignore[attr-defined]
    elif bool(finite):
        optimizer.step()


def upload(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A small tensor of the CPU on ``device``; the host does not wait for the GPU's other work."""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def map_on_threads(
    function: Callable[[T], object], items: Iterable[T], device: torch.device
) -> None:
    """Call ``function`` on every item; on a CPU, on as many items at a time as torch has threads.

    Each call then computes on a single thread. For small items that is much faster than splitting
    every operation over all threads, which wait for each other after each operation.
    """
    threads = torch.get_num_threads()
    if device.type != "cpu" or threads == 1:
        for item in items:
            function(item)
        return
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            for _ in pool.map(function, items):
                pass  # raises the first exception of a call
    finally:
        torch.set_num_threads(threads)  # the pool's threads changed a part of it for all


def release_memory() -> None:
    """Return freed memory that the C library keeps to the system (glibc only; else do nothing).

    Renders and training steps allocate blocks of different sizes, which fragments the heap: without
    this call it grows for hours, though the memory in use stays the same. Takes milliseconds.
    """
    import ctypes

    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim is not None:
        trim(0)


def peak_memory_mb(device: torch.device) -> float:
    """Peak memory so far in MiB: on the GPU, or on a CPU the resident memory of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    import resource

    status = Path("/proc/self/status")
    if status.exists():  # getrusage's value includes that of the parent process
        for line in status.read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 2**10
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


class Interrupted(Exception):
    """A stop signal came while pictures were being rendered. number: of the signal, if known."""

    def __init__(self, number: int = 0) -> None:
        super().__init__(number)
        self.number = number


class StopSignal:
    """Inside its block, a signal of ``KINDS`` sets ``number`` instead of ending the process.

    The loop reads ``number`` once per step; 0: no signal has come. SLURM sends SIGUSR1 before a
    time limit (``--signal=USR1@60``). A second signal meets the previous handler, which usually
    ends the process at once.
    """

    KINDS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)

    def __init__(self) -> None:
        self.number = 0
        self._previous: dict[signal.Signals, Any] = {}  # their handlers outside of the block

    def is_set(self) -> bool:
        """Whether a signal has come."""
        return self.number != 0

    def check(self) -> None:
        """Raise Interrupted if a signal has come."""
        if self.number:
            raise Interrupted(self.number)

    def __enter__(self) -> Self:
        for number in self.KINDS:
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *error: object) -> None:
        self._restore()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.number = number
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()
