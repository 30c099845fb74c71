"""Runs that repeat to the bit (``--deterministic``)."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

# cuBLAS reads it when it starts: one workspace for each stream makes its sums repeat.
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
    log("deterministic algorithms: the same machine, threads and processes give the same bits")
    try:
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
