"""What passes between a step and its user's own losses, in parts and halves, and how gradients are clipped."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

CLIPPING = ("norm", "value")


@dataclass(frozen=True)
class Outputs:
    """What an extra loss sees of an update.

    real, fake: [N, *] images as the discriminator saw them, augmented; in the generator's update gradients flow through
    fake. d_real, d_fake: the discriminator's whole outputs on them, features included; in the generator's update d_real
    is without gradients. labels: [N] or None. z: the latents.
    """

    real: Tensor
    fake: Tensor
    d_real: Any
    d_fake: Any
    labels: Any
    z: Any


ExtraLoss = Callable[[Outputs], Tensor]


def halves(output: Any) -> tuple[Any, Any]:
    """The outputs for each half of a batch: every tensor in the structure is cut along its first dimension."""
    if isinstance(output, Tensor):
        first, second = output.chunk(2)
        return first, second
    return tree_map(lambda t: t.chunk(2)[0], output), tree_map(lambda t: t.chunk(2)[1], output)


def parts_of(batch: Any, cut: Callable[[Any], Any], count: int) -> list[Any]:
    """`count` parts of a batch: of each tensor in the structure."""
    leaves, structure = tree_flatten(batch)
    pieces = [cut(leaf) for leaf in leaves]
    return [tree_unflatten([piece[i] for piece in pieces], structure) for i in range(count)]


def clipping(value: float | tuple[str, float] | None) -> tuple[str, float] | None:
    """(kind, limit) of a step's grad_clip. Raises ValueError for another kind or a limit that is not positive."""
    if value is None:
        return None
    kind, limit = value if isinstance(value, tuple) else ("norm", value)
    if kind not in CLIPPING or not limit > 0:
        raise ValueError(f'GANStep: grad_clip must be a positive norm, ("norm", x) or ("value", x), got {value!r}')
    return kind, float(limit)


def clip(optimizer: torch.optim.Optimizer, kind: str, limit: float) -> None:
    """Clip the gradients of an optimiser's parameters; nothing is read back."""
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    if kind == "norm":
        torch.nn.utils.clip_grad_norm_(parameters, limit)
    else:
        torch.nn.utils.clip_grad_value_(parameters, limit)
