"""Flags of checkpoints: which are kept, which one is opened, what else starts from weights.

For both scripts.
"""

import argparse
import re
from collections.abc import Sequence
from pathlib import Path

from nerf.flags.parser import Parser
from nerf.flags.types import positive_int

# Flags of the modes that only read what an earlier run has trained.
READING = ("render_only", "export", "export_points", "export_weights", "validate")
QUALITY = ("psnr", "ssim")


def checkpoint_choice(text: str) -> str:
    """newest, best, or the number of updates of a checkpoint."""
    if text in ("newest", "best") or re.fullmatch(r"[0-9]{1,15}", text):
        return text
    raise argparse.ArgumentTypeError("expected newest, best, or a checkpoint's step, as in 20000")


def logged_value(text: str) -> str:
    """A column of metrics.csv, and whether its smallest or largest value is the best."""
    if text == "none" or re.fullmatch(r"\w+:(min|max)", text):
        return text
    raise argparse.ArgumentTypeError("expected none, NAME:min or NAME:max, as in sds:min")


# fmt: off


def add_checkpoint_flags(parser: Parser, *, measures: bool) -> None:
    """Flags of what is kept and opened. measures: validations measure quality (run_nerf.py)."""
    section = parser.section(
        "checkpoints", "Which checkpoints are kept and opened, and how to start from weights."
    )
    flag, switch = section.flag, section.switch
    flag("ckpt", checkpoint_choice, "newest",
        "checkpoint to render, export, view or validate: newest, best (see --monitor), or a step, "
        "e.g. 20000", metavar="newest|best|STEP")
    flag("save_top_k", positive_int, 1,
        "number of best checkpoints to keep in addition to the newest ones (--keep_ckpts)")
    # torchrun takes --monitor for a beginning of its own --monitor-interval: hence a second name.
    if measures:
        flag("monitor", QUALITY, "psnr",
            "criterion for the best checkpoint, measured at every --i_img: psnr of 4096 pixels, or "
            "ssim of 16 patches of 32x32 pixels; with torchrun write --best_by",
            alias="best_by")
    else:
        flag("monitor", logged_value, "none",
            "column of metrics.csv whose smallest (NAME:min) or largest (NAME:max) value marks the "
            "best checkpoint, e.g. sds:min; no column measures quality; none: no best checkpoint; "
            "with torchrun write --best_by",
            metavar="NAME:min|max", alias="best_by")
    switch("save_weights_only",
        "save checkpoints without the optimizer state, at a third of the size; a run resumed from "
        "one starts with a fresh optimizer")
    flag("export_weights", "FILE", None,
        "write the weights of the network (the averaged ones if --ema_decay is on); FILE ends in "
        ".safetensors")
    flag("ft_weights", "PATH[:MODULE]", None,
        "start a new run at step 0 with the weights from a .tar or .safetensors file, or with "
        "those of one module, e.g. old.tar:field.encoding; see --ft_ignore")
    section.group.add_argument("--ft_ignore", nargs="+", metavar="NAME", default=None,
        help="names of tensors or modules that --ft_weights does not load, e.g. grid "
        "field.color_net")


# fmt: on


def reading_flags(args: argparse.Namespace) -> list[str]:
    """The flags set, with their dashes, by which the run only reads what an earlier one trained."""
    return [f"--{name}" for name in READING if getattr(args, name, None)]


def checkpoint_problems(args: argparse.Namespace) -> Sequence[tuple[object, str]]:
    """(condition, message) of contradictions among these flags."""
    reads = reading_flags(args)
    ending = Path(args.export_weights or "x.safetensors").suffix.lower()
    other = [f"--{name}" for name in ("ft_path", "init_from") if getattr(args, name, None)]
    return [
        (ending != ".safetensors",
         f"--export_weights {args.export_weights}: expected a name that ends in .safetensors"),
        (args.ckpt != "newest" and not reads,
         f"--ckpt {args.ckpt} chooses what --render_only and --export read; a run resumes from its "
         "newest checkpoint; to start a new one from another: --ft_path FILE and a new --expname"),
        (args.ckpt != "newest" and args.ft_path,
         "--ckpt and --ft_path both choose a checkpoint; leave one out"),
        (args.ft_weights and reads,
         f"--ft_weights starts a new run, and {reads[0] if reads else ''} reads an old one; leave "
         "one out"),
        (args.ft_weights and other,
         f"--ft_weights and {other[0] if other else ''} both choose where to start; leave one out"),
        (args.ft_ignore and not args.ft_weights, "--ft_ignore needs --ft_weights PATH"),
        (args.monitor == "none" and args.save_top_k > 1,
         f"--save_top_k {args.save_top_k} needs --monitor, since text to 3D measures no quality"),
    ]  # fmt: skip
