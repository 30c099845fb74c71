"""The viewer's frame rate on this machine, and how much open viewers slow training.

    python benchmarks/viewer.py --config configs/demo.txt    # frames per second while idle
    python benchmarks/viewer.py --turns 3 --clients 10 --config configs/demo.txt --N_iters 400

The first command needs a finished run. The second trains again under another name, by turns without
a viewer and with clients whose cameras always turn: processes of their own that talk to the server
as browsers do (viewer_clients.py). Both take run_nerf.py's flags. Last it prints which parts of the
time with a viewer its pictures and its messages took, which does not depend on the machine's other
load as the differences of whole runs do. Report all.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import run_nerf
from benchmarks.steady import free_port
from nerf import build, build_outputs
from nerf.flags import nerf as nerf_flags
from nerf.outputs import viewer
from nerf.outputs.scene import render_free_view
from nerf.training import checkpoint, checkpoint_choice, distributed, rng
from nerf.training.recovery import Attempt
from nerf.training.run_folder import RunFolder

ROOT = Path(__file__).resolve().parents[1]


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


class Measured(viewer.Viewer):
    """A viewer that adds up what it takes: seconds in ``tick``, and of its server's thread."""

    seconds = 0.0
    messages = 0.0

    def tick(self, *given):
        began = time.perf_counter()
        super().tick(*given)
        Measured.seconds += time.perf_counter() - began

    def close(self):
        Measured.messages += self.guard.cpu_seconds
        super().close()


class Cost(NamedTuple):
    """Seconds from the first step to the last: of the clock, of the CPU."""

    wall: float
    cpu: float


def train(flags: list[str]) -> Cost:
    """Train once in this process."""
    steps, draw = [], rng.step_generator

    def timed(*given):
        steps.append((time.perf_counter(), time.process_time()))
        return draw(*given)

    rng.step_generator = timed
    try:
        code = run_nerf.main(flags)
    finally:
        rng.step_generator = draw
    assert code == 0, code
    return Cost(*(last - first for first, last in zip(steps[0], steps[-1], strict=True)))


def train_viewed(flags: list[str], clients: int) -> tuple[Cost, dict[str, int]]:
    """Train with a viewer and its clients; what these sent and received."""
    port = str(free_port())
    command = [sys.executable, str(ROOT / "benchmarks" / "viewer_clients.py"), "--port", port]
    command += ["--clients", str(clients)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as browsers:
        try:
            cost = train([*flags, "--viewer", "--viewer_port", port])
            counts = json.loads(browsers.communicate(timeout=60)[0])
        finally:
            browsers.kill()
    return cost, counts


def slow_down(turns: int, clients: int, flags: list[str]) -> None:
    """Run all ways in turn; print how much slower training is with a viewer and clients."""
    flags = [*flags, "--expname", "viewer_benchmark", "--no_reload", "--i_img", "0"]
    flags += ["--i_video", "0", "--i_testset", "0", "--ckpt_secs", "0"]
    costs: dict[int | None, list[Cost]] = {None: [], clients: []}
    rates, viewed, viewer.Viewer = [], 0.0, Measured
    for turn in range(turns):
        for number in list(costs)[:: 1 if turn % 2 == 0 else -1]:
            if number is None:
                costs[None].append(train(flags))
                continue
            cost, counts = train_viewed(flags, number)
            costs[number].append(cost)
            viewed += cost.wall
            rates += [counts["pictures"] / cost.wall] if number else []
    for number, found in costs.items():
        name = "no viewer" if number is None else f"a viewer, {number} clients"
        for kind in Cost._fields:
            seconds = [getattr(cost, kind) for cost in found]
            alone = statistics.median(getattr(cost, kind) for cost in costs[None])
            more = 100 * (statistics.median(seconds) / alone - 1)
            listed = ", ".join(f"{value:.1f}" for value in seconds)
            print(f"{name}: {listed} s {kind}, {more:+.1f} % (medians)")
    print(f"{statistics.median(rates):.1f} pictures/s for all clients together")
    shares = [100 * seconds / viewed for seconds in (Measured.seconds, Measured.messages)]
    print("of the time with a viewer: {:.1f} % pictures, {:.1f} % messages".format(*shares))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], add_help=False)
    parser.add_argument("--turns", type=int, default=0, help="runs of each kind")
    parser.add_argument("--clients", type=int, default=1)
    own, flags = parser.parse_known_args()
    slow_down(own.turns, own.clients, flags) if own.turns else frames_per_second(flags)


if __name__ == "__main__":
    main()
