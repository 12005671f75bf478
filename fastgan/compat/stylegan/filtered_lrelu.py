"""`filtered_lrelu`: StyleGAN3's activation."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from fastgan import functional

__all__ = ["filtered_lrelu"]


def filtered_lrelu(
    x: Tensor,
    fu: Tensor | None = None,
    fd: Tensor | None = None,
    b: Tensor | None = None,
    up: int = 1,
    down: int = 1,
    padding: int | Sequence[int] = 0,
    gain: float = math.sqrt(2),
    slope: float = 0.2,
    clamp: float | None = None,
    flip_filter: bool = False,
    impl: str = "cuda",
) -> Tensor:
    """`fastgan.functional.filtered_lrelu`; `impl` is accepted, fastgan chooses its kernels itself."""
    return functional.filtered_lrelu(x, fu, fd, b, up, down, padding, float(gain), float(slope), clamp, flip_filter)
