"""Small tensors, for which a function takes PyTorch's own ops.

A call of our kernels pays for a lookup, for the binding and, under gradients, for an autograd node written in Python:
15 to 25 us a function, 60 to 80 us with its gradients. PyTorch's ops of few elements take 3 to 7 us and 25 us. The
sizes up to which PyTorch's ops are faster stand beside each function and in docs/evidence/call-overhead.md. There is no
race about it: a size decides the same way on every machine.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastgan._op import PLAIN, is_observed
from fastgan.choice import FREE, STATE, is_repacked


def is_small(x: Tensor, largest: int) -> bool:
    """Whether PyTorch's ops take a call on x: a CPU tensor of at most `largest` elements.

    False where a backend was forced, where something looks at single ops, under autocast, and where second derivatives
    are expected: PyTorch's are dozens of kernels. Under torch.utils.checkpoint too, whose second run may come where one
    of these is otherwise.
    """
    return (
        STATE.mode == FREE
        and not is_observed()  # before sizes: a traced graph would be bound to them
        and 0 < x.numel() <= largest
        and type(x) in PLAIN
        and x.is_cpu
        and not (STATE.emulated or STATE.watchers or STATE.second_order)
        and not torch.is_autocast_enabled("cpu")
        and not is_repacked()
    )


def learns(*tensors: Tensor | None) -> bool:
    """Whether any of the tensors may be asked for its gradient."""
    if torch.is_grad_enabled():
        for t in tensors:  # a generator costs 0.5 us
            if t is not None and t.requires_grad:
                return True
    return False
