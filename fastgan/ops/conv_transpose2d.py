"""Transposed convolution: the adjoint of conv2d, with its epilogues.

Formula      y[n,k,o] = phi(bias[k] + sum_{c,i,r: o = s i + d r - p} x[n,c,i] weight[c,k,r]), per spatial axis;
             computed by output phase o mod s, each a dense stride-1 convolution (no zero insertion).
             conv_transpose2d_statistics: mean and var of y's channels too, as conv2d_statistics
Shapes       x [N,C,H,W], weight [C,K/groups,R,S], bias [K] or None -> y [N,K,OH,OW],
             OH = (H-1) s - 2p + d(R-1) + output_padding + 1; conv_transpose2d_statistics: mean, var [G,K]
Dtypes       as conv2d: float32, bfloat16 natively, float16 too on a GPU; every torch dtype through the reference
Layout       as conv2d: kernels in channels_last; y is channels_last if x or weight suggests it
Autocast     lower: x, weight and bias go to the autocast dtype
Derivatives  first: conv2d, conv2d_weight, bias_act_backward. second and higher: the same ops (bilinear and closed).
             mean and var are no differentiable outputs, as in conv2d_statistics
Saves        x, weight, and y where there is an activation
Traffic      2 accesses an element of x, y in all, mean and var included; PyTorch 4 with bias and activation as own
             passes, and 1 more of y for statistics
FLOPs        2 N C H W (K/groups) R S at most (taps that fall outside y are not computed)
Determinism  bit-equal from run to run for one thread count, or one card and shape
Backends     cuda, triton, native, reference (torch.nn.functional.conv_transpose2d); conv_transpose2d_statistics:
             cuda, triton, reference
Source       Dumoulin and Visin, A guide to convolution arithmetic for deep learning (2016); phases: docs/maths.md
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastgan import _activation, _native
from fastgan._layout import cropped, empty, is_channels_last, laid_out
from fastgan._op import OPS, Op, draw, wanted
from fastgan.choice import triton
from fastgan.ops.bias_act import epilogue_backward
from fastgan.ops.conv2d import (
    NO_EPILOGUE,
    backends,
    backward_statistics,
    channels_last,
    declines,
    operand,
    plan,
    product_code,
    saves_statistics,
    statistics_backends,
    statistics_like,
    weight_is_wanted,
    with_statistics,
)


def output_shape(
    x: Any, weight: Any, stride: Any, padding: Any, output_padding: Any, groups: int, dilation: Any
) -> tuple[int, int, int, int]:
    oh, ow = (
        (x.shape[2 + i] - 1) * stride[i]
        - 2 * padding[i]
        + dilation[i] * (weight.shape[2 + i] - 1)
        + output_padding[i]
        + 1
        for i in (0, 1)
    )
    return x.shape[0], weight.shape[1] * groups, oh, ow


def cost(
    x: Tensor, weight: Tensor, stride: Any, padding: Any, output_padding: Any, groups: int, dilation: Any
) -> dict[str, int]:
    """Bytes and FLOPs that a perfect kernel needs: each tensor crosses memory once."""
    n, k, oh, ow = output_shape(x, weight, stride, padding, output_padding, groups, dilation)
    return {
        "bytes": (x.numel() + weight.numel() + n * k * oh * ow) * x.element_size(),
        "flops": 2 * x.numel() * weight[0].numel(),
    }


def cost_statistics(
    x: Tensor,
    weight: Tensor,
    stride: Any,
    padding: Any,
    output_padding: Any,
    groups: int,
    dilation: Any,
    stat_groups: int,
) -> dict[str, int]:
    """The cost of conv_transpose2d_statistics: y crosses memory once, as without statistics; mean and var besides."""
    found = cost(x, weight, stride, padding, output_padding, groups, dilation)
    n, k, oh, ow = output_shape(x, weight, stride, padding, output_padding, groups, dilation)
    return {"bytes": found["bytes"] + 8 * stat_groups * k, "flops": found["flops"] + 4 * n * k * oh * ow}


def reference(x, weight, bias, stride, padding, output_padding, groups, dilation, activation, slope):
    y = torch.nn.functional.conv_transpose2d(x, weight, bias, stride, padding, output_padding, groups, dilation)
    y = _activation.overwrite(y, activation, slope)
    return laid_out(y, channels_last(x, weight), activation != "identity")


def run(core, kernel, x, weight, bias, stride, padding, output_padding, groups, dilation, *tail, elementwise=False):
    """y of a core's function that takes `tail` behind y; elementwise: whether an activation makes y."""
    shape = output_shape(x, weight, stride, padding, output_padding, groups, dilation)
    geometry = tuple(weight.shape[2:]), tuple(stride), tuple(padding), tuple(dilation), groups
    code, x_ = product_code(core, x), core.pixels(x)
    (bias,), w = _native.float_vectors(bias), operand(core, weight)
    y = empty(shape, x, True)
    core.call(
        kernel, x, plan(core.module(), shape, tuple(x.shape), *geometry), code, x_, w, code, w.stride(), bias, y, *tail
    )
    return core.image(y, channels_last(x, weight), elementwise)


