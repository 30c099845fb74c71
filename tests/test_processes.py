"""Several processes as one: gradients, weights, metrics, frames, failures. gloo ranks on a CPU."""

import ast
import csv
import json
import os
import re
import time
from importlib.util import find_spec

import imageio.v3 as iio
import numpy as np
import pytest
import torch
from helpers import (
    DREAM_TINY,
    FAST_TINY,
    NERF_TINY,
    REPOSITORY,
    SERVER,
    _script,
    newest,
    run_python,
    run_script,
    torchrun,
)

# A small lrate: with a large one Adam turns sums in another order into other weights sooner.
TINY = [*NERF_TINY, "--lrate", "5e-4", "--i_print", "50", "--expname", "run"]


# -------------------------------------------------------------------------------------- restarts

RESTARTED = """
import os, sys, time
from nerf.training import distributed, entry
again, first = os.environ["TORCHELASTIC_RESTART_COUNT"] != "0", os.environ["RANK"] == "0"
if again and not first:
    time.sleep(1)
world = distributed.setup("cpu")
world.barrier()
if not again:
    os._exit(9)
print("rank", world.gather(world.rank), flush=True)
distributed.cleanup()
entry.exit_process(0)
"""


def test_processes_that_torchrun_restarts_meet_again(tmp_path):
    """The first one looks for the second before that has come: not where it was before."""
    script = tmp_path / "restarted.py"
    script.write_text(RESTARTED)
    words = [*torchrun(2)[:-1], "--max-restarts=1", torchrun(2)[-1], script]
    done = run_python(*words, PYTHONPATH=str(REPOSITORY))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("rank [0, 1]") == 2


# ------------------------------------------------------------------------------------- gradients

GRADIENTS = """
import sys, torch
from helpers import gradient_case
from nerf.training import distributed, entry
world = distributed.setup("cpu")
renderer, rays, target, noise = gradient_case()
model = distributed.data_parallel(world, renderer)
assert world.size == 1 or isinstance(model, torch.nn.parallel.DistributedDataParallel)
shard = world.shard(len(target))
count = shard.stop - shard.start
for size in (count // 2, count - count // 2):  # the second piece need not be like the first
    piece = slice(shard.start, shard.start + size)
    shard = slice(piece.stop, shard.stop)
    with distributed.without_sync(model):
        levels = model(rays.part(piece), noise.part(piece))
    errors = [((level.rgb - target[piece]) ** 2).mean() for level in levels]
    (sum(errors) * size / count).backward()
if sys.argv[1] == "averaged":
    distributed.sync_gradients(model)
found = torch.cat([p.grad.flatten() for p in renderer.parameters()])
every = world.gather(found)
# Weights without a gradient on rank 0, on all ranks, and with one on all.
some = torch.nn.ParameterList(torch.ones(2) for _ in range(3))
other = distributed.data_parallel(world, some, find_unused_parameters=True)
for _ in range(2):
    some[0].grad = torch.ones(2) if world.rank else None
    some[1].grad, some[2].grad = None, torch.full((2,), float(world.rank))
    distributed.sync_gradients(other)
    mean = (world.size - 1) / world.size
    assert world.size == 1 or some[0].grad.tolist() == [mean, mean]
    assert some[1].grad is None and some[2].grad.tolist() == [(world.size - 1) / 2] * 2
if world.is_main:
    torch.save(torch.stack(every), sys.argv[2])
world.barrier()
distributed.cleanup()
entry.exit_process(0)
"""


def gradients(path, count: int, way: str) -> torch.Tensor:
    """Gradients [ranks, N] of one global batch, as every rank holds them after backward."""
    script = path / "gradients.py"
    script.write_text(GRADIENTS)
    done = run_script([way, path / "found.pt"], ranks=count, script=str(script))
    assert done.returncode == 0, done.stderr
    return torch.load(path / "found.pt", weights_only=True)


def averaged(found: torch.Tensor, one: torch.Tensor) -> bool:
    """What must hold: all ranks hold the gradient of the whole batch."""
    return bool((found - one).abs().max() <= 1e-6 * max(1.0, float(one.abs().max())))


