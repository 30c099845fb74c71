"""run_dreamfusion.py as a user runs it: make, resume, stop, render, export, refuse. Tiny runs."""

import csv
import json
import os
import signal
import subprocess
import sys
import time

import imageio.v3 as iio
import numpy as np
import pytest
import torch
from helpers import (
    DREAM_TINY,
    REPOSITORY,
    assert_same_training,
    flat,
    newest,
    run_main,
    run_python,
    torchrun,
)
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_models import tiny_sd_folder

import run_dreamfusion
from guidance import build as guidance_build
from guidance.gaussian import RADIUS, RGB
from guidance.lora import attention_layers
from guidance.stable_diffusion import StableDiffusion
from nerf.media import MIN_CELL
from nerf.outputs import object as objects
from nerf.training import monitor
from nerf.training.checkpoint import list_checkpoints

MODEL = REPOSITORY / "guidance" / "tiny" / "model"


def dream(*arguments):
    return run_main(run_dreamfusion.main, *arguments)


def one_line(result) -> str:
    """The only line of a mistake's answer, without a traceback."""
    assert result.returncode == 2 and "Traceback" not in result.stderr, result.stderr
    lines = [text for text in result.stderr.splitlines() if text.startswith("run_dreamfusion.py: ")]
    assert len(lines) == 1, result.stderr
    return lines[0]


