"""What each op of a discriminator does to a cotangent, to a tangent and to its weights, where it is linear in its input.

A `Step` is one recorded op, linear up to an offset in the values that it reads: y = A(w) h + b. Its four methods are
what the passes of `fastgan.training.linearised` need: A' g, A v, the gradient of <g, A(w) u> with respect to w, and that
of <g, b>. Tensors live in one list that the passes hand in (`t`), so that autograd can save it; a step keeps indices
into it ("slots"), shapes and numbers. RULES maps an ATen or fastgan op to the function that runs and records it; an op
that is absent, or that raises Declined, sends the discriminator to double backward.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastgan import _activation
from fastgan._layout import accumulation_dtype, empty, is_channels_last, per_channel
from fastgan._op import OPS
from fastgan.ops.conv2d import input_padding

if TYPE_CHECKING:
    from fastgan.training.linearised import Tape

aten = torch.ops.aten
Found = Iterable[tuple[int, Tensor]]


class Declined(Exception):
    """The discriminator, or this use of it, does not qualify; str() is the reason."""


# ---- values ---------------------------------------------------------------------------------------------------------


class Storage:
    """What a value and its views share: how often it was changed in place."""

    changes = 0


class Traced(Tensor):
    """A value that depends on x, as the discriminator's code sees it: shape, dtype and layout, but no data to reach.

    Ops reach `tape.dispatch` with it (below autograd and autocast, so in canonical form and with their casts visible);
    what goes around them, a kernel launched on a pointer or a C++ extension, finds no storage and raises.
    """

    tape: Tape
    data_of: Tensor  # the value itself
    index: int
    storage: Storage
    seen: int  # storage.changes when this view of it was made
    detached: bool

    @staticmethod
    def __new__(cls, tape: Tape, value: Tensor, index: int) -> Traced:
        self: Traced = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, value.shape, strides=value.stride(), dtype=value.dtype, device=value.device
        )
        self.tape, self.data_of, self.index = tape, value, index
        self.storage, self.seen, self.detached = Storage(), 0, False
        return self

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # also inside an autograd.Function's forward, whose own backward must not be overlooked
        if not torch.is_grad_enabled():
            raise Declined("it runs under torch.no_grad or inside an autograd.Function")
        return super().__torch_function__(func, types, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        leaves = torch.utils._pytree.tree_leaves((args, kwargs))
        tape = next(a.tape for a in leaves if isinstance(a, cls))
        return tape.dispatch(func, args, kwargs or {})


# ---- steps ----------------------------------------------------------------------------------------------------------


class Step:
    """One op: y = A(w) h + b. `inputs` are the indices of the values h that it reads."""

    def __init__(self, inputs: Sequence[int]):
        self.inputs = tuple(inputs)
        self.factors: tuple[int, ...] = ()  # slots of weights in A that want a gradient
        self.terms: tuple[int, ...] = ()  # slots of weights in b that want a gradient
        self.primal: int | None = None  # slot of h, kept where the loss needs it for the factors
        self.cotangent: int | None = None  # slot of g, kept by the adjoint pass where anything here is learnt

    def adjoint(self, t: list[Tensor], g: Tensor) -> Sequence[Tensor]:
        """A' g, one for each input."""
        raise NotImplementedError

    def tangent(self, t: list[Tensor], v: Sequence[Tensor | None]) -> Tensor:
        """A v; at least one of v is not None, which stands for zero."""
        raise NotImplementedError

    def factor_gradients(self, t: list[Tensor], u: Tensor, g: Tensor) -> Found:
        """The gradients of <g, A(w) u> with respect to the factors."""
        return ()

    def term_gradients(self, t: list[Tensor], g: Tensor, scale: Tensor | None) -> Found:
        """The gradients of sum_n scale[n] <g[n], b[n]> with respect to the terms (scale None: ones)."""
        return ()


def scaled(x: Tensor, scale: Tensor | None) -> Tensor:
    """Sample n times scale[n]."""
    return x if scale is None else x * scale.to(x.dtype).view(-1, *(1,) * (x.dim() - 1))


