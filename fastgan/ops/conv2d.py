"""Strided forward convolution with an epilogue: bias and activation, or bias and the statistics for a batch norm.

Formula      y[n,k,o] = phi(bias[k] + sum_{c,r} x[n,c, s o + d r - p] weight[k,c,r]), per spatial axis.
             conv2d_statistics (phi = identity): mean and biased var of each channel of y over the samples and pixels
             of each of G groups, group g being the samples [g N/G, (g+1) N/G). They are those of y as it is stored,
             rounded to its dtype: the batch norm that follows reads that y, and its derivatives assume that the mean
             and var it was given are those of what it reads
Shapes       x [N,C,H,W], weight [K,C/groups,R,S], bias [K] or None -> y [N,K,OH,OW],
             OH = floor((H + 2p - d(R-1) - 1)/s) + 1; conv2d_statistics: mean, var [G,K]
Dtypes       float32, bfloat16 (float32 accumulation) natively, float16 too on a GPU; every torch dtype through the
             reference. On a GPU float32 multiplies in TF32 where torch's own convolutions do; on a
             CPU float32 layers of 2 or 3 neighbouring taps an axis use minimal filtering (csrc/cpu/conv_winograd.hpp).
             mean and var are float32 (float64 for float64)
Layout       the kernels work in channels_last and convert NCHW at its edges; y is channels_last if x or weight
             suggests it, as torch decides
Autocast     lower: x, weight and bias go to the autocast dtype
Derivatives  first: conv_transpose2d, conv2d_weight, bias_act_backward. second and higher: the same ops (bilinear and
             closed); the activation's through bias_act_backward. mean and var are no differentiable outputs: their
             share of the gradient is in that of bn_act, which takes them as functions of its input
Saves        x, weight, and y where there is an activation
Traffic      2 accesses an element of x, y in all (read x, write y), mean and var included; PyTorch 4 with bias and
             activation as own passes, and 1 more of y for statistics
FLOPs        2 N K OH OW (C/groups) R S in the direct form; minimal filtering multiplies 0.44 to 0.64 of that
Determinism  bit-equal from run to run for one thread count, or one card and shape (moments of tiles, merged by Chan's
             formula in a fixed order)
Backends     cuda, triton, native, reference (torch.nn.functional.conv2d); conv2d_statistics: cuda, triton, reference
Source       Dumoulin and Visin, A guide to convolution arithmetic for deep learning (2016)
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from fastgan import _activation, _native
from fastgan._layout import CHANNELS_LAST, accumulation_dtype, empty, is_channels_last, laid_out
from fastgan._op import OPS, Op, draw, first_alone, wanted
from fastgan.choice import Backend, has_kernel, triton
from fastgan.ops.bias_act import epilogue_backward
from fastgan.ops.bn_act import moments

POSITIONS = 1 << 30  # the CUDA kernels hold coordinates in 32 bits, with room for taps outside the image


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


def cost_statistics(
    x: Tensor, weight: Tensor, stride: Any, padding: Any, dilation: Any, stat_groups: int
) -> dict[str, int]:
    """The cost of conv2d_statistics: y crosses memory once, as without statistics; mean and var are written besides."""
    found = cost(x, weight, stride, padding, dilation)
    n, k, oh, ow = output_shape(x, weight, stride, padding, dilation)
    return {"bytes": found["bytes"] + 8 * stat_groups * k, "flops": found["flops"] + 4 * n * k * oh * ow}


# ---- what the three convolution ops share ---------------------------------------------------------------------------


def channels_last(x: Tensor, weight: Tensor) -> bool:
    """The output's layout, by torch's own rule: channels_last if either operand suggests it."""
    return is_channels_last(x) or is_channels_last(weight)


@functools.lru_cache(4096)
def plan(
    module: Any, x: tuple, y: tuple, kernel: tuple, stride: tuple, padding: tuple, dilation: tuple, groups: int
) -> Any:
    """A core's description of the forward convolution x [N,C,H,W] -> y [N,K,OH,OW]."""
    return module.Conv(*x, *y[1:], *kernel, *stride, *padding, *dilation, groups)


def input_padding(x: Any, dy: Any, weight: Any, stride: Any, padding: Any, dilation: Any) -> list[int]:
    """The output_padding with which the adjoint of a convolution x -> dy gives back x's exact size (shapes in)."""
    return [
        x[2 + i] - ((dy[2 + i] - 1) * stride[i] - 2 * padding[i] + dilation[i] * (weight[2 + i] - 1) + 1)
        for i in (0, 1)
    ]


def operand(core: _native.Core, weight: Tensor) -> Tensor:
    """The weight as a core's kernels read it: by any strides on a CPU, [K][R][S][C/groups] in CUDA.

    A load of CUDA's is 16 bytes along C/groups. Of an NCHW weight they would lie in 8 sectors of 32 bytes, once for
    every 128 pixels; this copy moves the weight twice, and a channels_last weight not at all.
    """
    return weight.contiguous(memory_format=CHANNELS_LAST) if core is _native.CUDA else weight


