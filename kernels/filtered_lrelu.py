"""Triton kernel of `filtered_lrelu` and of its derivatives: a tile of the upsampled image lives in registers.

"Fine" is the upsampled image, "coarse" what it is made of. Filters reach across lanes by `tl.gather`, through shared
memory; a tile's fine samples are made once for it and those in the reach of the last filter again by its neighbours.
Images are read and written in NCHW; channels_last is copied at the edge, 2 accesses more of x and of y.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from fastgan._layout import dense, is_channels_last, laid_out
from fastgan.choice import Backend
from fastgan.kernels.launching import FLOATS, contiguous, declines, launch, meta, power_of_2, recorded, wide
from fastgan.kernels.upfirdn2d import taps_at
from fastgan.ops.filtered_lrelu import adjoint_pads, middle, output_size, signs_shape, too_large
from fastgan.ops.upfirdn2d import taps_of

LARGEST = 8192  # fine samples of a tile, 16 a thread: 16 warps
BYTE = 8  # fine columns whose signs a store of the forward pass writes: tiles begin at a multiple of it


class Tile(NamedTuple):
    """Outputs of a program, and the fine samples that it makes for them: powers of 2."""

    rows: int
    columns: int
    fine_rows: int
    fine_columns: int


def tile(size: tuple[int, int], taps: tuple[int, int], down: int, forward: bool) -> Tile:
    """The tile that makes the fewest fine samples for outputs of `size`; the smallest of such."""

    def outputs(whole: int, fine: int, taps: int, early: int) -> int:
        """Of a tile along an axis; 0 where none fits. A tile that is the whole axis begins at its start."""
        return whole if whole * down + taps - 1 <= fine else min(whole, max((fine - taps + 1 - early) // down, 0))

    found = []
    for fine_rows in (16, 32, 64, 128):
        for fine_columns in (32, 64, 128):
            rows = outputs(size[0], fine_rows, taps[0], 0)
            columns = outputs(size[1], fine_columns, taps[1], BYTE - 1 if forward else 0)
            samples = fine_rows * fine_columns
            if samples <= LARGEST and rows and columns:
                programs = triton.cdiv(size[0], rows) * triton.cdiv(size[1], columns)
                found.append((programs * samples, samples, Tile(rows, columns, fine_rows, fine_columns)))
    return min(found)[2]


@triton.jit
def place(tap, K: tl.constexpr, FLIP: tl.constexpr):
    """Where a tap lies in memory: a convolution's filter is slid turned round."""
    return tap if FLIP else K - 1 - tap


@triton.jit
def samples(x, bias, row, column, met, W):
    """x + bias where `met`, 0 elsewhere."""
    v = tl.load(x + (row * W + column), mask=met, other=0.0).to(tl.float32)
    return v if bias is None else tl.where(met, v + bias, 0.0)


