"""Points between real and fake samples, one coefficient a sample: where WGAN-GP looks at the gradient.

Formula      y = e[n] real + (1 - e[n]) fake; with rest, y = e[n] real + rest[n] fake; without fake, y = e[n] real
Shapes       real [N,*], fake [N,*] or None, epsilon [N], rest [N] or None -> y like real
Dtypes       every floating dtype; 16-bit samples are mixed in float32, the coefficients may be float32 beside them
Layout       y keeps real's layout (channels_last or NCHW)
Autocast     first: runs in real's dtype
Derivatives  every order, by `interpolate` and `sample_dot`, which are closed: dreal = e dy, dfake = (1 - e) dy or
             rest dy, depsilon = <dy, real> (- <dy, fake> without rest), drest = <dy, fake>
Saves        the coefficients, and real, fake where a coefficient wants a gradient
Traffic      3 accesses an element (PyTorch's lerp the same; e * real + (1 - e) * fake written out: 8)
FLOPs        3 an element
Determinism  bit-equal from run to run
Backends     cuda, triton, native, reference (torch.lerp)
Source       Gulrajani et al., Improved Training of Wasserstein GANs (2017)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastgan import _native
from fastgan._layout import accumulation_dtype, dense, is_channels_last
from fastgan._op import OPS, Op, draw
from fastgan.choice import triton
from fastgan.ops.bias_act import like


def cost(real: Tensor) -> dict[str, int]:
    """Bytes and FLOPs that a perfect kernel needs."""
    return {"bytes": 3 * real.numel() * real.element_size(), "flops": 3 * real.numel()}


def _per_sample(epsilon: Tensor, x: Tensor) -> Tensor:
    return epsilon.to(accumulation_dtype(x.dtype)).view(-1, *(1,) * (x.dim() - 1))


def reference(real, fake, epsilon, rest):
    dtype = accumulation_dtype(real.dtype)
    r, e = real.to(dtype), _per_sample(epsilon, real)
    if fake is None:
        y = e * r
    elif rest is None:
        y = torch.lerp(fake.to(dtype), r, e)
    else:
        y = torch.addcmul(e * r, _per_sample(rest, real), fake.to(dtype))
    return dense(y.to(real.dtype), is_channels_last(real))


def launch(core, real, fake, epsilon, rest):
    channels_last = is_channels_last(real)
    real, fake = dense(real, channels_last), None if fake is None else dense(fake, channels_last)
    epsilon, rest = _native.float_vectors(epsilon, rest)
    y = torch.empty_like(real)
    code, samples = _native.DTYPE_CODES[real.dtype], len(real)
    core.call("interpolate_forward", real, code, real, fake, epsilon, rest, y, samples, real.numel() // samples)
    return y


op = Op(
    "interpolate(Tensor real, Tensor? fake, Tensor epsilon, Tensor? rest) -> Tensor",
    reference=reference,
    fake=lambda real, fake, epsilon, rest: like(real),
    backends={
        **_native.backends(launch, lambda real, fake, epsilon, rest: (real, fake)),
        "triton": triton("interpolate"),
    },
    example=lambda: (*draw((3, 2, 4, 5), (3, 2, 4, 5)), torch.rand(3), None),
)


def _save(ctx, inputs, output):
    real, fake, epsilon, rest = inputs
    want_ends = ctx.needs_input_grad[2] or ctx.needs_input_grad[3]
    ctx.save_for_backward(epsilon, rest, real if want_ends else None, fake if want_ends else None)
    ctx.complement = fake is not None and rest is None


def _backward(ctx, dy):
    epsilon, rest, real, fake = ctx.saved_tensors
    want_real, want_fake, want_epsilon, want_rest = ctx.needs_input_grad
    dreal = OPS["interpolate"](dy, None, epsilon, None) if want_real else None
    dfake = OPS["interpolate"](dy, None, 1 - epsilon if rest is None else rest, None) if want_fake else None
    depsilon = OPS["sample_dot"](dy, real) if want_epsilon else None
    drest: Any = OPS["sample_dot"](dy, fake) if want_rest or (want_epsilon and ctx.complement) else None
    if want_epsilon and ctx.complement:
        depsilon, drest = depsilon - drest, None
    return dreal, dfake, *(d if d is None else d.to(epsilon.dtype) for d in (depsilon, drest))


op.differentiate(_save, _backward)
