"""Tri-planes that become finer during training: their schedule, the optimizer, resuming, export."""

import json

import pytest
import torch
from helpers import FAST_TINY, assert_same_training, newest, run_main, run_script
from torch import nn

import run_nerf
from nerf import build_optimizer
from nerf.coarse_to_fine import GridSchedule, refine
from nerf.encodings import TriPlane, resized_planes
from nerf.field import FeatureField
from nerf.flags import nerf as nerf_flags
from nerf.training.ema import EMA
from nerf.training.recovery import Attempt
from nerf.training.state import TrainState

GROWING = ["--grid_steps", "4,9", "--grid_start", "16", "--grid_res", "64", "--ema_decay", "0.9"]


def test_sizes_are_a_geometric_sequence_from_the_start_to_the_finest():
    schedule = GridSchedule((100, 200, 400), start=64, finest=512)
    sizes = [schedule.size(step) for step in (0, 99, 100, 199, 200, 399, 400, 10_000)]
    assert sizes == [64, 64, 128, 128, 256, 256, 512, 512]
    latest = [schedule.latest(step) for step in (0, 99, 100, 399, 400, 500)]
    assert latest == [0, 0, 100, 200, 400, 400]
    assert GridSchedule((), start=64, finest=100).size(0) == 100


@pytest.mark.parametrize("schedule", ["cosine", "exp"])
def test_the_learning_rate_starts_again_where_planes_become_finer(schedule):
    words = f"--lr_schedule {schedule} --N_iters 1000 --lrate 1e-2 --lrate_decay 1".split()
    plain = nerf_flags.parse(words)
    args = nerf_flags.parse([*words, "--grid_steps", "200,300"])
    rates = [build_optimizer.learning_rate(step, args) for step in range(1001)]
    assert rates[:200] == [build_optimizer.learning_rate(step, plain) for step in range(200)]
    assert rates[200] == rates[300] == rates[0] == pytest.approx(1e-2)
    assert rates[199] < rates[200] > rates[201] and rates[299] < rates[300]
    if schedule == "cosine":
        assert (
            rates[1000] == pytest.approx(0.02 * 1e-2) == build_optimizer.learning_rate(1000, plain)
        )
    else:  # the same fall per update, from a later start
        assert rates[1000] == pytest.approx(1e-2 * 0.1**0.7)


class Renderer(nn.Module):
    def __init__(self):
        super().__init__()
        self.field = FeatureField(TriPlane(16))


def test_optimizer_and_average_go_on_with_the_finer_planes():
    torch.manual_seed(0)
    renderer, points = Renderer(), torch.rand(50, 3) * 2 - 1
    args = nerf_flags.parse(["--fast"])
    optimizer = torch.optim.Adam(
        build_optimizer.parameter_groups(renderer, args), lr=1e-2, fused=True
    )
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    state = TrainState(renderer, optimizer, scaler, EMA(renderer, 0.9), Attempt(0))

    def update():
        optimizer.zero_grad()
        renderer.field.density(points).square().mean().backward()
        optimizer.step()
        state.ema.update()

    update()
    coarse = list(renderer.field.encoding.parameters())
    others = [p for p in renderer.parameters() if not any(p is plane for plane in coarse)]
    moments = {p: optimizer.state[p]["exp_avg"].clone() for p in others if p in optimizer.state}
    ema = state.ema
    averages = {id(p): s.clone() for p, s in zip(ema.parameters, ema.shadow, strict=True)}
    finer = refine(renderer, 32)
    state.replace_parameters(finer, resized_planes)
    assert not refine(renderer, 32) and not refine(renderer, 20)  # never coarser
    assert [list(map(id, group["params"])) for group in optimizer.param_groups] == [
        [id(p) for p in others], [id(p) for p in renderer.field.encoding.parameters()],
    ]  # fmt: skip
    assert not any(p in optimizer.state for p in [*coarse, *finer.values()])
    kept = [torch.equal(optimizer.state[p]["exp_avg"], m) for p, m in moments.items()]
    assert kept and all(kept)
    assert list(map(id, ema.parameters)) == list(map(id, renderer.parameters()))
    for old, new in finer.items():
        number = next(i for i, p in enumerate(ema.parameters) if p is new)
        expected = resized_planes(averages[id(old)], new.shape)
        assert torch.equal(ema.shadow[number], expected)
    before = [p.detach().clone() for p in renderer.parameters()]
    update()
    for old, new in zip(before, renderer.parameters(), strict=True):
        assert new.grad is None or not torch.equal(old, new)
    assert all(optimizer.state[p]["step"] == 1 for p in finer.values())
    with ema.swap():
        assert renderer.field.encoding.finest == 32


