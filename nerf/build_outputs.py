"""What renders, measures and foretells a run, made from its flags."""

import argparse
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from nerf import build_optimizer, build_run, build_schedules
from nerf.build import SceneRenderer
from nerf.datasets.scene import Scene
from nerf.outputs import forecast, validation
from nerf.outputs.evaluation import Evaluation, EvaluationSettings
from nerf.outputs.object import ObjectOutputs, has_turntable, write_preview, write_turntable
from nerf.outputs.scene import SceneOutputs
from nerf.rays import Rays
from nerf.renderer import Rendered
from nerf.training import system
from nerf.training.distributed import World
from nerf.training.ema import EMA
from nerf.training.progress import Progress
from nerf.training.run_folder import RunFolder
from nerf.training.state import TrainState

SLOW = "; --fast or a config whose name ends in _fast takes minutes (docs/fast_path.md)"

Log = Callable[[str], None]


def every(step: int, interval: int) -> bool:
    """Whether something done each ``interval`` steps (0: never) is due at ``step``."""
    return interval > 0 and step % interval == 0


def scene_evaluation(
    args: argparse.Namespace,
    world: World,
    run: RunFolder,
    scene: Scene,
    state: TrainState[SceneRenderer],
    stop: system.StopSignal | None = None,
) -> Evaluation:
    """What renders, measures and exports the scene of this run."""
    renderer, saved = state.renderer, state.attempt.saved

    def render(rays: Rays) -> Rendered:
        with system.autocast(world.device, args.amp):
            return renderer.render(rays)

    run.write_json("world.json", scene.world_record())
    block = build_run.render_block(args, renderer, world)
    outputs = SceneOutputs(render, scene, block, world, stop, run.log)
    settings = EvaluationSettings(
        args.render_factor,
        args.metres_per_unit,
        true_depth=Path(args.datadir) / "depth",
        camera_path=Path(args.camera_path) if args.camera_path else None,
        variant=build_run.output_variant(args, scene, saved, run.folder),
        flags=vars(args),
        file_world=args.export_world == "files",
    )
    return Evaluation(outputs, run, renderer, state.ema, settings)


def object_outputs(
    args: argparse.Namespace,
    world: World,
    run: RunFolder,
    renderer: nn.Module,
    ema: EMA,
    view_word: Callable[[float, float], str],
    stop: system.StopSignal | None = None,
) -> ObjectOutputs:
    """Where previews, turntables and meshes of this run come from.

    view_word: of azimuth and elevation in degrees, written over previews.
    """
    radius = sum(build_schedules.pair_at(args.radius_range, args.N_iters)) / 2
    fov = sum(build_schedules.pair_at(args.fov_range, args.N_iters)) / 2
    return ObjectOutputs(
        run, world, renderer, ema, args.amp, args.eval_res, args.eval_background,
        elevation_deg=args.eval_elevation, radius=radius, fov_deg=fov, bound=args.bound,
        flat=args.space == "2d", stop=stop, save_raw=args.save_raw, view_word=view_word,
    )  # fmt: skip


def preview_size(args: argparse.Namespace, step: int) -> int:
    """Pixels per side of a view in a preview."""
    return int(min(args.eval_res, 2 * build_schedules.scheduled_flags(args, step)["train_res"]))


def preview(args: argparse.Namespace, outputs: ObjectOutputs, step: int) -> float:
    """Write four sides of every object, or all images that are optimized (``--space 2d``).

    Returns how many seconds the turntable will take at the same speed.
    """
    size, start, num_views = preview_size(args, step), time.perf_counter(), 4
    write_preview(outputs, step, num_views, size)
    seconds_per_pixel = (time.perf_counter() - start) / (num_views * size**2)
    pixels = 0 if outputs.flat else args.video_frames * args.eval_res**2
    return seconds_per_pixel * pixels / outputs.world.size


# --------------------------------------------- what an earlier start was stopped before making


