"""Flags that both scripts know, how flags are read, and which may differ from a checkpoint's.

Sources, strongest first: command line, environment (``NERF_<FLAG>``), config file, default.
"""

import argparse
import os
import re
import sys
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any

from nerf.encodings import ENCODINGS
from nerf.flags import mistakes
from nerf.flags.checkpoints import add_checkpoint_flags, checkpoint_problems, reading_flags
from nerf.flags.config_file import as_config as as_config  # part of this module's interface
from nerf.flags.optimization import add_optimization_flags
from nerf.flags.parser import Parser, Section, add_help_flags
from nerf.flags.types import (
    cells,
    checkpoints_kept,
    decay,
    frequencies,
    grid_resolution,
    non_negative,
    non_negative_int,
    parts,
    positive_int,
    seed,
)

# What reaches the terminal, from the most to the least (nerf.training.run_folder).
STARTS = ("ft_path", "ft_weights", "init_from")  # flags that name what a new run starts from
LEVELS = ("debug", "info", "warning")

# fmt: off


def add_run_flags(
    parser: Parser, *, unnamed: str, images: str, videos: str, measures: bool
) -> None:
    """Flags of any training script: where it writes, on what it runs, when it stops and saves.

    unnamed: what names a run without --expname. images, videos: the help of --i_img, --i_video.
    measures: whether validations measure quality.
    """
    section = parser.section(
        "run", "Where a run writes, on which device it computes, where it starts and when it ends."
    )
    flag, switch = section.flag, section.switch
    add_help_flags(section)
    flag("config", "FILE", None,
        "text file with one flag = value per line",
        is_config_file=True, env_var="NERF_CONFIG")
    flag("expname", "NAME", None, f"name of the run folder; default: {unnamed}")
    flag("basedir", "FOLDER", "./logs/", "folder that holds the run folders")
    flag("seed", seed, 0, "seed of the initial weights and of every random draw")
    flag("device", "NAME", "auto", "auto, cpu, cuda, cuda:1, ... or mps")
    flag("by_device", "NAME", "",
        "take default values for this device from a group of configs/by_device.table; flags that "
        "are set override them")
    flag("N_iters", positive_int, 200000,
        "total number of updates, including those before a resume")
    flag("max_minutes", non_negative, 0.0,
        "minutes of training, including those before a resume, after which the run stops; 0: no "
        "limit")
    switch("no_reload",
        "--reload: resume if the run folder has a checkpoint (default); --no-reload or "
        "--no_reload: move old checkpoints to before_N/ and start again", positive="reload")
    switch("dry_run",
        "load everything, train a few updates, print how much time and memory the run will take, "
        "and stop without writing anything")
    flag("ft_path", "FILE", None,
        "checkpoint (.tar, also nerf-pytorch's) to render or export, or to start a new run from; "
        "a run folder that has checkpoints is resumed from its own")
    flag("log_level", LEVELS, "info",
        "what the terminal shows; warning: only warnings; debug: also tracebacks and every number "
        "of metrics.csv; log.txt always has all messages")
    switch("deterministic",
        "use PyTorch's deterministic algorithms, which are slower: a run repeated on the same "
        "machine is identical to the bit; if an operation has no deterministic version, the run "
        "stops and names it")
    switch("debug_shapes",
        "check the shapes of the inputs and outputs of fields, renderers and guidance; slower (pip "
        "install jaxtyping beartype)")
    add_optimization_flags(parser)
    add_saving_flags(parser, images, videos)
    add_checkpoint_flags(parser, measures=measures)


def add_saving_flags(parser: Parser, images: str, videos: str) -> None:
    """Flags of what is printed, measured and saved during training."""
    section = parser.section(
        "saving", "What is printed, measured and saved during training, and how often."
    )
    flag, switch = section.flag, section.switch
    flag("i_print", positive_int, 100, "interval, in updates, between lines of metrics")
    flag("i_img", non_negative_int, 500, images)
    flag("i_weights", non_negative_int, 10000,
        "interval, in updates, between checkpoints; 0: only by --ckpt_secs and at the end")
    flag("i_video", non_negative_int, 50000, videos)
    flag("ckpt_secs", non_negative, 60.0,
        "interval, in seconds, between checkpoints; 0: only by --i_weights and at the end")
    flag("keep_ckpts", checkpoints_kept, 2,
        "number of newest checkpoints to keep in addition to the best one, 2 or more; 0: all")
    switch("wandb", "also log to Weights & Biases (pip install wandb)")


