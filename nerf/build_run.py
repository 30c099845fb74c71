"""What a run needs besides its renderer and data, from flags and the device.

Blocks of rays, CUDA graphs, the probe of a dead start, and where pictures go that are not the run's
own evaluation.
"""

import argparse
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nerf import build
from nerf.build import SceneRenderer
from nerf.build_shapes import debug_shapes
from nerf.datasets.identity import own_test_views, same_test_views, scene_identity
from nerf.datasets.scene import Scene
from nerf.flags.checkpoints import reading_flags
from nerf.occupancy_renderer import MOST_RAYS
from nerf.outputs.render import block_size
from nerf.renderer import NeRFRenderer
from nerf.training import system, weights
from nerf.training.checkpoint import SavedState, finished_updates, list_checkpoints
from nerf.training.checkpoint_choice import Ranking
from nerf.training.dead_start import MOST_DRAWS, Probe, redraw_until_alive
from nerf.training.deterministic import deterministic
from nerf.training.distributed import World
from nerf.training.ema import EMA
from nerf.training.graph import FunctionGraphs, StepGraphs
from nerf.training.recovery import MicroBatches
from nerf.training.run_folder import RunFolder
from nerf.training.schedules import highest
from nerf.training.state import TrainState

Log = Callable[[str], None]


def saving(args: argparse.Namespace) -> dict[str, Any]:
    """What ``TrainState`` saves and keeps, as its keyword arguments."""
    monitor = None if args.monitor == "none" else args.monitor
    ranking = Ranking(monitor, args.save_top_k)
    return {"ranking": ranking, "weights_only": args.save_weights_only}


def export_weights(
    args: argparse.Namespace,
    renderer: nn.Module,
    ema: EMA,
    content: Mapping[str, Any],
    run: RunFolder,
) -> None:
    """``--export_weights``, on the first rank.

    content: of the checkpoint that the renderer was restored from.
    """
    if run.is_main:
        flags, step = content.get("args") or vars(args), finished_updates(dict(content))
        weights.export_weights(Path(args.export_weights), renderer, ema, step, flags, run.log)


def record_logged(
    args: argparse.Namespace, state: TrainState[Any], values: Mapping[str, float]
) -> None:
    """Score this step by the column that ``--monitor NAME:min`` or ``NAME:max`` names.

    ValueError if metrics.csv has no such column.
    """
    name = args.monitor.partition(":")[0]
    if name == "none":
        return
    if name not in values:
        raise ValueError(
            f"--monitor {args.monitor}: metrics.csv has no column {name}; it has "
            f"{', '.join(values)}"
        )
    state.record_score(values[name])


def render_block(args: argparse.Namespace, renderer: SceneRenderer, world: World) -> int:
    """Rays rendered together."""
    if args.occ_grid:  # few samples a ray: larger blocks still fit into the cache
        return min(args.chunk, 8192 if world.device.type == "cpu" else 1 << 17)
    assert isinstance(renderer, NeRFRenderer)
    width = max(args.netwidth, args.netwidth_fine if renderer.fine is not None else 0)
    return block_size(renderer.samples_per_ray, width, args.chunk, args.netchunk, world.device)


def training_block(args: argparse.Namespace, world: World, rendered: int) -> int:
    """Rays in a micro-batch: on a GPU the whole batch; on a CPU as many as are ``rendered``."""
    if args.occ_grid:
        return MOST_RAYS
    return args.N_rand if world.device.type == "cuda" else rendered


def compile_if_set(
    args: argparse.Namespace, world: World, log: Log, scene: Scene, renderer: SceneRenderer
) -> None:
    """``--compile``, tried on a few rays."""
    if args.compile:
        few = torch.zeros(3, 64, dtype=torch.long, device=world.device)
        build.compile_renderer(renderer, scene.pick(*few)[0], log)


def loss_terms(args: argparse.Namespace) -> tuple[str, ...]:
    """The terms of run_nerf.py's loss that these flags may switch on, for the log."""
    colors = ("coarse", "fine") if args.N_importance and not args.occ_grid else ("color",)
    names = ("l1", "tv") if args.occ_grid else ()
    return colors + tuple(name for name in names if highest(getattr(args, f"lambda_{name}")))


@contextmanager
def careful(args: argparse.Namespace, log: Log, distillation: Any = None) -> Iterator[None]:
    """``--deterministic`` and ``--debug_shapes``, inside the block. distillation: guidance.sds."""
    with deterministic(args.deterministic, log):
        with debug_shapes(args.debug_shapes, log, distillation):
            yield


def view_batches(args: argparse.Namespace, world: World, log: Log, advice: str) -> MicroBatches:
    """The micro-batches of a step's views, of ``--views_at_once``.

    advice: what to do where memory runs out with a single view.
    """
    own = args.batch_views // world.size
    size = min(args.views_at_once or own, own)
    return MicroBatches(size, world, log, "views", advice)


def make_graphs(
    args: argparse.Namespace, world: World, log: Log, renderer: SceneRenderer
) -> StepGraphs:
    """CUDA graphs of a step's forward and backward: on one GPU, unless ``--cuda_graph off``."""
    enabled = args.cuda_graph == "auto" and world.device.type == "cuda" and world.size == 1
    static = build.has_static_shapes(args, world.device)
    return StepGraphs(renderer, log, enabled=enabled and static)


