"""Train, render and measure a neural radiance field: the loop, and nothing else.

    python run_nerf.py --config configs/lego.txt
    python run_nerf.py --config configs/lego.txt --render_only --render_test --render_factor 4
    python run_nerf.py --config configs/lego.txt --export lego.glb --export_points lego.ply
    torchrun --nproc_per_node=2 run_nerf.py --config configs/lego.txt

Exit codes: 0 done; 2 a mistake in flags or data; 3 done, or stopped, but something could not be
written (the log says what); 130 / 143 / 138 stopped by SIGINT / SIGTERM / SIGUSR1, with the step
saved: the same command goes on from there.
"""

import math
import sys
import time
import traceback
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from nerf import build
from nerf.build import compile_fields, load_scene
from nerf.flags import common as common_flags
from nerf.flags import nerf as nerf_flags
from nerf.metrics import load_lpips, psnr_from_mse
from nerf.occupancy_renderer import MOST_RAYS
from nerf.outputs import export, viewer
from nerf.outputs import scene as scene_outputs
from nerf.outputs.camera_path import read_path
from nerf.outputs.render import block_size
from nerf.outputs.report import try_report
from nerf.renderer import squared_error
from nerf.training import checkpoint, distributed, entry, recovery, rng, system
from nerf.training.ema import EMA
from nerf.training.monitor import DeadStart
from nerf.training.progress import Clock, Progress, Speed
from nerf.training.run_folder import RunFolder


def every(step: int, interval: int) -> bool:
    return interval > 0 and step % interval == 0


def main(argv: list[str] | None = None) -> int:
    args = nerf_flags.parse(argv)
    run = None
    try:
        world = distributed.setup(args.device)
        nerf_flags.check_nerf_flags(args, world.size)
        if args.camera_path:
            read_path(Path(args.camera_path))  # a broken one is to fail before the work begins
        if args.viewer and world.is_main and not (args.export or args.export_points):
            viewer.check_server(args.viewer_host, args.viewer_port)
        folder = Path(args.basedir) / args.expname
        reading = args.render_only or args.export or args.export_points
        run = RunFolder(folder, is_main=world.is_main, lock=not reading)
        code = read_run(args, world, run) if reading else train(args, world, run)
        world.barrier()  # a rank that leaves early can take the others' connections with it
        return run.exit_code(code)
    except (ValueError, OSError) as error:
        print(f"run_nerf.py: {error}", file=sys.stderr)
        if run is not None:
            run.log_file_only(traceback.format_exc())
        return 2 if isinstance(error, ValueError) else 3
    except (MemoryError, RuntimeError) as error:
        if not recovery.out_of_memory(error):
            raise
        print(f"run_nerf.py: {recovery.too_large(error)}", file=sys.stderr)
        return 2
    finally:
        if run is not None:
            run.close()
        distributed.cleanup()


# ------------------------------------------------------------------------------------ set-up


def prepare(args, world, scene, attempt: int, warn):
    """The parts of a run that learn: renderer, optimizer, scaler and EMA, on the device."""
    rng.seed_everything(args.seed + attempt)  # the same on all ranks: same initial weights
    renderer = build.build_renderer(args, scene, warn).to(world.device)
    fused = world.device.type in ("cpu", "cuda")
    betas, eps = ((0.9, 0.99), 1e-15) if args.occ_grid else ((0.9, 0.999), 1e-8)
    groups = build.parameter_groups(renderer, args)
    optimizer = torch.optim.Adam(groups, lr=args.lrate, betas=betas, eps=eps, fused=fused)
    scaler = system.grad_scaler(world.device, args.amp)
    return renderer, optimizer, scaler, EMA(renderer, args.ema_decay)


def find_checkpoint(args, world, run):
    """(path, state) to start from, or None."""
    return checkpoint.find_checkpoint(
        run.folder,
        args.ft_path,
        world,
        run.log,
        reload=not args.no_reload,
        prefer_given=bool(args.render_only or args.export or args.export_points),
    )


def check_flags(path, state, args) -> None:
    """ValueError if the checkpoint at ``path`` was made with another network or other data."""
    refused = common_flags.structural_changes(state.get("args", {}), args, nerf_flags.STRUCTURAL)
    if refused:
        raise ValueError(
            f"{path} was made with other flags ({'; '.join(refused)}); "
            "use those, or another --expname"
        )


