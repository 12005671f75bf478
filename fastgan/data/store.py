"""Where decoded pictures go: main memory, or a .npy file that is mapped afterwards."""

from __future__ import annotations

import ast
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO

import numpy as np

from fastgan._writing import atomic_file

# A .npy header of fixed length, since the number of images is known only after the last one: 10 + 118 bytes.
HEADER = 128
# Bytes rewritten at once when a colour file turns out to be all grey.
BLOCK = 64 << 20


def npy_header(shape: tuple[int, ...]) -> bytes:
    """The first 128 bytes of a uint8 C-order .npy file, format version 1.0 of NumPy's NEP 1."""
    text = f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}, }}"
    if not ast.literal_eval(text) or len(text) > HEADER - 11:
        raise ValueError(f"load: an array of shape {shape} does not fit the header of a .npy file")
    return b"\x93NUMPY\x01\x00" + (HEADER - 10).to_bytes(2, "little") + text.ljust(HEADER - 11).encode() + b"\n"


class MemoryStore:
    """Pictures uint8 [C, H, W] one after the other into one array with room for `capacity`."""

    def __init__(self, capacity: int, shape: tuple[int, int, int]) -> None:
        # Untouched pages of an empty array cost nothing, so room for files that prove unreadable is free.
        self._array = np.empty((capacity, *shape), np.uint8)
        self._count = 0

    def add(self, pictures: np.ndarray) -> None:
        self._array[self._count : self._count + len(pictures)] = pictures
        self._count += len(pictures)

    def finish(self, grey: bool) -> np.ndarray:
        """All pictures [count, C, H, W]; with `grey` only their first channel."""
        array = self._array[: self._count]
        return np.ascontiguousarray(array[:, :1]) if grey and array.shape[1] != 1 else array


class FileStore:
    """Pictures uint8 [C, H, W] one after the other into a .npy file, which appears when it is complete."""

    def __init__(self, path: Path, shape: tuple[int, int, int]) -> None:
        self.path = path
        self._shape = shape
        self._count = 0
        self._stack = ExitStack()
        self._file: BinaryIO = self._stack.enter_context(atomic_file(path))
        self._file.write(bytes(HEADER))

    def __enter__(self) -> FileStore:
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.__exit__(*error)  # type: ignore[arg-type]

    def add(self, pictures: np.ndarray) -> None:
        self._file.write(np.ascontiguousarray(pictures).data)
        self._count += len(pictures)

    def finish(self, grey: bool) -> None:
        """Write the header, with `grey` after moving the first channels together."""
        channels, height, width = self._shape
        if grey and channels != 1:
            self._drop_channels()
            channels = 1
        self._file.seek(0)
        self._file.write(npy_header((self._count, channels, height, width)))

    def _drop_channels(self) -> None:
        channels, height, width = self._shape
        size = height * width
        block = max(1, BLOCK // (channels * size))
        for start in range(0, self._count, block):
            count = min(block, self._count - start)
            self._file.seek(HEADER + start * channels * size)
            pictures = np.frombuffer(self._file.read(count * channels * size), np.uint8)
            self._file.seek(HEADER + start * size)
            self._file.write(np.ascontiguousarray(pictures.reshape(count, channels, size)[:, 0]).data)
        self._file.truncate(HEADER + self._count * size)
