"""A program on a GPU: the launches of the layers' ops one after the other, and one autograd node around them.

Each op runs on the backend that won its own race, PyTorch's convolution included, so a program has no kernels of its
own there. What it saves are launches and a part of the host's time: activations of a model in NCHW are turned once and
not at each op, running statistics of all norms follow in the launches of one, and an op has no node and no checks. The
memory is torch's, whose allocator has a GPU's at hand.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastgan._layout import is_channels_last, laid_out
from fastgan._op import OPS, is_aside, owned
from fastgan.functional.blocks import fold
from fastgan.functional.norm import update_running
from fastgan.ops import conv2d as _conv2d
from fastgan.ops import conv_transpose2d as _conv_transpose2d
from fastgan.program.layer import TRANSPOSED, Geometry, Layer, gradients_by_ops, reached, versions, written_to
from fastgan.program.plan import folds
from fastgan.program.tape import ACTIVATION, CAST, LINEAR, ROWS, TURN, Tape

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


class Launches:
    """The layers for one kind of input, as ops on a tape: (x, parameters, buffers) -> y.

    layers: none of which refuses; x: an input like those to come; dtype: what products compute in.
    """

    constant = False

    def __init__(self, layers: Sequence[Layer], x: Tensor, dtype: torch.dtype, wants: Sequence[bool]):
        self.layers = [layer.frozen() for layer in layers]  # a backward may come when the modules are set otherwise
        self.dtype, self.wants = dtype, tuple(wants)
        self.output_channels_last = x.dim() == 4 and is_channels_last(x)
        for layer in layers:
            if layer.convolves():
                self.output_channels_last |= is_channels_last(layer.conv.weight)
            self.output_channels_last &= not isinstance(layer.norm, nn.InstanceNorm2d)  # contiguous in torch

    def run(self, x: Tensor, parameters: Sequence[Any], buffers: Sequence[Any], tape: Tape) -> Tensor:
        """y, without a node; in eval mode and in training, the running statistics included."""
        rest, kept, updates = iter(parameters), iter(buffers), list[Update]()
        if x.dim() == 4 and not is_channels_last(x):
            x = tape.run(TURN, x)
        for layer in self.layers:
            tensors = [next(rest) for _ in layer.parameter_places()]
            x = self._layer(tape, layer, x, tensors, [next(kept) for _ in layer.buffer_places()], updates)
        _apply(updates)
        return x

    def laid_out(self, y: Tensor) -> Tensor:
        """y with torch's own strides."""
        plain_strides = self.layers[-1].makes_strides_plain()
        return y if y.dim() != 4 else laid_out(y, self.output_channels_last, plain_strides)

    def __call__(self, x: Tensor, parameters: Sequence[Any], buffers: Sequence[Any]) -> Tensor:
        if any(self.wants):
            return LaunchesNode.apply(self, buffers, x, *parameters)
        with _no_autocast(x):
            return owned(self.laid_out(self.run(x, parameters, buffers, Tape((), ()))))

    # ---- a layer ----------------------------------------------------------------------------------------------------

    def _layer(
        self, tape: Tape, layer: Layer, x: Tensor, tensors: list[Any], buffers: list[Any], updates: list[Update]
    ) -> Tensor:
        conv, norm = layer.conv, layer.norm
        act = layer.activation, layer.slope
        gamma, beta = tensors[-2:] if norm is not None else (None, None)
        x = tape.run(ROWS, x) if layer.flatten else x
        known: Sequence[Any] = ()
        if conv is not None:
            weight, bias = tensors[:2]
            in_eval = layer.convolves() and layer.is_batch_norm() and not norm.training
            if in_eval and folds(conv, weight, x.shape, constant=False):
                mean, var, _ = buffers
                weight, bias = fold(weight, bias, mean, var, gamma, beta, norm.eps, int(isinstance(conv, TRANSPOSED)))
                norm = None
            lowered: Any = [self._lowered(tape, t) for t in (x, weight, bias)]
            x, weight, bias = lowered
            if isinstance(conv, nn.Linear):
                x = tape.run(LINEAR, x, weight, bias)
            elif norm is not None and layer.is_batch_norm() and norm.training:
                x, *known = self._convolved(tape, layer, x, weight, bias, None)
            else:
                x = self._convolved(tape, layer, x, weight, bias, act if norm is None else ("identity", 0.0))
        if norm is not None:
            y, *found = self._normed(tape, layer, x, (gamma, beta), buffers, act, known)
            if layer.is_batch_norm() and norm.training and norm.track_running_stats and buffers[0] is not None:
                (running_mean, running_var, batches), (mean, var) = buffers, known or found
                count = x.numel() // (norm.stat_groups * x.shape[1])
                updates.append(Update(running_mean, running_var, batches, mean, var, count, float(norm.momentum)))
            return y
        fused = layer.convolves() or layer.activation == "identity"
        return x if fused else tape.run(ACTIVATION, x, *act)

    def _lowered(self, tape: Tape, t: Tensor | None) -> Tensor | None:
        return t if t is None or t.dtype == self.dtype else tape.run(CAST, t, self.dtype)

    def _convolved(self, tape: Tape, layer: Layer, x: Any, weight: Any, bias: Any, act: Any) -> Any:
        """y of the convolution; act: its epilogue, or None for (y, mean, var), y alone where that is no slower."""
        conv, g = layer.conv, Geometry.of(layer.conv)
        transposed = isinstance(conv, TRANSPOSED)
        stride, padding, dilation, extra = (list(v) for v in (g.stride, g.padding, g.dilation, g.output_padding))
        shape_of: Any
        if transposed:
            name, shape_of = "conv_transpose2d", _conv_transpose2d.output_shape
            geometry: tuple = stride, padding, extra, conv.groups, dilation
        else:
            name, shape_of = "conv2d", _conv2d.output_shape
            geometry = stride, padding, dilation, conv.groups
        if act is not None:
            return tape.run(OPS[name], x, weight, bias, *geometry, *act)
        groups = layer.norm.stat_groups
        shape = shape_of(x, weight, *(geometry if transposed else geometry[:3]))
        if _conv2d.statistics_pay(shape, x.device.type, f"{name}_statistics", groups):
            return tape.run(OPS[f"{name}_statistics"], x, weight, bias, *geometry, groups)
        return (tape.run(OPS[name], x, weight, bias, *geometry, "identity", 0.0),)

    def _normed(
        self, tape: Tape, layer: Layer, x: Tensor, vectors: tuple, buffers: list[Any], act: tuple, known: Sequence[Any]
    ) -> tuple[Tensor, ...]:
        """y and its statistics; known: those of x that the convolution has made, or none."""
        norm = layer.norm
        if not layer.is_batch_norm():
            groups = norm.num_groups if isinstance(norm, nn.GroupNorm) else x.shape[1]
            groups = 1 if isinstance(norm, nn.LayerNorm) else groups
            return tape.run(OPS["gn_act"], x, *vectors, groups, float(norm.eps), *act)
        mean, var = (known or (None, None)) if norm.training else buffers[:2]
        groups = norm.stat_groups if norm.training else 1
        return tape.run(OPS["bn_act"], x, *vectors, mean, var, norm.training, float(norm.eps), *act, groups)

    # ---- whether it may ---------------------------------------------------------------------------------------------

    @classmethod
    def made(cls, layers: Sequence[Layer], x: Tensor, dtype: torch.dtype, wants: Sequence[bool]) -> Launches | None:
        """The launches, or None where the layers take no such input or are not known to give the ops' numbers."""
        differs = dtype != torch.float32 if not torch.is_autocast_enabled(x.device.type) else dtype not in FLOATS
        if differs or x.dtype not in FLOATS or x.dim() not in (2, 4) or x.numel() == 0:
            return None
        if layers[0].conv is None and x.dtype != dtype:  # a norm under autocast computes in its input's type
            return None
        if any(layer.refusal(any(wants), x.device) for layer in layers) or not _takes(layers, x):
            return None
        return cls(layers, x, dtype, wants)


