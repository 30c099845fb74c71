"""benchmarks/soak.py: real runs are killed and lose nothing; and it would notice if they did."""

import random
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from helpers import REPOSITORY

from benchmarks import soak

SCRIPT = [sys.executable, str(REPOSITORY / "benchmarks" / "soak.py")]


def soaked(*flags):
    return subprocess.run(
        [*SCRIPT, *map(str, flags)], cwd=REPOSITORY, capture_output=True, text=True, timeout=900
    )


def test_two_kills_lose_nothing():
    done = soaked("--script", "dreamfusion", "--kills", 2)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "'kills': 2" in done.stdout and "'lost': []" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("script", soak.COMMANDS)
def test_twenty_kills_lose_nothing(script, demo_blender):
    data = ["--data", demo_blender] if script == "nerf" else []
    done = soaked("--script", script, "--kills", 20, *data)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("script", soak.COMMANDS)
def test_killing_one_rank_of_two_loses_nothing(script, demo_blender):
    """torchrun ends the other rank and starts both again."""
    data = ["--data", demo_blender] if script == "nerf" else []
    done = soaked("--script", script, "--kills", 4, "--ranks", 2, *data)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "'kills': 4" in done.stdout and "'lost': []" in done.stdout


def write(folder, step, weight):
    torch.save(
        {"global_step": step, "network_fn_state_dict": {"w": torch.tensor([weight])}},
        folder / f"{step:06d}.tar",
    )


def test_it_notices_weights_that_differ_and_progress_that_is_gone(tmp_path):
    write(tmp_path, 8, 1.0)
    other = tmp_path / "other"
    other.mkdir()
    write(other, 8, 1.0 + 1e-7)
    same, apart = tmp_path / "000008.tar", other / "000008.tar"
    assert soak.differences(same, same) == []
    assert soak.differences(same, apart) == ["network_fn_state_dict"]
    rows = "step,loss\n" + "".join(f"{step},1\n" for step in range(1, 12))
    (tmp_path / "metrics.csv").write_text(rows + "9")  # cut short by the kill
    assert soak.after_kill(tmp_path) == (8, "")
    (tmp_path / "metrics.csv").write_text(rows + "12,1\n13,1\n")
    step, lost = soak.after_kill(tmp_path)
    assert step == 8 and "13" in lost


def test_a_run_that_fails_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(soak, "start", lambda *_: subprocess.Popen([sys.executable, "-c", "1/0"]))
    told = soak.one_run(SimpleNamespace(), tmp_path, "run", 0, random.Random(0), 0.0)
    assert told["lost"] == ["run: exit code 1"]
