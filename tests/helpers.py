"""Functions that several test files use: scripts in processes of their own, tiny runs, states."""

import atexit
import contextlib
import io
import multiprocessing.connection
import os
import runpy
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import nn

from nerf import build
from nerf.flags import nerf as nerf_flags
from nerf.occupancy import OccupancyGrid
from nerf.rays import Rays
from nerf.renderer import NeRFRenderer, RayNoise
from nerf.text3d.renderer import ObjectRenderer
from nerf.training import rng
from nerf.training.checkpoint import (
    checkpoint_path,
    list_checkpoints,
    load_checkpoint,
    save_checkpoint,
)

REPOSITORY = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")
DEMO_SIZE = 32
DEMO_COUNTS = {"train": 6, "val": 2, "test": 2}

# Flags of run_nerf.py and run_dreamfusion.py for runs of a second; later flags replace these.
NERF_TINY = (
    "--use_viewdirs --white_bkgd --netdepth 2 --netwidth 16 --netdepth_fine 2 --netwidth_fine 16 "
    "--N_samples 8 --N_importance 8 --multires 4 --N_rand 64 --lrate 5e-3 --device cpu --i_img 0 "
    "--i_video 0 --i_print 5 --ckpt_secs 0 --expname tiny --dataset_type blender --testskip 1"
).split()
FAST_TINY = "--fast --amp off --target_samples 512 --occ_res 16".split()
DREAM_TINY = (
    "--guidance gaussian --prompt ball --device cpu --netdepth 2 --netwidth 16 --multires 2 "
    "--train_res 12 --batch_views 2 --march_steps 24 --occ_res 16 --lrate 1e-2 --i_print 5 "
    "--i_img 0 --ckpt_secs 0 --eval_res 16 --video_frames 3 --radius_range 2.5 3 --fov_range 38 44 "
    "--guidance_scale 1 --mesh_res 24 --albedo_steps 4 --background random"
).split()


# ---------------------------------------------------------------------------------- running scripts


def run_main(main: Callable[[list[str]], int], *arguments) -> subprocess.CompletedProcess:
    """``main(arguments)`` in this process, in the repository's folder, its text captured."""
    out, err, words = io.StringIO(), io.StringIO(), [str(word) for word in arguments]
    with (
        contextlib.chdir(REPOSITORY),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            code = main(words)
        except SystemExit as stop:  # argparse ends the program itself
            assert isinstance(stop.code, int), stop
            code = stop.code
    return subprocess.CompletedProcess(words, code, out.getvalue(), err.getvalue())


# Importing PyTorch, diffusers and transformers takes longer than most runs here. A server process
# imports them once; every script that a test starts is a fork of it.
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["run_nerf", "run_dreamfusion", "tiny_models", "helpers"])


def run_script(
    arguments: Iterable, *, script: str = "run_nerf.py", ranks: int = 1, timeout: float = 180
) -> subprocess.CompletedProcess:
    """``python script *arguments`` in the repository's folder, its text captured.

    In a process of its own; with ``ranks`` > 1 in as many, with the variables that torchrun sets,
    where the first that fails ends the others. Of their exit codes it returns the worst.
    """
    words = [script, *map(str, arguments)]
    with tempfile.TemporaryDirectory() as scratch:
        shared: dict[str, str] = {}
        if ranks > 1:  # as torchrun's agent does: the store, at a free port, is this process'
            store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True)
            shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}
            shared |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "WORLD_SIZE": str(ranks)}
        processes = []
        for rank in range(ranks):
            place = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else {}
            environment = {**os.environ, **shared, **place}
            texts = (f"{scratch}/out{rank}", f"{scratch}/err{rank}")
            processes.append(SERVER.Process(target=_script, args=(words, environment, *texts)))
        _wait(processes, timeout)
        out, err = (
            "".join(Path(f"{scratch}/{name}{rank}").read_text() for rank in range(ranks))
            for name in ("out", "err")
        )
    codes = [process.exitcode for process in processes]
    return subprocess.CompletedProcess(words, max(codes, key=abs), out, err)


def _script(words: list[str], environment: dict[str, str], out: str, err: str) -> None:
    """The body of such a process."""
    for number, path in ((1, out), (2, err)):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, number)
        os.close(file)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(REPOSITORY)
    sys.argv = words
    sys.path.insert(0, str(Path(words[0]).resolve().parent))
    try:
        runpy.run_path(words[0], run_name="__main__")
    finally:
        atexit._run_exitfuncs()  # a fork's end leaves them out


