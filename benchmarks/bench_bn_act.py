"""bn_act: batch norm and activation as DCGAN-64 has them, training mode; two of them forward alone,
two in their double backward and one in all three passes."""

import pytest
import torch
import torch.nn.functional as F
from layers import BATCH, DOUBLE, DTYPES, ROWS, SECOND, cases, noise, rows

import fastgan
from fastgan.benchmarking.comparison import Case
from fastgan.benchmarking.textbook import ACTIVATIONS, SLOPE
from fastgan.ops import bn_act

SHAPES = {
    "512x4x4-relu": (512, 4, "relu"),
    "256x8x8-leaky_relu": (256, 8, "leaky_relu"),
    "128x16x16-leaky_relu": (128, 16, "leaky_relu"),
    "64x32x32-relu": (64, 32, "relu"),
}
CASES = cases("bn_act", SHAPES, forward_too=("512", "64x"))
CASES += [
    Case("bn_act", "128x16x16-leaky_relu", direction, dtype) for direction in (SECOND, DOUBLE) for dtype in DTYPES
]
CASES += [Case("bn_act", "256x8x8-leaky_relu", DOUBLE, dtype) for dtype in DTYPES]


def runners(case):
    channels, size, activation = SHAPES[case.shape]
    x = noise(BATCH, channels, size, size, dtype=case.torch_dtype)
    # parameters and statistics are float32 beside a bf16 x, as autocast and torch's batch norm have them
    weight, bias = 1 + noise(channels, scale=0.02), noise(channels, scale=0.02)
    # a kept graph does not stand that the next row's forward moves the statistics it saved; the forward is not timed
    mean, var = (None, None) if case.direction == DOUBLE else (torch.zeros(channels), torch.ones(channels))
    act = ACTIVATIONS[activation]

    def plain(x, weight, bias):
        return act(F.batch_norm(x, mean, var, weight, bias, training=True))

    def ours(x, weight, bias):
        return fastgan.functional.bn_act(
            x, mean, var, weight, bias, training=True, activation=activation, negative_slope=SLOPE
        )

    first, last = [bn_act.cost(x), bn_act.cost_backward(x)], bn_act.cost_double_backward(x)
    work = {"forward": first[:1], "forward+backward": first, SECOND: [*first, last], DOUBLE: [last]}[case.direction]
    return rows(plain, ours, [x, weight, bias], case, work)


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_bn_act(case, row, compare):
    compare(case, row, runners)
