"""A HiFi-GAN-like vocoder, spectrogram to waveform: run `python examples/vocoder.py`, --plain for PyTorch alone.

The networks follow Kong et al., HiFi-GAN (2020), at a width that a laptop trains: transposed 1-D convolutions and
dilated residual stacks, discriminators by period and by scale that return logits and features, weight norm everywhere.
The sounds are made here: a few harmonics of a random tone.
"""

import argparse
import math
import time

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

import fastgan

BINS, HOP, RATE = 80, 256, 22_050
RATES = 8, 8, 2, 2  # their product is HOP


class Residual(nn.Module):
    def __init__(self, channels, kernel):
        super().__init__()
        conv = lambda d: nn.Conv1d(channels, channels, kernel, dilation=d, padding=d * (kernel - 1) // 2)
        self.dilated = nn.ModuleList(weight_norm(conv(d)) for d in (1, 3, 5))
        self.dense = nn.ModuleList(weight_norm(conv(1)) for _ in range(3))

    def forward(self, x):
        for dilated, dense in zip(self.dilated, self.dense, strict=True):
            x = x + dense(F.leaky_relu(dilated(F.leaky_relu(x, 0.1)), 0.1))
        return x


class Generator(nn.Module):
    def __init__(self, width=128, kernels=(3, 7, 11)):
        super().__init__()
        self.pre = weight_norm(nn.Conv1d(BINS, width, 7, padding=3))
        self.ups, self.stacks = nn.ModuleList(), nn.ModuleList()
        for i, rate in enumerate(RATES):
            up = nn.ConvTranspose1d(width >> i, width >> (i + 1), 2 * rate, rate, padding=rate // 2)
            self.ups.append(weight_norm(up))
            self.stacks.append(nn.ModuleList(Residual(width >> (i + 1), kernel) for kernel in kernels))
        self.post = weight_norm(nn.Conv1d(width >> len(RATES), 1, 7, padding=3))

    def forward(self, mel):
        x = self.pre(mel)
        for up, stacks in zip(self.ups, self.stacks, strict=True):
            x = up(F.leaky_relu(x, 0.1))
            x = sum(stack(x) for stack in stacks) / len(stacks)
        return torch.tanh(self.post(F.leaky_relu(x)))


class ByPeriod(nn.Module):
    """Sees the waveform as an image, a row a period."""

    def __init__(self, period, widths):
        super().__init__()
        self.period = period
        pairs = zip((1, *widths), widths, strict=False)
        self.convs = nn.ModuleList(weight_norm(nn.Conv2d(a, b, (5, 1), (3, 1), (2, 0))) for a, b in pairs)
        self.post = weight_norm(nn.Conv2d(widths[-1], 1, (3, 1), 1, (1, 0)))

    def forward(self, x):
        x = F.pad(x, (0, -x.shape[-1] % self.period), "reflect")
        x = x.unflatten(-1, (-1, self.period))
        features = []
        for conv in self.convs:
            x = F.leaky_relu(conv(x), 0.1)
            features.append(x)
        return self.post(x).flatten(1), features


class ByScale(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.convs = nn.ModuleList(
            [
                weight_norm(nn.Conv1d(1, width, 15, 1, padding=7)),
                weight_norm(nn.Conv1d(width, width, 41, 2, groups=4, padding=20)),
                weight_norm(nn.Conv1d(width, 2 * width, 41, 4, groups=min(16, width), padding=20)),
                weight_norm(nn.Conv1d(2 * width, 2 * width, 5, 1, padding=2)),
            ]
        )
        self.post = weight_norm(nn.Conv1d(2 * width, 1, 3, padding=1))

    def forward(self, x):
        features = []
        for conv in self.convs:
            x = F.leaky_relu(conv(x), 0.1)
            features.append(x)
        return self.post(x).flatten(1), features


class Discriminators(nn.Module):
    """Several discriminators as one: their logits in a list, their features in another."""

    per_sample = True  # no layer mixes samples, so that real and fake may run as one batch

    def __init__(self, width=32, periods=(2, 3, 5)):
        super().__init__()
        widths = width, 2 * width, 4 * width
        self.all = nn.ModuleList([*(ByPeriod(p, widths) for p in periods), ByScale(width)])

    def forward(self, x):
        logits, features = zip(*(d(x) for d in self.all), strict=True)
        return list(logits), list(features)


def spectrogram(sound):
    """[N, 1, L] to logarithms of [N, BINS, L / HOP] magnitudes."""
    window = torch.hann_window(4 * HOP)
    padded = F.pad(sound, (3 * HOP // 2, 3 * HOP // 2), "reflect").squeeze(1)
    found = torch.stft(padded, 4 * HOP, HOP, window=window, center=False, return_complex=True)
    return torch.log(found[:, :BINS].abs().clamp_min(1e-4))


def matching(real, fake):
    """L1 distance of features, summed over layers."""
    pairs = ((a, b) for one, other in zip(real, fake, strict=True) for a, b in zip(one, other, strict=True))
    return sum(F.l1_loss(b, a.detach()) for a, b in pairs)


def extra_g_loss(outputs):
    """What the generator learns besides deceiving: D's features and the spectrogram of the real sound."""
    near = F.l1_loss(spectrogram(outputs.fake.float()), spectrogram(outputs.real))
    return 2 * matching(outputs.d_real[1], outputs.d_fake[1]) + 45 * near


def train_step(generator, discriminator, g_optimizer, d_optimizer, real, mel):
    """The step as HiFi-GAN's authors write it, with the least squares of `GANStep`; (D's loss, G's loss)."""
    fake = generator(mel)
    d_optimizer.zero_grad()
    on_real, on_fake = discriminator(real)[0], discriminator(fake.detach())[0]
    pairs = zip(on_real, on_fake, strict=True)
    d_loss = sum(((r - 1).square().mean() + f.square().mean()) / 2 for r, f in pairs)
    d_loss.backward()
    d_optimizer.step()

    g_optimizer.zero_grad()
    discriminator.requires_grad_(False)
    with torch.no_grad():
        features = discriminator(real)[1]
    on_fake, of_fake = discriminator(fake)
    g_loss = sum((f - 1).square().mean() / 2 for f in on_fake) + 2 * matching(features, of_fake)
    g_loss = g_loss + 45 * F.l1_loss(spectrogram(fake), spectrogram(real))
    g_loss.backward()
    discriminator.requires_grad_(True)
    g_optimizer.step()
    return d_loss.detach(), g_loss.detach()


def tones(n, samples, rng):
    """[n, 1, samples]: a tone between 100 and 400 Hz with five harmonics."""
    pitch = 100 + 300 * torch.rand(n, 1, 1, generator=rng)
    time = torch.arange(samples) / RATE
    harmonics = torch.arange(1, 6).view(1, 5, 1)
    loud = torch.rand(n, 5, 1, generator=rng) / 5
    return (loud * torch.sin(2 * math.pi * pitch * harmonics * time)).sum(1, keepdim=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--samples", type=int, default=8192, help="of a segment, a multiple of 256")
    parser.add_argument("--plain", action="store_true", help="PyTorch alone")
    args = parser.parse_args()
    torch.manual_seed(0)
    generator, discriminator = Generator(args.width), Discriminators(args.width // 4)
    adam = {"lr": 2e-4, "betas": (0.8, 0.99), "fused": True}
    optimizers = [torch.optim.Adam(m.parameters(), **adam) for m in (generator, discriminator)]
    networks = generator, discriminator
    if args.plain:
        update = lambda real, mel: train_step(*networks, *optimizers, real, mel)
    else:
        step = fastgan.GANStep(
            *map(fastgan.convert, networks),
            latent=(BINS, args.samples // HOP),  # given at each step: the spectrogram
            g_optimizer=optimizers[0],
            d_optimizer=optimizers[1],
            loss="lsgan",
            extra_g_loss=extra_g_loss,
        )

        def update(real, mel):
            metrics = step(real, z=mel)
            return metrics["d_loss"], metrics["g_loss"] + metrics["extra_g_loss"]

    rng = torch.Generator().manual_seed(0)
    for i in range(args.steps):
        real = tones(8, args.samples, rng)
        begin = time.perf_counter()
        losses = update(real, spectrogram(real))
        seconds = time.perf_counter() - begin
        if i % 10 == 0 or i == args.steps - 1:
            print("step {}: D {:.4f}  G {:.4f}  ({:.0f} ms)".format(i + 1, *losses, 1e3 * seconds))


if __name__ == "__main__":
    main()
