"""`fma`: a b + c."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["fma"]


def fma(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """a b + c with broadcasting, in one pass, differentiable to every order."""
    return torch.addcmul(c, a, b)
