"""What people write by mistake, each answered by one line with the cure."""

import argparse
import difflib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from nerf.flags.config_file import OFF, ON, contradiction
from nerf.flags.help import metavar, section_of
from nerf.training.plain_text import shell_command

ENV_PREFIX = "NERF_"
# Flags that only one script has: they tell which script a config or a command line is for.
ONLY_IN = {
    "run_nerf.py": ("datadir", "dataset_type", "N_rand", "N_samples", "N_importance", "fast"),
    "run_dreamfusion.py": ("prompt", "prompt_file", "sd_model", "guidance", "guidance_scale"),
}


def shown(text: str) -> str:
    """A value inside a message: quoted where it is empty or has spaces."""
    return repr(text) if not text or re.search(r"\s", text) else text


def is_switch(action: argparse.Action | None) -> bool:
    """Whether the flag is on or off and takes no value."""
    return isinstance(action, argparse.BooleanOptionalAction)


# --------------------------------------------------------------------------------- unknown names


def config_names(parser: Any, *, aliases: bool = True) -> list[str]:
    """The names that config files can set. aliases False: one per flag, as in the environment."""
    keys = [parser.get_possible_config_keys(action) for action in parser._actions]
    return [key for each in keys for key in each[: None if aliases else 1] if key[:2] != "--"]


def nearest(parser: Any, name: str, before: str = "--") -> str:
    """The end of a message: the known flag most like ``name``, and its section.

    before: what is written before the flag: "--", nothing (config files) or ENV_PREFIX.
    """
    typed = [option[2:] for option in parser._option_string_actions if option[:2] == "--"]
    known = typed if before == "--" else config_names(parser, aliases=not before)
    lowered = {key.lower(): key for key in known if not key.startswith("no-no_")}
    close = difflib.get_close_matches(name.lower(), lowered, n=1, cutoff=0.5)
    if not close:
        return "; --help all prints every flag"
    flag = lowered[close[0]]
    written = flag.upper() if before == ENV_PREFIX else flag
    return f"; did you mean {before}{written}? (--help {section_of(parser, f'--{flag}')})"


def other_script(parser: Any, name: str) -> str | None:
    """The script that has the flag ``name`` when this one does not."""
    scripts = [script for script, flags in ONLY_IN.items() if name in flags]
    return scripts[0] if scripts and scripts[0] != parser.prog else None


def unknown_flag(parser: Any, word: str) -> str:
    """What is wrong with a word of the command line that looks like a flag and is none."""
    name = word.split("=")[0].lstrip("-")
    if script := other_script(parser, name):
        return f"--{name} is a flag of {script}"
    if name.replace("-", "_") == "help_all":
        return f"unknown flag {word.split('=')[0]}; did you mean --help all?"
    return f"unknown flag {word.split('=')[0]}{nearest(parser, name)}"


def check_environment(parser: Any, variables: Mapping[str, str]) -> str | None:
    """What is wrong with the NERF_* variables, if anything is."""
    own = {
        key[len(ENV_PREFIX) :]: variables[key] for key in variables if key.startswith(ENV_PREFIX)
    }
    known = {name.upper() for name in config_names(parser, aliases=False)}
    for name in own:
        if name not in known:
            near = nearest(parser, name.lower(), ENV_PREFIX)
            return f"environment variable {ENV_PREFIX}{name}: no flag has this name{near}"
    problem = contradiction({name.lower(): value for name, value in own.items()})
    return f"environment: {problem}" if problem else None


# ------------------------------------------------------------------------------- the command line


def check_words(parser: Any, words: Sequence[str]) -> str | None:
    """What is wrong with the command line, apart from the values: flags with one dash, unknown
    flags, words that no flag takes.
    """
    for word in words:
        name = word.split("=")[0].lstrip("-")
        if re.match(r"-[A-Za-z]", word) and f"--{name}" in parser._option_string_actions:
            return f"{word.split('=')[0]}: flags start with two dashes, --{name}"
        if word == "--":
            return "-- stands alone; leave it out, or write a flag's name directly after it"
    for flag, values in groups(parser, words):
        if flag is None:
            problem = leading_words(parser, values) if values else None
        else:
            problem = surplus_words(parser, flag, values)
        if problem:
            return problem
    return None


def groups(parser: Any, words: Sequence[str]) -> list[tuple[str | None, list[str]]]:
    """The command line as (flag, the words after it); first (None, words before any flag)."""
    found: list[tuple[str | None, list[str]]] = [(None, [])]
    for word in words:
        known = word.split("=")[0] in parser._option_string_actions
        if known or (re.match(r"--?[A-Za-z_]", word) and " " not in word):
            found.append((word, []))
        else:
            found[-1][1].append(word)
    return found


