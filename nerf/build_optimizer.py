"""The optimizer of a run from flags: its parameter groups, and their learning rates."""

import argparse
import math
from typing import Any

from torch import nn

from nerf.build import grid_schedule

# Names of the parameter groups, in their order: features on grids have one of their own.
GROUPS = ("networks", "grid")


def parameter_groups(renderer: nn.Module, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Adam's parameter groups: features on grids have a learning rate of their own.

    "scale" is a group's factor on the learning rate.
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
        groups.append({"params": features, "scale": args.lrate_grid / args.lrate})
    return groups


def learning_rate(step: int, args: argparse.Namespace) -> float:
    """The learning rate of update ``step`` (0 is the first), with a linear warm-up.

    At every step of ``--grid_steps`` its decay starts again, as in TensoRF.
    """
    start = grid_schedule(args).latest(step)
    since, left = step - start, max(1, args.N_iters - start)
    warmup = min(1.0, (step + 1) / args.lrate_warmup) if args.lrate_warmup else 1.0
    if args.lr_schedule == "cosine":
        decay = 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, since / left)))
    else:
        decay = 0.1 ** (since / (args.lrate_decay * 1000))
    return args.lrate * warmup * decay
