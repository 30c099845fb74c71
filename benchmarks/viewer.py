"""The viewer's speed on this machine: frames per second at its first and second quality, idle.

    python benchmarks/viewer.py --config configs/demo.txt        # a finished run

Takes run_nerf.py's flags. Machines differ, and so do other loads: say what else ran.
"""

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import run_nerf
from nerf import options, runtime, viewer
from nerf.logs import RunFolder


def main() -> None:
    args = options.parse(options.nerf_parser(), sys.argv[1:])
    world = runtime.setup(args.device)
    run = RunFolder(Path(args.basedir) / args.expname, is_main=True, lock=False)
    path, state = run_nerf.find_checkpoint(args, world, run)
    scene = run_nerf.load_scene(args, run.say).to(world.device)
    renderer = run_nerf.prepare(args, world, scene, 0, run.say)[0]
    run_nerf.checkpoint.restore(path, state, run.say, renderer)
    painter = run_nerf.make_painter(args, world, renderer, scene)
    pose = scene.c2w[0].cpu().numpy()
    for side in viewer.SIDES:
        times = []
        for _ in range(8):
            start = time.perf_counter()
            viewer.view_of(painter, pose, 0.8, (round(side / 1.5), side), "rgb", None)
            times.append(time.perf_counter() - start)
        print(f"{side} x {round(side / 1.5)}: median {1 / sorted(times)[4]:.1f} frames/s")


if __name__ == "__main__":
    main()
