"""Types of flags: text to a checked value, or one line that says what was expected."""

import argparse


def positive_int(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text}; expected 1 or more")
    return value


def non_negative_int(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text}; expected 0 or more")
    return value


def fraction(text: str) -> float:
    value = float(text)
    if not 0.0 < value <= 1.0:
        raise argparse.ArgumentTypeError(f"{text}; expected a number in (0, 1]")
    return value


def non_negative(text: str) -> float:
    value = float(text)
    if not 0.0 <= value <= 1e9:  # no flag means more, and float32 has no room for its square
        raise argparse.ArgumentTypeError(f"{text}; expected a finite number, 0 or more, up to 1e9")
    return value


def unit_interval(text: str) -> float:
    value = float(text)
    if not 0.0 <= value <= 1.0:
        raise argparse.ArgumentTypeError(f"{text}; expected a number in [0, 1]")
    return value


def positive_float(text: str) -> float:
    value = non_negative(text)
    if value < 1e-15:  # its square has to be a float32
        raise argparse.ArgumentTypeError(f"{text}; expected a number above 0, 1e-15 or more")
    return value


def grid_resolution(text: str) -> int:
    value = int(text)
    if value < 16:
        raise argparse.ArgumentTypeError(f"{text}; expected 16 or more")
    return value


def seed(text: str) -> int:
    value = int(text)
    if not 0 <= value < 2**62:
        raise argparse.ArgumentTypeError(f"{text}; expected a whole number from 0 to 2^62")
    return value


def frequencies(text: str) -> int:
    value = int(text)
    if not 1 <= value <= 32:  # 2^32 x is beyond the digits of float32
        raise argparse.ArgumentTypeError(f"{text}; expected 1 to 32")
    return value


def decay(text: str) -> float:
    value = float(text)
    if not 0.0 <= value < 1.0:
        raise argparse.ArgumentTypeError(f"{text}; expected a number in [0, 1)")
    return value
