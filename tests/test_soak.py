"""benchmarks/soak.py: real runs are killed and lose nothing; and it would notice if they did."""

import json
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from helpers import REPOSITORY
from safetensors.torch import save_file

from benchmarks import soak, soak_checks, soak_compare
from nerf.training.checkpoint import save_checkpoint
from nerf.training.files import unfinished_folder

SCRIPT = [sys.executable, str(REPOSITORY / "benchmarks" / "soak.py")]


def soaked(*flags):
    return subprocess.run(
        [*SCRIPT, *map(str, flags)], cwd=REPOSITORY, capture_output=True, text=True, timeout=900
    )


@pytest.mark.slow
def test_kills_of_a_run_lose_nothing():
    done = soaked("--script", "nerf", "--kills", 2)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "'kills': 2" in done.stdout and "'lost': 0" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("script", soak.COMMANDS)
def test_twenty_kills_lose_nothing(script):
    if script == "photos":
        pytest.importorskip("pycolmap", reason="needs pycolmap")
    done = soaked("--script", script, "--kills", 20)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("script", soak.TRAINED)
def test_killing_one_rank_of_two_loses_nothing(script):
    """torchrun ends the other rank and starts both again."""
    done = soaked("--script", script, "--kills", 4, "--ranks", 2)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "'kills': 4" in done.stdout and "'lost': 0" in done.stdout


# ---------------------------------------------------------------------- what the comparison notices


def write(folder, weight=1.0, seconds=1.0):
    """A run folder with one artifact of each kind."""
    folder.mkdir()
    weights = {"layer.weight": torch.tensor([weight, 2.0])}
    content = {"global_step": 8, "network_fn_state_dict": weights, "train_seconds": seconds}
    save_checkpoint(folder / "000008.tar", content)
    (folder / "metrics.csv").write_text(f"step,loss,train_seconds\n8,0.5,{seconds}\n")
    (folder / "metrics.json").write_text(json.dumps({"psnr": 9.0, "seconds_per_view": seconds}))
    (folder / "report.html").write_text(f"<img src='data:image/png;base64,AA=='> {seconds} s")
    (folder / "000.png").write_bytes(b"frame")
    torch.save({"step": 8}, folder / "state.pt")
    return folder


CHANGES = {
    "000008.tar: network_fn_state_dict differ": lambda f: None,
    "metrics.csv: other rows": lambda f: (f / "metrics.csv").write_text("step,loss\n8,0.6\n"),
    "metrics.json: psnr differ": lambda f: (f / "metrics.json").write_text('{"psnr": 8.0}'),
    "report.html: other pictures": lambda f: (f / "report.html").write_text(""),
    "000.png: other bytes": lambda f: (f / "000.png").write_bytes(b"half"),
    "val.csv: left behind": lambda f: (f / "val.csv").write_text("step"),
    "report.html: missing": lambda f: (f / "report.html").unlink(),
    ".x.tmp: left behind": lambda f: (f / ".x.tmp").write_text(""),
    ".x.unfinished: left behind": lambda f: (f / ".x.unfinished").mkdir(),
    "state.pt: other tensors": lambda f: torch.save({"step": 9}, f / "state.pt"),
}


def test_everything_but_times_is_compared(tmp_path):
    one = write(tmp_path / "one")
    assert soak_compare.differences(one, write(tmp_path / "slower", seconds=2.0)) == []
    for number, (said, change) in enumerate(CHANGES.items()):
        other = write(tmp_path / str(number), 1.0 + 1e-6 * (number == 0))
        change(other)
        assert soak_compare.differences(one, other) == [said]


def test_progress_that_is_gone_is_noticed(tmp_path):
    run = write(tmp_path / "run")
    rows = "step,loss\n" + "".join(f"{step},1\n" for step in range(1, 12))
    (run / "metrics.csv").write_text(rows + "9")  # cut short by the kill
    assert soak_checks.progress_lost(run, cadence=4) == (8, "")
    (run / "metrics.csv").write_text(rows + "12,1\n13,1\n")
    step, lost = soak_checks.progress_lost(run, cadence=4)
    assert step == 8 and "13" in lost


