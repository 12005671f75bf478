"""Parts of a model judged whole: ours in its ways, or plain PyTorch.

Ops race singly; a part may lose what its ops have won, by a layout that is converted at each of them or by Python's
time between them. So plain PyTorch is among a part's candidates, and the winner is remembered on disk as theirs are. A
race may take several calls.

In a loop of the user's own on a CPU a traced part races on the user's calls: they take turns among the ways, and cost
no more than the ways do. Else it runs forward and backward on clones of its inputs. In a run, which must give equal
bits for equal seeds and caches, the answer of the first call stands, a checkpoint carries it, and a winner that is
found later counts from the next run on. So it stands where hooks take what autograd saves, as torch.utils.checkpoint's.
"""

from __future__ import annotations

import bisect
import functools
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from fastgan.choice.budget import Account, unlimited
from fastgan.choice.calls import clocked, is_repacked, unpacked
from fastgan.choice.choosing import keep_to, remember_fact, remembered
from fastgan.choice.forcing import forced
from fastgan.choice.hardware import torch_multiplies_bfloat16
from fastgan.choice.race import BEHIND, CLEAR, ROUNDS
from fastgan.choice.state import STATE

Run = Callable[..., Any]
PATIENCE = 8  # calls whose backward passes have not come: a generator's for its discriminator alone never come
# A way's best time over the best of all, above which it is cut off after 0, 1, 2, ... runs. A quiet machine's runs lie
# within CLEAR of each other; two of three in a busy moment are rare.
ALLOWED = (float("inf"), float("inf"), BEHIND, 1.5, 1.3, CLEAR)
SHORT = 10e-3  # seconds; below them four times as many runs are compared: 50 us are lost in the noise of a few


def fastest(contest: Contest, arguments: Sequence[Any], sketched: Callable[[], dict[str, Any]]) -> str:
    """The name of the way that is fastest on these arguments, by a `Contest` that this call must pay for.

    A race that the account cannot pay for leaves the best way so far, for the whole run; `sketched()` goes into the
    list of open cases, from which `settle` races it at the run's end or in another process.
    """
    way = contest(arguments)
    if not contest.clear:
        keep_to(contest.case, f"config {way}", sketched())
    return way


def finished(make: Callable[[], tuple[Contest, Sequence[Any]]]) -> str | None:
    """The winner of a race that nobody waits for, "config ...", or None where the machine is too noisy to tell."""
    for _ in range(3):  # a noisy moment passes
        contest, arguments = make()
        contest.finish(arguments)
        if contest.clear:
            return f"config {contest.winner}"
    return None


