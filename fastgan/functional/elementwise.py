"""Functions of one element at a time."""

from __future__ import annotations

from torch import Tensor

from fastgan import _activation
from fastgan.functional.checks import check_bias
from fastgan.ops import bias_act as _bias_act


def bias_act(
    x: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = "leaky_relu",
    negative_slope: float = 0.2,
) -> Tensor:
    """activation(x + bias) with bias along dimension 1.

    Args:
        x: [N, C, *], floating.
        bias: [C] or None.
        activation: None, "identity", "relu", "leaky_relu", "tanh" or "sigmoid".
        negative_slope: of leaky_relu, >= 0.

    Returns:
        x's shape, dtype and layout.
    """
    activation = _activation.check("bias_act", activation, negative_slope)
    if x.dim() < 2:
        raise ValueError(f"bias_act: x must have at least 2 dimensions [N, C, *], got shape {tuple(x.shape)}")
    check_bias("bias_act", bias, x.shape[1])
    return _bias_act.op(x, bias, activation, float(negative_slope))
