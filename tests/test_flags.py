"""nerf.flags: nerf-pytorch's flags, where values come from, refusals, and config files."""

import re
import shlex

import pytest
from helpers import REPOSITORY

from nerf import build, build_optimizer
from nerf.flags import common as common_flags
from nerf.flags import dreamfusion as dream_flags
from nerf.flags import mistakes
from nerf.flags import nerf as nerf_flags

CONFIGS = sorted(
    path
    for path in (REPOSITORY / "configs").glob("*.txt")
    if "sd_model" not in path.read_text(encoding="utf-8")
)

PARSERS = {
    "run_nerf.py": nerf_flags.nerf_parser(),
    "run_dreamfusion.py": dream_flags.dream_parser(),
}
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
    """The one line that is printed as these flags end the program."""
    with pytest.raises(SystemExit) as caught:
        parse(*argv)
    printed = capsys.readouterr()
    assert caught.value.code == 2 and printed.out == ""
    assert re.fullmatch(r"run_nerf\.py: [^\n]+\n", printed.err), printed.err
    return printed.err


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


TWO_NAMES = [
    # file, environment, command line -> no_ndc
    ("", "", "--ndc", False),
    ("", "", "--no-ndc", True),
    ("", "", "--no_ndc", True),
    ("", "", "--no-no_ndc", False),
    ("", "", "--no_ndc --ndc", False),
    ("", "", "--ndc --no_ndc", True),
    ("ndc = False", "", "", True),
    ("ndc = True", "", "", False),
    ("no_ndc = True", "", "--ndc", False),
    ("ndc = True", "", "--no_ndc", True),
    ("ndc = False", "", "--ndc", False),
    ("", "NERF_NDC=False", "", True),
    ("", "NERF_NO_NDC=True", "--ndc", False),
    ("ndc = True", "NERF_NO_NDC=True", "", True),
    ("no_ndc = True", "NERF_NDC=True", "", False),
    ("no_ndc = True\nndc = False", "", "", True),
]


@pytest.mark.parametrize(("file", "environment", "command_line", "expected"), TWO_NAMES)
def test_positive_names_mean_the_opposite(
    tmp_path, monkeypatch, file, environment, command_line, expected
):
    if environment:
        monkeypatch.setenv(*environment.split("="))
    path = config(tmp_path, file + "\n")
    args = parse("--N_rand", "8", *command_line.split(), "--config", path)
    assert args.no_ndc is expected and not hasattr(args, "ndc")
    text = common_flags.as_config(args, nerf_flags.nerf_parser())
    assert f"\nno_ndc = {expected}\n" in text and "\nndc" not in text


def test_batching_and_reload_are_positive_names_too():
    args = parse("--no-batching", "--no-reload")
    assert args.no_batching and args.no_reload
    args = parse("--no_batching", "--batching", "--no_reload", "--reload")
    assert not args.no_batching and not args.no_reload


def test_a_config_named_by_the_environment_is_not_ignored(tmp_path, monkeypatch):
    monkeypatch.setenv("NERF_CONFIG", str(config(tmp_path, "N_rand = 10\n")))
    try:
        args = parse()
    except SystemExit:
        return  # to refuse the variable is as good
    assert (args.N_rand, args.expname) == (10, "some")


# -------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("typed", "nearest", "section"),
    [
        ("N_sample", "N_samples", "sampling"),
        ("N_samp", "N_samples", "sampling"),
        ("n_samples", "N_samples", "sampling"),
        ("white_bkg", "white_bkgd", "scene"),
        ("use_viewdir", "use_viewdirs", "network"),
        ("learning_rate_decay", "lrate_decay", "optimization"),
    ],
)
@pytest.mark.parametrize("where", ["command line", "command line with =", "file", "environment"])
def test_unknown_and_shortened_names_are_refused_with_the_nearest(
    tmp_path, monkeypatch, capsys, typed, nearest, section, where
):
    argv = {
        "command line": [f"--{typed}", "3"],
        "command line with =": [f"--{typed}=3"],
        "file": ["--config", config(tmp_path, f"{typed} = 3\n")],
        "environment": [],
    }[where]
    written = {"file": nearest, "environment": f"NERF_{nearest.upper()}"}.get(where, f"--{nearest}")
    if where == "environment":
        if typed.upper() == nearest.upper():
            pytest.skip("variables are in upper case: this name is a known one")
        monkeypatch.setenv(f"NERF_{typed.upper()}", "3")
    message = refusal(capsys, *argv)
    assert f"; did you mean {written}? (--help {section})" in message
    assert (typed.upper() if where == "environment" else typed) in message
    if where == "file":
        assert "some.txt: " in message


