"""Rendering cost against picture size: time should grow with the pixels, memory should not.

    python benchmarks/picture_size.py

Renders one view of 200x200 and one with 8 times as many pixels with an untrained network, each in
a process of its own, and prints time and peak memory without the finished picture.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

SIDES = ((200, 200), (400, 800))


def measure(height: int, width: int, flags: list[str]) -> None:
    """Body of a child process: print seconds and peak MB of one render as JSON."""
    import resource
    import time

    import torch

    from nerf import build
    from nerf.datasets.scene import Scene
    from nerf.flags import nerf as nerf_flags
    from nerf.outputs.render import block_size
    from nerf.outputs.scene import SceneOutputs
    from nerf.training import distributed, rng, system

    args = nerf_flags.parse(flags)
    rng.seed_everything(0)
    world = distributed.setup("cpu")
    renderer = build.build_renderer(args, 1.0)
    pose = torch.tensor([[[1.0, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 4]]])
    scene = Scene(
        images=torch.zeros(1, 1, 1, 3, dtype=torch.uint8).expand(1, height, width, 3),
        c2w=pose,
        intrinsics=torch.tensor([[1.2 * width, 1.2 * width, width / 2, height / 2]]),
        splits={"train": [0]},
        names=["view"],
        near=2.0,
        far=6.0,
        render_poses=pose,
    )

    def render(rays):
        with system.autocast(world.device, args.amp):
            return renderer.render(rays)

    block = block_size(renderer.samples_per_ray, args.netwidth, args.chunk, args.netchunk, "cpu")
    outputs = SceneOutputs(render, scene, block, world)
    outputs.render_camera(scene.resized(10), scene.c2w[0], scene.intrinsics[0])  # warm up
    began = time.perf_counter()
    rendered = outputs.render_camera(scene, scene.c2w[0], scene.intrinsics[0])
    seconds = time.perf_counter() - began
    output = sum(member.nelement() * 4 for member in rendered) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"seconds": seconds, "memory_mb": peak - output, "output_mb": output}))


def main() -> None:
    if sys.argv[1:2] == ["--measure"]:
        return measure(int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:])
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    args, flags = parser.parse_known_args()
    flags = flags or ["--config", str(ROOT / "configs" / "demo_vanilla.txt")]
    runs: dict[tuple[int, int], list[dict]] = {side: [] for side in SIDES}
    for _ in range(args.rounds):
        for side in SIDES:
            command = [sys.executable, __file__, "--measure", *map(str, side), *flags]
            result = subprocess.run(command, check=True, capture_output=True, text=True)
            runs[side].append(json.loads(result.stdout.strip().splitlines()[-1]))
    small, large = (
        {key: statistics.median(run[key] for run in runs[side]) for key in runs[side][0]}
        for side in SIDES
    )
    pixels = SIDES[1][0] * SIDES[1][1] / (SIDES[0][0] * SIDES[0][1])
    print(f"{pixels:g} times the pixels: {large['seconds'] / small['seconds']:.2f} times the time")
    print(
        f"peak memory without the picture: {small['memory_mb']:.0f} -> {large['memory_mb']:.0f} MB "
        f"({large['memory_mb'] / small['memory_mb']:.2f} times)"
    )


if __name__ == "__main__":
    main()
