"""Text is data: what others wrote reaches terminal, logs, pages and file names escaped."""

import json
import re
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest
from helpers import DREAM_TINY, NERF_TINY, run_main

import run_dreamfusion
import run_nerf
from nerf.outputs import html
from nerf.outputs.report import write_report
from nerf.training import provenance
from nerf.training.entry import report_mistakes
from nerf.training.plain_text import indented, one_line, shell_command
from nerf.training.run_folder import RunFolder

ATTACKS = {
    "colours": "\x1b[31mred",
    "a title": "\x1b]0;title\x07",
    "8-bit control": "\x9b31m",
    "a bell": "a\ab\bc",
    "carriage return": "safe\rforged",
    "a line": "a\n2026-01-01 00:00:00 step 9 of 9  PSNR 99",
    "next line": "a\x85b",
    "line separator": "a\u2028b\u2029c",
    "right to left": "a\u202egnp.exe",
    "isolate": "\u2066x\u2069",
    "mark": "\u200fx\u061c",
    "tags": "x\U000e0041\U000e007f",
    "no width": "a\u200bb\ufeff",
    "no UTF-8": "a\udcffb",
    "nothing": "a\0b",
    "delete": "a\x7fb",
}
ORDINARY = [
    "", "a robot #5 toy", "C:\\temp\\n", "½²", "a  b ", "Zoë’s café", "日本語", "עברית",
    "\U0001f468\u200d\U0001f469\u200d\U0001f467", "می\u200cخواهم", "n\u00a0b", "a\u202fb",
]  # fmt: skip


def controls(text: str) -> set[str]:
    """The characters of a text that a terminal would obey, but for the line feed."""
    bad = {"Cc", "Cs", "Zl", "Zp", "Cf"}
    return {c for c in text if unicodedata.category(c) in bad and c not in "\n\u200c\u200d"}


@pytest.mark.parametrize("attack", ATTACKS)
def test_control_characters_become_visible_and_take_one_line(attack):
    text = ATTACKS[attack]
    shown = one_line(text)
    assert not controls(shown) and "\n" not in shown and len(shown.splitlines()) == 1
    assert one_line(shown) == shown and shown.encode()
    page = html.page(text, [html.table([text], [[text]]), html.block(text)])
    assert not controls(page)
    assert text not in html.text(text) and len(html.text(text).splitlines()) == 1


@pytest.mark.parametrize("text", ORDINARY)
def test_ordinary_text_is_unchanged(text):
    assert one_line(text) == text
    assert one_line(Path("a") / "b") == "a/b" and one_line(None) == "None"


def test_every_character_is_escaped_or_harmless():
    for number in (*range(0x20000), *range(0xE0000, 0xE0200), 0x10FFFF):
        shown = one_line(chr(number))
        assert not controls(shown) and "\n" not in shown, number
        assert shown == chr(number) or (shown.startswith("\\") and shown.isascii())


def test_a_command_on_one_line_is_the_same_command():
    """bash takes it apart into the same words, bytes that are no UTF-8 among them."""
    words = [*ATTACKS.values(), *ORDINARY, "it's", '$HOME `x` "y"', "-n", "\\x41", "a'\n'b"]
    words = [word for word in words if "\0" not in word]  # no argument can hold it
    command = shell_command(words)
    assert "\n" not in command and not controls(command)
    program = "import os, sys; sys.stdout.buffer.write(b'\\0'.join(map(os.fsencode, sys.argv[1:])))"
    line = f"{shell_command([sys.executable, '-c', program])} {command}"
    found = subprocess.run(["bash", "-c", line], capture_output=True, check=True).stdout
    assert [word.decode("utf-8", "surrogateescape") for word in found.split(b"\0")] == words


def test_no_line_of_a_log_can_be_forged(tmp_path, capsys):
    text = "".join(ATTACKS.values())
    (tmp_path / "run").mkdir()  # else it would be removed again

    def stop():
        raise OSError(f"{text}: no such file")

    run = RunFolder(tmp_path / "run", is_main=True, lock=False)
    run.log(f"prompt {text}")
    run.mark_failed("x", text, OSError(5, text))
    with pytest.raises(ValueError), run:
        raise ValueError(f"{text}: no such file")
    assert report_mistakes("run_nerf.py", stop) == 3
    log = (tmp_path / "run" / "log.txt").read_bytes().decode()
    for said in (log, capsys.readouterr().err):
        assert not controls(said) and said.encode()
    times = [line for line in log.splitlines() if re.match(r"\d{4}-", line)]
    assert len(times) == 2 and len(log.splitlines()) > 4  # the traceback's lines are indented
    assert all(line.startswith("    ") for line in log.splitlines() if line not in times)
    assert indented("a\n\x1b") == "    a\n    \\x1b\n"


def test_cmd_txt_has_one_line_for_a_command_whatever_it_holds(monkeypatch, tmp_path):
    folder = tmp_path / "a\n# 2099-01-01 00:00:00, version 9\x1b[2J"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["run.py", "--prompt", "a\nrm -rf x\n# 2099\u202e"])
    lines = provenance.describe_start().splitlines()
    assert sum(line.startswith("# 20") for line in lines) == 1
    assert "rm -rf" in lines[1] and "--prompt" in lines[1] and not controls("".join(lines[:5]))


def evil_names(folder: Path) -> list[str]:
    return [name for path in folder.rglob("*") if (name := path.name) and one_line(name) != name]


def test_a_run_with_hostile_names_and_prompts_writes_and_says_none_of_it(
    demo_copy, tmp_path, monkeypatch, capfd
):
    """Both scripts, their log, cmd.txt, report and run folder."""
    evil = "".join(ATTACKS[k] for k in ("colours", "a line", "right to left", "8-bit control"))
    path, base = tmp_path / f"data {evil}.json", tmp_path / "logs"
    demo_copy("blender").rename(tmp_path / f"scene {evil}")
    key = {"c2w": [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 3]], "fov_deg": 40}
    path.write_text(json.dumps({"seconds": 0.1, "fps": 30, "keys": [key, key]}))
    nerf = [*NERF_TINY, "--datadir", tmp_path / f"scene {evil}", "--basedir", base, "--N_iters", 3]
    dream = [
        *DREAM_TINY,
        "--prompt",
        f"ball {evil}",
        "--basedir",
        base,
        "--N_iters",
        2,
        "--no-mesh",
    ]
    said = ""
    for main, flags, code in (
        (run_nerf.main, nerf, 0),
        (run_nerf.main, [*nerf, "--render_only", "--camera_path", path], 0),
        (run_nerf.main, [*nerf, "--ft_path", path, "--expname", "other"], 2),
        (run_nerf.main, [*nerf, "--datadir", path], 2),
        (run_dreamfusion.main, dream, 0),
    ):
        monkeypatch.setattr(sys, "argv", ["script.py", *map(str, flags)])
        done = run_main(main, *flags)
        assert done.returncode == code, done.stderr
        said += done.stdout + done.stderr
    out, err = capfd.readouterr()
    for run in (path for path in base.iterdir() if path.is_dir()):
        write_report(run)
        for name in ("log.txt", "cmd.txt", "report.html"):
            said += (run / name).read_bytes().decode()
    assert "\\x1b[31mred" in said
    assert controls(said + out + err) <= {"\r", "\t"}  # of progress bars; of uncommitted code
    assert not re.search(r"^2026-01-01 00:00:00", said, re.MULTILINE)
    assert evil_names(base) == []
