"""nerf.flags: nerf-pytorch's flags, where values come from, refusals, and config files."""

import argparse
import re

import pytest
from conftest import REPOSITORY

from nerf import build
from nerf.flags import common as common_flags
from nerf.flags import nerf as nerf_flags

CONFIGS = sorted(
    path
    for path in (REPOSITORY / "configs").glob("*.txt")
    if "sd_model" not in path.read_text(encoding="utf-8")
)

# nerf-pytorch's config_parser, by hand: flag, type, default.
NERF_PYTORCH = [
    ("expname", str, None),
    ("basedir", str, "./logs/"),
    ("datadir", str, "./data/llff/fern"),
    ("netdepth", int, 8),
    ("netwidth", int, 256),
    ("netdepth_fine", int, 8),
    ("netwidth_fine", int, 256),
    ("N_rand", int, 4096),
    ("lrate", float, 5e-4),
    ("lrate_decay", int, 250),
    ("chunk", int, 32768),
    ("netchunk", int, 65536),
    ("no_batching", bool, False),
    ("no_reload", bool, False),
    ("ft_path", str, None),
    ("N_samples", int, 64),
    ("N_importance", int, 0),
    ("perturb", float, 1.0),
    ("use_viewdirs", bool, False),
    ("i_embed", int, 0),
    ("multires", int, 10),
    ("multires_views", int, 4),
    ("raw_noise_std", float, 0.0),
    ("render_only", bool, False),
    ("render_test", bool, False),
    ("render_factor", int, 0),
    ("precrop_iters", int, 0),
    ("precrop_frac", float, 0.5),
    ("dataset_type", str, "llff"),
    ("testskip", int, 8),
    ("shape", str, "greek"),
    ("white_bkgd", bool, False),
    ("half_res", bool, False),
    ("factor", int, 8),
    ("no_ndc", bool, False),
    ("lindisp", bool, False),
    ("spherify", bool, False),
    ("llffhold", int, 8),
    ("i_print", int, 100),
    ("i_img", int, 500),
    ("i_weights", int, 10000),
    ("i_testset", int, 50000),
    ("i_video", int, 50000),
]


def parse(*argv):
    return nerf_flags.parse([str(word) for word in argv])


def config(folder, text, name="some.txt"):
    (folder / name).write_text(text)
    return folder / name


def refusal(capsys, *argv) -> str:
    """What is printed as these flags end the program."""
    with pytest.raises(SystemExit) as caught:
        parse(*argv)
    assert caught.value.code not in (0, None)
    return capsys.readouterr().err


# ------------------------------------------------------------------------- names, types, defaults


@pytest.mark.parametrize(("name", "kind", "default"), NERF_PYTORCH)
def test_flag_of_nerf_pytorch_is_here_with_its_default_and_type(name, kind, default):
    assert nerf_flags.nerf_parser().get_default(name) == default
    value = getattr(parse(), name)
    if name == "expname":
        assert value == "fern"  # filled in, see below
    else:
        assert value == default and type(value) is type(default)
    other = {bool: True, int: 7, float: 0.25, str: "llff"}[kind]
    other = {"i_embed": -1, "netdepth": 6}.get(name, other)
    given = [f"--{name}"] if kind is bool else [f"--{name}", str(other)]
    found = getattr(parse(*given), name)
    assert found == other and type(found) is kind


def test_every_flag_has_a_help_text():
    for action in nerf_flags.nerf_parser()._actions:
        assert action.help and action.help is not argparse.SUPPRESS, action.dest


def test_help_prints_every_flag(capsys):
    with pytest.raises(SystemExit) as caught:
        parse("--help")
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert all(f"--{name}" in text for name, _, _ in NERF_PYTORCH)


def test_name_of_the_run_is_the_configs_or_the_data_folders(tmp_path):
    path = config(tmp_path, "datadir = ./data/x/lego\n", "night.txt")
    assert parse("--config", path).expname == "night"
    assert parse("--datadir", "./data/x/lego").expname == "lego"
    assert parse("--config", path, "--expname", "mine").expname == "mine"


# ------------------------------------------------------------------------------------ precedence


