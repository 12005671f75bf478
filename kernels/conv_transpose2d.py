"""Triton kernel of `conv_transpose2d` and `conv_transpose2d_statistics`: the adjoint of conv2d by output phase, each
phase a dense implicit GEMM."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

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
from fastgan.ops.conv2d import channels_last
from fastgan.ops.conv_transpose2d import output_shape

# Bound: each pair of an output pixel and a tap that reaches it costs 2 C/groups K flops, and no other pair is computed:
# a quarter of what zero insertion costs at stride 2. Bytes and tiles as for conv2d. Phases run next to each other (they
# read the same pixels of x, which then come from the L2 cache once), and channel tiles within them.


@triton.jit
def phase_taps(phase, stride, pad, dilation, kernel, step, inverse):
    """Of one axis and the outputs o = stride q + phase: how many taps reach them, the first of them, and the input
    that it reads at q = 0.

    Tap r reaches o from input (o + pad - dilation r) / stride where that divides. With g = gcd(dilation, stride) it
    needs g | phase + pad, and then r = first (mod step), step = stride / g; `inverse` is that of dilation / g mod step.
    Tap first + t step reads input origin + q - t dilation / g.
    """
    g = stride // step
    reach = phase + pad
    first = (reach // g) * inverse % step
    some = (reach % g == 0) & (first < kernel)
    count = tl.where(some, (kernel - first + step - 1) // step, 0)
    origin = tl.where(some, reach - dilation * first, 0) // stride
    return count, first, origin


@triton.jit
def conv_transpose2d_kernel(
    x, weight, bias, y, moments, M, G, H, W, QH, QW, OH, OW, C, CG, K, KG, R, S, stride_h, stride_w, pad_h, pad_w,
    dilation_h, dilation_w, step_h, step_w, inverse_h, inverse_w, phases_h, phases_w, size, slope,
    SPLITS: tl.constexpr, ACTIVATION: tl.constexpr, PRECISION: tl.constexpr, FLAT: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip  # by kind: tensors, sizes, constants
    """x [N,H,W,C], weight [C,R,S,KG], bias [K] or None -> y [N,OH,OW,K], or its SPLITS parts in float32; and moments of
    G statistic groups, or None (then G is 1).

    One program a tile of the M = N/G QH QW pixels (q_h, q_w) of one phase (f_h, f_w) of a statistic group, output
    pixel stride q + f, by KG channels of a group. A phase that no tap reaches is the bias alone.
    """
    # ---- which tile of which phase
    tiles_n = tl.cdiv(KG, BLOCK_N)
    tiles_m = tl.cdiv(M, BLOCK_M)
    program = tl.program_id(0)
    n_tile = program % tiles_n
    program = program // tiles_n
    phase_w = program % phases_w
    program = program // phases_w
    phase_h = program % phases_h
    program = program // phases_h
    split = program % SPLITS
    program = program // SPLITS
    m_tile = program % (tiles_m * G)
    group = program // (tiles_m * G)
    TH, first_h, origin_h = phase_taps(phase_h, stride_h, pad_h, dilation_h, R, step_h, inverse_h)
    TW, first_w, origin_w = phase_taps(phase_w, stride_w, pad_w, dilation_w, S, step_w, inverse_w)
    # ---- which pixels and channels
    m = m_tile % tiles_m * BLOCK_M + tl.arange(0, BLOCK_M)
    k = n_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    is_output = k < KG
    there = m < M
    m += m_tile // tiles_m * M
    row = m // QW
    column = m - row * QW
    sample = row // QH
    row = row - sample * QH
    out_row = row * stride_h + phase_h
    out_column = column * stride_w + phase_w
    inside = there & (out_row < OH) & (out_column < OW)
    if WIDE:
        sample = sample.to(tl.int64)
    acc = gather_gemm(
        x, weight + group * CG * (R * S * KG) + (first_h * S + first_w) * KG, sample * (H * W * C) + group * CG,
        row + origin_h, column + origin_w, inside, k, is_output,
        H, W, C, CG, TH, TW, -(dilation_h * step_h // stride_h), -(dilation_w * step_w // stride_w),
        R * S * KG, 1, step_h * S * KG, step_w * KG, split,
        SPLITS, PRECISION, FLAT, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip  # by kind, and Triton takes no *arguments
    at = ((sample * OH + out_row) * OW + out_column) * K
    part = (m_tile * phases_h + phase_h) * phases_w + phase_w
    store_tile(
        y, bias, moments, acc, at, inside, group * KG + k, is_output, part, tiles_m * G * phases_h * phases_w, K,
        (n_tile == 0) & (group == 0), slope, split, size, SPLITS, ACTIVATION,
    )  # fmt: skip  # by kind, and Triton takes no *arguments


class Geometry(NamedTuple):
    """A transposed convolution per axis; `step` and `inverse` as in phase_taps."""

    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]

    @property
    def steps(self) -> list[int]:
        return [s // math.gcd(s, d) for s, d in zip(self.stride, self.dilation, strict=True)]

    @property
    def inverses(self) -> list[int]:
        return [
            pow(d // math.gcd(s, d), -1, s // math.gcd(s, d)) if s > math.gcd(s, d) else 0
            for s, d in zip(self.stride, self.dilation, strict=True)
        ]


def _launch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    shape: tuple,
    geometry: Geometry,
    epilogue: Any,
    product: Product,
    statistics: Statistics | None,
    config: Config,
) -> Tensor:
    """x and weight in channels_last -> y in channels_last; the moments of y go to `statistics`."""
    (n, c, h, w), (_, k, oh, ow), (_, kg, r, s) = x.shape, shape, weight.shape
    phases = [min(stride, size) for stride, size in zip(geometry.stride, (oh, ow), strict=True)]
    q = [triton.cdiv(size, stride) for stride, size in zip(geometry.stride, (oh, ow), strict=True)]
    stat_groups = statistics.groups if statistics else 1
    m, cg = n // stat_groups * q[0] * q[1], c // (k // kg)
    parts = stat_groups * triton.cdiv(m, config.block_m) * phases[0] * phases[1]
    tensors, sizes = (x, weight, bias, empty(shape, x, True)), (m, stat_groups, h, w, *q, oh, ow, c, cg, k, kg, r, s)
    plan = *geometry.stride, *geometry.padding, *geometry.dilation, *geometry.steps, *geometry.inverses, *phases
    return convolve(conv_transpose2d_kernel, tensors, parts, kg, (*sizes, *plan), epilogue, product, statistics, config)


def _as_product(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """A 1x1 input at padding 0 as [N, C] times [C, R S K]: by pixels, each of the R S outputs would try every tap for
    the one that reaches it (16 times the work in a DCGAN generator's first layer)."""
    _, kg, r, s = weight.shape
    matrix = weight.permute(0, 2, 3, 1).reshape(-1, r * s * kg, 1, 1)
    return x, matrix, None if bias is None else bias.repeat(r * s)


class _Call:
    """A call of either op as it is launched: as phases, or as one product where the input is 1x1."""

    def __init__(self, x, weight, bias, stride, padding, output_padding, groups, dilation):
        self.shape = output_shape(x, weight, stride, padding, output_padding, groups, dilation)
        self.x, self.weight = (t.contiguous(memory_format=CHANNELS_LAST) for t in (x, weight))
        self.geometry, self.launched = Geometry(tuple(stride), tuple(padding), tuple(dilation)), self.shape
        self.bias, self.channels_last, self.repeat = bias, channels_last(x, weight), 1
        is_product = x.shape[2:] == (1, 1) and groups == 1 and self.shape[2:] == tuple(weight.shape[2:])
        if is_product and not any(padding):
            self.repeat = math.prod(weight.shape[2:])
            self.x, self.weight, self.bias = _as_product(self.x, self.weight, bias)
            self.geometry = Geometry((1, 1), (0, 0), (1, 1))
            self.launched = (self.shape[0], self.weight.shape[1], 1, 1)
        phases = math.prod(self.geometry.stride)
        pixels = -(-self.launched[0] * self.launched[2] * self.launched[3] // phases)
        depth = -(-self.weight[:, 0].numel() // groups // phases)
        columns, channels = self.weight.shape[1], x.shape[1] // groups
        self.product = Product(pixels, columns, depth, phases * groups, channels, "k", precision(x))
        self.case = tuple(self.x.shape), self.launched, tuple(self.weight.shape), self.geometry

    def run(self, epilogue: Any, statistics: Statistics | None, config: Config) -> Tensor:
        y = _launch(
            self.x, self.weight, self.bias, self.launched, self.geometry, epilogue, self.product, statistics, config
        )
        if self.launched is not self.shape:
            y = y.view(self.shape[0], *self.shape[2:], self.shape[1]).permute(0, 3, 1, 2)
        return laid_out(y, self.channels_last, epilogue[0] != "identity")


def conv_transpose2d(x, weight, bias, stride, padding, output_padding, groups, dilation, activation, slope):
    call = _Call(x, weight, bias, stride, padding, output_padding, groups, dilation)
    return tuned(
        "conv_transpose2d", call.x, call.product, call.case, lambda config: call.run((activation, slope), None, config)
    )


def conv_transpose2d_statistics(x, weight, bias, stride, padding, output_padding, groups, dilation, stat_groups):
    call = _Call(x, weight, bias, stride, padding, output_padding, groups, dilation)
    call.product, epilogue = call.product._replace(statistics=True), ("identity", 0.0)

    def run(config: Config) -> tuple[Tensor, Tensor, Tensor]:
        if config == APART:
            y = OPS["conv_transpose2d"].run(
                x, weight, bias, stride, padding, output_padding, groups, dilation, *epilogue
            )
            return y, *batch_statistics(y, stat_groups)
        statistics = Statistics(stat_groups, call.repeat)
        y = call.run(epilogue, statistics, config)
        return y, *statistics.finish(y.shape[1])

    return tuned("conv_transpose2d_statistics", call.x, call.product, (*call.case, stat_groups), run, (APART,))


def _declines_statistics(x, weight, bias, *geometry):
    reason = declines(x, weight, bias)
    return reason or declines_statistics(output_shape(x, weight, *geometry[:-1]), geometry[-1])


LAUNCHERS = {
    "conv_transpose2d": Backend(conv_transpose2d, lambda x, weight, bias, *rest: declines(x, weight, bias)),
    "conv_transpose2d_statistics": Backend(conv_transpose2d_statistics, _declines_statistics),
}


def static_cases():
    """Every tile of every dtype, on a layer whose channels fill it and, gathered by element, on an RGB gradient."""
    layers = [(256, 128), (3, 64)]
    return [
        *every_candidate(lambda channels, dtype: conv_transpose2d(*_arguments(*channels, dtype)), layers),
        *every_candidate(
            lambda channels, dtype: conv_transpose2d_statistics(*_arguments(*channels, dtype)[:-2], 1), layers
        ),
    ]


def _arguments(c: int, k: int, dtype: torch.dtype) -> tuple:
    x, weight = meta((128, c, 16, 16), dtype, True), meta((c, k, 4, 4), dtype, True)
    return x, weight, meta((k,), dtype), [2, 2], [1, 1], [0, 0], 1, [1, 1], "tanh", 0.0
