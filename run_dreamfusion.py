"""Make a 3D object from a text by score distillation.

    python run_dreamfusion.py --config configs/dream_tiny.txt --prompt "a blue cube"
    python run_dreamfusion.py --config configs/dream_tiny.txt --export out.glb
    torchrun --nproc_per_node=2 run_dreamfusion.py --config configs/dream_tiny.txt --prompt "..."

Exit codes: 0 done; 1 a fault of the program, or another process of the run has ended; 2 a mistake
in flags or data; 3 done, or stopped, but something could not be written (the log says what); 4
done, but nothing was learned; 130 / 143 / 138 stopped by SIGINT / SIGTERM / SIGUSR1 with the step
saved, so that the same command resumes there.
"""

import nerf.training.installed  # noqa: F401  first: says in a sentence what is missing
import nerf.training.startup  # noqa: F401  before torch, which reads how its threads wait

# isort: split
import math
import sys
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from guidance import sds
from guidance.build import (
    Guide,
    make_guide,
    make_recipe,
    model_differences,
    next_memory_saving,
    shown_size,
)
from guidance.build_pictures import Seen, attention_grid, guidance_grid
from guidance.lora import save_lora
from guidance.prompts import pull_to_view_center, view_word
from nerf import build, build_optimizer, build_outputs, build_run, build_schedules
from nerf.build_start import check_object, find_start, start_from
from nerf.flags import common as common_flags
from nerf.flags import dreamfusion as dream_flags
from nerf.flags.checkpoints import reading_flags
from nerf.media import labeled_grid
from nerf.outputs import forecast
from nerf.outputs.camera_path import read_path
from nerf.outputs.evaluation import report_is_old
from nerf.outputs.object import (
    MODES,
    ObjectOutputs,
    path_cameras,
    render_free_view,
    write_mesh,
    write_turntable,
)
from nerf.outputs.report import try_report
from nerf.outputs.viewer import Viewer, check_server, open_viewer
from nerf.text3d.collapse import Collapse
from nerf.text3d.losses import SHAPE_LOSSES, shape_losses
from nerf.text3d.orbit import OrbitCameras, random_orbit_cameras
from nerf.text3d.particles import members_of
from nerf.text3d.shading import Lighting, draw_lighting
from nerf.training import checkpoint, distributed, entry, machine, rng, startup, system
from nerf.training.checkpoint_choice import archive_checkpoints, find_checkpoint
from nerf.training.ema import EMA
from nerf.training.logged import added, by_group, read_means
from nerf.training.monitor import Monitor
from nerf.training.progress import Progress
from nerf.training.recovery import (
    Attempt,
    NonFinite,
    Restart,
    StepTensors,
    explain_out_of_memory,
    next_attempt,
)
from nerf.training.run_folder import RunFolder, newest_run
from nerf.training.schedules import highest
from nerf.training.state import TrainState


def every(step: int, interval: int) -> bool:
    return interval > 0 and step % interval == 0


def main(argv: list[str] | None = None) -> int:
    return entry.exit_code("run_dreamfusion.py", partial(start, argv))


def start(argv: list[str] | None) -> int:
    args = dream_flags.parse(argv)
    return run_prompts(args)


def run_prompts(args) -> int:
    """The prompt, or every prompt of ``--prompt_file``, one after the other."""
    world, models = distributed.setup(args.device), {}  # a model is opened once for all prompts
    if not args.prompt_file:
        return run_prompt(args, world, models)
    prompts, codes = dream_flags.read_prompts(Path(args.prompt_file)), []
    names = dream_flags.run_names(args, prompts)  # all of them first: no two share a folder
    for prompt, name in zip(prompts, names, strict=True):
        own = dream_flags.Flags(vars(args) | {"prompt": prompt, "expname": name}, args.left_out)
        codes.append(
            entry.report_mistakes("run_dreamfusion.py", partial(run_prompt, own, world, models))
        )
        if codes[-1] >= 128:  # stopped by a signal
            break
    for prompt, name, code in zip(prompts, names, [*codes, *[None] * len(prompts)], strict=False):
        result = {0: "done", None: "not begun"}.get(code, f"exit code {code}")
        print(f"{name}: {result} ({prompt!r})", file=sys.stderr)
    return max(codes)


