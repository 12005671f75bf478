"""Images that are already arrays: idx, .npy and .npz files, NumPy arrays and tensors."""

from __future__ import annotations

import gzip
import json
import math
import mmap
import sys
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastgan.data.store import damage

IDX_TYPES = {0x08: "u1", 0x09: "i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
IMAGE_KEYS = ("images", "x", "x_train", "X", "data", "arr_0")
LABEL_KEYS = ("labels", "y", "y_train", "label", "targets")
# Images converted at once: 1,024 of 256 x 256 RGB in float32 are 0.8 GB, of 64 x 64 they are 50 MB.
CHUNK = 1024
# Not in Python's mmap before 3.13; the number is Linux's on x86, ARM and RISC-V.
MAP_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000 if sys.platform == "linux" else 0)


@dataclass
class Array:
    """Images as an array or memory map [M, H, W] or [M, C, H, W] or [M, H, W, C], not yet converted."""

    name: str
    values: np.ndarray
    labels: np.ndarray | None = None
    classes: list[str] | None = None
    skipped: list[tuple[str, str]] = field(default_factory=list)
    path: Path | None = None
    checksums: list[tuple[int, str]] | None = None

    def damage(self) -> str:
        """What is no longer as `prepare` wrote it, in a few words, or "": see `store.damage`."""
        if self.path is None or self.checksums is None:
            return ""
        return damage(self.path, self.values.shape, self.checksums)

    def require_sound(self) -> None:
        """Raise ValueError where the file is damaged."""
        found = self.damage()
        if found:
            raise ValueError(
                f"load: {self.path} must be as `prepare` wrote it, it has {found}; prepare it again, or delete the "
                ".json beside it to take it as it is"
            )

    def close(self) -> None:
        """Nothing to close: a memory map lives as long as the images do."""

    def fingerprint(self) -> str:
        """Changes when the file is rewritten."""
        if self.path is None:
            raise ValueError(f"load: {self.name} is no file")
        status = self.path.stat()
        return f"{self.path.resolve()} {status.st_size} {status.st_mtime_ns}"


def idx_suffix(path: Path) -> bool:
    """True for names as idx files have them: *-ubyte, *.idx, either also with .gz."""
    name = path.name.lower().removesuffix(".gz")
    return name.endswith(("-ubyte", ".idx", ".idx1", ".idx3", ".idx4"))


def read_idx(path: Path) -> np.ndarray:
    """The array in an idx file (gzipped or not): LeCun's format, http://yann.lecun.com/exdb/mnist.

    Raises ValueError if it is no idx file or holds fewer values than its header announces.
    """
    with path.open("rb") as raw:
        zipped = raw.read(2) == b"\x1f\x8b"
    try:
        with gzip.open(path, "rb") if zipped else path.open("rb") as file:
            magic = file.read(4)
            if len(magic) < 4 or magic[:2] != b"\0\0" or magic[2] not in IDX_TYPES or not 1 <= magic[3] <= 4:
                raise ValueError(
                    f"load: an idx file must start with 00 00 TYPE DIMS, {path} starts with {magic.hex(' ')}"
                )
            dtype = np.dtype(IDX_TYPES[magic[2]])
            shape = tuple(int(n) for n in np.frombuffer(file.read(4 * magic[3]), ">u4"))
            wanted = math.prod(shape) * dtype.itemsize
            if len(shape) == magic[3] and not zipped and path.stat().st_size >= 4 + 4 * len(shape) + wanted:
                return mapped(path, dtype, shape, 4 + 4 * len(shape))
            content = file.read(wanted) if len(shape) == magic[3] and wanted else b""
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"load: an idx file must be complete, {path} is not ({error}); download it again") from error
    if not wanted or len(content) < wanted:
        raise ValueError(
            f"load: {path} announces {' x '.join(map(str, shape))} values but holds {len(content):,} of "
            f"{wanted:,} bytes; download it again"
        )
    return np.frombuffer(bytearray(content), dtype).reshape(shape)


