"""Checkpoints that are whole and hold what no run writes: refused like damaged ones."""

import copy
import shutil
import warnings

import pytest
import torch
from helpers import REPOSITORY, assert_same_training, newest, run_main

import run_dreamfusion
import run_nerf
from nerf.training import checkpoint_choice
from nerf.training.checkpoint import (
    CheckpointError,
    NewerFormatError,
    list_checkpoints,
    load_checkpoint,
)

SCALE = {"scale": 1024.0, "growth_factor": 2.0, "backoff_factor": 0.5, "growth_interval": 2000}
SCALE |= {"_growth_tracker": 3}
RANKING = {"monitor": "psnr", "split": "val", "top": {"7": 20.0}}


def whole() -> dict:
    """A checkpoint with every part that run_nerf.py writes."""
    path = REPOSITORY / "tests" / "fixtures" / "fast.tar"
    state = torch.load(path, weights_only=True)
    views = {"poses": torch.zeros(2, 3, 4), "flags": {}}
    scene = {"poses": torch.zeros(2, 3, 4), "focal": torch.ones(2), "colors": torch.zeros(2, 3)}
    more = {"scaler_state_dict": SCALE, "ranking": RANKING, "scene": scene | {"test": views}}
    return {**state, **copy.deepcopy(more)}


def at(*keys):
    """A change: (place, new value) of the content, where the value may be made of the old one."""
    *path, last = keys

    def put(value):
        def change(state):
            for key in path:
                state = state[key]
            state[last] = value(state[last]) if callable(value) else value

        return change

    return put


def first(value, number=float("nan")):
    value = value.clone()
    value.view(-1)[0] = number
    return value


def quantized(value):
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # torch is about to drop them
        return torch.quantize_per_tensor(value.float(), 0.1, 0, torch.qint8)


def deep(depth):
    value = []
    for _ in range(depth):
        value = [value]
    return value


