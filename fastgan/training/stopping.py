"""When a run ends: its steps, its time, a bound on a metric, patience, a plateau, or a signal."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import Any

from fastgan.domains import domain_of

from .evaluation import NAMES, Evaluation, Target
from .recipes import Recipe

__all__ = ["StopRules"]

# A plateau: the second half of the last evaluations scores within FLAT of the first half, and the discriminator's
# logits are on the right side of 0 in 1/2 +- UNSURE of all cases.
FLAT, UNSURE = 0.05, 0.1
LEAST = 4  # evaluations: fewer have no two halves to compare
TELLING = ("bce", "minimax", "hinge")  # losses whose logits say real above 0 and generated below


class StopRules:
    """What ends a run.

    time_limit: seconds. target: a bound on a metric, or a function asked at every logged step. patience: evaluations in
    a row without a better score. plateau: evaluations in a row without a change, while the discriminator cannot tell.
    measured: whether the run evaluates at all. metrics: those that it can measure. loss: the run's.

    Raises ValueError for what cannot be meant.
    """

    def __init__(
        self,
        *,
        time_limit: float | None,
        target: Callable[[Any], bool] | str | None,
        patience: int | None,
        measured: bool,
        plateau: int | None = None,
        loss: str = "bce",
        metrics: Sequence[str] = tuple(NAMES),
    ):
        if time_limit is not None and not time_limit > 0:
            raise ValueError(f"training: time_limit must be positive, got {time_limit}")
        self.time_limit = time_limit
        self.target = Target.parse(target, metrics) if isinstance(target, str) else target
        if patience is not None and patience < 1:
            raise ValueError(f"training: patience must be at least 1, got {patience}")
        if plateau is not None and plateau < LEAST:
            raise ValueError(f"training: plateau must be at least {LEAST}, got {plateau}")
        if plateau and loss not in TELLING:
            raise ValueError(f"training: plateau goes with the losses {', '.join(TELLING)}, got {loss}")
        if (patience or plateau or isinstance(self.target, Target)) and not measured:
            raise ValueError(
                "training: target, patience and plateau need evaluations, set eval_every (--eval-every STEPS)"
            )
        self._patience, self._plateau = patience, plateau

    @classmethod
    def of(cls, recipe: Recipe, **rules: Any) -> StopRules:
        """Those of a run of `recipe`."""
        metrics = domain_of(recipe).metrics
        return cls(**rules, measured=bool(recipe.eval_every), metrics=metrics, loss=recipe.loss)

    def after_step(self, step: int, steps: int, elapsed: float, signalled: bool) -> str:
        """Why the run ends after `step` of `steps`, or ""."""
        if signalled:
            return "interrupted"
        if step >= steps:
            return "steps"
        if self.time_limit is not None and elapsed >= self.time_limit:
            return "time"
        return ""

    def after_log(self, scores: dict[str, float], evaluation: Evaluation, run: Any) -> str:
        """Why the run ends after a logged step, or "": target, patience or plateau."""
        if scores and self._plateau and evaluation.judge is not None:  # first: whatever ends the run, it may go on
            right = (run.metrics["right_real"] + run.metrics["right_fake"]) / 2
            evaluation.recent = [*evaluation.recent, [scores[evaluation.judge.metric], right]][-self._plateau :]
        target = self.target
        if target is not None and (target.reached(scores) if isinstance(target, Target) else target(run)):
            return "target"
        if scores and self._patience and evaluation.waited >= self._patience:
            return "patience"
        if scores and len(evaluation.recent) == self._plateau and _flat(evaluation.recent):
            return "plateau"
        return ""

    def explain(self, reason: str, evaluation: Evaluation) -> str:
        """What a reader of the report should make of the end of the run, or ""."""
        if reason != "plateau":
            return ""
        before, after, right = _halves(evaluation.recent)
        return (
            f"a plateau: the {evaluation.words} was {before:.4g} in the first half of the last "
            f"{len(evaluation.recent)} evaluations and {after:.4g} in the second, and the discriminator was right "
            f"about {right:.0%} of images; "
            "texts call this equilibrium. It says that both networks have stopped learning from each other, and not "
            "that the pictures are good: compare the distance with that between two halves of the images (fastgan "
            "evaluate). Lower rates (schedule=cosine), a wider discriminator or more images may go further"
        )

    def in_words(self, reason: str, evaluation: Evaluation) -> str:
        """`reason` as a report says it."""
        words: Mapping[str, str] = {
            "steps": "all steps done",
            "time": "time limit reached",
            "target": f"target reached{f': {self.target}' if isinstance(self.target, Target) else ''}",
            "patience": f"no lower {evaluation.words} in {evaluation.waited} evaluations",
            "plateau": f"plateau: no change in {len(evaluation.recent)} evaluations",
            "interrupted": "interrupted",
            "collapse": "stopped at a collapse",
        }
        return words[reason]


def _halves(recent: Sequence[Sequence[float]]) -> tuple[float, float, float]:
    """Mean score of the first and of the second half, and mean accuracy."""
    scores, right = [score for score, _ in recent], [share for _, share in recent]
    middle = len(scores) // 2
    return fmean(scores[:middle]), fmean(scores[middle:]), fmean(right)


def _flat(recent: Sequence[Sequence[float]]) -> bool:
    before, after, right = _halves(recent)
    return abs(after - before) <= FLAT * abs(before) and abs(right - 0.5) <= UNSURE