def test_fine_tuning_that_is_gone_or_broken_is_noticed(tmp_path):
    home = tmp_path / "run"
    (home / "own_run").mkdir(parents=True)
    said = home.with_suffix(".out")
    said.write_text("step 1/6  loss 0.5\nstep 2/6  loss 0.5\n")
    assert soak_checks.fine_tuning_lost(home, cadence=2) == ""  # it may still be saving
    said.write_text("step 3/6  loss 0.5\n")
    assert "step 3 was logged, the saved state is 0" in soak_checks.fine_tuning_lost(home, 2)
    torch.save({"step": 2}, home / "own_run" / "state.pt")
    assert "own.safetensors is missing" in soak_checks.fine_tuning_lost(home, 2)
    save_file({"a": torch.ones(2)}, home / "own.safetensors")
    assert soak_checks.fine_tuning_lost(home, 2) == ""
    (home / "own.safetensors").write_bytes(b"half")
    assert "broken file" in soak_checks.fine_tuning_lost(home, 2)


def test_what_is_there_must_be_whole_and_may_be_absent(tmp_path):
    unbroken, home = tmp_path / "unbroken", tmp_path / "killed"
    for name in ("root/example.zip", "root/nerf_synthetic/lego/r_0.png"):
        (unbroken / name).parent.mkdir(parents=True, exist_ok=True)
        (unbroken / name).write_text(name)
    (home / "root" / "nerf_synthetic" / ".lego.unpacking").mkdir(parents=True)
    assert soak_checks.half_written("download", unbroken, home) == []
    (home / "root" / "nerf_synthetic" / "lego").mkdir()
    (home / "root" / "example.zip").write_text("root")
    said = soak_checks.half_written("download", unbroken, home)
    assert len(said) == 2
    assert "example.zip/other bytes" in said[0] and "lego/r_0.png: missing" in said[1]


def test_a_process_that_outlives_its_program_is_noticed():
    program = (
        "import os, signal, subprocess\n"
        "from benchmarks import soak_checks\n"
        "soak_checks.PATIENCE = 0.5\n"
        "soak_checks.adopt_orphans()\n"
        "subprocess.run(['sh', '-c', 'true &'])\n"
        "print(soak_checks.left_running(set()))\n"
        "subprocess.run(['sh', '-c', 'sleep 600 & echo $!'])\n"
        "print(soak_checks.left_running(set()))\n"
        "[os.kill(pid, signal.SIGKILL) for pid in soak_checks.children(os.getpid())]"
    )
    lines = subprocess.run(
        [sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True
    ).stdout.splitlines()
    assert "" in lines and any("1 processes still run: sleep 600" in line for line in lines)


def test_a_run_that_fails_is_said(tmp_path, monkeypatch):
    monkeypatch.setitem(soak.COMMANDS, "demo", "data/make_demo.py --out /proc/none/demo")
    given = SimpleNamespace(script="demo", data=None, given={})
    told = soak.one_run(given, tmp_path, "run", 0, None, {})
    assert len(told["lost"]) == 1 and told["lost"][0].startswith("run: exit code 2")


# ------------------------------------------------------------------------------- set-up programs


def test_an_unfinished_folder_is_removed_by_the_next_start_unless_it_is_in_use(tmp_path):
    target = tmp_path / "de[mo]"
    program = (
        "import sys, time; from pathlib import Path; from nerf.training.files import *\n"
        "with unfinished_folder(Path(sys.argv[1])) as folder:\n"
        "    (folder / 'half').write_text('x'); print(folder, flush=True); time.sleep(600)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(target)], cwd=REPOSITORY, stdout=subprocess.PIPE
    )
    line = process.stdout.readline().decode().strip()
    with unfinished_folder(target) as own:
        assert os.listdir(line) == ["half"] and own.is_dir()  # it still runs
    process.kill()
    process.wait()
    process.stdout.close()
    (tmp_path / ".demo.of_others.unfinished").mkdir()
    with unfinished_folder(target):
        assert not os.path.exists(line)
    assert [path.name for path in tmp_path.iterdir()] == [".demo.of_others.unfinished"]


def test_structure_from_motion_ends_with_the_program_that_started_it(tmp_path):
    """A killed from_photos.py leaves no process behind that goes on for hours."""
    child = (
        f"import sys; sys.path[:0] = [{str(REPOSITORY)!r}, {str(REPOSITORY / 'data')!r}]\n"
        "import os, sfm, time\n"
        "sfm.end_with(int(sys.argv[1])); print(os.getpid(), flush=True); time.sleep(600)"
    )
    parent = (
        "import os, subprocess, sys\n"
        f"subprocess.run([sys.executable, '-c', {child!r}, str(os.getpid())])"
    )
    process = subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE)
    number = int(process.stdout.readline())
    os.kill(number, 0)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    end = time.monotonic() + 10
    while time.monotonic() < end and _runs(number):
        time.sleep(0.05)
    assert not _runs(number)


def _runs(number):
    """Whether a process runs; one that ended and that nobody has waited for does not."""
    try:
        with open(f"/proc/{number}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
