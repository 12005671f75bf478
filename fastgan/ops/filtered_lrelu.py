"""Bias, upsampling through a filter, leaky ReLU with gain and clamp, downsampling through a filter, in one pass.

Formula      y = fd * phi(up^2 fu * u), every down-th result; u holds x[i] + bias at up i, 0 elsewhere and in the
             padding; phi(t) = gain t where t > 0, else gain slope t, kept within +-clamp where clamp >= 0
Shapes       x [N,C,H,W]; bias [C] or None; fu, fd [KH,KW], or [K] for f f^T -> y [N,C,OH,OW]; signs, uint8
             [1 or 2, N, C, MH, 4 ceil(MW / 32)], of the upsampled image MH = H up + pad_before + pad_after - KH + 1;
             tie [0], which ties the derivative to x and bias in autograd's graph; OH = (MH - KH of fd) // down + 1
Dtypes       float32, bfloat16 natively (computed in float32, rounded once), float16 too on a GPU; every floating torch
             dtype through the reference. Filters are float32, or float64 beside a float64 x
Layout       y keeps x's layout (channels_last or NCHW); signs are of planes in either
Autocast     first: runs in x's dtype
Derivatives  of x and bias every order: filtered_lrelu_backward, which is linear and its own derivative with the two
             filters exchanged; 0 where the clamp holds, equality included. The derivative of a derivative for x and
             bias is zeros, as that of torch's leaky_relu. Of the filters it raises: the function in fastgan.functional
             composes other ops where a filter learns
Saves        signs: a bit for each sample of the upsampled image, two under a clamp; the filters
Traffic      x once, y once and the signs once; PyTorch writes the upsampled image three times and reads it three times
FLOPs        2 for each tap that meets a sample, rows before columns where a filter is a product
Determinism  bit-equal from run to run
Backends     cuda and triton (to 32 taps a side and factors of 32), native, reference (two depthwise convolutions of
             torch around its leaky ReLU)
Source       Karras et al., Alias-Free Generative Adversarial Networks (2021), section 3.2 and its appendix D
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastgan import _native
from fastgan._layout import accumulation_dtype, dense, empty, is_channels_last, per_channel
from fastgan._op import OPS, Op, draw, wanted
from fastgan.choice import triton
from fastgan.ops import upfirdn2d

WORD = 32  # samples of a row whose signs lie in one word of four bytes
LONGEST = 32  # taps of a side, and factors, on a GPU: tiles of longer filters do not fit on chip
LONGEST_AXIS = 2**29  # samples with zeros and padding, there: counted in 32 bits


def middle(x: Tensor, f: Tensor, up: int, pad: Sequence[int]) -> list[int]:
    """(MH, MW) of the upsampled image."""
    return upfirdn2d.output_size(x.shape[2:], upfirdn2d.taps_of(f), (up, up), (1, 1), pad)


def output_size(
    x: Tensor, fu: Tensor, fd: Tensor, up: int, down: int, pad: Sequence[int], pad_out: Sequence[int]
) -> list[int]:
    """(OH, OW)."""
    return upfirdn2d.output_size(middle(x, fu, up, pad), upfirdn2d.taps_of(fd), (1, 1), (down, down), pad_out)


def signs_shape(x: Tensor, size: Sequence[int], clamp: float) -> tuple[int, ...]:
    words = -(-size[1] // WORD)
    return (2 if clamp >= 0 else 1, *x.shape[:2], size[0], 4 * words)


def cost(x: Tensor, fu: Tensor, fd: Tensor, up: int, down: int, pad: Sequence[int], clamp: float) -> dict[str, int]:
    """Bytes and FLOPs that a perfect kernel needs."""
    height, width = middle(x, fu, up, pad)
    signs = signs_shape(x, (height, width), clamp)
    fine = x.new_empty((*x.shape[:2], height, width), device="meta")
    first = upfirdn2d.cost(x, fu, (up, up), (1, 1), pad)
    second = upfirdn2d.cost(fine, fd, (1, 1), (down, down), [0] * 4)
    outside = first["bytes"] + second["bytes"] - 2 * fine.numel() * x.element_size()  # the upsampled image stays within
    return {"bytes": outside + torch.Size(signs).numel(), "flops": first["flops"] + second["flops"]}


def does_not_fit(fu: Tensor, fd: Tensor, up: int, down: int) -> str:
    """Why a GPU's kernels leave these filters and factors, or ""."""
    longest = max(*upfirdn2d.taps_of(fu), *upfirdn2d.taps_of(fd), up, down)
    return f"GPU kernels take at most {LONGEST} taps a side and factors of {LONGEST}, got {longest}" * (
        longest > LONGEST
    )


