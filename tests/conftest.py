"""What the tests share: import paths, small demo scenes in every format, the script runner."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import make_demo
import pytest
import torch

REPOSITORY = Path(__file__).resolve().parents[1]
# Programs that tests start import this checkout, whatever is installed; pytest itself has the
# same folders from pyproject.toml.
FOLDERS = [REPOSITORY, REPOSITORY / "data", REPOSITORY / "tests"]
os.environ["PYTHONPATH"] = os.pathsep.join(map(str, FOLDERS))

DEMO_SIZE = 32
DEMO_COUNTS = {"train": 6, "val": 2, "test": 2}

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _no_nerf_variables(monkeypatch):
    """The caller's own NERF_* variables must not decide what a test sees."""
    for name in list(os.environ):
        if name.startswith("NERF_"):
            monkeypatch.delenv(name)


def _demo(tmp_path_factory, kind: str) -> Path:
    folder = tmp_path_factory.mktemp("demo") / kind
    make_demo.make(folder, kind, DEMO_SIZE, DEMO_COUNTS)
    return folder


@pytest.fixture(scope="session")
def demo_blender(tmp_path_factory) -> Path:
    """The demo scene in Blender's format. As all demo folders: read it, change only a copy."""
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


def run_script(args, launcher=(), script="run_nerf.py", **kw) -> subprocess.CompletedProcess:
    """``python script *args`` in the repository's root, its text captured."""
    environment = {key: text for key, text in os.environ.items() if not key.startswith("NERF_")}
    environment.setdefault("OMP_NUM_THREADS", "1")
    settings = {"cwd": REPOSITORY, "env": environment, "timeout": 120}
    command = [sys.executable, *launcher, script, *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, **{**settings, **kw})
