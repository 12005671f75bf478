"""WGAN-GP, your own loop: run `python examples/wgan_gp.py`, or with --plain for PyTorch alone.

The loop is that of Gulrajani et al., Improved Training of Wasserstein GANs (2017): five updates of the critic for one
of the generator. What changes: two lines with `fastgan.convert`, and the penalty, which is one call.
"""

import argparse
import time

import torch
from torch import nn

import fastgan

LATENT, CRITIC_UPDATES = 64, 5


def networks(width):
    generator = nn.Sequential(
        nn.ConvTranspose2d(LATENT, 4 * width, 7, bias=False),
        nn.BatchNorm2d(4 * width),
        nn.ReLU(),
        nn.ConvTranspose2d(4 * width, 2 * width, 4, 2, 1, bias=False),
        nn.BatchNorm2d(2 * width),
        nn.ReLU(),
        nn.ConvTranspose2d(2 * width, 1, 4, 2, 1),
        nn.Tanh(),
    )
    critic = nn.Sequential(  # no batch norm: the penalty is of single samples
        nn.Conv2d(1, 2 * width, 4, 2, 1),
        nn.LeakyReLU(0.2),
        nn.Conv2d(2 * width, 4 * width, 4, 2, 1),
        nn.LeakyReLU(0.2),
        nn.Conv2d(4 * width, 1, 7),
        nn.Flatten(0),
    )
    return generator, critic


def textbook_penalty(critic, real, fake):
    """10 mean (|gradient| - 1)^2 between real and generated samples."""
    share = torch.rand(len(real), 1, 1, 1)
    points = (share * real + (1 - share) * fake).requires_grad_()
    (gradient,) = torch.autograd.grad(critic(points).sum(), points, create_graph=True)
    return 10 * (gradient.flatten(1).norm(dim=1) - 1).square().mean()


def fast_penalty(critic, real, fake):
    return fastgan.functional.gradient_penalty(critic, real, fake, kind="wgan-gp", weight=10.0)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=20, help="updates of the generator")
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--plain", action="store_true", help="PyTorch alone")
    args = parser.parse_args()
    torch.manual_seed(0)
    generator, critic = networks(args.width)
    penalty = textbook_penalty
    if not args.plain:
        fastgan.convert(generator)
        fastgan.convert(critic)
        penalty = fast_penalty
    adams = [torch.optim.Adam(m.parameters(), 1e-4, betas=(0.0, 0.9), fused=True) for m in (generator, critic)]
    images = fastgan.data.load("fashion-mnist", image_size=28, channels=1)
    batches = images.batches(32, generator=torch.Generator().manual_seed(0))
    for i in range(args.steps):
        begin = time.perf_counter()
        for _ in range(CRITIC_UPDATES):
            real, _ = next(batches)
            with torch.no_grad():
                fake = generator(torch.randn(32, LATENT, 1, 1))
            adams[1].zero_grad()
            d_loss = critic(fake).mean() - critic(real).mean() + penalty(critic, real, fake)
            d_loss.backward()
            adams[1].step()
        adams[0].zero_grad()
        g_loss = -critic(generator(torch.randn(32, LATENT, 1, 1))).mean()
        g_loss.backward()
        adams[0].step()
        seconds = time.perf_counter() - begin
        if i % 10 == 0 or i == args.steps - 1:
            print(f"step {i + 1}: D {d_loss:.4f}  G {g_loss:.4f}  ({1e3 * seconds:.0f} ms)")


if __name__ == "__main__":
    main()
