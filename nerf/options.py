"""Flags: nerf-pytorch's by name, type, default and meaning, and ours beside them.

Sources, strongest first: command line, environment (``NERF_<FLAG>``), config file, default.
"""

import argparse
import contextlib
import difflib
import io
import math
import os
import re
import sys
from functools import partial
from pathlib import Path

import configargparse

from nerf.bounds import carve, scene_space
from nerf.datasets import DATASETS
from nerf.datasets.scene import Scene
from nerf.encodings import ENCODINGS
from nerf.field import FeatureField, NeRFField
from nerf.grid_renderer import GridRenderer
from nerf.mesh import FORMATS
from nerf.occupancy import OccupancyGrid
from nerf.renderer import NeRFRenderer
from nerf.volume import PACKED_WEIGHTS

ENV_PREFIX = "NERF_"

# A checkpoint fits a run only where these agree. The rest may change on resume, and is reported.
STRUCTURAL = (
    "netdepth netwidth netdepth_fine netwidth_fine multires multires_views i_embed use_viewdirs "
    "N_importance dataset_type white_bkgd no_ndc spherify lindisp pixel_center "
    "field grid_res occ_grid occ_res contract"
).split()

# What --fast stands for: as if these stood on the command line before your own flags.
FAST = (
    "--occ_grid --field triplane --pixel_center --random_bg --hull_init auto --no-no_batching "
    "--precrop_iters 0 --raw_noise_std 0 --amp bf16 --lrate 2e-3 --lr_schedule cosine "
    "--lrate_warmup 20 --N_iters 6000"
).split()


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text}; expected 1 or more")
    return value


def not_negative(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text}; expected 0 or more")
    return value


def fraction(text: str) -> float:
    value = float(text)
    if not 0.0 < value <= 1.0:
        raise argparse.ArgumentTypeError(f"{text}; expected a number in (0, 1]")
    return value


def amount(text: str) -> float:
    value = float(text)
    if not 0.0 <= value <= 1e9:  # no flag means more, and float32 has no room for its square
        raise argparse.ArgumentTypeError(f"{text}; expected a finite number, 0 or more, up to 1e9")
    return value


def part(text: str) -> float:
    value = float(text)
    if not 0.0 <= value <= 1.0:
        raise argparse.ArgumentTypeError(f"{text}; expected a number in [0, 1]")
    return value


def positive_number(text: str) -> float:
    value = amount(text)
    if value < 1e-15:  # its square has to be a float32
        raise argparse.ArgumentTypeError(f"{text}; expected a number above 0, 1e-15 or more")
    return value


def grid_side(text: str) -> int:
    value = int(text)
    if value < 16:
        raise argparse.ArgumentTypeError(f"{text}; expected 16 or more")
    return value


def seed(text: str) -> int:
    value = int(text)
    if not 0 <= value < 2**62:
        raise argparse.ArgumentTypeError(f"{text}; expected a whole number from 0 to 2^62")
    return value


def frequencies(text: str) -> int:
    value = int(text)
    if not 1 <= value <= 32:  # 2^32 x is beyond the digits of float32
        raise argparse.ArgumentTypeError(f"{text}; expected 1 to 32")
    return value