def too_large(x: Tensor, fu: Tensor, fd: Tensor, up: int, down: int, *pads: Sequence[int]) -> str:
    """Why a GPU's kernels leave this case, or ""; pads: of the first filter and, backward, of the second one."""
    inner = middle(x, fu, up, pads[0])
    longest = max(*x.shape[2:], *inner) * max(up, down) + max(abs(p) for pad in pads for p in pad)
    if longest > LONGEST_AXIS:
        return f"GPU kernels count positions in 32 bits, got {longest}"
    return does_not_fit(fu, fd, up, down)


# ---- forward --------------------------------------------------------------------------------------------------------


def reference(x, bias, fu, fd, up, down, pad, flip, gain, slope, clamp):
    dtype = accumulation_dtype(x.dtype)
    t = x.to(dtype) if bias is None else x.to(dtype) + per_channel(bias, x).to(dtype)
    t = upfirdn2d.reference(t, fu, (up, up), (1, 1), pad, flip, float(up * up))
    low = ~(t > 0)
    t = torch.where(low, gain * slope * t, gain * t)
    kinds = [low]
    if clamp >= 0:
        kinds.append(t.abs() >= clamp)
        t = t.clamp(-clamp, clamp)
    y = upfirdn2d.reference(t, fd, (1, 1), (down, down), [0] * 4, flip, 1.0)
    signs = torch.stack([_packed(kind) for kind in kinds])
    return dense(y.to(x.dtype), is_channels_last(x)), signs, x.new_empty(0)


def _packed(bits: Tensor) -> Tensor:
    """Rows of bits as bytes, the first bit the lowest; what is missing to a word is 0."""
    rows = torch.nn.functional.pad(bits.to(torch.uint8), (0, -bits.shape[-1] % WORD))
    places = torch.arange(8, dtype=torch.uint8, device=bits.device)
    return (rows.unflatten(-1, (-1, 8)) << places).sum(-1, dtype=torch.uint8)


def _unpacked(signs: Tensor, width: int) -> Tensor:
    """Rows of `width` bits."""
    places = torch.arange(8, dtype=torch.uint8, device=signs.device)
    return ((signs[..., None] >> places) & 1).flatten(-2)[..., :width].bool()


def _launch(core, kernel, x, tensors, filters, geometry, size, flip, form):
    """tensors: what the kernel takes behind x and before its filters, and behind them; geometry: (up, down, pad, pad
    of the second filter); form: gain, slope, clamp."""
    (fu, fd), (up, down, pad, pad_out) = filters, geometry
    channels_last = is_channels_last(x)
    height, width = middle(x, fu, up, pad)
    taps = *upfirdn2d.taps_of(fu), *upfirdn2d.taps_of(fd)
    y = empty((*x.shape[:2], *size), x, channels_last)
    before, after = tensors
    sizes = (*x.shape, height, width, *size, *taps, up, down, pad[0], pad[2], pad_out[0], pad_out[2])
    flags = fu.dim() == 1, fd.dim() == 1, flip, channels_last
    call = x, _native.DTYPE_CODES[x.dtype], x, before, *_native.float_vectors(fu, fd), y, *after, *sizes, *flags, *form
    core.call(kernel, *call)
    return y


