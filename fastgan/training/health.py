"""A run's health: how varied its pictures are beside its images, how large its gradients are, and whether the
discriminator knows its training images by heart. Nothing here draws from the run's random generators."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastgan._logits import logits_of
from fastgan.data import ImageSet
from fastgan.metrics import density_coverage, features, load_backbone, pairwise_diversity

from .sampling import draw, evaluating, evenly

__all__ = ["Health", "gradient_norms"]

LOOKED_AT = 64  # pictures and images: 20 ms on two cores at 32 x 32 on the backbone "small"
LEAST = 8  # below it neither variety nor coverage says anything


class Health:
    """Looks at a generator and a discriminator beside `images`; `held`: as many more that are never trained on.

    labelled: the networks take labels.
    """

    def __init__(self, images: ImageSet, held: ImageSet | None, *, labelled: bool):
        at = evenly(len(images), LOOKED_AT).to(images.images.device)
        self._known = images.images[at]
        self._held = None if held is None else held.images[:LOOKED_AT]
        self._labels = images.labels[at] if labelled and images.labels is not None else None
        self._held_labels = held.labels if labelled and held is not None else None
        self._real: Tensor | None = None  # features
        self._spread = 0.0

    def look(
        self, generator: nn.Module, discriminator: nn.Module, z: Tensor, labels: Tensor | None
    ) -> dict[str, float]:
        """Numbers about pictures from fixed latents.

        "diversity": mean distance between two pictures' features over that between two images'; "coverage" of the
        images by the pictures (`fastgan.metrics.density_coverage`); with held-out images "overfit", Karras et al. 2020
        (arXiv:2006.06676), equation 1: 0 where D judges both alike, 1 where it takes held-out images for generated.
        Empty where there are fewer than 8 pictures or images, or a picture is not finite.
        """
        some = z[:LOOKED_AT], None if labels is None else labels[:LOOKED_AT]
        pictures = draw(generator, *some)
        if min(len(pictures), len(self._known)) < LEAST or not pictures.isfinite().all():
            return {}
        backbone = load_backbone()
        if self._real is None:
            self._real = features(self._known.cpu(), backbone)
            self._spread = pairwise_diversity(self._real)
        made = features(pictures, backbone)
        found = {
            "diversity": pairwise_diversity(made) / max(self._spread, 1e-12),
            "coverage": density_coverage(self._real, made).coverage,
        }
        if self._held is not None:
            found["overfit"] = self._overfit(discriminator, pictures, some[1])
        return found

    def _overfit(self, discriminator: nn.Module, pictures: Tensor, labels: Tensor | None) -> float:
        device = next(discriminator.parameters()).device

        @torch.no_grad()
        def score(images: Any, labels: Tensor | None) -> float:
            x = images.to(device).float() / 127.5 - 1 if images.dtype == torch.uint8 else images.to(device)
            inputs = (x,) if labels is None else (x, labels[: len(x)].to(device))
            return float(_first(discriminator(*inputs)).float().mean())

        with evaluating(discriminator):
            known, held = score(self._known, self._labels), score(self._held, self._held_labels)
            made = score(pictures, labels)
        return (known - held) / gap if (gap := known - made) > 1e-6 else 0.0


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
