"""Flags that both scripts know, and how flags are read.

Sources, strongest first: command line, environment (``NERF_<FLAG>``), config file, default.
"""

import argparse
import contextlib
import difflib
import io
import os
import re
import sys
from functools import partial
from pathlib import Path

import configargparse

from nerf.encodings import ENCODINGS
from nerf.flags.types import (
    decay,
    frequencies,
    grid_resolution,
    non_negative,
    non_negative_int,
    positive_int,
    seed,
)

ENV_PREFIX = "NERF_"


class ConfigFile(configargparse.DefaultConfigFileParser):
    """``flag = value`` lines; text only, and no flag twice with different values."""

    def parse(self, stream):
        name = getattr(stream, "name", "the config file")
        try:
            lines = io.StringIO(stream.read())
        except UnicodeDecodeError:
            raise configargparse.ConfigFileParserException(
                f"{name}: is no text file; expected lines of flag = value, in UTF-8"
            ) from None
        lines.name = name
        seen = {}
        for line in lines:
            if match := re.match(r"\s*(?:--)?(\w+)\s*[=:\s]\s*(.*?)\s*$", line):
                key, value = match.groups()
                if seen.setdefault(key, value) != value:
                    raise configargparse.ConfigFileParserException(
                        f"{name}: {key} is there twice, {seen[key]} and {value}; leave one out"
                    )
        lines.seek(0)
        return super().parse(lines)


def new_parser(description: str) -> configargparse.ArgumentParser:
    """A parser that reads ``--config`` files and NERF_* variables and never guesses a name."""
    return configargparse.ArgumentParser(
        description=description,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        config_file_parser_class=ConfigFile,
        config_file_open_func=partial(open, encoding="utf-8-sig"),  # with or without a BOM
        auto_env_var_prefix=ENV_PREFIX,
        allow_abbrev=False,
        add_env_var_help=False,
    )


def add_switch(group, name: str, help: str) -> None:
    """An on/off flag that a config file can set and the command line can unset (--no-NAME)."""
    group.add_argument(f"--{name}", action=argparse.BooleanOptionalAction, default=False, help=help)


def add_run_flags(parser) -> None:
    """Flags of any training script: where it writes, on what it runs, when it stops and saves."""
    group = parser.add_argument_group("run")
    add = group.add_argument
    add(
        "--config",
        is_config_file=True,
        env_var="NERF_CONFIG",
        help="flat text file of flag = value lines",
    )
    add("--expname", help="name of the run; default: the config's or the data folder's name")
    add("--basedir", default="./logs/", help="folder that holds run folders")
    add("--seed", type=seed, default=0, help="decides weights and every random draw")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1 or mps")
    add("--N_iters", type=positive_int, default=200000, help="train up to this many updates in all")
    add(
        "--max_minutes",
        type=non_negative,
        default=0.0,
        help="stop training after so long; 0: no limit",
    )
    add_switch(group, "no_reload", "start anew, ignoring the checkpoints of the run folder")
    add("--ft_path", help="checkpoint to start from, ours or nerf-pytorch's (.tar)")

    group = parser.add_argument_group("optimization")
    add = group.add_argument
    add("--lrate", type=float, default=5e-4, help="learning rate")
    add("--lrate_decay", type=positive_int, default=250, help="thousand steps to a tenth of it")
    add(
        "--lr_schedule",
        choices=("exp", "cosine"),
        default="exp",
        help="exp: by --lrate_decay; cosine: to 2 %% at N_iters",
    )
    add("--lrate_grid", type=non_negative, default=8e-2, help="learning rate of features on grids")
    add("--lrate_warmup", type=non_negative_int, default=0, help="steps to reach it linearly")
    add("--amp", choices=("off", "bf16", "fp16"), default="off", help="half-precision networks")
    add("--ema_decay", type=decay, default=0.0, help="average the weights so, e.g. 0.999; 0: off")
    add("--grad_clip", type=non_negative, default=0.0, help="largest gradient norm; 0: no limit")

    group = parser.add_argument_group("logging and saving")
    add = group.add_argument
    add("--i_print", type=positive_int, default=100, help="steps between lines of metrics")
    add("--i_img", type=non_negative_int, default=500, help="steps between validations; 0: never")
    add(
        "--i_weights",
        type=non_negative_int,
        default=10000,
        help="steps between checkpoints; 0: none",
    )
    add("--i_video", type=non_negative_int, default=50000, help="steps between videos; 0: never")
    add(
        "--ckpt_secs",
        type=non_negative,
        default=60.0,
        help="seconds between checkpoints; 0: by step",
    )
    add("--keep_ckpts", type=int, default=2, help="newest checkpoints kept, and the best; 0: all")
    add_switch(group, "wandb", "log to Weights & Biases as well (pip install wandb)")


