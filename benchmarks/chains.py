"""Chains of layers, from one image of 8 x 8 pixels up: the converted chain beside PyTorch's better layout.

    python benchmarks/chains.py                       # this machine's own instructions, about 2 minutes
    python benchmarks/chains.py --table avx2          # both held to AVX2

A layer is convolution 3 x 3, batch norm, LeakyReLU. Seven chains are chosen, small ones first, where time between
kernels is all there is; fourteen are drawn at random. Each runs in one thread, in eval mode and in training (forward
and backward), in both layouts, in turns; figures are minima. Results go into benchmarks/results, and `make evidence`
makes the page of them.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import random
import sys
import tempfile
from collections.abc import Callable
from typing import Any

os.environ.setdefault("FASTGAN_CACHE", tempfile.mkdtemp(prefix="fastgan-chains-"))

import facts
import torch
from torch import Tensor, nn

import fastgan
from fastgan.benchmarking import table
from fastgan.benchmarking.timing import interleave

CHOSEN = [  # channels, side, batch, layers
    (8, 8, 1, 1),
    (8, 8, 1, 3),
    (4, 4, 1, 6),
    (16, 14, 8, 2),
    (32, 16, 4, 1),
    (48, 7, 4, 2),
    (64, 32, 8, 1),
]
DRAWN = 14
SECONDS = 0.2  # a candidate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", help="hold fastgan and PyTorch to one instruction set, as avx2")
    args = parser.parse_args()
    if args.table:
        table.hold(args.table)
    torch.set_num_threads(1)
    machine = facts.gather("python " + " ".join(sys.argv))
    path = facts.ROOT / "benchmarks" / "results" / f"chains-{facts.slug(machine)}.json"
    rng = random.Random(0)
    sides, batches = range(4, 29), (1, 2, 4, 8, 16, 32)
    drawn = [(rng.randrange(4, 49), rng.choice(sides), rng.choice(batches), rng.randrange(1, 5)) for _ in range(DRAWN)]
    rows = []
    for sizes in [*CHOSEN, *drawn]:
        for training in (False, True):
            rows.append(measured(*sizes, training))
            print(*sizes, "training" if training else "eval", *(f"{1e6 * s:.0f}" for s in rows[-1]["seconds"].values()))
    results = {"machine": {**machine, "load_after": facts.load()}, "chains": rows}
    path.write_text(json.dumps(results, indent=1) + "\n")


def measured(channels: int, side: int, batch: int, layers: int, training: bool) -> dict[str, Any]:
    torch.manual_seed(0)
    modules: list[nn.Module] = []
    for _ in range(layers):
        modules += [nn.Conv2d(channels, channels, 3, 1, 1), nn.BatchNorm2d(channels), nn.LeakyReLU(0.2)]
    plain = nn.Sequential(*modules).train(training)
    ours = fastgan.convert(copy.deepcopy(plain))
    x = torch.randn(batch, channels, side, side)
    images = {"NCHW": x, "channels_last": x.to(memory_format=torch.channels_last)}
    runners = {
        f"{who} {layout}": runner(model, image, training)
        for who, model in (("torch", plain), ("fastgan", ours))
        for layout, image in images.items()
    }
    found = interleave(runners, seconds=SECONDS * len(runners))
    sizes = {"channels": channels, "side": side, "batch": batch, "layers": layers, "training": training}
    return {**sizes, "seconds": {name: timing.min for name, timing in found.items()}}


def runner(model: nn.Module, image: Tensor, training: bool) -> Callable[[], object]:
    def forward() -> object:
        with torch.no_grad():
            return model(image)

    return (lambda: model(image).sum().backward()) if training else forward


if __name__ == "__main__":
    main()
