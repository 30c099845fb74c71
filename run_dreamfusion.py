"""Make a 3-D object from a text by score distillation: the loop, and nothing else.

    python run_dreamfusion.py --config configs/dream_tiny.txt --prompt "a blue cube"
    python run_dreamfusion.py --config configs/dream_tiny.txt --export out.glb
    torchrun --nproc_per_node=2 run_dreamfusion.py --config configs/dream_tiny.txt --prompt "..."

Exit codes: 0 done; 2 a mistake in flags or data; 3 done, or stopped, but something could not be
written (the log says what); 130 / 143 / 138 stopped by SIGINT / SIGTERM / SIGUSR1, with the step
saved: the same command goes on from there.
"""

import argparse
import math
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from guidance import memory, sds
from guidance.attention import attention_sheet, picked_tokens
from guidance.gaussian import Gaussian, ball
from guidance.lora import load_lora, save_lora
from guidance.prompts import VIEW_WORDS, ViewPrompts, pull_to_view_center, view_texts
from guidance.stable_diffusion import StableDiffusion
from guidance.vsd import LoRAScoreNetwork
from nerf import build
from nerf.flags import common as common_flags
from nerf.flags import dreamfusion as dream_flags
from nerf.outputs import viewer
from nerf.outputs.camera_path import read_path
from nerf.outputs.object import (
    MODES,
    ObjectOutputs,
    path_cameras,
    render_free_view,
    write_mesh,
    write_preview,
    write_turntable,
)
from nerf.outputs.report import try_report
from nerf.text3d import losses
from nerf.text3d.collapse import Collapse
from nerf.text3d.orbit import OrbitCameras, random_orbit_cameras
from nerf.text3d.shading import Lighting, draw_lighting
from nerf.training import checkpoint, distributed, entry, recovery, rng, system
from nerf.training.ema import EMA
from nerf.training.progress import Clock, Progress, Speed
from nerf.training.run_folder import RunFolder, newest_run
from nerf.training.schedules import scheduled, stepped


def every(step: int, interval: int) -> bool:
    return interval > 0 and step % interval == 0


