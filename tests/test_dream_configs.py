"""Every shipped config of run_dreamfusion.py in every mode: two updates, or one line.

The configs are used as they are; flags make them small and, for those of Stable Diffusion, name a
random model of its layout.
"""

import itertools
import json
import re

import pytest
from helpers import NERF_TINY, REPOSITORY, newest, run_main, run_script

import run_dreamfusion
import run_nerf
from nerf.flags.dreamfusion import dream_parser

CONFIGS = sorted(
    path.name
    for path in (REPOSITORY / "configs").glob("*.txt")
    if "sd_model" in path.read_text(encoding="utf-8")
)
MODES = {
    "2d": "--space 2d",
    "two particles": "--n_particles 2",
    "sds": "--guidance sds",
    "csd": "--guidance csd",
    "vsd": "--guidance vsd",
    "gaussian": "--guidance gaussian",
    "perp-neg": "--perp_neg",
    "mlp": "--field mlp",
    "hash grid": "--field hashgrid",
    "tri-planes": "--field triplane",
    "2d vsd": "--space 2d --guidance vsd",
    "2d gaussian": "--space 2d --guidance gaussian",
    "two particles, vsd, hash grid": "--n_particles 2 --guidance vsd --field hashgrid",
    "csd, perp-neg, mlp": "--guidance csd --perp_neg --field mlp",
}
SMALL = (
    "--N_iters 2 --device cpu --ckpt_secs 0 --eval_res 8 --video_frames 1 --mesh_res 16 "
    "--march_steps 16 --occ_res 16"
).split()
SIZES = {"dreamfusion_sd.txt": "8", "prolificdreamer_sd.txt": "0:8,1:9"}


def command(config, mode, sd_folder, folder):
    """The flags of one run."""
    flags = ["--config", f"configs/{config}", "--prompt", "a red cube", *SMALL, *mode.split()]
    if config.endswith("_sd.txt"):
        flags += ["--sd_model", sd_folder]
        if "2d" not in mode:  # a picture of any size is quick
            flags += ["--train_res", SIZES[config], "--grid_res", "16", "--netwidth", "16"]
    return [*flags, "--basedir", folder]


def settings(config):
    """What a config sets, as text."""
    lines = (REPOSITORY / "configs" / config).read_text(encoding="utf-8").splitlines()
    return dict(line.split(" = ") for line in lines if " = " in line and not line.startswith("#"))


def unusable(config, mode):
    """Settings of the config that are of no use in a mode, those at their default left out."""
    names = set()
    if "2d" in mode:
        names |= {
            name for name in settings(config) if re.match("lambda_(?!sds)|mesh$|i_video", name)
        }
    elif "--field" in mode:
        if "triplane" not in mode:
            names |= {"smooth_planes", "lambda_tv"}
        if "mlp" in mode:
            names |= {"grid_res"}
    if "vsd" not in mode and ("--guidance" in mode):
        names |= {"lora_views", "lrate_lora"}
    if "gaussian" in mode:
        names |= {"guidance_dtype"}
    default = dream_parser().get_default
    given = settings(config)
    number = re.compile(r"[\d.e-]+")
    return {
        name
        for name in names & set(given)
        if given[name] != str(default(name))
        and not (number.fullmatch(given[name]) and float(given[name]) == default(name))
    }


def assert_trained(run, mode, config):
    """The run has made two updates in the mode, and its outputs."""
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["step"] == 2 == newest(run)["global_step"]  # loading refuses NaN anywhere
    for flag, value in re.findall(r"--(space|n_particles|guidance|field) (\w+)", mode):
        assert str(metrics["args"][flag]) == value
    endings = ("", "_1") if "n_particles" in mode else ("",)
    for ending in endings:
        turntable = run / f"render_path{ending}_000002" / "000.png"
        assert turntable.exists() == ("2d" not in mode)
        assert (run / f"mesh{ending}.glb").exists() == ("2d" not in mode)
    log = (run / "log.txt").read_text()
    left_out = set(re.findall(r"--(\w+)", "".join(re.findall(r".* (?:is|are) not used", log))))
    assert unusable(config, mode) <= left_out, log
    assert "next: open" in log


@pytest.mark.parametrize("config", CONFIGS)
def test_every_config_runs_as_it_is(config, sd_folder, tmp_path):
    """As a script in a process of its own."""
    flags = command(config, "", sd_folder, tmp_path)
    result = run_script(flags, script="run_dreamfusion.py")
    assert result.returncode == 0, result.stderr
    assert_trained(tmp_path / "a_red_cube", "", config)


def is_its_own(config, mode):
    """Whether a config is in this mode without a flag."""
    given = settings(config)
    return mode.split() in (
        ["--guidance", given.get("guidance", "sds")], ["--field", given.get("field", "mlp")]
    )  # fmt: skip


def cases():
    """Configs x modes. All of one config of each kind in every run of the tests, the rest slow."""
    often = {
        "dream_tiny.txt": [name for name in MODES if ", " not in name],
        "prolificdreamer_sd.txt": ["2d", "two particles", "csd"],
    }
    often |= {"prolificdreamer_tiny.txt": ["2d", "sds", "mlp"], "dreamfusion_sd.txt": ["2d", "vsd"]}
    for config, name in itertools.product(CONFIGS, MODES):
        if not is_its_own(config, MODES[name]):
            marks = () if name in often.get(config, ()) else pytest.mark.slow
            yield pytest.param(config, MODES[name], id=f"{config}-{name}", marks=marks)


