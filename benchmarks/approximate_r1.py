"""How far approximate R1 is from R1: bias and spread of value and gradient, by the noise's deviation; what both cost.

    python benchmarks/approximate_r1.py [--draws 64]

The discriminator is that of `vit-gan-small` (width 64, 2 blocks) after 60 of its own updates on bundled emoji against
noise, the batch 64 emoji of 32 x 32. R1 is exact, in float64. All deviations see the same noise. About a minute.
"""

from __future__ import annotations

import argparse
import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fastgan
from fastgan.benchmarking import timing
from fastgan.functional import gradient_penalty

SIGMAS = (1.0, 0.3, 0.1, 0.03, 0.01, 0.001)


def subject() -> tuple[torch.nn.Module, Tensor]:
    """A discriminator that knows emoji from noise, in float64, and a batch of emoji."""
    torch.manual_seed(0)
    _, discriminator = fastgan.models.build("vit-gan-small", d_width=64, depth=2)
    emoji = fastgan.data.load("emoji-64", image_size=32)
    pixels = emoji.pick(torch.arange(0, len(emoji), 4))  # of every class
    adam = torch.optim.Adam(discriminator.parameters(), 2e-4, (0.0, 0.99))
    for _ in range(60):
        real = pixels[torch.randint(len(pixels), (32,))]
        fake = 0.5 * torch.randn_like(real) + real.mean((0, 2, 3), keepdim=True)
        loss = F.softplus(-discriminator(real)).mean() + F.softplus(discriminator(fake)).mean()
        adam.zero_grad()
        (loss + gradient_penalty(discriminator, real, kind="r1", weight=1.0)).backward()
        adam.step()
    return discriminator.double(), pixels[:64].double()


def penalty(discriminator: torch.nn.Module, x: Tensor, **how: Any) -> tuple[float, Tensor]:
    """(its value, its gradient for all parameters), in float64."""
    value = gradient_penalty(discriminator, x, weight=1.0, **how)
    found = torch.autograd.grad(value, list(discriminator.parameters()), allow_unused=True)
    parts = [
        (torch.zeros_like(p) if g is None else g).flatten().double()
        for p, g in zip(discriminator.parameters(), found, strict=True)
    ]
    return value.item(), torch.cat(parts)


def row(way: str, sigma: float, draws: int, subject: tuple[Any, Tensor], exact: tuple[float, Tensor]) -> str:
    """One line of the table: mean and spread of the value, error of the gradient's mean and of one draw."""
    discriminator, x = subject
    values, gradients = [], []
    for seed in range(draws):
        generator = torch.Generator().manual_seed(seed)
        with torch.autocast("cpu", torch.bfloat16, enabled=way == "bfloat16"):
            value, gradient = penalty(discriminator, x, kind="r1-approximate", sigma=sigma, generator=generator)
        values.append(value)
        gradients.append(gradient)
    value, gradient = torch.tensor(values, dtype=torch.float64) / exact[0], torch.stack(gradients)
    size, error = exact[1].norm(), value.std() / draws**0.5
    single = (gradient - exact[1]).norm(dim=1).mean() / size
    mean = (gradient.mean(0) - exact[1]).norm() / size
    return f"| {way} | {sigma} | {value.mean():.3f} ± {error:.3f} | {value.std():.3f} | {single:.2f} | {mean:.2f} |"


def cost(subject: tuple[Any, Tensor]) -> str:
    """Milliseconds of the penalty with its gradient, interleaved, of the converted discriminator in float32."""
    discriminator, x = fastgan.convert(subject[0]), subject[1]
    calls = {kind: functools.partial(penalty, discriminator, x, kind=kind) for kind in ("r1", "r1-approximate")}
    samples = timing.interleave(calls, seconds=20.0)
    r1, approximate = (1000 * samples[kind].median for kind in calls)
    return f"R1 {r1:.1f} ms, approximate {approximate:.1f} ms: {approximate / r1:.2f} of it"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=64)
    draws = parser.parse_args().draws
    discriminator, x = subject()
    exact = penalty(discriminator, x, kind="r1")
    print(f"exact R1 {exact[0]:.4g}, {draws} draws")
    print("| computed in | sigma | value / R1 | deviation of one | gradient's error, one draw | of the draws' mean |")
    print("|---|---|---|---|---|---|")
    for way in ("float32", "bfloat16"):
        narrow = discriminator.float(), x.float()
        for sigma in SIGMAS:
            print(row(way, sigma, draws, narrow, exact), flush=True)
    print(cost(narrow))


if __name__ == "__main__":
    main()
