"""1-D convolutions run as 2-D ones of height 1, on views."""

import copy

import pytest
import torch
import torch.nn.functional as F
from checks import BACKENDS, DTYPES, against_plain
from torch import nn

import fastgan
from fastgan import functional
from fastgan.trace import graphs

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


EXACT = {"rtol": 1e-11, "atol": 1e-12}


def innermost(t):
    return t.transpose(-2, -1).contiguous().transpose(-2, -1)


class Feeding(nn.Module):
    """Tokens [N, L, C], as a transformer has them, through convolutions; the mask is drawn in the order of memory."""

    def __init__(self):
        super().__init__()
        self.first, self.up = nn.Conv1d(4, 6, 3, padding=1), nn.ConvTranspose1d(6, 5, 4, 2, 1)
        self.last = nn.Conv1d(5, 3, 1)

    def forward(self, tokens):
        y = F.dropout(F.relu(self.first(tokens.transpose(1, 2))), 0.5)
        return self.last(F.dropout(F.leaky_relu(self.up(y), 0.2), 0.5)), self.last.weight


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("turned_weight", [False, True])
@pytest.mark.parametrize("shape", [(2, 6, 9), (1, 6, 9), (2, 6, 1), (6, 9)])
def test_strides_are_those_of_torch_whatever_x_lies_like(shape, turned_weight, backend):
    x, weights = innermost(torch.randn(shape)), [torch.randn(k, 6, r) for k in (4, 1) for r in (1, 3)]
    with fastgan.backend(backend):
        for w in weights:
            w = innermost(w) if turned_weight else w
            assert functional.conv1d(x, w, padding=1).stride() == F.conv1d(x, w, padding=1).stride()
            w = w.transpose(0, 1)
            w = innermost(w) if turned_weight else w.contiguous()
            assert functional.conv_transpose1d(x, w).stride() == F.conv_transpose1d(x, w).stride()


@pytest.mark.parametrize(("way", "channels"), [("ours", 4), ("channels_last", 4), ("program", 4), ("program", 1)])
def test_dropout_behind_a_convolution_of_tokens_draws_plain_pytorchs_mask(way, channels, monkeypatch):
    torch.manual_seed(0)
    tokens, dtype = torch.randn(3, 8, 4), torch.float32 if way == "program" else torch.float64
    plain = Feeding().to(dtype)
    if way == "program":  # a chain: one program, and a mask behind it
        plain = nn.Sequential(nn.Conv1d(4, 6, 3), nn.LeakyReLU(0.2), nn.Conv1d(6, channels, 3), nn.Tanh())
        plain.append(nn.Dropout(0.5))
    monkeypatch.setattr(graphs.Graph, "_raced", lambda self, case, arguments: self.ways.get(way, self.ways["ours"]))
    ours, results = fastgan.convert(copy.deepcopy(plain)), []
    for model in (plain, ours):
        x = tokens.to(dtype).requires_grad_()
        torch.manual_seed(1)
        y = model(x.transpose(1, 2) * 1 if way == "program" else x)
        y = y if way == "program" else y[0]
        results.append((y, *torch.autograd.grad(y.square().sum(), [x, *model.parameters()])))
    assert results[0][0].stride() == results[1][0].stride()
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, **({"rtol": 1e-4, "atol": 1e-5} if way == "program" else EXACT))


@pytest.mark.parametrize("backend", BACKENDS)
def test_layouts_and_unbatched_signals(backend):
    x, w = torch.randn(2, 6, 30), torch.randn(4, 6, 3)
    want = F.conv1d(x, w, padding=1)
    with fastgan.backend(backend):
        assert functional.conv1d(x, w, padding=1).stride() == want.stride()
        turned = x.transpose(1, 2).contiguous().transpose(1, 2)  # channels innermost
        torch.testing.assert_close(functional.conv1d(turned, w, padding=1), want, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(functional.conv1d(x[0], w, padding=1), want[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(functional.conv1d(x[:, :, ::2], w), F.conv1d(x[:, :, ::2], w), rtol=1e-4, atol=1e-5)


def test_what_it_refuses():
    with pytest.raises(ValueError, match=r"conv1d: x must be \[N,C,L\]"):
        functional.conv1d(torch.randn(2, 3, 4, 5), torch.randn(2, 3, 1))
    with pytest.raises(ValueError, match="stride must be an int >= 1"):
        functional.conv1d(torch.randn(2, 3, 4), torch.randn(2, 3, 1), stride=0)
    with pytest.raises(ValueError, match='layout must be "torch" or "x"'):
        functional.conv_transpose1d(torch.randn(2, 3, 4), torch.randn(3, 2, 1), layout="y")


def test_a_layout_of_x_copies_nothing():
    x, w = innermost(torch.randn(2, 6, 9)), torch.randn(6, 6, 3)
    for ours, plain in ((functional.conv1d, F.conv1d), (functional.conv_transpose1d, F.conv_transpose1d)):
        y = ours(x, w, layout="x")
        assert y.stride(1) == 1
        torch.testing.assert_close(y, plain(x, w))
