"""Image to image with pairs: a U-Net and a PatchGAN.

Source
    Isola, Zhu, Zhou, Efros 2017, Image-to-Image Translation with Conditional Adversarial Networks (arXiv:1611.07004),
    section 3.2 and appendix 6.1. Departures: the networks fit any power of two from 16 pixels, and at test time batch
    norm uses its running statistics and dropout is off.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from .sizes import check_positive, doublings

DROPPED = 3  # stages of the decoder, from the innermost, that drop features


def normal_weights(module: nn.Module) -> None:
    """The paper's initialisation: convolutions from N(0, 0.02), batch norm's weights from N(1, 0.02), biases 0."""
    for m in module.modules():
        if isinstance(m, nn.Conv2d | nn.ConvTranspose2d):
            nn.init.normal_(m.weight, 0.0, 0.02)
        elif isinstance(m, nn.BatchNorm2d):
            nn.init.normal_(m.weight, 1.0, 0.02)
        if isinstance(m, nn.Conv2d | nn.ConvTranspose2d | nn.BatchNorm2d) and m.bias is not None:
            nn.init.zeros_(m.bias)


class UNet(nn.Module):
    """Sources ``[N, source_channels, H, W]`` to targets ``[N, channels, H, W]`` in [-1, 1].

    The encoder halves the picture down to one pixel, the decoder doubles it again; each stage of the decoder also sees
    the stage of the encoder that it mirrors. Widths from the image inwards: 1, 2, 4, 8, 8, ... times `width`. The
    first and the innermost stage have no norm: of one picture, one pixel has no variance.
    """

    per_sample = True  # samples meet only inside batch norm

    def __init__(
        self,
        *,
        image_size: int = 64,
        channels: int = 3,
        source_channels: int = 3,
        width: int = 64,
        dropout: float = 0.5,
    ):
        super().__init__()
        levels = doublings("UNet", image_size) + 2
        check_positive("UNet", channels=channels, source_channels=source_channels, width=width)
        widths = [min(width << level, 8 * width) for level in range(levels)]
        self.image_size, self.channels, self.source_channels = image_size, channels, source_channels
        self.downs = nn.ModuleList([_down(source_channels, width, norm=False)])
        for level, (before, after) in enumerate(pairwise(widths), 1):
            self.downs.append(_down(before, after, norm=level < levels - 1))
        self.ups = nn.ModuleList()
        for number, (before, after) in enumerate(pairwise(widths[::-1])):
            drop = dropout if number < DROPPED and after == 8 * width else 0.0
            self.ups.append(_up(before if number == 0 else 2 * before, after, drop))
        self.last = nn.Sequential(nn.ConvTranspose2d(2 * width, channels, 4, 2, 1), nn.Tanh())
        normal_weights(self)

    def forward(self, source: Tensor) -> Tensor:
        seen = [source]
        for down in self.downs:
            seen.append(down(seen[-1]))
        h = seen.pop()
        for up in self.ups:
            h = torch.cat([up(h), seen.pop()], 1)
        images: Tensor = self.last(h)
        return images


def _down(inputs: int, outputs: int, *, norm: bool) -> nn.Sequential:
    layers = [nn.Conv2d(inputs, outputs, 4, 2, 1, bias=not norm), *([nn.BatchNorm2d(outputs)] if norm else [])]
    return nn.Sequential(*layers, nn.LeakyReLU(0.2))


def _up(inputs: int, outputs: int, dropout: float) -> nn.Sequential:
    layers = [nn.ConvTranspose2d(inputs, outputs, 4, 2, 1, bias=False), nn.BatchNorm2d(outputs)]
    return nn.Sequential(*layers, *([nn.Dropout(dropout)] if dropout else []), nn.ReLU())


def norm_of(kind: str, width: int) -> nn.Module:
    """The norm of that kind for `width` channels: "batch", "instance", or "layer" (over channels and places)."""
    if kind == "batch":
        return nn.BatchNorm2d(width)
    if kind == "instance":
        return nn.InstanceNorm2d(width)
    if kind == "layer":
        return nn.GroupNorm(1, width)
    raise ValueError(f"norm: it must be batch, instance or layer, got {kind!r}")


class PatchGAN(nn.Module):
    """Pictures ``[N, channels, H, W]`` and their sources to logits ``[N, 1, h, w]``, one for each patch.

    layers: convolutions of stride 2. A logit sees 16, 34, 70 or 142 pixels with 1, 2, 3 or 4 of them.
    source_channels: 0 for a discriminator that sees no source.
    norm: "batch", "instance" or "layer", on all but the first and the last.
    """

    per_sample = True

    def __init__(
        self,
        *,
        image_size: int = 64,
        channels: int = 3,
        source_channels: int = 3,
        width: int = 64,
        layers: int = 3,
        norm: str = "batch",
    ):
        super().__init__()
        check_positive("PatchGAN", channels=channels, width=width, layers=layers)
        if image_size >> layers < 4:
            raise ValueError(f"PatchGAN: {layers} layers need {4 << layers} pixels at least, got {image_size}")
        self.image_size, self.channels, self.source_channels = image_size, channels, source_channels
        widths = [min(width << level, 8 * width) for level in range(layers + 1)]
        stages: list[nn.Module] = [nn.Conv2d(channels + source_channels, width, 4, 2, 1), nn.LeakyReLU(0.2)]
        for level, (before, after) in enumerate(pairwise(widths), 1):
            stride = 2 if level < layers else 1
            stages.append(nn.Conv2d(before, after, 4, stride, 1, bias=norm != "batch"))
            stages += [norm_of(norm, after), nn.LeakyReLU(0.2)]
        self.main = nn.Sequential(*stages, nn.Conv2d(widths[-1], 1, 4, 1, 1))
        normal_weights(self)

    def forward(self, images: Tensor, source: Tensor | None = None) -> Tensor:
        logits: Tensor = self.main(images if source is None else torch.cat([images, source.to(images.dtype)], 1))
        return logits


def patch_layers(image_size: int, layers: int) -> int:
    """`layers`, or for 0 a choice by size: patches of 70 pixels from 128 on, of 34 at 64, else of 16."""
    return layers or (3 if image_size >= 128 else 2 if image_size >= 64 else 1)


def build_pix2pix(
    *,
    image_size: int = 64,
    channels: int = 3,
    source_channels: int = 0,
    g_width: int = 64,
    d_width: int = 64,
    d_layers: int = 0,
    dropout: float = 0.5,
) -> tuple[UNet, PatchGAN]:
    """``(UNet, PatchGAN)``. source_channels: 0 as many as channels. d_layers: 0 by the image's size."""
    sources = source_channels or channels
    sizes: Any = {"image_size": image_size, "channels": channels, "source_channels": sources}
    generator = UNet(**sizes, width=g_width, dropout=dropout)
    return generator, PatchGAN(**sizes, width=d_width, layers=patch_layers(image_size, d_layers))
