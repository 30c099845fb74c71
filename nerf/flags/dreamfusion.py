"""Flags of run_dreamfusion.py.

Schedules: ``nerf.training.schedules``. Sources of a flag as in
``nerf.flags.common``.
"""

import argparse
import re
import sys
from pathlib import Path
from typing import Any

from nerf.flags import by_device, common
from nerf.flags.checkpoints import reading_flags
from nerf.flags.common import (
    add_export_flags,
    add_grid_flags,
    add_network_flags,
    add_run_flags,
    add_viewer_flags,
    check_export_name,
    check_run_flags,
    refuse_first,
)
from nerf.flags.modes import leave_out
from nerf.flags.object import (
    add_camera_flags,
    add_light_flags,
    add_loss_flags,
    add_object_flags,
    check_camera_flags,
)
from nerf.flags.optimization import SCHEDULE
from nerf.flags.parser import Parser
from nerf.flags.types import (
    non_negative_int,
    number,
    parts,
    positive_int,
    rate_schedule,
    unit_schedule,
)
from nerf.media import MESH_FORMATS
from nerf.training.schedules import highest, parse_schedule, schedule, scheduled

VIEWS = ("front", "right", "back", "left", "overhead")
# RESIDUALS (with gaussian) and WEIGHTINGS of guidance/sds.py, which nerf/ does not import.
KINDS = ("sds", "csd", "vsd", "gaussian")
WEIGHTINGS = ("sds", "uniform", "annealed", "fantasia3d")
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
# Flags that are schedules of numbers. train_res is a schedule of sizes.
SCHEDULES = (
    "guidance_scale", "guidance_rescale", "t_min", "t_max", "latent_clip", "lambda_sds",
    "lambda_opacity", "lambda_entropy", "lambda_orient", "lambda_spread", "lambda_tv",
)  # fmt: skip
# The short help page: two commands that work in a fresh clone, and the flags that one needs.
TINY = "python run_dreamfusion.py --config configs/dream_tiny.txt"
EXAMPLES = (
    f'{TINY} --prompt "a red cone"',
    f'{TINY} --prompt "a red cone" --export cone.glb',
)
MAIN_FLAGS = (
    "config", "prompt", "negative_prompt", "prompt_file", "sd_model", "guidance", "guidance_scale",
    "N_iters", "expname", "seed", "no_reload", "device", "viewer", "render_only", "export",
)  # fmt: skip
MAX_NAME = 80  # characters of a run folder's name made from a prompt


def slug(prompt: str) -> str:
    """A prompt as a folder's name: "a red cone" -> "a_red_cone"."""
    words = re.sub(r"[^\w]+", "_", prompt.lower()).strip("_")
    return words[:MAX_NAME].rstrip("_") or "dream"


# fmt: off


def add_text_flags(parser: Parser) -> None:
    """Flags of the prompt."""
    section = parser.section("text", "What to make, in words.")
    flag = section.flag
    flag("prompt", "TEXT", None, 'what to make, in quotes: "a red cone"', alias="text")
    flag("negative_prompt", "TEXT", "", "text that the object should not look like")
    flag("prompt_file", "FILE", None,
        "text file with one prompt per line; one object is made after the other")
    flag("view_text", ("suffix", "prefix", "none"), "suffix",
        'where the prompt gets its view words ("front view"); none: no view words')
    for view in VIEWS:
        flag(f"prompt_{view}", "TEXT", None,
            f"complete text for {view} views, instead of --prompt with view words")
    for view in VIEWS:
        flag(f"negative_{view}", "TEXT", None,
            f"negative prompt for {view} views, instead of --negative_prompt")


def add_guidance_flags(parser: Parser) -> None:
    """Flags of how the model guides."""
    section = parser.section("guidance", f"How the diffusion model guides the object. {SCHEDULE}")
    flag, switch = section.flag, section.switch
    flag("guidance", KINDS, "sds",
        "score distillation: plain (sds), classifier (csd) or variational (vsd); gaussian: a "
        "closed-form prior around an orange ball, which needs no model and tests the loop")
    flag("guidance_scale", schedule, "100",
        "s in u + s (c - u), where u is the unconditional prediction and c the one with the text; "
        "a number or step:value,step:value")
    flag("guidance_rescale", schedule, "0",
        "fraction, 0 to 1, of the contrast added by --guidance_scale that is removed again, "
        "against oversaturated colors")
    flag("weighting", WEIGHTINGS, "sds",
        "weight w(t) of the noise levels; annealed: from sds to uniform during training")
    flag("t_min", schedule, "0.02", "lowest noise level, as a fraction of all timesteps, 0 to 1")
    flag("t_max", schedule, "0.98", "highest noise level, as a fraction of all timesteps, 0 to 1")
    flag("t_anneal", ("none", "linear", "sqrt", "falling"), "none",
        "none: random noise levels between --t_min and --t_max; others: levels that fall from "
        "--t_max to --t_min during training")
    flag("latent_clip", schedule, "0",
        "maximum absolute value in the gradient of the latents; 0: no clipping")
    switch("perp_neg", "Perp-Neg: push each view away from the words of the other views")
    flag("lambda_sds", schedule, "1", "weight of the guidance")
    flag("i_attn", non_negative_int, 0,
        "interval, in updates, between pictures of the attention to each word of the prompt; 0: "
        "never")
    flag("attn_tokens", "WORDS", None,
        "comma-separated words of the prompt that --i_attn shows; default: all words")
    flag("i_guidance", non_negative_int, 0,
        "interval, in updates, between pictures of the render, its noisy version and the "
        "prediction; 0: never")


