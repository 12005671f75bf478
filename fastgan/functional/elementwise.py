"""Functions of one element at a time."""

from __future__ import annotations

import math

from torch import Tensor

from fastgan import _activation
from fastgan._layout import per_channel
from fastgan.functional.checks import check_bias
from fastgan.functional.small import is_small, learns
from fastgan.ops import bias_act as _bias_act

# Elements up to which PyTorch's two ops are faster, without and with gradients: the kernel reads x once where they
# read it twice.
SMALL, SMALL_IN_TRAINING = 150_000, 500_000


def bias_act(
    x: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = "leaky_relu",
    negative_slope: float = 0.2,
    gain: float = 1.0,
    clamp: float | None = None,
) -> Tensor:
    """gain activation(x + bias) with bias along dimension 1, kept within ±clamp.

    Without gain and clamp, a contiguous CPU tensor of at most 150,000 elements (500,000 under gradients) goes through
    PyTorch's own ops, which are faster there.

    Args:
        x: [N, C, *], floating.
        bias: [C] or None.
        activation: None, "identity", "relu", "leaky_relu", "tanh", "sigmoid", "elu", "selu", "softplus", "swish" (or
            "silu"), "gelu" (x Phi(x)) or "gelu_tanh" (its approximation by tanh).
        negative_slope: of leaky_relu, >= 0.
        gain: multiplies the activation; finite and not 0.
        clamp: None, or the largest absolute value that comes out, >= 0. What it holds has the derivative 0.

    Returns:
        x's shape, dtype and layout.

    Raises:
        ValueError: a shape, name or number is not as above.
    """
    activation, limit = check_form("bias_act", activation, negative_slope, gain, clamp)
    if x.dim() < 2:
        raise ValueError(f"bias_act: x must have at least 2 dimensions [N, C, *], got shape {tuple(x.shape)}")
    check_bias("bias_act", bias, x.shape[1])
    plain = gain == 1 and clamp is None and (bias is not None or activation != "identity") and x.is_floating_point()
    if plain and is_small(x, SMALL_IN_TRAINING if learns(x, bias) else SMALL) and x.is_contiguous():
        return _plain(x, bias, activation, negative_slope)
    return _bias_act.op(x, bias, activation, float(negative_slope), float(gain), limit)


def _plain(x: Tensor, bias: Tensor | None, activation: str, slope: float) -> Tensor:
    """The reference of the op, differentiated by PyTorch. A view and a cast that change nothing cost 1 us together."""
    if bias is None:
        return _activation.apply(x, activation, slope)
    bias = bias if bias.dtype == x.dtype else bias.to(x.dtype)
    t = x + (bias if x.dim() == 2 else per_channel(bias, x))
    return (_activation.overwrite if activation in _activation.FUSED else _activation.apply)(t, activation, slope)


def check_form(
    op: str, activation: str | None, negative_slope: float, gain: float, clamp: float | None
) -> tuple[str, float]:
    """The activation's canonical name and the clamp as ops take it, -1 for None; or one clear ValueError."""
    name = _activation.check(op, activation, negative_slope, tuple(_activation.CODES))
    if not (math.isfinite(gain) and gain):
        raise ValueError(f"{op}: gain must be finite and not 0, got {gain}; multiply the result instead")
    if clamp is not None and not clamp >= 0:
        raise ValueError(f"{op}: clamp must be None or >= 0, got {clamp}")
    return name, -1.0 if clamp is None else float(clamp)
