"""What every measurement writes beside its numbers: machine, versions, commit, load; and the name of its file."""

from __future__ import annotations

import datetime
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import fastgan
from fastgan.backends import native
from fastgan.doctor import machine

ROOT = Path(__file__).resolve().parent.parent


def gather(command: str) -> dict[str, Any]:
    """The facts before a measurement; `load_after` is the caller's to add."""
    module, reason = native()
    return {
        **machine(), **source(), "device": "cpu", "fastgan": fastgan.__version__,
        "os": f"{platform.system()} {platform.machine()}", "kernels": module.table() if module else reason,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"), "command": command,
        "load_before": load(),
    }  # fmt: skip


def load() -> float | None:
    """The load average of the last minute: above 0.3 before the first case, the machine was not quiet."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def source() -> dict[str, Any]:
    """The commit that is measured, and whether files differ from it."""

    def git(*arguments: str) -> str | None:
        done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else None

    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return {"commit": git("rev-parse", "--short=12", "HEAD") or "unknown", "dirty": bool(changed)}
    except OSError:  # no git
        return {"commit": "unknown", "dirty": None}


def slug(facts: dict[str, Any]) -> str:
    """The machine as part of a file's name."""
    name = f"{facts['cpu']} {facts['kernels']} x{facts['cores']}"
    return re.sub(r"[^A-Za-z0-9]+", "-", name).strip("-").lower()


def file_name(facts: dict[str, Any]) -> str:
    return f"{slug(facts)}-{facts['commit']}{'-dirty' if facts['dirty'] else ''}.json"
