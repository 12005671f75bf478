"""Linear + batch norm + activation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastgan import functional
from fastgan._hooks import has_hooks
from fastgan._ranks import Sync
from fastgan.nn.norm import Act, bn_act


class LinearBNAct(Act):
    """`torch.nn.Linear`, `torch.nn.BatchNorm1d` and an activation; the matrix product stays torch's own.

    Args:
        in_features, out_features, bias, device, dtype: as `torch.nn.Linear`.
        eps, momentum, affine, track_running_stats: of the batch norm.
        activation, negative_slope, stat_groups, sync: as `fastgan.functional.bn_act`.

    Shape: [N, in_features] -> [N, out_features]. Parameters: linear.*, bn.*.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
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
        super().__init__()
        self.ends_in(activation, negative_slope)
        self.stat_groups, self.sync = stat_groups, sync
        self.linear = nn.Linear(in_features, out_features, bias, device, dtype)
        self.bn = nn.BatchNorm1d(out_features, eps, momentum, affine, track_running_stats, device, dtype)

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        if has_hooks(self.bn):
            return functional.bias_act(self.bn(y), activation=self.activation, negative_slope=self.negative_slope)
        return bn_act(self.bn, y, self.activation, self.negative_slope, self.stat_groups, self.sync)
