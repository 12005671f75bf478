"""Batch norm followed by (leaky) ReLU or identity, statistics over G groups of the batch.

Formula      xhat = (x - mean) rstd, rstd = (var + eps)^(-1/2) (biased var), t = weight xhat + bias, y = phi(t).
             training: mean, var of each channel over its group's samples and pixels; group g holds the samples
             [g N/G, (g+1) N/G). eval: mean = running_mean, var = running_var (G = 1). training with running_mean and
             running_var [G,C] given: they are the mean and var of x, from the epilogue of conv2d_statistics or its
             adjoint
Shapes       x [N,C,*], weight, bias [C] or None -> y like x, mean, var [G,C]; [0,C] where the batch's own were given
Dtypes       x float32, bfloat16 natively, float16 too in CUDA and Triton, every floating dtype through the reference;
             weight, bias, statistics may be float32 beside a 16-bit x; mean, var are float32 (float64 for float64)
Layout       y keeps x's layout (channels_last or NCHW); a sliced x gives a dense y
Autocast     first: runs in x's dtype with float32 parameters, as torch's batch norm does
Derivatives  first: bn_act_backward. second: bn_act_double_backward, closed form in one reduction and one elementwise
             pass. third: raises. mean and var are not differentiable outputs
Saves        x, weight, bias, mean, var (no mask, no normalised copy)
Traffic      3 accesses an element forward (x twice, y), 2 where mean and var are given; 5 backward (dy, x twice, dx),
             8 double backward (dy, ddx, x twice, d_dy, d_x); 2, 3 and 5 where in Triton a group fits a program's
             registers, in CUDA the tensor fits the device's shared memory (docs/evidence/gpu-cuda.md). PyTorch's
             batch norm + leaky ReLU: 5, 8, and about 80 kernels
FLOPs        8 an element forward, 12 backward
Determinism  bit-equal from run to run for one thread count
Backends     cuda, triton, native, reference
Source       Ioffe and Szegedy, Batch Normalization (2015); double backward derived in docs/maths.md
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastgan import _activation, _native
from fastgan._layout import accumulation_dtype, dense, empty_result, is_channels_last, per_channel, planes
from fastgan._op import OPS, Op, draw, first_alone
from fastgan.choice import triton
from fastgan.ops.bias_act import like

ACTIVATIONS = ("identity", "relu", "leaky_relu")


def cost(x: Tensor, training: bool = True, running_mean: Tensor | None = None) -> dict[str, int]:
    """Bytes and FLOPs that a perfect two-pass forward kernel needs (x is read twice, y written once); with statistics
    given, x is read once."""
    accesses, flops = (2, 4) if not training or running_mean is not None else (3, 8)
    return {"bytes": accesses * x.numel() * x.element_size(), "flops": flops * x.numel()}


def cost_backward(x: Tensor) -> dict[str, int]:
    return {"bytes": 5 * x.numel() * x.element_size(), "flops": 12 * x.numel()}


def cost_double_backward(x: Tensor) -> dict[str, int]:
    return {"bytes": 8 * x.numel() * x.element_size(), "flops": 25 * x.numel()}


def grouped(x: Tensor, groups: int) -> Tensor:
    """[N, C, *] -> [G, N/G, C, *], a view."""
    return x.unflatten(0, (groups, -1))


def _statistics_like(x: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    empty = x.new_empty(groups, x.shape[1], dtype=accumulation_dtype(x.dtype))
    return empty, torch.empty_like(empty)


def moments(x: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each stat group and channel, [G, C]."""
    dims = [1, *range(3, x.dim() + 1)]
    var, mean = torch.var_mean(grouped(x, groups).to(accumulation_dtype(x.dtype)), dims, correction=0)
    return mean, var


def computed(mean: Tensor, var: Tensor, training: bool, given: Tensor | None) -> tuple[Tensor, Tensor]:
    """The statistics as the op returns them; [0, C] where they were given. An op may not return its argument, and a
    copy of each would cost a launch."""
    if training and given is not None:
        return mean.new_empty(0, mean.shape[1]), var.new_empty(0, mean.shape[1])
    return mean, var


