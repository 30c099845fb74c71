"""Outputs of a run on posed pictures: validation, test metrics, videos, exports.

Everything is rendered with the averaged weights if EMA is on, else with the trained ones;
metrics.json records which.
"""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from nerf.metrics import load_lpips
from nerf.outputs import export
from nerf.outputs.camera_path import read_path
from nerf.outputs.report import try_report
from nerf.outputs.scene import (
    SceneOutputs,
    measure_views,
    render_free_view,
    render_path,
    validation_psnr,
    validation_strip,
)
from nerf.training.ema import EMA
from nerf.training.run_folder import RunFolder
from nerf.training.system import release_memory

METRICS = {"ssim": "SSIM", "lpips": "LPIPS", "depth_error": "depth error"}  # beside PSNR


class EvaluationSettings(NamedTuple):
    """The flags that evaluation needs, as plain values."""

    render_factor: int  # pictures are rendered this many times smaller; 0 or 1: full size
    metres_per_unit: float  # length of a scene unit, for depth files; 0: unknown
    true_depth: Path  # folder of true depth, VIEW.npy; may be missing
    camera_path: Path | None  # key frames to render instead of the scene's own path
    flags: dict[str, Any]  # of the run, for metrics.json


class Evaluation:
    """Renders, measures and exports the scene of one run into its folder."""

    def __init__(
        self,
        outputs: SceneOutputs,
        run: RunFolder,
        renderer: export.FieldRenderer,
        ema: EMA,
        settings: EvaluationSettings,
    ) -> None:
        self.outputs, self.run, self.settings = outputs, run, settings
        self.renderer, self.ema = renderer, ema

    def validate(self, step: int) -> float:
        """The validation PSNR over a fixed set of pixels, logged with the picture of one view."""
        with self.ema.swap():
            psnr = validation_psnr(self.outputs)
            if self.run.is_main:
                self.run.validation(step, psnr, validation_strip(self.outputs, step))
        self.run.log(f"step {step}: validation PSNR {psnr:.2f}")
        release_memory()
        return psnr

    def measure_test(self, step: int) -> None:
        """Render and measure the test views; write metrics.json to their folder and the run's."""
        outputs, run, settings = self.outputs, self.run, self.settings
        if not outputs.scene.splits.get("test"):
            run.log("there are no test views: no metrics.json")
            return
        name = f"render_test_{step:06d}"
        lpips, missing = load_lpips(outputs.world.device)
        with self.ema.swap():
            metrics = measure_views(
                outputs,
                "test",
                run.folder / name,
                settings.render_factor,
                lpips=lpips,
                true_depth=settings.true_depth,
                metres_per_unit=settings.metres_per_unit,
            )
        release_memory()
        metrics.update(step=step, weights=self.ema.kind, args=settings.flags)
        run.write_json(f"{name}/metrics.json", metrics)
        run.write_json("metrics.json", metrics)
        others = [
            f", {label} {metrics[key]:.4f}" for key, label in METRICS.items() if metrics.get(key)
        ]
        run.log(
            f"test: PSNR {metrics['psnr']:.2f} dB{''.join(others)} over {metrics['num_views']} "
            f"views, {metrics['seconds_per_view']:.2f} s each -> {run.folder / name}/, metrics.json"
            + (f"; no LPIPS ({missing})" if missing else "")
        )
        if run.is_main:
            try_report(run.folder, run.log)

    def render_camera_path(self, step: int) -> None:
        """Render the camera path and its videos into render_path_STEP/."""
        settings, folder = self.settings, self.run.folder / f"render_path_{step:06d}"
        key_path = read_path(settings.camera_path) if settings.camera_path else None
        with self.ema.swap():
            videos = render_path(
                self.outputs,
                folder,
                settings.render_factor,
                self.run.log,
                settings.metres_per_unit,
                key_path=key_path,
            )
        self.run.log("video: " + (", ".join(map(str, videos)) or f"frames only, in {folder}/"))
        release_memory()

    def free_view(self, *view: Any) -> np.ndarray:
        """The picture of a free camera, for the live viewer: see ``scene.render_free_view``."""
        with self.ema.swap():
            return render_free_view(self.outputs, *view)

    def export_mesh(self, path: Path, bound: float, *, resolution: int, level: float) -> None:
        """Write the scene's mesh, on the first rank; see ``nerf.outputs.export``."""
        if self.run.is_main:
            with self.ema.swap():
                trained = self._trained_scene(bound)
                export.export_mesh(trained, path, resolution=resolution, level=level)

    def export_points(self, path: Path, bound: float, num_points: int) -> None:
        """Write the scene's point cloud, on the first rank; see ``nerf.outputs.export``."""
        if self.run.is_main:
            with self.ema.swap():
                export.export_points(self._trained_scene(bound), path, num_points)

    def _trained_scene(self, bound: float) -> export.TrainedScene:
        outputs = self.outputs
        return export.TrainedScene(
            self.renderer, outputs.scene, outputs.render, outputs.block, bound, self.run.log
        )
