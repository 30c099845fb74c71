"""The parser of both scripts: sections, help pages, and mistakes answered by one line."""

import argparse
import glob
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TextIO, TypeVar

import configargparse

from nerf.flags import help as pages
from nerf.flags import mistakes
from nerf.flags.config_file import ConfigFile, open_config
from nerf.flags.types import whole_number

T = TypeVar("T")

ENV_PREFIX = mistakes.ENV_PREFIX
NOT_SETTABLE = ("help", "version")  # neither in config files nor in the environment


class Switch(argparse.BooleanOptionalAction):
    """--NAME and --no-NAME; a config file can set it and the command line unset it.

    inverted: --NAME stores False and --no-NAME stores True. This is how nerf-pytorch's negative
    names (``no_ndc``) get a positive name beside them.
    """

    def __init__(
        self, option_strings: Sequence[str], dest: str, *, help: str, inverted: bool = False
    ) -> None:
        default = argparse.SUPPRESS if inverted else False  # the negative name has the default
        super().__init__(option_strings, dest, default=default)
        self.help, self.inverted = help, inverted

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        on = not (option_string or "").startswith("--no-")
        setattr(namespace, self.dest, on != self.inverted)


class PageAction(argparse.Action):
    """--help and --version: print a page and end the program."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        assert isinstance(parser, Parser)
        parser.print_page(self.dest, values or "")


class Parser(configargparse.ArgumentParser):
    """Flags from the command line, NERF_* variables, a --config file, the user's own defaults.

    script: the file name that stands before every message. examples: commands of the short help
    page. main_flags: the names of the flags on it.
    """

    def __init__(
        self, script: str, description: str, examples: Sequence[str], main_flags: Sequence[str]
    ) -> None:
        super().__init__(
            prog=script,
            description=description,
            add_help=False,
            allow_abbrev=False,
            exit_on_error=False,
            config_file_parser_class=ConfigFile,
            default_config_files=[],  # set in ``parse_known_args``
            config_file_open_func=self.open_config,
            auto_env_var_prefix=ENV_PREFIX,
        )
        self.examples, self.main_flags = examples, main_flags
        self.words: list[str] = []  # the command line
        self.variables: Mapping[str, str] = os.environ
        # The user's own defaults, weaker than everything but the flags' own; may be missing.
        home = Path(os.environ.get("XDG_CONFIG_HOME") or "~/.config").expanduser()
        self.site = home / "nerf_dreamfusion" / script.replace(".py", ".txt")

    def section(self, name: str, sentence: str) -> "Section":
        """A new section of flags, with its one sentence on the help page."""
        return Section(self.add_argument_group(name, sentence))

    # -------------------------------------------------------------------------------- help

    def answer_help(self, words: Sequence[str]) -> None:
        """Print the page that --help or --version asks for, wherever it stands, and exit 0."""
        for place, word in enumerate(words):
            if word == "--version":
                self.print_page("version")
            if word in ("-h", "--help"):
                following = [*words[place + 1 : place + 2], "-"][0]
                self.print_page("help", "" if following.startswith("-") else following)
            if word.startswith("--help="):
                self.print_page("help", word.partition("=")[2])

    def print_page(self, page: str, section: str = "") -> NoReturn:
        """Print the version or a help page: section "" (the flags one needs), a name, or all."""
        try:
            print(pages.version() if page == "version" else pages.page(self, section))
        except ValueError as error:
            self.error(str(error))
        raise SystemExit(0)

    def format_help(self) -> str:
        """The short page."""
        return pages.page(self, "") + "\n"

    # ---------------------------------------------------------------------------- mistakes

    def error(self, message: str) -> NoReturn:
        """Print one line and exit with code 2."""
        line = re.sub(r"\s+", " ", "".join(c if c.isprintable() else " " for c in message))
        print(f"{self.prog}: {line}", file=sys.stderr)
        raise SystemExit(2)

    def config_keys(self) -> Sequence[str]:
        """The keys of the config file, known or not."""
        return self._config_file_parser.keys

    def refuse(self, problem: str | None) -> None:
        """End the program if there is a problem."""
        if problem:
            self.error(problem)

    def checked(self, function: Callable[..., T], *arguments: Any) -> T:
        """function(parser, *arguments); its ValueError ends the program as a mistake does."""
        try:
            return function(self, *arguments)
        except ValueError as error:
            self.error(str(error))

    @property
    def config_path(self) -> str:
        """The config file that was read last."""
        return next(reversed(self._config_file_parser.files), "config file")

    def file_of(self, name: str) -> str:
        """The config file that the flag ``name`` is from."""
        files = self._config_file_parser.files.items()
        return next((path for path, keys in files if name in keys), self.config_path)

    def sources(self) -> dict[str, str]:
        """Flag -> the environment variable or the config file that sets it, unless it was typed."""
        found: dict[str, str] = {}
        for source, settings in self.get_source_to_settings_dict().items():
            kind, _, path = source.partition("|")
            for key, (action, _) in settings.items():
                if kind in ("config_file", "environment_variables"):  # the strongest comes first
                    found.setdefault(action.dest, path or f"the variable {key}")
        return found

    def site_notes(self) -> list[str]:
        """A line for the log about the flags that the user's own defaults have set, if any."""
        settings = self.get_source_to_settings_dict().get(f"config_file|{self.site}", {})
        if not settings:
            return []
        listed = ", ".join(f"{name} {value}" for name, (_, value) in settings.items())
        return [f"from {self.site}: {listed}"]

    def open_config(self, path: str, mode: str = "r") -> TextIO:
        """The opened config file."""
        try:
            return open_config(path)
        except ValueError as error:
            self.error(str(error))

    def parse_known_args(self, args: Any = None, namespace: Any = None, **sources: Any) -> Any:
        """(flags, words that are none), as configargparse does; every mistake is one line."""
        self.words = list(sys.argv[1:] if args is None else args)
        self.variables = sources.get("env_vars", os.environ)
        self._config_file_parser.files.clear()
        # args.txt is the record of a run, with which nothing else shall interfere.
        recorded = any(word.endswith("args.txt") for word in self.words)
        self._default_config_files = [] if recorded else [glob.escape(str(self.site))]
        self.answer_help(self.words)
        self.refuse(mistakes.check_words(self, self.words))
        try:
            return super().parse_known_args(self.words, namespace, **sources)
        except argparse.ArgumentError as error:
            self.error(mistakes.explain(self, error))

    # ---------------------------------------- hooks of argparse and configargparse, used above

    def _get_value(self, action: argparse.Action, arg_string: str) -> Any:
        """``arg_string`` as the flag's type reads it; the message of a failure begins with it."""
        try:
            return action.type(arg_string) if callable(action.type) else arg_string
        except argparse.ArgumentTypeError as error:
            message = str(error).removeprefix(f"{arg_string!r}: ")
            text = mistakes.shown(arg_string)
            raise argparse.ArgumentError(action, f"{text}: {message}") from None

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        """ArgumentError unless the value is one of the flag's choices."""
        if action.choices is not None and value not in action.choices:
            choices = ", ".join(map(str, action.choices))
            text = mistakes.shown(str(value))
            raise argparse.ArgumentError(action, f"{text}: expected one of {choices}")

    def get_possible_config_keys(self, action: argparse.Action) -> list[str]:
        """Names of the flag in config files: not --help, not --no-NAME."""
        if action.dest in NOT_SETTABLE:
            return []
        keys = super().get_possible_config_keys(action)
        return keys[:2] if isinstance(action, Switch) else keys

    def convert_item_to_command_line_arg(
        self, action: argparse.Action | None, key: str, value: Any
    ) -> list[str]:
        """The words that a line of a config file or a variable stands for."""
        self.refuse(mistakes.check_item(self, action, key, value))
        return super().convert_item_to_command_line_arg(action, key, value)


