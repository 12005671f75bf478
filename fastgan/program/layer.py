"""One layer of a program: a product (convolution or linear), a norm and an activation, as the user's modules."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fastgan import _activation, functional
from fastgan._layout import image, is_dense
from fastgan.choice import reaches, second_order

_conv_facts = attrgetter("stride", "padding", "dilation", "output_padding", "groups", "padding_mode")
_norm_facts = attrgetter("training", "eps", "momentum", "track_running_stats", "stat_groups", "sync")
_sample_norm_facts: dict[type, Callable[[Any], Any]] = {
    nn.GroupNorm: attrgetter("eps", "num_groups"),
    nn.InstanceNorm2d: attrgetter("eps", "num_features"),
    nn.LayerNorm: attrgetter("eps", "normalized_shape"),
}
_slope = attrgetter("negative_slope")
_CHANNELS = ("num_features", "num_channels", "normalized_shape")  # where a norm says how many it has
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, *TRANSPOSED)


@dataclass(frozen=True)
class Geometry:
    """A convolution module's numbers as (H, W), those of a 1-D one as for images one pixel high."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    output_padding: tuple[int, ...]

    @classmethod
    def of(cls, conv: Any) -> Geometry:
        numbers: Any = conv.stride, conv.padding, conv.dilation, conv.output_padding
        if len(conv.kernel_size) == 1:
            numbers = tuple((least, *given) for least, given in zip((1, 0, 1, 0), numbers, strict=True))
        return cls(*numbers)


@dataclass
class Layer:
    """A product, a norm and an activation in this order, each of which may be absent.

    conv: nn.Conv1d or 2d, nn.ConvTranspose1d or 2d, nn.Linear or None. norm: a converted nn.BatchNorm1d or 2d after any
    of them; a converted nn.GroupNorm, nn.InstanceNorm2d or nn.LayerNorm; or None. activation: its name, "identity" for
    none, and act: its module or None. flatten: whether the layer's input goes through nn.Flatten() first.
    """

    conv: Any
    norm: Any
    activation: str
    act: Any
    flatten: bool = False

    @property
    def slope(self) -> float:
        return float(getattr(self.act, "negative_slope", 0.0))

    def parameter_places(self) -> list[tuple[dict[str, Any], str]]:
        """Where the product's weight and bias and the norm's weight and bias stand: module dictionaries and keys."""
        owners = [m._parameters for m in (self.conv, self.norm) if m is not None]
        return [(owner, name) for owner in owners for name in ("weight", "bias")]

    def parameters(self) -> list[Tensor | None]:
        """The product's weight and bias, the norm's weight and bias; None for those that are absent."""
        return [owner[name] for owner, name in self.parameter_places()]

    def buffer_places(self) -> list[tuple[dict[str, Any], str]]:
        """Where a batch norm's running mean, running variance and count of batches stand."""
        names = ("running_mean", "running_var", "num_batches_tracked") if self.is_batch_norm() else ()
        return [(self.norm._buffers, name) for name in names]

    def buffers(self) -> list[Tensor | None]:
        """A batch norm's running mean, running variance and count of batches."""
        return [owner[name] for owner, name in self.buffer_places()]

    def kinds(self) -> tuple:
        """What a plan depends on besides the tensors, and stays as it is."""
        return torch_class(self.conv), torch_class(self.norm), self.activation, self.flatten, self.in_place

    @property
    def in_place(self) -> bool:
        return bool(getattr(self.act, "inplace", False))

    def makes_strides_plain(self) -> bool:
        """Whether torch gives the result NCHW's strides where one channel or pixel makes both layouts the same memory:
        a batch norm does, and an activation that is not in place."""
        return self.is_batch_norm() or (self.activation != "identity" and not self.in_place)

    def fact_readers(self) -> list[tuple[Callable[[Any], Any], Any]]:
        """What a plan depends on besides the tensors, and may be set between calls: functions of modules."""
        found: list[tuple[Callable[[Any], Any], Any]] = [(_conv_facts, self.conv)] if self.convolves() else []
        if self.is_batch_norm():
            found.append((_norm_facts, self.norm))
        found += [(read, self.norm) for kind, read in _sample_norm_facts.items() if isinstance(self.norm, kind)]
        return found + ([(_slope, self.act)] if self.activation == "leaky_relu" else [])

    def convolves(self) -> bool:
        return isinstance(self.conv, CONVOLUTIONS)

    def is_batch_norm(self) -> bool:
        return isinstance(self.norm, _BatchNorm)

    def frozen(self) -> Layer:
        """The layer as it is set now, on modules that share the user's tensors."""
        modules = copy.copy(self.conv), copy.copy(self.norm)
        return Layer(*modules, self.activation, copy.copy(self.act), self.flatten)

    def refusal(self, differentiated: bool, device: torch.device) -> str:
        """Why the layer cannot be part of a program on a device, or ""."""
        conv, norm = self.conv, self.norm if self.is_batch_norm() else None
        if self.convolves() and (conv.padding_mode != "zeros" or isinstance(conv.padding, str)):
            return "padding other than by a number of zeros"
        if isinstance(conv, TRANSPOSED) and any(
            extra >= step for extra, step in zip(conv.output_padding, conv.stride, strict=True)
        ):
            return "output_padding of the stride or more"
        if norm is not None and norm.training and norm.track_running_stats and norm.momentum is None:
            return "a cumulative average of statistics"
        if norm is not None and not norm.training and (differentiated or norm.running_mean is None):
            return "a norm in eval mode without running statistics, or under gradients"
        if norm is not None and norm.training and norm.sync is not False:
            return "statistics over several processes"
        if getattr(self.norm, "running_mean", None) is not None and norm is None:
            return "an instance norm with running statistics"
        tensors = [t for t in (*self.parameters(), *self.buffers()[:2]) if t is not None]
        if any(t.dtype != torch.float32 or t.device != device or not is_dense(image(t)) for t in tensors):
            return f"parameters that are not dense float32 on {device}"
        return "" if self.fits_itself() else "parameters that do not fit each other"

    def fits_itself(self) -> bool:
        """Whether biases and a norm's vectors are as long as their layer has channels; kernels would read past them."""
        conv, norm = self.conv, self.norm
        found: list[tuple[Tensor | None, int]] = []
        if conv is not None:
            weight = conv.weight
            outputs = weight.shape[1] * conv.groups if isinstance(conv, TRANSPOSED) else weight.shape[0]
            found.append((conv.bias, outputs))
        if norm is not None:
            channels = next(getattr(norm, name) for name in _CHANNELS if hasattr(norm, name))
            channels = channels if isinstance(channels, int) else math.prod(channels)
            found += [(t, channels) for t in (norm.weight, norm.bias, *self.buffers()[:2])]
        return all(t is None or t.shape == (count,) for t, count in found)


