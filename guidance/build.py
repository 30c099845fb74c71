"""From flags to guidance: the model, its text, the LoRA score network, and the recipe of a step.

The one file of ``guidance`` that sees the parsed flags. ``now``: the flags that are schedules, as
numbers at the present step.
"""

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from guidance.gaussian import Gaussian, ball
from guidance.lora import load_lora, lora_and_scale
from guidance.memory import Memory
from guidance.prompts import VIEW_WORDS, ViewPrompts, view_texts
from guidance.sds import Conditions, Recipe
from guidance.stable_diffusion import StableDiffusion
from guidance.vsd import LoRAScoreNetwork

Log = Callable[[str], None]
# (orbit cameras, pixels per side, background [V, 3]) -> what the views are guided towards
ConditionsAt = Callable[[Any, int, Tensor], Conditions]

REPOSITORY = Path(__file__).resolve().parents[1]  # --sd_model guidance/tiny/model, from any folder
VIEW_FLAGS = {word: word.split()[0] for word in VIEW_WORDS}  # "right side" -> --prompt_right


class Recorder(Protocol):
    """What ``record`` needs of ``StepGraphs`` and ``FunctionGraphs`` of nerf.training.graph."""

    def run(self, function: Callable[[Any], Any], inputs: Any, /) -> Any: ...


@dataclass
class Guide:
    """Everything that guides an object: the frozen model, its text, VSD's LoRA score network.

    prompt_history: step -> prompt that was set in the viewer from then on; kept in checkpoints.
    """

    prior: StableDiffusion | Gaussian
    lora: LoRAScoreNetwork | None
    conditions: ConditionsAt
    prompt_history: dict[int, str]
    first_prompt: str

    @property
    def prompt(self) -> str:
        """The prompt that is followed now."""
        history = self.prompt_history
        return str(history[max(history)]) if history else self.first_prompt

    def set_prompt(self, args: argparse.Namespace, log: Log, prompt: str, step: int) -> None:
        """Follow ``prompt``, typed into the viewer, from now on, unless it cannot be embedded."""
        try:
            self.conditions = make_conditions(_with_prompt(args, prompt), self.prior, log)
        except Exception as error:  # whatever a viewer does, training goes on
            log(f"step {step}: the viewer's prompt {prompt!r} is not used: {error}")
            return
        self.prompt_history[step] = prompt
        log(
            f"step {step}: the viewer set the prompt to {prompt!r}; the flags alone do not "
            "reproduce this object any more"
        )

    def checkpoint_state(self) -> dict[str, Any]:
        """What a checkpoint must hold of the guidance, under the keys of the first release."""
        state = {"model": self.prior.fingerprint, "told": self.prompt_history}
        return state | ({"copy": self.lora.state()} if self.lora is not None else {})

    def restore(self, saved: Mapping[str, Any], where: str) -> None:
        """Load ``checkpoint_state``; ValueError if it is of another LoRA score network."""
        if saved and self.lora is not None:
            self.lora.restore(saved.get("copy"), where)

    def record(self, unet: Recorder, encoder: Recorder) -> None:
        """Call the frozen U-Net and the encoder through ``unet`` and ``encoder``."""
        if isinstance(self.prior, StableDiffusion):
            self.prior.run_unet, self.prior.run_encoder = unet.run, encoder.run

    def release(self) -> None:
        """Take the LoRA's hooks off the model, which the next prompt uses too."""
        if self.lora is not None:
            self.lora.lora.remove()


def model_differences(
    saved: Mapping[str, Any], args: argparse.Namespace, fingerprint: str
) -> list[str]:
    """What differs between a checkpoint's model and that of ``args``, as "before -> now".

    saved: the checkpoint's content. fingerprint: of the present model, that of the files of
    --sd_model and, after a plus sign, that of --sd_lora. The flags alone do not tell: a file may
    have been moved or replaced.
    """
    flags, (old, new) = saved.get("args") or {}, (str(saved.get("model")), fingerprint)
    if "guidance" in flags and (flags["guidance"] == "gaussian") != (args.guidance == "gaussian"):
        return []  # it has no model, and --guidance itself differs
    (old_base, _, old_lora), (new_base, _, new_lora) = old.partition("+"), new.partition("+")
    found = []
    if old_base != new_base:
        before, now = f"--sd_model {flags.get('sd_model')}", f"--sd_model {args.sd_model}"
        found.append(
            f"{before}, whose files were others" if before == now else f"{before} -> {now}"
        )
    if old_lora != new_lora:
        before, now = (
            f"--sd_lora {name}" if name else "without --sd_lora"
            for name in (flags.get("sd_lora") if old_lora else None, args.sd_lora)
        )
        found.append(f"{before}, whose file was another" if before == now else f"{before} -> {now}")
    return found


