"""`bias_act`: bias, activation, gain and clamp under StyleGAN's names."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgan import functional

__all__ = ["Activation", "activation_funcs", "bias_act"]


@dataclass(frozen=True)
class Activation:
    """What StyleGAN's networks ask of an activation: its default gain, which keeps the magnitude of normal noise."""

    func: Callable[..., Tensor]  # func(x, alpha)
    name: str  # fastgan's
    def_alpha: float = 0.0
    def_gain: float = 1.0


activation_funcs = {
    "linear": Activation(lambda x, **_: x, "identity"),
    "relu": Activation(lambda x, **_: F.relu(x), "relu", def_gain=math.sqrt(2)),
    "lrelu": Activation(lambda x, alpha, **_: F.leaky_relu(x, alpha), "leaky_relu", 0.2, math.sqrt(2)),
    "tanh": Activation(lambda x, **_: torch.tanh(x), "tanh"),
    "sigmoid": Activation(lambda x, **_: torch.sigmoid(x), "sigmoid"),
    "elu": Activation(lambda x, **_: F.elu(x), "elu"),
    "selu": Activation(lambda x, **_: F.selu(x), "selu"),
    "softplus": Activation(lambda x, **_: F.softplus(x), "softplus"),
    "swish": Activation(lambda x, **_: torch.sigmoid(x) * x, "swish", def_gain=math.sqrt(2)),
}


def bias_act(
    x: Tensor,
    b: Tensor | None = None,
    dim: int = 1,
    act: str = "linear",
    alpha: float | None = None,
    gain: float | None = None,
    clamp: float | None = None,
    impl: str = "cuda",
) -> Tensor:
    """gain act(x + b) within ±clamp; see `fastgan.functional.bias_act`.

    Args:
        x: of any shape, floating.
        b: [x.shape[dim]] or None.
        dim: along which b lies.
        act: a name of `activation_funcs`.
        alpha: the slope of lrelu; None is its default.
        gain: None is the activation's default.
        clamp: None, or the largest absolute value.
        impl: "cuda" or "ref"; fastgan chooses its kernels itself.

    Returns:
        x's shape and dtype.

    Raises:
        ValueError: an unknown name, or as `fastgan.functional.bias_act`.
    """
    if act not in activation_funcs:
        raise ValueError(f"bias_act: act must be one of {', '.join(activation_funcs)}, got {act!r}")
    kind = activation_funcs[act]
    gain = kind.def_gain if gain is None else float(gain)
    form: dict[str, Any] = {
        "activation": kind.name,
        "negative_slope": kind.def_alpha if alpha is None else float(alpha),
        "gain": gain or 1.0,
        "clamp": clamp,
    }
    if b is None:
        flat = x if x.dim() >= 2 else x.reshape(1, -1)
        y = functional.bias_act(flat, **form).reshape(x.shape)
    elif x.dim() == 1:
        y = functional.bias_act(x[None], b, **form)[0]
    elif dim % x.dim() == 1:
        y = functional.bias_act(x, b, **form)
    elif dim % x.dim() == 0:
        y = functional.bias_act(x[None].flatten(2) if x.dim() > 1 else x[None], b, **form).reshape(x.shape)
    else:
        y = functional.bias_act(x.movedim(dim, 1), b, **form).movedim(1, dim)
    return y if gain else y * 0.0
