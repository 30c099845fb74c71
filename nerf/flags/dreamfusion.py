"""Flags of run_dreamfusion.py.

Schedules are numbers or step:value,step:value (linear between). Sources of a flag as in
``nerf.flags.common``.
"""

import argparse
import math
import re
from pathlib import Path

from nerf.field import ACTIVATIONS
from nerf.flags import common
from nerf.flags.common import (
    add_export_flags,
    add_grid_flags,
    add_network_flags,
    add_run_flags,
    add_switch,
    add_viewer_flags,
    check_export_name,
    check_run_flags,
    new_parser,
)
from nerf.flags.types import (
    fraction,
    non_negative,
    non_negative_int,
    positive_float,
    positive_int,
    unit_interval,
)
from nerf.media import MESH_FORMATS
from nerf.training.schedules import highest, parse_schedule, schedule, scheduled

VIEWS = ("front", "right", "back", "left", "overhead")
KINDS = ("sds", "csd", "vsd", "gaussian")
# A checkpoint fits a run only where these agree; the model's fingerprint is compared too.
GUIDANCE_STRUCTURAL = (
    "prompt", "negative_prompt", *(f"prompt_{view}" for view in VIEWS),
    *(f"negative_{view}" for view in VIEWS), "view_text", "guidance", "perp_neg", "lora_rank",
    "lora_model",
)  # fmt: skip
# A checkpoint fits a run only where these agree; the model's fingerprint is compared too.
STRUCTURAL = (
    *GUIDANCE_STRUCTURAL,
    *"space field activation netdepth netwidth multires i_embed grid_res occ_res bound".split(),
    *"blob_scale blob_std density_scale background n_particles smooth_planes".split(),
)
MAX_NAME = 80  # characters of a run folder's name made from a prompt


def slug(prompt: str) -> str:
    """A prompt as a folder's name: "a red cone" -> "a_red_cone"."""
    words = re.sub(r"[^\w]+", "_", prompt.lower()).strip("_")
    return words[:MAX_NAME].rstrip("_") or "dream"


def add_text_flags(parser) -> None:
    """Flags of the prompt."""
    group = parser.add_argument_group("text")
    add = group.add_argument
    add("--prompt", "--text", help="what to make; quote it where it holds a #")
    add("--negative_prompt", default="", help="what it should not look like")
    add("--prompt_file", help="one prompt a line: makes them all, one after the other")
    for view in VIEWS:
        add(f"--prompt_{view}", help=f"the whole text for {view} views, instead of view words")
    for view in VIEWS:
        add(f"--negative_{view}", help=f"the negative prompt for {view} views")
    add(
        "--view_text",
        choices=("suffix", "prefix", "none"),
        default="suffix",
        help='where words such as "front view" go',
    )


def add_guidance_flags(parser) -> None:
    """Flags of the model and of how it guides."""
    group = parser.add_argument_group("guidance")
    add = group.add_argument
    add(
        "--guidance",
        choices=KINDS,
        default="sds",
        help="score distillation, classifier score distillation, variational score distillation, "
        "or a closed-form prior around an orange ball, to test the loop",
    )
    add("--guidance_scale", type=schedule, default="100", help="u + s (c - u); a schedule")
    add("--guidance_rescale", type=schedule, default="0",
        help="0 to 1: keep colors from growing with the scale; a schedule")  # fmt: skip
    add("--weighting", choices=("sds", "uniform", "annealed", "fantasia3d"), default="sds",
        help="w(t); annealed: from sds to uniform")  # fmt: skip
    add("--t_min", type=schedule, default="0.02", help="least noise, part of all; a schedule")
    add("--t_max", type=schedule, default="0.98", help="most noise, part of all; a schedule")
    add("--t_anneal", choices=("none", "linear", "sqrt", "falling"), default="none",
        help="none: t is drawn; else it falls from t_max to t_min as training goes on")  # fmt: skip
    add("--latent_clip", type=schedule, default="0", help="largest number of a latent's gradient")
    add_switch(group, "perp_neg", "push each view away from the other views' words")
    add("--lambda_sds", type=schedule, default="1", help="weight of the guidance; a schedule")
    add("--i_attn", type=non_negative_int, default=0,
        help="steps between pictures of where each word is looked at; 0: never")  # fmt: skip
    add("--attn_tokens", help="words of the prompt to draw then, with commas between; default: all")
    group = parser.add_argument_group("variational score distillation (--guidance vsd)")
    add = group.add_argument
    add("--n_particles", type=positive_int, default=1, help="objects; each step takes one")
    add("--lora_rank", type=positive_int, default=4, help="of the model's copy")
    add("--lora_model", help="folder or hub id of another model for the copy; default: --sd_model")
    add("--lora_file", help="LoRA to start the copy from (lora.safetensors of a run)")
    add("--lrate_lora", type=positive_float, default=1e-4, help="of the copy")
    add("--lora_views", type=non_negative_int, default=0,
        help="views of a step that the copy learns from, on each process; 0: all")  # fmt: skip
    add("--camera_dropout", type=unit_interval, default=0.1, help="cameras the copy is not told")


