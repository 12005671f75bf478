"""Augmentation of what the discriminator sees, against loops; its derivatives; instance noise; schedules."""

from __future__ import annotations

import math

import pytest
import torch
from tiny_run import TINY, assert_same_state, noise, trainer

import fastgan
from fastgan.training import augment, schedules
from fastgan.training.assembly import assemble
from fastgan.training.trainer import Trainer


@pytest.fixture(autouse=True)
def reference():
    with fastgan.backend("reference"):
        yield


def images(*shape, **options):
    return torch.randn(*shape, dtype=torch.double, generator=torch.Generator().manual_seed(0), **options)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_shift_is_the_loop(layout):
    x = images(5, 2, 6, 7).to(memory_format=layout)
    rows, columns = torch.tensor([0, 2, -3, 6, 1]), torch.tensor([0, -1, 4, 0, 7])
    found = augment._Shift.apply(x, rows, columns, 7)
    assert found.is_contiguous()
    for n in range(5):
        for i in range(6):
            for j in range(7):
                a, b = i + int(rows[n]), j + int(columns[n])
                want = x[n, :, a, b] if 0 <= a < 6 and 0 <= b < 7 else torch.zeros(2, dtype=torch.double)
                assert torch.equal(found[n, :, i, j], want)


@pytest.mark.parametrize("name", augment.POLICIES)
@pytest.mark.parametrize("shape", [(3, 3, 5, 6), (2, 1, 8, 8)])
def test_derivatives_of_both_orders(name, shape):
    x = images(*shape, requires_grad=True)

    def run(x):
        torch.manual_seed(1)
        return augment.POLICIES[name](x)

    assert torch.autograd.gradcheck(run, x)
    assert torch.autograd.gradgradcheck(run, x)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_all_together_keep_layouts_and_are_the_operations_one_by_one(layout):
    """Both orders, of a weight as the discriminator's: what comes in one layout leaves in it, and its gradient too."""
    x = images(4, 3, 6, 8).to(memory_format=layout).requires_grad_()
    weight = images(4, 3, 6, 8).square().to(memory_format=layout).requires_grad_()
    both = {}
    for together in (True, False):
        torch.manual_seed(2)
        y = x
        if together:
            y = augment.Augment(tuple(augment.POLICIES))(x)
            assert y.is_contiguous(memory_format=layout)
        else:
            for name in augment.POLICIES:
                y = augment.POLICIES[name](y)
        (first,) = torch.autograd.grad((weight * y.square()).sum(), x, create_graph=True)
        assert not together or first.is_contiguous(memory_format=layout)
        both[together] = y, first, *torch.autograd.grad(first.square().sum(), (x, weight))
    for a, b in zip(both[True], both[False], strict=True):
        assert torch.allclose(a, b, rtol=1e-12, atol=1e-12)


def test_colour_stays_in_its_ranges():
    x = images(400, 3, 4, 4)
    torch.manual_seed(0)
    y = augment.colour(x)
    shift = y.mean((1, 2, 3)) - x.mean((1, 2, 3))  # saturation and contrast keep the mean
    assert shift.abs().max() <= 0.5 and shift.max() > 0.45 and shift.min() < -0.45
    grey, before = (t - t.mean((1, 2, 3), keepdim=True) for t in (y.mean(1, keepdim=True), x.mean(1, keepdim=True)))
    contrast = (grey / before).flatten(1)
    assert torch.allclose(contrast, contrast[:, :1].expand_as(contrast))  # one factor for each image
    assert 0.5 <= contrast.min() < 0.55 and 1.45 < contrast.max() <= 1.5


def test_cutout_is_a_square_of_half_a_side():
    torch.manual_seed(0)
    y = augment.cutout(torch.ones(300, 2, 9, 8))
    holes = (y[:, 0] == 0).sum((1, 2))
    assert torch.equal(y[:, 0], y[:, 1]) and holes.max() == 5 * 4 and holes.min() >= 2 * 2


