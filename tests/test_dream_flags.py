"""Flags of run_dreamfusion.py: configs, contradictions, texts that config files could spoil."""

import re
import shlex

import pytest
from helpers import REPOSITORY

from guidance import sds
from nerf.flags import common as common_flags
from nerf.flags import dreamfusion as dream_flags
from nerf.flags import nerf as nerf_flags
from nerf.training.schedules import schedule

CONFIGS = [
    path
    for path in sorted((REPOSITORY / "configs").glob("*.txt"))
    if "sd_model" in path.read_text(encoding="utf-8")
]


def parse(*argv):
    words = [str(word) for word in argv]
    return dream_flags.parse(words)


def check(*argv, ranks=1):
    dream_flags.check_dream_flags(parse(*argv), ranks)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_is_valid_and_explains_itself(path):
    check("--config", path, "--prompt", "a red cone")
    first = path.read_text(encoding="utf-8").splitlines()[0]
    assert first.startswith("# ") and len(first) > 40


def test_every_flag_is_read_somewhere():
    """A flag that nothing reads is a promise that nothing keeps."""
    sources = "".join(
        path.read_text(encoding="utf-8")
        for path in [*(REPOSITORY / "nerf").rglob("*.py"), *REPOSITORY.glob("run_dream*.py")]
    )
    for name in vars(parse("--prompt", "x")):
        view = name.partition("_")[2] if name.startswith(("prompt_", "negative_")) else None
        ranged = name.removesuffix("_range")
        assert (
            f"args.{name}" in sources
            or f'"{name}"' in sources
            or (view and f'"{view}"' in sources)
            or (ranged != name and f'"{ranged}"' in sources)
        ), name


@pytest.mark.parametrize(
    ("prompt", "name"),
    [
        ("a red cone", "a_red_cone"),
        ("A DSLR photo of a hamburger!", "a_dslr_photo_of_a_hamburger"),
        ("  ", "dream"),
        ("../../etc/passwd", "etc_passwd"),
        ("une tête", "une_tête"),
        ("x" * 300, "x" * 80),
    ],
)
def test_run_names_made_from_prompts(prompt, name):
    assert dream_flags.slug(prompt) == name


def test_runs_are_named_after_the_prompt_also_with_a_config():
    path = CONFIGS[0]
    assert parse("--config", path, "--prompt", "a blue cube").expname == "a_blue_cube"
    assert parse("--config", path, "--prompt", "a blue cube", "--expname", "x").expname == "x"
    assert parse("--text", "a blue cube").prompt == "a blue cube"


@pytest.mark.parametrize(
    "prompt",
    [
        "a robot #5 toy",
        'a "quoted" robot',
        "it's a robot",
        "robot = toy",
        "robot: toy; red",
        "ein grüner Kegel 🎄",
        "[a, b]",
        "None",
        "true",
        "two\nlines",
        "trailing space ",
        """both " and ' """,
    ],
)
def test_odd_prompts_survive_the_run_folder(prompt, tmp_path):
    """args.txt either reads back to the same text or says where the text is kept."""
    args = parse("--prompt", prompt)
    text = common_flags.as_config(args, dream_flags.dream_parser())
    path = tmp_path / "args.txt"
    path.write_text(text, encoding="utf-8")
    again = parse("--config", path)
    assert again.prompt == prompt or "# prompt is in args.json only" in text
    assert again.train_res == args.train_res and again.radius_range == args.radius_range
    simple = "\n" not in prompt and '"' not in prompt and not prompt.startswith("[")
    assert not simple or again.prompt == prompt


