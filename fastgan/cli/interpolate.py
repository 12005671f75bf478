"""``fastgan interpolate``: walks through a run's latent space, as gif, mp4, or png with a row a walk."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from fastgan import data
from fastgan._writing import atomic_file, atomic_path, target_of
from fastgan.training import sampling
from fastgan.training.assembly import resolve_device

from .arguments import Commands, positive_int, seed

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
        _require_ffmpeg()
    frames = args.frames or (10 if kind == ".png" else 80)
    generator, config = sampling.load_generator(args.run, device=resolve_device(args.device), best=args.best)
    stops = sampling.latents(args.walks * args.stops, config["recipe"]["latent"], seed=args.seed)
    walks = [sampling.walk(z, frames, mode=args.mode) for z in stops.view(args.walks, args.stops, -1)]
    labels = _labels(args, config)
    each = None if labels is None else torch.tensor(labels).repeat_interleave(frames)
    images = sampling.draw(generator, torch.cat(walks), each).unflatten(0, (args.walks, frames))
    if kind == ".png":
        data.save_grid(images.flatten(0, 1), args.out, columns=frames)
    elif kind == ".gif":
        _save_gif(_pictures(images), args.out)
    else:
        _save_mp4(_pictures(images), args.out)
    print(f"{args.walks} walks of {frames} frames: {args.out}")
    return 0


def _labels(args: argparse.Namespace, config: dict[str, Any]) -> list[int] | None:
    """A class for each walk of a conditional run."""
    if args.label is not None:
        return [sampling.class_number(config, args.label)] * args.walks
    classes = config["recipe"].get("classes")
    return [walk % classes for walk in range(args.walks)] if classes else None


def _pictures(images: Tensor) -> Iterable[Tensor]:
    """A uint8 picture ``[height, width, 3]`` a frame, of images ``[walks, frames, C, H, W]`` in [-1, 1]."""
    scale = max(1, math.ceil(_TILE / images.shape[-1]))
    for frame in images.unbind(1):
        page = data.make_grid(frame, padding=0).permute(1, 2, 0)
        yield page.repeat_interleave(scale, 0).repeat_interleave(scale, 1).expand(-1, -1, 3)


def _save_gif(pictures: Iterable[Tensor], path: str) -> None:
    from PIL import Image

    first, *rest = [Image.fromarray(p.numpy()) for p in pictures]
    with atomic_file(path) as file:
        first.save(file, format="GIF", save_all=True, append_images=rest, duration=1000 // _FPS, loop=0)


def _require_ffmpeg() -> None:
    try:
        importlib.import_module("imageio_ffmpeg")
    except ImportError as error:
        raise ImportError(
            "interpolate: mp4 needs the package imageio-ffmpeg, which is not installed; "
            "pip install imageio-ffmpeg, or write a .gif"
        ) from error


def _save_mp4(pictures: Iterable[Tensor], path: str) -> None:
    ffmpeg = importlib.import_module("imageio_ffmpeg")
    with atomic_path(path) as part, contextlib.ExitStack() as stack:
        writer = None
        for picture in pictures:
            height, width, _ = picture.shape
            # H.264 with 4:2:0 colour wants even sizes
            picture = pad(picture, (0, 0, 0, width % 2, 0, height % 2))
            if writer is None:
                size = (picture.shape[1], picture.shape[0])
                writer = ffmpeg.write_frames(str(part), size, fps=_FPS, macro_block_size=1)
                stack.callback(writer.close)
                writer.send(None)
            writer.send(picture.contiguous().numpy())