TYPED = [
    ("lego", "'lego' is not a flag; flags start with --"),
    ("configs/lego.txt", "write --config configs/lego.txt"),
    ("N_iters 5", "write --N_iters"),
    ("-N_iters 5", "-N_iters: flags start with two dashes, --N_iters"),
    ("-half_res", "flags start with two dashes, --half_res"),
    ("--N_rand 10 N_iters 5", "'N_iters' is not a flag; write --N_iters"),
    ("--N_rand 10 20", "--N_rand 10 20: takes one value; leave out '20'"),
    ("--datadir my photos", '--datadir my photos: quote the datadir: --datadir "my photos"'),
    ("--white_bkg", "unknown flag --white_bkg; did you mean --white_bkgd?"),
    ("--no-white_bkg", "did you mean --no-white_bkgd?"),
    ("--zzzqqq 1", "unknown flag --zzzqqq; --help all prints every flag"),
    ("--help_all", "unknown flag --help_all; did you mean --help all?"),
    ("--con x.txt", "unknown flag --con"),
    ("-- --N_iters 5", "-- stands alone"),
    (
        "--white_bkgd false",
        "--white_bkgd false: a switch takes no value; use --white_bkgd or --no-",
    ),
    ("--white_bkgd True", "use --white_bkgd or --no-white_bkgd"),
    ("--white_bkgd=False", "use --white_bkgd or --no-white_bkgd"),
    ("--expname false --white_bkgd false", "--white_bkgd false: a switch"),
    ("--no_ndc False", "use --no_ndc or --ndc"),
    ("--ndc no", "use --ndc or --no-ndc"),
    ("--prompt 'a cat'", "--prompt is a flag of run_dreamfusion.py"),
    ("--config absent.txt", "--config absent.txt: cannot be read (No such file"),
    ("--config .", "--config .: cannot be read (Is a directory"),
    ("--config ''", "--config is empty"),
    ("--config", "--config: the value is missing: --config FILE"),
    ("--N_rand", "--N_rand: the value is missing: --N_rand N"),
    ("--N_rand --N_iters 5", "--N_rand: the value is missing"),
    ("--lrate -1e-3", "--lrate=-1e-3"),
    ("--N_rand 0", "--N_rand 0: expected a whole number, 1 or more"),
    ("--N_rand abc", "--N_rand abc: expected a whole number, 1 or more"),
    ("--N_rand ''", "--N_rand '': expected a whole number, 1 or more"),
    ("--N_rand 'a\nb'", "--N_rand 'a\\nb': expected a whole number, 1 or more"),
    ("--N_rand 1.5", "--N_rand 1.5: expected a whole number, 1 or more"),
    ("--N_iters 1e5", "expected a whole number, 1 or more (written as 100000)"),
    ("--N_importance -1", "--N_importance -1: expected a whole number, 0 or more"),
    ("--seed inf", "--seed inf: expected a whole number from 0 to 2^62"),
    ("--multires 33", "--multires 33: expected a whole number from 1 to 32"),
    ("--grid_res 15", "--grid_res 15: expected a whole number, 16 or more"),
    ("--keep_ckpts 1", "--keep_ckpts 1: expected 0 (keep all) or at least 2"),
    ("--keep_ckpts -3", "--keep_ckpts -3: expected 0 (keep all) or at least 2"),
    ("--keep_ckpts few", "--keep_ckpts few: expected 0 (keep all) or at least 2"),
    ("--lrate 0", "--lrate 0: expected a number above 0, at most 1e30"),
    ("--lrate nan", "--lrate nan: expected a number above 0, at most 1e30"),
    ("--lrate fast", "--lrate fast: expected a number above 0, at most 1e30"),
    ("--raw_noise_std nan", "--raw_noise_std nan: expected a finite number, 0 or more"),
    ("--grad_clip inf", "--grad_clip inf: expected a finite number, 0 or more"),
    ("--precrop_frac 0", "--precrop_frac 0: expected a number above 0, at most 1"),
    ("--ema_decay 1", "--ema_decay 1: expected a number from 0 to below 1"),
    ("--render_factor 0.5", "expected a whole number N: pictures are rendered N times smaller"),
    ("--factor 0.5", "expected a whole number N, 1 or more: pictures become N times smaller"),
    ("--dataset_type kolmap", "--dataset_type kolmap: expected one of LINEMOD, auto, blender"),
    ("--i_embed 1", "--i_embed 1: expected one of 0, -1"),
    ("--amp fp8", "--amp fp8: expected one of off, bf16, fp16"),
    ("--help sampl", "--help sampl: no such section; did you mean --help sampling?"),
    ("--help N_rand", "--N_rand is in section training; use --help training"),
]


