"""When a run ends: its steps, its time, a bound on a metric, patience, or a signal."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .evaluation import NAMES, Evaluation, Target

__all__ = ["StopRules"]


class StopRules:
    """What ends a run.

    time_limit: seconds. target: a bound on a metric, or a function asked at every logged step. patience: evaluations in
    a row without a better score. measured: whether the run evaluates at all. metrics: those that it can measure.

    Raises ValueError for what cannot be meant.
    """

    def __init__(
        self,
        *,
        time_limit: float | None,
        target: Callable[[Any], bool] | str | None,
        patience: int | None,
        measured: bool,
        metrics: Sequence[str] = tuple(NAMES),
    ):
        if time_limit is not None and not time_limit > 0:
            raise ValueError(f"training: time_limit must be positive, got {time_limit}")
        self.time_limit = time_limit
        self.target = Target.parse(target, metrics) if isinstance(target, str) else target
        if patience is not None and patience < 1:
            raise ValueError(f"training: patience must be at least 1, got {patience}")
        if (patience or isinstance(self.target, Target)) and not measured:
            raise ValueError("training: target and patience need evaluations, set eval_every (--eval-every STEPS)")
        self._patience = patience

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
        """Why the run ends after a logged step, or "": the target is met, or patience is at its end."""
        target = self.target
        if target is not None and (target.reached(scores) if isinstance(target, Target) else target(run)):
            return "target"
        if scores and self._patience and evaluation.waited >= self._patience:
            return "patience"
        return ""

    def in_words(self, reason: str, evaluation: Evaluation) -> str:
        """`reason` as a report says it."""
        words: Mapping[str, str] = {
            "steps": "all steps done",
            "time": "time limit reached",
            "target": f"target reached{f': {self.target}' if isinstance(self.target, Target) else ''}",
            "patience": f"no lower {evaluation.words} in {evaluation.waited} evaluations",
            "interrupted": "interrupted",
            "collapse": "stopped at a collapse",
        }
        return words[reason]