def decay(text: str) -> float:
    value = float(text)
    if not 0.0 <= value < 1.0:
        raise argparse.ArgumentTypeError(f"{text}; expected a number in [0, 1)")
    return value


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
    add("--N_iters", type=positive, default=200000, help="train up to this many updates in all")
    add("--max_minutes", type=amount, default=0.0, help="stop training after so long; 0: no limit")
    add_switch(group, "no_reload", "start anew, ignoring the checkpoints of the run folder")
    add("--ft_path", help="checkpoint to start from, ours or nerf-pytorch's (.tar)")

    group = parser.add_argument_group("optimisation")
    add = group.add_argument
    add("--lrate", type=float, default=5e-4, help="learning rate")
    add("--lrate_decay", type=positive, default=250, help="thousand steps to a tenth of it")
    add(
        "--lr_schedule",
        choices=("exp", "cosine"),
        default="exp",
        help="exp: by --lrate_decay; cosine: to 2 %% at N_iters",
    )
    add("--lrate_grid", type=amount, default=8e-2, help="learning rate of features on grids")
    add("--lrate_warmup", type=not_negative, default=0, help="steps to reach it linearly")
    add("--amp", choices=("off", "bf16", "fp16"), default="off", help="half-precision networks")
    add("--ema_decay", type=decay, default=0.0, help="average the weights so, e.g. 0.999; 0: off")
    add("--grad_clip", type=amount, default=0.0, help="largest gradient norm; 0: no limit")

    group = parser.add_argument_group("logging and saving")
    add = group.add_argument
    add("--i_print", type=positive, default=100, help="steps between lines of metrics")
    add("--i_img", type=not_negative, default=500, help="steps between validations; 0: never")
    add("--i_weights", type=not_negative, default=10000, help="steps between checkpoints; 0: none")
    add("--i_video", type=not_negative, default=50000, help="steps between videos; 0: never")
    add("--ckpt_secs", type=amount, default=60.0, help="seconds between checkpoints; 0: by step")
    add("--keep_ckpts", type=int, default=2, help="newest checkpoints kept, and the best; 0: all")
    add_switch(group, "wandb", "log to Weights & Biases as well (pip install wandb)")


def add_scene_flags(parser) -> None:
    """Flags of the pictures."""
    group = parser.add_argument_group("data")
    add = group.add_argument
    add("--datadir", default="./data/llff/fern", help="folder of the scene")
    add("--dataset_type", choices=sorted(DATASETS), default="llff", help="format; auto: look")
    add("--testskip", type=not_negative, default=8, help="keep 1/N of val and test views")
    add(
        "--data_store",
        choices=("memory", "mmap", "auto"),
        default="memory",
        help="in memory, in a mapped file, or there if they take over half of what is free",
    )
    add("--store_dir", help="folder of that file; default: the data folder")
    add("--shape", default="greek", help="deepvoxels: armchair, cube, greek or vase")
    add_switch(group, "white_bkgd", "white behind transparent pixels and rays that hit nothing")
    add_switch(group, "half_res", "halve the pictures of Blender and LINEMOD scenes")
    add("--downscale", type=positive, default=1, help="reduce Blender pictures, and transforms'")
    add("--factor", type=positive, default=8, help="llff, colmap: pictures this many times smaller")
    add_switch(group, "no_ndc", "llff: world coordinates (scenes that do not face forward)")
    add_switch(group, "lindisp", "space coarse samples evenly in 1 / depth")
    add_switch(group, "spherify", "llff: 360-degree capture around an object")
    add("--llffhold", type=not_negative, default=8, help="llff: every N-th view is for testing")
    add("--near", type=amount, default=0.0, help="transforms, colmap: where rays begin; 0: auto")
    add("--far", type=amount, default=0.0, help="transforms, colmap: where rays end; 0: auto")
    add_switch(group, "pixel_center", "rays through pixel centres (nerf-pytorch: corners)")


def add_network_flags(parser) -> None:
    """Flags of a field, for any script."""
    group = parser.add_argument_group("network")
    add = group.add_argument
    add("--netdepth", type=positive, default=8, help="layers")
    add("--netwidth", type=positive, default=256, help="channels per layer")
    add("--i_embed", type=int, choices=(0, -1), default=0, help="0: encode positions, -1: do not")
    add("--multires", type=frequencies, default=10, help="frequencies of the position")
    add(
        "--field",
        choices=("mlp", *sorted(ENCODINGS)),
        default="mlp",
        help="positional-encoding MLP, or features on grids and two small MLPs",
    )
    add("--grid_res", type=grid_side, default=128, help="finest side of a grid of features")


def add_grid_flags(parser) -> None:
    """Flags of marching through an occupancy grid, for any script."""
    group = parser.add_argument_group("occupancy grid")
    add = group.add_argument
    add("--occ_res", type=positive, default=64, help="cells per side of the occupancy grid")
    add("--march_steps", type=positive, default=128, help="samples across the whole scene box")
    add("--early_stop", type=decay, default=1e-3, help="transmittance that ends a ray; 0: none")