def _idx_labels(path: Path) -> Path | None:
    """The label file that goes with an image file: the same name with labels for images and idx1 for idx3."""
    name = path.name.replace("images", "labels").replace("idx3", "idx1")
    if name == path.name:
        return None
    other = name.removesuffix(".gz") if name.endswith(".gz") else f"{name}.gz"
    return next((path.with_name(n) for n in (name, other) if path.with_name(n).is_file()), None)


def from_idx(path: Path) -> Array:
    values = read_idx(path)
    if values.ndim < 3:
        raise ValueError(
            f"load: an idx file of images must have 3 or 4 dimensions, {path} has {values.ndim} "
            f"({'labels?' if values.ndim == 1 else 'vectors?'}); pass the image file"
        )
    label_path = _idx_labels(path)
    return Array(path.name, values, None if label_path is None else read_idx(label_path), path=path)


def from_npy(path: Path) -> Array:
    """A .npy of images, memory-mapped, with the labels in the .json that `prepare` writes beside it."""
    try:
        found = np.load(path, mmap_mode="r", allow_pickle=False)
        order = "C" if found.flags.c_contiguous else "F"
        values = mapped(path, found.dtype, found.shape, found.offset, order)
    except (ValueError, OSError, EOFError) as error:
        raise ValueError(f"load: a .npy must hold an array of numbers, {path} does not: {error}") from error
    array = Array(path.stem, values, path=path)
    facts = read_card(path.with_suffix(".json"))
    if facts is not None:
        array.name = facts["name"]
        array.classes = facts["classes"]
        array.labels = None if facts["labels"] is None else np.asarray(facts["labels"], np.int64)
        array.skipped = [(name, why) for name, why in facts["skipped"]]
        if "checksums" in facts:  # cards of earlier versions have none
            array.checksums = [(end, digest) for end, digest in facts["checksums"]]
    return array


def mapped(path: Path, dtype: np.dtype, shape: tuple[int, ...], offset: int, order: Any = "C") -> np.ndarray:
    """An array of a file's bytes that stays there: what is written to it stays in memory.

    Memory for such writing is not reserved: numpy's own mode "c" does, so that Linux refuses files larger than main
    memory with "Cannot allocate memory".
    """
    if not hasattr(mmap, "MAP_PRIVATE"):  # Windows
        return np.memmap(path, dtype, "c", offset, shape, order)
    with path.open("rb") as file:
        flags, protection = mmap.MAP_PRIVATE | MAP_NORESERVE, mmap.PROT_READ | mmap.PROT_WRITE
        buffer = mmap.mmap(file.fileno(), 0, flags=flags, prot=protection)
    return np.ndarray.__new__(np.memmap, shape, dtype, buffer, offset, order=order)


def read_card(path: Path) -> dict[str, Any] | None:
    """What `prepare` wrote beside a .npy, or None where `path` does not exist or is something else."""
    try:
        facts = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return facts if isinstance(facts, dict) and "fastgan" in facts else None


def from_npz(path: Path) -> Array:
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {key: archive[key] for key in archive.files}
    except (ValueError, OSError, EOFError, zlib.error) as error:
        raise ValueError(f"load: a .npz must hold arrays of numbers, {path} does not: {error}") from error
    except Exception as error:
        # zipfile raises BadZipFile, NotImplementedError or RuntimeError, by what is damaged.
        raise ValueError(f"load: a .npz must be a readable archive, {path} is not: {error}") from error
    images = [key for key in IMAGE_KEYS if key in arrays and arrays[key].ndim >= 3]
    images = images or [key for key in arrays if arrays[key].ndim >= 3]
    if not images or (len(images) > 1 and images[0] not in IMAGE_KEYS):
        held = ", ".join(f"{key} {list(value.shape)}" for key, value in arrays.items())
        raise ValueError(f"load: a .npz must name its images, {path} holds {held or 'nothing'}; call the key 'images'")
    count = len(arrays[images[0]])
    labels = next((arrays[k] for k in LABEL_KEYS if k in arrays and arrays[k].shape == (count,)), None)
    return Array(path.stem, arrays[images[0]], labels, path=path)


