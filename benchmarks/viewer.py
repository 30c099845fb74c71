"""The viewer's frame rate on this machine, and how much an open viewer slows training.

    python benchmarks/viewer.py --config configs/demo.txt    # frames per second while idle
    python benchmarks/viewer.py --moving 3 --config configs/demo.txt --N_iters 400

The first command needs a finished run. The second trains again under another name, three times
without a viewer and three times with a client whose camera always turns (a stand-in for a browser:
the server renders, encodes and queues every picture as for a real one). Both take run_nerf.py's
flags. Results depend on the machine and its other load: report both.
"""

import argparse
import math
import statistics
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np

import run_nerf
from nerf import build, build_outputs
from nerf.flags import nerf as nerf_flags
from nerf.outputs import viewer
from nerf.outputs.scene import render_free_view
from nerf.training import checkpoint, checkpoint_choice, distributed, rng
from nerf.training.recovery import Attempt
from nerf.training.run_folder import RunFolder


def frames_per_second(flags: list[str]) -> None:
    """Print the frames per second at each of the viewer's sizes, while nothing trains."""
    args = nerf_flags.parse(flags)
    world = distributed.setup(args.device)
    run = RunFolder(Path(args.basedir) / args.expname, is_main=True, lock=False)
    path, content = checkpoint_choice.newest_checkpoint(run.folder, run.log)
    scene = build.load_scene(args, run.log).to(world.device)
    state = run_nerf.prepare(args, world, run, scene, Attempt(args.seed))
    checkpoint.restore(path, content, run.log, state.renderer)
    outputs = build_outputs.scene_evaluation(args, world, run, scene, state).outputs
    pose = scene.c2w[0].cpu().numpy()
    for side in viewer.SIDES:
        times = []
        for _ in range(8):
            start = time.perf_counter()
            render_free_view(outputs, pose, 0.8, (round(side / 1.5), side), "rgb", None)
            times.append(time.perf_counter() - start)
        print(f"{side} x {round(side / 1.5)}: median {1 / sorted(times)[4]:.1f} frames/s")


class Turning(viewer.Viewer):
    """A viewer with one client, whose camera turns once in ten seconds."""

    pictures: list[float] = []  # time at which each was sent

    def _clients(self):
        server = self.server

        def show(*picture, **settings):
            server.scene.set_background_image(*picture, **settings)
            Turning.pictures.append(time.perf_counter())

        pose = viewer_pose(self.scene, 2 * math.pi * time.monotonic() / 10)
        camera = SimpleNamespace(
            update_timestamp=1.0, fov=0.8, aspect=1.5,
            wxyz=viewer.quaternion(pose), position=pose[:, 3],
        )  # fmt: skip
        return [
            (0, SimpleNamespace(camera=camera, scene=SimpleNamespace(set_background_image=show)))
        ]


def viewer_pose(scene, angle: float) -> np.ndarray:
    """The pose [3, 4] of the first camera, turned about z by ``angle`` radians."""
    cos, sin = math.cos(angle), math.sin(angle)
    return np.array([[cos, -sin, 0], [sin, cos, 0], [0, 0, 1]]) @ scene.c2w[0].cpu().numpy()


def train(flags: list[str]) -> tuple[float, float]:
    """Time at which main was called, and seconds from the first step to the last, of one run."""
    steps, draw = [], rng.step_generator

    def timed(*given):
        steps.append(time.perf_counter())
        return draw(*given)

    rng.step_generator, called = timed, time.perf_counter()
    try:
        code = run_nerf.main(flags)
    finally:
        rng.step_generator = draw
    assert code == 0, code
    return called, steps[-1] - steps[0]


def slow_down(turns: int, flags: list[str]) -> None:
    """Run without and with a client in turn; print how much slower the latter is."""
    viewer.Viewer = Turning
    flags = [*flags, "--expname", "viewer_benchmark", "--no_reload", "--i_img", "0"]
    flags += ["--i_video", "0", "--ckpt_secs", "0"]
    walls, waits, rates = {False: [], True: []}, [], []
    for turn in range(turns):
        for viewed in (False, True) if turn % 2 == 0 else (True, False):
            Turning.pictures = []
            called, wall = train([*flags, *(["--viewer"] if viewed else [])])
            walls[viewed].append(wall)
            if viewed:
                waits.append(Turning.pictures[0] - called)
                rates.append(len(Turning.pictures) / wall)
    for viewed, found in walls.items():
        listed = ", ".join(f"{seconds:.1f}" for seconds in found)
        print(f"{'with' if viewed else 'without'} a client: {listed} s")
    ratio = statistics.median(walls[True]) / statistics.median(walls[False])
    print(f"{100 * (ratio - 1):+.1f} % (medians); {statistics.median(rates):.1f} pictures/s")
    print(f"first picture {max(waits):.1f} s after the start, data and all, at the latest")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], add_help=False)
    parser.add_argument("--moving", type=int, default=0, help="runs of each kind")
    own, flags = parser.parse_known_args()
    slow_down(own.moving, flags) if own.moving else frames_per_second(flags)


if __name__ == "__main__":
    main()
