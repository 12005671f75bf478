"""Files of any kind below a folder."""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path

__all__ = ["files_below"]


def files_below(source: str, suffixes: Collection[str], kind: str) -> tuple[Path, list[str]]:
    """(folder, names below it) of all files with one of `suffixes`, sorted; a file is its folder and its own name.

    Hidden files and folders do not count. kind: what the files are, in errors. ValueError where there is none.
    """
    path = Path(source).expanduser()
    if path.is_file():
        return path.parent, [path.name]
    if not path.is_dir():
        raise ValueError(f"load: data must be a folder of {kind} or one such file, {path} does not exist")
    names = []
    for folder, inner, found in os.walk(path):
        inner[:] = sorted(name for name in inner if not name.startswith("."))
        names += [
            str((Path(folder) / name).relative_to(path))
            for name in found
            if not name.startswith(".") and Path(name).suffix.lower() in suffixes
        ]
    if not names:
        raise ValueError(f"load: {path} must hold {kind} ({', '.join(sorted(suffixes))}), it holds none")
    return path, sorted(names)
