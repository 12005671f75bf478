"""conv2d_weight: the weight gradients of DCGAN-64's layers (the generator's g2 to g5 mirror d4 to d1).

torch.compile has no row: the op is one call into ATen, which there is nothing to fuse with.
"""

import pytest
import torch
from layers import BATCH, D_LAYERS, DTYPES, G_LAYERS, KERNEL, forced, noise

from fastgan.benchmarking.comparison import Case, Runner
from fastgan.ops import conv2d_weight

ROWS = ("eager", "eager-channels_last", "fastgan", "fastgan-channels_last", "fastgan-native-channels_last")
# the adjoint's roles: a transposed layer's weight gradient is that of the convolution from its output to its input
SIZES = {v.name: (v.channels, v.size, v.filters, v.out, v.stride, v.padding) for v in D_LAYERS}
SIZES |= {v.name: (v.filters, v.out, v.channels, v.size, v.stride, v.padding) for v in G_LAYERS if v.name == "g1"}
LAYERS = {f"{name}-{c}x{h}x{h}-to-{k}x{o}x{o}": (c, h, k, o, s, p) for name, (c, h, k, o, s, p) in SIZES.items()}
CASES = [Case("conv2d_weight", shape, "forward", dtype) for shape in LAYERS for dtype in DTYPES]


def runners(case):
    c, h, k, o, s, p = LAYERS[case.shape]
    x = noise(BATCH, c, h, h, dtype=case.torch_dtype)
    dy = noise(BATCH, k, o, o, dtype=case.torch_dtype)
    geometry = [s, s], [p, p], [1, 1], 1
    work = [conv2d_weight.cost(x, dy, KERNEL, 1)]

    def operands(layout):
        return [t.contiguous(memory_format=layout) for t in (x, dy)]

    nchw, nhwc = operands(torch.contiguous_format), operands(torch.channels_last)
    weight = x.new_empty(k, c, *KERNEL)
    weights = {id(nchw): weight, id(nhwc): weight.contiguous(memory_format=torch.channels_last)}

    def plain(tensors):
        x, dy = tensors
        weight = weights[id(tensors)]  # ATen takes its shape and layout from it
        s, p, d, g = geometry
        return lambda: torch.ops.aten.convolution_backward(
            dy, x, weight, None, s, p, d, False, [0, 0], g, [False, True, False]
        )

    def ours(tensors):
        return lambda: conv2d_weight.op(*tensors, list(KERNEL), *geometry, tensors is nhwc)

    return {
        "eager": Runner(plain(nchw), work, case.dtype),
        "eager-channels_last": Runner(plain(nhwc), work, case.dtype),
        "fastgan": Runner(ours(nchw), work, case.dtype, ours=True),
        "fastgan-channels_last": Runner(ours(nhwc), work, case.dtype, ours=True),
        "fastgan-native-channels_last": Runner(forced(ours(nhwc)), work, case.dtype, ours=True),
    }


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_conv2d_weight(case, row, compare):
    compare(case, row, runners)