@pytest.mark.parametrize(("words", "cure"), TYPED, ids=[words for words, _ in TYPED])
def test_a_mistake_on_the_command_line_is_one_line_with_the_cure(capsys, words, cure):
    assert cure in refusal(capsys, *shlex.split(words))


IN_FILES = [
    ("N_rand = many", "some.txt: N_rand = many: expected a whole number, 1 or more"),
    ("N_rand =", "some.txt: N_rand = '': expected a whole number, 1 or more"),
    ("N_rand = [1, 2]", "some.txt: N_rand = [1, 2]: expected one value, not a list"),
    ("amp = half", "some.txt: amp = half: expected one of off, bf16, fp16"),
    ("white_bkgd = maybe", "some.txt: white_bkgd = maybe: expected True or False"),
    ("white_bkgd = [True]", "white_bkgd = ['True']: expected True or False"),
    ("no-white_bkgd = True", "some.txt: no-white_bkgd: write white_bkgd = False"),
    ("white_bkg = True", "did you mean white_bkgd? (--help scene)"),
    ("no-white_bkg = True", "did you mean white_bkgd? (--help scene)"),
    ("help = True", "some.txt: unknown flag help"),
    ("fast = True", "fast is for the command line"),
    ("ndc = True\nno_ndc = True", "ndc = True and no_ndc = True contradict each other"),
    ("lrate = 1\nlrate = 2", "lrate is set twice, to 1 and 2; leave one out"),
    ("lrate = 1e-3\n(N_rand) = 2", "line 2 is '(N_rand) = 2'; expected flag = value"),
    ('{"lrate": 1}', "line 1 is '{\"lrate\": 1}'; expected flag = value"),
    ("chunk = 8\nactivation = relu\nsd_model = x", "some.txt is a config of run_dreamfusion.py"),
]


@pytest.mark.parametrize(("text", "cure"), IN_FILES, ids=[text for text, _ in IN_FILES])
def test_a_mistake_in_a_config_is_one_line_with_the_cure(tmp_path, capsys, text, cure):
    assert cure in refusal(capsys, "--config", config(tmp_path, text + "\n"))


VARIABLES = [
    ("NERF_HELP=1", "environment variable NERF_HELP: no flag has this name"),
    ("NERF_VERSION=1", "environment variable NERF_VERSION: no flag has this name"),
    ("NERF_NO_WHITE_BKGD=1", "NERF_NO_WHITE_BKGD: no flag has this name"),
    ("NERF_white_bkgd=1", "did you mean NERF_WHITE_BKGD?"),
    ("NERF_=1", "environment variable NERF_: no flag has this name"),
    ("NERF_N_RAND=many", "environment variable NERF_N_RAND = many: expected a whole number"),
    ("NERF_N_RAND=[1,2]", "environment variable NERF_N_RAND = [1,2]: expected a whole number"),
    ("NERF_WHITE_BKGD=maybe", "environment variable NERF_WHITE_BKGD = maybe: expected True or"),
    ("NERF_CONFIG=absent.txt", "absent.txt: cannot be read"),
    ("NERF_NDC=1 NERF_NO_NDC=1", "ndc = 1 and no_ndc = 1 contradict each other"),
]


@pytest.mark.parametrize(("variables", "cure"), VARIABLES, ids=[name for name, _ in VARIABLES])
def test_a_mistake_in_the_environment_is_one_line_with_the_cure(
    monkeypatch, capsys, variables, cure
):
    for variable in variables.split():
        monkeypatch.setenv(*variable.split("="))
    assert cure in refusal(capsys)


def test_flags_that_tell_the_scripts_apart_are_flags_of_one_alone():
    for script, names in mistakes.ONLY_IN.items():
        for name in names:
            known = [key for key in PARSERS if f"--{name}" in PARSERS[key]._option_string_actions]
            assert known == [script], name


def test_values_that_begin_with_a_dash_or_hold_spaces_are_values():
    args = parse("--expname", "-a run", "--lrate=1e-3", "--i_embed", "-1", "--no_ndc")
    assert (args.expname, args.lrate, args.i_embed) == ("-a run", 1e-3, -1)


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

