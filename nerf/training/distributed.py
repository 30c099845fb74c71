"""The processes of a run: rank, world size, device and collectives.

Correct with no process group at all, so that call sites never branch on the number of processes.
"""

import os
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class World:
    """This process among ``size`` of them; rank 0 writes."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def shard(self, total: int) -> slice:
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

    def all_reduce_max(self, *values: float) -> list[float]:
        """The element-wise maximum of ``values`` over all ranks."""
        if self.size == 1:
            return list(values)
        numbers = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(numbers, dist.ReduceOp.MAX)
        return numbers.tolist()

    def all_reduce_sum(self, value: float) -> float:
        """The sum of ``value`` over all ranks."""
        if self.size == 1:
            return value
        number = torch.tensor(value, dtype=torch.float64, device=self.device)
        dist.all_reduce(number)
        return number.item()

    @contextmanager
    def raise_on_all_ranks(self):
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
