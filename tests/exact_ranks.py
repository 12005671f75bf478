"""What each rank of tests/test_exact_ranks.py runs: ``python exact_ranks.py FOLDER CASE...``.

A case is LOSS:PENALTY:DTYPE.

Every case trains 20 steps on networks with batch norm, this rank on its part of each batch, with statistics over all
ranks. The parameters after each step and the running statistics go to rank-K.pt. Without ranks the same function trains
plain PyTorch networks on the whole batches.
"""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor, nn

import fastgan
from fastgan.training.distributed import Exchange, World, join, leave

BATCH, STEPS = 12, 20
LOSSES = ("bce", "minimax", "lsgan", "hinge", "wasserstein", "relativistic", "relativistic-average")
PENALTIES = ("none", "wgan-gp", "dragan", "r1", "r2", "r1r2", "r1-approximate", "r2-approximate")
# Every loss and every penalty at least once.
PAIRS = [f"{loss}:{penalty}" for loss, penalty in zip((*LOSSES, "relativistic-average"), PENALTIES, strict=True)]
PAIRS += ["bce:top-k"]  # the generator learns from half of its images
ALL_PAIRS = [f"{loss}:{penalty}" for loss, penalty in itertools.product(LOSSES, PENALTIES)]
DTYPES = {"float64": torch.float64, "float32": torch.float32, "bf16": torch.float32}


class Generator(nn.Module):
    """A hand-written forward around its chain."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 12)
        self.norm = nn.BatchNorm1d(12)
        self.main = nn.Sequential(
            nn.ConvTranspose2d(12, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.ConvTranspose2d(4, 2, 4, 2, 1), nn.Tanh()
        )

    def forward(self, z: Tensor) -> Tensor:
        images: Tensor = self.main(torch.relu(self.norm(self.first(z)))[:, :, None, None])
        return images


def step_of(case: str, sync: bool) -> fastgan.GANStep:
    loss, penalty, dtype = case.split(":")
    torch.manual_seed(0)
    d = nn.Sequential(
        *(nn.Conv2d(2, 4, 3, 1, 1), nn.LeakyReLU(0.2), nn.Conv2d(4, 6, 3, 2, 1, bias=False), nn.BatchNorm2d(6)),
        *(nn.LeakyReLU(0.2), nn.Conv2d(6, 5, 3), nn.BatchNorm2d(5), nn.Softplus(), nn.Flatten(), nn.Linear(5, 1)),
    )
    g, d = (m.to(DTYPES[dtype]) for m in (Generator(), d))
    d.to(memory_format=torch.channels_last)
    adam = [torch.optim.Adam(m.parameters(), lr=5e-3, eps=1e-3) for m in (g, d)]
    return fastgan.GANStep(
        *(g, d),
        latent=5,
        g_optimizer=adam[0],
        d_optimizer=adam[1],
        loss=loss,
        penalty=None if penalty in ("none", "top-k") else penalty,
        top_k=0.5 if penalty == "top-k" else 1.0,
        penalty_weight=0.1 if "approximate" in penalty else 1.0,
        precision="bf16" if dtype == "bf16" else "fp32",
        rng=torch.Generator().manual_seed(7),
        sync=sync,
    )


def batches(dtype: str) -> list[tuple[Tensor, Tensor]]:
    draw = torch.Generator().manual_seed(3)
    shapes = (BATCH, 2, 6, 6), (BATCH, 5)
    numbers = [[torch.randn(s, generator=draw, dtype=torch.float64) for s in shapes] for _ in range(STEPS)]
    return [(real.to(DTYPES[dtype]) * 0.5, z.to(DTYPES[dtype])) for real, z in numbers]


def shared(draw, world: World, turned: bool = False):
    """torch.rand or randn, drawn for all ranks at once, in float64: this rank's part."""

    def part(*shape, generator=None, device=None, dtype=None):
        n, *rest = shape if isinstance(shape[0], int) else shape[0]
        whole = draw(n * world.size, *rest, generator=generator, dtype=torch.float64)
        own = whole[n * world.rank : n * (world.rank + 1)].to(dtype)
        return own.flip(0) if turned else own

    return part


def train(case: str, world: World, turned: bool = False) -> dict[str, Tensor]:
    """weights [STEPS, parameters] after each step; buffers: the running statistics at the end.

    turned: each batch with its last sample first, which changes nothing but how sums round.
    """
    step, images = step_of(case, sync=world.size > 1), batches(case.rpartition(":")[2])
    if world.size > 1:
        step.exchange = Exchange(world)
    part = BATCH // world.size
    mine, found = slice(world.rank * part, (world.rank + 1) * part), []
    rand, randn = (mock.patch(f"torch.{f.__name__}", shared(f, world, turned)) for f in (torch.rand, torch.randn))
    with rand, randn:
        for real, z in images:
            real, z = (x[mine].flip(0) if turned else x[mine] for x in (real, z))
            step(real, z=z)
            found.append(torch.cat([p.detach().reshape(-1) for m in step.modules() for p in m.parameters()]))
    kept = [b.double().reshape(-1) for m in step.modules() for b in m.buffers()]
    return {"weights": torch.stack(found), "buffers": torch.cat(kept)}


def main(folder: Path, cases: list[str]) -> None:
    torch.set_num_threads(1)
    world = join()
    torch.save({case: train(case, world) for case in cases}, folder / f"rank-{world.rank}.pt")
    leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
