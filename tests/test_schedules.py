"""Numbers that change during training."""

import argparse
import csv
import json
import math
from contextlib import nullcontext

import pytest
import torch
from helpers import (
    DREAM_TINY,
    FAST_TINY,
    NERF_TINY,
    assert_same_training,
    newest,
    random_rays,
    run_main,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import run_dreamfusion
import run_nerf
from nerf import build, build_schedules
from nerf.encodings import TriPlane
from nerf.field import FeatureField
from nerf.flags import dreamfusion as dream_flags
from nerf.flags import nerf as nerf_flags
from nerf.occupancy import Box, OccupancyGrid
from nerf.occupancy_renderer import OccupancyRenderer
from nerf.text3d.orbit import random_orbit_cameras
from nerf.text3d.shading import draw_lighting
from nerf.training.graph import WARM_UP, StepGraphs
from nerf.training.schedules import highest, scheduled, stepped

BOX = Box(torch.full((3,), -1.0), torch.full((3,), 1.0), 60)


@pytest.mark.parametrize(
    ("text", "step", "value"),
    [
        ("0.5", 0, 0.5),
        ("0.5", 10**6, 0.5),
        ("1e-3", 7, 1e-3),
        ("0:1,100:3", 0, 1.0),
        ("0:1,100:3", 50, 2.0),
        ("0:1,100:3", 100, 3.0),
        ("0:1,100:3", 10**6, 3.0),
        ("100:1,200:0", 0, 1.0),  # constant before the first step
        ("0:1, 10:2 ,20:0", 15, 1.0),
        ("0:-1,4:1", 2, 0.0),
    ],
)
def test_values_between_and_beyond_the_steps(text, step, value):
    assert scheduled(text, step) == pytest.approx(value)


def test_sizes_jump_at_their_step():
    assert [stepped("0:32,100:64", step) for step in (0, 99, 100, 101)] == [32, 32, 64, 64]
    assert stepped("5:8", 0) == 8


def test_the_highest_value():
    assert highest("0:0,10:3,20:1") == 3


@pytest.mark.parametrize("text", ["", "a", "1,2", "0:1,0:2", "5:1,2:1", "0:nan", "-1:2", "0:1:2"])
def test_what_is_no_schedule_is_refused(text):
    with pytest.raises(ValueError, match="expected|ascend"):
        scheduled(text, 0)


@pytest.mark.parametrize(
    ("shape", "middle", "quarter"),
    [
        ("linear", 5.05, 7.525),
        ("exp", 1.0, 10 ** (1 - 0.5)),  # the same factor in every step
        ("cosine", 5.05, 0.1 + 9.9 * (0.5 + 0.5 * 2**-0.5)),
        ("step", 10.0, 10.0),
    ],
)
def test_ways_from_one_step_to_the_next(shape, middle, quarter):
    text = f"100:10,300:0.1:{shape},400:5"
    assert scheduled(text, 0) == scheduled(text, 100) == 10
    assert scheduled(text, 200) == pytest.approx(middle)
    assert scheduled(text, 150) == pytest.approx(quarter)
    assert scheduled(text, 300) == pytest.approx(0.1)
    assert scheduled(text, 350) == pytest.approx(2.55) and scheduled(text, 1000) == 5
    assert highest(text) == 10


WRONG = {
    "run_nerf.py": {
        "--lambda_tv 0:1,5:2:fast": "in straight lines; step:value:exp",
        "--lambda_l1 0:0,5:1:exp": "exp needs values above 0",
        "--lrate 0:1e-3:exp,5:1e-4": "the first step takes no shape",
        "--lrate 0:1e-3,5:0": "a number above 0",
        "--lrate fast": "expected a number above 0",
        "--raw_noise_std 0:1,5:-1": "0 or more",
        "--target_samples 0:100,5:2.5": "a whole number, 1 or more",
        "--target_samples 0:100,5:200:exp": "whole numbers jump",
    },
    "run_dreamfusion.py": {
        "--radius_range 0:1,5:3 2": "--radius_range 0:1,5:3 2; expected two numbers, smaller first",
        "--elevation_range 0 0:10,5:95": "expected degrees from -90 to 90",
        "--p_diffuse 0:0,5:1.5": "a number from 0 to 1",
        "--train_res 0:32,5:64:cosine": "sizes jump",
        "--lrate_lora 5:1e-4,2:1": "the steps must ascend",
    },
}


@pytest.mark.parametrize("script", WRONG)
def test_a_wrong_schedule_is_one_line(script, capsys, tmp_path):
    main = {"run_nerf.py": run_nerf.main, "run_dreamfusion.py": run_dreamfusion.main}[script]
    more = {"run_dreamfusion.py": ["--guidance", "gaussian", "--prompt", "ball"]}.get(script, [])
    for words, message in WRONG[script].items():
        done = run_main(main, *words.split(), *more, "--basedir", tmp_path, "--device", "cpu")
        assert done.returncode == 2, words
        lines = done.stderr.strip().splitlines()
        assert len(lines) == 1 and message in lines[0] and words.split()[0] in lines[0], lines
    assert not list(tmp_path.iterdir())


def table(folder) -> list[dict[str, float]]:
    with open(folder / "metrics.csv") as file:
        return [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]


def test_schedules_of_a_scene_are_followed_logged_kept_and_resumed(data, tmp_path):
    """Learning rates, weights and the number of samples, in one run and in two halves."""
    told = {
        "lrate": "0:1e-2,8:1e-4:exp",
        "lrate_grid": "0:1e-2,4:2e-2:step",
        "lambda_tv": "0:0,4:0.1",
        "lambda_l1": "0:0.1,8:0:cosine",
        "target_samples": "0:400,4:800",
    }
    words = [word for name, text in told.items() for word in (f"--{name}", text)]
    flags = [*FAST_TINY, *NERF_TINY, "--datadir", data, "--basedir", tmp_path, *words]
    flags += ["--i_print", 1, "--lrate_warmup", 20]
    for name, steps in (("whole", 8), ("parts", 3), ("parts", 8)):
        done = run_main(run_nerf.main, *flags, "--expname", name, "--N_iters", steps)
        assert done.returncode == 0, done.stderr
    assert_same_training(newest(tmp_path / "whole"), newest(tmp_path / "parts"))
    rows = table(tmp_path / "whole")
    assert [rows[0].keys() for _ in rows] == [row.keys() for row in table(tmp_path / "parts")]
    for name, column in {"lrate": "lr", "lrate_grid": "lr_grid"}.items() | {
        (name, name) for name in ("lambda_tv", "lambda_l1")
    }:
        expected = [scheduled(told[name], step) for step in range(8)]
        assert [row[column] for row in rows] == pytest.approx(expected), name
    assert [row["target_samples"] for row in rows] == [400] * 4 + [800] * 4
    assert rows[0]["loss_tv"] == 0 < rows[1]["loss_tv"] < rows[4]["loss_tv"]
    for row in rows:
        parts = row["loss_color"] + row["loss_l1"] + row["loss_tv"]
        assert row["loss"] == pytest.approx(parts, rel=1e-5)
        norms = math.hypot(row["grad_norm_networks"], row["grad_norm_grid"])
        assert row["grad_norm"] == pytest.approx(norms, rel=1e-5)
    kept = json.loads((tmp_path / "whole" / "args.json").read_text())
    assert {name: kept[name] for name in told} == told
    again = nerf_flags.parse(["--config", str(tmp_path / "whole" / "args.txt")])
    assert vars(again) == kept | {"config": again.config, "fast": False}


def test_cameras_and_light_follow_their_schedules(tmp_path):
    """Progressive view: the radius shrinks, azimuths open; in the log, args.txt and the cameras."""
    words = "--radius_range 0:4,4:2 0:5,4:3:step --azimuth_range 0:-30,4:-180 0:30,4:180"
    words += " --p_textureless 0:0,4:1 --p_diffuse 1 --lambda_entropy 0:0,2:1"
    flags = [*DREAM_TINY, *words.split(), "--basedir", tmp_path, "--i_print", 1, "--N_iters", 5]
    done = run_main(run_dreamfusion.main, *flags)
    assert done.returncode == 0, done.stderr
    rows = table(tmp_path / "ball")
    assert [row["radius_range_low"] for row in rows] == [4, 3.5, 3, 2.5, 2]
    assert [row["radius_range_high"] for row in rows] == [5, 5, 5, 5, 3]
    assert [row["p_textureless"] for row in rows] == [0, 0.25, 0.5, 0.75, 1]
    assert [row["loss_entropy"] > 0 for row in rows] == [False, True, True, True, True]
    again = dream_flags.parse(["--config", str(tmp_path / "ball" / "args.txt")])
    assert again.radius_range == ["0:4,4:2", "0:5,4:3:step"] and again.p_diffuse == 1.0
    for step, low, high, turn in ((0, 4, 5, 30), (4, 2, 3, 180)):
        ranges = build_schedules.orbit_ranges(again, step)._replace(jitter_position=0.0)
        cameras = random_orbit_cameras(200, ranges, torch.Generator().manual_seed(0))
        distance = cameras.c2w[:, :, 3].norm(dim=-1)
        assert low <= distance.min() < low + 0.1 and high - 0.1 < distance.max() <= high + 1e-4
        assert 0.9 * turn < cameras.azimuth_deg.abs().max() <= turn
        lights = draw_lighting(
            cameras.c2w[:, :, 3],
            build_schedules.lighting_settings(again, step),
            torch.Generator().manual_seed(0),
            lit=True,
        )
        assert lights.textureless.mean() == (step > 0)


# ------------------------------------------------- CUDA graphs, with a stand-in for torch.cuda


class Tape(TorchDispatchMode):
    """Records every kernel with its tensors and numbers, and runs them again: a CUDA graph."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func._schema.name != "aten::_local_scalar_dense", "a read while recording"
        result = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, result))
        return result

    @torch.no_grad()
    def replay(self):
        for func, args, kwargs, result in self.calls:
            again = func(*args, **kwargs)
            for old, new in zip(tree_leaves(result), tree_leaves(again), strict=True):
                if isinstance(old, torch.Tensor):
                    old.copy_(new)

    def pool(self):
        return "memory"


@pytest.fixture
def taped(monkeypatch):
    """``StepGraphs`` on a CPU; the list of its recordings."""
    tapes = []

    class Capture:
        def __init__(self, graph, pool=None, stream=None):
            self.graph = graph

        def __enter__(self):
            tapes.append(self.graph)
            self.graph.__enter__()

        def __exit__(self, *error):
            self.graph.__exit__(*error)

    class Stream(nullcontext):
        def wait_stream(self, other):
            pass

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Tape)
    monkeypatch.setattr(torch.cuda, "graph", Capture)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: stream)
    return tapes


def scene_renderer(kind: str):
    torch.manual_seed(0)
    if kind == "vanilla":
        flags = [*NERF_TINY, "--raw_noise_std", "0:1,20:4", "--static_shapes", "on"]
        return build.build_renderer(nerf_flags.parse(flags))
    grid = OccupancyGrid(8)
    return OccupancyRenderer(
        FeatureField(TriPlane(16)), grid, BOX, background=1.0, static_shapes=True, first_rays=100,
        target_samples=2000,
    )  # fmt: skip


SCENE_FLAGS = {
    "fast": {"lambda_tv": "0:0.1,20:10:exp", "lambda_l1": "0:0,20:4", "raw_noise_std": 0.0,
             "target_samples": "0:2000,8:4000"},
    "vanilla": {"lambda_tv": 0.0, "lambda_l1": 0.0, "raw_noise_std": "0:1,20:4",
                "target_samples": 2000},
}  # fmt: skip


@pytest.mark.parametrize("kind", SCENE_FLAGS)
def test_a_number_inside_a_recorded_step_is_not_frozen(kind, taped):
    """Gradients of recorded steps are those of eager ones; as plain numbers they would be stale."""
    args, rays = argparse.Namespace(**SCENE_FLAGS[kind]), random_rays(100)

    def gradients(recorded: bool, graphs_on: bool) -> list[torch.Tensor]:
        renderer, found = scene_renderer(kind), []
        renderer.rays_per_step(100, 1)
        graphs = StepGraphs(renderer, print, enabled=graphs_on)

        def step(inputs):
            renderer.zero_grad(set_to_none=True)
            levels = renderer(inputs[0], inputs[1])
            loss = sum(level.rgb.square().mean() for level in levels)
            loss = loss + sum(renderer.penalties().values())
            loss.backward()
            return loss.detach()

        for number in range(12):
            build_schedules.set_scheduled(args, renderer, number, recorded=recorded)
            noise = renderer.draw_noise(100, torch.Generator().manual_seed(3))
            graphs.run(step, (rays, noise), kind=renderer.graph_kind())
            flat = [p.grad.flatten() for p in renderer.parameters() if p.grad is not None]
            found.append(torch.cat(flat).clone())
        return found

    eager = gradients(recorded=False, graphs_on=False)
    assert not taped
    graphs = gradients(recorded=True, graphs_on=True)
    assert len(taped) == (1 if kind == "vanilla" else 1 + (12 - 8 > WARM_UP))
    frozen = gradients(recorded=False, graphs_on=True)
    for own, right in zip(graphs, eager, strict=True):
        torch.testing.assert_close(own, right, rtol=1e-4, atol=1e-6)
    stale = [
        not torch.allclose(own, right, rtol=1e-3) for own, right in zip(frozen, eager, strict=True)
    ]
    assert not any(stale[: WARM_UP + 1]) and all(stale[WARM_UP + 1 : 8])
