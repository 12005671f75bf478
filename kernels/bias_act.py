"""Triton kernels of `bias_act` and its backward: one pass over the tensor each."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastgan._activation import limit
from fastgan._layout import dense, empty_result, is_channels_last, planes
from fastgan.choice import Backend
from fastgan.kernels.column_sums import column_sums
from fastgan.kernels.launching import FLOATS, chunks_of, contiguous, declines, launch, meta, recorded, tile, wide
from fastgan.kernels.numerics import activate, activate_backward, element_offsets, load_channels


# Bound: 2 accesses and about 2 flops an element (10 for tanh): memory on every card.
@triton.jit
def bias_act_kernel(
    x, bias, y, S, C, P, slope, gain, clamp,
    ACTIVATION: tl.constexpr, PLAIN: tl.constexpr, CHANNELS_LAST: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip  # by kind: tensors, sizes, constants
    """y = gain phi(x + bias) within +-clamp: one program a tile of BLOCK_S samples and pixels by BLOCK_C channels."""
    blocks = tl.cdiv(C, BLOCK_C)
    c = (tl.program_id(0) % blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    s = (tl.program_id(0) // blocks) * BLOCK_S + tl.arange(0, BLOCK_S)
    at = element_offsets(s, c, C, P, CHANNELS_LAST, WIDE)
    mask = (s < S)[:, None] & (c < C)[None, :]
    t = tl.load(x + at, mask=mask, other=0.0).to(tl.float32) + load_channels(bias, c, C, 0.0)[None, :]
    v = activate(t, slope, ACTIVATION)
    if not PLAIN:
        v = v * gain
        if clamp >= 0:
            v = tl.where(v > clamp, clamp, tl.where(v < -clamp, -clamp, v))
    tl.store(y + at, v.to(y.dtype.element_ty), mask=mask)


# Bound: 3 accesses and about 3 flops an element: memory on every card. dbias adds one float a channel and chunk.
@triton.jit
def bias_act_backward_kernel(
    dy, y, dx, dbias, S, C, P, rows, slope, gain, clamp,
    ACTIVATION: tl.constexpr, PLAIN: tl.constexpr, CHANNELS_LAST: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip  # by kind: tensors, sizes, constants
    """dx = dy gain phi'(y / gain), 0 where the clamp holds y, and dbias [chunks, C]: one program a chunk
    of `rows` samples and pixels by BLOCK_C channels."""
    blocks = tl.cdiv(C, BLOCK_C)
    c = (tl.program_id(0) % blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    chunk = tl.program_id(0) // blocks
    first = chunk * rows
    sums = tl.zeros((BLOCK_C,), tl.float32)
    for start in range(first, tl.minimum(first + rows, S), BLOCK_S):
        s = start + tl.arange(0, BLOCK_S)
        at = element_offsets(s, c, C, P, CHANNELS_LAST, WIDE)
        mask = (s < S)[:, None] & (c < C)[None, :]
        g = tl.load(dy + at, mask=mask, other=0.0).to(tl.float32)
        v = tl.load(y + at, mask=mask, other=0.0).to(tl.float32)
        if PLAIN:
            dt = activate_backward(g, v, slope, ACTIVATION)
        elif ACTIVATION == "swish" or (ACTIVATION == "gelu" or ACTIVATION == "gelu_tanh"):
            dt = activate_backward(g * gain, v, slope, ACTIVATION)
            v = activate(v, slope, ACTIVATION) * gain
        else:
            dt = activate_backward(g * gain, v / gain, slope, ACTIVATION)
        if not PLAIN:
            dt = tl.where((clamp >= 0) & (tl.abs(v) >= clamp), 0.0, dt)
        rounded = dt.to(dx.dtype.element_ty)
        tl.store(dx + at, rounded, mask=mask)
        if dbias is not None:
            sums += tl.sum(rounded.to(tl.float32), 0)  # of what is stored, as the reference has it
    if dbias is not None:
        tl.store(dbias + chunk * C + c, sums, mask=c < C)


def _forward(x, bias, activation, slope, gain, clamp):
    channels_last = is_channels_last(x)
    x = dense(x, channels_last)
    (bias,) = contiguous(bias)
    y = empty_result(x, activation != "identity")
    n, c, p = planes(x)
    channels_last |= p == 1
    block_s, block_c = tile(n * p, c, p, channels_last)
    programs = triton.cdiv(n * p, block_s) * triton.cdiv(c, block_c)
    sizes, blocks = (n * p, c, p), {"BLOCK_S": block_s, "BLOCK_C": block_c}
    constants = dict(
        ACTIVATION=activation, PLAIN=gain == 1 and clamp < 0, CHANNELS_LAST=channels_last, WIDE=wide(x), **blocks
    )
    launch(bias_act_kernel, programs, x, bias, y, *sizes, float(slope), float(gain), limit(clamp, x.dtype), **constants)
    return y


def _backward(dy, y, activation, slope, gain, clamp, want_bias):
    channels_last = is_channels_last(y)
    dy, y = dense(dy, channels_last), dense(y, channels_last)
    dx = torch.empty_like(y)
    n, c, p = planes(y)
    channels_last |= p == 1
    block_s, block_c = tile(n * p, c, p, channels_last)
    blocks = triton.cdiv(c, block_c)
    if want_bias:
        chunks, rows = chunks_of(n * p, block_s, blocks)
    else:  # nothing is summed: a tile a program
        chunks, rows = triton.cdiv(n * p, block_s), block_s
    partial = y.new_empty(chunks, c, dtype=torch.float32) if want_bias else None
    sizes, sections = (n * p, c, p, rows), {"BLOCK_S": block_s, "BLOCK_C": block_c}
    constants = dict(
        ACTIVATION=activation, PLAIN=gain == 1 and clamp < 0, CHANNELS_LAST=channels_last, WIDE=wide(y), **sections
    )
    form = float(slope), float(gain), limit(clamp, y.dtype)
    launch(bias_act_backward_kernel, chunks * blocks, dy, y, dx, partial, *sizes, *form, **constants)
    return dx, column_sums(partial)[0] if want_bias else y.new_empty(0, dtype=torch.float32)


LAUNCHERS = {
    "bias_act": Backend(_forward, lambda x, *rest: declines(x)),
    "bias_act_backward": Backend(_backward, lambda dy, y, *rest: declines(y, dy)),
}


def static_cases():
    """What the compile checks compile: DCGAN's output layer and the largest activations, in both layouts."""
    return recorded(
        run
        for dtype in FLOATS
        for shape, last in [((128, 64, 64, 64), True), ((128, 64, 64, 64), False), ((128, 3, 64, 64), True)]
        for x in [meta(shape, dtype, last)]
        for run in (
            lambda x=x: _forward(x, meta(x.shape[1:2], torch.float32), "tanh", 0.0, 1.0, -1.0),
            lambda x=x: _backward(x, x, "leaky_relu", 0.2, 1.0, -1.0, True),
            lambda x=x: _backward(x, x, "leaky_relu", 0.2, 1.4, 256.0, True),
        )
    )
