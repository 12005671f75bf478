"""The compiled core, or why it is absent."""

from __future__ import annotations

import functools
import importlib
from pathlib import Path
from types import ModuleType


@functools.cache
def native() -> tuple[ModuleType | None, str]:
    """The compiled module fastgan._C, or None with the reason."""
    try:
        module = importlib.import_module("fastgan._C")
    except ImportError as error:
        note = Path(__file__).parents[1] / "_C_build_failure.txt"  # setup.py leaves the compiler's last words there
        why = note.read_text().strip() if note.exists() else str(error)
        return None, f"fastgan._C is not built or does not load here ({why}); reinstall with a C++20 compiler on PATH"
    refusals = module.tables()
    if all(refusals.values()):
        why = "; ".join(f"{table}: {refusal}" for table, refusal in refusals.items())
        return None, f"fastgan._C must have kernels that this CPU runs, got none ({why})"
    return module, ""
