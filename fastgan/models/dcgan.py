"""Two DCGANs: the one of PyTorch's examples (`dcgan-64`) and the one of TensorFlow's Keras tutorial
(`dcgan-28`).

Sources
    dcgan-64: pytorch/examples, ``dcgan/main.py``, after Radford, Metz, Chintala 2016 (arXiv:1511.06434).
    dcgan-28: tensorflow.org/tutorials/generative/dcgan.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgan import _ranks
from fastgan._ranks import Sync

from .conditional import (
    EMBEDDING,
    ClassAffine,
    LabelledDiscriminator,
    LabelledGenerator,
    ProjectionDiscriminator,
    check_classes,
)
from .sizes import check_positive, doublings


def _widths(name: str, stages: int, width: int, most: int | None) -> list[int]:
    """Channels of each stage from the image inwards: `width`, twice that, ..., at most `most`."""
    if most is not None and most < width:
        raise ValueError(f"{name}: most must be none or at least the width, {width}, got {most!r}")
    return [min(width << stage, most or width << stage) for stage in range(stages)]


# ------------------------------------------------------------------------------------------ dcgan-64


class DCGANGenerator(nn.Module):
    """z ``[N, latent]`` (or ``[N, latent, 1, 1]``) to images ``[N, channels, image_size, image_size]`` in
    [-1, 1].

    4x4 transposed convolutions without bias, strides 1, 2, 2, ...; batch norm and ReLU after each but the
    last, which ends in tanh. `width` is the number of channels before the last layer and doubles towards the
    latent (at 64 pixels: 8, 4, 2, 1 times `width`), up to `most`. 3,576,704 parameters at the defaults.
    """

    per_sample = True  # samples meet only inside batch norm

    def __init__(
        self, *, image_size: int = 64, channels: int = 3, latent: int = 100, width: int = 64, most: int | None = None
    ):
        super().__init__()
        stages = doublings("DCGANGenerator", image_size)
        check_positive("DCGANGenerator", channels=channels, latent=latent, width=width)
        widths = _widths("DCGANGenerator", stages, width, most)[::-1]
        self.latent, self.image_size, self.channels = latent, image_size, channels
        layers: list[nn.Module] = [
            nn.ConvTranspose2d(latent, widths[0], 4, 1, 0, bias=False),
            nn.BatchNorm2d(widths[0]),
            nn.ReLU(inplace=True),
        ]
        for before, after in pairwise(widths):
            layers += [
                nn.ConvTranspose2d(before, after, 4, 2, 1, bias=False),
                nn.BatchNorm2d(after),
                nn.ReLU(inplace=True),
            ]
        layers += [nn.ConvTranspose2d(widths[-1], channels, 4, 2, 1, bias=False), nn.Tanh()]
        self.main = nn.Sequential(*layers)

    def forward(self, z: Tensor) -> Tensor:
        images: Tensor = self.main(z.view(z.shape[0], -1, 1, 1))
        return images


class MinibatchDeviation(nn.Module):
    """[N, C, H, W] -> [N, C + 1, H, W]: a plane with the mean deviation of features over a group of samples.

    A discriminator sees by it that pictures are too much alike. Groups are of 4 consecutive samples, or of the greatest
    number below that divides N. Source: Karras et al. 2018 (arXiv:1710.10196), section 3. StyleGAN's groups are of
    samples N / 4 apart; consecutive ones stay together where a batch is cut into parts, for ranks or `accumulate`.

    sync: False; True or a process group in training: groups are those that one process makes of the batches of all
    (`fastgan.convert.synchronise` sets it). They lie within a rank, so nothing is sent; ValueError where they do not.
    """

    sync: Sync = False

    def forward(self, x: Tensor) -> Tensor:
        n, _, height, width = x.shape
        whole = n * _ranks.size(self.sync) if self.training else n
        group = next(size for size in (4, 3, 2, 1) if whole % size == 0)
        if n % group:
            raise ValueError(
                f"MinibatchDeviation: a rank's part of a batch must hold whole groups of the {group} samples that one "
                f"process compares in a batch of {whole}, got {n}; take a batch_size whose parts are multiples of "
                f"{group}, or leave out sync_statistics"
            )
        wide = x if x.dtype == torch.float64 else x.float()
        groups = wide.unflatten(0, (n // group, group))
        deviation = (groups.var(1, correction=0) + 1e-8).sqrt().mean((1, 2, 3))  # [n / group]
        plane = deviation[:, None].expand(-1, group).reshape(n, 1, 1, 1).expand(n, 1, height, width)
        return torch.cat([x, plane.to(x.dtype)], 1)


class DCGANDiscriminator(nn.Module):
    """Images ``[N, channels, image_size, image_size]`` to logits ``[N]`` (no sigmoid: the losses take
    logits).

    The generator's mirror: 4x4 convolutions with stride 2 and LeakyReLU(0.2), batch norm on all but the
    first; the last maps 4x4 to one number. 2,765,568 parameters at the defaults.
    With `deviation` the last layer also sees how much the samples of a batch differ (`MinibatchDeviation`).
    Without `norm` a bias takes each batch norm's place: a critic for gradient penalties, which batch norm would couple.
    """

    per_sample = True

    def __init__(
        self,
        *,
        image_size: int = 64,
        channels: int = 3,
        width: int = 64,
        norm: bool = True,
        most: int | None = None,
        deviation: bool = False,
    ):
        super().__init__()
        stages = doublings("DCGANDiscriminator", image_size)
        check_positive("DCGANDiscriminator", channels=channels, width=width)
        widths = _widths("DCGANDiscriminator", stages, width, most)
        self.image_size, self.channels = image_size, channels
        layers: list[nn.Module] = [
            nn.Conv2d(channels, width, 4, 2, 1, bias=False),
            nn.LeakyReLU(0.2, inplace=True),
        ]
        for before, after in pairwise(widths):
            layers += [
                nn.Conv2d(before, after, 4, 2, 1, bias=not norm),
                *([nn.BatchNorm2d(after)] if norm else []),
                nn.LeakyReLU(0.2, inplace=True),
            ]
        if deviation:
            layers.append(MinibatchDeviation())
        self.main = nn.Sequential(*layers, nn.Conv2d(widths[-1] + deviation, 1, 4, 1, 0, bias=False))

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.main(images)
        return logits.flatten()


class ConditionalDCGANGenerator(nn.Module):
    """z ``[N, latent]``, labels ``[N]`` to images: `plain`'s layers, whose norms scale and shift by class."""

    per_sample = True

    def __init__(self, plain: DCGANGenerator, *, classes: int):
        super().__init__()
        self.latent, self.image_size, self.channels = plain.latent, plain.image_size, plain.channels
        self.classes = classes
        layers = list(plain.main)
        widths = [layer.num_features for layer in layers if isinstance(layer, nn.BatchNorm2d)]
        convolutions = [layer for layer in layers if isinstance(layer, nn.ConvTranspose2d)]
        pairs = zip(convolutions, widths, strict=False)  # the last convolution has no norm
        self.stages = nn.ModuleList(nn.Sequential(c, nn.BatchNorm2d(width, affine=False)) for c, width in pairs)
        self.affines = nn.ModuleList(ClassAffine(classes, width) for width in widths)
        self.last = nn.Sequential(*layers[-2:])

    def forward(self, z: Tensor, labels: Tensor) -> Tensor:
        x = z.view(z.shape[0], -1, 1, 1)
        for stage, affine in zip(self.stages, self.affines, strict=True):
            x = F.relu(affine(stage(x), labels))
        images: Tensor = self.last(x)
        return images


