"""``fastgan translate``: pictures from pictures, by a run's generator."""

from __future__ import annotations

import argparse
import itertools
import sys
from contextlib import closing
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from torch import nn

from fastgan import data
from fastgan._writing import target_of
from fastgan.data.decode import decode_all, quiet_decoding
from fastgan.data.files import Files, plural
from fastgan.data.loading import open_source
from fastgan.data.pairs import MADE, made_from
from fastgan.domains import domain_of
from fastgan.domains.pairs import Translating, normalised
from fastgan.training import sampling
from fastgan.training.assembly import resolve_device
from fastgan.training.recipes import Recipe
from fastgan.training.rundir import RunDirectory

from .arguments import Commands

BATCH = 16


def add(commands: Commands) -> argparse.ArgumentParser:
    """Register the command."""
    parser = commands.add_parser(
        "translate",
        help="make pictures from a folder's pictures",
        description="Translate every picture of a folder by the generator of a run's newest checkpoint; the centre "
        "square of each is resized to the run's size. A file that cannot be read is named and left out.",
    )
    parser.add_argument("--run", required=True, metavar="DIR", help="the run directory, of pix2pix or cyclegan")
    parser.add_argument("--input", required=True, metavar="FOLDER", help="a folder or a zip of pictures")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="where pictures of the same names go, as PNG")
    parser.add_argument(
        "--direction",
        choices=("ab", "ba"),
        help="from a to b or from b to a (default: as the run was trained, else ab)",
    )
    parser.add_argument(
        "--made", choices=tuple(MADE), help="make the input from each picture, as a run's pairs are made"
    )
    parser.add_argument("--best", action="store_true", help="the generator of the run's best evaluation")
    parser.add_argument("--device", metavar="D", default="auto", help="auto (default), cpu, cuda, cuda:1")
    return parser


def run(args: argparse.Namespace) -> int:
    """Translate, and say what was left out; 1 where nothing could be read."""
    recipe = Recipe.from_dict(RunDirectory(args.run).read_config()["recipe"])
    domain, source, out = domain_of(recipe), Path(args.input).expanduser(), Path(args.out)
    if not isinstance(domain, Translating):
        raise ValueError(f"translate: {args.run} must make pictures from pictures, {recipe.name} does not")
    opened = open_source(source) if source.exists() else None
    if not isinstance(opened, Files):
        raise ValueError(f"translate: --input must be a folder or a zip of pictures, got {args.input}")
    if out.exists() and not out.is_dir():
        raise ValueError(f"translate: --out must be a folder, {out} is a file")
    target_of(out / "picture.png")
    generator, _ = sampling.load_generator(args.run, device=resolve_device(args.device), best=args.best)
    network, channels = domain.translator(generator, args.direction)
    with closing(opened) as files:
        if not files.names:
            raise ValueError(f"translate: --input must hold pictures, {source} has {files.found()}")
        written = _translate(files, network, out, recipe.image_size, channels, args.made)
        for name, why in sorted(files.skipped):
            print(f"{name}: {why}", file=sys.stderr)
    left = f", {plural(len(files.skipped), 'file')} left out" if files.skipped else ""
    print(f"{plural(written, 'picture')}: {out}{left}")
    return 0 if written else 1


def _translate(files: Files, network: nn.Module, out: Path, size: int, channels: int, made: str | None) -> int:
    """Write a PNG for each picture that can be read; how many."""
    names: set[str] = set()
    with quiet_decoding():
        pictures = decode_all(files.names, files.open, size, 3 if made else channels)
        while some := list(itertools.islice(pictures, BATCH)):
            readable = {picture.name: picture.pixels for picture in some if picture.pixels is not None}
            for picture in some:
                if picture.pixels is None:
                    files.skip(picture.name, picture.reason)
            if not readable:
                continue
            sources = torch.from_numpy(np.stack(list(readable.values())).transpose(0, 3, 1, 2))
            sources = made_from(sources, made, channels) if made else sources
            drawn = sampling.draw(network, normalised(sources), batch=BATCH)
            for of, image in zip(readable, drawn, strict=True):
                names.add(name := _name(of, names))
                data.save_grid(image[None], out / name, padding=0)
    return len(names)


def _name(name: str, taken: set[str]) -> str:
    """The input's name as a PNG; beside another input of that stem its suffix stays in it."""
    plain = str(PurePosixPath(name).with_suffix(".png"))
    return plain if plain not in taken else f"{name}.png"
