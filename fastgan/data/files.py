"""Finding image files in a folder or a zip archive, without unpacking anything; tar shards: `shards`."""

from __future__ import annotations

import hashlib
import os
import stat
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from io import BytesIO
from pathlib import Path, PurePosixPath
from typing import BinaryIO, ClassVar

from fastgan.data.decode import MAX_FILE_BYTES, SUFFIXES

# Images by their suffix that Pillow cannot read: they are reported as skipped, never silently passed over.
UNREAD = {
    ".heic": "HEIC is not read: convert it to PNG or JPEG",
    ".heif": "HEIF is not read: convert it to PNG or JPEG",
    ".jxl": "JPEG XL is not read: convert it to PNG or JPEG",
    ".svg": "SVG has no pixels: render it to PNG",
    ".psd": "PSD is not read: export it as PNG",
    ".exr": "EXR is not read: convert it to PNG",
    ".dng": "raw photographs are not read: develop them to JPEG",
    ".cr2": "raw photographs are not read: develop them to JPEG",
    ".nef": "raw photographs are not read: develop them to JPEG",
    ".arw": "raw photographs are not read: develop them to JPEG",
}


def plural(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def printable(name: str) -> str:
    """File names may hold bytes that are no text; those are shown as escapes."""
    return name.encode("utf-8", "backslashreplace").decode()


def fingerprint_of(folder: Path, names: Iterable[str]) -> str:
    """Changes whenever one of these files below `folder` is rewritten, or other ones are named."""
    root = folder.resolve()
    digest = hashlib.sha256(str(root).encode("utf-8", "surrogateescape"))
    for name in names:
        digest.update(name.encode("utf-8", "surrogateescape"))
        try:
            status = os.stat(f"{root}/{name}")  # a Path for each would take a third of the time of a million
            digest.update(f" {status.st_size} {status.st_mtime_ns}\n".encode())
        except OSError:
            digest.update(b" gone\n")
    return digest.hexdigest()


class Files:
    """The image files of a source, in the order in which they are read.

    Attributes: `names` (to be decoded), `skipped` [(name, reason)] (seen, and known to be unreadable),
    `ignored` (a Counter of the suffixes of all other files). Hidden entries and __MACOSX do not count at all.
    """

    kind: ClassVar[str]

    def __init__(self, path: Path) -> None:
        self.path = path
        self.names: list[str] = []
        self.skipped: list[tuple[str, str]] = []
        self.ignored: Counter[str] = Counter()

    def close(self) -> None:
        """Close what is open."""

    def skip(self, name: str, reason: str) -> None:
        self.skipped.append((printable(name), reason))

    def _add(self, name: str) -> bool:
        """Sort an entry into names, skipped or ignored; True if it is to be decoded."""
        suffix = PurePosixPath(name).suffix.lower()
        if suffix in SUFFIXES:
            self.names.append(name)
            return True
        if suffix in UNREAD:
            self.skip(name, UNREAD[suffix])
        else:
            self.ignored[suffix or "no suffix"] += 1
        return False

    def open(self, name: str) -> AbstractContextManager[tuple[BinaryIO, int]]:
        """A binary file for `name` and its size in bytes. Safe to call from several threads."""
        raise NotImplementedError

    def labels(self, names: list[str]) -> tuple[list[int], list[str]] | None:
        """The class numbers of these files, and the classes' names; None where they have no classes."""
        return class_labels(names)

    def fingerprint(self) -> str:
        """Changes whenever a file is added, removed or rewritten: names, sizes and modification times."""
        raise NotImplementedError

    def found(self) -> str:
        """What is there beside readable images, for the error that says so."""
        parts = []
        if self.ignored:
            suffixes = ", ".join(f"{count} {suffix}" for suffix, count in self.ignored.most_common(4))
            parts.append(f"{plural(sum(self.ignored.values()), 'other file')} ({suffixes})")
        if self.skipped:
            first = "; ".join(f"{name}: {why}" for name, why in self.skipped[:3])
            more = ", ..." if len(self.skipped) > 3 else ""
            parts.append(f"{plural(len(self.skipped), 'unreadable image')} ({first}{more})")
        return " and ".join(parts) or "no files"


class Folder(Files):
    """The image files below a folder, sorted by path."""

    kind = "folder"

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._walk(path, "", set())
        self.names.sort(key=lambda name: name.split("/"))

    def _walk(self, folder: Path, prefix: str, above: set[tuple[int, int]]) -> None:
        """Links to folders are followed, as ImageFolder does, unless they lead back to a folder above."""
        try:
            status = folder.stat()
            identity = (status.st_dev, status.st_ino)
            if identity in above:
                return
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError as error:
            self.skip(prefix or str(folder), (error.strerror or str(error)).lower())
            return
        for entry in entries:
            if entry.name.startswith(".") or entry.name == "__MACOSX":
                continue
            name = f"{prefix}{entry.name}"
            if entry.is_dir():
                self._walk(Path(entry.path), f"{name}/", above | {identity})
            else:
                self._add(name)

    @contextmanager
    def open(self, name: str) -> Iterator[tuple[BinaryIO, int]]:
        path = self.path / name
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise OSError(f"not a regular file: {stat.filemode(status.st_mode)}")
        with path.open("rb") as file:
            yield file, status.st_size

    def fingerprint(self) -> str:
        return fingerprint_of(self.path, self.names)


class Zip(Files):
    """The image files in a zip, sorted by path."""

    kind = "zip"

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._entries: dict[str, zipfile.ZipInfo] = {}
        try:
            self._archive = zipfile.ZipFile(path)
        except (zipfile.BadZipFile, OSError) as error:
            raise ValueError(
                f"load: a .zip must be a readable archive, {path} is not ({error}); download it again"
            ) from error
        for entry in self._archive.infolist():
            # Some Windows tools write backslashes.
            name = inner_name(entry.filename.replace("\\", "/"))
            if not entry.filename.endswith(("/", "\\")) and name and name not in self._entries and self._add(name):
                self._entries[name] = entry
        self.names.sort(key=lambda name: name.split("/"))

    def close(self) -> None:
        self._archive.close()

    @contextmanager
    def open(self, name: str) -> Iterator[tuple[BinaryIO, int]]:
        entry = self._entries[name]
        # Pillow seeks, which inflates again and again in an archive: read it once, if the size is sane.
        content = self._archive.read(entry) if entry.file_size <= MAX_FILE_BYTES else b""
        yield BytesIO(content), entry.file_size

    def fingerprint(self) -> str:
        status = self.path.stat()
        digest = hashlib.sha256(str(self.path.resolve()).encode("utf-8", "surrogateescape"))
        digest.update(f"{status.st_size} {status.st_mtime_ns}".encode())
        for name in self.names:
            digest.update(name.encode("utf-8", "surrogateescape"))
        return digest.hexdigest()


def inner_name(name: str) -> str | None:
    """An archive member's path without empty parts; None for hidden entries and __MACOSX."""
    parts = [part for part in name.split("/") if part not in ("", ".")]
    hidden = any(part.startswith(".") or part == "__MACOSX" for part in parts)
    return None if hidden else "/".join(parts)


def class_labels(names: list[str]) -> tuple[list[int], list[str]] | None:
    """Labels by ImageFolder's convention: the first folder of each path, numbered in sorted order.

    None unless every file lies in a folder. One folder that wraps everything, as zips often have, is looked
    through where two or more class folders lie inside it.
    """
    paths = [tuple(name.split("/")[:-1]) for name in names]
    if not paths or any(not path for path in paths):
        return None
    inner = paths
    while all(inner) and len({path[0] for path in inner}) == 1:
        inner = [path[1:] for path in inner]
    if all(inner):
        paths = inner
    classes = sorted({path[0] for path in paths})
    number = {name: index for index, name in enumerate(classes)}
    return [number[path[0]] for path in paths], [printable(name) for name in classes]