@pytest.mark.parametrize("count", [2, 4])
def test_gradients_are_averaged_and_a_loop_without_would_be_caught(tmp_path, count):
    """Without it every rank keeps the gradient of its share, as in a bug that others had."""
    one = gradients(tmp_path, 1, "averaged")
    right = gradients(tmp_path, count, "averaged")
    assert averaged(right, one)
    assert all(torch.equal(right[0], other) for other in right[1:])
    wrong = gradients(tmp_path, count, "alone")
    assert not averaged(wrong, one)
    assert not torch.equal(wrong[0], wrong[1])
    assert averaged(wrong.mean(0, keepdim=True), one)  # what the average would have been


@pytest.mark.parametrize("script", ["run_nerf.py", "run_dreamfusion.py"])
def test_both_loops_go_through_ddp_and_average_once_a_step(script):
    """After all micro-batches, which the wrapper's forward passes begin."""
    source = (REPOSITORY / script).read_text(encoding="utf-8")
    assert "model = distributed.data_parallel(world, renderer" in source
    assert len(re.findall(r"= model\(", source)) == 1
    attributes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Attribute)]
    assert not [node for node in attributes if node.attr == "module"]
    order = ["micro.run(", "distributed.sync_gradients(model)", "scaler.unscale_(optimizer)"]
    places = [source.index(text) for text in order]
    assert places == sorted(places) and all(source.count(text) == 1 for text in order)


# ------------------------------------------------------------------------------------- whole runs


def train(data, folder, name, count, *more):
    flags = [*TINY, "--datadir", data, "--basedir", folder, "--expname", name, *more]
    done = run_script(flags, ranks=count)
    assert done.returncode == 0, done.stderr
    state = newest(folder / name)
    return state, json.loads((folder / name / "metrics.json").read_text())


def weights(state) -> torch.Tensor:
    nets = [state.get(f"network_{kind}_state_dict") or {} for kind in ("fn", "fine")]
    return torch.cat([value.flatten() for net in nets for value in net.values()])


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
def test_200_steps_of_several_ranks_are_those_of_one(data, tmp_path, count):
    one, told = train(data, tmp_path, "one", 1, "--N_iters", 200)
    many, told_many = train(data, tmp_path, "many", count, "--N_iters", 200)
    assert (weights(one) - weights(many)).abs().max() <= 1e-4
    assert [v["name"] for v in told["views"]] == [v["name"] for v in told_many["views"]]
    for key in ("psnr", "psnr_8bit"):
        assert told[key] == pytest.approx(told_many[key], abs=1e-3)
    assert told["ssim"] == pytest.approx(told_many["ssim"], abs=1e-5)


KINDS = {
    "vanilla": ["--lr_schedule", "exp"],
    "fast": [*FAST_TINY, "--lr_schedule", "exp"],
    "store": ["--data_store", "mmap"],
    "dream": ["--batch_views", 4, "--lrate", 1e-4],
}


@pytest.mark.parametrize(
    "kind", ["vanilla", "fast", "dream", pytest.param("store", marks=pytest.mark.slow)]
)
def test_a_run_goes_on_with_more_and_with_fewer_processes(data, tmp_path, kind):
    """1 -> 2 -> 1 processes, four steps each: what twelve steps of one give."""
    script = "run_dreamfusion.py" if kind == "dream" else "run_nerf.py"
    flags = DREAM_TINY if kind == "dream" else [*TINY, "--datadir", data]
    flags = [*flags, "--basedir", tmp_path, "--i_print", 4]

    def trained(name, steps, count):
        words = [*flags, *KINDS[kind], "--expname", name, "--N_iters", steps]
        done = run_script(words, ranks=count, script=script)
        assert done.returncode == 0, done.stderr
        return newest(tmp_path / name)

    one = trained("one", 12, 1)
    for steps, count in ((4, 1), (8, 2), (12, 1)):
        state = trained("changing", steps, count)
        assert state["global_step"] == steps
    assert (weights(one) - weights(state)).abs().max() <= 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
def test_frames_are_shared_out_whatever_their_number(data, tmp_path, count):
    """3 test views on 2 ranks (not divisible) and on 4 (fewer than ranks): the same pictures."""
    train(data, tmp_path, "run", 1, "--N_iters", 3)
    folder, found = tmp_path / "run" / "render_test_000003", {}
    flags = [*TINY, "--datadir", data, "--basedir", tmp_path, "--expname", "run"]
    for many in (1, count):
        for picture in folder.glob("*.png"):
            picture.unlink()
        done = run_script([*flags, "--render_only", "--render_test"], ranks=many)
        assert done.returncode == 0, done.stderr
        metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
        rows = [(v["name"], v["psnr"], v["ssim"]) for v in metrics["views"]]
        found[many] = rows, [iio.imread(path) for path in sorted(folder.glob("0*.png"))]
    assert len(found[count][1]) == 3 and found[1][0] == found[count][0]
    np.testing.assert_array_equal(found[1][1], found[count][1])