def run_prompt(args, world, models) -> int:
    """One prompt from start to end, or one of the modes that only read a finished run."""
    reading = bool(reading_flags(args))
    if args.camera_path:
        read_path(Path(args.camera_path))  # a broken file must fail before the work begins
    if args.viewer and world.is_main and reading_flags(args) in ([], ["--render_only"]):
        check_server(args.viewer_host, args.viewer_port)
    if reading:
        name_run_to_read(args)
    dream_flags.check_dream_flags(args, world.size)
    folder = Path(args.basedir) / args.expname
    if args.init_from and (args.no_reload or not checkpoint.list_checkpoints(folder)):
        find_start(args, lambda warning: None)  # what does not fit must fail early, too
    if reading and not args.ft_path and not folder.is_dir():
        raise ValueError(f"{folder}: no checkpoint there; train first, or name one: --ft_path")
    run_folder: RunFolder = forecast.DryRun(folder, is_main=world.is_main)
    if not args.dry_run:
        run_folder = RunFolder(folder, is_main=world.is_main, lock=not reading)
    run_folder.level = args.log_level
    advice = next_memory_saving(args, world.device)
    with explain_out_of_memory(advice), run_folder as run, build_run.careful(args, run.log, sds):
        args.amp = system.usable_amp(args.amp, world.device, run.log)
        code = render_and_export(args, world, run) if reading else train(args, world, run, models)
        world.barrier()  # a rank that leaves early can take the others' connections with it
        return run.exit_code(code)


def name_run_to_read(args) -> None:
    """Name the run that ``--render_only`` or ``--export`` reads, where no prompt was given."""
    if args.prompt or args.ft_path or args.expname != dream_flags.run_name(args, ""):
        return
    name = newest_run(Path(args.basedir), args.config, needs="guidance")
    if name is None:
        raise ValueError(
            f"{args.basedir}: no run of {args.config or 'run_dreamfusion.py'} in it; train one, or "
            "name it by --prompt or --expname"
        )
    args.expname = name


# ---------------------------------------------------------------------------------------- set-up


def prepare(args, world, attempt: Attempt) -> TrainState:
    """The parts that learn, on the device, with new weights."""
    # Every rank gets the same initial weights. What differs between ranks are the views they
    # train on: each draws the same global batch, see rng.step_generator, and keeps its shard.
    rng.seed_everything(attempt.weights_seed)
    renderer = build.object_renderer(args, world.device).to(world.device)
    optimizer = build_optimizer.make_optimizer(renderer, args, world.device)
    scaler = system.grad_scaler(world.device, args.amp)
    ema = EMA(renderer, args.ema_decay)
    return TrainState(renderer, optimizer, scaler, ema, attempt, **build_run.saving(args))


def resume(args, run, state: TrainState, guide: Guide) -> None:
    """Go on from the attempt's checkpoint, if there is one, and log what has changed since."""
    if state.attempt.saved is None:
        if args.init_from:
            start_from(args, run.log, state)
        if args.ft_weights:
            state.start_from_weights(args.ft_weights, args.ft_ignore or [], run.log)
        return
    path, saved = state.attempt.saved
    for change in common_flags.other_changes(saved.get("args", {}), args, dream_flags.STRUCTURAL):
        run.log(f"changed since the checkpoint: {change}")
    guide.restore(state.restore(run), str(path))
    if state.step < args.N_iters:
        run.log(f"resumed from {path} at step {state.step}")
    else:
        run.log(f"{path} has all {state.step} updates; to train on, set --N_iters to more")


def check_same_run(args, saved, model: str) -> None:
    """ValueError if the checkpoint was made for another prompt, model or network.

    model: the fingerprint of the present one.
    """
    path, content = saved
    check_object(str(path), content)
    other = model_differences(content, args, model)
    common_flags.check_same_run(path, content.get("args", {}), args, dream_flags.STRUCTURAL, other)


def start_viewer(args, world, run, outputs: ObjectOutputs) -> Viewer | None:
    """The live viewer of ``--viewer``, on the first rank."""
    if not args.viewer or not world.is_main or args.dry_run:
        return None
    may_pause = world.size == 1 and not args.render_only
    # One process only: of several, the others would go on with the old prompt.
    may_ask = may_pause and args.guidance != "gaussian" and args.space == "3d"
    viewer = open_viewer(
        None, run.folder, args.viewer_host, args.viewer_port, run.log,
        modes=MODES, text=args.prompt if may_ask else None, may_pause=may_pause,
    )  # fmt: skip
    if viewer is not None:
        viewer.view = partial(render_free_view, outputs)
    return viewer


