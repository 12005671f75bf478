"""Where the memory of a DCGAN-64 training step goes, in float32 at batch 64: PyTorch's and fastgan's, tensor by tensor.

    python benchmarks/memory.py

Both are tuned as in bench_step.py. Sizes are exact and repeat; a busy machine does not change them.
"""

from __future__ import annotations

import copy
import os
import sys
import tempfile
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

SMALLEST = 500_000  # bytes: smaller blocks are left out of the tables
Step = Callable[[], object]


def steps() -> dict[str, tuple[Step, set[int]]]:
    """Name -> (a whole step, the addresses of its parameters)."""
    torch.manual_seed(0)
    networks = fastgan.models.build("dcgan-64")
    images = torch.randn(BATCH, 3, 64, 64).contiguous(memory_format=torch.channels_last)

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

    ways = {"PyTorch": made(False), "fastgan": made(True)}
    return ways | {"fastgan, low_memory": made(True, low_memory=True)}


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


def megabytes(count: float) -> str:
    return f"{count / 1e6:.2f} MB"


def main() -> int:
    module, _ = native()
    torch.set_num_threads(2)
    for name, (run, parameters) in steps().items():
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
