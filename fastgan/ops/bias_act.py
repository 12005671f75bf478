"""Bias and activation.

Formula      y = gain phi(x + bias[channel]), kept within +-clamp where clamp >= 0;  phi: identity, relu, leaky_relu,
             tanh, sigmoid, elu, selu, softplus, swish, gelu, gelu_tanh
Shapes       x [N,C,*], bias [C] or None -> y like x
Dtypes       float32, bfloat16 natively (computed in float32), float16 too on a GPU; every floating torch dtype through
             the reference
Layout       y keeps x's layout (channels_last or NCHW); a sliced x gives a dense y
Autocast     first: runs in x's dtype; bias may be of another
Derivatives  first: bias_act_backward, from the output y (slope >= 0 keeps its sign); of swish and gelu from the
             input. 0 where the clamp holds y, |y| = clamp included (so what rounds to it). second: the same op for dy,
             and phi'' in closed form for y; any order
Saves        y; of swish and gelu x and bias
Traffic      2 accesses an element forward, 3 backward (dy, y, dx; dbias on the way); PyTorch 4 and 4
FLOPs        2 an element forward, 2 backward (tanh and its like counted as one; gain and clamp not counted)
Determinism  bit-equal from run to run for one thread count
Backends     cuda, triton, native, reference
Source       the chain rule; gain and clamp as in Karras et al., StyleGAN2-ADA (2020)
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastgan import _activation, _native
from fastgan._layout import accumulation_dtype, dense, empty_result, is_channels_last, per_channel, planes
from fastgan._op import OPS, Op, draw
from fastgan.choice import triton


def cost(x: Tensor) -> dict[str, int]:
    """Bytes and FLOPs that a perfect forward kernel needs."""
    return {"bytes": 2 * x.numel() * x.element_size(), "flops": 2 * x.numel()}


def cost_backward(y: Tensor) -> dict[str, int]:
    return {"bytes": 3 * y.numel() * y.element_size(), "flops": 2 * y.numel()}


# ---- forward --------------------------------------------------------------------------------------------------------


def reference(x, bias, activation, slope, gain, clamp):
    t = x if bias is None else x + per_channel(bias, x).to(x.dtype)
    y = dense(_activation.apply(t, activation, slope, gain, clamp), is_channels_last(x))
    return y.clone() if y is x else y


def launch(core, x, bias, activation, slope, gain, clamp):
    channels_last = is_channels_last(x)
    x = dense(x, channels_last)
    (bias,) = _native.float_vectors(bias)
    y = empty_result(x, activation != "identity") if channels_last else torch.empty_like(x)
    code, act = _native.DTYPE_CODES[x.dtype], _activation.CODES[activation]
    core.call(
        "bias_act_forward",
        x,
        code,
        x,
        bias,
        y,
        *planes(x),
        channels_last,
        act,
        slope,
        gain,
        _activation.limit(clamp, x.dtype),
    )
    return y


def like(x: Tensor, elementwise: bool = False) -> Tensor:
    """Fake output of an op that keeps x's shape, dtype and layout; elementwise as in `laid_out`."""
    return empty_result(dense(x, is_channels_last(x)), elementwise)


op = Op(
    "bias_act(Tensor x, Tensor? bias, str activation, float slope, float gain, float clamp) -> Tensor",
    reference=reference,
    fake=lambda x, bias, activation, *rest: like(x, activation != "identity"),
    backends={**_native.backends(launch, lambda x, *rest: (x,)), "triton": triton("bias_act")},
    example=lambda: (*draw((2, 5, 4, 3), (5,)), "sigmoid", 0.0, 1.5, 1.0),
)


def _save(ctx, inputs, output):
    x, bias, *form = inputs
    ctx.form = activation, _, _, clamp = tuple(form)
    ctx.has_bias = bias is not None
    ctx.bias_dtype = bias.dtype if ctx.has_bias else None
    if activation in _activation.FROM_INPUT:
        ctx.save_for_backward(None, x, bias)
    else:
        ctx.save_for_backward(output if activation != "identity" or clamp >= 0 else None, None, None)


