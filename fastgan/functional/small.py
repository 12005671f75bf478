"""Small tensors: PyTorch's own ops under a public function, where a call of ours costs more than its kernel saves.

A kernel of ours reads a tensor once where PyTorch's ops read it twice, and pays for that with a lookup, a call through
the binding and, under gradients, an autograd node written in Python. The sizes below which this does not pay are
measured once for a function and stand beside it; nothing races for them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastgan._op import PLAIN, is_observed
from fastgan.choice import STATE

FREE = "auto True"  # STATE.mode: no backend is forced, and races decide


def is_small(x: Tensor, largest: int) -> bool:
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
