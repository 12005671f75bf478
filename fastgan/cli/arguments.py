"""Types of command-line values; argparse shows what their errors say."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, TypeAlias

from fastgan.training.recipes import MAX_SEED

if TYPE_CHECKING:
    Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"
else:
    Commands = object

__all__ = ["Commands", "batch_size", "nonnegative_int", "positive_float", "positive_int", "seed"]


def _whole(text: str, least: int, beside: str = "") -> int:
    try:
        value = int(text)
    except ValueError:
        value = least - 1
    if value < least:
        raise argparse.ArgumentTypeError(f"must be {beside}a whole number of at least {least}, got {text!r}")
    if value >= MAX_SEED:  # what 64 bits hold
        raise argparse.ArgumentTypeError(f"must be below 2^63, got {text!r}")
    return value


def positive_int(text: str) -> int:
    """1, 2, ..."""
    return _whole(text, 1)


def batch_size(text: str) -> int | str:
    """1, 2, ... or auto."""
    return text if text == "auto" else _whole(text, 1, "auto or ")


def nonnegative_int(text: str) -> int:
    """0, 1, ..."""
    return _whole(text, 0)


def seed(text: str) -> int:
    """0 to 2^63 - 1."""
    return _whole(text, 0)


def positive_float(text: str) -> float:
    """A finite number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a number above 0, got {text!r}")
    return value
