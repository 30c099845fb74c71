"""The run folder: removed, spoiled or full of links while a run needs it."""

import json
import os
import shutil

import pytest
from helpers import NERF_TINY, run_main

import run_dreamfusion
import run_nerf
from nerf.outputs import report
from nerf.training import checkpoint, logged
from nerf.training.checkpoint import list_checkpoints
from nerf.training.run_folder import RunFolder

RECORDS = {"args.json", "args.txt", "cmd.txt", ".lock", "log.txt"}


def spoil_after(monkeypatch, step: int, spoil) -> None:
    """Call ``spoil`` after the checkpoint of ``step`` was written."""
    save = checkpoint.save_checkpoint

    def save_and_spoil(path, state):
        save(path, state)
        if path.name == f"{step:06d}.tar":
            spoil()

    monkeypatch.setattr(checkpoint, "save_checkpoint", save_and_spoil)


@pytest.mark.parametrize("removed", ["all", "contents"])
def test_a_folder_removed_while_running_comes_back_with_its_records(
    tiny, tmp_path, monkeypatch, removed
):
    run = tmp_path / "tiny"

    def remove():
        if removed == "all":
            shutil.rmtree(run)
        else:  # rm -r run/*
            for path in run.glob("[!.]*"):
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    spoil_after(monkeypatch, 5, remove)
    flags = [*tiny, "--i_weights", 5, "--i_print", 2, "--config", "configs/lego.txt"]
    result = run_main(run_nerf.main, *flags, "--N_iters", 15)
    assert result.returncode == 0 and "removed during the run" in result.stderr
    there = {path.name for path in run.iterdir()}
    assert there >= RECORDS | {"config.txt", "world.json", "metrics.json", "report.html"}
    assert json.loads((run / "args.json").read_text())["N_iters"] == 15
    assert run_nerf.nerf_flags.parse(["--config", str(run / "args.txt")]).N_iters == 15
    assert (run / "cmd.txt").read_text().startswith("# 20")  # the date of the command
    log = (run / "log.txt").read_text()
    assert "removed during the run" in log and "step 15/15" in log
    assert [path.name for path in list_checkpoints(run)] == ["000015.tar", "000010.tar"]
    assert [line.split(",")[0] for line in (run / "metrics.csv").read_text().splitlines()][
        -1
    ] == "15"
    assert run_main(run_nerf.main, *flags, "--N_iters", 17).returncode == 0  # it resumes


def test_a_folder_removed_after_the_last_checkpoint_is_told_by_the_exit_code(
    tiny_dream, tmp_path, monkeypatch
):
    run = tmp_path / "ball"
    spoil_after(monkeypatch, 4, lambda: shutil.rmtree(run))
    result = run_main(run_dreamfusion.main, *tiny_dream, "--no-mesh", "--N_iters", 4)
    assert result.returncode == 3
    assert (
        "not everything is on the disk: checkpoint (removed with the run folder)" in result.stderr
    )
    assert {path.name for path in run.iterdir()} >= RECORDS


# -------------------------------------------------------------------------------------- links

LINKS = ["log.txt", "metrics.json", "metrics.csv", "args.json", "cmd.txt", ".lock", "previews",
         ".args.json.tmp", "val_strip.png", "config.txt", "tb", "render_path_000004"]  # fmt: skip


@pytest.mark.parametrize("name", LINKS)
def test_what_a_run_writes_must_not_be_a_link(data, tmp_path, name):
    outside, run = tmp_path / "outside", tmp_path / "logs" / "tiny"
    run.mkdir(parents=True)
    folder = name in ("previews", "tb") or name.startswith("render")
    (outside / "kept").mkdir(parents=True) if folder else outside.write_text("mine")
    (run / name).symlink_to(outside)
    words = [*NERF_TINY, "--datadir", data, "--basedir", tmp_path / "logs", "--N_iters", 1]
    for more in ([], ["--render_only"]):
        result = run_main(run_nerf.main, *words, *more)
        assert result.returncode == 2 and "Traceback" not in result.stderr
        assert f"{name} is a symbolic link" in result.stderr.splitlines()[-1]
    left = [p.name for p in outside.iterdir()] if folder else outside.read_text()
    assert left == (["kept"] if folder else "mine") and (run / name).is_symlink()


