"""Upsampling by zeros, padding, a filter and downsampling, in one pass.

Formula      y[o] = gain sum over k of f'[k] u[down o + k - pad], in both axes; u holds x[i] at up i and 0 elsewhere;
             f' is f turned by 180 degrees (a convolution), or f itself with flip (a correlation)
Shapes       x [N,C,H,W]; f [KH,KW], or [K] for the filter f f^T -> y [N,C,OH,OW],
             OH = (H up + pad_before + pad_after - KH) // down + 1; a negative pad crops
Dtypes       float32, bfloat16 natively (computed in float32), float16 too on a GPU; every floating torch dtype through
             the reference. f is float32, or float64 beside a float64 x
Layout       y keeps x's layout (channels_last or NCHW)
Autocast     first: runs in x's dtype
Derivatives  every order, by itself: the adjoint swaps up with down, turns f once more and pads by KH - 1 - pad; of f
             every order too, by PyTorch's convolution of the zeros written out
Saves        f; x where f wants a gradient
Traffic      x once, y once; PyTorch writes the zeros and the padding out and reads them again
FLOPs        2 an output and tap that meets a sample: KH KW / up^2 of them; of a filter that is a product of a column
             and a row, found at the call on a CPU, KW / up and KH / up of every row that is needed
Determinism  bit-equal from run to run
Backends     cuda, triton, native, reference (depthwise torch convolution of the zeros written out)
Source       Karras et al., Analyzing and Improving the Image Quality of StyleGAN (2020), section 2 and its appendix B
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from fastgan import _native
from fastgan._layout import accumulation_dtype, dense, empty, is_channels_last
from fastgan._op import OPS, Op, draw
from fastgan.choice import triton

Two = Sequence[int]  # (y, x)


def output_size(size: Two, taps: Two, up: Two, down: Two, pad: Sequence[int]) -> list[int]:
    """(OH, OW) of an image of (H, W); pad is (before y, after y, before x, after x)."""
    return [(size[i] * up[i] + pad[2 * i] + pad[2 * i + 1] - taps[i]) // down[i] + 1 for i in (0, 1)]


def taps_of(f: Tensor) -> tuple[int, int]:
    """(KH, KW)."""
    return (f.shape[0], f.shape[-1])


def adjoint_pad(size: Two, out: Two, taps: Two, up: Two, down: Two, pad: Sequence[int]) -> list[int]:
    """The padding of the adjoint, which makes images of `size` of images of `out`."""
    found = []
    for i in (0, 1):
        before = taps[i] - 1 - pad[2 * i]
        found += [before, (size[i] - 1) * up[i] + taps[i] - out[i] * down[i] - before]
    return found


def cost(x: Tensor, f: Tensor, up: Two, down: Two, pad: Sequence[int]) -> dict[str, int]:
    """Bytes and FLOPs that a perfect kernel needs, f taken for no product unless it is [K]."""
    height, width = output_size(x.shape[2:], taps_of(f), up, down, pad)
    images, (kh, kw) = x.shape[0] * x.shape[1], taps_of(f)
    y = images * height * width
    along, across = -(-kw // up[1]), -(-kh // up[0])
    flops = 2 * (y * along + images * height * x.shape[3] * across) if f.dim() == 1 else 2 * y * along * across
    return {"bytes": (x.numel() + y) * x.element_size(), "flops": flops}


def reference(x, f, up, down, pad, flip, gain):
    dtype = accumulation_dtype(x.dtype)
    f = turned(f, flip).to(dtype)
    padded = written_out(x.to(dtype), up, pad)
    if f.dim() == 2:
        y = _slide(padded, f * gain, down)
    else:
        y = _slide(_slide(padded, (f * gain)[None], (1, down[1])), f[:, None], (down[0], 1))
    return dense(y.to(x.dtype), is_channels_last(x))


def turned(f: Tensor, flip: bool) -> Tensor:
    """f as it is slid over the samples."""
    return f if flip else f.flip(list(range(f.dim())))


def written_out(x: Tensor, up: Two, pad: Sequence[int]) -> Tensor:
    """x with up - 1 zeros behind each sample, padded or cropped."""
    n, c, h, w = x.shape
    if max(up) > 1:
        x = F.pad(x.reshape(n, c, h, 1, w, 1), (0, up[1] - 1, 0, 0, 0, up[0] - 1))
    return F.pad(x.reshape(n, c, h * up[0], w * up[1]), (pad[2], pad[3], pad[0], pad[1]))


def _slide(x: Tensor, f: Tensor, stride: Two) -> Tensor:
    channels = x.shape[1]
    return F.conv2d(x, f.expand(channels, 1, *f.shape), stride=tuple(stride), groups=channels)


def launch(core, x, f, up, down, pad, flip, gain):
    channels_last = is_channels_last(x)
    x = dense(x, channels_last)
    (f,) = _native.float_vectors(f)
    kh, kw = taps_of(f)
    oh, ow = output_size(x.shape[2:], (kh, kw), up, down, pad)
    y = empty((*x.shape[:2], oh, ow), x, channels_last)
    sizes = (*x.shape, oh, ow, kh, kw, *up, *down, pad[0], pad[2])
    core.call("upfirdn2d", x, _native.DTYPE_CODES[x.dtype], x, f, y, *sizes, f.dim() == 1, flip, channels_last, gain)
    return y


def fake(x, f, up, down, pad, flip, gain):
    size = output_size(x.shape[2:], taps_of(f), up, down, pad)
    return empty((*x.shape[:2], *size), x, is_channels_last(x))


op = Op(
    "upfirdn2d(Tensor x, Tensor f, int[2] up, int[2] down, int[4] pad, bool flip, float gain) -> Tensor",
    reference=reference,
    fake=fake,
    backends={**_native.backends(launch, lambda x, *rest: (x,)), "triton": triton("upfirdn2d")},
    example=lambda: (*draw((2, 3, 5, 4), (4, 3)), [2, 1], [1, 2], [2, 1, 1, 1], False, 1.5),
)


def _save(ctx, inputs, output):
    x, f, ctx.up, ctx.down, ctx.pad, ctx.flip, ctx.gain = inputs
    ctx.size = x.shape[2:]
    ctx.save_for_backward(f, x if ctx.needs_input_grad[1] else None)


def _backward(ctx, dy):
    f, x = ctx.saved_tensors
    dx = df = None
    if ctx.needs_input_grad[0]:
        pad = adjoint_pad(ctx.size, dy.shape[2:], taps_of(f), ctx.up, ctx.down, ctx.pad)
        dx = OPS["upfirdn2d"](dy, f, ctx.down, ctx.up, pad, not ctx.flip, ctx.gain)
    if ctx.needs_input_grad[1]:
        df = _filter_gradient(dy, x, f, ctx)
    return dx, df, None, None, None, None, None


op.differentiate(_save, _backward)


def _filter_gradient(dy, x, f, ctx):
    """df'[k] = gain sum over n, c, o of dy[o] u[down o + k], as one channel a group; f' f'^T of a [K]."""
    dtype = accumulation_dtype(x.dtype)
    u = written_out(x.to(dtype), ctx.up, ctx.pad)
    (n, c), (kh, kw) = dy.shape[:2], taps_of(f)
    slid = dy.to(dtype).reshape(n * c, 1, *dy.shape[2:])
    g = F.conv2d(u.reshape(1, n * c, *u.shape[2:]), slid, dilation=tuple(ctx.down), groups=n * c)
    g = g[0, :, :kh, :kw].sum(0) * ctx.gain
    if f.dim() == 1:
        g = (g + g.T) @ turned(f, ctx.flip).to(dtype)
    return turned(g, ctx.flip).to(f.dtype)
