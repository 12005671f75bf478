"""The activations that kernels fuse: names, codes, values, derivatives in terms of the OUTPUT."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

CODES = {
    "identity": 0,
    "relu": 1,
    "leaky_relu": 2,
    "tanh": 3,
    "sigmoid": 4,
    "elu": 5,
    "selu": 6,
    "softplus": 7,
    "swish": 8,
    "gelu": 9,
    "gelu_tanh": 10,
}
FUSED = ("identity", "relu", "leaky_relu", "tanh", "sigmoid")  # what convolutions have in their epilogue
ALIASES = {"silu": "swish"}
# These have no inverse: their derivatives are read from their input, and "y" below is that input.
FROM_INPUT = ("swish", "gelu", "gelu_tanh")
SELU_SCALE, SELU_ALPHA = 1.0507009873554805, 1.6732632423543772

_VALUES: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda t: t,
    "relu": torch.relu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "elu": F.elu,
    "selu": F.selu,
    "softplus": F.softplus,
    "swish": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),
}


def apply(t: Tensor, activation: str, slope: float, gain: float = 1.0, clamp: float = -1.0) -> Tensor:
    """y = gain phi(t), kept within +-clamp where clamp >= 0; differentiable."""
    y = F.leaky_relu(t, slope) if activation == "leaky_relu" else _VALUES[activation](t)
    y = y if gain == 1 else y * gain
    return y if clamp < 0 else y.clamp(-clamp, clamp)


_OVERWRITES: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda t: t,
    "relu": torch.relu_,
    "tanh": torch.tanh_,
    "sigmoid": torch.sigmoid_,
}


def overwrite(t: Tensor, activation: str, slope: float) -> Tensor:
    """phi(t) of a `FUSED` activation in t's own memory: for a t that nobody else reads.

    A second large tensor makes the allocator return memory to the system and ask for it again. A convolution to 16.8 MB
    took 3.5 ms on one core and leaky_relu of it 0.5 ms; the two together took 18.9 ms.
    """
    return F.leaky_relu_(t, slope) if activation == "leaky_relu" else _OVERWRITES[activation](t)


def backward(dy: Tensor, y: Tensor, activation: str, slope: float, gain: float = 1.0, clamp: float = -1.0) -> Tensor:
    """dy gain phi'(t) from the output y (slope >= 0, so y and t share their sign), 0 where the clamp holds y."""
    u = y / gain if gain != 1 and activation not in FROM_INPUT else y
    g = dy if gain == 1 else dy * gain
    aten = torch.ops.aten
    if activation == "relu":
        g = aten.threshold_backward(g, u, 0)
    elif activation == "leaky_relu":
        g = aten.leaky_relu_backward(g, u, slope, slope >= 0)
    elif activation == "tanh":
        g = aten.tanh_backward(g, u)
    elif activation == "sigmoid":
        g = aten.sigmoid_backward(g, u)
    elif activation == "elu":
        g = aten.elu_backward(g, 1, 1, 1, True, u)
    elif activation == "selu":
        g = aten.elu_backward(g, SELU_ALPHA, SELU_SCALE, 1, True, u)
    elif activation == "softplus":
        g = -g * torch.expm1(-u)
    elif activation == "swish":
        g = aten.silu_backward(g, u)
    elif activation in ("gelu", "gelu_tanh"):
        g = aten.gelu_backward(g, u, approximate="tanh" if activation == "gelu_tanh" else "none")
    return g if clamp < 0 else g.masked_fill(_held(y, activation, gain, clamp), 0)


def second(y: Tensor, activation: str, gain: float = 1.0, clamp: float = -1.0) -> Tensor | None:
    """d/dy of what `backward` multiplies dy by; None where it is zero.

    tanh' = 1 - u^2, sigmoid' = u (1 - u), elu' = u + 1 and selu' = u + scale alpha below 0, softplus' = 1 - e^-u of
    u = y / gain; swish' = s + t s (1 - s), gelu' = Phi(t) + t phi(t) of the input t.
    """
    u = y / gain if gain != 1 and activation not in FROM_INPUT else y
    if activation == "tanh":
        d = -2 * u
    elif activation == "sigmoid":
        d = 1 - 2 * u
    elif activation in ("elu", "selu"):
        d = (u <= 0).to(u.dtype)
    elif activation == "softplus":
        d = torch.exp(-u)
    elif activation == "swish":
        s = torch.sigmoid(u)
        d = gain * s * (1 - s) * (2 + u * (1 - 2 * s))
    elif activation == "gelu":
        d = gain * (2 - u * u) * torch.exp(-u * u / 2) / math.sqrt(2 * math.pi)
    elif activation == "gelu_tanh":
        d = gain * _gelu_tanh_second(u)
    else:
        return None
    return d if clamp < 0 else d.masked_fill(_held(y, activation, gain, clamp), 0)


def _gelu_tanh_second(t: Tensor) -> Tensor:
    """d^2/dt^2 of t s, s = sigmoid(v), v = 2 sqrt(2/pi) (t + 0.044715 t^3): s' (2 v' + t ((1 - 2 s) v'^2 + v''))."""
    scale, cubic = 2 * math.sqrt(2 / math.pi), 0.044715
    logit = scale * (t + cubic * t * t * t)
    s, rest = torch.sigmoid(logit), torch.sigmoid(-logit)  # 1 - s would lose the digits of a small rest
    first, second = scale * (1 + 3 * cubic * t * t), 6 * scale * cubic * t
    return s * rest * (2 * first + t * ((rest - s) * first * first + second))


@functools.lru_cache
def limit(clamp: float, dtype: torch.dtype) -> float:
    """clamp as the dtype holds it, for kernels that compare outputs with it: 0.9 is 0.8984 in bfloat16."""
    return clamp if clamp < 0 else torch.tensor(clamp, dtype=torch.float64).to(dtype).item()


def _held(y: Tensor, activation: str, gain: float, clamp: float) -> Tensor:
    """Where the clamp holds the output: its slope is 0 there."""
    out = _VALUES[activation](y) * gain if activation in FROM_INPUT else y
    return out.detach().abs() >= clamp


def check(op: str, activation: str | None, slope: float, allowed: tuple[str, ...] = FUSED) -> str:
    """The canonical name of an activation (None is identity), or one clear ValueError."""
    name = ALIASES.get(activation or "identity", activation or "identity")
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
