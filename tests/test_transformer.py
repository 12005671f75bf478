"""Norms with modulation and residual, gated units and dense layers with an activation, to second order."""

import pytest
import torch
import torch.nn.functional as F
from checks import BACKENDS, DTYPES, against_plain

import fastgan
from fastgan import functional

# The kernels' own tests: without races no small tensor goes through PyTorch's ops.
pytestmark = pytest.mark.usefixtures("unraced")

LAYOUT = torch.contiguous_format
GATES = {"sigmoid": torch.sigmoid, "gelu": F.gelu, "silu": F.silu, "relu": torch.relu, None: lambda t: t}


def doubles(*shapes):
    torch.manual_seed(0)
    return [torch.randn(shape, dtype=torch.float64) for shape in shapes]


def plain_layer_norm(x, w, b, scale, shift, residual):
    return F.layer_norm(x + residual, (6,), w, b) * (1 + scale[:, None]) + shift[:, None]


def plain_rms_norm(x, w, b, scale, shift, residual):
    total = (x + residual).to(torch.promote_types(x.dtype, torch.float32))
    normed = total * (total.square().mean(-1, keepdim=True) + 1e-3).rsqrt() * w
    return normed.to(x.dtype) * (1 + scale[:, None]) + shift[:, None] + 0 * b.sum()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_norms_with_modulation_and_residual(kind, dtype, backend):
    inputs = doubles((3, 5, 6), (6,), (6,), (3, 6), (3, 6), (3, 5, 6))

    def ours(x, w, b, scale, shift, residual):
        more = {"scale": scale, "shift": shift, "residual": residual}
        if kind == "layer":
            return functional.layer_norm(x, (6,), w, b, **more)[0]
        return functional.rms_norm(x, (6,), w, 1e-3, **more)[0] + 0 * b.sum()

    plain = plain_layer_norm if kind == "layer" else plain_rms_norm
    against_plain(ours, plain, inputs, dtype, LAYOUT, backend)


def test_the_sum_comes_out_too_and_nothing_changes_without_options():
    x, w, residual = doubles((2, 4, 3, 6), (3, 6), (2, 4, 3, 6))
    torch.testing.assert_close(functional.layer_norm(x, (3, 6), w), F.layer_norm(x, (3, 6), w))
    torch.testing.assert_close(functional.rms_norm(x, (3, 6), w), F.rms_norm(x, (3, 6), w))
    half = x.bfloat16()  # beside a wider weight, and its own rounding unit in the place of eps
    plain = F.rms_norm(half.double(), (3, 6), w, torch.finfo(torch.bfloat16).eps).bfloat16()
    assert torch.equal(functional.rms_norm(half, (3, 6), w), plain)
    for norm in (functional.layer_norm, functional.rms_norm):
        y, total = norm(x, (6,), residual=residual)
        assert torch.equal(total, x + residual) and torch.equal(y, norm(x + residual, (6,)))
        assert torch.equal(norm(x, (6,), scale=torch.ones(6).double()), 2 * norm(x, (6,)))
        assert torch.equal(norm(x, (6,), shift=torch.ones(6).double()), norm(x, (6,)) + 1)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", GATES)
def test_gated_units(activation, dtype, backend):
    ours = lambda x: functional.glu(x, 1, activation=activation)
    plain = lambda x: x[:, :3] * GATES[activation](x[:, 3:])
    against_plain(ours, plain, doubles((4, 6, 5)), dtype, LAYOUT, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "silu"])
def test_linear_layers_with_an_activation(activation, backend):
    phi = {"gelu": F.gelu, "gelu_tanh": lambda t: F.gelu(t, approximate="tanh"), "silu": F.silu}[activation]
    ours = lambda x, w, b: functional.linear_act(x, w, b, activation=activation)
    plain = lambda x, w, b: phi(F.linear(x, w, b))
    for dtype in (torch.float64, torch.float32):
        against_plain(ours, plain, doubles((2, 5, 4), (7, 4), (7,)), dtype, LAYOUT, backend)


def test_gradgradcheck():
    x, scale, shift = (t.requires_grad_() for t in doubles((2, 3, 4), (2, 4), (2, 4)))
    with fastgan.backend("reference"):
        for norm in (functional.layer_norm, functional.rms_norm):
            ours = lambda x, a, b, norm=norm: norm(x, (4,), scale=a, shift=b)
            assert torch.autograd.gradgradcheck(ours, (x, scale, shift))
        assert torch.autograd.gradgradcheck(lambda x: functional.glu(x, activation="gelu_tanh"), x)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x: functional.glu(x, 1), ValueError, "the size along dim 1 must be even, got x"),
        (lambda x: functional.glu(x, activation="mish"), ValueError, "activation must be None or one of"),
        (lambda x: functional.rms_norm(x, (5,)), ValueError, r"must end in normalized_shape \(5,\)"),
        (lambda x: functional.rms_norm(x.long(), (4,)), TypeError, "must be a floating tensor"),
        (lambda x: functional.rms_norm(x, (4,), x), ValueError, r"weight must have shape \(4,\)"),
        (lambda x: functional.layer_norm(x, (4,), residual=x[0]), ValueError, "residual must have x's shape"),
        (lambda x: functional.layer_norm(x, (4,), scale=x[:, 0, :3]), ValueError, "must broadcast against x"),
    ],
)
def test_errors_are_one_sentence(call, error, message):
    with pytest.raises(error, match=message):
        call(torch.randn(2, 3, 4))
