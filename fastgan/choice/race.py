"""The race of a case: proof and timing in turns, cheapest guess first, within the account.

Ours runs first, then the reference; both calls are the proof's, so a case costs one call each at least. Then:

- A case whose bound leaves a difference of a few microseconds (TINY) is not raced further: ours runs it.
- A backend that is BEHIND times slower at its first call is cut off, where that call took more than a millisecond: a
  first call's set-up (oneDNN builds a primitive in 0.3 to 1 ms) is not to decide.
- Else both run in turns until the faster one is clear, ROUNDS times at most.
- A verdict whose lead is smaller than its spread was taken under load. It is not remembered: the case stays open.
- A case for which the account has too little stays open as well. An open case runs on our kernel for the whole run.
- Where `cost()` says that two shapes of a family (they differ in batch size or output channels) need nearly the same
  time, the second takes the clear verdict of the first.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from fastgan.choice.budget import Account, bound
from fastgan.choice.hardware import lacks_products
from fastgan.choice.proof import prove
from fastgan.choice.routine import Routine, family, tensors
from fastgan.choice.state import State

TINY = 5e-6  # seconds of a perfect kernel, below which nothing is raced; a call takes about as much
BEHIND = 3.0
FIRST_CALL = 1e-3  # seconds
ROUNDS = 5
CLEAR = 1.15  # the lead that needs no further round
NEAR = 2.5  # ratio of bounds up to which a family shares a verdict
# Beside the two calls a proof draws its arguments and compares: 10 ns an element (normal_ 5, filling with NaN,
# two norms), as seconds a byte of the arguments and results.
DRAWING = 4e-9


@dataclass(frozen=True)
class Verdict:
    """winner: a backend; ahead: the next one's time over its own; spread: how far equal runs lay apart (1: none).

    settled: whether it may be remembered; else why says why the case stays open.
    """

    winner: str
    ahead: float = 1.0
    spread: float = 1.0
    settled: bool = True
    why: str = "raced"


def race(state: State, op: Routine, args: tuple, able: list[str], account: Account) -> Verdict:
    """Prove each of `able` (the cheapest guess first, the reference last) on this case, and time the survivors."""
    needed = bound(op, args)
    shared = _shared(state, op, args, needed)
    if shared and shared.winner in able:
        return shared
    runs = _Runs(op, args, needed, account)
    on_cpu = op.first(args).device.type == "cpu"
    if on_cpu and account.balance < runs.proof_seconds(able):
        return Verdict(able[0], settled=False, why="open: the budget for proofs and races is spent")
    with account.paying():
        verdict = _run(state, op, args, able, runs)
    if verdict.settled and verdict.ahead >= CLEAR:
        state.families[_neighbours(op, args)] = needed, verdict
    return verdict


def _run(state: State, op: Routine, case: tuple, able: list[str], runs: _Runs) -> Verdict:
    lacking = lacks_products(op, case)
    if not lacking and runs.account.balance < runs.pilot(case):
        return Verdict(able[0], settled=False, why="open: PyTorch's own op takes longer than the budget for races")
    args = op.drawn(case)
    proved = [n for n in able if n == "reference" or prove(state, op, n, case, args, runs.timed)]
    if lacking and len(proved) > 1:
        proved.remove("reference")
    if len(proved) == 1:
        return Verdict(proved[0], why=lacking if proved[0] != "reference" else "raced")
    return _timed(op, args, proved, runs)


def _timed(op: Routine, args: tuple, able: list[str], runs: _Runs) -> Verdict:
    """Of backends that have run once, in their proof."""
    first = {name: runs.seconds[name][0] for name in able}
    quickest = min(first.values())
    alive = [name for name in able if first[name] < max(BEHIND * quickest, FIRST_CALL)]
    if len(alive) == 1:
        rest = min(seconds for name, seconds in first.items() if name != alive[0])
        return Verdict(alive[0], rest / quickest)
    if runs.needed < TINY and first[able[0]] < max(BEHIND * quickest, 100e-6):
        return Verdict(able[0], why="too small to race")
    for name in able:
        runs.seconds[name].clear()  # a proof's call fills memory with NaN
    for turn in range(ROUNDS):  # interleaved, so that a noisy moment hits every runner
        if runs.account.balance < runs.so_far() + sum(first[name] for name in alive):
            break
        for name in alive:
            runs.timed(name, lambda: op.backends[name].run(*args))  # noqa: B023 (called at once)
        if turn > 0 and runs.ahead(alive) >= max(CLEAR, runs.spread(alive)):
            break
    if any(len(runs.seconds[name]) < 2 for name in alive):  # one run has no spread
        return Verdict(able[0], settled=False, why="open: the budget for proofs and races is spent")
    best = min(alive, key=lambda name: min(runs.seconds[name]))
    ahead, spread = runs.ahead(alive), runs.spread(alive)
    if spread > CLEAR and ahead < spread:
        return Verdict(able[0], ahead, spread, False, "open: the machine was under load, the times lay too far apart")
    return Verdict(best, ahead, spread)


class _Runs:
    """The times of one case, by backend."""

    def __init__(self, op: Routine, args: tuple, needed: float, account: Account):
        self.op, self.needed, self.account = op, needed, account
        self.device, self.dtype = op.first(args).device, op.first(args).dtype
        self.bytes = sum(t.numel() * t.element_size() for t in tensors(args))
        self.seconds: dict[str, list[float]] = {}
        self.begin = account.clock()

    def kind(self, name: str) -> tuple:
        return self.op.name, name, self.dtype

    def so_far(self) -> float:
        """Seconds of this case, which the account has not paid yet."""
        return self.account.clock() - self.begin

    def proof_seconds(self, able: list[str]) -> float:
        """What a proof is expected to take: a call of each, drawing and comparing."""
        return DRAWING * self.bytes + sum(self.account.expected(self.kind(name), self.needed) for name in able)

    def pilot(self, case: tuple) -> float:
        """What PyTorch's own op takes by one sample of the batch, in seconds; 0 where its kind is known."""
        one = None if self.account.known(self.kind("reference")) else self.op.one_sample(case)
        if one is None:
            return 0.0
        drawn = self.op.drawn(one)
        self.op.reference(*drawn)  # its first call sets up
        begin = self._now()
        self.op.reference(*drawn)
        return (self._now() - begin) * len(self.op.first(case))

    def timed(self, name: str, run: Callable[[], Any]) -> Any:
        begin = self._now()
        found = run()
        took = self._now() - begin
        self.seconds.setdefault(name, []).append(took)
        self.account.took(self.kind(name), self.needed, took)
        return found

    def ahead(self, alive: list[str]) -> float:
        """The second best time over the best."""
        best, *rest = sorted(min(self.seconds[name]) for name in alive)
        return rest[0] / best

    def spread(self, alive: list[str]) -> float:
        """How far the two best runs of a backend lie apart, at worst."""
        pairs = [sorted(self.seconds[name])[:2] for name in alive]
        return max((pair[-1] / pair[0] for pair in pairs), default=1.0)

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return self.account.clock()


def _shared(state: State, op: Routine, args: tuple, needed: float) -> Verdict | None:
    """The verdict of a neighbour in the family that needs nearly the same time; None on a GPU, where each case must be
    proved."""
    if op.first(args).device.type != "cpu":
        return None
    found = state.families.get(_neighbours(op, args))
    if found is None or not 1 / NEAR <= found[0] / needed <= NEAR:
        return None
    _, verdict = found
    return Verdict(verdict.winner, verdict.ahead, verdict.spread, why="shared with a neighbouring shape")


def _neighbours(op: Routine, args: tuple) -> tuple:
    return op.name, torch.get_num_threads(), family(args)
