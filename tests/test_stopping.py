"""A plateau: the metric is flat and the discriminator cannot tell; what ends, what does not, what the report says."""

from __future__ import annotations

import types

import pytest
from tiny_run import TINY, assert_same_state, noise, trainer

import fastgan
from fastgan.cli import main
from fastgan.training import evaluation as module
from fastgan.training.evaluation import Evaluation
from fastgan.training.stopping import StopRules
from fastgan.training.trainer import Trainer


@pytest.fixture(autouse=True)
def reference():
    with fastgan.backend("reference"):
        yield


def ended(scores, right, plateau=4):
    """At which evaluation the run ends, or None."""
    rules = StopRules(time_limit=None, target=None, patience=None, measured=True, plateau=plateau)
    evaluation = Evaluation(types.SimpleNamespace(metric="kcd", words="kernel distance"))
    for number, (score, share) in enumerate(zip(scores, right, strict=True), 1):
        run = types.SimpleNamespace(metrics={"right_real": share + 0.1, "right_fake": share - 0.1})
        if rules.after_log({"kcd": score}, evaluation, run) == "plateau":
            assert "plateau: no change in" in rules.in_words("plateau", evaluation)
            return number
    return None


def test_a_flat_metric_and_a_discriminator_that_cannot_tell_end_a_run():
    scores = [4.0, 2.0, 1.0, 0.52, 0.5, 0.53, 0.49, 0.5, 0.5]
    assert ended(scores, [0.55] * 9) == 7  # 0.51 and 0.51; before it 0.76 and 0.515
    assert ended(scores, [0.62] * 9) is None  # it can tell
    assert ended(scores, [0.38] * 9) is None
    assert ended(scores, [0.95] * 4 + [0.5] * 5) == 8  # 0.61 before
    assert ended(scores, [0.55] * 9, plateau=8) is None


def test_a_metric_that_moves_is_no_plateau():
    assert ended([0.9**k for k in range(20)], [0.5] * 20) is None
    assert ended([1.1**k for k in range(20)], [0.5] * 20) is None


def test_a_run_ends_there_and_its_report_says_what_that_means(tmp_path, monkeypatch):
    monkeypatch.setattr("fastgan.training.stopping.FLAT", 1e9)
    monkeypatch.setattr("fastgan.training.stopping.UNSURE", 1.0)
    recipe = TINY.replace(eval_every=1, steps=9)
    result = trainer(noise(), tmp_path / "run", recipe, plateau=4).fit()
    assert result.reason == "plateau" and result.step == 4
    text = (tmp_path / "run/report.html").read_text()
    assert "a plateau: the kernel distance was" in text and "texts call this equilibrium" in text


def test_a_resumed_run_remembers_its_last_evaluations(tmp_path, monkeypatch):
    monkeypatch.setattr("fastgan.training.stopping.FLAT", 1e9)
    monkeypatch.setattr("fastgan.training.stopping.UNSURE", 1.0)
    recipe = TINY.replace(eval_every=1, steps=9, checkpoint_every=1)
    whole = trainer(noise(), tmp_path / "whole", recipe, plateau=5)
    whole.fit()
    trainer(noise(), tmp_path / "parts", recipe, plateau=5, target=lambda run: run.step == 3).fit()
    parts = Trainer(recipe, resume=tmp_path / "parts", images=noise(), quiet=True, plateau=5)
    assert parts.fit().step == 5 == whole.step
    assert_same_state(whole, parts)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--plateau 0 --eval-every 9", "must be a whole number of at least 1, got '0'"),
        ("--plateau 3 --eval-every 9", "plateau must be at least 4, got 3"),
        ("--plateau 4", "set eval_every (--eval-every STEPS)"),
        ("--plateau 4 --eval-every 9 --set loss=lsgan", "plateau goes with the losses bce, minimax, hinge, got lsgan"),
    ],
)
def test_wrong_plateaus(tmp_path, capsys, options, message):
    assert main(["train", "--recipe", "mlp-28", "--out", str(tmp_path / "run"), *options.split()]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "run").exists()


class PacedJudge:
    """A judge whose samples take time on a clock: `each` seconds to draw one, a fifth of that to score it."""

    metric, words, batch, identity = "kcd", "kernel distance", 32, "a clock"
    available = 60_000

    def __init__(self, clock, each, once):
        self.clock, self.each, self.once = clock, each, once  # once: seconds of the real features

    def make(self, generator, count):
        self.clock.now += self.each * count
        return count

    def score(self, made, count):
        self.clock.now += 0.2 * self.each * count + self.once
        self.once = 0.0
        return {"kcd": 1.0}


@pytest.mark.parametrize(
    ("each", "interval"),
    [(1e-5, 2.0), (1e-3, 5.0), (1e-3, 60.0), (0.02, 60.0), (0.1, 300.0)],
    ids=lambda value: f"{value:g}s",
)
def test_evaluation_takes_less_than_a_tenth_of_a_run(each, interval, monkeypatch):
    """`interval`: seconds between evaluations. A step draws 64 samples four times at least, so that hundreds of steps
    leave time for LEAST samples; the first evaluation also computes the real features."""
    clock = types.SimpleNamespace(now=0.0)
    monkeypatch.setattr(module, "time", types.SimpleNamespace(perf_counter=lambda: clock.now))
    evaluation = Evaluation(PacedJudge(clock, each, once=0.05 * interval))
    shares = []
    for step in range(1, 21):
        evaluation(None, step, interval)
        shares.append(evaluation.seconds / (step * interval + evaluation.seconds))
    assert evaluation.seconds == pytest.approx(clock.now) and module.LEAST <= evaluation.count <= module.MOST
    assert shares[0] < 0.2 and max(shares[1:]) < 0.1 and shares[-1] < 0.07
