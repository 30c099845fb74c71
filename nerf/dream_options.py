"""Flags of run_dreamfusion.py, and the object renderer they ask for.

Schedules are numbers or step:value,step:value (linear between). Sources of a flag as in
``nerf.options``.
"""

import argparse
import json
import math
import re
from pathlib import Path

from nerf import guidance_options, options
from nerf.cameras import OrbitRanges
from nerf.encodings import ENCODINGS
from nerf.field import ACTIVATIONS, FeatureField, NeRFField
from nerf.mesh import FORMATS
from nerf.object_renderer import ObjectRenderer, Picture
from nerf.occupancy import OccupancyGrid
from nerf.particles import Particles
from nerf.schedules import highest, parse_schedule, schedule
from nerf.shading import LookSettings

# A checkpoint fits a run only where these agree; the model's fingerprint is compared too.
STRUCTURAL = (
    *guidance_options.STRUCTURAL,
    *"space field activation netdepth netwidth multires i_embed grid_res occ_res bound".split(),
    *"blob_scale blob_std density_scale background n_particles smooth_planes".split(),
)
MAX_NAME = 80  # characters of a run folder's name made from a prompt


def slug(prompt: str) -> str:
    """A prompt as a folder's name: "a red cone" -> "a_red_cone"."""
    words = re.sub(r"[^\w]+", "_", prompt.lower()).strip("_")
    return words[:MAX_NAME].rstrip("_") or "dream"


def add_object_flags(parser) -> None:
    """Flags of the object, its cameras, light and shape losses."""
    group = parser.add_argument_group("object")
    add = group.add_argument
    add("--space", choices=("3d", "2d"), default="3d", help="2d: make pictures, not an object")
    add("--bound", type=options.positive_number, default=1.0, help="half side of the object's cube")
    add("--activation", choices=sorted(ACTIVATIONS), default="silu", help="of the mlp")
    add(
        "--blob_scale", type=options.amount, default=10.0, help="density the object starts with ..."
    )
    add("--blob_std", type=options.positive_number, default=0.5, help="... and where it is 0")
    add(
        "--density_scale",
        type=options.positive_number,
        default=1.0,
        help="larger: harder surfaces, fewer samples behind them",
    )
    options.add_switch(group, "smooth_planes", "blur a triplane as it is read: smoother surfaces")
    add("--normals", choices=("analytic", "fd"), help="default: analytic for mlp, fd for grids")
    group = parser.add_argument_group("cameras")
    add = group.add_argument
    add(
        "--batch_views", type=options.positive, default=4, help="views per step, over all processes"
    )
    add("--train_res", type=schedule, default="64", help="pixels per side; a schedule of steps")
    for name, low, high in (
        ("azimuth", -180.0, 180.0),
        ("elevation", -10.0, 90.0),
        ("radius", 1.0, 1.5),
        ("fov", 40.0, 70.0),
    ):
        add(f"--{name}_range", type=float, nargs=2, default=[low, high], help="of random cameras")
    add(
        "--sphere_rate",
        type=options.part,
        default=0.5,
        help="elevations even by area",
    )
    add("--view_spread", type=options.fraction, default=1.0,
        help="share of each of 8 directions and 4 heights, about its middle")  # fmt: skip
    add("--jitter_pos", type=options.amount, default=0.1, help="largest shift of a camera")
    add("--jitter_target", type=options.amount, default=0.2, help="deviation of its aim")
    add("--jitter_up", type=options.amount, default=0.02, help="deviation of its up direction")
    group = parser.add_argument_group("light")
    add = group.add_argument
    add("--albedo_steps", type=options.not_negative, default=1000, help="first steps without light")
    add("--p_diffuse", type=options.part, default=0.75, help="later views that are lit")
    add("--p_textureless", type=options.part, default=0.5, help="of those, shown white")
    add("--ambient", type=options.part, default=0.1, help="light from everywhere on lit views")
    add(
        "--background",
        choices=("random", "learned", "white", "black"),
        default="learned",
        help="behind the object while training",
    )
    add(
        "--p_random_bg",
        type=options.part,
        default=0.5,
        help="views before a random colour",
    )
    group = parser.add_argument_group("shape losses (schedules)")
    add = group.add_argument
    add("--lambda_opacity", type=schedule, default="0", help="empty space")
    add("--lambda_entropy", type=schedule, default="0", help="no fog")
    add("--lambda_orient", type=schedule, default="0", help="normals face the camera")
    add("--lambda_spread", type=schedule, default="0", help="thin surfaces")
    add("--lambda_tv", type=schedule, default="0", help="smooth tri-planes")