def add_field_flags(parser) -> None:
    """Flags of the networks and of sampling along rays of posed pictures."""
    add_network_flags(parser)
    group = parser.add_argument_group("view dependence and fine network")
    add = group.add_argument
    add("--netdepth_fine", type=positive, default=8, help="layers of the fine network")
    add("--netwidth_fine", type=positive, default=256, help="channels per layer, fine network")
    add_switch(group, "use_viewdirs", "colour depends on the viewing direction (5D input)")
    add("--multires_views", type=frequencies, default=4, help="frequencies of the direction")
    add_grid_flags(parser)
    group = parser.add_argument_group("fast path")
    add = group.add_argument
    add_switch(group, "fast", "the recommended set of fast flags, weaker than any other you type")
    add_switch(group, "occ_grid", "one field, sampled only where an occupancy grid is not empty")
    add("--target_samples", type=positive, default=8192, help="samples per step; rays follow")
    add("--scene_bound", type=amount, default=0.0, help="half side of the scene's cube; 0: auto")
    add_switch(group, "contract", "unbounded scene: draw everything far away into a ball")
    add("--cone_angle", type=amount, default=0.01, help="growth of steps with distance (contract)")
    add_switch(group, "random_bg", "train over random backgrounds, where pictures have alpha")
    add(
        "--hull_init",
        choices=("off", "on", "auto"),
        default="off",
        help="start the grid as the visual hull of the alpha masks; auto: if there are any",
    )
    add("--composite", choices=sorted(PACKED_WEIGHTS), default="cumsum", help="packed blending")
    add(
        "--near_scaling",
        type=amount,
        default=0.0,
        help="scale gradients nearer than this by the distance squared; 0: do not",
    )
    add(
        "--resample",
        type=not_negative,
        default=0,
        help="samples a ray, drawn anew where a first look finds density; 0: those of that look",
    )
    add("--lambda_tv", type=amount, default=0.0, help="smoothness of tri-planes, e.g. 0.03; 0: off")
    group = parser.add_argument_group("sampling")
    add = group.add_argument
    add("--N_samples", type=positive, default=64, help="coarse samples per ray")
    add("--N_importance", type=not_negative, default=0, help="further, fine samples per ray")
    add("--perturb", type=amount, default=1.0, help="1: jitter training samples, 0: do not")
    add(
        "--raw_noise_std",
        type=amount,
        default=0.0,
        help="noise on training densities; not with occ_grid",
    )
    add("--chunk", type=positive, default=1024 * 32, help="most rays processed together")
    add("--netchunk", type=positive, default=1024 * 64, help="most points in one network call")


def add_export_flags(group) -> None:
    """Flags of the mesh that a finished run gives, for any script."""
    add = group.add_argument
    add("--export", help="write the mesh of the newest checkpoint: out.glb, out.obj or out.ply")
    add("--mesh_res", type=grid_side, default=128, help="cells of the mesh's longer side")
    add("--mesh_level", type=amount, default=0.0, help="density of the surface; 0: auto")


def check_export_name(flag: str, name: str | None, endings: tuple[str, ...]) -> None:
    """ValueError unless a file to be written has one of the endings."""
    if name and Path(name).suffix.lower() not in endings:
        raise ValueError(f"--{flag} {name}: expected a name that ends in {' '.join(endings)}")


def add_viewer_flags(parser) -> None:
    """Flags of the live viewer."""
    group = parser.add_argument_group("viewer")
    add_switch(group, "viewer", "show the scene in the browser while it trains (pip install viser)")
    group.add_argument("--viewer_port", type=positive, default=8080, help="where it is served")
    group.add_argument("--viewer_host", default="127.0.0.1", help="0.0.0.0: to other machines too")
    help = "with --render_only: render these key frames, saved by the viewer (camera_path.json)"
    group.add_argument("--camera_path", help=help)


