"""The pictures of docs/concepts.md, made by our own runs: `python examples/concepts.py` (minutes on 2 cores).

Three experiments, each with `fastgan.GANStep`: a generator with one parameter, of which the whole game can be drawn
(Mescheder et al. 2018, arXiv:1801.04406); a mixture of eight Gaussians in the plane; and photographs of garments.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import matplotlib

matplotlib.use("agg")
import torch
from matplotlib import pyplot
from torch import Tensor, nn

import fastgan

LEARNING_RATE = 0.05  # of the game with one parameter a player
D_RATE, G_RATE = 1e-3, 5e-3  # of the Gaussians: a generator five times as fast, which is too much for D alone
RADIUS, LIMIT = 2.0, 3.2  # of the ring of Gaussians, and of the part of the plane that is drawn
REGULARISERS = {  # title -> what it changes in GANStep; spectral norm changes the network
    "nothing": {},
    "WGAN-GP": dict(loss="wasserstein", penalty="wgan-gp", penalty_weight=1.0, d_steps=5),
    "spectral norm": dict(loss="hinge"),
    "R1": dict(penalty="r1", penalty_weight=0.5),
    "R1 + R2, paired": dict(loss="relativistic", penalty="r1r2", penalty_weight=0.5),
}


# ---- one parameter a player ------------------------------------------------------------------------------------------


class Point(nn.Module):
    """A generator that always draws its one parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.tensor([[1.0]]))

    def forward(self, z: Tensor) -> Tensor:
        return self.theta.expand(len(z), 1)


def orbit(steps: int, **settings: object) -> Tensor:
    """[steps, 2]: theta of the generator and psi of D(x) = psi x after each step; the real data are the point 0."""
    generator, discriminator = Point(), nn.Linear(1, 1, bias=False)
    nn.init.constant_(discriminator.weight, 0.5)
    step = fastgan.GANStep(
        generator,
        discriminator,
        latent=1,
        g_optimizer=torch.optim.SGD(generator.parameters(), lr=LEARNING_RATE),
        d_optimizer=torch.optim.SGD(discriminator.parameters(), lr=LEARNING_RATE),
        **settings,
    )
    path = []
    for _ in range(steps):
        step(torch.zeros(1, 1))
        path.append([generator.theta.item(), discriminator.weight.item()])
    return torch.tensor(path)


def draw_orbits(path: Path, steps: int) -> None:
    games = {
        "Wasserstein, no penalty": dict(loss="wasserstein"),
        "bce, no penalty": dict(loss="bce"),
        "bce with R1": dict(loss="bce", penalty="r1", penalty_weight=1.0),
    }
    figure, axes = pyplot.subplots(1, len(games), figsize=(10, 3.6), layout="constrained", sharex=True, sharey=True)
    for axis, (title, settings) in zip(axes, games.items(), strict=True):
        theta, psi = orbit(steps, **settings).unbind(1)
        axis.plot(theta, psi, linewidth=0.8, color="#3f6fb5")
        axis.plot(theta[0], psi[0], "o", color="black", label="start")
        axis.plot(theta[-1], psi[-1], "o", color="#c0504d", label="end")
        axis.plot(0, 0, "+", color="black", markersize=12, label="equilibrium")
        axis.set(title=title, xlabel="generator's parameter")
    axes[0].set_ylabel("discriminator's parameter")
    axes[0].legend(loc="lower left", fontsize=8)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


# ---- eight Gaussians in the plane ------------------------------------------------------------------------------------


def ring(count: int, generator: torch.Generator) -> Tensor:
    """[count, 2] samples of eight Gaussians of deviation 0.02 on a circle."""
    angle = torch.randint(8, (count,), generator=generator) * (math.tau / 8)
    centre = torch.stack([angle.cos(), angle.sin()], 1)
    return RADIUS * centre + 0.02 * torch.randn(count, 2, generator=generator)


def dense(inputs: int, outputs: int, width: int = 64, spectral: bool = False) -> nn.Sequential:
    """Three layers with LeakyReLU between them."""
    sizes = [(inputs, width), (width, width), (width, outputs)]
    layers = [nn.utils.parametrizations.spectral_norm(nn.Linear(*s)) if spectral else nn.Linear(*s) for s in sizes]
    return nn.Sequential(layers[0], nn.LeakyReLU(0.2), layers[1], nn.LeakyReLU(0.2), layers[2])