POISONED = """
import os, sys
from nerf.datasets.scene import Scene
rank = sys.argv.pop(1)
draw = Scene.sample_rays
calls = []
def sample_rays(*given, **named):
    rays, target = draw(*given, **named)
    calls.append(1)
    # the first call draws the rays by which a dead start is noticed
    if len(calls) in (4, 5) and os.environ["RANK"] == rank:
        target[:] = float("nan")
    return rays, target
Scene.sample_rays = sample_rays
import run_nerf
sys.exit(run_nerf.main())
"""


@pytest.mark.parametrize("rank", [0, 1])
def test_nan_on_one_rank_is_left_out_by_all(data, tmp_path, rank):
    """Or the ranks' weights would part: both take the same steps, with and without the NaN."""
    (tmp_path / "poisoned.py").write_text(POISONED)
    flags = [*TINY, "--datadir", data, "--basedir", tmp_path, "--expname", "run", "--N_iters", 6]
    flags += ["--i_print", 1]
    script = str(tmp_path / "poisoned.py")
    done = run_script([rank, *flags], ranks=2, script=script)
    assert done.returncode == 0, done.stderr
    state = newest(tmp_path / "run")  # refuses NaN anywhere
    adam = state["optimizer_state_dict"]["state"].values()
    assert {int(entry["step"]) for entry in adam} == {4}
    rows = (tmp_path / "run" / "metrics.csv").read_text().splitlines()
    skipped = rows[0].split(",").index("skipped")
    assert [row.split(",")[skipped] for row in rows[1:]] == ["0", "0", "1", "2", "2", "2"]


DREAM_POISONED = """
import os, sys, torch
import run_dreamfusion
rank, folder = sys.argv.pop(1), sys.argv.pop(1)
accumulate, finish = run_dreamfusion.accumulate_gradients, run_dreamfusion.finish
def poisoned(args, model, state, guide, inputs, now, views):
    if state.step in (2, 3) and os.environ["RANK"] == rank:
        inputs.lighting.background[0] = float("nan")
    return accumulate(args, model, state, guide, inputs, now, views)
def kept(args, run, outputs, *more):
    torch.save(outputs.renderer.state_dict(), f"{folder}/rank{outputs.world.rank}.pt")
    return finish(args, run, outputs, *more)
run_dreamfusion.accumulate_gradients, run_dreamfusion.finish = poisoned, kept
sys.exit(run_dreamfusion.main())
"""


@pytest.mark.parametrize("rank", [0, 1])
def test_nan_on_one_rank_of_text_to_3d_is_left_out_by_all(tmp_path, rank):
    (tmp_path / "poisoned.py").write_text(DREAM_POISONED)
    flags = [*DREAM_TINY, "--basedir", tmp_path, "--N_iters", 6, "--i_print", 1]
    script = str(tmp_path / "poisoned.py")
    done = run_script([rank, tmp_path, *flags], ranks=2, script=script)
    assert done.returncode == 0, done.stderr
    state = newest(tmp_path / "ball")  # refuses NaN anywhere
    adam = state["optimizer_state_dict"]["state"].values()
    assert {int(entry["step"]) for entry in adam} == {4}
    rows = (tmp_path / "ball" / "metrics.csv").read_text().splitlines()
    skipped = rows[0].split(",").index("skipped")
    assert [row.split(",")[skipped] for row in rows[1:]] == ["0", "0", "1", "2", "2", "2"]
    one, other = (torch.load(tmp_path / f"rank{n}.pt", weights_only=True) for n in (0, 1))
    assert all(torch.equal(one[name], other[name]) for name in one)


REFUSED = """
import errno, os, sys
from nerf.outputs import object, scene
def refused(path, picture):
    if os.environ["RANK"] == "1":
        raise OSError(errno.ENOSPC, "No space left on device")
    write(path, picture)
write = scene.write_png
scene.write_png = object.write_png = refused
script = __import__(sys.argv.pop(1))
sys.exit(script.main())
"""


