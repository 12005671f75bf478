"""bn_act: batch norm and activation as DCGAN-64 has them, training mode; two of them forward alone,
one to the second order."""

import pytest
import torch
import torch.nn.functional as F
from comparison import Case
from layers import BATCH, DTYPES, PLAIN_ACTIVATIONS, ROWS, SLOPE, cases, noise, rows

import fastgan
from fastgan.ops import bn_act

SHAPES = {
    "512x4x4-relu": (512, 4, "relu"),
    "256x8x8-leaky_relu": (256, 8, "leaky_relu"),
    "128x16x16-leaky_relu": (128, 16, "leaky_relu"),
    "64x32x32-relu": (64, 32, "relu"),
}
SECOND = "forward+double backward"
CASES = cases("bn_act", SHAPES, forward_too=("512", "64x"))
CASES += [Case("bn_act", "128x16x16-leaky_relu", SECOND, dtype) for dtype in DTYPES]


def runners(case):
    channels, size, activation = SHAPES[case.shape]
    x = noise(BATCH, channels, size, size, dtype=case.torch_dtype)
    # parameters and statistics are float32 beside a bf16 x, as autocast and torch's batch norm have them
    weight, bias = 1 + noise(channels, scale=0.02), noise(channels, scale=0.02)
    mean, var = torch.zeros(channels), torch.ones(channels)
    act = PLAIN_ACTIVATIONS[activation]

    def plain(x, weight, bias):
        return act(F.batch_norm(x, mean, var, weight, bias, training=True))

    def ours(x, weight, bias):
        return fastgan.functional.bn_act(
            x, mean, var, weight, bias, training=True, activation=activation, negative_slope=SLOPE
        )

    work = [bn_act.cost(x)]
    work += [] if case.direction == "forward" else [bn_act.cost_backward(x)]
    if case.direction == SECOND:  # the card: 7 accesses an element; two cotangents more than the backward's arithmetic
        work += [{"bytes": 7 * x.numel() * x.element_size(), "flops": 2 * bn_act.cost_backward(x)["flops"]}]
    return rows(plain, ours, [x, weight, bias], case, work)


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_bn_act(case, row, compare):
    compare(case, row, runners)
