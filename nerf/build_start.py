"""Where a text-to-3D run starts from flags: another run's object (``--init_from``)."""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from nerf import build
from nerf.flags import dreamfusion as dream_flags
from nerf.text3d import refit
from nerf.text3d.particles import members_of
from nerf.text3d.renderer import ObjectRenderer
from nerf.training import checkpoint
from nerf.training.checkpoint_choice import newest_checkpoint
from nerf.training.ema import EMA
from nerf.training.state import TrainState

Log = Callable[[str], None]


def check_object(name: str, saved: dict[str, Any]) -> None:
    """ValueError if a checkpoint is not of run_dreamfusion.py."""
    if "guidance" not in (saved.get("args") or {}):
        program = "run_nerf.py" if "N_rand" in (saved.get("args") or {}) else "another program"
        raise ValueError(f"{name}: a checkpoint of {program}; give one of run_dreamfusion.py")


def find_start(args: argparse.Namespace, log: Log) -> checkpoint.SavedState:
    """The checkpoint of ``--init_from``, a file or the newest of a run folder.

    ValueError if there is none, or if this run's object cannot be made of that one.
    """
    path = Path(args.init_from)
    found = newest_checkpoint(path, log) if path.is_dir() else None
    if path.is_dir() and found is None:
        raise ValueError(f"--init_from {path}: the folder has no checkpoint; name another run")
    path, saved = found or (path, checkpoint.load_checkpoint(path))
    check_object(f"--init_from {path}", saved)
    if changes := dream_flags.object_changes(saved["args"], args):
        raise ValueError(
            f"--init_from {path}: its object was made with other flags "
            f"({'; '.join(changes)}); use those flags"
        )
    return path, saved


def start_from(args: argparse.Namespace, log: Log, state: TrainState[Any]) -> None:
    """``--init_from``: another run's object, as its pictures show it; all else is new.

    A field of the same flags takes its weights. Tri-planes of another size are resampled; a field
    of another kind or size is fitted to the old one.
    """
    path, saved = find_start(args, log)
    changes, decay = dream_flags.field_changes(saved["args"], args), saved["args"].get("ema_decay")
    old: Any = state.renderer
    if changes:
        old = _old_object(args, saved["args"], state.renderer)
    averaged = EMA(old, decay or 0.0)
    checkpoint.restore(path, saved, log, old, ema=averaged)
    averaged.keep()
    log(f"starting from the object of {path}")
    if changes:
        for (_, new), (_, source) in zip(members_of(state.renderer), members_of(old), strict=True):
            assert isinstance(new, ObjectRenderer) and isinstance(source, ObjectRenderer)
            _take(new, source, args.seed, "; ".join(changes), log)
    state.ema.reset()


def _old_object(
    args: argparse.Namespace, saved: dict[str, Any], renderer: torch.nn.Module
) -> torch.nn.Module:
    """The renderer that the flags ``saved`` describe, on the device of ``renderer``."""
    names = (*dream_flags.STRUCTURAL, "march_steps", "normals")
    flags = {**vars(args), **{name: saved[name] for name in names if name in saved}}
    device = next(renderer.parameters()).device
    with torch.random.fork_rng(devices=[]):  # what it draws is overwritten
        return build.object_renderer(argparse.Namespace(**flags), device).to(device)


def _take(new: ObjectRenderer, old: ObjectRenderer, seed: int, changes: str, log: Log) -> None:
    """Make ``new`` the object ``old``: its occupancy grid, background and field."""
    if new.grid.resolution == old.grid.resolution:  # else its first update fills it
        new.grid.load_state_dict(old.grid.state_dict())
    if new.background_net is not None and old.background_net is not None:
        new.background_net.load_state_dict(old.background_net.state_dict())
    if refit.resample(new.field, old.field):
        log(f"its weights are taken, resampled to this run's grids ({changes})")
        return
    start = time.perf_counter()
    error = refit.fit(new, old, seed)
    log(
        f"another field ({changes}), fitted in {refit.STEPS} steps and "
        f"{time.perf_counter() - start:.0f} s; inside the object, alpha differs by "
        f"{error.alpha:.4f} and albedo by {error.albedo:.4f} on average"
    )
