"""Triton kernels of the norms with an activation: `bn_act` and `gn_act` are two settings of them.

x [N, C, P] has G statistic groups of S = N/G P samples and pixels, and NG norm groups of CG neighbouring channels:
batch norm is CG = 1, with a G of the user's choice; group norm is G = N. Each statistic group and norm group has one
mean and var, [G, NG], over m = S CG elements.

Two routes, chosen by `Plan`:
- streamed: sums per chunk of S and channel, merged in a fixed order by a small kernel, then one elementwise pass.
  Accesses an element: 3 forward, 5 backward, 8 double backward.
- resident: a program holds whole groups in registers and reads each tensor once: 2, 3 and 5, in one launch.

The formulas are those of docs/maths.md, sections 2 and 5; 8, 12 and 25 flops an element, so memory bounds them all.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgan._layout import dense, empty_result, is_channels_last, planes
from fastgan.kernels.column_sums import column_sums
from fastgan.kernels.launching import (
    FLOATS,
    PROGRAMS,
    chunks_of,
    contiguous,
    launch,
    meta,
    power_of_2,
    recorded,
    tile,
    wide,
)
from fastgan.kernels.numerics import (
    activate,
    activate_backward,
    element_offsets,
    load_channels,
    merge_moments,
)

RESIDENT = 8192  # elements of a tensor that one program may hold: 16 registers a thread at 16 warps; three fit
MERGED = 8192  # sums that a merging program may hold at a time: chunks by channels
SECTOR = 32  # bytes; a program that takes less from a row of memory wastes traffic
LEAST_PIXELS = 64  # per sample, to stream: the sums of a group norm are 8 bytes a sample and channel


# ---- pieces ----------------------------------------------------------------------------------------------------------


@triton.jit
def over_group(v, PER_CHANNEL: tl.constexpr):
    """Sum of a tile [rows, channels] over its norm groups: [1, channels] where CG = 1, else [1, 1]: the tile is one."""
    total = tl.sum(v, 0, keep_dims=True)
    if not PER_CHANNEL:
        total = tl.sum(total, 1, keep_dims=True)
    return total


@triton.jit
def group_channels(block, C, CG, PER_CHANNEL: tl.constexpr, BLOCK_C: tl.constexpr):
    """(channels, which are inside): of a block of channels where CG = 1, else of norm group `block`."""
    k = tl.arange(0, BLOCK_C)
    if PER_CHANNEL:
        c = block * BLOCK_C + k
        inside = c < C
    else:
        c = block * CG + k
        inside = k < CG
    return c, inside


@triton.jit
def group_places(g, block, c, inside, NG, PER_CHANNEL: tl.constexpr):
    """(places in a [G, NG] array, which are inside), shaped as `over_group` gives its sums."""
    if PER_CHANNEL:
        at = (g * NG + c)[None, :]
        mask = inside[None, :]
    else:
        at = g * NG + block + tl.zeros((1, 1), tl.int32)
        mask = at >= 0
    return at, mask


@triton.jit
def load_group(vector, g, c, C, CG):
    """vector[g, norm group of channel c] of a [G, C / CG] array, as [1, channels]; 0 beyond C."""
    return tl.load(vector + g * (C // CG) + c // CG, mask=c < C, other=0.0)[None, :]


@triton.jit
def group_offsets(g, s, S, c, C, P, CHANNELS_LAST: tl.constexpr, WIDE: tl.constexpr):
    """Offsets of the elements at row s of statistic group g."""
    if WIDE:
        g = g.to(tl.int64)
    return element_offsets(g * S + s, c, C, P, CHANNELS_LAST, WIDE)


@triton.jit
def load_tile(x, at, mask):
    return tl.load(x + at, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def load_norm(weight, bias, mean, var, g, c, C, CG, eps):
    """(mean, rstd, weight, bias) of channels c in statistic group g, [1, channels] each."""
    centre = load_group(mean, g, c, C, CG)
    r = 1.0 / tl.sqrt(load_group(var, g, c, C, CG) + eps)
    return centre, r, load_channels(weight, c, C, 1.0)[None, :], load_channels(bias, c, C, 0.0)[None, :]


@triton.jit
def load_inside(vector, c, C, inside, default):
    """vector[c], `default` where there is none, 0 outside the group: [1, channels]."""
    return tl.where(inside, load_channels(vector, c, C, default), 0.0)[None, :]


# ---- a program's place -----------------------------------------------------------------------------------------------


@triton.jit
def chunk_place(S, C, chunks, rows, BLOCK_C: tl.constexpr):
    """(g chunks + chunk, statistic group g, channels, first row, row behind the last) of a program that sums."""
    blocks = tl.cdiv(C, BLOCK_C)
    part = tl.program_id(0) // blocks
    c = (tl.program_id(0) % blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    first = (part % chunks) * rows
    return part, part // chunks, c, first, tl.minimum(first + rows, S)


@triton.jit
def merge_place(C, CG, blocks, PER_CHANNEL: tl.constexpr, CHUNKS: tl.constexpr, BLOCK_C: tl.constexpr):
    """Of a program that merges the sums of one group: (statistic group g, channels, which are inside, offsets of their
    sums [CHUNKS, channels], which are inside, places in a [G, NG] array, which are inside)."""
    g = tl.program_id(0) // blocks
    block = tl.program_id(0) % blocks
    c, inside = group_channels(block, C, CG, PER_CHANNEL, BLOCK_C)
    k = tl.arange(0, CHUNKS)
    at = (g * CHUNKS + k)[:, None] * C + c[None, :]
    mask = (k >= 0)[:, None] & inside[None, :]
    places, within = group_places(g, block, c, inside, C // CG, PER_CHANNEL)
    return g, c, inside, at, mask, places, within


@triton.jit
def tile_place(S, C, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr):
    """(statistic group, rows, channels, which elements are inside) of a program of an elementwise pass."""
    blocks = tl.cdiv(C, BLOCK_C)
    tiles = tl.cdiv(S, BLOCK_S)
    g = tl.program_id(0) // blocks // tiles
    s = (tl.program_id(0) // blocks) % tiles * BLOCK_S + tl.arange(0, BLOCK_S)
    c = (tl.program_id(0) % blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    return g, s, c, (s < S)[:, None] & (c < C)[None, :]


@triton.jit
def resident_place(S, C, CG, blocks, PER_CHANNEL: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr):
    """(part of the statistic groups, block, channels, which are inside, rows, which elements are inside)."""
    block = tl.program_id(0) % blocks
    c, inside = group_channels(block, C, CG, PER_CHANNEL, BLOCK_C)
    s = tl.arange(0, BLOCK_S)
    return tl.program_id(0) // blocks, block, c, inside, s, (s < S)[:, None] & inside[None, :]


# ---- streamed: sums --------------------------------------------------------------------------------------------------


# Bound: 1 access an element.
@triton.jit
def moments_kernel(
    x, mean, square, S, C, P, chunks, rows,
    CHANNELS_LAST: tl.constexpr, WIDE: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip  # by kind: tensors, sizes, constants
    """mean and sum of squared differences [G, chunks, C] of each channel over `rows` rows: a tile's own mean first, so
    that a large mean costs no digits, then Chan's merge from tile to tile."""
    part, g, c, first, last = chunk_place(S, C, chunks, rows, BLOCK_C)
    count = 0.0
    average = tl.zeros((BLOCK_C,), tl.float32)
    squares = tl.zeros((BLOCK_C,), tl.float32)
    for start in range(first, last, BLOCK_S):
        s = start + tl.arange(0, BLOCK_S)
        mask = (s < last)[:, None] & (c < C)[None, :]
        v = load_tile(x, group_offsets(g, s, S, c, C, P, CHANNELS_LAST, WIDE), mask)
        n = tl.minimum(last - start, BLOCK_S).to(tl.float32)
        m = tl.sum(v, 0) / n
        d = tl.where(mask, v - m[None, :], 0.0)
        count, average, squares = merge_moments(count, average, squares, n, m, tl.sum(d * d, 0))
    tl.store(mean + part * C + c, average, mask=c < C)
    tl.store(square + part * C + c, squares, mask=c < C)


