"""Clips: from animated files and folders of frames; held as bytes, in [-1, 1] to the networks."""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastgan.data.decode import pillow, quiet_decoding, reason, to_pixels
from fastgan.data.files import fingerprint_of
from fastgan.data.loading import load
from fastgan.data.memory import require
from fastgan.data.remarks import Remarks, tell
from fastgan.data.sharing import Read, read_once
from fastgan.data.tensorset import Held

__all__ = ["DEMONSTRATION", "ClipSet", "load_clips"]

DEMONSTRATION = "moving-garments"  # what the recipe trains on where no folder is given
ANIMATED = (".gif",)
FILMED = (".mp4", ".webm", ".mov", ".avi")  # imageio-ffmpeg reads them
STILL = (".png", ".jpg", ".jpeg", ".bmp", ".webp")  # a folder of them is a clip


class ClipSet(Held):
    """Clips for training.

    Attributes are those of `fastgan.data.Samples`; values: uint8 [M, frames, channels, height, width].
    """

    def pick(self, indices: Tensor, *, mirror: Tensor | None = None, channels_last: bool = False) -> Tensor:
        """Clips by number, float32 [N, T, C, H, W] in [-1, 1]; mirror: bool [N], which to flip left to right."""
        x = self.values.index_select(0, indices)
        if mirror is not None:
            x = torch.where(mirror.view(-1, 1, 1, 1, 1), x.flip(-1), x)
        return self.deliver(x).float().div_(127.5).sub_(1.0)


def load_clips(
    source: str, *, frames: int, image_size: int, channels: int, device: torch.device | str = "cpu"
) -> ClipSet:
    """Clips of the files and folders of frames below a folder, of one file, or of the demonstration "moving-garments".

    Args:
        source: the path, or the set's name.
        frames: of a clip; a longer film gives one clip after the other, the last one of its last frames.
        image_size, channels: of a frame; other sizes have their centre square resized.

    .gif needs nothing more, .mp4, .webm, .mov and .avi the package imageio-ffmpeg. A folder that itself holds images is
    one film, its files sorted by name. What cannot be used (damaged files, films that are too short) is named in
    `skipped` and logged in one line.

    Raises:
        ValueError: no such source, or no clip in it.
    """
    if source == DEMONSTRATION:
        return ClipSet(moving_garments(frames, image_size, channels), name=source, device=device)
    path = Path(source).expanduser()
    if not path.exists():
        raise ValueError(f"load: data must be a folder of clips or one such file, {path} does not exist")
    films = list(_films(path))
    of = lambda: [_fingerprint(path, films), frames, image_size, channels]
    found = read_once("clips", of, lambda: _read_all(path, films, frames, image_size, channels))
    tell(source, found.remarks)
    return ClipSet(found.values, name=source, skipped=found.remarks, device=device)


def _read_all(path: Path, films: Sequence[Path], frames: int, image_size: int, channels: int) -> Read:
    remarks: Remarks = []
    parts: list[np.ndarray] = []
    for film in films:
        name = str(film.relative_to(path)) if film != path else path.name
        try:
            with quiet_decoding():
                pixels = [to_pixels(picture, image_size, channels)[0] for picture in _frames(film)]
        except Exception as error:  # damaged files make readers raise nearly anything
            remarks.append((name, reason(error)))
            continue
        if len(pixels) < frames:
            remarks.append((name, f"it has {len(pixels)} of {frames} frames"))
            continue
        begins = [min(at, len(pixels) - frames) for at in range(0, len(pixels), frames)]
        require(2 * len(begins) * frames * pixels[0].size, "cpu", f"load: {len(begins):,} clips of {name}")
        parts += [np.stack(pixels[at : at + frames])[None] for at in begins]
    if not parts:
        first = "".join(f"; {name}: {what}" for name, what in remarks[:3])
        raise ValueError(f"load: {path} must hold a clip of {frames} frames, it holds none{first}")
    return Read(torch.from_numpy(np.concatenate(parts)).permute(0, 1, 4, 2, 3).contiguous(), remarks, {})


def _fingerprint(path: Path, films: Sequence[Path]) -> list[Any]:
    """Changes with every file of the films, and with what can be read."""
    base = path if path.is_dir() else path.parent
    files = [file for film in films for file in (sorted(film.iterdir()) if film.is_dir() else [film])]
    names = [str(file.relative_to(base)) for file in files]
    return [fingerprint_of(base, names), importlib.util.find_spec("imageio_ffmpeg") is not None]


def _films(path: Path) -> Iterator[Path]:
    """Animated files, and folders that hold images, sorted."""
    if path.is_file():
        yield path
        return
    for folder, inner, names in os.walk(path):
        inner[:] = sorted(name for name in inner if not name.startswith("."))
        suffixes = {name: Path(name).suffix.lower() for name in sorted(names) if not name.startswith(".")}
        if any(suffix in STILL for suffix in suffixes.values()):
            yield Path(folder)
        yield from (Path(folder) / name for name, suffix in suffixes.items() if suffix in (*ANIMATED, *FILMED))


def _frames(film: Path) -> Iterator:
    """The pictures of a film, as Pillow's."""
    image = pillow()
    if film.is_dir():
        for path in sorted(film.iterdir()):
            if path.suffix.lower() in STILL and not path.name.startswith("."):
                with image.open(path) as picture:
                    yield picture.convert("RGBA")
    elif film.suffix.lower() in FILMED:
        try:
            ffmpeg = importlib.import_module("imageio_ffmpeg")
        except ImportError as error:
            raise ValueError(f"{film.suffix} needs the package imageio-ffmpeg; pip install imageio-ffmpeg") from error
        reader = ffmpeg.read_frames(str(film))
        width, height = next(reader)["size"]
        for raw in reader:
            yield image.frombytes("RGB", (width, height), raw)
    else:
        with image.open(film) as animation:
            for number in range(getattr(animation, "n_frames", 1)):
                animation.seek(number)
                yield animation.convert("RGBA")


def moving_garments(frames: int, size: int, channels: int, count: int = 2000) -> Tensor:
    """uint8 [count, frames, channels, size, size]: pictures of Fashion-MNIST at half of the side, which move straight
    on and bounce off the edges, as the digits of Moving MNIST do (Srivastava et al. 2015, arXiv:1502.04681)."""
    half = size // 2
    garments = load("fashion-mnist", limit=count).images.float()
    small = torch.nn.functional.interpolate(garments, size=(half, half), mode="area").round().to(torch.uint8)
    rng = np.random.Generator(np.random.PCG64(0))
    room = size - half
    start, speed = rng.uniform(0, 2 * room, (count, 1, 2)), rng.uniform(0.04, 0.12, (count, 1, 2)) * size
    speed *= rng.choice([-1, 1], (count, 1, 2))
    way = (start + speed * np.arange(frames)[None, :, None]) % (2 * room)
    corner = np.rint(room - np.abs(way - room)).astype(int)  # there and back
    clips = torch.zeros(count, frames, 1, size, size, dtype=torch.uint8)
    for number in range(count):
        for frame in range(frames):
            y, x = corner[number, frame]
            clips[number, frame, 0, y : y + half, x : x + half] = small[number, 0]
    return clips.expand(-1, -1, channels, -1, -1).contiguous()
