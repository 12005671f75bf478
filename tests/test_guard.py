"""The guard beyond losses: variety, gradients, overfitting, and what follows a collapse."""

from __future__ import annotations

import math

import pytest
import torch
from tiny_run import TINY, assert_same_state, noise, trainer

import fastgan
from fastgan.cli import main
from fastgan.data.imageset import ImageSet
from fastgan.domains import domain_of
from fastgan.domains.text import _different, _places
from fastgan.functional import gan_loss
from fastgan.functional.losses import KINDS
from fastgan.training import checkpoint, recovery
from fastgan.training.guard import (
    CALM,
    CLIFF,
    GROWN,
    LATE,
    LEAP,
    LEAPING,
    LOOKS,
    OVER,
    PATIENCE,
    STARTED,
    STEEP,
    UNDECIDED,
    Collapse,
    Guard,
    Leaps,
    leaps_of,
)
from fastgan.training.health import Health, gradient_norms
from fastgan.training.rundir import read_log
from fastgan.training.trainer import Trainer


@pytest.fixture(autouse=True)
def reference():
    with fastgan.backend("reference"):
        yield


@pytest.mark.parametrize("loss", KINDS)
def test_every_loss_has_the_guards_numbers(loss, tmp_path):
    """Two logged steps of a run, and a discriminator that is certain or grows without bound."""
    run = trainer(noise(), tmp_path / "run", TINY.replace(loss=loss, steps=2, watch_every=1))
    run.fit()
    records = read_log(tmp_path / "run/log.jsonl")
    assert [r["step"] for r in records] == [1, 2] and all("d_loss" in r for r in records)
    grown = {"logit_real": 1e9, "logit_fake": -1e9}
    assert "grow without bound" in told(Guard(loss, 64), [grown] * GROWN)[0][1]
    if loss == "wasserstein":  # a critic's loss has no end
        return
    zero = torch.zeros(4)
    undecided = gan_loss(zero, zero, kind=loss, side="d").item() if loss != "lsgan" else 0.25  # at logits of 1/2
    assert UNDECIDED[loss] == pytest.approx(undecided)
    assert "has been certain" in told(Guard(loss, 64), [{"d_loss": 0.01 * undecided}] * PATIENCE)[0][1]


def look(diversity, coverage=0.9):
    return {"diversity": diversity, "coverage": coverage}


def told(guard, readings, start=STARTED, every=100):
    """[(step, warning)] of readings, one every so many steps."""
    found = [(start + i * every, guard.check(start + i * every, reading)) for i, reading in enumerate(readings)]
    return [(step, text) for step, text in found if text]


def test_loss_of_variety_is_told_once_and_again_after_a_recovery():
    guard = Guard("bce", 64)
    fine, lost = [look(0.8)] * 3, [look(0.1, 0.05)] * 5
    warnings = told(guard, fine + lost + fine + lost)
    assert [step for step, _ in warnings] == [STARTED + 100 * (3 + LOOKS - 1), STARTED + 100 * (11 + LOOKS - 1)]
    assert isinstance(warnings[0][1], Collapse)
    assert (
        "few kinds of samples (10% of the data's variety; 5% of the data have a sample near, at best it was 90%"
        in warnings[0][1]
    )
    assert guard.healthy == STARTED + 100 * 10