def _normalise(x: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """t = weight xhat + bias, group by group, with PyTorch's elementwise batch norm kernel."""
    parts = [
        torch.nn.functional.batch_norm(part, m, v, weight, bias, False, 0.0, eps)
        for part, m, v in zip(x.chunk(len(mean)), mean, var, strict=True)
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


# ---- forward --------------------------------------------------------------------------------------------------------


def reference(x, weight, bias, running_mean, running_var, training, eps, activation, slope, groups):
    dtype = accumulation_dtype(x.dtype)
    if training and x.numel() == 0:
        mean, var = (s.zero_() for s in _statistics_like(x, groups))
    elif training and running_mean is not None:
        mean, var = running_mean.to(dtype).contiguous(), running_var.to(dtype).contiguous()
    elif training:
        mean, var = moments(x, groups)
    else:
        mean, var = (s.to(dtype, copy=True).unsqueeze(0) for s in (running_mean, running_var))
    weight, bias = (None if p is None else p.to(dtype).contiguous() for p in (weight, bias))  # as PyTorch reads them
    y = _activation.overwrite(_normalise(x, mean, var, weight, bias, eps), activation, slope)
    return dense(y, is_channels_last(x)), *computed(mean, var, training, running_mean)


def launch(core, x, weight, bias, running_mean, running_var, training, eps, activation, slope, groups):
    channels_last = is_channels_last(x)
    x = dense(x, channels_last)
    # torch's batch norm is `elementwise` there, activation or not
    y = empty_result(x, True) if channels_last else torch.empty_like(x)
    if training and running_mean is not None:
        mean, var = (s.to(torch.float32).contiguous() for s in (running_mean, running_var))
    elif training:
        mean, var = _statistics_like(x, groups)
    else:
        mean, var = (s.to(torch.float32, copy=True).unsqueeze(0) for s in (running_mean, running_var))
    weight, bias = _native.float_vectors(weight, bias)
    code, act = _native.DTYPE_CODES[x.dtype], _activation.CODES[activation]
    numbers = *planes(x), groups, channels_last, training and running_mean is None, eps, act, slope
    core.call("bn_act_forward", x, code, x, weight, bias, mean, var, y, *numbers)
    return y, *computed(mean, var, training, running_mean)


def fake(x, weight, bias, running_mean, running_var, training, eps, activation, slope, groups):
    return like(x, True), *computed(*_statistics_like(x, groups), training, running_mean)


op = Op(
    "bn_act(Tensor x, Tensor? weight, Tensor? bias, Tensor? running_mean, Tensor? running_var, bool training,"
    " float eps, str activation, float slope, int groups) -> (Tensor, Tensor, Tensor)",
    reference=reference,
    fake=fake,
    backends={**_native.backends(launch, lambda x, *rest: (x,)), "triton": triton("bn_act")},
    example=lambda: (*draw((4, 5, 4, 3), (5,), (5,)), None, None, True, 1e-5, "leaky_relu", 0.2, 2),
)


def _save(ctx, inputs, output):
    x, weight, bias, running_mean, running_var, *ctx.scalars, _ = inputs
    _, mean, var = output
    first_alone(ctx, output)
    if ctx.scalars[0] and running_mean is not None:
        mean, var = running_mean, running_var
    ctx.save_for_backward(x, weight, bias, mean, var)


def _backward(ctx, dy, _dmean, _dvar):
    x, weight, bias, mean, var = ctx.saved_tensors
    dx, dweight, dbias = OPS["bn_act_backward"](dy, x, weight, bias, mean, var, *ctx.scalars)
    dweight = None if weight is None else dweight.to(weight.dtype)
    dbias = None if bias is None else dbias.to(bias.dtype)
    return dx, dweight, dbias, *(None,) * 7


op.differentiate(_save, _backward)


# ---- backward -------------------------------------------------------------------------------------------------------


def _dt(dy, x, weight, bias, mean, var, eps, activation, slope):
    """dy phi'(t), t recomputed."""
    if activation == "identity":
        return dy
    t = _normalise(x, mean, var, weight, bias, eps)
    return _activation.backward(dy, t, activation, slope)


def reference_backward(dy, x, weight, bias, mean, var, training, eps, activation, slope):
    dtype = accumulation_dtype(x.dtype)
    if x.numel() == 0:  # torch 2.13's kernel divides by the count: it ends the process
        vector = x.new_zeros(x.shape[1], dtype=dtype)
        return torch.empty_like(x), vector, vector.clone()
    weight, bias = (None if p is None else p.to(dtype).contiguous() for p in (weight, bias))  # as PyTorch reads them
    dt = _dt(dy, x, weight, bias, mean, var, eps, activation, slope)
    ones = x.new_ones(x.shape[1], dtype=dtype)
    parts = [
        torch.ops.aten.native_batch_norm_backward(
            g, part, ones if weight is None else weight, m, v, m, (v + eps).rsqrt(), training, eps, [True] * 3
        )
        for g, part, m, v in zip(dt.chunk(len(mean)), x.chunk(len(mean)), mean, var, strict=True)
    ]
    dx = parts[0][0] if len(parts) == 1 else torch.cat([p[0] for p in parts])
    dweight, dbias = (torch.stack([p[i] for p in parts]).sum(0) for i in (1, 2))
    return dense(dx, is_channels_last(x)), dweight.to(dtype), dbias.to(dtype)


def launch_backward(core, dy, x, weight, bias, mean, var, training, eps, activation, slope):
    channels_last = is_channels_last(x)
    dy, x = dense(dy, channels_last), dense(x, channels_last)
    dx, dweight = torch.empty_like(x), x.new_empty(x.shape[1], dtype=torch.float32)
    dbias = torch.empty_like(dweight)
    weight, bias = _native.float_vectors(weight, bias)
    code, act = _native.DTYPE_CODES[x.dtype], _activation.CODES[activation]
    numbers = *planes(x), len(mean), channels_last, training, eps, act, slope
    core.call("bn_act_backward", x, code, dy, x, weight, bias, mean, var, dx, dweight, dbias, *numbers)
    return dx, dweight, dbias


def fake_backward(dy, x, weight, bias, mean, var, training, eps, activation, slope):
    vector = x.new_empty(x.shape[1], dtype=accumulation_dtype(x.dtype))
    return like(x), vector, torch.empty_like(vector)


backward = Op(
    "bn_act_backward(Tensor dy, Tensor x, Tensor? weight, Tensor? bias, Tensor mean, Tensor var, bool training,"
    " float eps, str activation, float slope) -> (Tensor, Tensor, Tensor)",
    reference=reference_backward,
    fake=fake_backward,
    backends={
        **_native.backends(launch_backward, lambda dy, x, *rest: (dy, x)),
        "triton": triton("bn_act", "bn_act_backward"),
    },
    example=lambda: (
        *draw((4, 5, 4, 3), (4, 5, 4, 3), (5,), (5,), (2, 5)),
        draw((2, 5))[0].abs() + 0.5,
        *(True, 1e-5, "relu", 0.0),
    ),
)


def _save_backward(ctx, inputs, output):
    *tensors, training, eps, activation, slope = inputs
    ctx.scalars = training, eps, activation, slope
    ctx.save_for_backward(*tensors)


def _double_backward(ctx, ddx, ddweight, ddbias):
    dy, x, weight, bias, mean, var = ctx.saved_tensors
    d_dy, d_x, d_weight = OPS["bn_act_double_backward"](
        dy, ddx, ddweight, ddbias, x, weight, bias, mean, var, *ctx.scalars
    )
    # mean and var are functions of x: their share is in d_x
    d_weight = None if weight is None else d_weight.to(weight.dtype)
    return d_dy, d_x, d_weight, through_mask(ctx, bias, ctx.scalars[-2]), *(None,) * 6


backward.differentiate(_save_backward, _double_backward)


def through_mask(ctx: Any, bias: Tensor | None, activation: str) -> Tensor | None:
    """The gradient of a bias that enters through the mask alone: PyTorch's zeros, or None as there without a mask.

    An optimiser skips a parameter whose gradient is None; one of zeros it moves on by its momentum.
    """
    asked = bias is not None and activation != "identity" and ctx.needs_input_grad[3]
    return torch.zeros_like(bias) if asked else None  # type: ignore[arg-type]


# ---- double backward ------------------------------------------------------------------------------------------------


def reference_double_backward(dy, ddx, ddweight, ddbias, x, weight, bias, mean, var, training, eps, activation, slope):
    """MATHS of docs/maths.md, section 2. In eval mode mean and var are constants: the formula without its means."""
    groups, dtype = len(mean), accumulation_dtype(x.dtype)
    lift: Any = lambda v: per_channel(v, x)
    dims = [1, *range(3, x.dim() + 1)]
    total: Any = lambda v: v.sum(dims)
    n = x.numel() // max(groups * x.shape[1], 1)
    # not times 0 in eval mode: a NaN would stay, and of one sample reach all
    average: Any = lambda v: v / n if training and n else torch.zeros_like(v)

    rstd = (var + eps).rsqrt()
    gamma = torch.ones_like(rstd) if weight is None else weight.to(dtype).expand_as(rstd)
    beta = torch.zeros_like(rstd) if bias is None else bias.to(dtype).expand_as(rstd)
    zero = torch.zeros_like(rstd)
    vg = zero if ddweight is None else ddweight.to(dtype).expand_as(rstd)
    vb = zero if ddbias is None else ddbias.to(dtype).expand_as(rstd)
    xg, g = grouped(x, groups).to(dtype), grouped(dy, groups).to(dtype)
    w = torch.zeros_like(xg) if ddx is None else grouped(ddx, groups).to(dtype)
    xhat = (xg - lift(mean)) * lift(rstd)
    along_xhat: Any = lambda k: xhat * lift(k) if training else torch.where(lift(k) == 0.0, 0.0, xhat * lift(k))
    t = lift(gamma) * xhat + lift(beta)
    mask = (
        torch.ones_like(t)
        if activation == "identity"
        else _activation.backward(torch.ones_like(t), t, activation, slope)
    )
    dt = g * mask

    s1, s2, w1, w2, a0 = total(dt), total(dt * xhat), total(w), total(w * xhat), total(w * dt)
    a = a0 - average(w1 * s1 + w2 * s2)
    u = lift(gamma * rstd) * (w - lift(average(w1)) - along_xhat(average(w2))) + along_xhat(vg) + lift(vb)
    scale = gamma * rstd
    q = -lift(average(scale * s2)) * w + lift(vg - average(scale * w2)) * dt
    sum_q = -average(scale * (w1 * s2 + w2 * s1)) + vg * s1
    sum_q_xhat = -2 * average(scale * w2 * s2) + vg * s2
    d_x = lift(rstd) * q - lift(average(rstd * sum_q)) - along_xhat(average(rstd * sum_q_xhat + gamma * a * rstd**2))

    def back(v: Tensor) -> Tensor:
        return dense(v.flatten(0, 1).to(x.dtype), is_channels_last(x))

    return back(u * mask), back(d_x), (rstd * a).sum(0)


def launch_double_backward(
    core, dy, ddx, ddweight, ddbias, x, weight, bias, mean, var, training, eps, activation, slope
):
    channels_last = is_channels_last(x)
    dy, x = dense(dy, channels_last), dense(x, channels_last)
    ddx = None if ddx is None else dense(ddx, channels_last)
    d_dy, d_x = torch.empty_like(x), torch.empty_like(x)
    d_weight = x.new_empty(x.shape[1], dtype=torch.float32)
    weight, bias, ddweight, ddbias = _native.float_vectors(weight, bias, ddweight, ddbias)
    code, act = _native.DTYPE_CODES[x.dtype], _activation.CODES[activation]
    given = ddx, ddweight, ddbias, dy, x, weight, bias, mean, var
    numbers = *planes(x), len(mean), channels_last, training, eps, act, slope
    core.call("bn_act_double_backward", x, code, *given, d_dy, d_x, d_weight, *numbers)
    return d_dy, d_x, d_weight


def fake_double_backward(dy, ddx, ddweight, ddbias, x, weight, bias, mean, var, training, eps, activation, slope):
    return like(x), like(x), x.new_empty(x.shape[1], dtype=accumulation_dtype(x.dtype))


double_backward = Op(
    "bn_act_double_backward(Tensor dy, Tensor? ddx, Tensor? ddweight, Tensor? ddbias, Tensor x, Tensor? weight,"
    " Tensor? bias, Tensor mean, Tensor var, bool training, float eps, str activation, float slope)"
    " -> (Tensor, Tensor, Tensor)",
    reference=reference_double_backward,
    fake=fake_double_backward,
    backends={
        **_native.backends(launch_double_backward, lambda dy, ddx, *rest: (dy, ddx, rest[2])),
        "triton": triton("bn_act", "bn_act_double_backward"),
    },
    example=lambda: (
        *draw((4, 5, 4, 3), (4, 5, 4, 3), (5,), (5,), (4, 5, 4, 3), (5,), (5,), (2, 5)),
        draw((2, 5))[0].abs() + 0.5,
        *(True, 1e-5, "leaky_relu", 0.2),
    ),
)
double_backward.not_differentiable()
