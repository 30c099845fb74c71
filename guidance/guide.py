"""What says how the object should look: the model, its copy (VSD) and the text, of one run."""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from guidance import memory, sds
from guidance.gaussian import Gaussian, ball
from guidance.lora import load_lora
from guidance.prompts import VIEW_WORDS, ViewPrompts, view_texts
from guidance.stable_diffusion import StableDiffusion
from guidance.vsd import RenderCopy
from nerf import dream_options, guidance_options, options, runtime


@dataclass
class Guide:
    """What says how the object should look: model, copy (VSD) and text; the viewer may change it.

    conditions: (cameras, size, background) -> ``sds.Conditions``. told: step -> the text that the
    viewer asked for from then on.
    """

    prior: object
    copy: RenderCopy | None
    conditions: Callable
    told: dict[int, str]

    def reword(self, args, run, text: str, step: int) -> None:
        """Follow ``text``, which was typed into the viewer, unless it cannot be embedded."""
        own = argparse.Namespace(**(vars(args) | {"prompt": text}))
        try:
            self.conditions = make_conditions(own, self.prior, run)
        except Exception as error:  # whatever a viewer does, training goes on
            run.say(f"step {step}: the viewer's text {text!r} is not used: {error}")
            return
        self.told[step] = text
        run.say(
            f"step {step}: the text is now {text!r}, by the viewer; flags alone do not make this "
            "object again"
        )


def make_guide(args, world, run, priors: dict, found) -> Guide:
    """Model, copy and text of a run that goes on from ``found``, (path, state) or None."""
    prior = make_prior(args, world, run, priors)
    if found:
        check_resume(*found, args, prior)
    told = found[1].get("told", {}) if found else {}
    last = str(told[max(told)]) if told else args.prompt
    own = argparse.Namespace(**(vars(args) | {"prompt": last}))
    conditions = make_conditions(own, prior, run)
    copy = make_copy(args, world, run, prior, priors)
    if args.guidance != "gaussian" and not (args.prompt_file or args.viewer):
        prior.free_text_encoder()
    return Guide(prior, copy, conditions, dict(told))


def open_model(args, world, run, path: str, priors: dict):
    """The frozen diffusion model at ``path``; ``priors`` keeps it for the next prompt."""
    if path not in priors:
        saving = memory.Memory(**guidance_options.memory_fields(args))
        trains = args.guidance == "vsd"
        saving.check(world.device, trains_unet=trains, wants_maps=bool(args.i_attn))
        beside = Path(__file__).resolve().parents[1] / path  # the embedded model, from anywhere
        priors[path] = StableDiffusion(
            str(beside) if beside.is_dir() else path,
            world.device,
            dtype=args.guidance_dtype,
            local_files_only=args.local_files_only,
            allow_pickle=args.allow_pickle,
            scheduler=args.scheduler,
            memory=saving,
            warn=run.say,
        )
    priors[path].warn = run.say  # of this run's log, where several share the model
    return priors[path]


def make_prior(args, world, run, priors: dict):
    """What says how the text looks: the model, or the closed form that tests the loop."""
    if args.guidance == "gaussian":
        return Gaussian(world.device)
    return open_model(args, world, run, args.sd_model, priors)


def make_conditions(args, prior, run):
    """(cameras, size, background) -> ``sds.Conditions``."""
    if args.guidance == "gaussian":

        def target(cameras, size, background):
            rays, num_views = cameras.rays(size, size), len(cameras.c2w)
            behind = background.repeat_interleave(size * size, dim=0)
            picture = ball(rays.origins, rays.directions, behind)
            picture = picture.view(num_views, size, size, 3).permute(0, 3, 1, 2)
            return sds.Conditions(picture, picture)

        return target
    flags = dict(zip(VIEW_WORDS, guidance_options.VIEWS, strict=True))
    own = {word: getattr(args, f"prompt_{view}") for word, view in flags.items()}
    known, placement = prior.vocabulary and prior.vocabulary["views"], args.view_text
    texts = view_texts(
        args.prompt,
        "none" if args.space == "2d" else placement,
        known_views=known,
        overrides=own,
    )
    negatives = {
        word: getattr(args, f"negative_{view}") or args.negative_prompt
        for word, view in flags.items()
    }
    coarse = [word for word in known or () if word in VIEW_WORDS]
    coarse = view_texts(args.prompt, placement, known_views=coarse, overrides=own)
    prompts = ViewPrompts(prior.embed, texts, negatives, coarse if args.perp_neg else None)
    said = [repr(text) for text in dict.fromkeys(texts.values())]
    if len(said) > 6:
        said = [*said[:2], f"{len(said) - 2} more, by viewpoint"]
    run.say(f"text: {', '.join(said)}; negative: {args.negative_prompt!r}")
    return lambda cameras, size, background: prompts.at(*cameras[2:])


def make_copy(args, world, run, prior, priors: dict) -> RenderCopy | None:
    """The copy that learns how the renders look, for variational score distillation."""
    if args.guidance != "vsd":
        return None
    base = open_model(args, world, run, args.lora_model, priors) if args.lora_model else prior
    if base.latent_shape(64, 64) != prior.latent_shape(64, 64):
        raise ValueError(
            f"--lora_model {args.lora_model}: latents {base.latent_shape(64, 64)} of a 64 x 64 "
            f"picture, --sd_model {args.sd_model} has {prior.latent_shape(64, 64)}; use one family"
        )
    runtime.seed_everything(args.seed)  # the same on all ranks: same first adapters
    copy = RenderCopy(
        base,
        base.embed([args.prompt]),
        rank=args.lora_rank,
        lrate=args.lrate_lora,
        camera_dropout=args.camera_dropout,
        views=args.lora_views,
    )
    if args.lora_file:
        load_lora(Path(args.lora_file), copy.lora)
    return copy


def check_resume(path, state, args, prior) -> None:
    """ValueError if the checkpoint at ``path`` was made for another text, model or network."""
    refused = options.structural_changes(state.get("args", {}), args, dream_options.STRUCTURAL)
    before, now = state.get("model"), prior.fingerprint
    if before != now:
        refused.append(f"the model: {before} -> {now} ({args.sd_model})")
    if refused:
        raise ValueError(
            f"{path} was made with other flags ({'; '.join(refused)}); "
            "use those, or another --expname"
        )
