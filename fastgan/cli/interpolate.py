"""``fastgan interpolate``: walks through a run's latent space, as gif, mp4, or png with a row a walk."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastgan import data
from fastgan._writing import atomic_file, target_of
from fastgan.data.decode import decode, reason
from fastgan.data.films import require_ffmpeg, save_mp4
from fastgan.data.memory import require
from fastgan.domains import Domain, Images, domain_of
from fastgan.training import sampling
from fastgan.training.assembly import resolve_device
from fastgan.training.latent import PICTURES, class_directions, principal_directions, project
from fastgan.training.nearest import nearest_images
from fastgan.training.recipes import Recipe

from .arguments import Commands, positive_int, seed

COMPARED = 2000  # images whose classes pictures are given
_FPS = 20
_TILE = 96  # pixels that a picture is enlarged to at least, in whole factors


def add(commands: Commands) -> argparse.ArgumentParser:
    """Register the command."""
    parser = commands.add_parser(
        "interpolate",
        help="walk through a run's latent space",
        description="Walk through a run's latent space: a gif, an mp4, or a png with a row a walk.",
    )
    parser.add_argument("--run", required=True, metavar="DIR", help="the run directory")
    parser.add_argument("--out", required=True, metavar="FILE", help="ends in .gif, .mp4 or .png")
    parser.add_argument(
        "--mode",
        choices=("slerp", "lerp"),
        default="slerp",
        help="great arcs, which keep the length that latents have (default), or straight lines",
    )
    parser.add_argument(
        "--along",
        choices=("latents", "components", "activations", "classes"),
        default="latents",
        help="from latent to latent (default), or along directions, a walk each: those in which pictures change most, "
        "or activations of the generator's first layer, or those towards the classes of the run's images",
    )
    parser.add_argument("--image", action="append", default=[], metavar="FILE", help="pass this image; repeat it")
    parser.add_argument(
        "--nearest", action="store_true", help="under each frame the training image whose features are nearest"
    )
    parser.add_argument("--frames", type=positive_int, help="in all (default 80; 10 in a png)")
    parser.add_argument("--stops", type=positive_int, default=4, help="latents that a walk passes (default 4)")
    parser.add_argument("--walks", type=positive_int, default=9, help="walks side by side (default 9)")
    parser.add_argument("--label", metavar="NAME|K", help="one class of a conditional run (default: a walk a class)")
    parser.add_argument("--best", action="store_true", help="the generator of the run's best evaluation")
    parser.add_argument("--seed", type=seed, default=0, help="of the latents (default 0)")
    parser.add_argument("--device", metavar="D", default="auto", help="auto (default), cpu, cuda, cuda:1")
    return parser


def run(args: argparse.Namespace) -> int:
    """Write the walk."""
    kind = Path(args.out).suffix.lower()
    if kind not in (".gif", ".mp4", ".png"):
        raise ValueError(f"interpolate: --out must end in .gif, .mp4 or .png, got {args.out}")
    if args.stops < 2:
        raise ValueError(f"interpolate: --stops must be at least 2, got {args.stops}")
    target_of(args.out)
    if kind == ".mp4":
        require_ffmpeg("interpolate")
    frames = args.frames or (10 if kind == ".png" else 80)
    generator, config = sampling.load_generator(args.run, device=resolve_device(args.device), best=args.best)
    domain = domain_of(Recipe.from_dict(config["recipe"]))
    domain.require_latents("interpolate")
    _check_kind(args, domain)
    if args.nearest and config.get("images", {}).get("given"):
        raise ValueError("interpolate: --nearest needs the run's images in files, they were given in Python")
    numbers = args.walks * frames * config["recipe"]["latent"]
    require(4 * numbers, "cpu", f"interpolate: {args.walks:,} walks of {frames:,} frames")
    labels = _labels(args, config)
    walks = _walks(args, generator, config["recipe"], labels, frames)
    each = None if labels is None else torch.tensor(labels).repeat_interleave(frames)
    images = domain.pictures(domain.draw(generator, torch.cat(walks), each))
    if args.nearest:
        images = torch.cat([images, nearest_images(_training_images(domain), images)], 2)
    images = images.unflatten(0, (len(walks), frames))
    if kind == ".png":
        data.save_grid(images.flatten(0, 1), args.out, columns=frames)
    elif kind == ".gif":
        _save_gif(_pictures(images), frames, args.out)
    else:
        save_mp4(_pictures(images), args.out, fps=_FPS)
    print(f"{len(walks)} walks of {frames} frames: {args.out}")
    return 0


def _check_kind(args: argparse.Namespace, domain: Domain) -> None:
    """ValueError for an option that asks for a comparison with images where samples are none."""
    asked = {"--image": args.image, "--nearest": args.nearest, "--along classes": args.along == "classes"}
    for option, given in asked.items():
        if given and not isinstance(domain, Images):
            raise ValueError(f"interpolate: {option} must be left out, {domain.recipe.name} makes {domain.noun}")


def _training_images(domain: Domain) -> Tensor:
    """uint8 [N, C, H, W] of the images that a run learnt from."""
    images: Tensor = domain.hold_out(domain.load(torch.device("cpu")), domain.recipe.held_out)[0].images
    return images


def _walks(
    args: argparse.Namespace, generator: nn.Module, recipe: dict[str, Any], labels: list[int] | None, frames: int
) -> list[Tensor]:
    """Latents [frames, latent] of each walk."""
    count, latent = args.walks * args.stops, recipe["latent"]
    if args.along != "latents":
        if args.image:
            raise ValueError("interpolate: --image goes with --along latents, leave one out")
        z = sampling.latents(max(PICTURES, args.walks + 1), latent, seed=args.seed)
        if args.along == "classes":
            directions = _towards_classes(generator, z, recipe)[: args.walks]
        else:
            classes = None if labels is None else torch.tensor(labels).repeat(len(z))[: len(z)]
            of = "activations" if args.along == "activations" else "pictures"
            directions = list(principal_directions(generator, z, classes, count=args.walks, of=of))
        # there and back, to twice the deviation of a latent along it: a closed path, as the others
        swing = 2 * torch.sin(torch.arange(frames) * 2 * torch.pi / frames)
        return [z[0] + swing[:, None] * direction for direction in directions]
    stops = sampling.latents(count, latent, seed=args.seed)
    if len(args.image) > count:
        raise ValueError(f"interpolate: --image must be given at most {count} times, a stop of a walk each")
    if args.image:
        images = _images(args.image, recipe)
        given = None if labels is None else torch.tensor(labels)[torch.arange(len(images)) // args.stops % args.walks]
        stops[: len(images)] = project(generator, images, given, starts=stops)[0]
    return [sampling.walk(z, frames, mode=args.mode) for z in stops.view(args.walks, args.stops, -1)]


def _towards_classes(generator: nn.Module, z: Tensor, recipe: dict[str, Any]) -> list[Tensor]:
    """A direction for each class of the run's images that pictures show, in the order of the classes."""
    if recipe.get("conditional"):
        raise ValueError("interpolate: --along classes is for runs without classes, --label NAME asks this one for one")
    size, channels, labels = recipe["image_size"], recipe["channels"], recipe.get("labels")
    images = data.load(recipe["data"], image_size=size, channels=channels, labels=labels, limit=COMPARED)
    if images.labels is None:
        raise ValueError(f"interpolate: --along classes needs images with classes, {images.name} has none")
    found = class_directions(generator, z, images.images, images.labels)
    if not found:
        raise ValueError("interpolate: --along classes needs pictures of two classes or more, this run's are all alike")
    print(f"towards {', '.join((images.classes or [])[k] for k in found)}")
    return list(found.values())


