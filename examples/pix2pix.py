"""Image to image, a U-Net and a PatchGAN: run `python examples/pix2pix.py`, or with --plain for PyTorch alone.

The networks are those of Isola et al., Image-to-Image Translation with Conditional Adversarial Networks (2017), at a
width that a laptop trains. The task is to paint garments from their outlines. The two lines with `fastgan.convert` are
all that changes.
"""

import argparse
import itertools
import math
import time

import torch
import torch.nn.functional as F
from torch import nn

import fastgan


class Down(nn.Module):
    def __init__(self, inputs, outputs, norm=True):
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 4, 2, 1, bias=not norm)
        self.norm = nn.BatchNorm2d(outputs) if norm else nn.Identity()

    def forward(self, x):
        return self.norm(self.conv(F.leaky_relu(x, 0.2)))


class Up(nn.Module):
    def __init__(self, inputs, outputs, dropout=0.0):
        super().__init__()
        self.conv = nn.ConvTranspose2d(inputs, outputs, 4, 2, 1, bias=False)
        self.norm, self.dropout = nn.BatchNorm2d(outputs), nn.Dropout(dropout)

    def forward(self, x):
        return self.dropout(self.norm(self.conv(F.relu(x))))


class UNet(nn.Module):
    """Halves the image down to one pixel and goes up again; each level sees the one that it mirrors."""

    def __init__(self, width=64, size=256, channels=3):
        super().__init__()
        levels = int(math.log2(size))
        widths = [min(width * 2**i, 8 * width) for i in range(levels)]
        self.first = nn.Conv2d(channels, width, 4, 2, 1)
        pairs = list(itertools.pairwise(widths))
        self.downs = nn.ModuleList(Down(a, b, norm=i < levels - 2) for i, (a, b) in enumerate(pairs))
        ups = [Up(b if i == levels - 2 else 2 * b, a, 0.5 if i > 3 else 0.0) for i, (a, b) in enumerate(pairs)]
        self.ups = nn.ModuleList(reversed(ups))
        self.last = nn.ConvTranspose2d(2 * width, channels, 4, 2, 1)

    def forward(self, x):
        seen = [self.first(x)]
        for down in self.downs:
            seen.append(down(seen[-1]))
        h = seen.pop()
        for up in self.ups:
            h = torch.cat([up(h), seen.pop()], 1)
        return torch.tanh(self.last(F.relu(h)))


class PatchGAN(nn.Module):
    def __init__(self, width=64, channels=6):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 4, 2, 1)
        self.conv2, self.norm2 = nn.Conv2d(width, 2 * width, 4, 2, 1, bias=False), nn.BatchNorm2d(2 * width)
        self.conv3, self.norm3 = nn.Conv2d(2 * width, 4 * width, 4, 2, 1, bias=False), nn.BatchNorm2d(4 * width)
        self.conv4, self.norm4 = nn.Conv2d(4 * width, 8 * width, 4, 1, 1, bias=False), nn.BatchNorm2d(8 * width)
        self.out = nn.Conv2d(8 * width, 1, 4, 1, 1)

    def forward(self, x, y):
        h = F.leaky_relu(self.conv1(torch.cat([x, y], 1)), 0.2)
        h = F.leaky_relu(self.norm2(self.conv2(h)), 0.2)
        h = F.leaky_relu(self.norm3(self.conv3(h)), 0.2)
        return self.out(F.leaky_relu(self.norm4(self.conv4(h)), 0.2))


def train_step(generator, discriminator, g_optimizer, d_optimizer, x, y):
    """One update of D and one of G, which also comes near to y in L1; (D's loss, G's loss)."""
    fake = generator(x)
    d_optimizer.zero_grad()
    d_loss = (F.softplus(-discriminator(x, y)).mean() + F.softplus(discriminator(x, fake.detach())).mean()) / 2
    d_loss.backward()
    d_optimizer.step()

    g_optimizer.zero_grad()
    discriminator.requires_grad_(False)
    g_loss = F.softplus(-discriminator(x, fake)).mean() + 100 * F.l1_loss(fake, y)
    g_loss.backward()
    discriminator.requires_grad_(True)
    g_optimizer.step()
    return d_loss.detach(), g_loss.detach()


def outlines(images):
    """Where neighbouring pixels differ, from -1 (nowhere) to 1."""
    across = F.pad(images[..., 1:] - images[..., :-1], (0, 1))
    down = F.pad(images[..., 1:, :] - images[..., :-1, :], (0, 0, 0, 1))
    return (across.abs() + down.abs()).clamp(0, 2) - 1


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--plain", action="store_true", help="PyTorch alone")
    args = parser.parse_args()
    torch.manual_seed(0)
    generator, discriminator = UNet(args.width, 32, 1), PatchGAN(args.width, 2)
    if not args.plain:
        fastgan.convert(generator)
        fastgan.convert(discriminator)
    adam = {"lr": 2e-4, "betas": (0.5, 0.999), "fused": True}
    g_optimizer = torch.optim.Adam(generator.parameters(), **adam)
    d_optimizer = torch.optim.Adam(discriminator.parameters(), **adam)
    images = fastgan.data.load("fashion-mnist", image_size=32, channels=1)
    batches = images.batches(16, generator=torch.Generator().manual_seed(0))
    for i in range(args.steps):
        begin = time.perf_counter()
        real, _ = next(batches)
        losses = train_step(generator, discriminator, g_optimizer, d_optimizer, outlines(real), real)
        seconds = time.perf_counter() - begin
        if i % 10 == 0 or i == args.steps - 1:
            print("step {}: D {:.4f}  G {:.4f}  ({:.0f} ms)".format(i + 1, *losses, 1e3 * seconds))


if __name__ == "__main__":
    main()
