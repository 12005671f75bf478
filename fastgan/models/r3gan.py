"""`r3gan` and `r3gan-small`: the modern, norm-free baseline: grouped residual blocks, leaky ReLU, nothing else.

Source: Huang, Gokaslan, Kuleshov, Tompkin 2024, The GAN is dead; long live the GAN! (arXiv:2501.05441). Both are at a
fraction of its width. `r3gan` has the paper's two blocks a resolution and filters with [1, 3, 3, 1] where it resamples;
`r3gan-small` has one block, bilinear upsampling and average pooling.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from fastgan import functional

from .conditional import EMBEDDING, LabelledGenerator, ProjectionDiscriminator, check_classes
from .sizes import doublings


class ResidualBlock(nn.Module):
    """x + f(x); f: 1x1 to `expansion` times the channels, leaky ReLU, grouped 3x3, leaky ReLU, 1x1 back, no bias."""

    per_sample = True

    def __init__(self, channels: int, *, expansion: int = 2, group_size: int = 16):
        super().__init__()
        inner = channels * expansion
        self.main = nn.Sequential(
            nn.Conv2d(channels, inner, 1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(inner, inner, 3, padding=1, groups=max(inner // group_size, 1)),
            nn.LeakyReLU(0.2),
            nn.Conv2d(inner, channels, 1, bias=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.main(x)


class Filtered(nn.Module):
    """[N, C, H, W] up or down by 2 through the filter [1, 3, 3, 1] / 8 of both axes."""

    per_sample = True
    taps: Tensor

    def __init__(self, *, up: int = 1, down: int = 1):
        super().__init__()
        self.up, self.down = up, down
        self.register_buffer("taps", torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        padding = (2, 1) if self.up > 1 else (1, 1)
        return functional.upfirdn2d(x, self.taps, self.up, self.down, padding * 2, gain=float(self.up**2))


def _doubled(filtered: bool) -> nn.Module:
    return Filtered(up=2) if filtered else nn.Upsample(scale_factor=2, mode="bilinear")


def _halved(filtered: bool) -> nn.Module:
    return Filtered(down=2) if filtered else nn.AvgPool2d(2)


def _stage(channels: int, blocks: int, group_size: int) -> list[nn.Module]:
    return [ResidualBlock(channels, group_size=group_size) for _ in range(blocks)]


class R3GANGenerator(nn.Module):
    """z [N, latent] to images [N, channels, image_size, image_size] in about [-1, 1] (no tanh, as in the paper).

    A learned 4x4 basis scaled channel by channel by a linear map of z, then a stage of residual blocks a resolution.
    `width` is the number of channels at 4x4; it halves with every second doubling.
    """

    per_sample = True

    def __init__(
        self,
        *,
        image_size: int = 32,
        channels: int = 3,
        latent: int = 64,
        width: int = 128,
        blocks: int = 1,
        group_size: int = 16,
        filtered: bool = False,
    ):
        super().__init__()
        self.latent, self.image_size, self.channels = latent, image_size, channels
        widths = _widths("R3GANGenerator", image_size, width)
        self.basis = nn.Parameter(torch.randn(1, width, 4, 4))
        self.modulation = nn.Linear(latent, width, bias=False)
        layers: list[nn.Module] = _stage(width, blocks, group_size)
        for before, after in pairwise(widths):
            layers += [_doubled(filtered)]
            layers += [nn.Conv2d(before, after, 1, bias=False)] if before != after else []
            layers += _stage(after, blocks, group_size)
        self.main = nn.Sequential(*layers, nn.Conv2d(widths[-1], channels, 1))

    def forward(self, z: Tensor) -> Tensor:
        start = self.basis * self.modulation(z)[:, :, None, None]
        images: Tensor = self.main(start)
        return images


class R3GANDiscriminator(nn.Module):
    """Images to logits [N]: the generator's mirror, ended by a depthwise 4x4 convolution and a linear map."""

    per_sample = True

    def __init__(
        self,
        *,
        image_size: int = 32,
        channels: int = 3,
        width: int = 128,
        blocks: int = 1,
        group_size: int = 16,
        filtered: bool = False,
    ):
        super().__init__()
        self.image_size, self.channels = image_size, channels
        widths = _widths("R3GANDiscriminator", image_size, width)[::-1]
        layers: list[nn.Module] = [nn.Conv2d(channels, widths[0], 1)]
        for before, after in pairwise(widths):
            layers += [*_stage(before, blocks, group_size), _halved(filtered)]
            layers += [nn.Conv2d(before, after, 1, bias=False)] if before != after else []
        layers += [*_stage(width, blocks, group_size), nn.Conv2d(width, width, 4, groups=width, bias=False)]
        self.main = nn.Sequential(*layers, nn.Flatten(), nn.Linear(width, 1, bias=False))

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.main(images)
        return logits.flatten()


def _widths(name: str, image_size: int, width: int) -> list[int]:
    """Channels at 4x4, 8x8, ... image_size."""
    count = doublings(name, image_size) + 1
    if width % 16:
        raise ValueError(f"{name}: width must be a multiple of 16, got {width!r}")
    return [max(width >> (i // 2), 16) for i in range(count)]


def init_r3gan(network: nn.Module) -> None:
    """He-initialised; a block's first two convolutions scaled by depth^(-1/4), its last zero (Fixup, as the paper)."""
    blocks = [m for m in network.modules() if isinstance(m, ResidualBlock)]
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(layer.weight, 0.2)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    with torch.no_grad():
        for block in blocks:
            first, second, last = (m for m in block.main if isinstance(m, nn.Conv2d))
            first.weight.mul_(len(blocks) ** -0.25)
            second.weight.mul_(len(blocks) ** -0.25)
            last.weight.zero_()


def build_r3gan(
    *,
    image_size: int = 32,
    channels: int = 3,
    latent: int = 64,
    g_width: int = 128,
    d_width: int = 128,
    blocks: int = 1,
    group_size: int = 16,
    filtered: bool = False,
    classes: int = 0,
) -> tuple[nn.Module, nn.Module]:
    """Both networks of `r3gan-small`; filtered: resample by [1, 3, 3, 1].

    With `classes` the generator takes an embedding beside z, and the discriminator projects, as in the paper.
    """
    check_classes("r3gan", classes)
    z = latent + EMBEDDING if classes else latent
    shape: dict[str, Any] = {"image_size": image_size, "channels": channels, "blocks": blocks}
    shape |= {"group_size": group_size, "filtered": filtered}
    generator = R3GANGenerator(latent=z, width=g_width, **shape)
    discriminator = R3GANDiscriminator(width=d_width, **shape)
    init_r3gan(generator)
    init_r3gan(discriminator)
    if not classes:
        return generator, discriminator
    features, head = discriminator.main[:-1], discriminator.main[-1]
    projection = ProjectionDiscriminator(features, head, classes=classes, width=d_width, like=discriminator)
    return LabelledGenerator(generator, latent=latent, classes=classes), projection


def build_r3gan_filtered(
    *,
    image_size: int = 32,
    channels: int = 3,
    latent: int = 64,
    g_width: int = 128,
    d_width: int = 128,
    blocks: int = 2,
    group_size: int = 16,
    classes: int = 0,
) -> tuple[nn.Module, nn.Module]:
    """Both networks of `r3gan`: those of `build_r3gan` with the paper's two blocks a resolution and its filters."""
    shape: dict[str, Any] = {"image_size": image_size, "channels": channels, "latent": latent, "group_size": group_size}
    return build_r3gan(g_width=g_width, d_width=d_width, blocks=blocks, filtered=True, classes=classes, **shape)