def test_command_line_beats_environment_beats_file_beats_default(tmp_path, monkeypatch):
    path = config(tmp_path, "N_rand = 10\nlrate = 0.1\nN_samples = 20\n")
    monkeypatch.setenv("NERF_N_RAND", "11")
    monkeypatch.setenv("NERF_LRATE", "0.2")
    args = parse("--config", path, "--N_rand", "12")
    assert (args.N_rand, args.lrate, args.N_samples, args.N_importance) == (12, 0.2, 20, 0)


SWITCH_CASES = [
    # file, environment, command line -> value
    (None, None, None, False),
    ("True", None, None, True),
    ("False", None, None, False),
    (None, "True", None, True),
    ("True", "False", None, False),
    ("False", "True", None, True),
    ("True", None, "--no-white_bkgd", False),
    ("False", None, "--white_bkgd", True),
    (None, "True", "--no-white_bkgd", False),
    ("True", "True", "--no-white_bkgd", False),
    ("False", "False", "--white_bkgd", True),
]


@pytest.mark.parametrize(("file", "environment", "command_line", "expected"), SWITCH_CASES)
def test_switches_follow_the_same_order(
    tmp_path, monkeypatch, file, environment, command_line, expected
):
    argv = []
    if file:
        argv += ["--config", config(tmp_path, f"white_bkgd = {file}\n")]
    if environment:
        monkeypatch.setenv("NERF_WHITE_BKGD", environment)
    if command_line:
        argv.append(command_line)
    assert parse(*argv).white_bkgd is expected


def test_a_config_named_by_the_environment_is_not_ignored(tmp_path, monkeypatch):
    monkeypatch.setenv("NERF_CONFIG", str(config(tmp_path, "N_rand = 10\n")))
    try:
        args = parse()
    except SystemExit:
        return  # to refuse the variable is as good
    assert (args.N_rand, args.expname) == (10, "some")


@pytest.mark.parametrize("name", ["NERF_HELP", "NERF_NO_WHITE_BKGD", "NERF_white_bkgd", "NERF_"])
def test_variables_that_no_flag_reads_are_refused(monkeypatch, capsys, name):
    monkeypatch.setenv(name, "1")
    assert name in refusal(capsys)


# -------------------------------------------------------------------------------- unknown names


@pytest.mark.parametrize(
    ("typed", "nearest"),
    [
        ("N_sample", "N_samples"),
        ("N_samp", "N_samples"),
        ("n_samples", "N_samples"),
        ("white_bkg", "white_bkgd"),
        ("use_viewdir", "use_viewdirs"),
        ("learning_rate_decay", "lrate_decay"),
    ],
)
@pytest.mark.parametrize("where", ["command line", "command line with =", "file", "environment"])
def test_unknown_and_shortened_names_are_refused_with_the_nearest(
    tmp_path, monkeypatch, capsys, typed, nearest, where
):
    argv = {
        "command line": [f"--{typed}", "3"],
        "command line with =": [f"--{typed}=3"],
        "file": ["--config", config(tmp_path, f"{typed} = 3\n")],
        "environment": [],
    }[where]
    if where == "environment":
        if typed.upper() == nearest.upper():
            pytest.skip("variables are in upper case: this name is a known one")
        monkeypatch.setenv(f"NERF_{typed.upper()}", "3")
    message = refusal(capsys, *argv)
    assert f"did you mean '{nearest}'" in message
    assert (typed.upper() if where == "environment" else typed) in message
    if where == "file":
        assert "some.txt" in message


def test_unknown_switches_are_refused(tmp_path, capsys):
    assert "'white_bkgd'" in refusal(capsys, "--white_bkg")
    assert "white_bkgd'" in refusal(capsys, "--no-white_bkg")
    path = config(tmp_path, "white_bkg = True\n")
    assert "'white_bkgd'" in refusal(capsys, "--config", path)


def test_words_that_are_no_flags_are_refused(tmp_path, capsys):
    assert "'lego'" in refusal(capsys, "lego")
    assert "absent.txt" in refusal(capsys, "--config", tmp_path / "absent.txt")


@pytest.mark.parametrize(
    "given",
    [
        ("--N_rand", "0"),
        ("--N_rand", "many"),
        ("--N_rand", "1.5"),
        ("--N_importance", "-1"),
        ("--raw_noise_std", "-1"),
        ("--raw_noise_std", "nan"),
        ("--grad_clip", "inf"),
        ("--precrop_frac", "0"),
        ("--precrop_frac", "1.1"),
        ("--ema_decay", "1"),
        ("--dataset_type", "kolmap"),
        ("--i_embed", "1"),
        ("--amp", "fp8"),
    ],
    ids=" ".join,
)
def test_impossible_values_are_refused_by_name(capsys, given):
    assert given[0] in refusal(capsys, *given)


