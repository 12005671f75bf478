"""Triton kernel of `upfirdn2d`: one pass, neighbouring lanes make neighbouring outputs of y's memory."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastgan._layout import dense, empty, is_channels_last
from fastgan.choice import Backend
from fastgan.kernels.launching import FLOATS, LONGEST, contiguous, declines, launch, meta, recorded, wide
from fastgan.ops.upfirdn2d import output_size, taps_of

BLOCK = 512  # outputs a program: four a thread, so that 36 taps of StyleGAN3 keep no more than four sums in registers


@triton.jit
def taps_at(o, pad, UP: tl.constexpr, DOWN: tl.constexpr):
    """(first sample, its tap) of outputs o: they meet taps tap, tap + UP, ... with samples first, first + 1, ..."""
    start = o * DOWN - pad
    shifted = start % UP
    past = tl.where(shifted < 0, shifted + UP, shifted)  # the remainder of C is negative for a negative start
    tap = tl.where(past == 0, 0, UP - past)
    # start + tap is a multiple of UP, so that the quotient is exact whichever way it rounds
    return (start + tap) // UP, tap


# Bound: x and y once; 2 flops an output and tap that meets a sample. StyleGAN2's 4x4 filter, up 2: 8 flops of 2.5 bytes
# in bf16, memory on every card; StyleGAN3's 12x12, up 2: 72 flops of 5 bytes in float32, on an H100 as long as memory.
@triton.jit
def upfirdn2d_kernel(
    x, f, y, C, H, W, OH, OW, outputs, pad_y, pad_x, gain,
    KH: tl.constexpr, KW: tl.constexpr, UP_Y: tl.constexpr, UP_X: tl.constexpr,
    DOWN_Y: tl.constexpr, DOWN_X: tl.constexpr, SEPARABLE: tl.constexpr, FLIP: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip  # by kind: tensors, sizes, constants
    """y [N, C, OH, OW] of x [N, C, H, W], both NCHW or both channels_last: one program BLOCK outputs."""
    program = tl.program_id(0)
    if WIDE:
        program = program.to(tl.int64)
    at = program * BLOCK + tl.arange(0, BLOCK)
    inside = at < outputs
    if CHANNELS_LAST:
        pixel = at // C
        base = at % C
        inner = C
    else:
        pixel = at
        base = at * 0
        inner = 1
    ox = (pixel % OW).to(tl.int32)
    oy = (pixel // OW % OH).to(tl.int32)
    base += pixel // OW // OH * H * W * inner
    iy, ky = taps_at(oy, pad_y, UP_Y, DOWN_Y)
    ix, kx = taps_at(ox, pad_x, UP_X, DOWN_X)
    total = tl.zeros((BLOCK,), tl.float32)
    for j in range((KH + UP_Y - 1) // UP_Y):
        row = iy + j
        tap_y = ky + j * UP_Y
        in_row = inside & (tap_y < KH) & (row >= 0) & (row < H)
        place_y = tap_y if FLIP else KH - 1 - tap_y
        along = tl.zeros((BLOCK,), tl.float32)
        for i in range((KW + UP_X - 1) // UP_X):
            column = ix + i
            tap_x = kx + i * UP_X
            met = in_row & (tap_x < KW) & (column >= 0) & (column < W)
            place_x = tap_x if FLIP else KW - 1 - tap_x
            weight = tl.load(f + (place_x if SEPARABLE else place_y * KW + place_x), mask=met, other=0.0)
            sample = tl.load(x + (base + (row * W + column) * inner), mask=met, other=0.0)
            along += weight * sample.to(tl.float32)
        if SEPARABLE:
            along *= tl.load(f + place_y, mask=in_row, other=0.0)
        total += along
    tl.store(y + at, (gain * total).to(y.dtype.element_ty), mask=inside)


def _forward(x, f, up, down, pad, flip, gain):
    channels_last = is_channels_last(x)
    x = dense(x, channels_last)
    (f,) = contiguous(f.to(torch.float32))
    kh, kw = taps_of(f)
    oh, ow = output_size(x.shape[2:], (kh, kw), up, down, pad)
    y = empty((*x.shape[:2], oh, ow), x, channels_last)
    constants = dict(KH=kh, KW=kw, UP_Y=up[0], UP_X=up[1], DOWN_Y=down[0], DOWN_X=down[1], SEPARABLE=f.dim() == 1)
    constants |= dict(FLIP=flip, CHANNELS_LAST=channels_last, WIDE=wide(x, y), BLOCK=BLOCK)
    sizes = (*x.shape[1:], oh, ow, y.numel(), pad[0], pad[2])
    launch(upfirdn2d_kernel, triton.cdiv(y.numel(), BLOCK), x, f, y, *sizes, float(gain), **constants)
    return y


def _declines(x, f, up, down, pad, flip, gain):
    size = output_size(x.shape[2:], taps_of(f), up, down, pad)
    lengths = [n * k for n, k in zip((*x.shape[2:], *size), (*up, *down), strict=True)]
    if max(*lengths, *map(abs, pad)) > LONGEST:
        return f"triton kernels count positions in 32 bits, got {max(lengths)}"
    return declines(x)


LAUNCHERS = {"upfirdn2d": Backend(_forward, _declines)}


def static_cases():
    """StyleGAN2's up- and downsampling, StyleGAN3's, whose filter is a product, and 2^31 elements."""
    up, down = ([2, 2], [1, 1], [2, 1, 2, 1]), ([1, 1], [2, 2], [1, 1, 1, 1])
    forms = [((4, 4), up), ((4, 4), down), ((12,), ([2, 2], [1, 1], [6, 5, 6, 5]))]
    shapes = [((16, 64, 64, 64), True), ((16, 64, 64, 64), False), ((4096, 3, 512, 512), False)]
    return recorded(
        lambda x=x, f=f, form=form: _forward(x, meta(f, torch.float32), *form, False, 4.0)
        for dtype in FLOATS
        for shape, last in shapes
        for f, form in forms
        for x in [meta(shape, dtype, last)]
    )