def add_network_flags(parser) -> None:
    """Flags of a field, for any script."""
    group = parser.add_argument_group("network")
    add = group.add_argument
    add("--netdepth", type=positive_int, default=8, help="layers")
    add("--netwidth", type=positive_int, default=256, help="channels per layer")
    add("--i_embed", type=int, choices=(0, -1), default=0, help="0: encode positions, -1: do not")
    add("--multires", type=frequencies, default=10, help="frequencies of the position")
    add(
        "--field",
        choices=("mlp", *sorted(ENCODINGS)),
        default="mlp",
        help="positional-encoding MLP, or features on grids and two small MLPs",
    )
    add("--grid_res", type=grid_resolution, default=128, help="finest side of a grid of features")


def add_grid_flags(parser) -> None:
    """Flags of marching through an occupancy grid, for any script."""
    group = parser.add_argument_group("occupancy grid")
    add = group.add_argument
    add("--occ_res", type=positive_int, default=64, help="cells per side of the occupancy grid")
    add("--march_steps", type=positive_int, default=128, help="samples across the whole scene box")
    add("--early_stop", type=decay, default=1e-3, help="transmittance that ends a ray; 0: none")


def add_export_flags(group) -> None:
    """Flags of the mesh that a finished run gives, for any script."""
    add = group.add_argument
    add("--export", help="write the mesh of the newest checkpoint: out.glb, out.obj or out.ply")
    add("--mesh_res", type=grid_resolution, default=128, help="cells of the mesh's longer side")
    add("--mesh_level", type=non_negative, default=0.0, help="density of the surface; 0: auto")


def check_export_name(flag: str, name: str | None, endings: tuple[str, ...]) -> None:
    """ValueError unless a file to be written has one of the endings."""
    if name and Path(name).suffix.lower() not in endings:
        raise ValueError(f"--{flag} {name}: expected a name that ends in {' '.join(endings)}")


def add_viewer_flags(parser) -> None:
    """Flags of the live viewer."""
    group = parser.add_argument_group("viewer")
    add_switch(group, "viewer", "show the scene in the browser while it trains (pip install viser)")
    group.add_argument("--viewer_port", type=positive_int, default=8080, help="where it is served")
    group.add_argument("--viewer_host", default="127.0.0.1", help="0.0.0.0: to other machines too")
    help = "with --render_only: render these key frames, saved by the viewer (camera_path.json)"
    group.add_argument("--camera_path", help=help)


def parse(
    parser, argv: list[str] | None, name_of, fast: tuple[str, ...] = ()
) -> argparse.Namespace:
    """The flags of this run. Unknown names end the program and name the nearest known one.

    name_of(args): what a run without ``--expname`` is called. fast: the flags that ``--fast``
    stands for, as if they stood on the command line before all others.
    """
    argv = sys.argv[1:] if argv is None else argv
    known = sorted(option[2:] for option in parser._option_string_actions if option[:2] == "--")
    for name in os.environ:
        if name.startswith(ENV_PREFIX) and name not in {
            ENV_PREFIX + option.upper()
            for option in known
            if option != "help" and not option.startswith("no-")
        }:
            parser.error(f"environment variable {name}: " + _nearest(name[5:].lower(), known))
    if "--fast" in argv:
        place = argv.index("--fast")
        argv = [*fast, *argv[:place], *argv[place:]]
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        word = unknown[0]
        name = word.split("=")[0].lstrip("-")
        typed = any(given.split("=")[0] == word.split("=")[0] for given in argv)
        where = "" if typed or not args.config else f"{args.config}: "
        if not word.startswith("-"):
            parser.error(f"{where}{word!r} is not a flag; flags start with --")
        parser.error(f"{where}unknown flag {name!r}: " + _nearest(name, known))
    if getattr(args, "fast", False) and "--fast" not in argv:
        parser.error("fast is for the command line; a file lists the flags it stands for (FAST)")
    if args.ft_path == "None":  # nerf-pytorch's own args.txt writes it so
        args.ft_path = None
    if not args.expname or args.expname == "None":
        args.expname = name_of(args)
    return args


