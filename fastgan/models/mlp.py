"""A GAN of dense layers, for 28x28 grey images or anything as small.

Source: the fully connected GAN of the PyTorch-GAN collection (E. Linder-Norén,
``implementations/gan/gan.py``), itself after Goodfellow et al. 2014. One departure: that code writes
``BatchNorm1d(n, 0.8)``, which sets eps to 0.8 where a momentum was meant; here eps is PyTorch's 1e-5.
Parameter counts at the defaults: 1,510,032 and 533,505.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from .conditional import EMBEDDING, LabelledDiscriminator, LabelledGenerator, check_classes


def _check_widths(name: str, widths: Sequence[int]) -> tuple[int, ...]:
    widths = tuple(widths)
    if not widths or not all(isinstance(w, int) and w > 0 for w in widths):
        raise ValueError(f"{name}: widths must be one or more positive integers, got {widths}")
    return widths


class MLPGenerator(nn.Module):
    """z ``[N, latent]`` to images ``[N, channels, image_size, image_size]`` in [-1, 1].

    latent -> each of `widths` with LeakyReLU(0.2) -> pixels with tanh; batch norm on every hidden layer but
    the first.
    """

    per_sample = True  # samples meet only inside batch norm

    def __init__(
        self,
        *,
        image_size: int = 28,
        channels: int = 1,
        latent: int = 100,
        widths: Sequence[int] = (128, 256, 512, 1024),
    ):
        super().__init__()
        widths = _check_widths("MLPGenerator", widths)
        self.latent, self.image_size, self.channels = latent, image_size, channels
        layers: list[nn.Module] = [nn.Linear(latent, widths[0]), nn.LeakyReLU(0.2)]
        for before, after in pairwise(widths):
            layers += [nn.Linear(before, after), nn.BatchNorm1d(after), nn.LeakyReLU(0.2)]
        layers += [nn.Linear(widths[-1], channels * image_size * image_size), nn.Tanh()]
        self.main = nn.Sequential(*layers)

    def forward(self, z: Tensor) -> Tensor:
        pixels: Tensor = self.main(z)
        return pixels.view(-1, self.channels, self.image_size, self.image_size)


class MLPDiscriminator(nn.Module):
    """Images ``[N, channels, image_size, image_size]`` to logits ``[N]``, with LeakyReLU(0.2)."""

    per_sample = True

    def __init__(self, *, image_size: int = 28, channels: int = 1, widths: Sequence[int] = (512, 256)):
        super().__init__()
        widths = _check_widths("MLPDiscriminator", widths)
        self.image_size, self.channels = image_size, channels
        layers: list[nn.Module] = []
        before = channels * image_size * image_size
        for after in widths:
            layers += [nn.Linear(before, after), nn.LeakyReLU(0.2)]
            before = after
        self.main = nn.Sequential(*layers, nn.Linear(before, 1))

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.main(torch.flatten(images, 1))
        return logits.flatten()


def build(
    *,
    image_size: int = 28,
    channels: int = 1,
    latent: int = 100,
    g_widths: Sequence[int] = (128, 256, 512, 1024),
    d_widths: Sequence[int] = (512, 256),
    classes: int = 0,
) -> tuple[nn.Module, nn.Module]:
    """Both networks, with PyTorch's default initialisation as in the source; with `classes` both take an embedding."""
    check_classes("mlp-28", classes)
    if math.prod((image_size, channels, latent)) <= 0:
        raise ValueError(
            f"mlp: image_size, channels and latent must be positive, got {image_size}, {channels} and {latent}"
        )
    z, planes = (latent + EMBEDDING, channels + 1) if classes else (latent, channels)
    generator = MLPGenerator(image_size=image_size, channels=channels, latent=z, widths=g_widths)
    discriminator = MLPDiscriminator(image_size=image_size, channels=planes, widths=d_widths)
    if not classes:
        return generator, discriminator
    return (
        LabelledGenerator(generator, latent=latent, classes=classes),
        LabelledDiscriminator(discriminator, channels=channels, classes=classes),
    )
