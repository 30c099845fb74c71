"""How a script ends where no step has to be saved: one line, an exit code, nothing left behind."""

import os
import signal
import subprocess
import sys
import tempfile
import time

import pytest
from helpers import NERF_TINY, REPOSITORY, run_main

import run_nerf
from nerf.training import entry, interrupts, last_net, launch


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_while_data_are_read_is_one_line_and_leaves_no_folder(
    data, tmp_path, monkeypatch, request, number, code
):
    before = signal.getsignal(signal.SIGTERM)
    # As in a script's own process; processes of pytest-xdist ignore SIGINT.
    interrupts = signal.signal(signal.SIGINT, signal.default_int_handler)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, interrupts))

    def slow(args, log):
        log("reading")
        os.kill(os.getpid(), number)
        time.sleep(5)
        raise AssertionError("the signal comes first")

    monkeypatch.setattr(run_nerf, "load_scene", slow)
    result = run_main(run_nerf.main, *NERF_TINY, "--datadir", data, "--basedir", tmp_path)
    assert result.returncode == code and "Traceback" not in result.stderr
    assert result.stderr.splitlines()[-1].startswith("run_nerf.py: stopped by ")
    assert not list(tmp_path.iterdir())
    assert signal.getsignal(signal.SIGTERM) is before


def test_mistakes_and_full_disks_have_codes_of_their_own(capsys):
    def fail(error):
        raise error

    assert entry.exit_code("x", lambda: fail(ValueError("wrong"))) == 2
    assert entry.exit_code("x", lambda: fail(OSError("full"))) == 3
    assert capsys.readouterr().err == "x: wrong\nx: full\n"


def test_what_nobody_expected_is_one_line_and_its_traceback_a_file(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def fail():
        raise KeyError("a\nb\x1b[31m")

    assert entry.exit_code("x.py", fail) == 1
    said = capsys.readouterr().err
    (file,) = tmp_path.iterdir()
    assert said.count("\n") == 1 and said.startswith("x.py: unexpected KeyError: ")
    assert str(file) in said and "\x1b" not in said
    assert (
        "    Traceback (most recent call last)" in file.read_text() and "fail" in file.read_text()
    )


def test_the_traceback_of_a_run_is_in_its_log(tiny, tmp_path, monkeypatch):
    def fail(*given):
        raise AssertionError("no such shape")

    monkeypatch.setattr(run_nerf, "log_step", fail)
    result = run_main(run_nerf.main, *tiny, "--N_iters", 6)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    log = tmp_path / "tiny" / "log.txt"
    line = result.stderr.splitlines()[-1]
    assert line.startswith("run_nerf.py: unexpected AssertionError: no such shape; ")
    assert (
        str(log) in line and "Traceback" in log.read_text() and "train_attempt" in log.read_text()
    )
    monkeypatch.setattr(run_nerf.nerf_flags, "parse", fail)  # before there is a run
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert run_main(run_nerf.main, *tiny).returncode == 1
    assert list(tmp_path.glob("run_nerf.py.*.traceback.txt"))


# ------------------------------------------------------------------------------- the environment

PLACES = {
    "RANK=0": "RANK='0' is set and WORLD_SIZE is not",
    "WORLD_SIZE=2": "WORLD_SIZE='2' is set and RANK is not",
    "RANK=2 WORLD_SIZE=2": "RANK='2', expected a whole number from 0 to 1",
    "RANK=-1 WORLD_SIZE=2": "RANK='-1'",
    "RANK=² WORLD_SIZE=2": "RANK='²'",
    "RANK=0 WORLD_SIZE=two": "WORLD_SIZE='two'",
    "RANK=0 WORLD_SIZE=0": "WORLD_SIZE='0'",
    f"RANK=0 WORLD_SIZE={10**30}": "WORLD_SIZE='1000",
    "RANK=0 WORLD_SIZE=2 LOCAL_RANK=7": "LOCAL_RANK='7'",
    "LOCAL_RANK=first": "LOCAL_RANK='first'",
    "RANK=0 WORLD_SIZE=2": "MASTER_ADDR is not set",
    "RANK=0 WORLD_SIZE=2 MASTER_ADDR=127.0.0.1": "MASTER_PORT is not set",
    "RANK=0 WORLD_SIZE=2 MASTER_ADDR=127.0.0.1 MASTER_PORT=http": "MASTER_PORT='http'",
    "RANK=0 WORLD_SIZE=2 MASTER_ADDR=127.0.0.1 MASTER_PORT=99999": "MASTER_PORT='99999'",
}


@pytest.mark.parametrize("variables", PLACES)
def test_a_contradictory_environment_is_one_line(tiny, tmp_path, monkeypatch, variables):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for pair in variables.split():
        monkeypatch.setenv(*pair.split("="))
    result = run_main(run_nerf.main, *tiny, "--N_iters", 1)
    assert result.returncode == 2 and result.stderr.count("\n") == 1
    assert PLACES[variables] in result.stderr and "torchrun" in result.stderr
    assert not list(tmp_path.iterdir())


def test_places_that_torchrun_gives():
    meeting = {"MASTER_ADDR": "host", "MASTER_PORT": "29500"}
    assert launch.find_place({}) == (0, 1, 0)
    one = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    assert launch.find_place(one) == (0, 1, 0)
    four = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", **meeting}
    assert launch.find_place(four) == (3, 4, 1)


# ---------------------------------------------------------------------------------------- Ctrl-C


def interrupted(seconds: float, script: str, *flags, again: float | None = None, **options):
    """(exit code, stderr) of a script that gets SIGINT after ``seconds``, perhaps ``again``."""
    process = subprocess.Popen(
        [sys.executable, script, *map(str, flags)], cwd=REPOSITORY, stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL, text=True, preexec_fn=default_interrupts, **options,
    )  # fmt: skip
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    if again is not None:
        time.sleep(again)
        process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=120)
    return process.returncode, said


