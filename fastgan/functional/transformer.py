"""What stands around attention: norms with modulation and residual, gated units, dense layers with an activation.

Compositions of our ops and torch's elementwise ones, each exact to second order.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgan.functional.elementwise import bias_act
from fastgan.functional.norm import ln_act


def layer_norm(
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """torch.nn.functional.layer_norm of x + residual, times 1 + scale, plus shift (adaptive norm; Peebles and Xie,
    Scalable Diffusion Models with Transformers, 2023).

    Args:
        x: [N, ..., *normalized_shape], floating.
        normalized_shape: the trailing dimensions that share statistics.
        weight, bias: of normalized_shape, or None.
        eps: added to the variance.
        scale, shift: broadcast against x, or [N, D] beside [N, ..., D]: one vector a sample. None: no modulation.
        residual: of x's shape, added before the norm.

    Returns:
        x's shape and dtype; with a residual the sum x + residual behind it, for the next branch.

    Raises:
        ValueError, TypeError: as `ln_act`, or shapes that do not fit.
    """
    total = _added("layer_norm", x, residual)
    normed = ln_act(total, normalized_shape, weight, bias, eps, activation=None)
    y = _modulated("layer_norm", normed, scale, shift)
    return y if residual is None else (y, total)


def rms_norm(
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """torch.nn.functional.rms_norm of x + residual, times 1 + scale, plus shift (Zhang and Sennrich, Root Mean Square
    Layer Normalization, 2019). The mean square is taken in float32 of 16-bit x. The norm is torch's own: one kernel on
    a GPU, a composition on a CPU.

    Args:
        x, normalized_shape, weight, scale, shift, residual: as for `layer_norm`.
        eps: added to the mean square; None: the rounding unit of x's dtype, as in torch.

    Returns:
        As `layer_norm`.

    Raises:
        ValueError: shapes that do not fit.
        TypeError: x is not floating.
    """
    shape = tuple(normalized_shape)
    if not x.is_floating_point():
        raise TypeError(f"rms_norm: x must be a floating tensor, got {x.dtype}; convert it with .float()")
    if not shape or tuple(x.shape[-len(shape) :]) != shape:
        raise ValueError(f"rms_norm: x must end in normalized_shape {shape}, got x {tuple(x.shape)}")
    if weight is not None and tuple(weight.shape) != shape:
        raise ValueError(f"rms_norm: weight must have shape {shape}, got {tuple(weight.shape)}")
    total = _added("rms_norm", x, residual)
    if weight is None or weight.dtype == total.dtype:
        normed = F.rms_norm(total, shape, weight, eps)
    else:
        dtype = torch.promote_types(total.dtype, weight.dtype)
        eps = torch.finfo(x.dtype).eps if eps is None else eps
        normed = F.rms_norm(total.to(dtype), shape, weight.to(dtype), eps)
    normed = normed.to(total.dtype)  # autocast may have widened it
    y = _modulated("rms_norm", normed, scale, shift)
    return y if residual is None else (y, total)


def _added(name: str, x: Tensor, residual: Tensor | None) -> Tensor:
    if residual is not None and residual.shape != x.shape:
        raise ValueError(f"{name}: residual must have x's shape, got {tuple(residual.shape)} beside x {tuple(x.shape)}")
    return x if residual is None else x + residual


def _modulated(name: str, y: Tensor, scale: Tensor | None, shift: Tensor | None) -> Tensor:
    """y (1 + scale) + shift, in one pass over y: the sum 1 + scale has the size of scale."""
    scale, shift = (None if m is None else _spread(name, m, y) for m in (scale, shift))
    if scale is None:
        return y if shift is None else y + shift
    return y * (1 + scale) if shift is None else torch.addcmul(shift, y, 1 + scale)


def _spread(name: str, m: Tensor, y: Tensor) -> Tensor:
    """m as it broadcasts against y; [N, D] becomes [N, 1, ..., D]: one vector a sample."""
    if m.dim() == 2 and y.dim() > 2 and m.shape == (y.shape[0], y.shape[-1]):
        m = m.view(y.shape[0], *(1,) * (y.dim() - 2), y.shape[-1])
    fits = m.dim() <= y.dim() and all(a in (1, b) for a, b in zip(m.shape[::-1], y.shape[::-1], strict=False))
    if not fits:
        raise ValueError(
            f"{name}: scale and shift must broadcast against x {tuple(y.shape)}, or be [N, D], got {tuple(m.shape)}"
        )
    return m.to(y.dtype)


def glu(x: Tensor, dim: int = -1, *, activation: str | None = "sigmoid") -> Tensor:
    """a activation(b) of the halves a and b of x: torch.nn.functional.glu with any activation.

    "gelu" makes it GEGLU, "silu" SwiGLU, "relu" ReGLU, None bilinear (Shazeer, GLU Variants Improve Transformer, 2020).

    Args:
        x: floating, its size along dim even.
        dim: the dimension that is halved.
        activation: a name that `bias_act` takes.

    Returns:
        x's shape, dim halved.

    Raises:
        ValueError: the size along dim is odd, or the name is none of `bias_act`'s.
    """
    if x.dim() == 0 or x.shape[dim] % 2:
        raise ValueError(f"glu: the size along dim {dim} must be even, got x {tuple(x.shape)}")
    a, b = x.chunk(2, dim)
    return a * bias_act(b.reshape(1, -1), activation=activation).view(b.shape)


def linear_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = "gelu",
    negative_slope: float = 0.2,
) -> Tensor:
    """activation(x weightᵀ + bias): torch.nn.functional.linear whose bias goes with the activation.

    Args:
        x: [..., in], floating.
        weight: [out, in].
        bias: [out] or None.
        activation, negative_slope: as for `bias_act`.

    Returns:
        [..., out], in x's dtype, or autocast's.

    Raises:
        ValueError: the name is none of `bias_act`'s, or bias does not fit.
    """
    product = F.linear(x, weight)
    rows = product.reshape(-1, weight.shape[0])
    return bias_act(rows, bias, activation=activation, negative_slope=negative_slope).view(product.shape)
