"""The processes of a run: rank, world size, device and collectives.

Everything also works in a single process without a process group, so that call sites never branch
on the number of processes.
"""

import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nerf.training.launch import MEETING, find_place
from nerf.training.plain_text import one_line
from nerf.training.system import Interrupted


@dataclass(frozen=True)
class World:
    """This process, number ``rank`` of ``size``. Only rank 0 writes files."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0

    def shard(self, total: int) -> slice:
        """This rank's contiguous part of ``total`` items, a multiple of ``size``."""
        part = total // self.size
        return slice(self.rank * part, (self.rank + 1) * part)

    def gather(self, item: Any) -> list[Any]:
        """Every rank's ``item`` in the order of ranks, on every rank. Items must be picklable."""
        if self.size == 1:
            return [item]
        items: list[Any] = [None] * self.size
        dist.all_gather_object(items, item)
        return items

    def all_reduce_max(self, *values: float) -> list[float]:
        """The element-wise maximum of ``values`` over all ranks."""
        if self.size == 1:
            return list(values)
        numbers = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(numbers, dist.ReduceOp.MAX)
        return numbers.tolist()

    def reduce_max(self, facts: Tensor, more: tuple[float, ...]) -> Tensor:
        """``facts`` [N] and the numbers ``more`` on the device, each its maximum over all ranks."""
        host = facts.new_tensor(more) if any(more) else facts.new_zeros(len(more))
        numbers = torch.cat([facts, host])
        if self.size > 1:
            dist.all_reduce(numbers, dist.ReduceOp.MAX)
        return numbers

    def all_reduce_sum(self, value: float) -> float:
        """The sum of ``value`` over all ranks."""
        if self.size == 1:
            return value
        number = torch.tensor(value, dtype=torch.float64, device=self.device)
        dist.all_reduce(number)
        return number.item()

    def all_reduce_mean(self, *values: float) -> list[float]:
        """The mean of each of ``values`` over all ranks; of one process, ``values``."""
        if self.size == 1:
            return list(values)
        numbers = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(numbers)
        return (numbers / self.size).tolist()

    @contextmanager
    def raise_on_all_ranks(self) -> Iterator[None]:
        """An OSError or Interrupted of one rank in the block is raised on all ranks at its end.

        Otherwise the others would wait for that rank in their next collective. The block must not
        call collectives itself.
        """
        error: OSError | Interrupted | None = None
        try:
            yield
        except (OSError, Interrupted) as caught:
            error = caught
        reason = error.strerror or str(error) if isinstance(error, OSError) else None
        signal = error.number if isinstance(error, Interrupted) else None
        found = self.gather((reason, signal))
        if error is not None:
            raise error
        for rank, (reason, signal) in enumerate(found):
            if signal is not None:
                raise Interrupted(signal)
            if reason is not None:
                raise OSError(f"{reason}, on rank {rank}")

    def average_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Replace every gradient by its mean over all ranks, with one all-reduce."""
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
        """Wait until every rank has come here."""
        if self.size > 1:
            dist.barrier()


def print_to_stderr(line: str) -> None:
    """Print before there is a log."""
    print(one_line(line), file=sys.stderr)


def setup(device: str) -> World:
    """Join the process group if ``torchrun`` has started this process, and choose the device.

    device: auto, cpu, cuda, cuda:1 or mps. Under torchrun each process takes the GPU of its local
    rank (nccl), or the CPU (gloo). ValueError if the device does not exist.
    """
    rank, size, local_rank = find_place()
    chosen = choose_device(device, print_to_stderr if rank == 0 else None)
    if chosen.type == "cuda":
        chosen = torch.device("cuda", local_rank if size > 1 else chosen.index or 0)
        if chosen.index >= torch.cuda.device_count():
            raise ValueError(
                f"--device {device}: GPU {chosen.index}, but only {torch.cuda.device_count()} GPUs "
                "found; start at most one process per GPU"
            )
        torch.cuda.set_device(chosen)
    if size > 1 and not dist.is_initialized():
        try:
            backend = "nccl" if chosen.type == "cuda" else "gloo"
            dist.init_process_group(backend, store=_store(), rank=rank, world_size=size)
        except (RuntimeError, ValueError) as error:
            place = ":".join(os.environ.get(name, "") for name in MEETING)
            raise ValueError(
                f"the {size} processes cannot connect at {place} ({str(error).splitlines()[0]}); "
                f"check {' and '.join(MEETING)}, or start them with torchrun"
            ) from None
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // size))
    return World(rank, size, chosen)


def _store() -> dist.Store | None:
    """Where the processes that torchrun has started on one machine meet; None: where torch says.

    torchrun keeps one store for all of its restarts, in which a process would find addresses of
    those before; so each restart gets keys of its own. Several machines count restarts apart.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    if os.environ.get("GROUP_WORLD_SIZE") != "1":
        return None
    store = next(dist.rendezvous("env://"))[0]
    return dist.PrefixStore(f"start_{os.environ.get('TORCHELASTIC_RESTART_COUNT')}", store)


