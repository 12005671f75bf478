"""Images a second of the whole DCGAN training step over batch size, image size and threads.

    python benchmarks/scaling.py [--seconds S] [--limit S] [--json FILE] [--png FILE]
    python benchmarks/scaling.py --from FILE.json [--png FILE]        # draws again what was measured
    python benchmarks/scaling.py --continue FILE.json [--limit S]     # measures what the limit left out, then draws

At every point four rows run in turns: PyTorch in channels_last with fused Adam, and fastgan, each in float32 and in
bf16. Medians are kept. A point whose throughput is more than a quarter below that of the next smaller batch is reported
as a cliff.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("FASTGAN_CACHE", tempfile.mkdtemp(prefix="fastgan-scaling-"))  # races are run anew

import facts
import torch
from bench_step import LATENT

import fastgan
from fastgan.benchmarking import timing
from fastgan.benchmarking.textbook import textbook_step

ROWS = {  # name -> (ours, bf16)
    "PyTorch": (False, False),
    "PyTorch bf16": (False, True),
    "fastgan": (True, False),
    "fastgan bf16": (True, True),
}
BATCHES = {2: (64, 1, 2, 4, 8, 16, 32, 128, 256, 512), 1: (64, 1, 4, 16, 256)}  # by threads; what matters most first
SIZES = (32, 128)  # beside 64, at batch 64
CLIFF = 0.75
ROUNDS = 3


def points() -> list[tuple[int, int, int]]:
    """(threads, image size, batch), in the order in which they are measured."""
    sizes = [(threads, size, 64) for threads in BATCHES for size in SIZES]
    batches = [[(threads, 64, batch) for batch in BATCHES[threads]] for threads in BATCHES]
    return [*batches[0][:-1], *sizes, *batches[1], batches[0][-1]]


def steps(size: int, batch: int) -> dict[str, Any]:
    """Row -> a whole training step, every row with its own copy of the same networks."""
    recipe = fastgan.recipes()["dcgan-64"]
    networks = fastgan.models.build("dcgan-64", image_size=size)
    images = torch.randn(batch, 3, size, size).clamp_(-1, 1).contiguous(memory_format=torch.channels_last)

    def made(ours: bool, bf16: bool) -> Any:
        g, d = (copy.deepcopy(m).to(memory_format=torch.channels_last) for m in networks)
        adams = [torch.optim.Adam(m.parameters(), 2e-4, (0.5, 0.999), fused=True) for m in (g, d)]
        if not ours:
            step = textbook_step(recipe.replace(precision="bf16" if bf16 else "fp32"), g, d, *adams)
            return lambda: step(images)
        step = fastgan.GANStep(
            fastgan.convert(g),
            fastgan.convert(d),
            latent=LATENT,
            g_optimizer=adams[0],
            d_optimizer=adams[1],
            precision="bf16" if bf16 else "fp32",
        )
        return lambda: step(images)

    return {name: made(*kind) for name, kind in ROWS.items()}


def measure(threads: int, size: int, batch: int, seconds: float) -> dict[str, Any]:
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    found = timing.interleave(steps(size, batch), seconds=seconds, warmup=1, rounds=ROUNDS)
    rates = {name: None if t.failed else batch / t.median for name, t in found.items()}
    return {
        "threads": threads,
        "size": size,
        "batch": batch,
        "images_per_second": rates,
        "samples_s": {name: t.samples for name, t in found.items()},
        "failed": {name: t.failed for name, t in found.items() if t.failed},
    }


def run(seconds: float, limit: float, earlier: dict[str, Any] | None = None) -> dict[str, Any]:
    """Every point that the limit leaves time for, but for those of an earlier run; those it does not are named."""
    results: dict[str, Any] = {"machine": facts.gather(" ".join(["python", *sys.argv])), "points": [], "left_out": []}
    if earlier:
        results |= {"machine": earlier["machine"], "points": earlier["points"]}
    done = {(p["threads"], p["size"], p["batch"]) for p in results["points"]}
    begin = time.perf_counter()
    for threads, size, batch in (p for p in points() if p not in done):
        left = limit - (time.perf_counter() - begin)
        if expected(results["points"], threads, size, batch) > left:
            results["left_out"].append({"threads": threads, "size": size, "batch": batch})
            continue
        point = measure(threads, size, batch, seconds)
        results["points"].append(point)
        print(line(point), flush=True)
    results["machine"]["load_after"] = facts.load()
    results["cliffs"] = cliffs(results["points"])
    return results


def expected(points: list[dict[str, Any]], threads: int, size: int, batch: int) -> float:
    """Seconds that a point takes at least, from the last one measured: its images by all rows, warm-up and rounds."""
    if not points:
        return 0.0
    last = points[-1]
    seconds = sum(statistics.median(s) for s in last["samples_s"].values() if s) / last["batch"]
    work = {32: 0.4, 64: 1.0, 128: 3.0}  # images of other sizes, about
    return seconds * last["threads"] / threads * work[size] / work[last["size"]] * batch * (ROUNDS + 2)


def line(point: dict[str, Any]) -> str:
    said = ", ".join(f"{k} {v:.0f}" if v else f"{k} failed" for k, v in point["images_per_second"].items())
    return f"threads {point['threads']}, {point['size']} px, batch {point['batch']}: images/s {said}"


def cliffs(points: list[dict[str, Any]]) -> list[str]:
    """One sentence a point that is more than a quarter slower than the next smaller batch of its row and threads."""
    found = []
    for threads, row in itertools.product(BATCHES, ROWS):
        series = curve(points, row, "batch", threads=threads, size=64)
        for (small, before), (batch, after) in itertools.pairwise(series):
            if after < CLIFF * before:
                drop = 100 * (1 - after / before)
                found.append(
                    f"{row}, {threads} threads: batch {batch} is {drop:.0f} % slower an image than batch {small}"
                )
    return found


def curve(points: list[dict[str, Any]], row: str, along: str, **fixed: int) -> list[tuple[int, float]]:
    """(value of `along`, images/s) of a row where the other coordinates are as fixed, in order."""
    matching = [p for p in points if all(p[name] == value for name, value in fixed.items())]
    return sorted((p[along], p["images_per_second"][row]) for p in matching if p["images_per_second"][row])


# ---- the picture ----------------------------------------------------------------------------------------------------

STYLE = {  # colour by library, line by precision
    "PyTorch": ("#8c8c8c", "-"),
    "PyTorch bf16": ("#8c8c8c", "--"),
    "fastgan": ("#0072b2", "-"),
    "fastgan bf16": ("#0072b2", "--"),
}


def draw(results: dict[str, Any], path: Path) -> None:
    """Four panels: over the batch and over the image size, with two threads and with one."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plot

    figure, axes = plot.subplots(2, 2, figsize=(10, 7), layout="constrained")
    for row, threads in enumerate(BATCHES):
        plural = "threads" if threads > 1 else "thread"
        panel(axes[row][0], results["points"], "batch", f"64 x 64 images, {threads} {plural}", threads=threads, size=64)
        panel(axes[row][1], results["points"], "size", f"batch 64, {threads} {plural}", threads=threads, batch=64)
        axes[row][0].set(ylim=(0, None), xlabel="batch size", ylabel="images/s of whole training steps")
        axes[row][1].set(yscale="log", xlabel="image side, pixels", ylabel="images/s (log)")
        for each in (axes[row][1].yaxis.set_major_formatter, axes[row][1].yaxis.set_minor_formatter):
            each(lambda x, _: f"{x:g}" if f"{x:.0e}"[0] in "125" else "")
    axes[0][0].legend(frameon=False)
    facts_ = results["machine"]
    figure.suptitle(
        f"DCGAN training step, {facts_['cpu']} x{facts_['cores']}, torch {facts_['torch']}, commit {facts_['commit']}",
        fontsize=10,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plot.close(figure)


def panel(axis: Any, points: list[dict[str, Any]], along: str, title: str, **fixed: int) -> None:
    values: set[int] = set()
    for row, (colour, dashes) in STYLE.items():
        series = curve(points, row, along, **fixed)
        values |= {x for x, _ in series}
        axis.plot(
            *zip(*series, strict=True), dashes, color=colour, marker="o", markersize=3, label=row
        ) if series else 0
    axis.set_xscale("log", base=2)
    axis.set_xticks(sorted(values), [str(v) for v in sorted(values)])
    axis.set_title(title, fontsize=10)
    axis.grid(True, color="#e5e5e5")
    axis.spines[["top", "right"]].set_visible(False)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=4.0, help="of rounds at each point; at least three rounds run")
    parser.add_argument("--limit", type=float, default=720.0, help="seconds in all; points that do not fit are named")
    parser.add_argument("--json", type=Path, default=facts.ROOT / "benchmarks" / "results", help="a file or a folder")
    parser.add_argument("--png", type=Path, default=None, help="docs/images/scaling-<machine>.png where not given")
    parser.add_argument("--from", dest="source", type=Path, help="draw the results of an earlier run")
    parser.add_argument("--continue", dest="earlier", type=Path, help="measure what an earlier run left out, into it")
    options = parser.parse_args()
    earlier = json.loads(options.earlier.read_text()) if options.earlier else None
    if options.source:
        results = json.loads(options.source.read_text())
    else:
        results = run(options.seconds, options.limit, earlier)
    for said in (*results["cliffs"], *(f"left out for want of time: {p}" for p in results["left_out"])):
        print(said)
    if not options.source:
        path = options.earlier or options.json
        path = path if path.suffix == ".json" else path / f"scaling-{facts.file_name(results['machine'])}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(results, indent=1) + "\n")
        print(f"written: {path}")
    png = options.png or facts.ROOT / "docs" / "images" / f"scaling-{facts.slug(results['machine'])}.png"
    try:
        draw(results, png)
    except ImportError as error:
        print(f"no picture: matplotlib must be installed (pip install matplotlib), got: {error}", file=sys.stderr)
        return 1
    print(f"written: {png}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