def add_nerf_flags(parser) -> None:
    """Flags of run_nerf.py alone."""
    group = parser.add_argument_group("ray batches")
    add = group.add_argument
    add("--N_rand", type=positive, default=32 * 32 * 4, help="rays per step, over all processes")
    add_switch(group, "no_batching", "all rays of a step from one picture")
    add("--precrop_iters", type=not_negative, default=0, help="first steps use central crops only")
    add("--precrop_frac", type=fraction, default=0.5, help="part of the picture taken for them")
    group = parser.add_argument_group("training posed pictures")
    add_switch(
        group, "compile", "compile the networks with torch.compile; for GPUs, slower on CPUs"
    )
    group.add_argument("--dead_restarts", type=not_negative, default=3, help="new seeds if stuck")
    group = parser.add_argument_group("rendering")
    add = group.add_argument
    add("--i_testset", type=not_negative, default=50000, help="steps between test renders; 0: end")
    add_switch(group, "render_only", "render from the newest checkpoint instead of training")
    add_switch(group, "render_test", "render the test views, with metrics, not the camera path")
    add("--render_factor", type=not_negative, default=0, help="render N times smaller, e.g. 4")
    add("--metres_per_unit", type=amount, default=0.0, help="scene's scale, for depth; 0: unknown")
    add_viewer_flags(parser)
    group = parser.add_argument_group("export (reads a finished run)")
    add_export_flags(group)
    add = group.add_argument
    parser.set_defaults(mesh_res=256)
    add("--export_points", help="write a point cloud with colours and normals: out.ply")
    add("--num_points", type=positive, default=200_000, help="of the point cloud, about")
    add("--export_bound", type=amount, default=0.0, help="half side of the exported cube; 0: auto")


def nerf_parser() -> configargparse.ArgumentParser:
    """The flags of run_nerf.py."""
    parser = new_parser("Train, render and measure a neural radiance field from posed pictures.")
    add_run_flags(parser)
    add_scene_flags(parser)
    add_field_flags(parser)
    add_nerf_flags(parser)
    return parser


