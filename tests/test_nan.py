"""A NaN or an infinity in one sample reaches the other samples only where it does in PyTorch."""

import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from checks import BACKENDS
from torch import nn

import fastgan
from fastgan import functional

BAD = 1  # the sample


class Residual(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.first, self.norm, self.second = nn.Conv2d(3, 8, 3, padding=1), norm(8), nn.Conv2d(8, 8, 3, padding=1)
        self.down, self.last = nn.Conv2d(8, 16, 4, 2, 1), nn.Conv2d(16, 1, 3)

    def forward(self, x):
        y = F.leaky_relu(self.norm(self.first(x)), 0.2)
        return self.last(F.leaky_relu(self.down(F.relu(y + self.second(y))), 0.2)).flatten(1)


def chain(norm, activation, last):
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1), norm(8), activation, nn.Conv2d(8, 16, 4, 2, 1), norm(16), nn.LeakyReLU(0.2)),
        *(nn.Conv2d(16, 16, 3, 1, 1, groups=16), nn.LeakyReLU(0.2), nn.Conv2d(16, 1, 4), *last),
    )


NORMS = {
    "none": lambda c: nn.Identity(),
    "batch": nn.BatchNorm2d,
    "group": lambda c: nn.GroupNorm(2, c),
    "instance": lambda c: nn.InstanceNorm2d(c, affine=True),
}
NETWORKS = {
    "relu": lambda norm: chain(norm, nn.ReLU(), ()),
    "tanh": lambda norm: chain(norm, nn.LeakyReLU(0.2), (nn.Tanh(), nn.Flatten())),
    "residual": Residual,
}


def finite(model, x, bad):
    """Where outputs, and first and R1 gradients of the input, are finite, sample by sample."""
    x = x.clone(memory_format=torch.preserve_format)
    if bad != "cotangent":
        x[BAD, 1, 5, 7] = float(bad)
    x.requires_grad_()
    y = model(x)
    dy = torch.ones_like(y)
    if bad == "cotangent":
        dy[BAD, 0] = float("nan")
    (first,) = torch.autograd.grad(y, x, dy, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum() + y.square().sum(), x)
    return [t.isfinite() for t in (y, first, second)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("network", NETWORKS)
def test_other_samples_stay_as_finite_as_in_pytorch(network, norm, channels_last, backend):
    torch.manual_seed(0)
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    x = torch.randn(4, 3, 12, 12).to(memory_format=memory_format)
    for training in (True, False):
        plain = NETWORKS[network](NORMS[norm]).to(memory_format=memory_format).train(training)
        ours = fastgan.convert(copy.deepcopy(plain))
        for bad in ("nan", "inf", "-inf", "cotangent"):
            expected = finite(plain, x, bad)
            with fastgan.backend(backend):
                found = finite(ours, x, bad)
            others = [n for n in range(len(x)) if n != BAD]
            assert all(f[others].logical_or(~e[others]).all() for f, e in zip(found, expected, strict=True))
            assert (norm == "batch" and training) or all(f[others].all() for f in found)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", ["nan", "inf", "-inf", "cotangent"])
@pytest.mark.parametrize("channels_last", [False, True])
def test_batch_norm_of_known_statistics_keeps_samples_apart(channels_last, bad, backend):
    """A sum over the batch times 1/n = 0 would not. Convolutions before it fold it away."""
    torch.manual_seed(0)
    x = torch.randn(4, 3, 12, 12).to(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    statistics, weight = (torch.randn(3), torch.rand(3) + 0.5), (torch.randn(3), torch.randn(3))

    def ours(x):
        return functional.bn_act(x, *statistics, *weight, training=False, activation="leaky_relu", negative_slope=0.2)

    with fastgan.backend(backend):
        found = finite(ours, x, bad)
    expected = finite(lambda x: F.leaky_relu(F.batch_norm(x, *statistics, *weight), 0.2), x, bad)
    others = [n for n in range(len(x)) if n != BAD]
    assert all(f[others].all() for f in found) and found[0].equal(expected[0])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("norm", ["batch", "group", "instance"])
def test_the_last_norms_bias_has_a_gradient_of_zeros_as_in_pytorch(norm, backend):
    """Of an R1 penalty alone: an optimiser skips a parameter without one, its momentum included."""
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(3, 8, 3), NORMS[norm](8), nn.LeakyReLU(0.2), nn.Conv2d(8, 1, 6))
    ours, x = fastgan.convert(copy.deepcopy(plain)), torch.randn(4, 3, 8, 8)
    grads = []
    for model in (plain, ours):
        leaf = x.clone().requires_grad_()
        with fastgan.backend(backend):
            (gradient,) = torch.autograd.grad(model(leaf).sum(), leaf, create_graph=True)
        gradient.square().sum().backward()
        grads.append({name: p.grad for name, p in model.named_parameters()})
    assert grads[0]["1.bias"].eq(0).all() and grads[1]["1.bias"].eq(0).all()
    assert [g is None for g in grads[0].values()] == [g is None for g in grads[1].values()]


def r1_of_known_statistics(batch_norm, x):
    """Gradients of an R1 penalty by the norm's weight, the penalty's cotangent and x, of batch norm in eval mode."""
    torch.manual_seed(2)
    statistics, weight = (torch.randn(3), torch.rand(3) + 0.5), torch.randn(3).requires_grad_()
    x, dy = x.clone(memory_format=torch.preserve_format).requires_grad_(), torch.randn(x.shape).requires_grad_()
    y = batch_norm(x, *statistics, weight, torch.randn(3))
    (first,) = torch.autograd.grad(y, x, dy, create_graph=True)
    return first, *torch.autograd.grad(first.square().mean(), (weight, dy))


def check_r1_of_known_statistics(channels_last):
    """PyTorch's formula has no x there; in ours all that has x is times 1/n = 0."""
    torch.manual_seed(0)
    x = torch.randn(4, 3, 12, 12).to(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    x[BAD, 1, 5, 7] = float("nan")
    expected = r1_of_known_statistics(F.batch_norm, x)
    found = r1_of_known_statistics(functools.partial(functional.bn_act, training=False, activation="identity"), x)
    for f, e in zip(found, expected, strict=True):
        torch.testing.assert_close(f, e)
        assert e.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("channels_last", [False, True])
def test_a_nan_stays_out_of_r1_where_batch_norm_has_known_statistics(channels_last, backend):
    with fastgan.backend(backend):
        check_r1_of_known_statistics(channels_last)
