"""Does a capture of thousands of pictures cost more than its pictures? Time and memory by phase.

    python benchmarks/many.py --pictures 100 2000

Makes a COLMAP capture of the demo's solids for each number of pictures: JPEG files, a binary model
whose points lie on the solids and know the pictures that see them, with as many features per
picture as SIFT finds, and the same cameras as a transforms.json. Then run_nerf.py trains on it for
a few hundred steps and renders the test views, in a process that notes seconds and peak resident
memory of each phase: imports, the model, matching files, depths of the points, decoding, checks,
the first step, the tests and the report. What grows faster than the number of pictures is a fault.
"""

import argparse
import importlib
import json
import os
import runpy
import shlex
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
FLAGS = (
    "run_nerf.py --config configs/demo.txt --hull_init off --no-random_bg --i_video 0 "
    "--i_print 50 --seed 0"
)
RUNS = {  # name -> flags
    "colmap": "--dataset_type colmap --factor 1 --no_ndc --llffhold {hold}",
    "colmap, mmap": "--dataset_type colmap --factor 1 --no_ndc --llffhold {hold} --data_store mmap",
    "transforms": "--dataset_type transforms --llffhold {hold}",
}
# Functions of a run whose time and memory are noted, as module, name and phase.
PHASES = (
    ("nerf.datasets.colmap", "read_model", "read the model"),
    ("nerf.datasets.transforms", "read", "read the model"),
    ("nerf.datasets.colmap", "registered", "match the files"),
    ("nerf.datasets.transforms", "present", "match the files"),
    ("nerf.datasets.transforms", "views_of", "cameras and masks"),
    ("nerf.datasets.colmap", "depth_bounds", "depths of points"),
    ("nerf.datasets.capture", "pictures_of", "decode pictures"),
    ("nerf.datasets", "check_scene", "check the scene"),
    ("nerf.build", "load_scene", "load, all of it"),
    ("nerf.outputs.evaluation", "measure_views", "test views"),
    ("nerf.outputs.evaluation", "try_report", "report.html"),
)
ANGLE = 1.0  # radians, of a picture's width
CANDIDATES = 24  # pictures among which those are looked for that see a point
CHUNK = 1 << 16  # rays cast together


# ------------------------------------------------------------------------------- the capture


def make_capture(folder: Path, count: int, points: int, features: int, side: int) -> None:
    """Write images/, sparse/0 and transforms.json of ``count`` pictures, ``side`` wide."""
    import numpy as np
    import torch

    sys.path.insert(0, str(ROOT / "data"))
    from make_demo import hemisphere

    from nerf.datasets.colmap_model import Camera, Model
    from nerf.datasets.colmap_write import write_model

    height, focal = side * 3 // 4, 0.5 * side / np.tan(0.5 * ANGLE)
    center = side / 2, height / 2
    poses = hemisphere(count, seed=6)
    names = [f"IMG_{number:05d}.jpg" for number in range(count)]
    (folder / "images").mkdir(parents=True)
    for name, pose in zip(names, torch.tensor(poses, dtype=torch.float32), strict=True):
        write_picture(folder / "images" / name, pose, side, height, focal)
    camera = Camera("PINHOLE", side, height, (focal, focal, *center))
    xyz, colors, tracks = seen_points(poses, points, focal, side, height)
    model = Model({1: camera}, names, [1] * count, poses, xyz, colors, tracks)
    write_model(folder / "sparse" / "0", model)
    add_features(folder / "sparse" / "0" / "images.bin", features)
    frames = [
        {"file_path": f"images/{name}", "transform_matrix": [*pose.tolist(), [0, 0, 0, 1]]}
        for name, pose in zip(names, poses, strict=True)
    ]
    content = {"fl_x": focal, "fl_y": focal, "cx": center[0], "cy": center[1]}
    content |= {"w": side, "h": height, "frames": frames}
    (folder / "transforms.json").write_text(json.dumps(content), encoding="utf-8")


