"""Train, render and measure a neural radiance field from posed pictures.

    python run_nerf.py --config configs/lego.txt
    python run_nerf.py --config configs/lego.txt --render_only --render_test
    python run_nerf.py --config configs/lego.txt --export lego.glb --export_points lego.ply
    torchrun --nproc_per_node=2 run_nerf.py --config configs/lego.txt

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

from nerf import build, build_optimizer, build_outputs, build_run, build_schedules
from nerf.build import load_scene
from nerf.coarse_to_fine import refine
from nerf.datasets.identity import scene_difference
from nerf.encodings import resized_planes
from nerf.flags import common as common_flags
from nerf.flags import nerf as nerf_flags
from nerf.flags.checkpoints import reading_flags
from nerf.losses import PIXEL_LOSSES
from nerf.metrics import psnr_from_mse
from nerf.outputs import forecast, validation
from nerf.outputs.camera_path import read_path
from nerf.outputs.viewer import Viewer, check_server, open_viewer
from nerf.renderer import squared_error
from nerf.training import checkpoint, distributed, entry, machine, rng, startup, system
from nerf.training.checkpoint_choice import archive_checkpoints, find_checkpoint
from nerf.training.ema import EMA
from nerf.training.graph import StepGraphs
from nerf.training.logged import added, by_group, read_means
from nerf.training.monitor import WATCHED_STEPS, Monitor
from nerf.training.progress import Progress
from nerf.training.recovery import (
    Attempt,
    DeadStart,
    MicroBatches,
    NonFinite,
    Restart,
    StepTensors,
    explain_out_of_memory,
    next_attempt,
)
from nerf.training.run_folder import RunFolder, newest_run
from nerf.training.state import TrainState

SMALLER = (
    "make something smaller: --N_rand, --chunk, --netwidth, --N_samples, --N_importance, "
    "--grid_res, --occ_res, --mesh_res or the pictures"
)
FEWER_RAYS = "lower --chunk, --N_rand, --netwidth or --N_samples"
REVIVE = (
    "try another --seed, --alive_start, a lower --lrate, --fog_start, or the other --white_bkgd"
)


def every(step: int, interval: int) -> bool:
    return interval > 0 and step % interval == 0


def main(argv: list[str] | None = None) -> int:
    return entry.exit_code("run_nerf.py", partial(start, argv))


def start(argv: list[str] | None) -> int:
    args = nerf_flags.parse(argv)
    if is_reading(args) and not (args.config or args.ft_path):
        args = flags_of_run(args, argv)
    return run_scene(args)


def is_reading(args) -> bool:
    """Whether the run only reads what an earlier one has trained."""
    return bool(reading_flags(args))


def flags_of_run(args, argv: list[str] | None):
    """The flags of the named run, or of the one trained last, below what was typed."""
    named = (
        args.expname != nerf_flags.run_name(args) or (Path(args.basedir) / args.expname).is_dir()
    )
    name = args.expname if named else newest_run(Path(args.basedir), None, needs="N_rand")
    if name is None or not (Path(args.basedir) / name / "args.txt").is_file():
        return args
    taken = f"the flags of {name}" if named else f"the run trained last, {name}"
    print(f"no --config{'' if named else ' or --expname'}: taking {taken}", file=sys.stderr)
    saved = Path(args.basedir) / name / "args.txt"
    own = nerf_flags.parse([*(sys.argv[1:] if argv is None else argv), "--config", str(saved)])
    # Not where that run started: it has checkpoints of its own.
    own.ft_path, own.ft_weights, own.ft_ignore = args.ft_path, args.ft_weights, args.ft_ignore
    return own


def run_scene(args) -> int:
    """One scene from start to end, or one of the modes that only read a finished run."""
    world = distributed.setup(args.device)
    nerf_flags.check_nerf_flags(args, world.size)
    if args.camera_path:
        read_path(Path(args.camera_path))  # a broken file must fail before the work begins
    if args.viewer and world.is_main and reading_flags(args) in ([], ["--render_only"]):
        check_server(args.viewer_host, args.viewer_port)
    reading = is_reading(args)
    folder = Path(args.basedir) / args.expname
    run_folder: RunFolder = forecast.DryRun(folder, is_main=world.is_main)
    if not args.dry_run:
        run_folder = RunFolder(folder, is_main=world.is_main, lock=not reading)
    run_folder.level = args.log_level
    with explain_out_of_memory(SMALLER), run_folder as run, build_run.careful(args, run.log):
        args.amp = system.usable_amp(args.amp, world.device, run.log)
        code = render_and_export(args, world, run) if reading else train(args, world, run)
        world.barrier()  # a rank that leaves early can take the others' connections with it
        return run.exit_code(code)


def log_settings(args, world, run) -> None:
    """What was chosen by the device; after the data are read, so that a mistake is one line."""
    for note in args.notes:
        run.log(note)
    system.configure_gpu(args.tf32 == "on", world.device, run.log)
    startup.log_threads(world.device.type, run.log)


# ---------------------------------------------------------------------------------------- set-up


def prepare(args, world, run, scene, attempt: Attempt) -> TrainState:
    """The parts that learn, on the device, with new weights."""
    # Every rank gets the same initial weights. What differs between ranks are the rays they
    # train on: each draws the same global batch, see rng.step_generator, and keeps its shard.
    rng.seed_everything(attempt.weights_seed)
    saved = attempt.saved[1] if attempt.saved else None
    renderer = build.build_renderer(args, scene, run.log, saved).to(world.device)
    optimizer = build_optimizer.make_optimizer(renderer, args, world.device)
    scaler = system.grad_scaler(world.device, args.amp)
    ema = EMA(renderer, args.ema_decay)
    return TrainState(renderer, optimizer, scaler, ema, attempt, **build_run.saving(args))


def resume(args, run, state: TrainState) -> None:
    """Go on from the attempt's checkpoint, if there is one, and log what has changed since."""
    if state.attempt.saved is None:
        if args.ft_weights:
            state.start_from_weights(args.ft_weights, args.ft_ignore or [], run.log)
        return
    path, saved = state.attempt.saved
    for change in common_flags.other_changes(saved.get("args") or {}, args, nerf_flags.STRUCTURAL):
        run.log(f"changed since the checkpoint: {change}")
    state.restore(run, rays_per_step=args.N_rand)
    if state.step < args.N_iters:
        run.log(f"resumed from {path} at step {state.step}")
    else:
        run.log(f"{path} has all {state.step} updates; to train on, set --N_iters to more")


