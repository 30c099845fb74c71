"""A mistake in the flags of a small program: one line that begins with its name, and code 2."""

import sys

import pytest

from guidance import finetune, sample
from guidance.tiny import train
from nerf.outputs import compare, report
from nerf.training.arguments import ArgumentParser


def data_program(name):
    return lambda: __import__(name).main()


PROGRAMS = {
    "guidance.sample": sample.script,
    "guidance.finetune": finetune.main,
    "guidance.tiny.train": train.script,
    "nerf.compare": compare.main,
    "nerf.report": report.main,
    "download.py": data_program("download"),
    "from_photos.py": data_program("from_photos"),
    "make_demo.py": data_program("make_demo"),
    "demo_surface.py": data_program("demo_surface"),
}
WITHOUT_FLAGS = {  # what each lacks; the demo scene needs nothing
    "guidance.sample": "missing: --prompt",
    "guidance.finetune": "--pictures, --out",
    "guidance.tiny.train": "missing: --out, --work",
    "nerf.compare": "missing: runs",
    "nerf.report": "missing: runs",
    "download.py": "give the name of a scene: lego, fern",
    "from_photos.py": "missing: source, --out",
    "demo_surface.py": "missing: files",
}


def refusal(name, words, monkeypatch, capsys) -> str:
    """The one line that a program prints about the ``words`` of its command line."""
    monkeypatch.setattr(sys, "argv", [name, *words])
    try:
        code = PROGRAMS[name]()
    except SystemExit as stop:
        code = stop.code
    printed = capsys.readouterr()
    assert code == 2 and printed.err.count("\n") == 1 and not printed.out
    assert printed.err.startswith(f"{name}: ") and "usage" not in printed.err
    return printed.err


@pytest.mark.parametrize("name", WITHOUT_FLAGS)
def test_a_command_without_its_flags_is_one_line(name, monkeypatch, capsys):
    assert WITHOUT_FLAGS[name] in refusal(name, [], monkeypatch, capsys)


@pytest.mark.parametrize("name", PROGRAMS)
def test_an_unknown_flag_is_one_line(name, monkeypatch, capsys):
    needed = {
        "guidance.sample": ["--prompt", "a cone"],
        "guidance.finetune": ["--pictures", "a", "--out", "b"],
        "guidance.tiny.train": ["--out", "a", "--work", "b"],
        "from_photos.py": ["a", "--out", "b"],
        "make_demo.py": [],
    }.get(name, ["a"])
    assert "--odd_flag" in refusal(name, [*needed, "--odd_flag", "1"], monkeypatch, capsys)


def test_a_device_that_is_none_is_one_line(monkeypatch, capsys):
    words = ["--prompt", "a cone", "--device", "quantum"]
    said = refusal("guidance.sample", words, monkeypatch, capsys)
    assert "--device quantum: expected auto, cpu, cuda" in said


MESSAGES = [
    (["--numbr", "3"], "'--numbr' is not expected here; did you mean --number?"),
    (["extra"], "'extra' is not expected here; --help lists the flags"),
    (["--number", "many"], "--number 'many': expected a whole number"),
    (["--rate", "fast"], "--rate 'fast': expected a number"),
    (["--amp", "fp8"], "--amp 'fp8': expected one of 'off', 'bf16'"),
    (["--number"], "--number: the value is missing"),
    (["--num", "3"], "'--num' is not expected here; did you mean --number?"),  # no abbreviations
    (["--number", "1\n2"], "--number '1\\n2': expected a whole number"),
]


@pytest.mark.parametrize(("words", "said"), MESSAGES)
def test_a_mistake_says_what_came_and_what_was_expected(words, said, capsys):
    parser = ArgumentParser("tool", "One line.\n\nMore.")
    parser.add_argument("--number", type=int)
    parser.add_argument("--rate", type=float)
    parser.add_argument("--amp", choices=("off", "bf16"))
    with pytest.raises(SystemExit) as stop:
        parser.parse_args(words)
    assert stop.value.code == 2 and capsys.readouterr().err == f"tool: {said}\n"
    assert "One line." in parser.format_help() and "More." not in parser.format_help()