def launch(core, x, bias, fu, fd, up, down, pad, flip, gain, slope, clamp):
    x = dense(x, is_channels_last(x))
    (bias,) = _native.float_vectors(bias)
    signs = x.new_empty(signs_shape(x, middle(x, fu, up, pad), clamp), dtype=torch.uint8)
    size = output_size(x, fu, fd, up, down, pad, [0] * 4)
    geometry, form = (up, down, pad, [0] * 4), (gain, slope, clamp)
    y = _launch(core, "filtered_lrelu_forward", x, (bias, (signs,)), (fu, fd), geometry, size, flip, form)
    return y, signs, x.new_empty(0)


def fake(x, bias, fu, fd, up, down, pad, flip, gain, slope, clamp):
    y = empty((*x.shape[:2], *output_size(x, fu, fd, up, down, pad, [0] * 4)), x, is_channels_last(x))
    signs = x.new_empty(signs_shape(x, middle(x, fu, up, pad), clamp), dtype=torch.uint8)
    return y, signs, x.new_empty(0)


def _example():
    x, bias, fu, fd = draw((2, 3, 5, 4), (3,), (4, 3), (3,))
    return x, bias, fu.abs(), fd, 2, 2, [3, 2, 2, 3], False, 1.5, 0.2, 2.0


op = Op(
    "filtered_lrelu(Tensor x, Tensor? bias, Tensor fu, Tensor fd, int up, int down, int[4] pad, bool flip, float gain, "
    "float slope, float clamp) -> (Tensor, Tensor, Tensor)",
    reference=reference,
    fake=fake,
    backends={
        **_native.backends(
            launch,
            lambda x, *rest: (x,),
            lambda x, bias, fu, fd, up, down, pad, *form: too_large(x, fu, fd, up, down, pad),
        ),
        "triton": triton("filtered_lrelu"),
    },
    example=_example,
)


def _save(ctx, inputs, output):
    x, bias, fu, fd, ctx.up, ctx.down, ctx.pad, ctx.flip, ctx.gain, ctx.slope, ctx.clamp = inputs
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.shape, ctx.inner = x.shape, middle(x, fu, ctx.up, ctx.pad)
    _, signs, tie = output
    ctx.mark_non_differentiable(signs)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(signs, fu, fd, tie)


def _backward(ctx, dy, _, dtie):
    """dtie comes from a derivative of the derivative, with dy None where y itself is not asked for."""
    signs, fu, fd, tie = ctx.saved_tensors
    _refuse_filters(ctx, 2)
    if dy is None:
        return *_zeros(ctx, dtie), *[None] * 9
    dx = dbias = None
    wants_bias = ctx.bias_dtype is not None and ctx.needs_input_grad[1]
    if ctx.needs_input_grad[0] or wants_bias:
        pads = adjoint_pads(ctx.shape[2:], ctx.inner, dy.shape[2:], (fu, fd), ctx.up, ctx.down, ctx.pad, [0] * 4)
        form = not ctx.flip, ctx.gain * ctx.up**2, ctx.slope, ctx.clamp
        dx = OPS["filtered_lrelu_backward"](dy, signs, fd, fu, ctx.down, ctx.up, *pads, *form, tie)
        dbias = dx.sum([0, 2, 3]).to(ctx.bias_dtype) if wants_bias else None
    return dx, dbias, *[None] * 9


op.differentiate(_save, _backward)


def _zeros(ctx, dtie):
    """What a derivative has for derivatives of x and bias: the slopes are the same all around them."""
    dx = dtie.new_zeros(ctx.shape) if wanted(ctx, 0) else None
    wants_bias = ctx.bias_dtype is not None and wanted(ctx, 1)
    return dx, dtie.new_zeros(ctx.shape[1], dtype=ctx.bias_dtype) if wants_bias else None


def _refuse_filters(ctx, index):
    """Raises where one of the two filters, inputs `index` and the next, requires a gradient."""
    if ctx.needs_input_grad[index] or ctx.needs_input_grad[index + 1]:
        raise NotImplementedError(
            "filtered_lrelu: the filters must not require gradients, got one that does; "
            "fastgan.functional.filtered_lrelu composes ops that give them"
        )


