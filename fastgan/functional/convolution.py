"""Convolution and transposed convolution, each with a bias and an activation in its kernel."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgan import _activation
from fastgan._layout import image, is_channels_last, laid_out
from fastgan.functional.checks import Size2, check_bias, ints, pair
from fastgan.functional.norm import Statistics
from fastgan.ops import conv2d as _conv2d
from fastgan.ops import conv_transpose2d as _conv_transpose2d

Size1 = int | Sequence[int]


def conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Size2 = 1,
    padding: Size2 | str = 0,
    dilation: Size2 = 1,
    groups: int = 1,
    *,
    activation: str | None = None,
    negative_slope: float = 0.2,
) -> Tensor:
    """2-D convolution with bias and activation in one kernel.

    Args:
        x: [N, C, H, W] or [C, H, W], floating.
        weight: [K, C/groups, R, S], x's dtype and device.
        bias: [K] or None.
        stride, padding, dilation, groups: as `torch.nn.functional.conv2d`; padding may be "same" or "valid".
        activation: None, "identity", "relu", "leaky_relu", "tanh" or "sigmoid".
        negative_slope: of leaky_relu, >= 0.

    Returns:
        [N, K, OH, OW], x's dtype; channels_last if x or weight is.

    Raises:
        ValueError: shapes that do not fit, an unknown activation, a negative slope below 0.
        TypeError: dtypes that differ outside autocast.
    """
    activation = _activation.check("conv2d", activation, negative_slope)
    args = _conv2d_arguments(x, weight, bias, stride, padding, dilation, groups)
    y = _conv2d.op(*args, activation, float(negative_slope))
    return y if x.dim() == 4 else y.squeeze(0)


def conv2d_statistics(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Size2 = 1,
    padding: Size2 | str = 0,
    dilation: Size2 = 1,
    groups: int = 1,
    *,
    stat_groups: int = 1,
) -> tuple[Tensor, Statistics]:
    """`conv2d` and, where a GPU's kernel makes them in its epilogue, y's batch statistics for `bn_act`.

    Returns:
        (y, (mean, var)) with [stat_groups, K] float32 statistics of y, var biased, no gradients; (y, None) on a CPU and
        wherever `bn_act` is as fast with its own.
    """
    args = _conv2d_arguments(x, weight, bias, stride, padding, dilation, groups)
    shape = _conv2d.output_shape(args[0], weight, *args[3:6])
    if x.dim() == 4 and _conv2d.statistics_pay(shape, x.device.type, "conv2d_statistics", stat_groups):
        y, mean, var = _conv2d.statistics(*args, stat_groups)
        return y, (mean, var)
    y = _conv2d.op(*args, "identity", 0.0)
    return y if x.dim() == 4 else y.squeeze(0), None


def conv_transpose2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Size2 = 1,
    padding: Size2 = 0,
    output_padding: Size2 = 0,
    groups: int = 1,
    dilation: Size2 = 1,
    *,
    activation: str | None = None,
    negative_slope: float = 0.2,
) -> Tensor:
    """2-D transposed convolution with bias and activation in one kernel, computed by output phase.

    Args:
        x: [N, C, H, W] or [C, H, W], floating.
        weight: [C, K/groups, R, S], x's dtype and device.
        bias: [K] or None.
        stride, padding, output_padding, groups, dilation: as `torch.nn.functional.conv_transpose2d`.
        activation, negative_slope: as `conv2d`.

    Returns:
        [N, K, OH, OW], x's dtype; channels_last if x or weight is.

    Raises:
        ValueError: shapes that do not fit, an unknown activation, a negative slope below 0.
        TypeError: dtypes that differ outside autocast.
    """
    activation = _activation.check("conv_transpose2d", activation, negative_slope)
    args = _conv_transpose2d_arguments(x, weight, bias, stride, padding, output_padding, groups, dilation)
    y = _conv_transpose2d.op(*args, activation, float(negative_slope))
    return y if x.dim() == 4 else y.squeeze(0)


def conv_transpose2d_statistics(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Size2 = 1,
    padding: Size2 = 0,
    output_padding: Size2 = 0,
    groups: int = 1,
    dilation: Size2 = 1,
    *,
    stat_groups: int = 1,
) -> tuple[Tensor, Statistics]:
    """`conv_transpose2d` with batch statistics, as `conv2d_statistics`."""
    args = _conv_transpose2d_arguments(x, weight, bias, stride, padding, output_padding, groups, dilation)
    shape = _conv_transpose2d.output_shape(args[0], weight, *args[3:])
    if x.dim() == 4 and _conv2d.statistics_pay(shape, x.device.type, "conv_transpose2d_statistics", stat_groups):
        y, mean, var = _conv_transpose2d.statistics(*args, stat_groups)
        return y, (mean, var)
    y = _conv_transpose2d.op(*args, "identity", 0.0)
    return y if x.dim() == 4 else y.squeeze(0), None


def conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Size1 = 1,
    padding: Size1 | str = 0,
    dilation: Size1 = 1,
    groups: int = 1,
    *,
    activation: str | None = None,
    negative_slope: float = 0.2,
    layout: Literal["torch", "x"] = "torch",
) -> Tensor:
    """1-D convolution: `conv2d` of images one pixel high, which are views of x and weight.

    Args:
        x: [N, C, L] or [C, L], floating.
        weight: [K, C/groups, R], x's dtype and device.
        bias: [K] or None.
        stride, padding, dilation, groups: as `torch.nn.functional.conv1d`; padding may be "same" or "valid".
        activation, negative_slope: as `conv2d`.
        layout: of the result: "torch" is contiguous, or has the channels innermost where weight has them there, as in
            torch; "x" has them there where x has, too, which saves a copy.

    Returns:
        [N, K, OL], x's dtype, in that layout.

    Raises:
        ValueError, TypeError: as `conv2d`; an unknown layout.
    """
    _check_signal("conv1d", x, weight, layout)
    pads = padding if isinstance(padding, str) else _line("conv1d", "padding", padding, 0)
    y = conv2d(
        x.unsqueeze(-2),
        weight.unsqueeze(2),
        bias,
        _line("conv1d", "stride", stride, 1),
        pads,
        _line("conv1d", "dilation", dilation, 1),
        groups,
        activation=activation,
        negative_slope=negative_slope,
    )
    return _signal(y, weight, layout)


def conv_transpose1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Size1 = 1,
    padding: Size1 = 0,
    output_padding: Size1 = 0,
    groups: int = 1,
    dilation: Size1 = 1,
    *,
    activation: str | None = None,
    negative_slope: float = 0.2,
    layout: Literal["torch", "x"] = "torch",
) -> Tensor:
    """1-D transposed convolution: `conv_transpose2d` of images one pixel high; see `conv1d`.

    Args:
        x: [N, C, L] or [C, L], floating.
        weight: [C, K/groups, R], x's dtype and device.
        bias: [K] or None.
        stride, padding, output_padding, groups, dilation: as `torch.nn.functional.conv_transpose1d`.
        activation, negative_slope: as `conv2d`.
        layout: as of `conv1d`.

    Returns:
        [N, K, OL], x's dtype, in that layout.

    Raises:
        ValueError, TypeError: as `conv_transpose2d`; an unknown layout.
    """
    name = "conv_transpose1d"
    _check_signal(name, x, weight, layout)
    y = conv_transpose2d(
        x.unsqueeze(-2),
        weight.unsqueeze(2),
        bias,
        _line(name, "stride", stride, 1),
        _line(name, "padding", padding, 0),
        _line(name, "output_padding", output_padding, 0),
        groups,
        _line(name, "dilation", dilation, 1),
        activation=activation,
        negative_slope=negative_slope,
    )
    return _signal(y, weight, layout)


def _signal(y: Tensor, weight: Tensor, layout: str) -> Tensor:
    """An image one pixel high as a signal. A dropout behind it draws its mask in the order of memory: torch's."""
    y = y.squeeze(-2)
    lies = layout == "x" or (y.stride(-1) == 1 and y.stride(-2) == y.shape[-1]) or is_channels_last(image(weight))
    if lies:
        return y
    return laid_out(image(y), False).squeeze(2) if y.dim() == 3 else y.contiguous()


