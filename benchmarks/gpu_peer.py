"""nerf-pytorch's unchanged training loop and renderer under the clock of ``gpu.py``.

A program of its own, since both projects have a run_nerf.py: PYTHONPATH begins with the clone.

    python -m benchmarks.gpu_peer DEVICE WARM_UP SECONDS BLOCKS [flags of nerf-pytorch]

Its progress bar is replaced to take the times; two libraries that it imports but does not need
here are stubbed. The last line printed is JSON.
"""

import json
import sys
import types
from collections.abc import Iterator

import torch

from benchmarks.gpu_measure import BlockTimer, now, start_memory
from nerf.training.system import peak_memory_mb


def main(kind: str, warm_up: int, seconds: float, blocks: int, argv: list[str]) -> None:
    """Train until the blocks are there, render ``blocks`` test views and one before, print."""
    for name in ("matplotlib", "matplotlib.pyplot", "cv2"):
        sys.modules.setdefault(name, types.ModuleType(name))
    sys.argv = ["run_nerf.py", *argv]
    import run_nerf as peer

    device = torch.device(kind)
    timer = BlockTimer(device, blocks=blocks, seconds=seconds, warm_up=warm_up)
    made, create = {}, peer.create_nerf

    def create_and_keep(args):
        made["args"], made["nerf"] = args, create(args)
        return made["nerf"]

    def timed(start: int, stop: int) -> Iterator[int]:
        for step in range(start, stop):
            yield step
            timer.step(made["args"].N_rand)
            if timer.done:
                break
        training = peak_memory_mb(device)
        start_memory(device)
        frames = render_frames(peer, made, device, 1 + blocks)
        found = {"times": timer.times, "rates": timer.rates, "frames": frames[1:]}
        found |= {"memory_mb": training, "frame_memory_mb": peak_memory_mb(device)}
        print(json.dumps(found), flush=True)
        sys.exit(0)

    if kind == "cuda":  # as its own last lines do
        torch.set_default_tensor_type("torch.cuda.FloatTensor")
    peer.create_nerf, peer.trange = create_and_keep, timed
    peer.train()


def render_frames(peer, made: dict, device: torch.device, count: int) -> list[float]:
    """Seconds of each of ``count`` test views."""
    args, render = made["args"], made["nerf"][1]
    _, poses, _, (height, width, focal), split = peer.load_blender_data(
        args.datadir, False, args.testskip
    )
    matrix = [[focal, 0, width / 2], [0, focal, height / 2], [0, 0, 1]]
    views = torch.tensor(poses[split[2]][:count]).to(device)
    seconds = []
    for view in range(len(views)):
        start = now(device)
        with torch.no_grad():
            size = [int(height), int(width), focal]
            peer.render_path(views[view : view + 1], size, matrix, args.chunk, render)
        seconds.append(now(device) - start)
    return seconds


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), float(sys.argv[3]), int(sys.argv[4]), sys.argv[5:])