def _images(files: list[str], recipe: dict[str, Any]) -> Tensor:
    """[N, C, H, W] in [-1, 1] of image files, cut and resized as training images are."""
    pictures = []
    for file in files:
        try:
            with Path(file).open("rb") as opened:
                pixels, _ = decode(opened, recipe["image_size"], recipe["channels"])
        except Exception as error:  # damaged files make Pillow raise nearly anything
            raise ValueError(
                f"interpolate: --image must be a readable image, {file} is not: {reason(error)}"
            ) from error
        pictures.append(torch.from_numpy(pixels.copy()).permute(2, 0, 1))
    return torch.stack(pictures).float() / 127.5 - 1


def _labels(args: argparse.Namespace, config: dict[str, Any]) -> list[int] | None:
    """A class for each walk of a conditional run."""
    if args.label is not None:
        return [sampling.class_number(config, args.label)] * args.walks
    classes = config["recipe"].get("classes")
    return [walk % classes for walk in range(args.walks)] if classes else None


def _pictures(images: Tensor) -> Iterator[Tensor]:
    """A uint8 picture ``[height, width, 3]`` a frame, of images ``[walks, frames, C, H, W]`` in [-1, 1]."""
    scale = max(1, math.ceil(_TILE / images.shape[-1]))
    for frame in images.unbind(1):
        page = data.make_grid(frame, padding=0).permute(1, 2, 0)
        yield page.repeat_interleave(scale, 0).repeat_interleave(scale, 1).expand(-1, -1, 3)


def _save_gif(pictures: Iterator[Tensor], frames: int, path: str) -> None:
    from PIL import Image

    start = next(pictures)
    require(
        frames * start.numel(), "cpu", f"interpolate: a GIF of {frames:,} frames of {tuple(start.shape[:2])} pixels"
    )
    first, *rest = [Image.fromarray(p.numpy()) for p in (start, *pictures)]
    with atomic_file(path) as file:
        first.save(file, format="GIF", save_all=True, append_images=rest, duration=1000 // _FPS, loop=0)
