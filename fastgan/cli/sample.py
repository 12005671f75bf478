"""``fastgan sample``: a grid of pictures from a run's newest checkpoint."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from fastgan import data
from fastgan._writing import target_of
from fastgan.data.memory import require
from fastgan.training import sampling
from fastgan.training.assembly import resolve_device

from .arguments import Commands, positive_float, positive_int, seed


def add(commands: Commands) -> argparse.ArgumentParser:
    """Register the command."""
    parser = commands.add_parser(
        "sample",
        help="draw pictures from a run",
        description="Write a grid of pictures drawn from a run's newest checkpoint.",
    )
    parser.add_argument("--run", required=True, metavar="DIR", help="the run directory")
    parser.add_argument("--n", type=positive_int, default=64, help="how many pictures (default 64)")
    parser.add_argument("--out", required=True, metavar="FILE.png")
    parser.add_argument("--columns", type=positive_int, help="pictures a row (default: a square)")
    parser.add_argument("--seed", type=seed, default=0, help="of the latents (default 0)")
    parser.add_argument("--label", metavar="NAME|K", help="one class of a conditional run (default: a row a class)")
    parser.add_argument("--best", action="store_true", help="the generator of the run's best evaluation")
    parser.add_argument(
        "--truncation",
        type=positive_float,
        metavar="T",
        help="cut latents to [-T, T]: less varied, more typical",
    )
    parser.add_argument("--device", metavar="D", default="auto", help="auto (default), cpu, cuda, cuda:1")
    return parser


def run(args: argparse.Namespace) -> int:
    """Write the grid."""
    if Path(args.out).suffix.lower() != ".png":
        raise ValueError(f"sample: --out must end in .png, got {args.out}")
    target_of(args.out)
    generator, config = sampling.load_generator(args.run, device=resolve_device(args.device), best=args.best)
    recipe, labels, columns = config["recipe"], None, args.columns
    if args.label is not None:
        require(8 * args.n, "cpu", f"labels: {args.n:,} numbers")
        labels = torch.full((args.n,), sampling.class_number(config, args.label))
    elif recipe.get("conditional"):
        labels, rows = sampling.class_rows(args.n, recipe["classes"])
        columns = columns or rows
    count = args.n if labels is None else len(labels)
    z = sampling.latents(count, recipe["latent"], seed=args.seed, truncation=args.truncation)
    data.save_grid(sampling.draw(generator, z, labels), args.out, columns=columns)
    print(f"{count} samples: {args.out}")
    return 0
