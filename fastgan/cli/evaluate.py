"""``fastgan evaluate``: how far a run's pictures are from its training images."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastgan import data
from fastgan.choice import cache_dir
from fastgan.domains import Images, domain_of
from fastgan.metrics import Backbone, cached_features, compare, features, load_backbone, sliced_wasserstein
from fastgan.metrics.backbones import BACKBONES
from fastgan.training import sampling
from fastgan.training.assembly import resolve_device
from fastgan.training.recipes import Recipe

from .arguments import Commands, positive_int, seed


def add(commands: Commands) -> argparse.ArgumentParser:
    """Register the command."""
    parser = commands.add_parser(
        "evaluate",
        help="measure how far a run's pictures are from its training images",
        description="Frechet and kernel distance, precision, recall, density and coverage on a backbone's features, "
        "and the sliced Wasserstein distance at each scale (Karras et al. 2018, times 1000), between pictures from a "
        "run's newest checkpoint and its training images; beside each that between two halves of the training images.",
    )
    parser.add_argument("--run", required=True, metavar="DIR", help="the run directory")
    parser.add_argument("--n", type=positive_int, default=1000, help="pictures of either kind (default 1000)")
    parser.add_argument("--data", metavar="NAME|PATH", help="compare with these (default: the run's own data)")
    parser.add_argument("--backbone", choices=BACKBONES, default="small", help="whose features (default small)")
    parser.add_argument("--weights", metavar="FILE", help="Inception's weights, with --backbone inception")
    parser.add_argument("--best", action="store_true", help="the generator of the run's best evaluation")
    parser.add_argument("--seed", type=seed, default=0, help="of latents and patches (default 0)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--device", metavar="D", default="auto", help="auto (default), cpu, cuda, cuda:1")
    return parser


def run(args: argparse.Namespace) -> int:
    """Measure and print."""
    if args.weights and args.backbone != "inception":
        raise ValueError(
            f"evaluate: --weights goes with --backbone inception, got {args.backbone}; leave --weights out"
        )
    generator, config = sampling.load_generator(args.run, device=resolve_device(args.device), best=args.best)
    found = _measured(args, generator, config)
    print(json.dumps(found) if args.json else _text(found) if "features" in found else _scores(found))
    return 0


def _measured(args: argparse.Namespace, generator: nn.Module, config: dict[str, Any]) -> dict[str, Any]:
    """All distances between pictures from latents and images; of any other domain what its judge scores."""
    recipe = config["recipe"]
    domain = domain_of(Recipe.from_dict(recipe if args.data is None else {**recipe, "data": args.data}))
    if not isinstance(domain, Images):
        samples = domain.load(torch.device("cpu"))
        judge = domain.judge(domain.hold_out(samples, domain.recipe.held_out)[1] or samples)
        if judge is None:
            raise ValueError(f"evaluate: {domain.name} must have a measure, they have none")
        count = min(args.n, judge.available)
        scores = judge.score(judge.make(generator, count), count)
        return {"n": count, "by": judge.identity, "scores": scores}
    images = data.load(
        args.data or recipe["data"],
        image_size=recipe["image_size"],
        channels=recipe["channels"],
        limit=args.n,
        labels=None if args.data else recipe.get("labels"),
    )
    if len(images) < 2:
        raise ValueError(f"evaluate: there must be at least 2 images to compare with, got {len(images)}")
    backbone = load_backbone(args.backbone, weights=args.weights)
    z = sampling.latents(len(images), recipe["latent"], seed=args.seed)
    made = sampling.draw(generator, z, _labels(images, recipe))
    return {
        "n": len(images),
        "generator": "averaged" if Recipe.from_dict(recipe).averaged else "as trained",
        **_by_features(images.images, made, backbone),
        **_by_pixels(images.images.float().div(127.5).sub(1), made, args.seed),
    }


def _scores(found: dict[str, Any]) -> str:
    lines = [f"{found['n']} samples; {found['by']}", *(f"{k:9}    {v:.4f}" for k, v in found["scores"].items())]
    return "\n".join(lines)


def _labels(images: data.ImageSet, recipe: dict[str, Any]) -> Tensor | None:
    """The images' own classes for a conditional generator; all in turn where they are not those of the run."""
    classes = recipe.get("classes", 0)
    if not classes:
        return None
    same = images.labels is not None and len(images.classes or []) == classes
    return images.labels if same else torch.arange(len(images)) % classes


def _by_features(real: Tensor, made: Tensor, backbone: Backbone) -> dict[str, Any]:
    """The distances between features, what they depend on, and their floor."""
    a = cached_features(real, backbone, Path(cache_dir()) / "features")
    half = len(a) // 2
    return {
        "backbone": backbone.identity,
        "features": compare(a, features(made, backbone)),
        # two images have halves of one, which have no covariance
        "features_between_halves": compare(a[::2][:half], a[1::2][:half]) if half > 1 else {},
    }


def _by_pixels(real: Tensor, made: Tensor, seed: int) -> dict[str, Any]:
    half = len(real) // 2
    return {
        "sliced_wasserstein": sliced_wasserstein(real, made, seed=seed),
        "between_halves_of_the_images": sliced_wasserstein(real[::2][:half], real[1::2][:half], seed=seed),
    }


def _text(found: dict[str, Any]) -> str:
    n, floor = found["n"], found["features_between_halves"]
    lines = [
        f"{n} pictures of the generator ({found['generator']}) against {n} images; "
        f"beside it two halves of the images, {n // 2} each",
        f"features of {found['backbone']}; kernel distance over all pairs, precision and recall with k=3, density and "
        "coverage with k=5",
        "metric       pictures to images    between halves of the images",
    ]
    for name, value in found["features"].items():
        beside = f"{floor[name]:28.4f}" if name in floor else f"{'too few images':>28}"
        lines.append(f"{name:9}    {value:18.4f}    {beside}")
    lines += [
        "frechet falls as N grows: the halves have half the N",
        "",
        "sliced Wasserstein distance x 1000 (lower is nearer)",
        "scale        pictures to images    between halves of the images",
    ]
    for side, distance in found["sliced_wasserstein"].items():
        lines.append(f"{side:<9}    {distance:18.2f}    {found['between_halves_of_the_images'][side]:28.2f}")
    return "\n".join(lines)
