"""How good the generator is while it trains: distances on the backbone "small" on a schedule, and what follows of them.

    kcd  kernel distance, unbiased, so that its value does not depend on the number of images
    fcd  Frechet distance, comparable at equal numbers of images only

Nothing here draws from the run's random generators: the latents have a seed of their own.
"""

from __future__ import annotations

import operator
import re
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastgan.choice import cache_dir
from fastgan.metrics import cached_features, compare, features, load_backbone

from .sampling import draw, latents

__all__ = ["Evaluation", "Target"]

NAMES = {"kcd": "kernel", "fcd": "frechet", "precision": "precision", "recall": "recall", "coverage": "coverage"}
SHARE = (
    0.05  # of the time between evaluations; the first one also computes the real features, so it costs up to twice it
)
LEAST, MOST = (
    64,
    2000,
)  # images: below 64 the kernel distance is noise, above 2,000 its matrices cost more than they tell


class Target(NamedTuple):
    """A bound on a metric, such as kcd<0.05 or coverage>0.8."""

    name: str
    sign: str
    bound: float

    @classmethod
    def parse(cls, text: str) -> Target:
        """Raises ValueError for a text that is no bound on a known metric."""
        match = re.fullmatch(r"\s*(\w+)\s*([<>])\s*([-+.\deE]+)\s*", text)
        if not match or match[1] not in NAMES:
            raise ValueError(
                f"training: target must read NAME<NUMBER or NAME>NUMBER with one of {', '.join(NAMES)}, got {text!r}"
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


class Evaluation:
    """Scores of the generator against `images` ([N, C, H, W] uint8), and the best of them so far.

    labels: of the images, where the generator takes labels: it is asked for the classes that the images have.
    """

    def __init__(self, images: Tensor, latent: int, seed: int, batch: int, labels: Tensor | None = None):
        self._images, self._latent, self._seed, self._batch = images, latent, seed, min(batch, 256)
        self._labels = None if labels is None else labels.cpu()
        self._backbone = load_backbone()
        self._real: Tensor | None = None
        self.count = 0  # images of either kind; chosen at the first evaluation
        self.best: float | None = None  # kcd
        self.best_step = 0
        self.waited = 0  # evaluations since the best
        self.seconds = 0.0

    @property
    def identity(self) -> str:
        """Of the backbone."""
        return self._backbone.identity

    def __call__(self, generator: nn.Module, step: int, interval: float) -> dict[str, float]:
        """Scores at `step`; `interval`: seconds of training between two evaluations.

        Empty where an image is not finite: the guard has words for that.
        """
        began = time.perf_counter()
        if not self.count:
            self.count = self._affordable(generator, interval)
        if self._real is None:
            at = self._chosen(self.count).to(self._images.device)
            self._real = cached_features(self._images[at].cpu(), self._backbone, Path(cache_dir()) / "features")
        made = self._features(generator, self.count)
        scores = {}
        if made.isfinite().all():
            found = compare(self._real, made)
            scores = {name: found[key] for name, key in NAMES.items() if key in found}
            self.waited += 1
            if self.best is None or scores["kcd"] < self.best:
                self.best, self.best_step, self.waited = scores["kcd"], step, 0
        self.seconds += time.perf_counter() - began
        return scores

    def _affordable(self, generator: nn.Module, interval: float) -> int:
        """As many images as `SHARE` of `interval` is enough for, at most those that there are."""
        self._features(generator, self._batch)  # the first call also chooses kernels and loads weights
        began = time.perf_counter()
        self._features(generator, self._batch)
        each = (time.perf_counter() - began) / self._batch
        return min(len(self._images), MOST, max(LEAST, int(SHARE * interval / each)))

    def _features(self, generator: nn.Module, count: int) -> Tensor:
        """Of `count` pictures, in batches of one size: the one whose kernels the sample grid has chosen."""
        whole = -(-count // self._batch) * self._batch
        z = latents(whole, self._latent, seed=self._seed)
        labels = None if self._labels is None else self._labels[self._chosen(count)][torch.arange(whole) % count]
        return features(draw(generator, z, labels, batch=self._batch)[:count], self._backbone)

    def _chosen(self, count: int) -> Tensor:
        """`count` numbers evenly over the images: a folder may be ordered by class."""
        return torch.linspace(0, len(self._images) - 1, count).round().long()

    def state_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {name: getattr(self, name) for name in ("count", "best", "best_step", "waited")}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of `state_dict`."""
        for name in ("count", "best", "best_step", "waited"):
            setattr(self, name, state[name])
