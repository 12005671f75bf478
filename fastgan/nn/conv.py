"""Convolution blocks: torch's convolution and batch norm modules inside, one fused call outside.

The parameters live in ordinary torch submodules (`conv`, `bn`), so initialisers, spectral_norm, optimisers, DDP and
state_dict work unchanged. A submodule with hooks (torch's old spectral_norm is one) is called as the module it is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgan import _activation, functional
from fastgan._hooks import has_hooks
from fastgan._ranks import Sync
from fastgan.nn.norm import Act, bn_act, statistics
from fastgan.ops.bn_act import ACTIVATIONS

Size2 = int | tuple[int, int]
PaddingMode = Literal["zeros", "reflect", "replicate", "circular"]


Conv = nn.Conv1d | nn.Conv2d | nn.ConvTranspose1d | nn.ConvTranspose2d
OPS: dict[type[nn.Module], Callable[..., Tensor]] = {
    nn.Conv1d: functional.conv1d,
    nn.Conv2d: functional.conv2d,
    nn.ConvTranspose1d: functional.conv_transpose1d,
    nn.ConvTranspose2d: functional.conv_transpose2d,
}


def conv_act(conv: Conv, x: Tensor, activation: str | None, slope: float) -> Tensor:
    """The forward of a torch convolution module followed by an activation, as one op."""
    op = next(op for kind, op in OPS.items() if isinstance(conv, kind))
    return op(*_arguments(conv, x), activation=activation, negative_slope=slope)


def conv_bn_act(
    conv: nn.Conv2d | nn.ConvTranspose2d,
    bn: nn.BatchNorm2d,
    x: Tensor,
    activation: str | None,
    slope: float,
    stat_groups: int = 1,
    sync: Sync = False,
) -> Tensor:
    """A torch convolution module, a batch norm module and an activation: in eval mode as one op."""
    bn._check_input_dim(x)
    transposed = isinstance(conv, nn.ConvTranspose2d)
    op: Callable[..., Tensor] = functional.conv_transpose2d_bn_act if transposed else functional.conv2d_bn_act
    affine: dict[str, Any] = {"bn_weight": bn.weight, "bn_bias": bn.bias}
    return op(
        *_arguments(conv, x), activation=activation, negative_slope=slope, **affine, **statistics(bn, stat_groups, sync)
    )


def _arguments(conv: Conv, x: Tensor) -> tuple[Any, ...]:
    """What the functions take by position, in torch's order."""
    if isinstance(conv, nn.ConvTranspose1d | nn.ConvTranspose2d):
        geometry = conv.stride, conv.padding, conv.output_padding, conv.groups, conv.dilation
        return x, conv.weight, conv.bias, *geometry
    x, padding = _padded(conv, x)
    return x, conv.weight, conv.bias, conv.stride, padding, conv.dilation, conv.groups


def _padded(conv: nn.Conv1d | nn.Conv2d, x: Tensor) -> tuple[Tensor, Any]:
    """Non-zero padding modes pad first, as torch does."""
    if conv.padding_mode == "zeros":
        return x, conv.padding
    return F.pad(x, conv._reversed_padding_repeated_twice, mode=conv.padding_mode), 0


class _Block(Act):
    """A convolution and what follows it."""

    conv: nn.Conv2d | nn.ConvTranspose2d

    def __init__(self, activation: str | None, negative_slope: float, allowed: tuple[str, ...]):
        super().__init__()
        self.ends_in(activation, negative_slope, allowed)


class _BiasAct(_Block):
    def forward(self, x: Tensor) -> Tensor:
        if has_hooks(self.conv):
            return functional.bias_act(self.conv(x), activation=self.activation, negative_slope=self.negative_slope)
        return conv_act(self.conv, x, self.activation, self.negative_slope)


class _BNAct(_Block):
    bn: nn.BatchNorm2d

    def __init__(self, activation: str | None, negative_slope: float, stat_groups: int, sync: Sync):
        super().__init__(activation, negative_slope, ACTIVATIONS)
        self.stat_groups, self.sync = stat_groups, sync

    def forward(self, x: Tensor) -> Tensor:
        act = self.activation, self.negative_slope
        if not (has_hooks(self.conv) or has_hooks(self.bn)):
            return conv_bn_act(self.conv, self.bn, x, *act, self.stat_groups, self.sync)
        y = self.conv(x) if has_hooks(self.conv) else conv_act(self.conv, x, None, 0.0)
        if has_hooks(self.bn):
            return functional.bias_act(self.bn(y), activation=self.activation, negative_slope=self.negative_slope)
        return bn_act(self.bn, y, *act, self.stat_groups, self.sync)


