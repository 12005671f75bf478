"""Memory of an R1 step's attention (forward, backward, double backward) by the number of keys, ours and the plain form.

    python benchmarks/attention_memory.py [--picture docs/images/attention-memory.png] [--plain-to 4096]

Each point is a process of its own: the highest resident memory less what the process held before its first call.
float32, one sample, 4 heads of 64.
"""

from __future__ import annotations

import argparse
import math
import resource
import subprocess
import sys
import time

LENGTHS = (256, 512, 1024, 2048, 4096, 8192, 16384)


def step(way: str, length: int) -> None:
    """Prints the MiB and the seconds of one step."""
    import torch

    import fastgan

    def plain(q, k, v):
        return torch.softmax(q @ k.mT / math.sqrt(q.shape[-1]), -1) @ v

    fastgan.backend("native")
    run = plain if way == "plain" else fastgan.functional.scaled_dot_product_attention

    def once(length: int) -> None:
        q, k, v = (torch.randn(1, 4, length, 64, requires_grad=True) for _ in range(3))
        first = torch.autograd.grad(run(q, k, v).square().sum(), (q, k, v), create_graph=True)
        torch.autograd.grad(sum(g.square().sum() for g in first), (q, k, v))

    once(16)  # libraries and threads
    before, begin = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    once(length)
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024, time.perf_counter() - begin)


def measured(way: str, length: int) -> tuple[float, float]:
    command = [sys.executable, __file__, "--one", way, str(length)]
    mebibytes, seconds = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    return float(mebibytes), float(seconds)


def draw(found: dict[str, dict[int, float]], path: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plot

    figure, axes = plot.subplots(figsize=(6, 4), constrained_layout=True)
    for way, points in found.items():
        axes.plot(list(points), list(points.values()), marker="o", label=way)
    axes.set(xscale="log", yscale="log", xlabel="keys", ylabel="MiB of a step to second order")
    axes.set_xticks(LENGTHS, [str(n) for n in LENGTHS])
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--one", nargs=2, metavar=("WAY", "LENGTH"))
    parser.add_argument("--picture")
    parser.add_argument("--plain-to", type=int, default=4096)
    options = parser.parse_args()
    if options.one:
        step(options.one[0], int(options.one[1]))
        return
    found: dict[str, dict[int, float]] = {"fastgan": {}, "plain": {}}
    print(f"{'keys':>6} {'fastgan MiB':>12} {'s':>7} {'plain MiB':>12} {'s':>7}")
    for length in LENGTHS:
        row = f"{length:6}"
        for way, points in found.items():
            if way == "fastgan" or length <= options.plain_to:
                points[length], seconds = measured(way, length)
                row += f" {points[length]:12.1f} {seconds:7.2f}"
        print(row, flush=True)
    if options.picture:
        draw(found, options.picture)


if __name__ == "__main__":
    main()
