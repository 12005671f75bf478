"""Every op on its Triton kernels, under the checker: values, first and second derivatives against float64 PyTorch.

What the kernels decline runs on the reference, as on a GPU; each case says which ops must have run on Triton.
"""

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


# ---- norms -----------------------------------------------------------------------------------------------------------

BN = ["bn_act", "bn_act_backward", "bn_act_double_backward"]
GN = ["gn_act", "gn_act_backward", "gn_act_double_backward"]
KINDS = [("leaky_relu", dtype) for dtype in DTYPES] + [(None, torch.float32), ("relu", torch.float32)]


@pytest.fixture(params=["resident", "streamed"])
def route(request, monkeypatch):
    """Both routes of the norm kernels, whatever the size of the tensor would choose."""
    from fastgan.kernels import launching, normalisation

    if request.param == "streamed":
        monkeypatch.setattr(normalisation, "RESIDENT", 1)
        monkeypatch.setattr(normalisation, "LEAST_PIXELS", 1)
        monkeypatch.setattr(launching, "TILE", 128)  # several tiles and chunks of a small tensor
    return request.param


def plain_bn(activation, groups):
    def run(x, w, b):
        parts = [F.batch_norm(p, None, None, w, b, True, 0.0, 1e-5) for p in x.chunk(groups)]
        return PHI[activation](torch.cat(parts))

    return run


@pytest.mark.parametrize("layout", LAYOUTS, ids=["nchw", "nhwc"])
@pytest.mark.parametrize(("activation", "dtype"), KINDS, ids=str)
@pytest.mark.parametrize(("shape", "groups"), [((4, 5, 4, 7), 2), ((3, 10, 5, 3), 1)], ids=str)
def test_bn_act(shape, groups, activation, dtype, layout, route):
    ours = lambda x, w, b: functional.bn_act(
        x, None, None, w, b, training=True, activation=activation, stat_groups=groups
    )
    _, record = emulated(ours, plain_bn(activation, groups), affine(shape), dtype, layout, BN)
    assert (route == "resident") == ("resident_kernel" in record.kernels)


@pytest.mark.parametrize("layout", LAYOUTS, ids=["nchw", "nhwc"])
@pytest.mark.parametrize(("activation", "dtype"), KINDS, ids=str)
@pytest.mark.parametrize(("shape", "groups"), [((3, 6, 3, 5), 2), ((2, 4, 5, 5), 4), ((2, 8, 8, 8), 1)], ids=str)
def test_gn_act(shape, groups, activation, dtype, layout, route):
    ours = lambda x, w, b: functional.gn_act(x, groups, w, b, activation=activation)
    plain = lambda x, w, b: PHI[activation](F.group_norm(x, groups, w, b))
    _, record = emulated(ours, plain, affine(shape), dtype, layout, GN)
    if route == "streamed":
        assert "resident_kernel" not in record.kernels
