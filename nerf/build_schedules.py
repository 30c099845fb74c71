"""What changes from update to update, from flags: weights, cameras, light; and its log."""

import argparse
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from nerf.flags.dreamfusion import SCHEDULES
from nerf.flags.modes import SHAPE_LOSSES
from nerf.text3d.orbit import OrbitRanges
from nerf.text3d.shading import LightingSettings
from nerf.training.schedules import is_schedule, scheduled, stepped, value_at

# Flags of run_nerf.py that the renderer has as an attribute, and which may be schedules.
OF_SCENES = ("raw_noise_std", "lambda_tv", "lambda_l1")
RATES = ("lrate", "lrate_grid", "lrate_lora")  # logged as lr, lr_grid and lr_lora


def set_scheduled(
    args: argparse.Namespace, renderer: nn.Module, step: int, *, recorded: bool
) -> None:
    """Give a scene's renderer the values at ``step`` of those of its flags that are schedules.

    recorded: steps are recorded as CUDA graphs or compiled, which keeps every number of Python as
    it was: the numbers are then on the device, and change in place.
    """
    for name in OF_SCENES:
        value = getattr(args, name)
        if not is_schedule(value) or not hasattr(renderer, name):
            continue
        number, present = scheduled(value, step), getattr(renderer, name)
        if isinstance(present, Tensor):
            present.fill_(number)
        elif recorded:
            device = next(renderer.parameters()).device
            setattr(renderer, name, torch.full((), number, device=device))
        else:
            setattr(renderer, name, number)
    if is_schedule(args.target_samples) and hasattr(renderer, "target_samples"):
        renderer.target_samples = stepped(args.target_samples, step)  # type: ignore[assignment]


def scheduled_flags(args: argparse.Namespace, step: int) -> dict[str, Any]:
    """The values at ``step`` of text to 3D's flags that are schedules; train_res is a whole number.

    Cameras and light have functions of their own, below.
    """
    now: dict[str, Any] = {name: scheduled(getattr(args, name), step) for name in SCHEDULES}
    now |= {name: value_at(getattr(args, name), step) for name in ("lrate_lora", "camera_dropout")}
    if args.space == "2d":
        now |= dict.fromkeys(SHAPE_LOSSES, 0.0)
    return now | {"train_res": stepped(args.train_res, step)}


def pair_at(ends: Iterable[float | str], step: int) -> tuple[float, float]:
    """A range at ``step``: its low and its high end."""
    low, high = (value_at(end, step) for end in ends)
    return low, high


def orbit_ranges(args: argparse.Namespace, step: int) -> OrbitRanges:
    """The ranges of random cameras at update ``step``."""
    return OrbitRanges(
        azimuth_deg=pair_at(args.azimuth_range, step),
        elevation_deg=pair_at(args.elevation_range, step),
        radius=pair_at(args.radius_range, step),
        fov_deg=pair_at(args.fov_range, step),
        sphere_rate=value_at(args.sphere_rate, step),
        jitter_position=value_at(args.jitter_pos, step),
        jitter_target=value_at(args.jitter_target, step),
        jitter_up=value_at(args.jitter_up, step),
    )


def lighting_settings(args: argparse.Namespace, step: int) -> LightingSettings:
    """The settings of random lighting at update ``step``."""
    return LightingSettings(
        ambient=value_at(args.ambient, step),
        p_diffuse=value_at(args.p_diffuse, step),
        p_textureless=value_at(args.p_textureless, step),
        background=args.background,
        p_random=value_at(args.p_random_bg, step),
    )


def scheduled_columns(args: argparse.Namespace, step: int) -> dict[str, float]:
    """For the log: the value at ``step`` of every flag that is a schedule; LOW and HIGH apart.

    Learning rates are logged with their optimizer. Text that is no schedule, such as a prompt with
    a colon, is of another type.
    """
    columns: dict[str, float] = {}
    for name in _scheduled_names(args):
        value = getattr(args, name)
        if isinstance(value, list):
            ends = zip(("low", "high"), pair_at(value, step), strict=True)
            columns |= {f"{name}_{end}": number for end, number in ends}
        elif name in ("train_res", "target_samples"):
            columns[name] = stepped(value, step)
        else:
            columns[name] = value_at(value, step)
    return columns


def _scheduled_names(args: argparse.Namespace) -> list[str]:
    """The flags that hold a schedule of several numbers."""
    ranges = ("azimuth_range", "elevation_range", "radius_range", "fov_range")
    light = ("ambient", "p_diffuse", "p_textureless", "p_random_bg")
    cameras = (*ranges, "sphere_rate", "jitter_pos", "jitter_target", "jitter_up")
    names = (*SCHEDULES, "train_res", *cameras, *light, "camera_dropout", *OF_SCENES)
    found = []
    for name in dict.fromkeys((*names, "target_samples")):
        value = getattr(args, name, None)
        if any(is_schedule(end) for end in (value if isinstance(value, list) else [value])):
            found.append(name)
    return found
