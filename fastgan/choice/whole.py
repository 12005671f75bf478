"""Parts of a model judged whole: ours in its ways, or plain PyTorch.

A part runs forward and backward on clones of its own inputs. Ops race singly; a part may lose what its ops have won, by
a layout that is converted at each of them or by Python's time between them. So plain PyTorch is among a part's
candidates, and the winner is remembered on disk as theirs are.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastgan.choice.choosing import remember, remembered
from fastgan.choice.forcing import forced

Run = Callable[..., Any]
SECONDS = 1.0  # after which a race ends; a part is run twice at least
CLEAR = 1.25  # a ratio that ends it at once


def fastest(case: tuple, ways: dict[str, Run], arguments: Sequence[Any]) -> str:
    """The name of the way that is fastest on these arguments; the first one where racing is off or a backend forced."""
    first = next(iter(ways))
    backend, racing = forced()
    device = next((a.device for a in arguments if isinstance(a, Tensor)), torch.device("cpu"))
    if backend != "auto" or not racing or (device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
        return first
    known = (remembered(case) or "").removeprefix("config ")
    if known not in ways:
        known = _race(ways, arguments, device)
        remember(case, f"config {known}")
    return known


def _race(ways: dict[str, Run], arguments: Sequence[Any], device: torch.device) -> str:
    best = dict.fromkeys(ways, float("inf"))
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices, enabled=True):
        for run in ways.values():
            _seconds(run, arguments, device)  # the ops' own races, and the first touch of memory
        begin = time.perf_counter()
        for _ in range(5):
            for name, run in ways.items():
                best[name] = min(best[name], _seconds(run, arguments, device))
            low, second = sorted(best.values())[:2]
            if second > CLEAR * low or time.perf_counter() - begin > SECONDS:
                break
    return min(best, key=best.__getitem__)


def _seconds(run: Run, arguments: Sequence[Any], device: torch.device) -> float:
    """One forward and, where gradients are recorded, one backward pass; the arguments are left as they are."""
    copies = [a.detach().clone().requires_grad_(a.requires_grad) if isinstance(a, Tensor) else a for a in arguments]
    leaves = [a for a in copies if isinstance(a, Tensor) and a.requires_grad]
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    outputs = [y for y in torch.utils._pytree.tree_leaves(run(*copies)) if isinstance(y, Tensor) and y.requires_grad]
    if leaves and outputs:
        torch.autograd.grad(outputs, leaves, [torch.ones_like(y) for y in outputs], allow_unused=True)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start