def _line(op: str, name: str, value: Size1, least: int) -> list[int]:
    """A number along L as the pair (H, W) of an image one pixel high."""
    given = ints(value)
    if len(given) != 1 or given[0] < least:
        raise ValueError(f"{op}: {name} must be an int >= {least} or a sequence of one, got {value!r}")
    return [least, given[0]]


def _check_signal(op: str, x: Tensor, weight: Tensor, layout: str) -> None:
    if layout not in ("torch", "x"):
        raise ValueError(f'{op}: layout must be "torch" or "x", got {layout!r}')
    if x.dim() not in (2, 3) or weight.dim() != 3:
        raise ValueError(
            f"{op}: x must be [N,C,L] or [C,L] and weight must have 3 dimensions, got {tuple(x.shape)} and "
            f"{tuple(weight.shape)}"
        )


def _conv2d_arguments(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: Size2, padding: Size2 | str, dilation: Size2, groups: int
) -> tuple:
    """The op's arguments up to groups, checked."""
    name = "conv2d"
    _check_tensors(name, x, weight, bias)
    strides, dilations = pair(name, "stride", stride, 1), pair(name, "dilation", dilation, 1)
    if isinstance(padding, str):
        x, padding = _string_padding(x, weight, strides, padding, dilations)
    paddings = pair(name, "padding", padding, 0)
    if groups < 1 or x.shape[-3] != weight.shape[1] * groups or weight.shape[0] % groups:
        raise ValueError(
            f"{name}: x must have weight.shape[1] * groups = {weight.shape[1] * groups} channels and weight.shape[0] "
            f"must be a multiple of groups, got x {tuple(x.shape)}, weight {tuple(weight.shape)}, groups={groups}"
        )
    check_bias(name, bias, weight.shape[0])
    batched = x if x.dim() == 4 else x.unsqueeze(0)
    _, _, oh, ow = _conv2d.output_shape(batched, weight, strides, paddings, dilations)
    if oh < 1 or ow < 1:
        raise ValueError(
            f"{name}: the kernel must fit into the padded input, got x {tuple(x.shape)}, weight "
            f"{tuple(weight.shape)}, padding {paddings}, dilation {dilations}"
        )
    return batched, weight, bias, strides, paddings, dilations, groups