# -------------------------------------------------------------------------------------- training


def train(args, world, run, models) -> int:
    """Train until N_iters, --max_minutes or a signal; start again where an attempt cannot go on."""
    if args.no_reload and world.is_main:
        archive_checkpoints(run.folder, run.log)
    find = partial(find_checkpoint, run, args.ft_path, world)
    attempt = Attempt.from_checkpoint(args.seed, find(reload=not args.no_reload))
    for line in args.left_out:
        run.log(line)
    saved = attempt.saved[1] if attempt.saved else {}
    guide = make_guide(args, world.device, run.log, models, saved)
    guide.record(*build_run.guidance_graphs(args, world, run.log))
    system.configure_gpu(args.tf32 == "on", world.device, run.log)
    startup.log_threads(world.device.type, run.log)
    if attempt.saved:
        check_same_run(args, attempt.saved, guide.prior.fingerprint)
    if attempt.finished_updates < args.N_iters:  # else args.json would tell what never ran
        run.record(vars(args), common_flags.as_config(args, dream_flags.dream_parser()))
        if args.wandb:
            run.start_wandb(vars(args))
    try:
        with system.StopSignal() as stop:
            while True:
                try:
                    return train_attempt(args, world, run, guide, attempt, stop)
                except Restart as reason:
                    attempt = next_attempt(attempt, reason, run, world, find)
                except system.Interrupted as reason:
                    run.log(f"stopped by signal {reason.number} while rendering; training is saved")
                    return 128 + reason.number
    finally:
        guide.release()  # the next prompt's LoRA hangs on the same model