def write_picture(path: Path, pose, side: int, height: int, focal: float) -> None:
    """Write a JPEG of the demo's solids over white, cast at half its size and enlarged."""
    import numpy as np
    import torch
    from demo_scene import cast
    from PIL import Image

    from nerf.rays import pixels_to_rays

    y, x = torch.meshgrid(torch.arange(height // 2), torch.arange(side // 2), indexing="ij")
    intrinsics = torch.tensor([focal, focal, side / 2, height / 2]) / 2
    at = x.flatten() + 0.5, y.flatten() + 0.5
    rgba, _ = cast(pixels_to_rays(*at, intrinsics, pose, (0.0, float("inf"))))
    picture = rgba[:, :3] * rgba[:, 3:] + 1 - rgba[:, 3:]
    pixels = np.round(picture.view(height // 2, side // 2, 3).numpy() * 255).astype(np.uint8)
    Image.fromarray(pixels).resize((side, height), Image.Resampling.BICUBIC).save(path, quality=92)


def seen_points(poses, count: int, focal: float, width: int, height: int):
    """Points on the solids [count, 3], their colors, and tracks [T, 2] of pictures that see them.

    Of CANDIDATES random pictures those count in whose frame a point lies with nothing before it.
    """
    import numpy as np
    import torch
    from demo_scene import _rays, cast

    random = torch.Generator().manual_seed(7)
    centers = torch.tensor(poses[:, :, 3], dtype=torch.float32)
    found, colors, hits = [], [], 0
    while hits < count:
        view = torch.randint(len(poses), (CHUNK,), generator=random)
        aims = torch.rand(CHUNK, 3, generator=random) * 2.4 - 1.2
        rgba, t = cast(_rays(centers[view], aims - centers[view]))
        hit = torch.isfinite(t)
        found.append((centers[view] + t[:, None] * (aims - centers[view]))[hit])
        colors.append(rgba[hit, :3])
        hits += int(hit.sum())
    points, rgb = torch.cat(found)[:count], torch.cat(colors)[:count]
    number = torch.arange(count).repeat_interleave(CANDIDATES)
    view = torch.randint(len(poses), (count, CANDIDATES), generator=random).sort(-1).values
    new = torch.cat([torch.ones(count, 1, dtype=torch.bool), view[:, 1:] > view[:, :-1]], -1)
    number, view = number[new.flatten()], view[new]
    c2w, tracks = torch.tensor(poses, dtype=torch.float32), []
    for point, seer in zip(number.split(CHUNK), view.split(CHUNK), strict=True):
        away = points[point] - centers[seer]
        local = (away[:, None] @ c2w[seer, :, :3])[:, 0]
        x, y = focal * local[:, 0] / -local[:, 2], focal * local[:, 1] / local[:, 2]
        inside = (x.abs() < width / 2) & (y.abs() < height / 2)
        seen = inside & ((cast(_rays(centers[seer], away))[1] - 1).abs() < 1e-3)
        tracks.append(torch.stack([point, seer], -1)[seen])
    levels = np.round(rgb.numpy() * 255).astype(np.uint8)
    return points.double().numpy(), levels, torch.cat(tracks).numpy()


def add_features(path: Path, count: int) -> None:
    """Give each picture of an images.bin ``count`` features without a point, as most are."""
    loose = struct.pack("<2dq", 1.0, 1.0, -1) * count
    content, position, parts = path.read_bytes(), 8, []
    parts.append(content[:8])
    for _ in range(struct.unpack("<Q", content[:8])[0]):
        end = content.index(b"\0", position + 64) + 1
        (own,) = struct.unpack_from("<Q", content, end)
        parts += [content[position:end], struct.pack("<Q", own + count)]
        position = end + 8 + 24 * own
        parts += [content[end + 8 : position], loose]
    path.write_bytes(b"".join(parts))


# ----------------------------------------------------------------------------- the measured run


def memory_mb() -> dict[str, float]:
    """This process's peak since the last call, its present size, and that without files' pages."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    field = dict(line.split(":", 1) for line in lines)
    names = {"peak": "VmHWM", "now": "VmRSS", "own": "RssAnon"}
    found = {key: int(field[name].split()[0]) / 1024 for key, name in names.items()}
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    return found


def child(notes: Path, began: float, command: list[str]) -> None:
    """Run a script of this project and write seconds and memory of each phase to ``notes``."""
    rows: list[dict[str, Any]] = []

    def note(phase: str, seconds: float) -> None:
        rows.append({"phase": phase, "seconds": seconds, "at": time.time() - began, **memory_mb()})

    def timed(function: Callable, phase: str) -> Callable:
        @wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            result = function(*args, **kwargs)
            note(phase, time.perf_counter() - start)
            return result

        return call

    import nerf.training.startup  # noqa: F401  before torch, as in the script

    for module, name, phase in PHASES:
        place = importlib.import_module(module)
        setattr(place, name, timed(getattr(place, name), phase))
    from nerf.training.state import TrainState

    advance = TrainState.advance

    def first(self: TrainState, num_rays: int) -> None:
        advance(self, num_rays)
        note("first step", time.time() - began)
        TrainState.advance = advance  # type: ignore[method-assign]

    TrainState.advance = first  # type: ignore[method-assign]
    note("imports", time.time() - began)
    sys.argv = command
    try:
        runpy.run_path(command[0], run_name="__main__")
    finally:
        note("end", time.time() - began)
        notes.write_text(json.dumps(rows), encoding="utf-8")


def measure(capture: Path, out: Path, flags: str) -> dict[str, Any]:
    """The phases of one run, its files and its test views."""
    out.mkdir(parents=True, exist_ok=True)
    notes = out / "notes.json"
    command = [*shlex.split(f"{FLAGS} {flags}"), "--datadir", str(capture), "--basedir", str(out)]
    command += ["--expname", "run", "--store_dir", str(out / "store")]
    child_of = [sys.executable, __file__, "--child", str(notes), str(time.time())]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*child_of, *command], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    if done.returncode:
        sys.exit(f"{shlex.join(command)}\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
    run = out / "run"
    files = [path for path in run.rglob("*") if path.is_file()]
    metrics = json.loads((run / "metrics.json").read_text(encoding="utf-8"))
    return {
        "phases": json.loads(notes.read_text(encoding="utf-8")),
        "files": len(files),
        "files_mb": sum(path.stat().st_size for path in files) / 1e6,
        "report_mb": (run / "report.html").stat().st_size / 1e6,
        "test_views": metrics["num_views"],
        "psnr": metrics["psnr"],
    }


def show(results: dict[tuple[int, str], dict[str, Any]]) -> None:
    """Print a column for each run and a row for each phase: seconds, peak resident MB."""
    heads = [f"{count:,} pictures, {name}" for count, name in results]
    print(f"\n| seconds, peak MB | {' | '.join(heads)} |")
    print("|---" * (len(heads) + 1) + "|")
    names = list(dict.fromkeys(phase for _, _, phase in PHASES))
    middle = names.index("test views")
    for phase in ["imports", *names[:middle], "first step", *names[middle:], "end"]:
        cells = []
        for run in results.values():
            own = [row for row in run["phases"] if row["phase"] == phase]
            seconds, peak = (
                sum(row["seconds"] for row in own),
                max((r["peak"] for r in own), default=0),
            )
            cells.append(f"{seconds:.2f}, {peak:.0f}" if own else "-")
        print(f"| {phase} | {' | '.join(cells)} |")
    tests = [
        next(row["seconds"] for row in run["phases"] if row["phase"] == "test views")
        / run["test_views"]
        for run in results.values()
    ]
    rows = {
        "peak MB of all": [max(r["peak"] for r in run["phases"]) for run in results.values()],
        "MB after the tests without pages of files": [
            next(row["own"] for row in run["phases"] if row["phase"] == "test views")
            for run in results.values()
        ],
        "test views": [run["test_views"] for run in results.values()],
        "seconds per test view": tests,
        "PSNR, dB": [run["psnr"] for run in results.values()],
        "files of the run": [run["files"] for run in results.values()],
        "files, MB": [run["files_mb"] for run in results.values()],
        "report.html, MB": [run["report_mb"] for run in results.values()],
    }
    for name, values in rows.items():
        print(f"| {name} | {' | '.join(f'{value:.4g}' for value in values)} |")


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        return child(Path(sys.argv[2]), float(sys.argv[3]), sys.argv[4:])
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pictures", type=int, nargs="+", default=[100, 2000])
    parser.add_argument(
        "--test_views", type=int, default=300, help="of the most pictures; at least"
    )
    parser.add_argument("--points", type=int, default=100_000)
    parser.add_argument("--features", type=int, default=8000, help="of a picture, without a point")
    parser.add_argument("--side", type=int, default=400, help="pixels of the width")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--runs", nargs="+", choices=list(RUNS), default=list(RUNS))
    parser.add_argument("--captures", type=Path, help="keep the captures in this folder")
    parser.add_argument("--json", type=Path, help="file to write the results to")
    args = parser.parse_args()
    hold = max(2, max(args.pictures) // args.test_views)
    results: dict[tuple[int, str], dict[str, Any]] = {}
    with tempfile.TemporaryDirectory(prefix="many_") as temporary:
        folder = args.captures or Path(temporary)
        for count in args.pictures:
            capture = folder / f"{count}_{args.points}_{args.features}_{args.side}"
            if not capture.exists():
                making = folder / f".{capture.name}"
                start = time.perf_counter()
                make_capture(making, count, args.points, args.features, args.side)
                making.rename(capture)
                print(f"{capture} made in {time.perf_counter() - start:.0f} s", flush=True)
            for number, name in enumerate(args.runs):
                flags = RUNS[name].format(hold=hold) + f" --N_iters {args.steps}"
                out = Path(temporary) / f"run_{count}_{number}"
                results[count, name] = measure(capture, out, flags)
                total = results[count, name]["phases"][-1]["at"]
                print(f"{count} pictures, {name}: {total:.0f} s", flush=True)
        show(results)
    if args.json:
        rows = [{"pictures": n, "run": name, **run} for (n, name), run in results.items()]
        args.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
