"""The inner product of two tensors, sample by sample: what derivatives by a coefficient of each sample are made of.

Formula      dot[n] = sum x[n] y[n] over everything but the batch
Shapes       x, y [N,*] -> dot [N]
Dtypes       x, y any floating dtype; sums in float32 (float64 for float64)
Layout       y is read in x's layout (channels_last or NCHW)
Autocast     first: runs in x's dtype, with sums in float32
Derivatives  every order, by `interpolate` and `sample_dot`, which are closed: dx = ddot[n] y, dy = ddot[n] x
Saves        x, y
Traffic      2 accesses an element; PyTorch's product and sum: 4
FLOPs        2 an element
Determinism  bit-equal from run to run for one thread count
Backends     cuda, triton, native, reference
Source       the derivatives of a sample's scaling: docs/maths.md, section 4
"""

from __future__ import annotations

from torch import Tensor

from fastgan import _native
from fastgan._layout import accumulation_dtype, dense, is_channels_last
from fastgan._op import OPS, Op, draw
from fastgan.choice import triton


def cost(x: Tensor) -> dict[str, int]:
    """Bytes and FLOPs that a perfect kernel needs."""
    return {"bytes": 2 * x.numel() * x.element_size(), "flops": 2 * x.numel()}


def reference(x, y):
    dtype = accumulation_dtype(x.dtype)
    products = x.to(dtype) * y.to(dtype)
    return products.sum([*range(1, x.dim())]) if x.dim() > 1 else products


def launch(core, x, y):
    channels_last = is_channels_last(x)
    x, y, dot = dense(x, channels_last), dense(y, channels_last), fake(x, y)
    core.call("sample_dot", x, _native.DTYPE_CODES[x.dtype], x, y, dot, len(x), x.numel() // len(x))
    return dot


def fake(x, y):
    return x.new_empty(x.shape[0], dtype=accumulation_dtype(x.dtype))


op = Op(
    "sample_dot(Tensor x, Tensor y) -> Tensor",
    reference=reference,
    fake=fake,
    backends={**_native.backends(launch, lambda x, y: (x, y)), "triton": triton("sample_dot")},
    example=lambda: tuple(draw((3, 2, 4, 5), (3, 2, 4, 5))),
)


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward(ctx, ddot):
    x, y = ctx.saved_tensors
    dx = OPS["interpolate"](y, None, ddot, None) if ctx.needs_input_grad[0] else None
    dy = OPS["interpolate"](x, None, ddot, None) if ctx.needs_input_grad[1] else None
    return dx, dy


op.differentiate(_save, _backward)
