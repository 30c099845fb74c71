"""Flags of run_dreamfusion.py: configs, contradictions, texts that config files could spoil."""

import pytest
from conftest import REPOSITORY

from nerf.flags import common as common_flags
from nerf.flags import dreamfusion as dream_flags

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


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        ([], "--prompt is empty"),
        (["--prompt", "  "], "--prompt is empty"),
        (["--prompt", "x", "--render_only", "--export", "a.glb"], "exclude one another"),
        (["--prompt", "x", "--render_only", "--no_reload"], "contradict"),
        (["--prompt", "x", "--space", "2d", "--export", "a.glb"], "--space 2d"),
        (["--prompt", "x", "--space", "2d", "--train_res", "0:16,9:32"], "one number"),
        (["--prompt", "x", "--field", "triplane", "--normals", "analytic"], "--normals fd"),
        (["--prompt", "x", "--field", "hashgrid", "--i_embed", "-1"], "--i_embed"),
        (["--prompt", "x", "--radius_range", "2", "1"], "smaller first"),
        (["--prompt", "x", "--radius_range", "0", "1"], "above 0"),
        (["--prompt", "x", "--fov_range", "40", "180"], "--fov_range"),
        (["--prompt", "x", "--elevation_range", "-100", "0"], "-90 to 90"),
        (["--prompt", "x", "--t_max", "1.5"], "0 to 1"),
        (["--prompt", "x", "--train_res", "4"], "at least 8"),
        (["--prompt", "x", "--keep_ckpts", "1"], "--keep_ckpts"),
        (["--prompt", "x", "--lrate", "0"], "--lrate"),
    ],
)
def test_contradictions_are_one_line(flags, complaint):
    with pytest.raises(ValueError, match=complaint) as caught:
        check(*flags)
    assert "\n" not in str(caught.value)


def test_views_divide_by_processes():
    with pytest.raises(ValueError, match="multiple of 3"):
        check("--prompt", "x", "--batch_views", "4", ranks=3)
    check("--prompt", "x", "--batch_views", "6", ranks=3)


@pytest.mark.parametrize(
    "flags",
    [
        ["--lambda_orient", "1,2"],
        ["--guidance_scale", "high"],
        ["--p_diffuse", "1.1"],
        ["--blob_std", "0"],
        ["--guidance", "sdss"],
        ["--guidence", "sds"],
        ["--radius_range", "1"],
    ],
)
def test_bad_values_end_the_program_with_usage(flags, capsys):
    with pytest.raises(SystemExit) as caught:
        parse("--prompt", "x", *flags)
    assert caught.value.code == 2
    assert flags[0].lstrip("-") in capsys.readouterr().err


def test_prompt_files(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("# two\n\na red cone\n  a blue cube  \n", encoding="utf-8")
    assert dream_flags.read_prompts(path) == ["a red cone", "a blue cube"]
    path.write_text("# none\n", encoding="utf-8")
    with pytest.raises(ValueError, match="no prompts"):
        dream_flags.read_prompts(path)
    with pytest.raises(ValueError, match="cannot be read"):
        dream_flags.read_prompts(tmp_path / "missing.txt")