def check_same_run(args, saved, scene) -> None:
    """ValueError if the checkpoint was made with another network, or of another scene."""
    path, content = saved
    if "guidance" in (content.get("args") or {}):
        raise ValueError(f"{path}: a checkpoint of run_dreamfusion.py; give one of run_nerf.py")
    difference = scene_difference(content.get("scene"), scene)
    other = [f"another scene in {args.datadir}: {difference}"] if difference else []
    flags = content.get("args", {})
    common_flags.check_same_run(path, flags, args, nerf_flags.STRUCTURAL, other)


def start_viewer(args, world, run, scene) -> Viewer | None:
    """The live viewer of ``--viewer``, on the first rank."""
    if not args.viewer or not world.is_main or args.dry_run:
        return None
    place = (args.viewer_host, args.viewer_port)
    return open_viewer(scene, run.folder, *place, run.log, may_pause=world.size == 1)


# -------------------------------------------------------------------------------------- training


def train(args, world, run) -> int:
    """Train until N_iters, --max_minutes or a signal; start again where an attempt cannot go on."""
    scene = load_scene(args, run.log).to(world.device)
    run.log(f"{args.expname}: {scene.describe()}; {world.size} x {world.device}, seed {args.seed}")
    log_settings(args, world, run)
    if args.no_reload and world.is_main:
        archive_checkpoints(run.folder, run.log)
    find = partial(find_checkpoint, run, args.ft_path, world)
    attempt = Attempt.from_checkpoint(args.seed, find(reload=not args.no_reload))
    if attempt.saved:
        check_same_run(args, attempt.saved, scene)
    if attempt.finished_updates < args.N_iters:  # else args.json would tell what never ran
        run.record(vars(args), common_flags.as_config(args, nerf_flags.nerf_parser()))
        if args.wandb:
            run.start_wandb(vars(args))
    viewer = start_viewer(args, world, run, scene)
    with system.StopSignal() as stop, viewer or nullcontext():
        while True:
            try:
                return train_attempt(args, world, run, scene, attempt, stop, viewer)
            except Restart as reason:
                attempt = next_attempt(attempt, reason, run, world, find)
            except system.Interrupted as reason:
                run.log(f"stopped by signal {reason.number} while rendering; training is saved")
                return 128 + reason.number


