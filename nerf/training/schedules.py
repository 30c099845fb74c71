"""Numbers that change during training, written as text.

"0.1" is constant; "0:1e-3,5000:1e-1" goes from one to the other in a straight line. A third part
says how the value gets to a step from the one before: "0:1e-2,5000:1e-4:exp" by a constant factor
per update, "cosine" in half a wave, "step" in a jump at that step, "linear" as without it.
"""

import argparse
import math
from collections.abc import Callable
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

import numpy as np

GRAMMAR = (
    "a number or step:value,step:value, in straight lines; step:value:exp, :cosine or :step for "
    "another way from the step before"
)

# (value before, value after, fraction of the steps between, in (0, 1)) -> value
SHAPES: dict[str, Callable[[float, float, float], float]] = {
    "linear": lambda low, high, fraction: low + (high - low) * fraction,
    "exp": lambda low, high, fraction: low * (high / low) ** fraction,
    "cosine": lambda low, high, fraction: high + (low - high) * 0.5 * (
        1 + math.cos(math.pi * fraction)
    ),
    "step": lambda low, high, fraction: low,
}  # fmt: skip


class Schedule(NamedTuple):
    """Steps that ascend, the value at each, and how it is reached from the one before."""

    steps: tuple[float, ...]
    values: tuple[float, ...]
    shapes: tuple[str, ...]  # keys of SHAPES; the first has no effect


@lru_cache(maxsize=256)
def parse_schedule(text: str) -> Schedule:
    """The schedule that ``text`` writes. ValueError, with the grammar, if it is none."""
    pieces = [piece.strip().split(":") for piece in text.split(",")]
    try:
        if len(pieces) == 1 and len(pieces[0]) == 1:
            found = Schedule((0.0,), (float(text),), ("linear",))
        else:
            shapes = [piece[2].strip() if len(piece) == 3 else "linear" for piece in pieces]
            steps, values = zip(*((float(p[0]), float(p[1])) for p in pieces), strict=True)
            found = Schedule(steps, values, tuple(shapes))
            if any(len(piece) > 3 for piece in pieces) or not set(shapes) <= set(SHAPES):
                raise ValueError
    except (ValueError, IndexError):
        raise ValueError(f"{text!r} is not a schedule; expected {GRAMMAR}") from None
    steps, values, _ = found
    if not np.isfinite(values).all() or not np.isfinite(steps).all() or min(steps) < 0:
        raise ValueError(f"{text!r}: expected finite numbers, and steps of at least 0: {GRAMMAR}")
    if any(second <= first for first, second in pairwise(steps)):
        raise ValueError(f"{text!r}: the steps must ascend: {GRAMMAR}")
    if len(pieces[0]) == 3:
        raise ValueError(f"{text!r}: the first step takes no shape such as :exp: {GRAMMAR}")
    for place, shape in enumerate(found.shapes):
        if shape == "exp" and min(values[place - 1 : place + 1]) <= 0:
            raise ValueError(f"{text!r}: exp needs values above 0: {GRAMMAR}")
    return found


def schedule(text: str) -> str:
    """A flag's type: ``text`` itself, once it is checked; config files and args.json hold text."""
    try:
        parse_schedule(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def scheduled(text: str, step: int) -> float:
    """The value at ``step``: between the steps of ``text`` as it says, constant outside of them."""
    steps, values, shapes = parse_schedule(text)
    if set(shapes) == {"linear"}:
        return float(np.interp(step, steps, values))
    after = int(np.searchsorted(steps, step, side="right"))
    if after in (0, len(steps)):
        return values[max(0, after - 1)]
    start, end = steps[after - 1], steps[after]
    before, target, fraction = values[after - 1], values[after], (step - start) / (end - start)
    return SHAPES[shapes[after]](before, target, fraction)


def stepped(text: str | int, step: int) -> int:
    """The value at ``step`` without interpolation: a whole number, for sizes."""
    if isinstance(text, int):
        return text
    steps, values, _ = parse_schedule(text)
    return int(values[max(0, int(np.searchsorted(steps, step, side="right")) - 1)])


# ------------------------------------------------- flags that hold a number or a schedule's text


def is_schedule(value: object) -> bool:
    """Whether the value of a flag is a schedule with more than one number."""
    return isinstance(value, str) and ":" in value


def value_at(value: float | str, step: int) -> float:
    """The value at ``step`` of a flag that holds a number or a schedule."""
    return scheduled(value, step) if isinstance(value, str) else value


def values_of(value: float | str) -> tuple[float, ...]:
    """The numbers between which a flag's value goes; all its values lie between them."""
    return parse_schedule(value).values if isinstance(value, str) else (value,)


def steps_of(*values: float | str) -> list[int]:
    """Every step at which one of some flags' values begins to go elsewhere, and 0."""
    texts = [value for value in values if isinstance(value, str)]
    return sorted({0, *(int(step) for text in texts for step in parse_schedule(text).steps)})


def highest(value: float | str) -> float:
    """The largest value of a number or schedule."""
    return max(values_of(value))
