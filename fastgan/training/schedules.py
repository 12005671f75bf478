"""What changes as a run goes on: learning rates, the average's horizon, instance noise. All follow the step alone, so
that a resumed run finds them where they were."""

from __future__ import annotations

import math

from .augment import Augment
from .recipes import Recipe
from .step import GANStep

__all__ = ["Schedules", "average_decay", "noise_at", "rate_at", "share_at"]


def rate_at(recipe: Recipe, step: int) -> float:
    """The factor of both learning rates in the update after `step` updates.

    It rises from 1 / warm_up to 1 over `warm_up` steps; then it stays ("constant"), falls on a line ("linear") or half
    a cosine ("cosine", Loshchilov, Hutter 2017, arXiv:1608.03983) towards 0 at the recipe's last step.
    """
    if step < recipe.warm_up:
        return (step + 1) / recipe.warm_up
    if recipe.schedule == "constant":
        return 1.0
    gone = (step - recipe.warm_up) / max(1, recipe.steps - recipe.warm_up)
    return 1 - gone if recipe.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * gone))


def average_decay(recipe: Recipe, images: int) -> float | None:
    """The average's decay after `images` images; None where the recipe has no average.

    With `ema_half_life` H the average forgets half in H images, or in 5 % of the images seen while that is less (Karras
    et al. 2020, arXiv:2006.06676). The images seen count in powers of two: a new decay is a new CUDA graph.
    """
    if recipe.ema_half_life is None:
        return recipe.ema
    seen = 1 << max(images, recipe.batch_size).bit_length() - 1
    half_life = min(recipe.ema_half_life, 0.05 * seen)
    return float(0.5 ** (recipe.batch_size * recipe.d_steps / max(half_life, 1e-8)))


def noise_at(recipe: Recipe, step: int) -> float:
    """The deviation of instance noise: on a line from `instance_noise` to 0 at half of the steps."""
    return recipe.instance_noise * max(0.0, 1 - 2 * step / recipe.steps)


def share_at(recipe: Recipe, epoch: int) -> float:
    """The share of a batch that the generator learns from in an epoch: 0.99 of the share before, down to `top_k`.

    It is rounded up to whole eighths: each share is a CUDA graph of its own, and a step may have 32 of those.
    """
    return math.ceil(8 * max(recipe.top_k, 0.99**epoch)) / 8 if recipe.top_k < 1 else 1.0


class Schedules:
    """Sets all that follows the step number, in runs on `count` images. `slowed`: a further factor of both learning
    rates, which a rollback lowers."""

    def __init__(self, recipe: Recipe, step: GANStep, count: int):
        self._recipe, self._step, self._count, self.slowed = recipe, step, count, 1.0

    def apply(self, step: int, images: int) -> None:
        """Called before an update: `step` updates are done, and `images` images were seen."""
        recipe = self._recipe
        if recipe.schedule != "constant" or recipe.warm_up or self.slowed != 1.0:
            factor = rate_at(recipe, step) * self.slowed
            for optimizer, rate in ((self._step.g_optimizer, recipe.g_lr), (self._step.d_optimizer, recipe.d_lr)):
                for group in optimizer.param_groups:
                    group["lr"] = rate * factor
        if recipe.ema_half_life is not None and (decay := average_decay(recipe, images)) is not None:
            self._step.ema_decay = decay
        self._step.top_k = share_at(recipe, images // self._count)
        augment = self._step.augment
        if isinstance(augment, Augment) and augment.noise is not None:
            augment.noise.fill_(noise_at(recipe, step))
