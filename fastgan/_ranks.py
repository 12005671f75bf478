"""What the networks of several processes compute together: sums over the ranks that can be differentiated.

All ranks must reach each of these calls, in the same order. Networks that are alike do: their forward is the same code,
and autograd runs a graph's nodes in the reverse of their order.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# Of an option `sync`: False is this process alone, True are all processes, or a process group of torch.distributed.
Sync = Any


class LostRankError(RuntimeError):
    """Another rank ended, or cannot be reached."""


def size(sync: Sync) -> int:
    """How many processes take part; 1 where torch.distributed was not started."""
    if sync is False or not (dist.is_available() and dist.is_initialized()):
        return 1
    return dist.get_world_size(_group(sync))


def _group(sync: Sync) -> Any:
    return None if sync is True else sync


@contextlib.contextmanager
def together(size: int) -> Iterator[None]:
    """Within: what torch.distributed raises where a rank is gone says so."""
    try:
        yield
    except LostRankError:
        raise
    except RuntimeError as error:
        # gloo begins with its own source's place and ends with advice
        why = re.sub(r"^\[\S+\] ", "", " ".join(str(error).split())).partition(". ")[0][:120]
        raise LostRankError(
            f"distributed: all {size} ranks must reach every update, another one has ended or cannot be reached "
            f"({why}); its own message says why, and the run goes on from its newest checkpoint with --resume"
        ) from error


class _Sum(torch.autograd.Function):
    """The sum over the ranks. Each rank's loss counts, so the cotangent is the sum of the ranks' cotangents."""

    @staticmethod
    def forward(ctx: Any, t: Tensor, sync: Sync) -> Tensor:
        ctx.sync = sync
        total = t.clone(memory_format=torch.contiguous_format)
        with together(size(sync)):
            dist.all_reduce(total, group=_group(sync))
        return total

    @staticmethod
    def backward(ctx: Any, dt: Tensor) -> tuple[Tensor, None]:
        return summed(dt, ctx.sync), None


def summed(t: Tensor, sync: Sync) -> Tensor:
    """The sum of every rank's t, of one shape; differentiable as often as wanted."""
    total: Tensor = t if size(sync) == 1 else _Sum.apply(t, sync)
    return total


def pooled(t: Tensor, sync: Sync) -> Tensor:
    """Every rank's t [N, *] one after the other, [ranks N, *]; differentiable. For small t: it sends zeros too."""
    if size(sync) == 1:
        return t
    mine = dist.get_rank(_group(sync))
    return summed(torch.stack([t if k == mine else torch.zeros_like(t) for k in range(size(sync))]), sync).flatten(0, 1)


@torch.no_grad()
def merged(mean: Tensor, var: Tensor, count: int, sync: Sync) -> tuple[Tensor, Tensor, Tensor]:
    """The mean, biased variance and number of all ranks' values, from this rank's; 0 values are allowed.

    Chan's formula in float64, as sums of x^2 would lose a variance beside a large mean. One all_gather of 16 bytes a
    statistic; the same bits on every rank, as all add in the ranks' order.
    """
    if size(sync) == 1:
        return mean, var, mean.new_tensor(count)
    wide = torch.stack([mean, var]).double().nan_to_num()
    row = torch.cat([wide.flatten(), wide.new_tensor([count])])
    rows = row.new_empty(size(sync), len(row))
    with together(len(rows)):
        dist.all_gather(list(rows), row, group=_group(sync))
    counts = rows[:, -1].view(-1, *(1,) * mean.dim())
    means, variances = rows[:, :-1].unflatten(1, wide.shape).unbind(1)
    total = counts.sum()
    middle = (counts * means).sum(0) / total
    spread = (counts * (variances + (means - middle).square())).sum(0) / total
    return middle.to(mean.dtype), spread.to(var.dtype), total.to(mean.dtype)
