"""A call of a program as JSON, and layers like its own again: for a race that its run had no time for.

What is written are the layers' classes and settings and the shapes, strides and dtypes of all tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastgan.choice.sketch import drawn_from, sketch
from fastgan.program.layer import Layer, torch_class

CONVOLUTION = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups")
SETTINGS: dict[str, tuple[str, ...]] = {
    "Conv1d": CONVOLUTION,
    "Conv2d": CONVOLUTION,
    "ConvTranspose1d": (*CONVOLUTION, "output_padding"),
    "ConvTranspose2d": (*CONVOLUTION, "output_padding"),
    "Linear": ("in_features", "out_features"),
    "BatchNorm1d": ("num_features", "eps", "momentum", "track_running_stats"),
    "BatchNorm2d": ("num_features", "eps", "momentum", "track_running_stats"),
    "GroupNorm": ("num_groups", "num_channels", "eps"),
    "InstanceNorm2d": ("num_features", "eps"),
    "LayerNorm": ("normalized_shape", "eps"),
}


def written(
    layers: Sequence[Layer], x: Tensor, dtype: torch.dtype, wants: Sequence[bool] | None, constant: bool = False
) -> dict[str, Any]:
    """The call as JSON; wants: which of x and the parameters get gradients, or None where none are recorded; constant:
    whether the parameters and buffers stay as they are."""
    return {
        "layers": [
            {
                "conv": _module(layer.conv),
                "norm": _module(layer.norm),
                "activation": layer.activation,
                "slope": layer.slope,
                "flatten": layer.flatten,
            }
            for layer in layers
        ],
        "x": sketch(x),
        "dtype": str(dtype).removeprefix("torch."),
        "wants": wants if wants is None else list(wants),
        "constant": constant,
    }


def _module(m: Any) -> dict[str, Any] | None:
    if m is None:
        return None
    kind = torch_class(m)
    found = {"class": kind, "settings": {name: getattr(m, name) for name in SETTINGS[kind]}, "training": m.training}
    if hasattr(m, "stat_groups"):
        found["stat_groups"] = m.stat_groups
    tensors = {name: sketch([*getattr(m, name).values()]) for name in ("_parameters", "_buffers")}
    return {**found, **tensors, "names": [[*m._parameters], [*m._buffers]]}


def restored(found: dict[str, Any]) -> tuple[list[Layer], Tensor]:
    """Layers and an input like those written down, with random values."""
    (x,) = drawn_from([found["x"]])
    return [_layer(layer) for layer in found["layers"]], _filled(x)


def _layer(found: dict[str, Any]) -> Layer:
    act = nn.LeakyReLU(found["slope"]) if found["activation"] == "leaky_relu" else None
    return Layer(_built(found["conv"]), _built(found["norm"]), found["activation"], act, found["flatten"])


def _built(found: dict[str, Any] | None) -> Any:
    if found is None:
        return None
    m = getattr(nn, found["class"])(**found["settings"], device="meta").train(found["training"])
    if "stat_groups" in found:
        m.stat_groups, m.sync = found["stat_groups"], False  # programs have no statistics of several processes
    for kept, names in zip(("_parameters", "_buffers"), found["names"], strict=True):
        getattr(m, kept).update(zip(names, map(_filled, drawn_from(found[kept])), strict=True))
    return m


def _filled(t: Any) -> Any:
    """Random values, positive since some are variances; a count of batches stays."""
    return t.normal_().abs_().add_(0.1) if isinstance(t, Tensor) and t.is_floating_point() else t
