"""A lower instruction-set table on a bigger CPU, for both sides of a comparison: our kernels and PyTorch's.

PyTorch, oneDNN and MKL read their limits from the environment before their first kernel. So `hold` starts the program
anew with these variables set, and the second time it only chooses our table.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable

from fastgan.choice import native

# table -> what holds PyTorch to the same instructions. Inductor, too, reads the first.
LIMITS = {
    "portable": {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41", "MKL_ENABLE_INSTRUCTIONS": "SSE4_2"},
    "avx2": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"},
    "avx512": {
        "ATEN_CPU_CAPABILITY": "avx512",
        "ONEDNN_MAX_CPU_ISA": "AVX512_CORE",
        "MKL_ENABLE_INSTRUCTIONS": "AVX512",
    },
    "avx512_bf16": {"ATEN_CPU_CAPABILITY": "avx512", "ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"},
    "amx": {"ATEN_CPU_CAPABILITY": "avx512", "ONEDNN_MAX_CPU_ISA": "AVX512_CORE_AMX"},
}
# Inductor's cache does not tell instruction sets apart: code made for AVX2 and compiled for AVX-512 wrote beyond its
# tensors, and the process aborted. So each table has a cache of its own.
for _table, _limits in LIMITS.items():
    _limits["TORCHINDUCTOR_CACHE_DIR"] = os.path.join(tempfile.gettempdir(), f"fastgan-inductor-{_table}")


def hold(table: str, before: Callable[[], None] = lambda: None) -> None:
    """Run this program with `table` and with PyTorch held to the same instruction set.

    Does not return the first time: the process becomes the same command with the variables of `LIMITS` set. `before`
    is called just before that. Raises ValueError for a table that this build or this CPU does not have.
    """
    module, reason = native()
    if module is None:
        raise ValueError(f"--table: the compiled core must be present, got none: {reason}")
    tables = module.tables()
    if table not in tables:
        raise ValueError(f"--table must be one of {', '.join(tables)}, got {table!r}")
    if tables[table]:
        raise ValueError(f"--table {table}: this CPU must be able to run it, got: {tables[table]}")
    limits = LIMITS[table]
    if any(os.environ.get(name) != value for name, value in limits.items()):
        before()
        sys.stdout.flush()
        sys.stderr.flush()
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, **limits})
    module.use_table(table)