def add_vsd_flags(parser: Parser) -> None:
    """Flags of variational score distillation."""
    section = parser.section(
        "vsd", "Variational score distillation (--guidance vsd) and its LoRA score network."
    )
    flag = section.flag
    flag("n_particles", parts, 1, "number of objects trained together; each update trains one")
    flag("lora_rank", positive_int, 4, "rank of the LoRA score network")
    flag("lora_model", "PATH", None,
        "folder or hub id of another model for the LoRA score network; default: --sd_model")
    flag("lora_file", "FILE", None,
        "LoRA file with which the score network starts (lora.safetensors of a run)")
    flag("lrate_lora", rate_schedule, 1e-4, "learning rate of the LoRA score network")
    flag("lora_views", non_negative_int, 0,
        "number of views per update and process on which the LoRA score network trains; 0: all")
    flag("camera_dropout", unit_schedule, 0.1,
        "fraction of the views on which the LoRA score network trains without a camera, 0 to 1")
    flag("lora_cfg", number, 1.0,
        "guidance scale of the LoRA score network's prediction with and without the camera; 1: no "
        "guidance")


def add_model_flags(parser: Parser) -> None:
    """Flags of the diffusion model: where it is, and what it may cost."""
    section = parser.section("model", "The diffusion model: its location, memory and speed.")
    flag, switch = section.flag, section.switch
    flag("sd_model", "PATH", "guidance/tiny/model",
        "folder or hub id of a Stable Diffusion 1.x or 2.x model, or of the embedded model")
    switch("local_files_only", "never download from the hub")
    switch("allow_pickle", "also read weights from .bin files; code in them does not run")
    flag("sd_lora", "FILE[:SCALE]", None,
        "LoRA file to merge into the frozen U-Net of --sd_model, e.g. style.safetensors:0.8")
    flag("guidance_res", non_negative_int, 0,
        "pixels per side to which renders are resized for the model; 0: the model's own size")
    flag("scheduler", "NAME", None,
        "use the noise schedule of this scheduler instead of the model's own: ddim, ddpm, pndm, "
        "...")
    flag("guidance_dtype", ("auto", "fp32", "bf16", "fp16"), "auto",
        "precision of the model; auto: fp16 on a GPU, else fp32")
    flag("attention_slicing", "SLICES", "off",
        "compute attention in slices (less memory, slower): off, auto, max, or a number of heads "
        "per slice")
    switch("vae_slicing", "pass one picture at a time through the VAE: less memory")
    switch("vae_checkpointing", "recompute the activations of the VAE: less memory, slower")
    switch("channels_last", "use the channels-last memory layout: faster on some GPUs")
    flag("offload", ("none", "model", "sequential"), "none",
        "model: keep each part of the model on the GPU only while it computes; sequential: not "
        "supported")
    switch("compile",
        "compile the U-Net (torch.compile): faster updates after minutes of compiling")


def add_output_flags(parser: Parser) -> None:
    """Flags of what is rendered and exported."""
    section = parser.section("rendering", "Previews, the turntable and the mesh of a run.")
    flag, switch = section.flag, section.switch
    switch("render_only", "render the turntable of a finished run, without training")
    switch("mesh", "write mesh.glb into the run folder at the end of training")
    switch("save_raw", "also write the turntable's depth and normals as float32 .npy files")
    flag("init_from", "PATH", None,
        "run folder or checkpoint with the object from which a new run starts; tri-planes of "
        "another --grid_res are resampled, and a field of another kind or size is fitted to it")
    flag("eval_res", positive_int, 128,
        "pixels per side of the turntable; previews are not larger")
    flag("eval_background", ("white", "black", "learned"), "white",
        "background of previews and of the turntable")
    flag("eval_elevation", number, 20.0,
        "elevation of the turntable's cameras, in degrees, -90 to 90")
    flag("video_frames", positive_int, 60, "number of frames of the turntable")
    add_viewer_flags(parser)
    add_export_flags(parser, mesh_res=128)


