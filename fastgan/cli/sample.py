"""``fastgan sample``: a grid of pictures from a run's newest checkpoint."""

from __future__ import annotations

import argparse
from typing import Any

from fastgan.domains import domain_of
from fastgan.training import sampling
from fastgan.training.assembly import resolve_device
from fastgan.training.recipes import Recipe
from fastgan.training.rundir import RunDirectory

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
    parser.add_argument("--out", metavar="FILE", help="where to; lines of text are printed without it")
    parser.add_argument("--columns", type=positive_int, help="pictures a row (default: a square)")
    parser.add_argument("--seed", type=seed, default=0, help="of the latents (default 0)")
    parser.add_argument("--label", metavar="NAME|K", help="one class of a conditional run (default: a row a class)")
    parser.add_argument("--best", action="store_true", help="the generator of the run's best evaluation")
    parser.add_argument(
        "--truncation",
        type=positive_float,
        metavar="T",
        help="less varied, more typical: latents cut to [-T, T]; with stylegan2-small, styles at T times their "
        "distance from the mean style",
    )
    parser.add_argument("--device", metavar="D", default="auto", help="auto (default), cpu, cuda, cuda:1")
    return parser


def run(args: argparse.Namespace) -> int:
    """Write the samples."""
    recipe = Recipe.from_dict(RunDirectory(args.run).read_config()["recipe"])
    domain = domain_of(recipe)
    domain.check_out(args.out)
    generator, config = sampling.load_generator(args.run, device=resolve_device(args.device), best=args.best)
    options: Any = dict(seed=args.seed, label=args.label, truncation=args.truncation)
    made, columns = domain.sample(generator, config, args.n, **options)
    domain.save(made, args.out, args.columns or columns)
    if args.out is not None:
        print(f"{len(made)} samples: {args.out}")
    return 0
