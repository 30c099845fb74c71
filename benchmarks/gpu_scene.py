"""Stages of ``gpu.py`` on posed pictures: NeRF's own algorithm, and the fast path on Lego."""

import json
import os
import statistics
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

import run_nerf
from benchmarks.gpu_child import ROOT, Report, Skip
from benchmarks.gpu_measure import (
    BlockTimer,
    after_updates,
    drive,
    spread,
    start_memory,
    timed_frames,
    train_blocks,
)
from nerf.flags import nerf as nerf_flags
from nerf.outputs.evaluation import Evaluation
from nerf.training.system import peak_memory_mb

LEVELS = (32.54, 33.69, 35.65, 36.5)  # dB: NeRF, nerfacc's MLP, Instant-NGP, TensoRF on Lego
ROUNDS, ROUND_BLOCKS = 2, 3  # in turn with nerf-pytorch
PRECISIONS = {"fp32": ("off", "off"), "TF32": ("off", "on"), "bf16": ("bf16", "on")}  # amp, tf32
QUIET = "--i_img 0 --i_video 0 --i_weights 0 --ckpt_secs 0 --dead_restarts 0".split()


def knows(flag: str) -> bool:
    """Whether run_nerf.py has this flag."""
    return flag in nerf_flags.nerf_parser()._option_string_actions


def demo_scene(settings: dict[str, Any]) -> Path:
    """The demo scene at 400x400; made once for all stages."""
    sys.path.append(str(ROOT / "data"))
    import make_demo  # in data/, which is no package

    size, counts = (400, {"train": 3, "val": 1, "test": 4})  # a frame to warm up, three to time
    if settings["quick"]:
        size, counts = (20, {"train": 4, "val": 1, "test": 4})
    folder = Path(settings["work"]) / "demo"
    if not folder.exists():
        make_demo.make(folder, "blender", size, counts)
    return folder


def with_webp_names(lego: Path, work: Path) -> Path:
    """A Blender scene whose pictures were made WebP, under names that the loader finds.

    Its transforms name pictures without an ending, and the loader then tries PNG and JPEG. Returns
    a folder in ``work`` of links and of transforms with the ending; any other scene is returned.
    """
    files = sorted(lego.glob("transforms*.json"))
    contents = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    frames = [frame for content in contents for frame in content["frames"]]
    if not frames or not (lego / (frames[0]["file_path"] + ".webp")).is_file():
        return lego
    for frame in frames:
        frame["file_path"] += ".webp"
    folder = work / "lego_webp"
    folder.mkdir(exist_ok=True)
    for entry in lego.iterdir():
        if entry.is_dir() and not (folder / entry.name).exists():
            (folder / entry.name).symlink_to(entry, target_is_directory=True)
    for file, content in zip(files, contents, strict=True):
        (folder / file.name).write_text(json.dumps(content), encoding="utf-8")
    return folder


# ------------------------------------------------------------------------------------- vanilla NeRF


def vanilla_flags(settings: dict[str, Any], rays: int) -> list[str]:
    """Flags that nerf-pytorch knows too: its lego.txt, on the demo scene."""
    small = "--netdepth 2 --netwidth 16 --netdepth_fine 2 --netwidth_fine 16 --N_samples 8"
    small += " --N_importance 8"
    size = small if settings["quick"] else "--N_samples 64 --N_importance 128"
    return [
        *("--datadir", str(demo_scene(settings)), "--dataset_type", "blender", "--no_batching"),
        *("--use_viewdirs", "--white_bkgd", "--lrate_decay", "500", "--precrop_iters", "500"),
        *("--precrop_frac", "0.5", "--testskip", "1", "--N_rand", str(rays), *size.split()),
        *("--basedir", str(Path(settings["work"]) / "vanilla")),
    ]


def variants(device: torch.device) -> list[tuple[str, str | None]]:
    """Precisions, each with CUDA graphs off and on; None: there is no choice."""
    precisions = list(PRECISIONS) if device.type == "cuda" else ["fp32", "bf16"]
    graphs = ["off", "on"] if device.type == "cuda" and knows("--cuda_graph") else [None]
    return list(product(precisions, graphs))


def variant_flags(precision: str, graph: str | None) -> list[str]:
    """The flags of a variant; where run_nerf.py has no --tf32, torch's own switch is set."""
    amp, tf32 = PRECISIONS[precision]
    words = ["--amp", amp]
    if knows("--tf32"):
        words += ["--tf32", tf32]
    else:
        torch.set_float32_matmul_precision("high" if precision == "TF32" else "highest")
    return [*words, *(["--cuda_graph", graph] if graph else [])]


