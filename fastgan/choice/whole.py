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
    """The name of the way that is fastest on these arguments; the first one where racing is off or a backend forced.

    plain: the ways that are PyTorch's own. They do not run where the CPU lacks the instructions for their products. A
    race that the account cannot pay for leaves the first way, for as long as the caller keeps the answer.
    """
    first = next(iter(ways))
    backend, racing = forced()
    device = next((a.device for a in arguments if isinstance(a, Tensor)), torch.device("cpu"))
    if backend != "auto" or not racing or (device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
        return first
    if device.type == "cpu" and _bfloat16(arguments) and not torch_multiplies_bfloat16():
        ways = {name: run for name, run in ways.items() if name not in plain}
    known = (remembered(case) or "").removeprefix("config ")
    if known in ways or len(ways) == 1:
        return known if known in ways else first
    with STATE.account.paying():
        winner, settled = _race(ways, arguments, device, STATE.account)
    if settled:
        remember(case, f"config {winner}")
    return winner


def _bfloat16(arguments: Sequence[Any]) -> bool:
    lowered = torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16
    return lowered or any(isinstance(a, Tensor) and a.dtype == torch.bfloat16 for a in arguments)


def _race(ways: dict[str, Run], arguments: Sequence[Any], device: torch.device, account: Account) -> tuple[str, bool]:
    """(the winner, whether that is settled); `fastgan.choice.race` has the rules."""
    begin = account.clock()
    left = lambda: account.balance - (account.clock() - begin)
    ours, seconds = next(iter(ways)), dict[str, float]()
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices, enabled=True):
        for name, run in ways.items():  # the ops' own races, and the first touch of memory
            if left() < BEHIND * min(seconds.values(), default=0.0):
                return ours, False
            seconds[name] = _seconds(run, arguments, device)
        alive = [name for name in ways if seconds[name] < max(BEHIND * min(seconds.values()), FIRST_CALL)]
        best = dict.fromkeys(alive, float("inf"))
        short = min(seconds.values()) < FIRST_CALL  # 50 us are lost in the noise of one look at the clock
        for turn in range(0 if len(alive) == 1 else 4 * ROUNDS if short else ROUNDS):
            if left() < sum(seconds[name] for name in alive):
                break
            for name in alive:
                best[name] = min(best[name], _seconds(ways[name], arguments, device))
            low, second = sorted(best.values())[:2]
            # one round may be a noisy moment of the winner's rival
            if turn > (ROUNDS if short else 0) and second > CLEAR * low:
                break
    if len(alive) > 1 and best[ours if ours in best else alive[0]] == float("inf"):
        return ours, False
    return min(best, key=best.__getitem__), True


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