class Update(NamedTuple):
    """What a batch norm's running statistics follow: the batch's own, [G, C], of `values` values each."""

    running_mean: Tensor
    running_var: Tensor
    batches: Tensor | None
    mean: Tensor
    var: Tensor
    values: int
    momentum: float


@torch.no_grad()
def _apply(updates: Sequence[Update]) -> None:
    """Each norm's `update_running` and its count of batches; of several that are alike in the launches of one."""
    alike = {(u.momentum, len(u.mean), u.batches is None) for u in updates}
    if len(updates) < 2 or len(alike) > 1 or len({id(u.running_mean) for u in updates}) < len(updates):
        for u in updates:
            update_running(u.running_mean, u.running_var, u.mean, u.var, u.values, u.momentum)
            if u.batches is not None:
                u.batches.add_(len(u.mean))
        return
    means, variances = [u.running_mean.data for u in updates], [u.running_var.data for u in updates]
    unbiased, momentum = [u.values / (u.values - 1) for u in updates], updates[0].momentum
    for mean, var in zip(zip(*(u.mean for u in updates)), zip(*(u.var for u in updates)), strict=True):  # noqa: B905
        torch._foreach_lerp_(means, mean, momentum)
        torch._foreach_lerp_(variances, torch._foreach_mul(var, unbiased), momentum)
    if counts := [u.batches for u in updates if u.batches is not None]:
        torch._foreach_add_(counts, len(updates[0].mean))


