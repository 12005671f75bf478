"""What each rank of tests/test_distributed.py runs: ``python distributed_ranks.py FOLDER``; results in rank-K.pt."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from sharing_ranks import KINDS, LOADERS, counting, parts_of
from tiny_run import TINY, noise, tensors, trainer
from torch import nn

import fastgan
from fastgan import data
from fastgan.convert import synchronise
from fastgan.data import pixels
from fastgan.functional import bn_act
from fastgan.nn import BatchNormAct2d
from fastgan.training.distributed import Exchange, join, leave

RANKS, PART, STEPS = 2, 3, 4

# name: (options of GANStep, whether the networks have batch norm)
CASES = {
    "bce-r1": ({"loss": "bce", "penalty": "r1", "penalty_every": 2, "grad_clip": 0.05, "ema": 0.9}, False),
    "wasserstein-gp": ({"loss": "wasserstein", "penalty": "wgan-gp"}, False),
    "accumulate": ({"loss": "hinge", "penalty": "r1r2", "d_steps": 2, "accumulate": PART}, False),
    "batch-norm": ({"loss": "bce"}, True),
}


class Generator(nn.Module):
    """With a parameter that no loss reaches, and a frozen one."""

    def __init__(self, norm: bool):
        super().__init__()
        self.unused = nn.Parameter(torch.ones(3))
        self.main = nn.Sequential(
            nn.ConvTranspose2d(5, 4, 3),
            BatchNormAct2d(4, activation="relu") if norm else nn.ReLU(),
            nn.ConvTranspose2d(4, 2, 4, 2, 1),
            nn.Tanh(),
        )
        self.main[2].bias.requires_grad_(False)

    def forward(self, z):
        return self.main(z[:, :, None, None])


def networks(norm: bool, seed: int = 0) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(seed)
    d = nn.Sequential(
        *(nn.Conv2d(2, 4, 3, 1, 1), nn.LeakyReLU(0.2), nn.Conv2d(4, 6, 3, 2, 1)),
        *((BatchNormAct2d(6, activation="leaky_relu"),) if norm else (nn.Softplus(),)),
        *(nn.Flatten(), nn.Linear(54, 1)),
    )
    return Generator(norm).double(), d.double().to(memory_format=torch.channels_last)


def step_of(name: str, seed: int = 0) -> fastgan.GANStep:
    options, norm = CASES[name]
    g, d = networks(norm, seed)
    adam = [torch.optim.Adam([p for p in m.parameters() if p.requires_grad], lr=1e-2, eps=1e-4) for m in (g, d)]
    rng = torch.Generator().manual_seed(7)
    return fastgan.GANStep(g, d, latent=5, g_optimizer=adam[0], d_optimizer=adam[1], rng=rng, **options)


def batches(name: str):
    """[(real, z)] of all ranks together; each a list of one for every update of D."""
    draw = torch.Generator().manual_seed(3)
    size, updates = RANKS * PART, CASES[name][0].get("d_steps", 1)
    shapes = (size, 2, 6, 6), (size, 5)
    return [
        [[torch.randn(s, generator=draw, dtype=torch.float64) for _ in range(updates)] for s in shapes]
        for _ in range(STEPS)
    ]


def weights(step: fastgan.GANStep) -> torch.Tensor:
    """Every parameter of the networks and the average, in one row."""
    return torch.cat([p.detach().reshape(-1) for m in step.modules() for p in m.parameters()])


def train(name: str, world) -> dict:
    """The parameters after each step, and the running statistics of the discriminator."""
    step = step_of(name, seed=world.rank)  # a seed of its own: the copy makes the ranks equal
    world.copy_first(*step.modules())
    step.exchange = Exchange(world)
    mine = slice(world.rank * PART, (world.rank + 1) * PART)
    skip = lambda: torch.rand(PART, generator=step.rng, dtype=torch.float64)  # what the other rank draws
    found, drawn = [], CASES[name][0].get("penalty") == "wgan-gp"
    for real, z in batches(name):
        if drawn and world.rank:
            skip()
        step([x[mine] for x in real], z=[x[mine] for x in z])
        if drawn and not world.rank:
            skip()
        found.append(weights(step))
    return {"weights": torch.stack(found), "buffers": [b.clone() for b in step.discriminator.buffers()]}


def exchange(world) -> dict:
    """Gradients that only some ranks have."""
    p = [nn.Parameter(torch.zeros(2, 3)), nn.Parameter(torch.zeros(4)), nn.Parameter(torch.zeros(1))]
    p[0].grad = torch.arange(6.0).view(3, 2).t() * (world.rank + 1)
    if world.rank:
        p[1].grad = torch.full((4,), 8.0)
    average = Exchange(world)
    average.exchange(p)
    found = {"grads": [q.grad for q in p]}
    p[2].grad = torch.ones(1)
    try:
        average.exchange(p)
    except ValueError as error:
        found["late"] = str(error)
    try:
        world.require_same({"batch_size": 4, "data": f"folder-{world.rank}"})
    except ValueError as error:
        found["differ"] = str(error)
    return found | {"agreed": world.agree(("time", "interrupted")[world.rank]), "mean": world.mean({"a": world.rank})}


def synchronised(world) -> dict:
    """bn_act over ranks whose batches differ in size, and its first and second derivatives."""
    x, weight, bias, weights = parts_of_batch(world.rank)
    counted = {name: mock.patch.object(dist, name, wraps=getattr(dist, name)) for name in ("all_gather", "all_reduce")}
    with counted["all_gather"] as gathers, counted["all_reduce"] as sums:
        found = derivatives(x, weight, bias, weights, sync=True)
    found["collectives"] = gathers.call_count, sums.call_count
    try:
        synchronise(nn.Sequential(nn.BatchNorm3d(2)))
    except ValueError as error:
        found["declined"] = str(error)
    return found


def parts_of_batch(rank: int) -> list[torch.Tensor]:
    """x of a rank in two groups, weight and bias of all ranks, and what the loss weighs y by; a mean is 10^4."""
    draw = lambda seed, *shape: torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    shape = 2 * (2 + rank), 3, 2, 5
    far = torch.tensor([0.0, 1e4, -3.0], dtype=torch.float64).view(3, 1, 1)
    x = (draw(rank, *shape) + far).to(memory_format=torch.channels_last)
    return [x, draw(8, 3), draw(9, 3), draw(10 + rank, *shape)]


def derivatives(x, weight, bias, weights, **options) -> dict:
    """y, running statistics, and gradients of <weights, y> and of the square of its gradient."""
    leaves = [t.detach().clone().requires_grad_() for t in (x, weight, bias)]
    running = torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
    y = bn_act(leaves[0], *running, *leaves[1:], training=True, stat_groups=2, **options)
    first = torch.autograd.grad((y * weights).sum(), leaves, create_graph=True)
    second = torch.autograd.grad(first[0].square().sum(), leaves[:2])
    return {"y": y.detach(), "running": running, "first": [t.detach() for t in first], "second": second}


def runs(folder: Path, world) -> dict:
    """A run of six steps, and one that was stopped after three and goes on."""
    images = noise()
    straight = trainer(images, folder / "straight")
    straight.fit()
    trainer(images, folder / "resumed", TINY.replace(steps=3)).fit()
    resumed = trainer(images, None, resume=folder / "resumed")
    began = resumed.step
    resumed.fit()
    # What rank 0 alone follows, and running statistics, which are each rank's own while rank 0's are the run's.
    unlike = (".seconds", ".config", ".winners", ".ranks", *(() if world.first else (".guard",)))
    left, right = (
        {k: v for k, v in tensors(run.state()) if not k.startswith(unlike) and (world.first or "running_" not in k)}
        for run in (straight, resumed)
    )
    equal = lambda a, b: torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
    differ = sorted(left.keys() ^ right.keys()) or [k for k in left if not equal(left[k], right[k])]
    row = weights(resumed.train_step)
    images_used = resumed.batches._next_numbers()[0][resumed.batches._part]
    return {
        "differ": differ,
        "compared": len(left),
        "began": began,
        "weights": row,
        "next": images_used,
        "z": resumed.train_step.draw_latent(4),
    }


def decoded(folder: Path, world) -> dict:
    """A set that memory holds: who decodes it, and what each rank has."""
    os.environ.update(LOCAL_WORLD_SIZE=str(world.size), FASTGAN_CACHE=str(folder / "cache"))
    world.agree("")  # begin together
    with mock.patch.object(pixels, "decode_all", wraps=pixels.decode_all) as decoding:
        images = data.load(folder / "photos", image_size=8)
    return {"names": [name for call in decoding.call_args_list for name in call.args[0]], "images": images.images}


def read(folder: Path, world) -> dict:
    """For each other kind of samples: (files that this rank read, the samples), in the environment of `decoded`."""
    found = {}
    for kind in KINDS:
        files = counting(kind, setattr)
        world.agree("")
        samples = LOADERS[kind](folder / "sets" / kind)
        found[kind] = len(files), [part.values for part in parts_of(samples)]
    return found


def signalled(folder: Path, world) -> list:
    """A run whose last rank alone gets SIGTERM, after its first step: (reason, step, checkpoint)."""
    last = world.gather(os.getpid())[-1]

    def target(run) -> bool:
        if run.step == 1:  # the only one that is logged
            os.kill(last, signal.SIGTERM)
        return False

    result = trainer(noise(), folder / "signalled", TINY.replace(steps=500, log_every=1000), target=target).fit()
    return [result.reason, result.step, str(result.checkpoint)]


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    fastgan.racing(False)  # two runs that begin apart also race apart, and a loaded machine decides otherwise
    world = join()
    found = {name: train(name, world) for name in CASES}
    found |= {
        "exchange": exchange(world),
        "synchronised": synchronised(world),
        "runs": runs(folder, world),
        "signalled": signalled(folder, world),
        "decoded": decoded(folder, world),
        "read": read(folder, world),
        "world": (world.rank, world.size),
    }
    torch.save(found, folder / f"rank-{world.rank}.pt")
    leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
