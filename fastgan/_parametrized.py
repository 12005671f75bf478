"""Layers whose weight is made at each call: spectral norm, weight norm and others of torch.nn.utils.parametrize."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def plain_class(m: nn.Module) -> type[nn.Module] | None:
    """The class that a parametrized module had before; None for a module that is not parametrized."""
    return type(m).__bases__[0] if torch.nn.utils.parametrize.is_parametrized(m) else None


class StandIn:
    """A layer of a class of ours in the place of a parametrized one, with its settings, for as long as a call takes.

    The weight is made by torch, once a call: a power iteration must not be repeated. Nothing of it is kept.
    """

    def __init__(self, layer: nn.Module, kind: type[nn.Module]):
        self.layer = layer
        self.module: Any = kind.__new__(kind)
        self.tensors: dict[str, Tensor | None] = {"weight": None, "bias": None}
        self._take_settings()

    def make(self) -> None:
        self._take_settings()
        self.tensors.update(weight=self.layer.weight, bias=self.layer.bias)  # type: ignore[arg-type]

    def drop(self) -> None:
        self.tensors.update(weight=None, bias=None)

    def _take_settings(self) -> None:
        """As they are now; the parametrizations stay with the layer."""
        self.module.__dict__.update(self.layer.__dict__, _parameters=self.tensors, _modules={})
