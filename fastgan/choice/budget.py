"""The account that proofs, races and traces are paid from, and what a call is expected to cost.

The rule. The account starts with HELD seconds, holds no more than that, and regains RATE seconds in each second of the
clock. A proof or a race begins only where its expected time is on the account, and pays what it took. Dynamo's trace of
a forward (`fastgan.trace`) asks nobody; it pays afterwards, so that the races behind it wait.

What follows. A step that takes `own` seconds beside proofs and races spends at most HELD + RATE (own + spent) on them,
so it takes at most (own + HELD) / (1 - RATE) = 1.33 own + 1.33 seconds. `own` is not more than PyTorch's warm step and
its first touches (imports, memory; under 0.5 s), so a step that must choose stays below 1.5 times PyTorch's warm step
plus 2 seconds. The account need not know that step: it regains by the clock, whatever runs.

What a call is expected to cost. `bound` is the time of a perfect kernel at stated ceilings. The slowest call so far of
the same (op, backend, dtype), measured in bounds, tells what the next one costs; calls below SHORT tell nothing. Before
the first of them UNKNOWN bounds are assumed, and a product of many samples is first tried on one of them where PyTorch
runs it (`race`).
"""

from __future__ import annotations

import contextlib
import inspect
import sys
import time
from collections.abc import Callable, Iterator

import torch

from fastgan.choice.routine import Routine, tensors

HELD = 1.0  # seconds
RATE = 0.25  # seconds a second
UNKNOWN = 60.0  # bounds: an assumption; one multiply-add a cycle takes 16 of CPU_FLOPS
# A second and thread: 32 multiply-adds a cycle at 3 GHz, as AVX-512 gives; and bytes a second of two memory channels.
CPU_FLOPS, CPU_BYTES = 1e11, 2e10
GPU_FLOPS, GPU_BYTES = 1e14, 1e12
SHORT = 5e-3  # seconds; a first call builds its primitive and touches its memory in up to 1 ms
CALL = 2e-6  # seconds: the least that a call takes


def cost_of(op: Routine, args: tuple) -> dict[str, int] | None:
    """{"bytes", "flops"} by the op's own cost(), or cost_statistics(), cost_backward() or cost_double_backward(); None
    where it has none."""
    stem, suffix = op.name, ""
    for ending in ("_double_backward", "_backward", "_statistics"):
        if op.name.endswith(ending):
            stem, suffix = op.name.removesuffix(ending), ending
            break
    cost = getattr(sys.modules.get(f"fastgan.ops.{stem}"), f"cost{suffix}", None)
    if cost is None:
        return None
    named = dict(zip(op.names, args, strict=True))
    found: dict[str, int] = cost(*(named[name] for name in inspect.signature(cost).parameters))
    return found


def bound(op: Routine, args: tuple) -> float:
    """Seconds of a perfect kernel at the stated ceilings; for an op without a cost(), of reading its tensors."""
    needed = cost_of(op, args)
    if needed is None:
        needed = {"bytes": sum(t.numel() * t.element_size() for t in tensors(args)), "flops": 0}
    if op.first(args).device.type == "cuda":
        return CALL + max(needed["flops"] / GPU_FLOPS, needed["bytes"] / GPU_BYTES)
    return CALL + max(needed["flops"] / (CPU_FLOPS * torch.get_num_threads()), needed["bytes"] / CPU_BYTES)


class Account:
    """Seconds for proofs and races; see the rule above."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter, held: float = HELD):
        self.clock, self.held, self._balance, self._seen = clock, held, held, clock()
        self.spent = 0.0
        self._slowest: dict[tuple, float] = {}  # (op, backend, dtype) -> its slowest call in bounds

    @property
    def balance(self) -> float:
        now = self.clock()
        self._balance = min(self.held, self._balance + RATE * (now - self._seen))
        self._seen = now
        return self._balance

    @contextlib.contextmanager
    def paying(self) -> Iterator[None]:
        """Within: what passes on the clock is taken from the account, once where something within pays for itself."""
        begin, paid = self.clock(), self.spent
        _ = self.balance
        try:
            yield
        finally:
            self.charge(self.clock() - begin - (self.spent - paid))

    def charge(self, seconds: float) -> None:
        """Take seconds that have passed from the account."""
        self._balance = self.balance - seconds
        self.spent += seconds

    def known(self, kind: tuple) -> bool:
        return kind in self._slowest

    def expected(self, kind: tuple, bound: float) -> float:
        """Seconds that a call of this kind is expected to take at most."""
        return bound * self._slowest.get(kind, UNKNOWN)

    def took(self, kind: tuple, bound: float, seconds: float) -> None:
        """Learn from a call, unless it is so short that its set-up may be most of it."""
        if seconds < SHORT:
            return
        self._slowest[kind] = max(self._slowest.get(kind, 0.0), seconds / bound)


def unlimited() -> Account:
    """For races that nobody waits for: at the end of a run, or asked for by name."""
    return Account(held=float("inf"))
