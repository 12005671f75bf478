"""The cache on disk: the winners of this machine and version, shared by processes and carried by checkpoints."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import json
import os
import platform
import sys
import tempfile
from pathlib import Path

import torch

from fastgan._version import __version__
from fastgan.choice.native import native
from fastgan.choice.routine import NAMES


def cache_dir() -> Path:
    """Where proofs and races are kept: FASTGAN_CACHE or ~/.cache/fastgan."""
    return Path(os.environ.get("FASTGAN_CACHE") or Path.home() / ".cache" / "fastgan")


class Cache:
    """Winners: {digest of (op, case): backend, or "config ..." of a kernel}, read from disk at the first question."""

    def __init__(self) -> None:
        self._winners: dict[str, str] | None = None

    @property
    def winners(self) -> dict[str, str]:
        if self._winners is None:
            self._winners = _read()
        return self._winners

    def remember(self, digest: str, winner: str) -> None:
        """Add a winner to the file: merged with what other processes wrote, replaced in one step."""
        self.winners[digest] = winner
        folder = cache_dir()
        with contextlib.suppress(OSError):  # a read-only home costs a race per process, nothing else
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile("w", dir=folder, suffix=".tmp", delete=False) as file:
                json.dump({**_read(), **self.winners}, file)
            os.replace(file.name, folder / "winners.json")


def _read() -> dict[str, str]:
    """The cache file; one that is missing, unreadable or damaged counts as empty (the races are run again)."""
    try:
        read = json.loads((cache_dir() / "winners.json").read_text())
        return {str(k): v for k, v in read.items() if v in NAMES or str(v).startswith("config ")}
    except (OSError, ValueError, AttributeError):
        return {}


def digest(key: tuple) -> str:
    """A case's key in the file."""
    return hashlib.sha256(f"{fingerprint()}|{key}".encode()).hexdigest()[:24]


@functools.cache
def fingerprint() -> str:
    """What a race depends on: machine, instruction table, versions."""
    module, _ = native()
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    compiler = ""  # Triton's version, by its metadata: importing it takes half a second
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        compiler = importlib.metadata.version("triton")
    table = module.table() if module else ""
    return "|".join([_cpu_name(), gpu, table, torch.__version__, compiler, __version__, sys.platform])


def _cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip() + f" x{os.cpu_count()}"
    return f"{platform.processor() or platform.machine()} x{os.cpu_count()}"
