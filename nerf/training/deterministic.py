"""Runs that repeat to the bit (``--deterministic``)."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

# cuBLAS reads it when it starts: workspaces of a fixed size make its sums repeat.
WORKSPACE = ("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
REFUSED = "does not have a deterministic implementation"  # in torch's own message


@contextmanager
def deterministic(enabled: bool, log: Callable[[str], None]) -> Iterator[None]:
    """Inside the block, if ``enabled``, PyTorch adds up in the same order in every run.

    ValueError, which names the operation, where it has no such implementation.
    """
    if not enabled:
        yield
        return
    cudnn = torch.backends.cudnn
    before = torch.are_deterministic_algorithms_enabled(), cudnn.deterministic, cudnn.benchmark
    os.environ.setdefault(*WORKSPACE)
    torch.use_deterministic_algorithms(True)
    cudnn.deterministic, cudnn.benchmark = True, False
    log(
        "deterministic algorithms: a run repeated on the same machine, with as many threads and "
        "processes, is identical to the bit"
    )
    try:
        with RunningSums():
            yield
    except RuntimeError as error:
        if REFUSED not in str(error):
            raise
        operation = str(error).strip().split()[0]
        raise ValueError(
            f"--deterministic: {operation} has no deterministic implementation in PyTorch "
            f"{torch.__version__} on this device; leave the flag out, or use --device cpu"
        ) from error
    finally:
        torch.use_deterministic_algorithms(before[0])
        cudnn.deterministic, cudnn.benchmark = before[1:]


class RunningSums(TorchFunctionMode):
    """torch.cumsum of real numbers on a GPU, where PyTorch refuses it: no ray could be rendered."""

    def __torch_function__(
        self, func: Any, types: Any, values: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in (torch.cumsum, Tensor.cumsum) and is_refused(values[0]):
            return running_sum(*values, **(kwargs or {}))
        return func(*values, **(kwargs or {}))


def is_refused(values: Tensor) -> bool:
    """Whether torch.cumsum of ``values`` has no deterministic implementation."""
    return values.is_cuda and values.is_floating_point()


def running_sum(values: Tensor, dim: int, *, dtype: torch.dtype | None = None) -> Tensor:
    """torch.cumsum along ``dim``, by sums over 2, 4, 8, ... neighbors (Hillis and Steele 1986)."""
    total, shift = values if dtype is None else values.to(dtype), 1
    size = total.shape[dim]
    while shift < size:
        head, rest = total.narrow(dim, 0, shift), total.narrow(dim, 0, size - shift)
        total = torch.cat([head, total.narrow(dim, shift, size - shift) + rest], dim)
        shift *= 2
    return total
