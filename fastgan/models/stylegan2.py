"""`stylegan2-small`: a mapping network, synthesis by modulated convolutions, a residual discriminator.

Source: Karras, Laine, Aittala, Hellsten, Lehtinen, Aila 2020, Analyzing and Improving the Image Quality of StyleGAN
(arXiv:1912.04958); the depth of the mapping network (2) as Karras et al. 2020 (arXiv:2006.06676) take it for CIFAR-10.
Here with at most 64 channels, where the paper has 512.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgan import functional

from .conditional import ProjectionDiscriminator, check_classes
from .dcgan import MinibatchDeviation
from .sizes import check_positive, doublings

TAPS = (1.0, 3.0, 3.0, 1.0)  # of the filter that images are resampled with
MEAN_OF = 4096  # latents whose mean style truncation draws towards
SQRT2 = 2**0.5  # what leaky ReLU's result is multiplied by, to keep the magnitude


def _taps() -> Tensor:
    return torch.tensor(TAPS) / sum(TAPS)


class EqualLinear(nn.Module):
    """[N, inputs] to [N, outputs]; equalised learning rate.

    The weights are kept as N(0, 1) / rate and scaled by rate / sqrt(inputs) at every use, so that Adam moves each layer
    at `rate` times the learning rate, whatever its size.
    """

    per_sample = True

    def __init__(self, inputs: int, outputs: int, *, act: str = "identity", bias: float = 0.0, rate: float = 1.0):
        super().__init__()
        self.act, self.rate, self.scale = act, rate, rate / inputs**0.5
        self.weight = nn.Parameter(torch.randn(outputs, inputs) / rate)
        self.bias = nn.Parameter(torch.full((outputs,), bias / rate))

    def forward(self, x: Tensor) -> Tensor:
        y, gain = F.linear(x, self.weight * self.scale), 1.0 if self.act == "identity" else SQRT2
        return functional.bias_act(y, self.bias * self.rate, activation=self.act, gain=gain)


class EqualConv2d(nn.Module):
    """[N, C, H, W] to [N, out, H / down, W / down]: filtered and halved where `down` is 2; equalised learning rate."""

    per_sample = True
    taps: Tensor | None

    def __init__(
        self,
        channels: int,
        out: int,
        size: int,
        *,
        down: int = 1,
        act: str = "leaky_relu",
        bias: bool = True,
        gain: float = 1.0,
    ):
        super().__init__()
        self.act, self.down, self.padding = act, down, size // 2
        self.scale, self.gain = (channels * size * size) ** -0.5, gain * (1.0 if act == "identity" else SQRT2)
        self.weight = nn.Parameter(torch.randn(out, channels, size, size))
        self.bias = nn.Parameter(torch.zeros(out)) if bias else None
        self.register_buffer("taps", _taps() if down > 1 else None, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight * self.scale
        y = functional.conv2d_resample(x, weight.to(x.dtype), self.taps, down=self.down, padding=self.padding)
        return functional.bias_act(y, self.bias, activation=self.act, gain=self.gain)


class StyledConv2d(nn.Module):
    """[N, C, H, W] and style vectors [N, width] to [N, out, size, size]: a layer of the synthesis network.

    A modulated 3x3 convolution, upsampled by 2 and filtered where `up` is 2, noise of a learnt strength, bias, leaky
    ReLU. The noise is new at every call in training mode and the same for all images in eval mode.
    """

    per_sample = True
    noise: Tensor
    taps: Tensor | None

    def __init__(self, channels: int, out: int, *, width: int, size: int, up: int = 1):
        super().__init__()
        self.up = up
        self.affine = EqualLinear(width, channels, bias=1.0)
        self.weight = nn.Parameter(torch.randn(out, channels, 3, 3))
        self.strength = nn.Parameter(torch.zeros(()))
        self.bias = nn.Parameter(torch.zeros(out))
        self.register_buffer("noise", torch.randn(size, size))
        self.register_buffer("taps", _taps() if up > 1 else None, persistent=False)

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        noise = self.noise
        if self.training:
            noise = torch.randn(len(x), 1, *noise.shape, device=x.device, dtype=noise.dtype)
        y = functional.modulated_conv2d(
            *(x, self.weight, self.affine(w)),
            noise=noise * self.strength,
            up=self.up,
            padding=1,
            resample_filter=self.taps,
            flip_weight=self.up == 1,
        )
        return functional.bias_act(y, self.bias, activation="leaky_relu", gain=SQRT2)


class ToImage(nn.Module):
    """[N, C, H, W] and style vectors [N, width] to image channels: a modulated 1x1 convolution that keeps its scale."""

    per_sample = True

    def __init__(self, channels: int, out: int, *, width: int):
        super().__init__()
        self.scale = channels**-0.5
        self.affine = EqualLinear(width, channels, bias=1.0)
        self.weight = nn.Parameter(torch.randn(out, channels, 1, 1))
        self.bias = nn.Parameter(torch.zeros(out))

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        y = functional.modulated_conv2d(x, self.weight, self.affine(w) * self.scale, demodulate=False)
        return functional.bias_act(y, self.bias, activation="identity")


class Mapping(nn.Module):
    """z [N, latent] (and labels [N]) to style vectors [N, width], at a hundredth of the learning rate."""

    per_sample = True

    def __init__(self, *, latent: int, width: int, depth: int, classes: int):
        super().__init__()
        self.embedding = nn.Embedding(classes, latent) if classes else None
        inputs = [2 * latent if classes else latent, *[width] * (depth - 1)]
        self.main = nn.Sequential(*(EqualLinear(n, width, act="leaky_relu", rate=0.01) for n in inputs))

    def forward(self, z: Tensor, labels: Tensor | None = None) -> Tensor:
        parts = [z] if self.embedding is None or labels is None else [z, self.embedding(labels)]
        lengths = [(t.square().mean(1, keepdim=True) + 1e-8).rsqrt() for t in parts]
        styles: Tensor = self.main(torch.cat([t * length for t, length in zip(parts, lengths, strict=True)], 1))
        return styles


class StyleGAN2Generator(nn.Module):
    """z [N, latent] to images [N, channels, image_size, image_size] in about [-1, 1] (no tanh, as in the paper).

    A learned 4x4 constant, then two layers a resolution; the images of all resolutions are upsampled and summed (the
    paper's skip connections). `width` is the number of channels from 4x4 to 16x16; it halves with every doubling
    beyond. In training mode `mixing` of the images have another latent's styles from a layer on that is drawn for each
    of them (the authors draw one layer for the batch).
    """

    per_sample = True
    taps: Tensor
    mean_length: Tensor

    def __init__(
        self,
        *,
        image_size: int = 32,
        channels: int = 3,
        latent: int = 64,
        width: int = 64,
        depth: int = 2,
        mixing: float = 0.9,
        classes: int = 0,
    ):
        super().__init__()
        self.latent, self.image_size, self.channels, self.classes = latent, image_size, channels, classes
        self.mixing = mixing
        widths = _widths("StyleGAN2Generator", image_size, width)
        self.mapping = Mapping(latent=latent, width=width, depth=depth, classes=classes)
        self.constant = nn.Parameter(torch.randn(1, width, 4, 4))
        layers = [StyledConv2d(width, width, width=width, size=4)]
        for i, (before, after) in enumerate(pairwise(widths)):
            layers += [StyledConv2d(before, after, width=width, size=8 << i, up=2)]
            layers += [StyledConv2d(after, after, width=width, size=8 << i)]
        self.layers = nn.ModuleList(layers)
        self.to_image = nn.ModuleList(ToImage(n, channels, width=width) for n in widths)
        self.register_buffer("taps", _taps(), persistent=False)
        self.register_buffer("mean_length", torch.zeros(()))  # of `path_length_penalty`

    def forward(self, z: Tensor, labels: Tensor | None = None) -> Tensor:
        return self.synthesise(self.styles(z, labels))

    def styles(self, z: Tensor, labels: Tensor | None = None) -> Tensor:
        """[N, layers + 1, width]: the style vectors of every layer, and of the last `ToImage`."""
        count = len(self.layers) + 1
        w = self.mapping(z, labels)[:, None].expand(-1, count, -1)
        if not self.training or not self.mixing:
            return w
        other = self.mapping(torch.randn_like(z), labels)[:, None]
        start = torch.randint(1, count, (len(z), 1), device=z.device)
        mixed = torch.rand(len(z), 1, device=z.device) < self.mixing
        return torch.where((mixed & (torch.arange(count, device=z.device) >= start))[..., None], other, w)

    def synthesise(self, w: Tensor) -> Tensor:
        """Style vectors [N, layers + 1, width] to images."""
        x = self.layers[0](self.constant.expand(w.shape[0], -1, -1, -1), w[:, 0])
        image: Tensor = self.to_image[0](x, w[:, 1])
        for i, to_image in enumerate(self.to_image):
            if i == 0:
                continue
            for at in (2 * i - 1, 2 * i):
                x = self.layers[at](x, w[:, at])
            image = functional.upfirdn2d(image, self.taps, up=2, padding=(2, 1, 2, 1), gain=4.0)
            image = image + to_image(x, w[:, 2 * i + 1])
        return image

    def truncated(self, strength: float) -> nn.Module:
        """This generator with every style vector w at mean + strength (w - mean): below 1 more typical, less varied.

        The mean is that of the style vectors of 4,096 latents, of each class its own. strength is positive.
        Source: Karras, Laine, Aila 2019 (arXiv:1812.04948), appendix B.
        """
        if not 0 < strength < float("inf"):
            raise ValueError(f"truncated: strength must be positive and finite, got {strength}")
        return _Truncated(self, strength)

    def path_length_penalty(self, z: Tensor, labels: Tensor | None = None, *, decay: float = 0.01) -> Tensor:
        """mean over z of (l - a)^2, l the path lengths at z (`functional.path_lengths`); a scalar.

        a follows the mean of l by `decay` at every call and is a buffer. Source: section 3.2 of the paper.
        """
        w = self.styles(z, labels)
        lengths = functional.path_lengths(self.synthesise(w), w)
        with torch.no_grad():
            self.mean_length.lerp_(lengths.mean().to(self.mean_length.dtype), decay)
        return (lengths - self.mean_length.clone()).square().mean()


class _Truncated(nn.Module):
    """z (and labels) to images, from styles drawn towards their mean."""

    mean: Tensor

    def __init__(self, generator: StyleGAN2Generator, strength: float):
        super().__init__()
        self.generator, self.strength = generator, strength
        z = torch.randn(MEAN_OF, generator.latent, generator=torch.Generator().manual_seed(0))
        z = z.to(generator.constant)
        with torch.no_grad():
            every = range(generator.classes) if generator.classes else [None]
            labels = [None if k is None else torch.full((MEAN_OF,), k, device=z.device) for k in every]
            self.register_buffer("mean", torch.stack([generator.mapping(z, some).mean(0) for some in labels]))

    def forward(self, z: Tensor, labels: Tensor | None = None) -> Tensor:
        w = self.generator.styles(z, labels)
        mean = (self.mean if labels is None else self.mean[labels])[:, None]
        images: Tensor = self.generator.synthesise(mean + self.strength * (w - mean))
        return images


class ResidualDown(nn.Module):
    """[N, C, H, W] to [N, out, H / 2, W / 2]: two 3x3 convolutions, the second halving, and a filtered 1x1 shortcut."""

    per_sample = True

    def __init__(self, channels: int, out: int):
        super().__init__()
        self.first = EqualConv2d(channels, channels, 3)
        self.second = EqualConv2d(channels, out, 3, down=2, gain=0.5**0.5)
        self.shortcut = EqualConv2d(channels, out, 1, down=2, act="identity", bias=False, gain=0.5**0.5)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.second(self.first(x)) + self.shortcut(x)
        return y


class StyleGAN2Discriminator(nn.Module):
    """Images to logits [N]: a 1x1 convolution, `ResidualDown` to 4x4, the batch's deviation, 3x3, two dense layers."""

    per_sample = True  # the layers here; a `MinibatchDeviation` among them is looked at by itself

    def __init__(self, *, image_size: int = 32, channels: int = 3, width: int = 64, deviation: bool = True):
        super().__init__()
        self.image_size, self.channels = image_size, channels
        widths = _widths("StyleGAN2Discriminator", image_size, width)[::-1]
        self.main = nn.Sequential(
            EqualConv2d(channels, widths[0], 1),
            *(ResidualDown(before, after) for before, after in pairwise(widths)),
            *([MinibatchDeviation()] if deviation else []),
            EqualConv2d(width + deviation, width, 3),
            nn.Flatten(),
            EqualLinear(width * 16, width, act="leaky_relu"),
            EqualLinear(width, 1),
        )

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.main(images)
        return logits.flatten()


def _widths(name: str, image_size: int, width: int) -> list[int]:
    """Channels at 4x4, 8x8, ... image_size."""
    check_positive(name, width=width)
    return [max(min(width, width * 16 // (4 << i)), 1) for i in range(doublings(name, image_size) + 1)]


def build_stylegan2(
    *,
    image_size: int = 32,
    channels: int = 3,
    latent: int = 64,
    g_width: int = 64,
    d_width: int = 64,
    depth: int = 2,
    mixing: float = 0.9,
    d_deviation: bool = True,
    classes: int = 0,
) -> tuple[nn.Module, nn.Module]:
    """Both networks of `stylegan2-small`. depth: of the mapping network. mixing: how many images mix two styles.

    With `classes` the mapping network takes an embedding beside z, and the discriminator projects.
    """
    check_classes("stylegan2-small", classes)
    shape = {"image_size": image_size, "channels": channels}
    generator = StyleGAN2Generator(latent=latent, width=g_width, depth=depth, mixing=mixing, classes=classes, **shape)
    discriminator = StyleGAN2Discriminator(width=d_width, deviation=d_deviation, **shape)
    if not classes:
        return generator, discriminator
    parts = discriminator.main[:-1], discriminator.main[-1]
    return generator, ProjectionDiscriminator(*parts, classes=classes, width=d_width, like=discriminator)
