import pytest
import torch
import torch.nn.functional as F
from checks import BACKENDS, DTYPES, LAYOUTS, against_plain, distance

import fastgan
from fastgan import functional
from fastgan.choice import watching
from fastgan.ops import conv2d as card

# (N, C, H, W), K, kernel, stride, padding, dilation, groups, bias, activation
SAMPLES = [
    ((2, 3, 8, 8), 8, 4, 2, 1, 1, 1, True, "leaky_relu"),
    ((1, 5, 7, 9), 4, 3, 1, 1, 1, 1, False, None),
    ((3, 4, 9, 6), 6, (3, 2), (2, 1), (0, 1), 1, 2, True, "relu"),
    ((2, 4, 10, 10), 4, 3, 2, 2, 2, 4, True, "tanh"),
    ((2, 1, 14, 14), 17, 5, 2, 2, 1, 1, True, "sigmoid"),
    ((2, 16, 4, 4), 1, 4, 1, 0, 1, 1, False, None),
    ((2, 16, 5, 5), 33, 1, 1, 0, 1, 1, True, "leaky_relu"),
    ((2, 3, 6, 6), 5, 2, 3, 0, 1, 1, True, "leaky_relu"),
]


def plain(shape):
    _, _, _, stride, padding, dilation, groups, _, activation = shape

    def run(x, w, b):
        y = F.conv2d(x, w, b, stride, padding, dilation, groups)
        return (
            y
            if activation is None
            else {"leaky_relu": lambda t: F.leaky_relu(t, 0.2)}.get(
                activation, lambda t: getattr(torch, activation)(t)
            )(y)
        )

    return run


def ours(shape):
    _, _, _, stride, padding, dilation, groups, _, activation = shape
    return lambda x, w, b: functional.conv2d(x, w, b, stride, padding, dilation, groups, activation=activation)


