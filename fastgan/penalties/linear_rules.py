"""Which ATen and fastgan ops are linear in x, or piecewise so: the function that runs and records each.

An op that is absent here, or whose rule raises Declined, sends the discriminator to double backward. Rules see ops as
they arrive below autograd and autocast: composite functions taken apart, casts in the open. Closures keep shapes and
numbers, never tensors: those belong to the tape, which hands them to autograd.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastgan import _activation
from fastgan._layout import accumulation_dtype, empty, image, is_channels_last, per_channel
from fastgan._op import OPS
from fastgan.ops.filtered_lrelu import adjoint_pads, middle
from fastgan.ops.upfirdn2d import adjoint_pad, taps_of
from fastgan.penalties.linear_steps import (
    Bias,
    Concatenation,
    Convolution,
    Convolution3d,
    EvalNorm,
    FilteredGate,
    Gate,
    LinearStep,
    Map,
    Matmul,
    Product,
    Resampling,
    Sum,
    TransposedConvolution,
    innermost,
)
from fastgan.penalties.tape import Declined, Rule, Tape, Traced

aten = torch.ops.aten

# ---- the table ------------------------------------------------------------------------------------------------------

# "aten.mul.Tensor" -> rule(tape, *args, **kwargs): runs the op on the values and records it. In-place forms go through
# the rule of the op that they are a form of.
RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, function))
        return function

    return register


def shape_rule(*names: str) -> None:
    """Ops whose result depends on the shape of their input alone: noise, zeros, empty tensors."""
    for name in names:
        packet, overload = name.removeprefix("aten.").split(".")
        op = getattr(getattr(aten, packet), overload)
        RULES[name] = lambda tape, h, *args, op=op, **kwargs: op(tape.read(h), *args, **kwargs)


shape_rule("aten.empty_like.default", "aten.zeros_like.default", "aten.ones_like.default", "aten.full_like.default")
shape_rule("aten.new_empty.default", "aten.new_zeros.default", "aten.new_ones.default", "aten.new_full.default")
shape_rule("aten.rand_like.default", "aten.randn_like.default")


def plain(*operands: Any) -> None:
    """The operands that a rule takes only where they do not depend on x."""
    if any(isinstance(p, Traced) for p in operands):
        raise Declined("a product of two values that depend on x is not linear")


# ---- layers ---------------------------------------------------------------------------------------------------------


@rule("aten.convolution.default")
def convolution(tape: Tape, h: Any, w: Tensor, b: Tensor | None, *arguments: Any) -> Any:
    stride, padding, dilation, transposed, output_padding, groups = arguments
    plain(w, b)
    line = w.dim() == 3  # a signal is an image one pixel high
    numbers = zip((1, 0, 1, 0), (stride, padding, dilation, output_padding), strict=True)
    *geometry, extra = ([least] * line + list(given) for least, given in numbers)
    if w.dim() < 5:
        if transposed:
            return conv_transpose2d(tape, h, w, b, *geometry[:2], extra, groups, geometry[2], "identity", 0)
        return conv2d(tape, h, w, b, *geometry, groups, "identity", 0.0)
    x = tape.read(h)
    how = (*geometry, transposed, extra, groups)
    step = Convolution3d(h.node, tape.hold(w), tape.hold(b), x.shape, how)
    return _layer(tape, step, w, b, x, aten.convolution(x, w, b, *how))


def _layer(tape: Tape, step: LinearStep, w: Tensor | None, b: Tensor | None, primal: Tensor, y: Tensor) -> Any:
    """Record a step with a weight and a bias."""
    tape.learn(step, factors=(w,), terms=(b,), primal=primal)
    return tape.record(step, y)


@rule("fastgan.conv2d.default")
def conv2d(tape: Tape, h: Any, w: Tensor, b: Tensor | None, *arguments: Any) -> Any:
    stride, padding, dilation, groups, activation, slope = arguments
    plain(w, b)
    x, geometry = tape.read(h), (list(stride), list(padding), list(dilation))
    y = OPS["conv2d"](innermost(x), image(w), b, *geometry, groups, gated(activation), slope)
    y = y.squeeze(2) if x.dim() == 3 else y
    step = Convolution(h.node, tape.hold(w), tape.hold(b), x.shape, geometry, groups)
    return gate(tape, _layer(tape, step, w, b, x, y), y, activation, slope)


@rule("fastgan.conv_transpose2d.default")
def conv_transpose2d(tape: Tape, h: Any, w: Tensor, b: Tensor | None, *arguments: Any) -> Any:
    stride, padding, output_padding, groups, dilation, activation, slope = arguments
    plain(w, b)
    x, geometry = tape.read(h), (list(stride), list(padding), list(dilation))
    extra = list(output_padding)
    what = innermost(x), image(w), b, *geometry[:2], extra, groups, geometry[2]
    y = OPS["conv_transpose2d"](*what, gated(activation), slope)
    y = y.squeeze(2) if x.dim() == 3 else y
    step = TransposedConvolution(h.node, tape.hold(w), tape.hold(b), x.shape, geometry, groups)
    step.output_padding = extra
    return gate(tape, _layer(tape, step, w, b, x, y), y, activation, slope)


@rule("fastgan.upfirdn2d.default")
def upfirdn2d(tape: Tape, h: Any, f: Tensor, up: Any, down: Any, pad: Any, flip: bool, gain: float) -> Any:
    plain(f)
    if f.requires_grad:
        raise Declined("upfirdn2d has a rule for filters that do not learn alone")
    x = tape.read(h)
    y = OPS["upfirdn2d"](x, f, up, down, pad, flip, gain)
    back = adjoint_pad(x.shape[2:], y.shape[2:], taps_of(f), up, down, pad)
    step = Resampling(h.node, tape.hold(f), (up, down, pad, flip, gain), (down, up, back, not flip, gain))
    return tape.record(step, y)


@rule("fastgan.filtered_lrelu.default")
def filtered_lrelu(tape: Tape, h: Any, b: Tensor | None, fu: Tensor, fd: Tensor, *arguments: Any) -> Any:
    plain(b, fu, fd)
    if fu.requires_grad or fd.requires_grad:
        raise Declined("filtered_lrelu has a rule for filters that do not learn alone")
    x = tape.read(h)
    y, signs, tie = OPS["filtered_lrelu"](x, b, fu, fd, *arguments)
    if b is not None:
        step = Bias(h.node, tape.hold(b), 1)
        tape.learn(step, terms=(b,))
        h = tape.record(step, x)
    up, down, pad, flip, gain, slope, clamp = arguments
    ends = x.shape[2:], middle(x, fu, up, pad), y.shape[2:]
    back = adjoint_pads(*ends, (fu, fd), up, down, pad, [0] * 4)
    form = gain * up**2, slope, clamp, None
    held = tape.hold(fu), tape.hold(fd), tape.hold(signs)
    passes = (up, down, pad, [0] * 4, flip, *form), (down, up, *back, not flip, *form)
    return tape.record(FilteredGate(h.node, *held, *passes), y), signs, tie


def gated(activation: str) -> str:
    if activation not in ("identity", "relu", "leaky_relu"):
        raise Declined(f"{activation} is smooth, not piecewise linear")
    return activation


def gate(tape: Tape, h: Any, y: Tensor, activation: str, slope: float, gain: float = 1.0, clamp: float = -1.0) -> Any:
    """Record an activation whose output y is there already."""
    if activation == "identity" and gain == 1 and clamp < 0:
        return h
    if activation == "leaky_relu" and not slope >= 0:
        raise Declined(f"leaky_relu with a negative slope of {slope} cannot be told from its output's sign")
    return tape.record(Gate(h.node, tape.hold(y), activation, slope, gain, clamp), y)


@rule("aten.relu.default")
def relu(tape: Tape, h: Any) -> Any:
    return gate(tape, h, torch.relu(tape.read(h)), "relu", 0.0)


@rule("aten.leaky_relu.default")
def leaky_relu(tape: Tape, h: Any, slope: float = 0.01) -> Any:
    return gate(tape, h, torch.nn.functional.leaky_relu(tape.read(h), slope), "leaky_relu", slope)


@rule("fastgan.bias_act.default")
def bias_act(tape: Tape, h: Any, b: Tensor | None, activation: str, slope: float, gain: float, clamp: float) -> Any:
    plain(b)
    y = OPS["bias_act"](tape.read(h), b, gated(activation), slope, gain, clamp)
    if b is not None:
        step = Bias(h.node, tape.hold(b), 1)
        tape.learn(step, terms=(b,))
        h = tape.record(step, y)
    return gate(tape, h, y, activation, slope, gain, clamp)


@rule("aten.mm.default", "aten.mv.default", "aten.bmm.default")
def matmul(tape: Tape, h: Any, w: Tensor) -> Any:
    plain(w) if isinstance(h, Traced) else plain(h)
    if not isinstance(h, Traced):
        raise Declined("a matrix product from the left has no rule")
    x = tape.read(h)
    return _layer(tape, Matmul(h.node, tape.hold(w)), w, None, x, x @ w)


@rule("aten.addmm.default")
def addmm(tape: Tape, b: Tensor, h: Any, w: Tensor, *, beta: Any = 1, alpha: Any = 1) -> Any:
    plain(b, w)
    if beta != 1 or alpha != 1 or b.dim() != 1 or not isinstance(h, Traced):
        raise Declined("addmm has a rule for one bias a column and a value from the left alone")
    x = tape.read(h)
    y = torch.addmm(b, x, w)
    h = _layer(tape, Matmul(h.node, tape.hold(w)), w, None, x, y)
    step = Bias(h.node, tape.hold(b), 1)
    tape.learn(step, terms=(b,))
    return tape.record(step, y)


# ---- batch norm with running statistics, dropout --------------------------------------------------------------------


def eval_norm(
    tape: Tape, h: Any, w: Tensor | None, b: Tensor | None, mean: Any, var: Any, training: bool, eps: float
) -> Any:
    plain(w, b, mean, var)
    if training:
        raise Declined("batch norm with the batch's own statistics is not linear")
    x = tape.read(h)
    rstd = (var.to(accumulation_dtype(x.dtype)) + eps).rsqrt()
    y = torch.nn.functional.batch_norm(x, mean, var, w, b, False, 0.0, eps)
    step = EvalNorm(h.node, tape.hold(w), tape.hold(b), tape.hold(rstd))
    centred = x - per_channel(mean, x).to(x.dtype) if w is not None and w.requires_grad and tape.loss else x
    return _layer(tape, step, w, b, centred, y)


def _with_statistics(y: Any, mean: Tensor, count: int) -> tuple:
    return (y, *(mean.new_empty(0) for _ in range(count)))


@rule("aten.native_batch_norm.default", "aten.cudnn_batch_norm.default", "aten.miopen_batch_norm.default")
def native_batch_norm(
    tape: Tape, h: Any, w: Any, b: Any, mean: Any, var: Any, training: bool, momentum: float, eps: float
) -> Any:
    # cudnn's returns a fourth output, its reserve
    return _with_statistics(eval_norm(tape, h, w, b, mean, var, training, eps), tape.read(h), 2 + h.is_cuda)


@rule("fastgan.bn_act.default")
def bn_act(tape: Tape, h: Any, *arguments: Any) -> Any:
    *norm, activation, slope, _ = arguments
    y = eval_norm(tape, h, *norm)
    if activation != "identity":
        y = gate(tape, y, _activation.apply(tape.read(y), gated(activation), slope), activation, slope)
    return _with_statistics(y, tape.read(h), 2)


@rule("fastgan.conv2d_statistics.default", "fastgan.conv_transpose2d_statistics.default")
def batch_statistics(tape: Tape, *args: Any, **kwargs: Any) -> Any:
    raise Declined("batch norm with the batch's own statistics is not linear")


@rule("aten.native_group_norm.default", "aten.native_layer_norm.default", "fastgan.gn_act.default")
def own_statistics(tape: Tape, *args: Any, **kwargs: Any) -> Any:
    raise Declined("a norm with the sample's own statistics is not linear")


@rule("aten.native_dropout.default")
def native_dropout(tape: Tape, h: Any, p: float, train: bool | None) -> Any:
    x = tape.read(h)
    if train is False or p == 0:
        return tape.record(Map(h.node, _same, _same), x.clone()), torch.ones_like(x, dtype=torch.bool)
    _, mask = aten.native_dropout(x, p, train)
    return mul(tape, h, mask.to(x.dtype) * (0.0 if p == 1 else 1 / (1 - p))), mask


def _same(x: Tensor) -> Tensor:
    return x


# ---- arithmetic -----------------------------------------------------------------------------------------------------


def _scalar(x: Any) -> bool:
    return not isinstance(x, Tensor)


@rule("aten.mul.Tensor", "aten.mul.Scalar")
def mul(tape: Tape, a: Any, b: Any) -> Any:
    a, b = (a, b) if isinstance(a, Traced) else (b, a)
    plain(b)
    x = tape.read(a)
    if _scalar(b):
        return tape.record(Map(a.node, lambda v: v * b, lambda g: g * b), x * b)
    return _product(tape, a, b, x * b, False)


@rule("aten.div.Tensor", "aten.div.Scalar")
def div(tape: Tape, a: Any, b: Any) -> Any:
    plain(b)
    x = tape.read(a)
    if _scalar(b):
        return tape.record(Map(a.node, lambda v: v / b, lambda g: g / b), x / b)
    return _product(tape, a, b, x / b, True)


def _product(tape: Tape, h: Any, w: Tensor, y: Tensor, divide: bool) -> Any:
    x = tape.read(h)
    step = Product(h.node, tape.hold(w), x.shape, x.dtype, divide)
    tape.learn(step, factors=(w,), primal=x)
    return tape.record(step, y, apart=y.dim() == x.dim())


@rule("aten.neg.default")
def neg(tape: Tape, h: Any) -> Any:
    return tape.record(Map(h.node, torch.neg, torch.neg), -tape.read(h))


@rule("aten.add.Tensor", "aten.add.Scalar")
def add(tape: Tape, a: Any, b: Any, alpha: Any = 1) -> Any:
    return _sum(tape, [(a, 1), (b, alpha)], torch.add(tape.value(a), tape.value(b), alpha=alpha))


@rule("aten.sub.Tensor", "aten.sub.Scalar")
def sub(tape: Tape, a: Any, b: Any, alpha: Any = 1) -> Any:
    return _sum(tape, [(a, 1), (b, -alpha)], torch.sub(tape.value(a), tape.value(b), alpha=alpha))


@rule("aten.rsub.Tensor", "aten.rsub.Scalar")
def rsub(tape: Tape, a: Any, b: Any, alpha: Any = 1) -> Any:
    return _sum(tape, [(a, -alpha), (b, 1)], torch.rsub(tape.value(a), tape.value(b), alpha=alpha))


def _sum(tape: Tape, operands: list[tuple[Any, Any]], y: Tensor) -> Any:
    parts = [(h.node, h.shape, h.dtype, c) for h, c in operands if isinstance(h, Traced)]
    step = Sum(parts, y)
    for p, c in operands:
        if isinstance(p, Tensor) and not isinstance(p, Traced) and p.requires_grad:
            step.offset = tape.hold(p), c
            tape.learn(step, terms=(p,))
    return tape.record(step, y, apart=all(len(shape) == y.dim() for _, shape, _, _ in parts))


@rule("aten.cat.default")
def cat(tape: Tape, tensors: Sequence[Any], dim: int = 0) -> Any:
    if any(x.dim() != tensors[0].dim() for x in tensors):
        raise Declined("cat of tensors of different ranks has no rule")
    y = torch.cat([tape.value(x) for x in tensors], dim)
    dim %= y.dim()
    parts: list[tuple[int | None, bool, torch.Size]] = []
    learnt = []
    for x in tensors:
        wanted = not isinstance(x, Traced) and x.requires_grad
        parts.append(
            (x.node if isinstance(x, Traced) else tape.hold(x) if wanted else None, isinstance(x, Traced), x.shape)
        )
        if isinstance(x, Traced) and x.dtype != y.dtype:
            raise Declined("cat of values of different dtypes has no rule")
        learnt += [x] if wanted else []
    step = Concatenation(parts, dim, y)
    tape.learn(step, terms=learnt)
    return tape.record(step, y, apart=dim != 0)


@rule("aten.stack.default")
def stack(tape: Tape, tensors: Sequence[Any], dim: int = 0) -> Any:
    dim %= tensors[0].dim() + 1
    rows = [unsqueeze(tape, x, dim) if isinstance(x, Traced) else x.unsqueeze(dim) for x in tensors]
    return cat(tape, rows, dim)


# ---- shapes ---------------------------------------------------------------------------------------------------------


Linear = Callable[[Tensor], Tensor]


def _linear(tape: Tape, h: Any, y: Tensor, tangent: Linear, adjoint: Linear, apart: bool = True) -> Any:
    return tape.record(Map(h.node, tangent, adjoint), y, apart)


def _reshaped(tape: Tape, h: Any, y: Tensor) -> Any:
    """Row-major reshapes keep sample n at row n where the first dimension stays N (which `record` looks at)."""
    x = tape.read(h)
    before, after, turned = x.shape, y.shape, x.dim() == 3 and is_channels_last(image(x))

    def adjoint(g: Tensor) -> Tensor:
        g = g.reshape(before)
        return innermost(g).squeeze(2) if turned else g  # in the layout of x: it meets other gradients of its kind

    return _linear(tape, h, y, lambda v: v.reshape(after), adjoint)


def _reshape_rule(*names: str) -> None:
    for name in names:
        packet, overload = name.removeprefix("aten.").split(".")
        # signals have other strides here than in PyTorch (`innermost`), so that a view of them may need a copy
        op = aten.reshape.default if packet == "view" else getattr(getattr(aten, packet), overload)
        RULES[name] = lambda tape, h, *args, op=op, **kwargs: _reshaped(tape, h, op(tape.read(h), *args, **kwargs))


_reshape_rule("aten.view.default", "aten._unsafe_view.default", "aten.reshape.default")
_reshape_rule("aten.squeeze.default", "aten.squeeze.dim", "aten.squeeze.dims")
_reshape_rule("aten.alias.default", "aten.clone.default")


@rule("aten.unsqueeze.default")
def unsqueeze(tape: Tape, h: Any, dim: int) -> Any:
    return _reshaped(tape, h, tape.read(h).unsqueeze(dim))


@rule("aten.permute.default")
def permute(tape: Tape, h: Any, dims: Sequence[int]) -> Any:
    x = tape.read(h)
    order = [d % x.dim() for d in dims]
    inverse = [order.index(d) for d in range(x.dim())]
    return _linear(
        tape, h, x.permute(order), lambda v: v.permute(order), lambda g: g.permute(inverse), order[:1] == [0]
    )


@rule("aten.transpose.int")
def transpose(tape: Tape, h: Any, dim0: int, dim1: int) -> Any:
    order = list(range(tape.read(h).dim()))
    order[dim0], order[dim1] = order[dim1], order[dim0]
    return permute(tape, h, order)


@rule("aten.t.default")
def t(tape: Tape, h: Any) -> Any:
    return permute(tape, h, list(range(tape.read(h).dim()))[::-1])


@rule("aten.expand.default")
def expand(tape: Tape, h: Any, size: Sequence[int], implicit: bool = False) -> Any:
    x = tape.read(h)
    y = x.expand(size)
    narrow, wide = x.shape, y.shape
    return _linear(tape, h, y, lambda v: v.expand(wide), lambda g: g.sum_to_size(narrow), len(narrow) == len(wide))


@rule("aten.slice.Tensor")
def slice_(tape: Tape, h: Any, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1) -> Any:
    x = tape.read(h)
    size = x.shape
    first, last = start or 0, size[dim] if end is None else min(end, size[dim])
    cut = lambda v: aten.slice.Tensor(v, dim, start, end, step)
    back = lambda g: aten.slice_backward(g, size, dim, first, last, step)
    return _linear(tape, h, cut(x), cut, back, dim % x.dim() != 0 or size[0] == last - first)


@rule("aten.select.int")
def select(tape: Tape, h: Any, dim: int, index: int) -> Any:
    x = tape.read(h)
    size = x.shape
    pick = lambda v: v.select(dim, index)
    return _linear(tape, h, pick(x), pick, lambda g: aten.select_backward(g, size, dim, index), dim % x.dim() != 0)


@rule("aten.split.Tensor")
def split(tape: Tape, h: Any, size: int, dim: int = 0) -> list[Any]:
    extent = tape.read(h).shape[dim]
    return [slice_(tape, h, dim, at, min(at + size, extent)) for at in range(0, extent, size)]


@rule("aten.split_with_sizes.default")
def split_with_sizes(tape: Tape, h: Any, sizes: Sequence[int], dim: int = 0) -> list[Any]:
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    return [slice_(tape, h, dim, end - size, end) for size, end in zip(sizes, ends, strict=True)]


@rule("aten._to_copy.default")
def to_copy(tape: Tape, h: Any, **kwargs: Any) -> Any:
    x = tape.read(h)
    y = aten._to_copy(x, **kwargs)
    if not y.is_floating_point() or y.device != x.device:
        raise Declined(f"a conversion to {y.dtype} on {y.device} is not differentiable, or leaves the device")
    before, after = x.dtype, y.dtype
    return _linear(tape, h, y, lambda v: v.to(after), lambda g: g.to(before))


@rule("aten.constant_pad_nd.default")
def constant_pad_nd(tape: Tape, h: Any, pad: Sequence[int], value: Any = 0) -> Any:
    x, pad = tape.read(h), list(pad)
    back = [-p for p in pad]
    grow = lambda v: aten.constant_pad_nd(v, pad, 0)
    shrink = lambda g: aten.constant_pad_nd(g, back, 0)
    return _linear(tape, h, aten.constant_pad_nd(x, pad, value), grow, shrink, len(pad) < 2 * x.dim())


# ---- sums, pooling, resampling --------------------------------------------------------------------------------------


def _reduce_rules(function: Callable[..., Tensor], mean: bool, *names: str) -> None:
    def reduce(tape: Tape, h: Any, dim: Any = None, keepdim: bool = False, *, dtype: torch.dtype | None = None) -> Any:
        x = tape.read(h)
        shape, own = x.shape, x.dtype
        dims = sorted({d % x.dim() for d in dim}) if dim else list(range(x.dim()))
        share = 1.0 / math.prod(shape[d] for d in dims) if mean else 1.0
        kept = [1 if d in dims else n for d, n in enumerate(shape)]

        def adjoint(g: Tensor) -> Tensor:
            return (g * share if mean else g).reshape(kept).to(own).expand(shape)

        y = function(x, dims, keepdim, dtype=dtype)
        return _linear(tape, h, y, lambda v: function(v, dims, keepdim, dtype=dtype), adjoint, 0 not in dims)

    RULES.update(dict.fromkeys(names, reduce))


_reduce_rules(torch.sum, False, "aten.sum.dim_IntList", "aten.sum.default")
_reduce_rules(torch.mean, True, "aten.mean.dim", "aten.mean.default")


def _pool_rule(name: str, *defaults: Any) -> None:
    """Pools whose backward(g, a tensor of the input's shape and layout, *every argument after the input) is adjoint.

    defaults: of the forward's arguments, for those that a call leaves out.
    """
    forward, backward = getattr(aten, name).default, getattr(aten, f"{name}_backward").default

    def pool(tape: Tape, h: Any, *args: Any) -> Any:
        x = tape.read(h)
        shape, last = x.shape, is_channels_last(x)
        full = (*args, *defaults[len(args) :])[: len(defaults)]

        def adjoint(g: Tensor) -> Tensor:
            like = empty(shape, g, last) if g.dim() == 4 else g.new_empty(shape)
            dx: Tensor = backward(g, like, *full)
            return dx

        return _linear(tape, h, forward(x, *args), lambda v: forward(v, *args), adjoint)

    RULES[f"aten.{name}.default"] = pool


for _name in ("avg_pool2d", "avg_pool3d"):  # kernel, stride, padding, ceil_mode, count_include_pad, divisor_override
    _pool_rule(_name, None, [], 0, False, True, None)
for _name in ("_adaptive_avg_pool2d", "_adaptive_avg_pool3d"):  # the backward takes shapes alone
    _pool_rule(_name)


def _resample_rules(*names: str) -> None:
    """Interpolation: backward(g, output size, input size, *arguments)."""
    for name in names:
        forward, backward = getattr(aten, name).default, getattr(aten, f"{name}_backward").default

        def resample(
            tape: Tape, h: Any, size: Sequence[int], *args: Any, forward: Any = forward, backward: Any = backward
        ) -> Any:
            before, after = list(tape.read(h).shape), list(size)
            y = forward(tape.read(h), after, *args)
            return _linear(tape, h, y, lambda v: forward(v, after, *args), lambda g: backward(g, after, before, *args))

        RULES[f"aten.{name}.default"] = resample


_resample_rules("upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d", "_upsample_nearest_exact2d")
_resample_rules("upsample_linear1d", "upsample_bilinear2d", "upsample_trilinear3d")


@rule("aten.pixel_shuffle.default")
def pixel_shuffle(tape: Tape, h: Any, factor: int) -> Any:
    up, down = torch.pixel_shuffle, torch.pixel_unshuffle
    return _linear(tape, h, up(tape.read(h), factor), lambda v: up(v, factor), lambda g: down(g, factor))


@rule("aten.pixel_unshuffle.default")
def pixel_unshuffle(tape: Tape, h: Any, factor: int) -> Any:
    up, down = torch.pixel_shuffle, torch.pixel_unshuffle
    return _linear(tape, h, down(tape.read(h), factor), lambda v: down(v, factor), lambda g: up(g, factor))
