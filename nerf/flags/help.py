"""Help pages: the flags one needs, one section, or all.

A page is made from a parser whose argument groups are the sections: the title is the section's
name, the description its sentence.
"""

import argparse
import difflib
import inspect
import re
import textwrap
from typing import Any

import torch

from nerf import __version__

WIDTH = 100  # columns
COLUMN = 26  # where help texts begin
# By the type that the flag's text becomes.
METAVARS = {int: "N", float: "X", str: "SCHEDULE", int | str: "SCHEDULE", float | str: "SCHEDULE"}
SOURCES = """\
A flag is taken from the first of: the command line, the environment (NERF_N_ITERS=500), the
--config file (N_iters = 500), your own defaults in ~/.config/nerf_dreamfusion/SCRIPT.txt (if there
is such a file), its default. --X switches X on, --no-X off (in a file: X = False)."""


def version() -> str:
    """One line: the version of the project, and torch's."""
    return f"nerf-dreamfusion {__version__} (torch {torch.__version__})"


def sections(parser: Any) -> dict[str, Any]:
    """Section name -> argparse's group of its flags."""
    return {group.title: group for group in parser._action_groups if group._group_actions}


def entries(group: Any) -> list[argparse.Action]:
    """The flags of a section; of two names for one switch only the positive one."""
    actions = group._group_actions
    paired = {action.dest for action in actions if getattr(action, "inverted", False)}
    return [a for a in actions if a.dest not in paired or getattr(a, "inverted", False)]


def section_of(parser: Any, flag: str) -> str:
    """The name of the section that has ``flag``, written with its dashes."""
    action = parser._option_string_actions[flag]
    groups = sections(parser)
    return next(name for name in groups if action in groups[name]._group_actions)


def metavar(action: argparse.Action) -> str:
    """What stands for the flag's value: its own word, its choices, or a letter by its type."""
    if action.metavar is not None:
        return action.metavar if isinstance(action.metavar, str) else " ".join(action.metavar)
    if action.choices is not None:
        return "|".join(map(str, action.choices))
    kind: Any = action.type
    return METAVARS[inspect.get_annotations(kind)["return"]] if kind else "TEXT"


def names(action: argparse.Action, *, short: bool) -> str:
    """How the flag is written. short: of a switch only the form that one needs."""
    if getattr(action, "inverted", False):
        return f"{', '.join(action.option_strings)}, --{action.dest}"
    if isinstance(action, argparse.BooleanOptionalAction):
        return action.option_strings[0] if short else ", ".join(action.option_strings)
    value = f"[{metavar(action)}]" if action.nargs == "?" else metavar(action)
    return f"{', '.join(action.option_strings)} {value if action.nargs != 0 else ''}".rstrip()


def default_text(action: argparse.Action) -> str:
    """ " (default: X)" of a flag that has a value; nothing of switches and of unset flags."""
    value = action.default
    if isinstance(value, bool) or value in (None, "", argparse.SUPPRESS):
        return ""
    numbers = value if isinstance(value, list) else [value]
    return f" (default: {' '.join(f'{n:g}' if type(n) is float else str(n) for n in numbers)})"


def entry(action: argparse.Action, *, short: bool = False) -> list[str]:
    """The lines of one flag."""
    left = f"  {names(action, short=short)}"
    together = re.sub(r"(\b0|default): ", "\\1:\xa0", f"{action.help}{default_text(action)}")
    wrapped = textwrap.wrap(together, WIDTH - COLUMN, break_on_hyphens=False)
    right = [line.replace("\xa0", " ") for line in wrapped]
    if len(left) > COLUMN - 2:
        return [left, *(" " * COLUMN + line for line in right)]
    return [left.ljust(COLUMN) + right[0], *(" " * COLUMN + line for line in right[1:])]


def short_page(parser: Any) -> str:
    """Usage, two examples, the flags one needs, the names of the sections."""
    by_name = {
        action.dest: action for group in sections(parser).values() for action in entries(group)
    }
    lines = [f"usage: python {parser.prog} --config FILE [--flag value ...]", ""]
    lines += [parser.description, "", *(f"  {example}" for example in parser.examples), ""]
    for name in parser.main_flags:
        lines += entry(by_name[name], short=True)
    listed = f"Sections: {', '.join(sections(parser))}."
    lines += ["", *textwrap.wrap(listed, WIDTH)]
    lines += ["--help SECTION prints the flags of a section, --help all every flag.", SOURCES]
    return "\n".join(lines)


def section_page(name: str, group: Any) -> str:
    """A section's name and sentence, and its flags."""
    lines = textwrap.wrap(f"{name}: {group.description}", WIDTH)
    return "\n".join([*lines, *(line for action in entries(group) for line in entry(action))])


def page(parser: Any, section: str) -> str:
    """The page of a section; "": the flags one needs; "all": every flag.

    ValueError with one line if there is no such section.
    """
    groups = sections(parser)
    if section == "":
        return short_page(parser)
    if section.lower() == "all":
        pages = [section_page(name, group) for name, group in groups.items()]
        return "\n\n".join([*pages, SOURCES])
    if section.lower() in groups:
        return f"{section_page(section.lower(), groups[section.lower()])}\n\n{SOURCES}"
    flag = f"--{section.lstrip('-')}"
    if flag in parser._option_string_actions:
        name = section_of(parser, flag)
        raise ValueError(f"--help {section}: {flag} is in section {name}; use --help {name}")
    (near,) = difflib.get_close_matches(section.lower(), groups, n=1, cutoff=0.0)
    raise ValueError(f"--help {section}: no such section; did you mean --help {near}?")
