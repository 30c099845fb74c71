"""The ETA, and the progress of what is rendered."""

import re
import types

import pytest
from helpers import run_main

import run_dreamfusion
import run_nerf
from nerf.training import progress
from nerf.training.progress import Clock, Progress, duration, frames


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass only when told to; both clocks show them."""
    now = types.SimpleNamespace(seconds=100.0)
    monkeypatch.setattr(progress.time, "monotonic", lambda: now.seconds)
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now.seconds)
    return now


def test_frames_are_counted_every_ten_seconds(clock):
    said, given = [], []
    for item in frames(list("abcdefgh"), "frame", said.append):
        given.append(item)
        clock.seconds += 4
    assert "".join(given) == "abcdefgh"
    assert said == ["frame 3/8, 20 s left", "frame 6/8, 8 s left"]


def test_frames_of_several_ranks_are_counted_together(clock):
    said = []
    for _ in frames(range(0, 10, 2), "test view", said.append, total=10, stride=2):
        clock.seconds += 60
    assert said == [
        "test view 2/10, 4.0 min left",
        "test view 4/10, 3.0 min left",
        "test view 6/10, 2.0 min left",
        "test view 8/10, 1.0 min left",
    ]
    assert list(frames(range(3), "frame", said.append, show=False)) == [0, 1, 2] and len(said) == 4


def test_a_terminal_gets_a_bar(clock, monkeypatch, capsys):
    monkeypatch.setattr(progress.sys.stderr, "isatty", lambda: True, raising=False)
    said = []
    for _ in frames(range(60), "frame", said.append):
        clock.seconds += 30
    shown = capsys.readouterr().err
    assert said == [] and "frame 12/60" in shown and "\r" in shown and "\n" not in shown


def test_the_eta_counts_the_rendering(clock):
    state = types.SimpleNamespace(step=0, rays_drawn=0, clock=Clock())
    run, said = Progress(100, state, show=False), []
    state.step = 40
    clock.seconds += 20
    run.measure()
    run.report(said.append, "loss 1")
    run.rendering = 90.0
    run.report(said.append, "loss 1")
    state.step, run.rendering = 100, 0.0
    run.report(said.append, "loss 0")
    assert [text.split("ETA ")[1] for text in said] == [
        "30 s, without rendering", duration(30 + 90), "0 s",
    ]  # fmt: skip


def test_a_run_says_where_it_is(tiny, tmp_path, monkeypatch):
    """The time of test views and video is in the ETA once a picture was timed."""
    monkeypatch.setattr(progress, "SECONDS_BETWEEN", 0.0)
    flags = ["--N_iters", 6, "--i_print", 2, "--i_img", 3, "--i_video", 100]
    result = run_main(run_nerf.main, *tiny, *flags)
    assert result.returncode == 0, result.stderr
    etas = re.findall(r"step (\d)/6 .* ETA (.*)", result.stderr)
    assert [step for step, _ in etas] == ["2", "4", "6"]
    assert ["without rendering" in eta for _, eta in etas] == [True, False, False]
    assert re.search(r"test view 1/3, \d+ s left", result.stderr)
    numbers = [int(number) for number in re.findall(r"frame (\d+)/\d+, ", result.stderr)]
    (count,) = set(re.findall(r"frame \d+/(\d+), ", result.stderr))
    assert numbers == list(range(1, int(count)))
    report = (tmp_path / "tiny" / "report.html").read_text(encoding="utf-8")
    assert "test view 1/3" not in report  # among what the run logged besides its progress
    assert "next: open" in result.stderr


def test_an_object_says_where_it_is(tiny_dream, monkeypatch):
    monkeypatch.setattr(progress, "SECONDS_BETWEEN", 0.0)
    flags = ["--N_iters", 6, "--i_print", 2, "--i_img", 3, "--video_frames", 9]
    result = run_main(run_dreamfusion.main, *tiny_dream, *flags)
    assert result.returncode == 0, result.stderr
    etas = re.findall(r"step \d/6 .* ETA (.*)", result.stderr)
    assert ["without rendering" in eta for eta in etas] == [True, False, False]
    assert re.findall(r"frame (\d)/9, ", result.stderr) == ["4", "8"]
