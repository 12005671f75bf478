"""What every measurement of the repository writes beside its numbers: the package's facts and the commit; and the name
of its file."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

from fastgan.benchmarking import facts
from fastgan.benchmarking.facts import load

__all__ = ["ROOT", "file_name", "gather", "load", "slug", "source"]

ROOT = Path(__file__).resolve().parent.parent


def gather(command: str) -> dict[str, Any]:
    """The facts before a measurement; `load_after` is the caller's to add."""
    return {**facts.gather(command), **source()}


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