@pytest.mark.parametrize("name", ["run_nerf", "run_dreamfusion"])
def test_a_disk_that_fails_one_rank_costs_pictures_only(data, tmp_path, name):
    """Among frames that are shared out: the other rank must neither wait for ever nor stop."""
    (tmp_path / "refused.py").write_text(REFUSED)
    flags = [*(TINY if name == "run_nerf" else DREAM_TINY), "--basedir", tmp_path, "--N_iters", 6]
    flags += ["--datadir", data] if name == "run_nerf" else []
    flags += ["--expname", "run", "--i_weights", 2, "--i_video", 4]
    script = str(tmp_path / "refused.py")
    done = run_script([name, *flags], ranks=2, script=script)
    assert done.returncode != 0
    log = (tmp_path / "run" / "log.txt").read_text()
    refusals = "(No space left on device, on rank 1); training goes on"
    assert log.count(refusals) == 2  # at step 4 and at the end
    assert "not everything is on the disk" in log
    assert newest(tmp_path / "run")["global_step"] == 6


SIGNALED = """
import os, signal, sys
from pathlib import Path
from nerf.outputs import object, scene
name, folder, codes = (sys.argv.pop(1) for _ in range(3))
def write_and_signal(path, picture):
    write(path, picture)
    if folder in str(path) and os.environ["RANK"] == "1" and not signaled:
        signaled.append(os.kill(os.getpid(), signal.SIGTERM))
signaled, write = [], scene.write_png
scene.write_png = object.write_png = write_and_signal
code = __import__(name).main()
Path(codes, os.environ["RANK"]).write_text(str(code))
sys.exit(0)
"""


@pytest.mark.parametrize(
    ("name", "folder"),
    [
        pytest.param("run_nerf", "render_test_000006", marks=pytest.mark.slow),
        ("run_nerf", "render_path_000004"),
        pytest.param("run_dreamfusion", "render_path_000004", marks=pytest.mark.slow),
        ("run_dreamfusion", "render_path_000006"),
    ],
)
def test_a_signal_to_one_rank_ends_the_rendering_of_all(data, tmp_path, name, folder):
    """Also where the other has no signal: both end with 143, and the next start makes the rest."""
    (tmp_path / "signaled.py").write_text(SIGNALED)
    flags = [*TINY, "--datadir", data] if name == "run_nerf" else [*DREAM_TINY, "--mesh_res", 16]
    flags += ["--basedir", tmp_path, "--expname", "run", "--N_iters", 6, "--i_weights", 2]
    flags += (
        ["--i_video", 4, "--video_frames", 40] if name == "run_dreamfusion" else ["--i_video", 4]
    )
    script = str(tmp_path / "signaled.py")
    done = run_script([name, folder, tmp_path, *flags], ranks=2, script=script)
    assert done.returncode == 0, done.stderr
    assert [(tmp_path / rank).read_text() for rank in "01"] == ["143", "143"]
    run = tmp_path / "run"
    assert newest(run)["global_step"] == int(folder[-6:])
    assert "Traceback" not in done.stderr and not (run / folder / "rgb.mp4").exists()
    if name == "run_dreamfusion":  # where there are many pictures, rank 1 has not made its own
        assert len(list((run / folder).glob("*.png"))) < 40
    done = run_script(flags, ranks=2, script=f"{name}.py")
    assert done.returncode == 0, done.stderr
    assert newest(run)["global_step"] == 6
    assert all((run / made).exists() for made in ("metrics.json", "report.html"))
    assert list(run.glob("render_path_000004*/*.mp4")) and list(
        run.glob("render_path_000006*/*.mp4")
    )


FAILING = """
import os, sys
from nerf.datasets.scene import Scene
draw = Scene.sample_rays
calls = []
def sample_rays(*given, **named):
    calls.append(1)
    if len(calls) == 5 and os.environ["RANK"] == "1":
        raise ValueError("this rank's disk is gone")
    return draw(*given, **named)
Scene.sample_rays = sample_rays
import run_nerf
sys.exit(run_nerf.main())
"""


@pytest.mark.slow
def test_a_rank_that_fails_ends_all_soon_and_its_reason_is_seen(data, tmp_path):
    (tmp_path / "failing.py").write_text(FAILING)
    flags = [*TINY, "--datadir", data, "--basedir", tmp_path, "--expname", "run"]
    began = time.monotonic()
    done = run_python(*torchrun(2), tmp_path / "failing.py", *flags, "--N_iters", 100000)
    assert done.returncode != 0 and time.monotonic() - began < 60
    assert "this rank's disk is gone" in done.stderr
    assert not list((tmp_path / "run").glob("*.tar"))


