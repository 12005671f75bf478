"""Norm + activation as modules, and the stat groups that let D(real) and D(fake) run as one batch."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fastgan import _activation, functional
from fastgan._ranks import Sync
from fastgan.ops.bn_act import ACTIVATIONS


def momenta(bn: _BatchNorm, groups: int) -> float | list[float | Tensor]:
    """Count `groups` batches and give each its momentum; momentum=None is the cumulative average, as in torch."""
    if not bn.training or not bn.track_running_stats or bn.num_batches_tracked is None:
        return 0.0 if bn.momentum is None else bn.momentum
    bn.num_batches_tracked.add_(groups)
    if bn.momentum is not None:
        return bn.momentum
    # tensors, not numbers: the count lives on the device and the step reads nothing back
    return [1.0 / (bn.num_batches_tracked - (groups - 1 - g)).double() for g in range(groups)]


def statistics(bn: _BatchNorm, groups: int, sync: Sync) -> dict[str, Any]:
    """The norm's state as `functional.bn_act` wants it, by torch's own rules for training and buffers."""
    buffers = not bn.training or bn.track_running_stats
    return {
        "running_mean": bn.running_mean if buffers else None,
        "running_var": bn.running_var if buffers else None,
        "training": takes_batch_statistics(bn),
        "momentum": momenta(bn, groups),
        "eps": bn.eps,
        "stat_groups": groups,
        "sync": sync if bn.training else False,  # in eval mode ranks need not call together
    }


def takes_batch_statistics(bn: _BatchNorm) -> bool:
    """Whether the norm takes the batch's statistics, not its running ones, by torch's own rule."""
    return bn.training or (bn.running_mean is None and bn.running_var is None)


def bn_act(bn: _BatchNorm, x: Tensor, activation: str | None, negative_slope: float, groups: int, sync: Sync) -> Tensor:
    """A torch batch norm module followed by an activation, as one op."""
    bn._check_input_dim(x)
    act: dict[str, Any] = {"activation": activation, "negative_slope": negative_slope}
    return functional.bn_act(x, weight=bn.weight, bias=bn.bias, **act, **statistics(bn, groups, sync))


class Act(nn.Module):
    """A module that ends in an activation."""

    def ends_in(self, activation: str | None, negative_slope: float, allowed: tuple[str, ...] = ACTIVATIONS) -> None:
        self.activation = _activation.check(type(self).__name__, activation, negative_slope, allowed)
        self.negative_slope = negative_slope

    def extra_repr(self) -> str:
        return ", ".join(
            filter(None, [super().extra_repr(), _activation.describe(self.activation, self.negative_slope)])
        )


class _BatchNormAct(Act, _BatchNorm):
    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        activation: str | None = "leaky_relu",
        negative_slope: float = 0.2,
        stat_groups: int = 1,
        sync: Sync = False,
    ):
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device=device, dtype=dtype)
        self.ends_in(activation, negative_slope)
        self.stat_groups, self.sync = stat_groups, sync

    def forward(self, x: Tensor) -> Tensor:
        return bn_act(self, x, self.activation, self.negative_slope, self.stat_groups, self.sync)


class BatchNormAct2d(_BatchNormAct, nn.BatchNorm2d):
    """`torch.nn.BatchNorm2d` followed by an activation, as one op; same parameters, buffers and state_dict.

    Args:
        num_features, eps, momentum, affine, track_running_stats, device, dtype: as `torch.nn.BatchNorm2d`.
        activation, negative_slope, stat_groups, sync: as `fastgan.functional.bn_act`.

    Shape: [N, C, H, W] -> the same.
    """


class BatchNormAct1d(_BatchNormAct, nn.BatchNorm1d):
    """`torch.nn.BatchNorm1d` followed by an activation, as one op; arguments as `BatchNormAct2d`.

    Shape: [N, C] or [N, C, L] -> the same.
    """


# ---- group, instance and layer norm: every sample by itself ----------------------------------------------------------


def gn_act(norm: nn.GroupNorm, x: Tensor, activation: str | None, negative_slope: float) -> Tensor:
    """A torch group norm module followed by an activation, as one op."""
    return functional.gn_act(
        x, norm.num_groups, norm.weight, norm.bias, norm.eps, activation=activation, negative_slope=negative_slope
    )


def in_act(norm: nn.InstanceNorm2d, x: Tensor, activation: str | None, negative_slope: float) -> Tensor:
    """A torch instance norm module followed by an activation, as one op."""
    if x.dim() not in (3, 4):
        raise ValueError(f"in_act: x must be [N, C, H, W] or [C, H, W], got shape {tuple(x.shape)}")
    tensors = norm.running_mean, norm.running_var, norm.weight, norm.bias
    numbers = norm.training or not norm.track_running_stats, norm.momentum or 0.0, norm.eps
    batch = x if x.dim() == 4 else x.unsqueeze(0)
    y = functional.in_act(batch, *tensors, *numbers, activation=activation, negative_slope=negative_slope)
    return y if x.dim() == 4 else y.squeeze(0)


def ln_act(norm: nn.LayerNorm, x: Tensor, activation: str | None, negative_slope: float) -> Tensor:
    """A torch layer norm module followed by an activation, as one op."""
    affine = norm.weight, norm.bias, norm.eps
    return functional.ln_act(x, norm.normalized_shape, *affine, activation=activation, negative_slope=negative_slope)


class GroupNormAct(Act, nn.GroupNorm):
    """`torch.nn.GroupNorm` followed by an activation, as one op; same parameters and state_dict.

    Args:
        num_groups, num_channels, eps, affine, device, dtype: as `torch.nn.GroupNorm`.
        activation, negative_slope: as `fastgan.functional.bn_act`.

    Shape: [N, C, *] -> the same.
    """

    def __init__(
        self,
        num_groups: int,
        num_channels: int,
        eps: float = 1e-5,
        affine: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        activation: str | None = "leaky_relu",
        negative_slope: float = 0.2,
    ):
        super().__init__(num_groups, num_channels, eps, affine, device, dtype)
        self.ends_in(activation, negative_slope)

    def forward(self, x: Tensor) -> Tensor:
        return gn_act(self, x, self.activation, self.negative_slope)


class InstanceNormAct2d(Act, nn.InstanceNorm2d):
    """`torch.nn.InstanceNorm2d` followed by an activation, as one op; same parameters, buffers and state_dict.

    Args:
        num_features, eps, momentum, affine, track_running_stats, device, dtype: as `torch.nn.InstanceNorm2d`.
        activation, negative_slope: as `fastgan.functional.bn_act`.

    Shape: [N, C, H, W] or [C, H, W] -> the same.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float = 0.1,
        affine: bool = False,
        track_running_stats: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        activation: str | None = "leaky_relu",
        negative_slope: float = 0.2,
    ):
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype)
        self.ends_in(activation, negative_slope)

    def forward(self, x: Tensor) -> Tensor:
        return in_act(self, x, self.activation, self.negative_slope)