CONTRADICTIONS = [
    # flags, processes, what the line names
    ("--N_rand 1000", 3, "--N_rand 1000 does not divide by 3 processes"),
    ("--no_reload --render_only", 1, "--render_only"),
    ("--no-reload --ft_path a.tar", 1, "--ft_path"),
    ("--half_res --downscale 2", 1, "--downscale"),
    ("--occ_grid --lambda_tv 0.1", 1, "--lambda_tv"),
    ("--spherify", 1, "--no_ndc"),
    ("--lindisp", 1, "--no_ndc"),
    ("--N_importance 8 --N_samples 2", 1, "--N_samples 2"),
    ("--field triplane", 1, "--occ_grid"),
    ("--contract", 1, "--contract needs --occ_grid"),
    ("--hull_init on", 1, "--hull_init on needs --occ_grid"),
    ("--occ_grid --hull_init on --contract", 1, "bounded scene"),
    ("--export a.stl", 1, "--export a.stl"),
    ("--export_points a.glb", 1, "--export_points a.glb"),
    ("--expname ../a", 1, "leads out"),
    ("--expname 'a\nb'", 1, "--expname"),
]


@pytest.mark.parametrize(("given", "ranks", "named"), CONTRADICTIONS)
def test_contradictions_are_refused_by_name(given, ranks, named):
    with pytest.raises(ValueError, match=re.escape(named)) as caught:
        nerf_flags.check_nerf_flags(parse(*shlex.split(given)), ranks)
    assert "\n" not in str(caught.value)


FITTING = [
    ("", 4),
    ("--N_rand 999", 3),
    ("--spherify --no_ndc --lindisp", 1),
    ("--lindisp --dataset_type blender", 1),
    ("--N_importance 8 --N_samples 3", 1),
    ("--keep_ckpts 0", 1),
    ("--render_only --ft_path a.tar", 1),
]


@pytest.mark.parametrize(("given", "ranks"), FITTING)
def test_what_fits_together_passes(given, ranks):
    nerf_flags.check_nerf_flags(parse(*given.split()), ranks)


# ----------------------------------------------------------------------------------- what they do


def test_learning_rate_falls_to_a_tenth():
    args = parse("--lrate", "1e-3", "--lrate_decay", "2")
    rates = [build_optimizer.learning_rate(step, args) for step in (0, 1000, 2000, 4000)]
    assert rates == pytest.approx([1e-3, 1e-3 * 0.1**0.5, 1e-4, 1e-5], rel=1e-12)


def test_learning_rate_warms_up_linearly():
    args = parse("--lrate", "1e-3", "--lrate_decay", "2", "--lrate_warmup", "10")
    plain = parse("--lrate", "1e-3", "--lrate_decay", "2")
    for step, share in ((0, 0.1), (4, 0.5), (9, 1.0), (10, 1.0), (500, 1.0)):
        expected = share * build_optimizer.learning_rate(step, plain)
        assert build_optimizer.learning_rate(step, args) == pytest.approx(expected, rel=1e-12)


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
    # nerf-pytorch's checkpoints hold no flags
    assert common_flags.structural_changes({}, present, structural) == []


def test_a_checkpoint_of_other_structure_is_refused_with_every_difference():
    before = vars(parse("--netwidth", "128", "--lrate", "1e-3"))
    present, structural = parse("--netwidth", "64"), nerf_flags.STRUCTURAL
    with pytest.raises(ValueError) as caught:
        common_flags.check_same_run("a/1.tar", before, present, structural, ["the model: x -> y"])
    assert str(caught.value) == (
        "a/1.tar was made with other flags (netwidth: 128 -> 64; the model: x -> y); "
        "use those flags, or another --expname"
    )
    present.render_only = True
    with pytest.raises(ValueError, match="or leave --config out: the run's own flags are then us"):
        common_flags.check_same_run("a/1.tar", before, present, structural)
    common_flags.check_same_run("a/1.tar", before, parse("--netwidth", "128"), structural)


def test_fast_is_weaker_than_typed_flags_and_stronger_than_the_file(tmp_path):
    config = tmp_path / "scene.txt"
    config.write_text("lrate = 1e-4\nno_batching = True\n")
    args = parse("--config", str(config), "--field", "mlp", "--fast")
    assert args.occ_grid and args.field == "mlp" and args.lrate == 2e-3 and not args.no_batching