# fmt: on
def dream_parser() -> Parser:
    """The flags of run_dreamfusion.py."""
    parser = Parser(
        "run_dreamfusion.py",
        "Make a 3D object from a text by score distillation.",
        EXAMPLES,
        MAIN_FLAGS,
    )
    add_run_flags(
        parser,
        unnamed="made from the prompt",
        images="interval, in updates, between previews; 0: only at the end",
        videos="interval, in updates, between turntables; 0: only at the end",
        measures=False,
    )
    add_text_flags(parser)
    add_guidance_flags(parser)
    add_vsd_flags(parser)
    add_model_flags(parser)
    add_object_flags(parser)
    add_camera_flags(parser)
    add_light_flags(parser)
    add_loss_flags(parser)
    add_network_flags(parser)
    add_grid_flags(parser)
    add_output_flags(parser)
    parser.set_defaults(
        N_iters=10000, lrate=1e-3, i_print=50, i_img=100, i_weights=1000, i_video=0, netdepth=4,
        netwidth=64, multires=6, ema_decay=0.99, march_steps=128, occ_res=48, lrate_grid=1e-2,
    )  # fmt: skip
    return parser


# The recipe of the embedded model, which is the default one. The flags' own defaults are those of
# Stable Diffusion: with the embedded model they take hours, and end in a ball that fills the view.
TINY_MODEL = "guidance/tiny/model"
TINY_CONFIGS = {"sds": "dream_tiny.txt", "csd": "dream_tiny.txt", "vsd": "prolificdreamer_tiny.txt"}


class Flags(argparse.Namespace):
    """Parsed flags, and a line about each group of settings that their mode cannot use."""

    __slots__ = ("left_out",)  # not in vars(), which goes into checkpoints

    def __init__(self, values: dict[str, Any], left_out: list[str]) -> None:
        super().__init__(**values)
        self.left_out = left_out