def _conv_transpose2d_arguments(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Size2,
    padding: Size2,
    output_padding: Size2,
    groups: int,
    dilation: Size2,
) -> tuple:
    """The op's arguments up to dilation, checked."""
    name = "conv_transpose2d"
    _check_tensors(name, x, weight, bias)
    strides, dilations = pair(name, "stride", stride, 1), pair(name, "dilation", dilation, 1)
    paddings, extra = pair(name, "padding", padding, 0), pair(name, "output_padding", output_padding, 0)
    if groups < 1 or x.shape[-3] != weight.shape[0] or weight.shape[0] % groups:
        raise ValueError(
            f"{name}: x must have weight.shape[0] = {weight.shape[0]} channels, a multiple of groups, "
            f"got x {tuple(x.shape)}, weight {tuple(weight.shape)}, groups={groups}"
        )
    if any(extra[i] >= max(strides[i], dilations[i]) for i in (0, 1)):
        raise ValueError(
            f"{name}: output_padding must be smaller than stride or dilation, got {extra} with stride {strides} "
            f"and dilation {dilations}"
        )
    check_bias(name, bias, weight.shape[1] * groups)
    batched = x if x.dim() == 4 else x.unsqueeze(0)
    shape = _conv_transpose2d.output_shape(batched, weight, strides, paddings, extra, groups, dilations)
    if min(shape[2:]) < 1:
        raise ValueError(f"{name}: the output must not be empty, got x {tuple(x.shape)}, padding {paddings}")
    return batched, weight, bias, strides, paddings, extra, groups, dilations


def _check_tensors(op: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Ranks, dtypes and devices; the callers check shapes."""
    if weight.dim() != 4:
        raise ValueError(f"{op}: weight must have 4 dimensions, got shape {tuple(weight.shape)}")
    if x.dim() not in (3, 4):
        raise ValueError(f"{op}: x must be [N,C,H,W] or [C,H,W], got shape {tuple(x.shape)}")
    autocast = not x.is_meta and torch.is_autocast_enabled(x.device.type)  # which raises for the meta device
    for name, t in (("weight", weight), ("bias", bias)):
        if t is None:
            continue
        if t.device != x.device:
            raise ValueError(f"{op}: {name} must be on x's device {x.device}, got {t.device}; move one with .to()")
        if t.dtype != x.dtype and not autocast:
            raise TypeError(f"{op}: {name} must have x's dtype {x.dtype}, got {t.dtype}; convert one with .to()")
    if not x.is_floating_point():
        raise TypeError(f"{op}: x must be a floating tensor, got {x.dtype}; convert it with .float()")


def _string_padding(
    x: Tensor, weight: Tensor, stride: list[int], padding: str, dilation: list[int]
) -> tuple[Tensor, list[int]]:
    """torch's "valid" and "same"; an odd total puts the extra zero at the end, as torch does."""
    if padding == "valid":
        return x, [0, 0]
    if padding != "same" or max(stride) > 1:
        raise ValueError(
            f'conv2d: padding must be ints, "valid", or "same" with stride 1, got {padding!r} with stride {stride}'
        )
    total = [dilation[i] * (weight.shape[2 + i] - 1) for i in (0, 1)]
    if total[0] % 2 or total[1] % 2:
        x = F.pad(x, (0, total[1] % 2, 0, total[0] % 2))
    return x, [t // 2 for t in total]
