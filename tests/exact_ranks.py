"""What each rank of tests/test_exact_ranks.py runs: ``python exact_ranks.py FOLDER CASE...``.

A case is LOSS:PENALTY:STATISTICS:DTYPE.

Every case trains 20 steps on networks with batch norm, this rank on its part of each batch, with statistics over "all"
ranks or those of its "own" part. The parameters after each step and the running statistics go to rank-K.pt. One process
does the same in `alone`: plain PyTorch networks on the whole batches, or a textbook loop over the parts.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor, nn

import fastgan
from fastgan.functional import gan_loss, gradient_penalty
from fastgan.models import MinibatchDeviation
from fastgan.training.distributed import Exchange, World, join, leave

BATCH, STEPS = 12, 20  # 16 with deviation, whose groups are of 4
LOSSES = ("bce", "minimax", "lsgan", "hinge", "wasserstein", "relativistic", "relativistic-average")
PENALTIES = ("none", "wgan-gp", "dragan", "r1", "r2", "r1r2", "r1-approximate", "r2-approximate")
# Every loss and every penalty at least once.
PAIRS = [f"{loss}:{penalty}" for loss, penalty in zip((*LOSSES, "relativistic-average"), PENALTIES, strict=True)]
PAIRS += ["bce:top-k"]  # the generator learns from half of its images
# The discriminator compares the samples of a group: without a penalty, and with second derivatives.
DEVIATION = ["hinge:none+deviation", "wasserstein:wgan-gp+deviation", "bce:r1+deviation"]
GROUP = 4
PAIRS += DEVIATION
ALL_PAIRS = [f"{loss}:{penalty}" for loss, penalty in itertools.product(LOSSES, PENALTIES)]
STATISTICS = ("all", "own")
# "smooth" is float64 on the networks of the dtypes after it, which are compared with it
DTYPES = {"float64": torch.float64, "smooth": torch.float64, "float32": torch.float32, "bf16": torch.float32}


class Generator(nn.Module):
    """A hand-written forward around its chain."""

    def __init__(self, act: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.first = nn.Linear(5, 12)
        self.norm = nn.BatchNorm1d(12)
        self.main = nn.Sequential(
            nn.ConvTranspose2d(12, 4, 3), nn.BatchNorm2d(4), act(), nn.ConvTranspose2d(4, 2, 4, 2, 1), nn.Tanh()
        )
        self.act = act()

    def forward(self, z: Tensor) -> Tensor:
        images: Tensor = self.main(self.act(self.norm(self.first(z)))[:, :, None, None])
        return images


def networks(dtype: str, penalty: str) -> tuple[nn.Module, nn.Module, torch.optim.Optimizer, torch.optim.Optimizer]:
    """With `MinibatchDeviation` for a penalty that says so.

    Smooth ones but in float64: an input of 4e-8 at a leaky ReLU's kink has another slope once it is rounded, and by
    that one the weights of minimax:r1 jumped from an error of 1e-6 to one of 4e-4 in float32.
    """
    torch.manual_seed(0)
    act = functools.partial(nn.LeakyReLU, 0.2) if dtype == "float64" else nn.SiLU
    d = nn.Sequential(
        *(nn.Conv2d(2, 4, 3, 1, 1), act(), nn.Conv2d(4, 6, 3, 2, 1, bias=False), nn.BatchNorm2d(6), act()),
        *(nn.Conv2d(6, 5, 3), nn.BatchNorm2d(5), nn.Softplus()),
        *([MinibatchDeviation()] if "+" in penalty else []),
        *(nn.Flatten(), nn.Linear(6 if "+" in penalty else 5, 1)),
    )
    g, d = (m.to(DTYPES[dtype]) for m in (Generator(nn.ReLU if dtype == "float64" else act), d))
    d.to(memory_format=torch.channels_last)
    adam = [torch.optim.Adam(m.parameters(), lr=5e-3, eps=1e-3) for m in (g, d)]
    return g, d, adam[0], adam[1]


def weight_of(penalty: str) -> float:
    return 0.1 if "approximate" in penalty else 1.0


def step_of(case: str, sync: bool) -> fastgan.GANStep:
    loss, penalty, _, dtype = case.split(":")
    g, d, g_adam, d_adam = networks(dtype, penalty)
    kind = penalty.partition("+")[0]
    return fastgan.GANStep(
        *(g, d),
        latent=5,
        g_optimizer=g_adam,
        d_optimizer=d_adam,
        loss=loss,
        penalty=None if kind in ("none", "top-k") else kind,
        top_k=0.5 if kind == "top-k" else 1.0,
        penalty_weight=weight_of(penalty),
        precision="bf16" if dtype == "bf16" else "fp32",
        rng=torch.Generator().manual_seed(7),
        sync=sync,
    )


def batches_of(case: str) -> list[tuple[Tensor, Tensor]]:
    _, penalty, _, dtype = case.split(":")
    draw = torch.Generator().manual_seed(3)
    count = 4 * GROUP if "+" in penalty else BATCH
    shapes = (count, 2, 6, 6), (count, 5)
    numbers = [[torch.randn(s, generator=draw, dtype=torch.float64) for s in shapes] for _ in range(STEPS)]
    return [(real.to(DTYPES[dtype]) * 0.5, z.to(DTYPES[dtype])) for real, z in numbers]


def shared(draw, world: World, order: int = 0):
    """torch.rand or randn, drawn for all ranks at once, in float64: this rank's part."""

    def part(*shape, generator=None, device=None, dtype=None):
        n, *rest = shape if isinstance(shape[0], int) else shape[0]
        whole = draw(n * world.size, *rest, generator=generator, dtype=torch.float64)
        return in_order(whole[n * world.rank : n * (world.rank + 1)].to(dtype), order)

    return part