def main(argv: list[str] | None = None) -> int:
    args = dream_flags.parse(argv)
    try:
        world = distributed.setup(args.device)
        if not args.prompt_file:
            return run_prompt(args, world, {})
        code, priors = 0, {}  # the model is read once
        for prompt in dream_flags.read_prompts(Path(args.prompt_file)):
            own = argparse.Namespace(**vars(args))
            own.prompt, own.expname = prompt, dream_flags.slug(prompt)
            code = run_prompt(own, world, priors)
            if code >= 128:  # stopped by a signal
                break
        return code
    except (ValueError, OSError) as error:
        print(f"run_dreamfusion.py: {error}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 3
    finally:
        distributed.cleanup()


def run_prompt(args, world, priors: dict) -> int:
    """One text from start to end, or one of the modes that only read a finished run."""
    reading = args.render_only or args.export
    if args.camera_path:
        read_path(Path(args.camera_path))  # a broken one is to fail before the work begins
    if args.viewer and world.is_main and not args.export:
        viewer.check_server(args.viewer_host, args.viewer_port)
    if reading:
        name_run_to_read(args)
    dream_flags.check_dream_flags(args, world.size)
    folder = Path(args.basedir) / args.expname
    if reading and not args.ft_path and not folder.is_dir():
        raise ValueError(f"{folder}: no checkpoint there; train first, or name one: --ft_path")
    run = RunFolder(folder, is_main=world.is_main, lock=not reading)
    try:
        code = read_run(args, world, run) if reading else train(args, world, run, priors)
        world.barrier()  # a rank that leaves early can take the others' connections with it
        return run.exit_code(code)
    except (MemoryError, RuntimeError) as error:
        if not recovery.out_of_memory(error):
            raise
        advice = build.next_saving(args, world.device.type)
        raise ValueError(
            f"out of memory ({(str(error) or type(error).__name__).splitlines()[0]}); {advice}"
        ) from None
    except ValueError:
        run.log_file_only(traceback.format_exc())
        raise
    finally:
        run.close()


def name_run_to_read(args) -> None:
    """Name the run that ``--render_only`` or ``--export`` reads, where no text was given."""
    if args.prompt or args.ft_path or args.expname != dream_flags.slug(""):
        return
    name = newest_run(Path(args.basedir), args.config, needs="guidance")
    if name is None:
        raise ValueError(
            f"{args.basedir}: no run of {args.config or 'run_dreamfusion.py'} in it; train one, or "
            "name it by --prompt or --expname"
        )
    args.expname = name


# ------------------------------------------------------------------------------------ set-up


def prepare(args, world):
    """The parts of a run that learn: renderer, optimizer, scaler and EMA, on the device."""
    rng.seed_everything(args.seed)  # the same on all ranks: same initial weights
    renderer = build.object_renderer(args).to(world.device)
    groups = build.parameter_groups(renderer, args)
    fused = world.device.type in ("cpu", "cuda")
    optimizer = torch.optim.Adam(groups, lr=args.lrate, betas=(0.9, 0.99), eps=1e-15, fused=fused)
    scaler = system.grad_scaler(world.device, args.amp)
    return renderer, optimizer, scaler, EMA(renderer, args.ema_decay)


@dataclass
class Guide:
    """What says how the object should look: model, copy (VSD) and text; the viewer may change it.

    conditions: (cameras, size, background) -> ``sds.Conditions``. told: step -> the text that the
    viewer asked for from then on.
    """

    prior: object
    copy: LoRAScoreNetwork | None
    conditions: Callable
    told: dict[int, str]

    def reword(self, args, run, text: str, step: int) -> None:
        """Follow ``text``, which was typed into the viewer, unless it cannot be embedded."""
        own = argparse.Namespace(**(vars(args) | {"prompt": text}))
        try:
            self.conditions = make_conditions(own, self.prior, run)
        except Exception as error:  # whatever a viewer does, training goes on
            run.log(f"step {step}: the viewer's text {text!r} is not used: {error}")
            return
        self.told[step] = text
        run.log(
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
    copy = make_lora_score(args, world, run, prior, priors)
    if args.guidance != "gaussian" and not (args.prompt_file or args.viewer):
        prior.free_text_encoder()
    return Guide(prior, copy, conditions, dict(told))


def open_model(args, world, run, path: str, priors: dict):
    """The frozen diffusion model at ``path``; ``priors`` keeps it for the next prompt."""
    if path not in priors:
        saving = memory.Memory(**build.memory_fields(args))
        trains = args.guidance == "vsd"
        saving.check(world.device, trains_unet=trains, wants_maps=bool(args.i_attn))
        beside = Path(__file__).parent / path  # the embedded model, from anywhere
        priors[path] = StableDiffusion(
            str(beside) if beside.is_dir() else path,
            world.device,
            dtype=args.guidance_dtype,
            local_files_only=args.local_files_only,
            allow_pickle=args.allow_pickle,
            scheduler=args.scheduler,
            memory=saving,
            warn=run.log,
        )
    priors[path].warn = run.log  # of this run's log, where several share the model
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
    flags = dict(zip(VIEW_WORDS, dream_flags.VIEWS, strict=True))
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
    run.log(f"text: {', '.join(said)}; negative: {args.negative_prompt!r}")
    return lambda cameras, size, background: prompts.at(*cameras[2:])


def make_lora_score(args, world, run, prior, priors: dict) -> LoRAScoreNetwork | None:
    """The copy that learns how the renders look, for variational score distillation."""
    if args.guidance != "vsd":
        return None
    base = open_model(args, world, run, args.lora_model, priors) if args.lora_model else prior
    if base.latent_shape(64, 64) != prior.latent_shape(64, 64):
        raise ValueError(
            f"--lora_model {args.lora_model}: latents {base.latent_shape(64, 64)} of a 64 x 64 "
            f"picture, --sd_model {args.sd_model} has {prior.latent_shape(64, 64)}; use one family"
        )
    rng.seed_everything(args.seed)  # the same on all ranks: same first adapters
    copy = LoRAScoreNetwork(
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
    refused = common_flags.structural_changes(state.get("args", {}), args, dream_flags.STRUCTURAL)
    before, now = state.get("model"), prior.fingerprint
    if before != now:
        refused.append(f"the model: {before} -> {now} ({args.sd_model})")
    if refused:
        raise ValueError(
            f"{path} was made with other flags ({'; '.join(refused)}); "
            "use those, or another --expname"
        )


def resume(found, args, run, parts, guide) -> tuple[int, Clock]:
    """Finished updates and the training clock of ``found``, restored into all parts.

    found: (path, state), or None for a new object.
    """
    if not found:
        if args.init_from:
            start_from(args, run, *parts)
        return 0, Clock()
    path, state = found
    for change in common_flags.other_changes(state.get("args", {}), args, dream_flags.STRUCTURAL):
        run.log(f"changed since the checkpoint: {change}")
    checkpoint.restore(path, state, run.log, *parts)
    if guide.copy is not None:
        guide.copy.restore(state.get("copy"), str(path))
    step = checkpoint.finished_updates(state)
    done = f"; it is done: raise --N_iters {args.N_iters}" if step >= args.N_iters else ""
    run.log(f"resumed from {path} at step {step}{done}")
    return step, Clock(state.get("train_seconds", 0.0))


def start_from(args, run, renderer, optimizer, scaler, ema) -> None:
    """``--init_from``: another run's object, as its pictures show it; all else starts anew."""
    path = Path(args.init_from)
    if path.is_dir():
        newest = checkpoint.newest_checkpoint(path, run.log)
        if newest is None:
            raise ValueError(f"--init_from {path}: there is no checkpoint in it")
        path, state = newest
    else:
        state = checkpoint.load_checkpoint(path)
    shown = EMA(renderer, state.get("args", {}).get("ema_decay", 0.0))
    checkpoint.restore(path, state, run.log, renderer, ema=shown)
    shown.keep()
    ema.reset()
    run.log(f"starting from the object of {path}")


# ----------------------------------------------------------------------------------- pictures


def make_outputs(args, world, run, renderer, ema) -> ObjectOutputs:
    """Where previews, turntables and meshes of this run come from."""
    return ObjectOutputs(
        run, world, renderer, ema, args.amp, args.eval_res, args.eval_background,
        elevation_deg=args.eval_elevation, radius=sum(args.radius_range) / 2,
        fov_deg=sum(args.fov_range) / 2, bound=args.bound, flat=args.space == "2d",
    )  # fmt: skip


def preview(args, outputs: ObjectOutputs, step: int) -> None:
    """Four sides of the objects, or all pictures that are optimized."""
    size, num_views = stepped(args.train_res, step), args.batch_views
    if not outputs.flat:
        size, num_views = min(args.eval_res, 2 * size), 4
    write_preview(outputs, step, num_views, size)


def open_viewer(args, world, run, outputs: ObjectOutputs) -> viewer.Viewer | None:
    """The live viewer of ``--viewer``, on the first rank."""
    if not args.viewer or not world.is_main:
        return None
    alone = world.size == 1 and not args.render_only  # among several, texts would differ
    asks = alone and args.guidance != "gaussian" and args.space == "3d"
    try:
        window = viewer.Viewer(
            None, run.folder, args.viewer_host, args.viewer_port, run.log,
            modes=MODES, text=args.prompt if asks else None, may_pause=alone,
        )  # fmt: skip
    except Exception as error:  # whatever a viewer does, training goes on
        run.log(f"no viewer: {type(error).__name__}: {error}")
        return None
    window.view = partial(render_free_view, outputs)
    return window


def write_attention(args, run, prior, noise, found: "Gradients", step) -> None:
    """attentions/STEP.png: each view, and where each word of the prompt is looked at in it."""
    if not run.is_main:
        return
    words = prior.tokens(args.prompt)
    places = picked_tokens(words, args.attn_tokens)
    latents, t = found.distilled.latents, found.distilled.t
    noisy = sds.add_noise(latents, noise.epsilon, prior.alphas_cumprod[t])
    maps = prior.attention(noisy, t, found.text)
    maps = maps[:, [place + 1 for place in places]]  # place 0 is the start of the text
    sheet = attention_sheet(found.images, maps, [words[place] for place in places])
    run.picture(step, "attention", sheet)


def read_run(args, world, run) -> int:
    """``--render_only`` and ``--export``: from the newest checkpoint, with its averaged weights."""
    found = checkpoint.find_checkpoint(run.folder, args.ft_path, world, run.log, prefer_given=True)
    if found is None:
        raise ValueError(f"{run.folder}: no checkpoint there; train first, or name one: --ft_path")
    path, state = found
    build.adopt(args, state.get("args", {}), run.log)
    renderer = prepare(args, world)[0]
    ema = EMA(renderer, state.get("args", {}).get("ema_decay", 0.0))
    checkpoint.restore(path, state, run.log, renderer, ema=ema)
    step = checkpoint.finished_updates(state)
    run.log(f"{path}: step {step}, {ema.kind} weights")
    outputs = make_outputs(args, world, run, renderer, ema)
    if args.export:
        write_mesh(outputs, Path(args.export), resolution=args.mesh_res, level=args.mesh_level)
    elif args.camera_path:
        cameras = path_cameras(outputs, *read_path(Path(args.camera_path)))
        write_turntable(outputs, step, len(cameras.c2w), cameras)
    elif window := open_viewer(args, world, run, outputs):
        with system.StopSignal() as stop, window:
            window.serve(lambda: bool(stop.number))
    else:
        write_turntable(outputs, step, args.video_frames)
    return 0


def finish(args, run, outputs: ObjectOutputs, step, clock, guide) -> None:
    """What a finished run leaves behind: turntable, mesh, metrics.json, and where they are."""
    metrics = {"prompt": args.prompt, "step": step, "weights": outputs.ema.kind}
    metrics |= {"prompts_by_viewer": guide.told} if guide.told else {}
    metrics |= {"train_seconds": clock.seconds, "args": vars(args)}
    if args.space == "3d":
        with run.guard("turntable"):
            write_turntable(outputs, step, args.video_frames)
        if args.mesh:
            path = run.folder / "mesh.glb"
            with run.guard("mesh"):
                write_mesh(outputs, path, resolution=args.mesh_res, level=args.mesh_level)
    if guide.copy is not None and run.is_main:
        with run.guard("lora.safetensors"):
            save_lora(run.folder / "lora.safetensors", guide.copy.lora)
    with run.guard("metrics.json"):
        run.write_json("metrics.json", metrics)
    if run.is_main:
        try_report(run.folder, run.log)
    run.log(f"done: {run.folder}/ ({metrics['train_seconds']:.0f} s of training)")


def report(args, run, progress, step, distilled, values: dict, speed, clock) -> None:
    """One row of metrics, and the line a person reads."""
    rate = speed.rays_per_second(step, step * args.batch_views, clock.seconds)
    values = {"sds": distilled.loss.item(), "t": distilled.t.float().mean().item(), **values}
    values |= {"train_seconds": clock.seconds, "views_per_second": rate}
    run.scalars(step, values)
    line = (
        f"opacity {values['opacity']:.3f}  gradient {values['grad_norm']:.3g}  t {values['t']:.0f}"
    )
    progress.describe(line)
    if not progress.on_terminal:
        eta = (args.N_iters - step) * speed.seconds_per_step / 60
        note = " (not a measure of quality)" if step <= args.i_print else ""
        run.log(
            f"step {step}/{args.N_iters}  {line}  sds {values['sds']:.4g}{note}  ETA {eta:.1f} min"
        )


# ---------------------------------------------------------------------------------- training


class Drawn(NamedTuple):
    """Every random number of one step, a row per view."""

    cameras: OrbitCameras
    lighting: Lighting
    jitter: Tensor  # [V, size * size] in [0, 1), of the samples along each ray
    noise: sds.GuidanceNoise
    lit: bool  # whether any view of all processes needs normals: all have them then

    def part(self, shard: slice) -> "Drawn":
        """Some of the views."""
        return Drawn(
            self.cameras.part(shard), self.lighting.part(shard), self.jitter[shard],
            self.noise.part(shard), self.lit,
        )  # fmt: skip


def seen_size(args, prior, size: int) -> int:
    """Pixels per side of what the prior sees of a render of ``size``."""
    return args.guidance_res or prior.native_size or size


def draw_views(args, prior, step: int, size: int, generator) -> Drawn:
    """Cameras, light and noise for all ``--batch_views`` of size x size pixels."""
    ranges = build.orbit_ranges(args)
    if args.view_spread < 1:
        ranges = ranges._replace(settle=partial(pull_to_view_center, fraction=args.view_spread))
    cameras = random_orbit_cameras(args.batch_views, ranges, generator)
    settings, lit = build.lighting_settings(args), step >= args.albedo_steps
    lighting = draw_lighting(cameras.c2w[:, :, 3], settings, generator, lit=lit)
    options = {"generator": generator, "device": generator.device}
    jitter = torch.rand(args.batch_views * size * size, 1, **options)
    seen = seen_size(args, prior, size)
    noise = sds.draw_noise(args.batch_views, prior.latent_shape(seen, seen), generator)
    return Drawn(cameras, lighting, jitter.view(args.batch_views, -1), noise, lighting.is_lit)


def shape_losses(args, step, out, renderer):
    """The weighted sum of the losses on the object's shape (``nerf.text3d.losses``)."""
    terms = {
        "lambda_opacity": lambda: losses.opacity_loss(out.opacity),
        "lambda_entropy": lambda: losses.entropy_loss(out.opacity),
        "lambda_orient": lambda: losses.orientation_loss(out.backfacing),
        "lambda_spread": lambda: losses.spread_loss(out.spread, out.opacity),
        "lambda_tv": lambda: renderer.field.encoding.variation(),
    }
    weights = {name: scheduled(getattr(args, name), step) for name in terms}
    return sum(weight * terms[name]() for name, weight in weights.items() if weight)


class Gradients(NamedTuple):
    """What a step's views left behind besides gradients."""

    distilled: sds.Distilled
    weight: float  # of the guidance's loss
    shape: Tensor  # [] the weighted losses on the object's shape
    images: Tensor  # [V, 3, H, W]
    text: Tensor  # [V, ...] what the views are asked for
    opacity: Tensor  # [] mean
    samples: int

    @property
    def loss(self) -> Tensor:
        """[] with all terms."""
        return self.weight * self.distilled.loss.detach() + self.shape

    @staticmethod
    def joined(pieces: list["Gradients"]) -> "Gradients":
        """Of all views, from those of some each."""
        distilled, weights, shape, images, texts, opacity, samples = zip(*pieces, strict=True)
        counts = [len(each) for each in texts]
        shares = [count / sum(counts) for count in counts]
        gradient = [each.gradient * shard for each, shard in zip(distilled, shares, strict=True)]
        gradient = torch.cat(gradient)
        whole = sds.Distilled(
            0.5 * gradient.float().square().sum(),
            torch.cat([each.t for each in distilled]),
            torch.cat([each.latents for each in distilled]),
            gradient,
            sum(each.skipped for each in distilled),
        )

        def mean(values):
            return sum(value * shard for value, shard in zip(values, shares, strict=True))

        pictures, rows = torch.cat(images), torch.cat(texts)
        return Gradients(
            whole, weights[0], mean(shape), pictures, rows, mean(opacity), sum(samples)
        )


def backward(args, world, model, renderer, scaler, guide, drawn, step, views: int) -> Gradients:
    """Gradients of all ``drawn`` views, so many ``views`` at a time: they add up to the same."""
    renderer.zero_grad(set_to_none=True)  # of an attempt that did not fit
    size, num_views = stepped(args.train_res, step), len(drawn.jitter)
    recipe = sds.Recipe(**build.recipe_fields(args, step))
    pieces = []
    for start in range(0, num_views, views):
        cameras, lighting, jitter, noise, lit = drawn.part(slice(start, start + views))
        renderer.first = world.rank * num_views + start  # of a picture each, in 2-D
        with system.autocast(world.device, args.amp):
            rays = cameras.rays(size, size)
            out = model(rays, lighting.per_pixel(size * size), jitter.view(-1, 1), lit)
        images = out.rgb.float().view(-1, size, size, 3).permute(0, 3, 1, 2)
        conditions = guide.conditions(cameras, size, lighting.background)
        copy = guide.copy.epsilon_at(cameras.c2w) if guide.copy is not None else None
        shown = sds.resized(images, seen_size(args, guide.prior, size))
        distilled = sds.distill(guide.prior, shown, conditions, noise, recipe, copy)
        weight, shape = scheduled(args.lambda_sds, step), shape_losses(args, step, out, renderer)
        loss = weight * distilled.loss + shape
        scaler.scale(loss * (len(images) / num_views)).backward()  # DDP averages the gradients here
        mean, samples = out.opacity.detach().mean(), renderer.report().get("samples", 0)
        shape = torch.as_tensor(shape).detach()  # 0 without any
        told = weight, shape, images.detach(), conditions.text, mean, samples
        pieces.append(Gradients(distilled, *told))
    return pieces[0] if len(pieces) == 1 else Gradients.joined(pieces)


def cause(renderer, drawn: Drawn, found: Gradients) -> tuple[str, dict]:
    """What was not finite first in a step, and the step's tensors."""
    tensors = {"cameras": drawn.cameras.c2w, "rendered_colors": found.images}
    tensors |= {"guidance": found.distilled.gradient, "loss": found.loss}
    return recovery.first_non_finite(**tensors) or recovery.non_finite_gradients(renderer), tensors


def train(args, world, run, priors: dict) -> int:
    """Train until N_iters, --max_minutes or a signal; go back where numbers went bad."""
    if args.no_reload and world.is_main:
        checkpoint.archive_checkpoints(run.folder, run.log)
    find = partial(checkpoint.find_checkpoint, run.folder, args.ft_path, world, run.log)
    found = find(reload=not args.no_reload)
    guide = make_guide(args, world, run, priors, found)
    run.record(vars(args), common_flags.as_config(args, dream_flags.dream_parser()))
    if args.wandb:
        run.start_wandb(vars(args))
    returns = recovery.Rollback(found[1].get("draws", 0) if found else 0)
    try:
        with system.StopSignal() as stop:
            while True:
                try:
                    return train_attempt(args, world, run, stop, found, guide, returns)
                except recovery.NonFinite as error:
                    # What lies in the folder by now is this run's, whatever --no_reload says. The
                    # copy needs no way back: a bad step of its own never reaches it.
                    found = returns.roll_back(error, run, find)
    finally:
        if guide.copy is not None:
            guide.copy.lora.remove()  # the next prompt's copy hangs on the same model


def train_attempt(args, world, run, stop, found, guide, returns) -> int:
    """The loop. Returns the exit code."""
    parts = renderer, optimizer, scaler, ema = prepare(args, world)
    step, clock = resume(found, args, run, parts, guide)
    model = renderer
    if world.size > 1:  # views without light leave the light's gradients out, and so on
        model = DistributedDataParallel(renderer, find_unused_parameters=True)
    outputs = make_outputs(args, world, run, renderer, ema)
    collapse, progress = Collapse(), Progress(args.N_iters, step, show=world.is_main)
    speed, saved_at = Speed(step, clock.seconds), time.monotonic()
    watch, left_out = recovery.FiniteWatch(), 0
    seed, views = args.seed + returns.offset(), args.batch_views // world.size
    advice = build.next_saving(args, world.device.type)

    def save() -> bool:
        extra = {
            "args": vars(args),
            "model": guide.prior.fingerprint,
            "draws": returns.rollback_count,
        }
        extra |= {"train_seconds": clock.seconds, "told": guide.told}
        extra |= {"copy": guide.copy.state()} if guide.copy is not None else {}
        return checkpoint.save_run(run, step, parts, keep=args.keep_ckpts, **extra)

    with open_viewer(args, world, run, outputs) or nullcontext() as window:
        while step < args.N_iters:
            # One update. Every random number comes from (seed, step), see runtime.step_generator.
            rate = build.learning_rate(step, args)
            for group in optimizer.param_groups:
                group["lr"] = rate * group["scale"]
            generator = rng.step_generator(seed, step, world.device)
            renderer.begin_step(step, generator)
            size = stepped(args.train_res, step)
            drawn = draw_views(args, guide.prior, step, size, generator)
            drawn = drawn.part(world.shard(args.batch_views))
            grads, views = recovery.halve_until_it_fits(
                partial(backward, args, world, model, renderer, scaler, guide, drawn, step),
                views,
                run.log,
                may_halve=world.size == 1,
                unit="views",
                advice=advice,
            )
            scaler.unscale_(optimizer)
            grad_norm = torch.nn.utils.clip_grad_norm_(
                renderer.parameters(), args.grad_clip or math.inf
            )
            broken = not (math.isfinite(grad_norm) and math.isfinite(grads.loss.item()))
            time_up = bool(args.max_minutes) and clock.seconds >= args.max_minutes * 60
            number, time_up, broken = world.all_reduce_max(stop.number, time_up, broken)
            if not broken:  # anywhere: a rank alone must not go on
                scaler.step(optimizer)
                ema.update()
            scaler.update()
            values = {"loss": grads.loss.item(), "grad_norm": float(grad_norm)}
            if guide.copy is not None:
                latents, c2w = grads.distilled.latents, drawn.cameras.c2w
                values["copy_loss"] = guide.copy.train_step(latents, c2w, drawn.noise, world)
            step += 1  # updates finished, also when one was left out

            # After the update: signals, health, and everything periodic.
            if window is not None:
                with clock:  # what lookers cost is not training's time
                    window.tick(lambda: bool(stop.number))
                    if text := window.new_text():
                        guide.reword(args, run, text, step)
            watch.count(broken, step, world, partial(cause, renderer, drawn, grads))
            optimizer.zero_grad(set_to_none=True)
            left_out += int(grads.distilled.skipped)
            opacity = grads.opacity.item()
            if args.space == "3d":
                collapse.watch(opacity, step, run.log)
            if number:
                saved = "saved" if save() else "not saved"
                run.log(f"stopped by signal {int(number)}; step {step} is {saved}")
                return 128 + int(number)
            last = bool(time_up) or step == args.N_iters
            if every(step, args.i_print) or last:
                values |= {"opacity": opacity, "lr": rate, "views_left_out": left_out}
                values |= {"skipped": watch.skipped, **renderer.report()}
                values |= {"memory_mb": system.peak_memory_mb(world.device)}
                values |= {"samples": grads.samples} if "samples" in values else {}
                report(args, run, progress, step, grads.distilled, values, speed, clock)
            progress.advance()
            if every(step, args.i_img) or last:
                with clock, run.guard("previews"):
                    preview(args, outputs, step)
            if every(step, args.i_attn):
                with clock, run.guard("attention maps"):
                    write_attention(args, run, guide.prior, drawn.noise, grads, step)
            due = args.ckpt_secs and time.monotonic() - saved_at >= args.ckpt_secs
            if every(step, args.i_weights) or due or last:
                with clock:
                    save()
                saved_at = time.monotonic()
            if every(step, args.i_video) and not last:
                with clock, run.guard("turntable"):
                    write_turntable(outputs, step, args.video_frames)
            if last:
                break
    progress.close()
    finish(args, run, outputs, step, clock, guide)
    return 0


if __name__ == "__main__":
    entry.exit_process(main())
