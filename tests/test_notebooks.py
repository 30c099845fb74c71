"""The teaching notebooks: they run, and each .ipynb is what its .py makes."""

import os
import subprocess
import sys

import pytest
from helpers import REPOSITORY

SOURCES = sorted((REPOSITORY / "notebooks").glob("*.py"))
NAMES = [source.stem for source in SOURCES]


def run(source, tmp_path):
    """Run one source with a few steps; what it prints. Its pictures are then in tmp_path."""
    environment = {**os.environ, "NOTEBOOK_STEPS": "8", "NOTEBOOK_PICTURES": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, source], cwd=REPOSITORY, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_there_are_two():
    assert NAMES == ["nerf_step_by_step", "sds_in_2d"]


@pytest.mark.parametrize("source", SOURCES, ids=NAMES)
def test_a_notebook_is_what_its_source_makes(source):
    jupytext = pytest.importorskip("jupytext")
    made, kept = jupytext.read(source), jupytext.read(source.with_suffix(".ipynb"))
    assert [(c.cell_type, c.source) for c in made.cells] == [
        (c.cell_type, c.source) for c in kept.cells
    ], "run `make notebooks`"
    assert not any(cell.get("outputs") for cell in kept.cells)


def test_a_nerf_step_by_step_runs(tmp_path):
    printed = run(SOURCES[0], tmp_path)
    assert "a test view:" in printed
    assert {path.name for path in tmp_path.iterdir()} == {"pictures.png", "test_view.png"}


def test_score_distillation_in_two_dimensions_runs(tmp_path):
    printed = run(SOURCES[1], tmp_path)
    assert "mean distance from mu" in printed
    assert len(list(tmp_path.iterdir())) == 8