def parse(parser, argv: list[str] | None = None, name_of=None) -> argparse.Namespace:
    """The flags of this run. Unknown names end the program and name the nearest known one.

    name_of(args): what a run without ``--expname`` is called; by default ``run_name``.
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
        argv = [*FAST, *argv[:place], *argv[place:]]
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
        args.expname = (name_of or run_name)(args)
    return args


def run_name(args: argparse.Namespace) -> str:
    """The name of a run of posed pictures that was given none."""
    return Path(args.config).stem if args.config else Path(args.datadir).resolve().name


def _nearest(name: str, known: list[str]) -> str:
    lowered = {option.lower(): option for option in known}
    close = difflib.get_close_matches(name.lower(), lowered, n=1, cutoff=0.0)
    return f"did you mean {lowered[close[0]]!r}? (--help lists all flags)"


def check_nerf_flags(args: argparse.Namespace, num_ranks: int) -> None:
    """Raise ValueError on flags that contradict one another or cannot work."""
    if args.N_rand % num_ranks:
        raise ValueError(
            f"--N_rand {args.N_rand} does not divide by {num_ranks} processes; "
            f"use a multiple of {num_ranks}"
        )
    check_export_name("export", args.export, FORMATS)
    check_export_name("export_points", args.export_points, (".ply",))
    given = [n for n in ("render_only", "export", "export_points", "ft_path") if getattr(args, n)]
    if args.no_reload and given:
        other = f"--{given[0]}"
        raise ValueError(f"--no_reload and {other} contradict each other; leave one out")
    if args.half_res and args.downscale > 1:
        raise ValueError("--half_res and --downscale both reduce the pictures; leave one out")
    if args.dataset_type == "llff" and args.spherify and not args.no_ndc:
        raise ValueError("--spherify needs --no_ndc: NDC is only for cameras that face forward")
    if args.dataset_type == "llff" and args.lindisp and not args.no_ndc:
        raise ValueError("--lindisp needs --no_ndc: NDC is even in 1 / depth already")
    if args.N_importance and args.N_samples < 3:
        raise ValueError(
            f"--N_samples {args.N_samples} is too few for importance sampling; use 3 or more"
        )
    if args.field != "mlp" and not args.occ_grid:
        raise ValueError(f"--field {args.field} needs --occ_grid (or use --fast for both)")
    if args.lambda_tv and args.field != "triplane":
        raise ValueError(f"--lambda_tv is for --field triplane, not {args.field}; leave it out")
    fast_only = [f"--{n}" for n in ("contract", "random_bg", "resample") if getattr(args, n)]
    fast_only += ["--hull_init on"] * (args.hull_init == "on")
    if fast_only and not args.occ_grid:
        raise ValueError(f"{fast_only[0]} needs --occ_grid (or use --fast); or leave it out")
    if args.hull_init == "on" and args.contract:
        raise ValueError("--hull_init needs a bounded scene; leave it or --contract out")
    check_run_flags(args)


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


def build_renderer(args: argparse.Namespace, scene: Scene | None = None, warn=print):
    """The networks and sampling that ``args`` asks for, with weights from torch's global seed.

    scene: what an occupancy grid must cover; not needed without ``--occ_grid``.
    """
    background = float(args.white_bkgd)

    def field(depth: int, width: int) -> NeRFField:
        return NeRFField(
            depth,
            width,
            multires=args.multires,
            multires_views=args.multires_views,
            use_viewdirs=args.use_viewdirs,
            encode=args.i_embed == 0,
            out_channels=5 if args.N_importance > 0 else 4,  # the fifth is nerf-pytorch's, unused
        )

    if args.occ_grid:
        return _grid_renderer(args, scene, field, warn)
    return NeRFRenderer(
        field(args.netdepth, args.netwidth),
        field(args.netdepth_fine, args.netwidth_fine) if args.N_importance > 0 else None,
        num_samples=args.N_samples,
        num_importance=args.N_importance,
        background=background,
        perturb=args.perturb > 0,
        raw_noise_std=args.raw_noise_std,
        lindisp=args.lindisp,
    )


def _grid_renderer(args: argparse.Namespace, scene: Scene, mlp, warn) -> GridRenderer:
    """One field with an occupancy grid in the space that the scene's cameras look into."""
    space = scene_space(
        scene,
        args.march_steps,
        bound=args.scene_bound,
        contract=args.contract,
        cone_angle=args.cone_angle,
    )
    grid = OccupancyGrid(args.occ_res).to(scene.c2w.device)
    has_alpha = scene.images.shape[-1] == 4
    if args.hull_init == "on" or (args.hull_init == "auto" and has_alpha and not args.contract):
        space, warning = carve(scene, grid, space)
        if warning:
            warn(warning)
    warn(f"scene space: {space}; {grid.fraction:.1%} of the grid to look at")
    if args.field == "mlp":
        field = mlp(args.netdepth, args.netwidth)
    else:
        field = FeatureField(
            ENCODINGS[args.field](args.grid_res),
            multires_views=args.multires_views,
            use_viewdirs=args.use_viewdirs,
        )
    return GridRenderer(
        field,
        grid,
        space,
        background=float(args.white_bkgd),
        random_background=args.random_bg and has_alpha,
        target_samples=args.target_samples,
        composite=args.composite,
        early_stop=args.early_stop,
        near_scaling=args.near_scaling,
        lambda_tv=args.lambda_tv,
        resample=args.resample,
    )


def parameter_groups(renderer, args: argparse.Namespace) -> list[dict]:
    """Adam's groups: features on grids learn at their own rate ("scale" times the others')."""
    tables = []
    for member in getattr(renderer, "members", [renderer]):
        field = getattr(member, "field", None)
        if field is not None and args.field != "mlp":
            tables += field.encoding.parameters()
    others = set(renderer.parameters()) - set(tables)
    groups = [{"params": [p for p in renderer.parameters() if p in others], "scale": 1.0}]
    if tables:
        groups.append({"params": tables, "scale": args.lrate_grid / args.lrate})
    return groups


def learning_rate(step: int, args: argparse.Namespace) -> float:
    """Learning rate of update ``step`` (0 is the first), after a linear warm-up."""
    warmup = min(1.0, (step + 1) / args.lrate_warmup) if args.lrate_warmup else 1.0
    if args.lr_schedule == "cosine":
        decay = 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, step / args.N_iters)))
    else:
        decay = 0.1 ** (step / (args.lrate_decay * 1000))
    return args.lrate * warmup * decay


def structural_changes(saved: dict, args: argparse.Namespace, structural=STRUCTURAL) -> list[str]:
    """The structural flags whose saved and present values differ, as "name: saved -> present"."""
    return _changes(saved, args, structural)


def other_changes(saved: dict, args: argparse.Namespace, structural=STRUCTURAL) -> list[str]:
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
