"""Values of flags that depend on the device: the rows of configs/by_device.table.

A batch that fills a GPU takes a CPU minutes, and one that suits a CPU leaves a GPU idle. A config
names a group of rows (``by_device = fast``) and leaves their flags out.
"""

import argparse
import json
from collections.abc import Collection
from pathlib import Path

from nerf.flags.parser import Parser
from nerf.training.distributed import choose_device

TABLE = Path(__file__).resolve().parents[2] / "configs" / "by_device.table"


def read_table(path: Path = TABLE) -> dict[str, dict[str, tuple[str, str]]]:
    """Group -> flag -> its value on a CPU and on a GPU. ValueError with the line that is wrong.

    A row is ``group.flag = value on a CPU | value on a GPU``; lines that begin with # are comments.
    """
    table: dict[str, dict[str, tuple[str, str]]] = {}
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from None
    for number, line in enumerate(lines, 1):
        text = line.split("#")[0].strip()
        if not text:
            continue
        name, _, values = text.partition("=")
        group, _, flag = name.strip().partition(".")
        cpu, _, gpu = (value.strip() for value in values.partition("|"))
        if not (group and flag and cpu and gpu):
            raise ValueError(f"{path}, line {number}: {text!r}; expected group.flag = cpu | gpu")
        table.setdefault(group, {})[flag] = cpu, gpu
    return table


def choose_by_device(
    parser: Parser, args: argparse.Namespace, given: Collection[str], table: Path = TABLE
) -> list[str]:
    """Set the flags of the group ``args.by_device`` that are not in ``given``; lines for the log.

    A run keeps the values of the device on which it began, on whatever device it goes on; what was
    typed at an earlier start counts for that start only. A run's own record, args.txt, holds all
    values, so that nothing is chosen. ValueError for an unknown group or value.
    """
    if not args.by_device or (args.config and Path(args.config).name == "args.txt"):
        return []
    groups = read_table(table)
    if args.by_device not in groups:
        raise ValueError(
            f"--by_device {args.by_device}: {table.name} has the groups {', '.join(groups)}"
        )
    rows = groups[args.by_device].items()
    on_cpus, on_gpus = (
        {flag: _parsed(parser, flag, values[column], table) for flag, values in rows}
        for column in (0, 1)
    )
    began = {} if args.no_reload else _record(Path(args.basedir) / args.expname / "args.json")
    on_gpu = _began_on_gpu(began, on_cpus, on_gpus)
    source = ", on which this run began" * (on_gpu is not None)
    if on_gpu is None:
        on_gpu = choose_device(args.device).type == "cuda"
    chosen = {
        flag: value for flag, value in (on_gpus if on_gpu else on_cpus).items() if flag not in given
    }
    for flag, value in chosen.items():
        setattr(args, flag, value)
    if not chosen:
        return []
    listed = ", ".join(f"{flag} {value}" for flag, value in chosen.items())
    device = "GPU" if on_gpu else "CPU"
    return [f"settings for a {device}{source} (--by_device {args.by_device}): {listed}"]


def _began_on_gpu(
    began: dict[str, object], on_cpus: dict[str, object], on_gpus: dict[str, object]
) -> bool | None:
    """Whether the flags ``began`` of a run are a GPU's; None if they fit neither device better.

    Some may have been typed, so it is the device with more of its values among them.
    """
    cpu, gpu = (
        sum(began.get(flag) == value for flag, value in column.items())
        for column in (on_cpus, on_gpus)
    )
    return None if cpu == gpu else gpu > cpu


def _record(path: Path) -> dict[str, object]:
    """The flags of the run's last start; {} if there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _parsed(parser: Parser, flag: str, text: str, table: Path) -> object:
    """The value of ``text``, as a config file would give it."""
    actions = {action.dest: action for action in parser._actions}
    if flag not in actions:
        raise ValueError(f"{table}: {flag} is not a flag of {parser.prog}")
    try:
        value = parser._get_value(actions[flag], text)
        parser._check_value(actions[flag], value)
    except argparse.ArgumentError as error:
        raise ValueError(f"{table}: {error}") from None
    return value


def given_flags(parser: Parser, args: argparse.Namespace) -> frozenset[str]:
    """The flags that the command line, the environment or a config file has set."""
    defaults = parser.get_source_to_settings_dict().get("defaults", {})
    unset = {key.strip("-") for key in defaults}
    return frozenset(name for name in vars(args) if name not in unset)
