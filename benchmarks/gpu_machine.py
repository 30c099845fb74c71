"""Stages of ``gpu.py`` that need no training: the machine, its ceilings, the tests marked gpu."""

import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_child import ROOT, Report
from benchmarks.gpu_measure import alternate, spread, start_memory
from nerf.training.system import peak_memory_mb


def machine(settings: dict[str, Any], report: Report) -> None:
    """Device, driver, versions and commit; RuntimeError without a GPU."""
    found: dict[str, Any] = {"device": platform.processor() or platform.machine()}
    if settings["device"] == "cuda":
        if not torch.cuda.is_available():
            raise RuntimeError(
                f"no GPU that torch {torch.__version__} can use; --quick runs every stage on a CPU"
            )
        torch.zeros(1, device="cuda")  # a driver that is too old says so here
        properties = torch.cuda.get_device_properties(0)
        found["device"] = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        found["driver"] = f"driver {_output(query) or 'unknown'}, CUDA {torch.version.cuda}"
    found["torch"] = f"torch {torch.__version__}"
    found["python"] = f"Python {platform.python_version()}"
    found["cores"] = f"{len(os.sched_getaffinity(0))} cores"
    commit = _output(["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"])
    found["commit"] = f"commit {commit or 'unknown'}"
    report.add("machine", found)


def _output(command: list[str]) -> str:
    """The first line that a program prints; "" without the program, or if it fails."""
    if shutil.which(command[0]) is None:
        return ""
    result = subprocess.run(command, capture_output=True, text=True, timeout=20)
    return result.stdout.strip().split("\n")[0] if result.returncode == 0 else ""


def ceilings(settings: dict[str, Any], report: Report) -> None:
    """TFLOP/s of a product in the MLP's shape in each precision, GB/s of a copy on the device."""
    device, quick = torch.device(settings["device"]), settings["quick"]
    start_memory(device)
    rows, width = (2048, 64) if quick else (262144, 256)
    single = torch.randn(rows, width, device=device), torch.randn(width, width, device=device)
    half = tuple(factor.bfloat16() for factor in single)

    def product(precision: str, factors: tuple[torch.Tensor, ...]) -> None:
        torch.set_float32_matmul_precision(precision)
        torch.mm(*factors)

    sides = {
        "fp32": lambda: product("highest", single),
        "TF32": lambda: product("high", single),
        "bf16": lambda: product("highest", half),
    }
    seconds = 0.01 if quick else 0.1
    for name, times in alternate(sides, device, blocks=7, seconds=seconds).items():
        rates = [2e-12 * rows * width**2 / time for time in times]
        report.add(
            f"product {rows}x{width}x{width}, {name}",
            {"TFLOP/s": spread(rates)},
            peak_memory_mb(device),
        )
    source = torch.empty(1 << (20 if quick else 30), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copies = alternate({"copy": lambda: target.copy_(source)}, device, blocks=7, seconds=seconds)
    rates = [2e-9 * source.numel() / time for time in copies["copy"]]
    report.add("copy, read and written", {"GB/s": spread(rates)}, peak_memory_mb(device))


def tests(settings: dict[str, Any], report: Report) -> None:
    """The tests marked gpu; RuntimeError, with the last line of pytest, if one fails."""
    marked = re.compile(r"pytest\.mark\.gpu\b")
    files = [
        str(path.relative_to(ROOT))
        for path in sorted((ROOT / "tests").glob("test_*.py"))
        if marked.search(path.read_text(encoding="utf-8"))
    ]
    scratch = Path(settings["work"]) / "pytest"
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider"]
    result = subprocess.run(
        [*command, "--basetemp", str(scratch), *files], cwd=ROOT, capture_output=True, text=True
    )
    print(result.stdout, result.stderr, flush=True)
    lines = [line for line in (result.stdout + result.stderr).splitlines() if line.strip()]
    counts = {word: int(count) for count, word in re.findall(r"(\d+) ([a-z]+)", lines[-1])}
    kinds = {kind: counts[kind] for kind in ("passed", "failed", "skipped") if kind in counts}
    if kinds:
        report.add("pytest -m gpu", kinds)
    if result.returncode != 0:
        raise RuntimeError(f"pytest: {lines[-1]}")