class Contest:
    """A race of whole parts that may take several calls: each goes on as far as the account allows.

    case: what the winner is remembered by. ways: name -> what runs; the first is taken until others are known. plain:
    the ways that are PyTorch's own; they do not run where the CPU lacks the instructions for their products. overhead:
    seconds that every other way costs beside its run; None: not known yet, and nothing is decided until it is set.
    on_calls: whether the user's own calls are runs of the race, by `watched`.
    """

    def __init__(
        self,
        case: tuple,
        ways: dict[str, Run],
        plain: Collection[str] = ("plain",),
        overhead: float | None = 0.0,
        on_calls: bool = False,
    ):
        self.case, self.ways, self.plain, self.overhead, self.on_calls = case, ways, plain, overhead, on_calls
        self.settled = False  # whether the answer stands; else it is asked for again
        self.known = False  # whether it stands without a race: remembered, alone, or racing is off
        self.standing = ""  # the answer for the run that goes on
        self.begun, self.watching = False, False  # watching: the call that follows is one of the race
        self.latest = list(ways)  # the way of the user's last call first
        self.awaited: Counter[str] = Counter()  # the user's calls whose seconds are not known yet
        self.first: dict[str, float] = {}  # seconds of first runs, which decide nothing: the ops' own races are in them
        self.samples: dict[str, list[float]] = {name: [] for name in ways}  # further runs, ascending

    def __call__(self, arguments: Sequence[Any]) -> str:
        """The way that these arguments take now; the first one where racing is off or a backend forced.

        Where `watching` is true then, the call that follows is one of the race: it goes through `watched`.
        """
        first = next(iter(self.ways))
        backend, racing = forced()
        device = next((a.device for a in arguments if isinstance(a, Tensor)), torch.device("cpu"))
        if backend != "auto" or not racing:
            self.settled = self.known = True
            return first
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return first
        if not self.begun:
            self.begun = True
            self._leave_out(arguments, device)
            known = (remembered(self.case) or "").removeprefix("config ")
            if known in self.ways:
                self.ways = {known: self.ways[known]}
            self.settled = self.known = len(self.ways) == 1
            if self.known:
                return next(iter(self.ways))
        self.watching = self._watches(device)
        if self.watching:
            return self._next()
        account = STATE.account
        if not self.settled and self.overhead is not None and self._affords(account, account.clock()):
            with account.paying():
                self._advance(arguments, device, account)
        if self.settled and self.clear:
            remember_fact(self.case, self.winner)
        return self._answer()

    def _watches(self, device: torch.device) -> bool:
        """Whether the user's next call is one of the race: not where an answer stands, on a GPU, or after many that
        had no whole backward pass."""
        waiting = sum(self.awaited.values()) >= PATIENCE
        stands = STATE.in_run or is_repacked()
        return self.on_calls and not (self.settled or stands or waiting or device.type != "cpu")

    def watched(self, name: str, arguments: Sequence[Any]) -> Any:
        """The user's call by this way, its seconds noted."""
        self.awaited[name] += 1
        self.latest.remove(name)
        self.latest.insert(0, name)
        return clocked(self.ways[name], arguments, functools.partial(self._answered, name))

    def _answered(self, name: str, took: float) -> None:
        self.awaited[name] -= 1
        if not self.settled:
            self._note(name, took)

    def _note(self, name: str, took: float) -> None:
        if name in self.first:
            bisect.insort(self.samples[name], took)
        else:
            self.first[name] = took
        self.settled = self.overhead is not None and self._over()

    def _answer(self) -> str:
        """The way for this call, noted for checkpoints where it stands."""
        stood = self.standing
        if not stood and (STATE.in_run or is_repacked()):
            self.standing = self.winner
        answer = self.standing or self.winner
        if self.settled or self.standing != stood:
            keep_to(self.case, f"config {answer}")
        return answer

    def finish(self, arguments: Sequence[Any]) -> None:
        """Race to the end, whatever it takes; nothing is remembered."""
        device = arguments[0].device
        self._leave_out(arguments, device)
        self.settled = self.known = len(self.ways) == 1
        self._advance(arguments, device, unlimited())

    @property
    def winner(self) -> str:
        """The fastest way so far."""
        raced = self._raced()
        return min(raced, key=self._seconds) if len(raced) == len(self.ways) else next(iter(self.ways))

    @property
    def clear(self) -> bool:
        """Whether nothing is left to race: the answer was known, or the race is over and was not taken under load."""
        return self.known or (self.settled and (self._spread() <= CLEAR or self._ahead() >= self._spread()))

    def _leave_out(self, arguments: Sequence[Any], device: torch.device) -> None:
        """Drop PyTorch's ways where the CPU lacks the instructions for their products."""
        if device.type == "cpu" and _bfloat16(arguments) and not torch_multiplies_bfloat16():
            self.ways = {name: run for name, run in self.ways.items() if name not in self.plain}

    def _raced(self) -> list[str]:
        return [name for name in self.ways if self.samples[name]]

    def _seconds(self, name: str) -> float:
        return self.samples[name][0] + (0.0 if name in self.plain else self.overhead or 0.0)

    def _ahead(self) -> float:
        """The second best time over the best."""
        best, *rest = sorted(map(self._seconds, self._raced()))
        return rest[0] / best if rest else 1.0

    def _spread(self) -> float:
        """How far the two best runs of a way lie apart, at worst: 1 on a quiet machine."""
        return max(s[1] / s[0] for s in self.samples.values() if len(s) > 1)

    def _alive(self) -> list[str]:
        """The ways that are not behind; one run alone may have met a busy moment, which costs up to 100 times."""
        best = min(map(self._seconds, self._raced()), default=float("inf"))
        return [name for name in self.ways if not self.samples[name] or self._seconds(name) <= self._limit(name) * best]

    def _limit(self, name: str) -> float:
        """How far behind a way may be and go on, by the runs that it had: each loser's run costs its user time."""
        return ALLOWED[min(len(self.samples[name]), len(ALLOWED) - 1)]

    def _next(self) -> str:
        """The way that runs next, forth and back.

        A step may call twice, D(real) and D(fake), and the second backward pass also adds up their gradients: no way
        shall have all the first calls.
        """
        runs = lambda name: (name in self.first) + len(self.samples[name]) + self.awaited[name]
        return min(sorted(self._alive(), key=self.latest.index), key=runs)

    def _affords(self, account: Account, begin: float) -> bool:
        """Whether the account has what the next run is expected to take; a full one pays for a run of any length."""
        quickest = BEHIND * min(self.first.values(), default=0.0)
        expected = min(self.samples[self._next()], default=quickest)
        return account.balance - (account.clock() - begin) >= min(expected, account.held)

    def _advance(self, arguments: Sequence[Any], device: torch.device, account: Account) -> None:
        """Run as many samples as the account allows; `fastgan.choice.race` has the rules."""
        begin = account.clock()
        devices = [device] if device.type == "cuda" else []
        with torch.random.fork_rng(devices, enabled=True), unpacked():
            while not self.settled and self._affords(account, begin):
                name = self._next()
                self._note(name, _seconds(self.ways[name], arguments, device))

    def _over(self) -> bool:
        alive = self._alive()
        rounds = min(len(self.samples[name]) for name in alive)
        if rounds < 2:
            return False
        short = min(map(self._seconds, alive)) < SHORT
        least, most = (ROUNDS, 4 * ROUNDS) if short else (2, ROUNDS)
        clear = len(alive) == 1 or self._ahead() > CLEAR
        return rounds >= most or (rounds >= least and clear and self._spread() < CLEAR)


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
