"""A GPU gives the CPU's pictures and is never waited for; graphs train as eager calls do."""

import imageio.v3 as iio
import numpy as np
import pytest
import torch
from helpers import DREAM_TINY, FAST_TINY, NERF_TINY, run_main

import run_dreamfusion
import run_nerf
from nerf.training import rng
from nerf.training.monitor import READ_EVERY

pytestmark = pytest.mark.gpu
GPU = "cuda"


def pictures(folder) -> np.ndarray:
    return np.stack([iio.imread(path) for path in sorted(folder.glob("[0-9]*.png"))]) / 255.0


def assert_same_pictures(main, train: list, render: list, folder) -> None:
    """Sums in another order: rounding may move a channel by a step or two of 8 bits."""
    assert run_main(main, *train).returncode == 0
    found = []
    for device in ("cpu", GPU):
        result = run_main(main, *train, *render, "--amp", "off", "--device", device)
        assert result.returncode == 0, result.stderr
        found.append(pictures(folder))
    assert np.abs(found[0] - found[1]).mean() < 0.5 / 255
    assert np.abs(found[0] - found[1]).max() < 6 / 255


@pytest.mark.parametrize("fast", [[], FAST_TINY], ids=["vanilla", "fast"])
@pytest.mark.parametrize("device", ["cpu", GPU])
def test_a_scene_looks_the_same_on_both(data, tmp_path, fast, device):
    own = ["--datadir", data, "--basedir", tmp_path, "--N_iters", 20, "--device", device]
    render, folder = ["--render_only", "--render_test"], tmp_path / "tiny" / "render_test_000020"
    assert_same_pictures(run_nerf.main, [*fast, *NERF_TINY, *own], render, folder)


@pytest.mark.parametrize("device", ["cpu", GPU])
def test_an_object_looks_the_same_on_both(tmp_path, device):
    train = [*DREAM_TINY, "--basedir", tmp_path, "--N_iters", 20, "--device", device]
    folder = tmp_path / "ball" / "render_path_000020"
    assert_same_pictures(run_dreamfusion.main, train, ["--render_only"], folder)


# ----------------------------------------------------------------- no host waits, and CUDA graphs


@pytest.fixture
def waits_are_errors(monkeypatch):
    """A host wait in a step that is not read, between warm-up and the end, raises."""
    step_generator = rng.step_generator

    def starts(seed, step, device):
        quiet = READ_EVERY < step < 4 * READ_EVERY - 2 and step % READ_EVERY
        torch.cuda.set_sync_debug_mode("error" if quiet else "default")
        return step_generator(seed, step, device)

    monkeypatch.setattr(rng, "step_generator", starts)
    yield
    torch.cuda.set_sync_debug_mode("default")


SCENES = {
    "vanilla": [],
    "fast": FAST_TINY,
    "unbounded": [*FAST_TINY, "--contract", "--hull_init", "off", "--resample", 8],
    "fp16": [*FAST_TINY, "--amp", "fp16"],
}


@pytest.mark.parametrize("graph", ["auto", "off"])
@pytest.mark.parametrize("scene", SCENES)
def test_training_a_scene_waits_for_nothing(data, tmp_path, scene, graph, waits_are_errors):
    flags = [*SCENES[scene], *NERF_TINY, "--datadir", data, "--basedir", tmp_path]
    flags += ["--device", GPU, "--cuda_graph", graph, "--i_print", 1000]
    result = run_main(run_nerf.main, *flags, "--N_iters", 4 * READ_EVERY)
    assert result.returncode == 0, result.stderr
    assert "CUDA graphs are not used" not in result.stderr


@pytest.mark.parametrize("extra", [[], ["--albedo_steps", 0, "--n_particles", 2]])
def test_text_to_3d_waits_for_nothing(tmp_path, extra, waits_are_errors):
    flags = [*DREAM_TINY, *extra, "--basedir", tmp_path, "--device", GPU, "--i_print", 1000]
    result = run_main(run_dreamfusion.main, *flags, "--N_iters", 4 * READ_EVERY)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("scene", ["vanilla", "fast", "unbounded"])
def test_a_graph_trains_as_eager_calls_do(data, tmp_path, scene):
    losses = {}
    for graph in ("off", "auto"):
        flags = [*SCENES[scene], *NERF_TINY, "--datadir", data, "--basedir", tmp_path]
        flags += ["--device", GPU, "--cuda_graph", graph, "--tf32", "off", "--expname", graph]
        assert run_main(run_nerf.main, *flags, "--N_iters", 40, "--i_print", 1).returncode == 0
        rows = (tmp_path / graph / "metrics.csv").read_text().splitlines()
        column = rows[0].split(",").index("loss")
        losses[graph] = np.array([float(row.split(",")[column]) for row in rows[1:]])
    # atomics add in any order, so that rounding differs and grows with the steps
    assert np.abs(losses["auto"] / losses["off"] - 1).max() < 0.05
