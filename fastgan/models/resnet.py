"""`sngan-32`: residual networks with spectral normalisation in the discriminator.

Source: Miyato, Kataoka, Koyama, Yoshida 2018, Spectral Normalization for GANs (arXiv:1802.05957), table 4 (CIFAR-10).
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from .conditional import ClassAffine, ProjectionDiscriminator, check_classes
from .sizes import doublings


class UpBlock(nn.Module):
    """[N, C, H, W] -> [N, out, 2H, 2W]: norm, ReLU, upsample, 3x3, norm, ReLU, 3x3, plus an upsampled 1x1 shortcut."""

    per_sample = True  # samples meet only inside batch norm

    def __init__(self, channels: int, out: int):
        super().__init__()
        self.first = nn.Sequential(
            nn.BatchNorm2d(channels), nn.ReLU(), nn.Upsample(scale_factor=2), nn.Conv2d(channels, out, 3, padding=1)
        )
        self.second = nn.Sequential(nn.BatchNorm2d(out), nn.ReLU(), nn.Conv2d(out, out, 3, padding=1))
        self.shortcut = nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(channels, out, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x)) + self.shortcut(x)


class ConditionalUpBlock(nn.Module):
    """`UpBlock` whose norms scale and shift by class: [N, C, H, W], labels [N] -> [N, out, 2H, 2W]."""

    per_sample = True

    def __init__(self, channels: int, out: int, classes: int):
        super().__init__()
        plain = UpBlock(channels, out)
        self.norms = nn.ModuleList(nn.BatchNorm2d(width, affine=False) for width in (channels, out))
        self.affines = nn.ModuleList(ClassAffine(classes, width) for width in (channels, out))
        self.first, self.second, self.shortcut = plain.first[1:], plain.second[1:], plain.shortcut

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        h = self.first(self.affines[0](self.norms[0](x), labels))
        return self.second(self.affines[1](self.norms[1](h), labels)) + self.shortcut(x)


class SNBlock(nn.Module):
    """[N, C, H, W] -> [N, out, H/2, W/2] or [N, out, H, W]: two spectrally normalised 3x3 after ReLUs, and a shortcut.

    The image's own block (`first`) has no ReLU before its first convolution.
    """

    per_sample = True

    def __init__(self, channels: int, out: int, *, down: bool, first: bool = False):
        super().__init__()
        pool = [nn.AvgPool2d(2)] if down else []
        self.residual = nn.Sequential(
            *([] if first else [nn.ReLU()]),
            spectral_norm(nn.Conv2d(channels, out, 3, padding=1)),
            nn.ReLU(),
            spectral_norm(nn.Conv2d(out, out, 3, padding=1)),
            *pool,
        )
        learned = down or channels != out
        self.shortcut = nn.Sequential(*([spectral_norm(nn.Conv2d(channels, out, 1))] if learned else []), *pool)

    def forward(self, x: Tensor) -> Tensor:
        return self.residual(x) + self.shortcut(x)


class SNGANGenerator(nn.Module):
    """z [N, latent] to images [N, channels, image_size, image_size] in [-1, 1].

    A dense layer to 4x4 maps of `width` channels, one `UpBlock` a doubling, batch norm, ReLU, 3x3, tanh.
    """

    per_sample = True

    def __init__(self, *, image_size: int = 32, channels: int = 3, latent: int = 128, width: int = 256):
        super().__init__()
        self.latent, self.image_size, self.channels = latent, image_size, channels
        self.width = width
        self.dense = nn.Linear(latent, width * 16)
        blocks = [UpBlock(width, width) for _ in range(doublings("SNGANGenerator", image_size))]
        self.main = nn.Sequential(
            *blocks, nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, channels, 3, padding=1), nn.Tanh()
        )

    def forward(self, z: Tensor) -> Tensor:
        images: Tensor = self.main(self.dense(z).view(-1, self.width, 4, 4))
        return images


class ConditionalSNGANGenerator(nn.Module):
    """z [N, latent], labels [N] to images: `plain`'s layers with `ConditionalUpBlock`s, and its own last norm."""

    per_sample = True

    def __init__(self, plain: SNGANGenerator, *, classes: int):
        super().__init__()
        self.latent, self.image_size, self.channels = plain.latent, plain.image_size, plain.channels
        self.width, self.classes = plain.width, classes
        self.dense = plain.dense
        times = doublings("SNGANGenerator", plain.image_size)
        self.blocks = nn.ModuleList(ConditionalUpBlock(plain.width, plain.width, classes) for _ in range(times))
        self.last = plain.main[times:]

    def forward(self, z: Tensor, labels: Tensor) -> Tensor:
        x = self.dense(z).view(-1, self.width, 4, 4)
        for block in self.blocks:
            x = block(x, labels)
        images: Tensor = self.last(x)
        return images


class SNGANDiscriminator(nn.Module):
    """Images to logits [N]: two halving blocks, two more, ReLU, sum over pixels, dense; all spectrally normalised."""

    per_sample = True

    def __init__(self, *, image_size: int = 32, channels: int = 3, width: int = 128):
        super().__init__()
        doublings("SNGANDiscriminator", image_size)
        self.image_size, self.channels = image_size, channels
        self.main = nn.Sequential(
            SNBlock(channels, width, down=True, first=True),
            SNBlock(width, width, down=True),
            SNBlock(width, width, down=False),
            SNBlock(width, width, down=False),
            nn.ReLU(),
        )
        self.dense = spectral_norm(nn.Linear(width, 1))

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.dense(self.main(images).sum((2, 3)))
        return logits.flatten()


def build_sngan(
    *,
    image_size: int = 32,
    channels: int = 3,
    latent: int = 128,
    g_width: int = 256,
    d_width: int = 128,
    classes: int = 0,
) -> tuple[nn.Module, nn.Module]:
    """Both networks of `sngan-32`, Xavier-initialised (gain sqrt(2) inside blocks) as the paper's code does.

    With `classes` the generator's norms scale and shift by class, and the discriminator projects.
    """
    check_classes("sngan-32", classes)
    plain = SNGANGenerator(image_size=image_size, channels=channels, latent=latent, width=g_width)
    generator: nn.Module = ConditionalSNGANGenerator(plain, classes=classes) if classes else plain
    judge = SNGANDiscriminator(image_size=image_size, channels=channels, width=d_width)
    discriminator: nn.Module = judge
    if classes:
        parts = judge.main, judge.dense
        discriminator = ProjectionDiscriminator(*parts, classes=classes, width=d_width, like=judge, normalised=True)
    for network in (generator, discriminator):
        for name, parameter in network.named_parameters():  # a normalised weight is held as "...weight.original"
            if parameter.dim() > 1 and not any(word in name for word in ("affines", "embedding")):
                inside = parameter.dim() == 4 and "shortcut" not in name
                nn.init.xavier_uniform_(parameter, 2**0.5 if inside else 1.0)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)
    return generator, discriminator
