"""Does training in bf16 on fastgan's kernels give pictures as good as plain float32 PyTorch? Several seeds of each.

    python benchmarks/quality.py [--seeds 5] [--steps 1000] [--json FILE] [--png FILE]

The recipe dcgan-28 at half width on the bundled Fashion-MNIST images, the same initial weights and the same batches for
both arms of a seed. "float32 PyTorch" is a textbook loop over unconverted models, in which no code of fastgan's ops
runs. "bf16 fastgan" is GANStep over converted models, precision bf16.

Measure      Frechet distance (Heusel et al. 2017, arXiv:1706.08500) between Gaussians fitted to the 64 features before
             the last layer of a small classifier, over 10,000 generated and the 10,000 real images. The classifier is
             trained here, on four fifths of the same images, always with the same seed; its accuracy on the last fifth
             is in the output. Lower is better. Both arms are measured in float32 by the plain modules.
Criterion    the exact permutation test of the difference of the two means over all splits of the runs into two groups;
             "within the spread of seeds" where its p-value is above 0.05.
Limits       features of a classifier of these images, not of Inception: numbers compare with each other and with no
             publication. It sees what tells garments apart and is blind to noise below that. A test that finds no
             difference does not show that there is none: the output says how large a difference two pooled standard
             errors are, below which these few seeds would show nothing.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import facts
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastgan
from fastgan.data import ImageSet, save_grid
from fastgan.training.ema import EMA
from fastgan.training.sampling import draw, latents

BATCH, LATENT, WIDTH = 64, 100, 32
RATE, BETAS, DECAY = 5e-4, (0.5, 0.999), 0.995  # those of `make demo`
GENERATED = 10_000
PICTURE_SEED = 0
CHANCE = 0.05


# ---- training --------------------------------------------------------------------------------------------------------


def networks(seed: int) -> tuple[nn.Module, nn.Module, list[torch.optim.Optimizer]]:
    torch.manual_seed(seed)
    pair = fastgan.models.build("dcgan-28", g_width=WIDTH, d_width=WIDTH)
    g, d = (m.to(memory_format=torch.channels_last) for m in pair)
    return g, d, [torch.optim.Adam(m.parameters(), RATE, BETAS, fused=True) for m in (g, d)]


def batches(images: ImageSet, seed: int) -> Any:
    return images.batches(BATCH, generator=torch.Generator().manual_seed(seed), channels_last=True)


def train_plain(images: ImageSet, seed: int, steps: int) -> nn.Module:
    """The averaged generator of the textbook loop in float32."""
    g, d, (g_adam, d_adam) = networks(seed)
    average = EMA(g, DECAY)
    ones, zeros = torch.ones(BATCH), torch.zeros(BATCH)
    bce = F.binary_cross_entropy_with_logits
    for real, _ in itertools.islice(batches(images, seed), steps):
        d_adam.zero_grad()
        fake = g(torch.randn(BATCH, LATENT))
        (bce(d(real), ones) + bce(d(fake.detach()), zeros)).backward()
        d_adam.step()
        g_adam.zero_grad()
        bce(d(fake), ones).backward()
        g_adam.step()
        average.update(g)
    return average.module


def train_fastgan(images: ImageSet, seed: int, steps: int) -> nn.Module:
    """The averaged generator of GANStep in bf16, its weights in a plain module."""
    g, d, (g_adam, d_adam) = networks(seed)
    plain = copy.deepcopy(g)
    step = fastgan.GANStep(
        fastgan.convert(g),
        fastgan.convert(d),
        latent=LATENT,
        g_optimizer=g_adam,
        d_optimizer=d_adam,
        ema=DECAY,
        precision="bf16",
    )
    for real, _ in itertools.islice(batches(images, seed), steps):
        step(real)
    plain.load_state_dict(step.ema.state_dict())  # type: ignore[union-attr]
    return plain


ARMS = {"float32 PyTorch": train_plain, "bf16 fastgan": train_fastgan}


# ---- the measure -----------------------------------------------------------------------------------------------------


class Classifier(nn.Module):
    """Images [N, 1, 28, 28] -> logits [N, 10]; `features` are the 64 numbers before the last layer."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 32, 5, 2, 2),
            nn.ReLU(),
            nn.Conv2d(32, 64, 5, 2, 2),
            nn.ReLU(),
            nn.Flatten(),
            nn.Dropout(0.3),
            nn.Linear(64 * 49, 64),
            nn.ReLU(),
        )
        self.last = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.last(self.features(x))
        return logits


def classifier(images: ImageSet, epochs: int = 10) -> tuple[Classifier, float]:
    """The classifier, trained on four fifths of the images, and its accuracy on the others."""
    torch.manual_seed(0)
    order = torch.randperm(len(images))
    split = 4 * len(images) // 5
    labels = images.labels
    if labels is None:
        raise ValueError("quality: the images must have labels, got none")
    network = Classifier()
    adam = torch.optim.Adam(network.parameters(), 1e-3)
    for _ in range(epochs):
        for chosen in order[:split][torch.randperm(split)].split(128):
            adam.zero_grad()
            F.cross_entropy(network(images.pick(chosen)), labels[chosen]).backward()
            adam.step()
    network.eval()
    with torch.no_grad():
        right = network(images.pick(order[split:])).argmax(1) == labels[order[split:]]
    return network, right.double().mean().item()


