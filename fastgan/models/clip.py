"""`clip-32`: short clips, a frame at a time, in two-dimensional convolutions only.

Sources: the generator of TGAN (Saito et al. 2017, arXiv:1611.06624): a temporal generator makes a latent a frame, an
image generator makes each frame of it and of the clip's own latent. The discriminator looks at frames with a
convolutional network whose layers exchange an eighth of their channels with the frame before and an eighth with the
frame after: the temporal shift of Lin et al. 2019 (arXiv:1811.08383), as Chang et al. 2019 (arXiv:1907.01131) judge
videos. Departures: the sizes; TGAN's critic has three-dimensional convolutions. Parameter counts at the defaults:
731,521 and 166,625.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

SHIFTED = 8  # one channel of so many goes to each side
WEIGHT_STD = 0.02  # of DCGAN, for the generator's convolutions, each with a norm behind it but the last


class TemporalShift(nn.Module):
    """[N T, C, H, W] -> the same shape: an eighth of the channels from the next frame, an eighth from the last one.

    Zeros come in at a clip's ends. Frames of one clip meet, clips do not.
    """

    per_sample = True

    def __init__(self, frames: int):
        super().__init__()
        self.frames = frames

    def forward(self, x: Tensor) -> Tensor:
        x = x.unflatten(0, (-1, self.frames))
        part = max(1, x.shape[2] // SHIFTED)
        gap = torch.zeros_like(x[:, :1, :part])
        after = torch.cat([x[:, 1:, :part], gap], 1)
        before = torch.cat([gap, x[:, :-1, part : 2 * part]], 1)
        return torch.cat([after, before, x[:, :, 2 * part :]], 2).flatten(0, 1)

    def extra_repr(self) -> str:
        return f"frames={self.frames}"


class ClipGenerator(nn.Module):
    """z [N, latent] to clips [N, frames, channels, image_size, image_size] in [-1, 1]."""

    per_sample = True  # clips meet only inside batch norm

    def __init__(self, *, image_size: int, channels: int, frames: int, latent: int, width: int):
        super().__init__()
        self.latent, self.image_size, self.channels, self.frames = latent, image_size, channels, frames
        doublings = image_size.bit_length() - 3
        self.width = width << (doublings - 1)
        layers: list[nn.Module] = [nn.ConvTranspose1d(latent, 2 * latent, 1)]
        for left in reversed(range(frames.bit_length() - 1)):  # 1, 2, 4 ... frames
            layers += [nn.BatchNorm1d(2 * latent), nn.ReLU()]
            layers.append(nn.ConvTranspose1d(2 * latent, 2 * latent if left else latent, 4, 2, 1))
        self.temporal = nn.Sequential(*layers, nn.Tanh())
        self.dense = nn.ModuleList(nn.Linear(latent, self.width * 16, bias=False) for _ in range(2))
        blocks: list[nn.Module] = [nn.BatchNorm2d(2 * self.width), nn.ReLU()]
        before = 2 * self.width
        for level in reversed(range(doublings - 1)):
            after = width << level
            blocks += [nn.ConvTranspose2d(before, after, 4, 2, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
            before = after
        self.main = nn.Sequential(*blocks, nn.ConvTranspose2d(before, channels, 4, 2, 1), nn.Tanh())

    def forward(self, z: Tensor) -> Tensor:
        moments = self.temporal(z[:, :, None]).transpose(1, 2)  # [N, T, latent]
        own = self.dense[0](z)[:, None].expand(-1, self.frames, -1)
        both = torch.cat([part.reshape(-1, self.width, 4, 4) for part in (own, self.dense[1](moments))], 1)
        clips: Tensor = self.main(both).unflatten(0, (-1, self.frames))
        return clips


class ClipDiscriminator(nn.Module):
    """Clips [N, T, C, H, W] to logits [N]: the mean of the frames' logits, each made with its neighbours' help."""

    per_sample = True

    def __init__(self, *, image_size: int, channels: int, frames: int, width: int):
        super().__init__()
        self.image_size, self.channels, self.frames = image_size, channels, frames
        layers: list[nn.Module] = [nn.Conv2d(channels, width, 4, 2, 1), nn.LeakyReLU(0.2)]
        for level in range(1, image_size.bit_length() - 3):
            layers += [TemporalShift(frames), nn.Conv2d(width << (level - 1), width << level, 4, 2, 1)]
            layers.append(nn.LeakyReLU(0.2))
        last = width << (image_size.bit_length() - 4)
        self.main = nn.Sequential(*layers, TemporalShift(frames), nn.Conv2d(last, 1, 4))

    def forward(self, clips: Tensor) -> Tensor:
        logits: Tensor = self.main(clips.flatten(0, 1)).view(-1, self.frames)
        return logits.mean(1)


def build_clip(
    *, image_size: int = 32, channels: int = 1, frames: int = 8, latent: int = 64, g_width: int = 32, d_width: int = 32
) -> tuple[nn.Module, nn.Module]:
    """Both networks of `clip-32`: the generator's convolutions with deviations of 0.02 as DCGAN's, the discriminator's
    after He et al. 2015 (arXiv:1502.01852), since no norm makes up for small ones there: with 0.02 the outputs of its
    four layers differed by 0.04, 0.014, 0.007 and 0.006 from one picture of noise to another.

    Raises ValueError for frames that are no power of two from 2, and an image_size that is none from 16.
    """
    for name, value, least in (("frames", frames, 2), ("image_size", image_size, 16)):
        if not isinstance(value, int) or value < least or value & (value - 1):
            raise ValueError(f"clip: {name} must be a power of two of at least {least}, got {value!r}")
    shape = dict(image_size=image_size, channels=channels, frames=frames)
    generator = ClipGenerator(latent=latent, width=g_width, **shape)
    discriminator = ClipDiscriminator(width=d_width, **shape)
    for module in generator.modules():
        if isinstance(module, nn.ConvTranspose2d):
            nn.init.normal_(module.weight, 0.0, WEIGHT_STD)
    for module in discriminator.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, 0.2)
    return generator, discriminator