def find_cuda() -> tuple[bool, str]:
    """Whether an NVIDIA GPU can be used; if torch has a reason why not, its first sentence.

    The usual one is a driver that is too old for this build of torch.
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = torch.cuda.is_available()
    reasons = [] if found else [str(warning.message).strip() for warning in caught]
    return found, reasons[0].splitlines()[0].split(". ")[0] if reasons else ""


def choose_device(device: str, log: Callable[[str], None] | None = None) -> torch.device:
    """The device that ``--device`` names; "auto" takes cuda, else mps, else cpu.

    log: gets a line if there is a GPU that cannot be used. ValueError if the device does not exist.
    """
    has_cuda, reason = find_cuda()
    if device == "auto":
        if has_cuda:
            return torch.device("cuda")
        if reason and log is not None:
            log(f"the GPU is not used: {reason}")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise ValueError(f"--device {device}: expected auto, cpu, cuda, cuda:N or mps") from None
    missing = {
        "cuda": not has_cuda,
        "mps": not torch.backends.mps.is_available(),
        "cpu": False,
    }
    if missing.get(chosen.type, True):
        why = f" ({reason})" if reason and chosen.type == "cuda" else ""
        raise ValueError(f"--device {device}: not available here{why}; use --device cpu or auto")
    return chosen


class _Averaged(nn.Module):
    """A module for DDP that, called without inputs, gives a loss of 0 with a gradient of 0.

    Its backward pass changes no gradient, and lets DDP average those that micro-batches have left.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *inputs: Any) -> Any:
        if inputs:
            return self.module(*inputs)
        trained = [p for p in self.module.parameters() if p.requires_grad]
        left = [p for p in trained if p.grad is not None] or trained
        return torch.stack([0.0 * parameter.sum() for parameter in left]).sum()


def data_parallel(
    world: World, module: nn.Module, *, find_unused_parameters: bool = False
) -> nn.Module:
    """The module to call: with several processes, one in DistributedDataParallel.

    Micro-batches are called within ``without_sync``, so that a rank whose memory runs out may take
    smaller ones: no other waits for an all-reduce that it has begun. ``sync_gradients`` follows.
    Buffers are not sent around: every rank updates the occupancy grid alike.
    """
    if world.size == 1:
        return module
    return nn.parallel.DistributedDataParallel(
        _Averaged(module),
        broadcast_buffers=False,
        gradient_as_bucket_view=True,
        find_unused_parameters=find_unused_parameters,
    )


def without_sync(model: nn.Module) -> AbstractContextManager[None]:
    """Inside the block, DDP leaves gradients as they are on each rank."""
    if isinstance(model, nn.parallel.DistributedDataParallel):
        return model.no_sync()
    return nullcontext()


def sync_gradients(model: nn.Module) -> None:
    """Let DDP average the gradients of all ranks, once for all micro-batches of a step."""
    if isinstance(model, nn.parallel.DistributedDataParallel):
        model().backward()


def lost_process(error: RuntimeError) -> str:
    """In what words ``error`` says that a collective failed since another process ended; or ""."""
    if not (dist.is_available() and dist.is_initialized()):
        return ""
    signs = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "timed out")
    said = [sign for sign in (*signs, "gloo", "NCCL") if sign.lower() in str(error).lower()]
    return said[0] if said else type(error).__name__ * isinstance(error, dist.DistError)


def cleanup() -> None:
    """Leave the process group, if this process is in one."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
