"""What the functions ask of their arguments, each in one sentence."""

from __future__ import annotations

import operator
from collections.abc import Sequence

from torch import Tensor

Size2 = int | Sequence[int]


def pair(op: str, name: str, value: Size2, least: int) -> list[int]:
    """An int for both, or an int for each of height and width."""
    found = ints(value)
    found = found * 2 if len(found) == 1 else found
    if len(found) != 2 or min(found) < least:
        raise ValueError(f"{op}: {name} must be an int or a pair of ints >= {least}, got {value!r}")
    return found


def ints(value: Size2) -> list[int]:
    """The ints of an int or a sequence; none where anything else is among them: 1.9 is not taken for 1."""
    try:
        return [operator.index(v) for v in (value if isinstance(value, Sequence) else [value])]
    except TypeError:
        return []


def check_bias(op: str, bias: Tensor | None, channels: int) -> None:
    """One number an output channel."""
    if bias is not None and tuple(bias.shape) != (channels,):
        raise ValueError(f"{op}: bias must have shape ({channels},), got {tuple(bias.shape)}")


def check_channels(op: str, x: Tensor, **vectors: Tensor | None) -> None:
    """x must be [N, C, *] and floating, and every vector [C] on its device."""
    if x.dim() < 2:
        raise ValueError(f"{op}: x must have at least 2 dimensions [N, C, *], got shape {tuple(x.shape)}")
    if not x.is_floating_point():
        raise TypeError(f"{op}: x must be a floating tensor, got {x.dtype}; convert it with .float()")
    wanted, device = (x.shape[1],), x.device
    for what, v in vectors.items():
        if v is not None and (v.shape != wanted or v.device != device):
            raise ValueError(f"{op}: {what} must have shape {wanted} on {device}, got {tuple(v.shape)} on {v.device}")