def hold_constant(tensors: Iterable[Tensor | None]) -> None:
    """Promise that these tensors stay as they are: a program folds and packs them once."""
    for t in tensors:
        if t is not None:
            t.fastgan_constant = True  # type: ignore[attr-defined]


def are_constant(tensors: Iterable[Tensor | None]) -> bool:
    """Whether that was promised of all of them; the counts of batches, which no program in eval mode reads, aside."""
    return all(hasattr(t, "fastgan_constant") for t in tensors if t is not None and t.is_floating_point())


def torch_class(m: Any) -> str:
    """The name of torch's class that a module is of, or derived from; "" for None."""
    return next((c.__name__ for c in type(m).__mro__ if c.__module__.startswith("torch.nn.modules")), "")


def _sample_normed(norm: Any, x: Tensor, weight: Any, bias: Any, activation: str, slope: float) -> Tensor:
    """The op of a group, instance or layer norm, on other parameters than the module's."""
    act: Any = {"activation": activation, "negative_slope": slope}
    if isinstance(norm, nn.LayerNorm):
        return functional.ln_act(x, norm.normalized_shape, weight, bias, norm.eps, **act)
    groups = norm.num_groups if isinstance(norm, nn.GroupNorm) else norm.num_features
    return functional.gn_act(x, groups, weight, bias, norm.eps, **act)


def replay(layers: Sequence[Layer], x: Tensor, parameters: Sequence[Tensor | None]) -> Tensor:
    """The layers op by op, in training, running statistics untouched: what a program's backward falls back to."""
    rest = iter(parameters)
    for layer in layers:
        activation, slope = layer.activation, layer.slope
        x = x.flatten(1) if layer.flatten else x
        if isinstance(layer.conv, nn.Linear):
            x = torch.nn.functional.linear(x, next(rest), next(rest))  # type: ignore[arg-type]
        elif layer.conv is not None:
            epilogue = (
                dict(activation=activation, negative_slope=slope) if layer.norm is None else dict(activation=None)
            )
            x = convolved(layer.conv, x, next(rest), next(rest), **epilogue)
        if layer.is_batch_norm():
            x = functional.bn_act(
                x,
                weight=next(rest),
                bias=next(rest),
                training=True,
                eps=layer.norm.eps,
                activation=activation,
                negative_slope=slope,
                stat_groups=layer.norm.stat_groups,
            )
        elif layer.norm is not None:
            x = _sample_normed(layer.norm, x, next(rest), next(rest), activation, slope)
        elif layer.conv is None or isinstance(layer.conv, nn.Linear):
            x = _activation.apply(x, activation, slope)
    return x


