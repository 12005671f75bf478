"""Triton launchers of `gn_act` and its derivatives: `normalisation` with a statistic group a sample."""

from __future__ import annotations

from fastgan.choice import Backend
from fastgan.kernels import normalisation
from fastgan.kernels.launching import declines
from fastgan.kernels.normalisation import declines_plan, plan


def _plan(x, groups):
    return plan(x, x.shape[0], x.shape[1] // groups)


def _declines(groups, x, *rest):
    return declines(x, *rest) or declines_plan(_plan(x, groups))


def _forward(x, weight, bias, groups, eps, activation, slope):
    elementwise = activation != "identity"
    return normalisation.forward(_plan(x, groups), x, weight, bias, eps, activation, slope, elementwise=elementwise)


def _backward(dy, x, weight, bias, mean, var, eps, activation, slope):
    dx, dweight, dbias = normalisation.backward(
        _plan(x, mean.shape[1]), dy, x, weight, bias, mean, var, True, eps, activation, slope
    )
    return dx, *(g if p is not None else g.new_empty(0) for g, p in ((dweight, weight), (dbias, bias)))


def _double_backward(dy, ddx, ddweight, ddbias, x, weight, bias, mean, var, eps, activation, slope):
    d_dy, d_x, d_weight = normalisation.double_backward(
        _plan(x, mean.shape[1]), dy, ddx, ddweight, ddbias, x, weight, bias, mean, var, True, eps, activation, slope
    )
    return d_dy, d_x, d_weight if weight is not None else d_weight.new_empty(0)


LAUNCHERS = {
    "gn_act": Backend(_forward, lambda x, weight, bias, groups, *rest: _declines(groups, x)),
    "gn_act_backward": Backend(_backward, lambda dy, x, weight, bias, mean, *rest: _declines(mean.shape[1], x, dy)),
    "gn_act_double_backward": Backend(
        _double_backward,
        lambda dy, ddx, ddw, ddb, x, weight, bias, mean, *rest: _declines(mean.shape[1], x, dy, ddx),
    ),
}
