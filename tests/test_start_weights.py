"""Runs that start from weights alone (--ft_weights), or from an object in another field."""

import shutil

import imageio.v3 as iio
import numpy as np
import pytest
import safetensors.torch
import torch
from helpers import DREAM_TINY, NERF_TINY, newest, run_main

import run_dreamfusion
import run_nerf
from nerf.text3d import refit
from nerf.training.weights import split_module

FROZEN = ["--N_iters", 1, "--lrate", 1e-12]  # what a run starts with is what it saves


def nerf(*words):
    return run_main(run_nerf.main, *words)


def dream(*words):
    return run_main(run_dreamfusion.main, *words)


def refused(run, *words):
    result = run(*words)
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr
    return result.stderr.splitlines()[-1]


def said(result, start):
    """The one line of a successful run that begins so."""
    assert result.returncode == 0, result.stderr
    (line,) = [line for line in result.stderr.splitlines() if line.startswith(start)]
    return line


def average(state):
    """The averaged weights of a checkpoint of run_nerf.py by name."""
    names = [f"{level}.{name}" for level, part in LEVELS.items() for name in state[part]]
    return dict(zip(names, state["ema_state_dict"]["shadow"], strict=True))


LEVELS = {"coarse": "network_fn_state_dict", "fine": "network_fine_state_dict"}


def trained_weights(state):
    return {f"{level}.{k}": v for level, part in LEVELS.items() for k, v in state[part].items()}


@pytest.fixture(scope="module")
def scene(data, tmp_path_factory):
    """Flags of tiny runs in a folder that has a trained one, old/, and old.safetensors of it."""
    base = tmp_path_factory.mktemp("weights")
    flags = [*NERF_TINY, "--datadir", data, "--basedir", base, "--ema_decay", 0.9]
    result = nerf(*flags, "--expname", "old", "--N_iters", 20, "--lrate", 0.02)
    assert result.returncode == 0, result.stderr
    out = ["--expname", "old", "--export_weights", base / "old.safetensors"]
    assert nerf(*flags, *out).returncode == 0
    return base, flags


@pytest.mark.parametrize("file", ["old/000020.tar", "old.safetensors"])
def test_a_new_run_starts_from_averaged_weights_at_step_0(scene, file):
    base, flags = scene
    name = f"from_{file.split('.')[-1]}"
    words = [*flags, *FROZEN, "--expname", name, "--ft_weights", base / file]
    line = said(nerf(*words), "--ft_weights")
    assert line == (
        f"--ft_weights {base / file} (step 20, ema weights): loaded 24 tensors, ignored 0; "
        "step 0, with a fresh optimizer"
    )
    new, expected = newest(base / name), average(newest(base / "old"))
    assert new["global_step"] == 1 and new["rays_drawn"] == 64
    assert {float(e["step"]) for e in new["optimizer_state_dict"]["state"].values()} == {1.0}
    for name_, value in trained_weights(new).items():
        torch.testing.assert_close(value, expected[name_], atol=1e-6, rtol=0)
    # The same command resumes the run, and does not load the weights again.
    again = nerf(*words, "--N_iters", 2, "--lrate", 0.1)
    assert "resumed from" in again.stderr and "--ft_weights" not in again.stderr.split("resumed")[1]


def test_a_module_alone_and_ignored_names(scene, tmp_path):
    base, flags = scene
    old = newest(base / "old")
    # As nerf-pytorch writes it.
    keys = [*LEVELS.values(), "optimizer_state_dict", "global_step"]
    torch.save({key: old[key] for key in keys}, tmp_path / "theirs.tar")
    words = [*flags, *FROZEN, "--expname", "part", "--ft_weights", f"{tmp_path}/theirs.tar:fine"]
    line = said(nerf(*words, "--ft_ignore", "fine.rgb_linear", "fine.alpha_linear.bias"), "--ft_w")
    assert "(step 20, raw weights): loaded 9 tensors of fine, ignored 3: " in line
    assert "fine.rgb_linear (2), fine.alpha_linear.bias (1); step 0" in line
    assert nerf(*flags, *FROZEN, "--expname", "fresh").returncode == 0
    new, fresh, given = (trained_weights(newest(base / n)) for n in ("part", "fresh", "old"))
    for name, value in new.items():
        taken = name.startswith("fine.") and "rgb" not in name and "alpha_linear.bias" not in name
        source = given if taken else fresh
        torch.testing.assert_close(value, source[name], atol=1e-6, rtol=0)
        assert not torch.equal(given[name], fresh[name])


def test_what_does_not_fit_is_one_line_and_leaves_nothing(scene):
    base, flags = scene
    words, tar = [*flags, "--expname", "bad", "--N_iters", 1], base / "old" / "000020.tar"
    lines = {
        f"--ft_weights {tar} --netwidth 8": "coarse.pts_linears.0.bias is [16] there, [8] here; ",
        f"--ft_weights {tar} --N_importance 0": "fine.alpha_linear.bias is in the file only; ",
        f"--ft_weights {tar} --netdepth 3": "coarse.pts_linears.2.bias is not in the file; ",
        f"--ft_weights {tar}:field": "network has no field; it has coarse.",
        f"--ft_weights {tar} --ft_ignore grid": "--ft_ignore grid: neither ",
        "--ft_ignore grid": "--ft_ignore needs --ft_weights",
        f"--ft_weights {tar} --ft_path {tar}": "both choose where to start",
        f"--ft_weights {tar} --render_only": "starts a new run, and --render_only reads an old one",
        "--ft_weights nowhere.tar": "nowhere.tar: no such checkpoint",
        "--ft_weights nowhere.safetensors": "not a readable .safetensors file",
    }
    for more, line in lines.items():
        assert line in refused(nerf, *words, *more.split()), more
    assert not (base / "bad").exists()
    ignored = ["--ft_weights", tar, "--netwidth", 8, "--ft_ignore", "coarse"]
    assert "ignored 12: coarse (12)" in said(nerf(*words, *FROZEN, *ignored), "--ft_weights")


