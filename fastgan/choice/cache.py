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
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from fastgan._version import __version__
from fastgan.choice.native import native
from fastgan.choice.routine import NAMES


def cache_dir() -> Path:
    """Where proofs and races are kept: FASTGAN_CACHE or ~/.cache/fastgan."""
    return Path(os.environ.get("FASTGAN_CACHE") or Path.home() / ".cache" / "fastgan")


class Cache:
    """What is known of this machine, read from disk at the first question.

    winners.json  {digest of (op, case): {"winner", "ahead", "spread"}, or "config ..." of a kernel}
    open.json     {digest: sketch of a case that a run had no time to race}, for `fastgan doctor --race`
    """

    def __init__(self) -> None:
        self._winners: dict[str, Any] | None = None

    @property
    def winners(self) -> dict[str, Any]:
        if self._winners is None:
            self._winners = _read("winners.json", _is_verdict)
        return self._winners

    def winner(self, digest: str) -> str | None:
        """A backend, or a kernel's "config ..."."""
        found = self.winners.get(digest)
        return found["winner"] if isinstance(found, dict) else found

    def remember(self, digest: str, verdict: dict[str, Any] | str) -> None:
        """Add a verdict to the file."""
        self.winners[digest] = verdict
        _write("winners.json", {**_read("winners.json", _is_verdict), **self.winners})

    def open_cases(self) -> dict[str, dict[str, Any]]:
        """Those of this machine and version."""
        found = _read("open.json", lambda v: isinstance(v, dict) and "op" in v)
        return {digest: case for digest, case in found.items() if case.get("machine") == fingerprint()}

    def note_open(self, cases: dict[str, dict[str, Any]], closed: Iterable[str] = ()) -> None:
        """Add open cases to the file, and take away those that are closed."""
        found = _read("open.json", lambda v: isinstance(v, dict) and "op" in v)
        new = {digest: {**case, "machine": fingerprint()} for digest, case in cases.items()}
        gone = set(closed)
        left = {digest: case for digest, case in {**found, **new}.items() if digest not in gone}
        if left != found:
            _write("open.json", left)


def _is_verdict(value: Any) -> bool:
    if isinstance(value, dict):
        return value.get("winner") in NAMES
    return str(value).startswith("config ")


def _read(name: str, valid: Callable[[Any], bool]) -> dict[str, Any]:
    """A cache file; one that is missing, unreadable or damaged counts as empty (the races are run again)."""
    try:
        read = json.loads((cache_dir() / name).read_text())
        return {str(k): v for k, v in read.items() if valid(v)}
    except (OSError, ValueError, AttributeError):
        return {}


def _write(name: str, values: dict[str, Any]) -> None:
    """Replace a cache file in one step, merged by the caller with what other processes wrote."""
    folder = cache_dir()
    with contextlib.suppress(OSError):  # a read-only home costs a race per process, nothing else
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=folder, suffix=".tmp", delete=False) as file:
            file.write(json.dumps(values))  # dump() encodes in Python
        os.replace(file.name, folder / name)


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
    cpu = f"{cpu_name()} x{os.cpu_count()}"
    return "|".join([cpu, gpu, table, torch.__version__, compiler, __version__, sys.platform])


def cpu_name() -> str:
    """The CPU's name; of an x86 on Linux also its family and model, since a cloud gives CPUs of many years one name."""
    with contextlib.suppress(OSError):
        lines = (line.partition(":") for line in Path("/proc/cpuinfo").read_text().splitlines())
        facts = {name.strip(): value.strip() for name, _, value in lines}
        if name := facts.get("model name"):
            kind = f" (family {facts['cpu family']}, model {facts['model']})" if "cpu family" in facts else ""
            return name + kind
    return platform.processor() or platform.machine()