def train_attempt(args, world, run, guide: Guide, attempt: Attempt, stop) -> int:
    """The loop. Returns the exit code; raises Restart where this attempt cannot go on."""
    state = prepare(args, world, attempt)
    renderer, optimizer, scaler = state.renderer, state.optimizer, state.scaler
    resume(args, run, state, guide)
    # Call ``model``, never model.module: that skips DDP's averaging of gradients. Of several
    # particles a step trains one: DDP has to be told to expect no more gradients.
    model = distributed.data_parallel(world, renderer, find_unused_parameters=True)
    outputs = build_outputs.object_outputs(args, world, run, renderer, state.ema, view_word, stop)
    micro = build_run.view_batches(args, world, run.warn, next_memory_saving(args, world.device))
    read_every = build.read_every(args, world.device)
    monitor = Monitor(world, stop, state.clock, args.max_minutes, read_every)
    fields = [] if outputs.flat else [member.field for _, member in members_of(renderer)]
    progress = Progress(
        args.N_iters, state, show=world.is_main and run.level != "warning",
        machine=world.device.type.upper(),
        ceiling=machine.log_ceiling(fields, world, args.amp, run.log), read_every=read_every,
    )  # fmt: skip
    collapse = Collapse()
    progress.rendering = 0.0 if outputs.flat else None  # until a preview was timed
    left_out, views_left_out = torch.zeros((), device=world.device), 0.0  # guidance not finite

    with start_viewer(args, world, run, outputs) or nullcontext() as viewer:
        build_outputs.make_up_turntable(args, state, outputs)
        while state.step < args.N_iters:
            # ---- one update. Every random number comes from (seed, step), not from a running
            # generator: a resumed run draws what an unbroken one draws, on any number of ranks.
            build_optimizer.set_learning_rates(optimizer, state.step, args)
            now = build_schedules.scheduled_flags(args, state.step)  # flags that change by step
            generator = rng.step_generator(attempt.rng_seed, state.step, world.device)
            renderer.begin_step(state.step, generator)  # updates the occupancy grid
            inputs = draw_inputs(args, now, guide.prior, state.step, generator)  # for all ranks
            inputs = inputs.part(world.shard(args.batch_views))
            stats = micro.run(accumulate_gradients, args, model, state, guide, inputs, now)
            # DDP's all-reduce, once: of several ranks one may have needed more micro-batches.
            distributed.sync_gradients(model)
            # fp16 only: gradients were scaled up for half precision; undo it before clipping.
            scaler.unscale_(optimizer)
            grad_norm = torch.nn.utils.clip_grad_norm_(
                renderer.parameters(), args.grad_clip or math.inf
            )
            left_out = left_out + stats.distilled.skipped
            verdict = monitor.check(
                state.step,
                stats.loss,
                grad_norm,
                more=torch.cat([torch.stack([stats.opacity, left_out]), renderer.room_used]),
                read=every(state.step + 1, args.i_print) or state.step + 1 == args.N_iters,
            )
            system.update_if_finite(optimizer, verdict.finite)  # on all ranks, or they drift apart
            scaler.update()  # also after a skipped update: its scale may have been too large
            state.ema.update()
            values = {"loss": verdict.loss, "grad_norm": verdict.grad_norm}
            if verdict.read:
                opacity, views_left_out, *room_used = verdict.more
                renderer.end_step(room_used)
            if guide.lora is not None:  # VSD: the LoRA learns what the renders look like by now
                guide.lora.set_schedule(now["lrate_lora"], now["camera_dropout"])
                values["lora_loss"] = guide.lora.train_step(
                    stats.distilled.latents, inputs.cameras.c2w, inputs.noise, world
                )
            state.advance(args.batch_views * now["train_res"] ** 2)

            # ---- between updates: reasons to stop or to start again, then everything periodic.
            if viewer is not None:
                with state.clock.paused():  # what viewers cost is not training time
                    viewer.tick(stop.is_set)
                    if text := viewer.new_text():
                        guide.set_prompt(args, run.log, text, state.step)
            if verdict.diverged:
                raise NonFinite.diagnose(state.step, world, step_tensors(renderer, inputs, stats))
            if args.space == "3d" and verdict.read:
                collapse.watch(opacity, state.step, run.warn)
            last = verdict.time_up or state.step == args.N_iters
            if every(state.step, args.i_print) or last:
                values |= {"views_left_out": views_left_out, "skipped": monitor.skipped}
                if guide.lora is not None:
                    values |= {"lr_lora": guide.lora.lrate, "grad_norm_lora": guide.lora.grad_norm}
                log_step(args, run, progress, world, state, stats, now, values)
            optimizer.zero_grad(set_to_none=True)  # frees memory for pictures
            progress.advance(run.log)
            if args.dry_run and (world.all_reduce_max(progress.tried())[0] or last):
                return build_outputs.foretell_object(args, run.log, state, progress, outputs)
            if every(state.step, args.i_img) or last:
                with state.clock.paused(), run.guard("previews"):
                    progress.rendering = build_outputs.preview(args, outputs, state.step)
            if every(state.step, args.i_attn) and run.is_main:
                with state.clock.paused(), run.guard("attention maps"):
                    grid = attention_grid(args, guide, state.step, seen(inputs, stats))
                    run.picture(state.step, "attention", labeled_grid(*grid))
            if every(state.step, args.i_guidance) and run.is_main:
                with state.clock.paused(), run.guard("pictures of the guidance"):
                    grid = guidance_grid(args, guide, state.step, now, seen(inputs, stats))
                    run.picture(state.step, "guidance", labeled_grid(*grid))
            if verdict.signal:
                content = {"args": vars(args), **guide.checkpoint_state()}
                return state.save_and_stop(run, verdict.signal, args.keep_ckpts, **content)
            if every(state.step, args.i_weights) or state.due(args.ckpt_secs) or last:
                with state.clock.paused():
                    content = {"args": vars(args), **guide.checkpoint_state()}
                    state.save(run, args.keep_ckpts, **content)
            if every(state.step, args.i_video) and not last:
                try:
                    with state.clock.paused(), run.guard("turntable"):
                        write_turntable(outputs, state.step, args.video_frames)
                except system.Interrupted as reason:  # on all ranks; the next start makes the rest
                    content = {"args": vars(args), **guide.checkpoint_state()}
                    return state.save_and_stop(run, reason.number, args.keep_ckpts, **content)
            if last:
                break
    progress.close()
    finish(args, run, outputs, state, guide)
    if views_left_out and views_left_out >= (state.step - progress.first_step) * len(inputs.jitter):
        run.warn("the guidance of every view was not finite: nothing was learned; try --amp off, "
                 "or --guidance_dtype fp32")  # fmt: skip
        return entry.NOTHING_LEARNED
    return 0