def leading_words(parser: Any, words: Sequence[str]) -> str:
    """What is wrong with words before any flag."""
    word, text = words[0], " ".join(words)
    if word.endswith(".txt"):
        return f"{word!r} is not a flag; to read a config, write --config {shell_command([word])}"
    if f"--{word.split('=')[0]}" in parser._option_string_actions:
        return f"{word!r} is not a flag; write --{word}"
    if "--prompt" in parser._option_string_actions:
        return f'{text!r} is not a flag; to make it, write --prompt "{text}"'
    return f"{word!r} is not a flag; flags start with --"


def surplus_words(parser: Any, flag: str, values: list[str]) -> str | None:
    """What is wrong with a flag that is unknown or has more values than it takes."""
    name, equals, value = flag.partition("=")
    action = parser._option_string_actions.get(name)
    if action is None:
        return unknown_flag(parser, flag)
    if is_switch(action):
        return switch_with_value(parser, action, name, values[0]) if values else None
    given = [value, *values] if equals else values
    if action.nargs == "+":
        return None
    takes = action.nargs if isinstance(action.nargs, int) else 1
    if len(given) <= takes:
        return None
    text = " ".join(given)
    if action.metavar != "TEXT" and f"--{given[takes]}" in parser._option_string_actions:
        return f"{given[takes]!r} is not a flag; write --{given[takes]}"
    if action.type is None and action.choices is None:
        quoted = name.removeprefix("--")
        return f'{name} {text}: quote the {quoted}: {name} "{text}"'
    count = "one value" if takes == 1 else f"{takes} values"
    return f"{name} {text}: takes {count}; leave out {given[takes]!r}"


def switch_with_value(parser: Any, action: argparse.Action, name: str, value: str) -> str:
    """--white_bkgd false."""
    on, off = action.option_strings[:2]
    positive = "--" + on.removeprefix("--no_")
    if off.startswith("--no-no_") and positive in parser._option_string_actions:
        off = positive
    return f"{name} {value}: a switch takes no value; use {on} or {off}"


# ------------------------------------------------------------------------------------ bad values


def check_item(parser: Any, action: argparse.Action | None, key: str, value: Any) -> str | None:
    """What is wrong with a line of the config file, or with an environment variable."""
    variable = action is not None and key == getattr(action, "env_var", None)
    where = f"environment variable {key}" if variable else f"{parser.config_path}: {key}"
    if action is None:
        return unknown_key(parser, key)
    if is_switch(action):
        known = isinstance(value, str) and value.lower() in ON + OFF
        return None if known else f"{where} = {value}: expected True or False"
    if isinstance(action.nargs, int):
        fits = isinstance(value, list) and len(value) == action.nargs
        example = f"[{', '.join(map(str, action.default or action.metavar or ()))}]"
        return None if fits else f"{where} = {value}: expected {action.nargs} values: {example}"
    if isinstance(value, list) and action.nargs != "+":
        return f"{where} = {value}: expected one value, not a list"
    return None


def unknown_key(parser: Any, key: str) -> str:
    """What is wrong with a config file's key that is no flag."""
    for each in parser.config_keys():
        if script := other_script(parser, each):
            return f"{parser.config_path} is a config of {script}"
    name = key.removeprefix("--").removeprefix("no-")
    if name != key.removeprefix("--") and f"--{name}" in parser._option_string_actions:
        return f"{parser.config_path}: {key}: write {name} = False"
    return f"{parser.config_path}: unknown flag {key}{nearest(parser, key, '')}"


def explain(parser: Any, error: argparse.ArgumentError) -> str:
    """argparse's complaint about one flag, after the place that the flag comes from."""
    action = parser._option_string_actions.get((error.argument_name or "").split("/")[0])
    if action is None:
        return str(error)
    typed = [word for word in parser.words if word.split("=")[0] in action.option_strings]
    if not typed:
        variable = getattr(action, "env_var", None)
        from_file = f"{parser.file_of(action.dest)}: {action.dest}"
        where = f"environment variable {variable}" if variable in parser.variables else from_file
        return f"{where} = {error.message}"
    flag, _, value = typed[-1].partition("=")
    if is_switch(action):
        return switch_with_value(parser, action, flag, value)
    if not error.message.startswith("expected ") or " argument" not in error.message:
        return f"{flag} {error.message}"
    place = parser.words.index(typed[-1])
    following = [word for word in parser.words[place + 1 : place + 2] if word[:1] == "-"]
    if isinstance(action.nargs, int):
        values = action.default or action.metavar or ()
        example = " ".join(f"{n:g}" if isinstance(n, float) else str(n) for n in values)
        return f"{flag}: expected {action.nargs} numbers: {flag} {example}"
    if following and following[0] not in parser._option_string_actions:
        return f"{flag}: expected a value; one that starts with - is written {flag}={following[0]}"
    return f"{flag}: the value is missing: {flag} {metavar(action)}"
