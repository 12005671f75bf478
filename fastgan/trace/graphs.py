"""What Dynamo calls with each graph: ours or the graph as it came, whichever is faster, behind one callable."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from fastgan import functional
from fastgan.choice import STATE, Contest, forced
from fastgan.trace.layout import in_channels_last
from fastgan.trace.rewrite import Group, attention, example, multi_head, rewritten
from fastgan.trace.straight import Straight

# Calls of calls that run as written without a compiler behind them. Others do not: torch's own form of a user's
# autograd.Function loses its second derivative.
TRANSPARENT = ("tag_activation_checkpoint", "wrap")


# Calls at least whose time beside their graphs is measured, before a race ends; the least counts. Dynamo's guards and
# the way to them take 25 to 40 us in a loop of nothing else, 90 to 170 us between the kernels of a training step
# (networks of tests/handwritten.py), and 0.4 to 1 ms where 20 to 60 layers make their weights by hooks (2 cores of AMD
# EPYC Zen 5).
MEASURED = 2


@dataclass
class Graph:
    """One traced graph, in the ways that it can run: as Dynamo gave it, and with its groups fused."""

    ways: dict[str, Callable[..., Any]]  # "ours", "channels_last" where that differs, "plain"
    groups: list[Group]
    digest: str
    sizes: list[int] = field(default_factory=list)  # the arguments that are numbers: the sizes left open
    chosen: dict[tuple, str] = field(default_factory=dict)  # backend forced, sizes -> the way that runs
    contests: dict[tuple, Contest] = field(default_factory=dict)  # those not settled yet
    calls: int = 0
    last: str = ""  # the way of the last call, "" where it is not settled
    # Seconds that a call spends beside its graph, which one that is left to PyTorch saves (`fastgan.trace.part`); None:
    # not measured yet. Under torch.compile every way spends them.
    overhead: float | None = 0.0
    inside: float = 0.0  # seconds that all calls have spent in their ways
    beside: list[float] = field(default_factory=list)  # seconds of calls, without those

    def __call__(self, *arguments: Any) -> Any:
        case = (forced(), *(arguments[i] for i in self.sizes))
        self.calls += 1
        self.last = self.chosen.get(case, "")
        run = self.ways[self.last] if self.last else self._raced(case, arguments)
        account = STATE.account
        begin, paid = account.clock(), account.spent
        found = run(*arguments)
        self.inside += account.clock() - begin - (account.spent - paid)
        return found

    def measure(self, beside: float) -> None:
        """What a call has spent beside this graph; the race's end waits for MEASURED of them."""
        self.beside.append(beside)
        if len(self.beside) >= MEASURED:
            self.overhead = min(self.beside)

    def _raced(self, case: tuple, arguments: tuple) -> Callable[..., Any]:
        """The way for now, as it runs; it is kept once the race is settled."""
        contest = self.contests.get(case)
        if contest is None:
            contest = self.contests[case] = Contest(self._key(case, arguments), self.ways, on_calls=True)
        contest.overhead = self.overhead
        way = contest(arguments)
        if contest.settled:
            self.chosen[case] = self.last = way
            del self.contests[case]
        elif contest.watching:
            return lambda *arguments: contest.watched(way, arguments)
        return self.ways[way]

    def _key(self, case: tuple, arguments: tuple) -> tuple:
        """What the winner is remembered by."""
        tensors = tuple(
            (tuple(a.shape), a.stride(), str(a.dtype), a.device.type, a.requires_grad)
            for a in arguments
            if isinstance(a, Tensor)
        )
        threads, grad = torch.get_num_threads(), torch.is_grad_enabled()
        modes = threads, grad, torch.is_autocast_enabled("cpu")
        return "trace", self.digest, tuple(self.ways), case[1:], tensors, *modes


def backend(module: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
    """The Dynamo backend "fastgan": `torch.compile(model, backend="fastgan")`.

    Convolutions, norms and activations run on fastgan's ops, everything else as PyTorch runs it. Eager autograd records
    the calls, so second derivatives are those of the model without compilation. A graph that plain PyTorch runs faster,
    forward and backward together, is left to it.

    Args:
        module: a graph of torch-level calls, as Dynamo captures it.
        example_inputs: what the graph is called with first.

    Returns:
        What runs in the graph's place.
    """
    return traced(module, example_inputs) or module.forward


def traced(module: fx.GraphModule, example_inputs: list[Any], left: Collection[tuple[str, str]] = ()) -> Graph | None:
    """The graph with its groups, or None where there is nothing in it to fuse; left: groups that stay as they are."""
    for node in module.graph.nodes:
        if isinstance(node.target, torch._ops.HigherOrderOperator) and node.target.name() not in TRANSPARENT:
            raise torch._dynamo.exc.SkipFrame(f"{node.target.name()} is left to PyTorch's eager mode")
    ours, groups = rewritten(module, left)
    if not groups:
        return None
    turned = in_channels_last(ours)
    ours, _ = rewritten(module, left, Straight)
    digest = hashlib.sha256(f"{module.graph}{ours.graph}".encode()).hexdigest()[:24]
    numbers = [i for i, value in enumerate(example_inputs) if not isinstance(value, Tensor)]
    ways = {"ours": ours.forward} | ({"channels_last": turned.forward} if turned else {}) | _theirs(module, groups)
    return Graph(ways, groups, digest, numbers)


def _theirs(module: fx.GraphModule, groups: list[Group]) -> dict[str, Callable[..., Any]]:
    """PyTorch's way, but for attention: its fused kernels have no second derivative."""
    if any(group.target is functional.in_act and len(example(group.arguments["x"])) == 1 for group in groups):
        return {}  # torch 2.13 takes a channels_last cotangent of its instance norm of one sample for NCHW
    others = {group.key for group in groups if group.target not in (attention, multi_head)}
    if len(others) == len({group.key for group in groups}):
        return {"plain": module.forward}
    return {"plain but attention": rewritten(module, others)[0].forward} if others else {}
