"""A residual SNGAN with hand-written blocks: run `python examples/residual_sngan.py`, --plain for PyTorch alone.

The networks are those of Miyato et al., Spectral Normalization for Generative Adversarial Networks (2018), table 4, at
a width that a laptop trains. Nothing in them knows fastgan. The two lines with `fastgan.convert` are all that changes.
"""

import argparse
import time

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

import fastgan

LATENT = 128


class UpBlock(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm1, self.norm2 = nn.BatchNorm2d(width), nn.BatchNorm2d(width)
        self.conv1, self.conv2 = (nn.Conv2d(width, width, 3, padding=1) for _ in range(2))
        self.skip = nn.Conv2d(width, width, 1)

    def forward(self, x):
        h = self.conv1(F.interpolate(F.relu(self.norm1(x)), scale_factor=2))
        h = self.conv2(F.relu(self.norm2(h)))
        return h + self.skip(F.interpolate(x, scale_factor=2))


class Generator(nn.Module):
    def __init__(self, width=64, channels=3):
        super().__init__()
        self.width = width
        self.dense = nn.Linear(LATENT, 16 * width)
        self.blocks = nn.Sequential(*(UpBlock(width) for _ in range(3)))
        self.norm, self.out = nn.BatchNorm2d(width), nn.Conv2d(width, channels, 3, padding=1)

    def forward(self, z):
        h = self.dense(z).view(-1, self.width, 4, 4)
        return torch.tanh(self.out(F.relu(self.norm(self.blocks(h)))))


class DownBlock(nn.Module):
    def __init__(self, inputs, width, first=False, down=False):
        super().__init__()
        self.first, self.down = first, down
        self.conv1 = spectral_norm(nn.Conv2d(inputs, width, 3, padding=1))
        self.conv2 = spectral_norm(nn.Conv2d(width, width, 3, padding=1))
        self.skip = spectral_norm(nn.Conv2d(inputs, width, 1)) if down else nn.Identity()

    def forward(self, x):
        h = x if self.first else F.relu(x)
        h = self.conv2(F.relu(self.conv1(h)))
        if not self.down:
            return h + self.skip(x)
        return F.avg_pool2d(h, 2) + self.skip(F.avg_pool2d(x, 2))


class Discriminator(nn.Module):
    def __init__(self, width=64, channels=3):
        super().__init__()
        self.block1 = DownBlock(channels, width, first=True, down=True)
        self.block2 = DownBlock(width, width, down=True)
        self.block3, self.block4 = DownBlock(width, width), DownBlock(width, width)
        self.head = spectral_norm(nn.Linear(width, 1))

    def forward(self, x):
        h = self.block4(self.block3(self.block2(self.block1(x))))
        return self.head(F.relu(h).sum(dim=(2, 3)))


def train_step(generator, discriminator, g_optimizer, d_optimizer, real, z):
    """One update of D and one of G with the hinge loss; (D's loss, G's loss)."""
    fake = generator(z)
    d_optimizer.zero_grad()
    d_loss = F.relu(1 - discriminator(real)).mean() + F.relu(1 + discriminator(fake.detach())).mean()
    d_loss.backward()
    d_optimizer.step()

    g_optimizer.zero_grad()
    discriminator.requires_grad_(False)
    g_loss = -discriminator(fake).mean()
    g_loss.backward()
    discriminator.requires_grad_(True)
    g_optimizer.step()
    return d_loss.detach(), g_loss.detach()


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--plain", action="store_true", help="PyTorch alone")
    args = parser.parse_args()
    torch.manual_seed(0)
    generator, discriminator = Generator(args.width, 1), Discriminator(args.width, 1)
    if not args.plain:
        fastgan.convert(generator)
        fastgan.convert(discriminator)
    adam = {"lr": 2e-4, "betas": (0.0, 0.9), "fused": True}
    g_optimizer = torch.optim.Adam(generator.parameters(), **adam)
    d_optimizer = torch.optim.Adam(discriminator.parameters(), **adam)
    images = fastgan.data.load("fashion-mnist", image_size=32, channels=1)
    batches = images.batches(16, generator=torch.Generator().manual_seed(0))
    for i in range(args.steps):
        begin = time.perf_counter()
        real, _ = next(batches)
        losses = train_step(generator, discriminator, g_optimizer, d_optimizer, real, torch.randn(16, LATENT))
        seconds = time.perf_counter() - begin
        if i % 10 == 0 or i == args.steps - 1:
            print("step {}: D {:.4f}  G {:.4f}  ({:.0f} ms)".format(i + 1, *losses, 1e3 * seconds))


if __name__ == "__main__":
    main()
