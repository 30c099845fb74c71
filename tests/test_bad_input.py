"""Bad flags, configs, data and checkpoints, one table: each is answered by one line that names it.

Exit code 2, no traceback, and what lay in the data and run folders is as it was. Further ones stand
beside what they are about: test_datasets.py, test_flags.py, test_dream_flags.py.
"""

import hashlib
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import run_dreamfusion
import run_nerf

TINY = (
    "--use_viewdirs --white_bkgd --netdepth 2 --netwidth 16 --netdepth_fine 2 --netwidth_fine 16 "
    "--N_samples 4 --multires 4 --N_rand 16 --device cpu --i_img 0 --i_video 0 --i_testset 0 "
    "--N_iters 1 --testskip 1"
).split()
DREAM = (
    "--guidance gaussian --prompt ball --train_res 8 --batch_views 1 --march_steps 8 --occ_res 8 "
    "--eval_res 8 --video_frames 1 --netdepth 2 --netwidth 16 --N_iters 1 --device cpu --no-mesh"
).split()


def contents(folder: Path) -> dict:
    """File -> hash, of everything below but logs, which may note the mistake."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "log.txt" and not path.name.startswith(".")
    }


def complaint(main, argv, capfd) -> str:
    """The one line that a script prints about its input: alone, or after what it logged."""
    capfd.readouterr()
    logged = r"(?:[^\n]*\n)*"
    try:
        code = main([str(word) for word in argv])
    except SystemExit as stop:  # of the parser, before there is anything to log
        code, logged = stop.code, ""
    printed = capfd.readouterr().err
    match = re.fullmatch(rf"({logged})(run_\w+\.py: [^\n]+\n)", printed)
    assert code == 2 and match, (code, printed)
    assert "Traceback" not in printed and not re.search(r"^run_\w+\.py: ", match[1], re.M), printed
    return match[2]


# ------------------------------------------------------------------------------------------ flags

NERF_FLAGS = [
    ("--lrate 0", "--lrate 0"),
    ("--lrate nan", "lrate"),
    ("--lrate 1e31", "at most 1e30"),
    ("--seed -1", "seed"),
    (f"--seed {2**70}", "2^62"),
    ("--N_rand 0", "N_rand"),
    ("--N_rand 1.5", "N_rand"),
    ("--N_samples -3", "N_samples"),
    ("--N_iters 0", "N_iters"),
    ("--chunk 0", "chunk"),
    ("--netdepth 0", "netdepth"),
    ("--multires 0", "multires"),
    ("--multires 64", "1 to 32"),
    ("--multires_views 33", "1 to 32"),
    ("--i_embed 3", "i_embed"),
    ("--field cloud", "field"),
    ("--field triplane", "--occ_grid"),
    ("--lambda_tv 1", "triplane"),
    ("--contract", "--occ_grid"),
    ("--random_bg", "--occ_grid"),
    ("--resample 8", "--occ_grid"),
    ("--perturb nan", "perturb"),
    ("--perturb -1", "perturb"),
    ("--raw_noise_std inf", "raw_noise_std"),
    ("--early_stop 2", "early_stop"),
    ("--ema_decay 1", "ema_decay"),
    ("--keep_ckpts 1", "at least 2"),
    ("--render_factor 99", "render_factor"),
    ("--downscale 32", "2x2"),
    ("--expname ../away", "leads out"),
    ("--expname /away", "leads out"),
    ("--device tpu", "tpu"),
    ("--device cuda:99", "cuda"),
    ("--config nowhere.txt", "nowhere.txt"),
    ("--dataset_type video", "dataset_type"),
    ("--viewer --viewer_port 99999", "viewer_port"),
    ("--export scene.stl", "export"),
    ("--camera_path nowhere.json", "nowhere.json"),
    ("--render_only", "no checkpoint"),
    ("--ft_path nowhere.tar", "nowhere.tar"),
    ("--N_sample 4", "N_samples"),
    ("--max_minutes -1", "max_minutes"),
    ("--amp half", "amp"),
    ("--testskip -1", "testskip"),
]

DREAM_FLAGS = [
    ("--radius_range [0,1]", "radius_range"),
    ("--radius_range [3,2]", "radius_range"),
    ("--radius_range [1,1e9]", "radius_range"),
    ("--fov_range [0,40]", "fov_range"),
    ("--fov_range [40,180]", "fov_range"),
    ("--elevation_range [-100,0]", "elevation_range"),
    ("--eval_elevation 100", "eval_elevation"),
    ("--train_res 7", "train_res"),
    ("--train_res 8.5", "whole numbers"),
    ("--train_res 0:8,0:9", "train_res"),
    ("--train_res wide", "train_res"),
    ("--t_min 0.9 --t_max 0.5", "--t_min 0.9 is above"),
    ("--t_max 1.5", "t_max"),
    ("--lambda_opacity -1", "lambda_opacity"),
    ("--lambda_orient 0:1,10:-1", "lambda_orient"),
    ("--lambda_tv 1", "lambda_tv"),
    ("--smooth_planes", "--field triplane"),
    ("--view_spread 1.5", "view_spread"),
    ("--view_spread nan", "view_spread"),
    ("--latent_clip -1", "latent_clip"),
    ("--guidance_rescale 1.5", "guidance_rescale"),
    ("--perp_neg", "perp_neg"),
    ("--i_attn 1", "i_attn"),
    ("--batch_views 0", "batch_views"),
    ("--guidance clip", "guidance"),
    ("--guidance_scale nan", "guidance_scale"),
    ("--background plaid", "background"),
    ("--bound 0", "bound"),
    ("--bound 1e-30", "bound"),
    ("--blob_std 0", "blob_std"),
    ("--blob_scale -1", "blob_scale"),
    ("--p_textureless 2", "p_textureless"),
    ("--render_only --export a.glb", "exclude one another"),
    ("--no_reload --render_only", "contradict"),
    ("--space 2d --export a.glb", "2d"),
    ("--export a.stl", "glb"),
    ("--init_from nowhere.tar", "nowhere.tar"),
    ("--prompt_file nowhere.txt", "nowhere.txt"),
    ("--lrate 1e31", "lrate"),
    ("--seed 1e9", "seed"),
    ("--expname ..", "leads out"),
    ("--save_often", "save_often"),
    ("--guidance sds --sd_model ./no/such", "no/such"),
]


@pytest.mark.parametrize(("flags", "words"), NERF_FLAGS, ids=[flags for flags, _ in NERF_FLAGS])
def test_flags_of_run_nerf(flags, words, demo_blender, tmp_path, capfd):
    before = contents(demo_blender)
    own = ["--datadir", demo_blender, "--dataset_type", "blender", "--basedir", tmp_path]
    argv = [*TINY, *own, "--expname", "run", *flags.split()]
    assert words in complaint(run_nerf.main, argv, capfd)
    assert contents(demo_blender) == before and not list(tmp_path.rglob("*.tar"))


@pytest.mark.parametrize(("flags", "words"), DREAM_FLAGS, ids=[flags for flags, _ in DREAM_FLAGS])
def test_flags_of_run_dreamfusion(flags, words, tmp_path, capfd):
    argv = [*DREAM, "--basedir", tmp_path, "--expname", "run", *flags.split()]
    assert words in complaint(run_dreamfusion.main, argv, capfd)
    assert not list(tmp_path.rglob("*.tar"))


# ---------------------------------------------------------------------------------------- configs

CONFIGS = {
    "binary": (b"\x80\x81\xff\x00lrate", "not a text file"),
    "UTF-16": ("lrate = 1e-3\n".encode("utf-16"), "not a text file"),
    "twice": (b"lrate = 1e-3\nN_rand = 8\nlrate = 1e-4\n", "lrate is set twice, to 1e-3 and 1e-4"),
    "unknown": (b"learning_rate = 1\n", "unknown flag learning_rate"),
    "misspelled": (b"N_sampels = 8\n", "did you mean N_samples?"),
    "no number": (b"N_rand = many\n", "N_rand = many: expected a whole number"),
    "no value": (b"N_rand =\n", "N_rand = '': expected a whole number"),
    "a list": (b"N_rand = [1, 2]\n", "N_rand = [1, 2]: expected one value"),
    "JSON": (b'{"lrate": 1}\n', "expected flag = value"),
    "of the other script": (b"sd_model = x\n", "is a config of run_dreamfusion.py"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_configs(name, demo_blender, tmp_path, capfd):
    content, words = CONFIGS[name]
    path = tmp_path / "config.txt"
    path.write_bytes(content)
    argv = ["--config", path, "--datadir", demo_blender, "--basedir", tmp_path, "--N_iters", 1]
    assert words in complaint(run_nerf.main, argv, capfd)


def test_a_config_that_says_the_same_twice_and_has_a_byte_order_mark_is_fine(tmp_path):
    path = tmp_path / "config.txt"
    path.write_bytes(b"\xef\xbb\xbfdatadir = x\nN_rand = 8\nN_rand = 8\n")
    args = run_nerf.nerf_flags.parse(["--config", str(path)])
    assert args.N_rand == 8 and args.datadir == "x"


# ------------------------------------------------------------------------------------------- data


def edit(change, split="train"):
    """A spoiler: ``change`` the JSON of one split."""

    def spoil(folder: Path) -> None:
        path = folder / f"transforms_{split}.json"
        content = json.loads(path.read_text())
        content = change(content) or content
        path.write_text(json.dumps(content))

    return spoil


def first(**fields):
    return edit(lambda content: content["frames"][0].update(fields))


def raw(data: bytes):
    return lambda folder: (folder / "transforms_train.json").write_bytes(data)


def matrix(row, column, value):
    def change(content):
        content["frames"][0]["transform_matrix"][row][column] = value

    return edit(change)


def same_pose(content):
    for frame in content["frames"]:
        frame["transform_matrix"] = content["frames"][0]["transform_matrix"]


def pictures(make):
    """A spoiler of all training pictures: a single one is left out, see test_left_out.py."""
    return lambda folder: [make(path) for path in sorted((folder / "train").glob("*.png"))]


def animation(path: Path) -> None:
    frames = [Image.new("RGB", (32, 32), color) for color in ("red", "blue")]
    frames[0].save(path, save_all=True, append_images=frames[1:])


def rows(change):
    def spoil(folder: Path) -> None:
        table = np.load(folder / "poses_bounds.npy")
        np.save(folder / "poses_bounds.npy", change(table))

    return spoil


def at(row, column, value):
    def change(table):
        table[row, column] = value
        return table

    return rows(change)


def empty_folder(name):
    def spoil(folder):
        shutil.rmtree(folder / name)
        (folder / name).mkdir()

    return spoil


BLENDER = {
    "no folder": (shutil.rmtree, "blender"),
    "no transforms": (lambda f: (f / "transforms_train.json").unlink(), "transforms_train.json"),
    "empty JSON": (raw(b""), "is not valid JSON"),
    "cut JSON": (raw(b'{"camera_angle_x": 0.7, "fra'), "is not valid JSON"),
    "binary JSON": (raw(b"\xff\xfe\x00"), "cannot be read"),
    "deep JSON": (raw(b"[" * 100_000), "is not valid JSON"),
    "long number": (raw(b'{"camera_angle_x": ' + b"9" * 5000 + b"}"), "is not valid JSON"),
    "a list": (raw(b"[]"), "expected a JSON object"),
    "no angle": (edit(lambda c: c.pop("camera_angle_x") and None), "camera_angle_x"),
    "angle as text": (edit(lambda c: c.update(camera_angle_x="wide")), "camera_angle_x"),
    "angle 0": (edit(lambda c: c.update(camera_angle_x=0)), "camera_angle_x"),
    "angle pi": (edit(lambda c: c.update(camera_angle_x=3.15)), "camera_angle_x"),
    "no frames": (edit(lambda c: c.pop("frames") and None), "frames"),
    "empty frames": (edit(lambda c: c.update(frames=[])), "frames"),
    "frames is text": (edit(lambda c: c.update(frames="all")), "frames"),
    "frame is a number": (edit(lambda c: c.update(frames=[1])), "frame"),
    "file_path a number": (first(file_path=7), "file_path"),
    "file_path leads out": (first(file_path="../../etc/passwd"), "leads out"),
    "file_path is the folder": (first(file_path="."), "data folder"),
    "file_path unprintable": (first(file_path="a\nb"), "is not a valid file name"),
    "file_path too long": (first(file_path="a" * 300), "is not a valid file name"),
    "pictures empty": (pictures(lambda p: p.write_bytes(b"")), "r_0.png (empty)"),
    "pictures cut": (pictures(lambda p: p.write_bytes(p.read_bytes()[:60])), "r_0.png ("),
    "pictures are text": (pictures(lambda p: p.write_text("x")), "r_0.png (not a picture)"),
    "animations": (pictures(animation), "r_0.png (an animation of 2 frames)"),
    "matrix 3x3": (first(transform_matrix=[[1, 0, 0]] * 3), "transform_matrix"),
    "matrix is text": (first(transform_matrix="unit"), "transform_matrix"),
    "matrix NaN": (matrix(0, 3, float("nan")), "view 0"),
    "matrix far": (matrix(0, 3, 1e12), "units from the origin"),
    "matrix scaled": (matrix(0, 0, 5.0), "rotation"),
    "one pose for all": (edit(same_pose), "same pose"),
}

LLFF = {
    "no poses": (lambda f: (f / "poses_bounds.npy").unlink(), "poses_bounds.npy"),
    "poses are text": (lambda f: (f / "poses_bounds.npy").write_text("x"), "poses_bounds.npy"),
    "poses cut": (
        lambda f: (f / "poses_bounds.npy").write_bytes((f / "poses_bounds.npy").read_bytes()[:200]),
        "poses_bounds.npy",
    ),
    "fewer columns": (rows(lambda table: table[:, :16]), "poses_bounds.npy"),
    "one row less": (rows(lambda table: table[:-1]), "poses"),
    "NaN": (at(1, 3, np.nan), "row 1 holds NaN"),
    "near 0": (at(2, 15, 0.0), "0 < near < far"),
    "near above far": (at(2, 15, 1e6), "0 < near < far"),
    "far 1e12": (at(2, 16, 1e12), "1e9"),
    "focal 0": (at(0, 14, 0.0), "row 0"),
    "other proportions": (at(0, 4, 77.0), "same proportions"),
    "no pictures": (empty_folder("images"), "holds no pictures"),
}


def data_case(kind, spoil, words, demo_copy, tmp_path, capfd):
    folder = demo_copy(kind)
    spoil(folder)
    before = contents(folder)
    argv = [*TINY, "--datadir", folder, "--dataset_type", kind, "--basedir", tmp_path / "logs"]
    argv += ["--factor", "1"] if kind == "llff" else []
    assert words in complaint(run_nerf.main, argv, capfd)
    assert contents(folder) == before and not list(tmp_path.rglob("*.tar"))


@pytest.mark.parametrize("name", BLENDER)
def test_blender_data(name, demo_copy, tmp_path, capfd):
    data_case("blender", *BLENDER[name], demo_copy, tmp_path, capfd)


@pytest.mark.parametrize("name", LLFF)
def test_llff_data(name, demo_copy, tmp_path, capfd):
    data_case("llff", *LLFF[name], demo_copy, tmp_path, capfd)


# ------------------------------------------------------------------------------------ checkpoints


@pytest.fixture(scope="module")
def trained(tmp_path_factory, request):
    """The base folder of a run of one step."""
    base = tmp_path_factory.mktemp("trained")
    data = request.getfixturevalue("demo_blender")
    own = ["--datadir", data, "--dataset_type", "blender", "--basedir", base, "--expname", "run"]
    assert run_nerf.main([str(word) for word in [*TINY, *own]]) == 0
    return base


def with_fields(**fields):
    def spoil(path: Path) -> None:
        torch.save({**torch.load(path, weights_only=True), **fields}, path)

    return spoil


CHECKPOINTS = {
    "a folder": (lambda path: (path.unlink(), path.mkdir()), "is a folder"),
    "empty": (lambda path: path.write_bytes(b""), "empty (0 bytes)"),
    "text": (lambda path: path.write_text("hello"), "neither zip nor pickle"),
    "cut": (lambda path: path.write_bytes(path.read_bytes()[:1000]), "truncated"),
    "a list": (lambda path: torch.save([1, 2], path), "not a NeRF checkpoint"),
    "step as text": (with_fields(global_step="one"), "global_step is not a count"),
    "step True": (with_fields(global_step=True), "global_step is not a count"),
    "step -1": (with_fields(global_step=-1), "global_step is not a count"),
    "step 2^60": (with_fields(global_step=2**60), "global_step is not a count"),
    "draws as text": (with_fields(draws="3"), "draws is not a count"),
    "seconds NaN": (with_fields(train_seconds=float("nan")), "train_seconds is not a time"),
    "best of no step": (with_fields(best={"step": "x", "psnr": 1.0}), "best is not a step"),
    "no weights": (with_fields(network_fn_state_dict={}), "network"),
    "newer": (with_fields(format=99), "newer version"),
}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_checkpoints(name, trained, demo_blender, tmp_path, capfd):
    spoil, words = CHECKPOINTS[name]
    base = shutil.copytree(trained, tmp_path / "logs")
    path = shutil.copy(sorted((base / "run").glob("*.tar"))[-1], tmp_path / "given.tar")
    spoil(Path(path))
    before = contents(base)
    own = ["--datadir", demo_blender, "--dataset_type", "blender", "--basedir", base]
    argv = [*TINY, *own, "--expname", "other", "--ft_path", path, "--N_iters", "2"]
    line = complaint(run_nerf.main, argv, capfd)
    assert words in line and "given.tar" in line
    assert {k: v for k, v in contents(base).items() if k.startswith("run/")} == before
