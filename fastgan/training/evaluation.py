"""How good the generator is while it trains: a judge's scores on a schedule, and what follows of them.

Nothing here draws from the run's random generators: a judge's latents have a seed of their own.
"""

from __future__ import annotations

import operator
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from fastgan.choice import cache_dir
from fastgan.metrics import cached_features, compare, features, load_backbone

from .sampling import draw, latents

__all__ = ["Evaluation", "FeatureJudge", "Judge", "Target"]

NAMES = {"kcd": "kernel", "fcd": "frechet", "precision": "precision", "recall": "recall", "coverage": "coverage"}
# Of the time between evaluations. The first one also computes the real features, so it costs up to twice as much.
SHARE = 0.05
# Images: below 64 the kernel distance is noise, above 2,000 its matrices cost more than they tell.
LEAST, MOST = 64, 2000


class Target(NamedTuple):
    """A bound on a metric, such as kcd<0.05 or coverage>0.8."""

    name: str
    sign: str
    bound: float

    @classmethod
    def parse(cls, text: str, names: Sequence[str] = tuple(NAMES)) -> Target:
        """Raises ValueError for a text that is no bound on one of the metrics `names`."""
        match = re.fullmatch(r"\s*(\w+)\s*([<>])\s*([-+.\deE]+)\s*", text)
        if not match or match[1] not in names:
            raise ValueError(
                f"training: target must read NAME<NUMBER or NAME>NUMBER with one of {', '.join(names)}, got {text!r}"
            )
        try:
            return cls(match[1], match[2], float(match[3]))
        except ValueError as error:
            raise ValueError(f"training: the bound of target must be a number, got {text!r}") from error

    def reached(self, scores: dict[str, float]) -> bool:
        """Whether `scores` has the metric within the bound."""
        compare_ = operator.lt if self.sign == "<" else operator.gt
        return self.name in scores and bool(compare_(scores[self.name], self.bound))

    def __str__(self) -> str:
        return f"{self.name}{self.sign}{self.bound:g}"


class Judge(Protocol):
    """What scores a generator beside the training samples.

    metric: the score that chooses the best generator; lower is better. words: what that is called. identity: what the
    scores rest on. available: how many samples there are to compare with. batch: how many are drawn at a time.
    """

    metric: str
    words: str
    batch: int

    @property
    def identity(self) -> str: ...

    @property
    def available(self) -> int: ...

    def make(self, generator: nn.Module, count: int) -> Any:
        """What `count` samples of the generator are scored by: their features, say."""

    def score(self, made: Any, count: int) -> dict[str, float]:
        """The scores of what `make` gave; empty where a sample is not finite: the guard has words for that."""


class FeatureJudge:
    """Distances between pictures and `images` ([N, C, H, W] uint8) on the backbone "small".

        kcd  kernel distance, unbiased, so that its value does not depend on the number of images
        fcd  Frechet distance, comparable at equal numbers of images only

    labels: of the images, where the generator takes labels: it is asked for the classes that the images have.
    look: makes pictures of samples that are none.
    """

    metric, words = "kcd", "kernel distance"

    def __init__(
        self,
        images: Tensor,
        latent: int,
        seed: int,
        batch: int,
        labels: Tensor | None = None,
        look: Callable[[Tensor], Tensor] = lambda made: made,
    ):
        self._look = look
        self._images, self._latent, self._seed, self.batch = images, latent, seed, min(batch, 256)
        self._labels = None if labels is None else labels.cpu()
        self._backbone = load_backbone()
        self._real: Tensor | None = None
        self.identity, self.available = f"features of {self._backbone.identity}", len(images)

    def make(self, generator: nn.Module, count: int) -> Tensor:
        """Features of `count` pictures, in batches of one size: the one whose kernels the sample grid has chosen."""
        whole = -(-count // self.batch) * self.batch
        z = latents(whole, self._latent, seed=self._seed)
        labels = None if self._labels is None else self._labels[self._chosen(count)][torch.arange(whole) % count]
        return features(self._look(draw(generator, z, labels, batch=self.batch)[:count]), self._backbone)

    def score(self, made: Tensor, count: int) -> dict[str, float]:
        """Distances between the features of `make` and those of `count` images."""
        if self._real is None:
            at = self._chosen(count).to(self._images.device)
            self._real = cached_features(self._images[at].cpu(), self._backbone, Path(cache_dir()) / "features")
        if not made.isfinite().all():
            return {}
        found = compare(self._real, made)
        return {name: found[key] for name, key in NAMES.items() if key in found}

    def _chosen(self, count: int) -> Tensor:
        """`count` numbers evenly over the images: a folder may be ordered by class."""
        return torch.linspace(0, len(self._images) - 1, count).round().long()


class Evaluation:
    """A judge's scores of the generator, and the best of them so far; without a judge there are none."""

    def __init__(self, judge: Judge | None):
        self.judge = judge
        self.count = 0  # samples of either kind; chosen at the first evaluation
        self.best: float | None = None  # of the judge's metric
        self.best_step = 0
        self.waited = 0  # evaluations since the best
        self.recent: list[list[float]] = []  # the last ones' [score, D's accuracy], where a stop rule asks for them
        self.seconds = 0.0

    def __call__(self, generator: nn.Module, step: int, interval: float) -> dict[str, float]:
        """Scores at `step`; `interval`: seconds of training between two evaluations."""
        judge, began = self.judge, time.perf_counter()
        if judge is None:
            return {}
        if not self.count:
            self.count = self._affordable(judge, generator, interval)
        scores = judge.score(judge.make(generator, self.count), self.count)
        if scores:
            self.waited += 1
            value = scores[judge.metric]
            if self.best is None or value < self.best:
                self.best, self.best_step, self.waited = value, step, 0
        self.seconds += time.perf_counter() - began
        return scores

    @property
    def words(self) -> str:
        """What the judge's metric is called."""
        return self.judge.words if self.judge else ""

    @staticmethod
    def _affordable(judge: Judge, generator: nn.Module, interval: float) -> int:
        """As many samples as `SHARE` of `interval` is enough for, at most those that there are."""
        judge.make(generator, judge.batch)  # the first call also chooses kernels and loads weights
        began = time.perf_counter()
        judge.make(generator, judge.batch)
        each = (time.perf_counter() - began) / judge.batch
        return min(judge.available, MOST, max(LEAST, int(SHARE * interval / each)))

    def state_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {name: getattr(self, name) for name in ("count", "best", "best_step", "waited", "recent")}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of `state_dict`."""
        for name in ("count", "best", "best_step", "waited"):
            setattr(self, name, state[name])
        self.recent = state.get("recent", [])  # checkpoints of earlier versions have none