def gradients_by_ops(
    layers: Sequence[Layer], dtype: torch.dtype, wants: Sequence[bool], dy: Tensor, tensors: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """The gradients of `tensors`, x and then the parameters, from y's; differentiable where grad mode is on."""
    again = torch.is_grad_enabled()
    wants = [want and t is not None for want, t in zip(wants, tensors, strict=True)]
    lowered = torch.autocast(dy.device.type, dtype, enabled=dtype != torch.float32)
    with torch.enable_grad(), second_order(), lowered:
        # views end the inner pass: a parameter that x was made with would get its share of the outer pass twice
        apart: Callable[[Any], Tensor] = lambda t: t.view_as(t) if again else t.detach().requires_grad_()
        tensors = [apart(t) if want else t for t, want in zip(tensors, wants, strict=True)]
        y = replay(layers, tensors[0], tensors[1:])  # type: ignore[arg-type]
        asked = [t for t, w in zip(tensors, wants, strict=True) if w]
        found = iter(torch.autograd.grad(y, asked, dy, create_graph=again, allow_unused=True))  # type: ignore[arg-type]
    return [next(found) if w else None for w in wants]


def versions(parameters: Sequence[Tensor | None]) -> list[int]:
    """How often each of these was written to."""
    try:
        return [p._version for p in parameters if p is not None]
    except RuntimeError:  # of inference mode, which counts none
        return [0 if p.is_inference() else p._version for p in parameters if p is not None]


def reached(ctx: Any, tensors: Sequence[Tensor | None]) -> list[bool]:
    """Of the tensors among a node's inputs, whether the running backward pass uses their gradients."""
    edges = iter(ctx.next_functions)  # one for each tensor
    edge_of = [None if t is None else next(edges)[0] for t in tensors]
    wants = ctx.needs_input_grad[-len(tensors) :]
    return [want and reaches(edge) for want, edge in zip(wants, edge_of, strict=True)]


def written_to() -> RuntimeError:
    """What autograd raises where a tensor was written to between forward and backward, of a parameter."""
    return RuntimeError(
        "one of the variables needed for gradient computation has been modified by an inplace operation: "
        "a parameter of a converted chain; update parameters after the last backward pass that needs them"
    )


def convolved(conv: Any, x: Tensor, weight: Any, bias: Tensor | None, **epilogue: Any) -> Tensor:
    """The op of a convolution module, on other tensors than its own."""
    signals = len(conv.kernel_size) == 1
    op: Callable[..., Tensor]
    if isinstance(conv, TRANSPOSED):
        op = functional.conv_transpose1d if signals else functional.conv_transpose2d
        geometry: Any = conv.stride, conv.padding, conv.output_padding, conv.groups, conv.dilation
        return op(x, weight, bias, *geometry, **epilogue)
    op = functional.conv1d if signals else functional.conv2d
    return op(x, weight, bias, conv.stride, conv.padding, conv.dilation, conv.groups, **epilogue)


def plain(layers: Sequence[Layer], x: Tensor, parameters: Sequence[Any], buffers: Sequence[Any]) -> Tensor:
    """The layers in PyTorch's own ops, running statistics included: what a program races against."""
    rest, kept = iter(parameters), iter(buffers)
    for layer in layers:
        conv, norm = layer.conv, layer.norm
        x = x.flatten(1) if layer.flatten else x
        if isinstance(conv, nn.Linear):
            x = torch.nn.functional.linear(x, next(rest), next(rest))
        elif conv is not None:
            x = _plain_convolution(conv, x, next(rest), next(rest))
        if layer.is_batch_norm():
            x = _plain_norm(norm, x, next(rest), next(rest), next(kept), next(kept), next(kept))
        elif norm is not None:
            x = _plain_sample_norm(norm, x, next(rest), next(rest))
        y = _activation.apply(x, layer.activation, layer.slope)
        x = y if not layer.in_place or y.stride() == x.stride() else y.as_strided(y.shape, x.stride())
    return x


def _plain_convolution(conv: Any, x: Tensor, weight: Any, bias: Any) -> Tensor:
    signals = len(conv.kernel_size) == 1
    op: Callable[..., Tensor]
    if isinstance(conv, TRANSPOSED):
        op = torch.conv_transpose1d if signals else torch.conv_transpose2d
        geometry: Any = conv.stride, conv.padding, conv.output_padding, conv.groups, conv.dilation
        return op(x, weight, bias, *geometry)
    op = torch.conv1d if signals else torch.conv2d
    return op(x, weight, bias, conv.stride, conv.padding, conv.dilation, conv.groups)


def _plain_norm(norm: Any, x: Tensor, weight: Any, bias: Any, mean: Any, var: Any, batches: Any) -> Tensor:
    groups = norm.stat_groups if norm.training else 1
    if norm.training and norm.track_running_stats:
        batches.add_(groups)
    kept = (mean, var) if not norm.training or norm.track_running_stats else (None, None)
    parts = [
        torch.nn.functional.batch_norm(
            part, kept[0], kept[1], weight, bias, norm.training, norm.momentum or 0.0, norm.eps
        )
        for part in (x.chunk(groups) if groups > 1 else (x,))
    ]
    return parts[0] if groups == 1 else torch.cat(parts)


def _plain_sample_norm(norm: Any, x: Tensor, weight: Any, bias: Any) -> Tensor:
    if isinstance(norm, nn.LayerNorm):
        return torch.nn.functional.layer_norm(x, norm.normalized_shape, weight, bias, norm.eps)
    if isinstance(norm, nn.GroupNorm):
        return torch.nn.functional.group_norm(x, norm.num_groups, weight, bias, norm.eps)
    y = torch.nn.functional.instance_norm(x, weight=weight, bias=bias, eps=norm.eps)
    if len(x) == 1 and y.requires_grad:  # torch 2.13 takes one sample's channels_last cotangent for NCHW: wrong by 1.4
        y.register_hook(torch.Tensor.contiguous)
    return y