def _backward(ctx, dy):
    y, x, bias = ctx.saved_tensors
    if x is not None:
        y = x if bias is None else x + per_channel(bias, x).to(x.dtype)
    activation, slope, gain, clamp = ctx.form
    want_bias = ctx.has_bias and ctx.needs_input_grad[1]
    dx, dbias = form_backward(dy, y, activation, slope, gain, clamp, want_bias)
    return dx, None if dbias is None else dbias.to(ctx.bias_dtype), None, None, None, None


op.differentiate(_save, _backward)


def epilogue_backward(
    dy: Tensor, y: Tensor | None, activation: str, slope: float, want_bias: bool
) -> tuple[Tensor, Tensor | None]:
    """(dt, dbias) of y = phi(t + bias); the backward of every epilogue. y is None where phi is the identity."""
    return form_backward(dy, y, activation, slope, 1.0, -1.0, want_bias)


def form_backward(
    dy: Tensor, y: Tensor | None, activation: str, slope: float, gain: float, clamp: float, want_bias: bool
) -> tuple[Tensor, Tensor | None]:
    """(dx, dbias) of y = gain phi(x + bias) within +-clamp. y is None where nothing is read from it."""
    if y is None:
        dx = dy if gain == 1 else dy * gain
        return dx, dx.sum([d for d in range(dx.dim()) if d != 1]) if want_bias else None
    dx, dbias = backward(dy, y, activation, slope, gain, clamp, want_bias)
    return dx, dbias.to(dx.dtype) if want_bias else None


# ---- backward -------------------------------------------------------------------------------------------------------


def reference_backward(dy, y, activation, slope, gain, clamp, want_bias):
    dx = dense(_activation.backward(dy, y, activation, slope, gain, clamp), is_channels_last(y))
    dbias = dx.new_empty(0, dtype=accumulation_dtype(dx.dtype))
    if want_bias:
        dbias = dx.sum([d for d in range(dx.dim()) if d != 1], dtype=dbias.dtype)
    return dx, dbias


def launch_backward(core, dy, y, activation, slope, gain, clamp, want_bias):
    channels_last = is_channels_last(y)
    dy, y = dense(dy, channels_last), dense(y, channels_last)
    dx, dbias = torch.empty_like(y), y.new_empty(y.shape[1] if want_bias else 0, dtype=torch.float32)
    code, act = _native.DTYPE_CODES[y.dtype], _activation.CODES[activation]
    tensors = dy, y, dx, dbias if want_bias else None
    form = act, slope, gain, _activation.limit(clamp, y.dtype)
    core.call("bias_act_backward", y, code, *tensors, *planes(y), channels_last, *form)
    return dx, dbias


def fake_backward(dy, y, activation, slope, gain, clamp, want_bias):
    return like(y), y.new_empty(y.shape[1] if want_bias else 0, dtype=accumulation_dtype(y.dtype))


backward = Op(
    "bias_act_backward(Tensor dy, Tensor y, str activation, float slope, float gain, float clamp, bool want_bias)"
    " -> (Tensor, Tensor)",
    reference=reference_backward,
    fake=fake_backward,
    backends={
        **_native.backends(launch_backward, lambda dy, y, *rest: (dy, y)),
        "triton": triton("bias_act", "bias_act_backward"),
    },
    example=lambda: (*draw((2, 5, 4, 3), (2, 5, 4, 3)), "leaky_relu", 0.3, 1.4, 1.0, True),
)


def _save_backward(ctx, inputs, output):
    dy, y, *form, ctx.want_bias = inputs
    ctx.form = tuple(form)
    ctx.save_for_backward(dy, y)


def _double_backward(ctx, ddx, ddbias):
    """dx = dy phi'(y), dbias = sum dx: linear in dy; y enters through phi' only."""
    dy, y = ctx.saved_tensors
    w = ddx
    if ctx.want_bias and ddbias is not None:
        spread = per_channel(ddbias, dy).to(dy.dtype)
        w = spread.expand_as(dy) if w is None else w + spread
    if w is None:
        return (None,) * 7
    d_dy = OPS["bias_act_backward"](w, y, *ctx.form, False)[0] if ctx.needs_input_grad[0] else None
    activation, _, gain, clamp = ctx.form
    slope_of_derivative = _activation.second(y, activation, gain, clamp)
    d_y = w * dy * slope_of_derivative if slope_of_derivative is not None and ctx.needs_input_grad[1] else None
    return d_dy, d_y, None, None, None, None, None


backward.differentiate(_save_backward, _double_backward)
