"""More data than memory: rays/s from a mapped store beside rays/s from memory, in one run.

    python benchmarks/big_data.py --gib 4 --limit_mib 1024

Makes a store of --gib GiB of random pictures (without picture files, which would be decoded only
once) and a smaller set that fits into memory, and trains on both in turn. RLIMIT_DATA limits the
memory that the process allocates; files mapped for reading do not count. The benchmark also tries
to allocate the whole set, to show that it does not fit. The page cache is outside that limit, so
the file is dropped from it before every turn: all reads come from the disk.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from nerf import build
from nerf.cameras import orbit_path
from nerf.datasets.scene import Scene
from nerf.datasets.store import _write, as_tensor
from nerf.datasets.stored_file import StoredFile
from nerf.flags import nerf as nerf_flags
from nerf.renderer import squared_error
from nerf.training import rng

SIDE = 1024


def make_store(path: Path, num_bytes: int) -> int:
    """Write a store of random pictures of about ``num_bytes``; their number."""
    count = num_bytes // (SIDE * SIDE * 3)
    base = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    _write(path, count, lambda number: np.roll(base, number * 7919, axis=0))
    return count


def scene_of(images: torch.Tensor, stored: StoredFile | None) -> Scene:
    """A scene of images [N, SIDE, SIDE, 3] whose cameras lie on a circle."""
    count = len(images)
    poses = torch.tensor(orbit_path(count), dtype=torch.float32)
    return Scene(
        images=images,
        c2w=poses,
        intrinsics=torch.tensor([1200.0, 1200.0, SIDE / 2, SIDE / 2]).repeat(count, 1),
        splits={"train": list(range(count)), "test": [0]},
        names=[str(number) for number in range(count)],
        near=2.0,
        far=6.0,
        render_poses=poses[:1],
        stored=stored,
    )


def measure(scene: Scene, seconds: float, num_rays: int, start: int) -> dict:
    """Rays per second of whole training steps ("trained") and of ray sampling alone ("drawn")."""
    flags = "--use_viewdirs --N_samples 16 --netwidth 64 --netdepth 4"
    args = nerf_flags.parse(flags.split())
    rng.seed_everything(0)
    renderer = build.build_renderer(args, scene)
    optimizer = torch.optim.Adam(renderer.parameters(), 5e-4)
    order = scene.block_order(0)
    steps, drawing, began = 0, 0.0, time.perf_counter()
    while time.perf_counter() - began < seconds:
        generator = rng.step_generator(0, start + steps, "cpu")
        noise = renderer.draw_noise(num_rays, generator)
        moment = time.perf_counter()
        place = {"order": order, "position": (start + steps) * num_rays}
        rays, target = scene.sample_rays(num_rays, generator, **place)
        drawing += time.perf_counter() - moment
        loss = sum(squared_error(level.rgb, target) for level in renderer(rays, noise))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        steps += 1
    spent = time.perf_counter() - began
    return {"trained": steps * num_rays / spent, "drawn": steps * num_rays / drawing}


def work(store: Path, args) -> dict:
    """Medians for the mapped store and for one sixteenth of it in memory, measured in turn."""
    file = StoredFile(store)
    mapped = as_tensor(file.map())
    few = mapped[: max(1, len(mapped) // 16)].clone()
    scenes = {"memory": scene_of(few, None), "mmap": scene_of(mapped, file)}
    for scene in scenes.values():
        measure(scene, 1.0, args.rays, 0)
    found = {kind: [] for kind in scenes}
    for turn in range(args.turns):
        for kind, scene in scenes.items():
            # Each turn starts elsewhere in the epoch, at windows that were not read before.
            forget(store)
            found[kind].append(measure(scene, args.seconds, args.rays, 1 + turn * 100_003))
    result = {
        kind: {key: float(np.median([row[key] for row in rows])) for key in rows[0]}
        for kind, rows in found.items()
    }
    result["ratio_trained"] = result["mmap"]["trained"] / result["memory"]["trained"]
    result["own_mib"] = own_memory_mib()
    result |= {"limit_mib": args.limit_mib, "whole_set_fits": fits(mapped)}
    return result


def own_memory_mib() -> int:
    """Resident memory of this process in MiB, without pages of files."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return int(next(line for line in lines if line.startswith("RssAnon")).split()[1]) >> 10


def forget(path: Path) -> None:
    """Drop a file from the page cache."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def fits(pictures: torch.Tensor) -> bool:
    """Whether a copy of them can be allocated."""
    try:
        torch.empty_like(pictures)
    except RuntimeError:
        return False
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gib", type=float, default=4.0, help="size of the store")
    parser.add_argument("--limit_mib", type=int, default=1024, help="memory limit; 0: none")
    parser.add_argument("--seconds", type=float, default=10.0, help="length of each turn")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--rays", type=int, default=1024, help="rays per step")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        if args.limit_mib:
            resource.setrlimit(resource.RLIMIT_DATA, (args.limit_mib << 20,) * 2)
        print(json.dumps(work(args.worker, args)))
        return
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        store = Path(folder) / "pictures.npy"
        count = make_store(store, int(args.gib * 2**30))
        print(f"{count} pictures, {store.stat().st_size >> 20} MiB", flush=True)
        # A new process, so that memory used to make the store does not count.
        subprocess.run([sys.executable, *sys.argv, "--worker", str(store)], check=True)


if __name__ == "__main__":
    main()