class LayerNormAct(Act, nn.LayerNorm):
    """`torch.nn.LayerNorm` followed by an activation, as one op; same parameters and state_dict.

    Args:
        normalized_shape, eps, elementwise_affine, bias, device, dtype: as `torch.nn.LayerNorm`.
        activation, negative_slope: as `fastgan.functional.bn_act`.

    Shape: [*, *normalized_shape] -> the same.
    """

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        activation: str | None = "leaky_relu",
        negative_slope: float = 0.2,
    ):
        shape = normalized_shape if isinstance(normalized_shape, int) else list(normalized_shape)
        super().__init__(shape, eps, elementwise_affine, bias, device, dtype)
        self.ends_in(activation, negative_slope)

    def forward(self, x: Tensor) -> Tensor:
        return ln_act(self, x, self.activation, self.negative_slope)


@contextlib.contextmanager
def stat_groups(model: nn.Module, groups: int) -> Iterator[None]:
    """Within: every batch norm of ours in `model` takes its statistics over `groups` equal parts of the batch."""
    ours: list[Any] = [m for m in model.modules() if hasattr(m, "stat_groups")]
    before = [m.stat_groups for m in ours]
    for m in ours:
        m.stat_groups = groups
    try:
        yield
    finally:
        for m, value in zip(ours, before, strict=True):
            m.stat_groups = value