def product_code(core: _native.Core, x: Tensor) -> int:
    """The dtype code of a product: on a GPU float32 multiplies in TF32 where torch's own convolutions do."""
    if core is _native.CUDA and x.dtype == torch.float32 and tf32_allowed(x):
        return _native.TF32
    return _native.DTYPE_CODES[x.dtype]


def tf32_allowed(x: Tensor) -> bool:
    if not x.is_cuda or torch.cuda.get_device_capability(x.device) < (8, 0):
        return False
    cudnn: Any = torch.backends.cudnn  # torch 2.9 renamed the switch and refuses the old name after the new one was set
    return cudnn.conv.fp32_precision == "tf32" if hasattr(cudnn, "conv") else cudnn.allow_tf32


def declines(
    core: _native.Core, pixels: Callable[[], int], x: Tensor, other: Tensor, bias: Tensor | None = None
) -> str:
    """Why a core leaves a convolution of x with `other` (a weight or dy) to others, or ""; pixels(): rows of y."""
    if x.dim() != 4 or other.dim() != 4:
        return f"{core.name} convolutions take batched 4-D tensors"
    reason = core.declines(x, other, bias)
    if reason or core is _native.CPU:
        return reason
    if x.is_cuda and x.dtype == torch.bfloat16 and torch.cuda.get_device_capability(x.device) < (8, 0):
        return "cuda convolutions multiply bfloat16 on tensor cores of compute capability 8.0 and newer"
    if max(pixels(), x.numel() // x.shape[1], other.numel()) >= POSITIONS:
        return "cuda convolutions count pixels and weights below 2^30"
    return ""


def backends(launch: Callable[..., Tensor], declines: Callable[..., str]) -> dict[str, Backend]:
    """{"cuda": ..., "native": ...} of one launcher launch(core, *args) and its declines(core, *args)."""
    cores = _native.CUDA, _native.CPU
    return {core.name: Backend(functools.partial(launch, core), functools.partial(declines, core)) for core in cores}


# ---- gradients of weights --------------------------------------------------------------------------------------------

_skipping = False  # of the process: a GPU's backward passes run in threads of their own


@contextlib.contextmanager
def without_weight_gradients(skip: bool = True) -> Iterator[None]:
    """Within: the backward of a convolution makes no gradient of its weight, whoever asks for one."""
    global _skipping
    before, _skipping = _skipping, _skipping or skip
    try:
        yield
    finally:
        _skipping = before


def skips_weight_gradients() -> bool:
    """Whether backward passes make no gradient of a convolution's weight now."""
    return _skipping


def skip_weight_gradients(skip: bool) -> None:
    """From now on; within `without_weight_gradients` until its end."""
    global _skipping
    _skipping = skip


def weight_is_wanted(ctx: Any, index: int) -> bool:
    """`wanted` of a convolution's weight, input `index`."""
    return not _skipping and wanted(ctx, index)


# ---- the op ---------------------------------------------------------------------------------------------------------


def reference(x, weight, bias, stride, padding, dilation, groups, activation, slope):
    y = torch.nn.functional.conv2d(x, weight, bias, stride, padding, dilation, groups)
    y = _activation.overwrite(y, activation, slope)
    return laid_out(y, channels_last(x, weight), activation != "identity")


def run(core, kernel, x, weight, bias, stride, padding, dilation, groups, *tail, elementwise=False):
    """y of a core's function that takes `tail` behind y; elementwise: whether an activation makes y."""
    shape = output_shape(x, weight, stride, padding, dilation)
    geometry = tuple(weight.shape[2:]), tuple(stride), tuple(padding), tuple(dilation), groups
    code, x_ = product_code(core, x), core.pixels(x)
    (bias,), w = _native.float_vectors(bias), operand(core, weight)
    y = empty(shape, x, True)
    core.call(
        kernel, x, plan(core.module(), tuple(x.shape), shape, *geometry), code, x_, w, code, w.stride(), bias, y, *tail
    )
    return core.image(y, channels_last(x, weight), elementwise)


def launch(core, x, weight, bias, stride, padding, dilation, groups, activation, slope):
    epilogue = _activation.CODES[activation], slope
    tail, elementwise = epilogue, activation != "identity"
    return run(core, "conv2d", x, weight, bias, stride, padding, dilation, groups, *tail, elementwise=elementwise)


def launch_declines(core, x, weight, bias, stride, padding, dilation, *rest):
    def pixels():
        n, _, h, w = output_shape(x, weight, stride, padding, dilation)
        return n * h * w

    return declines(core, pixels, x, weight, bias)


def fake(x, weight, bias, stride, padding, dilation, groups, activation, slope):
    last = channels_last(x, weight)
    return laid_out(empty(output_shape(x, weight, stride, padding, dilation), x, last), last, activation != "identity")


op = Op(
    "conv2d(Tensor x, Tensor weight, Tensor? bias, int[] stride, int[] padding, int[] dilation, int groups,"
    " str activation, float slope) -> Tensor",
    reference=reference,
    fake=fake,
    backends={**backends(launch, launch_declines), "triton": triton("conv2d")},
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
    dt, dbias = epilogue_backward(dy, y, ctx.activation, ctx.slope, ctx.has_bias and wanted(ctx, 2))
    dx = dweight = None
    if wanted(ctx, 0):
        extra = input_padding(x.shape, dt.shape, weight.shape, *geometry)
        dx = OPS["conv_transpose2d"](
            dt, weight, None, ctx.stride, ctx.padding, extra, ctx.groups, ctx.dilation, "identity", 0.0
        )
    if weight_is_wanted(ctx, 1):
        dweight = OPS["conv2d_weight"](x, dt, list(weight.shape[2:]), *geometry, ctx.groups, is_channels_last(weight))
    return dx, dweight, dbias, *(None,) * 6


op.differentiate(_save, _backward)


# ---- with the statistics for a batch norm ---------------------------------------------------------------------------

# Pixels of a stat group up to which bn_act needs no help: a program of its Triton kernel holds them, 512 by 16 channels
# of a 16-bit type, and reads them once anyway, in one launch.
LEAST_PIXELS = 512

NO_EPILOGUE = _activation.CODES["identity"], 0.0


def statistics_pay(y: tuple, device: str, name: str, stat_groups: int) -> bool:
    """Whether the op `name` with statistics beats the convolution and bn_act's own: on a GPU, for y's shape [N,K,H,W].

    On a CPU there is nothing to win: the pass that it saves reads 75 MB of a DCGAN-64 step at batch 128 in bfloat16,
    a few milliseconds of a second.
    """
    if not has_kernel(name, device) or stat_groups < 1 or y[0] % stat_groups:
        return False
    return y[0] // stat_groups * y[2] * y[3] > LEAST_PIXELS


def with_statistics(y: Tensor, stat_groups: int) -> tuple[Tensor, Tensor, Tensor]:
    """(y, mean, var) of a convolution's output: what the epilogues compute, by a pass over y."""
    return y, *moments(y, stat_groups)


def statistics_like(y: Tensor, stat_groups: int) -> tuple[Tensor, Tensor, Tensor]:
    """(y, mean, var) with the last two empty, for tracing."""
    mean = y.new_empty(stat_groups, y.shape[1], dtype=accumulation_dtype(y.dtype))
    return y, mean, torch.empty_like(mean)


def statistics_backends(launch: Callable[..., tuple], declines: Callable[..., str], stem: str) -> dict[str, Backend]:
    """Those of a convolution with statistics: launch(core, *args), and the convolution's own declines(core, *args)."""

    def cuda_declines(x: Tensor, *args: Any) -> str:
        reason, stat_groups = declines(_native.CUDA, x, *args), args[-1]
        if reason or (stat_groups > 0 and x.shape[0] % stat_groups == 0):
            return reason
        return f"stat_groups must divide the batch, got {stat_groups} and {x.shape[0]}"

    cuda = Backend(functools.partial(launch, _native.CUDA), cuda_declines)
    return {"cuda": cuda, "triton": triton(stem, f"{stem}_statistics")}


def launch_statistics(core, x, weight, bias, stride, padding, dilation, groups, stat_groups):
    mean, var = (x.new_empty(stat_groups, weight.shape[0], dtype=torch.float32) for _ in range(2))
    geometry = stride, padding, dilation, groups
    tail = *NO_EPILOGUE, stat_groups, mean, var
    return run(core, "conv2d_statistics", x, weight, bias, *geometry, *tail), mean, var


def reference_statistics(x, weight, bias, stride, padding, dilation, groups, stat_groups):
    return with_statistics(reference(x, weight, bias, stride, padding, dilation, groups, "identity", 0.0), stat_groups)


def fake_statistics(x, weight, bias, stride, padding, dilation, groups, stat_groups):
    return statistics_like(fake(x, weight, bias, stride, padding, dilation, groups, "identity", 0.0), stat_groups)


statistics = Op(
    "conv2d_statistics(Tensor x, Tensor weight, Tensor? bias, int[] stride, int[] padding, int[] dilation, int groups,"
    " int stat_groups) -> (Tensor, Tensor, Tensor)",
    reference=reference_statistics,
    fake=fake_statistics,
    backends=statistics_backends(launch_statistics, launch_declines, "conv2d"),
    autocast="lower",
    example=lambda: (*draw((4, 3, 9, 8), (5, 3, 4, 3), (5,)), [2, 1], [1, 0], [1, 1], 1, 2),
)


def saves_statistics(save: Callable[..., None]) -> Callable[..., None]:
    """The convolution's own `save` for its op with statistics."""

    def save_statistics(ctx, inputs, output):
        first_alone(ctx, output)
        save(ctx, (*inputs[:-1], "identity", 0.0), output[0])

    return save_statistics


def backward_statistics(backward: Callable[..., tuple]) -> Callable[..., tuple]:
    """The convolution's own backward for its op with statistics, which has one argument less."""
    return lambda ctx, dy, _dmean, _dvar: backward(ctx, dy)[:-1]


statistics.differentiate(saves_statistics(_save), backward_statistics(_backward))
