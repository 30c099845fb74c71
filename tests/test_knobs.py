"""Flags of how a run computes and what it tells: the optimizer, determinism, checks, log levels."""

import sys
from importlib.util import find_spec

import pytest
import torch
from helpers import CPU, FAST_TINY, newest, run_main
from torch import nn

import run_dreamfusion
import run_nerf
from nerf import build_optimizer, build_run
from nerf.build_shapes import check
from nerf.field import NeRFField
from nerf.flags import dreamfusion as dream_flags
from nerf.flags import nerf as nerf_flags
from nerf.training import deterministic as module
from nerf.training.deterministic import deterministic, running_sum
from nerf.training.distributed import World

HAS_CHECKERS = bool(find_spec("jaxtyping") and find_spec("beartype"))
needs_checkers = pytest.mark.skipif(not HAS_CHECKERS, reason="needs jaxtyping and beartype")


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A function: script, text -> the user's own defaults of that script are this file."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))

    def write(script: str, text: str):
        path = tmp_path / "config" / "nerf_dreamfusion" / script
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    return write


# ----------------------------------------------------------------------------------- the optimizer


def one_step(*words: str) -> torch.Tensor:
    """Weights of 1 without a gradient, after an update with learning rate 0.1."""
    args = nerf_flags.parse(["--lrate", "0.1", *words])
    layer = nn.Linear(2, 2)
    optimizer = build_optimizer.make_optimizer(layer, args, CPU)
    nn.init.ones_(layer.weight)
    layer.weight.grad = torch.zeros_like(layer.weight)
    optimizer.step()
    return layer.weight.detach()


def test_weight_decay_is_apart_from_the_gradient_in_adamw_alone():
    assert (one_step() == 1).all()
    decayed = one_step("--optim", "adamw", "--weight_decay", "0.5")
    torch.testing.assert_close(decayed, torch.full((2, 2), 1 - 0.1 * 0.5))
    in_gradient = one_step("--weight_decay", "0.5")  # Adam normalizes it: a whole step
    torch.testing.assert_close(in_gradient, torch.full((2, 2), 1 - 0.1))


def options(folder) -> set:
    groups = newest(folder)["optimizer_state_dict"]["param_groups"]
    return {(tuple(group["betas"]), group["eps"], group["weight_decay"]) for group in groups}


def test_optimizers_of_both_scripts_and_a_resume_with_others(tiny, tiny_dream, tmp_path):
    """Not given, they are those of before; a resumed run takes what its command says."""
    words = "--optim adamw --adam_betas 0.8 0.95 --adam_eps 1e-6 --weight_decay 0.01".split()
    fast = [*FAST_TINY, *tiny]
    for main, flags, name, default in (
        (run_nerf.main, tiny, "vanilla", ((0.9, 0.999), 1e-8, 0.0)),
        (run_nerf.main, fast, "fast", ((0.9, 0.99), 1e-15, 0.0)),
        (run_dreamfusion.main, tiny_dream, "dream", ((0.9, 0.99), 1e-15, 0.0)),
    ):
        flags = [*flags, "--expname", name]
        assert run_main(main, *flags, "--N_iters", 1).returncode == 0
        assert options(tmp_path / name) == {default}
        done = run_main(main, *flags, *words, "--N_iters", 2)
        assert done.returncode == 0, done.stderr
        assert "changed since the checkpoint: adam_betas: None -> [0.8, 0.95]" in done.stderr
        assert options(tmp_path / name) == {((0.8, 0.95), 1e-6, 0.01)}
    again = nerf_flags.parse(["--config", str(tmp_path / "vanilla" / "args.txt")])
    assert (again.adam_betas, again.adam_eps, again.optim) == ([0.8, 0.95], 1e-6, "adamw")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--adam_betas 0.9", "--adam_betas: expected 2 numbers: --adam_betas BETA1 BETA2"),
        ("--adam_betas 0.9 1", "--adam_betas 1: expected a number from 0 to below 1"),
        ("--optim sgd", "--optim sgd: expected one of adam, adamw"),
        ("--log_level loud", "--log_level loud: expected one of debug, info, warning"),
    ],
)
def test_wrong_values_are_one_line(words, message):
    done = run_main(run_nerf.main, *words.split())
    assert done.returncode == 2 and done.stderr.strip() == f"run_nerf.py: {message}"


# ------------------------------------------------ determinism, shapes and log levels, in real runs


