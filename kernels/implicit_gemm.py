"""What the three convolution kernels share: the implicit GEMM over taps and channels, its epilogues, its second stage.

Tensors are channels_last in memory: x is [N, H, W, C], y is [N, OH, OW, K], a weight [A, R, S, B] (of PyTorch's
[A, B, R, S]). A convolution is then a matrix product whose rows are output pixels, whose columns are output channels
and whose inner index runs over taps and input channels; the left matrix is never made, its tiles are gathered from x.

Forward and adjoint differ in where the taps lie and nowhere else: per axis, tap t of an output pixel reads the input at
`origin + t step`. So one loop serves both.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgan.kernels.launching import declines as declines_activations
from fastgan.kernels.launching import launch, power_of_2, tile, wide
from fastgan.kernels.numerics import activate, merge_moments


@triton.jit
def next_tap(th, tw, c0, TH, TW, BLOCK_K: tl.constexpr):
    """The step after tap (th, tw) of the channels from c0: taps run fastest, so that neighbouring taps find the pixels
    that they share in the cache."""
    tw += 1
    row_ends = tw == TW
    tw = tl.where(row_ends, 0, tw)
    th = tl.where(row_ends, th + 1, th)
    ends = th == TH
    th = tl.where(ends, 0, th)
    return th, tw, tl.where(ends, c0 + BLOCK_K, c0)


@triton.jit
def gather_gemm(
    x, weight, base, row, column, inside, k, is_output, H, W, C, CG, TH, TW, step_h, step_w,
    stride_c, stride_k, stride_th, stride_tw, split,
    SPLITS: tl.constexpr, PRECISION: tl.constexpr, FLAT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip  # by kind: tensors, sizes, constants
    """acc[m, k] = sum over taps (th, tw) and channels c < CG of
    x[base[m] + ((row[m] + th step_h) W + column[m] + tw step_w) C + c] weight[th, tw, c, k], in float32.

    base [M]: offset of the sample and its group's first channel. FLAT: taps and channels form one inner index, for
    inputs whose CG channels fill no block (the 3 of an image: 48 of 64 places used at 4x4, not 3 of 16).
    split: which of SPLITS equal parts of the inner index to sum.
    """
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    inner = tl.arange(0, BLOCK_K)
    taps = TH * TW
    if FLAT:
        steps = tl.cdiv(taps * CG, BLOCK_K)
    else:
        steps = taps * tl.cdiv(CG, BLOCK_K)
    part = tl.cdiv(steps, SPLITS)
    first = split * part
    last = tl.minimum(first + part, steps)
    if FLAT:
        for step in range(first, last):
            j = step * BLOCK_K + inner
            tap = j // CG
            c = j - tap * CG
            th = tap // TW
            tw = tap - th * TW
            is_inner = j < taps * CG
            h = row[:, None] + (th * step_h)[None, :]
            w = column[:, None] + (tw * step_w)[None, :]
            there = inside[:, None] & is_inner[None, :] & (h >= 0) & (h < H) & (w >= 0) & (w < W)
            a = tl.load(x + base[:, None] + (h * W + w) * C + c[None, :], mask=there, other=0.0)
            at = th * stride_th + tw * stride_tw + c * stride_c
            b = tl.load(
                weight + at[:, None] + k[None, :] * stride_k, mask=is_inner[:, None] & is_output[None, :], other=0.0
            )
            acc = tl.dot(a, b, acc, input_precision=PRECISION)
    else:
        some = tl.maximum(taps, 1)  # a phase without taps makes no step, yet divides here
        tap = first % some
        c0 = first // some * BLOCK_K
        th = tap // TW
        tw = tap - th * TW
        for _ in range(first, last):
            c = c0 + inner
            h = row + th * step_h
            w = column + tw * step_w
            there = inside & (h >= 0) & (h < H) & (w >= 0) & (w < W)
            is_inner = c < CG
            a = tl.load(
                x + (base + (h * W + w) * C)[:, None] + c[None, :], mask=there[:, None] & is_inner[None, :], other=0.0
            )
            at = th * stride_th + tw * stride_tw
            b = tl.load(
                weight + at + c[:, None] * stride_c + k[None, :] * stride_k,
                mask=is_inner[:, None] & is_output[None, :],
                other=0.0,
            )
            acc = tl.dot(a, b, acc, input_precision=PRECISION)
            th, tw, c0 = next_tap(th, tw, c0, TH, TW, BLOCK_K)
    return acc


@triton.jit
def store_moments(moments, v, inside, channel, is_output, part, parts, columns, counts):
    """Part `part` of moments: of each channel of v [M, K] the mean over the rows inside and the sum of squared
    differences from it, and how many rows those are, where this program is the one that counts them.

    moments: [2, parts, columns] and then the counts [parts]. The tile's own mean comes first, from registers, so that
    a large mean costs no digits.
    """
    n = tl.sum(inside.to(tl.float32), 0)
    mean = tl.sum(tl.where(inside[:, None], v, 0.0), 0) / tl.maximum(n, 1.0)
    d = tl.where(inside[:, None], v - mean[None, :], 0.0)
    at = moments + part * columns + channel
    tl.store(at, mean, mask=is_output)
    tl.store(at + parts * columns, tl.sum(d * d, 0), mask=is_output)
    tl.store(moments + 2 * parts * columns + part, n, mask=counts)


@triton.jit
def store_tile(
    y, bias, moments, acc, at, inside, channel, is_output, part, parts, columns, counts, slope, split, size,
    SPLITS: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip  # by kind: tensors, sizes, constants
    """y[at + channel] = phi(acc + bias[channel]), and the moments of these numbers as y holds them, where there are
    moments; with several splits the bare sum, to part `split` of y."""
    where = at[:, None] + channel[None, :]
    mask = inside[:, None] & is_output[None, :]
    if SPLITS > 1:
        tl.store(y + split.to(tl.int64) * size + where, acc, mask=mask)
    else:
        if bias is not None:
            acc += tl.load(bias + channel, mask=is_output, other=0.0).to(tl.float32)[None, :]
        rounded = activate(acc, slope, ACTIVATION).to(y.dtype.element_ty)
        tl.store(y + where, rounded, mask=mask)
        if moments is not None:
            store_moments(moments, rounded.to(tl.float32), inside, channel, is_output, part, parts, columns, counts)


@triton.jit
def merge_splits_kernel(
    partial, bias, y, size, K, slope, SPLITS: tl.constexpr, ACTIVATION: tl.constexpr, WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip  # by kind: tensors, sizes, constants
    """y[e] = phi(sum over splits of partial[split, e] + bias[e % K]), in the order of the splits: no atomics, so a
    result is the same at every run.

    Bound: SPLITS + 1 accesses an element and 2 flops; y is small where a product is split at all.
    """
    program = tl.program_id(0)
    if WIDE:
        program = program.to(tl.int64)
    e = program * BLOCK + tl.arange(0, BLOCK)
    mask = e < size
    total = tl.zeros((BLOCK,), tl.float32)
    for split in tl.static_range(SPLITS):
        total += tl.load(partial + split * size + e, mask=mask, other=0.0)
    if bias is not None:
        total += tl.load(bias + e % K, mask=mask, other=0.0).to(tl.float32)
    tl.store(y + e, activate(total, slope, ACTIVATION).to(y.dtype.element_ty), mask=mask)


@triton.jit
def merge_splits_moments_kernel(
    partial, bias, y, moments, size, M, K, parts,
    SPLITS: tl.constexpr, WIDE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip  # by kind: tensors, sizes, constants
    """merge_splits_kernel with the moments of y: one program a tile of the M rows of a statistic group by channels.

    Bound: SPLITS + 1 accesses an element.
    """
    tiles_n = tl.cdiv(K, BLOCK_N)
    tiles_m = tl.cdiv(M, BLOCK_M)
    n_tile = tl.program_id(0) % tiles_n
    part = tl.program_id(0) // tiles_n
    m = part % tiles_m * BLOCK_M + tl.arange(0, BLOCK_M)
    k = n_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = m < M
    is_output = k < K
    m += part // tiles_m * M
    if WIDE:
        m = m.to(tl.int64)
    at = (m * K)[:, None] + k[None, :]
    mask = inside[:, None] & is_output[None, :]
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for split in tl.static_range(SPLITS):
        total += tl.load(partial + split * size + at, mask=mask, other=0.0)
    if bias is not None:
        total += tl.load(bias + k, mask=is_output, other=0.0).to(tl.float32)[None, :]
    rounded = total.to(y.dtype.element_ty)
    tl.store(y + at, rounded, mask=mask)
    store_moments(moments, rounded.to(tl.float32), inside, k, is_output, part, parts, K, n_tile == 0)


@triton.jit
def finish_moments_kernel(
    moments, mean, var, rows, parts, repeat, K, blocks, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr
):
    """mean and var [G, K] from moments [2, parts, repeat K] and counts [parts]: one program a statistic group of `rows`
    rows of K moments by BLOCK_C channels; `repeat` neighbouring rows share a count.

    Chan's merge from block to block of rows, in their order. The first part of a group is never empty, others may be.
    Bound: 8 bytes a part and column; one launch.
    """
    g = tl.program_id(0) // blocks
    c = tl.program_id(0) % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    size = parts * repeat * K
    count = 0.0
    average = tl.zeros((BLOCK_C,), tl.float32)
    squares = tl.zeros((BLOCK_C,), tl.float32)
    for start in range(0, rows, BLOCK_P):
        r = start + tl.arange(0, BLOCK_P)
        row = g * rows + r
        at = row[:, None] * K + c[None, :]
        mask = (r < rows)[:, None] & (c < K)[None, :]
        n = tl.load(moments + 2 * size + row // repeat, mask=r < rows, other=0.0)
        m = tl.load(moments + at, mask=mask, other=0.0)
        s = tl.load(moments + size + at, mask=mask, other=0.0)
        total = tl.sum(n, 0)
        centre = tl.sum(n[:, None] * m, 0) / tl.maximum(total, 1.0)
        d = m - centre[None, :]
        s += n[:, None] * d * d
        count, average, squares = merge_moments(count, average, squares, total, centre, tl.sum(s, 0))
    tl.store(mean + g * K + c, average, mask=c < K)
    tl.store(var + g * K + c, squares / count, mask=c < K)


# ---- launching ------------------------------------------------------------------------------------------------------

MERGE_BLOCK = 1024  # elements a program of the second stage writes: 8 a thread
FINISH_CHANNELS = 8  # of a finishing program: 32 bytes of a row, the least that memory moves
FINISHED = 8192  # moments that a finishing program holds of each kind: 1,024 parts of 8 channels, 32 a thread


def merge_splits(partial: Tensor, bias: Tensor | None, y: Tensor, channels: int, slope: float, activation: str) -> None:
    """y = phi(partial.sum(0) + bias), elements in memory order, channels innermost."""
    size = y.numel()
    numbers, place = (size, channels, float(slope)), {"WIDE": partial.numel() >= 2**31, "BLOCK": MERGE_BLOCK}
    constants = dict(SPLITS=partial.shape[0], ACTIVATION=activation, **place)
    launch(merge_splits_kernel, triton.cdiv(size, MERGE_BLOCK), partial, bias, y, *numbers, **constants)


class Statistics:
    """The moments of a convolution's output, part by part, on their way to mean and var of `groups` statistic groups.

    repeat: neighbouring columns of the launched product that are one channel's (the pixels of a 1x1 input's product).
    """

    moments: Tensor
    parts: int

    def __init__(self, groups: int, repeat: int = 1):
        self.groups, self.repeat = groups, repeat

    def room(self, y: Tensor, parts: int, columns: int) -> Tensor:
        """[2, parts, columns] and [parts], flat, for an epilogue that leaves `parts` parts."""
        self.parts = parts
        self.moments = torch.empty(parts * (2 * columns + 1), dtype=torch.float32, device=y.device)
        return self.moments

    def merge_splits(self, partial: Tensor, bias: Tensor | None, y: Tensor, columns: int) -> None:
        """y = partial.sum(0) + bias with its moments; y's elements in memory order, `columns` of them innermost."""
        rows = y.numel() // columns // self.groups
        block_m, block_n = tile(rows, columns, 1, True)
        tiles, parts = triton.cdiv(columns, block_n), self.groups * triton.cdiv(rows, block_m)
        tensors, sizes = (partial, bias, y, self.room(y, parts, columns)), (y.numel(), rows, columns, parts)
        constants = dict(SPLITS=partial.shape[0], WIDE=partial.numel() >= 2**31, BLOCK_M=block_m, BLOCK_N=block_n)
        launch(merge_splits_moments_kernel, parts * tiles, *tensors, *sizes, **constants)

    def finish(self, channels: int) -> tuple[Tensor, Tensor]:
        """(mean, var) [G, K], float32."""
        mean = self.moments.new_empty(self.groups, channels)
        var, rows = torch.empty_like(mean), self.parts // self.groups * self.repeat
        block_c = min(power_of_2(channels), FINISH_CHANNELS)
        block_p, blocks = min(power_of_2(rows), FINISHED // block_c), triton.cdiv(channels, block_c)
        sizes, warps = (rows, self.parts, self.repeat, channels, blocks), min(8, max(1, block_p * block_c // 256))
        constants = dict(num_warps=warps, BLOCK_P=block_p, BLOCK_C=block_c)
        launch(finish_moments_kernel, self.groups * blocks, self.moments, mean, var, *sizes, **constants)
        return mean, var


def convolve(kernel, tensors, parts, columns, numbers, epilogue, product, statistics, config):
    """y of tensors (x, weight, bias, y), by a convolution's kernel and, where it is split, by the second stage.

    parts: tiles of rows, of all statistic groups and phases. columns: output channels of a group. numbers: the kernel's
    own, before y's size. The moments of y go to `statistics`.
    """
    (x, weight, bias, y), (activation, slope), whole = tensors, epilogue, config.splits == 1
    k, out = y.shape[1], y if whole else spread(y, config.splits)
    moments = statistics.room(y, parts, k) if statistics and whole else None
    programs = parts * triton.cdiv(columns, config.block_n) * (k // columns) * config.splits
    constants = dict(SPLITS=config.splits, ACTIVATION=activation if whole else "identity", PRECISION=product.precision)
    constants |= dict(FLAT=product.flat(config), WIDE=wide(x, y), **config.blocks)
    given = x, weight, bias if whole else None, out, moments, *numbers, y.numel(), float(slope)
    launch(kernel, programs, *given, **constants, **config.options)
    if not whole and statistics:
        statistics.merge_splits(out, bias, y, k)
    elif not whole:
        merge_splits(out, bias, y, k, slope, activation)
    return y


def declines(x: Tensor, *rest: Tensor | None) -> str:
    """Why the convolution kernels leave a case to the reference, or ""."""
    reason = declines_activations(x, *rest)
    if reason:
        return reason
    if any(t is not None and t.dim() not in (1, 4) for t in (x, *rest)):
        return "triton convolutions take batched 4-D tensors"
    if any(t is not None and t.numel() // t.shape[0] >= 2**31 for t in (x, *rest)):
        return "triton convolutions take samples below 2^31 elements"
    if x.device.type == "cuda" and not torch.version.hip and torch.cuda.get_device_capability(x.device) < (8, 0):
        return "triton's dots compile to scalar FMA with spills below sm_80"
    return ""


def declines_statistics(y: tuple[int, ...], stat_groups: int) -> str:
    """Why the epilogues make no moments of a y of this shape, or ""."""
    if stat_groups < 1 or y[0] % stat_groups:
        return f"stat_groups must divide the batch, got {stat_groups} and {y[0]}"
    if math.prod(y) >= 2**33:  # two moments of every 16 pixels at the least, in 32-bit offsets
        return "triton convolutions make statistics of fewer than 2^33 elements"
    return ""


def spread(tensor: Tensor, splits: int) -> Tensor:
    """Room for the parts of a split sum."""
    return torch.empty((splits, tensor.numel()), dtype=torch.float32, device=tensor.device)
