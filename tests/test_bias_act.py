import pytest
import torch
import torch.nn.functional as F
from checks import BACKENDS, DTYPES, LAYOUTS, against_plain, clear_of

import fastgan
from fastgan import functional

ACTIVATIONS = {
    None: lambda t: t * 1,
    "relu": torch.relu,
    "leaky_relu": lambda t: F.leaky_relu(t, 0.3),
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "elu": F.elu,
    "selu": F.selu,
    "softplus": F.softplus,
    "swish": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda t: F.gelu(t, approximate="tanh"),
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


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS, ids=["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("gain", "clamp"), [(2**0.5, 1.0), (-0.7, None), (3.0, 0.9)], ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gain_and_clamp_to_second_order(activation, gain, clamp, dtype, layout, backend):
    """Clear of the clamp: torch.clamp passes the gradient of what rounds to it, ours does not (the card says so)."""
    x, b = torch.randn(2, 3, 5, 7, dtype=torch.float64), torch.randn(3, dtype=torch.float64)
    form = {"activation": activation, "negative_slope": 0.3, "gain": gain, "clamp": clamp}
    limited = lambda y: y if clamp is None else y.clamp(-clamp, clamp)
    x = x if clamp is None else clear_of(lambda x: (gain * plain(activation)(x, b)).abs() - clamp, x)
    ours = lambda x, b: functional.bias_act(x, b, **form)
    against_plain(ours, lambda x, b: limited(gain * plain(activation)(x, b)), (x, b), dtype, layout, backend)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_what_the_clamp_holds_has_no_slope(activation):
    x = torch.randn(4, 3, 5, dtype=torch.float64, requires_grad=True)
    y = functional.bias_act(x, activation=activation, gain=4.0, clamp=1.0)
    (g,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    held = y.abs() == 1
    assert held.any() and y.abs().max() == 1 and g[held].eq(0).all()
    if g.requires_grad:
        assert torch.autograd.grad(g.sum(), x)[0][held].eq(0).all()


def test_an_infinite_value_under_no_clamp_keeps_its_gradient():
    x = torch.tensor([[torch.inf, 1.0]], requires_grad=True)
    for backend in BACKENDS:
        with fastgan.backend(backend):
            y = functional.bias_act(x, activation="relu", gain=2.0)
            assert torch.autograd.grad(y.sum(), x)[0].tolist() == [[2.0, 2.0]]


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
    with pytest.raises(ValueError, match="bias_act: gain must be finite and not 0, got 0"):
        functional.bias_act(torch.randn(2, 3), gain=0)
    with pytest.raises(ValueError, match="bias_act: clamp must be None or >= 0, got -2"):
        functional.bias_act(torch.randn(2, 3), clamp=-2)
    with pytest.raises(ValueError, match="at least 2 dimensions"):
        functional.bias_act(torch.randn(3))


# ---- small tensors go through PyTorch's own ops --------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_small_tensors_equal_torch_to_second_order(activation, bias, dtype, free):
    for shape in SHAPES:
        x = torch.randn(shape, dtype=torch.float64)
        b = torch.randn(shape[1], dtype=torch.float64) if bias else None
        ours = lambda x, b: functional.bias_act(x, b, activation=activation, negative_slope=0.3)
        against_plain(ours, plain(activation), (x, b), dtype, torch.contiguous_format, "auto")


def test_which_calls_are_small(free):
    """The graph tells: an op of ours is a node of Python."""
    x, b = torch.randn(2, 8, 3, 3, requires_grad=True), torch.randn(8)
    node = lambda x, **form: type(functional.bias_act(x, b, **form).grad_fn).__name__
    assert "LeakyRelu" in node(x) and "Tanh" in node(x, activation="tanh")
    for other in (
        x.to(memory_format=torch.channels_last),
        x[:, :, :, 1:],
        torch.randn(1, 8, 300, 300).requires_grad_(),
    ):
        assert node(other) == "ThinBackward"
    assert node(x, gain=2.0) == node(x, clamp=1.0) == "ThinBackward"
    for name in ("native", "reference"):
        with fastgan.backend(name):
            assert node(x) == "ThinBackward"
    with fastgan.racing(False):
        assert node(x) == "ThinBackward"
    with torch.autocast("cpu", torch.bfloat16):
        assert functional.bias_act(x, b).dtype == torch.float32


def test_a_small_tensor_keeps_its_dtype_beside_another_of_the_bias(free):
    x, b = torch.randn(2, 8, 3, 3, dtype=torch.bfloat16), torch.randn(8)
    y = functional.bias_act(x, b)
    assert y.dtype == torch.bfloat16 and torch.equal(y, F.leaky_relu(x + b.view(1, 8, 1, 1).bfloat16(), 0.2))
