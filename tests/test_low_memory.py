"""A discriminator that learns from real and fake images in turn: the same numbers, half of the activations."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny_run import TINY
from torch import nn

import fastgan
from fastgan.training.step import IN_TURN_FROM
from fastgan.training.trainer import Trainer

APART = ("bce", "minimax", "lsgan", "hinge", "wasserstein")


class Scales(nn.Module):
    """Two scales of logits beside features."""

    per_sample = True

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 1, 3, 2)

    def forward(self, x):
        features = nn.functional.leaky_relu(self.a(x), 0.2)
        return [features.mean(1), self.b(features)], features


def normed():
    layers = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.LeakyReLU(0.2), nn.Flatten(), nn.Linear(144, 1)
    return fastgan.convert(nn.Sequential(*layers))


def plain():
    layers = nn.Conv2d(1, 4, 3), nn.LeakyReLU(0.2), nn.Flatten(), nn.Linear(144, 1)
    return fastgan.convert(nn.Sequential(*layers))


def spectral():
    layers = nn.utils.parametrizations.spectral_norm(nn.Conv2d(1, 4, 3)), nn.LeakyReLU(0.2)
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(144, 1))


def two_steps(discriminator, **options):
    """(metrics of two steps, state of both networks)"""
    torch.manual_seed(0)
    generator = nn.Sequential(nn.Linear(3, 64), nn.Unflatten(1, (1, 8, 8))).double()
    # not Adam, which makes steps of the rounding in the zero gradient of a bias before a norm
    sgd = [torch.optim.SGD(m.parameters(), 0.1) for m in (generator, discriminator)]
    draws = torch.Generator().manual_seed(0)
    step = fastgan.GANStep(
        generator, discriminator, latent=3, g_optimizer=sgd[0], d_optimizer=sgd[1], rng=draws, capture="off", **options
    )
    found = [step(torch.randn(8, 1, 8, 8).double(), z=torch.randn(8, 3).double()) for _ in range(2)]
    return found, [generator.state_dict(), discriminator.state_dict()]


def assert_same(discriminator, **options):
    ours = two_steps(copy.deepcopy(discriminator), low_memory=True, **options)
    want = two_steps(discriminator, **options)
    torch.testing.assert_close(ours, want, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("loss", APART)
@pytest.mark.parametrize("build", [normed, Scales])
def test_every_loss_keeps_its_numbers(loss, build):
    assert_same(build().double(), loss=loss)


@pytest.mark.parametrize("penalty", ["r1", "r2", "r1r2", "wgan-gp"])
@pytest.mark.parametrize("build", [plain, spectral, Scales])
def test_every_penalty_keeps_its_numbers(penalty, build):
    assert_same(build().double(), penalty=penalty, penalty_every=2)


@pytest.mark.parametrize("loss", ["bce", "minimax", "lsgan"])
def test_smoothing_on_both_sides_parts_and_several_updates(loss):
    assert_same(plain().double(), loss=loss, label_smoothing=(0.1, 0.2), accumulate=2, d_steps=2)


def test_a_final_sigmoid_is_folded_once():
    with pytest.warns(UserWarning, match="final sigmoid"):
        assert_same(nn.Sequential(*plain(), nn.Sigmoid()).double())


class Counted(torch.autograd.Function):
    """The identity; counts the passes whose graphs are alive."""

    alive = most = 0

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        Counted.alive += x.shape[0] if ctx.needs_input_grad[0] else 0
        Counted.most = max(Counted.most, Counted.alive)
        return x.clone()

    @staticmethod
    def backward(ctx, cotangent):
        (x,) = ctx.saved_tensors
        Counted.alive -= x.shape[0]
        return cotangent


class Counting(nn.Module):
    def __init__(self, per_sample):
        super().__init__()
        self.per_sample, self.head = per_sample, nn.Linear(64, 1)

    def forward(self, x):
        return self.head(Counted.apply(x.flatten(1) * self.head.weight))


@pytest.mark.parametrize(
    ("per_sample", "options", "images"),
    [
        (True, {}, 16),  # one batch of both
        (True, {"low_memory": True}, 8),
        (False, {}, 8),  # two passes anyway: in turn
        (False, {"loss": "relativistic"}, 16),  # the loss reads both
        (False, {"extra_d_loss": lambda outputs: outputs.d_real.mean() * 0}, 16),
    ],
)
def test_the_samples_that_are_alive_at_a_time(per_sample, options, images):
    Counted.alive = Counted.most = 0
    two_steps(Counting(per_sample).double(), **options)
    assert (Counted.most, Counted.alive) == (images, 0)


@pytest.mark.parametrize(
    ("options", "images"),
    [({}, 8), ({"low_memory": False}, 16), ({"loss": "relativistic"}, 16)],
)
def test_large_batches_go_in_turn_by_themselves(monkeypatch, options, images):
    assert IN_TURN_FROM == 64 * 3 * 64 * 64
    monkeypatch.setattr("fastgan.training.step.IN_TURN_FROM", 8 * 64)
    Counted.alive = Counted.most = 0
    two_steps(Counting(True).double(), **options)
    assert Counted.most == images
    monkeypatch.setattr("fastgan.training.step.IN_TURN_FROM", 8 * 64 + 1)
    Counted.most = 0
    two_steps(Counting(True).double(), **options)
    assert Counted.most == 16


def test_what_needs_both_halves_is_refused():
    for options, got in (
        (dict(loss="relativistic"), "loss 'relativistic'"),
        (dict(loss="relativistic-average"), "loss 'relativistic-average'"),
        (dict(extra_d_loss=lambda outputs: 0), "extra_d_loss"),
    ):
        with pytest.raises(
            ValueError, match=f"low_memory needs a loss whose real and fake logits stand apart, got {got}"
        ):
            two_steps(plain().double(), low_memory=True, **options)
    with pytest.raises(ValueError, match="recipe: low_memory goes with losses other than relativistic"):
        TINY.replace(low_memory=True, loss="relativistic")


def test_the_recipe_asks_the_step(tmp_path):
    run = Trainer(TINY.replace(low_memory=True), out=str(tmp_path / "run"), quiet=True)
    assert run.train_step.low_memory and "two passes: low_memory" in run.train_step.explain()
