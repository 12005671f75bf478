"""How much memory is free."""

from __future__ import annotations

import os
from pathlib import Path

import torch


def free_bytes(device: torch.device) -> int | None:
    """Free memory of `device` in bytes, or None where the system does not tell.

    For the CPU the smaller of what Linux calls available and what the control group still allows.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type != "cpu":
        return None
    found = [
        amount
        for amount in (_available(Path("/proc/meminfo")), _group_allowance(Path("/sys/fs/cgroup")))
        if amount is not None
    ]
    if found:
        return min(found)
    try:
        # Where there is no /proc: half of the whole memory stands for the free one.
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    except (AttributeError, OSError, ValueError):
        return None


def require(count: int, device: torch.device | str, what: str) -> None:
    """Raise ValueError where `what` needs `count` bytes and `device` has fewer free."""
    free = free_bytes(torch.device(device))
    if free is not None and count > free:
        raise ValueError(
            f"{what} must fit in memory, it needs {count / 2**30:,.1f} GiB and {free / 2**30:,.1f} are free"
        )


def _available(meminfo: Path) -> int | None:
    try:
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    return None


def _group_allowance(group: Path) -> int | None:
    """What a control group of version 2, as containers see their own, still allows.

    Cached file pages count as used there, though the kernel gives the inactive ones up on demand.
    """
    try:
        limit = int((group / "memory.max").read_text())
        used = int((group / "memory.current").read_text())
        lines = (group / "memory.stat").read_text().splitlines()
        cached = sum(int(line.split()[1]) for line in lines if line.startswith("inactive_file "))
        return max(0, limit - used + cached)
    except (OSError, ValueError, IndexError):
        # No such group, or its limit is the word "max".
        return None


def gib(count: int) -> str:
    """A number of bytes, for messages."""
    return f"{count / 2**30:.1f} GiB"
