"""Outputs of a run on posed pictures: validation, test metrics, videos, exports.

Everything is rendered with the averaged weights if EMA is on, else with the trained ones;
metrics.json records which.
"""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from nerf.media import forget_videos, has_video
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
from nerf.training.plain_text import one_line
from nerf.training.run_folder import RunFolder
from nerf.training.system import release_memory

METRICS = {"ssim": "SSIM", "lpips": "LPIPS", "depth_error": "depth error"}  # beside PSNR
NO_TEST_VIEWS = "this scene has no test views, so metrics.json is not written"


def report_is_old(folder: Path) -> bool:
    """Whether a run's report is missing, or older than its metrics or one of its videos."""
    report = folder / "report.html"
    shown = [folder / "metrics.json", *folder.glob("render_path_*/*.mp4")]
    times = [path.stat().st_mtime_ns for path in shown if path.exists()]
    return not report.exists() or report.stat().st_mtime_ns < max(times, default=0)


class EvaluationSettings(NamedTuple):
    """The flags that evaluation needs, as plain values."""

    render_factor: int  # pictures are rendered this many times smaller; 0 or 1: full size
    metres_per_unit: float  # length of a unit of the data's files, for depth files; 0: unknown
    true_depth: Path  # folder of true depth, VIEW.npy; may be missing
    camera_path: Path | None  # key frames to render instead of the scene's own path
    variant: str  # ending of folders that do not hold the run's own full test and path; "": they do
    flags: dict[str, Any]  # of the run, for metrics.json
    file_world: bool = True  # exports are in the world of the data's files, not in the scene's


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
            with self.outputs.world.raise_on_all_ranks():
                if self.run.is_main:
                    self.run.validation(step, psnr, validation_strip(self.outputs, step))
        self.run.log(f"step {step}: validation PSNR {psnr:.2f}")
        release_memory()
        return psnr

    def measure_test(self, step: int) -> None:
        """Render and measure the test views into render_test_STEP/, with a metrics.json.

        The run's own metrics.json and report are made of its full test only, never of fewer views
        or smaller pictures (``EvaluationSettings.variant``). The folder's metrics.json is written
        last: without it the test is owed.
        """
        outputs, run, settings = self.outputs, self.run, self.settings
        if not outputs.scene.splits.get("test"):
            run.log(NO_TEST_VIEWS)
            return
        folder = self._test_folder(step)
        if run.is_main:
            (folder / "metrics.json").unlink(missing_ok=True)
        lpips, missing = load_lpips(outputs.world.device)
        with self.ema.swap():
            metrics = measure_views(
                outputs,
                "test",
                folder,
                settings.render_factor,
                lpips=lpips,
                true_depth=settings.true_depth,
                metres_per_unit=settings.metres_per_unit,
            )
        release_memory()
        metrics.update(step=step, weights=self.ema.kind, args=settings.flags)
        self._publish(step, folder, metrics)
        if missing and metrics.get("psnr") is not None:
            run.log_once(step, f"LPIPS is not measured: {missing}")
        run.write_json(f"{folder.name}/metrics.json", metrics)

    def _publish(self, step: int, folder: Path, metrics: dict[str, Any]) -> None:
        """Log the measurements; of the run's own test write metrics.json, test.csv and report."""
        run, settings = self.run, self.settings
        if metrics.get("psnr") is None:
            run.log(
                f"test: {metrics['num_views']} views at 1 / {settings.render_factor} of their size "
                f"-> {folder}/; PSNR is not computed: these pictures are rendered smaller, without "
                "averaging"
            )
            return
        others = [
            f", {label} {metrics[key]:.4f}" for key, label in METRICS.items() if metrics.get(key)
        ]
        run.log(
            f"test: PSNR {metrics['psnr']:.2f} dB{''.join(others)} over {metrics['num_views']} "
            f"views, {metrics['seconds_per_view']:.2f} s each -> {folder}/"
        )
        if settings.variant:
            run.log(
                "metrics.json and report.html are unchanged: they describe the run's own full test"
            )
            return
        run.write_json("metrics.json", metrics)
        run.test_scores(step, metrics)
        if run.is_main:
            try_report(run.folder, run.log)

    def render_camera_path(self, step: int) -> None:
        """Render the camera path and its videos into render_path_STEP/.

        Key frames of the user's own go to render_path_STEP_NAME/, beside the scene's path.
        """
        settings, folder = self.settings, self._path_folder(step)
        if self.run.is_main:
            forget_videos(folder)
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

    def finish(self, step: int, *, video: bool) -> None:
        """Make what a run of ``step`` updates ends with, as far as it is not there yet.

        That is the test, then the video, if wanted. A run that was stopped while it made them
        makes up for them when it is started again.
        """
        owed = self.make_up(step, test=True, video=video)
        if not self.outputs.scene.splits.get("test"):
            self.run.log(NO_TEST_VIEWS)
            if self.run.is_main:
                try_report(self.run.folder, self.run.log)
        elif not any(owed):
            if self.run.is_main and not self.settings.variant and report_is_old(self.run.folder):
                try_report(self.run.folder, self.run.log)
            self.run.log(f"nothing is left to do: open {self.run.folder}/report.html")
            return
        if owed[1] and self.run.is_main and not self.settings.variant:
            try_report(self.run.folder, self.run.log)  # again, with the video in it
        if not self.run.has_checkpoint():  # the disk is full
            return
        self.run.log(
            f"next: open {self.run.folder}/report.html; add --export out.glb to the command to "
            "write a mesh, or --render_only --viewer to see the scene in a browser"
        )

    def make_up(self, step: int, *, test: bool, video: bool) -> tuple[bool, bool]:
        """Make the test and the video of ``step``, where wanted and not there; which were made."""
        world, tested, filmed = self.outputs.world, self._test_folder(step), self._path_folder(step)
        owed = (
            test
            and bool(self.outputs.scene.splits.get("test"))
            and not (tested / "metrics.json").exists(),
            video and not has_video(filmed, "depth"),
        )
        owed = world.gather(owed)[0]  # all ranks see the same folder, or do as rank 0 does
        if owed[0]:
            self.measure_test(step)
        if owed[1]:
            self.render_camera_path(step)
        return owed

    def owes_validation(self, step: int) -> bool:
        """Whether val.csv has no row of ``step``; the same answer on all ranks."""
        table = self.run.folder / "val.csv"
        owed = False
        if self.run.is_main:
            text = table.read_text(encoding="utf-8", errors="replace") if table.is_file() else ""
            owed = str(step) not in [line.split(",")[0] for line in text.splitlines()]
        return bool(self.outputs.world.gather(owed)[0])

    def _test_folder(self, step: int) -> Path:
        return self.run.folder / f"render_test_{step:06d}{self.settings.variant}"

    def _path_folder(self, step: int) -> Path:
        path, variant = self.settings.camera_path, self.settings.variant
        name = f"_{one_line(path.stem)}" if path else ""
        return self.run.folder / f"render_path_{step:06d}{variant}{name}"

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
            self.renderer, outputs.scene, outputs.render, outputs.block, bound, self.run.log,
            self.settings.file_world,
        )  # fmt: skip
