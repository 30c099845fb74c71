"""How fast the machine is, what is chosen before torch is imported, and --dry_run."""

import csv
import math
import os
import re
import subprocess
import sys
import types

import pytest
import torch
from helpers import CPU, REPOSITORY, run_main, run_script
from torch import nn

import run_dreamfusion
import run_nerf
from nerf import build_outputs
from nerf.encodings import TriPlane
from nerf.field import FeatureField, NeRFField
from nerf.outputs import forecast
from nerf.training import machine, progress, startup
from nerf.training.progress import Clock, Progress, amount

# ------------------------------------------------------------------------ threads and memory


def test_threads_sleep_only_where_one_of_them_is_disturbed():
    assert startup.waiting_variables({}, 1.0) == {}
    assert startup.waiting_variables({}, startup.ALONE) == {}
    assert startup.waiting_variables({}, 0.5) == {"OMP_WAIT_POLICY": "passive"}


@pytest.mark.parametrize("name", startup.WAITING)
def test_the_users_own_way_of_waiting_stays(name, monkeypatch):
    assert startup.waiting_variables({name: "active"}, 0.1) == {}
    monkeypatch.setattr(startup, "smallest_share", lambda threads: pytest.fail("needless"))
    environment = {name: "1000", "OMP_NUM_THREADS": "2"}
    assert f"{name}=1000" in startup.prepare(environment)
    assert environment == {name: "1000", "OMP_NUM_THREADS": "2"}


def test_a_quota_below_the_cpus_seen_limits_the_threads():
    assert startup.thread_variables({}, 8, math.inf) == {}
    assert startup.thread_variables({}, 8, 8.0) == {}
    assert startup.thread_variables({}, 8, 2.5) == {"OMP_NUM_THREADS": "2"}
    assert startup.thread_variables({}, 8, 0.5) == {"OMP_NUM_THREADS": "1"}
    assert startup.thread_variables({"OMP_NUM_THREADS": "6"}, 8, 2.5) == {}


def test_quotas_of_both_kinds_of_control_groups(tmp_path):
    """A limit of the process' own group, or of one above it."""
    own = tmp_path / "own"
    assert startup.quota(tmp_path, own) == math.inf
    own.write_text("3:cpu,cpuacct:/jobs/7\n2:memory:/other\n")
    for name in ("cpu", "cpu/jobs", "cpu/other", "jobs"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "cpu.cfs_period_us").write_text("100000\n")
        (tmp_path / name / "cpu.cfs_quota_us").write_text("-1\n")
    assert startup.quota(tmp_path, own) == math.inf
    (tmp_path / "cpu/other/cpu.cfs_quota_us").write_text("50000\n")
    assert startup.quota(tmp_path, own) == math.inf
    (tmp_path / "cpu/jobs/cpu.cfs_quota_us").write_text("150000\n")
    assert startup.quota(tmp_path, own) == 1.5
    own.write_text("0::/jobs/7\n")
    for text, expected in (("max 100000\n", math.inf), ("50000 100000\n", 0.5), ("?", math.inf)):
        (tmp_path / "jobs" / "cpu.max").write_text(text)
        assert startup.quota(tmp_path, own) == expected


def test_two_threads_for_one_cpu_get_half_each(monkeypatch):
    """The look notices that there are fewer cores than threads."""
    if not hasattr(os, "sched_setaffinity"):
        pytest.skip("needs sched_setaffinity")
    allowed = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(allowed)})
        assert startup.usable_cpus() == 1
        share = startup.smallest_share(2, 0.1)
    finally:
        os.sched_setaffinity(0, allowed)
    assert share < 0.7  # a half, and the switches are coarse
    environment = {"OMP_NUM_THREADS": "2"}
    monkeypatch.setattr(startup, "smallest_share", lambda threads: share)
    assert "sleep" in startup.prepare(environment)
    assert environment["OMP_WAIT_POLICY"] == "passive"
    monkeypatch.setattr(startup, "smallest_share", lambda threads: 0.99)
    assert "spin" in startup.prepare(spinning := {"OMP_NUM_THREADS": "2"})
    assert "OMP_WAIT_POLICY" not in spinning


def python(code: str, **variables: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True,
        env={**os.environ, **variables},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_nothing_is_chosen_once_torch_is_there():
    """Importing it in somebody's own program changes nothing there."""
    code = (
        "import os, torch; before = dict(os.environ); from nerf.training import startup\n"
        "print(startup.threads_line == '', dict(os.environ) == before)"
    )
    assert python(code, OMP_NUM_THREADS="2").split() == ["True", "True"]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="counts Linux' page faults")
