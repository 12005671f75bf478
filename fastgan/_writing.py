"""The one door to the disk: what fastgan writes appears under its name whole and on disk, or not at all.

A file is written beside its target, synced, given the target's permissions and owner, and renamed over it; then the
folder is synced. Links are followed to their target. A device, pipe, socket or folder is refused: a rename would
replace it.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import secrets
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO, cast

fcntl: ModuleType | None
try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

__all__ = [
    "WriteError",
    "append",
    "atomic_file",
    "atomic_path",
    "growing_file",
    "is_part",
    "part_of",
    "target_of",
    "told",
    "write",
]

_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFCHR: "a character device",
    stat.S_IFBLK: "a block device",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
}
_REMEDIES = {
    errno.ENOSPC: "the disk is full; free some space or write elsewhere",
    errno.EDQUOT: "the disk quota is used up; free some space or write elsewhere",
    errno.EFBIG: "it would be larger than a file may be here (ulimit -f); raise the limit or write elsewhere",
    errno.EROFS: "the file system is read-only; write elsewhere",
    errno.EACCES: "permission is denied; write elsewhere",
    errno.EPERM: "permission is denied; write elsewhere",
    errno.ENAMETOOLONG: "the name is too long; choose a shorter one",
    errno.ENOTDIR: "a part of the path is a file; choose another path",
    errno.EEXIST: "a part of the path is a file; choose another path",
    errno.ELOOP: "its links lead in a circle; choose another path",
}
_PART = ".part"


class WriteError(OSError):
    """A file could not be written; the sentence says which and why. What was there before is untouched."""


def is_part(path: Path) -> bool:
    """Whether `path` has the name of a file under way, which a killed process leaves behind."""
    return path.name.startswith(".") and _PART in path.suffixes


def target_of(path: str | Path) -> Path:
    """Where a file written to `path` will lie, links followed.

    Raises ValueError where that is no regular file, or a file that this user may not write.
    """
    text = os.fspath(path)
    if not text or "\0" in text:
        raise ValueError(f"output: a file name must be neither empty nor hold a NUL character, got {text!r}")
    try:
        found = os.stat(text)
    except FileNotFoundError:
        return Path(os.path.realpath(text))
    except OSError as error:
        raise ValueError(_sentence(error, text)) from error
    if not stat.S_ISREG(found.st_mode):
        kind = _KINDS.get(stat.S_IFMT(found.st_mode), "of another kind")
        raise ValueError(f"output: {text} must be a regular file or not exist yet, it is {kind}; choose another path")
    if not os.access(text, os.W_OK):
        raise ValueError(f"output: {text} must be writable, it is not; change its permissions or choose another path")
    return Path(os.path.realpath(text))


@contextlib.contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """An empty file beside `path` to be written by its name, with the same suffix; renamed to `path` at the end.

    Raises ValueError as `target_of`, and WriteError where the system refuses. A block that raises changes nothing.
    """
    target = target_of(path)
    part = target.with_name(f".{target.stem[:80]}.{secrets.token_hex(4)}{_PART}{target.suffix}")
    made = False
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(part, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        made = True
        yield part
        _finish(part, target)
    except BaseException as error:
        if made:
            with contextlib.suppress(OSError):
                part.unlink()
        if isinstance(error, OSError) and error.errno is not None and not isinstance(error, WriteError):
            raise WriteError(_sentence(error, path)) from error
        raise


@contextlib.contextmanager
def atomic_file(path: str | Path) -> Iterator[BinaryIO]:
    """A binary file, readable and writable, that becomes `path` when the block ends without an error."""
    with atomic_path(path) as part:
        raw = _Raw(part, "r+")
        file = io.BufferedRandom(raw)
        try:
            yield cast(BinaryIO, file)
            file.flush()
        except Exception as error:
            # a writer between us and the file may have turned the system's words into its own (torch: "unexpected pos")
            if raw.error is not None and error is not raw.error:
                raise raw.error from error
            raise
        finally:
            with contextlib.suppress(OSError):
                file.close()


def part_of(path: str | Path) -> Path:
    """Where what `growing_file` has of `path` lies until it is complete."""
    target = Path(path)
    return target.with_name(f".{target.stem[:80]}{_PART}{target.suffix}")


@contextlib.contextmanager
def growing_file(path: str | Path, waiting: Callable[[], None] | None = None) -> Iterator[BinaryIO]:
    """A binary file, readable and writable, that becomes `path` when the block ends without an error.

    Otherwise what was written stays in `part_of(path)`, and the next block begins with it: the file is at its start,
    and whether its content is sound is the caller's to say. A file that is empty at the end leaves nothing, and `path`
    as it was. One process at a time is in the block; another one calls `waiting` once and waits, and must then see for
    itself whether `path` is what it wants.
    """
    target, part = target_of(path), part_of(target_of(path))
    with told(path):
        target.parent.mkdir(parents=True, exist_ok=True)
        raw = _held(part, waiting)
        file = io.BufferedRandom(raw)
        try:
            yield cast(BinaryIO, file)
            file.flush()
            if os.fstat(raw.fileno()).st_size:
                _finish(part, target)
        finally:
            with contextlib.suppress(OSError):
                if os.path.samestat(os.stat(part), os.fstat(raw.fileno())) and not os.stat(part).st_size:
                    part.unlink()
            with contextlib.suppress(OSError):
                file.close()


def _held(part: Path, waiting: Callable[[], None] | None) -> io.FileIO:
    """The file at `part`, locked by this process: the lock ends with the process, however that ends."""
    while True:
        file = io.FileIO(os.open(part, os.O_RDWR | os.O_CREAT, 0o666), "r+")
        if fcntl is None:
            return file
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if waiting is not None:
                waiting()
                waiting = None
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:  # a file system without locks
            return file
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.stat(part), os.fstat(file.fileno())):
                return file
        file.close()  # its holder has completed it: this is `path` now


def write(path: str | Path, content: str | bytes) -> None:
    """`content` (text as UTF-8) as the whole of `path`."""
    with atomic_file(path) as file:
        file.write(encoded(content) if isinstance(content, str) else content)


def append(path: str | Path, text: str) -> None:
    """Add `text` to the end of `path` by one write; a killed process leaves it, a part of it, or nothing."""
    with told(path):
        at = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            content = encoded(text)
            while content:
                content = content[os.write(at, content) :]
        finally:
            os.close(at)


@contextlib.contextmanager
def told(path: str | Path) -> Iterator[None]:
    """Within: what the system refuses at `path` becomes a `WriteError`."""
    try:
        yield
    except WriteError:
        raise
    except OSError as error:
        raise WriteError(_sentence(error, path)) from error


def encoded(text: str) -> bytes:
    """UTF-8; bytes of file names that are no text come out as escapes."""
    return text.encode("utf-8", "backslashreplace")


class _Raw(io.FileIO):
    """Remembers the system's own error."""

    error: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            self.error = error
            raise


def _finish(part: Path, target: Path) -> None:
    """Give `part` what `target` has of permissions and owner, sync it, rename it, sync the folder."""
    at = os.open(part, os.O_RDONLY)
    try:
        with contextlib.suppress(FileNotFoundError):
            before, ours = os.stat(target), os.fstat(at)
            if (before.st_uid, before.st_gid) != (ours.st_uid, ours.st_gid):
                os.fchown(at, before.st_uid, before.st_gid)
            os.fchmod(at, stat.S_IMODE(before.st_mode))
        os.fsync(at)
    finally:
        os.close(at)
    os.replace(part, target)
    _sync_folder(target.parent)


def _sync_folder(folder: Path) -> None:
    """Put a rename on disk; some file systems have no such thing for folders, and none loses the old file by it."""
    with contextlib.suppress(OSError):
        at = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(at)
        finally:
            os.close(at)


def _sentence(error: OSError, path: str | Path) -> str:
    """What the system refused at `path`, why, and what to do."""
    why = _REMEDIES.get(error.errno or 0, (error.strerror or str(error)).lower())
    return f"output: {os.fspath(path)} must be writable: {why}"
