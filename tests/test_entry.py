"""How a script ends where no step has to be saved: one line, an exit code, nothing left behind."""

import os
import signal
import time

import pytest
from helpers import NERF_TINY, run_main

import run_nerf
from nerf.training import entry


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