def test_freed_blocks_are_kept_for_the_next_ones():
    """Tensors of 8 MB, 2048 pages, made and freed again: fresh pages only for the first ones."""
    code = (
        "from nerf.training import startup; import os, resource, torch\n"
        "count = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "for n in range(40):\n"
        "    before = count() if n == 20 else before if n else 0\n"
        "    x = torch.ones(2 << 20); del x\n"
        "print(startup.keep_freed_memory(os.environ), count() - before)"
    )
    kept, faults = python(code).split()
    if kept != "True":
        pytest.skip("not glibc's malloc")
    assert int(faults) < 4 * 2048
    kept, faults = python(code, MALLOC_TRIM_THRESHOLD_="131072").split()
    assert kept == "False" and int(faults) > 16 * 2048  # the user's own setting


# ------------------------------------------------------------------------------- the ceiling


def test_operations_are_those_of_the_layers():
    """Two per weight and sample, whatever is done once per call."""

    class Field(nn.Sequential):
        def forward(self, points, viewdirs, ray_indices):
            return super().forward(points)

    field = Field(nn.Linear(3, 64), nn.ReLU(), nn.Linear(64, 4))
    assert machine.flops_per_sample(field, CPU) == 2 * (3 * 64 + 64 * 4)


def test_numbers_read_of_planes_and_tables():
    assert machine.numbers_read(torch.zeros(3, 8, 32, 32)) == 3 * 8 * 4
    assert machine.numbers_read(torch.zeros(1000, 4)) == 4 * 8


def test_a_wider_network_has_a_lower_ceiling():
    narrow, wide = (NeRFField(4, width, use_viewdirs=True) for width in (32, 256))
    slow, fast = (machine.samples_ceiling([field], CPU, "off") for field in (wide, narrow))
    assert 0 < slow < fast / 2
    assert machine.samples_ceiling([FeatureField(TriPlane(32))], CPU, "off") > 0


def test_the_ceiling_draws_nothing_from_the_global_generator():
    torch.manual_seed(3)
    state, field = torch.get_rng_state(), FeatureField(TriPlane(16))
    state = torch.get_rng_state()
    machine.samples_ceiling([field], CPU, "off")
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in field.parameters())


def test_amounts():
    said = [amount(number) for number in (3.2, 310, 53_400, 1_234_000, 98_700_000, 2.5e9)]
    assert said == ["3", "310", "53 k", "1.2 M", "99 M", "2.5 G"]


# ----------------------------------------------------------------------- the first estimate


@pytest.fixture
def clock(monkeypatch):
    now = types.SimpleNamespace(seconds=100.0)
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now.seconds)
    return now


def advance(run: Progress, clock, seconds: list[float]) -> list[str]:
    said: list[str] = []
    for each in seconds:
        clock.seconds += each
        run.state.step += 1
        run.advance(said.append)
    return said


def test_the_whole_run_is_estimated_after_ten_updates(clock):
    state = types.SimpleNamespace(step=0, rays_drawn=0, clock=Clock())
    run = Progress(1010, state, show=False, hint="; faster: x")
    assert advance(run, clock, [5.0] + [0.1] * 8) == []  # the first update does not count
    assert advance(run, clock, [0.1] * 40) == ["1000 updates will take about 1.7 min on this CPU"]


def test_nobody_waits_minutes_for_the_estimate_of_a_long_run(clock):
    state = types.SimpleNamespace(step=0, rays_drawn=0, clock=Clock())
    run = Progress(200_000, state, show=False, hint="; faster: x")
    (said,) = advance(run, clock, [12.0] * 20)
    assert said == "199998 updates will take about 28 days on this CPU; faster: x"