@torch.no_grad()
def moments(network: Classifier, x: Tensor) -> tuple[Tensor, Tensor]:
    """(mean, covariance) of the features, float64."""
    features = torch.cat([network.features(part) for part in x.split(500)]).double()
    return features.mean(0), torch.cov(features.T)


def frechet(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> float:
    """|mean_a - mean_b|^2 + tr(A + B - 2 (A B)^(1/2)), the trace of the root by the symmetric A^(1/2) B A^(1/2)."""
    (mean_a, cov_a), (mean_b, cov_b) = a, b
    values, vectors = torch.linalg.eigh(cov_a)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    return ((mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross).item()


# ---- the verdict -----------------------------------------------------------------------------------------------------


def permutation_p(a: Sequence[float], b: Sequence[float]) -> float:
    """Share of the splits of all values into groups of these sizes whose means differ by at least as much."""
    values, size = [*a, *b], len(a)
    total, seen = sum(values), abs(statistics.mean(a) - statistics.mean(b))
    splits = [sum(chosen) for chosen in itertools.combinations(values, size)]
    differences = [abs(s / size - (total - s) / (len(values) - size)) for s in splits]
    return sum(d >= seen * (1 - 1e-12) for d in differences) / len(splits)


def verdict(values: dict[str, list[float]]) -> dict[str, Any]:
    """Means, standard deviations, the test, and one sentence."""
    (first, a), (second, b) = values.items()
    difference = statistics.mean(b) - statistics.mean(a)
    error = (statistics.variance(a) / len(a) + statistics.variance(b) / len(b)) ** 0.5
    p = permutation_p(a, b)
    within = p > CHANCE
    said = "is within" if within else "is NOT within"
    return {
        "mean": {name: statistics.mean(v) for name, v in values.items()},
        "standard_deviation": {name: statistics.stdev(v) for name, v in values.items()},
        "difference": difference,
        "by_seed": [y - x for x, y in zip(a, b, strict=True)],
        "standard_error": error,
        "p": p,
        "within_spread": within,
        "sentence": f"{second} minus {first}: {difference:+.3f}, which {said} the spread of seeds (permutation test, "
        f"p = {p:.3f}); two standard errors are {2 * error:.3f}, a smaller difference would not be seen",
    }


def run(seeds: int, steps: int, png: Path | None) -> dict[str, Any]:
    images = fastgan.data.load("fashion-mnist")
    network, accuracy = classifier(images)
    everything = images.pick(torch.arange(len(images)))
    real = moments(network, everything)
    half = len(images) // 2
    z = latents(GENERATED, LATENT, seed=12345)
    results: dict[str, Any] = {
        "machine": facts.gather(" ".join(["python", *sys.argv])),
        "steps": steps,
        "batch": BATCH,
        "width": WIDTH,
        "classifier_accuracy": accuracy,
        "halves_of_the_real_images": frechet(moments(network, everything[:half]), moments(network, everything[half:])),
        "untrained": frechet(real, moments(network, draw(networks(PICTURE_SEED)[0], z))),
        "seeds": [],
        "frechet": {arm: [] for arm in ARMS},
        "seconds": {arm: [] for arm in ARMS},
    }
    print(f"classifier: {100 * accuracy:.1f} % of held-out images right", flush=True)
    pictures = []
    for seed in range(seeds):
        results["seeds"].append(seed)
        for arm, train in ARMS.items():
            begin = time.perf_counter()
            generator = train(images, seed, steps)
            results["seconds"][arm].append(time.perf_counter() - begin)
            made = draw(generator, z)
            results["frechet"][arm].append(frechet(real, moments(network, made)))
            print(f"seed {seed}, {arm}: Frechet distance {results['frechet'][arm][-1]:.3f}", flush=True)
            if seed == PICTURE_SEED:
                pictures.append(made[:64])
    if png is not None:
        side_by_side(pictures, png)
    results["machine"]["load_after"] = facts.load()
    results["verdict"] = verdict(results["frechet"]) if seeds > 1 else None
    return results


def side_by_side(pictures: list[Tensor], path: Path) -> None:
    """The arms' images of the same latents, eight columns each, with a white column between."""
    rows = [p.unflatten(0, (8, 8)) for p in pictures]
    gap = torch.ones_like(rows[0][:, :1])
    save_grid(torch.cat([rows[0], gap, rows[1]], 1).flatten(0, 1), path, columns=17)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--json", type=Path, default=facts.ROOT / "benchmarks" / "results", help="a file or a folder")
    parser.add_argument("--png", type=Path, default=facts.ROOT / "docs" / "images" / "quality.png")
    options = parser.parse_args()
    results = run(options.seeds, options.steps, options.png)
    path = options.json
    path = path if path.suffix == ".json" else path / f"quality-{facts.file_name(results['machine'])}"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n")
    if results["verdict"]:
        print(results["verdict"]["sentence"])
    print(f"written: {path} and {options.png} (the same latents; left to right: {', '.join(ARMS)})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
