"""configs/by_device.table: flags that have one value on a CPU and another on a GPU."""

import json

import pytest
import torch
from helpers import FAST_TINY, NERF_TINY, REPOSITORY, run_main

import run_nerf
from nerf.flags import by_device, dreamfusion, nerf

FAST = {"target_samples": 262144, "grid_res": 512, "march_steps": 512}
LEGO = ["--config", str(REPOSITORY / "configs/lego_fast.txt")]


@pytest.fixture
def gpu(monkeypatch):
    """The parsers believe that there is a GPU."""
    monkeypatch.setattr(by_device, "choose_device", lambda name: torch.device("cuda"))


def test_every_row_names_a_flag_and_both_values_are_valid():
    parsers = {"dream_tiny": dreamfusion.dream_parser()}
    for group, rows in by_device.read_table().items():
        parser = parsers.get(group) or nerf.nerf_parser()
        for flag, values in rows.items():
            for text in values:
                by_device._parsed(parser, flag, text, by_device.TABLE)


def test_every_group_that_a_config_names_is_there():
    named = [
        line.split("=")[1].strip()
        for path in (REPOSITORY / "configs").glob("*.txt")
        for line in path.read_text().splitlines()
        if line.startswith("by_device =")
    ]
    assert len(named) >= 5 and set(named) <= set(by_device.read_table())


def test_a_cpu_keeps_the_values_that_the_configs_had(tmp_path):
    args = nerf.parse([*LEGO, "--basedir", str(tmp_path)])
    assert (args.target_samples, args.grid_res, args.march_steps) == (8192, 128, 128)
    assert args.N_iters == 6000
    assert "for a CPU (--by_device lego_fast): target_samples 8192" in args.notes[0]
    config = str(REPOSITORY / "configs/capture360_fast.txt")
    args = nerf.parse(["--config", config, "--basedir", str(tmp_path)])
    assert (args.target_samples, args.grid_res, args.march_steps) == (16384, 256, 64)
    config = str(REPOSITORY / "configs/dream_tiny.txt")
    args = dreamfusion.parse(["--config", config, "--basedir", str(tmp_path), "--prompt", "a cone"])
    assert (args.mesh_res, args.eval_res) == (96, 128)


def test_a_gpu_takes_its_own_and_a_flag_that_is_set_wins(gpu, tmp_path):
    args = nerf.parse([*LEGO, "--basedir", str(tmp_path)])
    assert {name: getattr(args, name) for name in FAST} == FAST and "for a GPU" in args.notes[0]
    args = nerf.parse([*LEGO, "--basedir", str(tmp_path), "--grid_res", "64"])
    assert args.grid_res == 64 and args.target_samples == 262144 and "grid_res" not in args.notes[0]
    args = nerf.parse(["--fast", "--basedir", str(tmp_path)])
    assert args.target_samples == 262144
    args = nerf.parse(["--occ_grid", "--basedir", str(tmp_path)])
    assert args.target_samples == 8192 and args.notes == []


def test_a_run_keeps_the_values_with_which_it_began(gpu, tmp_path):
    (tmp_path / "lego_fast").mkdir()
    record = {"target_samples": 8192, "grid_res": 128, "march_steps": 128, "N_iters": 6000}
    (tmp_path / "lego_fast" / "args.json").write_text(json.dumps(record))
    args = nerf.parse([*LEGO, "--basedir", str(tmp_path)])
    assert args.grid_res == 128 and "on which this run began" in args.notes[0]
    args = nerf.parse([*LEGO, "--basedir", str(tmp_path), "--no_reload"])
    assert args.grid_res == 512


@pytest.mark.parametrize("typed", [{"N_iters": 405}, {"N_iters": 405, "march_steps": 64}])
def test_what_was_typed_for_a_trial_run_is_not_chosen_by_device(gpu, tmp_path, typed):
    """A short first run: the plain config then trains to its own end, as one without a group."""
    (tmp_path / "lego_fast").mkdir()
    table = {"target_samples": 8192, "grid_res": 128, "march_steps": 128, "N_iters": 6000}
    (tmp_path / "lego_fast" / "args.json").write_text(json.dumps(table | typed))
    args = nerf.parse([*LEGO, "--basedir", str(tmp_path)])
    assert {name: getattr(args, name) for name in table} == table  # still those of a CPU
    assert "N_iters 6000" in args.notes[0] and "405" not in args.notes[0]
    args = nerf.parse([*LEGO, "--basedir", str(tmp_path), "--N_iters", "7000"])
    assert args.N_iters == 7000


def test_a_run_whose_values_were_all_typed_takes_those_of_this_device(gpu, tmp_path):
    (tmp_path / "lego_fast").mkdir()
    (tmp_path / "lego_fast" / "args.json").write_text(json.dumps({"N_iters": 405, "grid_res": []}))
    args = nerf.parse([*LEGO, "--basedir", str(tmp_path)])
    assert args.N_iters == 20000 and "began" not in args.notes[0]


def test_the_log_and_the_record_hold_what_was_chosen(data, tmp_path, gpu):
    flags = [*FAST_TINY, *NERF_TINY, "--datadir", data, "--basedir", tmp_path, "--N_iters", 1]
    flags += ["--grid_res", 16]
    result = run_main(run_nerf.main, *flags)
    assert result.returncode == 0, result.stderr
    log = (tmp_path / "tiny" / "log.txt").read_text()
    assert "settings for a GPU (--by_device fast): march_steps 512\n" in log
    args = json.loads((tmp_path / "tiny" / "args.json").read_text())
    assert args["march_steps"] == 512 and args["grid_res"] == 16 and args["by_device"] == "fast"
    # Its own record holds every value: nothing is chosen again.
    again = nerf.parse(["--config", str(tmp_path / "tiny" / "args.txt"), "--expname", "other"])
    assert again.notes == [] and again.march_steps == 512


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ("fast.grid_res = 128", "expected group.flag = cpu | gpu"),
        ("fast.pace = 1 | 2", "pace is not a flag"),
        ("fast.grid_res = 128 | many", "many"),
        ("other.grid_res = 16 | 32", "has the groups other"),
    ],
)
def test_a_broken_table_is_one_line(tmp_path, monkeypatch, capsys, gpu, row, problem):
    table = tmp_path / "by_device.table"
    table.write_text(f"# a comment\n{row}\n")
    monkeypatch.setattr(by_device.choose_by_device, "__defaults__", (table,))
    with pytest.raises(SystemExit) as stopped:
        nerf.parse(["--fast", "--basedir", str(tmp_path)])
    assert stopped.value.code == 2
    assert problem in capsys.readouterr().err.splitlines()[-1]
