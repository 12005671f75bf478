"""conv_transpose2d: the five layers of DCGAN-64's generator; two of them forward alone as well."""

import pytest
import torch.nn.functional as F
from layers import BATCH, G_LAYERS, KERNEL, ROWS, cases, noise, rows

import fastgan
from fastgan.benchmarking.textbook import ACTIVATIONS, SLOPE
from fastgan.ops import conv2d, conv2d_weight, conv_transpose2d

LAYERS = {f"{v.name}-{v.channels}x{v.size}x{v.size}-to-{v.filters}x{v.out}x{v.out}-{v.activation}": v for v in G_LAYERS}
CASES = cases("conv_transpose2d", LAYERS, forward_too=("g4", "g5"))


def runners(case):
    v = LAYERS[case.shape]
    x = noise(BATCH, v.channels, v.size, v.size, dtype=case.torch_dtype)
    weight = noise(v.channels, v.filters, *KERNEL, dtype=case.torch_dtype, scale=0.02)
    bias = [] if v.activation == "identity" else [noise(v.filters, dtype=case.torch_dtype)]  # before batch norm: none
    stride, padding, zeros, ones = [v.stride] * 2, [v.padding] * 2, [0, 0], [1, 1]
    act = ACTIVATIONS[v.activation]

    def plain(x, weight, bias=None):
        return act(F.conv_transpose2d(x, weight, bias, v.stride, v.padding))

    def ours(x, weight, bias=None):
        return fastgan.functional.conv_transpose2d(
            x, weight, bias, v.stride, v.padding, activation=v.activation, negative_slope=SLOPE
        )

    work = [conv_transpose2d.cost(x, weight, stride, padding, zeros, 1, ones)]
    if case.direction != "forward":
        dy = x.new_empty(conv_transpose2d.output_shape(x, weight, stride, padding, zeros, 1, ones))
        work += [conv2d_weight.cost(dy, x, KERNEL, 1)]
        work += [] if v.first else [conv2d.cost(dy, weight, stride, padding, ones)]
    return rows(plain, ours, [x, weight, *bias], case, work, constant=1 if v.first else 0)


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_conv_transpose2d(case, row, compare):
    compare(case, row, runners)
