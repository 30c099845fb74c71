"""The help pages of both scripts: their size, their sections, and that every flag is on one."""

import re
import shlex

import pytest
from helpers import REPOSITORY

from nerf import __version__
from nerf.flags import dreamfusion as dream_flags
from nerf.flags import help as help_pages
from nerf.flags import nerf as nerf_flags

PARSERS = {
    "run_nerf.py": nerf_flags.nerf_parser(),
    "run_dreamfusion.py": dream_flags.dream_parser(),
}
SCRIPTS = {"run_nerf.py": nerf_flags, "run_dreamfusion.py": dream_flags}
SECTIONS = [
    (script, name) for script, parser in PARSERS.items() for name in help_pages.sections(parser)
]


def printed(capsys, script, *argv) -> str:
    """What these flags print as they end the program with success."""
    with pytest.raises(SystemExit) as caught:
        SCRIPTS[script].parse(list(argv))
    captured = capsys.readouterr()
    assert caught.value.code == 0 and captured.err == ""
    return captured.out


def flags_on(page: str) -> list[str]:
    """The flags that a page explains, one for each line that begins with one."""
    return re.findall(r"^  (?:-h, )?--(?:no-)?(\w+)", page, re.MULTILINE)


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_short_page_has_two_examples_15_flags_and_the_sections(capsys, script):
    page = printed(capsys, script, "--help")
    lines = page.splitlines()
    assert len(lines) <= 40 and max(map(len, lines)) <= 100
    assert lines[0] == f"usage: python {script} --config FILE [--flag value ...]"
    parse, main_flags = SCRIPTS[script].parse, SCRIPTS[script].MAIN_FLAGS
    shown = flags_on(page)
    assert len(main_flags) == 15
    assert [name.replace("reload", "no_reload") for name in shown] == list(main_flags)
    examples = [shlex.split(line, comments=True) for line in lines if "  python run_" in line]
    assert len(examples) == 2
    for words in examples:
        assert words[:2] == ["python", script] and (REPOSITORY / words[3]).is_file()
        parse(
            [str(REPOSITORY / word) if word.startswith("configs/") else word for word in words[2:]]
        )
    for known, name in SECTIONS:
        assert known != script or re.search(rf"\b{name}[,.]", page)
    assert "NERF_N_ITERS" in page and "--help SECTION" in page and "--help all" in page


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_flag_is_in_exactly_one_section(capsys, script):
    page = printed(capsys, script, "--help", "all")
    flags = flags_on(page)
    actions = [action for action in PARSERS[script]._actions if "--no-no_" not in str(action)]
    names = {action.option_strings[0].removeprefix("--") for action in actions}
    assert len(names) > 90
    assert sorted(flags) == sorted(names - {"-h"} | {"help"})
    assert max(map(len, page.splitlines())) <= 100
    if script == "run_nerf.py":
        assert "--no_ndc" in page and "--no_batching" in page and "--no_reload" in page


@pytest.mark.parametrize(("script", "section"), SECTIONS)
def test_each_section_is_a_page(capsys, script, section):
    page = printed(capsys, script, "--help", section)
    assert re.match(rf"{section}: [A-Z][^\n]+\.", page) and flags_on(page)
    assert page == printed(capsys, script, f"--help={section.upper()}")


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_texts_stand_on_their_own(script):
    for group in help_pages.sections(PARSERS[script]).values():
        for action in help_pages.entries(group):
            text = " ".join(line.strip() for line in help_pages.entry(action)[-9:])
            assert action.help and not action.help[0].isspace()
            assert not re.search(r"\b(there|that file|then|such|these|so)\b", action.help), text
            assert "None" not in text and "SUPPRESS" not in text
            switch = isinstance(action.default, bool) or getattr(action, "inverted", False)
            assert ("(default: " in text) == (
                not switch and action.default not in (None, "", "==SUPPRESS==")
            ), text


HELP_ANYWHERE = [
    "-h",
    "--help --config absent.txt",
    "--config absent.txt --help",
    "--N_rand many -h",
    "--zzz 1 --help",
    "word --help --N_rand",
    "--prompt --help",
]


@pytest.mark.parametrize("words", HELP_ANYWHERE)
def test_help_is_printed_wherever_it_stands(capsys, monkeypatch, words):
    short = printed(capsys, "run_nerf.py", "--help")
    monkeypatch.setenv("NERF_WRONG", "1")
    assert printed(capsys, "run_nerf.py", *words.split()) == short
    assert nerf_flags.nerf_parser().format_help() == short


def test_version_is_one_line(capsys):
    line = printed(capsys, "run_nerf.py", "--config", "absent.txt", "--version")
    assert re.fullmatch(rf"nerf-dreamfusion {re.escape(__version__)} \(torch \d+\.\S+\)\n", line)
