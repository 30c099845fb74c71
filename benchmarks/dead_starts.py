"""Which start keeps NeRF's density alive? Many seeds of a few hundred steps, alive / all.

    python benchmarks/dead_starts.py --data DATA --starts relu fog_start --seeds 20 --steps 150 \\
        --N_rand 64 --N_samples 8 --N_importance 8

Trains two 4x128 networks on scenes of DATA (folders in Blender's format) at 100x100 over white,
without a central crop, at nerf-pytorch's learning rate, by run_nerf.py's own functions. A start is
dead if, after its last step, a level renders a fixed sample of training rays in one color. One row
per run is appended to --out; rows that are there are not run again, so the command can be stopped
and repeated.
"""

import argparse
import csv
import math
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import imageio.v3 as iio
import torch
import torch.nn.functional as F
from torch import Tensor

import run_nerf
from nerf import build, build_optimizer
from nerf.flags import nerf as nerf_flags
from nerf.renderer import NeRFRenderer
from nerf.training import distributed, rng, system
from nerf.training.dead_start import Probe, redraw_until_alive
from nerf.training.recovery import Attempt

FLAGS = (
    "--dataset_type blender --white_bkgd --use_viewdirs --netdepth 4 --netwidth 128 "
    "--netdepth_fine 4 --netwidth_fine 128 --lrate 5e-4 --lrate_decay 500 --testskip 100 "
    "--device cpu"
)
COLUMNS = "scene start seed steps alive psnr opacity seconds flags".split()
SIZE = 100  # height of the training pictures
PROBE = 512  # rays on which a run is judged
QUIET = SimpleNamespace(log=lambda text: None)  # a run folder that writes nothing


class Start(NamedTuple):
    """A way to begin: flags, a change of the new renderer, and a change of it before each step."""

    flags: str = ""
    build: Callable[[NeRFRenderer], None] = lambda renderer: None
    step: Callable[[NeRFRenderer, int], None] = lambda renderer, step: None
    object_first: int = 0  # first steps whose rays are from the object where there are enough


def density_bias(value: float) -> Callable[[NeRFRenderer], None]:
    """Add ``value`` to the raw density of both networks at the start."""

    def change(renderer: NeRFRenderer) -> None:
        for field in renderer.fields:
            field.alpha_linear.bias.data += value

    return change


def color_bias(value: float) -> Callable[[NeRFRenderer], None]:
    """Start with the color of raw value ``value``, 3 for nearly white."""

    def change(renderer: NeRFRenderer) -> None:
        for field in renderer.fields:
            field.rgb_linear.bias.data += value

    return change


def biases(density: float, color: float) -> Callable[[NeRFRenderer], None]:
    """``density_bias`` and ``color_bias``."""

    def change(renderer: NeRFRenderer) -> None:
        density_bias(density)(renderer)
        color_bias(color)(renderer)

    return change


def softplus(shift: float = 0.0, steps: float = math.inf) -> Callable[[NeRFRenderer, int], None]:
    """softplus(raw + shift) instead of the ReLU in the first ``steps`` steps."""

    def change(renderer: NeRFRenderer, step: int) -> None:
        if step < steps:
            renderer._skip_empty = False
            renderer._sigma = lambda raw, noise: F.softplus(raw + shift)  # type: ignore
        else:
            vars(renderer).pop("_sigma", None)

    return change


class _OneSided(torch.autograd.Function):
    """ReLU whose gradient also reaches negative inputs where the loss wants more."""

    @staticmethod
    def forward(ctx: Any, raw: Tensor) -> Tensor:
        ctx.save_for_backward(raw)
        return F.relu(raw)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (raw,) = ctx.saved_tensors
        return torch.where((raw > 0) | (gradient < 0), gradient, 0.0)


def one_sided(steps: float) -> Callable[[NeRFRenderer, int], None]:
    """Let the gradient that asks for more density through the ReLU in the first steps."""

    def change(renderer: NeRFRenderer, step: int) -> None:
        if step < steps:
            renderer._skip_empty = False
            renderer._sigma = lambda raw, noise: _OneSided.apply(raw)  # type: ignore
        else:
            vars(renderer).pop("_sigma", None)

    return change


def noise(std: float, steps: float) -> Callable[[NeRFRenderer, int], None]:
    """Density noise in the first ``steps`` steps only."""

    def change(renderer: NeRFRenderer, step: int) -> None:
        renderer.raw_noise_std = std if step < steps else 0.0

    return change


STARTS = {
    "relu": Start(),
    "bias_0.1": Start(build=density_bias(0.1)),
    "bias_0.5": Start(build=density_bias(0.5)),
    "bias_1": Start(build=density_bias(1.0)),
    "warmup_100": Start("--lrate_warmup 100"),
    "warmup_500": Start("--lrate_warmup 500"),
    "noise_1": Start(step=noise(1.0, math.inf)),
    "clip_0.1": Start("--grad_clip 0.1"),
    "crop_100": Start("--precrop_iters 100"),
    "object_first_100": Start(object_first=100),
    "softplus": Start(step=softplus()),
    "softplus_-1": Start(step=softplus(-1.0)),
    "softplus_100": Start(step=softplus(0.0, 100)),
    "one_sided": Start(step=one_sided(math.inf)),
    "one_sided_100": Start(step=one_sided(100)),
    "white": Start(build=color_bias(3.0)),
    "bias_0.1_white": Start(build=biases(0.1, 3.0)),
    "bias_0.5_white": Start(build=biases(0.5, 3.0)),
    "bias_1_white": Start(build=biases(1.0, 3.0)),
    "fog_start": Start("--fog_start"),
    "alive_start": Start("--alive_start"),
    "bias_1_one_sided": Start(build=density_bias(1.0), step=one_sided(math.inf)),
    "bias_0.1_one_sided": Start(build=density_bias(0.1), step=one_sided(math.inf)),
}