CONTRADICTIONS = [
    # flags, what the line says
    ("", "--prompt is empty"),
    ("--prompt '  '", "--prompt is empty"),
    ("--prompt x --render_only --export a.glb", "exclude one another"),
    ("--prompt x --render_only --no_reload", "contradict"),
    ("--prompt x --export a.stl", "ends in .glb"),
    ("--prompt x --space 2d --export a.glb", "--space 2d"),
    ("--prompt x --space 2d --train_res 0:16,9:32", "one number"),
    ("--prompt x --space 2d --n_particles 2", "leave out --n_particles"),
    ("--prompt x --space 2d --perp_neg", "--perp_neg tells views apart"),
    ("--prompt x --field triplane --normals analytic", "--normals fd"),
    ("--prompt x --field hashgrid --i_embed -1", "--i_embed"),
    ("--prompt x --field mlp --smooth_planes", "--field triplane, not mlp"),
    ("--prompt x --field mlp --lambda_tv 0:0,9:1", "--lambda_tv is for --field triplane"),
    ("--prompt x --radius_range 2 1", "--radius_range 2 1; expected two numbers, smaller first"),
    ("--prompt x --radius_range 0 1", "--radius_range 0 1; expected distances above 0"),
    ("--prompt x --fov_range 40 180", "--fov_range 40 180; expected degrees above 0, below 180"),
    ("--prompt x --elevation_range -100 0", "--elevation_range -100 0; expected degrees from -90"),
    ("--prompt x --eval_elevation 91", "--eval_elevation 91; expected degrees from -90"),
    ("--prompt x --t_max 1.5", "--t_max 1.5; expected numbers from 0 to 1"),
    ("--prompt x --t_min 0:0.1,9:0.9 --t_max 0.5", "is above --t_max"),
    ("--prompt x --guidance_rescale 0:0,9:2", "--guidance_rescale 0:0,9:2; expected numbers"),
    ("--prompt x --latent_clip -1", "--latent_clip -1; expected 0 or more"),
    ("--prompt x --lambda_sds 0:1,5:-1", "--lambda_sds 0:1,5:-1; expected 0 or more"),
    ("--prompt x --train_res 4", "at least 8"),
    ("--prompt x --lora_model y", "--lora_model is for --guidance vsd"),
    ("--guidance gaussian --i_attn 1", "reads no prompt"),
    ("--guidance gaussian --guidance_res 8", "leave out --guidance_res"),
    ("--prompt x --expname ..", "leads out"),
]


@pytest.mark.parametrize(("flags", "complaint"), CONTRADICTIONS)
def test_contradictions_are_one_line(flags, complaint):
    with pytest.raises(ValueError, match=re.escape(complaint)) as caught:
        check(*shlex.split(flags))
    assert "\n" not in str(caught.value)


def test_views_divide_by_processes():
    with pytest.raises(ValueError, match="multiple of 3"):
        check("--prompt", "x", "--batch_views", "4", ranks=3)
    check("--prompt", "x", "--batch_views", "6", ranks=3)


def test_the_choices_are_the_ways_of_guidance_and_the_weightings_that_exist():
    assert set(dream_flags.KINDS) == {*sds.RESIDUALS, "gaussian"}
    assert set(dream_flags.WEIGHTINGS) == set(sds.WEIGHTINGS)


MISTAKES = [
    # command line, a part of the one line
    ("--prompt a red cone", '--prompt a red cone: quote the prompt: --prompt "a red cone"'),
    ("--text=a red cone", '--text a red cone: quote the text: --text "a red cone"'),
    ("--prompt a mesh", '--prompt "a mesh"'),
    ("'a red cone'", 'to make it, write --prompt "a red cone"'),
    ("--config configs/lego.txt", "configs/lego.txt is a config of run_nerf.py"),
    ("--datadir x", "--datadir is a flag of run_nerf.py"),
    ("--prompt x --lambda_orient 1,2", "--lambda_orient 1,2: '1,2' is not a schedule"),
    ("--prompt x --t_max 5:1,5:2", "--t_max 5:1,5:2: the steps must ascend"),
    ("--prompt x --guidance_scale high", "expected a number or step:value,step:value"),
    ("--prompt x --p_diffuse 1.1", "--p_diffuse 1.1: expected a number from 0 to 1"),
    ("--prompt x --blob_std 0", "--blob_std 0: expected a number above 0, from 1e-15 to 1e9"),
    ("--prompt x --guidance sdss", "--guidance sdss: expected one of sds, csd, vsd, gaussian"),
    ("--prompt x --guidence sds", "did you mean --guidance? (--help guidance)"),
    ("--prompt x --radius_range 1", "--radius_range: expected 2 numbers: --radius_range 1 1.5"),
    ("--prompt x --radius_range [1,2]", "--radius_range: expected 2 numbers"),
    ("--prompt x --radius_range 1 2 3", "takes 2 values; leave out '3'"),
    ("--prompt x --radius_range 1 far", "--radius_range far: expected a finite number"),
    ("--prompt x --eval_elevation nan", "--eval_elevation nan: expected a finite number"),
    ("--prompt x --perp_neg yes", "use --perp_neg or --no-perp_neg"),
    ("--prompt x --help vds", "did you mean --help vsd?"),
]