def train_attempt(args, world, run, scene, attempt: Attempt, stop, viewer: Viewer | None) -> int:
    """The loop. Returns the exit code; raises Restart where this attempt cannot go on."""
    state = prepare(args, world, run, scene, attempt)
    renderer, optimizer, scaler = state.renderer, state.optimizer, state.scaler
    resume(args, run, state)
    ceiling = machine.log_ceiling(renderer.fields, world, args.amp, run.log)  # samples/s
    build_run.compile_if_set(args, world, run.log, scene, renderer)
    pool = build.ray_pool(args, scene, renderer, run.log)  # --hull_rays: a part of the pixels
    # Call ``model``, never model.module: that skips DDP's averaging of gradients.
    model = distributed.data_parallel(world, renderer)
    evaluation = build_outputs.scene_evaluation(args, world, run, scene, state, stop)
    if viewer is not None:
        viewer.view = evaluation.free_view
    block = build_run.training_block(args, world, evaluation.outputs.block)
    micro = MicroBatches(block, world, run.warn, "rays", FEWER_RAYS)
    probe, probe_block = build_run.make_probe(
        args, world, scene, renderer, attempt.weights_seed, evaluation.outputs.block
    )
    if args.alive_start and not args.ft_weights:
        build_run.start_alive(state, probe, evaluation.outputs.block, run.log)
    order = scene.block_order(attempt.weights_seed)  # of the rays in a mapped file; else None
    graphs = build_run.make_graphs(args, world, run.log, renderer)
    monitor = Monitor(
        world, stop, state.clock, args.max_minutes, build.read_every(args, world.device)
    )
    progress = Progress(
        args.N_iters, state, show=world.is_main and run.level != "warning",
        hint=build_outputs.faster_way(args), machine=world.device.type.upper(), ceiling=ceiling,
        read_every=monitor.read_every,
    )  # fmt: skip
    # Of test views and video, for the ETA; not known before the first validation.
    rendering_seconds = partial(
        evaluation.outputs.rendering_seconds, args.render_factor, video=args.i_video > 0
    )
    progress.rendering = rendering_seconds()
    scene_record = build_run.scene_record(args, scene, attempt.saved[1] if attempt.saved else {})
    content = {"args": vars(args), "scene": scene_record}  # of checkpoints, besides state
    if scene.stored is not None:  # a mapped file that is cut off while it is in use
        scene.stored.before_lost = partial(state.save, run, args.keep_ckpts, **content)

    build_outputs.make_up(
        args, state, evaluation, partial(state.save, run, args.keep_ckpts, **content)
    )
    while state.step < args.N_iters:
        if scene.stored is not None and every(state.step, monitor.read_every):
            scene.stored.check_on_all_ranks(world)
        if finer := refine(renderer, build.grid_schedule(args).size(state.step)):  # --grid_steps
            run.log(f"step {state.step}: tri-planes of {renderer.field.encoding.finest} per side")
            state.replace_parameters(finer, resized_planes)
            model = distributed.data_parallel(world, renderer)
            graphs = build_run.make_graphs(args, world, run.log, renderer)
        # ---- one update. Every random number comes from (seed, step), not from a running
        # generator: a resumed run, and a run on more processes, draws what an unbroken one draws.
        build_optimizer.set_learning_rates(optimizer, state.step, args)
        frozen = graphs.enabled or args.compile  # numbers of Python inside a step
        build_schedules.set_scheduled(args, renderer, state.step, recorded=frozen)
        generator = rng.step_generator(attempt.rng_seed, state.step, world.device)
        renderer.begin_step(state.step, generator)  # updates an occupancy grid, if there is one
        num_rays = renderer.rays_per_step(args.N_rand, world.size)  # over all ranks
        # Drawn for the whole batch, then cut: the result does not depend on the number of ranks.
        noise = renderer.draw_noise(num_rays, generator).part(world.shard(num_rays))
        rays, target = pool.sample_rays(
            num_rays,
            generator,
            one_image=args.no_batching,
            # At first only the middle, where the object is: background alone invites a dead start.
            crop=args.precrop_frac if state.step < args.precrop_iters else 1.0,
            background=noise.background,  # random behind transparent pixels (--random_bg), or None
            shard=world.shard(num_rays),
            order=order,
            position=state.rays_drawn,  # the order goes on where the last step ended
        )
        # accumulate_gradients(..., block), with a smaller block whenever memory runs out.
        stats = micro.run(
            accumulate_gradients, args, world, model, state, graphs, (rays, target, noise)
        )
        # DDP's all-reduce, once: of several ranks one may have needed more micro-batches.
        distributed.sync_gradients(model)
        # fp16 only: gradients were scaled up to survive half precision; undo it before clipping.
        scaler.unscale_(optimizer)
        grad_norm = torch.nn.utils.clip_grad_norm_(  # inf: measured only, as in NeRF
            renderer.parameters(), args.grad_clip or math.inf
        )
        # The raw density can be negative everywhere at the start: the ReLU gives 0, all rays show
        # one color, no gradient flows, and nothing ever changes. The first steps are watched.
        flat = None
        if state.step + 1 < WATCHED_STEPS:
            flat = probe.watch(state.step, min(probe_block(num_rays), micro.size))
        # The same answer on every rank: may the update be made, must we stop? On a GPU the numbers
        # are read every 16th step only, because the host would wait for them.
        verdict = monitor.check(
            state.step,
            stats.loss,
            grad_norm,
            flat=flat,
            samples=stats.samples,
            read=every(state.step + 1, args.i_print) or state.step + 1 == args.N_iters,
        )
        # On all ranks or on none, or they would drift apart.
        system.update_if_finite(optimizer, verdict.finite)
        scaler.update()  # also after a skipped update: it was too large a scale that made it skip
        state.ema.update()  # pictures are made with the averaged weights (--ema_decay)
        if verdict.read:
            renderer.end_step(num_rays, verdict.samples, verdict.total_samples)  # next num_rays
            progress.count(verdict.total_samples)
        state.advance(num_rays)

        # ---- between updates: reasons to stop or to start again, then everything periodic.
        if viewer is not None:
            with state.clock.paused():  # what viewers cost is not training time
                viewer.tick(stop.is_set)
        if verdict.diverged:
            raise NonFinite.diagnose(state.step, world, step_tensors(renderer, rays, target, stats))
        if verdict.dead and state.step < WATCHED_STEPS:
            if attempt.dead_starts < args.dead_restarts:
                progress.close()
                raise DeadStart(state.step, probe.diagnosis())
            run.log_once(state.step, f"stuck, {probe.diagnosis()}; no restart is left")
        last = verdict.time_up or state.step == args.N_iters
        if every(state.step, args.i_print) or last:
            log_step(args, run, progress, monitor, state, stats, verdict)
            run.log_once(state.step, renderer.warning(state.step))
        if verdict.signal:  # what else is due at this step, the next start makes up for
            return state.save_and_stop(run, verdict.signal, args.keep_ckpts, **content)
        progress.advance(run.log)
        if args.dry_run and (world.all_reduce_max(progress.tried())[0] or last):
            return build_outputs.foretell_scene(args, run.log, state, progress, evaluation)
        try:
            if every(state.step, args.i_img):
                with state.clock.paused():
                    state.record_score(*validation.score(evaluation, state.step, args.monitor))
                progress.rendering = rendering_seconds()
            if every(state.step, args.i_weights) or state.due(args.ckpt_secs) or last:
                with state.clock.paused():
                    state.save(run, args.keep_ckpts, **content)
            if last:
                break
            with state.clock.paused(), run.guard("a rendering"):
                if every(state.step, args.i_testset):
                    evaluation.measure_test(state.step)
                if every(state.step, args.i_video):
                    evaluation.render_camera_path(state.step)
        except system.Interrupted as reason:  # on all ranks; the next start makes the rest
            return state.save_and_stop(run, reason.number, args.keep_ckpts, **content)
    progress.close()
    with run.guard("a rendering"):  # also what an earlier start was stopped before rendering
        evaluation.finish(state.step, video=args.i_video > 0)
    judged = state.step > progress.first_step and (verdict.dead or state.step >= WATCHED_STEPS)
    if judged and probe.is_flat(min(probe_block(num_rays), micro.size)):
        run.warn(f"the run is dead: {probe.diagnosis()}; {REVIVE}")
        return entry.NOTHING_LEARNED
    return 0


