"""Types of flags: text to a checked value, or an ArgumentTypeError that says what was expected.

The parser puts the flag and the text before the message: "--N_rand abc: expected a whole number,
1 or more". The return type also chooses the placeholder in the help: N, X or SCHEDULE. A flag that
may change during training holds a number, or a schedule's text (``nerf.training.schedules``).
"""

import argparse
import math
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

from nerf.training.schedules import parse_schedule

T = TypeVar("T")

MOST = 10**12  # more of anything is a mistake, and torch's sizes end at 2^63


def _whole(text: str, expected: str, low: int, high: int | None = None, *, most: int = MOST) -> int:
    """``text`` as a whole number from low to high, which ``expected`` names (None: to ``most``)."""
    try:
        value = int(text)
    except ValueError:
        with suppress(ValueError, OverflowError):
            if float(text) == int(float(text)):  # 1e5, 300.0
                expected += f" (written as {int(float(text))})"
        raise argparse.ArgumentTypeError(f"expected {expected}") from None
    if value > most and high is None:
        limit = str(most) if most < MOST else "10^12"
        raise argparse.ArgumentTypeError(f"expected {expected}, at most {limit}")
    if value < low or (high is not None and value > high):
        raise argparse.ArgumentTypeError(f"expected {expected}")
    return value


def _real(
    text: str, expected: str, low: float, high: float, *, below: bool = False, above: bool = False
) -> float:
    """``text`` as a number from low to high. below, above: the limit itself is left out."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not low <= value <= high or (above and value == low) or (below and value == high):
        raise argparse.ArgumentTypeError(f"expected {expected}")
    return value


def whole_number(text: str) -> int:
    """Any whole number."""
    return _whole(text, "a whole number", -(2**62))


def positive_int(text: str) -> int:
    """A whole number, 1 or more."""
    return _whole(text, "a whole number, 1 or more", 1)


def non_negative_int(text: str) -> int:
    """A whole number, 0 or more."""
    return _whole(text, "a whole number, 0 or more", 0)


def grid_resolution(text: str) -> int:
    """Cells per side of a grid: 16 or more; the cells of 2^16 per side can still be counted."""
    return _whole(text, "a whole number, 16 or more", 16, most=2**16)


def cells(text: str) -> int:
    """Cells per side of an occupancy grid, 1 to 4096; more take 64 GiB and above."""
    return _whole(text, "a whole number, 1 or more", 1, most=2**12)


def parts(text: str) -> int:
    """Layers, or copies of an object, each of which is made on its own."""
    return _whole(text, "a whole number, 1 or more", 1, most=1000)


def hashmap_size(text: str) -> int:
    """Base-2 logarithm of a number of table entries: 2^24 of them take 256 MiB a level."""
    return _whole(text, "a whole number from 8 to 24", 8, 24)


def frequencies(text: str) -> int:
    """Frequencies of a positional encoding: 2^32 x is beyond the digits of float32."""
    return _whole(text, "a whole number from 1 to 32", 1, 32)


def seed(text: str) -> int:
    """A seed below 2^62: torch takes 64 bits, and restarts and steps are added to it."""
    return _whole(text, "a whole number from 0 to 2^62", 0, 2**62 - 1)


def rising_steps(text: str) -> str:
    """Numbers of updates, each larger than the one before, with commas between; 0: none."""
    parts = text.replace(" ", "").split(",")
    steps = [int(part) if part.isascii() and part.isdigit() else -1 for part in parts]
    rises = all(0 < low < high for low, high in zip(steps, steps[1:], strict=False))
    if min(steps) < 0 or max(steps) >= 2**53 or not rises:
        raise argparse.ArgumentTypeError("expected rising numbers of updates, e.g. 500,1000, or 0")
    return ",".join(map(str, steps))


def reduction(text: str) -> int:
    """N of pictures that are read N times smaller."""
    return _whole(text, "a whole number N, 1 or more: pictures become N times smaller", 1)


def render_reduction(text: str) -> int:
    """N of pictures that are rendered N times smaller; 0 and 1: full size."""
    expected = "a whole number N: pictures are rendered N times smaller (0 or 1: full size)"
    return _whole(text, expected, 0)


def checkpoints_kept(text: str) -> int:
    """0 (all) or 2 and more: the newest checkpoint may be damaged, so one alone is no safety."""
    expected = "0 (keep all) or at least 2, since the newest may be damaged"
    value = _whole(text, expected, 0)
    return value if value != 1 else _whole(text, expected, 2)


def number(text: str) -> float:
    """Any finite number."""
    return _real(text, "a finite number", -1e300, 1e300)


def non_negative(text: str) -> float:
    """0 or more; no flag means more than 1e9, and float32 has no room for the square of more."""
    return _real(text, "a finite number, 0 or more, up to 1e9", 0.0, 1e9)


def learning_rate(text: str) -> float:
    """Above 0, and far enough below 3e38, the largest float32."""
    return _real(text, "a number above 0, at most 1e30", 0.0, 1e30, above=True)


def positive_float(text: str) -> float:
    """Above 0, with a square that float32 can hold."""
    return _real(text, "a number above 0, from 1e-15 to 1e9", 1e-15, 1e9)


def unit_interval(text: str) -> float:
    """A number from 0 to 1."""
    return _real(text, "a number from 0 to 1", 0.0, 1.0)


def fraction(text: str) -> float:
    """A part of something: above 0, at most 1."""
    return _real(text, "a number above 0, at most 1", 0.0, 1.0, above=True)


def decay(text: str) -> float:
    """A factor per step that forgets: from 0, below 1."""
    return _real(text, "a number from 0 to below 1", 0.0, 1.0, below=True)


# ----------------------------------------------------------------------------- numbers or schedules


def _or_schedule(kind: Callable[[str], T], text: str) -> T | str:
    """``text`` as ``kind`` reads it, or itself if it is a schedule of what ``kind`` reads."""
    if ":" not in text:
        return kind(text)
    try:
        found = parse_schedule(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    for value in found.values:
        kind(f"{value:.15g}")
    return text


def whole_schedule(text: str) -> int | str:
    """A whole number, 1 or more, or a schedule of such, which jumps at its steps."""
    found = _or_schedule(positive_int, text)
    if isinstance(found, str) and not set(parse_schedule(found).shapes) <= {"linear", "step"}:
        raise argparse.ArgumentTypeError("whole numbers jump: expected no exp or cosine")
    return found


def number_schedule(text: str) -> float | str:
    """Any finite number, or a schedule."""
    return _or_schedule(number, text)


def non_negative_schedule(text: str) -> float | str:
    """0 or more, or a schedule."""
    return _or_schedule(non_negative, text)


def rate_schedule(text: str) -> float | str:
    """A learning rate above 0, or a schedule."""
    return _or_schedule(learning_rate, text)


def unit_schedule(text: str) -> float | str:
    """A number from 0 to 1, or a schedule."""
    return _or_schedule(unit_interval, text)
