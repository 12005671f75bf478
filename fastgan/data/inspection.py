"""What a folder, a zip or an array of images holds, before anything is trained on it."""

from __future__ import annotations

import math
from collections import Counter
from contextlib import closing
from typing import Any

import numpy as np

from fastgan.data import arrays
from fastgan.data.decode import Facts, decode_all, quiet_decoding
from fastgan.data.files import Files
from fastgan.data.loading import Source, open_source
from fastgan.data.pixels import FOLDER_SIZE, Progress, Wanted

FEW = 500  # images: of 200 augmentation made a sixth of the kernel distance (docs/train-on-a-folder.md)
SIZES = (16, 32, 64, 128, 256, 512, 1024)


class Inspection(dict[str, Any]):
    """The findings of `inspect` as plain values (JSON); str() is a report of a few lines."""

    def __str__(self) -> str:
        lines = [f"{self['path']}: {self['images']:,} images ({self['kind']})"]
        for title, key in (("sizes", "sizes"), ("modes", "modes"), ("classes", "classes")):
            if self[key]:
                top = (
                    sorted(self[key].items(), key=lambda item: -item[1])
                    if key != "classes"
                    else list(self[key].items())
                )
                more = f", and {len(top) - 8} more" if len(top) > 8 else ""
                said = ", ".join(f"{name}: {count:,}" for name, count in top[:8]) + more
                alone = key == "sizes" and more and top[0][1] == 1
                lines.append(f"{title:11}" + (f"{len(top):,}, no two images have the same" if alone else said))
        if self["short_side"]:
            low, median, high = (self["short_side"][key] for key in ("min", "median", "max"))
            lines.append(f"{'short side':11}{low} to {high} pixels, median {median}")
        notes = {key: self[key] for key in ("grey", "transparent", "rotated", "not_square") if self[key]}
        if notes:
            lines.append(f"{'of these':11}" + ", ".join(f"{k.replace('_', ' ')}: {n:,}" for k, n in notes.items()))
        if self["ignored"]:
            lines.append(f"{'ignored':11}" + ", ".join(f"{name}: {n:,}" for name, n in self["ignored"].items()))
        if self["unreadable"]:
            lines.append(f"{'unreadable':11}{len(self['unreadable']):,}")
            lines += [f"  {name}: {why}" for name, why in self["unreadable"][:20]]
            if len(self["unreadable"]) > 20:
                lines.append(f"  and {len(self['unreadable']) - 20:,} more")
        if self["suggestion"]:
            size, channels = self["suggestion"]["image_size"], self["suggestion"]["channels"]
            mib = self["suggestion"]["bytes"] / 2**20
            lines.append(f"{'suggestion':11}image_size={size}, channels={channels}: {mib:,.1f} MiB of pixels")
            if len(self["classes"] or {}) > 1:
                lines.append(f"{'':11}--conditional trains with the classes")
            if self["images"] < FEW:
                lines.append(
                    f"{'':11}--augment colour,translation,cutout, since a discriminator learns so few by heart"
                )
        return "\n".join(lines)


def inspect(source: Source, *, limit: int | None = None, progress: Progress | None = None) -> Inspection:
    """Decode every image of `source` once and say what is there; nothing is kept or written.

    Args:
        source: as for `load`. limit: at most so many files, evenly spread; the rest is only counted.
        progress: called with (files done, files in all), now and then.

    Returns:
        A dict: path, kind, images (readable), examined, sizes {"WxH": n}, short_side {min, median, max},
        modes {Pillow's mode or the dtype: n}, grey, transparent, rotated, not_square (counts), classes
        {name: n} or None, unreadable [(name, reason)], ignored {suffix: n}, suggestion {image_size, channels,
        bytes} or None if nothing is readable.

    Raises:
        ValueError, TypeError: as for `load`; a source without any readable image is no error here.
    """
    wanted = Wanted(limit=limit, progress=progress)
    with closing(open_source(source)) as opened:
        if isinstance(opened, Files):
            return _inspect_files(opened, wanted)
        return _inspect_array(opened)


