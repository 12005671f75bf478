"""The penalty on per-sample gradient norms: (|g| - target)^2, the piece that WGAN-GP, DRAGAN, R1 and R2 share.

Formula      norm[n] = |g[n]| (2-norm over everything but the batch), penalty[n] = (norm[n] - target)^2.
             target 1: WGAN-GP, DRAGAN. target 0: |g|^2, R1 and R2
Shapes       gradient [N,*] -> penalty, norm [N]
Dtypes       gradient any floating dtype; sums, penalty and norm in float32 (float64 for float64)
Layout       any; the derivative keeps gradient's layout
Autocast     first: runs in gradient's dtype, with sums in float32
Derivatives  first: grad_norm_penalty_backward, d penalty / dg = 2 (1 - target / |g|) g, and 0 where |g| = 0 (the
             subgradient that torch's norm takes). second and higher: closed form by `sample_dot` (one reduction) and
             `interpolate` (one elementwise pass), closed themselves. norm is not a differentiable output
Saves        gradient, norm
Traffic      1 access an element forward, 2 backward, 5 double backward; PyTorch's square, sum, sqrt: 3, 4 and more
FLOPs        2 an element forward, 1 backward
Determinism  bit-equal from run to run for one thread count
Backends     cuda, triton, native, reference
Source       Gulrajani et al. (2017); Mescheder et al., Which Training Methods for GANs do actually Converge? (2018);
             derivatives: docs/maths.md, section 4
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastgan import _native
from fastgan._layout import accumulation_dtype, dense, is_channels_last
from fastgan._op import OPS, Op, draw, first_alone
from fastgan.choice import triton
from fastgan.ops.bias_act import like


def cost(gradient: Tensor) -> dict[str, int]:
    """Bytes and FLOPs that a perfect forward kernel needs."""
    return {"bytes": gradient.numel() * gradient.element_size(), "flops": 2 * gradient.numel()}


def cost_backward(gradient: Tensor) -> dict[str, int]:
    return {"bytes": 2 * gradient.numel() * gradient.element_size(), "flops": gradient.numel()}


def _per_sample(v: Tensor, x: Tensor) -> Tensor:
    return v.view(-1, *(1,) * (x.dim() - 1))


def root(squared: Tensor) -> Tensor:
    """sqrt with derivative 0 at 0, as torch's own norm has it."""
    positive = squared > 0
    return torch.where(positive, torch.where(positive, squared, 1.0).sqrt(), 0.0)


def _slope(norm: Tensor, target: float) -> Tensor:
    """s with d penalty / dg = s g: 2 (1 - target / |g|), 0 where |g| = 0; differentiable."""
    if target == 0:
        return torch.full_like(norm, 2.0)
    positive = norm > 0
    return torch.where(positive, 2 - 2 * target / torch.where(positive, norm, 1.0), 0.0)


# ---- forward --------------------------------------------------------------------------------------------------------


def reference(gradient, target):
    dtype, dims = accumulation_dtype(gradient.dtype), list(range(1, gradient.dim()))
    norm = torch.linalg.vector_norm(gradient, 2, dims, dtype=dtype)
    return (norm - target).square(), norm


def launch(core, gradient, target):
    gradient = dense(gradient, is_channels_last(gradient))
    penalty, norm = fake(gradient, target)
    code, sizes = _native.DTYPE_CODES[gradient.dtype], (len(gradient), gradient.numel() // len(gradient))
    core.call("grad_norm_penalty_forward", gradient, code, gradient, penalty, norm, *sizes, target)
    return penalty, norm


def fake(gradient, target):
    norm = gradient.new_empty(gradient.shape[0], dtype=accumulation_dtype(gradient.dtype))
    return norm, torch.empty_like(norm)


op = Op(
    "grad_norm_penalty(Tensor gradient, float target) -> (Tensor, Tensor)",
    reference=reference,
    fake=fake,
    backends={**_native.backends(launch, lambda gradient, target: (gradient,)), "triton": triton("grad_norm_penalty")},
    example=lambda: (*draw((3, 2, 4, 5)), 1.0),
)


def _save(ctx, inputs, output):
    gradient, ctx.target = inputs
    first_alone(ctx, output)
    ctx.save_for_backward(gradient, output[1])


def _backward(ctx, dpenalty, _dnorm):
    gradient, norm = ctx.saved_tensors
    return OPS["grad_norm_penalty_backward"](dpenalty, gradient, norm, ctx.target), None


op.differentiate(_save, _backward)


# ---- backward -------------------------------------------------------------------------------------------------------


def reference_backward(dpenalty, gradient, norm, target):
    scale = _per_sample(dpenalty * _slope(norm, target), gradient)
    out = torch.empty_like(dense(gradient, is_channels_last(gradient)))
    return torch.mul(gradient, scale, out=out)


def launch_backward(core, dpenalty, gradient, norm, target):
    gradient = dense(gradient, is_channels_last(gradient))
    dpenalty, norm = _native.float_vectors(dpenalty, norm)
    dgradient = torch.empty_like(gradient)
    code, sizes = _native.DTYPE_CODES[gradient.dtype], (len(gradient), gradient.numel() // len(gradient))
    core.call("grad_norm_penalty_backward", gradient, code, dpenalty, gradient, norm, dgradient, *sizes, target)
    return dgradient


backward = Op(
    "grad_norm_penalty_backward(Tensor dpenalty, Tensor gradient, Tensor norm, float target) -> Tensor",
    reference=reference_backward,
    fake=lambda dpenalty, gradient, norm, target: like(gradient),
    backends={
        **_native.backends(launch_backward, lambda dp, gradient, *rest: (gradient,)),
        "triton": triton("grad_norm_penalty", "grad_norm_penalty_backward"),
    },
    example=lambda: (*draw((3,), (3, 2, 4, 5)), draw((3,))[0].abs() + 0.5, 1.0),
)


def _save_backward(ctx, inputs, output):
    dpenalty, gradient, norm, ctx.target = inputs
    ctx.save_for_backward(dpenalty, gradient, norm)


def _double_backward(ctx, w):
    """L = sum dp s(|g|) <w, g> per sample. norm is a function of gradient: its share is in d_gradient."""
    dpenalty, gradient, norm = ctx.saved_tensors
    along = OPS["sample_dot"](w, gradient)
    if ctx.target == 0:
        return 2 * along, OPS["interpolate"](w, None, 2 * dpenalty, None), None, None
    if torch.is_grad_enabled():  # for orders beyond the second
        norm = root(OPS["sample_dot"](gradient, gradient))
    slope = _slope(norm, ctx.target)
    bend = torch.where(norm > 0, 2 * ctx.target / torch.where(norm > 0, norm, 1.0) ** 3, 0.0)
    d_gradient = OPS["interpolate"](w, gradient, dpenalty * slope, dpenalty * bend * along)
    return slope * along, d_gradient, None, None


backward.differentiate(_save_backward, _double_backward)
