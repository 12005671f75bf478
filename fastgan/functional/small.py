"""Small tensors, for which a function takes PyTorch's own ops.

A kernel of ours pays for a lookup, a call through the binding and, under gradients, an autograd node written in Python:
15 to 25 us a function, 60 to 80 us with its gradients, where PyTorch's ops of few elements take 3 to 7 and 25 us. The
sizes up to which they are faster stand beside each function and in docs/evidence/call-overhead.md. Nothing races for
it: a size decides the same way everywhere.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastgan._op import PLAIN, is_observed
from fastgan.choice import FREE, STATE


def is_small(x: Tensor, largest: int) -> bool:
    """Whether PyTorch's ops take a call on x: a CPU tensor of at most `largest` elements.

    False wherever somebody asked for kernels of ours or looks at single ops, where second derivatives are expected
    (PyTorch's are dozens of kernels), and under autocast.
    """
    return (
        STATE.mode == FREE
        and not is_observed()  # before sizes: a traced graph would be bound to them
        and 0 < x.numel() <= largest
        and type(x) in PLAIN
        and x.is_cpu
        and not (STATE.emulated or STATE.watchers or STATE.second_order)
        and not torch.is_autocast_enabled("cpu")
    )


def learns(*tensors: Tensor | None) -> bool:
    """Whether a gradient may be asked for of any of them."""
    if torch.is_grad_enabled():
        for t in tensors:  # a generator costs 0.5 us
            if t is not None and t.requires_grad:
                return True
    return False
