"""A discriminator that returns probabilities, as many tutorials write it: noticed before it trains wrongly.

The losses take logits. Where the last thing that a discriminator does is a sigmoid, the loss would apply a second one.
The last function is read from the autograd graph of the output, so that any way to write the network will do.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from fastgan._logits import logits_of

SQUASHING = {"sigmoid": "a sigmoid", "softmax": "a softmax"}
# autograd's names of what leaves values as they are, or averages them
NEUTRAL = (
    "view",
    "unsafeview",
    "reshape",
    "squeeze",
    "unsqueeze",
    "split",
    "chunk",
    "slice",
    "select",
    "asstrided",
    "clone",
    "tocopy",
    "permute",
    "transpose",
    "t",
    "expand",
    "mean",
    "cat",
    "stack",
    "alias",
    "contiguous",
)
UPDATES = 20  # discriminator updates whose logits are looked at; real ones have left [0, 1] by then
LEAST = 16  # logits that must have been seen before all of them within [0, 1] mean something


class Folded(nn.Sigmoid):
    """A sigmoid that the loss applies: the identity here."""

    def forward(self, input: Tensor) -> Tensor:
        return input


class Watch:
    """Looks at the logits of a discriminator's first updates."""

    def __init__(self, discriminator: nn.Module, reads: bool):
        """reads: whether the values may be read back, which a captured step must not."""
        self.discriminator, self.reads = discriminator, reads
        self.updates, self.seen, self.total, self.within = 0, 0, 0.0, True

    @property
    def may_fold(self) -> bool:
        """Whether the first update may run the discriminator twice: a step that nothing should record."""
        return self.updates == 0 and type(_last(self.discriminator)[1]) is nn.Sigmoid

    def folded(self, run: Callable[[], tuple[Any, ...]]) -> tuple[Any, ...]:
        """run() gives the first of the discriminator's outputs in an update, or all; it runs again where a final
        sigmoid had to be folded away first."""
        if self.updates >= UPDATES:
            return run()
        restore = _snapshot(self.discriminator) if self.may_fold else None
        found = run()
        if self.updates == 0 and (what := _squashed(found[0])):
            self._fold(what)
            if restore is not None:
                restore()
            found = run()
            if what := _squashed(found[0]):
                self._refuse(what)
        return found

    def _fold(self, what: str) -> None:
        path, last = _last(self.discriminator)
        if what != "sigmoid" or type(last) is not nn.Sigmoid:
            self._refuse(what)
        last.__class__ = Folded
        warnings.warn(
            f"GANStep: the discriminator's final sigmoid ({path}) is folded into the loss; "
            "the discriminator returns logits from now on",
            stacklevel=6,
        )

    def _refuse(self, what: str) -> NoReturn:
        raise ValueError(
            f"GANStep: the discriminator must return logits, got the output of {SQUASHING[what]}; "
            "return the value before it"
        )

    def look(self, *outputs: Any) -> None:
        """Count an update with these outputs; warn once where all logits of all of them lie in [0, 1]."""
        if self.updates >= UPDATES:
            return
        self.updates += 1
        for t in (t for output in outputs for t in logits_of(output)):
            if not (self.reads and self.within):  # nothing more is read back
                return
            t = t.detach()
            self.within = bool(((t >= 0) & (t <= 1)).all())
            self.seen += t.numel()
            self.total += float(t.sum())
        near_half = 0.25 < self.total / max(self.seen, 1) < 0.75  # the logits of an untrained network lie around 0
        if self.updates == UPDATES and self.within and near_half and self.seen >= LEAST:
            warnings.warn(
                f"GANStep: the discriminator must return logits, got values within [0, 1] only in its first {UPDATES} "
                "updates; if they are probabilities, return the value before the sigmoid",
                stacklevel=6,
            )


def _squashed(output: Any) -> str:
    """What squashed the logits of some scale last, or ""."""
    return next(filter(None, map(final_squashing, logits_of(output))), "")


def final_squashing(logits: Tensor) -> str:
    """ "sigmoid" or "softmax" where the last thing that made the logits is one, else ""."""
    node: Any = logits.grad_fn
    while node is not None:
        name = type(node).__name__.lower().partition("backward")[0].lstrip("_")
        if getattr(node, "activation", "") == "sigmoid" or name == "sigmoid":
            return "sigmoid"
        if name == "softmax":
            return "softmax"
        if name not in NEUTRAL or not node.next_functions:
            return ""
        node = node.next_functions[0][0]
    return ""


def _last(m: nn.Module, path: str = "") -> tuple[str, nn.Module]:
    """The module registered last, however deep, and its path."""
    children = list(m.named_children())
    if not children:
        return path, m
    name, child = children[-1]
    return _last(child, f"{path}.{name}".lstrip("."))


def _snapshot(discriminator: nn.Module) -> Callable[[], None]:
    """A function that puts buffers and torch's random state back."""
    buffers = [(b, b.detach().clone()) for b in discriminator.buffers()]
    state = torch.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() and torch.cuda.is_initialized() else None

    @torch.no_grad()
    def restore() -> None:
        for buffer, before in buffers:
            buffer.copy_(before)
        torch.set_rng_state(state)
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)

    return restore
