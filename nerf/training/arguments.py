"""Flags of the small programs: argparse, whose every mistake is one line and the exit code 2.

The two training scripts have ``nerf.flags.parser``.
"""

import argparse
import difflib
import re
import sys
from typing import NoReturn

from nerf.training.last_net import MISTAKE
from nerf.training.plain_text import one_line

KINDS = {"int": "a whole number", "float": "a number"}  # types of argparse, in words


class ArgumentParser(argparse.ArgumentParser):
    """A parser without abbreviations and without pages of usage at a mistake.

    program: what stands before each message, such as "guidance.sample".
    """

    def __init__(self, program: str, description: str | None) -> None:
        first_line = (description or "").splitlines()[:1]
        super().__init__(prog=program, description=" ".join(first_line), allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        """Print one line, and end the process with exit code 2."""
        print(f"{self.prog}: {one_line(self.explain(message))}", file=sys.stderr)
        raise SystemExit(MISTAKE)

    def explain(self, message: str) -> str:
        """argparse's message, in words that say what to do."""
        flags = [name for name in self._option_string_actions if name.startswith("--")]
        if match := re.fullmatch(r"unrecognized arguments: (.*)", message, re.DOTALL):
            word = match[1].split()[0]
            close = difflib.get_close_matches(word.split("=")[0], flags, n=1)
            cure = f"did you mean {close[0]}?" if close else "--help lists the flags"
            return f"{word!r} is not expected here; {cure}"
        if match := re.fullmatch(r"the following arguments are required: (.*)", message):
            return f"missing: {match[1]}; --help says what each is"
        flag, _, problem = message.removeprefix("argument ").partition(": ")
        if match := re.fullmatch(r"invalid (\w+) value: (.*)", problem, re.DOTALL):
            return f"{flag} {match[2]}: expected {KINDS.get(match[1], 'another value')}"
        if match := re.fullmatch(r"invalid choice: (.*) \(choose from (.*)\)", problem, re.DOTALL):
            return f"{flag} {match[1]}: expected one of {match[2]}"
        if problem.startswith("expected ") and "argument" in problem:
            return f"{flag}: the value is missing"
        return message.removeprefix("argument ")
