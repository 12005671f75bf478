"""Group norm followed by (leaky) ReLU or identity; instance norm and layer norm are the same op on other views.

Formula      per sample and group of C/groups channels, M = C/groups * pixels elements:
             xhat = (x - mean) rstd, rstd = (var + eps)^(-1/2) (biased var), t = weight xhat + bias, y = phi(t).
             Instance norm: groups = C. Layer norm over D trailing elements: x viewed as [rows, D], groups = 1
Shapes       x [N,C,*], weight, bias [C] or None -> y like x, mean, var [N,groups]
Dtypes       x float32, bfloat16 natively, float16 too in CUDA and Triton, every floating dtype through the reference;
             weight and bias may be float32 beside a 16-bit x; mean, var are float32 (float64 for float64)
Layout       y keeps x's layout (channels_last or NCHW); a sliced x gives a dense y
Autocast     first: runs in x's dtype with float32 statistics and parameters, as bn_act does (torch's CUDA autocast
             runs group and layer norm wholly in float32)
Derivatives  first: gn_act_backward. second: gn_act_double_backward, closed form in one reduction and one elementwise
             pass. third: raises. mean and var are not differentiable outputs
Saves        x, weight, bias, mean, var (no mask, no normalised copy)
Traffic      3 accesses an element forward, 5 backward, 8 double backward; 2, 3 and 5 where a sample (channels_last) or
             a group (NCHW) stays in the cache. PyTorch's group norm + leaky ReLU: 5, 8, and about 100 kernels
FLOPs        8 an element forward, 12 backward
Determinism  bit-equal from run to run for one thread count
Backends     cuda, triton, native, reference (PyTorch's group, instance and layer norm; its channels_last group norm
             loses the variance where the mean is a thousand standard deviations away, ours does not)
Source       Wu and He, Group Normalization (2018); Ulyanov et al., Instance Normalization (2016); Ba et al., Layer
             Normalization (2016); double backward derived in docs/maths.md, section 5
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastgan import _activation, _native
from fastgan._layout import accumulation_dtype, dense, empty_result, is_channels_last, planes
from fastgan._op import OPS, Op, draw, first_alone
from fastgan.choice import triton
from fastgan.ops.bias_act import like
from fastgan.ops.bn_act import through_mask

ACTIVATIONS = ("identity", "relu", "leaky_relu")


def cost(x: Tensor) -> dict[str, int]:
    """Bytes and FLOPs that a perfect forward kernel needs: a group is read once and stays in the cache."""
    return {"bytes": 2 * x.numel() * x.element_size(), "flops": 8 * x.numel()}


def cost_backward(x: Tensor) -> dict[str, int]:
    return {"bytes": 3 * x.numel() * x.element_size(), "flops": 12 * x.numel()}


def cost_double_backward(x: Tensor) -> dict[str, int]:
    return {"bytes": 5 * x.numel() * x.element_size(), "flops": 25 * x.numel()}


def _statistics_like(x: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    empty = x.new_empty(x.shape[0], groups, dtype=accumulation_dtype(x.dtype))
    return empty, torch.empty_like(empty)


def _gradient_like(x: Tensor, parameter: Tensor | None) -> Tensor:
    """Room for a parameter's gradient: [C], or [0] where there is no such parameter."""
    return x.new_empty(0 if parameter is None else x.shape[1], dtype=accumulation_dtype(x.dtype))


def _for_torch(x: Tensor) -> Tensor:
    """x in a layout that PyTorch's group norm takes: on a GPU it knows NCHW only."""
    return dense(x, is_channels_last(x) and x.device.type == "cpu")


def _parameters(x: Tensor, *parameters: Tensor | None) -> list[Tensor | None]:
    """As PyTorch's kernels take them: without gaps, float32 beside a 16-bit x on a CPU, x's own dtype elsewhere."""
    dtype = accumulation_dtype(x.dtype) if x.device.type == "cpu" else x.dtype
    return [None if p is None else p.to(dtype).contiguous() for p in parameters]


def _is_layer_norm(x: Tensor, groups: int) -> bool:
    """Whether PyTorch's layer norm computes the same: on [rows, D] it is much faster than PyTorch's group norm."""
    return groups == 1 and x.dim() == 2


def _cuda_declines(x: Tensor) -> str:
    """Why the CUDA kernels leave x to the reference, or "": they count rows of few pixels in int."""
    n, channels, pixels = planes(x)
    few = pixels < 16 and max(n, pixels) * channels > 2**30
    return f"cuda kernels want at most 2^30 elements a sample of few pixels, got {tuple(x.shape)}" if few else ""


def _layout(core, x: Tensor) -> bool:
    """Whether the kernels get x as channels_last. The CUDA kernels take a sample of fewer than 16 pixels as one row in
    NCHW: such an image in channels_last is copied."""
    return is_channels_last(x) and not (core is _native.CUDA and planes(x)[2] < 16)


