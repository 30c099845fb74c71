"""``--dry_run``: what a run will take, foretold from its first updates and a small rendering."""

import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from nerf.media import write_png
from nerf.metrics import ssim
from nerf.outputs.evaluation import Evaluation
from nerf.outputs.object import ObjectOutputs, write_preview
from nerf.outputs.scene import (
    target_mask,
    target_picture,
    validation_psnr,
    validation_strip,
    write_view,
)
from nerf.text3d.particles import members_of
from nerf.text3d.renderer import ObjectRenderer
from nerf.training import system
from nerf.training.plain_text import one_line
from nerf.training.progress import duration
from nerf.training.run_folder import RunFolder
from nerf.training.state import TrainState

TRIED_POINTS = 1 << 16  # of the mesh's sampling grid


class DryRun(RunFolder):
    """A run folder that is not made: what is logged goes to the terminal, the rest nowhere.

    Nor is anything read from ``folder``: the run is foretold from its start.
    """

    def __init__(self, folder: Path, *, is_main: bool) -> None:
        super().__init__(folder / "dry_run", is_main=False, lock=False)
        self._shows = is_main

    def log(self, message: str, level: str = "info") -> None:
        """Print one line, on rank 0."""
        if self._shows:
            self.show(one_line(message), level)


SCENE = ("validation", "test views", "video")
OBJECT = ("preview", "mesh", "turntable")


class Pictures(NamedTuple):
    """Seconds of a run's pictures, with the weights as they are at the start."""

    preview: float  # one of them, with the validation of a scene
    test: float  # all test views; for an object its mesh
    video: float


def occasions(total: int, interval: int, *, at_end: bool = False) -> int:
    """How often something happens in ``total`` updates, every ``interval`` ones; 0: only at_end."""
    often = total // interval if interval else 0
    return often + (at_end and not (interval and total % interval == 0))


def foretell(
    updates: float,
    pictures: Pictures,
    times: tuple[int, int, int],
    memory_mb: float,
    names: tuple[str, str, str],
) -> list[str]:
    """Lines about a run whose updates take ``updates`` seconds.

    times: how often each kind of ``pictures`` is made, called ``names``. memory_mb: the most it
    will need.
    """
    parts = [f"updates {duration(updates)}"]
    for name, number, seconds in zip(names, times, pictures, strict=True):
        if number and seconds:
            parts.append(f"{name} {f'{number} x ' if number > 1 else ''}{duration(seconds)}")
    total = updates + sum(n * seconds for n, seconds in zip(times, pictures, strict=True))
    return [
        f"dry run: the whole run will take about {duration(total)} ({', '.join(parts)}); rendering "
        "was timed with untrained weights and often becomes faster",
        f"dry run: and up to about {memory_mb / 1024:.1f} GB of memory; nothing was written",
    ]


def rehearse_scene(evaluation: Evaluation, step: int) -> Pictures:
    """Time the pictures of a scene: a validation is made, test and video follow from its pixels."""
    outputs, factor = evaluation.outputs, evaluation.settings.render_factor
    with evaluation.ema.swap():
        start = time.perf_counter()
        validation_psnr(outputs)
        validation_strip(outputs, step)
        validation = time.perf_counter() - start
    test = outputs.rendering_seconds(factor, video=False) or 0.0
    video = (outputs.rendering_seconds(factor, video=True) or 0.0) - test
    views = outputs.scene.splits.get("test") or []
    if views:
        test += _seconds_of_files(evaluation, views[0]) * len(views) / outputs.world.size
    return Pictures(validation, test, video)


def _seconds_of_files(evaluation: Evaluation, view: int) -> float:
    """Of the metrics and files of a test view, in a temporary folder, with the target itself."""
    scene, factor = evaluation.outputs.scene, evaluation.settings.render_factor
    start = time.perf_counter()
    target, mask = target_picture(scene, view, factor), target_mask(scene, view, factor)
    with tempfile.TemporaryDirectory() as folder:
        write_view(Path(folder), 0, target, target)
        write_png(Path(folder) / "depth.png", target)
        np.save(Path(folder) / "depth.npy", target[..., 0])
        if factor <= 1:
            ssim(target, target, mask)
    return time.perf_counter() - start


def rehearse_object(
    outputs: ObjectOutputs, size: int, video_frames: int, mesh_points: int
) -> Pictures:
    """Time the pictures of an object: a preview of ``size`` is made, the rest follows from it.

    mesh_points: points of the mesh's sampling grid; 0: there is no mesh.
    """
    start, views = time.perf_counter(), 4
    write_preview(outputs, 0, views, size)
    preview = time.perf_counter() - start
    pixels = 0 if outputs.flat else video_frames * outputs.size**2
    turntable = preview / (views * size**2) * pixels / outputs.world.size
    mesh, device = 0.0, outputs.world.device
    for _, renderer in members_of(outputs.renderer):
        if mesh_points and isinstance(renderer, ObjectRenderer):
            start = time.perf_counter()
            with torch.no_grad():
                renderer.density(torch.zeros(TRIED_POINTS, 3, device=device))
            mesh += (time.perf_counter() - start) / TRIED_POINTS * mesh_points
    return Pictures(preview, mesh, turntable)


def memory_of_run(state: TrainState[Any], device: torch.device) -> float:
    """Peak memory in MiB that a whole run will have; call it after a rehearsal."""
    if device.type == "cuda":
        return system.peak_memory_mb(device)
    with suppress(ImportError):  # every run opens it with its first metrics
        import torch.utils.tensorboard  # noqa: F401
    # A checkpoint is read back after it was written: weights, Adam's moments, averaged weights.
    tensors = list(state.renderer.state_dict().values()) * (2 if state.ema.enabled else 1)
    for entry in state.optimizer.state.values():
        tensors += [value for value in entry.values() if torch.is_tensor(value)]
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    return system.peak_memory_mb(device) + size / 2**20