def make_up(
    args: argparse.Namespace,
    state: TrainState[Any],
    evaluation: Evaluation,
    save: Callable[[], object],
) -> None:
    """Make the validation, test and video that belong to the step of the resumed checkpoint.

    A kill or a signal during them came after the step was saved. save: writes the checkpoint again,
    if the validation makes it one of the best.
    """
    step, folder = state.step, evaluation.run.folder
    if args.dry_run or not _is_own(state, folder):
        return
    with state.clock.paused():
        if every(step, args.i_img) and evaluation.owes_validation(step):
            state.record_score(*validation.score(evaluation, step, args.monitor))
            if step in state.ranking.steps:
                # Restored with those of the flags; the file holds those of its last update.
                build_optimizer.set_learning_rates(state.optimizer, step - 1, args)
                save()
        if step < args.N_iters:  # else ``Evaluation.finish`` makes them
            with evaluation.run.guard("a rendering"):
                test, video = every(step, args.i_testset), every(step, args.i_video)
                evaluation.make_up(step, test=test, video=video)


def make_up_turntable(
    args: argparse.Namespace, state: TrainState[Any], outputs: ObjectOutputs
) -> None:
    """Make the turntable that belongs to the step of the resumed checkpoint, as ``make_up``."""
    step = state.step
    if args.dry_run or not _is_own(state, outputs.run.folder) or step >= args.N_iters:
        return
    if every(step, args.i_video) and not has_turntable(outputs, step):
        with state.clock.paused(), outputs.run.guard("turntable"):
            write_turntable(outputs, step, args.video_frames)


def _is_own(state: TrainState[Any], folder: Path) -> bool:
    """Whether the run goes on from a checkpoint of its own, not of --ft_path."""
    saved = state.attempt.saved
    return saved is not None and saved[0].resolve().parent == folder.resolve()


# ------------------------------------------------------------------------------------ estimates


def faster_way(args: argparse.Namespace) -> str:
    """What the estimate of hours adds: the fast config of the same scene, if there is one."""
    fast = Path(f"{(args.config or '').removesuffix('.txt')}_fast.txt")
    slow = f"; {fast} takes minutes (docs/fast_path.md)" if fast.is_file() else SLOW
    return "" if args.occ_grid else slow


def foretell_scene(
    args: argparse.Namespace,
    log: Log,
    state: TrainState[Any],
    progress: Progress,
    evaluation: Evaluation,
) -> int:
    """``--dry_run``: log what time and memory the whole run will take. Returns the exit code."""
    updates = state.clock.seconds + progress.seconds_left()
    times = (
        forecast.occasions(args.N_iters, args.i_img),
        forecast.occasions(args.N_iters, args.i_testset, at_end=True),
        forecast.occasions(args.N_iters, args.i_video, at_end=args.i_video > 0),
    )
    pictures = forecast.rehearse_scene(evaluation, state.step)
    world = evaluation.outputs.world
    return _foretell(args, log, state, world, (updates, pictures, times, forecast.SCENE))


def foretell_object(
    args: argparse.Namespace,
    log: Log,
    state: TrainState[Any],
    progress: Progress,
    outputs: ObjectOutputs,
) -> int:
    """``foretell_scene`` of a text-to-3D run."""
    updates = state.clock.seconds + progress.seconds_left()
    times = (
        forecast.occasions(args.N_iters, args.i_img, at_end=True),
        int(args.mesh and not outputs.flat),
        forecast.occasions(args.N_iters, args.i_video, at_end=True) * (not outputs.flat),
    )
    size = preview_size(args, args.N_iters)
    pictures = forecast.rehearse_object(outputs, size, args.video_frames, args.mesh_res**3)
    return _foretell(args, log, state, outputs.world, (updates, pictures, times, forecast.OBJECT))


def _foretell(
    args: argparse.Namespace,
    log: Log,
    state: TrainState[Any],
    world: World,
    run: tuple[float, forecast.Pictures, tuple[int, int, int], tuple[str, str, str]],
) -> int:
    """Log the forecast of ``run``: seconds of updates, pictures, how many of each, their names."""
    updates, pictures, times, names = run
    memory = forecast.memory_of_run(state, world.device)  # after the rehearsal
    updates = min(updates, args.max_minutes * 60 or math.inf)
    for line in forecast.foretell(updates, pictures, times, memory, names):
        log(line)
    return 0