class StepStats(NamedTuple):
    """What a batch leaves behind besides its gradients."""

    # Of the first micro-batch: it is the largest, the last one may hold a single ray, and the
    # standard deviation of a single color, by which a dead start is noticed, is NaN.
    levels: tuple  # Rendered of each level (coarse, fine)
    target: Tensor  # [b, 3]
    loss: Tensor  # [] of the batch
    terms: dict[str, Tensor]  # [] what ``loss`` is the sum of, weights included
    error: Tensor  # [] squared error of the final level, for PSNR
    samples: int | Tensor  # of this rank


def accumulate_gradients(
    args, world, model, state: TrainState, graphs: StepGraphs, batch, block: int
) -> StepStats:
    """Forward and backward of batch = (rays, target, noise), ``block`` rays at a time."""
    if not state.renderer.static_shapes:
        return forward_backward(args, world, model, state, block, batch)
    kind = block, state.renderer.graph_kind()
    return graphs.run(partial(forward_backward, args, world, model, state, block), batch, kind)


def forward_backward(args, world, model, state: TrainState, block: int, batch) -> StepStats:
    """Render, compare and backpropagate; on a GPU recorded as a graph, so nothing is read here.

    Micro-batches add up to the gradients of the whole batch. On a CPU they are so small that the
    activations stay in the cache.
    """
    rays, target, noise = batch
    renderer, scaler = state.renderer, state.scaler
    pixel_loss = partial(PIXEL_LOSSES[args.loss], delta=args.loss_delta)
    renderer.zero_grad(set_to_none=True)  # also after a try that did not fit into memory
    loss_sum, error_sum, samples = torch.zeros((), device=world.device), 0.0, 0
    names = ("coarse", "fine") if len(renderer.fields) > 1 else ("color",)
    first_levels, terms = None, {}
    pieces = [slice(start, start + block) for start in range(0, len(target), block)]
    for piece in pieces:
        with distributed.without_sync(model), system.autocast(world.device, args.amp):
            levels = model(rays.part(piece), noise.part(piece))  # (coarse, fine) or (coarse,)
        weight = len(target[piece]) / len(target)  # its share of the batch
        # Both levels learn (NeRF eq. 6): the fine one needs the coarse one's density.
        errors = [pixel_loss(level.rgb, target[piece]) * weight for level in levels]
        penalties = renderer.penalties()  # on the field, by name
        loss = sum(errors) + weight * sum(penalties.values())
        scaler.scale(loss).backward()
        penalties = {name: weight * penalty for name, penalty in penalties.items()}
        terms = added(terms, dict(zip(names, errors, strict=True)) | penalties)
        first_levels = first_levels or levels
        loss_sum += loss.detach()
        error_sum += squared_error(levels[-1].rgb.detach(), target[piece]) * weight
        samples = samples + renderer.batch_samples
    return StepStats(first_levels, target[pieces[0]], loss_sum, terms, error_sum, samples)


