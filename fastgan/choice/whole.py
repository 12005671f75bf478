"""Parts of a model judged whole: ours in its ways, or plain PyTorch.

A part runs forward and backward on clones of its own inputs. Ops race singly; a part may lose what its ops have won, by
a layout that is converted at each of them or by Python's time between them. So plain PyTorch is among a part's
candidates, and the winner is remembered on disk as theirs are.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from fastgan.choice.budget import Account
from fastgan.choice.choosing import remember, remembered
from fastgan.choice.forcing import forced
from fastgan.choice.hardware import torch_multiplies_bfloat16
from fastgan.choice.race import BEHIND, CLEAR, FIRST_CALL, ROUNDS
from fastgan.choice.state import STATE

Run = Callable[..., Any]


def fastest(case: tuple, ways: dict[str, Run], arguments: Sequence[Any], plain: Collection[str] = ("plain",)) -> str:
    """The name of the way that is fastest on these arguments, by a `Contest` that this call must pay for.

    A race that the account cannot pay for leaves the best way so far, for as long as the caller keeps the answer.
    """
    return Contest(case, ways, plain)(arguments)


class Contest:
    """A race of whole parts that may take several calls: each goes on as far as the account allows.

    case: what the winner is remembered by. ways: name -> what runs; the first is taken until others are known. plain:
    the ways that are PyTorch's own; they do not run where the CPU lacks the instructions for their products. overhead:
    seconds that every other way costs beside its run.
    """

    def __init__(self, case: tuple, ways: dict[str, Run], plain: Collection[str] = ("plain",), overhead: float = 0.0):
        self.case, self.ways, self.plain, self.overhead = case, ways, plain, overhead
        self.settled = False  # whether the answer stands; else it is asked for again
        self.first: dict[str, float] = {}  # seconds of first runs, which decide nothing: the ops' own races are in them
        self.best: dict[str, float] = {}
        self.samples = dict.fromkeys(ways, 0)

    def __call__(self, arguments: Sequence[Any]) -> str:
        """The way that these arguments take now; the first one where racing is off or a backend forced."""
        first = next(iter(self.ways))
        backend, racing = forced()
        device = next((a.device for a in arguments if isinstance(a, Tensor)), torch.device("cpu"))
        if backend != "auto" or not racing:
            self.settled = True
            return first
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return first
        if not self.first and self._known(arguments, device):
            return next(iter(self.ways))
        account = STATE.account
        if self._affords(account, account.clock()):
            with account.paying():
                self._advance(arguments, device, account)
            if self.settled:
                remember(self.case, f"config {self.winner}")
        return self.winner

    @property
    def winner(self) -> str:
        """The fastest way so far."""
        if len(self.best) < len(self.ways):
            return next(iter(self.ways))
        return min(self.best, key=self._seconds)

    def _known(self, arguments: Sequence[Any], device: torch.device) -> bool:
        """Whether nothing is left to race: the winner is remembered, or alone; the other ways are dropped."""
        if device.type == "cpu" and _bfloat16(arguments) and not torch_multiplies_bfloat16():
            self.ways = {name: run for name, run in self.ways.items() if name not in self.plain}
        known = (remembered(self.case) or "").removeprefix("config ")
        if known in self.ways:
            self.ways = {known: self.ways[known]}
        self.settled = len(self.ways) == 1
        return self.settled

    def _seconds(self, name: str) -> float:
        return self.best[name] + (0.0 if name in self.plain else self.overhead)

    def _alive(self) -> list[str]:
        """The ways that are not far behind."""
        limit = BEHIND * min(self.best.values(), default=float("inf"))
        return [name for name in self.ways if self.best.get(name, 0.0) <= limit]

    def _next(self) -> str:
        """The way that runs next."""
        new = [name for name in self.ways if name not in self.first]
        return new[0] if new else min(self._alive(), key=self.samples.__getitem__)

    def _affords(self, account: Account, begin: float) -> bool:
        """Whether the account has what the next run is expected to take; a full one pays for a run of any length."""
        quickest = BEHIND * min(self.first.values(), default=0.0)
        expected = self.best.get(self._next(), quickest)
        return account.balance - (account.clock() - begin) >= min(expected, account.held)

    def _advance(self, arguments: Sequence[Any], device: torch.device, account: Account) -> None:
        """Run as many samples as the account allows; `fastgan.choice.race` has the rules."""
        begin = account.clock()
        devices = [device] if device.type == "cuda" else []
        with torch.random.fork_rng(devices, enabled=True):
            while not self.settled and self._affords(account, begin):
                name = self._next()
                took = _seconds(self.ways[name], arguments, device)
                if name in self.first:
                    self.best[name] = min(self.best.get(name, took), took)
                    self.samples[name] += 1
                else:
                    self.first[name] = took
                self.settled = self._over()

    def _over(self) -> bool:
        if len(self.best) < len(self.ways):
            return False
        alive = self._alive()
        short = min(self.best.values()) < FIRST_CALL  # 50 us are lost in the noise of one look at the clock
        rounds = min(self.samples[name] for name in alive)
        if len(alive) == 1 or rounds >= (4 * ROUNDS if short else ROUNDS):
            return True
        low, second = sorted(map(self._seconds, alive))[:2]
        # one round may be a noisy moment of the winner's rival
        return second > CLEAR * low and rounds > (ROUNDS if short else 1)


def _bfloat16(arguments: Sequence[Any]) -> bool:
    lowered = torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16
    return lowered or any(isinstance(a, Tensor) and a.dtype == torch.bfloat16 for a in arguments)


def _seconds(run: Run, arguments: Sequence[Any], device: torch.device) -> float:
    """One forward and, where gradients are recorded, one backward pass; the arguments are left as they are."""
    copies = [a.detach().clone().requires_grad_(a.requires_grad) if isinstance(a, Tensor) else a for a in arguments]
    leaves = [a for a in copies if isinstance(a, Tensor) and a.requires_grad]
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = STATE.account.clock()
    outputs = [y for y in torch.utils._pytree.tree_leaves(run(*copies)) if isinstance(y, Tensor) and y.requires_grad]
    if leaves and outputs:
        # as training does, into the copies alone; autograd.grad costs our nodes an exception of 8 us a leaf
        torch.autograd.backward(outputs, [torch.ones_like(y) for y in outputs], inputs=leaves)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return STATE.account.clock() - start
