"""Ours or plain PyTorch, judged whole: a part of a model, forward and backward, on clones of its own inputs.

Ops race singly (`fastgan.backends`); a part may lose what its ops have won, by a layout that is converted at each of
them or by Python's time between them. So plain PyTorch is among a part's candidates, and the winner is remembered on
disk as theirs are.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastgan.choice import forced, remember, remembered

Run = Callable[..., Any]
SECONDS = 1.0  # after which a race ends; a part is run twice at least
CLEAR = 1.25  # a ratio that ends it at once


def ours_is_faster(case: tuple, ours: Run, plain: Run, arguments: Sequence[Any]) -> bool:
    """Whether `ours` beats `plain` on these arguments; True where racing is off or a backend is forced."""
    backend, racing = forced()
    device = next((a.device for a in arguments if isinstance(a, Tensor)), torch.device("cpu"))
    if backend != "auto" or not racing or (device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
        return True
    known = remembered(case)
    if known is None:
        known = "config ours" if _race(ours, plain, arguments, device) else "config plain"
        remember(case, known)
    return known == "config ours"


def _race(ours: Run, plain: Run, arguments: Sequence[Any], device: torch.device) -> bool:
    best = dict.fromkeys((ours, plain), float("inf"))
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices, enabled=True):
        for run in best:
            _seconds(run, arguments, device)  # the ops' own races, and the first touch of memory
        begin = time.perf_counter()
        for _ in range(5):
            for run in best:
                best[run] = min(best[run], _seconds(run, arguments, device))
            low, high = sorted(best.values())
            if high > CLEAR * low or time.perf_counter() - begin > SECONDS:
                break
    return best[ours] <= best[plain]


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
