"""`conv2d_resample`: a convolution between up- and downsampling."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fastgan import functional

__all__ = ["conv2d_resample"]


def conv2d_resample(
    x: Tensor,
    w: Tensor,
    f: Tensor | None = None,
    up: int = 1,
    down: int = 1,
    padding: int | Sequence[int] = 0,
    groups: int = 1,
    flip_weight: bool = True,
    flip_filter: bool = False,
) -> Tensor:
    """`fastgan.functional.conv2d_resample`."""
    return functional.conv2d_resample(x, w, f, up, down, padding, groups, flip_weight, flip_filter)
