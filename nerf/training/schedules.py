"""Numbers that change during training, written as text: "0.1" or "0:1e-3,5000:1e-1"."""

import argparse
from functools import lru_cache

import numpy as np


@lru_cache(maxsize=256)
def parse_schedule(text: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Steps and values of ``text``. ValueError unless steps ascend and all are finite numbers."""
    pieces = [piece.strip() for piece in text.split(",")]
    try:
        if len(pieces) == 1 and ":" not in text:
            steps, values = (0.0,), (float(text),)
        else:
            pairs = [piece.split(":") for piece in pieces]
            steps = tuple(float(step) for step, _ in pairs)
            values = tuple(float(value) for _, value in pairs)
    except ValueError:
        raise ValueError(
            f"{text!r} is not a schedule; expected a number, or step:value,step:value"
        ) from None
    if not np.isfinite(values).all() or not np.isfinite(steps).all() or min(steps) < 0:
        raise ValueError(f"{text!r}: expected finite numbers and steps from 0")
    if any(late <= early for early, late in zip(steps, steps[1:], strict=False)):
        raise ValueError(f"{text!r}: the steps have to ascend")
    return steps, values


def schedule(text: str) -> str:
    """A schedule of a flag, kept as text: that is what config files and args.json hold."""
    try:
        parse_schedule(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def scheduled(text: str, step: int) -> float:
    """The value at ``step``: linear between the given steps, constant before and after them."""
    steps, values = parse_schedule(text)
    return float(np.interp(step, steps, values))


def stepped(text: str, step: int) -> int:
    """The value at ``step`` that was set last, a whole number: for sizes, which cannot glide."""
    steps, values = parse_schedule(text)
    return int(values[max(0, int(np.searchsorted(steps, step, side="right")) - 1)])


def highest(text: str) -> float:
    """The largest value it ever takes."""
    return max(parse_schedule(text)[1])