def add_model_flags(parser) -> None:
    """Flags of the diffusion model: where it is, and what it may cost."""
    group = parser.add_argument_group("diffusion model")
    add = group.add_argument
    add("--sd_model", default="guidance/tiny/model", help="folder or hub id of a Stable Diffusion")
    add_switch(group, "local_files_only", "never ask the hub")
    add_switch(group, "allow_pickle", "open .bin weights, which can run code")
    add("--guidance_res", type=non_negative_int, default=0,
        help="pixels per side that renders are shown to the model at; 0: its own")  # fmt: skip
    add("--scheduler", help="noise schedule instead of the model's own: ddim, ddpm, pndm ...")
    add("--guidance_dtype", choices=("auto", "fp32", "bf16", "fp16"), default="auto",
        help="precision of the model; auto: fp16 on a GPU, else fp32")  # fmt: skip
    add("--attention_slicing", default="off", help="off, auto, max or heads at a time: less memory")
    add_switch(group, "vae_slicing", "one picture at a time through the VAE: less memory")
    add_switch(group, "vae_checkpointing", "compute the VAE's inside twice: less memory")
    add_switch(group, "channels_last", "another order in memory: faster on some GPUs")
    add("--offload", choices=("none", "model", "sequential"), default="none",
        help="model: parts of the model are on the GPU only while they work")  # fmt: skip
    add_switch(group, "compile", "torch.compile the U-Net: minutes first, faster then")