def one_line(capsys, *argv) -> str:
    """The one line that is printed as these flags end the program."""
    with pytest.raises(SystemExit) as caught:
        parse(*argv)
    printed = capsys.readouterr()
    assert caught.value.code == 2 and printed.out == ""
    assert re.fullmatch(r"run_dreamfusion\.py: [^\n]+\n", printed.err), printed.err
    return printed.err


@pytest.mark.parametrize(("words", "cure"), MISTAKES, ids=[words for words, _ in MISTAKES])
def test_a_mistake_is_one_line_with_the_cure(words, cure, capsys, monkeypatch):
    monkeypatch.chdir(REPOSITORY)  # the configs
    assert cure in one_line(capsys, *shlex.split(words))


IN_FILES = [
    ("radius_range = 1", "radius_range = 1: expected 2 values: [1.0, 1.5]"),
    ("radius_range = [1, 2, 3]", "radius_range = [1, 2, 3]: expected 2 values: [1.0, 1.5]"),
    ("radius_range = [1, far]", "radius_range = far: expected a finite number"),
    ("prompt = [a, b]", "prompt = ['a', 'b']: expected one value, not a list"),
    ("chunk = 8\ndatadir = x", "some.txt is a config of run_nerf.py"),
]


@pytest.mark.parametrize(("text", "cure"), IN_FILES, ids=[text for text, _ in IN_FILES])
def test_a_mistake_in_a_config_is_one_line_with_the_cure(text, cure, tmp_path, capsys):
    path = tmp_path / "some.txt"
    path.write_text(text + "\n", encoding="utf-8")
    assert cure in one_line(capsys, "--config", path)


def test_args_txt_of_the_other_script_is_named_as_such(tmp_path, capsys):
    """Its keys are sorted, so a flag that only the other script has may come late."""
    args = nerf_flags.parse(["--datadir", "x"])
    path = tmp_path / "args.txt"
    path.write_text(common_flags.as_config(args, nerf_flags.nerf_parser()), encoding="utf-8")
    assert "args.txt is a config of run_nerf.py" in one_line(capsys, "--config", path)


def test_a_second_name_is_no_variable(monkeypatch, capsys):
    monkeypatch.setenv("NERF_TEXT", "a red cone")
    assert "environment variable NERF_TEXT: no flag has this name" in one_line(capsys)


def test_schedules_are_all_flags_that_are_schedules():
    actions = dream_flags.dream_parser()._actions
    schedules = {action.dest for action in actions if action.type is schedule}
    assert schedules == {*dream_flags.SCHEDULES, "train_res"}
    assert len(dream_flags.SCHEDULES) == len(set(dream_flags.SCHEDULES))


def test_prompt_files(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("# two\n\na red cone\n  a blue cube  \n", encoding="utf-8")
    assert dream_flags.read_prompts(path) == ["a red cone", "a blue cube"]
    path.write_text("# none\n", encoding="utf-8")
    with pytest.raises(ValueError, match="no prompts"):
        dream_flags.read_prompts(path)
    with pytest.raises(ValueError, match="cannot be read"):
        dream_flags.read_prompts(tmp_path / "missing.txt")
