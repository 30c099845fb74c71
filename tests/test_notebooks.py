"""The teaching notebooks: they run, and each .ipynb is what its .py makes, with its outputs."""

import base64
import io
import json
import re

import numpy as np
import pytest
from helpers import REPOSITORY, run_script
from PIL import Image

SOURCES = sorted((REPOSITORY / "notebooks").glob("*.py"))
NAMES = [source.stem for source in SOURCES]
PICTURES = {"nerf_step_by_step": 4, "sds_in_2d": 9}  # that each notebook shows


def stored_outputs(source) -> list[dict]:
    """All outputs in the .ipynb beside a source, in order."""
    notebook = json.loads(source.with_suffix(".ipynb").read_text())
    return [output for cell in notebook["cells"] for output in cell.get("outputs", [])]


def stored_text(source) -> str:
    """All that the stored run printed."""
    outputs = stored_outputs(source)
    return "".join("".join(output.get("text", "")) for output in outputs)


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


@pytest.mark.parametrize("source", SOURCES, ids=NAMES)
def test_stored_outputs_are_of_one_run_from_top_to_bottom(source):
    cells = json.loads(source.with_suffix(".ipynb").read_text())["cells"]
    counts = [cell["execution_count"] for cell in cells if cell["cell_type"] == "code"]
    assert counts == list(range(1, len(counts) + 1)), "run `make notebooks`"


@pytest.mark.parametrize("source", SOURCES, ids=NAMES)
def test_stored_outputs_are_small_pictures_and_plain_text(source):
    """No warning, no error, no path of the machine that ran it."""
    outputs, pictures = stored_outputs(source), []
    for output in outputs:
        assert output["output_type"] in ("stream", "display_data"), output
        if output["output_type"] == "stream":
            assert output["name"] == "stdout", output["text"]
        else:
            assert list(output["data"]) == ["image/png"]
            pictures.append(Image.open(io.BytesIO(base64.b64decode(output["data"]["image/png"]))))
    assert len(pictures) == PICTURES[source.stem]
    assert all(len(picture.convert("RGB").getcolors(2**20)) > 16 for picture in pictures)
    assert not re.search(r"(^|\s)[/\\~]\w|\w:\\|warning", stored_text(source), re.IGNORECASE)
    assert source.with_suffix(".ipynb").stat().st_size < 400_000


@pytest.mark.slow
def test_a_nerf_step_by_step_runs(run, tmp_path):
    printed = run(SOURCES[0])
    psnr = re.search(r"mean of 5 test views: ([\d.]+) dB", printed)
    # Three steps do not get far: a notebook whose result does not come from its training fails.
    assert psnr and float(psnr[1]) < 20
    names = {"pictures.png", "hull.png", "training.png", "test_views.png"}
    assert {path.name for path in tmp_path.iterdir()} == names


def test_the_stored_nerf_is_recognizable():
    text = stored_text(SOURCES[0])
    each = re.search(r"PSNR of each test view: ([\d., ]+)", text)
    mean = re.search(r"mean of 5 test views: ([\d.]+) dB", text)
    assert each and mean
    psnrs = [float(psnr) for psnr in each[1].split(",")]
    assert float(mean[1]) >= 27
    assert len(psnrs) == 5 and min(psnrs) >= 25
    assert sum(psnrs) / 5 == pytest.approx(float(mean[1]), abs=0.11)  # both were rounded


@pytest.mark.slow
def test_score_distillation_in_two_dimensions_runs(run, tmp_path):
    printed = run(SOURCES[1])
    assert "mean distance from mu" in printed
    assert len(list(tmp_path.iterdir())) == 9
    stem = np.asarray(Image.open(tmp_path / "reweighted.png")).astype(float)
    middle = stem[68:100, 56:72].min(-1), stem[68:100, 128 + 56 : 128 + 72].min(-1)
    assert middle[1].max() > middle[0].max() + 30  # the stem is white where the word counts


def test_the_stored_score_distillation_finds_mu():
    found = re.search(r"mean distance from mu: ([\d.]+)", stored_text(SOURCES[1]))
    assert found and float(found[1]) < 0.03  # of a range of 1; it began at a quarter
