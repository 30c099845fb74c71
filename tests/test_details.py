"""docs/details.md names what exists; benchmarks/ablations.py changes what it says and runs once."""

import argparse
import ast
import json
import re

import pytest
from helpers import REPOSITORY

from benchmarks import ablations
from nerf.flags import dreamfusion as dream_flags
from nerf.flags import nerf as nerf_flags

PAGE = (REPOSITORY / "docs" / "details.md").read_text(encoding="utf-8")
CELLS = re.findall(r"\[(vanilla|fast|dream): ([^\]:]+): ([^\]]*)\]", PAGE)


def arguments(tmp_path, **others):
    given = {"out": tmp_path, "scene": "demo", "prompt": "a red cone", "seeds": [0], "rows": None}
    return argparse.Namespace(**(given | others))


def keep(tmp_path, table, row, seed, scene="demo", **figures):
    args = arguments(tmp_path, scene=scene)
    place = ablations.run_folder(args, table, row, seed).with_suffix(".json")
    place.write_text(json.dumps(figures))


def test_every_file_and_function_named_exists():
    named = re.findall(r"`((?:nerf|guidance|data|benchmarks)/[\w/]+\.py):(\w+)`", PAGE)
    assert len(named) > 30
    for file, name in named:
        tree = ast.parse((REPOSITORY / file).read_text(encoding="utf-8"))
        kinds = (ast.FunctionDef, ast.ClassDef)
        assert name in {n.name for n in ast.walk(tree) if isinstance(n, kinds)}, f"{file}:{name}"


def test_every_flag_named_exists():
    source = (REPOSITORY / "benchmarks" / "ablations.py").read_text(encoding="utf-8")
    known = {*re.findall(r'"(--\w+)"', source)}
    for parser in (nerf_flags.nerf_parser(), dream_flags.dream_parser()):
        known |= set(parser._option_string_actions)
    assert set(re.findall(r"`?(--[A-Za-z]\w*)", PAGE)) <= known


def test_the_page_has_every_row_and_no_other():
    rows = {(table, row) for table in ablations.ROWS for row in ("base", *ablations.ROWS[table])}
    assert {(table, row) for table, row, _ in CELLS} == rows
    lego = re.findall(r"\[(\w+), Lego: ([^\]:]+): ", PAGE)
    assert set(lego) == {(table, row) for table, row in rows if table != "dream"}


@pytest.mark.parametrize("table", ["vanilla", "fast", "dream"])
def test_every_row_changes_a_flag_of_its_base(table, monkeypatch):
    monkeypatch.chdir(REPOSITORY)  # the configs' paths
    if table == "dream":
        parse, base = dream_flags.parse, [*ablations.DREAM.split(), "--prompt", "a b"]
    else:
        parse, base = nerf_flags.parse, ablations.NERF[table].split()
    start = vars(parse(base))
    for row, flags in ablations.ROWS[table].items():
        flags = ablations.dream_flags(row, "a b") if table == "dream" else flags.split()
        changed = vars(parse([*base, *flags]))
        assert any(changed[name] != start[name] for name in start), row


def test_fill_writes_differences_of_the_same_seed(tmp_path):
    for seed, psnr in enumerate((20.0, 21.0, 25.0)):
        keep(tmp_path, "vanilla", "", seed, psnr=psnr, ssim=0.5)
    keep(tmp_path, "vanilla", "float32", 0, psnr=19.5, ssim=0.5)
    keep(tmp_path, "vanilla", "", 0, scene="lego", psnr=18.0, ssim=0.5)
    keep(tmp_path, "vanilla", "float32", 0, scene="lego", psnr=18.25, ssim=0.5)
    text = "[vanilla: base: old] [vanilla: float32: old]; [vanilla: no warm-up: +9] [a: b: c]"
    text += " [vanilla, Lego: float32: not run] [fast, Lego: float32: not run]"
    filled = ablations.fill(text, arguments(tmp_path))
    assert filled == (
        "[vanilla: base: 22.00 (20.00 to 25.00)] [vanilla: float32: -0.50]; "
        "[vanilla: no warm-up: +9] [a: b: c] [vanilla, Lego: float32: +0.25] "
        "[fast, Lego: float32: not run]"
    )
    assert ablations.fill(filled, arguments(tmp_path)) == filled


def test_fill_refuses_a_row_that_does_not_exist(tmp_path):
    with pytest.raises(SystemExit, match="no such row"):
        ablations.fill("[vanilla: no such thing: 1]", arguments(tmp_path))


def test_finished_rows_are_read_and_not_run_again(tmp_path, monkeypatch, capsys):
    runs = []

    def train(args, table, flags, seed, folder):
        runs.append((flags, seed))
        return {"psnr": 20.0 + seed + len(flags), "ssim": 0.5}

    monkeypatch.setattr(ablations, "nerf_row", train)
    keep(tmp_path, "vanilla", "", 1, psnr=21.0, ssim=0.5)
    args = arguments(tmp_path, rows=["float32"])
    ablations.print_table(args, "vanilla", None)
    assert runs == [("", 0), ("", 2), ("--amp off", 0)]
    assert "+9.00" in capsys.readouterr().out  # len("--amp off")
    ablations.print_table(args, "vanilla", None)
    assert len(runs) == 3