def _wait(processes: list, timeout: float) -> None:
    """Start the processes and wait for all; the first that fails, or the timeout, ends them."""
    try:
        for process in processes:
            process.start()  # the first one waits for the server's imports
        end = time.monotonic() + timeout
        while any(process.exitcode is None for process in processes):
            if any(process.exitcode for process in processes):
                break
            if time.monotonic() > end:
                raise TimeoutError(f"not finished after {timeout} s")
            multiprocessing.connection.wait(
                [p.sentinel for p in processes if p.exitcode is None], timeout=1.0
            )
    finally:
        for process in processes:
            if process.exitcode is None:
                process.terminate()
                process.join(30)
                process.kill()
            process.join()


def torchrun(count: int) -> list[str]:
    """The launcher of ``count`` processes at a free port: words after ``python``."""
    return ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}"]


def run_python(*words, timeout: float = 180, **environment: str) -> subprocess.CompletedProcess:
    """A new ``python *words`` in the repository's folder, its text captured."""
    return subprocess.run(
        [sys.executable, *map(str, words)],
        cwd=REPOSITORY, env={**os.environ, **environment},
        capture_output=True, text=True, timeout=timeout,
    )  # fmt: skip


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


# ------------------------------------------------------------------------------------ checkpoints


def newest(folder: Path) -> dict:
    """The newest checkpoint of a run folder; loading refuses NaN anywhere."""
    return load_checkpoint(list_checkpoints(folder)[0])


def flat(value, prefix: str = "") -> dict:
    """Every tensor and number of a nested state, by path."""
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list):
        items = enumerate(value)
    else:
        return {prefix: value}
    return {k: v for name, item in items for k, v in flat(item, f"{prefix}/{name}").items()}


def assert_same_training(first: dict, second: dict) -> None:
    """Two checkpoints hold the same bits of everything that training continues from."""
    names = "network_fn_state_dict network_fine_state_dict background_state_dict particles copy"
    names += " optimizer_state_dict occupancy_state_dict ema_state_dict scaler_state_dict"
    for name in [*names.split(), "num_rays", "box", "model", "global_step"]:
        one, other = flat(first.get(name)), flat(second.get(name))
        assert one.keys() == other.keys(), name
        for key, value in one.items():
            same = torch.equal(value, other[key]) if torch.is_tensor(value) else value == other[key]
            assert same, f"{name}{key} differs"


def small_state(step: int = 7) -> dict:
    """What a checkpoint must hold at least."""
    torch.manual_seed(step)
    weights = {"layer.weight": torch.randn(20, 20), "layer.bias": torch.randn(20)}
    return {"global_step": step, "network_fn_state_dict": weights, "args": {"expname": "x"}}


def write_checkpoint(folder: Path, step: int) -> Path:
    path = checkpoint_path(folder, step)
    save_checkpoint(path, small_state(step))
    return path


# ------------------------------------------------------------------------------------------- rays


def gradient_case() -> tuple[NeRFRenderer, Rays, torch.Tensor, RayNoise]:
    """A small renderer and one global batch of 32 rays, the same in every process."""
    rng.seed_everything(3)
    renderer = build.build_renderer(nerf_flags.parse(NERF_TINY))
    generator = rng.step_generator(3, 0, "cpu")
    directions = torch.randn(32, 3, generator=generator)
    unit = directions / directions.norm(dim=-1, keepdim=True)
    near, far = torch.full((32, 1), 2.0), torch.full((32, 1), 6.0)
    rays = Rays(-4 * unit, unit, unit, near, far)
    target = torch.rand(32, 3, generator=generator)
    return renderer, rays, target, renderer.draw_noise(32, generator)


def rays_through(origins: torch.Tensor, directions: torch.Tensor) -> Rays:
    near, far = torch.zeros(len(origins), 1), torch.full((len(origins), 1), 100.0)
    unit = directions / directions.norm(dim=-1, keepdim=True)
    return Rays(origins, directions, unit, near, far)


def random_rays(count: int = 200, seed: int = 0) -> Rays:
    torch.manual_seed(seed)
    origins = torch.nn.functional.normalize(torch.randn(count, 3), dim=-1) * 4
    return rays_through(origins, (torch.rand(count, 3) * 2 - 1 - origins) * 0.3)


BALL_RADIUS = 0.5
BALL_SHARPNESS = 2000.0  # raw density per unit of distance to the surface


class Ball(nn.Module):
    """Dense within BALL_RADIUS of the origin; its red is 0.5 + x / 4."""

    def __init__(self):
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(1))

    def density(self, points):
        return BALL_SHARPNESS * (BALL_RADIUS - points.norm(dim=-1)) + self.shift

    def forward(self, points, viewdirs, ray_indices):
        red = torch.logit(0.5 + points[:, 0] / 4)
        return self.density(points), torch.stack([red, 0 * red, 0 * red], -1)


def ball_renderer(field=None, **settings) -> ObjectRenderer:
    settings = {"bound": 1.0, "num_steps": 256, "blob_scale": 0.0, "blob_std": 0.5} | settings
    return ObjectRenderer(field or Ball(), OccupancyGrid(32), **settings)