def drawing(world: World, order: int):
    """Within: what is drawn is this rank's part of what all draw."""
    stack = contextlib.ExitStack()
    for draw in (torch.rand, torch.randn):
        stack.enter_context(mock.patch(f"torch.{draw.__name__}", shared(draw, world, order)))
    return stack


def part_of(batch: Tensor, world: World, order: int) -> Tensor:
    return in_order(batch.chunk(world.size)[world.rank], order)


def in_order(samples: Tensor, order: int) -> Tensor:
    """In one of 2n orders of n samples, 0 as they are: nothing changes but how sums round. Groups stay together."""
    size = GROUP if len(samples) % GROUP == 0 else 1
    turns, shift = divmod(order, len(samples))
    groups, within = divmod(shift, size)
    if shift:
        samples = samples.unflatten(0, (-1, size)).roll((groups, within), (0, 1)).flatten(0, 1)
    return samples.flip(0) if turns else samples


def row(*modules: nn.Module) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for m in modules for p in m.parameters()])


def train(case: str, world: World, order: int = 0) -> dict[str, Tensor]:
    """weights [STEPS, parameters] after each step; buffers: the running statistics at the end.

    order: of the samples in each batch (`in_order`).
    """
    step, images = step_of(case, sync=world.size > 1 and ":all:" in case), batches_of(case)
    if world.size > 1:
        step.exchange = Exchange(world)
    found = []
    with drawing(world, order):
        for batch in images:
            real, z = (part_of(x, world, order) for x in batch)
            step(real, z=z)
            found.append(row(*step.modules()))
    kept = [b.double().reshape(-1) for m in step.modules() for b in m.buffers()]
    return {"weights": torch.stack(found), "buffers": torch.cat(kept)}


def alone(case: str, ranks: int, order: int = 0) -> dict[str, Tensor]:
    """What one process makes of a case."""
    return train(case, World(), order) if ":all:" in case else Parts(case, ranks, order).train()


class Parts:
    """The textbook's loop in one process, each update by the mean of the losses of as many parts as there are ranks."""

    def __init__(self, case: str, ranks: int, order: int):
        self.case, (self.loss, penalty, _, self.dtype) = case, case.split(":")
        self.ranks, self.order = [World(k, ranks) for k in range(ranks)], order
        self.g, self.d, self.g_adam, self.d_adam = networks(self.dtype, penalty)
        self.penalty = penalty.partition("+")[0]
        self.rng = torch.Generator().manual_seed(7)

    def train(self) -> dict[str, Tensor]:
        """The weights alone: a rank's running statistics see its own part."""
        found = []
        for batch in batches_of(self.case):
            parts = [[part_of(x, rank, self.order) for x in batch] for rank in self.ranks]
            with self.autocast():
                fakes = [self.g(z) for _, z in parts]
            reals, before = [real for real, _ in parts], self.rng.get_state()
            losses = (self.d_loss(*of, before) for of in zip(self.ranks, reals, fakes, strict=True))
            self.update(self.d_adam, losses)
            self.update(self.g_adam, map(self.g_loss, reals, fakes))
            found.append(row(self.g, self.d))
        return {"weights": torch.stack(found)}

    def update(self, adam: torch.optim.Optimizer, losses: Iterable[Tensor]) -> None:
        adam.zero_grad()
        (sum(losses) / len(self.ranks)).backward()
        adam.step()

    def d_loss(self, rank: World, real: Tensor, fake: Tensor, before: Tensor) -> Tensor:
        """before: of the generator of random numbers, from which every rank draws all parts and takes its own."""
        on_real, on_fake = self.judged(real), self.judged(fake.detach())
        loss = gan_loss(on_fake, on_real, kind=self.loss, side="d")
        if self.penalty in ("none", "top-k"):
            return loss
        self.rng.set_state(before)
        options = dict(kind=self.penalty, weight=weight_of(self.penalty), generator=self.rng)
        with drawing(rank, self.order), self.autocast():
            return loss + gradient_penalty(self.d, real, fake.detach(), **options)

    def g_loss(self, real: Tensor, fake: Tensor) -> Tensor:
        with torch.no_grad():
            on_real = self.judged(real) if "relativistic" in self.loss else None
        on_fake = self.judged(fake)
        if self.penalty == "top-k":
            on_fake = on_fake.flatten().topk(-(-len(on_fake) // 2)).values
        return gan_loss(on_fake, on_real, kind=self.loss, side="g")

    def judged(self, images: Tensor) -> Tensor:
        with self.autocast():
            logits: Tensor = self.d(images)
        return logits if DTYPES[self.dtype] == torch.float64 else logits.float()

    def autocast(self):
        return torch.autocast("cpu", torch.bfloat16, enabled=self.dtype == "bf16")


def main(folder: Path, cases: list[str]) -> None:
    torch.set_num_threads(1)
    world = join()
    torch.save({case: train(case, world) for case in cases}, folder / f"rank-{world.rank}.pt")
    leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
