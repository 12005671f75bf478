"""Where decoded pictures go: main memory, or a .npy file that is mapped afterwards."""

from __future__ import annotations

import ast
import hashlib
import json
import logging
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from fastgan._writing import append, growing_file, part_of, write
from fastgan.data.decode import in_order

log = logging.getLogger("fastgan.data")

# A .npy header of fixed length, since the number of images is known only after the last one: 10 + 118 bytes.
HEADER = 128
# Bytes rewritten at once when a colour file turns out to be all grey.
BLOCK = 64 << 20
# Files between two marks, which is also what one checksum covers: 3 MB of 64 x 64 RGB, half a second of one core.
MARK = 256
# Bytes whose checksums are compared when a file is loaded, evenly spread over a longer one: 0.6 s on two cores.
CHECKED = 1 << 30


def npy_header(shape: tuple[int, ...]) -> bytes:
    """The first 128 bytes of a uint8 C-order .npy file, format version 1.0 of NumPy's NEP 1."""
    text = f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}, }}"
    if not ast.literal_eval(text) or len(text) > HEADER - 11:
        raise ValueError(f"load: an array of shape {shape} does not fit the header of a .npy file")
    return b"\x93NUMPY\x01\x00" + (HEADER - 10).to_bytes(2, "little") + text.ljust(HEADER - 11).encode() + b"\n"


class Mark(NamedTuple):
    """A line of the journal: what was in the file after the first `done` files of the source.

    pictures: in the file. grey: whether all of them are. skipped: since the mark before, [(file name, reason)].
    sha256: of the pictures since the mark before.
    """

    done: int
    pictures: int
    grey: bool
    skipped: list[tuple[str, str]]
    sha256: str


class MemoryStore:
    """Pictures uint8 [C, H, W] one after the other into one array with room for `capacity`."""

    marks: Sequence[Mark] = ()

    def __init__(self, capacity: int, shape: tuple[int, int, int]) -> None:
        # Untouched pages of an empty array cost nothing, so room for files that prove unreadable is free.
        self._array = np.empty((capacity, *shape), np.uint8)
        self._count = 0

    def add(self, pictures: np.ndarray) -> None:
        self._array[self._count : self._count + len(pictures)] = pictures
        self._count += len(pictures)

    def mark(self, done: int, grey: bool = False, skipped: Sequence[tuple[str, str]] = ()) -> None:
        """Memory is not gone on with."""

    def finish(self, grey: bool) -> np.ndarray:
        """All pictures [count, C, H, W]; with `grey` only their first channel."""
        array = self._array[: self._count]
        return np.ascontiguousarray(array[:, :1]) if grey and array.shape[1] != 1 else array


