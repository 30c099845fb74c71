"""How fast this machine could be at best: short measurements of matrix products and of gathering.

A field's ceiling is the rate at which its samples could be trained if nothing else had to be done:
no marching, no activations, no compositing, no optimizer, no guidance.
"""

import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from nerf.training import system
from nerf.training.distributed import World
from nerf.training.progress import amount

PROBE_SECONDS = 0.025  # each, of matrix products and of gathering
COUNTED = 1024  # points of the forward pass whose operations are counted
NUMBERS = 1 << 21  # in the probe's matrices on a CPU: they fit into the cache, as in training
BACKWARD = 2  # a backward pass takes twice the products and the memory accesses of a forward one

# field(points [N, 3], viewdirs [R, 3], ray_indices [N])
FieldCall = Callable[[Tensor, Tensor, Tensor], object]


def samples_ceiling(fields: Sequence[nn.Module], device: torch.device, amp: str) -> float:
    """Samples/s that ``device`` could train at most, forward and backward; the fields' mean.

    fields: each with its layers' ``width``, and with an ``encoding`` if it has feature grids. amp:
    the precision of the run (--amp). On a GPU the host waits for it, so call this before training.
    """
    seconds = [_seconds_per_sample(field, device, amp) for field in fields]
    return len(seconds) / sum(seconds)


def log_ceiling(
    fields: Sequence[nn.Module], world: World, amp: str, log: Callable[[str], None]
) -> float:
    """``samples_ceiling`` of all ranks together, with a line in the log; 0 without a field."""
    if not fields:
        return 0.0
    ceiling = world.all_reduce_sum(samples_ceiling(fields, world.device, amp))
    log(
        f"upper limit of this {world.device.type.upper()}: {amount(ceiling)} samples/s (only the "
        "networks' matrix products and the feature lookups)"
    )
    return ceiling


def _seconds_per_sample(field: nn.Module, device: torch.device, amp: str) -> float:
    width = field.width
    assert isinstance(width, int)
    seconds = flops_per_sample(field, device) / product_rate(width, device, amp)
    encoding = getattr(field, "encoding", None)
    tables = list(encoding.parameters()) if isinstance(encoding, nn.Module) else []
    if tables:
        numbers = sum(numbers_read(table) for table in tables)
        seconds += numbers / gather_rate(max(tables, key=Tensor.numel), device)
    return seconds * (1 + BACKWARD)


def flops_per_sample(field: nn.Module, device: torch.device) -> float:
    """Floating point operations of the matrix products of a sample's forward pass."""
    points = torch.zeros(COUNTED, 3, device=device)
    rays = torch.zeros(COUNTED, dtype=torch.long, device=device)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        field(points, points[:1] + 1, rays)
    return counter.get_total_flops() / COUNTED


def numbers_read(table: Tensor) -> int:
    """Numbers that an interpolated lookup reads: the corners' channels.

    table: planes [P, C, H, W], 4 corners in each, or rows [N, C] of a 3D grid, 8 corners.
    """
    return 4 * table.shape[0] * table.shape[1] if table.dim() == 4 else 8 * table.shape[-1]


def product_rate(width: int, device: torch.device, amp: str) -> float:
    """Measured operations per second of matrix products [N, width] x [width, width]."""
    rows = (NUMBERS if device.type == "cpu" else 16 * NUMBERS) // width
    inputs, weights = torch.ones(rows, width, device=device), torch.eye(width, device=device)
    dtype = system.AMP_DTYPES[amp] or torch.float32
    inputs, weights = inputs.to(dtype), weights.to(dtype)
    return 2 * rows * width**2 / best_seconds(lambda: inputs @ weights, device)


def gather_rate(table: Tensor, device: torch.device) -> float:
    """Measured numbers per second of reading rows at random places of a table of this size."""
    channels = table.shape[1]
    rows = table.numel() // channels
    values = torch.ones(rows, channels, device=device)
    count = NUMBERS // channels
    places = torch.randint(rows, (count,), generator=torch.Generator().manual_seed(0)).to(device)
    return count * channels / best_seconds(lambda: values.index_select(0, places), device)


def best_seconds(call: Callable[[], object], device: torch.device) -> float:
    """The shortest time of a call, over PROBE_SECONDS of calls after two for warming up."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    best, repeats = float("inf"), 1 if device.type == "cpu" else 10
    for _ in range(2):
        call()
    wait()
    end = time.perf_counter() + PROBE_SECONDS
    while True:
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        wait()
        now = time.perf_counter()
        best = min(best, (now - start) / repeats)
        if now >= end:
            return best
