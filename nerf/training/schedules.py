"""Numbers that change during training, written as text: "0.1" or "0:1e-3,5000:1e-1"."""

import argparse
from functools import lru_cache
from itertools import pairwise

import numpy as np


@lru_cache(maxsize=256)
def parse_schedule(text: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Steps and values of ``text``. ValueError unless steps ascend and all are finite numbers."""
    pieces = [piece.strip() for piece in text.split(",")]
    steps: tuple[float, ...]
    values: tuple[float, ...]
    try:
        if len(pieces) == 1 and ":" not in text:
            steps, values = (0.0,), (float(text),)
        else:
            pairs = [piece.split(":") for piece in pieces]
            steps = tuple(float(step) for step, _ in pairs)
            values = tuple(float(value) for _, value in pairs)
    except ValueError:
        raise ValueError(
            f"{text!r} is not a schedule; expected a number or step:value,step:value"
        ) from None
    if not np.isfinite(values).all() or not np.isfinite(steps).all() or min(steps) < 0:
        raise ValueError(f"{text!r}: expected finite numbers, and steps of at least 0")
    if any(second <= first for first, second in pairwise(steps)):
        raise ValueError(f"{text!r}: the steps must ascend")
    return steps, values


def schedule(text: str) -> str:
    """A flag's type: ``text`` itself, once it is checked; config files and args.json hold text."""
    try:
        parse_schedule(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def scheduled(text: str, step: int) -> float:
    """The value at ``step``: linear between the steps of ``text``, constant outside of them."""
    steps, values = parse_schedule(text)
    return float(np.interp(step, steps, values))


def stepped(text: str, step: int) -> int:
    """The value at ``step`` without interpolation: a whole number, for sizes."""
    steps, values = parse_schedule(text)
    return int(values[max(0, int(np.searchsorted(steps, step, side="right")) - 1)])


def highest(text: str) -> float:
    """The largest value of the schedule ``text``."""
    return max(parse_schedule(text)[1])