def test_a_slow_run_is_told_of_the_fast_config_of_its_scene(monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    flags = types.SimpleNamespace(config="configs/lego.txt", occ_grid=False)
    assert build_outputs.faster_way(flags).startswith("; configs/lego_fast.txt takes minutes")
    flags.config = None
    assert "--fast" in build_outputs.faster_way(flags)
    flags.occ_grid = True
    assert build_outputs.faster_way(flags) == ""


def test_on_a_gpu_both_ends_are_as_far_from_a_read(clock):
    """The host runs ahead of the GPU and waits at every 16th step."""
    state = types.SimpleNamespace(step=0, rays_drawn=0, clock=Clock())
    run = Progress(1064, state, show=False, machine="CUDA", read_every=16)
    steps = [1.6 if step % 16 == 0 else 0.0 for step in range(100)]
    assert advance(run, clock, steps) == ["1000 updates will take about 1.7 min on this CUDA"]


def test_samples_and_their_share(clock):
    state = types.SimpleNamespace(step=0, rays_drawn=0, clock=Clock())
    run = Progress(100, state, show=False, ceiling=4e6)
    for samples in (1e6, 3e6):
        run.count(samples)
        state.step += 1
        clock.seconds += 1.0
    run.measure()
    assert run.samples_per_second == pytest.approx(2e6)
    assert run.usage() == "2.0 M samples/s, 50% of this machine's 4.0 M"


# ---------------------------------------------------------------------------------- runs


def test_how_often_pictures_are_made():
    assert forecast.occasions(100, 0) == 0 and forecast.occasions(100, 30) == 3
    assert forecast.occasions(100, 0, at_end=True) == 1
    assert forecast.occasions(100, 30, at_end=True) == 4
    assert forecast.occasions(100, 25, at_end=True) == 4


def check_dry_run(result, folder) -> None:
    assert result.returncode == 0, result.stderr
    assert list(folder.iterdir()) == []
    first, second = re.findall(r"dry run: (.*)", result.stderr)
    assert re.search(r"take about \d.* \(updates \d", first)
    assert re.fullmatch(r"and up to about \d+\.\d GB of memory; nothing was written", second)
    assert "step " not in result.stderr  # it stopped long before the end


def test_a_dry_run_of_a_scene_says_what_it_takes_and_writes_nothing(tiny, tmp_path):
    flags = ["--N_iters", 100000, "--i_print", 100000, "--i_img", 1000, "--i_video", 100000]
    result = run_script([*tiny, *flags, "--dry_run"])
    check_dry_run(result, tmp_path)
    assert re.search(r"validation 100 x \d.*, test views \d.*, video \d", result.stderr)
    assert re.search(r"\d+ updates will take about .* on this CPU", result.stderr)
    assert re.search(r"upper limit of this CPU: \d.* samples/s \(", result.stderr)


def test_a_dry_run_of_an_object_says_what_it_takes_and_writes_nothing(tiny_dream, tmp_path):
    flags = ["--N_iters", 100000, "--i_print", 100000, "--i_img", 1000]
    result = run_script([*tiny_dream, *flags, "--dry_run"], script="run_dreamfusion.py")
    check_dry_run(result, tmp_path)
    assert re.search(r"preview 100 x \d.*, turntable", result.stderr)


def test_a_dry_run_leaves_a_finished_run_alone(tiny, tmp_path):
    assert run_main(run_nerf.main, *tiny, "--N_iters", 4).returncode == 0
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "tiny").rglob("*")}
    result = run_main(run_nerf.main, *tiny, "--N_iters", 50, "--dry_run", "--no_reload")
    assert result.returncode == 0 and "dry run: the whole run" in result.stderr
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "tiny").rglob("*")} == before


def test_a_dry_run_is_for_training(tiny, tiny_dream):
    for main, flags in ((run_nerf.main, tiny), (run_dreamfusion.main, tiny_dream)):
        result = run_main(main, *flags, "--dry_run", "--export", "x.glb")
        assert result.returncode == 2 and "--dry_run is for training" in result.stderr


def test_both_logs_say_how_fast_the_machine_is_used(tiny, tiny_dream, tmp_path):
    for main, flags, name in (
        (run_nerf.main, tiny, "tiny"), (run_dreamfusion.main, tiny_dream, "ball"),
    ):  # fmt: skip
        result = run_main(main, *flags, "--N_iters", 5, "--i_video", 0)
        assert result.returncode == 0, result.stderr
        pattern = r"step 5/5 .* samples/s, \d+% of this machine's \d.*  \d+\.\d\d GB  ETA"
        assert re.search(pattern, result.stderr)
        with open(tmp_path / name / "metrics.csv") as file:
            (row,) = csv.DictReader(file)
        assert float(row["samples_per_second"]) > 0


def test_more_samples_than_could_be_trained_is_no_share_above_1():
    counters = types.SimpleNamespace(step=0, rays_drawn=0, clock=Clock())
    shown = Progress(10, counters, show=False, ceiling=100.0)
    shown.samples_per_second = 50.0
    assert "50% of this machine's 100" in shown.usage()
    shown.samples_per_second = 220.0
    assert "%" not in shown.usage() and "skipped (limit without skipping: 100)" in shown.usage()