BIAS = ("network_fn_state_dict", "density_net.0.weight")
MOMENTS = ("optimizer_state_dict", "state", 0)
WRONG = {
    "args are None": (at("args")(None), "args is not a dict"),
    "args are a list": (at("args")([]), "args is not a dict"),
    "a flag is a tensor": (at("args", "seed")(torch.ones(2)), "args: seed"),
    "a flag is a dict": (at("args", "expname")({}), "args: expname"),
    "the averages' decay is text": (at("args", "ema_decay")("0.9"), "ema_decay"),
    "the step is text": (at("global_step")("300"), "global_step is not a count"),
    "the step is true": (at("global_step")(True), "global_step is not a count"),
    "the step is a fraction": (at("global_step")(1.5), "global_step is not a count"),
    "rays are negative": (at("rays_drawn")(-1), "rays_drawn is not a count"),
    "rays of a step are none": (at("num_rays")(0), "num_rays"),
    "the time is NaN": (at("train_seconds")(float("nan")), "train_seconds"),
    "the time is text": (at("train_seconds")("2 h"), "train_seconds"),
    "the format is text": (at("format")("1"), "format is not a int"),
    "the format is None": (at("format")(None), "format is not a int"),
    "the format is 0": (at("format")(0), "format"),
    "weights are quantized": (at(*BIAS)(quantized), "density_net.0.weight has numbers of a kind"),
    "weights are complex": (at(*BIAS)(lambda v: v.to(torch.complex64)), "complex64"),
    "weights are of 8 bits": (at(*BIAS)(lambda v: v.to(torch.float8_e4m3fn)), "float8"),
    "weights are on or off": (at(*BIAS)(lambda v: v > 0), "not a tensor of weights"),
    "weights are integers": (at(*BIAS)(lambda v: v.long()), "not a tensor of weights"),
    "weights are a list": (at(*BIAS)(lambda v: v.tolist()), "density_net.0.weight is not a tensor"),
    "weights are sparse": (at(*BIAS)(lambda v: v.to_sparse()), "dense"),
    "weights are NaN": (at(*BIAS)(first), "density_net.0.weight holds NaN"),
    "weights are too large": (at(*BIAS)(lambda v: v.double() + 1e300), "float32 cannot hold"),
    "a mean of squares is negative": (
        at(*MOMENTS, "exp_avg_sq")(lambda v: first(v, -1e-8)),
        "is negative",
    ),
    "a mean of squares is absurd": (at(*MOMENTS, "exp_avg_sq")(lambda v: first(v, 1e31)), "1e+30"),
    "a mean is absurd": (at(*MOMENTS, "exp_avg")(lambda v: first(v, -1e31)), "1e+30"),
    "a mean is NaN": (at(*MOMENTS, "exp_avg")(first), "exp_avg holds NaN"),
    "a mean is of integers": (at(*MOMENTS, "exp_avg")(lambda v: v.int()), "exp_avg"),
    "a mean is text": (at(*MOMENTS, "exp_avg")("0"), "exp_avg"),
    "Adam's step is negative": (at(*MOMENTS, "step")(torch.tensor(-3.0)), "step of parameter 0"),
    "Adam's step is NaN": (at(*MOMENTS, "step")(float("nan")), "step of parameter 0"),
    "Adam's step is absurd": (at(*MOMENTS, "step")(torch.tensor(1e13)), "step of parameter 0"),
    "Adam's step is text": (at(*MOMENTS, "step")("300"), "step of parameter 0"),
    "Adam's step is a fraction": (at(*MOMENTS, "step")(2.5), "step of parameter 0"),
    "Adam's step is a table": (at(*MOMENTS, "step")(torch.ones(3)), "step of parameter 0"),
    "Adam's entry is a list": (at(*MOMENTS)([]), "entry 0 is not Adam's"),
    "Adam's entries are a list": (at("optimizer_state_dict", "state")([]), "not the state of an"),
    "Adam's groups are None": (at("optimizer_state_dict", "param_groups")(None), "optimizer"),
    "the optimizer is None": (
        at("optimizer_state_dict")(None),
        "optimizer_state_dict is not a dict",
    ),
    "the loss scale is 0": (at("scaler_state_dict")(SCALE | {"scale": 0.0}), "scaler_state_dict"),
    "the loss scale is NaN": (
        at("scaler_state_dict")(SCALE | {"scale": float("nan")}),
        "scaler_state_dict",
    ),
    "the loss scale is text": (
        at("scaler_state_dict")(SCALE | {"scale": "1"}),
        "scaler_state_dict",
    ),
    "averages are counted by text": (at("ema_state_dict", "num_updates")("9"), "num_updates"),
    "averages are negative in number": (at("ema_state_dict", "num_updates")(-1), "num_updates"),
    "averages are text": (at("ema_state_dict", "shadow")(["a"]), "shadow"),
    "averages are integers": (
        at("ema_state_dict", "shadow", 0)(lambda v: v.int()),
        "shadow is not a list of weights",
    ),
    "the grid is a list": (at("occupancy_state_dict", "density")([0.0]), "occupancy_state_dict"),
    "the box is inside out": (at("box")(lambda v: v.flip(0)), "box"),
    "the box is a list": (at("box")([0, 1]), "box"),
    "the best score is NaN": (at("best")({"step": 7, "psnr": float("nan")}), "best"),
    "the best step is text": (at("best")({"step": "7", "psnr": 20.0}), "best"),
    "the ranking's steps are no digits": (at("ranking", "top")({"²": 1.0}), "ranking"),
    "the ranking's scores are text": (at("ranking", "top")({"7": "20"}), "ranking"),
    "the ranking is empty": (at("ranking")({"top": {}}), "ranking"),
    "the scene is a text": (at("scene")("lego"), "scene is not a dict"),
    "the scene's views are a list": (at("scene", "poses")([1]), "scene: poses"),
    "the scene's test views are a text": (at("scene", "test")("all"), "scene: test"),
    "dicts are nested without end": (
        lambda state: state.update(more=deep(100)),
        "inside one another",
    ),
}


