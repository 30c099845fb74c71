"""The teaching notebooks: they run, and each .ipynb is what its .py makes."""

import pytest
from helpers import REPOSITORY, run_script

SOURCES = sorted((REPOSITORY / "notebooks").glob("*.py"))
NAMES = [source.stem for source in SOURCES]


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A function: run one source with a few steps; what it prints. Its pictures: in tmp_path."""
    monkeypatch.setenv("NOTEBOOK_STEPS", "3")
    monkeypatch.setenv("NOTEBOOK_PICTURES", str(tmp_path))

    def printed(source) -> str:
        done = run_script([], script=str(source))
        assert done.returncode == 0, done.stderr
        return done.stdout

    return printed


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


def test_a_nerf_step_by_step_runs(run, tmp_path):
    printed = run(SOURCES[0])
    assert "a test view:" in printed
    assert {path.name for path in tmp_path.iterdir()} == {"pictures.png", "test_view.png"}


def test_score_distillation_in_two_dimensions_runs(run, tmp_path):
    printed = run(SOURCES[1])
    assert "mean distance from mu" in printed
    assert len(list(tmp_path.iterdir())) == 8
