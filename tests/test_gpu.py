"""A GPU gives the CPU's pictures: a checkpoint trained on one is rendered on both."""

import imageio.v3 as iio
import numpy as np
import pytest
from helpers import DREAM_TINY, FAST_TINY, NERF_TINY, run_main

import run_dreamfusion
import run_nerf

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