def adjoint_pads(size, inner, out, filters, up, down, pad, pad_out):
    """The paddings of the adjoint, whose first filter is the last one here."""
    first, last = (upfirdn2d.taps_of(f) for f in filters)
    one = (1, 1)
    return (
        upfirdn2d.adjoint_pad(inner, out, last, one, (down, down), pad_out),
        upfirdn2d.adjoint_pad(size, inner, first, (up, up), one, pad),
    )


# ---- backward: the same pass with known slopes ----------------------------------------------------------------------
# tie is the forward's, empty, or None. It carries no number: by it a derivative requires gradients wherever x or bias
# does, as that of torch's leaky_relu, and hands them zeros. Keeping x or y for this would keep their memory.


def reference_backward(x, signs, fu, fd, up, down, pad, pad_out, flip, gain, slope, clamp, tie):
    dtype = accumulation_dtype(x.dtype)
    t = upfirdn2d.reference(x.to(dtype), fu, (up, up), (1, 1), pad, flip, 1.0)
    low, *held = _unpacked(signs, t.shape[-1])
    t = torch.where(low, gain * slope * t, gain * t)
    t = t.masked_fill(held[0], 0) if held else t
    y = upfirdn2d.reference(t, fd, (1, 1), (down, down), pad_out, flip, 1.0)
    return dense(y.to(x.dtype), is_channels_last(x))


def launch_backward(core, x, signs, fu, fd, up, down, pad, pad_out, flip, gain, slope, clamp, tie):
    x, signs = dense(x, is_channels_last(x)), signs.contiguous()
    size = output_size(x, fu, fd, up, down, pad, pad_out)
    geometry, form = (up, down, pad, pad_out), (gain, slope, clamp)
    return _launch(core, "filtered_lrelu_backward", x, (signs, ()), (fu, fd), geometry, size, flip, form)


def fake_backward(x, signs, fu, fd, up, down, pad, pad_out, flip, gain, slope, clamp, tie):
    return empty((*x.shape[:2], *output_size(x, fu, fd, up, down, pad, pad_out)), x, is_channels_last(x))


def _example_backward():
    x, bias, fu, fd, up, down, pad, flip, gain, slope, clamp = _example()
    signs = reference(x, bias, fu, fd, up, down, pad, flip, gain, slope, clamp)[1]
    return x, signs, fu, fd, up, down, pad, [0, 1, 2, -1], flip, gain, slope, clamp, x.new_empty(0)


backward = Op(
    "filtered_lrelu_backward(Tensor x, Tensor signs, Tensor fu, Tensor fd, int up, int down, int[4] pad, "
    "int[4] pad_out, bool flip, float gain, float slope, float clamp, Tensor? tie) -> Tensor",
    reference=reference_backward,
    fake=fake_backward,
    backends={
        **_native.backends(launch_backward, lambda x, *rest: (x,), lambda x, signs, *case: too_large(x, *case[:6])),
        "triton": triton("filtered_lrelu", "filtered_lrelu_backward"),
    },
    example=_example_backward,
)


def _save_backward(ctx, inputs, output):
    x, signs, fu, fd, ctx.up, ctx.down, ctx.pad, ctx.pad_out, ctx.flip, *ctx.form, tie = inputs
    ctx.size, ctx.inner = x.shape[2:], middle(x, fu, ctx.up, ctx.pad)
    ctx.save_for_backward(signs, fu, fd, tie)


def _backward_of_backward(ctx, dy):
    signs, fu, fd, tie = ctx.saved_tensors
    _refuse_filters(ctx, 2)
    dx = None
    if ctx.needs_input_grad[0]:
        pads = adjoint_pads(ctx.size, ctx.inner, dy.shape[2:], (fu, fd), ctx.up, ctx.down, ctx.pad, ctx.pad_out)
        dx = OPS["filtered_lrelu_backward"](dy, signs, fd, fu, ctx.down, ctx.up, *pads, not ctx.flip, *ctx.form, tie)
    return dx, *[None] * 11, dy.new_zeros(0) if ctx.needs_input_grad[12] else None


backward.differentiate(_save_backward, _backward_of_backward)