def step_tensors(renderer, rays, target, stats: StepStats) -> StepTensors:
    """The tensors of a step in the order of computation, to name what was not finite first."""
    tensors = {"rays": rays.directions, "origins": rays.origins, "target_colors": target}
    tensors |= {"rendered_colors": stats.levels[-1].rgb, "loss": stats.loss}
    return StepTensors(tensors, renderer)


def log_step(args, run, progress, monitor, state, stats, verdict) -> None:
    """One row of metrics, over all ranks, and the line a person reads."""
    progress.measure()
    world, optimizer = monitor.world, state.optimizer
    values = {
        "loss": stats.loss,
        "psnr": stats.error,
        "lr": optimizer.param_groups[0]["lr"],
        "grad_norm": verdict.grad_norm,
        "rays_per_second": progress.rays_per_second,
        "memory_mb": world.all_reduce_max(system.peak_memory_mb(world.device))[0],
        "skipped": monitor.skipped,
        "train_seconds": state.clock.seconds,
        **state.renderer.report(),
        "samples_per_second": progress.samples_per_second,
        **by_group(optimizer, build_optimizer.GROUPS, verdict.grad_norm, args.grad_clip),
        **{f"loss_{name}": stats.terms.get(name, 0.0) for name in build_run.loss_terms(args)},
        **build_schedules.scheduled_columns(args, state.step - 1),  # of the update just made
    }
    values = read_means(world, values)
    values["psnr"] = psnr_from_mse(values["psnr"])
    run.scalars(state.step, values)
    progress.report(
        run.log,
        f"loss {values['loss']:.5f}  PSNR {values['psnr']:.2f}  "
        f"{values['rays_per_second']:.0f} rays/s",
        f"{progress.usage()}  {values['memory_mb'] / 1024:.2f} GB",
    )


