import pytest
import torch
import torch.nn.functional as F
from checks import BACKENDS, DTYPES, LAYOUTS, against_plain

import fastgan
from fastgan import functional

ACTIVATIONS = {
    None: lambda t: t * 1,
    "relu": torch.relu,
    "leaky_relu": lambda t: F.leaky_relu(t, 0.3),
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
}
SHAPES = [(2, 3, 5, 7), (3, 17), (1, 4, 9), (2, 3, 2, 3, 2), (2, 64, 4, 4)]


def plain(activation):
    def run(x, b):
        return ACTIVATIONS[activation](x if b is None else x + b.view(1, -1, *[1] * (x.dim() - 2)))

    return run


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS, ids=["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_torch_to_second_order(shape, activation, bias, dtype, layout, backend):
    x = torch.randn(shape, dtype=torch.float64)
    b = torch.randn(shape[1], dtype=torch.float64) if bias else None
    ours = lambda x, b: functional.bias_act(x, b, activation=activation, negative_slope=0.3)
    against_plain(ours, plain(activation), (x, b), dtype, layout, backend)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradgradcheck(activation):
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    b = torch.randn(3, dtype=torch.float64, requires_grad=True)
    run = lambda x, b: functional.bias_act(x, b, activation=activation)
    assert torch.autograd.gradcheck(run, (x, b), fast_mode=True)
    assert torch.autograd.gradgradcheck(run, (x, b), fast_mode=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_inf_empty_and_no_alias(backend):
    with fastgan.backend(backend):
        x = torch.tensor([[float("nan"), float("inf"), -float("inf"), 0.0]])
        y = functional.bias_act(x, activation="leaky_relu")
        assert torch.equal(y.isnan(), x.isnan()) and y[0, 1] == float("inf") and y[0, 2] == -float("inf")
        assert functional.bias_act(torch.randn(0, 3, 2, 2)).shape == (0, 3, 2, 2)
        same = functional.bias_act(x, activation=None)
        assert same.data_ptr() != x.data_ptr()


def test_errors():
    with pytest.raises(ValueError, match=r"bias_act: bias must have shape \(3,\), got \(4,\)"):
        functional.bias_act(torch.randn(2, 3), torch.zeros(4))
    with pytest.raises(ValueError, match="at least 2 dimensions"):
        functional.bias_act(torch.randn(3))