def add_object_flags(parser) -> None:
    """Flags of the object, its cameras, light and shape losses."""
    group = parser.add_argument_group("object")
    add = group.add_argument
    add("--space", choices=("3d", "2d"), default="3d", help="2d: make pictures, not an object")
    add("--bound", type=positive_float, default=1.0, help="half side of the object's cube")
    add("--activation", choices=sorted(ACTIVATIONS), default="silu", help="of the mlp")
    add("--blob_scale", type=non_negative, default=10.0, help="density the object starts with ...")
    add("--blob_std", type=positive_float, default=0.5, help="... and where it is 0")
    add(
        "--density_scale",
        type=positive_float,
        default=1.0,
        help="larger: harder surfaces, fewer samples behind them",
    )
    add_switch(group, "smooth_planes", "blur a triplane as it is read: smoother surfaces")
    add("--normals", choices=("analytic", "fd"), help="default: analytic for mlp, fd for grids")
    group = parser.add_argument_group("cameras")
    add = group.add_argument
    add("--batch_views", type=positive_int, default=4, help="views per step, over all processes")
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
        type=unit_interval,
        default=0.5,
        help="elevations even by area",
    )
    add("--view_spread", type=fraction, default=1.0,
        help="share of each of 8 directions and 4 heights, about its middle")  # fmt: skip
    add("--jitter_pos", type=non_negative, default=0.1, help="largest shift of a camera")
    add("--jitter_target", type=non_negative, default=0.2, help="deviation of its aim")
    add("--jitter_up", type=non_negative, default=0.02, help="deviation of its up direction")
    group = parser.add_argument_group("light")
    add = group.add_argument
    add("--albedo_steps", type=non_negative_int, default=1000, help="first steps without light")
    add("--p_diffuse", type=unit_interval, default=0.75, help="later views that are lit")
    add("--p_textureless", type=unit_interval, default=0.5, help="of those, shown white")
    add("--ambient", type=unit_interval, default=0.1, help="light from everywhere on lit views")
    add(
        "--background",
        choices=("random", "learned", "white", "black"),
        default="learned",
        help="behind the object while training",
    )
    add(
        "--p_random_bg",
        type=unit_interval,
        default=0.5,
        help="views before a random color",
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
    add_switch(group, "render_only", "render the turntable from the newest checkpoint")
    add_export_flags(group)
    add_switch(group, "mesh", "write mesh.glb into the run folder at the end of training")
    add("--init_from", help="run folder or checkpoint whose object to start from")
    add("--eval_res", type=positive_int, default=128, help="pixels per side of what is rendered")
    add("--eval_background", choices=("white", "black", "learned"), default="white", help="there")
    add("--eval_elevation", type=float, default=20.0, help="of the turntable, degrees")
    add("--video_frames", type=positive_int, default=60, help="of the turntable")


def dream_parser():
    """The flags of run_dreamfusion.py."""
    parser = new_parser("Make a 3-D object from a text by score distillation.")
    add_run_flags(parser)
    add_text_flags(parser)
    add_guidance_flags(parser)
    add_model_flags(parser)
    add_object_flags(parser)
    add_network_flags(parser)
    add_grid_flags(parser)
    add_output_flags(parser)
    add_viewer_flags(parser)
    parser.set_defaults(
        N_iters=10000, lrate=1e-3, i_print=50, i_img=100, i_weights=1000, i_video=0, netdepth=4,
        netwidth=64, multires=6, ema_decay=0.99, march_steps=128, occ_res=48, lrate_grid=1e-2,
    )  # fmt: skip
    return parser


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags of this run of run_dreamfusion.py."""
    return common.parse(dream_parser(), argv, lambda args: slug(args.prompt or ""))


def check_dream_flags(args: argparse.Namespace, num_ranks: int) -> None:
    """Raise ValueError on flags that contradict one another or cannot work."""
    given = [f"--{n}" for n in ("render_only", "export", "init_from") if getattr(args, n)]
    if len(given) > 1:
        raise ValueError(f"{' and '.join(given)} exclude one another; use one at a time")
    if args.no_reload and (args.render_only or args.export):
        raise ValueError(f"--no_reload and {given[0]} contradict each other; leave one out")
    check_export_name("export", args.export, MESH_FORMATS)
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
    check_guidance_flags(args)
    check_run_flags(args)


def check_guidance_flags(args: argparse.Namespace) -> None:
    """Raise ValueError on flags that contradict one another or cannot work."""
    reading = args.render_only or args.export
    if args.guidance != "gaussian" and not reading and not (args.prompt or "").strip():
        raise ValueError('--prompt is empty; say what to make: --prompt "a red cone"')
    for name in ("t_min", "t_max", "guidance_rescale"):
        if not all(0 <= value <= 1 for value in parse_schedule(getattr(args, name))[1]):
            raise ValueError(f"--{name} {getattr(args, name)}; expected parts from 0 to 1")
    steps = {s for n in ("t_min", "t_max") for s in parse_schedule(getattr(args, n))[0]}
    if any(scheduled(args.t_min, step) > scheduled(args.t_max, step) for step in steps):
        raise ValueError(f"--t_min {args.t_min} is above --t_max {args.t_max}; exchange them")
    positive_int = [n for n in vars(args) if n.startswith("lambda_")]
    for name in ("latent_clip", *positive_int):
        if min(parse_schedule(getattr(args, name))[1]) < 0:
            raise ValueError(f"--{name} {getattr(args, name)}; expected 0 or more")
    if args.guidance == "gaussian" and (args.perp_neg or args.i_attn):
        raise ValueError("--guidance gaussian has no words: leave out --perp_neg and --i_attn")
    if args.guidance == "gaussian" and args.guidance_res:
        raise ValueError("--guidance gaussian sees renders as they are: leave out --guidance_res")
    if args.perp_neg and args.space == "2d":
        raise ValueError("--perp_neg tells views apart, and --space 2d has none; leave it out")
    if args.guidance != "vsd":
        for name in ("lora_model", "lora_file"):
            if getattr(args, name):
                raise ValueError(f"--{name} is for --guidance vsd; leave it out")
    if args.n_particles > 1 and args.space == "2d":
        raise ValueError("--space 2d makes --batch_views pictures; leave out --n_particles")


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