def test_an_untrained_generator_is_no_collapse_and_one_that_stays_so_is():
    assert not told(Guard("bce", 64), [look(0.05, 0.0)] * 10, start=0, every=STARTED // 11)
    ((step, _),) = told(Guard("bce", 64), [look(0.1, 0.0)] * 100)
    assert step == LATE + 100 * (LOOKS - 1)


def test_coverage_that_falls_is_a_collapse_and_coverage_that_never_was_is_none():
    ((step, _),) = told(Guard("bce", 64), [look(0.7, 0.5), *[look(0.6, 0.1)] * 3])
    assert step == STARTED + 100 * LOOKS
    assert not told(Guard("bce", 64), [look(0.7, 0.5), *[look(0.45, 0.2)] * 5])
    assert not told(Guard("bce", 64), [look(0.7, 0.2), *[look(0.6, 0.0)] * 5])


def test_gradients_that_explode():
    guard = Guard("bce", 64)
    usual = [{"g_grad": 1.0 + i % 3, "d_grad": 2.0} for i in range(20)]
    assert not told(guard, usual)
    ((step, text),) = told(guard, [{"g_grad": 3 * STEEP, "d_grad": 2.0}] * 5, start=5000)
    assert step == 5000 + 100 * (GROWN - 1) and isinstance(text, Collapse)
    assert "the generator's gradients explode" in text
    guard = Guard("bce", 64)
    ((step, _),) = told(guard, [*usual, {"g_grad": 2.0, "d_grad": 3 * CLIFF}, *usual])
    assert step == STARTED + 100 * len(usual)


def test_a_certain_discriminator_has_no_usual_gradients():
    """Norms as of a `dcgan-28` that learns although its discriminator has a hundred times its rate."""
    sure, errs = {"d_loss": 1e-9, "d_grad": 1e-6}, {"d_loss": 2.0, "d_grad": 30.0}
    assert not told(Guard("bce", 64), [*[sure] * (PATIENCE - 1), errs] * 5)
    ((_, text),) = told(Guard("bce", 64), [*[errs] * 10, {"d_loss": 9.0, "d_grad": 31.0 * CLIFF}])
    assert "the discriminator's gradients explode" in text
    ((_, text),) = told(Guard("wasserstein", 64), [*[sure] * 10, {"d_loss": -9.0, "d_grad": 30.0}])
    assert "the discriminator's gradients explode" in text  # a critic's loss says nothing of how sure it is


def test_a_discriminator_that_loses_its_hold():
    leaps = lambda share: {"d_loss": 0.25, "d_leaps": share}
    readings = map(leaps, [0.0, 1.01 * LEAPING, 0.9, 1.1 * CALM, 0.9, 0.9 * CALM, 2 * LEAPING])
    warnings = told(Guard("lsgan", 64), list(readings), every=1)
    assert [step for step, _ in warnings] == [STARTED + 1, STARTED + 6] and isinstance(warnings[0][1], Collapse)
    assert "has lost its hold (its loss has been more than 2.5 times what one pays" in warnings[0][1]
    assert not told(Guard("lsgan", 64), [leaps(1.0)], start=STARTED - 1)
    assert [loss for loss in KINDS if leaps_of(loss) is not None] == ["lsgan"]
    guard = Guard("lsgan", 64)
    guard.check(STARTED, leaps(1.0))
    guard.check(STARTED + 1, look(0.8))
    assert guard.healthy == 0  # a rollback must not end where the discriminator has no hold


@pytest.mark.parametrize("scales", [1, 3])
def test_leaps(scales):
    """Three in a row, or of five, are more than LEAPING; one alone is not, however high."""
    above, below = (torch.tensor(scales * UNDECIDED["lsgan"] * LEAP * factor) for factor in (1.01, 0.99))
    over = {}
    for name, losses in {"one": [math.inf], "two": [above] * 2, "three": [above, below, above, above]}.items():
        leaps = Leaps("lsgan")
        for loss in [below] * 5 + [torch.as_tensor(x) for x in losses] + [below] * 5:
            leaps.update(STARTED, loss, scales)
        copy = Leaps("lsgan")
        copy.load_state_dict(leaps.state_dict())
        over[name] = leaps.peak > LEAPING
        for one in (leaps, copy):
            peak, later = one.read(), one.read()
            assert peak == pytest.approx(later * (1 - 1 / OVER) ** -5) and later > 0
    assert over == {"one": False, "two": False, "three": True}
    leaps = Leaps("lsgan")
    for step in range(1, STARTED):  # the first steps are told of by their end alone
        leaps.update(step, above if step < 100 else below, scales)
    assert leaps.peak < 1e-4


class OnGpu(torch.Tensor):
    """A CPU tensor that says that it lies on a GPU."""

    is_cuda = True


def test_leaps_are_followed_on_a_gpu_as_on_a_cpu():
    losses = torch.rand(300, generator=torch.Generator().manual_seed(0)) * 2
    losses[210] = math.nan
    here, there = Leaps("lsgan"), Leaps("lsgan")
    for step, loss in enumerate(losses, start=1):
        here.update(step, loss)
        there.update(step, loss.as_subclass(OnGpu))
        assert isinstance(there._share, torch.Tensor) and there.peak == pytest.approx(here.peak, rel=1e-5)
        if step % 50 == 0:
            assert there.read() == pytest.approx(here.read(), rel=1e-5)
    assert 0 < here.peak < 1 and there.state_dict() == pytest.approx(here.state_dict(), rel=1e-5)


def test_a_loss_of_several_scales_is_measured_by_their_number(tmp_path):
    """hifigan-small has eight score maps: the losses of a discriminator that cannot tell are 2 in all."""
    recipe = fastgan.recipes()["hifigan-small"].replace(
        model_options={"g_width": 8, "d_width": 4}, steps=1, batch_size=2, eval_every=0, held_out=0, sample_count=2
    )
    run = Trainer(recipe, out=tmp_path / "run", device="cpu", quiet=True)
    run.fit()
    assert run.train_step.scales == run.guard.scales == 8
    assert run.guard._share({"d_loss": 2.0}) == 1.0


def test_leaps_between_two_logged_steps_are_told_at_once(tmp_path):
    """On a CPU; that step is logged, and no other one is."""
    run = trainer(
        noise(),
        tmp_path / "run",
        TINY.replace(loss="lsgan", steps=230, log_every=50, watch_every=0, checkpoint_every=0, sample_every=0),
    )
    original = run.train_step.run
    leap = lambda *args: original(*args) | ({"d_loss": torch.tensor(99.0)} if 211 <= run.step <= 214 else {})
    run.train_step.run = leap
    run.fit()
    assert [r["step"] for r in read_log(tmp_path / "run/log.jsonl")] == [1, 50, 100, 150, 200, 214, 230]
    (note,) = [note for note in run.notes if "has lost its hold" in note]
    assert note.startswith("step 214: ")


def test_a_run_that_logs_seldom_has_no_usual_gradients_at_first():
    """At 32 x 32 r1-dcgan-64's generator has a norm of 0.05 at step 1 and 0.6 at steps 250, 500 and 750."""
    first, later = {"g_grad": 0.05, "d_grad": 2.0}, {"g_grad": 20 * 0.05, "d_grad": 2.0}
    assert not told(Guard("bce", 64), [first, *[later] * 10], start=1, every=250)
    ((step, _),) = told(Guard("bce", 64), [first, *[later] * 10, {"g_grad": 100.0}, *[later] * 4], start=1, every=250)
    assert step == 1 + 250 * 11


def test_a_discriminator_that_knows_its_images_by_heart():
    guard = Guard("bce", 64)
    ((_, text),) = told(guard, [{"overfit": v} for v in (0.1, 0.9, 0.3, 0.9, 0.9, 0.9)])
    assert "90% of the way to generated ones" in text and "augment=" in text and not isinstance(text, Collapse)


def test_what_health_sees():
    images = torch.randint(0, 256, (40, 1, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    known, held = ImageSet(images[:20]), ImageSet(images[20:])
    health = Health(known, held, labelled=False)
    z = torch.arange(20.0)[:, None]

    class Memory(torch.nn.Module):  # returns the image whose number z is, or always the same one
        def __init__(self, kinds):
            super().__init__()
            self.pixels = torch.nn.Parameter(images[:20].float() / 127.5 - 1)
            self.kinds = kinds

        def forward(self, z):
            return self.pixels[(z[:, 0].long() % self.kinds)]

    class Judge(torch.nn.Module):  # knows its training images
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(()))

        def forward(self, x):
            pixels = (x * 127.5 + 127.5).round().to(torch.uint8)
            return self.weight * (pixels.flatten(1)[:, None] == images[:20].flatten(1)).all(2).any(1).float()

    state = torch.get_rng_state()
    found = health.look(Memory(20), Judge(), z, None)
    assert found["diversity"] == pytest.approx(1.0, rel=1e-3) and found["coverage"] == 1.0
    assert found["overfit"] == 0.0  # generated and known images alike
    lost = health.look(Memory(1), Judge(), z, None)
    assert lost["diversity"] < 1e-3 and lost["coverage"] < 0.5
    assert torch.equal(state, torch.get_rng_state())


class Repeats(torch.nn.Module):
    """Gives one of so many samples, by the number that z is."""

    def __init__(self, samples, kinds):
        super().__init__()
        self.samples, self.kinds = torch.nn.Parameter(samples), kinds

    def forward(self, z):
        return self.samples[z[:, 0].long() % self.kinds]


@pytest.mark.parametrize("name", ["wavegan", "hifigan-small", "clip-32", "chargan", "dcgan-28"])
def test_every_kind_of_samples_is_watched(name):
    """Other training samples are no collapse; one or three of them again and again are one, after healthy looks."""
    domain = domain_of(fastgan.recipes()[name])
    samples = domain.load(torch.device("cpu"))
    health, z = domain.health(samples, None), torch.arange(64.0)[:, None]
    others = samples.pick(torch.randperm(len(samples), generator=torch.Generator().manual_seed(0))[:64])
    found = {kinds: health.look(Repeats(others, kinds), torch.nn.Identity(), z, None) for kinds in (64, 3, 1)}
    assert found[64]["diversity"] > 0.8 and found[64]["coverage"] > 0.5 and found[1]["diversity"] < 0.01
    assert not told(Guard("bce", 64, narrow=domain.narrow), [found[64]] * 20)
    for lost in (1, 3):
        ((step, warning),) = told(Guard("bce", 64, narrow=domain.narrow), [*[found[64]] * 3, *[found[lost]] * 4])
        assert step == STARTED + 100 * (3 + LOOKS - 1) and isinstance(warning, Collapse)
    ((step, _),) = told(Guard("bce", 64, narrow=domain.narrow), [found[1]] * 100)
    assert step == LATE + 100 * (LOOKS - 1)


@pytest.mark.usefixtures("unraced")
def test_a_run_of_lines_looks_and_warns_of_one_line_for_all(tmp_path, monkeypatch):
    monkeypatch.setattr("fastgan.training.guard.STARTED", 4)
    recipe = fastgan.recipes()["chargan"].replace(
        model_options={"width": 8, "blocks": 1},
        **dict(batch_size=4, steps=10, eval_every=0, sample_count=12, watch_every=1, sample_every=0),
    )
    run = Trainer(recipe, out=tmp_path / "run", device="cpu", quiet=True)
    look = run.health.look
    constant = Repeats(run.images.pick(torch.arange(1)), 1)
    run.health.look = lambda g, *rest: look(constant if run.step > 6 else g, *rest)
    run.fit()
    assert all({"diversity", "coverage"} <= record.keys() for record in read_log(tmp_path / "run/log.jsonl"))
    (note,) = [note for note in run.notes if "few kinds" in note]
    assert note.startswith("step 8: the generator makes few kinds of samples (0% of the data's variety")


def test_the_end_of_a_line_is_no_variety():
    line = torch.nn.functional.one_hot(torch.tensor([[1, 2, 0, 3], [1, 2, 0, 0], [1, 2, 3, 0]]), 4).mT.float()
    places = _places(line)
    assert torch.equal(places[0], places[1]) and not torch.equal(places[0], places[2])
    assert [_different(places[list(rows)]) for rows in ((0, 1), (0, 2), (0, 1, 2))] == [0.0, 1.0, 0.5]


def test_gradient_norms():
    layer = torch.nn.Linear(2, 1)
    assert gradient_norms(layer, layer) == {}
    layer(torch.ones(1, 2)).sum().backward()
    assert gradient_norms(layer, layer) == pytest.approx({"g_grad": 3**0.5, "d_grad": 3**0.5})


# ---- what follows ---------------------------------------------------------------------------------------------------

LONG = TINY.replace(steps=20, watch_every=2, checkpoint_every=2, keep_checkpoints=20, sample_count=8, log_every=2)


def failing(path, steps, on_collapse, recipe=LONG, **options):
    """A run that is seen to collapse at `steps`, each time it comes there with full rates or half of them."""
    run = trainer(noise(), path, recipe, on_collapse=on_collapse, **options)
    return _seen(run, steps)


def _seen(run, steps):
    run.guard.check = lambda step, metrics, check=run.guard.check: (
        Collapse(f"step {step}: seen") if step in steps and run.schedules.slowed > 0.25 else check(step, metrics)
    )
    return run


def test_warning_goes_on(tmp_path, capsys):
    result = failing(tmp_path / "run", (10,), "warn").fit()
    assert (result.step, result.reason) == (20, "steps") and "warning: step 10: seen" in capsys.readouterr().err


def test_stop(tmp_path):
    result = failing(tmp_path / "run", (10,), "stop").fit()
    assert (result.step, result.reason) == (10, "collapse")
    assert "stopped at a collapse" in (tmp_path / "run/report.html").read_text()


def test_rollback_goes_on_from_the_last_good_checkpoint_at_half_the_rates(tmp_path, capsys):
    run = failing(tmp_path / "run", (10,), "rollback")
    run.guard.healthy = 6
    result = run.fit()
    said = capsys.readouterr().err
    assert (result.step, result.reason, run.rollbacks) == (20, "steps", 2)
    assert "step 10: gone back to step 8 with 0.5 of the rates (rollback 1 of 3)" in said
    assert "with 0.25 of the rates (rollback 2 of 3)" in said
    assert run.train_step.g_optimizer.param_groups[0]["lr"] == pytest.approx(TINY.g_lr / 4)
    assert [r["step"] for r in read_log(tmp_path / "run/log.jsonl")] == [1, *range(2, 21, 2)]


def test_a_run_that_was_rolled_back_resumes_exactly(tmp_path):
    whole = failing(tmp_path / "whole", (10,), "rollback")
    whole.fit()
    failing(tmp_path / "parts", (10,), "rollback", target=lambda run: run.step == 14).fit()
    torch.manual_seed(77)
    parts = _seen(Trainer(resume=tmp_path / "parts", images=noise(), quiet=True, on_collapse="rollback"), (10,))
    parts.fit()
    assert_same_state(whole, parts)
    assert parts.rollbacks == 2


def test_rollback_from_numbers_that_are_not_finite(tmp_path):
    run = trainer(noise(), tmp_path / "run", LONG, on_collapse="rollback")
    original = run.train_step.run

    def poisoned(*args):
        metrics = original(*args)
        return metrics | {"g_loss": torch.tensor(float("nan"))} if run.step == 11 and run.rollbacks == 0 else metrics

    run.train_step.run = poisoned
    result = run.fit()
    assert (result.step, run.rollbacks) == (20, 1)


def test_rollbacks_come_to_an_end(tmp_path, monkeypatch):
    monkeypatch.setattr(recovery, "MOST", 1)
    result = failing(tmp_path / "run", (10,), "rollback").fit()
    assert (result.step, result.reason) == (10, "collapse")


def test_without_a_good_checkpoint_the_run_stops(tmp_path, capsys):
    result = failing(tmp_path / "run", (10,), "rollback", LONG.replace(checkpoint_every=0)).fit()
    assert result.reason == "collapse" and "no checkpoint is older than it" in capsys.readouterr().err


def test_checkpoints_after_the_good_one_are_put_aside(tmp_path):
    run = trainer(noise(), tmp_path / "run", LONG, on_collapse="rollback")
    check = run.guard.check

    def sick(step, metrics):
        run.guard.healthy = min(run.guard.healthy, 4)
        return Collapse("seen") if step == 10 and run.rollbacks == 0 else check(step, metrics)

    run.guard.check = sick
    run.fit()
    kept = checkpoint.list_steps(tmp_path / "run/checkpoints")
    aside = sorted(p.name for p in (tmp_path / "run/checkpoints").glob("*.collapsed"))
    assert aside == [f"step-{step:07d}.collapsed" for step in (6, 8, 10)] and kept[:2] == [2, 4]


def test_wrong_actions(tmp_path, capsys):
    with pytest.raises(ValueError, match="on_collapse must be one of warn, rollback, stop, got 'panic'"):
        trainer(noise(), tmp_path / "run", TINY, on_collapse="panic")
    assert main(["train", "--recipe", "dcgan-28", "--out", str(tmp_path / "a"), "--on-collapse", "panic"]) == 2
    assert "invalid choice: 'panic'" in capsys.readouterr().err


def harming(run, at):
    """The guard's check of a run, whose rates become a hundredfold at a step, once."""
    check = run.guard.check

    def harmed(step, metrics):
        if step == at and not run.rollbacks:
            for group in (g for optimizer in run.train_step.optimizers() for g in optimizer.param_groups):
                group["lr"] *= 100
        return check(step, metrics)

    return harmed


def test_a_run_that_really_breaks_is_told_before_it_is_seen_and_saved_by_a_rollback(tmp_path, capsys):
    """An LSGAN without norm breaks once its rates are a hundredfold, and stays broken unless it goes back.

    The rates change at step 310. At 2e-2 from the start it breaks as well, but the step follows from rounding: 330 on a
    Zen 5, 210 on a Zen 1.
    """
    recipe = fastgan.recipes()["dcgan-64"].replace(
        model_options={"g_width": 4, "d_width": 8, "d_norm": False},
        **{"batch_size": 8, "image_size": 16, "loss": "lsgan", "g_lr": 1e-3, "d_lr": 1e-3, "steps": 400},
        **{"log_every": 10, "watch_every": 50, "eval_every": 200, "sample_every": 0, "checkpoint_every": 50},
        sample_count=16,
    )
    found = {}
    for action in ("warn", "rollback"):
        run = Trainer(recipe, out=tmp_path / action, device="cpu", quiet=True, on_collapse=action)
        run.guard.check = harming(run, 310)
        run.fit()
        found[action] = [r["kcd"] for r in read_log(tmp_path / action / "log.jsonl") if "kcd" in r]
        first = next(note for note in run.notes if "has lost its hold" in note)
        assert 310 < int(first.split(":")[0].removeprefix("step ")) < 320  # before the next logged step
    assert run.rollbacks == 1
    (before, broken), (_, saved) = found["warn"], found["rollback"]
    assert broken > 3 * before  # the metric shows at step 400 what the guard saw before
    assert broken > 2 * saved