class StepInputs(NamedTuple):
    """Every random number of one step but the occupancy grid's, a row per view."""

    first_view: int  # number of the first row among all views of the step
    cameras: OrbitCameras
    lighting: Lighting
    jitter: Tensor  # [V, size * size] in [0, 1), of the samples along each ray
    noise: sds.GuidanceNoise
    lit: bool  # whether any view, on any rank, needs normals: then all views compute them

    def part(self, views: slice) -> "StepInputs":
        """Some of the views."""
        return StepInputs(
            self.first_view + views.start, self.cameras.part(views), self.lighting.part(views),
            self.jitter[views], self.noise.part(views), self.lit,
        )  # fmt: skip


def draw_inputs(args, now, prior, step: int, generator: torch.Generator) -> StepInputs:
    """Cameras, lighting and noise for all ``--batch_views``, over all ranks."""
    size, num_views = now["train_res"], args.batch_views
    ranges = build_schedules.orbit_ranges(args, step)
    if args.view_spread < 1:
        ranges = ranges._replace(settle=partial(pull_to_view_center, fraction=args.view_spread))
    host = rng.host_generator(generator)  # the host chooses view words by the cameras' angles
    cameras = random_orbit_cameras(num_views, ranges, host)
    # Albedo alone at first: shading needs normals, and those of the first fog mean nothing.
    settings, lit = build_schedules.lighting_settings(args, step), step >= args.albedo_steps
    lighting = draw_lighting(cameras.c2w[:, :, 3], settings, host, lit=lit)
    is_lit, device = lighting.is_lit, generator.device
    cameras, lighting = cameras.on(device), lighting.on(device)
    jitter = torch.rand(num_views * size**2, 1, generator=generator, device=generator.device)
    shown = shown_size(args, prior, size)
    noise = sds.draw_noise(num_views, prior.latent_shape(shown, shown), generator)
    return StepInputs(0, cameras, lighting, jitter.view(num_views, -1), noise, is_lit)


class StepStats(NamedTuple):
    """What the views of a step leave behind besides gradients."""

    distilled: sds.Distilled
    shape: Tensor  # [] sum of the losses on the object's shape, with their weights
    terms: dict[str, Tensor]  # [] each of them
    loss: Tensor  # [] guidance and shape
    images: Tensor  # [V, 3, H, W] in [0, 1]
    text: Tensor  # [V, ...] embedded prompt of each view
    opacity: Tensor  # [] mean
    samples: int  # along all rays of this rank


def accumulate_gradients(
    args, model, state: TrainState, guide: Guide, inputs: StepInputs, now, views: int
) -> StepStats:
    """Forward and backward of ``inputs``, ``views`` at a time; their gradients add up.

    now: the flags that are schedules, at this step.
    """
    size, num_views, renderer = now["train_res"], len(inputs.jitter), state.renderer
    renderer.zero_grad(set_to_none=True)  # also after a try that did not fit into memory
    recipe = make_recipe(args, now, progress=min(1.0, state.step / args.N_iters))
    pieces = []
    for start in range(0, num_views, views):
        first, cameras, lighting, jitter, noise, lit = inputs.part(slice(start, start + views))
        renderer.first = first  # --space 2d only: each view is an image of its own
        with distributed.without_sync(model), system.autocast(jitter.device, args.amp):
            rays = cameras.rays(size, size)
            rendered = model(rays, lighting.per_pixel(size * size), jitter.view(-1, 1), lit)
        images = rendered.rgb.float().view(-1, size, size, 3).permute(0, 3, 1, 2)
        shown = sds.resized(images, shown_size(args, guide.prior, size))
        # "front view", "back view": without view words the object would get a face on every side.
        conditions = guide.conditions(cameras, size, lighting.background)
        lora = guide.lora.epsilon_at(cameras.c2w) if guide.lora is not None else None
        distilled = sds.distill(guide.prior, shown, conditions, noise, recipe, lora)
        terms = shape_losses(rendered, renderer, now)
        shape = torch.as_tensor(sum(terms.values(), start=0.0))
        loss = now["lambda_sds"] * distilled.loss + shape
        # Gradients add up; a micro-batch counts by its share of the views.
        state.scaler.scale(loss * (len(images) / num_views)).backward()
        detached = shape.detach(), added({}, terms), loss.detach(), images.detach()
        opacity, samples = rendered.opacity.detach().mean(), renderer.batch_samples
        pieces.append(StepStats(distilled, *detached, conditions.text, opacity, samples))
    return pieces[0] if len(pieces) == 1 else join_stats(pieces, now["lambda_sds"])