def launch(core, x, weight, bias, stride, padding, output_padding, groups, dilation, activation, slope):
    geometry, epilogue = (stride, padding, output_padding, groups, dilation), (_activation.CODES[activation], slope)
    return run(core, "conv_transpose2d", x, weight, bias, *geometry, *epilogue, elementwise=activation != "identity")


def launch_declines(core, x, weight, bias, stride, padding, output_padding, groups, dilation, *rest):
    def pixels():
        n, _, h, w = output_shape(x, weight, stride, padding, output_padding, groups, dilation)
        return n * h * w

    return declines(core, pixels, x, weight, bias)


def fake(x, weight, bias, stride, padding, output_padding, groups, dilation, activation, slope):
    shape = output_shape(x, weight, stride, padding, output_padding, groups, dilation)
    last = channels_last(x, weight)
    return laid_out(empty(shape, x, last), last, activation != "identity")


op = Op(
    "conv_transpose2d(Tensor x, Tensor weight, Tensor? bias, int[] stride, int[] padding, int[] output_padding,"
    " int groups, int[] dilation, str activation, float slope) -> Tensor",
    reference=reference,
    fake=fake,
    backends={**backends(launch, launch_declines), "triton": triton("conv_transpose2d")},
    autocast="lower",
    example=lambda: (*draw((2, 3, 5, 4), (3, 5, 4, 3), (5,)), [2, 1], [1, 0], [0, 0], 1, [1, 1], "tanh", 0.0),
)


def _save(ctx, inputs, output):
    x, weight, bias, ctx.stride, ctx.padding, _, ctx.groups, ctx.dilation, ctx.activation, ctx.slope = inputs
    ctx.has_bias = bias is not None
    ctx.save_for_backward(x, weight, output if ctx.activation != "identity" else None)


def _backward(ctx, dy):
    x, weight, y = ctx.saved_tensors
    geometry = ctx.stride, ctx.padding, ctx.dilation
    dt, dbias = epilogue_backward(dy, y, ctx.activation, ctx.slope, ctx.has_bias and wanted(ctx, 2))
    dx = dweight = None
    if wanted(ctx, 0):
        dx = OPS["conv2d"](dt, weight, None, *geometry, ctx.groups, "identity", 0.0)
        # with output_padding >= stride (legal when dilation > stride) the forward convolution yields extra rows
        dx = cropped(dx, x)
    if weight_is_wanted(ctx, 1):
        dweight = OPS["conv2d_weight"](dt, x, list(weight.shape[2:]), *geometry, ctx.groups, is_channels_last(weight))
    return dx, dweight, dbias, *(None,) * 7


op.differentiate(_save, _backward)


# ---- with the statistics for a batch norm ---------------------------------------------------------------------------


def launch_statistics(core, x, weight, bias, stride, padding, output_padding, groups, dilation, stat_groups):
    mean, var = (x.new_empty(stat_groups, weight.shape[1] * groups, dtype=torch.float32) for _ in range(2))
    geometry = stride, padding, output_padding, groups, dilation
    tail = *NO_EPILOGUE, stat_groups, mean, var
    return run(core, "conv_transpose2d_statistics", x, weight, bias, *geometry, *tail), mean, var


def reference_statistics(x, weight, bias, stride, padding, output_padding, groups, dilation, stat_groups):
    y = reference(x, weight, bias, stride, padding, output_padding, groups, dilation, "identity", 0.0)
    return with_statistics(y, stat_groups)


def fake_statistics(x, weight, bias, stride, padding, output_padding, groups, dilation, stat_groups):
    y = fake(x, weight, bias, stride, padding, output_padding, groups, dilation, "identity", 0.0)
    return statistics_like(y, stat_groups)


statistics = Op(
    "conv_transpose2d_statistics(Tensor x, Tensor weight, Tensor? bias, int[] stride, int[] padding,"
    " int[] output_padding, int groups, int[] dilation, int stat_groups) -> (Tensor, Tensor, Tensor)",
    reference=reference_statistics,
    fake=fake_statistics,
    backends=statistics_backends(launch_statistics, launch_declines, "conv_transpose2d"),
    autocast="lower",
    example=lambda: (*draw((4, 3, 5, 4), (3, 5, 4, 3), (5,)), [2, 1], [1, 0], [0, 0], 1, [1, 1], 2),
)
statistics.differentiate(saves_statistics(_save), backward_statistics(_backward))
