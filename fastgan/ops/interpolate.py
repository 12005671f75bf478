"""Points between real and fake samples, one coefficient a sample: where WGAN-GP looks at the gradient.

Formula      y = e[n] real + (1 - e[n]) fake
Shapes       real, fake [N,*], epsilon [N] -> y like real
Dtypes       every floating dtype; 16-bit samples are mixed in float32, epsilon may be float32 beside them
Layout       y keeps real's layout (channels_last or NCHW)
Autocast     first: runs in real's dtype
Derivatives  first: dreal = e dy, dfake = (1 - e) dy, depsilon = sum dy (real - fake) per sample (float32 sums), in
             differentiable torch ops. second and higher: the same ops (trilinear)
Saves        epsilon, and real, fake where epsilon wants a gradient
Traffic      3 accesses an element (PyTorch's lerp the same; e * real + (1 - e) * fake written out: 8)
FLOPs        3 an element
Determinism  bit-equal from run to run
Backends     cuda, native, triton, reference (torch.lerp)
Source       Gulrajani et al., Improved Training of Wasserstein GANs (2017)
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastgan import _native
from fastgan._layout import accumulation_dtype, dense, is_channels_last
from fastgan._op import Op, draw
from fastgan.backends import triton
from fastgan.ops.bias_act import like


def cost(real: Tensor) -> dict[str, int]:
    """Bytes and FLOPs that a perfect kernel needs."""
    return {"bytes": 3 * real.numel() * real.element_size(), "flops": 3 * real.numel()}


def _per_sample(epsilon: Tensor, x: Tensor) -> Tensor:
    return epsilon.to(accumulation_dtype(x.dtype)).view(-1, *(1,) * (x.dim() - 1))


def reference(real, fake, epsilon):
    dtype = accumulation_dtype(real.dtype)
    y = torch.lerp(fake.to(dtype), real.to(dtype), _per_sample(epsilon, real)).to(real.dtype)
    return dense(y, is_channels_last(real))


def launch(core, real, fake, epsilon):
    channels_last = is_channels_last(real)
    real, fake = dense(real, channels_last), dense(fake, channels_last)
    (epsilon,) = _native.float_vectors(epsilon)
    y = torch.empty_like(real)
    core.call(
        "interpolate", real, _native.DTYPE_CODES[real.dtype], real, fake, epsilon, y, len(real), real[0].numel(),
    )  # fmt: skip
    return y


op = Op(
    "interpolate(Tensor real, Tensor fake, Tensor epsilon) -> Tensor",
    reference=reference,
    fake=lambda real, fake, epsilon: like(real),
    backends={**_native.backends(launch, lambda real, fake, epsilon: (real, fake)), "triton": triton("interpolate")},
    example=lambda: (*draw((3, 2, 4, 5), (3, 2, 4, 5)), torch.rand(3)),
)


def _save(ctx, inputs, output):
    real, fake, epsilon = inputs
    want_ends = ctx.needs_input_grad[2]
    ctx.save_for_backward(epsilon, real if want_ends else None, fake if want_ends else None)


def _backward(ctx, dy):
    epsilon, real, fake = ctx.saved_tensors
    e = _per_sample(epsilon, dy)
    dreal = (e * dy).to(dy.dtype) if ctx.needs_input_grad[0] else None
    dfake = ((1 - e) * dy).to(dy.dtype) if ctx.needs_input_grad[1] else None
    depsilon = None
    if real is not None:
        terms = dy.to(e.dtype) * (real.to(e.dtype) - fake.to(e.dtype))
        depsilon = terms.flatten(1).sum(1).to(epsilon.dtype)
    return dreal, dfake, depsilon


op.differentiate(_save, _backward)
