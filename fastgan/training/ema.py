"""Exponential moving average of a generator's parameters."""

from __future__ import annotations

import copy

import torch
from torch import nn


class EMA:
    """A copy of `model` whose parameters follow p_ema <- decay p_ema + (1 - decay) p; buffers are copied.

    Args:
        model: the module to average.
        decay: 0 <= decay < 1; the average's horizon is about 1 / (1 - decay) updates.
    """

    def __init__(self, model: nn.Module, decay: float):
        if not 0 <= decay < 1:
            raise ValueError(f"EMA: decay must be in [0, 1), got {decay}")
        self.decay = decay
        self.module = copy.deepcopy(model).requires_grad_(False).eval()

    def pairs(self, model: nn.Module) -> dict[torch.Tensor, torch.Tensor]:
        """{parameter of `model`: the one that follows it}."""
        return dict(zip(model.parameters(), self.module.parameters(), strict=True))

    @torch.no_grad()
    def update(self, model: nn.Module, pairs: dict[torch.Tensor, torch.Tensor] | None = None) -> None:
        """Move the average one step towards `model`, in one multi-tensor call; of the parameters, `pairs` alone."""
        pairs = self.pairs(model) if pairs is None else pairs
        if pairs:
            torch._foreach_lerp_(list(pairs.values()), list(pairs), 1 - self.decay)
        for mine, other in zip(self.module.buffers(), model.buffers(), strict=True):
            mine.copy_(other)