ON_ONE_RANK = ("second", "memory")  # parts of the names of columns that the machine decides


@pytest.mark.parametrize("kind", ["vanilla", "fast", "dream"])
def test_every_logged_number_is_over_all_ranks(data, sd_folder, tmp_path, kind):
    """metrics.csv of two processes is that of one: losses, samples, VSD's network and all."""
    if kind == "dream":
        flags = [*DREAM_TINY, "--guidance", "vsd", "--sd_model", sd_folder, "--train_res", 16]
        flags += ["--field", "triplane", "--grid_res", 16, "--lambda_tv", 0.1, "--batch_views", 4]
        flags += ["--lambda_opacity", "0:0,3:0.1", "--lambda_orient", 1, "--camera_dropout", 0.5]
        flags += ["--lrate", 1e-4, "--lrate_grid", 1e-4]
    else:
        flags = [*(FAST_TINY if kind == "fast" else []), *TINY, "--datadir", data]
        more = ["--lambda_tv", 0.01, "--lambda_l1", 0.01, "--grad_clip", 1e-3]
        flags += more if kind == "fast" else ["--raw_noise_std", "0:0,3:1"]
    script = "run_dreamfusion.py" if kind == "dream" else "run_nerf.py"
    tables = []
    for ranks in (1, 2):
        place = ["--basedir", tmp_path, "--expname", str(ranks), "--N_iters", 5, "--i_print", 1]
        done = run_script([*flags, *place], script=script, ranks=ranks)
        assert done.returncode == 0, done.stderr
        with open(tmp_path / str(ranks) / "metrics.csv") as file:
            tables.append(list(csv.DictReader(file)))
    assert len(tables[0]) == len(tables[1]) == 5
    wanted = {
        "vanilla": "loss psnr lr grad_norm loss_coarse loss_fine raw_noise_std",
        "fast": "loss_color loss_l1 loss_tv lr_grid grad_norm_grid grad_norm_networks rays",
        "dream": "sds loss t lora_loss lr_lora grad_norm_lora opacity samples loss_tv loss_orient",
    }[kind]
    assert set(wanted.split()) <= tables[0][0].keys() == tables[1][0].keys()
    for one, two in zip(*tables, strict=True):
        for name in one:
            if not any(part in name for part in ON_ONE_RANK):
                expected = pytest.approx(float(one[name]), rel=1e-3, abs=1e-9)
                assert float(two[name]) == expected, (name, one["step"])


def test_views_one_by_one_are_all_of_them_with_several_processes_too(tmp_path):
    """--views_at_once sets what memory decides by itself; and with every shape checked."""
    flags = [*DREAM_TINY, "--batch_views", 4, "--albedo_steps", 0, "--field", "mlp", "--i_print", 1]
    flags += ["--basedir", tmp_path, "--N_iters", 3, "--lambda_entropy", 1, "--lrate", 1e-4]
    checks = ["--debug_shapes"] if find_spec("jaxtyping") and find_spec("beartype") else []
    runs = {"all": ([], 1), "one": (["--views_at_once", 1, *checks], 1),
            "ranks": (["--views_at_once", 1, "--deterministic"], 2)}  # fmt: skip
    for name, (words, ranks) in runs.items():
        place = ["--expname", name]
        done = run_script([*flags, *words, *place], script="run_dreamfusion.py", ranks=ranks)
        assert done.returncode == 0, done.stderr
    states = {name: newest(tmp_path / name)["network_fn_state_dict"] for name in runs}
    rows = {}
    for name in runs:
        with open(tmp_path / name / "metrics.csv") as file:
            rows[name] = list(csv.DictReader(file))[-1]
    for other in ("one", "ranks"):
        for name, value in states["all"].items():
            torch.testing.assert_close(states[other][name], value, rtol=1e-4, atol=1e-6)
        for name in ("sds", "loss", "loss_entropy", "grad_norm", "samples", "opacity"):
            assert float(rows[other][name]) == pytest.approx(float(rows["all"][name]), rel=1e-3)
    log = (tmp_path / "one" / "log.txt").read_text()
    assert ("ObjectRenderer, composite, distill" in log) == bool(checks)


# ------------------------------------------------------------ a rank without memory, or killed