def default_interrupts():
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # of which Python makes KeyboardInterrupt


IMPORTING = """
import os, runpy, signal, sys, time
class Interrupting:
    def find_spec(self, name, *more):
        if name == sys.argv[2]:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(5)
sys.meta_path.insert(0, Interrupting())
sys.path[:0] = [".", "data"]
runpy.run_path(sys.argv[1], run_name="__main__")
"""


def test_ctrl_c_while_a_program_imports_what_it_needs_is_one_line():
    for program in interrupts.PROGRAMS:
        imported = "lzma" if program == "data/download.py" else "numpy"
        result = subprocess.run(
            [sys.executable, "-c", IMPORTING, program, imported], cwd=REPOSITORY,
            capture_output=True, text=True, timeout=60, preexec_fn=default_interrupts,
        )  # fmt: skip
        assert result.returncode == 130, (program, result.stderr)
        assert result.stderr.endswith(": stopped by Ctrl-C\n") and result.stderr.count("\n") == 1


def test_ctrl_c_in_the_first_second_is_one_line(data, tmp_path):
    for script in ("run_nerf.py", "run_dreamfusion.py"):
        flags = [*NERF_TINY, "--datadir", data, "--basedir", tmp_path] if "nerf" in script else []
        code, said = interrupted(0.8, script, *flags)
        assert code == 130 and said == f"{script}: stopped by Ctrl-C\n"
    assert not list(tmp_path.iterdir())


def test_an_unexpected_error_of_a_program_is_one_line_with_its_traceback_in_a_file(
    monkeypatch, tmp_path, capsys
):
    def fail():
        raise ZeroDivisionError("nobody\nexpected")

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert last_net.exit_code("make_demo.py", fail) == 1
    said = capsys.readouterr().err
    assert said.startswith(
        "make_demo.py: unexpected ZeroDivisionError: nobody; its traceback is in"
    )
    assert said.count("\n") == 1
    assert 'raise ZeroDivisionError("nobody' in next(tmp_path.iterdir()).read_text()


def test_a_second_ctrl_c_while_cleaning_up_ends_at_once(request):
    before = signal.getsignal(signal.SIGINT)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    code = """
import os, signal, sys, time
from nerf.training import entry, interrupts
def work():
    try:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)
    finally:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)
        print("not reached", file=sys.stderr)
sys.argv = ["x.py"]
sys.exit(entry.exit_code("x.py", work))
"""
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, timeout=60,
        preexec_fn=default_interrupts,
    )  # fmt: skip
    assert result.returncode == 130 and result.stderr == "x.py: stopped by Ctrl-C\n"


@pytest.mark.slow
@pytest.mark.parametrize("mode", [["--N_iters", "9999"], ["--render_only"], ["--export", "a.glb"]])
def test_ctrl_c_at_any_moment_is_130_and_no_traceback(data, tmp_path, mode):
    flags = [*NERF_TINY, "--datadir", data, "--basedir", tmp_path, "--mesh_res", "200"]
    assert run_main(run_nerf.main, *flags, "--N_iters", 3).returncode == 0
    mode = [word.replace("a.glb", str(tmp_path / "a.glb")) for word in mode]
    done, began = 0, time.monotonic()
    subprocess.run([sys.executable, "-c", "import nerf.training.installed"], cwd=REPOSITORY)
    started = 1.5 * (time.monotonic() - began) + 0.1
    for number in range(14):
        again = (None, 0.0, 0.05)[number % 3]
        code, said = interrupted(started + 0.4 * number, "run_nerf.py", *flags, *mode, again=again)
        done += code in (0, -2)
        # -2: met while Python itself ends, all work being done; a shell calls that 130 too
        assert code in (130, 0, -2) and "Traceback" not in said, said
    assert done < 10