def test_translation_moves_by_an_eighth():
    torch.manual_seed(0)
    x = torch.zeros(300, 1, 16, 16)
    x[:, :, 8, 8] = 1
    at = augment.translation(x).flatten(1).argmax(1)
    assert {int(i) // 16 - 8 for i in at} == set(range(-2, 3)) == {int(i) % 16 - 8 for i in at}


def test_r1_is_that_of_the_augmented_images():
    recipe = TINY.replace(augment="colour,translation,cutout", penalty="r1", model_options={"dropout": 0.0})
    _, discriminator, step = assemble(recipe, torch.device("cpu"))
    real = torch.randn(4, 1, 8, 8)
    torch.manual_seed(3)
    z = torch.randn(4, 5)
    state = torch.get_rng_state()
    seen = step.augment(real).requires_grad_()
    want = 10 / 2 * torch.autograd.grad(discriminator(seen).sum(), seen)[0].square().sum((1, 2, 3)).mean()
    torch.set_rng_state(state)
    assert float(step(real, z=z)["penalty"]) == pytest.approx(float(want), rel=1e-5)


EVERYTHING = {
    "augment": "color,translation",
    "instance_noise": 0.2,
    "ema": None,
    "ema_half_life": 40.0,
    "schedule": "cosine",
    "warm_up": 2,
    "grad_clip": 1.0,
    "label_smoothing": 0.1,
    "held_out": 2,
    "watch_every": 2,
}


def test_resuming_is_exact_with_every_option(tmp_path):
    recipe = TINY.replace(**EVERYTHING)
    whole = trainer(noise(), tmp_path / "whole", recipe)
    whole.fit()
    at_three = trainer(noise(), tmp_path / "parts", recipe, target=lambda run: run.step == 3)
    assert at_three.fit().step == 3
    torch.manual_seed(999)
    parts = Trainer(recipe, resume=tmp_path / "parts", images=noise(), quiet=True)
    parts.fit()
    assert_same_state(whole, parts)
    assert whole.train_step.g_optimizer.param_groups[0]["lr"] < recipe.g_lr
    assert "overfit" not in whole.metrics  # eight training images of ten, too few to look at


def test_rates():
    recipe = TINY.replace(steps=110, warm_up=10)
    rate = lambda step, **changes: schedules.rate_at(recipe.replace(**changes), step)
    assert [rate(step) for step in (0, 4, 9, 10, 109)] == [0.1, 0.5, 1.0, 1.0, 1.0]
    assert rate(60, schedule="linear") == 0.5 and rate(110, schedule="linear") == 0.0
    assert rate(35, schedule="cosine") == pytest.approx(0.5 * (1 + math.cos(math.pi / 4)))


def test_the_average_forgets_half_in_its_half_life():
    recipe = TINY.replace(ema=None, ema_half_life=1000.0)
    decay = schedules.average_decay(recipe, 1 << 20)
    assert decay ** (1000 / recipe.batch_size) == pytest.approx(0.5)
    assert schedules.average_decay(recipe, 4096) ** (0.05 * 4096 / 4) == pytest.approx(0.5)
    assert schedules.average_decay(recipe, 4096) == schedules.average_decay(recipe, 8191)  # a graph for each octave
    assert schedules.average_decay(TINY, 7) == TINY.ema


def test_instance_noise_fades():
    recipe = TINY.replace(instance_noise=0.4, steps=8)
    assert [schedules.noise_at(recipe, step) for step in (0, 2, 4, 7)] == [0.4, 0.2, 0.0, 0.0]
    added = augment.Augment((), torch.tensor(0.4))(torch.zeros(64, 1, 32, 32))
    assert added.std().item() == pytest.approx(0.4, rel=0.02)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("augment=blur", "augment must be none, ada or some of colour,translation,cutout, got 'blur'"),
        ("augment=cutout,cutout", "augment must be none, ada or some of"),
        ("schedule=step", "schedule must be one of constant, linear, cosine, got 'step'"),
        ("warm_up=-1", "warm_up must be at least 0, got -1"),
        ("warm_up=1e9", "warm_up must be below steps, which are"),
        ("grad_clip=0", "grad_clip must be none or finite and above 0, got 0"),
        ("label_smoothing=0.5", r"label_smoothing must be in \[0, 0.5\), got 0.5"),
        ("instance_noise=-1", "instance_noise must be finite and at least 0, got -1"),
        ("ema_half_life=0", "ema_half_life must be none or finite and above 0, got 0"),
        ("ema_half_life=100", "two ways to say one thing"),
        ("held_out=-1", "held_out must be at least 0, got -1"),
        ("watch_every=x", "watch_every must be a whole number, got 'x'"),
    ],
)
def test_wrong_settings(setting, message):
    with pytest.raises((ValueError, TypeError), match=message):
        TINY.with_settings([setting])


def test_smoothing_needs_a_target():
    with pytest.raises(ValueError, match="label_smoothing goes with bce, minimax, lsgan, got hinge"):
        TINY.replace(loss="hinge", label_smoothing=0.1)


def test_held_out_images_are_not_trained_on(tmp_path):
    run = trainer(noise(), tmp_path / "run", TINY.replace(held_out=3))
    kept = {0, 3, 6}
    trained = {tuple(x.flatten().tolist()) for x in run.batches.source.images}
    assert trained == {tuple(x.flatten().tolist()) for i, x in enumerate(noise().images) if i not in kept}
    with pytest.raises(ValueError, match="held_out must be below the 10 images, got 10"):
        trainer(noise(), tmp_path / "other", TINY.replace(held_out=10))
