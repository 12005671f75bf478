"""What passes between a step, its networks and its user's own losses, and how gradients are clipped."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from fastgan._logits import logits_of

CLIPPING = ("norm", "value")


@dataclass(frozen=True)
class Outputs:
    """What an extra loss sees of an update.

    real, fake: [N, *] images as the discriminator saw them, augmented; in the generator's update gradients flow through
    fake. d_real, d_fake: the discriminator's whole outputs on them, features included; in the generator's update d_real
    is without gradients, and None where the extra loss does not read it. labels: [N] or None. z: the latents, a tuple
    where the generator takes several.
    """

    real: Tensor
    fake: Tensor
    d_real: Any
    d_fake: Any
    labels: Any
    z: Any


ExtraLoss = Callable[[Outputs], Tensor]


class Several(nn.ModuleList):
    """Discriminators that judge the same images: {"logits": those of all, "outputs": what each returned}."""

    per_sample = True  # of its own; its members are looked at one by one

    def __init__(self, members: Sequence[nn.Module]):
        super().__init__(members)

    def forward(self, x: Tensor, *labels: Any) -> dict[str, list[Any]]:
        outputs = [member(x, *labels) for member in self]
        return {"logits": [t for output in outputs for t in logits_of(output)], "outputs": outputs}


def as_one(discriminator: nn.Module | Sequence[nn.Module]) -> nn.Module:
    """A discriminator as it is; several of them, in a list, a tuple or an nn.ModuleList, as one module."""
    several = isinstance(discriminator, list | tuple) or type(discriminator) is nn.ModuleList
    return Several(discriminator) if several else discriminator  # type: ignore[arg-type, return-value]


def members_of(discriminator: nn.Module) -> list[nn.Module]:
    """The discriminators that a module stands for."""
    return list(discriminator) if isinstance(discriminator, Several) else [discriminator]


def check_takes_labels(network: nn.Module, name: str, inputs: int) -> None:
    """ValueError where a network cannot be called with its inputs and labels."""
    for member in members_of(network):
        with contextlib.suppress(ValueError):  # code without a signature, as TorchScript's
            signature = inspect.signature(member.forward)
            try:
                signature.bind(*range(inputs + 1))
            except TypeError:
                break
    else:
        return
    raise ValueError(
        f"GANStep: the {name} must take labels after its input where a step is given labels, got "
        f"{type(member).__name__}.forward{signature}; add the argument, or leave the labels out"
    )


def scalar(name: str, value: Any) -> Tensor:
    """What an extra loss returned. Raises ValueError for what is no 0-dim tensor."""
    if not isinstance(value, Tensor) or value.dim():
        found = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"GANStep: {name} must return a scalar tensor, got {found}; take a mean or a sum")
    return value


def halves(output: Any) -> tuple[Any, Any]:
    """The outputs for each half of a batch: every tensor in the structure is cut along its first dimension."""
    if isinstance(output, Tensor):
        first, second = output.chunk(2)
        return first, second
    return tree_map(lambda t: t.chunk(2)[0], output), tree_map(lambda t: t.chunk(2)[1], output)


def parts_of(batch: Any, cut: Callable[[Any], Any], count: int) -> list[Any]:
    """`count` parts of a batch: every tensor in the structure is cut."""
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
