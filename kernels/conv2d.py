"""Triton kernel of `conv2d` and `conv2d_statistics`: implicit GEMM over output pixels, with bias and activation in its
epilogue, or bias and the statistics for a batch norm."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgan._layout import CHANNELS_LAST, empty, laid_out
from fastgan._op import OPS
from fastgan.choice import Backend
from fastgan.kernels.configs import APART, Config, Product, every_candidate, precision, tuned
from fastgan.kernels.implicit_gemm import Statistics, convolve, declines, declines_statistics, gather_gemm, store_tile
from fastgan.kernels.launching import meta
from fastgan.kernels.normalisation import batch_statistics
from fastgan.ops.conv2d import channels_last, output_shape

# Bound: 2 M K taps C/groups flops; x, weight and y once. A DCGAN layer (k4 s2, 128 to 256 channels, 16x16 out, batch
# 128) makes 34 GFLOP of 51 MB in bf16: 670 flops a byte, above the 300 at which an H100 turns from memory to its tensor
# cores. So the tile is large (128 x 128: 128 flops an element loaded) wherever it still fills the card; layers with 3
# channels at an end are bound by memory at any tile, there BLOCK_N = 16 wastes only idle tensor cores.


@triton.jit
def conv2d_kernel(
    x, weight, bias, y, moments, M, G, H, W, OH, OW, C, CG, K, KG, R, S, stride_h, stride_w, pad_h, pad_w,
    dilation_h, dilation_w, size, slope,
    SPLITS: tl.constexpr, ACTIVATION: tl.constexpr, PRECISION: tl.constexpr, FLAT: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip  # by kind: tensors, sizes, constants
    """x [N,H,W,C], weight [K,R,S,CG], bias [K] or None -> y [N,OH,OW,K], or its SPLITS parts in float32; and moments of
    G statistic groups, or None (then G is 1).

    One program a tile of the M = N/G OH OW pixels of a statistic group by KG channels of a group: no tile straddles
    two. Channel tiles run fastest, so that programs that run together read the same pixels.
    """
    # ---- which tile
    tiles_n = tl.cdiv(KG, BLOCK_N)
    tiles_m = tl.cdiv(M, BLOCK_M)
    program = tl.program_id(0)
    n_tile = program % tiles_n
    program = program // tiles_n
    split = program % SPLITS
    program = program // SPLITS
    part = program % (tiles_m * G)
    group = program // (tiles_m * G)
    # ---- which pixels and channels
    m = part % tiles_m * BLOCK_M + tl.arange(0, BLOCK_M)
    k = n_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = m < M
    is_output = k < KG
    m += part // tiles_m * M
    row = m // OW
    column = m - row * OW
    sample = row // OH
    row = row - sample * OH
    if WIDE:
        sample = sample.to(tl.int64)
        m = m.to(tl.int64)
    acc = gather_gemm(
        x, weight + group * KG * (R * S * CG), sample * (H * W * C) + group * CG,
        row * stride_h - pad_h, column * stride_w - pad_w, inside, k, is_output,
        H, W, C, CG, R, S, dilation_h, dilation_w, 1, R * S * CG, S * CG, CG, split,
        SPLITS, PRECISION, FLAT, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip  # by kind, and Triton takes no *arguments
    store_tile(
        y, bias, moments, acc, m * K, inside, group * KG + k, is_output, part, tiles_m * G, K,
        (n_tile == 0) & (group == 0), slope, split, size, SPLITS, ACTIVATION,
    )  # fmt: skip  # by kind, and Triton takes no *arguments


def _launch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    shape: tuple,
    geometry: tuple,
    epilogue: Any,
    product: Product,
    statistics: Statistics | None,
    config: Config,
) -> Tensor:
    """x and weight in channels_last -> y in channels_last; the moments of y go to `statistics`."""
    (n, c, h, w), (_, k, oh, ow), (_, cg, r, s) = x.shape, shape, weight.shape
    stat_groups = statistics.groups if statistics else 1
    m, kg = n // stat_groups * oh * ow, k // (c // cg)
    parts = stat_groups * triton.cdiv(m, config.block_m)
    tensors = x, weight, bias, empty(shape, x, True)
    numbers = m, stat_groups, h, w, oh, ow, c, cg, k, kg, r, s, *geometry
    return convolve(conv2d_kernel, tensors, parts, kg, numbers, epilogue, product, statistics, config)


def _case(x, weight, stride, padding, dilation, groups):
    """(x and weight in channels_last, shape of y, geometry, product) of a call."""
    shape = output_shape(x, weight, stride, padding, dilation)
    x_, weight_ = (t.contiguous(memory_format=CHANNELS_LAST) for t in (x, weight))
    product = Product(
        shape[0] * shape[2] * shape[3],
        shape[1] // groups,
        weight[0].numel(),
        groups,
        weight.shape[1],
        "k",
        precision(x),
    )
    return x_, weight_, shape, (*stride, *padding, *dilation), product


def conv2d(x, weight, bias, stride, padding, dilation, groups, activation, slope):
    x_, weight_, shape, geometry, product = _case(x, weight, stride, padding, dilation, groups)

    def run(config):
        return _launch(x_, weight_, bias, shape, geometry, (activation, slope), product, None, config)

    y = tuned("conv2d", x_, product, (tuple(x.shape), shape, tuple(weight.shape), geometry), run)
    return laid_out(y, channels_last(x, weight), activation != "identity")


def conv2d_statistics(x, weight, bias, stride, padding, dilation, groups, stat_groups):
    x_, weight_, shape, geometry, product = _case(x, weight, stride, padding, dilation, groups)
    product, epilogue = product._replace(statistics=True), ("identity", 0.0)

    def run(config: Config) -> tuple[Tensor, Tensor, Tensor]:
        if config == APART:
            y = OPS["conv2d"].run(x, weight, bias, stride, padding, dilation, groups, *epilogue)
            return y, *batch_statistics(y, stat_groups)
        statistics = Statistics(stat_groups)
        y = _launch(x_, weight_, bias, shape, geometry, epilogue, product, statistics, config)
        return laid_out(y, channels_last(x, weight)), *statistics.finish(shape[1])

    case = tuple(x.shape), shape, tuple(weight.shape), geometry, stat_groups
    return tuned("conv2d_statistics", x_, product, case, run, (APART,))


def _declines_statistics(x, weight, bias, stride, padding, dilation, groups, stat_groups):
    reason = declines(x, weight, bias)
    return reason or declines_statistics(output_shape(x, weight, stride, padding, dilation), stat_groups)


LAUNCHERS = {
    "conv2d": Backend(conv2d, lambda x, weight, bias, *rest: declines(x, weight, bias)),
    "conv2d_statistics": Backend(conv2d_statistics, _declines_statistics),
}


def static_cases():
    """Every tile of every dtype, on a layer whose channels fill it and, gathered by element, on an RGB image."""
    layers = [(128, 256), (3, 64)]
    return [
        *every_candidate(lambda channels, dtype: conv2d(*_arguments(*channels, dtype)), layers),
        *every_candidate(lambda channels, dtype: conv2d_statistics(*_arguments(*channels, dtype)[:-2], 1), layers),
    ]


def _arguments(c: int, k: int, dtype: torch.dtype) -> tuple:
    x, weight = meta((128, c, 32, 32), dtype, True), meta((k, c, 4, 4), dtype, True)
    return x, weight, meta((k,), dtype), [2, 2], [1, 1], [1, 1], 1, "tanh", 0.0
