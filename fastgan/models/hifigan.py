"""`hifigan-small`: waveforms from mel spectrograms; discriminators by period and by scale.

Source: Kong, Kim, Bae 2020 (arXiv:2010.05646), section 2 and appendix A: transposed convolutions with receptive field
fusion, weight norm, 5 periods and 3 scales. Departures: `g_width` 64 where V1 has 512, residual blocks of 3 and 7 taps
(theirs: 3, 7, 11), hops of 64 samples, since the sounds have 8 kHz; discriminators whose widest layer is a
thirty-second of theirs, and a layer less; weight norm also where theirs has spectral norm. Parameter counts at the
defaults: 121,762 and 97,332.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from .sizes import check_positive

KERNELS, DILATIONS = (3, 7), (1, 3, 5)  # of the residual blocks
PERIODS, SCALES = (2, 3, 5, 7, 11), 3
SLOPE = 0.1
FACTOR = 4  # of a transposed convolution, the last one's may be 2
WEIGHT_STD = 0.01  # of the generator's convolutions behind the first one
Judged = tuple[list[Tensor], list[list[Tensor]]]  # logits [N, *] and features of every discriminator


class DilatedBlock(nn.Module):
    """[N, C, L] -> the same shape: x + conv(act(dilated(act(x)))) for each dilation, one after the other."""

    per_sample = True

    def __init__(self, width: int, kernel: int, dilations: Sequence[int] = DILATIONS):
        super().__init__()
        same = lambda d: small(nn.Conv1d(width, width, kernel, dilation=d, padding=d * (kernel - 1) // 2))
        act = lambda: nn.LeakyReLU(SLOPE)
        self.branches = nn.ModuleList(nn.Sequential(act(), same(d), act(), same(1)) for d in dilations)

    def forward(self, x: Tensor) -> Tensor:
        for branch in self.branches:
            x = x + branch(x)
        return x


def small(convolution: nn.Module) -> nn.Module:
    """Weight-normed, with weights that begin small."""
    nn.init.normal_(convolution.weight, 0.0, WEIGHT_STD)  # type: ignore[arg-type]
    return weight_norm(convolution)


class Fusion(nn.Module):
    """[N, C, L] -> the same shape: the mean of residual blocks of several kernels, multi-receptive field fusion."""

    per_sample = True

    def __init__(self, width: int, kernels: Sequence[int] = KERNELS):
        super().__init__()
        self.blocks = nn.ModuleList(DilatedBlock(width, kernel) for kernel in kernels)

    def forward(self, x: Tensor) -> Tensor:
        total = self.blocks[0](x)
        for block in self.blocks[1:]:
            total = total + block(x)
        mean: Tensor = total / len(self.blocks)
        return mean


class MelGenerator(nn.Module):
    """Logarithms of mel spectrograms [N, bands, frames] to sound [N, 1, hop frames] in [-1, 1]."""

    per_sample = True

    def __init__(self, *, bands: int, hop: int, width: int):
        super().__init__()
        factors = factors_of(hop)
        check_positive("hifigan", bands=bands, g_width=width)
        if width >> len(factors) < 1:
            raise ValueError(f"hifigan: g_width must be at least {1 << len(factors)} for hop {hop}, got {width}")
        self.bands, self.hop = bands, hop
        layers: list[nn.Module] = [weight_norm(nn.Conv1d(bands, width, 7, padding=3))]
        for factor in factors:
            up = nn.ConvTranspose1d(width, width // 2, 2 * factor, factor, factor // 2)
            layers += [nn.LeakyReLU(SLOPE), small(up), Fusion(width // 2)]
            width //= 2
        self.main = nn.Sequential(*layers, nn.LeakyReLU(), small(nn.Conv1d(width, 1, 7, padding=3)), nn.Tanh())

    def forward(self, mel: Tensor) -> Tensor:
        sound: Tensor = self.main(mel)
        return sound


class Judge(nn.Module):
    """A stack of convolutions: x to (logits [N, *], the features behind every layer)."""

    per_sample = True

    def __init__(self, layers: Sequence[nn.Module], last: nn.Module):
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(weight_norm(layer), nn.LeakyReLU(SLOPE)) for layer in layers)
        self.last = nn.Sequential(weight_norm(last))

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        features = []
        for layer in self.layers:
            x = layer(x)
            features.append(x)
        logits = self.last(x)
        return logits.flatten(1), [*features, logits]


def by_period(width: int) -> Judge:
    """Of sound as an image with a row a period: no kernel is wider than one, so that only samples a period apart meet.

    Widths width, 4 width, 8 width, 8 width; strides of 3 over the rows but in the last one.
    """
    widths = 1, width, 4 * width, 8 * width, 8 * width
    pairs = zip(widths, widths[1:], (3, 3, 3, 1), strict=False)
    layers = [nn.Conv2d(i, o, (5, 1), (stride, 1), (2, 0)) for i, o, stride in pairs]
    return Judge(layers, nn.Conv2d(8 * width, 1, (3, 1), padding=(1, 0)))


def by_scale(width: int) -> Judge:
    """Of sound at one resolution: wide kernels in groups, width to 4 width channels, 8 times coarser at the end."""
    layers = [
        nn.Conv1d(1, width, 15, padding=7),
        nn.Conv1d(width, 2 * width, 41, 2, 20, groups=width // 4),
        nn.Conv1d(2 * width, 4 * width, 41, 4, 20, groups=width // 4),
        nn.Conv1d(4 * width, 4 * width, 5, padding=2),
    ]
    return Judge(layers, nn.Conv1d(4 * width, 1, 3, padding=1))


class SoundDiscriminators(nn.Module):
    """Sound [N, 1, L] to the logits and features of 5 judges by period and 3 by scale, at L, L/2 and L/4."""

    per_sample = True

    def __init__(self, *, width: int):
        super().__init__()
        check_positive("hifigan", d_width=width)
        if width % 4:
            raise ValueError(f"hifigan: d_width must be a multiple of 4, got {width}")
        self.periods = nn.ModuleList(by_period(width // 2) for _ in PERIODS)
        self.scales = nn.ModuleList(by_scale(width) for _ in range(SCALES))

    def forward(self, sound: Tensor) -> Judged:
        judged = []
        for period, judge in zip(PERIODS, self.periods, strict=True):
            whole = F.pad(sound, (0, -sound.shape[-1] % period))
            judged.append(judge(whole.unflatten(-1, (-1, period))))
        for judge in self.scales:
            judged.append(judge(sound))
            sound = F.avg_pool1d(sound, 4, 2, 2)
        logits, features = zip(*judged, strict=True)
        return list(logits), list(features)


def factors_of(hop: int) -> list[int]:
    """What the transposed convolutions multiply lengths by. ValueError unless hop is a power of two of at least 4."""
    if not isinstance(hop, int) or hop < FACTOR or hop & (hop - 1):
        raise ValueError(f"hifigan: hop must be a power of two of at least {FACTOR}, got {hop!r}")
    exponent = hop.bit_length() - 1
    return [FACTOR] * (exponent // 2) + [2] * (exponent % 2)


def build_hifigan(
    *, bands: int = 40, hop: int = 64, g_width: int = 64, d_width: int = 8
) -> tuple[nn.Module, nn.Module]:
    """Both networks of `hifigan-small`: spectrograms of `bands`, one each `hop` samples, to sound; sound to logits.

    Raises ValueError for a hop that is no power of two from 4, a g_width that its halvings do not leave a channel of,
    and a d_width that is no multiple of 4.
    """
    generator: Any = MelGenerator(bands=bands, hop=hop, width=g_width)
    return generator, SoundDiscriminators(width=d_width)
