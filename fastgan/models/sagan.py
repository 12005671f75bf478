"""`sagan-32`: `sngan-32` with self-attention in both networks, and spectral normalisation in the generator too.

Source: Zhang, Goodfellow, Metaxas, Odena 2019, Self-Attention Generative Adversarial Networks (arXiv:1805.08318).
Theirs are networks for 128 pixels, whose attention looks at maps of 32 x 32; here it looks at 16 x 16 of 32 pixels.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from .attention import DotProductAttention
from .resnet import build_sngan


class SelfAttention2d(nn.Module):
    """x + gain o(attention of every pixel to its map), ``[N, C, H, W]`` to the same; the gain starts at 0 (equation 3).

    1x1 convolutions make queries and keys of C/8 channels and values of C/2. Keys and values are of maps pooled 2 x 2
    by their maximum, as in the authors' code: a quarter of the scores.
    """

    per_sample = True

    def __init__(self, channels: int):
        super().__init__()
        inner, values = max(channels // 8, 1), max(channels // 2, 1)
        self.query = nn.Conv2d(channels, inner, 1, bias=False)
        self.key = nn.Conv2d(channels, inner, 1, bias=False)
        self.value = nn.Conv2d(channels, values, 1, bias=False)
        self.attention = DotProductAttention(scale=1.0)
        self.out = nn.Conv2d(values, channels, 1, bias=False)
        self.gain = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.query(x), F.max_pool2d(self.key(x), 2), F.max_pool2d(self.value(x), 2)
        y = self.attention(*(t.flatten(2).mT.unsqueeze(1) for t in (q, k, v)))  # [N, 1 head, pixels, channels]
        attended: Tensor = self.out(y.squeeze(1).mT.unflatten(2, x.shape[2:]))
        return x + self.gain * attended


class Attended(nn.Module):
    """Self-attention behind a block of `channels` output channels; labels, where there are any, go to the block."""

    per_sample = True

    def __init__(self, block: nn.Module, channels: int):
        super().__init__()
        self.block, self.attention = block, SelfAttention2d(channels)

    def forward(self, *inputs: Tensor) -> Tensor:
        y: Tensor = self.attention(self.block(*inputs))
        return y


def _attend(blocks: Any, at: int, channels: int) -> None:
    """Self-attention behind one block of a container."""
    blocks[at] = Attended(blocks[at], channels)
    for layer in blocks[at].attention.children():
        if isinstance(layer, nn.Conv2d):
            nn.init.xavier_uniform_(layer.weight)


def _normalise(network: nn.Module) -> None:
    """Spectral norm on every convolution and dense layer that has none."""
    for layer in list(network.modules()):
        if isinstance(layer, nn.Conv2d | nn.Linear) and not nn.utils.parametrize.is_parametrized(layer):
            spectral_norm(layer)


def build_sagan(
    *,
    image_size: int = 32,
    channels: int = 3,
    latent: int = 128,
    g_width: int = 256,
    d_width: int = 128,
    classes: int = 0,
) -> tuple[nn.Module, nn.Module]:
    """Both networks of `sagan-32`: those of `sngan-32` with self-attention where maps are of 16 x 16 pixels.

    The discriminator halves its maps twice only, so from 128 pixels on its attention looks at a quarter of the size.
    With `classes` the generator's norms scale and shift by class, and the discriminator projects, as in the paper.
    """
    sizes = {"image_size": image_size, "channels": channels, "latent": latent}
    generator, discriminator = build_sngan(g_width=g_width, d_width=d_width, classes=classes, **sizes)
    _attend(generator.blocks if classes else generator.main, 1, g_width)
    halvings = min(max(image_size.bit_length() - 5, 1), 2)
    _attend(discriminator.features if classes else discriminator.main, halvings - 1, d_width)
    _normalise(generator)
    _normalise(discriminator)
    return generator, discriminator