SHORT = """
import os, sys, torch
from nerf.renderer import NeRFRenderer
from nerf.text3d.renderer import ObjectRenderer
from nerf.training.distributed import World
rank, most, folder = sys.argv.pop(1), int(sys.argv.pop(1)), sys.argv.pop(1)
short = []

def limited(kind):
    forward = kind.forward
    def checked(self, rays, *more, **named):
        rendered = forward(self, rays, *more, **named)
        count = len(rays.directions)
        if os.environ["RANK"] != rank or count <= most or not torch.is_grad_enabled():
            return rendered
        short.append(count)
        if len(short) % 2:
            raise torch.OutOfMemoryError("no memory for this")
        def fail(gradient):  # in backward(), after the last layers have their gradients
            raise torch.OutOfMemoryError("no memory for this")
        level = rendered if hasattr(rendered, "rgb") else rendered[-1]
        level.rgb.register_hook(fail)
        return rendered
    kind.forward = checked

for kind in (NeRFRenderer, ObjectRenderer):
    limited(kind)
script = __import__(sys.argv.pop(1))
save = script.TrainState.save
def saved(state, run, *more, **named):
    torch.save(state.renderer.state_dict(), f"{folder}/rank{os.environ['RANK']}.pt")
    return save(state, run, *more, **named)
script.TrainState.save = saved
from nerf.training import entry
entry.exit_process(script.main())
"""


@pytest.mark.parametrize("name", ["run_nerf", "run_dreamfusion"])
def test_a_rank_without_memory_takes_smaller_pieces_and_the_weights_are_the_same(
    data, tmp_path, name
):
    """In forward() and in backward(); the other rank waits in the one all-reduce of the step."""
    (tmp_path / "short.py").write_text(SHORT)
    nerf = name == "run_nerf"
    flags = [*TINY, "--datadir", data] if nerf else [*DREAM_TINY, "--batch_views", 8]
    flags = [*flags, "--lrate", 1e-4, "--basedir", tmp_path, "--N_iters", 4, "--i_weights", 4]
    most = 8 if nerf else 12 * 12  # rays in a piece: one view of four
    smaller = ["--chunk", 8] if nerf else ["--views_at_once", 1]
    states = {}
    for run, limit, more in (("whole", 10**9, []), ("small", 10**9, smaller), ("short", most, [])):
        words = [1, limit, tmp_path, name, *flags, *more, "--expname", run]
        done = run_script(words, ranks=2, script=str(tmp_path / "short.py"))
        assert done.returncode == 0, done.stderr
        assert done.stderr.count("rank 1: out of memory") == (2 if run == "short" else 0) or nerf
        assert ("rank 1: out of memory" in done.stderr) == (run == "short")
        one, other = (torch.load(tmp_path / f"rank{n}.pt", weights_only=True) for n in (0, 1))
        assert all(torch.equal(one[key], other[key]) for key in one), "the ranks have parted"
        states[run] = one
    for run in ("whole", "small"):
        for key, value in states[run].items():
            torch.testing.assert_close(states["short"][key], value, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("name", ["run_nerf", "run_dreamfusion"])
def test_a_killed_rank_ends_the_other_soon_with_one_line(data, tmp_path, name):
    """Without torchrun, which would end it."""
    flags = [*TINY, "--datadir", data] if name == "run_nerf" else DREAM_TINY
    flags = [*flags, "--basedir", tmp_path, "--N_iters", 100000, "--expname", "run"]
    flags += ["--i_print", 1, "--i_weights", 2]
    words = [f"{name}.py", *map(str, flags)]
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True)
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "WORLD_SIZE": "2"}
    shared |= {**os.environ, "TORCHELASTIC_USE_AGENT_STORE": "True"}
    ranks = []
    for rank in ("0", "1"):
        texts = (str(tmp_path / f"out{rank}"), str(tmp_path / f"err{rank}"))
        environment = shared | {"RANK": rank, "LOCAL_RANK": rank}
        ranks.append(SERVER.Process(target=_script, args=(words, environment, *texts)))
    try:
        for process in ranks:
            process.start()
        end = time.monotonic() + 120
        while not list((tmp_path / "run").glob("0*.tar")) and time.monotonic() < end:
            time.sleep(0.05)
        ranks[1].kill()
        ranks[0].join(30)
        code = ranks[0].exitcode
    finally:
        for process in ranks:
            process.kill()
            process.join()
    assert code not in (0, None, -9)
    errors = (tmp_path / "err0").read_text()
    assert "Traceback" not in errors and "another process of this run has ended" in errors
    assert newest(tmp_path / "run")["global_step"] >= 2