# ----------------------------------------------------------------------------------- config files


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config_parses_and_says_what_it_is(path):
    assert path.read_text().startswith("# ")
    args = parse("--config", path)
    nerf_flags.check_nerf_flags(args, num_ranks=1)
    # What the file says is what is parsed.
    for line in path.read_text().splitlines():
        if match := re.match(r"(\w+) = (\S+)$", line):
            name, text = match.groups()
            value = getattr(args, name)
            expected = text == "True" if isinstance(value, bool) else type(value)(text)
            assert value == expected, name


def test_there_are_configs():
    assert {"lego", "fern", "demo"} <= {path.stem for path in CONFIGS}


def read_back(folder, args):
    path = config(folder, common_flags.as_config(args, nerf_flags.nerf_parser()), "args.txt")
    return {**vars(parse("--config", path)), "config": args.config}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_as_config_reads_back_to_the_same_values(tmp_path, path):
    args = parse("--config", path)
    assert read_back(tmp_path, args) == vars(args)


def test_as_config_keeps_what_differs_from_every_default(tmp_path):
    argv = ["--ft_path", "a.tar", "--lrate", "3e-5", "--perturb", "0", "--i_embed", "-1"]
    argv += ["--white_bkgd", "--no-half_res", "--expname", "run 2", "--ema_decay", "0.999"]
    args = parse(*argv)
    assert read_back(tmp_path, args) == vars(args)


@pytest.mark.parametrize(
    "text", ["./data/with space", "./data/set #5", "a = b", "it's", '"quoted"', "#1"]
)
def test_as_config_keeps_awkward_text(tmp_path, text):
    args = parse("--datadir", text, "--expname", "awkward")
    assert read_back(tmp_path, args)["datadir"] == text


def test_as_config_of_a_fast_run_can_be_run_again(tmp_path):
    args = parse("--fast", "--datadir", "somewhere")
    assert args.occ_grid and read_back(tmp_path, args) == {**vars(args), "fast": False}


def test_as_config_says_what_it_cannot_keep(tmp_path, monkeypatch):
    args = parse("--expname", "two\nlines", "--datadir", "x")
    monkeypatch.setenv("NERF_SEED", "5")  # must not count: the file has to stand alone
    text = common_flags.as_config(args, nerf_flags.nerf_parser())
    assert "# expname is in args.json only" in text and "seed = 0" in text
    assert "lines" not in text


def test_as_config_refuses_numbers_that_would_read_back_differently():
    args = parse("--datadir", "x")
    args.lrate = float("nan")
    with pytest.raises(ValueError, match="lrate.*args.txt"):
        common_flags.as_config(args, nerf_flags.nerf_parser())


def test_none_in_a_file_means_unset(tmp_path):
    path = config(tmp_path, "ft_path = None\nexpname = None\n")
    args = parse("--config", path)
    assert (args.ft_path, args.expname) == (None, "some")


# --------------------------------------------------------------------------------- contradictions


@pytest.mark.parametrize(
    ("given", "ranks", "named"),
    [
        (["--N_rand", "1000"], 3, "N_rand 1000"),
        (["--no_reload", "--render_only"], 1, "render_only"),
        (["--no_reload", "--ft_path", "a.tar"], 1, "ft_path"),
        (["--half_res", "--downscale", "2"], 1, "downscale"),
        (["--occ_grid", "--lambda_tv", "0.1"], 1, "lambda_tv"),
        (["--spherify"], 1, "no_ndc"),
        (["--lindisp"], 1, "no_ndc"),
        (["--N_importance", "8", "--N_samples", "2"], 1, "N_samples 2"),
        (["--keep_ckpts", "1"], 1, "keep_ckpts 1"),
        (["--keep_ckpts", "-3"], 1, "keep_ckpts"),
        (["--lrate", "0"], 1, "lrate"),
        (["--lrate", "nan"], 1, "lrate"),
        (["--lrate", "inf"], 1, "lrate"),
    ],
)
def test_contradictions_are_refused_by_name(given, ranks, named):
    with pytest.raises(ValueError, match=named) as caught:
        nerf_flags.check_nerf_flags(parse(*given), ranks)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("given", "ranks"),
    [
        ([], 4),
        (["--N_rand", "999"], 3),
        (["--spherify", "--no_ndc", "--lindisp"], 1),
        (["--lindisp", "--dataset_type", "blender"], 1),
        (["--N_importance", "8", "--N_samples", "3"], 1),
        (["--keep_ckpts", "0"], 1),
        (["--render_only", "--ft_path", "a.tar"], 1),
    ],
)
def test_what_fits_together_passes(given, ranks):
    nerf_flags.check_nerf_flags(parse(*given), ranks)


