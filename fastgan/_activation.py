"""The activations that kernels fuse: names, codes, values, derivatives in terms of the OUTPUT."""

from __future__ import annotations

import torch
from torch import Tensor

CODES = {"identity": 0, "relu": 1, "leaky_relu": 2, "tanh": 3, "sigmoid": 4}


def apply(t: Tensor, activation: str, slope: float) -> Tensor:
    """y = phi(t), differentiable."""
    if activation == "identity":
        return t
    if activation == "relu":
        return torch.relu(t)
    if activation == "leaky_relu":
        return torch.nn.functional.leaky_relu(t, slope)
    return torch.tanh(t) if activation == "tanh" else torch.sigmoid(t)


def backward(dy: Tensor, y: Tensor, activation: str, slope: float) -> Tensor:
    """dy phi'(t) from the output y = phi(t), with PyTorch's own kernels (slope >= 0, so y and t share their sign)."""
    if activation == "relu":
        return torch.ops.aten.threshold_backward(dy, y, 0)
    if activation == "leaky_relu":
        return torch.ops.aten.leaky_relu_backward(dy, y, slope, slope >= 0)
    if activation == "tanh":
        return torch.ops.aten.tanh_backward(dy, y)
    if activation == "sigmoid":
        return torch.ops.aten.sigmoid_backward(dy, y)
    return dy


def second(y: Tensor, activation: str) -> Tensor | None:
    """d/dy of phi'(t(y)): tanh' = 1 - y^2, sigmoid' = y (1 - y); None where it is zero."""
    if activation == "tanh":
        return -2 * y
    if activation == "sigmoid":
        return 1 - 2 * y
    return None


def check(op: str, activation: str | None, slope: float, allowed: tuple[str, ...] = tuple(CODES)) -> str:
    """The canonical name of an activation (None is identity), or one clear ValueError."""
    name = activation or "identity"
    if name not in allowed:
        raise ValueError(f"{op}: activation must be None or one of {', '.join(allowed)}, got {activation!r}")
    if name == "leaky_relu" and not slope >= 0:
        raise ValueError(
            f"{op}: negative_slope must be >= 0 (the derivative is read from the output's sign), got {slope}; "
            "apply torch.nn.functional.leaky_relu after activation=None instead"
        )
    return name


def describe(activation: str, slope: float) -> str:
    """For extra_repr: `activation=leaky_relu, negative_slope=0.2`."""
    return f"activation={activation}" + (f", negative_slope={slope}" if activation == "leaky_relu" else "")
