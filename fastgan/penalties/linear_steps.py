"""One op of a discriminator, linear in what it reads: what it does to a cotangent, to a tangent and to its weights.

A `LinearStep` is y = A(w) h + b. Its four methods are what the passes of `fastgan.penalties.tape` need: A' g, A v, the
gradient of <g, A(w) u> with respect to w, and that of <g, b>. Tensors live in one list that the passes hand in (`t`),
so that autograd can save it; a step keeps indices into it ("slots"), shapes and numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastgan import _activation
from fastgan._layout import accumulation_dtype, dense, image, is_channels_last, per_channel
from fastgan._op import OPS
from fastgan.ops.conv2d import input_padding

aten = torch.ops.aten
Found = Iterable[tuple[int, Tensor]]


class LinearStep:
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
    return (x if x.shape == torch.Size(shape) else x.sum_to_size(tuple(shape))).to(dtype)


class Map(LinearStep):
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


class Gate(LinearStep):
    """(Leaky) ReLU: phi'(t) read from the sign of y = phi(t), which the next layer keeps anyway; and its clamp."""

    def __init__(self, index: int, y: int, activation: str, slope: float, gain: float, clamp: float):
        super().__init__((index,))
        self.y, self.form = y, (activation, slope, gain, clamp)

    def _times(self, g: Tensor, y: Tensor) -> Tensor:
        if y.dim() < 2:
            return _activation.backward(g, y, *self.form)
        gated: Tensor = OPS["bias_act_backward"](g, y, *self.form, False)[0]
        return gated

    def adjoint(self, t: list[Tensor], g: Tensor) -> Sequence[Tensor]:
        return (self._times(g, t[self.y]),)

    def tangent(self, t: list[Tensor], v: Sequence[Tensor | None]) -> Tensor:
        return self._times(_only(v), t[self.y])


def innermost(x: Tensor) -> Tensor:
    """A signal as images one pixel high with the channels innermost, as the kernels want them; images as they are.

    In PyTorch's own layout each of the three passes would turn its signals before and after every convolution: a third
    of the time of a penalty of chargan. Signals of functional.conv1d come as such images already.
    """
    return dense(image(x), True) if x.dim() == 3 or x.shape[2] == 1 else x


class Convolution(LinearStep):
    """A 2-D convolution on fastgan's ops, or a 1-D one as that of images one pixel high."""

    def __init__(self, index: int, weight: int, bias: int | None, shape: torch.Size, geometry: tuple, groups: int):
        super().__init__((index,))
        self.weight, self.bias, self.shape = weight, bias, shape if len(shape) == 4 else (*shape[:2], 1, shape[2])
        self.stride, self.padding, self.dilation = geometry
        self.groups = groups

    def _forward(self, t: list[Tensor], x: Tensor) -> Tensor:
        geometry = self.stride, self.padding, self.dilation, self.groups
        y: Tensor = OPS["conv2d"](innermost(x), image(t[self.weight]), None, *geometry, "identity", 0.0)
        return y

    def _transposed(self, t: list[Tensor], x: Tensor, output_padding: list[int]) -> Tensor:
        geometry = self.stride, self.padding, output_padding, self.groups, self.dilation
        y: Tensor = OPS["conv_transpose2d"](innermost(x), image(t[self.weight]), None, *geometry, "identity", 0.0)
        return y

    def adjoint(self, t: list[Tensor], g: Tensor) -> Sequence[Tensor]:
        shapes = self.shape, image(g).shape, image(t[self.weight]).shape
        extra = input_padding(*shapes, self.stride, self.padding, self.dilation)
        return (_like(self._transposed(t, g, extra), g),)

    def tangent(self, t: list[Tensor], v: Sequence[Tensor | None]) -> Tensor:
        return _like(self._forward(t, _only(v)), _only(v))

    def factor_gradients(self, t: list[Tensor], u: Tensor, g: Tensor) -> Found:
        weight = image(t[self.weight])
        kernel, last = list(weight.shape[2:]), is_channels_last(weight)
        geometry = kernel, self.stride, self.padding, self.dilation, self.groups
        yield self.weight, _like(OPS["conv2d_weight"](innermost(u), innermost(g), *geometry, last), t[self.weight])

    def term_gradients(self, t: list[Tensor], g: Tensor, scale: Tensor | None) -> Found:
        if self.bias is not None:
            yield self.bias, channel_sums(g, scale).to(t[self.bias].dtype)


def _like(y: Tensor, x: Tensor) -> Tensor:
    """An image as the signal that it stands for, where x is one."""
    return y.squeeze(2) if x.dim() == 3 else y


class TransposedConvolution(Convolution):
    """A transposed convolution: the same with the roles of input and output exchanged."""

    output_padding: list[int]

    def adjoint(self, t: list[Tensor], g: Tensor) -> Sequence[Tensor]:
        # with output_padding >= stride the forward convolution yields extra rows
        return (_like(self._forward(t, g)[:, :, : self.shape[2], : self.shape[3]], g),)

    def tangent(self, t: list[Tensor], v: Sequence[Tensor | None]) -> Tensor:
        return _like(self._transposed(t, _only(v), self.output_padding), _only(v))

    def factor_gradients(self, t: list[Tensor], u: Tensor, g: Tensor) -> Found:
        return super().factor_gradients(t, g, u)


class Convolution3d(LinearStep):
    """A 3-D convolution, transposed or not, on ATen's ops."""

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


class Matmul(LinearStep):
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


class Product(LinearStep):
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


class Resampling(LinearStep):
    """`upfirdn2d` with a filter that does not learn; `forward` and `back` are its arguments and its adjoint's."""

    def __init__(self, index: int, taps: int, forward: tuple, back: tuple):
        super().__init__((index,))
        self.taps, self.forward, self.back = taps, forward, back

    def adjoint(self, t: list[Tensor], g: Tensor) -> Sequence[Tensor]:
        return (OPS["upfirdn2d"](g, t[self.taps], *self.back),)

    def tangent(self, t: list[Tensor], v: Sequence[Tensor | None]) -> Tensor:
        y: Tensor = OPS["upfirdn2d"](_only(v), t[self.taps], *self.forward)
        return y


class FilteredGate(LinearStep):
    """`filtered_lrelu` behind its bias, with the slopes that its signs tell: one op forward and back."""

    def __init__(self, index: int, fu: int, fd: int, signs: int, forward: tuple, back: tuple):
        super().__init__((index,))
        self.fu, self.fd, self.signs, self.forward, self.back = fu, fd, signs, forward, back

    def adjoint(self, t: list[Tensor], g: Tensor) -> Sequence[Tensor]:
        return (OPS["filtered_lrelu_backward"](g, t[self.signs], t[self.fd], t[self.fu], *self.back),)

    def tangent(self, t: list[Tensor], v: Sequence[Tensor | None]) -> Tensor:
        y: Tensor = OPS["filtered_lrelu_backward"](_only(v), t[self.signs], t[self.fu], t[self.fd], *self.forward)
        return y


class Sum(LinearStep):
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


class Bias(LinearStep):
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


class Concatenation(LinearStep):
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


class EvalNorm(LinearStep):
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