# ----------------------------------------------------------------------------------- what they do


def test_learning_rate_falls_to_a_tenth():
    args = parse("--lrate", "1e-3", "--lrate_decay", "2")
    rates = [build.learning_rate(step, args) for step in (0, 1000, 2000, 4000)]
    assert rates == pytest.approx([1e-3, 1e-3 * 0.1**0.5, 1e-4, 1e-5], rel=1e-12)


def test_learning_rate_warms_up_linearly():
    args = parse("--lrate", "1e-3", "--lrate_decay", "2", "--lrate_warmup", "10")
    plain = parse("--lrate", "1e-3", "--lrate_decay", "2")
    for step, share in ((0, 0.1), (4, 0.5), (9, 1.0), (10, 1.0), (500, 1.0)):
        expected = share * build.learning_rate(step, plain)
        assert build.learning_rate(step, args) == pytest.approx(expected, rel=1e-12)


def test_flags_reach_the_renderer():
    renderer = build.build_renderer(
        parse("--netdepth", "3", "--netwidth", "16", "--netdepth_fine", "2", "--netwidth_fine", "8",
              "--multires", "5", "--multires_views", "2", "--use_viewdirs", "--N_samples", "9",
              "--N_importance", "7", "--perturb", "0", "--raw_noise_std", "0.5", "--lindisp",
              "--white_bkgd"),
    )  # fmt: skip
    coarse, fine = renderer.coarse, renderer.fine
    assert (len(coarse.pts_linears), coarse.width, coarse.pts_linears[0].in_features) == (3, 16, 33)
    assert (len(fine.pts_linears), fine.width) == (2, 8)
    assert coarse.views_linears[0].in_features == 16 + 15
    assert (renderer.num_samples, renderer.num_importance, renderer.samples_per_ray) == (9, 7, 16)
    assert (renderer.background, renderer.perturb, renderer.lindisp) == (1.0, False, True)
    assert renderer.raw_noise_std == 0.5
    alone = build.build_renderer(parse("--i_embed", "-1", "--netwidth", "16"))
    assert alone.fine is None and alone.perturb
    assert alone.coarse.output_linear.out_features == 4
    assert alone.coarse.pts_linears[0].in_features == 3


def test_changes_since_a_checkpoint_are_sorted_by_weight():
    before = vars(parse("--N_importance", "64", "--netwidth", "128", "--lrate", "1e-3"))
    present, structural = parse("--N_importance", "128", "--lrate", "2e-3"), nerf_flags.STRUCTURAL
    # 64 or 128 fine samples use the same weights; their presence is what counts.
    assert common_flags.structural_changes(before, present, structural) == ["netwidth: 128 -> 256"]
    assert common_flags.other_changes(before, present, structural) == ["lrate: 0.001 -> 0.002"]
    coarse_only = parse("--netwidth", "128")
    assert common_flags.structural_changes(before, coarse_only, structural) == [
        "N_importance: 64 -> 0"
    ]
    # nerf-pytorch's checkpoints say nothing
    assert common_flags.structural_changes({}, present, structural) == []


def test_fast_is_weaker_than_typed_flags_and_stronger_than_the_file(tmp_path, capsys):
    config = tmp_path / "scene.txt"
    config.write_text("lrate = 1e-4\nno_batching = True\n")
    args = parse("--config", str(config), "--field", "mlp", "--fast")
    assert args.occ_grid and args.field == "mlp" and args.lrate == 2e-3 and not args.no_batching
    config.write_text("fast = True\n")
    with pytest.raises(SystemExit):
        parse("--config", str(config))
    assert "command line" in capsys.readouterr().err
