"""The cache of decoded images: sets too large for memory lie in files that are mapped, made once for all runs."""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path

import numpy as np

from fastgan._writing import part_of, told
from fastgan.data import arrays
from fastgan.data.arrays import Array
from fastgan.data.files import Files
from fastgan.data.imageset import ImageSet
from fastgan.data.memory import gib
from fastgan.data.pixels import ArrayPixels, FilePixels, Wanted, card_of, complete, identity

log = logging.getLogger("fastgan.data")


class NoRoomError(ValueError):
    """The cache's disk is too small for the images."""


def stream(
    opened: Files | Array,
    pixels: FilePixels | ArrayPixels,
    wanted: Wanted,
    cap: int,
    cache_dir: str | os.PathLike[str] | None,
) -> ImageSet:
    """The images in a memory-mapped .npy: the source itself if it is one, else one in the cache folder."""
    if isinstance(pixels, ArrayPixels) and pixels.whole and isinstance(pixels.array.values, np.memmap):
        return pixels.as_it_is(opened.path)
    folder = Path(cache_dir) if cache_dir is not None else default_cache()
    of = identity(opened, wanted)
    path = folder / f"{pixels.shape[1]}px-{of[:16]}.npy"
    if not sound(path):
        with told(folder):
            folder.mkdir(parents=True, exist_ok=True)
        begun = part_of(path)
        free = shutil.disk_usage(folder).free + (begun.stat().st_size if begun.exists() else 0)
        if free < pixels.bytes_needed:
            why = f"memory may hold {gib(cap)}" if pixels.bytes_needed > cap else "the processes of a machine share it"
            raise NoRoomError(
                f"load: the images need {gib(pixels.bytes_needed)} in a file, as {why}, and {folder} has {gib(free)} "
                "free; set cache_dir, limit or a smaller image_size"
            )
        log.info("load: %s of pixels go to %s", gib(pixels.bytes_needed), path)
        pixels.to_file(path, of, keep=True)
    mapped = ArrayPixels(arrays.from_npy(path), Wanted())
    return mapped.as_it_is(path)


def sound(path: Path) -> bool:
    """Whether a file of the cache and its card are there as they were written; damaged ones are deleted."""
    if not complete(path):
        return False
    if damaged := arrays.from_npy(path).damage():
        log.warning("load: %s is damaged, it has %s; it is made again", path, damaged)
        for file in (card_of(path), path):
            file.unlink(missing_ok=True)
    return not damaged


def default_cache() -> Path:
    root = os.environ.get("FASTGAN_CACHE")
    return (Path(root) if root else Path.home() / ".cache" / "fastgan") / "data"
