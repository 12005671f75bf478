"""Checkpoints: one file a state, written whole or not at all, checked bit by bit when read.

A file holds the state, a checksum of each tensor, and one of all plain values. A file whose checksums do not agree is
damaged, and so is one with an infinite or undefined number. Files are read with ``weights_only=True``: no code in them
runs.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastgan._writing import atomic_file

__all__ = [
    "DamagedError",
    "Found",
    "first_nonfinite",
    "latest",
    "list_steps",
    "load",
    "newest",
    "path_of",
    "prune",
    "rng_state",
    "save",
    "set_rng_state",
]

_NAME = re.compile(r"step-(\d+)\.pt")
_CHECKSUMS = "checksums"
log = logging.getLogger("fastgan.training")


class DamagedError(ValueError):
    """A file that is no checkpoint, or no longer the one that was written."""


@dataclass(frozen=True)
class Found:
    """The newest sound checkpoint, its state, and what was wrong with newer ones."""

    path: Path
    state: dict[str, Any]
    damaged: dict[Path, str]


def path_of(folder: str | Path, step: int) -> Path:
    """Where the checkpoint of `step` lies in a checkpoints folder."""
    return Path(folder) / f"step-{step:07d}.pt"


def list_steps(folder: str | Path) -> list[int]:
    """The steps that `folder` holds checkpoints of, in ascending order."""
    folder = Path(folder)
    if not folder.is_dir():
        return []
    return sorted(int(m[1]) for m in (_NAME.fullmatch(p.name) for p in folder.iterdir()) if m)


def latest(folder: str | Path) -> Path | None:
    """The newest checkpoint in `folder` by its name, unread, or None."""
    steps = list_steps(folder)
    return path_of(folder, steps[-1]) if steps else None


def newest(folder: str | Path) -> Found | None:
    """The newest checkpoint in `folder` that is sound, or None where there is no checkpoint.

    Logs one line for each damaged one that is passed over. Raises `DamagedError` if none is sound.
    """
    damaged: dict[Path, str] = {}
    for step in reversed(list_steps(folder)):
        path = path_of(folder, step)
        try:
            state = load(path)
        except FileNotFoundError:  # pruned by a run that is under way
            continue
        except DamagedError as error:
            damaged[path] = str(error)
            continue
        for why in damaged.values():
            log.warning("%s; %s, the newest sound one, is used", why, path.name)
        return Found(path, state, damaged)
    if damaged:
        first, *others = damaged.values()
        more = f", nor do the {len(others)} older ones" if others else ""
        raise DamagedError(f"{first}{more}; nothing sound is left in {folder}")
    return None


def save(state: dict[str, Any], path: str | Path) -> None:
    """Write `state` (tensors and plain Python values) to `path`.

    The file appears under its name only when it is complete and on disk: an interrupted save leaves the
    previous checkpoint untouched.
    """
    with atomic_file(path) as file:
        torch.save({**state, _CHECKSUMS: _checksums(state)}, file)


def load(path: str | Path) -> dict[str, Any]:
    """The state saved at `path`, all tensors on the CPU.

    Raises `DamagedError`, a ValueError, for any other file, and where a bit or a number is not as it was saved.
    """
    state = _read(path)
    if not isinstance(state, dict) or "step" not in state:
        raise DamagedError(f"checkpoint: {path} must be a checkpoint of fastgan, it holds no training state")
    written = state.pop(_CHECKSUMS, None)
    if not isinstance(written, dict):
        raise DamagedError(f"checkpoint: {path} must be a checkpoint of fastgan, it is damaged: it holds no checksums")
    found = _checksums(state)
    wrong = next((name for name in [*found, *written] if found.get(name) != written.get(name)), None)
    if wrong is not None:
        raise DamagedError(f"checkpoint: {path} must be as it was written, it is damaged: {wrong} has changed")
    bad = first_nonfinite(state)
    if bad:
        raise DamagedError(f"checkpoint: {path} must hold finite numbers, {bad} is not")
    return state


def _read(path: str | Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except PermissionError as error:
        raise ValueError(f"checkpoint: {path} must be readable, permission is denied") from error
    except Exception as error:  # flipped bits make the unpickler raise nearly anything
        raise DamagedError(
            f"checkpoint: {path} must be a checkpoint of fastgan, it is damaged or holds other things than "
            "tensors and plain values"
        ) from error


def prune(folder: str | Path, keep: int) -> None:
    """Delete all checkpoints in `folder` but the `keep` newest."""
    for step in list_steps(folder)[:-keep]:
        path_of(folder, step).unlink(missing_ok=True)


def first_nonfinite(state: Mapping[str, Any]) -> str | None:
    """The path of the first tensor that holds an infinite or undefined value, or None. Synchronises."""
    for name, value in _leaves(state):
        if not isinstance(value, Tensor) or not value.is_floating_point():
            continue
        # A sum is infinite or undefined if a term is, and costs a tenth of the exact question; it may overflow.
        if not bool(torch.isfinite(value.sum())) and not bool(torch.isfinite(value).all()):
            return name
    return None


def _leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Tensors and plain values by their path, such as "generator.main.0.weight"."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _leaves(item, f"{name}.{key}" if name else str(key))
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from _leaves(item, f"{name}.{index}")
    else:
        yield name, value


def _checksums(state: Mapping[str, Any]) -> dict[str, str]:
    """SHA-256 of each tensor's type, shape and numbers, and under "plain values" of all else."""
    found: dict[str, str] = {}
    plain = []
    for name, value in _leaves(state):
        if isinstance(value, Tensor):
            numbers = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
            digest = hashlib.sha256(f"{value.dtype} {tuple(value.shape)} ".encode())
            digest.update(numbers.data)
            found[name] = digest.hexdigest()
        else:
            plain.append([name, type(value).__name__, repr(value)])
    found["plain values"] = hashlib.sha256(json.dumps(plain).encode()).hexdigest()
    return found


def rng_state() -> dict[str, Any]:
    """The state of torch's global generators, CPU and every CUDA device."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"cpu": torch.get_rng_state(), "cuda": cuda}


def set_rng_state(state: dict[str, Any]) -> None:
    """Restore what `rng_state` returned. CUDA states are restored on as many devices as there are."""
    torch.set_rng_state(state["cpu"])
    if torch.cuda.is_available():
        for index, value in enumerate(state["cuda"][: torch.cuda.device_count()]):
            torch.cuda.set_rng_state(value, index)
