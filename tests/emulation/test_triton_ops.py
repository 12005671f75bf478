"""Every op on its Triton kernels, under the checker: values, first and second derivatives against float64 PyTorch.

What the kernels decline runs on the reference, as on a GPU; each case says which ops must have run on Triton.
"""

# ruff: noqa: E402 (without Triton this file is skipped before it imports it)

import pytest
import torch

pytest.importorskip("triton", "3.8", reason="triton 3.8 or newer is needed to emulate Triton kernels")
import torch.nn.functional as F
from checks import LAYOUTS, against_plain

from fastgan import functional, testing
from fastgan.backends import watching

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
PHI = {
    None: lambda t: t * 1,
    "relu": torch.relu,
    "leaky_relu": lambda t: F.leaky_relu(t, 0.2),
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
}


def noise(*shape):
    return torch.randn(shape, dtype=torch.float64)


def affine(shape):
    x = noise(*shape) * 2 + 3
    return x, torch.rand(shape[1], dtype=torch.float64) + 0.5, noise(shape[1])


def emulated(ours, plain, inputs, dtype, layout, ops):
    """ours equals plain to second order on emulated Triton kernels, and `ops` ran there."""
    ran = set()
    with testing.emulate("triton") as record, watching(lambda op, name, why: ran.add((op.name, name))):
        got = against_plain(ours, plain, inputs, dtype, layout, "triton")
    assert {(op, "triton") for op in ops} <= ran, ran
    assert record.launches
    return got, record


# ---- bias_act --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS, ids=["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", PHI)
def test_bias_act(activation, dtype, layout):
    ours = lambda x, b: functional.bias_act(x, b, activation=activation)
    plain = lambda x, b: PHI[activation](x + b.view(1, -1, 1, 1))
    ops = ["bias_act"] + ["bias_act_backward"] * (activation is not None)
    emulated(ours, plain, (noise(3, 5, 6, 7), noise(5)), dtype, layout, ops)


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 70, 5, 5), (65, 3), (2, 3, 33), (1, 3, 2, 3, 5)], ids=str)
def test_bias_act_shapes(shape):
    ours = lambda x, b: functional.bias_act(x, b, activation="tanh")
    plain = lambda x, b: torch.tanh(x + b.view(1, -1, *(1,) * (x.dim() - 2)))
    emulated(ours, plain, (noise(*shape), noise(shape[1])), torch.float32, LAYOUTS[0], ["bias_act"])
