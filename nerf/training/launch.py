"""Which of how many processes this one is, as torchrun's environment variables say."""

import os
from collections.abc import Mapping
from typing import NamedTuple

MOST = 10**6  # processes
BOTH = ("RANK", "WORLD_SIZE")
MEETING = ("MASTER_ADDR", "MASTER_PORT")


class Place(NamedTuple):
    """This process, ``rank`` of ``size``, and number ``local_rank`` of its machine."""

    rank: int
    size: int
    local_rank: int


def find_place(variables: Mapping[str, str] | None = None) -> Place:
    """The place that the variables (default: the environment's) give; (0, 1, 0) without them.

    ValueError if they contradict each other, or if one of several processes could not find the
    others.
    """
    variables = os.environ if variables is None else variables
    given = [name for name in BOTH if name in variables]
    if not given:
        return Place(0, 1, _number(variables, "LOCAL_RANK", 0, 0, MOST))
    if len(given) == 1:
        (lacking,) = set(BOTH) - set(given)
        raise _mistake(f"{given[0]}={_shown(variables[given[0]])} is set and {lacking} is not")
    size = _number(variables, "WORLD_SIZE", 1, 1, MOST)
    rank = _number(variables, "RANK", 0, 0, size - 1)
    local_rank = _number(variables, "LOCAL_RANK", 0, 0, size - 1)
    if size > 1:
        for name in MEETING:
            if not variables.get(name, "").strip():
                raise _mistake(f"WORLD_SIZE={size} and {name} is not set")
        _number(variables, "MASTER_PORT", 0, 1, 65535)
    return Place(rank, size, local_rank)


def _number(variables: Mapping[str, str], name: str, default: int, low: int, high: int) -> int:
    text = variables.get(name, str(default)).strip()
    is_number = text.isascii() and text.isdigit() and len(text) < 10
    if not is_number or not low <= int(text) <= high:
        raise _mistake(f"{name}={_shown(text)}, expected a whole number from {low} to {high}")
    return int(text)


def _shown(text: str) -> str:
    return repr(text[:40])


def _mistake(what: str) -> ValueError:
    return ValueError(
        f"the environment: {what}; start several processes with torchrun, which sets all of "
        f"{', '.join((*BOTH, 'LOCAL_RANK', *MEETING))}, or unset them for a single one"
    )
