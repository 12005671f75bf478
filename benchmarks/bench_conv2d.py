"""conv2d: the five layers of DCGAN-64's discriminator; two of them forward alone as well."""

import pytest
import torch.nn.functional as F
from layers import BATCH, D_LAYERS, KERNEL, ROWS, cases, noise, rows

import fastgan
from fastgan.benchmarking.textbook import ACTIVATIONS, SLOPE
from fastgan.ops import conv2d, conv2d_weight, conv_transpose2d

LAYERS = {f"{v.name}-{v.channels}x{v.size}x{v.size}-to-{v.filters}x{v.out}x{v.out}-{v.activation}": v for v in D_LAYERS}
CASES = cases("conv2d", LAYERS, forward_too=("d1", "d2"))


def runners(case):
    v = LAYERS[case.shape]
    x = noise(BATCH, v.channels, v.size, v.size, dtype=case.torch_dtype)
    weight = noise(v.filters, v.channels, *KERNEL, dtype=case.torch_dtype, scale=0.02)
    bias = [] if v.activation == "identity" else [noise(v.filters, dtype=case.torch_dtype)]  # before batch norm: none
    stride, padding, ones = [v.stride] * 2, [v.padding] * 2, [1, 1]
    act = ACTIVATIONS[v.activation]

    def plain(x, weight, bias=None):
        return act(F.conv2d(x, weight, bias, v.stride, v.padding))

    def ours(x, weight, bias=None):
        return fastgan.functional.conv2d(
            x, weight, bias, v.stride, v.padding, activation=v.activation, negative_slope=SLOPE
        )

    work = [conv2d.cost(x, weight, stride, padding, ones)]
    if case.direction != "forward":
        dy = x.new_empty(conv2d.output_shape(x, weight, stride, padding, ones))
        extra = conv2d.input_padding(x.shape, dy.shape, weight.shape, stride, padding, ones)
        work += [
            conv_transpose2d.cost(dy, weight, stride, padding, extra, 1, ones),
            conv2d_weight.cost(x, dy, KERNEL, 1),
        ]
    return rows(plain, ours, [x, weight, *bias], case, work)


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_conv2d(case, row, compare):
    compare(case, row, runners)
