"""bias_act: the activations that follow no convolution of ours, at two sizes of DCGAN-64."""

import pytest
import torch
import torch.nn.functional as F
from layers import BATCH, DIRECTIONS, DTYPES, ROWS, noise, rows

import fastgan
from fastgan.benchmarking.comparison import Case
from fastgan.benchmarking.textbook import SLOPE
from fastgan.ops import bias_act

SHAPES = {"64x32x32-leaky_relu": (64, 32, "leaky_relu"), "3x64x64-tanh": (3, 64, "tanh")}
CASES = [Case("bias_act", shape, direction, dtype) for shape in SHAPES for direction in DIRECTIONS for dtype in DTYPES]
ACTIVATIONS = {"leaky_relu": lambda t: F.leaky_relu_(t, SLOPE), "tanh": torch.tanh_}


def runners(case):
    channels, size, activation = SHAPES[case.shape]
    x, bias = noise(BATCH, channels, size, size, dtype=case.torch_dtype), noise(channels, dtype=case.torch_dtype)
    act = ACTIVATIONS[activation]

    def plain(x, bias):
        return act(x + bias.view(1, -1, 1, 1))

    def ours(x, bias):
        return fastgan.functional.bias_act(x, bias, activation=activation, negative_slope=SLOPE)

    work = [bias_act.cost(x)]
    if case.direction != "forward":  # the card: dy and y are read, dx is written, dbias on the way
        work += [{"bytes": 3 * x.numel() * x.element_size(), "flops": 2 * x.numel()}]
    return rows(plain, ours, [x, bias], case, work)


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_bias_act(case, row, compare):
    compare(case, row, runners)
