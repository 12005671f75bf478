"""``fastgan translate``: pictures from pictures, or sounds from their spectrograms, by a run's generator."""

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
from fastgan._writing import atomic_file, target_of
from fastgan.data.decode import decode_all, quiet_decoding
from fastgan.data.files import Files, plural
from fastgan.data.loading import open_source
from fastgan.data.pairs import MADE, made_from
from fastgan.data.sounds import each_sound, save_wav
from fastgan.domains import domain_of
from fastgan.domains.pairs import Translating, normalised
from fastgan.domains.vocoder import Vocoder
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
        help="make pictures from a folder's pictures, or its sounds again",
        description="Translate every picture of a folder by the generator of a run's newest checkpoint; the centre "
        "square of each is resized to the run's size. A vocoder's run makes every sound again from its spectrogram. A "
        "file that cannot be read is named and left out.",
    )
    parser.add_argument(
        "--run", required=True, metavar="DIR", help="the run directory, of pix2pix, cyclegan or a vocoder"
    )
    parser.add_argument(
        "--input", required=True, metavar="FOLDER", help="a folder or a zip of pictures; a folder or a file of sounds"
    )
    parser.add_argument("--out", required=True, metavar="FOLDER", help="where files of the same names go, PNG or WAV")
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
    if not isinstance(domain, Translating | Vocoder):
        raise ValueError(f"translate: {args.run} must make pictures from pictures or sounds, {recipe.name} does not")
    if out.exists() and not out.is_dir():
        raise ValueError(f"translate: --out must be a folder, {out} is a file")
    if out.resolve() == (source.parent if source.suffix == ".wav" else source).resolve():
        raise ValueError(f"translate: --out must not be the folder of the input, which would be lost, got {args.out}")
    target_of(out / "picture.png")
    if isinstance(domain, Vocoder):
        return _sounds(args, domain, source)
    opened = open_source(source) if source.exists() else None
    if not isinstance(opened, Files):
        raise ValueError(f"translate: --input must be a folder or a zip of pictures, got {args.input}")
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


def _sounds(args: argparse.Namespace, domain: Vocoder, source: Path) -> int:
    """Write a .wav for each sound that can be read, made from its spectrogram; 1 where none could."""
    for option in ("direction", "made"):
        if getattr(args, option) is not None:
            raise ValueError(f"translate: --{option} must be left out, {domain.recipe.name} makes sounds again")
    if not source.exists():
        raise ValueError(f"translate: --input must be a folder of sounds, or one, got {args.input}")
    generator, _ = sampling.load_generator(args.run, device=resolve_device(args.device), best=args.best)
    remarks: list[tuple[str, str]] = []
    names: set[str] = set()
    rate = int(domain.option["rate"])
    for of, sound in each_sound(str(source), rate, remarks):
        names.add(name := _name(of, names, ".wav"))
        with atomic_file(Path(args.out) / name) as file:
            save_wav(domain.made_again(generator, torch.from_numpy(sound)), rate, file)
    for name, what in remarks:
        print(f"{name}: {what}", file=sys.stderr)
    print(f"{plural(len(names), 'sound')}: {args.out}")
    return 0 if names else 1


def _name(name: str, taken: set[str], suffix: str = ".png") -> str:
    """The input's name with another suffix; beside another input of that stem its own suffix stays in it."""
    plain = str(PurePosixPath(name).with_suffix(suffix))
    return plain if plain not in taken else f"{name}{suffix}"