def resume(found, args, run, renderer, optimizer, scaler, ema) -> tuple[int, dict, Clock]:
    """Finished updates, the best validation so far and the training clock of ``found``, restored.

    found: (path, state), or None for a new run.
    """
    best = {"step": None, "psnr": -math.inf}
    if not found:
        return 0, best, Clock()
    path, state = found
    for change in common_flags.other_changes(state.get("args") or {}, args, nerf_flags.STRUCTURAL):
        run.log(f"changed since the checkpoint: {change}")
    checkpoint.restore(path, state, run.log, renderer, optimizer, scaler, ema)
    step = checkpoint.finished_updates(state)
    done = f"; it is done: raise --N_iters {args.N_iters}" if step >= args.N_iters else ""
    run.log(f"resumed from {path} at step {step}{done}")
    return step, state.get("best") or best, Clock(state.get("train_seconds", 0.0))


def make_outputs(args, world, renderer, scene, stop=None, log=print) -> scene_outputs.SceneOutputs:
    def render(rays):
        with system.autocast(world.device, args.amp):
            return renderer.render(rays)

    block = rays_per_block(args, renderer, world)
    return scene_outputs.SceneOutputs(render, scene, block, world, stop, log)


def rays_per_block(args, renderer, world) -> int:
    if args.occ_grid:  # few samples a ray: larger blocks, still in cache
        return min(args.chunk, 8192 if world.device.type == "cpu" else 1 << 17)
    width = max(args.netwidth, args.netwidth_fine if renderer.fine is not None else 0)
    return block_size(renderer.samples_per_ray, width, args.chunk, args.netchunk, world.device)


def measure_test(args, run, outputs, ema, step) -> None:
    """Render and measure the test views; metrics.json in their folder and in the run's."""
    if not outputs.scene.splits.get("test"):
        run.log("there are no test views: no metrics.json")
        return
    name = f"render_test_{step:06d}"
    lpips, missing = load_lpips(outputs.world.device)
    settings = {"lpips": lpips, "metres_per_unit": args.metres_per_unit}
    settings["true_depth"] = Path(args.datadir) / "depth"
    with ema.swap():
        metrics = scene_outputs.measure_views(
            outputs, "test", run.folder / name, args.render_factor, **settings
        )
    system.release_memory()
    metrics.update(step=step, weights=ema.kind, args=vars(args))
    run.write_json(f"{name}/metrics.json", metrics)
    run.write_json("metrics.json", metrics)
    others = {"ssim": "SSIM", "lpips": "LPIPS", "depth_error": "depth error"}
    found = [f", {said} {metrics[key]:.4f}" for key, said in others.items() if metrics.get(key)]
    run.log(
        f"test: PSNR {metrics['psnr']:.2f} dB{''.join(found)} over {metrics['num_views']} views, "
        f"{metrics['seconds_per_view']:.2f} s each -> {run.folder / name}/, metrics.json"
        + (f"; no LPIPS ({missing})" if missing else "")
    )
    if run.is_main:
        try_report(run.folder, run.log)


def validate(world, run, outputs, ema, step) -> float:
    """Validation PSNR over a fixed set of pixels, logged with the picture of one view."""
    with ema.swap():
        score = scene_outputs.validation_psnr(outputs)
        if world.is_main:
            run.validation(step, score, scene_outputs.validation_strip(outputs, step))
    run.log(f"step {step}: validation PSNR {score:.2f}")
    system.release_memory()
    return score


def report(args, run, progress, step, values: dict, seconds_per_step: float) -> None:
    """One row of metrics, and the line a person reads."""
    run.scalars(step, values)
    line = (
        f"loss {values['loss']:.5f}  PSNR {values['psnr']:.2f}  "
        f"{values['rays_per_second']:.0f} rays/s"
    )
    progress.describe(line)
    if not progress.on_terminal:
        eta = (args.N_iters - step) * seconds_per_step / 60
        run.log(f"step {step}/{args.N_iters}  {line}  ETA {eta:.1f} min")