def make_guide(
    args: argparse.Namespace,
    device: torch.device,
    log: Log,
    models: dict[str, StableDiffusion],
    saved: Mapping[str, Any],
) -> Guide:
    """The guide of a run.

    models: by path, those opened for earlier prompts; what is opened here is added. saved: content
    of the checkpoint that the run goes on from, {} for a new one. ValueError if it was made with
    another model.
    """
    prior = open_prior(args, device, log, models)
    history = dict(saved.get("told", {}))
    prompt = str(history[max(history)]) if history else args.prompt
    conditions = make_conditions(_with_prompt(args, prompt), prior, log)
    lora = make_lora(args, prior, log, models)
    if isinstance(prior, StableDiffusion) and not (args.prompt_file or args.viewer):
        prior.free_text_encoder()
    return Guide(prior, lora, conditions, history, args.prompt)


def _with_prompt(args: argparse.Namespace, prompt: str) -> argparse.Namespace:
    return argparse.Namespace(**(vars(args) | {"prompt": prompt}))


def open_prior(
    args: argparse.Namespace, device: torch.device, log: Log, models: dict[str, StableDiffusion]
) -> StableDiffusion | Gaussian:
    """The frozen diffusion model, or for ``--guidance gaussian`` a closed form to test the loop."""
    if args.guidance == "gaussian":
        return Gaussian(device)
    lora = lora_and_scale(args.sd_lora) if args.sd_lora else None
    return open_model(args, device, log, models, args.sd_model, lora)


def open_model(
    args: argparse.Namespace,
    device: torch.device,
    log: Log,
    models: dict[str, StableDiffusion],
    path: str,
    lora: tuple[Path, float] | None = None,
) -> StableDiffusion:
    """The frozen diffusion model at ``path``, opened once for all prompts.

    lora: a file that is merged into it, and its scale.
    """
    key = path if lora is None else f"{path} with {lora[0]} x {lora[1]}"
    if key not in models:
        memory = Memory(
            attention_slicing=args.attention_slicing,
            vae_slicing=args.vae_slicing,
            vae_checkpointing=args.vae_checkpointing,
            channels_last=args.channels_last,
            offload=args.offload,
            compile=args.compile,
        )
        memory.check(device, trains_unet=args.guidance == "vsd", wants_maps=bool(args.i_attn))
        in_repository = REPOSITORY / path
        models[key] = StableDiffusion(
            str(in_repository) if in_repository.is_dir() else path,
            device,
            dtype=args.guidance_dtype,
            local_files_only=args.local_files_only,
            allow_pickle=args.allow_pickle,
            scheduler=args.scheduler,
            memory=memory,
            lora=lora,
            warn=log,
        )
    models[key].warn = log  # into the log of this run, where several prompts share the model
    return models[key]


def make_conditions(
    args: argparse.Namespace, prior: StableDiffusion | Gaussian, log: Log
) -> ConditionsAt:
    """What views are guided towards: the prompt with view words, or the closed form's picture."""
    if isinstance(prior, Gaussian):
        return _ball_conditions
    overrides = {word: getattr(args, f"prompt_{flag}") for word, flag in VIEW_FLAGS.items()}
    known_views = prior.vocabulary["views"] if prior.vocabulary else None
    texts = view_texts(
        args.prompt,
        "none" if args.space == "2d" else args.view_text,
        known_views=known_views,
        overrides=overrides,
    )
    negatives = {
        word: getattr(args, f"negative_{flag}") or args.negative_prompt
        for word, flag in VIEW_FLAGS.items()
    }
    coarse = None
    if args.perp_neg:
        coarse_words = [word for word in known_views or () if word in VIEW_WORDS]
        coarse = view_texts(
            args.prompt, args.view_text, known_views=coarse_words, overrides=overrides
        )
    prompts = ViewPrompts(prior.embed, texts, negatives, coarse)
    shown = [repr(text) for text in dict.fromkeys(texts.values())]
    if len(shown) > 6:
        shown = [*shown[:2], f"{len(shown) - 2} more, by viewpoint"]
    log(f"text: {', '.join(shown)}; negative: {args.negative_prompt!r}")
    return lambda cameras, size, background: prompts.at(cameras.azimuth_deg, cameras.elevation_deg)


