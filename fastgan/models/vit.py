"""`vit-gan-small`: a transformer judges, DCGAN's generator draws.

Source: the discriminator is the encoder of Dosovitskiy et al. 2021, An Image is Worth 16x16 Words (arXiv:2010.11929),
norm before each branch, at a fraction of its size, with overlapping patches as Lee et al. 2022, ViTGAN
(arXiv:2107.04589). ViTGAN tames it by attention by distance and a spectral norm of its own; here R1 does.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .attention import DotProductAttention
from .conditional import ProjectionDiscriminator, check_classes
from .dcgan import ConditionalDCGANGenerator, DCGANGenerator, init_dcgan


class SelfAttention(nn.Module):
    """Attention of tokens ``[N, L, width]`` to each other in `heads` heads, between two dense layers."""

    per_sample = True

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.inputs, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.attention = DotProductAttention()

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.inputs(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # each [N, heads, L, d]
        y: Tensor = self.out(self.attention(q, k, v).transpose(1, 2).flatten(2))
        return y


class TransformerBlock(nn.Module):
    """x + attention(norm(x)), then x + dense(norm(x)): tokens ``[N, L, width]`` to the same."""

    per_sample = True

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.attend = nn.Sequential(nn.LayerNorm(width), SelfAttention(width, heads))
        self.dense = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attend(x)
        return x + self.dense(x)


class Tokens(nn.Module):
    """Images ``[N, channels, H, W]`` to a token of each patch ``[N, H W / patch², width]``, a learnt position added.

    A token sees half a patch beyond its own on each side, as ViTGAN's do: what is sharp at the edges of patches alone
    would not be seen, and the generator draws a grid.
    """

    per_sample = True

    def __init__(self, image_size: int, channels: int, patch: int, width: int):
        super().__init__()
        beyond = patch // 2
        self.patches = nn.Conv2d(channels, width, patch + 2 * beyond, patch, beyond)
        self.position = nn.Parameter(torch.empty((image_size // patch) ** 2, width))

    def forward(self, images: Tensor) -> Tensor:
        return self.patches(images).flatten(2).mT + self.position


class MeanToken(nn.Module):
    """Tokens ``[N, L, width]`` to their mean ``[N, width]``."""

    per_sample = True

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1)


class ViTDiscriminator(nn.Module):
    """Images to logits ``[N]``: patches as tokens, `depth` transformer blocks, norm, mean token, a dense layer."""

    per_sample = True

    def __init__(
        self,
        *,
        image_size: int = 32,
        channels: int = 3,
        width: int = 128,
        depth: int = 4,
        heads: int = 4,
        patch: int = 4,
    ):
        super().__init__()
        if width < 1 or heads < 1 or width % heads:
            raise ValueError(f"ViTDiscriminator: heads must divide the width, got {heads!r} and {width!r}")
        if depth < 1 or patch < 1 or image_size % patch:
            raise ValueError(
                f"ViTDiscriminator: depth must be at least 1 and patch divide image_size, {image_size!r}, "
                f"got {depth!r} and {patch!r}"
            )
        self.image_size, self.channels = image_size, channels
        self.main = nn.Sequential(
            Tokens(image_size, channels, patch, width),
            *(TransformerBlock(width, heads) for _ in range(depth)),
            nn.LayerNorm(width),
            MeanToken(),
            nn.Linear(width, 1),
        )

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.main(images)
        return logits.flatten()


def _sinusoids(side: int, width: int) -> Tensor:
    """[side², width]: sines and cosines of each token's row and column at rates from 1 to 1/100, zeros where 4 do not
    divide the width."""
    place, rates = torch.arange(side, dtype=torch.float32), 100.0 ** -torch.linspace(0, 1, width // 4)
    waves = torch.cat([f(place[:, None] * rates) for f in (torch.sin, torch.cos)], 1)  # [side, width / 2]
    both = torch.cat([waves.repeat_interleave(side, 0), waves.repeat(side, 1)], 1)
    return nn.functional.pad(both, (0, width - both.shape[1]))


def init_vit(network: nn.Module) -> None:
    """Weights N(0, 0.02), cut at two deviations, biases 0, patches as a dense layer of their pixels, and positions that
    begin as sinusoids, of the size of the patches' values.

    Positions of N(0, 0.02), as in the paper, are lost beside the patches for the first thousand steps: the
    discriminator judged patches without their place, and the generator repeated one of them all over its pictures.
    """
    for layer in network.modules():
        if isinstance(layer, nn.Linear):
            nn.init.trunc_normal_(layer.weight, std=0.02, a=-0.04, b=0.04)
            nn.init.zeros_(layer.bias)
        elif isinstance(layer, Tokens):
            nn.init.xavier_uniform_(layer.patches.weight.flatten(1))
            nn.init.zeros_(layer.patches.bias)  # type: ignore[arg-type]
            with torch.no_grad():
                layer.position.copy_(_sinusoids(round(len(layer.position) ** 0.5), layer.position.shape[1]))


def build_vit(
    *,
    image_size: int = 32,
    channels: int = 3,
    latent: int = 100,
    g_width: int = 48,
    d_width: int = 128,
    depth: int = 4,
    heads: int = 4,
    patch: int = 4,
    classes: int = 0,
) -> tuple[nn.Module, nn.Module]:
    """Both networks of `vit-gan-small`: DCGAN's generator and a transformer for a discriminator.

    With `classes` the generator's norms scale and shift by class, and the discriminator projects.
    """
    check_classes("vit-gan-small", classes)
    generator = DCGANGenerator(image_size=image_size, channels=channels, latent=latent, width=g_width)
    sizes = {"image_size": image_size, "channels": channels, "depth": depth, "heads": heads, "patch": patch}
    discriminator = ViTDiscriminator(width=d_width, **sizes)
    init_dcgan(generator)
    init_vit(discriminator)
    if not classes:
        return generator, discriminator
    features, head = discriminator.main[:-1], discriminator.main[-1]
    projection = ProjectionDiscriminator(features, head, classes=classes, width=d_width, like=discriminator)
    return ConditionalDCGANGenerator(generator, classes=classes), projection
