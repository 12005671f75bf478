"""Strided forward convolution with a bias and activation epilogue.

Formula      y[n,k,o] = phi(bias[k] + sum_{c,r} x[n,c, s o + d r - p] weight[k,c,r]), per spatial axis
Shapes       x [N,C,H,W], weight [K,C/groups,R,S], bias [K] or None -> y [N,K,OH,OW],
             OH = floor((H + 2p - d(R-1) - 1)/s) + 1
Dtypes       float32, bfloat16 (float32 accumulation) natively; every torch dtype through the reference
Layout       the native kernel works in channels_last and converts NCHW at its edges; y is channels_last if x or weight
             suggests it, as torch decides
Autocast     lower: x, weight and bias go to the autocast dtype
Derivatives  first: conv_transpose2d, conv2d_weight, bias_act_backward. second and higher: the same ops (bilinear and
             closed); the activation's through bias_act_backward
Saves        x, weight, and y where there is an activation
Traffic      2 accesses an element of x, y in all (read x, write y); PyTorch 4 with bias and activation as own passes
FLOPs        2 N K OH OW (C/groups) R S
Determinism  bit-equal from run to run for one thread count
Backends     native, triton, reference (torch.nn.functional.conv2d)
Source       Dumoulin and Visin, A guide to convolution arithmetic for deep learning (2016)
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from fastgan import _activation, _native
from fastgan._layout import CHANNELS_LAST, dense, empty, is_channels_last
from fastgan._op import OPS, Op, draw, wanted
from fastgan.backends import Backend, triton
from fastgan.ops.bias_act import epilogue_backward


def output_size(size: int, kernel: int, stride: int, padding: int, dilation: int) -> int:
    return (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1


def output_shape(x: Any, weight: Any, stride: Any, padding: Any, dilation: Any) -> tuple[int, int, int, int]:
    oh, ow = (output_size(x.shape[2 + i], weight.shape[2 + i], stride[i], padding[i], dilation[i]) for i in (0, 1))
    return x.shape[0], weight.shape[0], oh, ow


def cost(x: Tensor, weight: Tensor, stride: Any, padding: Any, dilation: Any) -> dict[str, int]:
    """Bytes and FLOPs that a perfect kernel needs: each tensor crosses memory once."""
    n, k, oh, ow = output_shape(x, weight, stride, padding, dilation)
    y = n * k * oh * ow
    return {
        "bytes": (x.numel() + weight.numel() + y) * x.element_size(),
        "flops": 2 * y * weight[0].numel(),
    }


# ---- what the three convolution ops share ---------------------------------------------------------------------------


def channels_last(x: Tensor, weight: Tensor) -> bool:
    """The output's layout, by torch's own rule: channels_last if either operand suggests it."""
    return is_channels_last(x) or is_channels_last(weight)


@functools.lru_cache(4096)
def plan(x: tuple, y: tuple, kernel: tuple, stride: tuple, padding: tuple, dilation: tuple, groups: int) -> Any:
    """The native description of the forward convolution x [N,C,H,W] -> y [N,K,OH,OW]."""
    return _native.core().Conv(*x, *y[1:], *kernel, *stride, *padding, *dilation, groups)


def input_padding(x: Any, dy: Any, weight: Any, stride: Any, padding: Any, dilation: Any) -> list[int]:
    """The output_padding with which the adjoint of a convolution x -> dy gives back x's exact size (shapes in)."""
    return [
        x[2 + i] - ((dy[2 + i] - 1) * stride[i] - 2 * padding[i] + dilation[i] * (weight[2 + i] - 1) + 1)
        for i in (0, 1)
    ]


def native_declines(x: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> str:
    if x.dim() != 4 or weight.dim() != 4:
        return "native convolutions take batched 4-D tensors"
    return _native.declines(x, weight, bias)


# ---- the op ---------------------------------------------------------------------------------------------------------


def reference(x, weight, bias, stride, padding, dilation, groups, activation, slope):
    y = torch.nn.functional.conv2d(x, weight, bias, stride, padding, dilation, groups)
    return dense(_activation.apply(y, activation, slope), channels_last(x, weight))


def native(x, weight, bias, stride, padding, dilation, groups, activation, slope):
    shape = output_shape(x, weight, stride, padding, dilation)
    conv = plan(tuple(x.shape), shape, tuple(weight.shape[2:]), tuple(stride), tuple(padding), tuple(dilation), groups)
    code, x_ = _native.DTYPE_CODES[x.dtype], x.contiguous(memory_format=CHANNELS_LAST)
    (bias,) = _native.float_vectors(bias)
    y = empty(shape, x, True)
    _native.core().conv2d(
        conv, code, x_.data_ptr(), weight.data_ptr(), code, weight.stride(), _native.address(bias), y.data_ptr(),
        _activation.CODES[activation], slope, torch.get_num_threads(),
    )  # fmt: skip
    return dense(y, channels_last(x, weight))


def fake(x, weight, bias, stride, padding, dilation, groups, activation, slope):
    return empty(output_shape(x, weight, stride, padding, dilation), x, channels_last(x, weight))


op = Op(
    "conv2d(Tensor x, Tensor weight, Tensor? bias, int[] stride, int[] padding, int[] dilation, int groups,"
    " str activation, float slope) -> Tensor",
    reference=reference,
    fake=fake,
    backends={"native": Backend(native, native_declines), "triton": triton("conv2d")},
    autocast="lower",
    example=lambda: (*draw((2, 3, 9, 8), (5, 3, 4, 3), (5,)), [2, 1], [1, 0], [1, 1], 1, "leaky_relu", 0.2),
)


def _save(ctx, inputs, output):
    x, weight, bias, ctx.stride, ctx.padding, ctx.dilation, ctx.groups, ctx.activation, ctx.slope = inputs
    ctx.has_bias = bias is not None
    ctx.save_for_backward(x, weight, output if ctx.activation != "identity" else None)


def _backward(ctx, dy):
    x, weight, y = ctx.saved_tensors
    geometry = ctx.stride, ctx.padding, ctx.dilation
    dt, dbias = epilogue_backward(dy, y, ctx.activation, ctx.slope, ctx.has_bias and ctx.needs_input_grad[2])
    dx = dweight = None
    if ctx.needs_input_grad[0]:
        extra = input_padding(x.shape, dt.shape, weight.shape, *geometry)
        dx = OPS["conv_transpose2d"](
            dt, weight, None, ctx.stride, ctx.padding, extra, ctx.groups, ctx.dilation, "identity", 0.0
        )
    if wanted(ctx, 1, weight):
        dweight = OPS["conv2d_weight"](x, dt, list(weight.shape[2:]), *geometry, ctx.groups, is_channels_last(weight))
    return dx, dweight, dbias, *(None,) * 6


op.differentiate(_save, _backward)
