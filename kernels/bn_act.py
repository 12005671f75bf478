"""Triton launchers of `bn_act` and its derivatives: `normalisation` with norm groups of one channel."""

from __future__ import annotations

import torch

from fastgan.choice import Backend
from fastgan.kernels import normalisation
from fastgan.kernels.launching import declines
from fastgan.kernels.normalisation import plan
from fastgan.ops.bn_act import computed


def _forward(x, weight, bias, running_mean, running_var, training, eps, activation, slope, groups):
    statistics, given = None, training and running_mean is not None
    if given:
        statistics = tuple(s.to(torch.float32).contiguous() for s in (running_mean, running_var))
    elif not training:
        statistics = tuple(
            s.to(torch.float32, copy=True).contiguous().unsqueeze(0) for s in (running_mean, running_var)
        )
    case = plan(x, groups if training else 1, 1, may_be_resident=statistics is None)
    y, mean, var = normalisation.forward(case, x, weight, bias, eps, activation, slope, statistics)
    return y, *computed(mean, var, training, running_mean)


def _backward(dy, x, weight, bias, mean, var, training, eps, activation, slope):
    case = plan(x, len(mean), 1)
    return normalisation.backward(case, dy, x, weight, bias, mean, var, training, eps, activation, slope)


def _double_backward(dy, ddx, ddweight, ddbias, x, weight, bias, mean, var, training, eps, activation, slope):
    return normalisation.double_backward(
        plan(x, len(mean), 1), dy, ddx, ddweight, ddbias, x, weight, bias, mean, var, training, eps, activation, slope
    )


LAUNCHERS = {
    "bn_act": Backend(_forward, lambda x, *rest: declines(x)),
    "bn_act_backward": Backend(_backward, lambda dy, x, *rest: declines(x, dy)),
    "bn_act_double_backward": Backend(
        _double_backward, lambda dy, ddx, ddweight, ddbias, x, *rest: declines(x, dy, ddx)
    ),
}