@triton.jit
def upsampled(
    x, bias, f, my, mx, H, W, pad_y, pad_x,
    KH: tl.constexpr, KW: tl.constexpr, UP: tl.constexpr, SEPARABLE: tl.constexpr, FLIP: tl.constexpr,
    FINE_Y: tl.constexpr, FINE_X: tl.constexpr, COARSE_Y: tl.constexpr,
):  # fmt: skip  # by kind: tensors, sizes, constants
    """[FINE_Y, FINE_X] of f * x at fine rows my and columns mx."""
    iy, ky = taps_at(my, pad_y, UP, 1)
    ix, kx = taps_at(mx, pad_x, UP, 1)
    t = tl.zeros((FINE_Y, FINE_X), tl.float32)
    if SEPARABLE:  # along the coarse rows, then down
        first = tl.min(iy, 0)
        row = first + tl.arange(0, COARSE_Y)
        in_row = (row >= 0) & (row < H)
        along = tl.zeros((COARSE_Y, FINE_X), tl.float32)
        for i in range((KW + UP - 1) // UP):
            column, tap = ix + i, kx + i * UP
            in_column = (tap < KW) & (column >= 0) & (column < W)
            weight = tl.load(f + place(tap, KW, FLIP), mask=in_column, other=0.0)
            met = in_row[:, None] & in_column[None, :]
            along += weight[None, :] * samples(x, bias, row[:, None], column[None, :], met, W)
        for j in range((KH + UP - 1) // UP):
            tap = ky + j * UP
            weight = tl.load(f + place(tap, KH, FLIP), mask=tap < KH, other=0.0)
            at = tl.broadcast_to(tl.minimum(iy + j - first, COARSE_Y - 1)[:, None], (FINE_Y, FINE_X))
            t += tl.where((tap < KH)[:, None], weight[:, None] * tl.gather(along, at, 0), 0.0)
    else:
        for j in range((KH + UP - 1) // UP):
            row, tap_y = iy + j, ky + j * UP
            in_row = (tap_y < KH) & (row >= 0) & (row < H)
            for i in range((KW + UP - 1) // UP):
                column, tap_x = ix + i, kx + i * UP
                met = in_row[:, None] & ((tap_x < KW) & (column >= 0) & (column < W))[None, :]
                at = place(tap_y, KH, FLIP)[:, None] * KW + place(tap_x, KW, FLIP)[None, :]
                weight = tl.load(f + at, mask=met, other=0.0)
                t += weight * samples(x, bias, row[:, None], column[None, :], met, W)
    return t


@triton.jit
def downsampled(
    t, f, shift,
    KH: tl.constexpr, KW: tl.constexpr, DOWN: tl.constexpr, SEPARABLE: tl.constexpr, FLIP: tl.constexpr,
    FINE_Y: tl.constexpr, FINE_X: tl.constexpr, OUT_Y: tl.constexpr, OUT_X: tl.constexpr,
):  # fmt: skip  # by kind
    """[OUT_Y, OUT_X] of f * t, every DOWN-th, from fine column `shift` on."""
    row, column = tl.arange(0, OUT_Y) * DOWN, shift + tl.arange(0, OUT_X) * DOWN
    total = tl.zeros((OUT_Y, OUT_X), tl.float32)
    if SEPARABLE:
        along = tl.zeros((FINE_Y, OUT_X), tl.float32)
        for i in range(KW):
            at = tl.broadcast_to(tl.minimum(column + i, FINE_X - 1)[None, :], (FINE_Y, OUT_X))
            along += tl.load(f + place(i, KW, FLIP)) * tl.gather(t, at, 1)
        for j in range(KH):
            at = tl.broadcast_to(tl.minimum(row + j, FINE_Y - 1)[:, None], (OUT_Y, OUT_X))
            total += tl.load(f + place(j, KH, FLIP)) * tl.gather(along, at, 0)
    else:
        for j in range(KH):
            at_row = tl.broadcast_to(tl.minimum(row + j, FINE_Y - 1)[:, None], (OUT_Y, FINE_X))
            rows = tl.gather(t, at_row, 0)
            for i in range(KW):
                at_column = tl.broadcast_to(tl.minimum(column + i, FINE_X - 1)[None, :], (OUT_Y, OUT_X))
                weight = tl.load(f + place(j, KH, FLIP) * KW + place(i, KW, FLIP))
                total += weight * tl.gather(rows, at_column, 1)
    return total


@triton.jit
def packed(bits, FINE_Y: tl.constexpr, FINE_X: tl.constexpr):
    """Bytes [FINE_Y, FINE_X / 8], the first column's bit the lowest."""
    bits = tl.reshape(bits.to(tl.int32), (FINE_Y, FINE_X // 8, 8))
    return tl.sum(bits << tl.arange(0, 8)[None, None, :], 2).to(tl.uint8)


@triton.jit
def activated(
    t, inside, rows, clamped, my, byte, own_rows, until, used, row_bytes, gain, low, clamp,
    CLAMPS: tl.constexpr, FINE_Y: tl.constexpr, FINE_X: tl.constexpr,
):  # fmt: skip  # by kind
    """phi of t; leaves its signs in the rows' bytes from `byte` up to `until`, and zeros in those past the `used`."""
    is_low = (t > 0) == 0  # NaN too
    v = t * tl.where(is_low, low, gain)
    octets = byte + tl.arange(0, FINE_X // 8)
    own = own_rows[:, None] & (octets < tl.minimum(until, used))[None, :]
    rest = used + tl.arange(0, 4)  # of a row's last word
    own_rest = own_rows[:, None] & (rest < tl.where(until == row_bytes, row_bytes, 0))[None, :]
    to, to_rest = my[:, None] * row_bytes + octets[None, :], my[:, None] * row_bytes + rest[None, :]
    nothing = tl.zeros((FINE_Y, 4), tl.uint8)
    tl.store(rows + to, packed(is_low & inside, FINE_Y, FINE_X), mask=own)
    tl.store(rows + to_rest, nothing, mask=own_rest)
    if CLAMPS:
        held = tl.abs(v) >= clamp
        v = tl.where(held, tl.where(v > 0, clamp, -clamp), v)
        tl.store(clamped + to, packed(held & inside, FINE_Y, FINE_X), mask=own)
        tl.store(clamped + to_rest, nothing, mask=own_rest)
    return v


@triton.jit
def sloped(t, inside, rows, clamped, my, mx, row_bytes, gain, low, CLAMPS: tl.constexpr):
    """t times the slope that phi had, by the signs."""
    at, bit = my[:, None] * row_bytes + (mx >> 3)[None, :], (mx & 7)[None, :]
    is_low = (tl.load(rows + at, mask=inside, other=0).to(tl.int32) >> bit) & 1
    v = t * tl.where(is_low != 0, low, gain)
    if CLAMPS:
        held = (tl.load(clamped + at, mask=inside, other=0).to(tl.int32) >> bit) & 1
        v = tl.where(held != 0, 0.0, v)
    return v


# Bound: x, y and the signs once; 18 FMA for a fine sample of 12 taps, up 2 and down 2, of which a tile of 32 x 64 uses
# 20 x 46. A gather of a filter's reach stores its source and loads a value for each result: 12 and 6 stores, 6 and 6
# loads of shared memory for each fine sample of such a tile, and the same again down the rows for a half and a quarter.
@triton.jit
def filtered_lrelu_kernel(
    x, bias, f_up, f_down, y, signs, C, H, W, MH, MW, OH, OW, planes, row_bytes,
    pad_y, pad_x, pad_out_y, pad_out_x, gain_up, gain, low, clamp,
    KH_UP: tl.constexpr, KW_UP: tl.constexpr, KH_DOWN: tl.constexpr, KW_DOWN: tl.constexpr,
    UP: tl.constexpr, DOWN: tl.constexpr, SEPARABLE_UP: tl.constexpr, SEPARABLE_DOWN: tl.constexpr,
    FLIP: tl.constexpr, FORWARD: tl.constexpr, CLAMPS: tl.constexpr, WIDE: tl.constexpr,
    TILE_Y: tl.constexpr, TILE_X: tl.constexpr, FINE_Y: tl.constexpr, FINE_X: tl.constexpr,
    COARSE_Y: tl.constexpr, OUT_Y: tl.constexpr, OUT_X: tl.constexpr,
):  # fmt: skip  # by kind
    """y [planes, OH, OW] of x [planes, H, W]: a program a tile. FORWARD writes the signs, else they are read."""
    program = tl.program_id(0)
    tiles_y, tiles_x = tl.cdiv(OH, TILE_Y), tl.cdiv(OW, TILE_X)
    tile_x, tile_y = program % tiles_x, program // tiles_x % tiles_y
    plane = program // tiles_x // tiles_y
    channel = plane % C
    if WIDE:
        plane = plane.to(tl.int64)
    left, top = tile_x * TILE_X, tile_y * TILE_Y
    column = left * DOWN - pad_out_x
    first = column // 8 * 8 if FORWARD else column
    my, mx = top * DOWN - pad_out_y + tl.arange(0, FINE_Y), first + tl.arange(0, FINE_X)
    offset = None if bias is None else tl.load(bias + channel).to(tl.float32)
    t = upsampled(
        x + plane * H * W, offset, f_up, my, mx, H, W, pad_y, pad_x,
        KH_UP, KW_UP, UP, SEPARABLE_UP, FLIP, FINE_Y, FINE_X, COARSE_Y,
    )  # fmt: skip  # by kind
    t *= gain_up
    inside = ((my >= 0) & (my < MH))[:, None] & ((mx >= 0) & (mx < MW))[None, :]
    rows = signs + plane * MH * row_bytes
    clamped = signs + (plane + planes) * MH * row_bytes  # the second kind's rows
    if FORWARD:
        last_y, last_x = tile_y == tiles_y - 1, tile_x == tiles_x - 1
        own_rows = my < tl.where(last_y, MH, tl.minimum((top + TILE_Y) * DOWN, MH))
        until = tl.where(last_x, row_bytes, (left + TILE_X) * DOWN // 8)
        v = activated(
            t, inside, rows, clamped, my, first // 8, own_rows, until, (MW + 7) // 8, row_bytes, gain, low, clamp,
            CLAMPS, FINE_Y, FINE_X,
        )  # fmt: skip  # by kind
    else:
        v = sloped(t, inside, rows, clamped, my, mx, row_bytes, gain, low, CLAMPS)
    v = tl.where(inside, v, 0.0)
    total = downsampled(
        v, f_down, column - first, KH_DOWN, KW_DOWN, DOWN, SEPARABLE_DOWN, FLIP, FINE_Y, FINE_X, OUT_Y, OUT_X,
    )  # fmt: skip  # by kind
    ty, tx = tl.arange(0, OUT_Y), tl.arange(0, OUT_X)
    oy, ox = top + ty, left + tx
    stored = ((ty < TILE_Y) & (oy < OH))[:, None] & ((tx < TILE_X) & (ox < OW))[None, :]
    to_y = y + plane * OH * OW + (oy[:, None] * OW + ox[None, :])
    tl.store(to_y, total.to(y.dtype.element_ty), mask=stored)


def _run(x, bias, signs, filters, up, down, pad, pad_out, flip, form, forward):
    """y in x's layout; signs are written or read."""
    channels_last = is_channels_last(x)
    x = dense(x, False)
    fu, fd = contiguous(*(f.to(torch.float32) for f in filters))
    inner = middle(x, fu, up, pad)
    size = output_size(x, fu, fd, up, down, pad, pad_out)
    y = x.new_empty((*x.shape[:2], *size))
    chosen = tile(tuple(size), taps_of(fd), down, forward)
    coarse = triton.cdiv(chosen.fine_rows - 1, up) + triton.cdiv(taps_of(fu)[0], up)
    gain, slope, clamp = form
    sizes = (*x.shape[1:], *inner, *size, x.shape[0] * x.shape[1], signs.shape[-1])
    numbers = (pad[0], pad[2], pad_out[0], pad_out[2], float(up * up) if forward else 1.0, gain, gain * slope, clamp)
    constants = dict(zip(("KH_UP", "KW_UP", "KH_DOWN", "KW_DOWN"), (*taps_of(fu), *taps_of(fd)), strict=True))
    constants |= dict(UP=up, DOWN=down, SEPARABLE_UP=fu.dim() == 1, SEPARABLE_DOWN=fd.dim() == 1, FLIP=flip)
    constants |= dict(FORWARD=forward, CLAMPS=clamp >= 0, WIDE=wide(x, y, signs), TILE_Y=chosen.rows)
    constants |= dict(TILE_X=chosen.columns, FINE_Y=chosen.fine_rows, FINE_X=chosen.fine_columns)
    constants |= dict(COARSE_Y=power_of_2(coarse), OUT_Y=power_of_2(chosen.rows), OUT_X=power_of_2(chosen.columns))
    programs = x.shape[0] * x.shape[1] * triton.cdiv(size[0], chosen.rows) * triton.cdiv(size[1], chosen.columns)
    tensors, warps = (x, bias, fu, fd, y, signs), max(1, chosen.fine_rows * chosen.fine_columns // 512)
    launch(filtered_lrelu_kernel, programs, *tensors, *sizes, *numbers, num_warps=warps, **constants)
    return laid_out(y, channels_last)


def _forward(x, bias, fu, fd, up, down, pad, flip, gain, slope, clamp):
    signs = x.new_empty(signs_shape(x, middle(x, fu, up, pad), clamp), dtype=torch.uint8)
    (bias,) = contiguous(bias)
    y = _run(x, bias, signs, (fu, fd), up, down, pad, [0] * 4, flip, (gain, slope, clamp), True)
    return y, signs, x.new_empty(0)


def _backward(x, signs, fu, fd, up, down, pad, pad_out, flip, gain, slope, clamp, tie):
    return _run(x, None, signs.contiguous(), (fu, fd), up, down, pad, pad_out, flip, (gain, slope, clamp), False)


LAUNCHERS = {
    "filtered_lrelu": Backend(
        _forward, lambda x, bias, fu, fd, up, down, pad, *form: declines(x) or too_large(x, fu, fd, up, down, pad)
    ),
    "filtered_lrelu_backward": Backend(_backward, lambda x, signs, *case: declines(x) or too_large(x, *case[:6])),
}


def static_cases():
    """StyleGAN3's layers at 36 pixels, with up 2 and 4, products and a round last filter, and 2^31 elements."""
    forms = [((12,), (12,), 2, 2), ((24,), (12,), 4, 2), ((12,), (12, 12), 2, 2)]
    shapes = [(8, 64, 36, 36), (65536, 512, 8, 8)]
    pad = [11, 10, 11, 10]

    def both(x, up_filter, down_filter, up, down):
        fu, fd = (meta(taps, torch.float32) for taps in (up_filter, down_filter))
        y, signs, tie = _forward(x, meta((x.shape[1],), torch.float32), fu, fd, up, down, pad, False, 1.4, 0.2, 256.0)
        pads = adjoint_pads(x.shape[2:], middle(x, fu, up, pad), y.shape[2:], (fu, fd), up, down, pad, [0] * 4)
        return _backward(y, signs, fd, fu, down, up, *pads, True, 1.4 * up**2, 0.2, 256.0, tie)

    return recorded(
        lambda x=x, form=form: both(x, *form)
        for dtype in FLOATS
        for shape in shapes
        for form in forms
        for x in [meta(shape, dtype)]
    )
