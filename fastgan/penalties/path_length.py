"""How far an image moves with its style: what StyleGAN2 regularises its generator by."""

from __future__ import annotations

import torch
from torch import Tensor

from fastgan._layout import accumulation_dtype


def path_lengths(images: Tensor, w: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
    """|J^T y| of each sample, with J = d images / d w and y normal noise; differentiable once more.

    Args:
        images: [N, C, H, W], of a graph that reaches w.
        w: [N, width] style vectors, or [N, layers, width], whose lengths are the root of the mean square over layers.
        generator: of the noise y, which has deviation 1 / sqrt(H W).

    Returns:
        [N], float32 (float64 for float64). Source: Karras et al. 2020 (arXiv:1912.04958), section 3.2.

    Raises:
        ValueError: shapes are not as above.
    """
    if images.dim() != 4 or w.dim() not in (2, 3) or len(images) != len(w):
        raise ValueError(
            f"path_lengths: images must be [N, C, H, W] and w [N, width] or [N, layers, width], got "
            f"{tuple(images.shape)} and {tuple(w.shape)}"
        )
    noise = torch.randn(images.shape, generator=generator, device=images.device, dtype=images.dtype)
    with torch.enable_grad():
        scale = (images.shape[2] * images.shape[3]) ** -0.5
        (gradient,) = torch.autograd.grad((images * (noise * scale)).sum(), w, create_graph=True)
    squares = gradient.to(accumulation_dtype(gradient.dtype)).square().sum(-1)
    return (squares if w.dim() == 2 else squares.mean(1)).sqrt()
