"""Images resampled through filters: StyleGAN's up- and downsampling, and its activation between the two."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fastgan.functional.checks import Size2, pair
from fastgan.ops import upfirdn2d as _upfirdn2d


def upfirdn2d(
    x: Tensor,
    f: Tensor | None,
    up: Size2 = 1,
    down: Size2 = 1,
    padding: int | Sequence[int] = 0,
    flip_filter: bool = False,
    gain: float = 1.0,
) -> Tensor:
    """Upsample by zeros, pad, filter, downsample: in one pass.

    `up - 1` zeros are put behind every sample, `padding` zeros around the image, every position is convolved with f,
    and every `down`-th result is kept. The derivative is the same op with `up` and `down` exchanged.

    Args:
        x: [N, C, H, W], floating.
        f: [KH, KW], or [K] for the filter f f^T, float32 (float64 beside a float64 x); None is the filter 1.
        up, down: an int, or (x, y).
        padding: an int, (x, y) or (x before, x after, y before, y after), of the upsampled image; negative crops.
        flip_filter: False: convolution; True: correlation.
        gain: multiplies the result.

    Returns:
        [N, C, (H up + padding before and after - KH) // down + 1, ...], x's dtype and layout.

    Raises:
        ValueError, TypeError: a shape, a factor or a dtype is not as above, or f does not fit into the padded image.
    """
    check_image("upfirdn2d", x)
    f = filter_of("upfirdn2d", "f", f, x)
    up_x, up_y = pair("upfirdn2d", "up", up, 1)
    down_x, down_y = pair("upfirdn2d", "down", down, 1)
    before_x, after_x, before_y, after_y = pads("upfirdn2d", padding)
    if not math.isfinite(gain):
        raise ValueError(f"upfirdn2d: gain must be finite, got {gain}")
    geometry = [up_y, up_x], [down_y, down_x], [before_y, after_y, before_x, after_x]
    size = _upfirdn2d.output_size(x.shape[2:], _upfirdn2d.taps_of(f), *geometry)
    if min(size) < 1:
        raise ValueError(
            f"upfirdn2d: f {tuple(f.shape)} must fit into the padded image, got x {tuple(x.shape)}, up {up}, "
            f"padding {padding}"
        )
    return _upfirdn2d.op(x, f, *geometry, bool(flip_filter), float(gain))


def check_image(op: str, x: Tensor) -> None:
    if x.dim() != 4:
        raise ValueError(f"{op}: x must be [N,C,H,W], got shape {tuple(x.shape)}")
    if not x.is_floating_point():
        raise TypeError(f"{op}: x must be a floating tensor, got {x.dtype}; convert it with .float()")


def filter_of(op: str, name: str, f: Tensor | None, x: Tensor) -> Tensor:
    """A filter as the op takes it; None is the filter 1."""
    if f is None:
        return torch.ones(1, dtype=torch.float64 if x.dtype == torch.float64 else torch.float32, device=x.device)
    if f.dim() not in (1, 2) or f.numel() == 0:
        raise ValueError(f"{op}: {name} must be None, [K] or [KH,KW] with an element, got shape {tuple(f.shape)}")
    if f.device != x.device:
        raise ValueError(f"{op}: {name} must be on x's device {x.device}, got {f.device}; move it with .to()")
    if f.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{op}: {name} must be float32 or float64, got {f.dtype}; convert it with .float()")
    return f


def pads(op: str, padding: int | Sequence[int]) -> list[int]:
    """(x before, x after, y before, y after) of an int, (x, y), or those four."""
    found = [int(p) for p in padding] if isinstance(padding, Sequence) else [int(padding)] * 2
    if len(found) == 2:
        found = [found[0], found[0], found[1], found[1]]
    if len(found) != 4:
        raise ValueError(
            f"{op}: padding must be an int, (x, y) or (x before, x after, y before, y after), got {padding!r}"
        )
    return found