def parse(argv: list[str] | None = None) -> Flags:
    """The flags of this run of run_dreamfusion.py, without what its mode cannot use.

    Without --config, the embedded model takes its own (TINY_CONFIGS).
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    parser, name_of = dream_parser(), lambda args: run_name(args, args.prompt or "")
    args = common.parse(parser, argv, name_of)
    recipe = TINY_CONFIGS.get(args.guidance)
    if not args.config and args.sd_model == TINY_MODEL and recipe and args.prompt:
        path = Path(__file__).resolve().parents[2] / "configs" / recipe
        print(f"no --config: taking configs/{recipe}, made for {TINY_MODEL}", file=sys.stderr)
        parser = dream_parser()
        args = common.parse(parser, ["--config", str(path), *argv], name_of)
    given = by_device.given_flags(parser, args)
    notes = parser.site_notes() + parser.checked(by_device.choose_by_device, args, given)
    typed = {word.split("=")[0].removeprefix("--") for word in argv if word.startswith("--")}
    left_out = leave_out(args, dream_parser().get_default, typed)
    reads = reading_flags(args)  # with the flags that the run was trained with
    return Flags(vars(args), notes + ([] if reads else left_out))


def run_name(args: argparse.Namespace, prompt: str) -> str:
    """The folder name of a run without --expname: of its prompt, and of a seed that is not 0."""
    return slug(prompt) + (f"_seed{args.seed}" if args.seed else "")


def run_names(args: argparse.Namespace, prompts: list[str]) -> list[str]:
    """The folder name of each of several prompts; those that would be the same are numbered."""
    names: list[str] = []
    for prompt in prompts:
        name, number = run_name(args, prompt), 2
        while name in names:
            name, number = f"{run_name(args, prompt)}_{number}", number + 1
        names.append(name)
    return names


def check_dream_flags(args: argparse.Namespace, num_ranks: int) -> None:
    """Raise ValueError on flags that contradict one another or cannot work."""
    modes = [*reading_flags(args), *(["--init_from"] * bool(args.init_from))]
    _, sizes, shapes = parse_schedule(args.train_res)
    check_export_name("export", args.export, MESH_FORMATS)
    refuse_first([
        (len(modes) > 1, f"{' and '.join(modes)} exclude one another; use one at a time"),
        (args.no_reload and reading_flags(args),
         f"--no_reload and {''.join(modes)} contradict each other; leave one out"),
        (args.batch_views % num_ranks,
         f"--batch_views {args.batch_views} does not divide by {num_ranks} processes; "
         f"use a multiple of {num_ranks}"),
        (args.smooth_planes and args.field != "triplane",
         f"--smooth_planes is for --field triplane, not {args.field}; leave it out"),
        (highest(args.lambda_tv) and args.field != "triplane",
         f"--lambda_tv is for --field triplane, not {args.field}; leave it out"),
        (args.i_embed == -1 and args.field != "mlp",
         f"--i_embed -1 is for --field mlp, not {args.field}; leave it out"),
        (args.normals == "analytic" and args.field == "triplane",
         "--normals analytic needs second derivatives, which --field triplane lacks; "
         "use --normals fd"),
        (args.space == "2d" and (reading_flags(args) or args.viewer),
         "--space 2d makes pictures (in previews/) and no object; leave out --export, "
         "--render_only and --viewer"),
        (args.space == "2d" and args.init_from,
         "--init_from starts from an object, and --space 2d makes none; leave one out"),
        (args.space == "2d" and len(sizes) > 1,
         "--space 2d has pictures of one size; give --train_res one number"),
        (args.space == "2d" and args.n_particles > 1,
         "--space 2d makes --batch_views pictures; leave out --n_particles"),
        (min(sizes) < 8 or max(sizes) > 8192 or any(size % 1 for size in sizes),
         f"--train_res {args.train_res}; expected whole numbers, at least 8, at most 8192"),
        (not set(shapes) <= {"linear", "step"},
         f"--train_res {args.train_res}; sizes jump: expected no exp or cosine"),
    ])  # fmt: skip
    check_camera_flags(args)
    check_guidance_flags(args)
    check_run_flags(args)


def check_guidance_flags(args: argparse.Namespace) -> None:
    """Raise ValueError on a prior that cannot guide so."""
    trains = not reading_flags(args)
    steps: set[Any] = {*parse_schedule(args.t_min)[0], *parse_schedule(args.t_max)[0]}
    gaussian = args.guidance == "gaussian"
    refuse_first([
        (not gaussian and trains and not (args.prompt or "").strip(),
         '--prompt is empty; say what to make: --prompt "a red cone"'),
        *(
            (not all(0 <= value <= 1 for value in parse_schedule(getattr(args, name))[1]),
             f"--{name} {getattr(args, name)}; expected numbers from 0 to 1")
            for name in ("t_min", "t_max", "guidance_rescale")
        ),
        (any(scheduled(args.t_min, step) > scheduled(args.t_max, step) for step in steps),
         f"--t_min {args.t_min} is above --t_max {args.t_max}; give --t_min the lower value"),
        *(
            (min(parse_schedule(getattr(args, name))[1]) < 0,
             f"--{name} {getattr(args, name)}; expected 0 or more")
            for name in SCHEDULES
            if name == "latent_clip" or name.startswith("lambda_")
        ),
        (gaussian and (args.perp_neg or args.i_attn),
         "--guidance gaussian reads no prompt; leave out --perp_neg and --i_attn"),
        (gaussian and args.guidance_res,
         "--guidance gaussian does not resize renders; leave out --guidance_res"),
        (args.perp_neg and args.space == "2d",
         "--perp_neg tells views apart, and --space 2d has none; leave it out"),
        *(
            (args.guidance != "vsd" and getattr(args, name),
             f"--{name} is for --guidance vsd; leave it out")
            for name in ("lora_model", "lora_file")
        ),
        (args.guidance == "vsd" and args.lora_cfg != 1 and args.camera_dropout == 0,
         f"--lora_cfg {args.lora_cfg:g} needs training without a camera: --camera_dropout above 0"),
    ])  # fmt: skip


def object_changes(saved: dict[str, Any], args: argparse.Namespace) -> list[str]:
    """Why an object made with the flags ``saved`` cannot become this run's, for --init_from."""
    names = ["space", "n_particles"]
    if args.background == "learned":  # a network, which an object of another one does not have
        names.append("background")
    return common.structural_changes(saved, args, names)


def field_changes(saved: dict[str, Any], args: argparse.Namespace) -> list[str]:
    """Flags by which the weights of a run with the flags ``saved`` do not fit into this one's."""
    names = ["field", "occ_res"]
    if saved.get("field", args.field) == args.field:  # of another kind all else is another, too
        mlp = ["netdepth", "netwidth", "multires", "i_embed", "activation"]
        names += mlp if args.field == "mlp" else ["grid_res"]
    return common.structural_changes(saved, args, names)


def read_prompts(path: Path) -> list[str]:
    """The prompts of a file, one a line; empty lines and lines that start with # are left out."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--prompt_file {path}: cannot be read ({error})") from None
    prompts = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
    if not prompts:
        raise ValueError(f"--prompt_file {path} has no prompts; write one per line")
    return prompts
