"""Graphs in channels_last inside: what depends on strides there is that of plain PyTorch, which is in NCHW."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._pytree import tree_leaves

import fastgan
from fastgan.trace import graphs

N, C, SIZE = 3, 8, 6


def modulated(y):
    """The samples as groups of one convolution."""
    weight = torch.linspace(-1, 1, 2 * N * C, dtype=y.dtype).view(2 * N, C, 1, 1)
    return F.conv2d(y.view(1, N * C, SIZE, SIZE), weight, groups=N).view(N, 2, SIZE, SIZE)


def written_through_flatten(y):
    y = y * 1
    y.flatten(1).mul_(2)
    return y


def written_through_reshape(y):
    y = y * 1
    z = y.reshape(N, -1)
    z += 1
    return y * y


def written_at_places(y):
    y = y * 1
    y[:, :, 0] = 3
    y.flatten()[7] = 9
    return y * y


def filled_beside(kind):
    def call(y):
        noise = torch.empty_like(y)
        getattr(noise, kind)()
        return y + noise

    return call


def dropped_in_place(y):
    z = y * 1
    F.dropout(z, 0.5, True, True)
    return z * z


READERS = {
    "groups of view": modulated,
    "write through flatten": written_through_flatten,
    "write through reshape": written_through_reshape,
    "write through indices": written_at_places,
    "dropout in place": dropped_in_place,
    "in-place residual": lambda y: (y * 1).add_(y.mean(1, keepdim=True)),
    "normal_": filled_beside("normal_"),
    "uniform_": filled_beside("uniform_"),
    "exponential_": filled_beside("exponential_"),
    "uniform_ of a call": lambda y: y * torch.zeros_like(y).uniform_(),
    "bernoulli_": lambda y: y * torch.empty_like(y).bernoulli_(0.5),
    "tokens": lambda y: y.flatten(2).transpose(1, 2),
    "dropout of tokens": lambda y: F.dropout(y.flatten(2).transpose(1, 2), 0.5),
    "dropout of channels last": lambda y: F.dropout(y.permute(0, 2, 3, 1), 0.5),
    "five dimensions": lambda y: y.view(N, 2, C // 2, SIZE, SIZE),
    "dropout of five dimensions": lambda y: F.dropout(y.view(N, 2, C // 2, SIZE, SIZE) * 2, 0.5),
    "windows": lambda y: y.unfold(2, 3, 3),
    "view_as": lambda y: y.view_as(torch.empty(N, C // 2, 2 * SIZE, SIZE)),
    "view of a type": lambda y: y * (y.detach().view(torch.int64) > 0),
    "complex": lambda y: torch.view_as_real(torch.view_as_complex(F.avg_pool2d(y, (1, 3)))) * 2,
}


class Reading(nn.Module):
    def __init__(self, reader):
        super().__init__()
        self.first, self.second, self.reader = nn.Conv2d(3, C, 3, padding=1), nn.Conv2d(C, C, 3, padding=1), reader

    def forward(self, x):
        return self.reader(F.leaky_relu(self.second(F.relu(self.first(x))), 0.2))


def numbers(model, x):
    """Outputs, first gradients and those of an R1 penalty."""
    torch.manual_seed(1)
    outputs, leaves = tree_leaves(model(x)), [x, *model.parameters()]
    gradients = torch.autograd.grad(sum((y * y).sum() for y in outputs), leaves, create_graph=True)
    penalty = gradients[0].square().sum()
    return [*outputs, *gradients, *torch.autograd.grad(penalty, leaves)]


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("way", ["channels_last", "ours"])
def test_a_reader_of_strides_finds_those_of_plain_pytorch(name, way, monkeypatch):
    """A convolution's result lies in channels_last: views, masks, noise and writes through views are NCHW's."""
    monkeypatch.setattr(graphs.Graph, "_raced", lambda self, case, arguments: self.ways.get(way, self.ways["ours"]))
    torch.manual_seed(0)
    plain = Reading(READERS[name]).double()
    ours = fastgan.convert(copy.deepcopy(plain))
    x = torch.randn(N, 3, SIZE, SIZE, dtype=torch.float64, requires_grad=True)
    found, expected = numbers(ours, x), numbers(plain, x)
    assert found[0].stride() == expected[0].stride()
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)
    assert ours.forward.graphs


@pytest.mark.parametrize("name", ["groups of view", "tokens", "uniform_", "in-place residual"])
def test_such_graphs_still_have_a_way_in_channels_last(name):
    torch.manual_seed(0)
    ours = fastgan.convert(Reading(READERS[name]))
    ours(torch.randn(N, 3, SIZE, SIZE))
    assert [graph for graph in ours.forward.graphs if "channels_last" in graph.ways]


def test_a_write_through_a_view_that_would_be_a_copy_declines_it():
    ours = fastgan.convert(Reading(written_through_reshape))
    ours(torch.randn(N, 3, SIZE, SIZE))
    assert all("channels_last" not in graph.ways for graph in ours.forward.graphs)
