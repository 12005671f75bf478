import pytest
import torch
import torch.nn.functional as F
from checks import BACKENDS, DTYPES, LAYOUTS, against_plain, distance

import fastgan
from fastgan import functional
from fastgan.ops import conv_transpose2d as card

# (N, C, H, W), K, kernel, stride, padding, output_padding, groups, dilation, bias, activation
SAMPLES = [
    ((2, 100, 1, 1), 16, 4, 1, 0, 0, 1, 1, False, None),
    ((2, 16, 4, 4), 8, 4, 2, 1, 0, 1, 1, True, "leaky_relu"),
    ((1, 8, 7, 7), 5, 5, 2, 2, 1, 1, 1, False, "relu"),
    ((2, 6, 5, 3), 4, 3, (2, 1), (1, 0), (1, 0), 2, 1, True, "tanh"),
    ((2, 4, 5, 5), 4, 2, 3, 0, 2, 4, 1, True, "sigmoid"),  # kernel smaller than stride: phases without taps
    ((2, 3, 4, 6), 3, 3, 2, 2, 1, 1, 2, True, "leaky_relu"),
    ((2, 3, 5, 5), 4, 3, 1, 1, 1, 1, 2, True, None),  # output_padding >= stride
    ((2, 32, 8, 8), 3, 4, 2, 1, 0, 1, 1, True, "tanh"),
]


def plain(shape):
    *_, stride, padding, extra, groups, dilation, _, activation = shape

    def run(x, w, b):
        y = F.conv_transpose2d(x, w, b, stride, padding, extra, groups, dilation)
        return (
            y
            if activation is None
            else {"leaky_relu": lambda t: F.leaky_relu(t, 0.2)}.get(
                activation, lambda t: getattr(torch, activation)(t)
            )(y)
        )

    return run


def ours(shape):
    *_, stride, padding, extra, groups, dilation, _, activation = shape
    return lambda x, w, b: functional.conv_transpose2d(
        x, w, b, stride, padding, extra, groups, dilation, activation=activation
    )


def inputs(shape):
    (n, c, h, w), k, kernel, *_, groups, _, bias, _ = shape
    d = torch.float64
    weight = torch.randn(c, k // groups, kernel, kernel, dtype=d) / (c // groups) ** 0.5
    return torch.randn(n, c, h, w, dtype=d), weight, torch.randn(k, dtype=d) if bias else None


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS, ids=["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SAMPLES, ids=str)
def test_equals_torch_to_second_order(shape, dtype, layout, backend):
    against_plain(ours(shape), plain(shape), inputs(shape), dtype, layout, backend)


@pytest.mark.parametrize("shape", SAMPLES, ids=str)
def test_gradgradcheck(shape):
    args = [None if t is None else t.requires_grad_() for t in inputs(shape)]
    assert torch.autograd.gradcheck(ours(shape), args, fast_mode=True)
    assert torch.autograd.gradgradcheck(ours(shape), args, fast_mode=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_sliced_empty_and_unbatched_inputs(backend):
    w = torch.randn(12, 4, 4, 4)[::2]
    x = torch.randn(3, 12, 6, 6)[:, ::2, 1:-1]
    with fastgan.backend(backend):
        assert distance(functional.conv_transpose2d(x, w, stride=2), F.conv_transpose2d(x, w, stride=2)) < 1e-5
        assert functional.conv_transpose2d(x[:0], w).shape == F.conv_transpose2d(x[:0], w).shape
        assert distance(functional.conv_transpose2d(x[0], w), F.conv_transpose2d(x[0], w)) < 1e-5


def test_errors_are_one_clear_sentence():
    x, w = torch.randn(1, 4, 8, 8), torch.randn(4, 3, 3, 3)
    for call, error, words in [
        (lambda: functional.conv_transpose2d(x, w[:2]), ValueError, "channels"),
        (lambda: functional.conv_transpose2d(x, w.double()), TypeError, "dtype"),
        (lambda: functional.conv_transpose2d(x, w, torch.zeros(4)), ValueError, "bias"),
        (lambda: functional.conv_transpose2d(x, w, output_padding=1), ValueError, "output_padding"),
        (lambda: functional.conv_transpose2d(x, w, groups=3), ValueError, "groups"),
        (lambda: functional.conv_transpose2d(x[..., :1, :], w, padding=2), ValueError, "empty"),
    ]:
        with pytest.raises(error, match=words) as raised:
            call()
        assert str(raised.value).startswith("conv_transpose2d: ") and "\n" not in str(raised.value)


# ---- with the statistics for a batch norm ---------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("groups", [1, 2])
def test_statistics_are_those_of_y_as_it_is_stored(groups, dtype):
    x, w, b = (torch.randn(shape).to(dtype) for shape in ((4, 3, 5, 4), (3, 6, 4, 4), (6,)))
    geometry = [2, 2], [1, 1], [0, 0], 1, [1, 1]
    y, mean, var = card.statistics(x, w, b, *geometry, groups)
    assert torch.equal(y, card.reference(x, w, b, *geometry, "identity", 0.0))
    exact = torch.var_mean(y.double().unflatten(0, (groups, -1)), [1, 3, 4], correction=0)
    assert distance(var, exact[0]) < 1e-6 and distance(mean, exact[1]) < 1e-6
    assert not mean.requires_grad and not var.requires_grad


def test_statistics_leave_the_derivatives_alone():
    args = [torch.randn(s, dtype=torch.float64).requires_grad_() for s in ((2, 3, 3, 4), (3, 4, 3, 3), (4,))]
    ours = lambda *args: card.statistics(*args, [2, 2], [1, 1], [1, 0], 1, [1, 1], 2)[0]
    theirs = lambda *args: F.conv_transpose2d(*args, 2, 1, (1, 0))
    against_plain(ours, theirs, args, torch.float32, LAYOUTS[1], "reference")
    assert torch.autograd.gradcheck(ours, args, fast_mode=True)
    assert torch.autograd.gradgradcheck(ours, args, fast_mode=True)