def warn_once(run, step, complaint: str | None, said: tuple[str, ...]) -> tuple[str, ...]:
    """Say ``complaint`` unless it was ``said``; returns what has been said by now."""
    if complaint is None or complaint in said:
        return said
    run.log(f"step {step}: {complaint}")
    return (*said, complaint)


def render_camera_path(args, run, outputs, ema, step) -> None:
    folder, scale = run.folder / f"render_path_{step:06d}", args.metres_per_unit
    with ema.swap():
        path = read_path(Path(args.camera_path)) if args.camera_path else None
        videos = scene_outputs.render_path(
            outputs, folder, args.render_factor, run.log, scale, key_path=path
        )
    run.log("video: " + (", ".join(map(str, videos)) or f"frames only, in {folder}/"))
    system.release_memory()


def open_viewer(args, world, run, scene) -> viewer.Viewer | None:
    """The live viewer of ``--viewer``, on the first rank; ``look_through`` says what it shows."""
    if not args.viewer or not world.is_main:
        return None
    try:
        place = (args.viewer_host, args.viewer_port)
        return viewer.Viewer(scene, run.folder, *place, run.log, may_pause=world.size == 1)
    except Exception as error:  # whatever a viewer does, training goes on
        run.log(f"no viewer: {type(error).__name__}: {error}")
        return None


def look_through(window: viewer.Viewer | None, outputs, ema) -> None:
    """Let the viewer show what pictures show."""

    def view(*wish):
        with ema.swap():
            return scene_outputs.render_free_view(outputs, *wish)

    if window is not None:
        window.view = view


def write_exports(args, run, outputs, renderer, ema) -> None:
    """The mesh and the point cloud that are asked for, of the weights that pictures show."""
    if not run.is_main:
        return
    render, scene, block = outputs.render, outputs.scene, outputs.block
    with ema.swap():
        capture = export.TrainedScene(renderer, scene, render, block, args.export_bound, run.log)
        if args.export:
            settings = {"resolution": args.mesh_res, "level": args.mesh_level}
            export.export_mesh(capture, Path(args.export), **settings)
        if args.export_points:
            export.export_points(capture, Path(args.export_points), args.num_points)


def read_run(args, world, run) -> int:
    """``--export``, ``--render_only``: mesh, points, camera path or test views of a checkpoint."""
    found = find_checkpoint(args, world, run)
    if found is None:
        raise ValueError(
            f"{run.folder}: no checkpoint to render or export; train first, or name one: --ft_path"
        )
    path, state = found
    scene = load_scene(args, run.log).to(world.device)
    renderer = prepare(args, world, scene, attempt=0, warn=run.log)[0]
    # What training averaged is what it measured, so that is what is rendered.
    ema = EMA(renderer, state.get("args", {}).get("ema_decay", 0.0))
    check_flags(path, state, args)
    checkpoint.restore(path, state, run.log, renderer, ema=ema)
    step = checkpoint.finished_updates(state)
    run.log(f"{path}: step {step}, {ema.kind} weights; {scene.describe()}")
    outputs = make_outputs(args, world, renderer, scene, log=run.log)
    write_exports(args, run, outputs, renderer, ema)
    others = args.render_test, args.camera_path, args.export, args.export_points
    serves = args.render_only and not any(others)
    window = open_viewer(args, world, run, scene) if serves else None
    if window is not None:
        look_through(window, outputs, ema)
        with system.StopSignal() as stop:
            window.serve(lambda: bool(stop.number))
        window.close()
    elif args.render_only:
        (measure_test if args.render_test else render_camera_path)(args, run, outputs, ema, step)
    return 0


# ---------------------------------------------------------------------------------- training