def add_network_flags(parser: Parser) -> Section:
    """Flags of a field, for any script. Returns their section."""
    section = parser.section(
        "network", "The field: the network that maps points to color and density."
    )
    flag = section.flag
    flag("field", ("mlp", *sorted(ENCODINGS)), "mlp",
        "mlp: positional encoding and an MLP; hashgrid, triplane: features on grids and two small "
        "MLPs")
    flag("grid_res", grid_resolution, 128,
        "cells per side of the finest feature grid (--field triplane or hashgrid), 16 or more")
    flag("netdepth", parts, 8, "layers of the MLP (--field mlp)")
    flag("netwidth", positive_int, 256, "channels per layer of the MLP")
    flag("i_embed", (0, -1), 0,
        "0: positional encoding of the MLP's inputs; -1: raw coordinates, no encoding")
    flag("multires", frequencies, 10, "frequencies in the positional encoding of points, 1 to 32")
    return section


def add_grid_flags(parser: Parser) -> None:
    """Flags of marching through an occupancy grid, for any script."""
    section = parser.section(
        "occupancy", "The occupancy grid: rays are sampled only in its occupied cells."
    )
    flag = section.flag
    flag("occ_res", cells, 64, "cells per side of the occupancy grid")
    flag("march_steps", positive_int, 128,
        "number of samples along the diagonal of the scene box if all its cells were occupied; "
        "sets the step length")
    flag("early_stop", decay, 1e-3,
        "transmittance below which samples are skipped as occluded; 0: keep all samples")


def add_export_flags(parser: Parser, *, mesh_res: int) -> Section:
    """Flags of the mesh of a trained run, for any script. Returns their section."""
    section = parser.section(
        "export", "A mesh or points of a trained run: its newest checkpoint, --ckpt or --ft_path."
    )
    flag = section.flag
    flag("export", "FILE", None, "write a mesh; FILE ends in .glb, .obj or .ply")
    flag("mesh_res", grid_resolution, mesh_res,
        "cells of the mesh sampling grid along its longer side, 16 or more")
    flag("mesh_level", non_negative, 0.0,
        "density (per scene unit) at which the surface of the mesh lies; 0: automatic")
    return section


def add_viewer_flags(parser: Parser) -> None:
    """Flags of the live viewer."""
    section = parser.section(
        "viewer", "The live viewer in the browser, and the camera paths that it saves."
    )
    flag, switch = section.flag, section.switch
    switch("viewer",
        "show the scene in a browser during training, or with --render_only until Ctrl-C (pip "
        "install viser)")
    flag("viewer_port", positive_int, 8080, "port that the viewer listens on")
    flag("viewer_host", "ADDRESS", "127.0.0.1",
        "address that the viewer listens on; 0.0.0.0: other machines can connect as well")
    flag("camera_path", "FILE", None,
        "with --render_only: render the key frames that the viewer saved (camera_path.json)")


# fmt: on
# --------------------------------------------------------------------------------------- reading


