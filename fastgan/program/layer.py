"""One layer of a program: a convolution, a batch norm or both, and the activation after them, as the user's modules."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from fastgan import _activation, functional

_conv_facts = attrgetter("stride", "padding", "dilation", "groups", "padding_mode")
_norm_facts = attrgetter("training", "eps", "momentum", "track_running_stats", "stat_groups")


@dataclass
class Layer:
    """conv: nn.Conv2d, nn.ConvTranspose2d or None; norm: a converted nn.BatchNorm2d or None; act: a module or None."""

    conv: Any
    norm: Any
    activation: str
    act: Any

    @property
    def slope(self) -> float:
        return float(getattr(self.act, "negative_slope", 0.0))

    def parameters(self) -> list[Tensor | None]:
        """Convolution's weight and bias, norm's weight and bias; None for those that are absent."""
        owners = [m._parameters for m in (self.conv, self.norm) if m is not None]
        return [p[name] for p in owners for name in ("weight", "bias")]

    def buffers(self) -> list[Tensor | None]:
        """The norm's running mean, running variance and count of batches."""
        if self.norm is None:
            return []
        buffers = self.norm._buffers
        return [buffers["running_mean"], buffers["running_var"], buffers["num_batches_tracked"]]

    def facts(self) -> tuple:
        """What a plan depends on besides the tensors."""
        conv = () if self.conv is None else _conv_facts(self.conv)
        norm = () if self.norm is None else _norm_facts(self.norm)
        return type(self.conv).__name__, conv, norm, self.activation, getattr(self.act, "negative_slope", 0.0)

    def frozen(self) -> Layer:
        """The layer as it is set now, on modules that share the user's tensors."""
        return Layer(copy.copy(self.conv), copy.copy(self.norm), self.activation, copy.copy(self.act))

    def refusal(self, differentiated: bool) -> str:
        """Why the layer cannot be part of a program, or ""."""
        conv, norm = self.conv, self.norm
        if conv is not None and (conv.padding_mode != "zeros" or isinstance(conv.padding, str)):
            return "padding other than by a number of zeros"
        if isinstance(conv, nn.ConvTranspose2d) and any(
            extra >= step for extra, step in zip(conv.output_padding, conv.stride, strict=True)
        ):
            return "output_padding of the stride or more"
        if norm is not None and norm.training and norm.track_running_stats and norm.momentum is None:
            return "a cumulative average of statistics"
        if norm is not None and not norm.training and (differentiated or norm.running_mean is None):
            return "a norm in eval mode without running statistics, or under gradients"
        tensors = [t for t in (*self.parameters(), *self.buffers()[:2]) if t is not None]
        if any(t.dtype != torch.float32 or not t.is_cpu or not dense(t) for t in tensors):
            return "parameters that are not dense float32 on the CPU"
        return ""


def dense(t: Tensor) -> bool:
    """Whether t is contiguous or channels_last."""
    return t.is_contiguous() or (t.dim() == 4 and t.is_contiguous(memory_format=torch.channels_last))


def replay(layers: Sequence[Layer], x: Tensor, parameters: Sequence[Tensor | None]) -> Tensor:
    """The layers op by op, in training, running statistics untouched: what a program's backward falls back to."""
    rest = iter(parameters)
    for layer in layers:
        activation, slope = layer.activation, layer.slope
        if layer.conv is not None:
            epilogue = (
                dict(activation=activation, negative_slope=slope) if layer.norm is None else dict(activation=None)
            )
            x = convolved(layer.conv, x, next(rest), next(rest), **epilogue)
        if layer.norm is not None:
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
    return x


def convolved(conv: Any, x: Tensor, weight: Any, bias: Tensor | None, **epilogue: Any) -> Tensor:
    """The op of a convolution module, on other tensors than its own."""
    if isinstance(conv, nn.ConvTranspose2d):
        geometry = conv.stride, conv.padding, conv.output_padding, conv.groups, conv.dilation
        return functional.conv_transpose2d(x, weight, bias, *geometry, **epilogue)  # type: ignore[arg-type]
    return functional.conv2d(x, weight, bias, conv.stride, conv.padding, conv.dilation, conv.groups, **epilogue)


def plain(layers: Sequence[Layer], x: Tensor, parameters: Sequence[Any], buffers: Sequence[Any]) -> Tensor:
    """The layers in PyTorch's own ops, running statistics included: what a program races against."""
    rest, kept = iter(parameters), iter(buffers)
    for layer in layers:
        conv, norm = layer.conv, layer.norm
        if isinstance(conv, nn.ConvTranspose2d):
            geometry = conv.stride, conv.padding, conv.output_padding, conv.groups, conv.dilation
            x = torch.nn.functional.conv_transpose2d(x, next(rest), next(rest), *geometry)  # type: ignore[arg-type]
        elif conv is not None:
            x = torch.conv2d(x, next(rest), next(rest), conv.stride, conv.padding, conv.dilation, conv.groups)
        if norm is not None:
            x = _plain_norm(norm, x, next(rest), next(rest), next(kept), next(kept), next(kept))
        x = _activation.apply(x, layer.activation, layer.slope)
    return x


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
