"""What a measurement depends on and is written beside it: machine, versions, date, load."""

from __future__ import annotations

import datetime
import os
import platform
from typing import Any

import torch

import fastgan
from fastgan.choice import native
from fastgan.doctor import machine


def gather(command: str, device: torch.device | str = "cpu") -> dict[str, Any]:
    """The facts before a measurement; `load_after` is the caller's to add."""
    module, reason = native()
    return {
        **machine(device),
        "device": str(device),
        "fastgan": fastgan.__version__,
        "os": f"{platform.system()} {platform.machine()}",
        "kernels": module.table() if module else reason,
        "tables": module.tables() if module else {},
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": command,
        "load_before": load(),
    }


def load() -> float | None:
    """The load average of the last minute: above 0.3 before the first case, the machine was not quiet."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None