def parse(data: Path, scene: str, start: Start, seed: int, extra: list[str]) -> argparse.Namespace:
    """run_nerf.py's flags of one run."""
    height = iio.improps(next((data / scene / "train").glob("*.png"))).shape[0]
    words = [*FLAGS.split(), *start.flags.split(), "--datadir", str(data / scene)]
    words += ["--downscale", str(height // SIZE), "--seed", str(seed)]
    return nerf_flags.parse([*words, *extra])


def object_rays(scene: Any, count: int, generator: torch.Generator) -> tuple:
    """Random training rays, of the object rather than the background where 4 x as many allow."""
    rays, target = scene.sample_rays(4 * count, generator)
    order = (target == scene.background).all(-1).int().argsort(stable=True)[:count]
    return rays.part(order), target[order]


def measure(args: argparse.Namespace, scene: Any, start: Start, steps: int) -> dict[str, Any]:
    """One run of ``steps`` steps: alive, PSNR and opacity of the probe's rays, seconds."""
    began = time.perf_counter()
    world = distributed.setup(args.device)
    state = run_nerf.prepare(args, world, QUIET, scene, Attempt(args.seed))
    renderer, optimizer = state.renderer, state.optimizer
    start.build(renderer)
    if args.alive_start:
        probe = Probe.draw(scene.sample_rays, renderer, args.seed, world.device)
        redraw_until_alive(renderer, probe, len(probe.target), args.seed)
    for step in range(steps):
        build_optimizer.set_learning_rates(optimizer, step, args)
        generator = rng.step_generator(args.seed, step, world.device)
        renderer.begin_step(step, generator)
        start.step(renderer, step)
        drawn = renderer.draw_noise(args.N_rand, generator)
        if step < start.object_first:
            rays, target = object_rays(scene, args.N_rand, generator)
        else:
            crop = args.precrop_frac if step < args.precrop_iters else 1.0
            rays, target = scene.sample_rays(args.N_rand, generator, crop=crop)
        run_nerf.forward_backward(args, world, renderer, state, args.N_rand, (rays, target, drawn))
        norm = torch.nn.utils.clip_grad_norm_(renderer.parameters(), args.grad_clip or math.inf)
        system.update_if_finite(optimizer, norm.isfinite())
    generator = rng.step_generator(args.seed, 10**6, world.device)
    rays, target = scene.sample_rays(PROBE, generator)
    with torch.no_grad():
        levels = renderer(rays)
    alive = all(bool(level.rgb.std(0).max() > 1e-3) for level in levels)
    mse = ((levels[-1].rgb - target) ** 2).mean().item()
    return {
        "alive": int(alive),
        "psnr": f"{-10 * math.log10(mse):.2f}",
        "opacity": " / ".join(f"{level.opacity.mean():.4f}" for level in levels),
        "seconds": f"{time.perf_counter() - began:.1f}",
    }


def rows_of(path: Path) -> list[dict[str, str]]:
    """The rows that were written so far."""
    if not path.exists():
        return []
    with open(path, encoding="utf-8") as file:
        return list(csv.DictReader(file))


def summary(rows: list[dict[str, str]]) -> list[str]:
    """alive / all and the mean PSNR of every start, scene and number of steps."""
    groups: dict[tuple[str, str, str], list[dict[str, str]]] = {}
    for row in rows:
        groups.setdefault((row["start"], row["scene"], row["steps"]), []).append(row)
    return [
        f"{start:18} {scene:6} {steps:>5} steps  {sum(int(row['alive']) for row in found):2} / "
        f"{len(found):2} alive  {sum(float(row['psnr']) for row in found) / len(found):.2f} dB"
        for (start, scene, steps), found in groups.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of the scenes")
    parser.add_argument("--scenes", nargs="+", default=["mic", "lego"])
    parser.add_argument("--starts", nargs="+", default=list(STARTS), choices=list(STARTS))
    parser.add_argument("--seeds", type=int, default=20, help="number of seeds, from 0")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--out", type=Path, default=Path("dead_starts.csv"))
    args, extra = parser.parse_known_args()  # further flags go to run_nerf.py's parser
    for name in args.scenes:
        plain = parse(args.data, name, Start(), 0, extra)
        scene = None
        for seed in range(args.seeds):
            for start in args.starts:
                key = {"scene": name, "start": start, "seed": str(seed), "steps": str(args.steps)}
                key |= {"flags": " ".join(extra)}
                rows = rows_of(args.out)
                if any(all(row[k] == v for k, v in key.items()) for row in rows):
                    continue
                scene = scene or build.load_scene(plain, lambda text: None)
                run = parse(args.data, name, STARTS[start], seed, extra)
                row = key | measure(run, scene, STARTS[start], args.steps)
                with open(args.out, "a", encoding="utf-8", newline="") as file:
                    writer = csv.DictWriter(file, COLUMNS)
                    if not rows:
                        writer.writeheader()
                    writer.writerow(row)
                print(*row.values(), flush=True)
    print(*summary(rows_of(args.out)), sep="\n")


if __name__ == "__main__":
    main()