def init_dcgan(module: nn.Module) -> None:
    """The DCGAN paper's initialisation: convolutions N(0, 0.02), batch norm weight N(1, 0.02) and bias 0."""
    for layer in module.modules():
        if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)):
            nn.init.normal_(layer.weight, 0.0, 0.02)
        elif isinstance(layer, nn.BatchNorm2d):
            nn.init.normal_(layer.weight, 1.0, 0.02)
            nn.init.zeros_(layer.bias)


def build_dcgan(
    *,
    image_size: int = 64,
    channels: int = 3,
    latent: int = 100,
    g_width: int = 64,
    d_width: int = 64,
    d_norm: bool = True,
    d_deviation: bool = False,
    most: int | None = None,
    classes: int = 0,
) -> tuple[nn.Module, nn.Module]:
    """Both networks of `dcgan-64`, initialised as in the paper. `g_width` and `d_width`: its ngf and ndf.

    No layer has more than `most` channels.
    With `classes` the generator's norms scale and shift by class, and the discriminator projects.
    """
    check_classes("dcgan-64", classes)
    generator = DCGANGenerator(image_size=image_size, channels=channels, latent=latent, width=g_width, most=most)
    discriminator = DCGANDiscriminator(
        image_size=image_size, channels=channels, width=d_width, norm=d_norm, most=most, deviation=d_deviation
    )
    init_dcgan(generator)
    init_dcgan(discriminator)
    if not classes:
        return generator, discriminator
    features, head = discriminator.main[:-1], discriminator.main[-1]
    width = int(head.in_channels)  # type: ignore[arg-type]
    projection = ProjectionDiscriminator(features, head, classes=classes, width=width, like=discriminator)
    return ConditionalDCGANGenerator(generator, classes=classes), projection