def train(args, world, run) -> int:
    """Train until N_iters, --max_minutes or a signal; start again with a new seed if stuck."""
    scene = load_scene(args, run.log).to(world.device)
    run.log(f"{args.expname}: {scene.describe()}; {world.size} x {world.device}, seed {args.seed}")
    if args.no_reload and world.is_main:
        checkpoint.archive_checkpoints(run.folder, run.log)
    found = find_checkpoint(args, world, run)
    if found:
        check_flags(*found, args)
    run.record(vars(args), common_flags.as_config(args, nerf_flags.nerf_parser()))
    if args.wandb:
        run.start_wandb(vars(args))
    attempt, draws = (found[1].get(name, 0) if found else 0 for name in ("attempt", "draws"))
    returns, window = recovery.Rollback(draws), open_viewer(args, world, run, scene)
    with system.StopSignal() as stop, window or nullcontext():
        while True:
            try:
                code = train_attempt(args, world, run, scene, stop, found, attempt, returns, window)
            except recovery.NonFinite as error:
                args.no_reload = False  # what lies in the folder by now is this run's
                found = returns.roll_back(error, run, lambda: find_checkpoint(args, world, run))
                continue
            except scene_outputs.Interrupted:
                run.log(f"stopped by signal {stop.number} while rendering; training is saved")
                return 128 + stop.number
            if code is not None:
                return code
            # Stuck: whatever this attempt saved is as dead as it is.
            found, attempt = None, attempt + 1
            if world.is_main:
                for path in checkpoint.list_checkpoints(run.folder):
                    path.unlink()
            run.close_tables()
            world.barrier()


class Gradients(NamedTuple):
    """What a batch left behind besides its gradients."""

    levels: tuple  # of the last block
    target: Tensor  # of the last block
    loss: Tensor  # [] of the batch
    error: Tensor  # [] squared, of the final level
    samples: int


def backward(args, world, model, renderer, scaler, batch, block: int) -> Gradients:
    """Gradients of batch = (rays, target, noise), ``block`` rays at a time.

    Smaller blocks add up to the same gradients; they are so small that activations stay in cache.
    """
    rays, target, noise = batch
    renderer.zero_grad(set_to_none=True)  # of an attempt that did not fit
    loss_sum, error_sum, samples = torch.zeros((), device=world.device), 0.0, 0
    pieces = [slice(start, start + block) for start in range(0, len(target), block)]
    for part in pieces:
        waiting = world.size > 1 and part is not pieces[-1]
        with model.no_sync() if waiting else nullcontext():
            with system.autocast(world.device, args.amp):
                levels = model(rays.part(part), noise.part(part))  # (coarse, fine) or (coarse,)
            weight = len(target[part]) / len(target)
            errors = [squared_error(level.rgb, target[part]) * weight for level in levels]
            loss = sum(errors) + weight * renderer.penalty()
            scaler.scale(loss).backward()  # DDP averages the gradients here
        loss_sum += loss.detach()
        error_sum += errors[-1].detach()
        samples += renderer.num_samples
    return Gradients(levels, target[pieces[-1]], loss_sum, error_sum, samples)


def cause(renderer, rays, target, found: Gradients) -> tuple[str, dict]:
    """What was not finite first in a step, and the step's tensors."""
    tensors = {"rays": rays.directions, "origins": rays.origins, "target_colors": target}
    tensors |= {"rendered_colors": found.levels[-1].rgb, "loss": found.loss}
    return recovery.first_non_finite(**tensors) or recovery.non_finite_gradients(renderer), tensors


