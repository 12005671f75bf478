"""Checkpoints: one file a state, written whole or not at all, read with ``weights_only=True``."""

from __future__ import annotations

import os
import pickle
import re
from pathlib import Path
from typing import Any

import torch

from fastgan.data.atomic import atomic_file

__all__ = ["latest", "list_steps", "load", "path_of", "prune", "rng_state", "save", "set_rng_state"]

_NAME = re.compile(r"step-(\d+)\.pt")


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
    """The newest checkpoint in `folder`, or None."""
    steps = list_steps(folder)
    return path_of(folder, steps[-1]) if steps else None


def save(state: dict[str, Any], path: str | Path) -> None:
    """Write `state` (tensors and plain Python values) to `path`.

    The file appears under its name only when it is complete and on disk: an interrupted save leaves the
    previous checkpoint untouched.
    """
    with atomic_file(Path(path)) as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())


def load(path: str | Path) -> dict[str, Any]:
    """The state saved at `path`, all tensors on the CPU. Raises ValueError for any other file."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError, ValueError, KeyError) as error:
        raise ValueError(
            f"checkpoint: {path} must be a checkpoint of fastgan, it is damaged or holds other things than "
            "tensors and plain values"
        ) from error
    if not isinstance(state, dict) or "step" not in state:
        raise ValueError(f"checkpoint: {path} must be a checkpoint of fastgan, it holds no training state")
    return state


def prune(folder: str | Path, keep: int) -> None:
    """Delete all checkpoints in `folder` but the `keep` newest."""
    for step in list_steps(folder)[:-keep]:
        path_of(folder, step).unlink(missing_ok=True)


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
