"""Settings that the chosen mode of run_dreamfusion.py cannot use: left out, each by its name.

A config is written for one mode; --space, --guidance and --field choose others.
"""

import argparse
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

from nerf.training.schedules import highest, parse_schedule

SHAPE_LOSSES = ("lambda_opacity", "lambda_entropy", "lambda_orient", "lambda_spread", "lambda_tv")
LIGHT = ("albedo_steps", "p_diffuse", "p_textureless", "ambient")
OF_MLP = ("netdepth", "netwidth", "multires", "activation")
OF_GRIDS = ("grid_res", "lrate_grid")
OF_TRI_PLANES = ("smooth_planes", "lambda_tv")
OBJECT = ("field", "bound", "blob_scale", "blob_std", "density_scale", "march_steps", "occ_res")
VSD = ("lora_rank", "lrate_lora", "lora_views", "camera_dropout", "lora_cfg")
MODEL = ("sd_model", "sd_lora", "guidance_dtype", "scheduler", "negative_prompt", "view_text")
# Those that something depends on. The others have no effect, and stay what they are.
SWITCHED_OFF = ("smooth_planes", "lambda_tv", "mesh", "i_video")


class Mode(NamedTuple):
    """A mode, when it is on, why it cannot use ``flags``."""

    is_on: Callable[[argparse.Namespace], bool]
    reason: str
    flags: tuple[str, ...]


MODES = (
    Mode(lambda args: args.space == "2d", "--space 2d makes pictures and no object",
         (*SHAPE_LOSSES, "mesh", "i_video", *OBJECT, *OF_MLP, *OF_GRIDS, "smooth_planes", *LIGHT)),
    Mode(lambda args: args.space == "3d" and args.field == "mlp", "--field mlp has no feature grid",
         (*OF_GRIDS, *OF_TRI_PLANES)),
    Mode(lambda args: args.space == "3d" and args.field == "hashgrid",
         "--field hashgrid has neither tri-planes nor a large MLP", (*OF_MLP, *OF_TRI_PLANES)),
    Mode(lambda args: args.space == "3d" and args.field == "triplane",
         "--field triplane has no large MLP", OF_MLP),
    Mode(lambda args: args.guidance == "gaussian", "--guidance gaussian opens no model", MODEL),
    Mode(lambda args: args.guidance != "vsd", "only --guidance vsd trains a LoRA", VSD),
)  # fmt: skip


def leave_out(
    args: argparse.Namespace, default: Callable[[str], Any], typed: Collection[str]
) -> list[str]:
    """Unset what the mode of ``args`` cannot use; one line for each reason, with the names.

    default: the default of a flag. typed: flags of the command line. What contradicts the mode and
    was typed stays as it is, for ``check_dream_flags`` to refuse.
    """
    lines = []
    for mode in MODES:
        if not mode.is_on(args):
            continue
        set_flags = [name for name in mode.flags if getattr(args, name) != default(name)]
        if args.space == "3d":
            set_flags = [name for name in set_flags if name not in {*OF_TRI_PLANES} & {*typed}]
        for name in SWITCHED_OFF:
            fits = name == "smooth_planes" and args.field == "triplane"  # a checkpoint's, in 2d too
            if name in set_flags and not fits:
                setattr(args, name, default(name))
        if set_flags:
            names = ", ".join(f"--{name}" for name in set_flags)
            lines.append(
                f"{mode.reason}: {names} {'is' if len(set_flags) == 1 else 'are'} not used"
            )
    if args.space == "2d" and len(parse_schedule(args.train_res)[1]) > 1:
        if "train_res" not in typed:
            size = f"{highest(args.train_res):g}"
            lines.append(f"--train_res {args.train_res} -> {size}: --space 2d has a single size")
            args.train_res = size
    return lines
