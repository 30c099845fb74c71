"""benchmarks/gpu.py: every stage on a CPU, its clocks, and what it does when a stage fails."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import CPU, NERF_TINY, REPOSITORY
from PIL import Image

import run_nerf
from benchmarks import gpu, gpu_child, gpu_measure, gpu_profile, gpu_scene
from nerf import build
from nerf.flags import nerf as nerf_flags
from nerf.outputs.scene import SceneOutputs


def command(tmp_path, *flags, **options):
    """The command on a CPU; its scratch folders lie in tmp_path."""
    words = [sys.executable, "benchmarks/gpu.py", "--quick", "--out", tmp_path / "gpu.json", *flags]
    return subprocess.run(
        [str(word) for word in words],
        cwd=REPOSITORY, env={**os.environ, "TMPDIR": str(tmp_path)}, timeout=400,
        capture_output=True, text=True, **options,
    )  # fmt: skip


def processes_of(folder: Path) -> list[str]:
    """Command lines of the processes that name a folder."""
    lines = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            lines.append(path.read_text(errors="replace").replace("\0", " "))
        except OSError:
            pass  # it has ended
    return [line for line in lines if str(folder) in line]


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """Every stage, tiny; Lego is not where the flag says, and the tests are given a second."""
    folder = tmp_path_factory.mktemp("quick")
    result = command(folder, "--lego", folder / "nowhere", "--limit", "tests=1")
    left = processes_of(folder)
    return result, json.loads((folder / "gpu.json").read_text()), left


def test_every_stage_runs_and_a_failed_one_stops_no_other(quick):
    result, found, _ = quick
    assert result.returncode == 1, result.stderr
    stages = found["stages"]
    assert list(stages) == list(gpu.LIMITS)
    status = {name: stage["status"] for name, stage in stages.items()}
    expected = dict.fromkeys(gpu.LIMITS, "done")
    assert status == expected | {"fast": "failed", "profile": "failed", "tests": "time limit"}
    assert "no such data folder" in stages["fast"]["why"]
    assert "\n" not in stages["fast"]["why"] and "Traceback" not in result.stdout
    assert any("Traceback" in line for line in stages["fast"]["log"])
    # Of the three loops that are profiled only the one on Lego has failed.
    assert [row["what"] for row in stages["profile"]["rows"]] == [
        "vanilla, per step", "text3d, per step",
    ]  # fmt: skip


def test_the_table_shows_every_row_and_every_stage_that_failed(quick):
    result, found, _ = quick
    table = result.stdout[result.stdout.index("| stage |") :]
    for name, stage in found["stages"].items():
        for row in stage["rows"]:
            assert f"| {name} | {row['what']} |" in table
        if stage["status"] != "done":
            assert f"| {name} | **{stage['status']}** | {stage['why']} |" in table


def test_times_have_a_median_of_five_blocks_or_more(quick):
    _, found, _ = quick
    spreads = [
        (name, row["what"], value)
        for name, stage in found["stages"].items()
        for row in stage["rows"]
        for value in row["results"].values()
        if isinstance(value, dict)
    ]
    assert len(spreads) > 10
    for name, what, value in spreads:
        assert 0 < value["low"] <= value["median"] <= value["high"], (name, what)
        assert value["blocks"] >= 5, (name, what)


def test_nothing_goes_on_running_after_a_stage_was_stopped(quick):
    _, found, left = quick
    assert found["stages"]["tests"]["seconds"] < 20
    assert not left


@pytest.mark.slow
def test_sigterm_ends_the_running_stage_too(tmp_path):
    words = [sys.executable, "benchmarks/gpu.py", "--quick", "--stages", "tests"]
    process = subprocess.Popen(
        [*words, "--out", str(tmp_path / "gpu.json")],
        cwd=REPOSITORY, env={**os.environ, "TMPDIR": str(tmp_path)},
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        end = time.monotonic() + 120
        while not processes_of(tmp_path / "gpu_benchmark_") and time.monotonic() < end:
            time.sleep(0.1)
        assert processes_of(tmp_path / "gpu_benchmark_"), "pytest has not begun"
        process.terminate()
        assert process.wait(20) == 143
    finally:
        process.kill()
    assert not processes_of(tmp_path / "gpu_benchmark_")
    assert not list(tmp_path.glob("gpu_benchmark_*"))


def test_without_a_gpu_it_says_so_in_one_line(monkeypatch, capfd, tmp_path):
    monkeypatch.setattr(gpu, "has_driver", lambda: False)
    assert gpu.main(["--out", str(tmp_path / "gpu.json")]) == 2
    out, err = capfd.readouterr()
    assert len(err.splitlines()) == 1 and "--quick" in err


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--limit", "fast"], "STAGE=SECONDS"),
        (["--limit", "slow=3"], "STAGE=SECONDS"),
        (["--out", "/proc/no/gpu.json"], "cannot be written"),
    ],
)
def test_a_mistake_in_flags(flags, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        gpu.parse(flags)
    assert message in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    "statuses, code", [(["done", "skipped"], 0), (["done", "failed"], 1), (["time limit"], 1)]
)
def test_exit_code(statuses, code, monkeypatch, tmp_path):
    names = iter(["done", *statuses])

    def run(self, name, limit):
        rows = [{"what": name, "results": {"device": "x"}}]
        return {"status": next(names), "why": "because", "rows": rows, "seconds": 0.0}

    monkeypatch.setattr(gpu.Stages, "run", run)
    stages = list(gpu.LIMITS)[: len(statuses)]
    flags = ["--quick", "--out", str(tmp_path / "gpu.json"), "--stages", *stages]
    assert gpu.main(flags) == code
    written = json.loads((tmp_path / "gpu.json").read_text())["stages"]
    assert [stage["status"] for stage in written.values()] == statuses


def test_no_stage_begins_when_the_time_is_over(tmp_path):
    runner = gpu.Stages({"quick": True, "device": "cpu"}, tmp_path, minutes=0.0)
    assert runner.run("ceilings", 100)["status"] == "skipped"


def test_a_missing_package_is_named():
    with pytest.raises(ModuleNotFoundError) as caught:
        import no_such_package  # noqa: F401
    assert gpu_child.one_line(caught.value) == "the package no_such_package is not installed"


# ------------------------------------------------------------------------------------------- clocks


def test_blocks_are_of_equal_work_and_without_the_warm_up(monkeypatch):
    """A clock that a step moves by 0.1 s, the first ten by 1 s."""
    clock = SimpleNamespace(time=0.0)
    monkeypatch.setattr(gpu_measure, "now", lambda device: clock.time)
    timer = gpu_measure.BlockTimer(CPU, blocks=3, seconds=0.4, warm_up=20)
    while not timer.done:
        clock.time += 1.0 if timer.count < 10 else 0.1
        timer.step(50)
    assert timer.updates == 4 and timer.count == 20 + 3 * 4
    assert timer.times == pytest.approx([0.1] * 3)
    assert timer.rates == pytest.approx([500.0] * 3)


def test_sides_take_turns():
    calls = []
    sides = {name: lambda name=name: calls.append(name) for name in "ab"}
    found = gpu_measure.alternate(sides, CPU, blocks=3, seconds=0.0)
    assert "".join(calls) == "aabb" + "ab" * 3
    assert {name: len(times) for name, times in found.items()} == {"a": 3, "b": 3}


def test_the_training_loop_is_watched_and_stopped(tiny, tmp_path):
    """Every update counts once; the run saves where it is stopped, as by its own signal."""
    log = tmp_path / "log"
    log.touch()
    timer = gpu_measure.BlockTimer(CPU, blocks=2, warm_up=4, updates=3)
    steps = []

    def note(state):
        steps.append(state.step)
        return len(steps) == 2

    argv = [*tiny, "--N_iters", "100000"]
    assert gpu_measure.train_blocks(run_nerf.main, argv, timer, str(log), note) > 0
    assert steps == [11, 12]
    assert timer.count <= 12 + 17  # a loop may look at its stop signal every 16th step
    assert (tmp_path / "tiny" / f"{timer.count:06d}.tar").exists()
    assert min(timer.rates) > 0
    with gpu_measure.timed_frames(CPU, most=2) as seconds:
        gpu_measure.drive(run_nerf.main, [*argv, "--render_only", "--render_test"], str(log))
    assert len(seconds) == 2 and min(seconds) > 0
    assert SceneOutputs.render_dataset_view.__name__ == "render_dataset_view"


def test_a_run_that_ends_too_early_is_no_measurement(tiny, tmp_path):
    log = tmp_path / "log"
    log.touch()
    timer = gpu_measure.BlockTimer(CPU, blocks=2, warm_up=4, updates=3)
    with pytest.raises(RuntimeError, match="after 6 updates"):
        gpu_measure.train_blocks(run_nerf.main, [*tiny, "--N_iters", "6"], timer, str(log))


def test_a_failed_run_is_named_by_its_last_line(tmp_path):
    def main(argv):
        print("something")
        file.write("first\nrun_nerf.py: what is wrong\n")
        file.flush()
        return 2

    with open(tmp_path / "log", "w") as file, pytest.raises(RuntimeError, match="what is wrong"):
        gpu_measure.drive(main, [], str(tmp_path / "log"))


def test_a_trace_is_summed_by_step():
    """Two steps; what follows them, such as the last wait, belongs to the benchmark."""

    def event(category, name, ts, dur=0.0):
        return {"cat": category, "name": name, "ts": ts, "dur": dur}

    events = [
        {"ph": "M", "name": "process_name"},
        event("cuda_runtime", "cudaLaunchKernel", 1), event("cuda_runtime", "cudaLaunchKernel", 2),
        event("cuda_driver", "cuLaunchKernelEx", 3), event("cuda_runtime", "cudaGraphLaunch", 4),
        event("cuda_runtime", "cudaStreamSynchronize", 5), event("cuda_runtime", "cudaMalloc", 6),
        event("cpu_op", "aten::mm", 7), event("cpu_op", "aten::_local_scalar_dense", 8),
        event("user_annotation", gpu_profile.END, 10), event("cpu_op", "aten::mm", 11),
        event("cuda_runtime", "cudaDeviceSynchronize", 12),
        event("kernel", "product", 3, 2000.0), event("kernel", "product", 30, 4000.0),
        event("gpu_memcpy", "Memcpy DtoH", 9, 1000.0),
        event("gpu_user_annotation", "Optimizer.step#Adam.step", 3, 9000.0),
    ]  # fmt: skip
    found = gpu_profile.summarize(events, steps=2)
    assert found["kernel_ms"] == pytest.approx(3.5)
    assert found["top"] == [("product", pytest.approx(3.0)), ("Memcpy DtoH", pytest.approx(0.5))]
    assert (found["launches"], found["graph launches"], found["waits"]) == (1.5, 0.5, 0.5)
    assert (found["copies"], found["operations"], found["reads"]) == (0.5, 1.0, 0.5)


# -------------------------------------------------------------------------------------- the scene


@pytest.fixture
def webp(demo_copy):
    """The demo scene as lossless WebP under the same names, without its PNG files."""
    folder = demo_copy("blender")
    for path in folder.rglob("*.png"):
        Image.open(path).save(path.with_suffix(".webp"), lossless=True, exact=True)
        path.unlink()
    return folder


def test_webp_frames_are_the_same_scene(webp, demo_blender, tmp_path):
    def load(folder):
        return build.load_scene(nerf_flags.parse([*NERF_TINY, "--datadir", str(folder)]))

    assert gpu_scene.with_webp_names(demo_blender, tmp_path) == demo_blender
    one, other = load(demo_blender), load(gpu_scene.with_webp_names(webp, tmp_path))
    assert torch.equal(one.images, other.images) and torch.equal(one.c2w, other.c2w)
    assert (one.pixel_center, one.near, one.far) == (other.pixel_center, other.near, other.far)


def test_levels_are_read_off_the_validations(webp, tmp_path):
    log = tmp_path / "log"
    log.touch()
    settings = {
        "quick": True, "device": "cpu", "work": str(tmp_path / "work"), "lego": str(webp),
        "fast_seconds": 100.0, "fast_flags": ["--N_iters", "40"], "test_views": 1, "log": str(log),
    }  # fmt: skip
    (tmp_path / "work").mkdir()
    report = gpu_child.Report(tmp_path / "fast.json")
    gpu_scene.fast(settings, report)
    found = json.loads((tmp_path / "fast.json").read_text())
    rows = {row["what"]: row["results"] for row in found["rows"]}
    seconds = [seconds for _, seconds, _ in found["curve"]]
    assert [step for step, *_ in found["curve"]] == [10, 20, 30, 40]
    assert seconds == sorted(seconds) and seconds[0] > 0
    first = next(seconds for _, seconds, psnr in found["curve"] if psnr >= 5.0)
    assert rows["to 5 dB (validation)"]["s of training"] == first
    best = max(psnr for *_, psnr in found["curve"])
    assert f"{best:.2f} dB" in rows["to 36.5 dB (validation)"]["not reached"]
    assert rows["end, 1 test views"]["steps"] == 40  # --test_views 1 of 2
    assert rows["end, 1 test views"]["s of training"] >= seconds[-1]
    assert rows["frame 32x32"]["s"]["median"] > 0


def test_only_flags_that_this_version_knows_are_given(monkeypatch):
    assert gpu_scene.knows("--N_rand") and not gpu_scene.knows("--no_such_flag")
    monkeypatch.setattr(gpu_scene, "knows", lambda flag: True)
    cuda = torch.device("cuda")
    names = gpu_scene.variants(cuda)
    assert len(names) == 6 and ("TF32", "on") in names
    flags = gpu_scene.variant_flags("fp32", "on")
    assert flags == ["--amp", "off", "--tf32", "off", "--cuda_graph", "on"]
    monkeypatch.setattr(gpu_scene, "knows", lambda flag: False)
    assert gpu_scene.variants(cuda) == [("fp32", None), ("TF32", None), ("bf16", None)]
    try:
        assert gpu_scene.variant_flags("TF32", None) == ["--amp", "off"]
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")