def add_output_flags(parser) -> None:
    """Flags of what is rendered and exported."""
    group = parser.add_argument_group("output")
    add = group.add_argument
    options.add_switch(group, "render_only", "render the turntable from the newest checkpoint")
    options.add_export_flags(group)
    options.add_switch(group, "mesh", "write mesh.glb into the run folder at the end of training")
    add("--init_from", help="run folder or checkpoint whose object to start from")
    add(
        "--eval_res", type=options.positive, default=128, help="pixels per side of what is rendered"
    )
    add("--eval_background", choices=("white", "black", "learned"), default="white", help="there")
    add("--eval_elevation", type=float, default=20.0, help="of the turntable, degrees")
    add("--video_frames", type=options.positive, default=60, help="of the turntable")


def dream_parser():
    """The flags of run_dreamfusion.py."""
    parser = options.new_parser("Make a 3-D object from a text by score distillation.")
    options.add_run_flags(parser)
    guidance_options.add_text_flags(parser)
    guidance_options.add_guidance_flags(parser)
    guidance_options.add_model_flags(parser)
    add_object_flags(parser)
    options.add_network_flags(parser)
    options.add_grid_flags(parser)
    add_output_flags(parser)
    options.add_viewer_flags(parser)
    parser.set_defaults(
        N_iters=10000, lrate=1e-3, i_print=50, i_img=100, i_weights=1000, i_video=0, netdepth=4,
        netwidth=64, multires=6, ema_decay=0.99, march_steps=128, occ_res=48, lrate_grid=1e-2,
    )  # fmt: skip
    return parser


def check_dream_flags(args: argparse.Namespace, num_ranks: int) -> None:
    """Raise ValueError on flags that contradict one another or cannot work."""
    given = [f"--{n}" for n in ("render_only", "export", "init_from") if getattr(args, n)]
    if len(given) > 1:
        raise ValueError(f"{' and '.join(given)} exclude one another; use one at a time")
    if args.no_reload and (args.render_only or args.export):
        raise ValueError(f"--no_reload and {given[0]} contradict each other; leave one out")
    options.check_export_name("export", args.export, FORMATS)
    if args.batch_views % num_ranks:
        raise ValueError(
            f"--batch_views {args.batch_views} does not divide by {num_ranks} processes; "
            f"use a multiple of {num_ranks}"
        )
    if args.smooth_planes and args.field != "triplane":
        raise ValueError(f"--smooth_planes is for --field triplane, not {args.field}; leave it out")
    if args.space == "2d" and args.export:
        raise ValueError("--export writes a mesh, and --space 2d has none; leave one out")
    if args.space == "2d" and len(parse_schedule(args.train_res)[1]) > 1:
        raise ValueError("--space 2d keeps one size; give --train_res one number")
    if args.normals == "analytic" and args.field == "triplane":
        raise ValueError(
            "--normals analytic needs second derivatives, which --field triplane lacks; "
            "use --normals fd"
        )
    if highest(args.lambda_tv) and args.field != "triplane":
        raise ValueError(f"--lambda_tv is for --field triplane, not {args.field}; leave it out")
    if args.field != "mlp" and args.i_embed == -1:
        raise ValueError(f"--i_embed -1 is for --field mlp, not {args.field}; leave it out")
    for name in ("azimuth", "elevation", "radius", "fov"):
        low, high = getattr(args, f"{name}_range")
        if not low <= high or not math.isfinite(low + high):
            raise ValueError(f"--{name}_range {low} {high}; expected two numbers, smaller first")
    if (
        not 1e-6 < args.radius_range[0] <= args.radius_range[1] < 1e6
        or not 0 < args.fov_range[0] <= args.fov_range[1] < 180
    ):
        raise ValueError(
            "--radius_range has to lie above 0 (to 1e6), --fov_range within 0 and 180 degrees"
        )
    if not -90 <= args.elevation_range[0] <= args.elevation_range[1] <= 90:
        raise ValueError(f"--elevation_range {args.elevation_range}; expected -90 to 90")
    sizes = parse_schedule(args.train_res)[1]
    if min(sizes) < 8 or any(size % 1 for size in sizes):
        raise ValueError(f"--train_res {args.train_res}; expected whole numbers, at least 8 pixels")
    if not -90 <= args.eval_elevation <= 90:
        raise ValueError(f"--eval_elevation {args.eval_elevation}; expected -90 to 90 degrees")
    guidance_options.check_guidance_flags(args)
    options.check_run_flags(args)


