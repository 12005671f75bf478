"""The pieces that gradient penalties are made of; `fastgan.penalties` has the penalties themselves."""

from __future__ import annotations

import torch
from torch import Tensor

from fastgan._layout import accumulation_dtype
from fastgan.ops import grad_norm_penalty as _grad_norm_penalty
from fastgan.ops import interpolate as _interpolate


def interpolate(
    real: Tensor,
    fake: Tensor,
    epsilon: Tensor | None = None,
    *,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Points between samples, epsilon real + (1 - epsilon) fake, one epsilon a sample (WGAN-GP); no resizing.

    Args:
        real, fake: [N, *], one shape, dtype and device, floating.
        epsilon: [N]; None draws it uniformly from [0, 1).
        generator: of the random numbers.

    Returns:
        real's shape, dtype and layout.

    Raises:
        ValueError: shapes or devices that differ.
        TypeError: dtypes that differ or are not floating.
    """
    name = "interpolate"
    if real.dim() < 1 or fake.shape != real.shape or fake.device != real.device:
        raise ValueError(
            f"{name}: fake must have real's shape [N, *] {tuple(real.shape)} on {real.device}, "
            f"got {tuple(fake.shape)} on {fake.device}"
        )
    if fake.dtype != real.dtype or not real.is_floating_point():
        raise TypeError(f"{name}: real and fake must have one floating dtype, got {real.dtype} and {fake.dtype}")
    if epsilon is None:
        dtype = accumulation_dtype(real.dtype)
        epsilon = torch.rand(len(real), generator=generator, device=real.device, dtype=dtype)
    elif tuple(epsilon.shape) != (len(real),) or epsilon.device != real.device:
        raise ValueError(
            f"{name}: epsilon must have shape ({len(real)},) on {real.device}, "
            f"got {tuple(epsilon.shape)} on {epsilon.device}"
        )
    return _interpolate.op(real, fake, epsilon, None)


def grad_norm_penalty(gradient: Tensor, target: float = 1.0) -> Tensor:
    """(|g| - target)^2 of each sample's gradient g, with derivative 0 where |g| = 0.

    Args:
        gradient: [N, *], floating; norms are over everything but the first dimension, summed in float32 or better.
        target: 1 for WGAN-GP and DRAGAN; 0 gives |g|^2, the penalty of R1 and R2.

    Returns:
        [N], float32 (float64 for float64).

    Raises:
        ValueError: gradient has fewer than 2 dimensions, or target is negative.
        TypeError: gradient is not floating.
    """
    name = "grad_norm_penalty"
    if gradient.dim() < 2:
        raise ValueError(f"{name}: gradient must have at least 2 dimensions [N, *], got {tuple(gradient.shape)}")
    if not gradient.is_floating_point():
        raise TypeError(f"{name}: gradient must be a floating tensor, got {gradient.dtype}")
    if not target >= 0:
        raise ValueError(f"{name}: target must be >= 0, got {target}")
    return _grad_norm_penalty.op(gradient, float(target))[0]