# ---- forward --------------------------------------------------------------------------------------------------------


def reference(x, weight, bias, groups, eps, activation, slope):
    dtype, channels_last = accumulation_dtype(x.dtype), is_channels_last(x)
    if x.numel() == 0:
        return like(x), *(s.zero_() for s in _statistics_like(x, groups))
    x = _for_torch(x)
    if weight is None and x.dtype != dtype:
        # without a float32 weight PyTorch rounds the statistics to 16 bits
        weight = x.new_ones(x.shape[1], dtype=dtype)
    weight, bias = _parameters(x, weight, bias)
    if _is_layer_norm(x, groups):
        t, mean, rstd = torch.native_layer_norm(x, x.shape[1:], weight, bias, eps)
    else:
        t, mean, rstd = torch.native_group_norm(x, weight, bias, *planes(x), groups, eps)
    var = rstd.to(dtype).pow(-2).sub_(eps).clamp_min_(0)
    return dense(_activation.apply(t, activation, slope), channels_last), mean.to(dtype), var


def launch(core, x, weight, bias, groups, eps, activation, slope):
    channels_last, given = _layout(core, x), is_channels_last(x)
    x = dense(x, channels_last)
    y = empty_result(x, activation != "identity")
    mean, var = _statistics_like(x, groups)
    weight, bias = _native.float_vectors(weight, bias)
    code, act = _native.DTYPE_CODES[x.dtype], _activation.CODES[activation]
    numbers = *planes(x), groups, channels_last, eps, act, slope
    core.call("gn_act_forward", x, code, x, weight, bias, mean, var, y, *numbers)
    return dense(y, given), mean, var


def fake(x, weight, bias, groups, eps, activation, slope):
    return like(x, activation != "identity"), *_statistics_like(x, groups)


op = Op(
    "gn_act(Tensor x, Tensor? weight, Tensor? bias, int groups, float eps, str activation, float slope)"
    " -> (Tensor, Tensor, Tensor)",
    reference=reference,
    fake=fake,
    backends={
        **_native.backends(launch, lambda x, *rest: (x,), lambda x, *rest: _cuda_declines(x)),
        "triton": triton("gn_act"),
    },
    example=lambda: (*draw((3, 6, 4, 3), (6,), (6,)), 2, 1e-5, "leaky_relu", 0.2),
)


def _save(ctx, inputs, output):
    x, weight, bias, _, *ctx.scalars = inputs
    first_alone(ctx, output)
    ctx.save_for_backward(x, weight, bias, *output[1:])


def _backward(ctx, dy, _dmean, _dvar):
    x, weight, bias, mean, var = ctx.saved_tensors
    dx, dweight, dbias = OPS["gn_act_backward"](dy, x, weight, bias, mean, var, *ctx.scalars)
    dweight = None if weight is None else dweight.to(weight.dtype)
    dbias = None if bias is None else dbias.to(bias.dtype)
    return dx, dweight, dbias, *(None,) * 4


op.differentiate(_save, _backward)


# ---- backward -------------------------------------------------------------------------------------------------------