def channel_sums(g: Tensor, scale: Tensor | None) -> Tensor:
    """sum over n and pixels of scale[n] g[n, c, ...]: [C], in the accumulating dtype."""
    dtype = accumulation_dtype(g.dtype)
    if scale is None:
        return g.sum([d for d in range(g.dim()) if d != 1], dtype=dtype)
    per_sample = g.sum(list(range(2, g.dim())), dtype=dtype) if g.dim() > 2 else g.to(dtype)
    return scale.to(dtype) @ per_sample


def fold(x: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """The adjoint of broadcasting: x summed to `shape`."""
    return (x if x.shape == torch.Size(shape) else x.sum_to_size(*shape)).to(dtype)


class Map(Step):
    """An op without weights, given by what it does to tangents and cotangents."""

    def __init__(self, index: int, tangent: Callable[[Tensor], Tensor], adjoint: Callable[[Tensor], Tensor]):
        super().__init__((index,))
        self._tangent, self._adjoint = tangent, adjoint

    def adjoint(self, t: list[Tensor], g: Tensor) -> Sequence[Tensor]:
        return (self._adjoint(g),)

    def tangent(self, t: list[Tensor], v: Sequence[Tensor | None]) -> Tensor:
        return self._tangent(_only(v))


def _only(v: Sequence[Tensor | None]) -> Tensor:
    """The tangent of a step with one input."""
    (tangent,) = v
    if tangent is None:
        raise RuntimeError("linearised: a step must have a tangent to pass on, got none")
    return tangent


class Gate(Step):
    """(Leaky) ReLU: phi'(t) read from the sign of y = phi(t), which the next layer keeps anyway."""

    def __init__(self, index: int, y: int, activation: str, slope: float):
        super().__init__((index,))
        self.y, self.activation, self.slope = y, activation, slope

    def _times(self, g: Tensor, y: Tensor) -> Tensor:
        if y.dim() < 2:
            return _activation.backward(g, y, self.activation, self.slope)
        gated: Tensor = OPS["bias_act_backward"](g, y, self.activation, self.slope, False)[0]
        return gated

    def adjoint(self, t: list[Tensor], g: Tensor) -> Sequence[Tensor]:
        return (self._times(g, t[self.y]),)

    def tangent(self, t: list[Tensor], v: Sequence[Tensor | None]) -> Tensor:
        return self._times(_only(v), t[self.y])


class Convolution(Step):
    """A 2-D convolution on fastgan's ops."""

    def __init__(self, index: int, weight: int, bias: int | None, shape: torch.Size, geometry: tuple, groups: int):
        super().__init__((index,))
        self.weight, self.bias, self.shape = weight, bias, shape
        self.stride, self.padding, self.dilation = geometry
        self.groups = groups

    def adjoint(self, t: list[Tensor], g: Tensor) -> Sequence[Tensor]:
        weight = t[self.weight]
        extra = input_padding(self.shape, g.shape, weight.shape, self.stride, self.padding, self.dilation)
        return (
            OPS["conv_transpose2d"](
                g, weight, None, self.stride, self.padding, extra, self.groups, self.dilation, "identity", 0.0
            ),
        )

    def tangent(self, t: list[Tensor], v: Sequence[Tensor | None]) -> Tensor:
        y: Tensor = OPS["conv2d"](
            _only(v), t[self.weight], None, self.stride, self.padding, self.dilation, self.groups, "identity", 0.0
        )
        return y

    def factor_gradients(self, t: list[Tensor], u: Tensor, g: Tensor) -> Found:
        weight = t[self.weight]
        kernel, last = list(weight.shape[2:]), is_channels_last(weight)
        yield (
            self.weight,
            OPS["conv2d_weight"](u, g, kernel, self.stride, self.padding, self.dilation, self.groups, last),
        )

    def term_gradients(self, t: list[Tensor], g: Tensor, scale: Tensor | None) -> Found:
        if self.bias is not None:
            yield self.bias, channel_sums(g, scale).to(t[self.bias].dtype)


class TransposedConvolution(Convolution):
    """A 2-D transposed convolution: the same with the roles of input and output exchanged."""

    output_padding: list[int]

    def adjoint(self, t: list[Tensor], g: Tensor) -> Sequence[Tensor]:
        dx = OPS["conv2d"](
            g, t[self.weight], None, self.stride, self.padding, self.dilation, self.groups, "identity", 0.0
        )
        # with output_padding >= stride the forward convolution yields extra rows
        return (dx[:, :, : self.shape[2], : self.shape[3]],)

    def tangent(self, t: list[Tensor], v: Sequence[Tensor | None]) -> Tensor:
        y: Tensor = OPS["conv_transpose2d"](
            _only(v), t[self.weight], None, self.stride, self.padding, self.output_padding, self.groups,
            self.dilation, "identity", 0.0,
        )  # fmt: skip
        return y

    def factor_gradients(self, t: list[Tensor], u: Tensor, g: Tensor) -> Found:
        return super().factor_gradients(t, g, u)


class ConvolutionNd(Step):
    """A 1-D or 3-D convolution, transposed or not, on ATen's ops."""

    def __init__(self, index: int, weight: int, bias: int | None, shape: torch.Size, how: tuple):
        super().__init__((index,))
        self.weight, self.bias, self.shape, self.how = weight, bias, shape, how

    def _backward(self, g: Tensor, x: Tensor, weight: Tensor, mask: list[bool]) -> tuple[Tensor, Tensor, Tensor]:
        results: tuple[Tensor, Tensor, Tensor] = aten.convolution_backward(g, x, weight, None, *self.how, mask)
        return results

    def adjoint(self, t: list[Tensor], g: Tensor) -> Sequence[Tensor]:
        return (self._backward(g, g.new_empty(self.shape), t[self.weight], [True, False, False])[0],)

    def tangent(self, t: list[Tensor], v: Sequence[Tensor | None]) -> Tensor:
        y: Tensor = aten.convolution(_only(v), t[self.weight], None, *self.how)
        return y

    def factor_gradients(self, t: list[Tensor], u: Tensor, g: Tensor) -> Found:
        yield self.weight, self._backward(g, u, t[self.weight], [False, True, False])[1]

    def term_gradients(self, t: list[Tensor], g: Tensor, scale: Tensor | None) -> Found:
        if self.bias is not None:
            yield self.bias, channel_sums(g, scale).to(t[self.bias].dtype)


class Matmul(Step):
    """h @ w: h [N, I] with w [I, O] or [I], or h [B, N, I] with w [B, I, O]."""

    def __init__(self, index: int, weight: int):
        super().__init__((index,))
        self.weight = weight

    def adjoint(self, t: list[Tensor], g: Tensor) -> Sequence[Tensor]:
        w = t[self.weight]
        return (torch.outer(g, w) if w.dim() == 1 else g @ w.mT,)

    def tangent(self, t: list[Tensor], v: Sequence[Tensor | None]) -> Tensor:
        return _only(v) @ t[self.weight]

    def factor_gradients(self, t: list[Tensor], u: Tensor, g: Tensor) -> Found:
        yield self.weight, u.mT @ g


class Product(Step):
    """h * w, or h / w, with broadcasting."""

    def __init__(self, index: int, weight: int, shape: torch.Size, dtype: torch.dtype, divide: bool):
        super().__init__((index,))
        self.weight, self.shape, self.dtype, self.divide = weight, shape, dtype, divide

    def _times(self, x: Tensor, w: Tensor) -> Tensor:
        return x / w if self.divide else x * w

    def adjoint(self, t: list[Tensor], g: Tensor) -> Sequence[Tensor]:
        return (fold(self._times(g, t[self.weight]), self.shape, self.dtype),)

    def tangent(self, t: list[Tensor], v: Sequence[Tensor | None]) -> Tensor:
        return self._times(_only(v), t[self.weight])

    def factor_gradients(self, t: list[Tensor], u: Tensor, g: Tensor) -> Found:
        w = t[self.weight]
        product = -(u * g) / w.square() if self.divide else u * g
        yield self.weight, fold(product, w.shape, w.dtype)


class Sum(Step):
    """sum_j c_j h_j + offset, with broadcasting; `parts` are (index, shape, dtype, c)."""

    def __init__(self, parts: Sequence[tuple[int, torch.Size, torch.dtype, Any]], like: Tensor):
        super().__init__([index for index, *_ in parts])
        self.parts, self.shape, self.dtype = parts, like.shape, like.dtype
        self.offset: tuple[int, Any] | None = None  # (slot, coefficient) of an offset that is learnt

    def adjoint(self, t: list[Tensor], g: Tensor) -> Sequence[Tensor]:
        return [fold(g if c == 1 else g * c, shape, dtype) for _, shape, dtype, c in self.parts]

    def tangent(self, t: list[Tensor], v: Sequence[Tensor | None]) -> Tensor:
        pairs = zip(v, self.parts, strict=True)
        moved = [(x if c == 1 else x * c).to(self.dtype).expand(self.shape) for x, (*_, c) in pairs if x is not None]
        return moved[0] if len(moved) == 1 else torch.stack(moved).sum(0) if len(moved) > 2 else moved[0] + moved[1]

    def term_gradients(self, t: list[Tensor], g: Tensor, scale: Tensor | None) -> Found:
        if self.offset is not None:
            slot, c = self.offset
            g = scaled(g, scale)
            yield slot, fold(g if c == 1 else g * c, t[slot].shape, t[slot].dtype)


class Bias(Step):
    """h + b with b along the last dimension (addmm) or the channels (bias_act)."""

    def __init__(self, index: int, bias: int, dim: int):
        super().__init__((index,))
        self.bias, self.dim = bias, dim

    def adjoint(self, t: list[Tensor], g: Tensor) -> Sequence[Tensor]:
        return (g,)

    def tangent(self, t: list[Tensor], v: Sequence[Tensor | None]) -> Tensor:
        return _only(v)

    def term_gradients(self, t: list[Tensor], g: Tensor, scale: Tensor | None) -> Found:
        yield self.bias, channel_sums(g, scale).to(t[self.bias].dtype)


class Concatenation(Step):
    """cat or stack of values and of tensors that do not depend on x; `parts` are (index or slot, is value, extent)."""

    def __init__(self, parts: Sequence[tuple[int | None, bool, torch.Size]], dim: int, like: Tensor):
        super().__init__([where for where, value, _ in parts if value and where is not None])
        self.parts, self.dim, self.dtype = parts, dim, like.dtype

    def _pieces(self, g: Tensor) -> Sequence[Tensor]:
        return g.split([shape[self.dim] for *_, shape in self.parts], self.dim)

    def adjoint(self, t: list[Tensor], g: Tensor) -> Sequence[Tensor]:
        return [piece for piece, (_, value, _) in zip(self._pieces(g), self.parts, strict=True) if value]

    def tangent(self, t: list[Tensor], v: Sequence[Tensor | None]) -> Tensor:
        like = next(x for x in v if x is not None)
        given = iter(v)
        pieces = [(next(given) if value else None, shape) for _, value, shape in self.parts]
        return torch.cat([like.new_zeros(shape) if x is None else x for x, shape in pieces], self.dim)

    def term_gradients(self, t: list[Tensor], g: Tensor, scale: Tensor | None) -> Found:
        for piece, (slot, value, _) in zip(self._pieces(scaled(g, scale)), self.parts, strict=True):
            if slot in self.terms and not value:
                yield slot, piece.to(t[slot].dtype)


class EvalNorm(Step):
    """Batch norm with running statistics: y = w (h - mean) rstd + b along the channels. The primal is h - mean."""

    def __init__(self, index: int, weight: int | None, bias: int | None, rstd: int):
        super().__init__((index,))
        self.weight, self.bias, self.rstd = weight, bias, rstd

    def _scale(self, t: list[Tensor], x: Tensor) -> Tensor:
        scale = t[self.rstd] if self.weight is None else t[self.rstd] * t[self.weight]
        return per_channel(scale, x).to(x.dtype)

    def adjoint(self, t: list[Tensor], g: Tensor) -> Sequence[Tensor]:
        return (g * self._scale(t, g),)

    def tangent(self, t: list[Tensor], v: Sequence[Tensor | None]) -> Tensor:
        x = _only(v)
        return x * self._scale(t, x)

    def factor_gradients(self, t: list[Tensor], u: Tensor, g: Tensor) -> Found:
        if self.weight is not None:
            yield self.weight, (channel_sums(u * g, None) * t[self.rstd]).to(t[self.weight].dtype)

    def term_gradients(self, t: list[Tensor], g: Tensor, scale: Tensor | None) -> Found:
        if self.bias is not None:
            yield self.bias, channel_sums(g, scale).to(t[self.bias].dtype)


# ---- the table ------------------------------------------------------------------------------------------------------

# "aten.mul.Tensor" -> rule(tape, *args, **kwargs): runs the op on the values and records it. By name, so that an op that
# this version of torch lacks does no harm. In-place forms go through the rule of the op that they are a form of.
RULES: dict[str, Callable[..., Any]] = {}


def rule(*names: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        RULES.update(dict.fromkeys(names, function))
        return function

    return register


def shape_rule(*names: str) -> None:
    """Ops whose result depends on the shape of their input alone: noise, zeros, empty tensors."""
    for name in names:
        packet, overload = name.removeprefix("aten.").split(".")
        op = getattr(getattr(aten, packet), overload)
        RULES[name] = lambda tape, h, *args, op=op, **kwargs: op(tape.read(h), *args, **kwargs)


shape_rule(
    "aten.empty_like.default", "aten.zeros_like.default", "aten.ones_like.default", "aten.full_like.default",
    "aten.rand_like.default", "aten.randn_like.default", "aten.new_empty.default", "aten.new_zeros.default",
    "aten.new_ones.default", "aten.new_full.default",
)  # fmt: skip


def plain(*operands: Any) -> None:
    """The operands that a rule takes only where they do not depend on x."""
    if any(isinstance(p, Traced) for p in operands):
        raise Declined("a product of two values that depend on x is not linear")


# ---- layers ---------------------------------------------------------------------------------------------------------


@rule("aten.convolution.default")
def convolution(
    tape: Tape, h: Any, w: Tensor, b: Tensor | None, stride: Any, padding: Any, dilation: Any, transposed: bool,
    output_padding: Any, groups: int,
) -> Any:  # fmt: skip
    plain(w, b)
    geometry = list(stride), list(padding), list(dilation)
    if w.dim() == 4 and transposed:
        return conv_transpose2d(tape, h, w, b, *geometry[:2], list(output_padding), groups, geometry[2], "identity", 0)
    if w.dim() == 4:
        return conv2d(tape, h, w, b, *geometry, groups, "identity", 0.0)
    x = tape.read(h)
    how = (*geometry, transposed, list(output_padding), groups)
    step = ConvolutionNd(h.index, tape.hold(w), tape.hold(b), x.shape, how)
    return _layer(tape, step, w, b, x, aten.convolution(x, w, b, *how))


def _layer(tape: Tape, step: Step, w: Tensor | None, b: Tensor | None, primal: Tensor, y: Tensor) -> Any:
    """Record a step with a weight and a bias."""
    tape.learn(step, factors=(w,), terms=(b,), primal=primal)
    return tape.record(step, y)


@rule("fastgan.conv2d.default")
def conv2d(
    tape: Tape, h: Any, w: Tensor, b: Tensor | None, stride: Any, padding: Any, dilation: Any, groups: int,
    activation: str, slope: float,
) -> Any:  # fmt: skip
    plain(w, b)
    x, geometry = tape.read(h), (list(stride), list(padding), list(dilation))
    y = OPS["conv2d"](x, w, b, *geometry, groups, gated(activation), slope)
    step = Convolution(h.index, tape.hold(w), tape.hold(b), x.shape, geometry, groups)
    return gate(tape, _layer(tape, step, w, b, x, y), y, activation, slope)


@rule("fastgan.conv_transpose2d.default")
def conv_transpose2d(
    tape: Tape, h: Any, w: Tensor, b: Tensor | None, stride: Any, padding: Any, output_padding: Any, groups: int,
    dilation: Any, activation: str, slope: float,
) -> Any:  # fmt: skip
    plain(w, b)
    x, geometry = tape.read(h), (list(stride), list(padding), list(dilation))
    extra = list(output_padding)
    y = OPS["conv_transpose2d"](x, w, b, *geometry[:2], extra, groups, geometry[2], gated(activation), slope)
    step = TransposedConvolution(h.index, tape.hold(w), tape.hold(b), x.shape, geometry, groups)
    step.output_padding = extra
    return gate(tape, _layer(tape, step, w, b, x, y), y, activation, slope)


def gated(activation: str) -> str:
    if activation not in ("identity", "relu", "leaky_relu"):
        raise Declined(f"{activation} is smooth, not piecewise linear")
    return activation


def gate(tape: Tape, h: Any, y: Tensor, activation: str, slope: float) -> Any:
    """Record an activation whose output y is there already."""
    if activation == "identity":
        return h
    if activation == "leaky_relu" and not slope >= 0:
        raise Declined(f"leaky_relu with a negative slope of {slope} cannot be told from its output's sign")
    return tape.record(Gate(h.index, tape.hold(y), activation, slope), y)


@rule("aten.relu.default")
def relu(tape: Tape, h: Any) -> Any:
    return gate(tape, h, torch.relu(tape.read(h)), "relu", 0.0)


@rule("aten.leaky_relu.default")
def leaky_relu(tape: Tape, h: Any, slope: float = 0.01) -> Any:
    return gate(tape, h, torch.nn.functional.leaky_relu(tape.read(h), slope), "leaky_relu", slope)


@rule("fastgan.bias_act.default")
def bias_act(tape: Tape, h: Any, b: Tensor | None, activation: str, slope: float) -> Any:
    plain(b)
    y = OPS["bias_act"](tape.read(h), b, gated(activation), slope)
    if b is not None:
        step = Bias(h.index, tape.hold(b), 1)
        tape.learn(step, terms=(b,))
        h = tape.record(step, y)
    return gate(tape, h, y, activation, slope)


@rule("aten.mm.default", "aten.mv.default", "aten.bmm.default")
def matmul(tape: Tape, h: Any, w: Tensor) -> Any:
    plain(w) if isinstance(h, Traced) else plain(h)
    if not isinstance(h, Traced):
        raise Declined("a matrix product from the left has no rule")
    x = tape.read(h)
    return _layer(tape, Matmul(h.index, tape.hold(w)), w, None, x, x @ w)


@rule("aten.addmm.default")
def addmm(tape: Tape, b: Tensor, h: Any, w: Tensor, *, beta: Any = 1, alpha: Any = 1) -> Any:
    plain(b, w)
    if beta != 1 or alpha != 1 or b.dim() != 1 or not isinstance(h, Traced):
        raise Declined("addmm has a rule for one bias a column and a value from the left alone")
    x = tape.read(h)
    y = torch.addmm(b, x, w)
    h = _layer(tape, Matmul(h.index, tape.hold(w)), w, None, x, y)
    step = Bias(h.index, tape.hold(b), 1)
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
    step = EvalNorm(h.index, tape.hold(w), tape.hold(b), tape.hold(rstd))
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
def bn_act(
    tape: Tape, h: Any, w: Any, b: Any, mean: Any, var: Any, training: bool, eps: float, activation: str, slope: float,
    groups: int,
) -> Any:  # fmt: skip
    y = eval_norm(tape, h, w, b, mean, var, training, eps)
    if activation != "identity":
        y = gate(tape, y, _activation.apply(tape.read(y), gated(activation), slope), activation, slope)
    return _with_statistics(y, tape.read(h), 2)


@rule("aten.native_dropout.default")
def native_dropout(tape: Tape, h: Any, p: float, train: bool | None) -> Any:
    x = tape.read(h)
    if train is False or p == 0:
        return tape.record(Map(h.index, _same, _same), x.clone()), torch.ones_like(x, dtype=torch.bool)
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
        return tape.record(Map(a.index, lambda v: v * b, lambda g: g * b), x * b)
    return _product(tape, a, b, x * b, False)


@rule("aten.div.Tensor", "aten.div.Scalar")
def div(tape: Tape, a: Any, b: Any) -> Any:
    plain(b)
    x = tape.read(a)
    if _scalar(b):
        return tape.record(Map(a.index, lambda v: v / b, lambda g: g / b), x / b)
    return _product(tape, a, b, x / b, True)


def _product(tape: Tape, h: Any, w: Tensor, y: Tensor, divide: bool) -> Any:
    x = tape.read(h)
    step = Product(h.index, tape.hold(w), x.shape, x.dtype, divide)
    tape.learn(step, factors=(w,), primal=x)
    return tape.record(step, y, apart=y.dim() == x.dim())


@rule("aten.neg.default")
def neg(tape: Tape, h: Any) -> Any:
    return tape.record(Map(h.index, torch.neg, torch.neg), -tape.read(h))


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
    parts = [(h.index, h.shape, h.dtype, c) for h, c in operands if isinstance(h, Traced)]
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
            (x.index if isinstance(x, Traced) else tape.hold(x) if wanted else None, isinstance(x, Traced), x.shape)
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


def _linear(
    tape: Tape, h: Any, y: Tensor, tangent: Callable[[Tensor], Tensor], adjoint: Callable[[Tensor], Tensor],
    apart: bool = True,
) -> Any:  # fmt: skip
    return tape.record(Map(h.index, tangent, adjoint), y, apart)


def _reshaped(tape: Tape, h: Any, y: Tensor) -> Any:
    """Row-major reshapes keep sample n at row n wherever the first dimension stays N (which `record` looks at)."""
    before, after = tape.read(h).shape, y.shape
    return _linear(tape, h, y, lambda v: v.reshape(after), lambda g: g.reshape(before))


def _reshape_rule(*names: str) -> None:
    for name in names:
        packet, overload = name.removeprefix("aten.").split(".")
        op = getattr(getattr(aten, packet), overload)
        RULES[name] = lambda tape, h, *args, op=op, **kwargs: _reshaped(tape, h, op(tape.read(h), *args, **kwargs))


_reshape_rule(
    "aten.view.default", "aten._unsafe_view.default", "aten.reshape.default", "aten.squeeze.default",
    "aten.squeeze.dim", "aten.squeeze.dims", "aten.alias.default", "aten.clone.default",
)  # fmt: skip


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
    return _linear(tape, h, y, lambda v: v.expand(y.shape), lambda g: g.sum_to_size(x.shape), y.dim() == x.dim())


@rule("aten.slice.Tensor")
def slice_(tape: Tape, h: Any, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1) -> Any:
    x = tape.read(h)
    size = x.shape
    first, last = start or 0, size[dim] if end is None else min(end, size[dim])
    return _linear(
        tape, h, aten.slice.Tensor(x, dim, start, end, step),
        lambda v: aten.slice.Tensor(v, dim, start, end, step),
        lambda g: aten.slice_backward(g, size, dim, first, last, step), dim % x.dim() != 0 or size[0] == last - first,
    )  # fmt: skip


@rule("aten.select.int")
def select(tape: Tape, h: Any, dim: int, index: int) -> Any:
    x = tape.read(h)
    size = x.shape
    return _linear(
        tape, h, x.select(dim, index), lambda v: v.select(dim, index),
        lambda g: aten.select_backward(g, size, dim, index), dim % x.dim() != 0,
    )  # fmt: skip


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
    return _linear(tape, h, y, lambda v: v.to(y.dtype), lambda g: g.to(x.dtype))


@rule("aten.constant_pad_nd.default")
def constant_pad_nd(tape: Tape, h: Any, pad: Sequence[int], value: Any = 0) -> Any:
    x, pad = tape.read(h), list(pad)
    back = [-p for p in pad]
    return _linear(
        tape, h, aten.constant_pad_nd(x, pad, value), lambda v: aten.constant_pad_nd(v, pad, 0),
        lambda g: aten.constant_pad_nd(g, back, 0), len(pad) < 2 * x.dim(),
    )  # fmt: skip


# ---- sums, pooling, resampling --------------------------------------------------------------------------------------


def _reduce_rule(name: str, function: Callable[..., Tensor], mean: bool) -> None:
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

    RULES[name] = reduce


for _name, _function, _mean in (
    ("aten.sum.dim_IntList", torch.sum, False), ("aten.sum.default", torch.sum, False),
    ("aten.mean.dim", torch.mean, True), ("aten.mean.default", torch.mean, True),
):  # fmt: skip
    _reduce_rule(_name, _function, _mean)


def _by_backward(name: str) -> None:
    """Ops of ATen, linear, whose backward(g, input of which only shape and layout count, *arguments) is its adjoint."""
    forward, backward = getattr(aten, name).default, getattr(aten, f"{name}_backward").default

    def pool(tape: Tape, h: Any, *args: Any) -> Any:
        x = tape.read(h)
        shape, last = x.shape, is_channels_last(x)
        # a pool's adjoint wants every argument, its forward may leave the later ones out
        rest = args if name.startswith("_adaptive") else (*args, *POOL_DEFAULTS[len(args) :])

        def adjoint(g: Tensor) -> Tensor:
            like = empty(shape, g, last) if g.dim() == 4 else g.new_empty(shape)
            dx: Tensor = backward(g, like, *(() if name.startswith("_adaptive") else rest))
            return dx

        return _linear(tape, h, forward(x, *args), lambda v: forward(v, *args), adjoint)

    RULES[f"aten.{name}.default"] = pool


POOL_DEFAULTS = (None, [], 0, False, True, None)  # kernel, stride, padding, ceil_mode, count_include_pad, divisor
for _name in ("avg_pool2d", "avg_pool3d", "_adaptive_avg_pool2d", "_adaptive_avg_pool3d"):
    _by_backward(_name)


def _resample_rule(name: str) -> None:
    """Interpolation: backward(g, output size, input size, *arguments)."""
    forward, backward = getattr(aten, name).default, getattr(aten, f"{name}_backward").default

    def resample(tape: Tape, h: Any, size: Sequence[int], *args: Any) -> Any:
        x = tape.read(h)
        shape, size = list(x.shape), list(size)
        return _linear(
            tape, h, forward(x, size, *args), lambda v: forward(v, size, *args),
            lambda g: backward(g, size, shape, *args),
        )  # fmt: skip

    RULES[f"aten.{name}.default"] = resample


for _name in (
    "upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d", "_upsample_nearest_exact2d",
    "upsample_linear1d", "upsample_bilinear2d", "upsample_trilinear3d",
):  # fmt: skip
    _resample_rule(_name)


@rule("aten.pixel_shuffle.default")
def pixel_shuffle(tape: Tape, h: Any, factor: int) -> Any:
    up, down = torch.pixel_shuffle, torch.pixel_unshuffle
    return _linear(tape, h, up(tape.read(h), factor), lambda v: up(v, factor), lambda g: down(g, factor))


@rule("aten.pixel_unshuffle.default")
def pixel_unshuffle(tape: Tape, h: Any, factor: int) -> Any:
    up, down = torch.pixel_shuffle, torch.pixel_unshuffle
    return _linear(tape, h, down(tape.read(h), factor), lambda v: down(v, factor), lambda g: up(g, factor))