def _takes(layers: Sequence[Layer], x: Tensor) -> bool:
    """Whether the layers take x: kernels see to no shapes. Where they do not, the ops say why."""
    shape = tuple(x.shape)
    for layer in layers:
        shape = (shape[0], math.prod(shape[1:])) if layer.flatten else shape
        if layer.conv is not None:
            shape = _output_shape(layer, shape)
        if not shape or (layer.norm is not None and not _norm_takes(layer, shape)):
            return False
    return True


def _output_shape(layer: Layer, shape: tuple) -> tuple:
    """The shape of a product's output, or () where it does not take the input."""
    conv, weight = layer.conv, layer.parameters()[0]
    if weight is None or len(shape) != weight.dim():
        return ()
    if isinstance(conv, nn.Linear):
        return (shape[0], weight.shape[0]) if shape[1] == weight.shape[1] else ()
    g, like = Geometry.of(conv), torch.empty(shape, device="meta")
    if weight.dim() != 4:  # signals
        return ()
    if isinstance(conv, TRANSPOSED):
        channels = weight.shape[0]
        out = _conv_transpose2d.output_shape(
            like, weight, g.stride, g.padding, g.output_padding, conv.groups, g.dilation
        )
    else:
        channels = weight.shape[1] * conv.groups
        out = _conv2d.output_shape(like, weight, g.stride, g.padding, g.dilation)
    return out if shape[1] == channels and min(out) > 0 else ()


def _norm_takes(layer: Layer, shape: tuple) -> bool:
    norm, (n, c, *size) = layer.norm, shape
    pixels = math.prod(size)
    if layer.is_batch_norm():
        groups, kind = norm.stat_groups, nn.BatchNorm1d if len(shape) < 4 else nn.BatchNorm2d
        enough = not norm.training or (groups > 0 and n % groups == 0 and n // groups * pixels > 1)
        return isinstance(norm, kind) and norm.num_features == c and enough
    if isinstance(norm, nn.GroupNorm):
        return bool(norm.num_channels == c and n * c * pixels > norm.num_groups)
    if isinstance(norm, nn.LayerNorm):
        return len(shape) == 2 and tuple(norm.normalized_shape) == (c,)
    return len(shape) == 4 and norm.num_features == c and pixels > 1


class LaunchesNode(torch.autograd.Function):
    """The one autograd node of a program on a GPU: apply(launches, buffers, x, *parameters)."""

    @staticmethod
    def forward(ctx: Any, launches: Launches, buffers: list, x: Tensor, *parameters: Any) -> Tensor:
        inputs = [x, *parameters]
        tape = Tape(inputs, ctx.needs_input_grad[2:])
        with _no_autocast(x):
            inner = launches.run(x, parameters, buffers, tape)
        kept, y = tape.close(inner), owned(launches.laid_out(inner))
        ctx.turns = y.dim() == 4 and is_channels_last(inner)
        ctx.launches, ctx.tape, ctx.activation = launches, tape, launches.layers[-1].activation
        ctx.parameters, ctx.versions = parameters, versions(parameters)
        ctx.save_for_backward(x, y if kept else None)  # the tape has them; autograd sees to it that nobody wrote there
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, _ = ctx.saved_tensors
        launches, tape, ctx.tape = ctx.launches, ctx.tape, None  # what was kept is freed on the way
        if ctx.versions != versions(ctx.parameters):
            raise written_to()
        tensors = (x, *ctx.parameters)
        wants = reached(ctx, tensors)
        if torch.is_grad_enabled() or tape is None or is_aside(dy):
            return None, None, *gradients_by_ops(launches.layers, launches.dtype, wants, dy, tensors)
        asked = [i for i, want in enumerate(wants) if want]
        with _no_autocast(dy):
            found = tape.back(laid_out(dy, True) if ctx.turns else dy, asked)
        return None, None, *[found.get(i) for i in range(len(tensors))]


def _no_autocast(x: Tensor) -> contextlib.AbstractContextManager:
    """Within: ops compute in the dtypes that they are given."""
    device = x.device.type
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else contextlib.nullcontext()