def test_a_run_leaves_everything_the_readme_names(tiny_dream, tmp_path):
    result = run_python("run_dreamfusion.py", *tiny_dream, "--N_iters", 10, "--i_img", 5, "--mesh")
    assert result.returncode == 0, result.stderr
    run = tmp_path / "ball"
    names = "args.json args.txt cmd.txt log.txt metrics.csv metrics.json mesh.glb 000010.tar"
    for name in [*names.split(), "previews/000005.png", "previews/000010.png"]:
        assert (run / name).stat().st_size > 0, name
    with open(run / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == [5, 10]
    assert all(np.isfinite(float(value)) for row in rows for value in row.values())
    assert "not a measure of quality" in result.stderr
    turntable = run / "render_path_000010"
    for name in ("rgb", "lit", "normal", "depth", "opacity"):
        assert iio.imread(turntable / f"{name}.mp4").shape == (3, 16, 16, 3)
    cell = MIN_CELL  # pictures of 16 pixels, enlarged to it
    height, width, _ = iio.imread(run / "previews" / "000010.png").shape
    assert 4 * cell < height < 5 * cell and 4 * cell < width < 5 * cell
    assert json.loads((run / "metrics.json").read_text())["prompt"] == "ball"


def test_the_known_ball_is_found(tiny_dream, tmp_path):
    """The whole loop against algebra: the scene becomes the ball that the closed form asks for."""
    flags = ["--N_iters", 250, "--train_res", 20, "--netwidth", 32, "--march_steps", 48]
    flags += ["--eval_res", 32, "--p_diffuse", 0, "--ema_decay", 0.9, "--lr_schedule", "cosine"]
    assert dream(*tiny_dream, *flags).returncode == 0
    seen = iio.imread(tmp_path / "ball" / "render_path_000250" / "000.png") / 255.0
    middle = seen[12:20, 12:20].reshape(-1, 3).mean(0)
    assert np.abs(middle - RGB).max() < 0.06
    # From 2.75 away with a field of view of 41 degrees a ball of radius 0.6 covers 26 %.
    focal = 0.5 / np.tan(np.radians(20.5))
    disc = np.pi * (focal * RADIUS) ** 2 / (2.75**2 - RADIUS**2)
    solid = np.abs(seen - 1).max(-1) > 0.5
    assert solid.mean() == pytest.approx(disc, rel=0.15)


MODES = {
    "plain": [],
    "learned background, EMA off": ["--background", "learned", "--ema_decay", "0"],
    "fp16": ["--amp", "fp16"],
    "tri-plane": ["--field", "triplane", "--grid_res", "16"],
    "hash grid": ["--field", "hashgrid", "--grid_res", "16"],
    "schedules": "--train_res 0:8,4:12 --t_max 0:0.98,8:0.4 --lambda_orient 0:0,8:9".split(),
    "pictures": ["--space", "2d"],
}


@pytest.mark.parametrize("mode", MODES)
def test_stop_and_resume_is_bit_exact(tiny_dream, tmp_path, mode):
    flags = [*tiny_dream, *MODES[mode], "--video_frames", 1]
    for name, steps in (("whole", [8]), ("parts", [3, 8])):
        for count in steps:
            given = [*flags, "--expname", name, "--N_iters", str(count)]
            assert run_dreamfusion.main([str(word) for word in given]) == 0
    assert_same_training(newest(tmp_path / "whole"), newest(tmp_path / "parts"))


def test_a_signal_saves_the_step_and_the_run_goes_on(tiny_dream, tmp_path):
    command = [sys.executable, "run_dreamfusion.py", *tiny_dream, "--N_iters", "100000"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, cwd=REPOSITORY, env=environment, stderr=subprocess.PIPE)
    table = tmp_path / "ball" / "metrics.csv"
    deadline = time.monotonic() + 90
    while not (table.exists() and len(table.read_text().splitlines()) > 2):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 143
    step = newest(tmp_path / "ball")["global_step"]
    assert step > 5 and "Traceback" not in process.stderr.read().decode()
    result = dream(*tiny_dream, "--N_iters", step + 2)
    assert result.returncode == 0 and f"at step {step}" in result.stderr


def test_two_processes_give_the_same_object_as_one(tiny_dream, tmp_path):
    flags = [*tiny_dream, "--N_iters", 4, "--video_frames", 2, "--background", "learned"]
    flags += ["--lambda_opacity", 1]
    single = dream(*flags, "--expname", "one")
    assert single.returncode == 0, single.stderr
    double = run_python(*torchrun(2), "run_dreamfusion.py", *flags, "--expname", "two")
    assert double.returncode == 0, double.stderr
    one, two = newest(tmp_path / "one"), newest(tmp_path / "two")
    for key in ("network_fn_state_dict", "background_state_dict"):
        for name, value in one[key].items():
            torch.testing.assert_close(two[key][name], value, atol=1e-4, rtol=1e-3)
    assert len(list((tmp_path / "two" / "render_path_000004").glob("*.png"))) == 2


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run to read from."""
    base = tmp_path_factory.mktemp("runs")
    assert run_dreamfusion.main([*DREAM_TINY, "--basedir", str(base), "--N_iters", "20"]) == 0
    return base


@pytest.mark.parametrize("ending", ["glb", "obj", "ply"])
def test_export_from_a_finished_run(finished, tmp_path, ending):
    """Without a prompt it takes the newest run, and the flags that its weights were made with."""
    out = tmp_path / f"out.{ending}"
    flags = ["--basedir", finished, "--export", out, "--mesh_res", 24, "--mesh_level", 1]
    result = dream(*flags)
    assert result.returncode == 0, result.stderr
    import trimesh

    surface = trimesh.load(out, force="mesh")
    assert len(surface.faces) > 50 and surface.is_watertight


def test_render_only_changes_nothing(finished):
    run = finished / "ball"
    before = list_checkpoints(run)[0].read_bytes()
    result = dream("--basedir", finished, "--prompt", "ball", "--render_only", "--video_frames", 2)
    assert result.returncode == 0, result.stderr
    assert list_checkpoints(run)[0].read_bytes() == before
    assert (run / "render_path_000020" / "rgb.mp4").exists()


def test_another_run_starts_from_a_finished_object(finished, tiny_dream, tmp_path):
    given = [*tiny_dream, "--expname", "next", "--N_iters", "1", "--lrate", "1e-12"]
    assert run_dreamfusion.main([*given, "--init_from", str(finished / "ball")]) == 0
    old, new = newest(finished / "ball"), newest(tmp_path / "next")
    for value, shadow in zip(
        new["network_fn_state_dict"].values(), old["ema_state_dict"]["shadow"], strict=True
    ):
        torch.testing.assert_close(value, shadow, atol=1e-6, rtol=0)
    assert new["global_step"] == 1


def test_a_file_of_prompts_makes_a_run_each(tiny_dream, tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("a first\na second one\n", encoding="utf-8")
    flags = [*tiny_dream, "--prompt_file", str(path), "--N_iters", "2", "--video_frames", "1"]
    assert run_dreamfusion.main(flags) == 0
    for name in ("a_first", "a_second_one"):
        assert json.loads((tmp_path / name / "metrics.json").read_text())["step"] == 2


def test_pictures_instead_of_a_scene(tiny_dream, tmp_path):
    flags = [*tiny_dream, "--space", "2d", "--N_iters", "150", "--lrate", "0.1", "--i_img", "150"]
    flags += ["--p_random_bg", "0", "--background", "white"]
    assert run_dreamfusion.main(flags) == 0
    seen = iio.imread(tmp_path / "ball" / "previews" / "000150.png") / 255.0
    assert seen.shape == (12, 24, 3)
    middle = seen[5:7, 5:7].reshape(-1, 3).mean(0)
    assert np.abs(middle - RGB).max() < 0.15 and seen[0, 0].min() > 0.8


def test_a_preview_shows_each_picture_whatever_its_size(tiny_dream, tmp_path):
    flags = [*tiny_dream, "--space", "2d", "--N_iters", 2, "--train_res", 72, "--ema_decay", 0]
    result = dream(*flags, "--lrate", 0.5)
    assert result.returncode == 0, result.stderr
    seen = iio.imread(tmp_path / "ball" / "previews" / "000002.png") / 255.0
    (logits,) = newest(tmp_path / "ball")["network_fn_state_dict"].values()
    pictures = logits.sigmoid().permute(0, 2, 3, 1).numpy()
    assert np.abs(pictures[0] - pictures[1]).max() > 0.1
    assert np.abs(seen - np.concatenate(pictures, axis=1)).max() <= 0.51 / 255


# ------------------------------------------------------------------------------ with a model


def with_model(tiny_dream, folder, *flags):
    return [
        *tiny_dream,
        "--guidance",
        "sds",
        "--sd_model",
        str(folder),
        "--train_res",
        "16",
        *flags,
    ]


def test_a_stable_diffusion_of_the_real_layout_runs_resumes_and_exports(
    tiny_dream, sd_folder, tmp_path
):
    flags = with_model(tiny_dream, sd_folder, "--prompt", "a cube", "--amp", "bf16")
    for steps in (2, 4):
        result = dream(*flags, "--N_iters", steps)
        assert result.returncode == 0, result.stderr
    assert "resumed from" in result.stderr and "'a cube, side view'" in result.stderr
    out = tmp_path / "out.glb"
    result = dream("--basedir", tmp_path, "--export", out, "--mesh_res", 24, "--mesh_level", 1)
    assert result.returncode == 0 and out.stat().st_size > 1000, result.stderr


@pytest.mark.skipif(not MODEL.exists(), reason="the embedded model is not there")
def test_the_embedded_model_makes_a_step(tmp_path):
    flags = ["--config", REPOSITORY / "configs" / "dream_tiny.txt", "--basedir", tmp_path]
    flags += ["--prompt", "a red gizmo", "--N_iters", 2, "--video_frames", 1, "--no-mesh"]
    result = dream(*flags, "--eval_res", 16)
    assert result.returncode == 0, result.stderr
    assert "gizmo" in result.stderr.replace("a red gizmo", "")  # named as a word it never saw
    # The model knows the fine words, so it is asked in them.
    assert "'a red gizmo, front low view'" in result.stderr and "30 more" in result.stderr


# ------------------------------------------------------------------------------ one clear line


def test_another_prompt_or_model_in_the_same_folder_is_refused(tiny_dream, sd_folder, tmp_path):
    base = with_model(tiny_dream, sd_folder, "--expname", "mine", "--video_frames", "1")
    assert run_dreamfusion.main([*base, "--prompt", "a cube", "--N_iters", "1"]) == 0
    before = list_checkpoints(tmp_path / "mine")
    record = (tmp_path / "mine" / "args.json").read_text()
    line = one_line(dream(*base, "--prompt", "a cone", "--N_iters", 2))
    assert "prompt: a cube -> a cone" in line and "--expname" in line
    other = tiny_sd_folder(tmp_path / "other", "v_prediction")
    other_base = with_model(tiny_dream, other, "--expname", "mine", "--prompt", "a cube")
    line = one_line(dream(*other_base, "--N_iters", 2))
    assert f"made with other flags (--sd_model {sd_folder} -> --sd_model {other}); " in line
    assert list_checkpoints(tmp_path / "mine") == before
    assert (tmp_path / "mine" / "args.json").read_text() == record


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--guidance", "sds", "--prompt", ""], "--prompt is empty"),
        (["--guidance", "sds", "--sd_model", "./no/such"], "no/such"),
        (["--export", "out.stl"], "glb"),
        (["--render_only", "--expname", "never"], "no checkpoint"),
        (["--export", "out.glb", "--expname", "never"], "no checkpoint"),
        (["--init_from", "nowhere.tar"], "nowhere.tar"),
        (["--prompt_file", "nowhere.txt"], "nowhere.txt"),
    ],
)
def test_mistakes_are_one_line(tiny_dream, flags, complaint):
    assert complaint in one_line(dream(*tiny_dream, "--N_iters", 1, *flags))


def test_a_model_whose_vae_cannot_divide_the_size(tiny_dream, sd_folder):
    line = one_line(
        dream(*with_model(tiny_dream, sd_folder, "--guidance_res", "15", "--N_iters", "1"))
    )
    assert "15" in line


@pytest.mark.parametrize(("flags", "wanted"), [((), None), (("--guidance_res", "16"), 16)])
def test_the_model_sees_pictures_of_its_own_size(
    tiny_dream, sd_folder, tmp_path, monkeypatch, flags, wanted
):
    """Whatever the renders' size: 8 x 8 latents of a 64 x 64 render are nothing that it knows."""
    seen, encode = [], StableDiffusion.encode

    def spy(model, images, noise):
        seen.append((*images.shape[-2:], model.native_size))
        return encode(model, images, noise)

    monkeypatch.setattr(StableDiffusion, "encode", spy)
    sizes = ["--train_res", "0:9,1:12", "--N_iters", "2", "--prompt", "a cube"]
    assert (
        run_dreamfusion.main([str(w) for w in with_model(tiny_dream, sd_folder, *sizes, *flags)])
        == 0
    )
    assert len(seen) == 2
    for height, width, native in seen:
        assert height == width == (wanted or native)


def test_collapse_is_said(tiny_dream):
    """With no guidance and a heavy wish for empty space nothing is left."""
    flags = ["--lambda_sds", 0, "--lambda_opacity", 300, "--N_iters", 330, "--train_res", 8]
    result = dream(*tiny_dream, *flags, "--lrate", 3e-2, "--video_frames", 1)
    assert "the object has vanished; lower --lambda_opacity" in result.stderr


# ------------------------------------------------------------------------- the guidance family


GUIDED = ["--prompt", "a red cube", "--video_frames", 1, "--ema_decay", 0.9]


@pytest.mark.parametrize(
    "flags",
    [
        ["--guidance", "vsd"],
        ["--guidance", "vsd", "--n_particles", 2],
        ["--guidance", "csd", "--perp_neg", "--negative_front", "a green sphere"],
        [
            "--t_anneal",
            "falling",
            "--weighting",
            "annealed",
            "--latent_clip",
            "0:1,4:2",
            "--guidance_rescale",
            "0:0,4:1",
        ],
    ],
    ids=lambda flags: " ".join(map(str, flags)),
)
def test_each_guidance_resumes_to_the_bit(tiny_dream, sd_folder, tmp_path, flags):
    common = [*with_model(tiny_dream, sd_folder, *GUIDED), *flags]
    assert dream(*common, "--N_iters", 4, "--expname", "whole").returncode == 0
    # A schedule that ends with the run would differ: stop the same run half way instead.
    halves = [*common, "--N_iters", 4, "--expname", "halves", "--i_weights", 2]
    assert dream(*halves).returncode == 0
    (tmp_path / "halves" / "000004.tar").unlink()
    result = dream(*halves)
    assert (
        result.returncode == 0 and "resumed from" in result.stderr and "at step 2" in result.stderr
    )
    first, second = newest(tmp_path / "whole"), newest(tmp_path / "halves")
    assert_same_training(first, second)
    if "vsd" in flags:
        assert first["copy"]["weights"]["steps"] == 4
        assert (tmp_path / "whole" / "lora.safetensors").stat().st_size > 1000


def test_particles_are_shown_and_exported_one_by_one(tiny_dream, sd_folder, tmp_path):
    flags = with_model(tiny_dream, sd_folder, *GUIDED, "--n_particles", 2, "--N_iters", 2, "--mesh")
    result = dream(*flags, "--mesh_level", 1)
    assert result.returncode == 0, result.stderr
    run = tmp_path / "a_red_cube"
    assert (run / "mesh.glb").exists() and (run / "mesh_1.glb").exists()
    assert (run / "render_path_000002").is_dir() and (run / "render_path_1_000002").is_dir()
    assert 8 * MIN_CELL < iio.imread(run / "previews" / "000002.png").shape[0] < 9 * MIN_CELL
    kept = torch.load(run / "000002.tar")
    one, other = (flat(e["network_fn_state_dict"]) for e in (kept, *kept["particles"]))
    assert not all(torch.equal(one[key], other[key]) for key in one)
    flags[flags.index("--n_particles") + 1] = 3
    result = dream(*flags)
    assert result.returncode == 2 and "n_particles: 2 -> 3" in result.stderr


def test_what_guidance_sees(tiny_dream, sd_folder, tmp_path):
    """--i_attn, --i_guidance: rows are the two views; --save_raw: the numbers of the turntable."""
    flags = with_model(tiny_dream, sd_folder, *GUIDED, "--N_iters", 2, "--i_attn", 2)
    wanted = ["--i_guidance", 2, "--attn_tokens", "red,cube", "--save_raw"]
    done = dream(*flags, *wanted)
    assert done.returncode == 0, done.stderr
    run = tmp_path / "a_red_cube"
    height, width, _ = iio.imread(run / "attentions" / "000002.png").shape
    assert 2 * 128 < height < 3 * 128 and 3 * 128 < width < 4 * 128  # the render and two words
    height, width, _ = iio.imread(run / "guidances" / "000002.png").shape
    assert 2 * 128 < height < 3 * 128 and 4 * 128 < width < 5 * 128
    logged = EventAccumulator(str(run / "tb")).Reload().Tags()["images"]
    assert {"attention", "guidance", "preview"} <= set(logged)
    turntable = run / "render_path_000002"
    depth, normal = (np.load(turntable / name / "000.npy") for name in ("depth", "normal"))
    assert depth.shape == (16, 16) and normal.shape == (16, 16, 3) and depth.dtype == np.float32
    shown = iio.imread(turntable / "normal" / "000.png") / 255.0
    assert np.abs(shown - (normal + 1) / 2).max() < 0.51 / 255 and depth.max() < 10
    result = dream(*flags, "--attn_tokens", "cone", "--no_reload")
    assert result.returncode == 2 and "--attn_tokens cone: not in the prompt" in result.stderr


def test_a_file_of_prompts_leaves_no_adapters_on_the_shared_model(
    tiny_dream, sd_folder, tmp_path, monkeypatch
):
    opened = {}
    original = guidance_build.open_model

    def open_model(*args):
        opened["model"] = original(*args)
        return opened["model"]

    monkeypatch.setattr(guidance_build, "open_model", open_model)
    (tmp_path / "prompts.txt").write_text("a red cube\na green sphere\n")
    flags = with_model(
        tiny_dream, sd_folder, "--guidance", "vsd", "--N_iters", 1, "--video_frames", 1
    )
    assert dream(*flags, "--prompt_file", tmp_path / "prompts.txt").returncode == 0
    layers = attention_layers(opened["model"].unet).values()
    assert layers and not any(layer._forward_hooks for layer in layers)


def test_a_lora_file_starts_the_copy(tiny_dream, sd_folder, tmp_path):
    flags = with_model(tiny_dream, sd_folder, *GUIDED, "--guidance", "vsd", "--N_iters", 2)
    assert dream(*flags, "--lrate_lora", 0.1).returncode == 0
    file = tmp_path / "a_red_cube" / "lora.safetensors"
    again = [*flags, "--expname", "again", "--lrate_lora", 1e-12, "--lora_file", file]
    assert dream(*again).returncode == 0
    copies = [load_file(path) for path in (file, tmp_path / "again" / "lora.safetensors")]
    for name, value in copies[0].items():
        torch.testing.assert_close(copies[1][name], value, atol=1e-6, rtol=0)
    result = dream(*flags, "--expname", "third", "--lora_file", file, "--lora_rank", 2)
    assert result.returncode == 2 and "expected" in result.stderr and "--lora_rank" in result.stderr


def test_out_of_memory_names_a_flag_and_keeps_what_is_saved(
    tiny_dream, sd_folder, tmp_path, monkeypatch
):
    flags = with_model(tiny_dream, sd_folder, *GUIDED, "--N_iters", 4)
    assert dream(*flags, "--N_iters", 2).returncode == 0

    def full(*args, **kw):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB.\nmore")

    monkeypatch.setattr(run_dreamfusion.sds, "distill", full)
    result = dream(*flags)
    assert (
        result.returncode == 2
        and "out of memory" in result.stderr
        and "try --vae_checkpointing" in result.stderr
    )
    assert "Traceback" not in result.stderr
    assert (tmp_path / "a_red_cube" / "000002.tar").exists()


@pytest.mark.parametrize(
    "flags, complaint",
    [
        (["--guidance", "vsd", "--lora_rank", 0], "--lora_rank"),
        (["--guidance", "vsd", "--offload", "sequential"], "use --offload model"),
        (["--guidance", "vsd", "--offload", "model"], "leave one out"),
        (["--offload", "model"], "needs a GPU"),
        (["--attention_slicing", "auto", "--i_attn", 1], "--i_attn draws; leave one out"),
        (["--lora_file", "x.safetensors"], "--lora_file is for --guidance vsd"),
        (["--guidance", "vsd", "--lora_file", "x.safetensors"], "x.safetensors: cannot read it"),
        (["--scheduler", "flow_match_euler_discrete"], "no alphas_cumprod"),
        (["--perp_neg", "--space", "2d"], "--perp_neg tells views apart"),
        (["--latent_clip", -1], "--latent_clip"),
        (["--n_particles", 2, "--space", "2d"], "leave out --n_particles"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else "",
)
def test_contradictory_guidance_is_one_line(tiny_dream, sd_folder, flags, complaint):
    result = dream(*with_model(tiny_dream, sd_folder, *GUIDED, "--N_iters", 2, *flags))
    assert (
        result.returncode == 2 and complaint in result.stderr and "Traceback" not in result.stderr
    )


# ------------------------------------------------------------------- bad numbers, little memory


def test_views_in_smaller_pieces_give_the_same_object(tiny_dream, sd_folder, tmp_path, monkeypatch):
    """With every term, light and a copy of the model: five views at once, then one by one."""
    flags = with_model(tiny_dream, sd_folder, *GUIDED, "--guidance", "vsd", "--batch_views", 5)
    flags += ["--train_res", 64]
    flags += ["--N_iters", 2, "--albedo_steps", 0, "--lambda_entropy", 1, "--lambda_orient", 5]
    flags += ["--lambda_opacity", 1, "--lambda_spread", 1, "--background", "learned"]
    flags = [str(word) for word in flags]
    assert run_dreamfusion.main([*flags, "--expname", "roomy"]) == 0
    distill = run_dreamfusion.sds.distill

    def tight(prior, images, *given):
        if len(images) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return distill(prior, images, *given)

    monkeypatch.setattr(run_dreamfusion.sds, "distill", tight)
    assert run_dreamfusion.main([*flags, "--expname", "tight"]) == 0
    log = (tmp_path / "tight" / "log.txt").read_text()
    assert log.count("going on with 2 views") == log.count("going on with 1 views") == 1
    roomy, tight = (newest(tmp_path / name) for name in ("roomy", "tight"))
    for part in ("network_fn_state_dict", "background_state_dict"):
        for name, value in roomy[part].items():  # the order of summing alone differs
            torch.testing.assert_close(value, tight[part][name], atol=1e-5, rtol=1e-3)
    rows = [list(csv.DictReader(open(tmp_path / n / "metrics.csv"))) for n in ("roomy", "tight")]
    for name in ("loss", "opacity", "sds", "t", "samples"):
        one, other = (float(table[-1][name]) for table in rows)
        assert one == pytest.approx(other, rel=1e-3), name


def poisoned(monkeypatch, where, steps):
    """NaN in ``where`` of the given steps' draws, counted from this start."""
    draw, calls = run_dreamfusion.draw_inputs, []

    def draw_inputs(*given):
        drawn = draw(*given)
        calls.append(1)
        if len(calls) in steps:
            part = {
                "camera": drawn.cameras.c2w,
                "light": drawn.lighting.light,
                "background": drawn.lighting.background,
                "noise": drawn.noise.epsilon,
            }[where]
            part.view(-1)[0] = float("nan")
        return drawn

    monkeypatch.setattr(run_dreamfusion, "draw_inputs", draw_inputs)


@pytest.mark.parametrize("where", ["camera", "light", "background", "noise"])
def test_nan_in_a_step_is_left_out_and_never_reaches_weights(
    tiny_dream, tmp_path, monkeypatch, where
):
    poisoned(monkeypatch, where, (2, 3))
    flags = [*tiny_dream, "--N_iters", "5", "--albedo_steps", "0", "--p_diffuse", "1"]
    assert run_dreamfusion.main(flags) == 0
    newest(tmp_path / "ball")  # refuses NaN anywhere
    with open(tmp_path / "ball" / "metrics.csv") as file:
        last = list(csv.DictReader(file))[-1]
    if where != "camera":  # rays with NaN meet nothing
        assert int(last["skipped"]) + int(last["views_left_out"]) >= 2


def test_endless_nan_goes_back_once_and_then_stops_with_a_dump(tiny_dream, tmp_path, monkeypatch):
    assert dream(*tiny_dream, "--N_iters", 4).returncode == 0
    poisoned(monkeypatch, "background", range(1000))
    monkeypatch.setattr(monitor, "MAX_SKIPPED", 5)
    result = dream(*tiny_dream, "--N_iters", 40)
    assert (
        result.returncode == 2
        and "rolling back to 000004.tar, with other random numbers" in result.stderr
    )
    assert (
        "again after rolling back: rendered colors (NaN" in result.stderr
        and "Traceback" not in result.stderr
    )
    dump = torch.load(next((tmp_path / "ball").glob("broken_*.pt")), weights_only=True)
    assert dump["rendered_colors"].isnan().any()


def test_a_way_back_leads_past_a_bad_place(tiny_dream, tmp_path, monkeypatch):
    poisoned(monkeypatch, "background", range(4, 10))
    monkeypatch.setattr(monitor, "MAX_SKIPPED", 5)
    result = dream(*tiny_dream, "--N_iters", 12, "--i_weights", 2)
    assert result.returncode == 0 and "with other random numbers" in result.stderr
    found = newest(tmp_path / "ball")
    assert found["global_step"] == 12 and found["draws"] == 1


def test_no_reload_keeps_what_was_there_out_of_the_way(tiny_dream, tmp_path):
    assert run_dreamfusion.main([*tiny_dream, "--N_iters", "9"]) == 0
    assert run_dreamfusion.main([*tiny_dream, "--N_iters", "4", "--no_reload"]) == 0
    assert newest(tmp_path / "ball")["global_step"] == 4
    assert newest(tmp_path / "ball" / "before_1")["global_step"] == 9


def test_no_reload_makes_its_own_results(tiny_dream, tmp_path):
    """Also for as many updates as before, where the old numbers would pass for the new ones."""
    for seed in (0, 1):
        flags = ["--N_iters", 2, "--video_frames", 1, "--mesh", "--seed", seed, "--no_reload"]
        result = dream(*tiny_dream, *flags, "--expname", "ball")
        assert result.returncode == 0 and "nothing is left" not in result.stderr, result.stderr
    new, old = tmp_path / "ball", tmp_path / "ball" / "before_1"
    for name in ("metrics.json", "mesh.glb", "report.html", "render_path_000002/000.png"):
        assert (new / name).exists() and (old / name).exists(), name
    seeds = [json.loads((run / "metrics.json").read_text())["args"]["seed"] for run in (new, old)]
    assert seeds == [1, 0]
    assert (new / "mesh.glb").read_bytes() != (old / "mesh.glb").read_bytes()


def test_a_turntable_that_was_stopped_is_made_by_the_same_command(
    tiny_dream, tmp_path, monkeypatch
):
    """Ctrl-C between two frames of the last rendering: nothing is lost, nor said to be done."""
    render, calls = objects.render_cameras, []

    def stopped(*given, **settings):
        calls.append((tmp_path / "ball" / "000002.tar").exists())
        if calls[-1] and calls.count(True) == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return render(*given, **settings)

    flags = [*tiny_dream, "--N_iters", 2, "--video_frames", 9, "--ema_decay", 0]
    with monkeypatch.context() as patch:
        patch.setattr(objects, "render_cameras", stopped)
        result = dream(*flags)
    assert result.returncode == 130 and "while rendering; training is saved" in result.stderr
    assert not (tmp_path / "ball" / "metrics.json").exists()
    result = dream(*flags)
    assert result.returncode == 0 and "done: " in result.stderr and "next: open" in result.stderr
    assert len(list((tmp_path / "ball" / "render_path_000002").glob("*.png"))) == 9
    assert (tmp_path / "ball" / "metrics.json").exists()


def test_a_text_typed_into_the_viewer_outlives_a_restart(tiny_dream, sd_folder, tmp_path):
    flags = with_model(tiny_dream, sd_folder, *GUIDED, "--expname", "told")
    assert dream(*flags, "--N_iters", 2).returncode == 0
    path = list_checkpoints(tmp_path / "told")[0]
    saved = torch.load(path, weights_only=True)
    assert saved["told"] == {}
    torch.save({**saved, "told": {1: "a blue cone", 2: "a red cone"}}, path)
    result = dream(*flags, "--N_iters", 4)
    assert (
        result.returncode == 0
        and "'a red cone" in result.stderr
        and "a blue cone" not in result.stderr
    )
    metrics = json.loads((tmp_path / "told" / "metrics.json").read_text())
    assert metrics["prompts_by_viewer"] == {"1": "a blue cone", "2": "a red cone"}