def test_a_scene_repeats_to_the_bit_and_tells_as_much_as_is_asked(tiny, tmp_path):
    """One run tells all, the other warnings alone; shapes that are checked change nothing."""
    flags = [*tiny, "--deterministic", "--N_iters", 4, "--i_print", 2]
    loud = run_main(run_nerf.main, *flags, "--expname", "loud", "--log_level", "debug")
    words = ["--log_level", "warning", *(["--debug_shapes"] if HAS_CHECKERS else [])]
    calm = run_main(run_nerf.main, *flags, *words, "--expname", "calm")
    assert loud.returncode == calm.returncode == 0, calm.stderr
    states = [newest(tmp_path / name)["network_fn_state_dict"] for name in ("loud", "calm")]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    log = (tmp_path / "calm" / "log.txt").read_text()
    assert "deterministic algorithms: a run repeated" in log
    assert ("shapes are checked" in log) == HAS_CHECKERS
    assert "step 4/4" in log and "test: PSNR" in log
    allowed = ("LPIPS is not measured", "warning")
    assert all(any(word in line for word in allowed) for line in calm.stderr.splitlines())
    assert "step 4/4" in loud.stderr and "loss_coarse 0." in loud.stderr
    assert "loss_coarse" not in (tmp_path / "loud" / "log.txt").read_text()
    assert not torch.are_deterministic_algorithms_enabled()
    # A mistake is one line; its traceback is in log.txt, and on the terminal where one wants it.
    for level, shown in (("info", False), ("debug", True)):
        words = ["--netwidth", 17, "--expname", "loud", "--log_level", level]
        wrong = run_main(run_nerf.main, *flags, *words)
        assert wrong.returncode == 2 and ("Traceback" in wrong.stderr) == shown
    assert "Traceback" in (tmp_path / "loud" / "log.txt").read_text()


def test_views_are_shared_out_over_processes():
    args = dream_flags.parse(["--prompt", "x", "--batch_views", "8", "--guidance", "gaussian"])
    batches = build_run.view_batches(args, World(0, 2, CPU), print, "lower something")
    assert batches.size == 4 and batches.advice == "lower something"
    args.views_at_once = 1
    batches = build_run.view_batches(args, World(0, 2, CPU), print, "lower something")
    assert batches.size == 1