def test_broken_weights_are_refused(scene, tmp_path):
    base, flags = scene
    words = [*flags, "--expname", "broken", "--ft_weights", tmp_path / "x.safetensors"]
    tensors = safetensors.torch.load_file(base / "old.safetensors")
    tensors["fine.rgb_linear.bias"][0] = float("nan")
    safetensors.torch.save_file(tensors, tmp_path / "x.safetensors")
    assert "fine.rgb_linear.bias holds NaN or infinity" in refused(nerf, *words)
    content = (base / "old.safetensors").read_bytes()
    (tmp_path / "x.safetensors").write_bytes(content[: len(content) // 2])
    assert "x.safetensors: not a readable .safetensors file" in refused(nerf, *words)


def test_a_path_may_have_a_colon(tmp_path):
    (tmp_path / "a:b.tar").touch()
    assert split_module(f"{tmp_path}/a:b.tar") == (tmp_path / "a:b.tar", "")
    assert split_module(f"{tmp_path}/a:b.tar:field.x") == (tmp_path / "a:b.tar", "field.x")
    assert split_module("old.tar") == (split_module("old.tar:")[0], "")


# ------------------------------------------------------------------------------------ text to 3D


@pytest.fixture(scope="module")
def ball(tmp_path_factory):
    """Flags of tiny runs in a folder that has a trained one, ball/."""
    base = tmp_path_factory.mktemp("objects")
    flags = [*DREAM_TINY, "--basedir", base]
    result = dream(*flags, "--N_iters", 40)
    assert result.returncode == 0, result.stderr
    return base, flags


def frames(run):
    """The turntable's colors and opacities, in [0, 1]."""
    (folder,) = run.glob("render_path_*")
    files = [*sorted(folder.glob("*.png")), *sorted((folder / "opacity").glob("*.png"))]
    return np.stack([iio.imread(file) / 255.0 for file in files])


def psnr(first, second):
    return -10 * np.log10(np.mean((frames(first) - frames(second)) ** 2))


@pytest.mark.slow
def test_an_object_moves_into_other_fields_and_looks_the_same(ball, monkeypatch):
    """MLP to tri-planes, to finer ones, back to a smaller MLP; each of the one before."""
    base, flags = ball
    monkeypatch.setattr(refit, "STEPS", 200)
    start = {
        "planes": ("ball", ["--field", "triplane", "--grid_res", 32]),
        "finer": ("planes", ["--field", "triplane", "--grid_res", 48]),
        "back": ("finer", ["--netwidth", 24, "--netdepth", 3]),
        "grid": ("ball", ["--occ_res", 24]),
    }
    lines = {
        "planes": "another field (field: mlp -> triplane), fitted in 200 steps and ",
        "finer": "its weights are taken, resampled to this run's grids (grid_res: 32 -> 48)",
        "back": "another field (field: triplane -> mlp), fitted in 200 steps and ",
        "grid": "its weights are taken, resampled to this run's grids (occ_res: 16 -> 24)",
    }
    for name, (source, field) in start.items():
        words = [*FROZEN, "--lrate_grid", 0, "--expname", name, "--init_from", base / source]
        result = dream(*flags, *words, *field)
        assert said(result, "starting from the object of").endswith(".tar")
        line = said(result, lines[name])
        if "fitted" in line:
            alpha, albedo = (
                float(text.split()[0])
                for text in line.split("differs by ")[1:] + [line.split("albedo by ")[1]]
            )
            assert 0 < alpha < 0.03 and 0 < albedo < 0.1, line
        assert psnr(base / name, base / source) > 35, name
    assert frames(base / "ball").std() > 0.1  # there is something to see
    assert psnr(base / "back", base / "ball") > 32


def test_weights_of_an_object_and_of_its_encoding(ball, tmp_path):
    base, flags = ball
    planes = ["--field", "triplane", "--grid_res", 16, *FROZEN]
    result = dream(*flags, *planes, "--expname", "a", "--n_particles", 2, "--lrate", 0.1)
    assert result.returncode == 0, result.stderr
    old = newest(base / "a")
    words = [*flags, *planes, "--lrate_grid", 0, "--expname", "b", "--n_particles", 2]
    given = f"{base}/a/000001.tar:members.1.field.encoding"
    line = said(dream(*words, "--ft_weights", given), "--ft_weights")
    assert "loaded 3 tensors of members.1.field.encoding, ignored 0" in line
    new = newest(base / "b")
    names = [name for name in old["network_fn_state_dict"] if name.startswith("encoding.planes")]
    assert len(names) == 3
    for name in names:
        theirs = old["particles"][0]["network_fn_state_dict"][name]  # of the second object
        assert torch.equal(new["particles"][0]["network_fn_state_dict"][name], theirs)
        assert not torch.equal(new["network_fn_state_dict"][name], theirs)
    shutil.rmtree(base / "b")
    assert "network has no members.1; it has field." in refused(
        dream, *flags, *planes, "--expname", "b", "--ft_weights", f"{base}/a/000001.tar:members.1"
    )
    assert "both choose where to start" in refused(
        dream, *flags, "--expname", "b", "--ft_weights", base / "x", "--init_from", base / "a"
    )
