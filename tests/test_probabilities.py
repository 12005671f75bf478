"""Discriminators that return probabilities: their sigmoid is folded into the loss, refused, or at least noticed."""

import copy
import warnings

import pytest
import torch
from torch import nn

import fastgan


def body():
    return [nn.Conv2d(3, 8, 4, 2, 1), nn.BatchNorm2d(8), nn.LeakyReLU(0.2), nn.Conv2d(8, 1, 4, 2, 1)]


class Tutorial(nn.Module):
    def __init__(self):
        super().__init__()
        self.main = nn.Sequential(*body(), nn.Flatten(), nn.Linear(4, 1), nn.Sigmoid())

    def forward(self, x):
        return self.main(x).view(-1)


class Functional(nn.Module):
    def __init__(self, how=torch.sigmoid):
        super().__init__()
        self.main, self.how = nn.Sequential(*body()), how

    def forward(self, x):
        return self.how(self.main(x)).mean((2, 3))


def train(d, steps=4, loss="bce"):
    torch.manual_seed(0)
    g = nn.Sequential(nn.Linear(4, 3 * 64), nn.Unflatten(1, (3, 8, 8)), nn.Tanh()).double()
    sgd = lambda m: torch.optim.SGD(m.parameters(), 0.05)
    step = fastgan.GANStep(g, d, latent=4, g_optimizer=sgd(g), d_optimizer=sgd(d), loss=loss)
    metrics = [step(torch.randn(8, 3, 8, 8, dtype=torch.float64)) for _ in range(steps)]
    return [float(v) for m in metrics for v in m.values()], [b.clone() for b in d.buffers()]


@pytest.mark.parametrize("convert", [False, True])
@pytest.mark.parametrize("make", [Tutorial, lambda: nn.Sequential(*body(), nn.Sigmoid())])
def test_a_final_sigmoid_is_folded_with_one_line(make, convert):
    torch.manual_seed(1)
    d = make().double()
    logits = copy.deepcopy(d)
    (logits.main if hasattr(logits, "main") else logits)[-1] = nn.Identity()
    want, buffers = train(logits)
    if convert:
        fastgan.convert(d)
    with pytest.warns(UserWarning, match="final sigmoid .* is folded") as told:
        got, ours = train(d)
    assert len(told) == 1
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(ours, buffers)  # the first forward ran twice, its statistics count once
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(d)  # once


@pytest.mark.parametrize("how", [torch.sigmoid, lambda t: t.flatten(1).softmax(1)[:, :, None, None]])
def test_a_sigmoid_in_a_forward_is_refused(how):
    with pytest.raises(ValueError, match="must return logits"):
        train(Functional(how).double())


def test_a_traced_discriminator_is_looked_through():
    class Conv(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 1, 8)

        def forward(self, x):
            return torch.sigmoid(self.conv(x))

    with pytest.raises(ValueError, match="output of a sigmoid"):
        train(fastgan.convert(Conv().double()))


def test_values_within_0_and_1_are_told_once():
    with pytest.warns(UserWarning, match=r"within \[0, 1\]") as told:
        train(Functional(lambda t: (t + 0.5).clamp(0, 1)).double(), steps=24)
    assert len(told) == 1


@pytest.mark.filterwarnings("error")
def test_ordinary_logits_say_nothing():
    train(Functional(lambda t: t * 3).double())
    train(Functional(lambda t: t.abs().clamp(max=0.2)).double())  # small and positive: an untrained network's may be
    train(Functional(lambda t: t * torch.sigmoid(t)).double(), loss="relativistic-average")  # a gate is no squashing