def play(title: str, at: list[int], g_rate: float, seed: int = 0) -> tuple[list[Tensor], list[Tensor]]:
    """Samples, and D on a grid of the plane, after each number of steps in `at`."""
    torch.manual_seed(seed)
    generator, discriminator = dense(8, 2), dense(2, 1, spectral=title == "spectral norm")
    step = fastgan.GANStep(
        generator,
        discriminator,
        latent=8,
        g_optimizer=fastgan.Adam(generator.parameters(), g_rate, betas=(0.5, 0.999)),
        d_optimizer=fastgan.Adam(discriminator.parameters(), D_RATE, betas=(0.5, 0.999)),
        **REGULARISERS[title],
    )
    rng = torch.Generator().manual_seed(seed)
    line = torch.linspace(-LIMIT, LIMIT, 60)
    plane = torch.cartesian_prod(line, line)
    z = torch.randn(512, 8, generator=rng)
    samples, surfaces = [], []
    for number in range(max(at) + 1):
        if times := at.count(number):
            with torch.no_grad():
                samples += [generator(z)] * times
                surfaces += [discriminator(plane).view(60, 60).T] * times
        step([ring(128, rng) for _ in range(step.d_steps)] if step.d_steps > 1 else ring(128, rng))
    return samples, surfaces


def draw_games(path: Path, titles: list[str], at: list[int], g_rate: float) -> None:
    """A row a regulariser, a column a number of steps: D as colour, samples as dots, the real modes as rings."""
    figure, axes = pyplot.subplots(
        len(titles), len(at), figsize=(2.3 * len(at), 2.35 * len(titles)), layout="constrained", squeeze=False
    )
    modes = torch.arange(8) * (math.tau / 8)
    for row, title in zip(axes, titles, strict=True):
        for axis, number, points, surface in zip(row, at, *play(title, at, g_rate), strict=True):
            axis.imshow(surface.numpy(), extent=(-LIMIT, LIMIT, -LIMIT, LIMIT), origin="lower", cmap="RdBu", alpha=0.6)
            axis.plot(
                RADIUS * modes.cos(), RADIUS * modes.sin(), "o", markerfacecolor="none", color="black", markersize=9
            )
            axis.plot(*points.unbind(1), ".", color="black", markersize=1.5)
            axis.set(xlim=(-LIMIT, LIMIT), ylim=(-LIMIT, LIMIT), xticks=[], yticks=[], title=f"step {number}")
        row[0].set_ylabel(title)
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


# ---- photographs of garments -----------------------------------------------------------------------------------------


MOMENTS = (0, 0.03, 0.1, 0.25, 0.5, 1)  # shares of the run


def film(steps: int, g_rate: float) -> list[Tensor]:
    """Pictures from the same 16 latents at each of MOMENTS."""
    torch.manual_seed(0)
    generator, discriminator = fastgan.models.build("dcgan-28", g_width=16, d_width=16, dropout=0.0)
    step = fastgan.GANStep(
        fastgan.convert(generator),
        fastgan.convert(discriminator),
        latent=100,
        g_optimizer=fastgan.Adam(generator.parameters(), g_rate, betas=(0.5, 0.999)),
        d_optimizer=fastgan.Adam(discriminator.parameters(), 5e-4, betas=(0.5, 0.999)),
    )
    images = fastgan.data.load("fashion-mnist", device="cpu")
    batches = images.batches(32, generator=torch.Generator().manual_seed(0))
    z = torch.randn(16, 100)
    pictures = []
    for number in range(steps + 1):
        if times := [round(steps * share) for share in MOMENTS].count(number):
            generator.eval()
            with torch.no_grad():
                pictures += [fastgan.data.make_grid(generator(z), columns=4)] * times
            generator.train()
        step(next(batches)[0])
    return pictures


def draw_films(path: Path, steps: int) -> None:
    runs = {"equal rates": 5e-4, "generator 20 times as fast": 1e-2}
    figure, axes = pyplot.subplots(len(runs), len(MOMENTS), figsize=(10, 4.3), layout="constrained")
    for row, (title, g_rate) in zip(axes, runs.items(), strict=True):
        for axis, sheet, share in zip(row, film(steps, g_rate), MOMENTS, strict=True):
            axis.imshow(sheet.squeeze().numpy(), cmap="gray")
            axis.set(xticks=[], yticks=[], title=f"step {round(steps * share)}")
        row[0].set_ylabel(title)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent.parent / "docs" / "images")
    parser.add_argument("--effort", type=float, default=1.0, help="share of the steps: 0.01 for a quick look")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)

    def steps(whole: int) -> int:
        return max(2, round(whole * options.effort))

    draw_orbits(options.out / "concepts-orbits.png", steps(1500))
    early, late = [0, *map(steps, (100, 300, 1000, 2000))], [*map(steps, (200, 500, 1000, 1500, 2000))]
    draw_games(options.out / "concepts-game.png", ["R1"], early, D_RATE)
    draw_games(options.out / "concepts-regularisers.png", list(REGULARISERS), late, G_RATE)
    draw_films(options.out / "concepts-garments.png", steps(600))


if __name__ == "__main__":
    main()
