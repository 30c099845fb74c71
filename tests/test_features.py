"""docs/features.md: every flag has a row, and every row a flag or file and a test that exist."""

import ast
import re

import pytest
from helpers import REPOSITORY

from nerf.flags import dreamfusion as dream_flags
from nerf.flags import nerf as nerf_flags

PAGE = (REPOSITORY / "docs" / "features.md").read_text(encoding="utf-8")
ROWS = [
    [cell.strip() for cell in line.strip("|").split(" | ")]
    for line in PAGE.splitlines()
    if line.startswith("| ") and not line.startswith("| feature |")
]


def flags_of_both() -> set[str]:
    """Every flag by its first name; what --no-NAME says is a part of --NAME."""
    parsers = nerf_flags.nerf_parser(), dream_flags.dream_parser()
    actions = [action for parser in parsers for action in parser._actions]
    return {f"--{a.dest}" for a in actions if any(o.startswith("--") for o in a.option_strings)}


def test_the_page_has_three_columns_and_no_row_twice():
    assert len(ROWS) > 90 and all(len(row) == 3 for row in ROWS)
    features = [row[0] for row in ROWS]
    assert len(set(features)) == len(features)


def test_every_flag_has_a_row_and_every_named_flag_exists():
    named = set(re.findall(r"--\w+", " ".join(row[1] for row in ROWS)))
    assert named == flags_of_both()


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_files_and_tests_of_a_row_exist(row):
    names = re.findall(r"`([^`]+)`", row[1])
    assert names, "a flag or a file"
    for name in names:
        assert name.startswith("--") or (REPOSITORY / name).exists(), name
    file, _, function = row[2].strip("`").partition("::")
    tree = ast.parse((REPOSITORY / "tests" / file).read_text(encoding="utf-8"))
    assert function in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
