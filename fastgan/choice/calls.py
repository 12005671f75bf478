"""The seconds of a call that its user makes anyway: forward, and its backward pass where one comes.

Such a call costs nothing to measure, where a race on copies costs a part of every first minute. Autograd's engine runs
whatever is ready in the order in which forward made it, the last first. So the nodes of one call follow each other,
from those of its outputs to the one that it made first, and two hooks see where they begin and end.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fastgan.choice.state import STATE


def clocked(run: Callable[..., Any], arguments: Sequence[Any], told: Callable[[float], None]) -> Any:
    """run(*arguments), and told(seconds) once they are known: at once, or at the end of the backward pass.

    A backward pass counts where it makes every gradient and is not itself differentiated. Of another one, or where none
    comes, nobody is told.
    """
    clock = STATE.account.clock
    number = torch._C._autograd._get_sequence_nr()
    begin, paid = clock(), STATE.account.spent
    found = run(*arguments)
    took = clock() - begin - (STATE.account.spent - paid)
    outputs = [y for y in torch.utils._pytree.tree_leaves(found) if isinstance(y, Tensor)]
    last = {y.grad_fn for y in outputs if y.grad_fn is not None}
    nodes, leaves = _made(last, number)
    if nodes:
        backward = _Backward(took, leaves, told)
        for node in last & nodes:
            node.register_prehook(backward.begins)
        min(nodes, key=lambda node: node._sequence_nr()).register_hook(backward.ends)
    else:
        told(took)
    return found


def reaches(node: Any) -> bool:
    """Whether the running backward pass executes a node of the graph: one of ctx.next_functions."""
    try:
        return torch._C._will_engine_execute_node(node)
    except RuntimeError:  # refused for a leaf that the pass is asked for itself, and where no engine runs
        return True


def is_repacked() -> bool:
    """Whether hooks take what autograd saves, as in torch.utils.checkpoint.

    It runs a function again in the backward pass and pairs, by their order alone, the tensors that both runs save.
    Whatever may decide otherwise then keeps to one way: another one's tensors would give wrong gradients.
    """
    return bool(_hooks())


def _asked() -> bool:
    """For torch < 2.8, which cannot be asked: hooks cannot be switched off where some are set."""
    hooks: Any = torch._C._autograd
    if not hooks._saved_tensors_hooks_is_enabled():
        return False
    try:
        hooks._saved_tensors_hooks_disable("")
    except RuntimeError:
        return True
    finally:
        hooks._saved_tensors_hooks_enable()
    return False


_top: Callable[[bool], Any] | None = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
_hooks: Callable[[], Any] = _asked if _top is None else functools.partial(_top, True)


@contextlib.contextmanager
def unpacked() -> Iterator[None]:
    """Within: no hook of the user's sees what is saved."""
    if not is_repacked():
        yield
        return
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
        yield


class _Backward:
    """The first backward pass through a call; its forward took `before` seconds."""

    def __init__(self, before: float, leaves: Sequence[Any], told: Callable[[float], None]):
        self.before, self.leaves, self.told = before, leaves, told
        self.begun: float | None = None
        self.paid = 0.0

    def begins(self, gradients: Any) -> None:
        if self.leaves and not torch.is_grad_enabled() and all(map(reaches, self.leaves)):
            self.begun, self.paid = STATE.account.clock(), STATE.account.spent
        self.leaves = ()  # a second output, or a second pass

    def ends(self, gradients: Any, outputs: Any) -> None:
        if self.begun is not None:
            took = STATE.account.clock() - self.begun - (STATE.account.spent - self.paid)
            self.begun = None
            self.told(self.before + took)


def _made(outputs: set[Any], number: int) -> tuple[set[Any], list[Any]]:
    """The nodes behind these that were made since autograd counted `number`, and what stands behind them in turn."""
    nodes: set[Any] = set()
    leaves: set[Any] = set()
    pending = list(outputs)
    while pending:
        node = pending.pop()
        if node in nodes or node in leaves:
            continue
        if node.name() == "torch::autograd::AccumulateGrad" or node._sequence_nr() < number:
            leaves.add(node)
        else:
            nodes.add(node)
            pending += [following for following, _ in node.next_functions if following is not None]
    return nodes, list(leaves)