def _nearest(name: str, known: list[str]) -> str:
    lowered = {option.lower(): option for option in known}
    close = difflib.get_close_matches(name.lower(), lowered, n=1, cutoff=0.0)
    return f"did you mean {lowered[close[0]]!r}? (--help lists all flags)"


def check_run_flags(args: argparse.Namespace) -> None:
    """The part of the checks that any training script needs."""
    if args.keep_ckpts == 1 or args.keep_ckpts < 0:
        raise ValueError(
            f"--keep_ckpts {args.keep_ckpts}; keep at least 2, the last may be damaged (0: all)"
        )
    if not 0 < args.lrate <= 1e30:
        raise ValueError(f"--lrate {args.lrate}; expected a positive number, at most 1e30")
    name = args.expname
    if Path(name).is_absolute() or {"..", "."} & set(re.split(r"[/\\]", name)):
        raise ValueError(
            f"--expname {name!r} leads out of --basedir; give a name, and the folder by --basedir"
        )
    if not name.strip() or not name.isprintable():
        raise ValueError(f"--expname {name!r}: expected a name of letters, digits, _ and -")


def structural_changes(saved: dict, args: argparse.Namespace, structural) -> list[str]:
    """The structural flags whose saved and present values differ, as "name: saved -> present"."""
    return _changes(saved, args, structural)


def other_changes(saved: dict, args: argparse.Namespace, structural) -> list[str]:
    """Every other flag that differs from the saved run's."""
    return _changes(saved, args, [name for name in vars(args) if name not in structural])


def _changes(saved: dict, args: argparse.Namespace, names) -> list[str]:
    def present(name):
        return bool(getattr(args, name)) if name == "N_importance" else getattr(args, name)

    def before(name):
        return bool(saved[name]) if name == "N_importance" else saved[name]

    return [
        f"{name}: {saved[name]} -> {getattr(args, name)}"
        for name in names
        if name in saved and before(name) != present(name)
    ]


def as_config(args: argparse.Namespace, parser) -> str:
    """``args`` as a config file that reads back to the same; unset flags are comments.

    Text that no config file can hold (several lines, some quotes) is named in a comment.
    """
    lines = []
    for name, value in sorted(vars(args).items()):
        if name in ("config", "fast"):  # what they stand for is written out
            continue
        plain = not isinstance(value, str) or re.fullmatch(r"[\w ./:-]*", value)
        line = f'{name} = "{value}"' if isinstance(value, str) else f"{name} = {value}"  # " #"
        if value is None:
            line = f"# {name} is not set"
        elif not plain and _read_back(line, parser).get(name) != value:
            line = f"# {name} is in args.json only: a config file cannot hold it"
        lines.append(line)
    written = _read_back("\n".join(lines), parser)
    for name, value in vars(args).items():
        commented = f"# {name} is in args.json only: a config file cannot hold it" in lines
        if name not in ("config", "fast") and not commented and written.get(name) != value:
            raise ValueError(
                f"--{name} {value!r} cannot be kept in args.txt (it would read back as "
                f"{written.get(name)!r}); use another value"
            )
    return "\n".join(lines) + "\n"


def _read_back(content: str, parser) -> dict:
    """The flags that a config file of this content gives; none if it is not one."""
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            given = {"config_file_contents": content + "\n", "env_vars": {}}
            return vars(parser.parse_known_args([], **given)[0])
    except (SystemExit, ValueError, configargparse.ConfigFileParserException):
        return {}