# ------------------------------------------------------------- modes that only read a finished run


def render_and_export(args, world, run) -> int:
    """``--export``, ``--render_only``, ``--validate``: mesh, points, pictures of a checkpoint."""
    saved = find_checkpoint(run, args.ft_path, world, prefer_given=True, choice=args.ckpt)
    if saved is None:
        raise ValueError(
            f"{run.folder}: no checkpoint to render or export; train first, or name one: --ft_path"
        )
    path, content = saved
    scene = load_scene(args, run.log).to(world.device)
    check_same_run(args, saved, scene)
    state = prepare(args, world, run, scene, Attempt(args.seed, saved))
    # Training measured its averaged weights, so these are rendered too.
    state.ema = EMA(state.renderer, content.get("args", {}).get("ema_decay", 0.0))
    checkpoint.restore(path, content, run.log, state.renderer, ema=state.ema)
    step = checkpoint.finished_updates(content)
    run.log(f"{path}: step {step}, {state.ema.kind} weights; {scene.describe()}")
    log_settings(args, world, run)
    build_run.compile_if_set(args, world, run.log, scene, state.renderer)
    evaluation = build_outputs.scene_evaluation(args, world, run, scene, state)
    if args.export:
        evaluation.export_mesh(
            Path(args.export), args.export_bound, resolution=args.mesh_res, level=args.mesh_level
        )
    if args.export_points:
        evaluation.export_points(Path(args.export_points), args.export_bound, args.num_points)
    if args.export_weights:
        build_run.export_weights(args, state.renderer, state.ema, content, run)
    if args.validate:
        validation.measure_validation(evaluation, step, path, args.datadir)
    named = args.render_test or args.camera_path or reading_flags(args) != ["--render_only"]
    viewer = start_viewer(args, world, run, scene) if args.render_only and not named else None
    if viewer is not None:
        viewer.view = evaluation.free_view
        with system.StopSignal() as stop, viewer:
            viewer.serve(stop.is_set)
    elif args.render_only and args.render_test:
        evaluation.measure_test(step)
    elif args.render_only:
        evaluation.render_camera_path(step)
    return 0


if __name__ == "__main__":
    entry.exit_process(main())
