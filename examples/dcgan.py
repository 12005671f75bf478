"""DCGAN, the script of PyTorch's tutorial: run `python examples/dcgan.py`, or with --plain for PyTorch alone.

The loop is the tutorial's: D on real and on generated images, one Adam each, binary cross entropy of a D that ends in a
sigmoid. What changes in it: the two lines with `fastgan.convert`. What it prints stays the same, to rounding.
"""

import argparse
import time

import torch
from torch import nn

import fastgan

LATENT, BATCH = 100, 32


class Generator(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.main = nn.Sequential(
            nn.ConvTranspose2d(LATENT, 4 * width, 4, 1, 0, bias=False),
            nn.BatchNorm2d(4 * width),
            nn.ReLU(True),
            nn.ConvTranspose2d(4 * width, 2 * width, 4, 2, 1, bias=False),
            nn.BatchNorm2d(2 * width),
            nn.ReLU(True),
            nn.ConvTranspose2d(2 * width, width, 4, 2, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(True),
            nn.ConvTranspose2d(width, 1, 4, 2, 1, bias=False),
            nn.Tanh(),
        )

    def forward(self, z):
        return self.main(z)


class Discriminator(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.main = nn.Sequential(
            nn.Conv2d(1, width, 4, 2, 1, bias=False),
            nn.LeakyReLU(0.2, inplace=True),
            nn.Conv2d(width, 2 * width, 4, 2, 1, bias=False),
            nn.BatchNorm2d(2 * width),
            nn.LeakyReLU(0.2, inplace=True),
            nn.Conv2d(2 * width, 4 * width, 4, 2, 1, bias=False),
            nn.BatchNorm2d(4 * width),
            nn.LeakyReLU(0.2, inplace=True),
            nn.Conv2d(4 * width, 1, 4, 1, 0, bias=False),
            nn.Sigmoid(),
        )

    def forward(self, x):
        return self.main(x).view(-1)


def weights_init(m):
    """As in the paper. `isinstance` knows converted layers too."""
    if isinstance(m, nn.Conv2d | nn.ConvTranspose2d):
        nn.init.normal_(m.weight, 0.0, 0.02)
    elif isinstance(m, nn.BatchNorm2d):
        nn.init.normal_(m.weight, 1.0, 0.02)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--plain", action="store_true", help="PyTorch alone")
    args = parser.parse_args()
    torch.manual_seed(0)
    generator, discriminator = (net(args.width).apply(weights_init) for net in (Generator, Discriminator))
    if not args.plain:
        fastgan.convert(generator)
        fastgan.convert(discriminator)
    criterion = nn.BCELoss()
    g_adam, d_adam = (torch.optim.Adam(m.parameters(), 2e-4, betas=(0.5, 0.999)) for m in (generator, discriminator))
    images = fastgan.data.load("fashion-mnist", image_size=32, channels=1)
    batches = images.batches(BATCH, generator=torch.Generator().manual_seed(0))
    ones, zeros = torch.ones(BATCH), torch.zeros(BATCH)
    for i in range(args.steps):
        begin = time.perf_counter()
        real, _ = next(batches)
        discriminator.zero_grad()
        d_real = criterion(discriminator(real), ones)
        d_real.backward()
        fake = generator(torch.randn(BATCH, LATENT, 1, 1))
        d_fake = criterion(discriminator(fake.detach()), zeros)
        d_fake.backward()
        d_adam.step()
        generator.zero_grad()
        g_loss = criterion(discriminator(fake), ones)
        g_loss.backward()
        g_adam.step()
        seconds = time.perf_counter() - begin
        if i % 10 == 0 or i == args.steps - 1:
            print(f"step {i + 1}: D {d_real + d_fake:.4f}  G {g_loss:.4f}  ({1e3 * seconds:.0f} ms)")


if __name__ == "__main__":
    main()
