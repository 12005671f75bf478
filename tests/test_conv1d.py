"""1-D convolutions run as 2-D ones of height 1, on views."""

import pytest
import torch
import torch.nn.functional as F
from checks import BACKENDS, DTYPES, against_plain

import fastgan
from fastgan import functional

# x, weight, stride, padding, dilation, groups; the shapes of vocoders among them
FORWARD = [
    ((2, 6, 33), (4, 6, 3), 1, 1, 1, 1),
    ((2, 6, 40), (6, 6, 7), 1, 9, 3, 1),
    ((1, 6, 61), (6, 6, 11), 1, 25, 5, 1),
    ((3, 1, 50), (5, 1, 15), 1, 7, 1, 1),
    ((2, 8, 90), (12, 2, 41), 2, 20, 1, 4),
    ((2, 4, 9), (3, 4, 1), 3, 0, 1, 1),
    ((2, 4, 12), (4, 4, 5), 1, "same", 2, 1),
]
# x, weight, stride, padding, output_padding, groups
BACK = [
    ((2, 8, 7), (8, 4, 16), 8, 4, 0, 1),
    ((2, 6, 9), (6, 3, 4), 2, 1, 0, 1),
    ((1, 4, 5), (4, 2, 5), 3, 1, 1, 2),
]


def leaf(shape):
    return torch.randn(shape, dtype=torch.float64)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", FORWARD, ids=str)
def test_conv1d_equals_pytorch_to_second_order(case, dtype, backend):
    shape, weight, *geometry = case
    ours = lambda x, w, b: functional.conv1d(x, w, b, *geometry, activation="tanh")
    plain = lambda x, w, b: torch.tanh(F.conv1d(x, w, b, *geometry))
    inputs = (leaf(shape), leaf(weight) * 0.2, leaf(weight[0]))
    against_plain(ours, plain, inputs, dtype, torch.contiguous_format, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", BACK, ids=str)
def test_conv_transpose1d_equals_pytorch_to_second_order(case, dtype, backend):
    shape, weight, *geometry = case
    ours = lambda x, w, b: functional.conv_transpose1d(x, w, b, *geometry, activation="leaky_relu")
    plain = lambda x, w, b: F.leaky_relu(F.conv_transpose1d(x, w, b, *geometry), 0.2)
    inputs = (leaf(shape), leaf(weight) * 0.2, leaf(weight[1] * geometry[-1]))
    against_plain(ours, plain, inputs, dtype, torch.contiguous_format, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_layouts_and_unbatched_signals(backend):
    x, w = torch.randn(2, 6, 30), torch.randn(4, 6, 3)
    want = F.conv1d(x, w, padding=1)
    with fastgan.backend(backend):
        assert functional.conv1d(x, w, padding=1).stride() == want.stride()
        turned = x.transpose(1, 2).contiguous().transpose(1, 2)  # channels innermost
        y = functional.conv1d(turned, w, padding=1)
        torch.testing.assert_close(y, want, rtol=1e-4, atol=1e-5)
        assert y.stride() == (120, 1, 4)
        torch.testing.assert_close(functional.conv1d(x[0], w, padding=1), want[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(functional.conv1d(x[:, :, ::2], w), F.conv1d(x[:, :, ::2], w), rtol=1e-4, atol=1e-5)


def test_what_it_refuses():
    with pytest.raises(ValueError, match=r"conv1d: x must be \[N,C,L\]"):
        functional.conv1d(torch.randn(2, 3, 4, 5), torch.randn(2, 3, 1))
    with pytest.raises(ValueError, match="stride must be an int >= 1"):
        functional.conv1d(torch.randn(2, 3, 4), torch.randn(2, 3, 1), stride=0)
