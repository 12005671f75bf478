"""Ranks of one machine over gloo: a model of the exchange's time, calibrated on sizes alone and checked on whole steps.

    python benchmarks/ranks.py [--ranks 1 2 4]

Every rank computes in one thread on a batch of its own, as one of several machines would. On each number of ranks:
- `Exchange` on one parameter of 4 KB and on one of 32 MB gives latency a and bandwidth b of seconds = a + bytes / b.
- A recipe's step runs in turns without an exchange, with one that only waits for all ranks, and with the whole one; all
  on all ranks at once, so that cores which are shared slow each. The model says: with = without + updates * a +
  gradients' bytes / b; with the waiting that was measured in the place of a's it says what the bytes alone add.
- The discriminator's gradients are exchanged before the generator's forward pass, and beside it.
Prints a table, and a line for each of the last. About three minutes.
"""

from __future__ import annotations

import argparse
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

os.environ.setdefault("FASTGAN_CACHE", tempfile.mkdtemp(prefix="fastgan-ranks-"))  # races are run anew

import facts
import torch
import torch.distributed as dist
from torch import Tensor, nn

import fastgan
from fastgan.training.distributed import Exchange, World, join, leave

SMALL, LARGE = 4 << 10, 32 << 20  # bytes
RECIPES = {"mlp-28": 64, "dcgan-28": 32, "dcgan-64": 16}  # images a rank
ROUNDS, WARM_UP = 12, 4


def median(world: World, work: Callable[[], Any], rounds: int) -> float:
    """Milliseconds, the mean over the ranks of their medians; each round begins on all ranks together."""
    found = []
    for _ in range(rounds):
        world.agree("")
        begin = time.perf_counter()
        work()
        found.append(1e3 * (time.perf_counter() - begin))
    return world.mean({"": statistics.median(found)})[""]


def calibrate(world: World) -> tuple[float, float]:
    """(ms of an exchange of nothing, bytes a ms)."""
    times = []
    for size in (SMALL, LARGE):
        parameter = nn.Parameter(torch.zeros(size // 4))
        parameter.grad = torch.zeros_like(parameter)
        exchange = Exchange(world)
        exchange.exchange([parameter])
        times.append(median(world, lambda e=exchange, p=parameter: e.exchange([p]), 15))
    rate = (LARGE - SMALL) / max(1e-9, times[1] - times[0])
    return times[0] - SMALL / rate, rate


def make_step(name: str) -> tuple[fastgan.GANStep, Callable[[], Tensor]]:
    """A recipe's step on this rank, and what draws its images."""
    torch.manual_seed(0)
    recipe, batch = fastgan.recipes()[name], RECIPES[name]
    g, d = fastgan.models.build(recipe.model, image_size=recipe.image_size, channels=recipe.channels)
    adam = [torch.optim.Adam(m.parameters(), 2e-4, (0.5, 0.999), fused=True) for m in (g, d)]
    optimizers: Any = dict(g_optimizer=adam[0], d_optimizer=adam[1])
    step = fastgan.GANStep(g, d, latent=recipe.latent, loss=recipe.loss, **optimizers)
    shape = batch, recipe.channels, recipe.image_size, recipe.image_size
    return step, lambda: torch.rand(shape) * 2 - 1


class Waiting:
    """An exchange of one number: what an update waits for the slowest rank."""

    def __init__(self, world: World):
        self._world = world

    def exchange(self, parameters: Sequence[Tensor]) -> None:
        self._world.agree("")


def measure(world: World, name: str) -> tuple[dict[str, float], int]:
    """(ms of a step "with" the exchange, "waiting" and "without", bytes of gradients)."""
    step, draw = make_step(name)
    images, several = draw(), world.size > 1
    exchanges = {"with": Exchange(world), "waiting": Waiting(world), "without": None}
    found: dict[str, list[float]] = {way: [] for way in exchanges}
    for number in range(WARM_UP + ROUNDS):
        for way, exchange in exchanges.items():
            step.exchange = exchange if several else None
            spent = median(world, lambda: float(step(images)["g_loss"]), 1)
            if number >= WARM_UP:
                found[way].append(spent)
    size = sum(p.numel() * 4 for m in (step.generator, step.discriminator) for p in m.parameters())
    return {way: statistics.median(times) for way, times in found.items()}, size


def overlap(world: World, name: str) -> tuple[float, float]:
    """Milliseconds of D's exchange followed by G's forward pass, and of both at once."""
    step, _ = make_step(name)
    flat = torch.zeros(sum(p.numel() for p in step.discriminator.parameters()))
    z = step.draw_latent(RECIPES[name])

    def in_turn() -> None:
        dist.all_reduce(flat)
        step.generator(z)

    def at_once() -> None:
        job = dist.all_reduce(flat, async_op=True)
        step.generator(z)
        job.wait()

    times: tuple[list[float], list[float]] = [], []
    for number in range(WARM_UP + ROUNDS):
        for way, found in zip((in_turn, at_once), times, strict=True):
            spent = median(world, way, 1)
            if number >= WARM_UP:
                found.append(spent)
    return statistics.median(times[0]), statistics.median(times[1])


def work() -> None:
    """One rank."""
    torch.set_num_threads(1)
    world = join()
    latency, rate = calibrate(world) if world.size > 1 else (0.0, float("inf"))
    if world.first and world.size > 1:
        print(f"{world.size} ranks: exchange of nothing {latency:.2f} ms, {rate / 1e3:,.0f} MB/s of gradients")
    for name in RECIPES:
        ms, size = measure(world, name)
        whole, alone = ms["with"], ms["without"]
        model, waited = alone + 2 * latency + size / rate, ms["waiting"] + size / rate
        if world.first:
            print(
                f"| `{name}`, {RECIPES[name]} | {world.size} | {alone:.1f} | {ms['waiting']:.1f} | {whole:.1f} "
                f"| {model:.1f} | {model / whole - 1:+.0%} | {waited / whole - 1:+.0%} | {alone / whole:.0%} |",
                flush=True,
            )
    for name in RECIPES if world.size > 1 else ():
        in_turn, at_once = overlap(world, name)
        if world.first:
            print(f"`{name}`: D's exchange, then G's forward {in_turn:.1f} ms, at once {at_once:.1f} ms", flush=True)
    if world.size > 1:
        dist.barrier()
    leave()


def start(ranks: int) -> None:
    """Run `work` on so many processes; raises CalledProcessError if one fails."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    world = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(ranks), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, "--work"]
    jobs = [subprocess.Popen(command, env={**os.environ, **world, "RANK": str(k)}) for k in range(ranks)]
    try:
        codes = [job.wait() for job in jobs]
    finally:
        for job in jobs:
            job.kill()
    if any(codes):
        raise subprocess.CalledProcessError(max(codes), command)


def main() -> int:
    """Print everything."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        work()
        return 0
    found = facts.gather("python " + " ".join(sys.argv))
    print({key: found[key] for key in ("cpu", "cores", "kernels", "torch", "commit", "dirty")}, flush=True)
    print(
        "| recipe, images a rank | ranks | step without ms | waiting ms | with ms | model ms | model's error "
        "| with the waiting | efficiency |"
    )
    print("|---|---|---|---|---|---|---|---|---|", flush=True)
    for ranks in args.ranks:
        start(ranks)
    print(f"load average {os.getloadavg()[0]:.1f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
