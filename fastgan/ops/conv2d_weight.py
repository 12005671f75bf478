"""Weight gradient of conv2d and, with x and dy exchanged, of conv_transpose2d.

Formula      dweight[k,c,r] = sum_{n,o} dy[n,k,o] x[n,c, s o + d r - p], per spatial axis
Shapes       x [N,C,H,W], dy [N,K,OH,OW] -> dweight [K,C/groups,R,S]; OH, OW may be smaller than what x would give
Dtypes       float32, bfloat16 (float32 accumulation, one rounding at the end) natively, float16 too on a GPU;
             others through the reference
Layout       kernels in channels_last; dweight is channels_last if asked for (as its weight is)
Autocast     lower: x and dy go to the autocast dtype
Derivatives  bilinear: conv_transpose2d for x, conv2d for dy; any order
Saves        x, dy
Traffic      1 access an element of x, dy, dweight
FLOPs        2 N K OH OW (C/groups) R S
Determinism  bit-equal from run to run for one thread count, or one card and shape (partial sums are added in
             a fixed order)
Backends     cuda, triton, native, reference (ATen's convolution_backward)
Source       MATHS of the forward op; the adjoint in the weight argument
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastgan import _native
from fastgan._layout import cropped, dense, empty
from fastgan._op import OPS, Op, draw, wanted
from fastgan.choice import triton
from fastgan.ops.conv2d import POSITIONS, backends, declines, input_padding, output_size, plan, product_code


def weight_shape(x: Any, dy: Any, kernel: Any, groups: int) -> tuple[int, int, int, int]:
    return dy.shape[1], x.shape[1] // groups, kernel[0], kernel[1]


def cost(x: Tensor, dy: Tensor, kernel: Any, groups: int) -> dict[str, int]:
    """Bytes and FLOPs that a perfect kernel needs: each tensor crosses memory once."""
    k, c, r, s = weight_shape(x, dy, kernel, groups)
    return {
        "bytes": (x.numel() + dy.numel() + k * c * r * s) * x.element_size(),
        "flops": 2 * dy.numel() * c * r * s,
    }


def _full(x, dy, kernel, stride, padding, dilation):
    """dy with zeros for the rows and columns that x would give and dy does not have."""
    missing = [
        output_size(x.shape[2 + i], kernel[i], stride[i], padding[i], dilation[i]) - dy.shape[2 + i] for i in (1, 0)
    ]
    return torch.nn.functional.pad(dy, (0, missing[0], 0, missing[1])) if any(missing) else dy


def reference(x, dy, kernel, stride, padding, dilation, groups, weight_channels_last):
    # ATen wants dy of exactly the size that x gives
    dy = _full(x, dy, kernel, stride, padding, dilation)
    shape_only = x.new_empty(weight_shape(x, dy, kernel, groups))
    dweight = torch.ops.aten.convolution_backward(
        dy, x, shape_only, None, stride, padding, dilation, False, [0, 0], groups, [False, True, False]
    )[1]
    return dense(dweight, weight_channels_last)


def launch(core, x, dy, kernel, stride, padding, dilation, groups, weight_channels_last):
    geometry = tuple(kernel), tuple(stride), tuple(padding), tuple(dilation), groups
    code = product_code(core, x)
    x_, dy_ = core.pixels(x), core.pixels(dy)
    dweight = empty(weight_shape(x, dy, kernel, groups), x, weight_channels_last)
    conv = plan(core.module(), tuple(x.shape), tuple(dy.shape), *geometry)
    core.call("conv2d_weight", x, conv, code, x_, dy_, dweight, code, dweight.stride())
    return dweight


def launch_declines(core, x, dy, kernel, *rest):
    reason = declines(core, lambda: dy.numel() // dy.shape[1], x, dy)
    if not reason and core is _native.CUDA and x.shape[1] * dy.shape[1] * kernel[0] * kernel[1] >= POSITIONS:
        return "cuda convolutions count weights below 2^30"
    return reason


def fake(x, dy, kernel, stride, padding, dilation, groups, weight_channels_last):
    return empty(weight_shape(x, dy, kernel, groups), x, weight_channels_last)


op = Op(
    "conv2d_weight(Tensor x, Tensor dy, int[] kernel, int[] stride, int[] padding, int[] dilation, int groups,"
    " bool weight_channels_last) -> Tensor",
    reference=reference,
    fake=fake,
    backends={**backends(launch, launch_declines), "triton": triton("conv2d_weight")},
    autocast="lower",
    example=lambda: (*draw((2, 3, 8, 8), (2, 5, 4, 4)), [4, 4], [2, 2], [1, 1], [1, 1], 1, False),
)


def _save(ctx, inputs, output):
    x, dy, ctx.kernel, ctx.stride, ctx.padding, ctx.dilation, ctx.groups, _ = inputs
    ctx.save_for_backward(x, dy)


def _backward(ctx, ddweight):
    x, dy = ctx.saved_tensors
    geometry = ctx.stride, ctx.padding, ctx.dilation
    dx = ddy = None
    if wanted(ctx, 0):
        whole = _full(x, dy, ctx.kernel, *geometry)
        extra = input_padding(x.shape, whole.shape, ddweight.shape, *geometry)
        dx = OPS["conv_transpose2d"](
            whole, ddweight, None, ctx.stride, ctx.padding, extra, ctx.groups, ctx.dilation, "identity", 0.0
        )
    if wanted(ctx, 1):
        ddy = OPS["conv2d"](x, ddweight, None, *geometry, ctx.groups, "identity", 0.0)
        ddy = cropped(ddy, dy)
    return dx, ddy, *(None,) * 6


op.differentiate(_save, _backward)
