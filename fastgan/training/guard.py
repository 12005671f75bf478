"""The guard: says when a GAN has stopped learning, by values that were read for the log anyway, and on a CPU by the
discriminator's loss of every step: no synchronisation."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = ["Collapse", "DivergedError", "Guard", "Leaps", "leaps_of"]

# The loss of a discriminator that cannot tell real from fake: the unit of its loss. A critic's (wasserstein) is 0.
UNDECIDED = {
    "bce": 2 * math.log(2),
    "minimax": 2 * math.log(2),
    "lsgan": 0.25,
    "hinge": 2.0,
    "relativistic": math.log(2),
    "relativistic-average": 2 * math.log(2),
}
# As a share of UNDECIDED. With bce D(x) = 0.99 and D(G(z)) = 0.01 make 0.0145: the generator's gradient is almost
# nothing. A healthy discriminator dips below it for a few logged steps at a time, so PATIENCE of them must follow.
CERTAIN = 0.015
PATIENCE = 20
# The gradient of these losses grows with what a score is wrong by: a discriminator that is thrown about throws further.
# It pays more than LEAP times UNDECIDED then, in update after update: in more than LEAPING of the last ones, which
# count 0.9 to the power of their age, so in about 3 of 5. One that learns leaps alone, also with a batch of 2
# (docs/troubleshooting.md). Of other losses a score's gradient is at most 1: a `dcgan-28` whose discriminator has a
# hundred times its rate leaps so, and learns.
THROWN = ("lsgan",)
LEAP, LEAPING, CALM, OVER = 2.5, 0.2, 0.1, 10
# No loss asks for a score beyond these: for lsgan 100 away from its targets 0 and 1, for the others a logit of 1000.
# A critic has CRITIC_GAP and CRITIC_LEVEL.
LARGEST = dict.fromkeys(UNDECIDED, 1e3) | {"lsgan": 1e2}
# A critic of slope 1 tells two images apart by at most their distance, so by at most the diameter of [-1, 1]^pixels.
# Penalties hold the slope on average only, hence a factor; its level is free, until rounding eats the difference.
CRITIC_GAP, CRITIC_LEVEL = 10, 100
GROWN = 3  # logged steps in a row
# Standard deviation over the samples of a grid, averaged over pixels in [-1, 1]: data sets have 0.3 to 0.8,
# one image repeated has 0.
COLLAPSED = 0.01
# Steps after which gradients and variety are those of a network that learns. Samples may be flat for longer, and an
# average follows at its own pace: at width 16 dcgan-64's samples have 0.0095 at step 355, at width 8 and batch 4
# r1-dcgan-64's 0.009 at step 200 with an average over 1000 steps.
STARTED, UNFLAT = 200, 1000
# A generator learns if its weights move: over so many steps by so much of their own spread. At a rate of 1e-4 Adam
# moves weights of 0.02 by a quarter of it.
MOVING_STEPS, MOVED = 50, 1e-3

# Variety (`health`): that of samples over that of the data; and the share of the data with a sample near, beside the
# greatest so far where that says anything. What these find and miss stands in docs/troubleshooting.md.
NARROW, FALLEN, COVERED = 0.2, 0.4, 0.3
# A generator that was never twice as varied as NARROW may be a slow starter: r1-dcgan-64 at width 16 has 0.06 at step
# 200 and 0.16 at step 1,200. It is lost if it still is so after this many steps.
LATE = 5000
LOOKS = 2  # in a row
# A gradient's norm over its running mean over so many logged steps: so much three times in a row, or so much once.
# After their first 200 steps healthy small networks have up to 6; an LSGAN without norm had 36,000 as it broke. Of the
# discriminator's gradients nothing is said by steps at which its loss is below SURE of UNDECIDED: they are next to
# nothing then, and beside a mean of such the 30 of one batch in which it errs would be an explosion.
STEEP, CLIFF, USUAL = 15.0, 50.0, 20
SURE = 0.1
SETTLED = 4  # logged steps before which a mean says nothing: a run that logs every 250 steps has one by step 200
BY_HEART = 0.5  # of the way from training images to generated ones is where held-out images are
KEPT = (
    "_strained",
    "_sure",
    "_grown",
    "_flat",
    "_varied",
    "_widest",
    "_best",
    "_narrow",
    "_known",
    "_steep",
    "healthy",
)


class DivergedError(RuntimeError):
    """A metric or a parameter became infinite or not a number."""


class Collapse(str):
    """A warning of a generator that is lost unless something is done."""


class Leaps:
    """The share of a discriminator's last updates in which its loss leapt, the `OVER` last ones for the most part, and
    the largest it was since it was last read; of its first `STARTED` updates none is said. On a GPU both stay there: an
    update waits for nothing."""

    def __init__(self, loss: str):
        self._bound = LEAP * UNDECIDED[loss]
        self._share: float | Tensor = 0.0
        self._peak: float | Tensor = 0.0

    def update(self, step: int, loss: Tensor, scales: int = 1) -> None:
        """Take in the loss of update `step`, the sum of those of so many score maps."""
        if loss.is_cuda:
            leapt = (loss.detach() > self._bound * scales).float()
            self._share = torch.as_tensor(self._share, device=loss.device).lerp(leapt, 1 / OVER)
            self._peak = torch.as_tensor(self._peak, device=loss.device).maximum(self._share)
        else:  # numbers: a microsecond where three ops on tensors take ten
            self._share += ((float(loss) > self._bound * scales) - self._share) / OVER
            self._peak = max(self._peak, self._share)
        if step < STARTED:
            self._peak = self._share

    @property
    def peak(self) -> float:
        """The largest share since `read`; this waits for a GPU."""
        return float(self._peak)

    def read(self) -> float:
        """`peak`, which begins anew."""
        peak, self._peak = self.peak, self._share
        return peak

    def state_dict(self) -> dict[str, float]:
        """Plain values."""
        return {"share": float(self._share), "peak": self.peak}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """The inverse of `state_dict`."""
        self._share, self._peak = state["share"], state["peak"]


def leaps_of(loss: str) -> Leaps | None:
    """What follows a discriminator's `loss` from step to step; None where a leap of it says nothing."""
    return Leaps(loss) if loss in THROWN else None