def guidance_graphs(
    args: argparse.Namespace, world: World, log: Log
) -> tuple[StepGraphs, FunctionGraphs]:
    """CUDA graphs of the frozen U-Net and of the encoder, unless ``--cuda_graph off``.

    Only where their weights stay in place; VSD's LoRA changes what the U-Net computes.
    """
    enabled = args.cuda_graph == "auto" and world.device.type == "cuda" and args.offload == "none"
    unet = StepGraphs(torch.nn.Module(), log, enabled=enabled and args.guidance != "vsd")
    return unet, FunctionGraphs(log, enabled=enabled and not args.vae_checkpointing)


def make_probe(
    args: argparse.Namespace,
    world: World,
    scene: Scene,
    renderer: SceneRenderer,
    seed: int,
    block: int,
) -> tuple[Probe, Callable[[int], int]]:
    """The rays by which a dead start is noticed, and the most of them in one call.

    The second is a function of the number of rays of a step: of the fast path a call has a fixed
    room for samples, which the rays of a step fill, and more if all of them see the object.
    """

    def context() -> ExitStack:
        stack = ExitStack()
        stack.enter_context(system.autocast(world.device, args.amp))
        stack.enter_context(torch.set_grad_enabled(args.occ_grid))  # shapes as in training
        if args.compile:  # for a few rays now and then nothing is compiled
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        return stack

    probe = Probe.draw(scene.sample_rays, renderer, seed, scene.c2w.device, context)
    return probe, lambda rays: max(1, rays // world.size // 2) if args.occ_grid else block


def start_alive(state: TrainState[Any], probe: Probe, block: int, log: Log) -> None:
    """``--alive_start``: draw the weights of a new vanilla network again until it has density."""
    if state.step > 0 or state.attempt.saved or not isinstance(state.renderer, NeRFRenderer):
        return
    draws = redraw_until_alive(state.renderer, probe, block, state.attempt.weights_seed)
    state.ema.reset()
    if draws == MOST_DRAWS:
        log(f"--alive_start: {draws} random initializations in a row had too little density")
    elif draws:
        times = "once" if draws == 1 else f"{draws} times"
        log(f"--alive_start: the weights were drawn again {times}, until the network had density")


# Flags that decide which pictures a run renders and measures, and at which size; and those that
# decide what a finished run's pictures look like.
PICTURE_FLAGS = ("testskip", "llffhold", "factor", "downscale", "half_res")
RENDER_FLAGS = (
    "near",
    "far",
    "scene_bound",
    "N_samples",
    "march_steps",
    "cone_angle",
    "early_stop",
)


def scene_record(
    args: argparse.Namespace, scene: Scene, saved: Mapping[str, Any]
) -> dict[str, Any]:
    """The scene in a checkpoint: its fingerprint, and the test views of the run's first start.

    saved: the checkpoint that the run goes on from, {} for a new one.
    """
    flags = {name: getattr(args, name) for name in PICTURE_FLAGS}
    test = (saved.get("scene") or {}).get("test") or own_test_views(scene, flags)
    return {**scene_identity(scene), "test": test}


def output_variant(
    args: argparse.Namespace, scene: Scene, saved: SavedState | None, folder: Path
) -> str:
    """How the folders of rendered pictures end: "" for the run's own full test and path.

    Other views, another size or other rendering than the run was trained for get folders of their
    own, as does a checkpoint from elsewhere, so that they never replace its evaluation. saved: the
    checkpoint that is read or resumed; folder: the run's.
    """
    path, content = saved or (None, {})
    test, flags = (content.get("scene") or {}).get("test"), content.get("args") or {}
    names = _changed(args, test["flags"] if test else flags, PICTURE_FLAGS)
    if reading_flags(args):  # training makes them its own
        names += _changed(args, flags, RENDER_FLAGS)
    endings = [f"_{name}{float(getattr(args, name)):g}" for name in names]
    if test and not endings and not same_test_views(test, scene):
        endings.append(f"_{len(scene.splits.get('test') or [])}views")
    if path is not None and is_from_elsewhere(path, folder):
        endings.append(f"_{path.resolve().parent.name}_{path.stem}")
    if args.ckpt != "newest" and path not in list_checkpoints(folder)[:1]:
        endings.append("_ckpt")  # metrics.json is that of the newest
    return "".join(endings) + (f"_f{args.render_factor}" if args.render_factor > 1 else "")


def is_from_elsewhere(path: Path, folder: Path) -> bool:
    """Whether a checkpoint is not one of the run folder's, which has checkpoints of its own."""
    return path.resolve().parent != folder.resolve() and any(folder.glob("[0-9]*.tar"))


TURNTABLE_FLAGS = ("video_frames", "eval_res", "eval_elevation", "eval_background")


def turntable_variant(args: argparse.Namespace, saved: SavedState, folder: Path) -> str:
    """How the folder of a turntable ends that is not the one with which the run ended; else ""."""
    path, content = saved
    names = _changed(args, content.get("args") or {}, TURNTABLE_FLAGS)
    endings = [f"{name}_{getattr(args, name)}" for name in names]
    if is_from_elsewhere(path, folder):
        endings.append(f"{path.resolve().parent.name}_{path.stem}")
    return "_".join(endings)


def _changed(
    args: argparse.Namespace, saved: Mapping[str, Any], names: tuple[str, ...]
) -> list[str]:
    return [n for n in names if saved.get(n, getattr(args, n)) != getattr(args, n)]
