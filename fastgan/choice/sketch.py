"""A case as JSON: enough to draw its arguments again, after the run that met it or in another process."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

SMALL = 1  # elements of a tensor whose value goes along: a learning rate


def sketch(value: Any) -> Any:
    """Shapes, strides and dtypes of tensors, values of the rest; tuples of any class become lists."""
    if isinstance(value, Tensor):
        dtype = str(value.dtype).removeprefix("torch.")
        found = {
            "shape": list(value.shape),
            "stride": list(value.stride()),
            "dtype": dtype,
            "device": value.device.type,
        }
        return {**found, "value": value.item()} if value.numel() <= SMALL and value.dim() == 0 else found
    if isinstance(value, list | tuple):
        return [sketch(v) for v in value]
    return value


def drawn_from(sketched: list) -> tuple:
    """Arguments of the case that a sketch was made of; the caller draws their contents."""
    return tuple(map(_restored, sketched))


def _restored(value: Any) -> Any:
    if isinstance(value, dict):
        kind = {"dtype": getattr(torch, value["dtype"]), "device": value["device"]}
        if "value" in value:
            return torch.tensor(value["value"], **kind)
        return torch.empty_strided(value["shape"], value["stride"], **kind)
    return [_restored(v) for v in value] if isinstance(value, list) else value