def _dt(dy, x, weight, bias, mean, rstd, activation, slope):
    """dy phi'(t), t recomputed in one elementwise pass."""
    if activation == "identity":
        return dy
    groups, dtype = mean.shape[1], mean.dtype
    spread: Any = lambda s: s.repeat_interleave(x.shape[1] // groups, 1).view(*x.shape[:2], *(1,) * (x.dim() - 2))
    per_channel: Any = lambda p: p.to(dtype).view(-1, *(1,) * (x.dim() - 2))
    scale = spread(rstd) if weight is None else spread(rstd) * per_channel(weight)
    shift = -spread(mean) * scale
    shift = shift if bias is None else shift + per_channel(bias)
    t = torch.addcmul(shift, x, scale, out=torch.empty_like(x))
    return _activation.backward(dy, t, activation, slope)


def reference_backward(dy, x, weight, bias, mean, var, eps, activation, slope):
    groups, dtype, channels_last = mean.shape[1], mean.dtype, is_channels_last(x)
    dweight, dbias = _gradient_like(x, weight), _gradient_like(x, bias)
    if x.numel() == 0:
        return like(x), dweight.zero_(), dbias.zero_()
    rstd = (var + eps).rsqrt()
    x = _for_torch(x)
    dt = dense(_dt(dy, x, weight, bias, mean, rstd, activation, slope), is_channels_last(x))
    n, c, hw = planes(x)
    wanted = [True, weight is not None, bias is not None]
    if weight is None and (bias is not None or x.dtype != dtype):
        weight = x.new_ones(c, dtype=dtype)  # PyTorch's kernels need one for dbias, and for statistics in float32
    gamma, beta = _parameters(x, weight, bias)
    if _is_layer_norm(x, groups):
        grads = torch.ops.aten.native_layer_norm_backward(dt, x, [c], mean, rstd, gamma, beta, wanted)
    elif groups == c and hw > 1:
        grads = _instance_norm_backward(dt, x, gamma, mean, rstd, eps, wanted)
    else:
        mean, rstd = _parameters(x, mean, rstd)
        grads = torch.ops.aten.native_group_norm_backward(dt, x, mean, rstd, gamma, n, c, hw, groups, wanted)
    dweight = dweight if dweight.numel() == 0 else grads[1].to(dtype)
    dbias = dbias if dbias.numel() == 0 else grads[2].to(dtype)
    return dense(grads[0], channels_last), dweight, dbias


def _instance_norm_backward(dt, x, weight, mean, rstd, eps, wanted):
    """By batch norm on [1, N C, *], as torch.instance_norm does it: group norm's backward is many times slower here."""
    n, c, hw = planes(x)
    rows = lambda v: dense(v, False).view(1, n * c, hw)
    weight = None if weight is None else weight.to(mean.dtype).repeat(n)
    dx, *grads = torch.ops.aten.native_batch_norm_backward(
        rows(dt), rows(x), weight, None, None, mean.flatten(), rstd.flatten(), True, eps, wanted
    )
    return dx.view(x.shape), *(g.view(n, c).sum(0) if w else None for g, w in zip(grads, wanted[1:], strict=True))


def launch_backward(core, dy, x, weight, bias, mean, var, eps, activation, slope):
    channels_last, given = _layout(core, x), is_channels_last(x)
    dy, x = dense(dy, channels_last), dense(x, channels_last)
    dx, dweight, dbias = torch.empty_like(x), _gradient_like(x, weight), _gradient_like(x, bias)
    weight, bias = _native.float_vectors(weight, bias)
    code, act = _native.DTYPE_CODES[x.dtype], _activation.CODES[activation]
    made = dx, None if weight is None else dweight, None if bias is None else dbias
    numbers = *planes(x), mean.shape[1], channels_last, eps, act, slope
    core.call("gn_act_backward", x, code, dy, x, weight, bias, mean, var, *made, *numbers)
    return dense(dx, given), dweight, dbias


def fake_backward(dy, x, weight, bias, mean, var, eps, activation, slope):
    return like(x), _gradient_like(x, weight), _gradient_like(x, bias)


backward = Op(
    "gn_act_backward(Tensor dy, Tensor x, Tensor? weight, Tensor? bias, Tensor mean, Tensor var, float eps,"
    " str activation, float slope) -> (Tensor, Tensor, Tensor)",
    reference=reference_backward,
    fake=fake_backward,
    backends={
        **_native.backends(launch_backward, lambda dy, x, *rest: (dy, x), lambda dy, x, *rest: _cuda_declines(x)),
        "triton": triton("gn_act", "gn_act_backward"),
    },
    example=lambda: (
        *draw((3, 6, 4, 3), (3, 6, 4, 3), (6,), (6,), (3, 2)),
        draw((3, 2))[0].abs() + 0.5,
        *(1e-5, "relu", 0.0),
    ),
)


def _save_backward(ctx, inputs, output):
    *tensors, eps, activation, slope = inputs
    ctx.scalars = eps, activation, slope
    ctx.save_for_backward(*tensors)


def _double_backward(ctx, ddx, ddweight, ddbias):
    dy, x, weight, bias, mean, var = ctx.saved_tensors
    ddweight, ddbias = None if weight is None else ddweight, None if bias is None else ddbias
    d_dy, d_x, d_weight = OPS["gn_act_double_backward"](
        dy, ddx, ddweight, ddbias, x, weight, bias, mean, var, *ctx.scalars
    )
    # mean and var are functions of x: their share is in d_x
    d_weight = None if weight is None else d_weight.to(weight.dtype)
    return d_dy, d_x, d_weight, through_mask(ctx, bias, ctx.scalars[-2]), *(None,) * 5


backward.differentiate(_save_backward, _double_backward)


# ---- double backward ------------------------------------------------------------------------------------------------


def reference_double_backward(dy, ddx, ddweight, ddbias, x, weight, bias, mean, var, eps, activation, slope):
    """docs/maths.md, section 5: five sums per sample and channel, then two linear combinations."""
    groups, dtype, channels_last = mean.shape[1], mean.dtype, is_channels_last(x)
    inv_m = 1.0 / max(x[0].numel() // groups, 1) if len(x) else 0.0

    def tensor(v):  # [N, G, C/G, pixels]: a view of a dense tensor
        v = dense(v, channels_last).to(dtype)
        return (v.flatten(2) if v.dim() > 2 else v.unsqueeze(2)).unflatten(1, (groups, -1))

    def channels(v, default):  # [G, C/G]
        return x.new_full((), default, dtype=dtype) if v is None else v.to(dtype).view(groups, -1)

    def lift(v):
        return v.unsqueeze(-1)

    r = lift((var + eps).rsqrt())  # [N, G, 1], as every sum over a group
    gamma, beta = channels(weight, 1), channels(bias, 0)
    vg, vb = channels(ddweight, 0), channels(ddbias, 0)
    scale = (gamma * r).expand(*r.shape[:2], x.shape[1] // groups)
    g, centred = tensor(dy), tensor(x) - lift(lift(mean))
    w = torch.zeros_like(g) if ddx is None else tensor(ddx)
    if activation == "identity":
        mask = None
        dt = g
    else:
        t = centred * lift(scale) + (beta if beta.dim() == 0 else lift(beta))
        mask = _activation.backward(torch.ones_like(t), t, activation, slope)
        dt = _activation.backward(g, t, activation, slope)

    # sums per sample and channel [N, G, C/G], then per group
    c1, c2, w1, w2, a0 = dt.sum(-1), (dt * centred).sum(-1) * r, w.sum(-1), (w * centred).sum(-1) * r, (w * dt).sum(-1)
    total: Any = lambda v: v.sum(-1, keepdim=True)
    s1, s2, w1, w2 = total(gamma * c1), total(gamma * c2), total(w1), total(w2)
    a = total(gamma * a0) - (w1 * s1 + w2 * s2) * inv_m
    sum_q = total(vg * c1) - r * inv_m * (w1 * s2 + w2 * s1)
    sum_q_xhat = total(vg * c2) - 2 * r * inv_m * w2 * s2
    u1 = r * (vg - scale * (w2 * inv_m))
    u = lift(scale) * w + (lift(u1) * centred + lift(vb - scale * (w1 * inv_m)))
    d_x = lift(-(r**2) * s2 * inv_m) * w + lift(u1) * dt
    d_x += lift(-(r**2) * inv_m * (sum_q_xhat + a * r)) * centred + lift(-r * sum_q * inv_m)
    d_weight = _gradient_like(x, weight)
    if weight is not None:
        d_weight = (r * (a0 - (w1 * c1 + w2 * c2) * inv_m)).sum(0).flatten()

    def back(v: Tensor) -> Tensor:
        return dense(v.reshape(x.shape).to(x.dtype), channels_last)

    return back(u if mask is None else u * mask), back(d_x), d_weight


def launch_double_backward(core, dy, ddx, ddweight, ddbias, x, weight, bias, mean, var, eps, activation, slope):
    channels_last, given = _layout(core, x), is_channels_last(x)
    dy, x = dense(dy, channels_last), dense(x, channels_last)
    ddx = None if ddx is None else dense(ddx, channels_last)
    d_dy, d_x, d_weight = torch.empty_like(x), torch.empty_like(x), _gradient_like(x, weight)
    weight, bias, ddweight, ddbias = _native.float_vectors(weight, bias, ddweight, ddbias)
    code, act = _native.DTYPE_CODES[x.dtype], _activation.CODES[activation]
    tensors = ddx, ddweight, ddbias, dy, x, weight, bias, mean, var
    made = d_dy, d_x, None if weight is None else d_weight
    numbers = *planes(x), mean.shape[1], channels_last, eps, act, slope
    core.call("gn_act_double_backward", x, code, *tensors, *made, *numbers)
    return dense(d_dy, given), dense(d_x, given), d_weight


def fake_double_backward(dy, ddx, ddweight, ddbias, x, weight, bias, mean, var, eps, activation, slope):
    return like(x), like(x), _gradient_like(x, weight)


double_backward = Op(
    "gn_act_double_backward(Tensor dy, Tensor? ddx, Tensor? ddweight, Tensor? ddbias, Tensor x, Tensor? weight,"
    " Tensor? bias, Tensor mean, Tensor var, float eps, str activation, float slope) -> (Tensor, Tensor, Tensor)",
    reference=reference_double_backward,
    fake=fake_double_backward,
    backends={
        **_native.backends(
            launch_double_backward, lambda dy, ddx, *rest: (dy, ddx, rest[2]), lambda dy, *rest: _cuda_declines(dy)
        ),
        "triton": triton("gn_act", "gn_act_double_backward"),
    },
    example=lambda: (
        *draw((3, 6, 4, 3), (3, 6, 4, 3), (6,), (6,), (3, 6, 4, 3), (6,), (6,), (3, 2)),
        draw((3, 2))[0].abs() + 0.5,
        *(1e-5, "leaky_relu", 0.2),
    ),
)
double_backward.not_differentiable()
