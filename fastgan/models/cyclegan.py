"""Image to image without pairs: residual generators both ways and a critic of each side.

Source
    Zhu, Park, Isola, Efros 2017, Unpaired Image-to-Image Translation using Cycle-Consistent Adversarial Networks
    (arXiv:1703.10593), section 4 and appendix 7.2.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .pix2pix import PatchGAN, norm_of, normal_weights, patch_layers
from .sizes import check_positive, doublings


class ResidualBlock(nn.Module):
    """x + norm(conv(relu(norm(conv(x))))), 3x3 with reflection padding."""

    per_sample = True

    def __init__(self, width: int, norm: str = "instance"):
        super().__init__()
        self.main = nn.Sequential(
            *(nn.ReflectionPad2d(1), nn.Conv2d(width, width, 3), norm_of(norm, width), nn.ReLU()),
            *(nn.ReflectionPad2d(1), nn.Conv2d(width, width, 3), norm_of(norm, width)),
        )

    def forward(self, x: Tensor) -> Tensor:
        added: Tensor = x + self.main(x)
        return added


class ResidualGenerator(nn.Module):
    """Pictures ``[N, channels, H, W]`` of one side to pictures of the other in [-1, 1]; H and W multiples of 4.

    c7s1-width, two halvings, `blocks` residual blocks, two doublings, c7s1-channels; the names are the paper's.
    """

    per_sample = True

    def __init__(self, *, channels: int = 3, width: int = 64, blocks: int = 6, norm: str = "instance"):
        super().__init__()
        check_positive("ResidualGenerator", channels=channels, width=width, blocks=blocks)
        layers: list[nn.Module] = [nn.ReflectionPad2d(3), nn.Conv2d(channels, width, 7)]
        layers += [norm_of(norm, width), nn.ReLU()]
        for inputs in (width, 2 * width):
            layers += [nn.Conv2d(inputs, 2 * inputs, 3, 2, 1), norm_of(norm, 2 * inputs), nn.ReLU()]
        layers += [ResidualBlock(4 * width, norm) for _ in range(blocks)]
        for inputs in (4 * width, 2 * width):
            layers.append(nn.ConvTranspose2d(inputs, inputs // 2, 3, 2, 1, output_padding=1))
            layers += [norm_of(norm, inputs // 2), nn.ReLU()]
        self.main = nn.Sequential(*layers, nn.ReflectionPad2d(3), nn.Conv2d(width, channels, 7), nn.Tanh())

    def forward(self, x: Tensor) -> Tensor:
        images: Tensor = self.main(x)
        return images


class BothWays(nn.Module):
    """Pictures of both sides, planes a then b, to their translations, planes b then a: ``[N, 2 channels, H, W]``."""

    per_sample = True

    def __init__(self, ab: nn.Module, ba: nn.Module):
        super().__init__()
        self.ab, self.ba = ab, ba

    def forward(self, both: Tensor) -> Tensor:
        a, b = both.chunk(2, 1)
        return torch.cat([self.ab(a), self.ba(b)], 1)


class BothCritics(nn.Module):
    """Pictures of both sides, planes b then a, to {"logits": [b's, a's]}, each by a critic of its own."""

    per_sample = True

    def __init__(self, of_b: nn.Module, of_a: nn.Module):
        super().__init__()
        self.of_b, self.of_a = of_b, of_a

    def forward(self, both: Tensor) -> dict[str, list[Tensor]]:
        b, a = both.chunk(2, 1)
        return {"logits": [self.of_b(b), self.of_a(a)]}


def build_cyclegan(
    *,
    image_size: int = 64,
    channels: int = 3,
    g_width: int = 64,
    d_width: int = 64,
    blocks: int = 0,
    d_layers: int = 0,
    norm: str = "instance",
) -> tuple[BothWays, BothCritics]:
    """Both generators and both critics.

    blocks: 0 takes 9 from 256 pixels on and 6 below. d_layers: 0 by size. norm: "instance" as the paper, "layer" (over
    channels and places, so that it leaves how bright a flat thing is) or "batch".
    """
    doublings("cyclegan", image_size)
    count = blocks or (9 if image_size >= 256 else 6)
    way: Any = dict(channels=channels, width=g_width, blocks=count, norm=norm)
    generator = BothWays(ResidualGenerator(**way), ResidualGenerator(**way))
    critic: Any = dict(image_size=image_size, channels=channels, source_channels=0, width=d_width, norm=norm)
    layers = patch_layers(image_size, d_layers)
    critics = BothCritics(PatchGAN(**critic, layers=layers), PatchGAN(**critic, layers=layers))
    normal_weights(generator)
    return generator, critics
