"""Hooks of modules, and the four policies for them.

- `has_hooks`: calling the module does more than its forward. A fused layer that skips the call needs none.
- `has_hooks_on_values`: a hook may look at what flows through the module. Torch's older weight hooks do not: they make
  the weight by tensor ops, which a tape records and a CUDA graph captures like any other op.
- `makes_weight`: such a hook, or a user's own in its form (an equalised learning rate), which a trace follows too.
- `has_global_hooks`: torch calls such hooks for every module, so every module must be called as one.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.modules import module as _torch
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

__all__ = ["has_global_hooks", "has_hooks", "has_hooks_on_values", "makes_weight"]

WEIGHT_HOOKS = (SpectralNorm, WeightNorm)


def has_global_hooks() -> bool:
    """Whether torch calls a hook for every module. Torch 2.6 has no function for this."""
    return bool(
        _torch._global_forward_hooks
        or _torch._global_forward_pre_hooks
        or _torch._global_backward_hooks
        or _torch._global_backward_pre_hooks
    )


def has_hooks(module: nn.Module) -> bool:
    """Whether calling the module does more than its forward."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def has_hooks_on_values(module: nn.Module) -> bool:
    """Whether the module has a hook that is none of torch's weight hooks."""
    before = any(not isinstance(hook, WEIGHT_HOOKS) for hook in module._forward_pre_hooks.values())
    return bool(before or module._forward_hooks or module._backward_hooks or module._backward_pre_hooks)


def makes_weight(hook: Any) -> bool:
    """Whether a hook is one of torch's weight hooks, or an object in their form.

    Its `compute_weight(module)` gives what becomes the attribute `name` of the module, beside a parameter of another
    name. Reimplementations of PGGAN and StyleGAN equalise the learning rate so. What else such an object's code does, a
    trace sees.
    """
    return isinstance(hook, WEIGHT_HOOKS) or (
        isinstance(getattr(hook, "name", None), str) and callable(getattr(hook, "compute_weight", None))
    )