class Conv2dBiasAct(_BiasAct):
    """`torch.nn.Conv2d` followed by an activation, as one op.

    Args:
        in_channels ... dtype: as `torch.nn.Conv2d`.
        activation, negative_slope: as `fastgan.functional.conv2d`.

    Shape: [N, in_channels, H, W] -> [N, out_channels, OH, OW]. Parameters: conv.weight, conv.bias.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size2,
        stride: Size2 = 1,
        padding: Size2 | str = 0,
        dilation: Size2 = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: PaddingMode = "zeros",
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        activation: str | None = "leaky_relu",
        negative_slope: float = 0.2,
    ):
        super().__init__(activation, negative_slope, _activation.FUSED)
        self.conv = nn.Conv2d(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device, dtype
        )


class ConvTranspose2dBiasAct(_BiasAct):
    """`torch.nn.ConvTranspose2d` followed by an activation, as one op: a generator's last layer.

    Args:
        in_channels ... dtype: as `torch.nn.ConvTranspose2d`.
        activation, negative_slope: as `fastgan.functional.conv2d`.

    Shape: [N, in_channels, H, W] -> [N, out_channels, OH, OW]. Parameters: conv.weight, conv.bias.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size2,
        stride: Size2 = 1,
        padding: Size2 = 0,
        output_padding: Size2 = 0,
        groups: int = 1,
        bias: bool = True,
        dilation: Size2 = 1,
        padding_mode: PaddingMode = "zeros",
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        activation: str | None = "leaky_relu",
        negative_slope: float = 0.2,
    ):
        super().__init__(activation, negative_slope, _activation.FUSED)
        geometry = in_channels, out_channels, kernel_size, stride, padding, output_padding, groups, bias, dilation
        self.conv = nn.ConvTranspose2d(*geometry, padding_mode, device, dtype)


class Conv2dBNAct(_BNAct):
    """`torch.nn.Conv2d`, `torch.nn.BatchNorm2d` and an activation.

    Args:
        in_channels ... dtype: as `torch.nn.Conv2d` (bias defaults to True, as there; the norm makes it redundant).
        eps, momentum, affine, track_running_stats: of the batch norm.
        activation, negative_slope, stat_groups, sync: as `fastgan.functional.bn_act`.

    Shape: [N, in_channels, H, W] -> [N, out_channels, OH, OW]. Parameters: conv.*, bn.*.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size2,
        stride: Size2 = 1,
        padding: Size2 | str = 0,
        dilation: Size2 = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: PaddingMode = "zeros",
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        activation: str | None = "leaky_relu",
        negative_slope: float = 0.2,
        stat_groups: int = 1,
        sync: Sync = False,
    ):
        super().__init__(activation, negative_slope, stat_groups, sync)
        self.conv = nn.Conv2d(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device, dtype
        )
        self.bn = nn.BatchNorm2d(out_channels, eps, momentum, affine, track_running_stats, device, dtype)


class ConvTranspose2dBNAct(_BNAct):
    """`torch.nn.ConvTranspose2d`, `torch.nn.BatchNorm2d` and an activation: a generator's layer.

    Args:
        in_channels ... dtype: as `torch.nn.ConvTranspose2d`.
        eps, momentum, affine, track_running_stats: of the batch norm.
        activation, negative_slope, stat_groups, sync: as `fastgan.functional.bn_act`.

    Shape: [N, in_channels, H, W] -> [N, out_channels, OH, OW]. Parameters: conv.*, bn.*.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size2,
        stride: Size2 = 1,
        padding: Size2 = 0,
        output_padding: Size2 = 0,
        groups: int = 1,
        bias: bool = True,
        dilation: Size2 = 1,
        padding_mode: PaddingMode = "zeros",
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        activation: str | None = "leaky_relu",
        negative_slope: float = 0.2,
        stat_groups: int = 1,
        sync: Sync = False,
    ):
        super().__init__(activation, negative_slope, stat_groups, sync)
        geometry = in_channels, out_channels, kernel_size, stride, padding, output_padding, groups, bias, dilation
        self.conv = nn.ConvTranspose2d(*geometry, padding_mode, device, dtype)
        self.bn = nn.BatchNorm2d(out_channels, eps, momentum, affine, track_running_stats, device, dtype)
