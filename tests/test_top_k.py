"""A generator that learns from its best images alone, and targets that are smoothed on both sides."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny_run import TINY, assert_same_state, noise, trainer
from torch import nn

import fastgan
from fastgan.training import schedules
from fastgan.training.trainer import Trainer


@pytest.fixture(autouse=True)
def reference():
    with fastgan.backend("reference"):
        yield


class Scales(nn.Module):
    """Two scales of logits."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(1, 1, 3), nn.Conv2d(1, 1, 4, 2)

    def forward(self, x):
        return [self.a(x), self.b(x)]


def a_step(discriminator, **options):
    torch.manual_seed(0)
    generator = nn.Sequential(nn.Linear(3, 64), nn.Unflatten(1, (1, 8, 8)))
    generator, discriminator = generator.double(), discriminator.double()
    sgd = [torch.optim.SGD(m.parameters(), 0.1) for m in (generator, discriminator)]
    step = fastgan.GANStep(
        generator, discriminator, latent=3, g_optimizer=sgd[0], d_optimizer=sgd[1], capture="off", **options
    )
    return generator, discriminator, step


@pytest.mark.parametrize("loss", ["bce", "minimax", "lsgan", "hinge", "wasserstein"])
def test_the_best_images_alone_move_the_generator(loss):
    generator, d, step = a_step(nn.Sequential(nn.Flatten(), nn.Linear(64, 1)), loss=loss, top_k=0.6)
    real, z = torch.randn(5, 1, 8, 8).double(), torch.randn(5, 3).double()
    before = copy.deepcopy(generator)
    metrics = step(real, z=z)
    logits = d(before(z))[:, 0]
    best = logits[logits.argsort(descending=True)[:3]]
    want = fastgan.functional.gan_loss(best, kind=loss, side="g")
    assert float(metrics["g_loss"]) == pytest.approx(want.item())
    grads = torch.autograd.grad(want, list(before.parameters()))
    for p, q, grad in zip(generator.parameters(), before.parameters(), grads, strict=True):
        assert torch.allclose(p, q - 0.1 * grad)


def test_several_scales_choose_the_same_images():
    generator, d, step = a_step(Scales(), top_k=0.5)
    real, z = torch.randn(4, 1, 8, 8).double(), torch.randn(4, 3).double()
    before = copy.deepcopy(generator)
    metrics = step(real, z=z)
    scales = d(before(z))
    score = sum(s.flatten(1).mean(1) for s in scales)
    kept = score.argsort(descending=True)[:2]
    want = fastgan.functional.gan_loss([s[kept] for s in scales], kind="bce", side="g")
    assert float(metrics["g_loss"]) == pytest.approx(want.item())


def test_the_share_falls_by_a_hundredth_an_epoch():
    recipe = TINY.replace(top_k=0.5)
    found = [schedules.share_at(recipe, epoch) for epoch in (0, 13, 14, 28, 29, 68, 69, 1000)]
    assert found == [1, 1, 0.875, 0.875, 0.75, 0.625, 0.5, 0.5]  # 0.99^13 = 0.878, 0.99^14 = 0.869, 0.99^69 = 0.4998
    assert schedules.share_at(TINY, 1000) == 1


def test_a_run_with_both_options_resumes_exactly(tmp_path):
    recipe = TINY.replace(top_k=0.25, label_smoothing=0.1, fake_smoothing=0.2, steps=60, checkpoint_every=25)
    recipe = recipe.replace(sample_every=0, log_every=10)
    whole = trainer(noise(), tmp_path / "whole", recipe)
    whole.fit()  # 24 epochs of ten images
    assert whole.train_step.top_k == 0.875
    trainer(noise(), tmp_path / "parts", recipe, target=lambda run: run.step == 50).fit()
    parts = Trainer(recipe, resume=tmp_path / "parts", images=noise(), quiet=True)
    parts.fit()
    assert_same_state(whole, parts)


@pytest.mark.parametrize("loss", ["bce", "minimax", "lsgan"])
def test_both_targets_are_smoothed(loss):
    _, d, step = a_step(nn.Sequential(nn.Flatten(), nn.Linear(64, 1)), loss=loss, label_smoothing=(0.1, 0.2))
    before = copy.deepcopy(d)
    real, z = torch.randn(4, 1, 8, 8).double(), torch.randn(4, 3).double()
    fake = step.generator(z).detach()
    found = float(step(real, z=z)["d_loss"])
    r, f = before(real), before(fake)
    if loss == "lsgan":
        want = ((r - 0.9).square() + (f - 0.2).square()).mean() / 2
    else:
        bce = nn.functional.binary_cross_entropy_with_logits
        want = bce(r, torch.full_like(r, 0.9)) + bce(f, torch.full_like(f, 0.2))
    assert found == pytest.approx(want.item())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["top_k=0"], r"top_k must be in \(0, 1\], and 1 with relativistic, relativistic-average, got 0.0"),
        (["top_k=2"], r"top_k must be in \(0, 1\]"),
        (["loss=relativistic", "top_k=0.5"], r"top_k must be in \(0, 1\], and 1 with relativistic"),
        (["fake_smoothing=0.5"], r"fake_smoothing must be in \[0, 0.5\), got 0.5"),
        (["loss=hinge", "fake_smoothing=0.1"], "fake_smoothing goes with bce, minimax, lsgan, got hinge"),
    ],
)
def test_wrong_settings(changes, message):
    with pytest.raises(ValueError, match=message):
        TINY.with_settings(changes)


def test_the_step_refuses_them_too():
    for options in (dict(top_k=0), dict(top_k=1.5), dict(loss="relativistic", top_k=0.5)):
        with pytest.raises(ValueError, match=r"GANStep: top_k must be in \(0, 1\], and 1 with relativistic"):
            a_step(nn.Sequential(nn.Flatten(), nn.Linear(64, 1)), **options)
