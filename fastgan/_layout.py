"""Memory layout: which of the two dense layouts a tensor suggests, and the view our kernels take of it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

CHANNELS_LAST = torch.channels_last


def is_channels_last(x: Tensor) -> bool:
    """Whether a 4-D tensor's strides suggest channels_last; the rule of ATen's `suggest_memory_format`.

    Strides, not contiguity, decide: [N, 1, H, W] is contiguous in both formats, yet its strides remember which one
    it was made in. Tensors without such a memory ([N, 1, 1, 1]) count as NCHW.
    """
    if x.dim() != 4:
        return False
    sizes, strides = x.shape, x.stride()
    least = 0
    if strides[1] == 0:
        return False
    for d in (1, 3, 2, 0):
        if sizes[d] == 0 or strides[d] < least or (d == 0 and least == strides[1]):
            return False
        least = strides[d] * max(sizes[d], 1)
    return True


def image(t: Tensor) -> Tensor:
    """A signal [N, C, L], or its weight, as a view of images one pixel high; a tensor of other dimensions as it is."""
    return t.unsqueeze(2) if t.dim() == 3 else t


def is_dense(x: Tensor) -> bool:
    """Whether x is contiguous in one of the two layouts."""
    return x.is_contiguous() or (x.dim() == 4 and x.is_contiguous(memory_format=CHANNELS_LAST))


def memory_format(channels_last: bool) -> torch.memory_format:
    return CHANNELS_LAST if channels_last else torch.contiguous_format


def dense(x: Tensor, channels_last: bool) -> Tensor:
    """x itself, or a copy of it in the layout asked for."""
    return x.contiguous(memory_format=memory_format(channels_last))


def laid_out(y: Tensor, channels_last: bool, elementwise: bool = False) -> Tensor:
    """`dense`, with exactly the strides that torch gives a new tensor of that layout.

    With one channel or one pixel both layouts are the same memory, but later ops still go by the strides: a dropout
    draws its mask in their order. For such a tensor an elementwise op of torch's, such as an activation, returns NCHW's
    strides, whatever strides its input has. elementwise: whether y is the result of such an op.
    """
    y = dense(y, channels_last)
    if y.dim() != 4 or (y.shape[1] > 1 and y.shape[2] * y.shape[3] > 1):
        return y
    _, c, h, w = y.shape
    strides: tuple[int, ...] = (1, w * c, c) if channels_last and not elementwise else (h * w, w, 1)
    strides = (c * h * w, *strides)
    return y if y.stride() == strides else y.as_strided(y.shape, strides)


def empty_result(x: Tensor, elementwise: bool) -> Tensor:
    """An empty tensor for a result of x's shape and layout; x is dense, elementwise as in `laid_out`."""
    return torch.empty_like(x, memory_format=torch.contiguous_format if elementwise and x.is_contiguous() else None)


def empty(shape: Sequence[int], like: Tensor, channels_last: bool, dtype: torch.dtype | None = None) -> Tensor:
    return torch.empty(shape, dtype=dtype or like.dtype, device=like.device, memory_format=memory_format(channels_last))


def cropped(y: Tensor, like: Tensor) -> Tensor:
    """The first rows and columns of y, as many as `like` has; y itself where it has no more."""
    return y if y.shape[2:] == like.shape[2:] else y[:, :, : like.shape[2], : like.shape[3]]


def planes(x: Tensor) -> tuple[int, int, int]:
    """(N, C, elements per channel and sample) of an [N, C, *] tensor."""
    return x.shape[0], x.shape[1], math.prod(x.shape[2:])


def per_channel(v: Tensor, x: Tensor) -> Tensor:
    """[C] or [G, C] shaped so that it broadcasts against [N, C, *] or [G, N/G, C, *]."""
    return v.view(*v.shape[:-1], *((1,) if v.dim() > 1 else ()), v.shape[-1], *((1,) * (x.dim() - 2)))


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Statistics and parameter gradients are float32 for the 16-bit types, else of the tensor's own type."""
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype
