"""`load`: any source of images to an ImageSet; `prepare`: the same to a file."""

from __future__ import annotations

import contextlib
import difflib
import logging
import os
import shutil
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from fastgan._writing import WriteError, target_of
from fastgan.data import arrays
from fastgan.data.arrays import Array
from fastgan.data.cache import NoRoomError, stream
from fastgan.data.catalogue import CATALOGUE
from fastgan.data.decode import SUFFIXES, WHITE, greatest, in_order, quiet_decoding
from fastgan.data.files import Files, Folder, Zip
from fastgan.data.imageset import ImageSet
from fastgan.data.memory import free_bytes, gib
from fastgan.data.pixels import ArrayPixels, FilePixels, Progress, Wanted, card_of, identity, opened_pixels
from fastgan.data.remarks import tell
from fastgan.data.shards import Shards, shards_of
from fastgan.data.sharing import processes

Source = str | os.PathLike[str] | torch.Tensor | np.ndarray
# Taken as the limit where the system does not tell how much memory is free.
UNKNOWN_LIMIT = 2 << 30
KINDS = "a folder, a .zip, a .tar or a folder of them, an idx file (also .gz), a .npy, a .npz or a tensor"

log = logging.getLogger("fastgan.data")


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
            images (never unpacked to disk), a .tar, a folder of them or NAME-{000..041}.tar as WebDataset writes them
            (`fastgan.data.shards`), an idx file, a .npy, a .npz, a NumPy array or a tensor (a uint8
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
            which are in memory already). None: half of the free main memory, shared by the processes that
            torchrun started on this machine. Where main memory holds them and half of the free memory of `device`
            does not, they stay in main memory.
        cache_dir: where that file is written, and found again by the next call; None: $FASTGAN_CACHE/data,
            else ~/.cache/fastgan/data. A process that was killed while it wrote leaves what it had to the next one.
            Where torchrun started several processes on this machine, one of them decodes files of images to there for
            all, and they all map that file.
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
        if isinstance(opened, Array):
            opened.require_sound()
        pixels = opened_pixels(opened, wanted)
        cap = _host_limit() if max_bytes is None else max_bytes
        images = read_pixels(opened, pixels, wanted, cap, cache_dir)
    tell(images.name, images.skipped, "skipped")
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
    card = target_of(card_of(out))
    if card.exists() and arrays.read_card(card) is None:
        raise ValueError(
            f"prepare: {card_of(out)}, where the labels go, must be of an earlier prepare or not exist yet; move it or "
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
                f"prepare: {out} needs {gib(pixels.bytes_needed)} and {place} has {gib(free)} free; "
                "choose another disk, a limit or a smaller image_size"
            )
        pixels.to_file(out, identity(opened, wanted))
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
    shards = shards_of(os.fspath(source))
    if shards is not None:
        return Shards(path, shards)
    if not path.exists():
        close = difflib.get_close_matches(str(source), CATALOGUE, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise ValueError(
            f"load: source must be a bundled set ({', '.join(CATALOGUE)}), {KINDS}; {path} does not exist{hint}"
        )
    suffix = path.suffix.lower()
    if path.is_dir() or suffix == ".zip":
        return Folder(path) if path.is_dir() else Zip(path)
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


def _host_limit() -> int:
    """Half of the free memory, or this process' share of it where torchrun started several on this machine."""
    free = free_bytes(torch.device("cpu"))
    return UNKNOWN_LIMIT if free is None else free // (2 * processes())


def read_pixels(
    opened: Files | Array,
    pixels: FilePixels | ArrayPixels,
    wanted: Wanted,
    cap: int,
    cache_dir: str | os.PathLike[str] | None,
) -> ImageSet:
    """The images in a file where memory may not hold them, else in memory: decoded by one of a machine's processes."""
    if pixels.bytes_needed > cap and opened.path is not None:
        return stream(opened, pixels, wanted, cap, cache_dir)
    if not isinstance(opened, Files) or processes() == 1:
        return pixels.to_memory()
    before = list(opened.skipped)
    try:
        found = stream(opened, pixels, wanted, cap, cache_dir)
    except (NoRoomError, WriteError) as error:
        log.warning("load: each process of this machine decodes all images for itself: %s", error)
        opened.skipped = before
        return pixels.to_memory()
    return ImageSet(found.images, found.labels, found.classes, name=found.name, skipped=found.skipped)


def _place(images: ImageSet, device: torch.device) -> ImageSet:
    """To the device, unless half of its free memory is too small for the pixels."""
    free = None if device.type == "cpu" or images.mapped else free_bytes(device)
    if free is None or images.nbytes <= free // 2:
        return images.to(device)
    return ImageSet(
        images.images, images.labels, images.classes, name=images.name, skipped=images.skipped, device=device
    )
