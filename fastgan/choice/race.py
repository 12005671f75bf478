"""The race: backends that passed their proof, timed in turns on random data of the case."""

from __future__ import annotations

import time

import torch

from fastgan.choice.proof import prove
from fastgan.choice.routine import Routine
from fastgan.choice.state import State


def race(state: State, op: Routine, args: tuple, able: list[str]) -> str:
    """Prove each backend against the reference on random data of this case, then time the survivors in turns."""
    case, args = args, op.drawn(args)
    able = [name for name in able if name == "reference" or prove(state, op, name, case, args)]
    best = dict.fromkeys(able, float("inf"))
    begin = time.perf_counter()
    for _ in range(5):  # interleaved, so that a noisy moment hits every runner
        for name in able:
            best[name] = min(best[name], _seconds(op, name, args))
        if time.perf_counter() - begin > 0.5:
            break
    return min(able, key=best.__getitem__)


def _seconds(op: Routine, name: str, args: tuple) -> float:
    cuda = op.first(args).device.type == "cuda"
    if cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    op.backends[name].run(*args)
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start