class Guard:
    """Watches one run, of a loss of `fastgan.GANStep` on samples of so many numbers (`pixels`: C x H x W), with an
    average of decay `ema`; samples that vary by less than `flat` are one, and few kinds below `narrow` of the data's
    variety."""

    def __init__(
        self, loss: str, pixels: int, ema: float | None = None, *, flat: float = COLLAPSED, narrow: float = NARROW
    ):
        self._loss, self._least, self._few = loss, flat, narrow
        self._unflat = UNFLAT if ema is None else max(UNFLAT, round(2 / (1 - ema)))
        self._diameter = 2 * math.sqrt(pixels)
        self.scales = 1  # score maps whose losses are summed in d_loss
        self._sure = self._grown = 0
        self._strained = self._flat = False
        self._varied = False  # whether the samples ever were
        self._first: tuple[int, Tensor] | None = None
        self._widest = 0.0  # the greatest diversity so far
        self._best = 0.0  # the greatest coverage so far
        self._narrow = self._known = self._steep = 0  # looks in a row at which that was so
        self._norms: dict[str, tuple[float, int]] = {}  # of gradients: running mean, and over how many
        self.healthy = 0  # the step of the last look at which nothing was wrong

    def check(self, step: int, metrics: Mapping[str, float]) -> str | None:
        """A warning to print about a logged step, or None."""
        return (
            self._check_strain(step, metrics)
            or self._check_certain(step, metrics)
            or self._check_growth(step, metrics)
            or self._check_gradients(step, metrics)
            or self._check_variety(step, metrics)
            or self._check_overfitting(step, metrics)
        )

    def strained(self, step: int, leaps: float) -> bool:
        """Whether such a share of leaps is news: the discriminator is thrown about, for the first time since it was
        calm."""
        return not self._strained and step >= STARTED and leaps > LEAPING

    def _check_strain(self, step: int, metrics: Mapping[str, float]) -> str | None:
        if "d_leaps" not in metrics:
            return None
        new = self.strained(step, metrics["d_leaps"])
        self._strained = new or (self._strained and metrics["d_leaps"] > CALM)
        if not new:
            return None
        return Collapse(
            f"step {step}: the discriminator has lost its hold (its loss has been more than {LEAP:g} times what one "
            "pays that cannot tell, in one update after another); try lower rates, grad_clip=1 or a penalty"
        )

    def _share(self, metrics: Mapping[str, float]) -> float:
        """The discriminator's loss over that of one that cannot tell; 1 of a critic, whose loss has no unit."""
        unit = UNDECIDED.get(self._loss)
        return metrics["d_loss"] / (unit * self.scales) if unit is not None and "d_loss" in metrics else 1.0

    def _check_certain(self, step: int, metrics: Mapping[str, float]) -> str | None:
        share = self._share(metrics)
        self._sure = self._sure + 1 if share < CERTAIN else 0
        if self._sure != PATIENCE:
            return None
        return (
            f"step {step}: the discriminator has been certain for {PATIENCE} logged steps (its loss is {share:.1%} of "
            "what one pays that cannot tell); the generator hardly learns, try a lower d_lr or a penalty"
        )

    def _check_growth(self, step: int, metrics: Mapping[str, float]) -> str | None:
        real, fake = metrics.get("logit_real", 0.0), metrics.get("logit_fake", 0.0)
        level, gap = max(abs(real), abs(fake)), abs(real - fake)
        if self._loss == "wasserstein":
            largest = CRITIC_LEVEL * self._diameter
            grown = level > largest or gap > CRITIC_GAP * self._diameter
            scale = f"a critic of slope 1 tells images apart by at most {self._diameter:.0f}"
        else:
            largest = LARGEST[self._loss]
            grown, scale = level > largest, f"{self._loss} has no use for scores beyond {largest:g}"
        self._grown = self._grown + 1 if grown else 0
        if self._grown != GROWN:
            return None
        return (
            f"step {step}: the discriminator's scores grow without bound (real {real:.4g}, generated {fake:.4g}; "
            f"{scale}); try a lower d_lr or a larger penalty"
        )

    def _check_gradients(self, step: int, metrics: Mapping[str, float]) -> str | None:
        """Norms far above their own running mean, in its first steps excepted."""
        worst, name = 0.0, ""
        for key in ("g_grad", "d_grad"):
            norm = metrics.get(key, 0.0)
            if not 0 < norm < math.inf or (key == "d_grad" and self._share(metrics) < SURE):
                continue
            mean, count = self._norms.get(key, (norm, 0))
            ratio = norm / mean
            if count >= SETTLED:
                worst, name = max((worst, name), (ratio, key))
            if step <= STARTED or count < SETTLED or ratio <= STEEP:  # what explodes is no part of what is usual
                count = min(count + 1, USUAL)
                self._norms[key] = mean + (norm - mean) / count, count
        self._steep = self._steep + 1 if step > STARTED and worst > STEEP else 0
        if self._steep and worst > CLIFF:
            self._steep = max(self._steep, GROWN)
        if self._steep != GROWN:
            return None
        whose = "generator" if name == "g_grad" else "discriminator"
        return Collapse(
            f"step {step}: the {whose}'s gradients explode (norm {metrics[name]:.3g}, {worst:.0f} times the usual); "
            "try lower rates, grad_clip=1 or a penalty"
        )

    def _check_variety(self, step: int, metrics: Mapping[str, float]) -> str | None:
        if "diversity" not in metrics:
            return None
        diversity, coverage = metrics["diversity"], metrics["coverage"]
        self._widest, self._best = max(self._widest, diversity), max(self._best, coverage)
        fallen = self._best >= COVERED and coverage < FALLEN * self._best
        lost = diversity < self._few and (self._widest >= 2 * self._few or step >= LATE)
        narrow = step >= STARTED and (lost or fallen)
        self._narrow = self._narrow + 1 if narrow else 0
        if not narrow and not (self._steep or self._grown or self._flat or self._strained):
            self.healthy = step
        if self._narrow != LOOKS:
            return None
        return Collapse(
            f"step {step}: the generator makes few kinds of samples ({diversity:.0%} of the data's variety; "
            f"{coverage:.0%} of the data have a sample near, at best it was {self._best:.0%}); go back to an earlier "
            "checkpoint, and try lower rates, a penalty (penalty=r1) or more data"
        )

    def _check_overfitting(self, step: int, metrics: Mapping[str, float]) -> str | None:
        if "overfit" not in metrics:
            return None
        self._known = self._known + 1 if metrics["overfit"] > BY_HEART else 0
        if self._known != LOOKS:
            return None
        return (
            f"step {step}: the discriminator knows its training images by heart (it judges held-out images as "
            f"{metrics['overfit']:.0%} of the way to generated ones); "
            "try augment=colour,translation,cutout, flip=true or more images"
        )

    def state_dict(self) -> dict[str, Any]:
        """Plain values: what a later warning depends on, but for the movement of weights."""
        return {name: getattr(self, name) for name in KEPT} | {"_norms": dict(self._norms)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state_dict`."""
        for name in KEPT:
            setattr(self, name, state.get(name, getattr(self, name)))  # checkpoints of earlier versions lack some
        self._norms = {name: tuple(values) for name, values in state["_norms"].items()}

    def check_samples(self, step: int, images: Tensor) -> str | None:
        """A warning if all of `images` ``[N, C, H, W]`` look the same: once until they differ again, and for a
        generator that has been so from the start after a while."""
        if images.shape[0] < 2:
            return None
        spread = images.float().std(0).mean().item()
        flat, before = spread < self._least, self._flat
        if not flat:
            self._flat, self._varied = False, True
            return None
        if before or not (self._varied or step >= self._unflat):  # said already, or an untrained generator
            return None
        self._flat = True
        what = "have collapsed to one image" if self._varied else "have been one image from the start"
        return Collapse(
            f"step {step}: the samples {what} (standard deviation {spread:.2g}); "
            "go back to an earlier checkpoint or change the seed, the loss or the learning rates"
        )

    def check_movement(self, step: int, weights: Tensor) -> str | None:
        """A warning, once, if the generator's `weights` (any of them) are still those of the first call."""
        if self._first is None:
            self._first = step, weights.detach().float().cpu().clone()
            return None
        begin, first = self._first
        if not begin <= step - MOVING_STEPS:
            return None
        self._first = step, first[:0]  # asked once
        moved = (weights.detach().float().cpu() - first).abs().max() if first.numel() else None
        if moved is None or moved > MOVED * first.std():
            return None
        return f"step {step}: the generator has not moved since step {begin}, it does not learn; try a higher g_lr"

    @staticmethod
    def diverged(step: int, name: str, value: str, good: Path | None) -> DivergedError:
        """The error for a value that is not finite."""
        remedy = f"the last good checkpoint is {good}" if good else "no checkpoint had been saved"
        return DivergedError(
            f"training: {name} must be finite, it is {value} at step {step}; {remedy}; "
            "try lower learning rates, or fp32 if it ran in less"
        )
