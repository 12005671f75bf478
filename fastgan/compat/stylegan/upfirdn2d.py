"""`upfirdn2d` and what StyleGAN builds of it: filters set up, images filtered, up- and downsampled."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastgan import functional
from fastgan.functional.checks import Size2, pair
from fastgan.functional.resampling import filter_of, pads
from fastgan.ops.upfirdn2d import taps_of

__all__ = ["downsample2d", "filter2d", "setup_filter", "upfirdn2d", "upsample2d"]

Padding = int | Sequence[int]


def setup_filter(
    f: Any,
    device: torch.device | str = "cpu",
    normalize: bool = True,
    flip_filter: bool = False,
    gain: float = 1,
    separable: bool | None = None,
) -> Tensor:
    """A filter as the other functions take it.

    Args:
        f: a number, a list, an array or a tensor: [KH, KW], [K] or one value; None is 1.
        device: of the result.
        normalize: whether it is scaled to the sum 1.
        flip_filter: whether it is turned by 180 degrees.
        gain: of the whole filter.
        separable: whether a [K] stays one, for f f^T; None: from 8 taps on.

    Returns:
        float32, [K] where it is separable, else [KH, KW].

    Raises:
        ValueError: f is empty or has more than two dimensions.
    """
    f = torch.as_tensor(np.asarray(1 if f is None else f.cpu() if isinstance(f, Tensor) else f), dtype=torch.float32)
    if f.dim() > 2 or f.numel() == 0:
        raise ValueError(f"setup_filter: f must have at most 2 dimensions and an element, got shape {tuple(f.shape)}")
    f = f.reshape(1) if f.dim() == 0 else f
    keep = f.dim() == 1 and f.numel() >= 8 if separable is None else separable
    if f.dim() == 1 and not keep:
        f = torch.outer(f, f)
    if f.dim() != (1 if keep else 2):
        raise ValueError(f"setup_filter: a separable f must have 1 dimension, got shape {tuple(f.shape)}")
    if normalize:
        f = f / f.sum()
    if flip_filter:
        f = f.flip(list(range(f.dim())))
    return (f * gain ** (f.dim() / 2)).to(device)


def upfirdn2d(
    x: Tensor,
    f: Tensor | None,
    up: Size2 = 1,
    down: Size2 = 1,
    padding: Padding = 0,
    flip_filter: bool = False,
    gain: float = 1,
    impl: str = "cuda",
) -> Tensor:
    """`fastgan.functional.upfirdn2d`; `impl` is accepted, fastgan chooses its kernels itself."""
    return functional.upfirdn2d(x, f, up, down, padding, flip_filter, float(gain))


def filter2d(
    x: Tensor, f: Tensor | None, padding: Padding = 0, flip_filter: bool = False, gain: float = 1, impl: str = "cuda"
) -> Tensor:
    """x filtered, of the same size without padding: f lies with its middle, or the tap behind it, on each pixel."""
    kh, kw = taps_of(filter_of("filter2d", "f", f, x))
    around = _around("filter2d", padding, (kw // 2, (kw - 1) // 2, kh // 2, (kh - 1) // 2))
    return upfirdn2d(x, f, 1, 1, around, flip_filter, gain)


def upsample2d(
    x: Tensor,
    f: Tensor | None,
    up: Size2 = 2,
    padding: Padding = 0,
    flip_filter: bool = False,
    gain: float = 1,
    impl: str = "cuda",
) -> Tensor:
    """x upsampled by `up` and filtered; the filter's gain is multiplied by `up`, which keeps the magnitude."""
    by_x, by_y = pair("upsample2d", "up", up, 1)
    kh, kw = taps_of(filter_of("upsample2d", "f", f, x))
    middle = (kw + by_x - 1) // 2, (kw - by_x) // 2, (kh + by_y - 1) // 2, (kh - by_y) // 2
    return upfirdn2d(x, f, up, 1, _around("upsample2d", padding, middle), flip_filter, gain * by_x * by_y)


def downsample2d(
    x: Tensor,
    f: Tensor | None,
    down: Size2 = 2,
    padding: Padding = 0,
    flip_filter: bool = False,
    gain: float = 1,
    impl: str = "cuda",
) -> Tensor:
    """x filtered and every `down`-th pixel kept."""
    by_x, by_y = pair("downsample2d", "down", down, 1)
    kh, kw = taps_of(filter_of("downsample2d", "f", f, x))
    middle = (kw - by_x + 1) // 2, (kw - by_x) // 2, (kh - by_y + 1) // 2, (kh - by_y) // 2
    return upfirdn2d(x, f, 1, down, _around("downsample2d", padding, middle), flip_filter, gain)


def _around(op: str, padding: Padding, middle: Sequence[int]) -> list[int]:
    """The padding with what keeps the filter centred."""
    return [p + m for p, m in zip(pads(op, padding), middle, strict=True)]


# Names that StyleGAN's own modules take from this one.
def _parse_scaling(scaling: Size2) -> tuple[int, ...]:
    return tuple(pair("upfirdn2d", "scaling", scaling, 1))


def _parse_padding(padding: Padding) -> tuple[int, ...]:
    return tuple(pads("upfirdn2d", padding))


def _get_filter_size(f: Tensor | None) -> tuple[int, int]:
    """(KW, KH)."""
    if f is not None and not isinstance(f, Tensor):
        raise TypeError(f"upfirdn2d: f must be None or a tensor, got {type(f).__name__}; take setup_filter(f)")
    return (1, 1) if f is None else (int(f.shape[-1]), int(f.shape[0]))
