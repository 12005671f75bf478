"""Triton kernels of `grad_norm_penalty` and its backward."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastgan._layout import dense, is_channels_last
from fastgan.choice import Backend
from fastgan.kernels.launching import FLOATS, declines, launch, meta, power_of_2, recorded, wide
from fastgan.kernels.samples import merged_sum, sample_blocks, sample_chunks, sample_sum, sample_tile


@triton.jit
def write_penalty(penalty, norm, n, squares, target):
    length = tl.sqrt(squares)
    tl.store(norm + n, length)
    tl.store(penalty + n, (length - target) * (length - target))


# Bound: 1 access and 2 flops an element: memory on every card.
@triton.jit
def grad_norm_penalty_kernel(
    gradient, penalty, norm, partial, M, chunks, each, target, WIDE: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip  # by kind: tensors, sizes, constants
    """Sum of squares of `each` elements of a sample; partial [N, chunks], or the penalty itself from an only chunk."""
    n = tl.program_id(0) // chunks
    squares = sample_sum(gradient, None, n, tl.program_id(0) % chunks, M, each, WIDE, BLOCK)
    if partial is None:
        write_penalty(penalty, norm, n, squares, target)
    else:
        tl.store(partial + tl.program_id(0), squares)


# Bound: 4 bytes a chunk: a launch.
@triton.jit
def grad_norm_penalty_merge_kernel(partial, penalty, norm, chunks, target, BLOCK: tl.constexpr):
    n = tl.program_id(0)
    write_penalty(penalty, norm, n, merged_sum(partial, n, chunks, BLOCK), target)


# Bound: 2 accesses and 1 flop an element: memory on every card.
@triton.jit
def grad_norm_penalty_backward_kernel(
    dpenalty, gradient, norm, out, N, M, target,
    AT_ZERO: tl.constexpr, WIDE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip  # by kind: tensors, sizes, constants
    """dpenalty 2 (1 - target / |g|) g, 0 where |g| = 0. AT_ZERO: the target is 0, and the factor 2."""
    n, at, mask = sample_tile(N, M, WIDE, BLOCK_N, BLOCK_M)
    scale = tl.load(dpenalty + n, mask=n < N, other=0.0).to(tl.float32)
    if AT_ZERO:
        scale = scale * 2.0
    else:
        length = tl.load(norm + n, mask=n < N, other=0.0).to(tl.float32)
        slope = tl.where(length > 0, 2.0 - 2.0 * target / tl.where(length > 0, length, 1.0), 0.0)
        scale = scale * tl.where(length != length, length, slope)  # a NaN stays one
    g = tl.load(gradient + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + at, (g * scale[:, None]).to(out.dtype.element_ty), mask=mask)


def _forward(gradient, target):
    gradient = dense(gradient, is_channels_last(gradient))
    n, m = len(gradient), gradient.numel() // len(gradient)
    penalty, norm = (gradient.new_empty(n, dtype=torch.float32) for _ in range(2))
    chunks, each, block = sample_chunks(n, m)
    partial = None if chunks == 1 else gradient.new_empty(n, chunks, dtype=torch.float32)
    tensors, constants = (gradient, penalty, norm, partial), {"WIDE": wide(gradient), "BLOCK": block}
    launch(grad_norm_penalty_kernel, n * chunks, *tensors, m, chunks, each, float(target), **constants)
    if partial is not None:
        launch(
            grad_norm_penalty_merge_kernel, n, partial, penalty, norm, chunks, float(target), BLOCK=power_of_2(chunks)
        )
    return penalty, norm


def _backward(dpenalty, gradient, norm, target):
    gradient = dense(gradient, is_channels_last(gradient))
    out = torch.empty_like(gradient)
    n, m = len(gradient), gradient.numel() // len(gradient)
    programs, blocks = sample_blocks(n, m)
    tensors, constants = (dpenalty.contiguous(), gradient, norm.contiguous(), out), {"AT_ZERO": target == 0}
    constants |= {"WIDE": wide(gradient), **blocks}
    launch(grad_norm_penalty_backward_kernel, programs, *tensors, n, m, float(target), **constants)
    return out


LAUNCHERS = {
    "grad_norm_penalty": Backend(_forward, lambda gradient, target: declines(gradient)),
    "grad_norm_penalty_backward": Backend(_backward, lambda dpenalty, gradient, norm, target: declines(gradient)),
}


def static_cases():
    """A batch that fills the card by itself, one of few large samples, and 2^31 elements."""
    return recorded(
        run
        for dtype in FLOATS
        for shape in ((1024, 3, 32, 32), (8, 3, 256, 256), (4096, 3, 512, 512))
        for g, v in [(meta(shape, dtype), meta(shape[:1], torch.float32))]
        for run in (
            lambda g=g: _forward(g, 1.0),
            lambda g=g, v=v: _backward(v, g, v, 1.0),
            lambda g=g, v=v: _backward(v, g, v, 0.0),
        )
    )
