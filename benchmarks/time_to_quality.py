"""How long until a generator is good: the same recipe and images, tuned PyTorch against fastgan, evaluation included.

    python benchmarks/time_to_quality.py [--seeds 3] [--target 0.05] [--limit 60] [--json FILE] [--png FILE]

The recipe dcgan-28 with the settings of `make demo` at half width on the bundled Fashion-MNIST images. "PyTorch" is
the textbook loop over unconverted models in channels_last with fused Adam, in float32; "fastgan" is GANStep over
converted models in float32, "fastgan auto" the same in the precision that `fastgan train` takes by itself. All begin
with the same weights and see the same batches; their noise differs.

Measure      seconds of wall time until the averaged generator's kernel distance (Binkowski et al. 2018) to the images,
             on the features of fastgan's backbone "small" (`fastgan.metrics`), is below --target: 500 pictures of fixed
             latents against 500 images, every --every steps. Everything after the networks are built counts: the first
             steps with their proofs and races, and the evaluations.
Protocol     the arms of a seed take turns in going first. A run that is not there after --limit seconds is said to be
             above the limit and enters no mean. The networks begin at a distance of 1.8, two halves of the images are
             0.004 apart; runs of this size level off near 0.015. At 0.05 the nine runs take 4 minutes on 2 cores.
Limits       a small network and small images; the seeds are few, and their spread is in the output.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import facts
import torch
from torch import Tensor, nn

import fastgan
from fastgan.benchmarking.textbook import textbook_step
from fastgan.metrics import features, kernel_distance, load_backbone
from fastgan.training.assembly import assemble, precision_of
from fastgan.training.ema import EMA
from fastgan.training.recipes import Recipe
from fastgan.training.sampling import build_models, draw, latents

RECIPE = fastgan.recipes()["dcgan-28"].replace(
    model_options={"g_width": 32, "d_width": 32}, batch_size=32, g_lr=5e-4, d_lr=5e-4, betas=(0.5, 0.999), ema=0.995
)
COMPARED = 500  # pictures and images
SECONDS = "seconds to the target"

Arm = tuple[Callable[[Tensor], Any], nn.Module]  # a step, and the averaged generator that it moves


def plain(recipe: Recipe, networks: tuple[nn.Module, nn.Module]) -> Arm:
    """The textbook loop as PyTorch's users tune it."""
    g, d = (m.to(memory_format=torch.channels_last) for m in networks)
    rates: Any = dict(betas=recipe.betas, eps=recipe.adam_eps, fused=True)
    adams = [torch.optim.Adam(m.parameters(), lr, **rates) for m, lr in ((g, recipe.g_lr), (d, recipe.d_lr))]
    average = EMA(g, recipe.ema or 0.0)
    update = textbook_step(recipe.replace(ema=None), g, d, *adams)

    def step(real: Tensor) -> None:
        update([real])
        average.update(g)

    return step, average.module


def automatic(recipe: Recipe, networks: tuple[nn.Module, nn.Module]) -> Arm:
    """In bf16 where this machine is faster in it."""
    found = precision_of(recipe.replace(precision="auto"), torch.device("cpu"), networks)
    return ours(recipe.replace(precision=found.name), networks)


def ours(recipe: Recipe, networks: tuple[nn.Module, nn.Module]) -> Arm:
    """What `fastgan train` runs."""
    _, _, step = assemble(recipe, torch.device("cpu"), networks)
    if step.ema is None:
        raise ValueError("time to quality: the recipe must have an average")
    return step, step.ema


ARMS = {"PyTorch": plain, "fastgan": ours, "fastgan auto": automatic}


def train(
    arm: str, seed: int, options: argparse.Namespace, images: fastgan.data.ImageSet, real: Tensor
) -> dict[str, Any]:
    """One run: its curve [(seconds, steps, kernel distance)] and the seconds to the target, None above the limit."""
    recipe = RECIPE.replace(seed=seed)
    torch.manual_seed(seed)
    networks = build_models(recipe)
    batches = images.batches(recipe.batch_size, generator=torch.Generator().manual_seed(seed), channels_last=True)
    z, backbone = latents(COMPARED, recipe.latent, seed=1), load_backbone()
    torch.manual_seed(seed + 1)
    curve: list[tuple[float, int, float]] = []
    begin = time.perf_counter()
    step, average = ARMS[arm](recipe, networks)
    torch.manual_seed(seed + 1)
    steps, evaluating = 0, 0.0
    while True:
        step(next(batches)[0])
        steps += 1
        if steps % options.every:
            continue
        began = time.perf_counter()
        distance = kernel_distance(real, features(draw(average, z, batch=250), backbone))
        now = time.perf_counter()
        evaluating += now - began
        curve.append((now - begin, steps, distance))
        if distance < options.target or now - begin > options.limit:
            reached = now - begin if distance < options.target else None
            found = {"arm": arm, "seed": seed, "steps": steps, SECONDS: reached}
            return found | {"share of evaluation": evaluating / (now - begin), "curve": curve}