@pytest.mark.parametrize(("config", "mode"), list(cases()))
def test_every_config_runs_in_every_mode(config, mode, sd_folder, tmp_path):
    result = run_main(run_dreamfusion.main, *command(config, mode, sd_folder, tmp_path))
    assert result.returncode == 0, result.stderr
    assert_trained(tmp_path / "a_red_cube", mode, config)


REFUSED = {
    "--space 2d --perp_neg": "--perp_neg tells views apart, and --space 2d has none",
    "--space 2d --n_particles 2": "leave out --n_particles",
    "--space 2d --train_res 0:8,9:16": "give --train_res one number",
    "--space 2d --viewer": "and no object; leave out --export, --render_only and --viewer",
    "--guidance gaussian --perp_neg": "--guidance gaussian reads no prompt",
    "--guidance csd --lora_file x": "--lora_file is for --guidance vsd",
    "--field hashgrid --smooth_planes": "--smooth_planes is for --field triplane, not hashgrid",
    "--field triplane --normals analytic": "use --normals fd",
}


def refusal(*arguments):
    """The one line of a command that cannot work; it leaves nothing behind."""
    result = run_main(run_dreamfusion.main, *arguments)
    assert result.returncode == 2, result.stderr
    (line,) = [text for text in result.stderr.splitlines() if text.startswith("run_dreamf")]
    return line


@pytest.mark.parametrize(("config", "mode"), list(itertools.product(CONFIGS, REFUSED)))
def test_modes_that_exclude_each_other_are_one_line(config, mode, sd_folder, tmp_path):
    assert REFUSED[mode] in refusal(*command(config, mode, sd_folder, tmp_path), *mode.split())
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def scenes(data, tmp_path_factory):
    """Checkpoints of run_nerf.py, vanilla and fast."""
    base, flags = tmp_path_factory.mktemp("scenes"), [*NERF_TINY, "--N_iters", 1, "--N_rand", 16]
    fast = ["--fast", "--amp", "off", "--occ_res", 16, "--field", "mlp", "--no-use_viewdirs"]
    for name, more in (("vanilla", []), ("fast", fast)):
        words = [*flags, *more, "--datadir", data, "--basedir", base, "--expname", name]
        result = run_main(run_nerf.main, *words)
        assert result.returncode == 0, result.stderr
    return base


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("kind", ["vanilla", "fast"])
def test_a_scene_of_run_nerf_is_no_object_to_start_from(config, kind, scenes, sd_folder, tmp_path):
    """Said before the model is opened; so too for a checkpoint to go on from, or to render."""
    flags = command(config, "", sd_folder, tmp_path)
    path = scenes / kind / "000001.tar"
    line = refusal(*flags, "--init_from", scenes / kind)
    assert f"--init_from {path}: a checkpoint of run_nerf.py; " in line
    for more in ([], ["--render_only"], ["--export", tmp_path / "out.glb"]):
        line = refusal(*flags, "--ft_path", path, *more)
        assert f"{path}: a checkpoint of run_nerf.py; " in line
    assert not list(tmp_path.iterdir())


def test_pictures_are_no_object_to_render_or_start_from(tiny_dream, tmp_path):
    """Of a run of --space 2d; the turntables that its config asks for are left out, too."""
    flags = [*tiny_dream, "--N_iters", 3, "--expname", "flat", "--space", "2d", "--i_video", 1]
    result = run_main(run_dreamfusion.main, *flags)
    assert result.returncode == 0 and "--i_video" in result.stderr, result.stderr
    read = ["--basedir", tmp_path, "--expname", "flat"]
    for more in (["--render_only"], ["--export", tmp_path / "out.glb"]):
        assert "it has no object to render or export" in refusal(*read, *more)
    start = ["--expname", "next", "--init_from", tmp_path / "flat"]
    assert "space: 2d -> 3d" in refusal(*tiny_dream, *start)
    assert "--space 2d makes none" in refusal(*tiny_dream, *start, "--space", "2d")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["flat"]


def test_an_object_that_cannot_become_this_runs_is_named(tiny_dream, tiny, tmp_path):
    result = run_main(run_dreamfusion.main, *tiny_dream, "--N_iters", 1, "--video_frames", 1)
    assert result.returncode == 0, result.stderr
    path = tmp_path / "ball" / "000001.tar"
    result = run_main(run_nerf.main, *tiny, "--ft_path", path)
    assert result.returncode == 2
    assert result.stderr.endswith("a checkpoint of run_dreamfusion.py; give one of run_nerf.py\n")
    for more, change in {
        "--n_particles 2": "n_particles: 1 -> 2",
        "--background learned": "background: random -> learned",
    }.items():
        start = ["--expname", "next", "--init_from", tmp_path / "ball", *more.split()]
        assert f"made with other flags ({change}" in refusal(*tiny_dream, *start)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ball"]