# Bound: 8 bytes a channel, chunk and group: nothing; a launch.
@triton.jit
def merge_moments_kernel(
    partial_mean, partial_square, mean, var, S, C, CG, blocks, rows, inv_m,
    PER_CHANNEL: tl.constexpr, CHUNKS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip  # by kind: tensors, sizes, constants
    """mean and var [G, NG] from the moments of CHUNKS chunks and CG channels, with one program a group."""
    _, _, _, at, mask, places, within = merge_place(C, CG, blocks, PER_CHANNEL, CHUNKS, BLOCK_C)
    held = tl.minimum(tl.maximum(S - tl.arange(0, CHUNKS) * rows, 0), rows).to(tl.float32)  # rows in each chunk
    n = tl.where(mask, held[:, None], 0.0)
    m = tl.load(partial_mean + at, mask=mask, other=0.0)
    average = over_group(n * m, PER_CHANNEL) * inv_m
    d = m - average
    squares = tl.load(partial_square + at, mask=mask, other=0.0) + n * d * d
    tl.store(mean + places, average, mask=within)
    tl.store(var + places, over_group(squares, PER_CHANNEL) * inv_m, mask=within)


# Bound: 2 accesses an element; the backward's first pass.
@triton.jit
def backward_sums_kernel(
    dy, x, weight, bias, mean, var, partial, S, C, P, CG, chunks, rows, arrays, eps, slope,
    ACTIVATION: tl.constexpr, CHANNELS_LAST: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip  # by kind: tensors, sizes, constants
    """partial [2, G, chunks, C]: sum dt, sum dt xhat; dt = dy phi'(t). arrays: G chunks, the size of one of the two."""
    part, g, c, first, last = chunk_place(S, C, chunks, rows, BLOCK_C)
    centre, r, gamma, shift = load_norm(weight, bias, mean, var, g, c, C, CG, eps)
    scale = gamma * r
    c1 = tl.zeros((BLOCK_C,), tl.float32)
    c2 = tl.zeros((BLOCK_C,), tl.float32)
    for start in range(first, last, BLOCK_S):
        s = start + tl.arange(0, BLOCK_S)
        mask = (s < last)[:, None] & (c < C)[None, :]
        at = group_offsets(g, s, S, c, C, P, CHANNELS_LAST, WIDE)
        centred = load_tile(x, at, mask) - centre
        dt = activate_backward(load_tile(dy, at, mask), centred * scale + shift, slope, ACTIVATION)
        c1 += tl.sum(dt, 0)
        c2 += tl.sum(dt * centred * r, 0)
    at = part * C + c
    tl.store(partial + at, c1, mask=c < C)
    tl.store(partial + arrays * C + at, c2, mask=c < C)


@triton.jit
def averaged(total, inv_m):
    """total / m. inv_m is 0 where mean and var are constants: times that, a NaN of one sample would reach all."""
    return tl.where(inv_m > 0.0, total * inv_m, 0.0)


@triton.jit
def times(factor, v):
    """factor v; 0 where the factor is, whatever v: a NaN in x would stay one where mean and var are constants."""
    return tl.where(factor == 0.0, 0.0, factor * v)


# Bound: 8 bytes a channel, chunk and group.
@triton.jit
def merge_backward_kernel(
    partial, weight, sums, dbias, dweight, C, CG, blocks, groups, inv_m,
    PER_CHANNEL: tl.constexpr, CHUNKS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip  # by kind: tensors, sizes, constants
    """sums [2, G, NG]: means over the group of weight dt, weight dt xhat; dbias, dweight [G, C]: sums dt, dt xhat."""
    g, c, inside, at, mask, places, within = merge_place(C, CG, blocks, PER_CHANNEL, CHUNKS, BLOCK_C)
    gamma = load_inside(weight, c, C, inside, 1.0)
    c1 = tl.sum(tl.load(partial + at, mask=mask, other=0.0), 0)
    c2 = tl.sum(tl.load(partial + groups * CHUNKS * C + at, mask=mask, other=0.0), 0)
    tl.store(dbias + g * C + c, c1, mask=inside)
    tl.store(dweight + g * C + c, c2, mask=inside)
    s1 = averaged(over_group(gamma * c1[None, :], PER_CHANNEL), inv_m)
    s2 = averaged(over_group(gamma * c2[None, :], PER_CHANNEL), inv_m)
    tl.store(sums + places, s1, mask=within)
    tl.store(sums + groups * (C // CG) + places, s2, mask=within)


# Bound: 3 accesses an element, or 2 where there is no ddx; the double backward's first pass.
@triton.jit
def double_backward_sums_kernel(
    dy, ddx, x, weight, bias, mean, var, partial, S, C, P, CG, chunks, rows, arrays, eps, slope,
    ACTIVATION: tl.constexpr, CHANNELS_LAST: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip  # by kind: tensors, sizes, constants
    """partial [5, G, chunks, C]: sums of dt, dt xhat, w, w xhat, w dt; w = ddx."""
    part, g, c, first, last = chunk_place(S, C, chunks, rows, BLOCK_C)
    centre, r, gamma, shift = load_norm(weight, bias, mean, var, g, c, C, CG, eps)
    scale = gamma * r
    c1 = tl.zeros((BLOCK_C,), tl.float32)
    c2 = tl.zeros((BLOCK_C,), tl.float32)
    w1 = tl.zeros((BLOCK_C,), tl.float32)
    w2 = tl.zeros((BLOCK_C,), tl.float32)
    a0 = tl.zeros((BLOCK_C,), tl.float32)
    for start in range(first, last, BLOCK_S):
        s = start + tl.arange(0, BLOCK_S)
        mask = (s < last)[:, None] & (c < C)[None, :]
        at = group_offsets(g, s, S, c, C, P, CHANNELS_LAST, WIDE)
        centred = load_tile(x, at, mask) - centre
        dt = activate_backward(load_tile(dy, at, mask), centred * scale + shift, slope, ACTIVATION)
        xhat = centred * r
        c1 += tl.sum(dt, 0)
        c2 += tl.sum(dt * xhat, 0)
        if ddx is not None:
            w = load_tile(ddx, at, mask)
            w1 += tl.sum(w, 0)
            w2 += tl.sum(w * xhat, 0)
            a0 += tl.sum(w * dt, 0)
    at = part * C + c
    tl.store(partial + at, c1, mask=c < C)
    tl.store(partial + arrays * C + at, c2, mask=c < C)
    tl.store(partial + 2 * arrays * C + at, w1, mask=c < C)
    tl.store(partial + 3 * arrays * C + at, w2, mask=c < C)
    tl.store(partial + 4 * arrays * C + at, a0, mask=c < C)


@triton.jit
def double_backward_coefficients(c1, c2, w1, w2, a0, gamma, vg, r, inv_m, PER_CHANNEL: tl.constexpr):
    """From the five sums of each channel [1, C'] (0 outside the group): what the elementwise pass needs of the group,
    (W1/m, W2/m, factor of w, factor of x - mean, constant), and each channel's share of d_weight. r: of the group."""
    s1 = over_group(gamma * c1, PER_CHANNEL)
    s2 = over_group(gamma * c2, PER_CHANNEL)
    W1 = over_group(w1, PER_CHANNEL)
    W2 = over_group(w2, PER_CHANNEL)
    a = over_group(gamma * a0, PER_CHANNEL) - (W1 * s1 + W2 * s2) * inv_m
    q = over_group(vg * c1, PER_CHANNEL) - r * inv_m * (W1 * s2 + W2 * s1)
    q_xhat = over_group(vg * c2, PER_CHANNEL) - 2.0 * r * inv_m * W2 * s2
    d_weight = r * (a0 - averaged(W1 * c1 + W2 * c2, inv_m))
    along_w, along = averaged(-r * r * s2, inv_m), averaged(-r * r * (q_xhat + a * r), inv_m)
    return averaged(W1, inv_m), averaged(W2, inv_m), along_w, along, averaged(-r * q, inv_m), d_weight


# Bound: 20 bytes a channel, chunk and group.
@triton.jit
def merge_double_backward_kernel(
    partial, weight, ddweight, var, coefficients, d_weight, C, CG, blocks, groups, eps, inv_m,
    PER_CHANNEL: tl.constexpr, CHUNKS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip  # by kind: tensors, sizes, constants
    """coefficients [5, G, NG] of the elementwise pass, and d_weight [G, C]."""
    g, c, inside, at, mask, places, within = merge_place(C, CG, blocks, PER_CHANNEL, CHUNKS, BLOCK_C)
    gamma = load_inside(weight, c, C, inside, 1.0)
    vg = load_inside(ddweight, c, C, inside, 0.0)
    r = 1.0 / tl.sqrt(tl.load(var + places, mask=within, other=1.0) + eps)
    one = groups * CHUNKS * C  # elements of one of the five
    c1 = tl.sum(tl.load(partial + at, mask=mask, other=0.0), 0)[None, :]
    c2 = tl.sum(tl.load(partial + one + at, mask=mask, other=0.0), 0)[None, :]
    w1 = tl.sum(tl.load(partial + 2 * one + at, mask=mask, other=0.0), 0)[None, :]
    w2 = tl.sum(tl.load(partial + 3 * one + at, mask=mask, other=0.0), 0)[None, :]
    a0 = tl.sum(tl.load(partial + 4 * one + at, mask=mask, other=0.0), 0)[None, :]
    W1, W2, along_w, along, constant, share = double_backward_coefficients(
        c1, c2, w1, w2, a0, gamma, vg, r, inv_m, PER_CHANNEL
    )
    size = groups * (C // CG)
    tl.store(coefficients + places, W1, mask=within)
    tl.store(coefficients + size + places, W2, mask=within)
    tl.store(coefficients + 2 * size + places, along_w, mask=within)
    tl.store(coefficients + 3 * size + places, along, mask=within)
    tl.store(coefficients + 4 * size + places, constant, mask=within)
    tl.store(d_weight + (g * C + c)[None, :], share, mask=inside[None, :])


# ---- streamed: elementwise -------------------------------------------------------------------------------------------


# Bound: 2 accesses an element; all there is to do in eval mode.
@triton.jit
def norm_act_kernel(
    x, weight, bias, mean, var, y, S, C, P, CG, eps, slope,
    ACTIVATION: tl.constexpr, CHANNELS_LAST: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip  # by kind: tensors, sizes, constants
    """y = phi(weight (x - mean) rstd + bias)."""
    g, s, c, mask = tile_place(S, C, BLOCK_S, BLOCK_C)
    at = group_offsets(g, s, S, c, C, P, CHANNELS_LAST, WIDE)
    v = load_tile(x, at, mask)
    centre, r, gamma, beta = load_norm(weight, bias, mean, var, g, c, C, CG, eps)
    t = (v - centre) * (gamma * r) + beta
    tl.store(y + at, activate(t, slope, ACTIVATION).to(y.dtype.element_ty), mask=mask)


# Bound: 3 accesses an element.
@triton.jit
def norm_act_backward_kernel(
    dy, x, weight, bias, mean, var, sums, dx, S, C, P, CG, groups, eps, slope,
    ACTIVATION: tl.constexpr, CHANNELS_LAST: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip  # by kind: tensors, sizes, constants
    """dx = rstd (weight dt - sums[0] - xhat sums[1])."""
    g, s, c, mask = tile_place(S, C, BLOCK_S, BLOCK_C)
    at = group_offsets(g, s, S, c, C, P, CHANNELS_LAST, WIDE)
    v = load_tile(x, at, mask)
    centre, r, gamma, beta = load_norm(weight, bias, mean, var, g, c, C, CG, eps)
    xhat = (v - centre) * r
    dt = activate_backward(load_tile(dy, at, mask), xhat * gamma + beta, slope, ACTIVATION)
    s1 = load_group(sums, g, c, C, CG)
    s2 = load_group(sums + groups * (C // CG), g, c, C, CG)
    tl.store(dx + at, (r * (gamma * dt - s1 - times(s2, xhat))).to(dx.dtype.element_ty), mask=mask)


@triton.jit
def double_backward_elements(
    g, w, centred, r, gamma, beta, vg, vb, W1, W2, along_w, along, constant, slope, ACTIVATION: tl.constexpr
):  # fmt: skip  # by kind: tensors, sizes, constants
    """(d_dy, d_x) of elements with dy = g, ddx = w, x - mean = centred; the rest is [1, C'] or [1, 1]."""
    t = centred * (gamma * r) + beta
    dt = activate_backward(g, t, slope, ACTIVATION)
    u1 = r * (vg - gamma * r * W2)
    u = gamma * r * w + times(u1, centred) + (vb - gamma * r * W1)
    return activate_backward(u, t, slope, ACTIVATION), along_w * w + u1 * dt + times(along, centred) + constant


@triton.jit
def load_ddx(ddx, at, mask):
    """A tile of ddx, or [1, 1] zeros where there is none."""
    if ddx is None:
        w = tl.zeros((1, 1), tl.float32)
    else:
        w = load_tile(ddx, at, mask)
    return w


# Bound: 5 accesses an element, 4 where there is no ddx.
@triton.jit
def norm_act_double_backward_kernel(
    dy, ddx, ddweight, ddbias, x, weight, bias, mean, var, coefficients, d_dy, d_x, S, C, P, CG, groups, eps, slope,
    ACTIVATION: tl.constexpr, CHANNELS_LAST: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip  # by kind: tensors, sizes, constants
    g, s, c, mask = tile_place(S, C, BLOCK_S, BLOCK_C)
    size = groups * (C // CG)
    at = group_offsets(g, s, S, c, C, P, CHANNELS_LAST, WIDE)
    gy, w, v = load_tile(dy, at, mask), load_ddx(ddx, at, mask), load_tile(x, at, mask)
    centre, r, gamma, beta = load_norm(weight, bias, mean, var, g, c, C, CG, eps)
    u, q = double_backward_elements(
        gy, w, v - centre, r, gamma, beta,
        load_channels(ddweight, c, C, 0.0)[None, :], load_channels(ddbias, c, C, 0.0)[None, :],
        load_group(coefficients, g, c, C, CG), load_group(coefficients + size, g, c, C, CG),
        load_group(coefficients + 2 * size, g, c, C, CG), load_group(coefficients + 3 * size, g, c, C, CG),
        load_group(coefficients + 4 * size, g, c, C, CG), slope, ACTIVATION,
    )  # fmt: skip  # by kind, and Triton takes no *arguments
    tl.store(d_dy + at, u.to(d_dy.dtype.element_ty), mask=mask)
    tl.store(d_x + at, q.to(d_x.dtype.element_ty), mask=mask)


# ---- resident --------------------------------------------------------------------------------------------------------


# Bound: 2 accesses an element.
@triton.jit
def resident_kernel(
    x, weight, bias, mean, var, y, S, C, P, CG, blocks, inv_m, eps, slope,
    ACTIVATION: tl.constexpr, CHANNELS_LAST: tl.constexpr, WIDE: tl.constexpr, PER_CHANNEL: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip  # by kind: tensors, sizes, constants
    """Statistics and y of one statistic group by one norm group, or by BLOCK_C channels where CG = 1."""
    g, block, c, inside, s, mask = resident_place(S, C, CG, blocks, PER_CHANNEL, BLOCK_S, BLOCK_C)
    at = group_offsets(g, s, S, c, C, P, CHANNELS_LAST, WIDE)
    v = load_tile(x, at, mask)
    average = over_group(v, PER_CHANNEL) * inv_m
    centred = tl.where(mask, v - average, 0.0)
    variance = over_group(centred * centred, PER_CHANNEL) * inv_m
    places, within = group_places(g, block, c, inside, C // CG, PER_CHANNEL)
    tl.store(mean + places, average, mask=within)
    tl.store(var + places, variance, mask=within)
    scale = load_channels(weight, c, C, 1.0)[None, :] / tl.sqrt(variance + eps)
    t = centred * scale + load_channels(bias, c, C, 0.0)[None, :]
    tl.store(y + at, activate(t, slope, ACTIVATION).to(y.dtype.element_ty), mask=mask)


# Bound: 3 accesses an element, and 8 bytes a channel and part.
@triton.jit
def resident_backward_kernel(
    dy, x, weight, bias, mean, var, dx, dbias, dweight, S, C, P, CG, blocks, groups, each, inv_m, eps, slope,
    ACTIVATION: tl.constexpr, CHANNELS_LAST: tl.constexpr, WIDE: tl.constexpr, PER_CHANNEL: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip  # by kind: tensors, sizes, constants
    """dx of `each` statistic groups by one block, one after the other; dbias, dweight [parts, C] of them."""
    part, block, c, inside, s, mask = resident_place(S, C, CG, blocks, PER_CHANNEL, BLOCK_S, BLOCK_C)
    gamma = load_inside(weight, c, C, inside, 1.0)
    beta = load_channels(bias, c, C, 0.0)[None, :]
    sum_dt = tl.zeros((BLOCK_C,), tl.float32)
    sum_dt_xhat = tl.zeros((BLOCK_C,), tl.float32)
    for i in range(0, tl.minimum(each, groups - part * each)):
        g = part * each + i
        places, within = group_places(g, block, c, inside, C // CG, PER_CHANNEL)
        at = group_offsets(g, s, S, c, C, P, CHANNELS_LAST, WIDE)
        r = 1.0 / tl.sqrt(tl.load(var + places, mask=within, other=1.0) + eps)
        centred = load_tile(x, at, mask) - tl.load(mean + places, mask=within, other=0.0)
        xhat = tl.where(mask, centred * r, 0.0)
        dt = activate_backward(load_tile(dy, at, mask), xhat * gamma + beta, slope, ACTIVATION)
        c1 = tl.sum(dt, 0)
        c2 = tl.sum(dt * xhat, 0)
        s1 = averaged(over_group(gamma * c1[None, :], PER_CHANNEL), inv_m)
        s2 = averaged(over_group(gamma * c2[None, :], PER_CHANNEL), inv_m)
        tl.store(dx + at, (r * (gamma * dt - s1 - times(s2, xhat))).to(dx.dtype.element_ty), mask=mask)
        sum_dt += c1
        sum_dt_xhat += c2
    tl.store(dbias + part * C + c, sum_dt, mask=inside)
    tl.store(dweight + part * C + c, sum_dt_xhat, mask=inside)


# Bound: 5 accesses an element, 4 where there is no ddx.
@triton.jit
def resident_double_backward_kernel(
    dy, ddx, ddweight, ddbias, x, weight, bias, mean, var, d_dy, d_x, d_weight,
    S, C, P, CG, blocks, groups, each, inv_m, eps, slope,
    ACTIVATION: tl.constexpr, CHANNELS_LAST: tl.constexpr, WIDE: tl.constexpr, PER_CHANNEL: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip  # by kind: tensors, sizes, constants
    """d_dy and d_x of `each` statistic groups by one block; d_weight [parts, C] of them."""
    part, block, c, inside, s, mask = resident_place(S, C, CG, blocks, PER_CHANNEL, BLOCK_S, BLOCK_C)
    gamma = load_inside(weight, c, C, inside, 1.0)
    beta = load_channels(bias, c, C, 0.0)[None, :]
    vg = load_inside(ddweight, c, C, inside, 0.0)
    vb = load_channels(ddbias, c, C, 0.0)[None, :]
    total = tl.zeros((1, BLOCK_C), tl.float32)
    for i in range(0, tl.minimum(each, groups - part * each)):
        g = part * each + i
        places, within = group_places(g, block, c, inside, C // CG, PER_CHANNEL)
        at = group_offsets(g, s, S, c, C, P, CHANNELS_LAST, WIDE)
        r = 1.0 / tl.sqrt(tl.load(var + places, mask=within, other=1.0) + eps)
        gy = load_tile(dy, at, mask)
        w = load_ddx(ddx, at, mask)
        centred = tl.where(mask, load_tile(x, at, mask) - tl.load(mean + places, mask=within, other=0.0), 0.0)
        dt = activate_backward(gy, centred * (gamma * r) + beta, slope, ACTIVATION)
        none = tl.zeros((1, BLOCK_C), tl.float32)
        W1, W2, along_w, along, constant, share = double_backward_coefficients(
            tl.sum(dt, 0, keep_dims=True), tl.sum(dt * centred, 0, keep_dims=True) * r,
            tl.sum(w, 0, keep_dims=True) + none, tl.sum(w * centred, 0, keep_dims=True) * r,
            tl.sum(w * dt, 0, keep_dims=True), gamma, vg, r, inv_m, PER_CHANNEL,
        )  # fmt: skip  # by kind, and Triton takes no *arguments
        u, q = double_backward_elements(
            gy, w, centred, r, gamma, beta, vg, vb, W1, W2, along_w, along, constant, slope, ACTIVATION
        )
        tl.store(d_dy + at, u.to(d_dy.dtype.element_ty), mask=mask)
        tl.store(d_x + at, q.to(d_x.dtype.element_ty), mask=mask)
        total += share
    tl.store(d_weight + (part * C + c)[None, :], total, mask=inside[None, :])


# ---- launchers -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """How a case [N, C, P] with G statistic groups and channels-a-group CG is cut into programs."""

    S: int
    C: int
    P: int
    CG: int
    G: int
    channels_last: bool
    resident: bool
    block_s: int
    block_c: int

    @property
    def NG(self) -> int:
        return self.C // self.CG

    @property
    def group_block(self) -> int:
        """Channels of a program that merges sums, or holds whole groups: a norm group, or several where CG = 1."""
        if self.CG > 1:
            return power_of_2(self.CG)
        return self.block_c if self.resident else min(power_of_2(self.C), 32)

    @property
    def group_blocks(self) -> int:
        """How many such programs a statistic group needs."""
        return self.NG if self.CG > 1 else triton.cdiv(self.C, self.group_block)

    @property
    def inv_m(self) -> float:
        return 1.0 / (self.S * self.CG)

    def chunks(self) -> tuple[int, int]:
        chunks, rows = chunks_of(self.S, self.block_s, self.G * triton.cdiv(self.C, self.block_c))
        while chunks > 1 and chunks * self.group_block > MERGED:
            chunks, rows = chunks // 2, rows * 2
        return chunks, rows

    @property
    def tiles(self) -> int:
        """Programs of the elementwise kernels."""
        return self.G * triton.cdiv(self.S, self.block_s) * triton.cdiv(self.C, self.block_c)


def plan(x: Tensor, groups: int, channels_a_group: int, may_be_resident: bool = True) -> Plan:
    n, C, P = planes(x)
    S, last = n // groups * P, is_channels_last(x) or P == 1
    run = x.element_size() * (1 if last else P)  # bytes that lie together for one channel
    if channels_a_group == 1:
        block_c = min(power_of_2(C), power_of_2(triton.cdiv(SECTOR, run)))
        wasteful = False
    else:
        block_c = power_of_2(channels_a_group)
        wasteful = run * channels_a_group < SECTOR and channels_a_group < C and P >= LEAST_PIXELS
    block_s = power_of_2(S)
    resident = may_be_resident and not wasteful and block_s * block_c <= RESIDENT
    if not resident:
        block_s, block_c = tile(S, C, P, last)
    return Plan(S, C, P, channels_a_group, groups, last, resident, block_s, block_c)


def declines_plan(p: Plan) -> str:
    """Why these kernels leave a group norm to the reference, or ""."""
    if p.CG > 1 and not p.resident and (p.P < LEAST_PIXELS or power_of_2(p.CG) > MERGED):
        return f"a group of {p.CG} channels by {p.S} pixels fits neither registers ({RESIDENT} elements) nor streaming"
    return ""


def _elements(p: Plan, x: Tensor, activation: str | None = None) -> dict[str, Any]:
    """Constants of a kernel that visits elements."""
    chosen = {} if activation is None else {"ACTIVATION": activation}
    return {**chosen, "CHANNELS_LAST": p.channels_last, "WIDE": wide(x), "BLOCK_S": p.block_s, "BLOCK_C": p.block_c}


def _resident(p: Plan, kernel: Any, parts: int, activation: str, x: Tensor, *arguments: Any) -> None:
    """A kernel that holds `parts` by blocks of groups in registers; arguments: all of them, x among them."""
    constants = _elements(p, x, activation)
    blocks = {name: constants.pop(name) for name in ("BLOCK_S", "BLOCK_C")}
    warps = min(16, max(1, p.block_s * p.block_c // 512))
    constants = {**constants, "PER_CHANNEL": p.CG == 1, **blocks}
    launch(kernel, parts * p.group_blocks, *arguments, num_warps=warps, **constants)


def _sums(
    p: Plan, kernel: Any, words: int, activation: str, eps: float, slope: float, x: Tensor, *tensors: Tensor | None
) -> Tensor:
    """[words, G, chunks, C] float32: sums of each chunk and channel."""
    chunks, rows = p.chunks()
    sums = x.new_empty(words, p.G, chunks, p.C, dtype=torch.float32)
    numbers = p.S, p.C, p.P, p.CG, chunks, rows, p.G * chunks, eps, slope
    programs = p.G * chunks * triton.cdiv(p.C, p.block_c)
    launch(kernel, programs, *tensors, sums, *numbers, **_elements(p, x, activation))
    return sums


def _merge(p: Plan, kernel: Any, *arguments: Any) -> None:
    """A kernel that merges the chunks of each group's sums."""
    constants = {"PER_CHANNEL": p.CG == 1, "CHUNKS": p.chunks()[0], "BLOCK_C": p.group_block}
    launch(kernel, p.G * p.group_blocks, *arguments, **constants)


def _statistics(p: Plan, x: Tensor, mean: Tensor, var: Tensor) -> None:
    """mean and var of a dense x, streamed."""
    chunks, rows = p.chunks()
    moments = x.new_empty(2, p.G, chunks, p.C, dtype=torch.float32)
    programs = p.G * chunks * triton.cdiv(p.C, p.block_c)
    launch(moments_kernel, programs, x, *moments, p.S, p.C, p.P, chunks, rows, **_elements(p, x))
    _merge(p, merge_moments_kernel, *moments, mean, var, p.S, p.C, p.CG, p.group_blocks, rows, p.inv_m)


def batch_statistics(x: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """(mean, var) [G, C] of a batch norm's statistic groups, float32, in one pass over x."""
    p = plan(x, groups, 1, may_be_resident=False)
    mean, var = (x.new_empty(groups, p.C, dtype=torch.float32) for _ in range(2))
    _statistics(p, dense(x, is_channels_last(x)), mean, var)
    return mean, var


def forward(p: Plan, x, weight, bias, eps, activation, slope, statistics=None, elementwise=True):
    """(y, mean, var) [G, NG] float32; statistics: (mean, var) given, as in eval mode; elementwise as in `laid_out`."""
    x = dense(x, is_channels_last(x))
    weight, bias = contiguous(weight, bias)
    y, slope = empty_result(x, elementwise), float(slope)
    mean, var = statistics or (x.new_empty(p.G, p.NG, dtype=torch.float32) for _ in range(2))
    tensors, sizes = (x, weight, bias, mean, var, y), (p.S, p.C, p.P, p.CG)
    if p.resident and statistics is None:
        numbers = *sizes, p.group_blocks, p.inv_m, eps, slope
        _resident(p, resident_kernel, p.G, activation, x, *tensors, *numbers)
        return y, mean, var
    if statistics is None:
        _statistics(p, x, mean, var)
    launch(norm_act_kernel, p.tiles, *tensors, *sizes, eps, slope, **_elements(p, x, activation))
    return y, mean, var


def _parts(p: Plan) -> tuple[int, int]:
    """(parts, statistic groups in each) of the resident backwards: as many parts as keep a card busy."""
    parts = min(p.G, triton.cdiv(PROGRAMS, p.group_blocks))
    each = triton.cdiv(p.G, parts)
    return triton.cdiv(p.G, each), each


def backward(p: Plan, dy, x, weight, bias, mean, var, training, eps, activation, slope):
    """(dx, dweight, dbias) with [C] float32 gradients."""
    dy, x = (dense(t, is_channels_last(x)) for t in (dy, x))
    weight, bias, mean, var = contiguous(weight, bias, mean, var)
    dx, slope, inv_m = torch.empty_like(x), float(slope), p.inv_m if training else 0.0
    sizes, tensors = (p.S, p.C, p.P, p.CG), (dy, x, weight, bias, mean, var)
    parts, each = _parts(p) if p.resident else (p.G, 1)
    dbias, dweight = (x.new_empty(parts, p.C, dtype=torch.float32) for _ in range(2))
    if p.resident:
        numbers = *sizes, p.group_blocks, p.G, each, inv_m, eps, slope
        _resident(p, resident_backward_kernel, parts, activation, x, *tensors, dx, dbias, dweight, *numbers)
    else:
        sums = _sums(p, backward_sums_kernel, 2, activation, eps, slope, x, *tensors)
        means = x.new_empty(2, p.G, p.NG, dtype=torch.float32)
        numbers = p.C, p.CG, p.group_blocks, p.G, inv_m
        _merge(p, merge_backward_kernel, sums, weight, means, dbias, dweight, *numbers)
        warps = 8 if wide(x) else 4  # at 4, 64-bit offsets made 8 spilled bytes on sm_86 and sm_89
        options = dict(num_warps=warps, **_elements(p, x, activation))
        launch(norm_act_backward_kernel, p.tiles, *tensors, means, dx, *sizes, p.G, eps, slope, **options)
    dweight, dbias = column_sums(dweight, dbias)
    return dx, dweight, dbias


def double_backward(p: Plan, dy, ddx, ddweight, ddbias, x, weight, bias, mean, var, training, eps, activation, slope):
    """(d_dy, d_x, d_weight) with d_weight [C] float32."""
    last = is_channels_last(x)
    dy, x, ddx = dense(dy, last), dense(x, last), None if ddx is None else dense(ddx, last)
    ddweight, ddbias, weight, bias, mean, var = contiguous(ddweight, ddbias, weight, bias, mean, var)
    d_dy, d_x = torch.empty_like(x), torch.empty_like(x)
    slope, inv_m = float(slope), p.inv_m if training else 0.0
    sizes, tensors = (p.S, p.C, p.P, p.CG), (dy, ddx, ddweight, ddbias, x, weight, bias, mean, var)
    parts, each = _parts(p) if p.resident else (p.G, 1)
    d_weight = x.new_empty(parts, p.C, dtype=torch.float32)
    if p.resident:
        numbers = *sizes, p.group_blocks, p.G, each, inv_m, eps, slope
        _resident(p, resident_double_backward_kernel, parts, activation, x, *tensors, d_dy, d_x, d_weight, *numbers)
        return d_dy, d_x, column_sums(d_weight)[0]
    kernel, read = double_backward_sums_kernel, (dy, ddx, x, weight, bias, mean, var)
    sums = _sums(p, kernel, 5, activation, eps, slope, x, *read)
    coefficients = x.new_empty(5, p.G, p.NG, dtype=torch.float32)
    numbers = p.C, p.CG, p.group_blocks, p.G, eps, inv_m
    _merge(p, merge_double_backward_kernel, sums, weight, ddweight, var, coefficients, d_weight, *numbers)
    # 8 elements a thread: at 16, five tensors in float32 spilled on sm_80
    options = dict(num_warps=8, **_elements(p, x, activation))
    tensors = *tensors, coefficients, d_dy, d_x
    launch(norm_act_double_backward_kernel, p.tiles, *tensors, *sizes, p.G, eps, slope, **options)
    return d_dy, d_x, column_sums(d_weight)[0]


# ---- for ahead-of-time compilation -----------------------------------------------------------------------------------


def static_cases():
    """Both routes of both norms: DCGAN layers streamed and resident, a group norm, a layer norm, 2^31 elements."""
    return recorded(
        run
        for dtype in FLOATS
        for shape, last, groups, channels_a_group in [
            ((128, 64, 32, 32), True, 2, 1),
            ((128, 64, 32, 32), False, 2, 1),
            ((64, 512, 4, 4), True, 1, 1),
            ((64, 512, 4, 4), False, 1, 1),
            ((64, 128, 64, 64), True, 64, 8),
            ((64, 128, 16, 16), False, 64, 4),
            ((4096, 1024), False, 4096, 1024),
            ((512, 64, 256, 256), True, 2, 1),
        ]
        for run in _every_direction(meta(shape, dtype, last), groups, channels_a_group)
    )


def _every_direction(x, groups, channels_a_group):
    p = plan(x, groups, channels_a_group)
    weight, bias = (meta((p.C,), torch.float32) for _ in range(2))
    mean, var = (meta((p.G, p.NG), torch.float32) for _ in range(2))
    scalars = 1e-5, "leaky_relu", 0.2
    yield lambda: forward(p, x, weight, bias, *scalars)
    yield lambda: forward(plan(x, groups, channels_a_group, False), x, weight, bias, *scalars, (mean, var))
    yield lambda: backward(p, x, x, weight, bias, mean, var, True, *scalars)
    for ddx, dd in ((x, weight), (None, None)):
        yield lambda ddx=ddx, dd=dd: double_backward(p, x, ddx, dd, dd, x, weight, bias, mean, var, True, *scalars)