def run(options: argparse.Namespace) -> dict[str, Any]:
    images = fastgan.data.load(RECIPE.data)
    at = torch.linspace(0, len(images) - 1, COMPARED).round().long()
    real = features(images.images[at], load_backbone())
    runs: list[dict[str, Any]] = []
    results: dict[str, Any] = {
        "machine": facts.gather(" ".join(["python", *sys.argv])),
        "recipe": RECIPE.to_dict(),
        "target": options.target,
        "limit": options.limit,
        "images_compared": COMPARED,
        "auto": precision_of(RECIPE.replace(precision="auto"), torch.device("cpu")).name,
        "backbone": load_backbone().identity,
        "between_halves_of_the_images": kernel_distance(real[::2], real[1::2]),
        "times": runs,
    }
    for seed in range(options.seeds):
        for arm in list(ARMS)[:: 1 if seed % 2 == 0 else -1]:
            found = train(arm, seed, options, images, real)
            runs.append(found)
            took = f"{found[SECONDS]:.1f} s" if found[SECONDS] else f"above {options.limit:g} s"
            share = f"{100 * found['share of evaluation']:.0f} % of it evaluation"
            print(f"seed {seed}, {arm}: {took}, {found['steps']} steps, {share}", flush=True)
    results["machine"]["load_after"] = facts.load()
    results["verdict"] = verdict(runs, options)
    return results


def verdict(runs: list[dict[str, Any]], options: argparse.Namespace) -> str:
    """One sentence with means, spreads and the ratio of each seed."""
    by_arm = {arm: {r["seed"]: r[SECONDS] for r in runs if r["arm"] == arm} for arm in ARMS}
    all_there = [seed for seed in by_arm["PyTorch"] if all(found[seed] for found in by_arm.values())]
    if not all_there:
        return f"no seed reached a kernel distance of {options.target:g} in {options.limit:g} s in all arms"
    said = []
    for arm, found in by_arm.items():
        times = [found[seed] for seed in all_there]
        spread = f" (from {min(times):.1f} to {max(times):.1f})" if len(times) > 1 else ""
        ratios = [by_arm["PyTorch"][seed] / found[seed] for seed in all_there]
        each = f", {statistics.geometric_mean(ratios):.2f} times as fast ({', '.join(f'{r:.2f}' for r in ratios)})"
        said.append(f"{arm} takes {statistics.mean(times):.1f} s{spread}{each if arm != 'PyTorch' else ''}")
    seeds = f"{len(all_there)} of {options.seeds} seeds"
    return f"until a kernel distance of {options.target:g} over {seeds}, {'; '.join(said)}"


def plot(results: dict[str, Any], path: Path) -> None:
    """Kernel distance over seconds, a line a run."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    colours = {"PyTorch": "#8c8c8c", "fastgan": "#0072b2", "fastgan auto": "#d55e00"}
    figure, axes = pyplot.subplots(figsize=(6.4, 3.6), layout="constrained")
    for one in results["times"]:
        seconds, _, distances = zip(*one["curve"], strict=True)
        label = one["arm"] if one["seed"] == 0 else None
        axes.plot(seconds, distances, color=colours[one["arm"]], linewidth=1.2, label=label)
    axes.axhline(results["target"], color="black", linewidth=0.8, linestyle=":")
    axes.set(xlabel="seconds, evaluation included", ylabel="kernel distance", yscale="log")
    axes.legend(frameon=False)
    figure.savefig(path, dpi=110)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--target", type=float, default=0.05, help="kernel distance (default 0.05)")
    parser.add_argument("--every", type=int, default=50, help="steps between evaluations (default 50)")
    parser.add_argument("--limit", type=float, default=60.0, help="seconds a run (default 60: 6 minutes at most)")
    parser.add_argument("--json", type=Path, default=facts.ROOT / "benchmarks" / "results", help="a file or a folder")
    parser.add_argument("--png", type=Path, help="draw the curves (needs matplotlib)")
    options = parser.parse_args()
    if options.png and importlib.util.find_spec("matplotlib") is None:
        parser.error("--png needs matplotlib, which is not installed; pip install matplotlib")
    results = run(options)
    path = options.json
    path = path if path.suffix == ".json" else path / f"time-to-quality-{facts.file_name(results['machine'])}"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n")
    if options.png:
        plot(results, options.png)
    print(f"{results['verdict']}\nwritten: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