def from_memory(source: Any) -> Array:
    """A tensor on any device or a NumPy array."""
    if isinstance(source, torch.Tensor):
        source = source.detach().cpu()
        source = (source.float() if source.dtype in (torch.bfloat16, torch.float16) else source).numpy()
    return Array("tensor", np.asarray(source))


def channels_last(array: Array) -> np.ndarray:
    """A view [M, H, W, C] with C in 1, 3, 4. A 4-D array is [M, C, H, W] if dimension 1 is 1, 3 or 4."""
    values, shape = array.values, list(array.values.shape)
    if values.ndim == 3:
        if shape[-1] in (3, 4) and min(shape[:2]) > 4:
            raise ValueError(
                f"load: images must be [M, H, W], [M, C, H, W] or [M, H, W, C], {array.name} is {shape}, "
                "which looks like one picture; add a first dimension"
            )
        values = values[..., None]
    elif values.ndim == 4 and shape[1] in (1, 3, 4):
        values = values.transpose(0, 2, 3, 1)
    if values.ndim != 4 or values.shape[-1] not in (1, 3, 4) or 0 in values.shape:
        raise ValueError(
            "load: images must be [M, H, W], [M, C, H, W] or [M, H, W, C] with 1, 3 or 4 channels and no "
            f"dimension 0, {array.name} is {shape}"
        )
    return values


def value_range(values: np.ndarray, name: str, white: int = 65535) -> tuple[float, float]:
    """(offset, scale) by which `values` become 0..255: (x + offset) * scale.

    uint8 as it is; bool 0/1; uint16 0..white; other integers 0..255; floats 0..1 or -1..1, told apart by
    whether any value is negative. Anything else is a ValueError: guessing would make black or white pictures.
    """
    dtype = values.dtype
    if dtype == np.uint8:
        return 0.0, 1.0
    if dtype == np.bool_:
        return 0.0, 255.0
    if dtype == np.uint16:
        return 0.0, 255 / white
    if dtype.kind not in "iuf":
        raise ValueError(f"load: images must be integers or floats, {name} has dtype {dtype}")
    low, high = math.inf, -math.inf
    for start in range(0, len(values), CHUNK):
        part = values[start : start + CHUNK]
        if dtype.kind == "f" and not np.isfinite(part).all():
            raise ValueError(
                f"load: images must be finite, {name} holds NaN or infinity among images {start} to "
                f"{start + len(part) - 1}; remove them"
            )
        low, high = min(low, float(part.min())), max(high, float(part.max()))
    if dtype.kind in "iu" and low >= 0 and high <= 255:
        return 0.0, 1.0
    if dtype.kind == "f" and low >= 0 and high <= 1:
        return 0.0, 255.0
    if dtype.kind == "f" and low >= -1 and high <= 1:
        return 1.0, 127.5
    wanted = "0..1 or -1..1 as floats" if dtype.kind == "f" else "0..255 as integers"
    raise ValueError(f"load: images must lie in {wanted}, {name} ({dtype}) lies in {low:g}..{high:g}; use uint8 0..255")


def to_uint8_pixels(values: np.ndarray, offset: float, scale: float) -> np.ndarray:
    """(values + offset) * scale rounded to the nearest uint8; uint8 comes back as it is."""
    if values.dtype == np.uint8:
        return values
    return np.rint((values.astype(np.float64) + offset) * scale).clip(0, 255).astype(np.uint8)


def checked_labels(array: Array) -> tuple[np.ndarray | None, list[str] | None]:
    """Labels as int64 and one class name for each number, from `classes` or the numbers themselves."""
    if array.labels is None:
        return None, None
    labels, count = np.asarray(array.labels), len(array.values)
    if labels.shape != (count,) or labels.dtype.kind not in "iu" or labels.min(initial=0) < 0:
        low = f" from {labels.min()}" if labels.size and labels.dtype.kind in "iu" else ""
        raise ValueError(
            f"load: labels must be {count} integers from 0 up, {array.name} has {labels.dtype} "
            f"{list(labels.shape)}{low}"
        )
    labels = labels.astype(np.int64)
    return labels, array.classes or [str(number) for number in range(int(labels.max(initial=0)) + 1)]
