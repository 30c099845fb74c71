"""What pytest sets up for all tests: import paths, markers, and the folders that tests share."""

import os
import shutil
import tempfile
from pathlib import Path

import make_demo
import pytest
import torch
from helpers import DEMO_COUNTS, DEMO_SIZE, DREAM_TINY, NERF_TINY, REPOSITORY

# Programs that tests start import this checkout, whatever is installed; pytest itself has the
# same folders from pyproject.toml.
FOLDERS = [REPOSITORY, REPOSITORY / "data", REPOSITORY / "tests"]
os.environ["PYTHONPATH"] = os.pathsep.join(map(str, FOLDERS))
# Tiny tensors: a second thread costs more than it gains, and tests may run beside each other.
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)
# The caller's own variables and defaults must not decide what a test sees.
HOME = tempfile.TemporaryDirectory()
os.environ["XDG_CONFIG_HOME"] = HOME.name
for name in [name for name in os.environ if name.startswith("NERF_")]:
    del os.environ[name]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


# --------------------------------------------------- folders to read; tests change only a copy


def _demo(tmp_path_factory, kind: str) -> Path:
    folder = tmp_path_factory.mktemp("demo") / kind
    make_demo.make(folder, kind, DEMO_SIZE, DEMO_COUNTS)
    return folder


@pytest.fixture(scope="session")
def demo_blender(tmp_path_factory) -> Path:
    """The demo scene in Blender's format."""
    return _demo(tmp_path_factory, "blender")


@pytest.fixture(scope="session")
def demo_llff(tmp_path_factory) -> Path:
    return _demo(tmp_path_factory, "llff")


@pytest.fixture(scope="session")
def demo_deepvoxels(tmp_path_factory) -> Path:
    return _demo(tmp_path_factory, "deepvoxels")


@pytest.fixture(scope="session")
def demo_linemod(tmp_path_factory) -> Path:
    return _demo(tmp_path_factory, "linemod")


@pytest.fixture(scope="session")
def demo_transforms(tmp_path_factory) -> Path:
    return _demo(tmp_path_factory, "transforms")


@pytest.fixture(scope="session")
def demo_colmap(tmp_path_factory) -> Path:
    return _demo(tmp_path_factory, "colmap")


@pytest.fixture
def demo_copy(request, tmp_path):
    """A function: kind -> a copy of the demo scene in that format, to be changed."""

    def copy(kind: str) -> Path:
        folder = tmp_path / kind
        shutil.copytree(request.getfixturevalue(f"demo_{kind}"), folder)
        return folder

    return copy


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    """The demo scene in Blender's format, 20 pixels wide, three test views."""
    folder = tmp_path_factory.mktemp("scene") / "demo"
    make_demo.make(folder, "blender", 20, {"train": 5, "val": 2, "test": 3})
    return folder


@pytest.fixture(scope="session")
def sd_folder(tmp_path_factory) -> Path:
    """A model in Stable Diffusion's layout."""
    from tiny_models import tiny_sd_folder  # importing diffusers takes seconds

    return tiny_sd_folder(tmp_path_factory.mktemp("sd") / "model")


@pytest.fixture(scope="session")
def sd2_folder(tmp_path_factory) -> Path:
    from tiny_models import tiny_sd_folder

    folder = tmp_path_factory.mktemp("sd2") / "model"
    return tiny_sd_folder(folder, "v_prediction", linear_projection=True)


# -------------------------------------------------------------------- flags of runs of a second


@pytest.fixture
def tiny(data, tmp_path) -> list[str]:
    """Flags of a tiny run of run_nerf.py; its run folder is tmp_path / "tiny"."""
    return [*NERF_TINY, "--datadir", str(data), "--basedir", str(tmp_path)]


@pytest.fixture
def tiny_dream(tmp_path) -> list[str]:
    """Flags of a tiny run of run_dreamfusion.py; its run folder is tmp_path / "ball"."""
    return [*DREAM_TINY, "--basedir", str(tmp_path)]
