"""A convolution and what follows it: one kernel where that is the same mathematics, else as few as there are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from fastgan._layout import accumulation_dtype
from fastgan._ranks import Sync
from fastgan.functional.checks import Size2, pair
from fastgan.functional.convolution import conv2d, conv2d_statistics, conv_transpose2d, conv_transpose2d_statistics
from fastgan.functional.norm import Statistics, bn_act


def conv2d_bias_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Size2 = 1,
    padding: Size2 | str = 0,
    dilation: Size2 = 1,
    groups: int = 1,
    *,
    activation: str | None = "leaky_relu",
    negative_slope: float = 0.2,
) -> Tensor:
    """`conv2d` whose activation defaults to leaky ReLU: the critic's block."""
    act: dict[str, Any] = {"activation": activation, "negative_slope": negative_slope}
    return conv2d(x, weight, bias, stride, padding, dilation, groups, **act)


def conv2d_bn_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Size2 = 1,
    padding: Size2 | str = 0,
    dilation: Size2 = 1,
    groups: int = 1,
    *,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    bn_weight: Tensor | None = None,
    bn_bias: Tensor | None = None,
    training: bool,
    momentum: float | Sequence[float | Tensor] = 0.1,
    eps: float = 1e-5,
    activation: str | None = "leaky_relu",
    negative_slope: float = 0.2,
    stat_groups: int = 1,
    sync: Sync = False,
) -> Tensor:
    """Convolution, batch norm and activation; arguments as `conv2d` and `bn_act`.

    In training on a GPU the statistics come out of the convolution's epilogue, and the norm reads its input once. In
    eval mode the norm folds into the convolution's weight and bias where that is less work (there are about as many
    output pixels as taps, or more): one kernel, equal to rounding.
    """
    geometry = stride, padding, dilation, groups
    act: dict[str, Any] = {"activation": activation, "negative_slope": negative_slope}
    folds = not training and _folding_pays("conv2d", x, weight, stride)
    if folds and running_mean is not None and running_var is not None:
        weight, bias = fold(weight, bias, running_mean, running_var, bn_weight, bn_bias, eps, channel_dim=0)
        return conv2d(x, weight, bias, *geometry, **act)
    known: Statistics = None
    if training:
        y, known = conv2d_statistics(x, weight, bias, *geometry, stat_groups=stat_groups)
    else:
        y = conv2d(x, weight, bias, *geometry)
    norm = {"training": training, "momentum": momentum, "eps": eps, "stat_groups": stat_groups, "sync": sync, **act}
    return _normed(y, known, running_mean, running_var, bn_weight, bn_bias, norm)


def conv_transpose2d_bn_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Size2 = 1,
    padding: Size2 = 0,
    output_padding: Size2 = 0,
    groups: int = 1,
    dilation: Size2 = 1,
    *,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    bn_weight: Tensor | None = None,
    bn_bias: Tensor | None = None,
    training: bool,
    momentum: float | Sequence[float | Tensor] = 0.1,
    eps: float = 1e-5,
    activation: str | None = "leaky_relu",
    negative_slope: float = 0.2,
    stat_groups: int = 1,
    sync: Sync = False,
) -> Tensor:
    """Transposed convolution, batch norm and activation; arguments as `conv_transpose2d` and `bn_act`.

    In training as `conv2d_bn_act`. In eval mode (groups = 1) the norm folds into the convolution's weight and bias
    where that is less work (there are about as many output pixels as weights of an output channel, or more).
    """
    geometry = stride, padding, output_padding, groups, dilation
    act: dict[str, Any] = {"activation": activation, "negative_slope": negative_slope}
    folds = not training and groups == 1 and _folding_pays("conv_transpose2d", x, weight, stride)
    if folds and running_mean is not None and running_var is not None:
        weight, bias = fold(weight, bias, running_mean, running_var, bn_weight, bn_bias, eps, channel_dim=1)
        return conv_transpose2d(x, weight, bias, *geometry, **act)
    known: Statistics = None
    if training:
        y, known = conv_transpose2d_statistics(x, weight, bias, *geometry, stat_groups=stat_groups)
    else:
        y = conv_transpose2d(x, weight, bias, *geometry)
    norm = {"training": training, "momentum": momentum, "eps": eps, "stat_groups": stat_groups, "sync": sync, **act}
    return _normed(y, known, running_mean, running_var, bn_weight, bn_bias, norm)


def _normed(
    y: Tensor,
    known: Statistics,
    mean: Tensor | None,
    var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    norm: dict[str, Any],
) -> Tensor:
    """`bn_act` of a convolution's output [N, K, OH, OW], or [K, OH, OW] as a batch of one."""
    if y.dim() == 4:
        return bn_act(y, mean, var, weight, bias, batch_statistics=known, **norm)
    return bn_act(y.unsqueeze(0), mean, var, weight, bias, **norm).squeeze(0)


def _folding_pays(op: str, x: Tensor, weight: Tensor, stride: Size2) -> bool:
    """Whether an output channel has about as many pixels as weights, or more."""
    pixels, step = x.numel() // max(x.shape[-3], 1), math.prod(pair(op, "stride", stride, 1))
    if op == "conv_transpose2d":
        return pixels * step >= weight.numel() // max(weight.shape[1], 1)
    return pixels >= weight.numel() // max(weight.shape[0], 1) * step


def fold(
    weight: Tensor,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    eps: float,
    channel_dim: int,
) -> tuple[Tensor, Tensor]:
    """(weight, bias) of the convolution that does its own eval-mode batch norm; differentiable, computed in float32.

    Anew at each call, weight.numel() multiplications: nothing tells reliably that weights or statistics changed
    (`_version` does not move under fused optimisers, numpy views or `.data`). The pass that it saves reads and writes
    output.numel() elements, so callers fold where that is about the larger number.
    """
    scale = (var.to(accumulation_dtype(var.dtype)) + eps).rsqrt()
    scale = scale if gamma is None else gamma * scale
    shape = [1] * 4
    shape[channel_dim] = -1
    shift = -mean * scale if bias is None else (bias - mean) * scale
    shift = shift if beta is None else shift + beta
    folded = weight.to(scale.dtype) * scale.view(shape)
    return folded.to(weight.dtype), shift.to(weight.dtype)