def save(state: dict, path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.save(state, path)


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    path = tmp_path_factory.mktemp("good") / "000299.tar"
    save(whole(), path)
    load_checkpoint(path)
    return path


@pytest.mark.parametrize("case", WRONG)
def test_a_value_that_no_run_writes_is_refused_like_a_damaged_file(good, tmp_path, case):
    change, words = WRONG[case]
    shutil.copy(good, tmp_path)
    state = whole()
    change(state)
    save(state, tmp_path / "000300.tar")
    said = []
    path, _ = checkpoint_choice.newest_checkpoint(tmp_path, said.append)
    assert path.name == "000299.tar" and len(said) == 1 and "\n" not in said[0]
    assert "000300.tar: " in said[0] and words in said[0], said


def test_parts_that_are_not_used_may_be_none_or_missing(tmp_path):
    for parts in (["scaler_state_dict", "ema_state_dict", "ranking", "best", "scene"], ["args"]):
        state = whole()
        for part in parts:
            del state[part]
            if len(parts) > 1:
                state[part] = None
        save(state, tmp_path / "a.tar")
        assert load_checkpoint(tmp_path / "a.tar")["global_step"] == 300


def broken_copies(path, wanted) -> int:
    """Write a newer file than ``path`` beside it for each wrong value that fits; how many."""
    state = torch.load(path, weights_only=True)
    names = list(state["network_fn_state_dict"])
    for number, name in enumerate(wanted, 1):
        content = torch.load(path, weights_only=True)
        place = ("network_fn_state_dict", names[0])
        change = WRONG[name][0] if "weights" not in name else at(*place)(quantized)
        change(content)
        save(content, path.with_name(f"{state['global_step'] + number:06d}.tar"))
    return len(wanted)


WANTED = ["args are None", "weights are quantized", "a mean of squares is negative",
          "Adam's step is NaN", "the loss scale is 0", "the averages' decay is text"]  # fmt: skip


def test_run_nerf_goes_on_from_the_one_before_and_leaves_a_newer_version_alone(tiny, tmp_path):
    ema = ["--ema_decay", "0.9"]
    run = tmp_path / "tiny"
    assert run_main(run_nerf.main, *tiny, *ema, "--N_iters", 4).returncode == 0
    count = broken_copies(run / "000004.tar", WANTED)
    resumed = run_main(run_nerf.main, *tiny, *ema, "--N_iters", 20)
    assert resumed.returncode == 0 and "Traceback" not in resumed.stderr
    assert resumed.stderr.count("skipping a bad checkpoint") == count
    assert "resumed from" in resumed.stderr and "000004.tar at step 4" in resumed.stderr
    unbroken = run_main(run_nerf.main, *tiny, *ema, "--N_iters", 20, "--expname", "unbroken")
    assert unbroken.returncode == 0
    assert_same_training(newest(run), newest(tmp_path / "unbroken"))
    nothing_of_a_newer_version_is_lost(run, run_nerf.main, [*tiny, *ema])


def test_run_dreamfusion_goes_on_from_the_one_before_and_leaves_a_newer_version_alone(
    tiny_dream, tmp_path
):
    run = tmp_path / "ball"
    flags = [*tiny_dream, "--no-mesh", "--video_frames", "1"]
    assert run_main(run_dreamfusion.main, *flags, "--N_iters", 2).returncode == 0
    count = broken_copies(run / "000002.tar", WANTED)
    resumed = run_main(run_dreamfusion.main, *flags, "--N_iters", 12)
    assert resumed.returncode == 0 and "Traceback" not in resumed.stderr
    assert resumed.stderr.count("skipping a bad checkpoint") == count
    assert "000002.tar at step 2" in resumed.stderr and newest(run)["global_step"] == 12
    nothing_of_a_newer_version_is_lost(run, run_dreamfusion.main, flags)


def nothing_of_a_newer_version_is_lost(run, main, flags) -> None:
    """As the newest file, and as one so old that a run from another would remove it."""
    for name in ("000003.tar", "900000.tar"):
        state = torch.load(list_checkpoints(run)[0], weights_only=True)
        torch.save({**state, "format": 2, "args": ["of a kind of its own"]}, run / name)
        before = {path.name: path.read_bytes() for path in run.glob("*.tar")}
        for more in ([], ["--i_weights", "1"]):
            refused = run_main(main, *flags, "--N_iters", 30, *more)
            assert refused.returncode == 2 and "Traceback" not in refused.stderr
            line = refused.stderr.splitlines()[-1]
            assert f"{name}: written by a newer version (format 2" in line
        assert {path.name: path.read_bytes() for path in run.glob("*.tar")} == before
        with pytest.raises(NewerFormatError):
            load_checkpoint(run / name)
        assert isinstance(NewerFormatError("x"), CheckpointError)
        (run / name).rename(run / f"aside_{name}")
    # Asked to start anew, a run moves it out of the way whole.
    (run / "aside_900000.tar").rename(run / "900000.tar")
    assert run_main(main, *flags, "--N_iters", 1, "--no_reload").returncode == 0
    assert (run / "before_1" / "900000.tar").read_bytes() == before["900000.tar"]