@pytest.mark.parametrize(("shape", "dim"), [((7,), 0), ((5, 13), -1), ((6, 4), 0), ((3, 0), -1)])
def test_a_running_sum_of_ones_own_is_that_of_torch(shape, dim):
    values = torch.rand(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    one, other = (values.clone().requires_grad_() for _ in range(2))
    found, expected = running_sum(one, dim), torch.cumsum(other, dim)
    torch.testing.assert_close(found, expected)
    found.square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(one.grad, other.grad)
    assert running_sum(values.float(), dim, dtype=torch.float64).dtype == torch.float64


@pytest.mark.parametrize("kind", ["vanilla", "fast"])
def test_where_torch_has_no_running_sum_rays_are_rendered_all_the_same(
    tiny, tmp_path, monkeypatch, kind
):
    """As on a GPU: every sum of real numbers is refused, and replaced."""
    flags = [*(FAST_TINY if kind == "fast" else []), *tiny, "--N_iters", 3, "--i_print", 1]
    assert run_main(run_nerf.main, *flags, "--expname", "plain").returncode == 0
    replaced = []
    monkeypatch.setattr(module, "is_refused", lambda values: values.is_floating_point())
    monkeypatch.setattr(
        module,
        "running_sum",
        lambda *given, **more: replaced.append(1) or running_sum(*given, **more),
    )
    done = run_main(run_nerf.main, *flags, "--deterministic", "--expname", "sums")
    assert done.returncode == 0, done.stderr
    assert len(replaced) > 3
    one, other = (newest(tmp_path / name)["network_fn_state_dict"] for name in ("plain", "sums"))
    for name, value in one.items():
        torch.testing.assert_close(other[name], value, rtol=1e-4, atol=1e-6)


def put_in_place(*given, **named):
    """An operation without deterministic implementation on any device."""
    return torch.zeros(4).put_(torch.tensor([0, 0]), torch.ones(2))


def test_what_torch_cannot_repeat_is_refused_by_its_name(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(run_nerf, "squared_error", put_in_place)
    done = run_main(run_nerf.main, *tiny, "--deterministic", "--N_iters", 2)
    assert done.returncode == 2, done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("run_nerf.py: --deterministic: put_ has no deterministic impl")
    assert "leave the flag out" in last and not torch.are_deterministic_algorithms_enabled()
    with deterministic(False, print):
        put_in_place()


# ---------------------------------------------------------------------------------- --debug_shapes


@needs_checkers
def test_a_wrong_shape_is_named_and_missing_packages_are_one_sentence(tiny, monkeypatch):
    flags = [*tiny, "--debug_shapes", "--N_iters", 1]
    forward = NeRFField.forward

    def wrong(self, *given):
        density, color = forward(self, *given)
        return density, torch.cat([color, color[..., :1]], -1)

    with monkeypatch.context() as patched:
        patched.setattr(NeRFField, "forward", wrong)
        done = run_main(run_nerf.main, *flags)
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 2 and "NeRFField.forward: color is torch.float32 [" in last
    assert "4], expected float [*samples 3] after points [" in last
    assert NeRFField.forward is forward
    monkeypatch.setitem(sys.modules, "jaxtyping", None)
    done = run_main(run_nerf.main, *flags)
    assert done.returncode == 2
    needs = "run_nerf.py: --debug_shapes needs two more packages: pip install jaxtyping beartype"
    assert done.stderr.strip().splitlines()[-1] == needs
    assert run_main(run_nerf.main, *flags, "--compile").returncode == 2


@needs_checkers
def test_one_name_is_one_length():
    rays = torch.zeros(4, 3)
    check("f", {"a": (rays, "rays 3"), "b": (torch.zeros(4), "rays"), "c": (None, "rays")})
    with pytest.raises(ValueError, match=r"f: b is torch.float32 \[5\], expected float \[rays\]"):
        check("f", {"a": (rays, "rays 3"), "b": (torch.zeros(5), "rays")})
    with pytest.raises(ValueError, match="a is torch.int64"):
        check("f", {"a": (rays.long(), "rays 3")})


# ---------------------------------------------------------------------------- the user's defaults


def test_own_defaults_are_weaker_than_everything_typed(tiny, tmp_path, site):
    path = site("run_nerf.txt", "lrate = 0.125\nseed = 7\nN_rand = 32\nadam_betas = [0.5, 0.6]\n")
    (tmp_path / "config.txt").write_text("N_rand = 16\n")
    words = ["--config", tmp_path / "config.txt", "--seed", 3, "--N_iters", 1]
    flags = [word for word in tiny if word not in ("--N_rand", "64", "--lrate", "5e-3")]
    done = run_main(run_nerf.main, *flags, *words)
    assert done.returncode == 0, done.stderr
    line = f"from {path}: lrate 0.125, adam_betas [0.5, 0.6]"
    assert line in (tmp_path / "tiny" / "log.txt").read_text()
    args = nerf_flags.parse([str(word) for word in words])
    assert (args.lrate, args.seed, args.N_rand, args.adam_betas) == (0.125, 3, 16, [0.5, 0.6])
    # A run's record is complete: it is read as it was.
    path.write_text("sd_model = x\nlrate = 0.25\n")
    again = nerf_flags.parse(["--config", str(tmp_path / "tiny" / "args.txt")])
    assert again.lrate == 0.125 and again.notes == []
    dream = dream_flags.parse(["--guidance", "gaussian", "--prompt", "x"])
    assert dream.lrate == 1e-3  # a file for each script


def test_a_mistake_in_own_defaults_names_their_file(site, tmp_path):
    config = tmp_path / "config.txt"
    for text, own, message in (
        ("N_rand = 16\n", "lrat = 1\n", "{site}: unknown flag lrat; did you mean lrate?"),
        ("N_rand = 16\n", "lrate = fast\n", "{site}: lrate = fast: expected a number above 0"),
        ("N_rand = many\n", "lrate = 1e-3\n", "{config}: N_rand = many: expected a whole number"),
        ("N_rand = 16\n", "lrate 1 2 =\n=\n", "{site}: line 2 is"),
    ):
        config.write_text(text)
        path = site("run_nerf.txt", own)
        done = run_main(run_nerf.main, "--config", config)
        lines = done.stderr.strip().splitlines()
        assert done.returncode == 2 and len(lines) == 1, lines
        assert message.format(site=path, config=config) in lines[0], lines