def join_stats(pieces: list[StepStats], lambda_sds: float) -> StepStats:
    """The statistics of all views, from those of the micro-batches."""
    distilled, shapes, terms, _, images, texts, opacities, samples = zip(*pieces, strict=True)
    counts = [len(text) for text in texts]
    fractions = [count / sum(counts) for count in counts]
    whole = sds.join(distilled, fractions)
    shape, opacity = (
        sum(value * fraction for value, fraction in zip(values, fractions, strict=True))
        for values in (shapes, opacities)
    )
    each: dict[str, Tensor] = {}
    for named, fraction in zip(terms, fractions, strict=True):
        each = added(each, {name: term * fraction for name, term in named.items()})
    loss = lambda_sds * whole.loss + shape
    views = torch.cat(images), torch.cat(texts)
    return StepStats(whole, shape, each, loss, *views, opacity, sum(samples))


def seen(inputs: StepInputs, stats: StepStats) -> Seen:
    """What pictures of the guidance show of a step."""
    views = inputs.cameras, inputs.lighting.background, stats.images, stats.text
    return Seen(*views, stats.distilled, inputs.noise)


def step_tensors(renderer, inputs: StepInputs, stats: StepStats) -> StepTensors:
    """The tensors of a step in the order of computation, to name what was not finite first."""
    tensors = {"cameras": inputs.cameras.c2w, "rendered_colors": stats.images}
    tensors |= {"guidance": stats.distilled.gradient, "loss": stats.loss}
    return StepTensors(tensors, renderer)


# ------------------------------------------------------------------------------ logs and pictures


def log_step(args, run, progress, world, state, stats: StepStats, now, values) -> None:
    """One row of metrics, over all ranks, and the line a person reads."""
    progress.count(samples := world.all_reduce_sum(stats.samples))
    progress.measure()
    optimizer, grad_norm = state.optimizer, values["grad_norm"]
    # A rank's guidance is the mean over its own views, and ``sds`` the square of that: the mean
    # over all views is 1 / size of each rank's, its square the sum of all squares over size^2.
    guidance = stats.distilled.loss / world.size
    values |= {"loss": now["lambda_sds"] * guidance + stats.shape}
    left_out, skipped = values.pop("views_left_out"), values.pop("skipped")
    values = {"sds": guidance, "t": stats.distilled.t.float().mean(), **values}
    values |= {"opacity": stats.opacity, "lr": optimizer.param_groups[0]["lr"]}
    values |= {"views_left_out": left_out * world.size, "skipped": skipped}
    values |= state.renderer.report()
    values |= {"memory_mb": world.all_reduce_max(system.peak_memory_mb(world.device))[0]}
    values |= {"samples": samples} if "samples" in values else {}
    values |= {"train_seconds": state.clock.seconds}
    values |= {"views_per_second": progress.steps_per_second * args.batch_views}
    values |= {"samples_per_second": progress.samples_per_second}
    values |= by_group(optimizer, build_optimizer.GROUPS, grad_norm, args.grad_clip)
    names = [name for name in SHAPE_LOSSES if highest(getattr(args, f"lambda_{name}"))]
    values |= {f"loss_{name}": stats.terms.get(name, 0.0) for name in names}
    values |= build_schedules.scheduled_columns(args, state.step - 1)  # of the update just made
    values = read_means(world, values)
    run.scalars(state.step, values)
    build_run.record_logged(args, state, values)
    usage = "" if args.space == "2d" else f", {progress.usage()}"
    sds_value = ""
    if not progress.on_terminal:
        note = " (not a measure of quality)" if state.step <= args.i_print else ""
        sds_value = f"  sds {values['sds']:.4g}{note}"
    progress.report(
        run.log,
        f"opacity {values['opacity']:.3f}  gradient {values['grad_norm']:.3g}  "
        f"t {values['t']:.0f}{sds_value}",
        f"{progress.steps_per_second:.3g} steps/s{usage}  {values['memory_mb'] / 1024:.2f} GB",
    )