class Vanilla:
    """Measures each variant of run_nerf.py, and nerf-pytorch, a few blocks at a time."""

    def __init__(self, settings: dict[str, Any], report: Report) -> None:
        self.settings, self.report = settings, report
        self.device = torch.device(settings["device"])
        self.seconds = 0.02 if settings["quick"] else 0.3  # of a block
        self.warm_up = 4 if settings["quick"] else 20
        self.found: dict[str, dict[str, list[float]]] = {}
        self.runs = 0
        self.peer_rays = 0  # of a step of nerf-pytorch

    def ours(self, rays: int, precision: str, graph: str | None, blocks: int, frames: bool) -> None:
        """Train ``blocks`` blocks; then, if ``frames``, render from the checkpoint that is left."""
        self.runs += 1
        name = f"{precision}, {rays} rays" + (f", graph {graph}" if graph else "")
        argv = [
            *(*vanilla_flags(self.settings, rays), *QUIET, *variant_flags(precision, graph)),
            *("--device", self.device.type, "--N_iters", "100000", "--expname", f"r{self.runs}"),
        ]
        timer = BlockTimer(self.device, blocks=blocks, seconds=self.seconds, warm_up=self.warm_up)
        peak = train_blocks(run_nerf.main, argv, timer, self.settings["log"])
        seconds: list[float] = []
        if frames:
            start_memory(self.device)
            with timed_frames(self.device, most=1 + ROUND_BLOCKS) as seconds:
                reading = [*argv, "--render_only", "--render_test"]
                drive(run_nerf.main, reading, self.settings["log"])
        self.add(name, timer.times, timer.rates, peak)
        if frames:
            self.add_frames(name, seconds[1:], peak_memory_mb(self.device))

    def peer(self, rays: int) -> None:
        """The same by nerf-pytorch's own code, in a process of its own."""
        self.runs += 1
        checkout = self.settings["peer"]
        result = subprocess.run(
            [
                *(sys.executable, "-m", "benchmarks.gpu_peer", self.device.type, str(self.warm_up)),
                *(str(self.seconds), str(ROUND_BLOCKS), *vanilla_flags(self.settings, rays)),
                *("--expname", f"p{self.runs}", "--i_weights", "1000000"),
            ],
            capture_output=True, text=True, cwd=checkout,
            env={**os.environ, "PYTHONPATH": os.pathsep.join([checkout, str(ROOT)])},
        )  # fmt: skip
        if result.returncode:
            lines = [line for line in result.stderr.splitlines() if line.strip()]
            raise RuntimeError(f"nerf-pytorch: {lines[-1] if lines else result.returncode}")
        found = json.loads(result.stdout.strip().splitlines()[-1])
        name, self.peer_rays = f"nerf-pytorch, {rays} rays", rays
        self.add(name, found["times"], found["rates"], found["memory_mb"])
        self.add_frames(name, found["frames"], found["frame_memory_mb"])

    def add(self, name: str, times: list[float], rates: list[float], peak: float) -> None:
        """Add blocks to a row of training."""
        row = self.found.setdefault(f"train, {name}", {"times": [], "rates": []})
        row["times"] += times
        row["rates"] += rates
        figures = {
            "ms/step": spread([1e3 * time for time in row["times"]]),
            "rays/s": spread(row["rates"]),
            **self.ratio("train", name, "rates", "x nerf-pytorch's rays/s"),
        }
        self.report.add(f"train, {name}", figures, peak)

    def add_frames(self, name: str, seconds: list[float], peak: float) -> None:
        """Add pictures to a row of rendering."""
        frame = "frame 20x20" if self.settings["quick"] else "frame 400x400"
        row = self.found.setdefault(f"{frame}, {name}", {"frames": []})
        row["frames"] += seconds
        ratio = self.ratio(frame, name, "frames", "x nerf-pytorch's time")
        self.report.add(f"{frame}, {name}", {"s": spread(row["frames"]), **ratio}, peak)

    def ratio(self, kind: str, name: str, key: str, label: str) -> dict[str, float]:
        """label -> a row's median over nerf-pytorch's with as many rays; {} for its own."""
        peer = self.found.get(f"{kind}, nerf-pytorch, {self.peer_rays} rays")
        if peer is None or f"{self.peer_rays} rays" not in name or "nerf-pytorch" in name:
            return {}
        own = self.found[f"{kind}, {name}"]
        return {label: statistics.median(own[key]) / statistics.median(peer[key])}