def parse(
    parser: Parser,
    argv: list[str] | None,
    name_of: Callable[[argparse.Namespace], str],
    fast: tuple[str, ...] = (),
) -> argparse.Namespace:
    """The flags of this run. A mistake ends the program with one line and exit code 2.

    name_of(args): what a run without ``--expname`` is called. fast: the flags that ``--fast``
    stands for, as if they stood on the command line before all others.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    parser.answer_help(argv)
    parser.refuse(mistakes.check_environment(parser, os.environ))
    words = argv
    if "--fast" in argv:
        place = argv.index("--fast")
        words = [*fast, *argv[:place], *argv[place:]]
    args, unknown = parser.parse_known_args(words)
    if unknown:
        parser.error(f"{unknown[0]!r} is not a flag; flags start with --")
    if getattr(args, "fast", False) and "--fast" not in argv:
        parser.error(
            "fast is for the command line; in a config file, list the flags that --fast stands for"
        )
    if args.config == "":
        parser.error("--config is empty; give a file, or leave it out")
    if args.ft_path == "None":  # nerf-pytorch's own args.txt writes it so
        args.ft_path = None
    if not args.expname or args.expname == "None":
        args.expname = name_of(args)
    return args


# -------------------------------------------------------------------------------------- checking


def refuse_first(table: Iterable[tuple[object, str]]) -> None:
    """ValueError with the message of the first (condition, message) whose condition holds."""
    for wrong, message in table:
        if wrong:
            raise ValueError(message)


def check_export_name(flag: str, name: str | None, endings: tuple[str, ...]) -> None:
    """ValueError unless a file to be written has one of the endings."""
    if name and Path(name).suffix.lower() not in endings:
        raise ValueError(f"--{flag} {name}: expected a name that ends in {' '.join(endings)}")


def check_run_flags(args: argparse.Namespace) -> None:
    """The part of the checks that any training script needs."""
    name = args.expname
    leaves = Path(name).is_absolute() or {"..", "."} & set(re.split(r"[/\\]", name))
    refuse_first(
        [
            (
                leaves,
                f"--expname {name!r} leads out of --basedir; give a plain name, and choose the "
                "folder with --basedir",
            ),
            (
                not name.strip() or not name.isprintable(),
                f"--expname {name!r}: expected a name of letters, digits, _ and -",
            ),
            (
                args.dry_run and reading_flags(args),
                "--dry_run is for training; leave out --dry_run, or --render_only and --export",
            ),
            (
                args.debug_shapes and getattr(args, "compile", False),
                "--debug_shapes cannot check compiled networks; leave out --debug_shapes or "
                "--compile",
            ),
            *checkpoint_problems(args),
        ]
    )


def structural_changes(
    saved: dict[str, Any], args: argparse.Namespace, structural: Iterable[str]
) -> list[str]:
    """The structural flags whose saved and present values differ, as "name: saved -> present"."""
    return _changes(saved, args, structural)


def other_changes(
    saved: dict[str, Any], args: argparse.Namespace, structural: Collection[str]
) -> list[str]:
    """Every other flag that differs from the saved run's."""
    return _changes(saved, args, [name for name in vars(args) if name not in structural])


def check_same_run(
    path: Path | str,
    saved: dict[str, Any],
    args: argparse.Namespace,
    structural: Iterable[str],
    extra: Iterable[str] = (),
) -> None:
    """ValueError if the checkpoint at ``path`` was made with other flags, structural or of STARTS.

    saved: the flags in the checkpoint. extra: further differences, as "name: saved -> present".
    """
    check_start(path, saved, args)
    changes = [*structural_changes(saved, args, structural), *extra]
    if changes:
        cure = "use those flags, or another --expname"
        if reading_flags(args):
            cure = "use those flags, or leave --config out: the run's own flags are then used"
        raise ValueError(f"{path} was made with other flags ({'; '.join(changes)}); {cure}")


def check_start(path: Path | str, saved: dict[str, Any], args: argparse.Namespace) -> None:
    """ValueError if a flag of STARTS names what a run that goes on from ``path`` would not read.

    saved: the flags in the checkpoint. The start that the run once had may be named, or its file
    itself.
    """
    for name in STARTS:
        given = getattr(args, name, None)
        known = [str(each) for each in (saved.get(name), path) if each]
        if not given or os.path.abspath(given) in map(os.path.abspath, known):
            continue
        raise ValueError(
            f"--{name} {given}: it would not be read, since the run goes on from {path}; give "
            "another --expname to start from it, or leave it out to go on"
        )


def _changes(saved: dict[str, Any], args: argparse.Namespace, names: Iterable[str]) -> list[str]:
    """ "name: saved -> present" of flags that differ; of N_importance only whether it is 0."""

    def compared(name: str, value: Any) -> Any:
        return bool(value) if name == "N_importance" else value

    present = vars(args)
    return [
        f"{name}: {saved[name]} -> {present[name]}"
        for name in names
        if name in saved and compared(name, saved[name]) != compared(name, present[name])
    ]