def finish(args, run, outputs: ObjectOutputs, state: TrainState, guide: Guide) -> None:
    """What a finished run leaves: turntable, mesh, LoRA, metrics.json and a report."""
    seconds, finished = state.clock.seconds, run.read_json("metrics.json")
    if outputs.world.gather(finished.get("step") == state.step)[0]:
        if run.is_main and report_is_old(run.folder):
            try_report(run.folder, run.log)
        run.log(f"nothing is left to do: open {run.folder}/report.html")
        return
    metrics = {"prompt": guide.prompt, "step": state.step, "weights": outputs.ema.kind}
    metrics |= {"prompts_by_viewer": guide.prompt_history} if guide.prompt_history else {}
    metrics |= {"train_seconds": seconds, "args": vars(args)}
    if args.space == "3d":
        with run.guard("turntable"):
            write_turntable(outputs, state.step, args.video_frames)
        if args.mesh:
            path = run.folder / "mesh.glb"
            with run.guard("mesh"):
                write_mesh(outputs, path, resolution=args.mesh_res, level=args.mesh_level)
    if guide.lora is not None and run.is_main:
        with run.guard("lora.safetensors"):
            save_lora(run.folder / "lora.safetensors", guide.lora.lora)
    with run.guard("metrics.json"):
        run.write_json("metrics.json", metrics)
    if run.is_main:
        try_report(run.folder, run.log)
    run.log(f"done: {run.folder}/ ({seconds:.0f} s of training)")
    if not run.has_checkpoint():  # the disk is full
        return
    more = "--export out.glb to the command to write a mesh, or --render_only --viewer to see it"
    run.log(
        f"next: open {run.folder}/report.html"
        + ("" if outputs.flat else f"; add {more} in a browser")
    )


# ------------------------------------------------------------- modes that only read a finished run


def render_and_export(args, world, run) -> int:
    """``--render_only`` and ``--export``: from a checkpoint, with its averaged weights."""
    saved = find_checkpoint(run, args.ft_path, world, prefer_given=True, choice=args.ckpt)
    if saved is None:
        raise ValueError(f"{run.folder}: no checkpoint there; train first, or name one: --ft_path")
    path, content = saved
    check_object(str(path), content)
    if content["args"].get("space") == "2d":
        raise ValueError(
            f"{path} is of a run with --space 2d: it has no object to render or export; its "
            f"pictures are in {run.folder}/previews/"
        )
    prompt = content["args"].get("prompt")
    if args.prompt and prompt and args.prompt != prompt:
        raise ValueError(
            f"{path} is of --prompt {prompt!r}, not {args.prompt!r}; leave --prompt out, or name "
            "the run of that prompt"
        )
    variant = build_run.turntable_variant(args, saved, run.folder)
    build.adopt_saved_flags(args, content["args"], run.log)
    renderer = prepare(args, world, Attempt(args.seed)).renderer
    ema = EMA(renderer, content.get("args", {}).get("ema_decay", 0.0))
    checkpoint.restore(path, content, run.log, renderer, ema=ema)
    step = checkpoint.finished_updates(content)
    run.log(f"{path}: step {step}, {ema.kind} weights")
    system.configure_gpu(args.tf32 == "on", world.device, run.log)
    outputs = build_outputs.object_outputs(args, world, run, renderer, ema, view_word)
    if args.export:
        write_mesh(outputs, Path(args.export), resolution=args.mesh_res, level=args.mesh_level)
    elif args.export_weights:
        build_run.export_weights(args, renderer, ema, content, run)
    elif args.camera_path:
        cameras = path_cameras(outputs, *read_path(Path(args.camera_path)))
        write_turntable(outputs, step, len(cameras.c2w), cameras, Path(args.camera_path).stem)
    elif viewer := start_viewer(args, world, run, outputs):
        with system.StopSignal() as stop, viewer:
            viewer.serve(stop.is_set)
    else:
        write_turntable(outputs, step, args.video_frames, name=variant)
    return 0


if __name__ == "__main__":
    entry.exit_process(main())
