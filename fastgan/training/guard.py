"""The guard: stops a run whose numbers are gone, and says when a GAN has stopped learning.

It looks at values that were read for the log anyway, so it costs no synchronisation.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

__all__ = ["DivergedError", "Guard"]

# A discriminator this sure of both sides gives the generator a gradient of almost nothing; a healthy one dips
# there for a few logged steps at a time, hence a run of them.
SURE_REAL = 0.99
SURE_FAKE = 0.01
PATIENCE = 20
# Standard deviation over the samples of a grid, averaged over pixels in [-1, 1]: data sets have 0.3 to 0.8,
# one image repeated has 0.
COLLAPSED = 0.01


class DivergedError(RuntimeError):
    """A metric or a parameter became infinite or not a number."""


class Guard:
    """Watches one run. `scores` says whether d_real and d_fake are probabilities (not so for a critic)."""

    def __init__(self, *, scores: bool):
        self._scores = scores
        self._sure = 0
        self._flat = False

    def check(self, step: int, metrics: Mapping[str, float]) -> str | None:
        """A warning to print, or None."""
        if not self._scores:
            return None
        sure = metrics.get("d_real", 0.0) > SURE_REAL and metrics.get("d_fake", 1.0) < SURE_FAKE
        self._sure = self._sure + 1 if sure else 0
        if self._sure == PATIENCE:
            return (
                f"step {step}: the discriminator has been certain for {PATIENCE} logged steps "
                f"(D(x) > {SURE_REAL}, D(G(z)) < {SURE_FAKE}); the generator hardly learns, try a lower d_lr "
                "or a penalty"
            )
        return None

    def check_samples(self, step: int, images: Tensor) -> str | None:
        """A warning if all of `images` ``[N, C, H, W]`` look the same, once until they differ again."""
        if images.shape[0] < 2:
            return None
        spread = images.float().std(0).mean().item()
        flat = spread < COLLAPSED
        warn = flat and not self._flat and step > 0  # an untrained generator is flat
        self._flat = flat
        if warn:
            return (
                f"step {step}: the samples have collapsed to one image (standard deviation {spread:.2g}); "
                "go back to an earlier checkpoint or change the seed, the loss or the learning rates"
            )
        return None

    @staticmethod
    def diverged(step: int, name: str, value: str, good: Path | None) -> DivergedError:
        """The error for a value that is not finite."""
        remedy = f"the last good checkpoint is {good}" if good else "no checkpoint had been saved"
        return DivergedError(
            f"training: {name} must be finite, it is {value} at step {step}; {remedy}; "
            "try lower learning rates, or fp32 if it ran in less"
        )
