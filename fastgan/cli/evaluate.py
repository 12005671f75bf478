"""``fastgan evaluate``: how far a run's pictures are from its training images."""

from __future__ import annotations

import argparse
import json

from fastgan import data
from fastgan.metrics import sliced_wasserstein
from fastgan.training import sampling
from fastgan.training.trainer import resolve_device

from .arguments import Commands, positive_int, seed


def add(commands: Commands) -> argparse.ArgumentParser:
    """Register the command."""
    parser = commands.add_parser(
        "evaluate",
        help="measure how far a run's pictures are from its training images",
        description="Sliced Wasserstein distance at each scale (Karras et al. 2018, times 1000) between pictures from "
        "a run's newest checkpoint and its training images; beside it that between two halves of the training images.",
    )
    parser.add_argument("--run", required=True, metavar="DIR", help="the run directory")
    parser.add_argument("--n", type=positive_int, default=1000, help="pictures of either kind (default 1000)")
    parser.add_argument("--data", metavar="NAME|PATH", help="compare with these (default: the run's own data)")
    parser.add_argument("--seed", type=seed, default=0, help="of latents and patches (default 0)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--device", metavar="D", default="auto", help="auto (default), cpu, cuda, cuda:1")
    return parser


def run(args: argparse.Namespace) -> int:
    """Measure and print."""
    generator, config = sampling.load_generator(args.run, device=resolve_device(args.device))
    recipe = config["recipe"]
    images = data.load(
        args.data or recipe["data"], image_size=recipe["image_size"], channels=recipe["channels"], limit=args.n
    )
    if len(images) < 2:
        raise ValueError(f"evaluate: there must be at least 2 images to compare with, got {len(images)}")
    real = images.images.float().div(127.5).sub(1)
    made = sampling.draw(generator, sampling.latents(len(real), recipe["latent"], seed=args.seed))
    half = len(real) // 2
    found = sliced_wasserstein(real, made, seed=args.seed)
    floor = sliced_wasserstein(real[::2][:half], real[1::2][:half], seed=args.seed)
    if args.json:
        print(json.dumps({"n": len(real), "sliced_wasserstein": found, "between_halves_of_the_images": floor}))
        return 0
    print(f"sliced Wasserstein distance x 1000, {len(real)} pictures of either kind (lower is nearer)")
    print("scale    pictures to images    between halves of the images")
    for side, distance in found.items():
        print(f"{side:5}    {distance:18.2f}    {floor[side]:28.2f}")
    return 0
