"""Stage ``profile`` of ``gpu.py``: where the time of a training step goes.

Wall time comes from blocks without the profiler, which slows down the host; the rest from its
trace of a few later steps.
"""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, record_function
from torch.profiler import profile as torch_profile

import run_dreamfusion
import run_nerf
from benchmarks.gpu_child import Report, one_line
from benchmarks.gpu_measure import BlockTimer, now, spread, train_blocks
from benchmarks.gpu_scene import QUIET, fast_flags, vanilla_flags
from benchmarks.gpu_text import text3d_flags

END = "end of the profiled steps"  # what follows, such as the wait for the last kernel, is ours
READS = ("aten::_local_scalar_dense", "aten::nonzero")  # operations that wait for the device


class StepProfiler:
    """Profiles ``steps`` updates of a loop: call it after every update, until it returns True."""

    def __init__(self, device: torch.device, steps: int, trace: Path) -> None:
        self.device, self.steps, self.trace = device, steps, trace
        activities = [ProfilerActivity.CPU]
        activities += [ProfilerActivity.CUDA] if device.type == "cuda" else []
        self.profiler = torch_profile(activities=activities)
        self.count = 0

    def __call__(self, state: object) -> bool:
        if self.count == 0:
            now(self.device)  # of earlier steps nothing is left to do
            self.profiler.start()
        self.count += 1
        if self.count <= self.steps:
            return False
        with record_function(END):
            pass
        now(self.device)
        self.profiler.stop()
        self.profiler.export_chrome_trace(str(self.trace))
        return True


def summarize(events: list[dict[str, Any]], steps: int) -> dict[str, Any]:
    """Figures per step from the events of a Chrome trace.

    kernel_ms: of kernels, copies and fills on the device. launches: of kernels; a captured graph
    counts as one graph launch. waits: calls by which the host waits for the device.
    """
    end = min((event["ts"] for event in events if event.get("name") == END), default=float("inf"))
    kernels: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    for event in events:
        kind, name = event.get("cat", ""), event.get("name", "")
        if kind in ("kernel", "gpu_memcpy", "gpu_memset"):
            kernels[name] += event.get("dur", 0.0) / 1e3 / steps
            counts["copies"] += kind == "gpu_memcpy"
        elif kind in ("cuda_runtime", "cuda_driver") and event["ts"] < end:
            counts["launches"] += "LaunchKernel" in name or "LaunchCooperative" in name
            counts["graph launches"] += "GraphLaunch" in name
            counts["waits"] += "Synchronize" in name
        elif kind == "cpu_op" and event["ts"] < end:
            counts["operations"] += 1
            counts["reads"] += name in READS
    per_step = {name: count / steps for name, count in counts.items()}
    return {"kernel_ms": sum(kernels.values()), "top": kernels.most_common(12), **per_step}


def profile_loop(name: str, main: Any, argv: list[str], settings: dict, report: Report) -> None:
    """A row: wall and kernel time, launches and waits of a step of one training loop."""
    device, quick = torch.device(settings["device"]), settings["quick"]
    steps, warm_up = (2, 4) if quick else (10, 40)
    timer = BlockTimer(device, blocks=5, warm_up=warm_up, seconds=0.02 if quick else 0.3)
    trace = Path(settings["work"]) / f"trace_{name}.json"
    profiler = StepProfiler(device, steps, trace)
    peak = train_blocks(main, argv, timer, settings["log"], profiler)
    events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    trace.unlink()
    found = summarize(events, steps)
    results: dict[str, Any] = {"ms wall": spread([1e3 * time for time in timer.times])}
    if device.type == "cuda":
        results["ms of kernels"] = found["kernel_ms"]
        kinds = ("launches", "graph launches", "waits", "copies")
        results |= {kind: found.get(kind, 0.0) for kind in kinds}
    results |= {kind: found.get(kind, 0.0) for kind in ("operations", "reads")}
    report.content.setdefault("kernels", {})[name] = found["top"]
    report.add(f"{name}, per step", results, peak)


def profile(settings: dict[str, Any], report: Report) -> None:
    """Vanilla NeRF, the fast path and text to 3D with their configs' own settings."""
    rays = 32 if settings["quick"] else 1024
    vanilla = [
        *(*vanilla_flags(settings, rays), *QUIET, "--amp", "bf16", "--expname", "profile"),
        *("--N_iters", "100000", "--device", settings["device"]),
    ]
    loops = {"vanilla": (run_nerf.main, vanilla)}
    fast = [*fast_flags(settings, "profile"), "--N_iters", "100000", "--testskip", "25"]
    loops["fast"] = (run_nerf.main, [*fast, *settings["fast_flags"]])
    loops["text3d"] = (run_dreamfusion.main, text3d_flags(settings, "profile"))
    errors = []
    for name, (main, argv) in loops.items():
        try:
            profile_loop(name, main, argv, settings, report)
        except RuntimeError as error:  # the others go on
            errors.append(f"{name}: {one_line(error)}")
    if errors:
        raise RuntimeError("; ".join(errors))
