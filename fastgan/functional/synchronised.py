"""Batch norm over the batches of several processes, exact to second order.

It is a composition. `moments` are the batch statistics of all ranks, and their derivatives hold the collectives. The op
`bn_act` with fixed statistics does the rest, on each rank by itself.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastgan import _ranks
from fastgan._layout import accumulation_dtype, per_channel
from fastgan.ops import bn_act as _bn_act


class _Moments(torch.autograd.Function):
    """(mean, var, number) of all ranks' x, from this rank's mean and var [G, C]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mean: Tensor, var: Tensor, sync: _ranks.Sync) -> tuple[Tensor, Tensor, Tensor]:
        ctx.sync = sync
        mean, var, count = _ranks.merged(mean, var, x.numel() // max(mean.numel(), 1), sync)
        ctx.mark_non_differentiable(count)
        ctx.save_for_backward(x, mean, count)
        return mean, var, count

    @staticmethod
    def backward(ctx: Any, dmean: Tensor, dvar: Tensor, _dcount: Tensor) -> tuple[Tensor | None, ...]:
        # The mean that was saved is this node's own output: a second derivative goes through it.
        x, mean, count = ctx.saved_tensors
        a, b = (_ranks.summed(torch.stack([dmean, 2 * dvar]), ctx.sync) / count).unbind()
        centred = _bn_act.grouped(x, len(mean)).to(mean.dtype) - per_channel(mean, x)
        dx = torch.addcmul(per_channel(a, x), per_channel(b, x), centred)
        return dx.flatten(0, 1).to(x.dtype), None, None, None


def moments(x: Tensor, mean: Tensor, var: Tensor, sync: _ranks.Sync) -> tuple[Tensor, Tensor, Tensor]:
    """The batch statistics over all ranks, differentiable twice in x.

    Args:
        x: [N, C, *], this rank's batch in G groups.
        mean, var: [G, C] of it, var biased.
        sync: which ranks take part.

    Returns:
        mean, var: [G, C] of all ranks' values. count: how many values each is made of, 0-dim.
    """
    found: tuple[Tensor, Tensor, Tensor] = _Moments.apply(x, mean.detach(), var.detach(), sync)
    return found


def normalise(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, var: Tensor, eps: float, *act: Any
) -> Tensor:
    """phi(weight (x - mean) (var + eps)^(-1/2) + bias), differentiable twice, also in mean and var [G, C].

    The op takes the statistics as constants mean_c and var_c. Its weight w and bias b make up for what constants leave
    out: w = weight r / r_c and b = bias - (mean - mean_c) r_c w, with r = (var + eps)^(-1/2). The values of w and b are
    weight and bias, so nothing is rounded anew. Their derivatives are those of the formula above for any constants.
    """
    dtype = accumulation_dtype(x.dtype)
    fixed_mean, fixed_var = mean.detach(), var.detach()
    gain = ((var + eps) / (fixed_var + eps)).rsqrt()
    gain = gain if weight is None else gain * weight.to(dtype)
    shift = (fixed_mean - mean) * (fixed_var + eps).rsqrt() * gain
    shift = shift if bias is None else shift + bias.to(dtype)
    parts = [
        _bn_act.op(part, gain[g], shift[g], fixed_mean[g], fixed_var[g], False, eps, *act, 1)[0]
        for g, part in enumerate(x.chunk(len(mean)))
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts)
