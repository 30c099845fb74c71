"""Config files: lines of flag = value, read with one-line messages and written so that they reread.

Text only, in UTF-8, with or without a byte order mark.
"""

import argparse
import contextlib
import difflib
import io
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TextIO

import configargparse

NOT_WRITTEN = ("config", "fast")  # what they stand for is written out
MOST_BYTES = 1 << 20  # of a config file
ON, OFF = ("true", "yes", "on", "1"), ("false", "no", "off", "0")


class ConfigFile(configargparse.DefaultConfigFileParser):
    """``flag = value`` lines; text only, and no flag twice with different values."""

    keys: Sequence[str] = ()  # of the newest file

    def __init__(self) -> None:
        super().__init__()
        self.files: dict[str, Sequence[str]] = {}  # the keys of each file, the strongest first

    def parse(self, stream: TextIO) -> dict[str, Any]:
        """Flag -> value. ConfigFileParserException names the line that is wrong."""
        name = getattr(stream, "name", "the config file")
        try:
            lines = io.StringIO(stream.read())
        except UnicodeDecodeError:
            raise configargparse.ConfigFileParserException(
                f"{name}: not a text file; expected lines of flag = value, in UTF-8"
            ) from None
        lines.name = name  # type: ignore[attr-defined]  # configargparse's messages read it
        if problem := line_problem(lines):
            raise configargparse.ConfigFileParserException(f"{name}: {problem}")
        lines.seek(0)
        items = super().parse(lines)
        self.keys = self.files[name] = list(items)
        return items


def line_problem(lines: Iterable[str]) -> str | None:
    """What is wrong with the lines of a config file, if anything is."""
    values: dict[str, str] = {}
    for number, line in enumerate(lines, 1):
        line = line.strip()
        if not line or line[0] in "#;[" or line.startswith("---"):
            continue
        match = re.match(r"(?:--)?([\w-]+)(?:\s*[=:\s]\s*(.*?))?$", line)
        if match is None:
            return f"line {number} is {line!r}; expected flag = value"
        key, value = match[1], match[2] or "true"
        if values.setdefault(key, value) != value:
            return f"{key} is set twice, to {values[key]} and {value}; leave one out"
    return contradiction(values)


def contradiction(values: dict[str, str]) -> str | None:
    """What is wrong where a switch is set by its two names (ndc, no_ndc) to opposite meanings."""
    for name, value in values.items():
        other = values.get(f"no_{name}", "")
        if any(value.lower() in words and other.lower() in words for words in (ON, OFF)):
            return f"{name} = {value} and no_{name} = {other} contradict each other; leave one out"
    return None


def open_config(path: str) -> TextIO:
    """The opened config file. ValueError names the nearest file if it cannot be opened.

    Pipes and devices are refused: one may wait or go on for ever, and the run copies its config.
    """
    try:
        if Path(path).exists() and not Path(path).is_dir():
            if not Path(path).is_file():
                raise ValueError("it is a pipe or a device, not a file")
            if Path(path).stat().st_size > MOST_BYTES:
                raise ValueError(f"it has more than {MOST_BYTES} bytes, too many for a config")
        return open(path, encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        folders = {Path(path).parent, Path("configs")}
        files = {file.stem: str(file) for folder in folders for file in folder.glob("*.txt")}
        near = difflib.get_close_matches(Path(path).stem, files, n=1)
        advice = f"; did you mean {files[near[0]]}?" if near else ""
        raise ValueError(f"--config {path}: cannot be read ({reason}){advice}") from None


def as_config(args: argparse.Namespace, parser: Any) -> str:
    """``args`` as a config file that reads back to the same; unset flags are comments.

    Text that no config file can hold (several lines, some quotes) is named in a comment.
    ValueError on any other value that would read back differently.
    """
    flags = {name: value for name, value in vars(args).items() if name not in NOT_WRITTEN}
    lines, left_out = {}, set()
    for name, value in sorted(flags.items()):
        plain = not isinstance(value, str) or re.fullmatch(r"[\w ./:-]*", value)
        line = f'{name} = "{value}"' if isinstance(value, str) else f"{name} = {value}"  # " #"
        if isinstance(value, list):
            line = f"{name} = {json.dumps(value)}"
        if value is None:
            line = f"# {name} is not set"
        elif not plain and _read_back(line, parser).get(name) != value:
            line = f"# {name} is in args.json only: a config file cannot hold it"
            left_out.add(name)
        lines[name] = line
    content = "\n".join(lines.values())
    written = _read_back(content, parser)
    wrong = [name for name in flags if name not in left_out and written.get(name) != flags[name]]
    alone = [name for name in wrong if _read_back(lines[name], parser).get(name) != flags[name]]
    for name in alone or wrong:
        raise ValueError(
            f"--{name} {flags[name]!r} cannot be kept in args.txt: it would not read back as the "
            "same; use another value"
        )
    return content + "\n"


def _read_back(content: str, parser: Any) -> dict[str, Any]:
    """The flags that a config file of this content gives; none if it is not one."""
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            given = {"config_file_contents": content + "\n", "env_vars": {}}
            return vars(parser.parse_known_args([], **given)[0])
    except (SystemExit, ValueError, configargparse.ConfigFileParserException):
        return {}
