"""`wavegan`: raw sound by one-dimensional convolutions and upsampling by 4.

Source: Donahue, McAuley, Puckette 2019 (arXiv:1802.04208), tables 3 and 4: kernels of 25, no batch norm, phase shuffle
in the discriminator. Departures: the generator's convolutions see each of their inputs repeated 4 times, the
nearest-neighbour upsampling that the paper tries too, where its default begins at zeros between them: those leave lines
at every multiple of a quarter of the rate (Odena, Dumoulin, Olah 2016, doi:10.23915/distill.00003). `width` (the
paper's d) is 16 and `length` 4,096 where the paper has 64 and 16,384, so that two cores train it; latents are normal,
the paper's uniform; the shift of the phase shuffle is drawn for each sample. Parameter counts at the defaults: 476,161
and 271,489.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization

KERNEL, STRIDE, SHORTEST = 25, 4, 16
PADDING = 11  # of the discriminator: of the 25 - 4 = 21 places that the longer side has more: 11 before, 10 after


class PhaseShuffle(nn.Module):
    """[N, C, L] with each sample moved by -n to n places at random, the gap filled by reflection; nothing in eval mode.

    The discriminator cannot learn the phase of the artefacts of transposed convolutions (section 3.3 of the source).
    """

    def __init__(self, n: int):
        super().__init__()
        self.n = n

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or not self.n:
            return x
        n, length = self.n, x.shape[2]
        # Slices in place of F.pad: on a GPU the backward of reflection padding adds in no fixed order. gather takes
        # each place of the longer map at most once, so its backward has a fixed order.
        longer = torch.cat([x[:, :, 1 : n + 1].flip(2), x, x[:, :, -n - 1 : -1].flip(2)], 2)
        start = torch.randint(0, 2 * n + 1, (len(x), 1, 1), device=x.device)
        return longer.gather(2, (torch.arange(length, device=x.device) + start).expand(-1, x.shape[1], -1))

    def extra_repr(self) -> str:
        return f"n={self.n}"


class Nearest(nn.Module):
    """Weights [I, O, K] of a convolution behind nearest-neighbour upsampling to [I, O, K + 3] of a transposed one.

    Each neighbour is repeated 4 times, so that a tap of the transposed convolution is the sum of 4 that follow each
    other. The numbers are those of `nn.Upsample(scale_factor=4)` and an `nn.Conv1d` with its taps reversed, at a
    quarter of the products.
    """

    def forward(self, weight: Tensor) -> Tensor:
        return sum(F.pad(weight, (k, STRIDE - 1 - k)) for k in range(STRIDE))  # type: ignore[return-value]


class WaveGenerator(nn.Module):
    """z [N, latent] to sound [N, 1, length] in [-1, 1]: a dense layer, then a convolution a factor of 4."""

    per_sample = True

    def __init__(self, *, length: int, latent: int, width: int):
        super().__init__()
        levels = levels_of(length)
        self.latent, self.length, self.start = latent, length, length // STRIDE**levels
        self.widest = width << (levels - 1)
        self.dense = nn.Linear(latent, self.widest * self.start)
        layers: list[nn.Module] = [nn.ReLU()]
        for level in reversed(range(levels)):
            out = width << (level - 1) if level else 1
            up = nn.ConvTranspose1d(width << level, out, KERNEL, STRIDE, KERNEL // 2)
            register_parametrization(up, "weight", Nearest(), unsafe=True)  # of another shape
            layers.append(up)
            layers.append(nn.ReLU() if level else nn.Tanh())
        self.main = nn.Sequential(*layers)

    def forward(self, z: Tensor) -> Tensor:
        sound: Tensor = self.main(self.dense(z).view(-1, self.widest, self.start))
        return sound


class WaveDiscriminator(nn.Module):
    """Sound [N, 1, length] to logits [N]: LeakyReLU(0.2), and phase shuffle after every convolution but the last."""

    per_sample = True  # its PhaseShuffle does not say so: D(real) and D(fake) draw as two passes do

    def __init__(self, *, length: int, width: int, shuffle: int):
        super().__init__()
        levels = levels_of(length)
        self.length = length
        layers: list[nn.Module] = []
        for level in range(levels):
            before = width << (level - 1) if level else 1
            layers += [nn.Conv1d(before, width << level, KERNEL, STRIDE, PADDING), nn.LeakyReLU(0.2)]
            layers += [PhaseShuffle(shuffle)] if level < levels - 1 else []
        last = (width << (levels - 1)) * (length // STRIDE**levels)
        self.main = nn.Sequential(*layers, nn.Flatten(), nn.Linear(last, 1))

    def forward(self, sound: Tensor) -> Tensor:
        logits: Tensor = self.main(sound)
        return logits.flatten()


def levels_of(length: int) -> int:
    """How often `length` is divided by 4 until 16 to 63 are left, that is the convolutions of either network.

    Raises ValueError for a length below 64, or one that is not so divisible.
    """
    levels, left = 0, length if isinstance(length, int) else 0
    while left >= SHORTEST * STRIDE and left % STRIDE == 0:
        levels, left = levels + 1, left // STRIDE
    if not levels or left >= SHORTEST * STRIDE:
        raise ValueError(f"wavegan: length must be 16 to 63 times a power of 4, such as 4096 or 16384, got {length!r}")
    return levels


def build_wavegan(
    *, length: int = 4096, latent: int = 100, g_width: int = 16, d_width: int = 16, shuffle: int = 2
) -> tuple[nn.Module, nn.Module]:
    """Both networks of `wavegan`, Xavier-initialised with biases of 0, as the paper's code is.

    Raises ValueError for a length that is not 16 to 63 times a power of 4, or sizes below 1 (shuffle: 0, and small
    against the shortest map).
    """
    for name, value in (("latent", latent), ("g_width", g_width), ("d_width", d_width)):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"wavegan: {name} must be a whole number of at least 1, got {value!r}")
    if not isinstance(shuffle, int) or not 0 <= shuffle < SHORTEST:
        raise ValueError(f"wavegan: shuffle must be 0 to {SHORTEST - 1}, got {shuffle!r}")
    generator = WaveGenerator(length=length, latent=latent, width=g_width)
    discriminator = WaveDiscriminator(length=length, width=d_width, shuffle=shuffle)
    for network in (generator, discriminator):
        for name, parameter in network.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            else:
                nn.init.xavier_uniform_(parameter)
    return generator, discriminator
