"""The core of attention in plain torch, which `fastgan.convert` puts on the op `attention`."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class DotProductAttention(nn.Module):
    """softmax(scale q kᵀ) v, with q ``[N, heads, L, d]``, k ``[N, heads, S, d]``, v ``[N, heads, S, e]``.

    It is the plain formula, which can be differentiated twice and holds the scores [N, heads, L, S].
    torch.nn.functional.scaled_dot_product_attention cannot: its fused kernels raise at the second derivative, which
    R1 needs. `fastgan.convert` runs it by `fastgan.functional.scaled_dot_product_attention`, which can, and whose
    memory is linear in S.

    scale: of the scores; None: d^(-1/2).
    """

    per_sample = True

    def __init__(self, scale: float | None = None):
        super().__init__()
        self.scale = scale

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scale = q.shape[-1] ** -0.5 if self.scale is None else self.scale
        y: Tensor = torch.softmax(scale * q @ k.mT, -1) @ v
        return y
