"""Triton kernel of `sample_dot`: one reduction."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastgan._layout import dense, is_channels_last
from fastgan.choice import Backend
from fastgan.kernels.launching import FLOATS, declines, launch, meta, power_of_2, recorded, wide
from fastgan.kernels.samples import merged_sum, sample_chunks, sample_sum


# Bound: 2 accesses and 2 flops an element: memory on every card.
@triton.jit
def sample_dot_kernel(x, y, out, M, chunks, each, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    """The products of `each` elements of a sample, summed: out [N, chunks]."""
    n = tl.program_id(0) // chunks
    tl.store(out + tl.program_id(0), sample_sum(x, y, n, tl.program_id(0) % chunks, M, each, WIDE, BLOCK))


# Bound: 4 bytes a chunk: a launch.
@triton.jit
def sample_dot_merge_kernel(partial, dot, chunks, BLOCK: tl.constexpr):
    n = tl.program_id(0)
    tl.store(dot + n, merged_sum(partial, n, chunks, BLOCK))


def _forward(x, y):
    channels_last = is_channels_last(x)
    x, y = dense(x, channels_last), dense(y, channels_last)
    n, m = len(x), x.numel() // len(x)
    chunks, each, block = sample_chunks(n, m)
    dot = x.new_empty(n, dtype=torch.float32)
    out = dot if chunks == 1 else x.new_empty(n, chunks, dtype=torch.float32)
    # two operands and a sum: at 4 warps 8 bytes of float32 spilled on sm_100
    options = dict(WIDE=wide(x), BLOCK=block, num_warps=8)
    launch(sample_dot_kernel, n * chunks, x, y, out, m, chunks, each, **options)
    if chunks > 1:
        launch(sample_dot_merge_kernel, n, out, dot, chunks, BLOCK=power_of_2(chunks))
    return dot


LAUNCHERS = {"sample_dot": Backend(_forward, lambda x, y: declines(x, y))}


def static_cases():
    """A batch that fills the card by itself, one of few large samples, and 2^31 elements."""
    return recorded(
        lambda x=x: _forward(x, x)
        for dtype in FLOATS
        for shape in ((1024, 3, 32, 32), (8, 3, 256, 256), (4096, 3, 512, 512))
        for x in [meta(shape, dtype)]
    )
