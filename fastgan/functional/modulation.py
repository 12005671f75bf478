"""StyleGAN2's convolution, whose weight each sample scales by a style of its own."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastgan._layout import accumulation_dtype
from fastgan.functional.resampling import check_image, conv2d_resample

FORMS = ("auto", "activations", "weights")


def modulated_conv2d(
    x: Tensor,
    weight: Tensor,
    styles: Tensor,
    *,
    noise: Tensor | None = None,
    up: int = 1,
    down: int = 1,
    padding: int | Sequence[int] = 0,
    resample_filter: Tensor | None = None,
    demodulate: bool = True,
    flip_weight: bool = True,
    eps: float = 1e-8,
    form: str = "auto",
) -> Tensor:
    """A convolution whose weight is scaled by each sample's styles, and each of its filters then to length 1.

    w[n, k, c] = weight[k, c] styles[n, c], divided with `demodulate` by the root of the sum of w[n, k]^2 over its
    elements + eps (Karras et al. 2020, section 2.2). Two forms agree to rounding: the activations are scaled before
    and after one convolution that all samples share, or each sample has its own weight in a grouped convolution.

    Args:
        x: [N, C, H, W], floating.
        weight: [K, C, R, S].
        styles: [N, C].
        noise: added to the result: None, or what broadcasts against it.
        up, down, padding, resample_filter: as `conv2d_resample`.
        demodulate: whether filters are scaled to length 1.
        flip_weight: True: correlation, as torch's convolutions.
        eps: added to the squared length.
        form: "activations", "weights", or "auto": weights for one sample whose weight is smaller than its activations.

    Returns:
        [N, K, OH, OW], x's dtype.

    Raises:
        ValueError, TypeError: shapes do not match, or as `conv2d_resample`.
    """
    check_image("modulated_conv2d", x)
    n, c = x.shape[:2]
    if weight.dim() != 4 or weight.shape[1] != c or tuple(styles.shape) != (n, c):
        raise ValueError(
            f"modulated_conv2d: weight must be [K, C, R, S] and styles [N, C] of x {tuple(x.shape)}, got "
            f"{tuple(weight.shape)} and {tuple(styles.shape)}"
        )
    if form not in FORMS:
        raise ValueError(f"modulated_conv2d: form must be one of {', '.join(FORMS)}, got {form!r}")
    if x.dtype == torch.float16 and demodulate:  # the length is taken out anyway: keep float16 from overflow
        weight = weight / weight.abs().amax([1, 2, 3], keepdim=True) / (weight[0].numel() ** 0.5)
        styles = styles / styles.abs().amax(1, keepdim=True)
    geometry = {"f": resample_filter, "up": up, "down": down, "padding": padding, "flip_weight": flip_weight}
    by_weights = form == "weights" or (form == "auto" and _weights_are_cheaper(x, weight, up, down))
    run = _by_weights if by_weights else _by_activations
    return run(x, weight, styles, noise, demodulate, eps, geometry)


def _weights_are_cheaper(x: Tensor, weight: Tensor, up: int, down: int) -> bool:
    """Whether one sample's weight is smaller than its activations: scaling activations reads and writes x and y once
    more, scaling the weight writes and reads the weight once.

    For more than one sample the convolution would be a grouped one, which costs more than the scaling: 8 samples of 64
    channels, 32x32, took 7.0 ms forward and backward by weights and 4.1 ms by activations (channels_last, 2 cores of
    AMD EPYC Zen 5).
    """
    y = x.numel() // x.shape[1] * weight.shape[0] * up * up // (down * down)
    return x.shape[0] == 1 and 2 * weight.numel() < x.numel() + y


def _by_activations(
    x: Tensor, weight: Tensor, styles: Tensor, noise: Tensor | None, demodulate: bool, eps: float, geometry: dict
) -> Tensor:
    y = conv2d_resample(_scaled(x, styles), weight.to(x.dtype), **geometry)
    if not demodulate:
        return y if noise is None else y + noise.to(x.dtype)
    # |w[n, k]|^2 = sum over c of styles[n, c]^2 |weight[k, c]|^2: no sample's weight is ever made
    wide = accumulation_dtype(styles.dtype)
    squares = styles.to(wide).square() @ weight.to(wide).square().sum([2, 3]).t()
    y = _scaled(y, (squares + eps).rsqrt())
    return y if noise is None else y + noise.to(x.dtype)


def _scaled(x: Tensor, v: Tensor) -> Tensor:
    """x [N, C, H, W] times v [N, C]."""
    return x * v.to(x.dtype)[:, :, None, None]


def _by_weights(
    x: Tensor, weight: Tensor, styles: Tensor, noise: Tensor | None, demodulate: bool, eps: float, geometry: dict
) -> Tensor:
    n, c, h, w = x.shape
    own = weight[None] * styles[:, None, :, None, None]
    if demodulate:
        own = own * (own.square().sum([2, 3, 4], keepdim=True) + eps).rsqrt()
    y = conv2d_resample(x.reshape(1, n * c, h, w), own.flatten(0, 1).to(x.dtype), groups=n, **geometry)
    y = y.reshape(n, -1, *y.shape[2:])
    return y if noise is None else y + noise.to(x.dtype)
