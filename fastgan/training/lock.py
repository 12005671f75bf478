"""The lock of a run directory: one process trains in it, and the others learn which.

The operating system's lock on the file ends with its process, however that ends. The file names the process, its host
and its start; these decide where the file system knows no locks, or where the file comes from another host.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import socket
import time
from pathlib import Path
from types import ModuleType
from typing import Any

fcntl: ModuleType | None
try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

__all__ = ["LockedError", "RunLock"]


class LockedError(ValueError):
    """Another process trains in the run directory."""


class RunLock:
    """`path` is the lock file. Not reentrant; the file is gone when the lock is not held."""

    def __init__(self, path: Path):
        self.path = path
        self._file: int | None = None

    def check(self) -> None:
        """Raise `LockedError` if another process holds the lock just now."""
        if self._file is None and self.path.exists():
            self.acquire()
            self.release()

    def acquire(self) -> None:
        """Take the lock, also from a process that is gone. Raises `LockedError`, which names the holder."""
        for patience in (0.05, 0.1, 0.2, None):
            try:
                return self._acquire()
            except LockedError:  # perhaps by a `check`, which lasts a moment
                if patience is None:
                    raise
                time.sleep(patience)

    def _acquire(self) -> None:
        while True:
            at = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                free, holder = _try_lock(at), _read(at)
                taken = free is False or (free is None and _lives_here(holder))
                if taken or _lives_elsewhere(holder):
                    raise LockedError(_sentence(self.path, holder))
                if not _is_file(at, self.path):  # its holder removed it between our two calls
                    os.close(at)
                    continue
            except BaseException:
                os.close(at)
                raise
            os.ftruncate(at, 0)
            os.pwrite(at, json.dumps(_identity()).encode(), 0)
            self._file = at
            return

    def release(self) -> None:
        """Give the lock back and remove its file."""
        if self._file is not None:
            with contextlib.suppress(OSError):
                self.path.unlink()
            os.close(self._file)
            self._file = None


def _try_lock(at: int) -> bool | None:
    """Whether the kernel gives us its lock; None where it has none to give on this file system."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(at, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _read(at: int) -> dict[str, Any]:
    """Who holds the lock, as far as the file can be read."""
    try:
        found = json.loads(os.pread(at, 4096, 0))
        return found if isinstance(found, dict) else {}
    except ValueError:
        return {}


def _is_file(at: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(at), os.stat(path))
    except FileNotFoundError:
        return False


def _identity() -> dict[str, Any]:
    return {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "process_started": _start_of(os.getpid()),
        "since": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
    }


def _start_of(pid: int) -> int | None:
    """When a process started, in the kernel's ticks since boot: tells it from a later one with its number."""
    try:
        # the second field, the program's name in parentheses, may hold anything
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    except (OSError, ValueError, IndexError):
        return None


def _lives_elsewhere(holder: dict[str, Any]) -> bool:
    """Whether a process of another host holds the lock: from here nobody can see whether it still runs."""
    return bool(holder) and holder.get("host") != socket.gethostname()


def _lives_here(holder: dict[str, Any]) -> bool:
    try:
        os.kill(int(holder["pid"]), 0)
    except (ProcessLookupError, KeyError, TypeError, ValueError):
        return False
    except OSError:  # it is another user's
        pass
    return _start_of(int(holder["pid"])) in (None, holder.get("process_started"))


def _sentence(path: Path, holder: dict[str, Any]) -> str:
    if not holder:
        return f"training: {path.parent} must be free, another process trains in it"
    who = f"process {holder.get('pid')} on {holder.get('host')}, since {holder.get('since')}"
    end = "stop it or choose another directory"
    if _lives_elsewhere(holder):
        end = f"if that process is gone, delete {path}"
    return f"training: {path.parent} must be free, another process trains in it ({who}); {end}"
