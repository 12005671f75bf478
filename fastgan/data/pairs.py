"""Pairs of pictures to train image-to-image networks on: from two folders, side by side in one file, or made."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import PurePosixPath
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from fastgan.data.decode import decode, in_order, pillow, quiet_decoding, reason, to_pixels
from fastgan.data.files import Files, plural
from fastgan.data.imageset import ImageSet
from fastgan.data.loading import load, open_source, read_pixels
from fastgan.data.memory import require
from fastgan.data.pixels import FilePixels, Wanted
from fastgan.data.remarks import tell
from fastgan.data.sharing import Read, read_once
from fastgan.data.store import MemoryStore

__all__ = ["MADE", "PairSet", "UnpairedSet", "load_pairs", "load_unpaired", "made_from", "two_folders"]


class PairSet(ImageSet):
    """Pairs as one picture each, uint8 [M, source_channels + C, H, W]: the planes of the source, then the target's.

    So a pair is picked, mirrored, held out and hashed as one.
    """

    def __init__(self, images: Tensor, source_channels: int, **facts: Any):
        super().__init__(images, **facts)
        if not 0 < source_channels < images.shape[1]:
            raise ValueError(
                f"PairSet: source_channels must leave planes for the target, got {source_channels} of {images.shape[1]}"
            )
        self.source_channels = source_channels

    @property
    def sources(self) -> Tensor:
        """uint8 [M, source_channels, H, W]"""
        return self.images[:, : self.source_channels]

    @property
    def targets(self) -> Tensor:
        """uint8 [M, C, H, W]"""
        return self.images[:, self.source_channels :]

    def select(self, numbers: Tensor) -> PairSet:
        """The pairs of these numbers, int64 [K], as a set of their own."""
        images = self.images[numbers.to(self.images.device)]
        return PairSet(images, self.source_channels, name=self.name, device=self.device)

    def to(self, device: torch.device | str) -> PairSet:
        """The same pairs on `device`."""
        moved = super().to(device)
        return PairSet(moved.images, self.source_channels, name=self.name, skipped=self.skipped, device=moved.device)


class UnpairedSet:
    """Pictures of two sides that do not belong together one by one; attributes are those of `fastgan.data.Samples`."""

    labels = classes = mapped = None

    def __init__(self, a: ImageSet, b: ImageSet, *, name: str = "two sides"):
        self.a, self.b, self.name = a, b, name
        self.device = a.device

    @property
    def parts(self) -> tuple[ImageSet, ImageSet]:
        """Both sides."""
        return self.a, self.b

    @property
    def skipped(self) -> list[tuple[str, str]]:
        """Of both sides."""
        return [*self.a.skipped, *self.b.skipped]

    def __len__(self) -> int:
        """Of the larger side."""
        return max(len(self.a), len(self.b))


# ---- sources that are made from targets ------------------------------------------------------------------------------


def _grey(pictures: Tensor) -> Tensor:
    """Luminance uint8 [M, 1, H, W], by the weights of Rec. 601 that Pillow uses."""
    if pictures.shape[1] == 1:
        return pictures
    weights = torch.tensor([0.299, 0.587, 0.114], device=pictures.device).view(1, 3, 1, 1)
    return (pictures.float() * weights).sum(1, keepdim=True).round().clamp(0, 255).to(torch.uint8)


def _outlines(pictures: Tensor) -> Tensor:
    """White lines on black, uint8 [M, 1, H, W]: how much grey pixels differ from those to the right and below."""
    grey = _grey(pictures).float()
    across = pad(grey[..., 1:] - grey[..., :-1], (0, 1)).abs()
    down = pad(grey[..., 1:, :] - grey[..., :-1, :], (0, 0, 0, 1)).abs()
    return (across + down).clamp(0, 255).to(torch.uint8)


def _negative(pictures: Tensor) -> Tensor:
    return 255 - pictures


MADE: dict[str, Callable[[Tensor], Tensor]] = {"outlines": _outlines, "grey": _grey, "negative": _negative}


def made_from(pictures: Tensor, kind: str, channels: int) -> Tensor:
    """Sources uint8 [M, channels, H, W] made from targets uint8 [M, C, H, W].

    kind: "outlines", "grey" or "negative". ValueError for another, and where the channels cannot be had.
    """
    if kind not in MADE:
        raise ValueError(f"pairs: a source is made as one of {', '.join(MADE)}, got {kind!r}")
    parts = [MADE[kind](part) for part in pictures.split(1024)]
    made = torch.cat(parts)
    if made.shape[1] not in (1, channels):
        raise ValueError(f"pairs: {kind} of these pictures has {made.shape[1]} channels, the recipe wants {channels}")
    return made.expand(-1, channels, -1, -1)


# ---- pairs from files ------------------------------------------------------------------------------------------------


class _Pair(NamedTuple):
    """Where a pair comes from: one file that holds both halves side by side, or two files."""

    first: str
    second: str | None


def two_folders(files: Files) -> tuple[list[str], list[str], str, str] | None:
    """(names in the first folder, names in the second, and the folders) of a source that holds two folders of pictures.

    Folders count in sorted order, so that a and b, source and target or trainA and trainB are what they say. None where
    there are not two; one folder that wraps everything, as zips often have, is looked through.
    """
    names = [PurePosixPath(name) for name in files.names]
    depth = 0
    while names and all(len(p.parts) > depth + 1 for p in names) and len({p.parts[depth] for p in names}) == 1:
        depth += 1
    groups: dict[str, list[str]] = defaultdict(list)
    for path in names:
        groups[path.parts[depth] if len(path.parts) > depth + 1 else ""].append(str(path))
    if len(groups) != 2 or "" in groups:
        return None
    (a, first), (b, second) = sorted(groups.items())
    return first, second, a, b


def _matched(files: Files, first: Sequence[str], second: Sequence[str], a: str, b: str) -> Iterator[_Pair]:
    """Files of the same path and name below both folders, whatever their suffix. Those without a partner are named."""

    def keys(names: Sequence[str], folder: str) -> dict[str, str]:
        found: dict[str, str] = {}
        for name in names:
            path = PurePosixPath(name)
            below = PurePosixPath(*path.parts[path.parts.index(folder) + 1 :])
            if str(below.with_suffix("")) in found:
                files.skip(name, f"{found[str(below.with_suffix(''))]} has its name too")
            found.setdefault(str(below.with_suffix("")), name)
        return found

    left, right = keys(first, a), keys(second, b)
    for key in left.keys() - right.keys():
        files.skip(left[key], f"has no partner in {b}")
    for key in right.keys() - left.keys():
        files.skip(right[key], f"has no partner in {a}")
    for key in sorted(left.keys() & right.keys()):
        yield _Pair(left[key], right[key])


def _whole(files: Files, name: str) -> np.ndarray:
    with files.open(name) as (file, _):
        return decode(file, None, None)[0]


def _halves(files: Files, pair: _Pair) -> tuple[np.ndarray, np.ndarray]:
    """Both pictures uint8 [H, W, C], uncut. ValueError where they cannot lie on each other."""
    first = _whole(files, pair.first)
    height, width = first.shape[:2]
    if pair.second is None:
        if width <= height:
            raise ValueError(f"{width}x{height} is no pair side by side, which is wider than high")
        return first[:, : width // 2], first[:, width - width // 2 :]
    second = _whole(files, pair.second)
    other_height, other_width = second.shape[:2]
    if abs(width * other_height - height * other_width) > max(width, height, other_width, other_height):
        raise ValueError(f"{width}x{height} and its partner {other_width}x{other_height} have other proportions")
    return first, second


def _planes(picture: np.ndarray, size: int, channels: int) -> np.ndarray:
    image = pillow().fromarray(picture[..., 0] if picture.shape[-1] == 1 else picture)
    return to_pixels(image, size, channels)[0].transpose(2, 0, 1)


def _from_files(files: Files, size: int, source_channels: int, channels: int, direction: str) -> Read:
    found = two_folders(files)
    pairs = list(_matched(files, *found)) if found else [_Pair(name, None) for name in files.names]
    require(len(pairs) * (source_channels + channels) * size * size, "cpu", f"load: {plural(len(pairs), 'pair')}")
    store, count = MemoryStore(len(pairs), (source_channels + channels, size, size)), 0

    def one(pair: _Pair) -> np.ndarray | str:
        try:
            source, target = _halves(files, pair)
            source, target = (source, target) if direction == "ab" else (target, source)
            return np.concatenate([_planes(source, size, source_channels), _planes(target, size, channels)])
        except Exception as error:  # damaged files make Pillow raise nearly anything
            return reason(error)

    with quiet_decoding():
        for pair, planes in zip(pairs, in_order(one, pairs), strict=True):
            if isinstance(planes, str):
                files.skip(pair.first, planes)
            else:
                store.add(planes[None])
                count += 1
    files.skipped.sort()
    if not count:
        raise ValueError(
            f"load: {files.path} must hold pairs, two folders with files of the same names or pictures with both "
            f"halves side by side; it has {files.found()}"
        )
    return Read(torch.from_numpy(store.finish(False)), files.skipped, {})


def load_pairs(
    source: Any,
    *,
    image_size: int,
    channels: int = 3,
    source_channels: int = 3,
    made: str = "auto",
    direction: str = "ab",
    device: torch.device | str = "cpu",
) -> PairSet:
    """Pairs of square pictures.

    Args:
        source: a folder or a zip with two folders of pictures, whose files of the same name are pairs, or with pictures
            that hold a pair side by side; for pairs that are made, whatever `fastgan.data.load` takes.
        image_size: in pixels. The centre square of each picture is resized to it.
        channels: 1 or 3, of the target; source_channels: of the source.
        made: "no": the source holds pairs. "outlines", "grey" or "negative": each source is made from its target.
            "auto": outlines of a bundled set or an array, pairs in a folder or a zip.
        direction: "ab": the first folder (or the left half) is the source; "ba": the second.
        device: where batches come out.

    Raises:
        ValueError: no pair at all, or arguments that cannot be meant. A pair that cannot be used (a file without a
            partner, damaged, of other proportions) is named in `skipped`, and all of them are logged in one line.
    """
    if made not in ("auto", "no", *MADE):
        raise ValueError(f"pairs: made must be one of auto, no, {', '.join(MADE)}, got {made!r}")
    if direction not in ("ab", "ba"):
        raise ValueError(f"pairs: direction must be ab or ba, got {direction!r}")
    with closing(open_source(source)) as opened:
        if made == "no" and not isinstance(opened, Files):
            raise ValueError(f"pairs: a folder or a zip must hold the pairs, got {os.fspath(source)!r}")
        if isinstance(opened, Files) and made in ("auto", "no"):
            of = lambda: [opened.fingerprint(), image_size, source_channels, channels, direction]
            read = lambda: _from_files(opened, image_size, source_channels, channels, direction)
            pairs = read_once("pairs", of, read)
            name = opened.path.name or str(opened.path)
            tell(name, pairs.remarks, "skipped")
            return PairSet(pairs.values, source_channels, name=name, skipped=pairs.remarks).to(device)
    images = load(source, image_size=image_size, channels=channels)
    sources = made_from(images.images, "outlines" if made == "auto" else made, source_channels)
    planes = torch.cat([sources, images.images], 1)
    return PairSet(planes, source_channels, name=images.name, skipped=images.skipped).to(device)


def load_unpaired(
    source: Any, *, image_size: int, channels: int = 3, made: str = "auto", device: torch.device | str = "cpu"
) -> UnpairedSet:
    """Two sides of square pictures.

    Args:
        source: a folder or a zip with two folders of pictures, in sorted order a and b; for sides that are made,
            whatever `fastgan.data.load` takes.
        image_size, channels, device: as for `load_pairs`, the same for both sides.
        made: "no": the source holds both. "outlines", "grey" or "negative": b is every second picture, a is made from
            the others, so that no picture is on both sides. "auto": outlines of a bundled set or an array, two folders
            in a folder or a zip.

    Raises:
        ValueError: no two sides, or one without a readable picture. A damaged file is named in `skipped`.
    """
    if made not in ("auto", "no", *MADE):
        raise ValueError(f"unpaired: made must be one of auto, no, {', '.join(MADE)}, got {made!r}")
    with closing(open_source(source)) as opened:
        if made == "no" and not isinstance(opened, Files):
            raise ValueError(f"unpaired: a folder or a zip must hold both sides, got {os.fspath(source)!r}")
        if isinstance(opened, Files) and made in ("auto", "no"):
            found = two_folders(opened)
            if found is None:
                raise ValueError(
                    f"load: {opened.path} must hold two folders of pictures, one a side; it has "
                    f"{plural(len(opened.names), 'picture')} and {opened.found()}"
                )
            sides, wanted, unread = [], Wanted(image_size, channels), opened.skipped
            for names in found[:2]:
                opened.names, opened.skipped = names, []
                pixels = FilePixels(opened, wanted)
                sides.append(read_pixels(opened, pixels, wanted, pixels.bytes_needed, None).to(device))
            sides[0].skipped = sorted(unread + sides[0].skipped)
            both = UnpairedSet(*sides, name=opened.path.name or str(opened.path))
            tell(both.name, both.skipped, "skipped")
            return both
    images = load(source, image_size=image_size, channels=channels)
    numbers = torch.arange(len(images))
    if len(images) < 2:
        raise ValueError(f"unpaired: two sides need 2 pictures at least, {images.name} has {len(images)}")
    a, b = images.select(numbers[::2]), images.select(numbers[1::2])
    sources = made_from(a.images, "outlines" if made == "auto" else made, channels).contiguous()
    a = ImageSet(sources, name=images.name, skipped=images.skipped)
    return UnpairedSet(a.to(device), b.to(device), name=images.name)
