"""Flags of ``python -m guidance.finetune``, and which of them a resumed run must keep."""

import math
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import NoReturn

SETTINGS = (  # that decide the result: a run that is resumed must keep them
    "rank", "lrate", "batch", "size", "seed", "amp", "prompt", "class_prompt",
    "num_class_pictures", "prior_weight",
)  # fmt: skip


class Parser(ArgumentParser):
    """A parser whose mistakes are ValueErrors, of one line."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


# fmt: off
def parse(argv: list[str] | None, description: str) -> Namespace:
    """The checked command-line flags; ValueError for a bad value."""
    parser = Parser(prog="guidance.finetune", description=description, allow_abbrev=False)
    flag = parser.add_argument
    flag("--pictures", type=Path, required=True,
        help="folder of pictures; their captions may be in metadata.jsonl or NAME.txt")
    flag("--prompt", help="caption of pictures that have none, and prompt of the samples")
    flag("--out", type=Path, required=True,
        help=".safetensors file to write; OUT_run/ beside it holds the training state and samples")
    flag("--sd_model", help="folder or hub id of the model; default: the embedded model")
    flag("--local_files_only", action="store_true", help="never download from the hub")
    flag("--allow_pickle", action="store_true", help="also read weights from .bin files")
    flag("--rank", type=int, default=4, help="rank of the LoRA (default: 4)")
    flag("--lrate", type=float, default=1e-4, help="learning rate of AdamW (default: 1e-4)")
    flag("--steps", type=int, default=500,
        help="number of updates; a larger number continues a finished run (default: 500)")
    flag("--batch", type=int, default=1, help="pictures per update (default: 1)")
    flag("--size", type=int, help="pixels per side; default: the model's size")
    flag("--class_prompt",
        help="what the pictures show, without the new word: the model also trains on its own "
        "pictures of this, so that it does not forget it (prior preservation, DreamBooth)")
    flag("--num_class_pictures", type=int, default=32,
        help="number of pictures of --class_prompt (default: 32)")
    flag("--prior_weight", type=float, default=1.0,
        help="weight of the loss on pictures of --class_prompt (default: 1)")
    flag("--negative", default="", help="negative prompt of the samples")
    flag("--guidance_scale", type=float, default=7.5,
        help="guidance scale of samples and of pictures of --class_prompt (default: 7.5)")
    flag("--seed", type=int, default=0,
        help="seed of the initial LoRA and of every update (default: 0)")
    flag("--sample_every", type=int, default=100,
        help="interval, in updates, between samples; 0: no samples (default: 100)")
    flag("--save_every", type=int, default=100,
        help="interval, in updates, between saves; 0: only at the end (default: 100)")
    flag("--print_every", type=int, default=20,
        help="interval, in updates, between lines of the log (default: 20)")
    flag("--amp", choices=("off", "bf16", "fp16"), default="off",
        help="half precision in the U-Net (default: off)")
    flag("--device", default="auto", help="auto, cpu, cuda, cuda:1, ... or mps")
    args = parser.parse_args(argv)
    check(args)
    return args
# fmt: on


def check(args: Namespace) -> None:
    """ValueError for flags outside their range."""
    if args.out.suffix != ".safetensors":
        raise ValueError(f"--out {args.out}: expected a name that ends in .safetensors")
    for name in ("rank", "steps", "batch", "num_class_pictures", "print_every"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} {getattr(args, name)}: expected 1 or more")
    for name in ("sample_every", "save_every", "seed"):
        if getattr(args, name) < 0:
            raise ValueError(f"--{name} {getattr(args, name)}: expected 0 or more")
    if not (math.isfinite(args.lrate) and args.lrate > 0):
        raise ValueError(f"--lrate {args.lrate:g}: expected a number above 0")
    if not (math.isfinite(args.prior_weight) and args.prior_weight >= 0):
        raise ValueError(f"--prior_weight {args.prior_weight:g}: expected 0 or more")
    for name in ("prompt", "class_prompt"):
        if getattr(args, name) is not None and not getattr(args, name).strip():
            raise ValueError(f'--{name} is empty; say what is shown: --{name} "a red cone"')