def inputs(shape):
    (n, c, h, w), k, kernel, *_, groups, bias, _ = shape
    r, s = (kernel, kernel) if isinstance(kernel, int) else kernel
    d = torch.float64
    weight = torch.randn(k, c // groups, r, s, dtype=d) / (c // groups * r * s) ** 0.5
    return torch.randn(n, c, h, w, dtype=d), weight, torch.randn(k, dtype=d) if bias else None


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS, ids=["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SAMPLES, ids=str)
def test_equals_torch_to_second_order(shape, dtype, layout, backend):
    got = against_plain(ours(shape), plain(shape), inputs(shape), dtype, layout, backend)
    if layout == torch.channels_last and shape[0][1] > 1 and min(got[0].shape[1:]) > 1:
        assert got[0].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("shape", SAMPLES, ids=str)
def test_gradgradcheck(shape):
    args = [None if t is None else t.requires_grad_() for t in inputs(shape)]
    assert torch.autograd.gradcheck(ours(shape), args, fast_mode=True)
    assert torch.autograd.gradgradcheck(ours(shape), args, fast_mode=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_sliced_and_expanded_inputs(backend):
    x = torch.randn(4, 12, 10, 11)[::2, ::2, 1:, :-1]
    w = torch.randn(8, 12, 3, 3)[:, ::2]
    dy = torch.ones(1, 1, 1, 1).expand(2, 8, 7, 8)
    with fastgan.backend(backend):
        a, b = x.clone().requires_grad_(), w.clone().requires_grad_()
        y = functional.conv2d(x.requires_grad_(), w.requires_grad_())
        got = torch.autograd.grad(y, (x, w), dy)
    want = torch.autograd.grad(F.conv2d(a, b), (a, b), dy)
    for g, v in zip((y, *got), (F.conv2d(a, b), *want), strict=True):
        assert distance(g, v) < 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_batch_and_unbatched(backend):
    w = torch.randn(8, 3, 3, 3, requires_grad=True)
    with fastgan.backend(backend):
        y = functional.conv2d(torch.randn(0, 3, 8, 8), w)
        y.sum().backward()
        assert y.shape == (0, 8, 6, 6) and torch.equal(w.grad, torch.zeros_like(w))
        x = torch.randn(3, 8, 8)
        assert distance(functional.conv2d(x, w), F.conv2d(x, w)) < 1e-5


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("padding", ["same", "valid"])
@pytest.mark.parametrize("kernel", [3, 4])
def test_string_padding(padding, kernel):
    x, w = torch.randn(2, 3, 9, 8), torch.randn(4, 3, kernel, kernel)
    assert distance(functional.conv2d(x, w, padding=padding), F.conv2d(x, w, padding=padding)) < 1e-5


def test_errors_are_one_clear_sentence():
    x, w = torch.randn(1, 3, 8, 8), torch.randn(4, 3, 3, 3)
    for call, error, words in [
        (lambda: functional.conv2d(x, w[:, :2]), ValueError, "channels"),
        (lambda: functional.conv2d(x, w.double()), TypeError, "dtype"),
        (lambda: functional.conv2d(x, w, torch.zeros(3)), ValueError, "bias"),
        (lambda: functional.conv2d(x, w, activation="gelu"), ValueError, "activation"),
        (lambda: functional.conv2d(x, w, activation="leaky_relu", negative_slope=-1.0), ValueError, "slope"),
        (lambda: functional.conv2d(x[0, 0], w), ValueError, "C,H,W"),
        (lambda: functional.conv2d(x, w[0]), ValueError, "4 dimensions"),
        (lambda: functional.conv2d(x[..., :2], w), ValueError, "fit"),
        (lambda: functional.conv2d(x, w, stride=0), ValueError, "stride"),
        (lambda: functional.conv2d(x.int(), w.int()), TypeError, "floating"),
    ]:
        with pytest.raises(error, match=words) as raised:
            call()
        assert str(raised.value).startswith("conv2d: ") and "\n" not in str(raised.value)


def test_native_declines_with_a_reason():
    x, weight = torch.randn(1, 1, 4, 4).double(), torch.randn(1, 1, 1, 1)
    declines = card.op.backends["native"].declines
    assert "float32 and bfloat16" in declines(x, weight, None, [1, 1], [0, 0], [1, 1], 1, "identity", 0.0)


def test_cost_counts_each_tensor_once():
    x, w = torch.randn(2, 3, 8, 8), torch.randn(4, 3, 3, 3)
    assert card.cost(x, w, (1, 1), (0, 0), (1, 1)) == {
        "bytes": 4 * (2 * 3 * 64 + 4 * 27 + 2 * 4 * 36),
        "flops": 2 * 2 * 4 * 36 * 27,
    }


# ---- with the statistics for a batch norm ---------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("groups", [1, 3])
def test_statistics_are_those_of_y_as_it_is_stored(groups, dtype):
    x, w, b = (None if t is None else t.to(dtype) for t in inputs(SAMPLES[2]))
    y, mean, var = card.statistics(x, w, b, [2, 1], [0, 1], [1, 1], 2, groups)
    assert torch.equal(y, card.reference(x, w, b, [2, 1], [0, 1], [1, 1], 2, "identity", 0.0))
    exact = torch.var_mean(y.double().unflatten(0, (groups, -1)), [1, 3, 4], correction=0)
    assert mean.dtype == var.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert distance(var, exact[0]) < 1e-6 and distance(mean, exact[1]) < 1e-6
    assert not mean.requires_grad and not var.requires_grad


@pytest.mark.parametrize("layout", LAYOUTS, ids=["nchw", "nhwc"])
def test_statistics_leave_the_derivatives_alone(layout):
    args = [t.requires_grad_() for t in inputs(SAMPLES[2])]
    ours = lambda *args: card.statistics(*args, [2, 1], [0, 1], [1, 1], 2, 3)[0]
    theirs = lambda *args: F.conv2d(*args, (2, 1), (0, 1), 1, 2)
    against_plain(ours, theirs, args, torch.float32, layout, "reference")
    assert torch.autograd.gradcheck(ours, args, fast_mode=True)
    assert torch.autograd.gradgradcheck(ours, args, fast_mode=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_cpu_computes_no_statistics_with_the_convolution(backend):
    x, w = torch.randn(8, 3, 16, 16), torch.randn(4, 3, 3, 3)
    ran = []
    with fastgan.backend(backend), watching(lambda op, name, why: ran.append(op.name)):
        y, statistics = functional.conv2d_statistics(x, w)
        functional.conv2d_bn_act(x, w, training=True)
        fastgan.nn.Conv2dBNAct(3, 4, 3)(x)
    assert statistics is None and torch.equal(y, functional.conv2d(x, w))
    assert ran == ["conv2d", "conv2d", "bn_act", "conv2d", "bn_act"]


def test_cost_of_statistics_is_two_numbers_a_channel():
    x, w = torch.randn(2, 3, 8, 8), torch.randn(4, 3, 3, 3)
    plain, ours = card.cost(x, w, (1, 1), (0, 0), (1, 1)), card.cost_statistics(x, w, (1, 1), (0, 0), (1, 1), 2)
    assert ours["bytes"] - plain["bytes"] == 2 * 2 * 4 * 4 and ours["flops"] - plain["flops"] == 4 * 2 * 4 * 36
