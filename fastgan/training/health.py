"""A run's health: how varied its samples are beside its data, how large its gradients are, and whether the
discriminator knows its training samples by heart. Nothing here draws from the run's random generators."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastgan._logits import logits_of
from fastgan.data import Samples
from fastgan.metrics import density_coverage, features, load_backbone, pairwise_diversity

from .sampling import draw, evaluating, evenly

__all__ = ["Health", "gradient_norms"]

LOOKED_AT = 64  # samples of either kind: 20 ms for images on two cores at 32 x 32 on the backbone "small"
LEAST = 8  # below it neither variety nor coverage says anything


class Health:
    """Looks at a generator and a discriminator beside `samples`; `held`: as many more that are never trained on.

    labelled: the networks take labels. look: features [N, F] of samples, whose distances say how alike two are; by
    default those of pictures on the backbone "small". variety: a number of [N, F] features, 0 or little where all
    samples are one.
    """

    def __init__(
        self,
        samples: Samples,
        held: Samples | None,
        *,
        labelled: bool = False,
        look: Callable[[Tensor], Tensor] = lambda pictures: features(pictures, load_backbone()),
        variety: Callable[[Tensor], float] = pairwise_diversity,
    ):
        at = evenly(len(samples), LOOKED_AT).to(samples.values.device)
        self._features, self._variety = look, variety
        self._known, self._held = samples.pick(at), None if held is None else _first_of(held)
        self._labels = samples.labels[at] if labelled and samples.labels is not None else None
        self._held_labels = held.labels if labelled and held is not None else None
        self._real: Tensor | None = None  # features
        self._spread = 0.0

    def look(
        self, generator: nn.Module, discriminator: nn.Module, z: Tensor, labels: Tensor | None
    ) -> dict[str, float]:
        """Numbers about samples of fixed inputs.

        "diversity": their variety over that of the data, which is the mean distance between two samples' features
        unless another was given; "coverage" of the data by them (`fastgan.metrics.density_coverage`); with held-out
        samples "overfit", Karras et al. 2020 (arXiv:2006.06676), equation 1: 0 where D judges both alike, 1 where it
        takes held-out samples for generated. Empty where there are fewer than 8 of either, or one is not finite.
        """
        some = z[:LOOKED_AT], None if labels is None else labels[:LOOKED_AT]
        drawn = draw(generator, *some)
        if min(len(drawn), len(self._known)) < LEAST or not drawn.isfinite().all():
            return {}
        if self._real is None:
            self._real = self._features(self._known.cpu())
            self._spread = self._variety(self._real)
        made = self._features(drawn)
        found = {
            "diversity": self._variety(made) / max(self._spread, 1e-12),
            "coverage": density_coverage(self._real, made).coverage,
        }
        if self._held is not None:
            found["overfit"] = self._overfit(discriminator, drawn, self._told(*some))
        return found

    def _told(self, z: Tensor, labels: Tensor | None) -> Tensor | None:
        """What the discriminator is told of the samples of z."""
        return labels

    def _overfit(self, discriminator: nn.Module, drawn: Tensor, labels: Tensor | None) -> float:
        device = next(discriminator.parameters()).device

        @torch.no_grad()
        def score(samples: Any, labels: Tensor | None) -> float:
            x = samples.to(device)
            inputs = (x,) if labels is None else (x, labels[: len(x)].to(device))
            return float(_first(discriminator(*inputs)).float().mean())

        with evaluating(discriminator):
            known, held = score(self._known, self._labels), score(self._held, self._held_labels)
            made = score(drawn, labels)
        return (known - held) / gap if (gap := known - made) > 1e-6 else 0.0


def _first_of(samples: Samples) -> Tensor:
    return samples.pick(torch.arange(min(len(samples), LOOKED_AT), device=samples.values.device))


def _first(output: Any) -> Tensor:
    """One tensor of logits, whatever the discriminator returns."""
    return logits_of(output)[-1]


def gradient_norms(generator: nn.Module, discriminator: nn.Module) -> dict[str, float]:
    """ "g_grad" and "d_grad": norms of the gradients of the last update, where there are any."""
    found = {}
    for name, network in (("g_grad", generator), ("d_grad", discriminator)):
        grads = [p.grad.detach() for p in network.parameters() if p.grad is not None]
        if grads:
            found[name] = float(torch.stack([n.float() for n in torch._foreach_norm(grads)]).norm())
    return found