class Section:
    """A section of flags: ``flag`` adds one that has a value, ``switch`` one that is on or off."""

    def __init__(self, group: Any) -> None:
        self.group = group  # argparse's

    def flag(
        self, name: str, kind: Any, default: Any, help: str, *, alias: str = "", **more: Any
    ) -> None:
        """Add --NAME, and --ALIAS for the same.

        kind: a type of ``nerf.flags.types``, a sequence of choices, or, for a text, what stands for
        it in the help, such as FILE. more: for argparse.
        """
        if isinstance(kind, str):
            more = {"metavar": kind, **more}
        elif callable(kind):
            more = {"type": kind, **more}
        else:
            more = {
                "type": whole_number if isinstance(kind[0], int) else None,
                "choices": kind,
            } | more
        names = [f"--{each}" for each in (name, alias) if each]
        self.group.add_argument(*names, default=default, help=help, **more)

    def switch(self, name: str, help: str, *, positive: str | None = None) -> None:
        """Add --NAME and --no-NAME. positive: a name for the opposite ("ndc" for "no_ndc")."""
        self.group.add_argument(f"--{name}", action=Switch, help=help)
        if positive:
            self.group.add_argument(
                f"--{positive}", action=Switch, dest=name, help=help, inverted=True
            )


def add_help_flags(section: Section) -> None:
    """--help and --version."""
    add, never = section.group.add_argument, argparse.SUPPRESS
    help = "print the flags one needs; with SECTION: its flags; with all: every flag"
    add("-h", "--help", action=PageAction, nargs="?", metavar="SECTION", default=never, help=help)
    help = "print the versions of this project and of torch"
    add("--version", action=PageAction, nargs=0, default=never, help=help)
