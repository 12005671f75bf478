"""Samples that one process of a machine reads for all that torchrun started there, in a file that they all map."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastgan._writing import WriteError, growing_file, told, write
from fastgan.data import arrays
from fastgan.data.cache import NoRoomError, default_cache, sound
from fastgan.data.memory import gib
from fastgan.data.pixels import CACHE_FORMAT, card_of, complete
from fastgan.data.remarks import Remarks
from fastgan.data.store import MARK, npy_header

__all__ = ["Read", "processes", "read_once"]

log = logging.getLogger("fastgan.data")

BLOCK = 4 << 20  # bytes that one checksum covers, at least


class Read(NamedTuple):
    """What reading files gave. values: [M, ...] in main memory. remarks: on the files. facts: plain values beside."""

    values: Tensor
    remarks: Remarks
    facts: dict[str, Any]


def processes() -> int:
    """How many processes torchrun started on this machine, 1 where it started none."""
    found = os.environ.get("LOCAL_WORLD_SIZE", "1")
    return max(1, int(found)) if found.isdecimal() else 1


def read_once(kind: str, of: Callable[[], Any], read: Callable[[], Read]) -> Read:
    """What `read` gives. Of several processes of a machine one reads, into the cache, and all map its file.

    kind: of samples, a word. of: gives plain values that differ wherever `read` would give something else. Where the
    cache cannot be written each process reads for itself, and a line says so.
    """
    if processes() == 1:
        return read()
    digest = hashlib.sha256(json.dumps([CACHE_FORMAT, of()]).encode()).hexdigest()
    path, own = default_cache() / f"{kind}-{digest[:16]}.npy", None
    waiting = lambda: log.warning("load: another process reads %s for this one, waiting for it", kind)
    try:
        if not sound(path):
            with told(path.parent):
                path.parent.mkdir(parents=True, exist_ok=True)
            with growing_file(path, waiting) as file:
                if not complete(path):
                    file.truncate(0)  # what a killed process left
                    own = read()
                    _keep(own, file, path)
        return _mapped(path)
    except (NoRoomError, WriteError) as error:
        log.warning("load: each process of this machine reads all %s for itself: %s", kind, error)
        return read() if own is None else own


def _keep(found: Read, file: BinaryIO, path: Path) -> None:
    """Write the values to `file`, which becomes `path`, and the rest to the card beside it."""
    rows = found.values.contiguous().numpy().reshape(len(found.values), -1).view(np.uint8)
    free = shutil.disk_usage(path.parent).free
    if free < rows.nbytes:
        raise NoRoomError(f"load: {path.parent} must have room for {gib(rows.nbytes)}, it has {gib(free)}")
    file.write(npy_header(rows.shape))
    checksums, step = [], max(MARK, BLOCK // rows.shape[1])
    for start in range(0, len(rows), step):
        some = rows[start : start + step].data
        file.write(some)
        checksums.append((start + len(some), hashlib.sha256(some).hexdigest()))
    card = {"fastgan": CACHE_FORMAT, "name": path.stem, "classes": None, "labels": None, "skipped": found.remarks}
    of = {"dtype": str(found.values.dtype), "shape": found.values.shape[1:], "facts": found.facts}
    write(card_of(path), json.dumps(card | of | {"checksums": checksums}))


def _mapped(path: Path) -> Read:
    array, card = arrays.from_npy(path), arrays.read_card(card_of(path)) or {}
    dtype = getattr(torch, card["dtype"].removeprefix("torch."))
    values = torch.from_numpy(array.values).view(dtype).view(-1, *card["shape"])
    return Read(values, array.skipped, card["facts"])
