"""`load`: any source of images to an ImageSet; `prepare`: the same to a file."""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from fastgan._writing import target_of, write
from fastgan.data import arrays
from fastgan.data.arrays import Array
from fastgan.data.catalogue import CATALOGUE
from fastgan.data.decode import SUFFIXES, WHITE, decode_all, greatest, in_order, pillow, quiet_decoding, to_pixels
from fastgan.data.files import Files, class_labels, plural
from fastgan.data.imageset import ImageSet
from fastgan.data.labels import classes_by_table
from fastgan.data.memory import free_bytes, require
from fastgan.data.store import FileStore, MemoryStore

Source = str | os.PathLike[str] | torch.Tensor | np.ndarray
Progress = Callable[[int, int], None]

# What a folder of images is resized to unless told otherwise: the size of the DCGAN paper.
FOLDER_SIZE = 64
# Taken as the limit where the system does not tell how much memory is free.
UNKNOWN_LIMIT = 2 << 30
# Part of every cache file's name: change it with the decoding, or old files would be taken for new ones.
CACHE_FORMAT = "1"
KINDS = "a folder, a .zip, an idx file (also .gz), a .npy, a .npz or a tensor"

log = logging.getLogger("fastgan.data")


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


def load(
    source: Source,
    *,
    image_size: int | None = None,
    channels: int | None = None,
    device: torch.device | str = "cpu",
    limit: int | None = None,
    labels: str | os.PathLike[str] | None = None,
    max_bytes: int | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> ImageSet:
    """Load images for training.

    Args:
        source: a bundled set's name (`fastgan.data.available()`), a folder (searched recursively), a .zip of
            images (never unpacked to disk), an idx file, a .npy, a .npz, a NumPy array or a tensor (a uint8
            [M, C, H, W] one is not copied). A folder that has a bundled set's name is written "./name".
        image_size: height and width in pixels; other sizes have their centre square resized with
            antialiasing. None: 64 for folders and zips, else the size the images have.
        channels: 1 (luminance) or 3. None: for files 1 if every image is grey, else 3; for arrays what they
            have. Transparency is composited on white.
        device: where batches come out, and the images with them if they fit.
        limit: at most so many images, spread evenly over the source in its order, so over all classes.
        labels: a CSV of FILE,LABEL lines, which takes the place of the folders' names; for a folder or a zip. A
            file is named by its path below the folder, or by its name alone.
        max_bytes: above so many bytes of pixels the images stay in a memory-mapped file (but for tensors,
            which are in memory already). None: half of the free main memory. Where main memory holds them
            and half of the free memory of `device` does not, they stay in main memory.
        cache_dir: where that file is written, and found again by the next call; None: $FASTGAN_CACHE/data,
            else ~/.cache/fastgan/data.
        progress: called with (images done, images in all), now and then.

    Returns:
        ImageSet: uint8 [M, C, H, W], in sorted order of path, labels by folder, and what was skipped.

    Raises:
        ValueError: no such source, no readable image in it, or an argument out of range; a single damaged
            file among others is skipped, named in `ImageSet.skipped` and logged.
        TypeError: a source of another type.
        ImportError: Pillow is needed and missing.
    """
    if max_bytes is not None and max_bytes < 0:
        raise ValueError(f"load: max_bytes must be at least 0 or None, got {max_bytes!r}")
    target = torch.device(device)
    wanted = Wanted(image_size, channels, limit, progress, labels=labels)
    opened = open_source(source)
    with closing(opened):
        pixels = opened_pixels(opened, wanted)
        cap = _host_limit() if max_bytes is None else max_bytes
        if pixels.bytes_needed > cap and opened.path is not None:
            images = _stream(opened, pixels, wanted, cap, cache_dir)
        else:
            images = pixels.to_memory()
    if images.skipped:
        first = "; ".join(f"{name}: {why}" for name, why in images.skipped[:3])
        more = "; ..." if len(images.skipped) > 3 else ""
        log.warning("load: %s of %s skipped (%s%s)", plural(len(images.skipped), "file"), images.name, first, more)
    return _place(images, target)


def prepare(
    source: Source,
    out: str | os.PathLike[str],
    *,
    image_size: int | None = None,
    channels: int | None = None,
    limit: int | None = None,
    white: int | str = WHITE,
    progress: Progress | None = None,
) -> Path:
    """Decode `source` once to `out`, a .npy of uint8 [M, C, H, W], with its labels in a .json beside it.

    `load(out)` is then ready at once; arguments and errors are those of `load`. Returns the path. Both files replace
    what an earlier `prepare` left there; ValueError for any other .json in that place.

    white: what is white in 16-bit greys: a number, "sbit" (2^bits - 1 with the significant bits that a PNG file names,
        else 65535), or "max" (the greatest number in the set; logged in one line). Cameras and scanners write 10 to 14
        bits into 16: such pictures are nearly black otherwise.
    """
    out = Path(out)
    if out.suffix != ".npy":
        raise ValueError(f"prepare: out must be a .npy file, got {out}; call it {out.name}.npy")
    wanted = Wanted(image_size, channels, limit, progress, white)
    target = target_of(out)
    card = target_of(_card(out))
    if card.exists() and arrays.read_card(card) is None:
        raise ValueError(
            f"prepare: {_card(out)}, where the labels go, must be of an earlier prepare or not exist yet; move it or "
            "choose another out"
        )
    with closing(open_source(source)) as opened:
        if white == "max":
            top = _greatest(opened, wanted) or WHITE
            log.warning("prepare: white of 16-bit greys is %s, the greatest number in %s", f"{top:,}", source)
            wanted = replace(wanted, white=top)
        pixels = opened_pixels(opened, wanted)
        place = next(folder for folder in target.parents if folder.is_dir())
        free = shutil.disk_usage(place).free
        if pixels.bytes_needed > free:
            raise ValueError(
                f"prepare: {out} needs {_gib(pixels.bytes_needed)} and {place} has {_gib(free)} free; "
                "choose another disk, a limit or a smaller image_size"
            )
        pixels.to_file(out)
    return out


def open_source(source: Source) -> Files | Array:
    """The source by its kind, nothing decoded yet. ValueError or TypeError if it is none."""
    if isinstance(source, (torch.Tensor, np.ndarray)):
        return arrays.from_memory(source)
    if not isinstance(source, (str, os.PathLike)):
        raise TypeError(f"load: source must be a name, {KINDS}, got {type(source).__name__}")
    if isinstance(source, str) and source in CATALOGUE:
        return CATALOGUE[source].read()
    if not os.fspath(source) or "\0" in os.fspath(source):
        raise ValueError(f"load: source must be neither empty nor hold a NUL character, got {os.fspath(source)!r}")
    path = Path(source).expanduser()
    if not path.exists():
        close = difflib.get_close_matches(str(source), CATALOGUE, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise ValueError(
            f"load: source must be a bundled set ({', '.join(CATALOGUE)}), {KINDS}; {path} does not exist{hint}"
        )
    suffix = path.suffix.lower()
    if path.is_dir() or suffix == ".zip":
        return Files(path)
    if suffix == ".npy":
        return arrays.from_npy(path)
    if suffix == ".npz":
        return arrays.from_npz(path)
    if arrays.idx_suffix(path):
        return arrays.from_idx(path)
    if suffix in SUFFIXES:
        raise ValueError(f"load: source must hold many images, {path} is one; pass its folder {path.parent}")
    raise ValueError(f"load: source must be {KINDS}, {path.name} is none of them by its name; unpack or convert it")


def absolute(source: str) -> str:
    """`source` as it is found from any folder: a bundled set's name as it is, a path from the root."""
    return source if source in CATALOGUE or not source else os.path.abspath(os.path.expanduser(source))


def opened_pixels(opened: Files | Array, wanted: Wanted) -> FilePixels | ArrayPixels:
    """The pixels of a source. ValueError where a single picture does not fit in memory."""
    if wanted.labels is not None and isinstance(opened, Array):
        raise ValueError(f"load: labels go with a folder or a zip of images, got {opened.name}; leave labels out")
    pixels = FilePixels(opened, wanted) if isinstance(opened, Files) else ArrayPixels(opened, wanted)
    channels, height, width = pixels.shape
    require(channels * height * width, "cpu", f"load: one picture of {channels} x {height} x {width}")
    return pixels


def _greatest(opened: Files | Array, wanted: Wanted) -> int:
    """The greatest 16-bit grey of a source, 0 where it has none."""
    if not isinstance(opened, Files):
        return int(opened.values.max()) if opened.values.dtype == np.uint16 else 0

    def of(name: str) -> int:
        with contextlib.suppress(Exception), opened.open(name) as (file, _):  # damage is told by the decoding
            return greatest(file)
        return 0

    with quiet_decoding():
        return max(in_order(of, [opened.names[i] for i in wanted.numbers(len(opened.names))]), default=0)


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
        good, grey = [], True
        with quiet_decoding():
            wanted = self.wanted
            pictures = decode_all(self.names, self.files.open, self.shape[1], wanted.channels, wanted.white)
            for done, picture in enumerate(pictures, 1):
                if picture.pixels is None or picture.facts is None:
                    self.files.skip(picture.name, picture.reason)
                else:
                    good.append(picture.name)
                    grey = grey and picture.facts.grey
                    store.add(np.broadcast_to(picture.pixels.transpose(2, 0, 1), self.shape)[None])
                if done % 256 == 0 or done == len(self.names):
                    self.wanted.report(done, len(self.names))
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
        return class_labels(names) or (None, None)

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

    def to_file(self, path: Path) -> None:
        with FileStore(path, self.shape) as store:
            good, grey = self._decode_into(store)
            store.finish(grey)
            _card(path).unlink(
                missing_ok=True
            )  # killed before the new one, the pictures have no labels, not wrong ones
        labels, classes = self._labels(good)
        _write_card(path, self.title, labels, classes, self.files.skipped)


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

        for start in range(0, len(self.numbers), arrays.CHUNK):
            numbers = self.numbers[start : start + arrays.CHUNK]
            pixels = arrays.to_uint8_pixels(self.values[numbers], offset, scale)
            if image is not None:
                pixels = np.stack(list(in_order(convert, pixels)))
            store.add(pixels.transpose(0, 3, 1, 2))
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

    def to_file(self, path: Path) -> None:
        with FileStore(path, self.shape) as store:
            self._convert_into(store)
            store.finish(False)
            _card(path).unlink(missing_ok=True)
        labels = None if self.labels is None else self.labels.tolist()
        _write_card(path, self.array.name, labels, self.classes, self.array.skipped)


def _card(path: Path) -> Path:
    """The .json beside a .npy."""
    return path.with_suffix(".json")


def _write_card(
    path: Path,
    name: str,
    labels: list[int] | None,
    classes: list[str] | None,
    skipped: list[tuple[str, str]],
) -> None:
    """The .json beside a .npy. Written last: where it is, the .npy is complete."""
    card = {"fastgan": CACHE_FORMAT, "name": name, "classes": classes, "labels": labels, "skipped": skipped}
    write(_card(path), json.dumps(card))


# --------------------------------------------------------------------------------- too large for memory


def _host_limit() -> int:
    free = free_bytes(torch.device("cpu"))
    return UNKNOWN_LIMIT if free is None else free // 2


def _place(images: ImageSet, device: torch.device) -> ImageSet:
    """To the device, unless half of its free memory is too small for the pixels."""
    free = None if device.type == "cpu" or images.mapped else free_bytes(device)
    if free is None or images.nbytes <= free // 2:
        return images.to(device)
    return ImageSet(
        images.images, images.labels, images.classes, name=images.name, skipped=images.skipped, device=device
    )


def _stream(
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
    choices = f"{CACHE_FORMAT} {wanted.image_size} {wanted.channels} {wanted.limit} {opened.fingerprint()}"
    if wanted.labels is not None:  # the card beside the pixels holds the labels
        choices += hashlib.sha256(Path(wanted.labels).expanduser().read_bytes()).hexdigest()
    key = hashlib.sha256(choices.encode()).hexdigest()[:16]
    path = folder / f"{pixels.shape[1]}px-{key}.npy"
    if not (path.is_file() and _card(path).is_file()):
        folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free
        if free < pixels.bytes_needed:
            raise ValueError(
                f"load: the images need {_gib(pixels.bytes_needed)}, more than the {_gib(cap)} allowed in "
                f"memory, and {folder} has {_gib(free)} free; set cache_dir, limit or a smaller image_size"
            )
        log.info("load: %s of pixels go to %s", _gib(pixels.bytes_needed), path)
        pixels.to_file(path)
    mapped = ArrayPixels(arrays.from_npy(path), Wanted())
    return mapped.as_it_is(path)


def default_cache() -> Path:
    root = os.environ.get("FASTGAN_CACHE")
    return (Path(root) if root else Path.home() / ".cache" / "fastgan") / "data"


def _gib(count: int) -> str:
    return f"{count / 2**30:.1f} GiB"
