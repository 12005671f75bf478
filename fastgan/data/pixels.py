"""The pixels of a source as they are wanted: decoded or converted into memory, or into a .npy with its card."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from fastgan._writing import write
from fastgan.data import arrays
from fastgan.data.arrays import Array
from fastgan.data.decode import SUFFIXES, WHITE, decode_all, in_order, pillow, quiet_decoding, to_pixels
from fastgan.data.files import Files
from fastgan.data.imageset import ImageSet
from fastgan.data.labels import classes_by_table
from fastgan.data.memory import require
from fastgan.data.store import MARK, FileStore, MemoryStore

Progress = Callable[[int, int], None]

# What a folder of images is resized to unless told otherwise: the size of the DCGAN paper.
FOLDER_SIZE = 64
# Part of every cache file's name: change it with the decoding, or old files would be taken for new ones.
CACHE_FORMAT = "1"


@dataclass(frozen=True)
class Wanted:
    """The checked arguments that decide the pixels."""

    image_size: int | None = None
    channels: int | None = None
    limit: int | None = None
    progress: Progress | None = None
    white: int | str = WHITE
    labels: str | os.PathLike[str] | None = None

    def __post_init__(self) -> None:
        for name, value in (("image_size", self.image_size), ("limit", self.limit)):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ValueError(f"load: {name} must be an integer of at least 1 or None, got {value!r}")
        whole = isinstance(self.white, int) and not isinstance(self.white, bool) and 1 <= self.white <= WHITE
        if not whole and self.white not in ("sbit", "max"):
            raise ValueError(f'load: white must be "sbit", "max" or 1 to {WHITE}, got {self.white!r}')
        if self.channels not in (None, 1, 3):
            raise ValueError(f"load: channels must be 1, 3 or None, got {self.channels!r}")

    def numbers(self, count: int) -> list[int]:
        """At most `limit` of the numbers below count, evenly spaced from 0."""
        kept = count if self.limit is None else min(count, self.limit)
        return [i * count // kept for i in range(kept)]

    def report(self, done: int, total: int) -> None:
        if self.progress is not None:
            self.progress(done, total)


def opened_pixels(opened: Files | Array, wanted: Wanted) -> FilePixels | ArrayPixels:
    """The pixels of a source. ValueError where a single picture does not fit in memory."""
    if wanted.labels is not None and isinstance(opened, Array):
        raise ValueError(f"load: labels go with a folder or a zip of images, got {opened.name}; leave labels out")
    pixels = FilePixels(opened, wanted) if isinstance(opened, Files) else ArrayPixels(opened, wanted)
    channels, height, width = pixels.shape
    require(channels * height * width, "cpu", f"load: one picture of {channels} x {height} x {width}")
    return pixels


class FilePixels:
    """The pixels of image files, as `wanted`."""

    def __init__(self, files: Files, wanted: Wanted) -> None:
        self.files = files
        self.wanted = wanted
        self.names = [files.names[i] for i in wanted.numbers(len(files.names))]
        size = wanted.image_size or FOLDER_SIZE
        # Until the last file is read it may turn out not to be all grey.
        self.shape = (wanted.channels or 3, size, size)
        self.bytes_needed = len(self.names) * self.shape[0] * size * size
        self.title = files.path.name or str(files.path)

    def _decode_into(self, store: MemoryStore | FileStore) -> tuple[list[str], bool]:
        """Names of the files that could be read, and whether one channel is enough for them all.

        What could not be read goes to files.skipped. ValueError if nothing is left.
        """
        begin, grey = (store.marks[-1].done, store.marks[-1].grey) if store.marks else (0, True)
        bad = dict(skipped for mark in store.marks for skipped in mark.skipped)
        lately: list[tuple[str, str]] = []  # skipped since the last mark
        with quiet_decoding():
            wanted = self.wanted
            pictures = decode_all(self.names[begin:], self.files.open, self.shape[1], wanted.channels, wanted.white)
            for done, picture in enumerate(pictures, begin + 1):
                if picture.pixels is None or picture.facts is None:
                    lately.append((picture.name, picture.reason))
                else:
                    grey = grey and picture.facts.grey
                    store.add(np.broadcast_to(picture.pixels.transpose(2, 0, 1), self.shape)[None])
                if done % MARK == 0 or done == len(self.names):
                    store.mark(done, grey, lately)
                    bad.update(lately)
                    lately = []
                    self.wanted.report(done, len(self.names))
        for name, why in bad.items():
            self.files.skip(name, why)
        good = [name for name in self.names if name not in bad]
        if not good:
            raise ValueError(
                f"load: a {self.files.kind} must hold at least one readable image, {self.files.path} has "
                f"{self.files.found()}; suffixes read: {' '.join(sorted(SUFFIXES))}"
            )
        self.files.skipped.sort()
        return good, grey and self.wanted.channels is None

    def _labels(self, names: list[str]) -> tuple[list[int] | None, list[str] | None]:
        if self.wanted.labels is not None:
            return classes_by_table(names, self.wanted.labels)
        return self.files.labels(names) or (None, None)

    def to_memory(self) -> ImageSet:
        store = MemoryStore(len(self.names), self.shape)
        good, grey = self._decode_into(store)
        labels, classes = self._labels(good)
        return ImageSet(
            torch.from_numpy(store.finish(grey)),
            None if labels is None else torch.tensor(labels),
            classes,
            name=self.title,
            skipped=self.files.skipped,
        )

    def to_file(self, path: Path, of: str, *, keep: bool = False) -> None:
        """To a .npy and its card; of: what tells these pixels from others. keep: what lies there already stays."""
        with FileStore(path, self.shape, of) as store:
            if keep and complete(path):
                return
            good, grey = self._decode_into(store)
            checksums = store.finish(grey)
            labels, classes = self._labels(good)
            _write_card(path, self.title, labels, classes, self.files.skipped, checksums)


class ArrayPixels:
    """The pixels of an array, as `wanted`."""

    def __init__(self, array: Array, wanted: Wanted) -> None:
        self.array = array
        self.wanted = wanted
        self.values = arrays.channels_last(array)
        count, height, width, channels = self.values.shape
        self.numbers = wanted.numbers(count)
        self.shape = (
            wanted.channels or min(channels, 3),
            wanted.image_size or height,
            wanted.image_size or width,
        )
        self.bytes_needed = len(self.numbers) * self.shape[0] * self.shape[1] * self.shape[2]
        labels, self.classes = arrays.checked_labels(array)
        self.labels = None if labels is None else labels[self.numbers]
        # True if the pixels need neither resizing nor other channels.
        self.fits = (channels, height, width) == self.shape
        self.whole = self.fits and self.values.dtype == np.uint8 and len(self.numbers) == count

    def _convert_into(self, store: MemoryStore | FileStore) -> None:
        white = self.wanted.white if isinstance(self.wanted.white, int) else WHITE
        offset, scale = arrays.value_range(self.values, self.array.name, white)
        image = None if self.fits else pillow()

        def convert(pixels: np.ndarray) -> np.ndarray:
            picture = image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)  # type: ignore[union-attr]
            return to_pixels(picture, self.wanted.image_size, self.shape[0])[0]

        begin = store.marks[-1].done if store.marks else 0
        for start in range(begin, len(self.numbers), arrays.CHUNK):
            numbers = self.numbers[start : start + arrays.CHUNK]
            pixels = arrays.to_uint8_pixels(self.values[numbers], offset, scale)
            if image is not None:
                pixels = np.stack(list(in_order(convert, pixels)))
            store.add(pixels.transpose(0, 3, 1, 2))
            store.mark(start + len(numbers))
            self.wanted.report(start + len(numbers), len(self.numbers))

    def as_it_is(self, mapped: Path | None) -> ImageSet:
        """The array itself, without a copy unless main memory needs one."""
        pixels = self.values.transpose(0, 3, 1, 2)
        if mapped is None and (isinstance(self.array.values, np.memmap) or not pixels.flags.writeable):
            pixels = np.array(pixels, order="C")
        elif mapped is None:
            pixels = np.ascontiguousarray(pixels)
        return self._image_set(pixels, mapped)

    def to_memory(self) -> ImageSet:
        if self.whole:
            return self.as_it_is(None)
        store = MemoryStore(len(self.numbers), self.shape)
        self._convert_into(store)
        return self._image_set(store.finish(False), None)

    def _image_set(self, pixels: np.ndarray, mapped: Path | None) -> ImageSet:
        return ImageSet(
            torch.from_numpy(pixels),
            None if self.labels is None else torch.from_numpy(self.labels),
            self.classes,
            name=self.array.name,
            skipped=self.array.skipped,
            mapped=mapped,
        )

    def to_file(self, path: Path, of: str, *, keep: bool = False) -> None:
        """As `FilePixels.to_file`."""
        with FileStore(path, self.shape, of) as store:
            if keep and complete(path):
                return
            self._convert_into(store)
            labels = None if self.labels is None else self.labels.tolist()
            _write_card(path, self.array.name, labels, self.classes, self.array.skipped, store.finish(False))


def identity(opened: Files | Array, wanted: Wanted) -> str:
    """Changes whenever the pixels or the labels would; a new one each time for what is in memory."""
    source = secrets.token_hex(16) if opened.path is None else opened.fingerprint()
    choices = f"{CACHE_FORMAT} {wanted.image_size} {wanted.channels} {wanted.limit} {wanted.white} {source}"
    if wanted.labels is not None:  # the card beside the pixels holds the labels
        choices += hashlib.sha256(Path(wanted.labels).expanduser().read_bytes()).hexdigest()
    return hashlib.sha256(choices.encode()).hexdigest()


def card_of(path: Path) -> Path:
    """The .json beside a .npy."""
    return path.with_suffix(".json")


def _write_card(
    path: Path,
    name: str,
    labels: list[int] | None,
    classes: list[str] | None,
    skipped: list[tuple[str, str]],
    checksums: list[tuple[int, str]],
) -> None:
    """The .json beside a .npy. Killed before the .npy follows, its checksums do not agree with an earlier one."""
    card = {"fastgan": CACHE_FORMAT, "name": name, "classes": classes, "labels": labels, "skipped": skipped}
    write(card_of(path), json.dumps(card | {"checksums": checksums}))


def complete(path: Path) -> bool:
    """Whether a .npy and its card are there."""
    return path.is_file() and card_of(path).is_file()