def object_renderer(args: argparse.Namespace):
    """The module that ``args`` asks for, with weights from torch's global seed."""
    if args.space == "2d":
        return Picture(args.batch_views, int(highest(args.train_res)))
    members = [_one_object(args) for _ in range(args.n_particles)]
    return members[0] if args.n_particles == 1 else Particles(members)


def _one_object(args: argparse.Namespace) -> ObjectRenderer:
    if args.field == "mlp":
        field = NeRFField(
            args.netdepth,
            args.netwidth,
            multires=args.multires,
            use_viewdirs=False,
            encode=args.i_embed == 0,
            activation=args.activation,
        )
    else:
        smooth = {"smooth": True} if args.smooth_planes else {}
        field = FeatureField(ENCODINGS[args.field](args.grid_res, **smooth), use_viewdirs=False)
    return ObjectRenderer(
        field,
        OccupancyGrid(args.occ_res, decay=0.5),  # the fog it starts with goes in a few looks
        bound=args.bound,
        num_steps=args.march_steps,
        blob_scale=args.blob_scale,
        blob_std=args.blob_std,
        density_scale=args.density_scale,
        normals=args.normals or ("analytic" if args.field == "mlp" else "fd"),
        early_stop=args.early_stop,
        learned_background=args.background == "learned",
    )


def orbit_ranges(args: argparse.Namespace) -> OrbitRanges:
    """Where random cameras stand."""
    return OrbitRanges(
        azimuth_deg=tuple(args.azimuth_range),
        elevation_deg=tuple(args.elevation_range),
        radius=tuple(args.radius_range),
        fov_deg=tuple(args.fov_range),
        sphere_rate=args.sphere_rate,
        jitter_position=args.jitter_pos,
        jitter_target=args.jitter_target,
        jitter_up=args.jitter_up,
    )


def look_settings(args: argparse.Namespace) -> LookSettings:
    """By which laws views are lit."""
    return LookSettings(
        ambient=args.ambient,
        p_diffuse=args.p_diffuse,
        p_textureless=args.p_textureless,
        background=args.background,
        p_random=args.p_random_bg,
    )


def read_prompts(path: Path) -> list[str]:
    """The prompts of a file, one a line; empty lines and lines that start with # are left out."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--prompt_file {path}: cannot be read ({error})") from None
    prompts = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
    if not prompts:
        raise ValueError(f"--prompt_file {path}: no prompts in it; write one a line")
    return prompts


def find_run(args: argparse.Namespace) -> None:
    """Name the run that ``--render_only`` or ``--export`` reads, where no text was given.

    It is the one of the same --config that was trained last. ValueError if there is none.
    """
    if args.prompt or args.ft_path or args.expname != slug(""):
        return
    runs = []
    for path in Path(args.basedir).glob("*/args.json"):
        try:
            saved = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if "guidance" in saved and args.config in (None, saved.get("config")):
            runs.append((path.stat().st_mtime, path.parent.name))
    if not runs:
        raise ValueError(
            f"{args.basedir}: no run of {args.config or 'run_dreamfusion.py'} in it; train one, or "
            "name it by --prompt or --expname"
        )
    args.expname = max(runs)[1]


def adopt(args: argparse.Namespace, saved: dict, say) -> None:
    """Take over from a checkpoint's flags what its weights were made for."""
    for name in (*STRUCTURAL, "bound", "march_steps", "normals"):
        if name in saved and saved[name] != getattr(args, name):
            if name not in ("prompt", "negative_prompt") and not name.startswith(
                ("prompt_", "negative_")
            ):
                say(f"--{name} {getattr(args, name)} -> {saved[name]} (as it was trained)")
            setattr(args, name, saved[name])
