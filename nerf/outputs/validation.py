"""Scores by which a run's best checkpoint is chosen, and ``--validate`` of a finished run.

During training a validation measures fixed pixels of the validation views, or of the training views
where a scene has no others, so that its scores can be compared from step to step.
"""

import math
from pathlib import Path

import torch

from nerf.metrics import load_lpips, ssim
from nerf.outputs.evaluation import METRICS, Evaluation
from nerf.outputs.scene import SceneOutputs, measure_views
from nerf.training.system import release_memory

NUM_PATCHES, PATCH_SIDE = 16, 32  # of a validation SSIM: four times the pixels of its PSNR


def score(evaluation: Evaluation, step: int, monitor: str) -> tuple[float, str]:
    """Validate, log PSNR and a picture; return the score of ``monitor`` and the split measured.

    monitor: "psnr" or "ssim", which is NaN where pictures are smaller than its window.
    """
    psnr = evaluation.validate(step)
    split = "val" if evaluation.outputs.scene.splits.get("val") else "train"
    if monitor == "psnr":
        return psnr, split
    with evaluation.ema.swap():
        value = patch_ssim(evaluation.outputs, split)
    evaluation.run.log(f"step {step}: validation SSIM {value:.4f}")
    release_memory()
    return value, split


def patch_ssim(outputs: SceneOutputs, split: str) -> float:
    """Mean SSIM of fixed patches of the views of ``split``, on every rank; NaN if there is none.

    Views are taken evenly, places at random, both the same at every step.
    """
    scene, world = outputs.scene, outputs.world
    views, generator = scene.splits[split], torch.Generator().manual_seed(0)
    places = torch.rand(NUM_PATCHES, 2, generator=generator).tolist()
    own: list[float] = []
    for number in range(world.rank, NUM_PATCHES, world.size):
        view = views[number * len(views) // NUM_PATCHES]
        height, width = scene.view_size(view)
        side = min(PATCH_SIDE, height, width)
        top, left = (
            int(place * (size - side + 1))
            for place, size in zip(places[number], (height, width), strict=True)
        )
        value = _ssim_of_patch(outputs, view, top, left, side)
        own += [] if value is None else [value]
    found = [value for values in world.gather(own) for value in values]
    return sum(found) / len(found) if found else math.nan


def _ssim_of_patch(
    outputs: SceneOutputs, view: int, top: int, left: int, side: int
) -> float | None:
    """SSIM of side x side pixels of a view, None if it cannot be measured."""
    scene, device = outputs.scene, outputs.world.device
    pixels = torch.arange(side * side, device=device)
    rays, target = scene.pick(
        torch.full_like(pixels, view), left + pixels % side, top + pixels // side
    )

    def render(block: int) -> torch.Tensor:
        starts = range(0, len(pixels), block)
        parts = [outputs.render(rays.part(slice(start, start + block))).rgb for start in starts]
        return torch.cat(parts)

    with torch.no_grad():
        rendered = outputs.halve_block_until_it_fits(render).clamp(0, 1)
    mask = scene.mask(view)
    inside = None if mask is None else mask[top : top + side, left : left + side].numpy()
    picture, truth = (each.float().cpu().view(side, side, 3).numpy() for each in (rendered, target))
    return ssim(picture, truth, inside)


def measure_validation(evaluation: Evaluation, step: int, checkpoint: Path, datadir: str) -> None:
    """``--validate``: measure all validation views, into render_val_STEP/ with a metrics.json.

    The run's metrics.json and report stay those of its test views. ValueError if the scene has no
    validation views.
    """
    outputs, run, settings = evaluation.outputs, evaluation.run, evaluation.settings
    if not outputs.scene.splits.get("val"):
        raise ValueError(
            f"--validate: {datadir} has no validation views; --render_only --render_test measures "
            "the test views"
        )
    folder = run.folder / f"render_val_{step:06d}{settings.variant}"
    lpips, missing = load_lpips(outputs.world.device)
    with evaluation.ema.swap():
        metrics = measure_views(
            outputs,
            "val",
            folder,
            lpips=lpips,
            true_depth=settings.true_depth,
            metres_per_unit=settings.metres_per_unit,
        )
    release_memory()
    metrics.update(step=step, weights=evaluation.ema.kind, checkpoint=str(checkpoint))
    metrics.update(args=settings.flags)
    run.write_json(f"{folder.name}/metrics.json", metrics)
    others = [f", {label} {metrics[key]:.4f}" for key, label in METRICS.items() if metrics.get(key)]
    run.log(
        f"validation: PSNR {metrics['psnr']:.2f} dB{''.join(others)} over {metrics['num_views']} "
        f"views -> {folder}/metrics.json"
    )
    if missing:
        run.log_once(step, f"LPIPS is not measured: {missing}")