class FileStore:
    """Pictures uint8 [C, H, W] one after the other into a .npy file, which appears when it is complete.

    A process that ended early leaves the pictures and a journal; the next one begins after `marks`, the part of them
    whose checksums agree. of: what the pictures come from; another source begins anew. Another process that is at the
    same file is waited for.
    """

    def __init__(self, path: Path, shape: tuple[int, int, int], of: str) -> None:
        self.marks: list[Mark] = []
        self._shape = shape
        self._size = shape[0] * shape[1] * shape[2]
        self._count = 0
        self._digest = hashlib.sha256()
        self._stack = ExitStack()
        waiting = lambda: log.warning("load: another process writes %s, waiting for it", path)
        self._file: BinaryIO = self._stack.enter_context(growing_file(path, waiting))
        self._journal = part_of(path.with_suffix(".json"))
        self._take_up(json.dumps({"of": of, "shape": shape}))

    def __enter__(self) -> FileStore:
        return self

    def __exit__(self, kind: Any, *error: Any) -> None:
        self._stack.__exit__(kind, *error)
        if kind is None or not self._count:
            self._journal.unlink(missing_ok=True)

    def _take_up(self, title: str) -> None:
        """Go on after the last mark up to which the file is as it was written."""
        lines: list[str] = []
        with suppress(OSError, ValueError):
            lines = self._journal.read_text(encoding="utf-8").splitlines()
        self._file.seek(HEADER)
        for line in lines[1:] if lines[:1] == [title] else []:
            with suppress(ValueError, TypeError):  # a line that was cut off
                mark = Mark(*json.loads(line))
                content = self._file.read((mark.pictures - self._count) * self._size)
                if hashlib.sha256(content).hexdigest() == mark.sha256:
                    self.marks.append(mark._replace(skipped=[(name, why) for name, why in mark.skipped]))
                    self._count = mark.pictures
                    continue
            break
        self._file.truncate(HEADER + self._count * self._size if self._count else 0)
        self._file.seek(HEADER + self._count * self._size)
        write(self._journal, "".join(f"{line}\n" for line in [title, *map(json.dumps, self.marks)]))

    def add(self, pictures: np.ndarray) -> None:
        content = np.ascontiguousarray(pictures).data
        self._file.write(content)
        self._digest.update(content)
        self._count += len(pictures)

    def mark(self, done: int, grey: bool = False, skipped: Sequence[tuple[str, str]] = ()) -> None:
        """The first `done` files of the source are in the file, or `skipped`."""
        self._file.flush()
        self.marks.append(Mark(done, self._count, grey, list(skipped), self._digest.hexdigest()))
        self._digest = hashlib.sha256()
        append(self._journal, json.dumps(self.marks[-1]) + "\n")

    def finish(self, grey: bool) -> list[tuple[int, str]]:
        """Write the header, with `grey` after moving the first channels together; the checksums for `damage`.

        Everything must be marked.
        """
        channels, height, width = self._shape
        checksums = [(mark.pictures, mark.sha256) for mark in self.marks]
        if grey and channels != 1:
            checksums = self._drop_channels()
            channels = 1
        self._file.seek(0)
        self._file.write(npy_header((self._count, channels, height, width)))
        return checksums

    def _drop_channels(self) -> list[tuple[int, str]]:
        channels, size = self._shape[0], self._size // self._shape[0]
        found, start = [], 0
        for mark in self.marks:
            digest = hashlib.sha256()
            for first in range(start, mark.pictures, step := max(1, BLOCK // self._size)):
                count = min(step, mark.pictures - first)
                self._file.seek(HEADER + first * self._size)
                pictures = np.frombuffer(self._file.read(count * self._size), np.uint8)
                grey = np.ascontiguousarray(pictures.reshape(count, channels, size)[:, 0]).data
                self._file.seek(HEADER + first * size)
                self._file.write(grey)
                digest.update(grey)
            start = mark.pictures
            found.append((start, digest.hexdigest()))
        self._file.truncate(HEADER + self._count * size)
        return found


def damage(path: Path, shape: Sequence[int], checksums: Sequence[tuple[int, str]]) -> str:
    """What of a .npy of uint8 `shape` [M, ...] is not as a `FileStore` wrote it, in a few words, or "".

    checksums: (number of the first picture after it, SHA-256) of each block, in order. `CHECKED` bytes are read, evenly
    spread.
    """
    count, size = shape[0], int(np.prod(shape[1:]))
    if not checksums or checksums[-1][0] != count:
        return f"{count:,} images and there were {checksums[-1][0] if checksums else 0:,}"
    begin = path.stat().st_size - count * size
    starts = [0, *(end for end, _ in checksums)]
    share = min(1.0, CHECKED / max(1, count * size))
    some = np.unique(np.linspace(0, len(checksums) - 1, max(2, int(share * len(checksums)))).round().astype(int))

    def sound(number: int) -> bool:
        with path.open("rb") as file:
            file.seek(begin + starts[number] * size)
            content = file.read((starts[number + 1] - starts[number]) * size)
        return hashlib.sha256(content).hexdigest() == checksums[number][1]

    for number, good in zip(some, in_order(sound, some), strict=True):
        if not good:
            return f"other pixels among images {starts[number]:,} to {starts[number + 1] - 1:,}"
    return ""
