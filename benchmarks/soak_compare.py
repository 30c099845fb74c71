"""What a run that was killed left, compared with what an unbroken one left: everything but times.

Pictures, depth, videos, meshes and exports byte by byte; metrics, tables and checkpoints without
the values that are times, memory or places; of report.html the pictures in it. Files that only one
of the two has are differences, and so are hidden files that a kill left behind.
"""

import csv
import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from nerf.training import checkpoint

# Not compared: what was started when, TensorBoard's files, and notes that hold times of files.
OWN = ("log.txt", "cmd.txt", "args.json", "args.txt", "config.txt", ".lock", "settings.json")
OWN_FOLDERS = ("tb", "code", "work")
TIMES = ("second", "memory", "elapsed")  # in the names of values that the machine decides
PLACES = ("args", "file", "folder", "checkpoint")


def differences(first: Path, second: Path) -> list[str]:
    """One line for each artifact that differs between two folders, or that only one of them has.

    Also of two files.
    """
    if first.is_file():
        return [why] if (why := _difference(first, second)) else []
    one, other = _files(first), _files(second)
    found = [f"{name}: missing" for name in sorted(one - other) if not name.endswith(".tar")]
    found += [f"{name}: left behind" for name in sorted(other - one) if not name.endswith(".tar")]
    last = max((name for name in one if name.endswith(".tar")), default="")
    if last and last not in other:
        found.append(f"{last}: missing")
    for name in sorted(one & other):
        if why := _difference(first / name, second / name):
            found.append(f"{name}: {why}")
    return found


def _files(folder: Path) -> set[str]:
    paths = [path for path in folder.rglob("*") if _is_left(path) and path.name not in OWN]
    paths = [path for path in paths if not re.fullmatch(r"\.pictures(\.lock|_\w+\.npy)", path.name)]
    names = [path.relative_to(folder) for path in paths]
    return {str(name) for name in names if not set(name.parts[:-1]) & set(OWN_FOLDERS)}


def _is_left(path: Path) -> bool:
    """Whether it is a file, or a hidden folder such as a killed program leaves behind."""
    return path.is_file() or path.name.startswith(".")


def _difference(first: Path, second: Path) -> str:
    """What differs between two files of one name; "" if nothing does."""
    if first.suffix == ".tar":
        one, other = (_without_times(checkpoint.load_checkpoint(path)) for path in (first, second))
        keys = [key for key in one.keys() | other.keys() if not same(one.get(key), other.get(key))]
        return f"{', '.join(sorted(keys))} differ" if keys else ""
    if first.suffix == ".csv":
        return "" if _rows(first) == _rows(second) else "other rows"
    if first.suffix == ".json":
        one, other = (_without_times(json.loads(path.read_text())) for path in (first, second))
        keys = [key for key in one.keys() | other.keys() if one.get(key) != other.get(key)]
        return f"{', '.join(sorted(keys))} differ" if keys else ""
    if first.suffix == ".html":
        one, other = (re.findall(r"data:[^\"')]+", path.read_text()) for path in (first, second))
        return "" if one == other else "other pictures"
    if first.name.endswith(".made_from") or first.name.startswith(".stored"):
        return ""  # fingerprints of times of files
    if first.suffix in (".pt", ".safetensors"):
        return "" if same(tensors(first), tensors(second)) else "other tensors"
    if first.name == "report.txt":  # of photos; it says how long they took
        one, other = (re.sub(r" in \d+ s;", "", path.read_text()) for path in (first, second))
        return "" if one == other else "other text"
    return "" if first.read_bytes() == second.read_bytes() else "other bytes"


def tensors(path: Path) -> dict[str, Any]:
    """The content of a .safetensors or .pt file; the order of the former's metadata is random."""
    if path.suffix == ".safetensors":
        return load_file(path)
    return torch.load(path, weights_only=True)


def _rows(path: Path) -> list[dict[str, str]]:
    """A table without the columns that are times."""
    rows = csv.DictReader(path.read_text().splitlines())
    return [{k: v for k, v in row.items() if k and not _is_time(k)} for row in rows]


def _is_time(name: str) -> bool:
    return any(part in name for part in TIMES)


def _without_times(value: Any) -> Any:
    """Nested tables without the entries that are times or places."""
    if isinstance(value, dict):
        kept = [key for key in value if not (_is_time(str(key)) or key in PLACES)]
        return {key: _without_times(value[key]) for key in kept}
    return [_without_times(entry) for entry in value] if isinstance(value, list) else value


def same(one: Any, other: Any) -> bool:
    """Whether two values of a checkpoint are equal bit for bit."""
    if torch.is_tensor(one):
        return torch.is_tensor(other) and torch.equal(one, other)
    if isinstance(one, dict):
        return (
            isinstance(other, dict)
            and one.keys() == other.keys()
            and all(same(one[key], other[key]) for key in one)
        )
    if isinstance(one, list):
        return (
            isinstance(other, list)
            and len(one) == len(other)
            and all(same(*pair) for pair in zip(one, other, strict=True))
        )
    return bool(one == other)