def vanilla(settings: dict[str, Any], report: Report) -> None:
    """NeRF's own algorithm, 8x256 with 64 + 128 samples: training and a frame."""
    measured = Vanilla(settings, report)
    few, many = (32, 64) if settings["quick"] else (1024, 4096)
    choices = variants(measured.device)
    if choices[0][1] is None and measured.device.type == "cuda":
        report.note("run_nerf.py has no --cuda_graph: one row for each precision")
    if settings["peer"] is None:
        report.note("no --peer: not compared with nerf-pytorch")
    elif not (Path(settings["peer"]) / "run_nerf.py").is_file():
        report.note(f"--peer {settings['peer']}: no run_nerf.py in it; not compared")
        settings = measured.settings = {**settings, "peer": None}
    last_graph = choices[-1][1]
    for _ in range(ROUNDS):
        if settings["peer"]:
            try:
                measured.peer(few)
            except RuntimeError as error:
                report.note(str(error))
                settings = measured.settings = {**settings, "peer": None}
        for precision, graph in choices:
            frames = graph == last_graph and precision != "TF32"
            measured.ours(few, precision, graph, ROUND_BLOCKS, frames)
    for precision, graph in choices:
        measured.ours(many, precision, graph, 5, frames=False)


# ---------------------------------------------------------------------------------------- fast path


def fast_flags(settings: dict[str, Any], name: str) -> list[str]:
    """configs/lego_fast.txt at full size; Lego, or the demo scene where it is not at hand."""
    work = Path(settings["work"])
    quick = "--grid_res 16 --target_samples 512 --occ_res 16 --march_steps 24 --N_iters 60".split()
    lego = Path(settings["lego"]) if settings["lego"] else None
    scene = with_webp_names(lego, work) if lego else demo_scene(settings)
    return [
        *("--config", "configs/lego_fast.txt", "--datadir", str(scene), "--no-half_res"),
        *("--basedir", str(work / "fast"), "--expname", name, "--device", settings["device"]),
        *QUIET,
        *(quick if settings["quick"] else []),
    ]


def skip_views(settings: dict[str, Any], scene: Path) -> int:
    """--testskip that leaves about ``test_views`` test views."""
    file = scene / "transforms_test.json"
    if not settings["test_views"] or not file.is_file():
        return 1
    count = len(json.loads(file.read_text(encoding="utf-8"))["frames"])
    return max(1, round(count / settings["test_views"]))


def fast(settings: dict[str, Any], report: Report) -> None:
    """The fast path: training seconds to each level, test views, seconds per frame, memory."""
    if settings["lego"] is None and not settings["quick"]:
        raise Skip("no --lego")
    device = torch.device(settings["device"])
    argv = fast_flags(settings, "fast")
    scene = Path(argv[argv.index("--datadir") + 1])
    argv += ["--testskip", str(skip_views(settings, scene))]
    argv += ["--max_minutes", f"{settings['fast_seconds'] / 60:.3f}", *settings["fast_flags"]]
    validations = 4 if settings["quick"] else 40
    argv += ["--i_img", str(max(1, nerf_flags.parse(argv).N_iters // validations))]
    curve, last = [], {}  # (step, training seconds, dB) of validations; the newest counters
    validate, measure_test = Evaluation.validate, Evaluation.measure_test

    def validate_and_keep(self: Evaluation, step: int) -> float:
        value = validate(self, step)
        curve.append((step, last["seconds"], value))
        report_curve(report, curve, settings["quick"])
        return value

    def note_peak(self: Evaluation, step: int) -> None:
        last["training_mb"] = peak_memory_mb(device)
        start_memory(device)
        measure_test(self, step)

    def count(state: Any, rays: int) -> None:
        last.update(seconds=state.clock.seconds, step=state.step, rays=state.rays_drawn)

    start_memory(device)
    with (
        patch.object(Evaluation, "validate", validate_and_keep),
        patch.object(Evaluation, "measure_test", note_peak),
        after_updates(count),
        timed_frames(device) as seconds,
    ):
        drive(run_nerf.main, argv, settings["log"])
    folder = Path(settings["work"]) / "fast" / "fast"
    metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    num_test, (width, height) = metrics["num_views"], metrics["resolution"]
    report.add(
        f"end, {num_test} test views",
        {
            "dB test": metrics["psnr"], "SSIM": metrics["ssim"], "s of training": last["seconds"],
            "steps": last["step"], "rays/s": last["rays"] / last["seconds"],
        },
        last["training_mb"],
    )  # fmt: skip
    frames = seconds[-num_test:][1:] or seconds  # the first one warms up
    report.add(f"frame {width}x{height}", {"s": spread(frames)}, peak_memory_mb(device))
    report.content["curve"] = curve
    report.write()


def report_curve(report: Report, curve: list[tuple[int, float, float]], quick: bool) -> None:
    """A row for each level: training seconds at the first validation at or above it."""
    for level in (5.0, *LEVELS) if quick else LEVELS:
        reached = next((seconds for _, seconds, psnr in curve if psnr >= level), None)
        results = {"s of training": reached}
        if reached is None:
            best = max(psnr for *_, psnr in curve)
            results = {"not reached": f"{best:.2f} dB after {curve[-1][1]:.0f} s"}
        report.add(f"to {level:g} dB (validation)", results)