# Channels at full size by image size: a step costs about the same from 32 to 128 pixels (docs/losses-and-recipes.md).
BY_SIZE = {16: 64, 32: 48, 64: 32, 128: 16, 256: 8}


def build_by_size(
    *,
    image_size: int = 64,
    channels: int = 3,
    latent: int = 100,
    g_width: int | None = None,
    d_width: int | None = None,
    d_norm: bool = False,
    d_deviation: bool = False,
    most: int = 256,
    classes: int = 0,
) -> tuple[nn.Module, nn.Module]:
    """The networks of `dcgan-64` for a few minutes on a few cores: widths by image size where they are None.

    The discriminator has no norm, for R1. Sizes: 16, 32, 64, 128, 256.
    """
    if image_size not in BY_SIZE:
        raise ValueError(f"fastgan: image_size must be one of {', '.join(map(str, BY_SIZE))}, got {image_size!r}")
    g_width, d_width = (BY_SIZE[image_size] if width is None else width for width in (g_width, d_width))
    sizes = {"image_size": image_size, "channels": channels, "latent": latent, "classes": classes}
    return build_dcgan(g_width=g_width, d_width=d_width, d_norm=d_norm, d_deviation=d_deviation, most=most, **sizes)


# ------------------------------------------------------------------------------------------ dcgan-28

_KERAS_EPS = 1e-3
_KERAS_MOMENTUM = 0.01  # Keras' 0.99 weighs the old value, PyTorch's 0.01 the new one
_SLOPE = 0.3  # Keras' LeakyReLU default


class KerasDCGANGenerator(nn.Module):
    """z ``[N, latent]`` to images ``[N, channels, image_size, image_size]`` in [-1, 1].

    Dense to ``image_size/4`` squared times 4 `width`, then 5x5 transposed convolutions to 2 `width` (stride
    1), `width` (stride 2) and `channels` (stride 2), all without bias; batch norm and LeakyReLU(0.3) between,
    tanh at the end. Batch norm has Keras' eps 1e-3 and momentum 0.99. 2,305,472 trainable parameters at the
    defaults.

    Padding: on an even size, Keras' "same" with kernel 5 and stride 2 pads 1 before and 2 after; padding 2
    (with output_padding 1 in the transposed form) lands on the grid that pads 2 before and 1 after. It is the
    mirror image: a network with all kernels flipped sees flipped images, so what can be learnt is the same.
    """

    per_sample = True

    def __init__(self, *, image_size: int = 28, channels: int = 1, latent: int = 100, width: int = 64):
        super().__init__()
        if not isinstance(image_size, int) or image_size < 4 or image_size % 4:
            raise ValueError(f"KerasDCGANGenerator: image_size must be a positive multiple of 4, got {image_size!r}")
        check_positive("KerasDCGANGenerator", channels=channels, latent=latent, width=width)
        self.latent, self.image_size, self.channels = latent, image_size, channels
        self.start, self.width = image_size // 4, width
        features = self.start * self.start * 4 * width
        self.dense = nn.Sequential(
            nn.Linear(latent, features, bias=False),
            nn.BatchNorm1d(features, _KERAS_EPS, _KERAS_MOMENTUM),
            nn.LeakyReLU(_SLOPE),
        )
        self.main = nn.Sequential(
            nn.ConvTranspose2d(4 * width, 2 * width, 5, 1, 2, bias=False),
            nn.BatchNorm2d(2 * width, _KERAS_EPS, _KERAS_MOMENTUM),
            nn.LeakyReLU(_SLOPE),
            nn.ConvTranspose2d(2 * width, width, 5, 2, 2, output_padding=1, bias=False),
            nn.BatchNorm2d(width, _KERAS_EPS, _KERAS_MOMENTUM),
            nn.LeakyReLU(_SLOPE),
            nn.ConvTranspose2d(width, channels, 5, 2, 2, output_padding=1, bias=False),
            nn.Tanh(),
        )

    def forward(self, z: Tensor) -> Tensor:
        # Features are ordered [row][column][channel], as Keras reshapes them: in PyTorch a channels_last
        # view, no copy.
        h = self.dense(z).view(-1, self.start, self.start, 4 * self.width).permute(0, 3, 1, 2)
        images: Tensor = self.main(h)
        return images


