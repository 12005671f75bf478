"""Images in tar archives, as WebDataset writes them: `shard-000000.tar` with `0001.jpg`, and its class in `0001.cls`.

Source of the conventions: https://github.com/webdataset/webdataset, "The WebDataset Format". A sample's key is its
path up to the first dot of its file's name; files of one key belong together. Images are read in place, by their
offsets: nothing is unpacked.
"""

from __future__ import annotations

import hashlib
import re
import tarfile
from array import array
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import BytesIO
from itertools import compress
from operator import not_
from pathlib import Path
from typing import BinaryIO

from fastgan.data.decode import MAX_FILE_BYTES
from fastgan.data.files import Files, class_labels, inner_name, plural

__all__ = ["Shards", "shards_of"]

COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
_CLASS_BYTES = 64  # a class number has at most 19 digits
_NONE = -1  # of classes


def shards_of(source: str) -> list[Path] | None:
    """The tar files that `source` names, in order: one .tar, a folder of them, or NAME-{000000..000041}.tar.

    None where it names something else: a folder without a .tar at its top, or with images beside them, say.

    Raises:
        ValueError: a file of the range does not exist, or the archive is a compressed one.
    """
    path, found = Path(source).expanduser(), _RANGE.search(source)
    if str(source).lower().endswith(COMPRESSED):
        raise ValueError(f"load: tar files must be uncompressed, to be read at any place, got {source}; unpack it once")
    if found and not path.exists():
        digits, first, last = len(found[1]), int(found[1]), int(found[2])
        paths = [
            Path(f"{source[: found.start()]}{number:0{digits}d}{source[found.end() :]}").expanduser()
            for number in range(first, last + 1)
        ]
        absent = next((path for path in paths if not path.is_file()), None)
        if absent is not None or not paths:
            raise ValueError(f"load: every file of {source} must exist, {absent or 'the range'} does not")
        return paths
    if path.is_dir():
        inside = sorted(p for p in path.iterdir() if not p.name.startswith("."))
        tars = [p for p in inside if p.suffix.lower() == ".tar" and p.is_file()]
        # one archive left beside the folder that was unpacked from it is not a set of shards
        return tars if tars and not any(p.is_dir() for p in inside) else None
    return [path] if path.suffix.lower() == ".tar" and path.is_file() else None


class Shards(Files):
    """The images in tar files, in the order in which they lie there.

    A name is that of its archive and its path inside, "shard-000000.tar/0001.jpg". A damaged archive is read up to
    the damage, which is named in `skipped`. Where there are .cls files, so is an image without a class number.
    """

    kind = "tar"

    def __init__(self, path: Path, shards: list[Path]) -> None:
        super().__init__(path)
        self.shards = shards
        self._rows: dict[str, int] = {}  # name -> place in the four arrays: 32 bytes an image, not 300
        self._shard, self._offset, self._size, self._class = array("l"), array("q"), array("q"), array("q")
        for number, shard in enumerate(shards):
            self._list(number, shard)
        self._labelled = any(label != _NONE for label in self._class)
        if self._labelled:
            numbered = [self._class[self._rows[name]] != _NONE for name in self.names]
            for name in compress(self.names, map(not_, numbered)):
                self.skip(name, "no class number in a .cls, as other images have")
            self.names = list(compress(self.names, numbered))

    def _list(self, number: int, shard: Path) -> None:
        """The members of one archive."""
        end, taken, classes = 0, [], {}
        try:
            with tarfile.open(shard, "r:") as archive, shard.open("rb") as file:
                for member in archive:
                    end = member.offset_data + -(-member.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
                    name = inner_name(member.name) if member.isreg() else None
                    archive.members = []  # type: ignore[attr-defined]  # it would keep every header, 1 KB each
                    if name and name.endswith(".cls"):
                        classes[_key(name)] = _class_number(file, member)
                    elif name:
                        taken.append((name, member.offset_data, member.size))
            why = _damage(shard, end)
        except (tarfile.TarError, OSError, EOFError) as error:
            why = f"damaged after byte {end:,}, the rest is not read: {error}"
        if why:
            self.skip(shard.name, why)
        plain = {_key(name) for name, _, _ in taken if "." not in _extension(name)}
        for name, offset, size in taken:
            extension, key = _extension(name), _key(name)
            if "." in extension and key in plain:  # 0001.mask.png beside 0001.jpg is not a picture of its own
                self.ignored[f".{extension}"] += 1
            else:
                self._take(f"{shard.name}/{name}", number, offset, size, classes.get(key, _NONE))

    def _take(self, name: str, *row: int) -> None:
        """An image's shard, offset, size and class."""
        if name in self._rows:
            self.skip(name, "a second file of that name in its archive")
        elif self._add(name):
            self._rows[name] = len(self._shard)
            for column, value in zip((self._shard, self._offset, self._size, self._class), row, strict=True):
                column.append(value)

    @contextmanager
    def open(self, name: str) -> Iterator[tuple[BinaryIO, int]]:
        row = self._rows[name]
        size = self._size[row]
        content = b""
        if size <= MAX_FILE_BYTES:
            with self.shards[self._shard[row]].open("rb") as file:
                file.seek(self._offset[row])
                content = file.read(size)
            if len(content) < size:
                raise OSError(f"its archive ends {plural(size - len(content), 'byte')} before it does")
        yield BytesIO(content), size

    def labels(self, names: list[str]) -> tuple[list[int], list[str]] | None:
        """From .cls files, a class number each; without any by the folders inside the archives."""
        if not self._labelled:
            return class_labels([name.partition("/")[2] for name in names])
        labels = [self._class[self._rows[name]] for name in names]
        return labels, [str(number) for number in range(max(labels, default=0) + 1)]

    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        for shard in self.shards:
            status = shard.stat()
            line = f"{shard.resolve()} {status.st_size} {status.st_mtime_ns}\n"
            digest.update(line.encode("utf-8", "surrogateescape"))
        return digest.hexdigest()


def _key(name: str) -> str:
    """The path up to the first dot of the file's name."""
    folder, slash, file = name.rpartition("/")
    return f"{folder}{slash}{file.partition('.')[0]}"


def _extension(name: str) -> str:
    """What follows the key, without its first dot, in small letters."""
    return name.rpartition("/")[2].partition(".")[2].lower()


def _class_number(file: BinaryIO, member: tarfile.TarInfo) -> int:
    """The number in a .cls, or -1."""
    file.seek(member.offset_data)
    with suppress(ValueError):
        return max(_NONE, int(file.read(min(member.size, _CLASS_BYTES)).decode("ascii", "replace")))
    return _NONE


def _damage(shard: Path, end: int) -> str:
    """What is wrong with an archive whose members end at `end`, or "".

    tarfile takes a damaged header in the middle for the end; after the true one there are zeros alone.
    """
    size = shard.stat().st_size
    with shard.open("rb") as file:
        file.seek(end)
        rest = file.read(tarfile.BLOCKSIZE)
    if end <= size and not rest.strip(b"\0"):
        return ""
    return f"damaged after byte {min(end, size):,}, the rest is not read"