def train_attempt(
    args, world, run, scene, stop, found, attempt: int, returns, window
) -> int | None:
    """The loop. Returns the exit code, or None if the start is dead and another should be tried."""
    parts = renderer, optimizer, scaler, ema = prepare(args, world, scene, attempt, run.log)
    step, best, clock = resume(found, args, run, *parts)
    if args.compile:
        few = torch.zeros(3, 64, dtype=torch.long, device=world.device)
        compile_fields(renderer, scene.pick(*few)[0], run.log)
    model = DistributedDataParallel(renderer) if world.size > 1 else renderer
    outputs = make_outputs(args, world, renderer, scene, stop, run.log)
    look_through(window, outputs, ema)
    block = MOST_RAYS if args.occ_grid else outputs.block  # rays in one graph
    health, complaints = DeadStart(), ()
    progress = Progress(args.N_iters, step, show=world.is_main)
    seed = args.seed + attempt + returns.offset()
    watch, saved_at = recovery.FiniteWatch(), time.monotonic()
    rays_done, speed = 0, Speed(step, clock.seconds)
    order = scene.block_order(args.seed + attempt)
    position = found[1].get("rays_drawn", step * args.N_rand) if found else 0

    def save() -> bool:
        extra = {
            "args": vars(args),
            "attempt": attempt,
            "draws": returns.rollback_count,
            "best": best,
        }
        extra |= {"train_seconds": clock.seconds, "best_step": best["step"], "rays_drawn": position}
        return checkpoint.save_run(run, step, parts, keep=args.keep_ckpts, **extra)

    while step < args.N_iters:
        # One update. Every random number comes from (seed, step), see runtime.step_generator.
        rate = build.learning_rate(step, args)
        for group in optimizer.param_groups:
            group["lr"] = rate * group["scale"]
        generator = rng.step_generator(seed, step, world.device)
        renderer.begin_step(step, generator)
        num_rays = renderer.rays_per_step(args.N_rand, world.size)
        shard = world.shard(num_rays)
        noise = renderer.draw_noise(num_rays, generator).part(shard)
        rays, target = scene.sample_rays(
            num_rays,
            generator,
            one_image=args.no_batching,
            crop=args.precrop_frac if step < args.precrop_iters else 1.0,
            background=noise.background,
            shard=shard,
            order=order,
            position=position,
        )
        batch = rays, target, noise
        grads, block = recovery.halve_until_it_fits(
            partial(backward, args, world, model, renderer, scaler, batch),
            block,
            run.log,
            may_halve=world.size == 1,
        )
        scaler.unscale_(optimizer)
        grad_norm = torch.nn.utils.clip_grad_norm_(
            renderer.parameters(), args.grad_clip or math.inf
        )
        broken = not (math.isfinite(grad_norm) and math.isfinite(grads.loss))
        dead = health.looks_dead(grads.levels, grads.target, step + 1)
        time_up = bool(args.max_minutes) and clock.seconds >= args.max_minutes * 60
        number, time_up, alive, broken = world.all_reduce_max(
            stop.number, time_up, not dead, broken
        )
        if not broken:  # anywhere: a rank alone must not go on
            scaler.step(optimizer)
            ema.update()
        scaler.update()
        if args.occ_grid:
            renderer.num_samples = grads.samples  # of all blocks
            renderer.end_step(num_rays, world.all_reduce_sum(grads.samples))
        rays_done, position = rays_done + num_rays, position + num_rays
        step += 1  # updates finished, also when one was left out

        # After the update: signals, health, and everything periodic.
        if window is not None:
            with clock:  # what lookers cost is not training's time
                window.tick(lambda: bool(stop.number))
        watch.count(broken, step, world, partial(cause, renderer, *batch[:2], grads))
        if number:
            saved = "saved" if save() else "not saved"
            run.log(f"stopped by signal {int(number)}; step {step} is {saved}")
            return 128 + int(number)
        if not alive and attempt < args.dead_restarts:
            run.log(
                f"step {step}: stuck, {DeadStart.diagnosis(grads.levels)}; starting again "
                f"with seed {args.seed + attempt + 1} (--dead_restarts 0 to go on instead)"
            )
            progress.close()
            return None
        last = bool(time_up) or step == args.N_iters
        if every(step, args.i_print) or last:
            values = {
                "loss": grads.loss.item(),
                "psnr": psnr_from_mse(grads.error.item()),
                "lr": rate,
                "grad_norm": float(grad_norm),
                "rays_per_second": speed.rays_per_second(step, rays_done, clock.seconds),
                "memory_mb": system.peak_memory_mb(world.device),
                "skipped": watch.skipped,
                "train_seconds": clock.seconds,
                **renderer.report(),
            }
            report(args, run, progress, step, values, speed.seconds_per_step)
            complaints = warn_once(run, step, renderer.warning(step), complaints)
        progress.advance()
        if every(step, args.i_img):
            with clock:
                score = validate(world, run, outputs, ema, step)
            if score > best["psnr"]:
                best = {"step": step, "psnr": score}
        due = args.ckpt_secs and time.monotonic() - saved_at >= args.ckpt_secs
        if every(step, args.i_weights) or due or best["step"] == step or last:
            with clock:
                save()
            saved_at = time.monotonic()
        with clock, run.guard("a rendering"):
            if every(step, args.i_video) or (last and args.i_video):
                render_camera_path(args, run, outputs, ema, step)
            if every(step, args.i_testset) or last:
                measure_test(args, run, outputs, ema, step)
        if last:
            break
    progress.close()
    return 0


if __name__ == "__main__":
    entry.exit_process(main())
