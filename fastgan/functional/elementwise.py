"""Functions of one element at a time."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastgan import _activation
from fastgan._layout import per_channel
from fastgan._op import PLAIN, is_observed
from fastgan.choice import FREE, STATE
from fastgan.functional.checks import check_bias
from fastgan.ops import bias_act as _bias_act

# Elements up to which PyTorch's two ops are faster, without and with gradients (docs/evidence/call-overhead.md): the
# kernel reads x once where they read it twice, and pays for that with a lookup, a call through the binding and, under
# gradients, an autograd node written in Python. Nothing races for it.
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
    if gain == 1 and clamp is None and (bias is not None or activation != "identity"):
        learns = torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad))
        if _is_small(x, SMALL_IN_TRAINING if learns else SMALL):
            return _plain(x, bias, activation, negative_slope)
    return _bias_act.op(x, bias, activation, float(negative_slope), float(gain), limit)


def _is_small(x: Tensor, largest: int) -> bool:
    """Whether PyTorch's ops take a call on x: a dense CPU tensor of at most `largest` elements.

    False wherever somebody asked for kernels of ours or looks at single ops, under autocast, and for layouts that
    PyTorch's ops would not keep.
    """
    return (
        STATE.mode == FREE
        and not is_observed()  # before sizes: a traced graph would be bound to them
        and x.numel() <= largest
        and type(x) in PLAIN
        and x.is_cpu
        and not (STATE.emulated or STATE.watchers)
        and x.is_contiguous()
        and not torch.is_autocast_enabled("cpu")
    )


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
