"""Where the memory of a DCGAN-64 training step goes, in float32 at batch 64: PyTorch's and fastgan's, tensor by tensor.

    python benchmarks/memory.py
    python benchmarks/memory.py --batch 128
    python benchmarks/memory.py --turns     # D's halves in turn beside one batch of both: time and memory, 4 minutes

Both are tuned as in bench_step.py. Sizes are exact and repeat; a busy machine does not change them. Times need a quiet
one.
"""

from __future__ import annotations

import argparse
import copy
import functools
import os
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable

os.environ.setdefault("FASTGAN_CACHE", tempfile.mkdtemp(prefix="fastgan-memory-"))

import torch
from bench_step import LATENT
from layers import BATCH
from torch import Tensor

import fastgan
from fastgan.benchmarking.textbook import textbook_step
from fastgan.choice import native
from fastgan.training.assembly import assemble

SMALLEST = 500_000  # bytes: smaller blocks are left out of the tables
TURNS = (  # model, batch, precision
    *(("dcgan-64", batch, "fp32") for batch in (16, 32, 64, 128, 256)),
    *(("dcgan-64", batch, "bf16") for batch in (64, 256)),
    ("fastgan", 128, "fp32"),
)
SECONDS = 12.0  # of a case of TURNS
Step = Callable[[], object]


def steps(batch: int) -> dict[str, tuple[Step, set[int]]]:
    """Name -> (a whole step, the addresses of its parameters)."""
    torch.manual_seed(0)
    networks = fastgan.models.build("dcgan-64")
    images = torch.randn(batch, 3, 64, 64).contiguous(memory_format=torch.channels_last)

    def made(ours: bool, **options: bool) -> tuple[Step, set[int]]:
        g, d = (copy.deepcopy(m).to(memory_format=torch.channels_last) for m in networks)
        adams = [torch.optim.Adam(m.parameters(), 2e-4, (0.5, 0.999), fused=True) for m in (g, d)]
        addresses = {p.data_ptr() for m in (g, d) for p in m.parameters()}
        if not ours:
            step = textbook_step(fastgan.recipes()["dcgan-64"], g, d, *adams)
        else:
            g, d = fastgan.convert(g), fastgan.convert(d)
            step = fastgan.GANStep(g, d, latent=LATENT, g_optimizer=adams[0], d_optimizer=adams[1], **options)
        return (lambda: step(images)), addresses

    ways = {"PyTorch": made(False), "fastgan, in turn": made(True, low_memory=True)}
    return ways | {"fastgan, one batch": made(True, low_memory=False)}


def at_the_peak(run: Step) -> tuple[int, list[str], Counter[int]]:
    """(bytes at the worst moment, the ops that run then, how many blocks of each size are live then)."""
    cpu = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=cpu, profile_memory=True, acc_events=True) as profile:
        run()
    events = profile.profiler.kineto_results.events()  # type: ignore[union-attr]
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    level = peak = moment = 0
    for when, change in changes:
        level += change
        if level > peak:
            peak, moment = level, when
    live: Counter[int] = Counter()
    for when, change in changes:
        if when <= moment:
            live[abs(change)] += 1 if change > 0 else -1
    running = [
        e.name() for e in events if e.name() != "[memory]" and e.start_ns() <= moment <= e.start_ns() + e.duration_ns()
    ]
    return peak, running, live


def saved(run: Step, parameters: set[int]) -> list[tuple[int, int, tuple[int, ...]]]:
    """(bytes, how many graph nodes keep it, shape) of every tensor that a step saves for its backward passes."""
    found: dict[int, tuple[Tensor, int]] = {}

    def pack(t: Tensor) -> Tensor:
        key = t.untyped_storage().data_ptr()
        if key not in parameters:
            found[key] = (t, found.get(key, (t, 0))[1] + 1)  # holding t keeps its address from being used again
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        run()
    return sorted(((t.nbytes, times, tuple(t.shape)) for t, times in found.values()), reverse=True)


def turns() -> int:
    """Whole steps with D's halves in turn and as one batch, alternating."""
    for name, batch, precision in TURNS:
        recipe = fastgan.recipes()[name]
        images = torch.randn(batch, recipe.channels, recipe.image_size, recipe.image_size)
        images = images.contiguous(memory_format=torch.channels_last)
        steps = []
        for low_memory in (False, True):
            torch.manual_seed(0)
            chosen = recipe.replace(precision=precision, low_memory=low_memory)
            steps.append(assemble(chosen, torch.device("cpu"))[2])
        for step in 3 * steps:  # races, Adam's state
            step(images)
        seconds: list[list[float]] = [[], []]
        end, first = time.monotonic() + SECONDS, 0
        while time.monotonic() < end:
            for i in (first, 1 - first):
                begin = time.perf_counter()
                steps[i](images)
                seconds[i].append(time.perf_counter() - begin)
            first = 1 - first
        best, usual = ([f(s) for s in seconds] for f in (min, statistics.median))
        peaks = [megabytes(at_the_peak(functools.partial(step, images))[0]) for step in steps]
        speed = f"{best[0] / best[1]:.2f} by minimum, {usual[0] / usual[1]:.2f} by median"
        print(f"{name}, {precision}, batch {batch}: in turn {speed} times as fast; {peaks[0]}, in turn {peaks[1]}")
    return 0


def megabytes(count: float) -> str:
    return f"{count / 1e6:.2f} MB"


def main() -> int:
    module, _ = native()
    torch.set_num_threads(2)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=BATCH)
    parser.add_argument("--turns", action="store_true", help="times instead, at several batches")
    args = parser.parse_args()
    if args.turns:
        return turns()
    for name, (run, parameters) in steps(args.batch).items():
        run(), run()  # races, Adam's state
        if module is not None:
            module.scratch_highest(True)
        peak, running, live = at_the_peak(run)
        kept = saved(run, parameters)
        print(f"{name}: {megabytes(peak)} at the worst moment, in {', '.join(running[:3])}; live then:")
        for size, blocks in sorted(live.items(), reverse=True):
            if blocks > 0 and size >= SMALLEST:
                print(f"  {blocks} x {megabytes(size)}")
        print(f"  saved for backward, {megabytes(sum(size for size, *_ in kept))} in all, over both updates:")
        for size, times, shape in kept:
            if size >= SMALLEST:
                print(f"    {megabytes(size)} {list(shape)}, by {times} nodes")
        if name != "PyTorch" and module is not None:
            print(f"  scratch of the CPU kernels, held at most: {megabytes(module.scratch_highest())}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