def all_grey(source: Source) -> bool:
    """Whether every readable image is grey: red, green and blue agree in every pixel, whatever the file's mode.

    Ends at the first image that is not, so it is quick on a set of colour images; on one of grey images it decodes all
    of them once. False where no image is readable. Raises what `load` raises for a source that is none.
    """
    with closing(open_source(source)) as opened:
        if not isinstance(opened, Files):
            return arrays.channels_last(opened).shape[-1] == 1
        found = False
        with quiet_decoding(), closing(decode_all(opened.names, opened.open, FOLDER_SIZE, None)) as pictures:
            for picture in pictures:
                if picture.facts is not None and not picture.facts.grey:
                    return False
                found = found or picture.facts is not None
        return found


def _inspect_files(files: Files, wanted: Wanted) -> Inspection:
    names = [files.names[i] for i in wanted.numbers(len(files.names))]
    good: list[str] = []
    facts: list[Facts] = []
    with quiet_decoding():
        for done, picture in enumerate(decode_all(names, files.open, FOLDER_SIZE, None), 1):
            if picture.facts is None:
                files.skip(picture.name, picture.reason)
            else:
                good.append(picture.name)
                facts.append(picture.facts)
            if done % 256 == 0 or done == len(names):
                wanted.report(done, len(names))
    labelled = files.labels(good)
    classes = None
    if labelled:
        counts = Counter(labelled[0])
        classes = {name: counts[number] for number, name in enumerate(labelled[1])}
    # Of files that were not examined the share of readable ones is taken to be the same.
    images = len(good) + (len(files.names) - len(names)) * len(good) // max(1, len(names))
    return Inspection(
        path=str(files.path),
        kind=files.kind,
        images=images,
        examined=len(names),
        sizes=dict(Counter(f"{fact.width}x{fact.height}" for fact in facts).most_common()),
        short_side=_short_sides([min(fact.width, fact.height) for fact in facts]),
        modes=dict(Counter(fact.mode for fact in facts).most_common()),
        grey=sum(fact.grey for fact in facts),
        transparent=sum(fact.transparent for fact in facts),
        rotated=sum(fact.rotated for fact in facts),
        not_square=sum(fact.width != fact.height for fact in facts),
        classes=classes,
        unreadable=sorted(files.skipped),
        ignored=dict(files.ignored.most_common()),
        suggestion=_suggestion([min(f.width, f.height) for f in facts], all(f.grey for f in facts), images),
    )


def _inspect_array(array: arrays.Array) -> Inspection:
    values = arrays.channels_last(array)
    arrays.value_range(values, array.name)
    count, height, width, channels = values.shape
    labels, names = arrays.checked_labels(array)
    classes = None
    if labels is not None and names is not None:
        numbers = np.bincount(labels, minlength=len(names))
        classes = {name: int(number) for name, number in zip(names, numbers, strict=True)}
    side = min(height, width)
    return Inspection(
        path=array.name,
        kind="array",
        images=count,
        examined=count,
        sizes={f"{width}x{height}": count},
        short_side={"min": side, "median": side, "max": side},
        modes={f"{values.dtype} x {channels}": count},
        grey=count if channels == 1 else 0,
        transparent=count if channels == 4 else 0,
        rotated=0,
        not_square=0 if height == width else count,
        classes=classes,
        unreadable=list(array.skipped),
        ignored={},
        suggestion=_suggestion([side], channels == 1, count),
    )


def _short_sides(sides: list[int]) -> dict[str, int] | None:
    if not sides:
        return None
    return {"min": min(sides), "median": sorted(sides)[len(sides) // 2], "max": max(sides)}


def _suggestion(sides: list[int], grey: bool, images: int) -> dict[str, int] | None:
    """A power of two that three quarters of the images reach, if need be by 15 % of enlargement.

    The 15 % let 28 become 32 and 120 become 128; more would train on blur.
    """
    if not sides:
        return None
    quarter = sorted(sides)[len(sides) // 4]
    size = max((s for s in SIZES if s <= math.floor(1.15 * quarter)), default=SIZES[0])
    channels = 1 if grey else 3
    return {"image_size": size, "channels": channels, "bytes": images * channels * size * size}
