"""How networks take labels: class-conditional affine after a norm, projection, and concatenated embeddings.

Sources
    ClassAffine: Dumoulin et al. 2017 (arXiv:1610.07629); de Vries et al. 2017 (arXiv:1707.00683).
    ProjectionDiscriminator: Miyato, Koyama 2018 (arXiv:1802.05637), equation 3.
    LabelledGenerator, LabelledDiscriminator: Mirza, Osindero 2014 (arXiv:1411.1784).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

EMBEDDING = 32  # numbers that a class becomes beside the latents


class ClassAffine(nn.Module):
    """x ``[N, C, H, W]``, labels ``[N]`` to weight[label] x + bias[label], a weight and a bias for each channel.

    It follows a norm without an affine of its own. Weights start at 1, biases at 0: every class begins the same.
    """

    per_sample = True

    def __init__(self, classes: int, channels: int):
        super().__init__()
        self.weight, self.bias = nn.Embedding(classes, channels), nn.Embedding(classes, channels)
        nn.init.ones_(self.weight.weight)
        nn.init.zeros_(self.bias.weight)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        weight, bias = (e(labels)[:, :, None, None].to(x.dtype) for e in (self.weight, self.bias))
        return torch.addcmul(bias, x, weight)


class LabelledGenerator(nn.Module):
    """z ``[N, latent]``, labels ``[N]`` to `generator` of z with the class's embedding behind it.

    generator: a network of this package whose latent is `latent` + 32.
    """

    per_sample = True

    def __init__(self, generator: nn.Module, *, latent: int, classes: int):
        super().__init__()
        self.latent, self.image_size, self.channels = latent, generator.image_size, generator.channels
        self.classes = classes
        self.embedding = nn.Embedding(classes, EMBEDDING)
        self.main = generator

    def forward(self, z: Tensor, labels: Tensor) -> Tensor:
        images: Tensor = self.main(torch.cat([z, self.embedding(labels).to(z.dtype)], 1))
        return images


class LabelledDiscriminator(nn.Module):
    """Images ``[N, C, H, W]``, labels ``[N]`` to `discriminator` of the images with a learnt plane for each class.

    discriminator: a network of this package for `channels` + 1 channels. Planes start near 0, as grey pixels.
    """

    per_sample = True

    def __init__(self, discriminator: nn.Module, *, channels: int, classes: int):
        super().__init__()
        size = int(discriminator.image_size)  # type: ignore[arg-type]
        self.image_size, self.channels, self.classes = size, channels, classes
        self.embedding = nn.Embedding(classes, size * size)
        nn.init.normal_(self.embedding.weight, 0.0, 0.02)
        self.main = discriminator

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        plane = self.embedding(labels).view(-1, 1, self.image_size, self.image_size).to(images.dtype)
        logits: Tensor = self.main(torch.cat([images, plane], 1))
        return logits


class ProjectionDiscriminator(nn.Module):
    """Images, labels to head(h) + <embedding[label], sum of h over pixels>, with h = features(images); logits ``[N]``.

    features: to [N, width, H, W], or to [N, width]. head: h to one logit; a dense one takes the sum over pixels.
    like: the network that they are of, for its image_size and channels.
    normalised: spectral norm on the embedding, as on the other layers of `sngan-32`.
    """

    per_sample = True

    def __init__(
        self,
        features: nn.Module,
        head: nn.Module,
        *,
        classes: int,
        width: int,
        like: nn.Module,
        normalised: bool = False,
    ):
        super().__init__()
        self.image_size, self.channels, self.classes = like.image_size, like.channels, classes
        self.features, self.head = features, head
        embedding = nn.Embedding(classes, width)
        nn.init.normal_(embedding.weight, 0.0, 0.02)
        self.embedding = spectral_norm(embedding) if normalised else embedding
        self._dense = isinstance(head, nn.Linear)

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        h = self.features(images)
        pooled = h.sum((2, 3)) if h.dim() == 4 else h
        logits: Tensor = self.head(pooled if self._dense else h).flatten()
        return logits + (self.embedding(labels).to(h.dtype) * pooled).sum(1)


def check_classes(name: str, classes: int) -> None:
    """ValueError unless `classes` is 0 (no labels) or at least 2."""
    if not isinstance(classes, int) or isinstance(classes, bool) or classes < 0 or classes == 1:
        raise ValueError(f"{name}: classes must be 0 (no labels) or at least 2, got {classes!r}")