class KerasDCGANDiscriminator(nn.Module):
    """Images ``[N, channels, image_size, image_size]`` to logits ``[N]``.

    Two 5x5 convolutions with stride 2 to `width` and 2 `width` channels, each with LeakyReLU(0.3) and dropout
    0.3, then one dense unit. Padding as in `KerasDCGANGenerator`. 212,865 parameters at the defaults.
    """

    per_sample = True  # dropout draws a mask per sample

    def __init__(self, *, image_size: int = 28, channels: int = 1, width: int = 64, dropout: float = 0.3):
        super().__init__()
        if not isinstance(image_size, int) or image_size < 4 or image_size % 4:
            raise ValueError(
                f"KerasDCGANDiscriminator: image_size must be a positive multiple of 4, got {image_size!r}"
            )
        check_positive("KerasDCGANDiscriminator", channels=channels, width=width)
        self.image_size, self.channels = image_size, channels
        self.main = nn.Sequential(
            nn.Conv2d(channels, width, 5, 2, 2),
            nn.LeakyReLU(_SLOPE),
            nn.Dropout(dropout),
            nn.Conv2d(width, 2 * width, 5, 2, 2),
            nn.LeakyReLU(_SLOPE),
            nn.Dropout(dropout),
        )
        self.dense = nn.Linear((image_size // 4) ** 2 * 2 * width, 1)

    def forward(self, images: Tensor) -> Tensor:
        h = self.main(images).permute(0, 2, 3, 1)  # flattened as [row][column][channel]: a view when channels_last
        logits: Tensor = self.dense(torch.flatten(h, 1))
        return logits.flatten()


def init_keras(module: nn.Module) -> None:
    """Keras' default: glorot uniform weights and zero biases.

    Keras counts the fans of a transposed convolution as kernel area times its two channel counts, as PyTorch
    does; glorot adds them, so which is in and which is out does not matter. Batch norm starts at weight 1 and
    bias 0 in both.
    """
    for layer in module.modules():
        if isinstance(layer, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)):
            nn.init.xavier_uniform_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


def build_keras_dcgan(
    *,
    image_size: int = 28,
    channels: int = 1,
    latent: int = 100,
    g_width: int = 64,
    d_width: int = 64,
    dropout: float = 0.3,
    classes: int = 0,
) -> tuple[nn.Module, nn.Module]:
    """Both networks of `dcgan-28`, initialised as Keras does; with `classes` both take an embedding of the label."""
    check_classes("dcgan-28", classes)
    if not isinstance(dropout, (int, float)) or not 0 <= dropout < 1 or math.isnan(dropout):
        raise ValueError(f"dcgan-28: dropout must be in [0, 1), got {dropout!r}")
    z, planes = (latent + EMBEDDING, channels + 1) if classes else (latent, channels)
    generator = KerasDCGANGenerator(image_size=image_size, channels=channels, latent=z, width=g_width)
    discriminator = KerasDCGANDiscriminator(image_size=image_size, channels=planes, width=d_width, dropout=dropout)
    init_keras(generator)
    init_keras(discriminator)
    if not classes:
        return generator, discriminator
    return (
        LabelledGenerator(generator, latent=latent, classes=classes),
        LabelledDiscriminator(discriminator, channels=channels, classes=classes),
    )
