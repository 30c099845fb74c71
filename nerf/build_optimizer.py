"""The optimizer of a run from flags: its kind, parameter groups, and learning rates."""

import argparse
import math
from typing import Any

import torch
from torch import nn

from nerf.build import grid_schedule
from nerf.training.schedules import scheduled, value_at

# Names of the parameter groups, in their order: features on grids have one of their own.
GROUPS = ("networks", "grid")
OPTIMIZERS = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}


def make_optimizer(
    renderer: nn.Module, args: argparse.Namespace, device: torch.device
) -> torch.optim.Optimizer:
    """The optimizer of ``renderer``'s weights (``--optim``).

    Without --adam_betas and --adam_eps they are nerf-pytorch's for the vanilla NeRF, and those of
    Instant-NGP for everything with an occupancy grid, whose gradients are smaller.
    """
    has_grid = getattr(args, "occ_grid", True)  # text to 3D has no such flag, and always one
    betas, eps = ((0.9, 0.99), 1e-15) if has_grid else ((0.9, 0.999), 1e-8)
    return OPTIMIZERS[args.optim](
        parameter_groups(renderer, args),
        lr=value_at(args.lrate, 0),
        betas=tuple(args.adam_betas or betas),
        eps=eps if args.adam_eps is None else args.adam_eps,
        weight_decay=args.weight_decay,
        fused=device.type in ("cpu", "cuda"),
    )


def parameter_groups(renderer: nn.Module, args: argparse.Namespace) -> list[dict[str, Any]]:
    """The optimizer's parameter groups: features on grids have a learning rate of their own.

    "scale" is a group's factor on the learning rate of update 0; checkpoints have it.
    """
    features: list[nn.Parameter] = []
    for member in getattr(renderer, "members", [renderer]):
        field = getattr(member, "field", None)
        if field is not None and args.field != "mlp":
            features += field.encoding.parameters()
    others = set(renderer.parameters()) - set(features)
    groups: list[dict[str, Any]] = [
        {"params": [p for p in renderer.parameters() if p in others], "scale": 1.0}
    ]
    if features:
        scale = value_at(args.lrate_grid, 0) / value_at(args.lrate, 0)
        groups.append({"params": features, "scale": scale})
    return groups


def learning_rate(step: int, args: argparse.Namespace, start: float | None = None) -> float:
    """The learning rate of update ``step`` (0 is the first), with a linear warm-up.

    At every step of ``--grid_steps`` its decay starts again, as in TensoRF. start: the rate before
    warm-up and decay; None: --lrate, which as a schedule has neither.
    """
    if start is None and isinstance(args.lrate, str):
        return scheduled(args.lrate, step)
    latest = grid_schedule(args).latest(step)
    since, left = step - latest, max(1, args.N_iters - latest)
    warmup = min(1.0, (step + 1) / args.lrate_warmup) if args.lrate_warmup else 1.0
    if args.lr_schedule == "cosine":
        decay = 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, since / left)))
    else:
        decay = 0.1 ** (since / (args.lrate_decay * 1000))
    return (args.lrate if start is None else start) * warmup * decay


def set_learning_rates(
    optimizer: torch.optim.Optimizer, step: int, args: argparse.Namespace
) -> None:
    """Set the learning rate of update ``step`` in every group, as --lrate or --lrate_grid says."""
    lr, grid = learning_rate(step, args), args.lrate_grid
    for number, group in enumerate(optimizer.param_groups):
        group["lr"] = lr * group["scale"]  # 1 for networks, more for features on grids
        if number and isinstance(grid, str):
            group["lr"] = scheduled(grid, step)
        elif number and isinstance(args.lrate, str):
            group["lr"] = learning_rate(step, args, grid)