def _ball_conditions(cameras: Any, size: int, background: Tensor) -> Conditions:
    """The picture of an orange ball as these cameras see it, for ``--guidance gaussian``."""
    rays, num_views = cameras.rays(size, size), len(cameras.c2w)
    background = background.repeat_interleave(size * size, dim=0)
    picture = ball(rays.origins, rays.directions, background)
    picture = picture.view(num_views, size, size, 3).permute(0, 3, 1, 2)
    return Conditions(picture, picture)


def make_lora(
    args: argparse.Namespace,
    prior: StableDiffusion | Gaussian,
    log: Log,
    models: dict[str, StableDiffusion],
) -> LoRAScoreNetwork | None:
    """VSD's LoRA score network (``--guidance vsd``), on the same model or on ``--lora_model``."""
    if args.guidance != "vsd":
        return None
    assert isinstance(prior, StableDiffusion)
    base = prior
    if args.lora_model:
        base = open_model(args, prior.device, log, models, args.lora_model)
    if base.latent_shape(64, 64) != prior.latent_shape(64, 64):
        raise ValueError(
            f"--lora_model {args.lora_model}: latents {base.latent_shape(64, 64)} of a 64 x 64 "
            f"picture, --sd_model {args.sd_model} has {prior.latent_shape(64, 64)}; use one family"
        )
    torch.manual_seed(args.seed)  # the same on all ranks: the same initial adapters
    network = LoRAScoreNetwork(
        base,
        base.embed([args.prompt]),
        rank=args.lora_rank,
        lrate=1e-4,  # of no update: ``set_schedule``
        camera_dropout=0.1,
        views=args.lora_views,
        cfg=args.lora_cfg,
    )
    if args.lora_file:
        load_lora(Path(args.lora_file), network.lora)
    return network


def make_recipe(args: argparse.Namespace, now: Mapping[str, float], progress: float) -> Recipe:
    """How views are guided at the present step. progress: part of the run that is done, 0 to 1."""
    return Recipe(
        kind="sds" if args.guidance == "gaussian" else args.guidance,
        scale=now["guidance_scale"],
        weighting=args.weighting,
        t_range=(now["t_min"], now["t_max"]),
        t_anneal=args.t_anneal,
        progress=progress,
        rescale=now["guidance_rescale"],
        clip=now["latent_clip"],
    )


# What to try when memory runs out, in this order: each costs more speed or quality than the last.
MEMORY_SAVINGS = (
    ("guidance_dtype", ("fp16", "bf16"), "--guidance_dtype fp16"),
    ("vae_checkpointing", (True,), "--vae_checkpointing"),
    ("vae_slicing", (True,), "--vae_slicing"),
    ("attention_slicing", ("auto", "max"), "--attention_slicing auto"),
    ("offload", ("model",), "--offload model"),
)


def next_memory_saving(args: argparse.Namespace, device: torch.device) -> str:
    """The first of MEMORY_SAVINGS that is not in use and works here, or what to make smaller."""
    on_gpu = device.type != "cpu"
    usable = {
        "guidance_dtype": on_gpu and args.guidance_dtype != "auto",
        "attention_slicing": not args.i_attn,
        "offload": on_gpu and args.guidance != "vsd",
    }
    for name, values, advice in MEMORY_SAVINGS:
        if usable.get(name, True) and getattr(args, name) not in values:
            return f"try {advice}"
    return f"lower --batch_views {args.batch_views}, --train_res {args.train_res} or --guidance_res"


def shown_size(args: argparse.Namespace, prior: StableDiffusion | Gaussian, size: int) -> int:
    """Pixels per side at which a render of ``size`` is shown to the prior."""
    return int(args.guidance_res or prior.native_size or size)
