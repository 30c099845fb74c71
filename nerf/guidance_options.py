"""Flags of run_dreamfusion.py about the text and the model that reads it."""

import argparse

from nerf import options
from nerf.schedules import parse_schedule, schedule, scheduled

VIEWS = ("front", "right", "back", "left", "overhead")
KINDS = ("sds", "csd", "vsd", "gaussian")
# A checkpoint fits a run only where these agree; the model's fingerprint is compared too.
STRUCTURAL = (
    "prompt", "negative_prompt", *(f"prompt_{view}" for view in VIEWS),
    *(f"negative_{view}" for view in VIEWS), "view_text", "guidance", "perp_neg", "lora_rank",
    "lora_model",
)  # fmt: skip


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
        help="0 to 1: keep colours from growing with the scale; a schedule")  # fmt: skip
    add("--weighting", choices=("sds", "uniform", "annealed", "fantasia3d"), default="sds",
        help="w(t); annealed: from sds to uniform")  # fmt: skip
    add("--t_min", type=schedule, default="0.02", help="least noise, part of all; a schedule")
    add("--t_max", type=schedule, default="0.98", help="most noise, part of all; a schedule")
    add("--t_anneal", choices=("none", "linear", "sqrt", "falling"), default="none",
        help="none: t is drawn; else it falls from t_max to t_min as training goes on")  # fmt: skip
    add("--latent_clip", type=schedule, default="0", help="largest number of a latent's gradient")
    options.add_switch(group, "perp_neg", "push each view away from the other views' words")
    add("--lambda_sds", type=schedule, default="1", help="weight of the guidance; a schedule")
    add("--i_attn", type=options.not_negative, default=0,
        help="steps between pictures of where each word is looked at; 0: never")  # fmt: skip
    add("--attn_tokens", help="words of the prompt to draw then, with commas between; default: all")
    group = parser.add_argument_group("variational score distillation (--guidance vsd)")
    add = group.add_argument
    add("--n_particles", type=options.positive, default=1, help="objects; each step takes one")
    add("--lora_rank", type=options.positive, default=4, help="of the model's copy")
    add("--lora_model", help="folder or hub id of another model for the copy; default: --sd_model")
    add("--lora_file", help="LoRA to start the copy from (lora.safetensors of a run)")
    add("--lrate_lora", type=options.positive_number, default=1e-4, help="of the copy")
    add("--lora_views", type=options.not_negative, default=0,
        help="views of a step that the copy learns from, on each process; 0: all")  # fmt: skip
    add("--camera_dropout", type=options.part, default=0.1, help="cameras the copy is not told")


def add_model_flags(parser) -> None:
    """Flags of the diffusion model: where it is, and what it may cost."""
    group = parser.add_argument_group("diffusion model")
    add = group.add_argument
    add("--sd_model", default="guidance/tiny/model", help="folder or hub id of a Stable Diffusion")
    options.add_switch(group, "local_files_only", "never ask the hub")
    options.add_switch(group, "allow_pickle", "open .bin weights, which can run code")
    add("--guidance_res", type=options.not_negative, default=0,
        help="pixels per side that renders are shown to the model at; 0: its own")  # fmt: skip
    add("--scheduler", help="noise schedule instead of the model's own: ddim, ddpm, pndm ...")
    add("--guidance_dtype", choices=("auto", "fp32", "bf16", "fp16"), default="auto",
        help="precision of the model; auto: fp16 on a GPU, else fp32")  # fmt: skip
    add("--attention_slicing", default="off", help="off, auto, max or heads at a time: less memory")
    options.add_switch(group, "vae_slicing", "one picture at a time through the VAE: less memory")
    options.add_switch(group, "vae_checkpointing", "compute the VAE's inside twice: less memory")
    options.add_switch(group, "channels_last", "another order in memory: faster on some GPUs")
    add("--offload", choices=("none", "model", "sequential"), default="none",
        help="model: parts of the model are on the GPU only while they work")  # fmt: skip
    options.add_switch(group, "compile", "torch.compile the U-Net: minutes first, faster then")


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
    positive = [n for n in vars(args) if n.startswith("lambda_")]
    for name in ("latent_clip", *positive):
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


def recipe_fields(args: argparse.Namespace, step: int) -> dict:
    """The fields of ``guidance.sds.Recipe`` at ``step``."""
    return {
        "kind": "sds" if args.guidance == "gaussian" else args.guidance,
        "scale": scheduled(args.guidance_scale, step),
        "weighting": args.weighting,
        "t_range": (scheduled(args.t_min, step), scheduled(args.t_max, step)),
        "t_anneal": args.t_anneal,
        "progress": min(1.0, step / args.N_iters),
        "rescale": scheduled(args.guidance_rescale, step),
        "clip": scheduled(args.latent_clip, step),
    }


def memory_fields(args: argparse.Namespace) -> dict:
    """The fields of ``guidance.memory.Memory``."""
    names = ("attention_slicing", "vae_slicing", "vae_checkpointing", "channels_last", "offload")
    return {name: getattr(args, name) for name in (*names, "compile")}


# What to try when memory runs out, in this order: what is given up for it grows.
SAVINGS = (
    ("guidance_dtype", ("fp16", "bf16"), "--guidance_dtype fp16"),
    ("vae_checkpointing", (True,), "--vae_checkpointing"),
    ("vae_slicing", (True,), "--vae_slicing"),
    ("attention_slicing", ("auto", "max"), "--attention_slicing auto"),
    ("offload", ("model",), "--offload model"),
)


def next_saving(args: argparse.Namespace, device_type: str) -> str:
    """The first flag of SAVINGS that is not in use, or what to make smaller then."""
    for name, values, advice in SAVINGS:
        usable = {
            "guidance_dtype": device_type != "cpu" and args.guidance_dtype != "auto",
            "attention_slicing": not args.i_attn,
            "offload": device_type != "cpu" and args.guidance != "vsd",
        }
        if usable.get(name, True) and getattr(args, name) not in values:
            return f"try {advice}"
    return f"lower --batch_views {args.batch_views}, --train_res {args.train_res} or --guidance_res"
