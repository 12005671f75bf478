"""Triton kernel of `conv2d_weight`: a product over all pixels, split over programs and summed in a fixed order."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgan._layout import CHANNELS_LAST, empty
from fastgan.choice import Backend
from fastgan.kernels.configs import Config, Product, every_candidate, precision, tuned
from fastgan.kernels.implicit_gemm import declines, merge_splits, spread
from fastgan.kernels.launching import launch, meta, wide
from fastgan.ops.conv2d_weight import weight_shape

# Bound: 2 K (taps C/groups) pixels flops; x, dy once. Its output is small (1 M elements at 256 x 256 x 16) and its
# inner index long (131,072 pixels of a DCGAN layer): at 128 x 128 the tiles would fill 64 of 132 multiprocessors. So
# the pixels are split, and each part's sum goes to memory in float32 (8 bytes an element and split, written and read).


@triton.jit
def conv2d_weight_kernel(
    x, dy, dweight, pixels, H, W, OH, OW, C, CG, K, KG, R, S, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w,
    out_k, out_tap, out_c, size, SPLITS: tl.constexpr, PRECISION: tl.constexpr, FLAT: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip  # by kind: tensors, sizes, constants
    """x [N,H,W,C], dy [N,OH,OW,K] -> dweight[k, tap, c] at k out_k + tap out_tap + c out_c, or its SPLITS parts.

    One program a tile of KG output channels by columns (tap, c) of a group, over one part of the pixels. FLAT: columns
    of several taps in a tile, for inputs whose CG channels fill no block. Parts run slowest: programs that run
    together read the same pixels.
    """
    # ---- which tile of which part
    tiles_m = tl.cdiv(KG, BLOCK_M)
    if FLAT:
        tiles_n = tl.cdiv(R * S * CG, BLOCK_N)
    else:
        tiles_n = R * S * tl.cdiv(CG, BLOCK_N)
    program = tl.program_id(0)
    m_tile = program % tiles_m
    program = program // tiles_m
    n_tile = program % tiles_n
    program = program // tiles_n
    split = program % SPLITS
    group = program // SPLITS
    k = m_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    is_k = k < KG
    # ---- which taps and channels: one tap a tile, or one a column
    if FLAT:
        column = n_tile * BLOCK_N + tl.arange(0, BLOCK_N)
        tap = column // CG
        c = column - tap * CG
        is_column = tap < R * S
    else:
        tap = n_tile % (R * S)
        c = n_tile // (R * S) * BLOCK_N + tl.arange(0, BLOCK_N)
        is_column = c < CG
    tap_row = tap // S
    tap_h = tap_row * dilation_h - pad_h
    tap_w = (tap - tap_row * S) * dilation_w - pad_w
    # ---- sum over this part's pixels
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    part = tl.cdiv(tl.cdiv(pixels, BLOCK_K), SPLITS) * BLOCK_K
    begin = split * part
    for start in range(begin, tl.minimum(begin + part, pixels), BLOCK_K):
        p = start + tl.arange(0, BLOCK_K)
        is_pixel = p < pixels
        row = p // OW
        ow = p - row * OW
        sample = row // OH
        row = row - sample * OH
        if WIDE:
            sample = sample.to(tl.int64)
            p = p.to(tl.int64)
        a = tl.load(dy + (p * K + group * KG)[:, None] + k[None, :], mask=is_pixel[:, None] & is_k[None, :], other=0.0)
        base = sample * (H * W * C) + group * CG
        if FLAT:
            h = (row * stride_h)[:, None] + tap_h[None, :]
            w = (ow * stride_w)[:, None] + tap_w[None, :]
            there = is_pixel[:, None] & (h >= 0) & (h < H) & (w >= 0) & (w < W)
            at = base[:, None] + (h * W + w) * C
        else:
            h = row * stride_h + tap_h
            w = ow * stride_w + tap_w
            there = (is_pixel & (h >= 0) & (h < H) & (w >= 0) & (w < W))[:, None]
            at = (base + (h * W + w) * C)[:, None]
        b = tl.load(x + at + c[None, :], mask=there & is_column[None, :], other=0.0)
        acc = tl.dot(tl.trans(a), b, acc, input_precision=PRECISION)
    # ---- store, or leave to the second stage
    at = (group * KG + k)[:, None] * out_k + (tap * out_tap + c * out_c)[None, :]
    mask = is_k[:, None] & is_column[None, :]
    tl.store(dweight + split.to(tl.int64) * size + at, acc.to(dweight.dtype.element_ty), mask=mask)


def _launch(
    x: Tensor, dy: Tensor, shape: tuple, geometry: tuple, weight_channels_last: bool, product: Product, config: Config
) -> Tensor:
    """x and dy in channels_last -> dweight in either layout."""
    (n, c, h, w), (_, k, oh, ow), (_, cg, r, s) = x.shape, dy.shape, shape
    groups, split = c // cg, config.splits > 1
    # the second stage runs over memory in order, so the parts must lie in the order of what it writes
    dweight = empty(shape, x, weight_channels_last)
    out = spread(dweight, config.splits) if split else dweight
    strides = (r * s * cg, cg, 1) if weight_channels_last else (r * s * cg, 1, r * s)
    flat, kg = product.flat(config), k // groups
    columns = triton.cdiv(r * s * cg, config.block_n) if flat else r * s * triton.cdiv(cg, config.block_n)
    programs = triton.cdiv(kg, config.block_m) * columns * groups * config.splits
    sizes = n * oh * ow, h, w, oh, ow, c, cg, k, kg, r, s
    constants = dict(SPLITS=config.splits, PRECISION=product.precision, FLAT=flat, WIDE=wide(x, dy), **config.blocks)
    numbers = *sizes, *geometry, *strides, dweight.numel()
    launch(conv2d_weight_kernel, programs, x, dy, out, *numbers, **constants, **config.options)
    if split:
        merge_splits(out, None, dweight, 1, 0.0, "identity")
    return dweight


def conv2d_weight(x, dy, kernel, stride, padding, dilation, groups, weight_channels_last):
    shape = weight_shape(x, dy, kernel, groups)
    x_, dy_ = (t.contiguous(memory_format=CHANNELS_LAST) for t in (x, dy))
    k, cg, r, s = shape
    product = Product(k // groups, r * s * cg, dy[:, 0].numel(), groups, cg, "n", precision(x))
    geometry = (*stride, *padding, *dilation)

    def run(config):
        return _launch(x_, dy_, shape, geometry, weight_channels_last, product, config)

    case = tuple(x.shape), tuple(dy.shape), shape, geometry, weight_channels_last
    return tuned("conv2d_weight", x_, product, case, run)


LAUNCHERS = {"conv2d_weight": Backend(conv2d_weight, lambda x, dy, *rest: declines(x, dy))}


def static_cases():
    """Every tile of every dtype, on a layer whose channels fill it and, gathered by element, on an RGB image."""
    return every_candidate(lambda channels, dtype: conv2d_weight(*_arguments(*channels, dtype)), [(128, 256), (3, 64)])


def _arguments(c: int, k: int, dtype: torch.dtype) -> tuple:
    x, dy = meta((128, c, 32, 32), dtype, True), meta((128, k, 16, 16), dtype, True)
    return x, dy, [4, 4], [2, 2], [1, 1], [1, 1], 1, True