def test_a_pipe_is_refused_and_does_not_hang(tmp_path):
    os.mkfifo(tmp_path / "log.txt")
    with pytest.raises(ValueError, match=r"log.txt is neither a file nor a folder"):
        RunFolder(tmp_path, is_main=True, lock=True)
    (tmp_path / "log.txt").unlink()
    (tmp_path / "render_test_000001").mkdir()
    (tmp_path / "render_test_000001" / "000.png").symlink_to("/dev/full")
    with pytest.raises(ValueError, match=r"000.png is a symbolic link"):
        RunFolder(tmp_path, is_main=True, lock=False)


def test_links_made_while_running_are_not_written_through(tmp_path):
    outside = tmp_path / "outside"
    outside.write_text("mine")
    names = [
        "log.txt",
        "metrics.csv",
        "args.json",
        ".best.json.tmp",
        "000004.tar",
        ".000004.tar.tmp",
    ]
    with RunFolder(tmp_path / "run", is_main=True, lock=True) as run:
        for name in names:
            (run.folder / name).symlink_to(outside)
        run.log("hello")
        run.scalars(3, {"loss": 1.0})
        run.write_json("args.json", {"a": 1})
        run.write_json("best.json", {"a": 1})
        checkpoint.save_checkpoint(
            run.folder / "000004.tar", {"global_step": 4, "network_fn_state_dict": {}}
        )
        assert run.exit_code() == 3 and "log.txt" in run.failed  # what could not be replaced
        assert checkpoint.load_checkpoint(run.folder / "000004.tar")["global_step"] == 4
    assert outside.read_text() == "mine"


def test_a_run_folder_that_is_a_link_itself_is_normal(tiny, tmp_path):
    (tmp_path / "scratch").mkdir()
    (tmp_path / "tiny").symlink_to(tmp_path / "scratch")
    for steps in (2, 4):
        assert run_main(run_nerf.main, *tiny, "--N_iters", steps).returncode == 0
    assert (tmp_path / "tiny").is_symlink() and (tmp_path / "scratch" / "000004.tar").is_file()


# ------------------------------------------------------------------------------------- tables

DAMAGED = {
    "a step that is a digit and no number": ("2,0.5,10", "²,0.5,10", "row 3: '²' is not a step"),
    "a cell that is a text": ("2,0.5,10", "2,abc,10", "row 3: 'abc' is not a number (loss)"),
    "other digits": ("2,0.5,10", "2,٣,10", "is not a number (loss)"),
    "a cell with an underscore": ("2,0.5,10", "2,1_0,10", "row 3: '1_0' is not a number (loss)"),
    "a cell too many": ("2,0.5,10", "2,0.5,10,4", "row 3: 4 cells for 3 columns"),
    "zeros of a disk": ("2,0.5,10", "\0" * 30, "row 3: "),
    "an empty row": ("2,0.5,10", "", "row 3: '' is not a step"),
    "a step of 5000 digits": ("2,0.5,10", "9" * 5000 + ",0.5,10", "row 3: "),
    "a step below 0": ("2,0.5,10", "-2,0.5,10", "row 3: "),
    "a header of no table": ("step,loss,psnr", "loss,psnr", "row 1: the first column is 'loss'"),
    "a header with a name twice": ("step,loss,psnr", "step,loss,loss", "row 1: "),
    "a header of zeros": ("step,loss,psnr", "step,\0\0\0,psnr", "row 1: "),
}


@pytest.mark.parametrize("case", DAMAGED)
@pytest.mark.parametrize("table", ["metrics.csv", "val.csv"])
def test_a_damaged_cell_names_file_and_row_and_heals(tmp_path, table, case):
    good, bad, words = DAMAGED[case]
    path, text = tmp_path / table, "step,loss,psnr\n1,0.7,\n2,0.5,10\n3,nan,11\n9,0.1,12\n"
    path.write_text(text.replace(good, bad), encoding="utf-8")
    if not bad.startswith("9" * 5000):
        report._columns(path)
    with RunFolder(tmp_path, is_main=True, lock=True) as run:
        run.scalars(4, {"loss": 0.4, "psnr": 13.0}, table)
        run.scalars(5, {"loss": 0.3, "psnr": 14.0}, table)
    (line,) = [each for each in (tmp_path / "log.txt").read_text().splitlines() if table in each]
    assert f"{table}: row " in line and words in line and "left out" in line
    rows = ["1,0.7,", "3,nan,11"] if good.startswith("2") else []
    assert path.read_text().split("\n") == ["step,loss,psnr", *rows, "4,0.4,13", "5,0.3,14", ""]
    assert logged.Table(path, 6, ["loss"]).damaged == []
    curves = report._columns(path)
    assert curves["psnr"][0].tolist() == ([3.0] if rows else []) + [4.0, 5.0]