def test_a_resumed_run_grows_its_planes_as_an_unbroken_one_does(tiny, tmp_path):
    flags = [*FAST_TINY, *tiny, *GROWING, "--lr_schedule", "exp"]
    whole = run_main(run_nerf.main, *flags, "--expname", "whole", "--N_iters", 12)
    assert whole.returncode == 0, whole.stderr
    log = (tmp_path / "whole" / "log.txt").read_text()
    assert "step 4: tri-planes of 32 per side" in log and "step 9: tri-planes of 64 per side" in log
    for last, size in ((4, 16), (6, 32), (12, 64)):  # before, after and at a step that refines
        done = run_main(run_nerf.main, *flags, "--expname", "parts", "--N_iters", last)
        assert done.returncode == 0, done.stderr
        planes = newest(tmp_path / "parts")["network_fn_state_dict"]["encoding.planes.2"]
        assert planes.shape[-1] == size
    assert_same_training(newest(tmp_path / "whole"), newest(tmp_path / "parts"))


def test_a_run_with_coarse_planes_is_rendered_and_exported_as_it_is(tiny, tmp_path):
    flags = [*FAST_TINY, *tiny, *GROWING]
    assert run_main(run_nerf.main, *flags, "--N_iters", 6).returncode == 0
    metrics = tmp_path / "tiny" / "metrics.json"
    measured = json.loads(metrics.read_text())["psnr"]
    metrics.unlink()
    done = run_main(run_nerf.main, *flags, "--render_only", "--render_test")
    assert done.returncode == 0, done.stderr
    assert json.loads(metrics.read_text())["psnr"] == pytest.approx(measured, abs=1e-3)
    done = run_main(run_nerf.main, *flags, "--export", tmp_path / "it.ply", "--mesh_res", 16)
    assert "Traceback" not in done.stderr and "fit this network" not in done.stderr
    # Without the flag the planes become as fine as --grid_res asks for at once.
    plain = [*FAST_TINY, *tiny, "--grid_res", 64, "--N_iters", 8, "--ema_decay", 0.9]
    done = run_main(run_nerf.main, *plain)
    assert done.returncode == 0 and "step 6: tri-planes of 64 per side" in done.stderr + done.stdout


def test_two_processes_refine_alike(tiny, tmp_path):
    flags = [*FAST_TINY, *tiny, *GROWING, "--N_iters", 6]
    for name, ranks in (("one", 1), ("two", 2)):
        done = run_script([*flags, "--expname", name], ranks=ranks)
        assert done.returncode == 0, done.stderr
    one, two = (newest(tmp_path / name)["network_fn_state_dict"] for name in ("one", "two"))
    for key, value in one.items():
        torch.testing.assert_close(value, two[key], rtol=1e-2, atol=1e-2, msg=key)


@pytest.mark.parametrize(
    "words, message",
    [
        (["--grid_steps", "9,4"], "expected rising numbers of updates"),
        (["--grid_steps", "0,4"], "expected rising numbers of updates"),
        (["--grid_steps", "soon"], "expected rising numbers of updates"),
        (["--grid_steps", "4", "--field", "hashgrid"], "--grid_steps is for --field triplane"),
        (["--grid_steps", "4", "--grid_start", "99", "--grid_res", "64"], "exceeds --grid_res 64"),
        (["--log2_hashmap_size", "40"], "from 8 to 24"),
    ],
)  # fmt: skip
def test_flags_that_cannot_work_are_refused_in_a_line(tiny, words, message):
    done = run_main(run_nerf.main, *FAST_TINY, *tiny, *words)
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr
