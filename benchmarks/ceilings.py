"""What this machine can do at best, measured by ceilings.cpp.

    python benchmarks/ceilings.py [TABLE] [threads ...]    # TABLE: no instructions beyond avx2, say

The program is compiled with the host's C++ compiler into a temporary folder each time (about 2 s), so that it is never
older than its source and is built for the processor at hand.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SOURCE = Path(__file__).with_name("ceilings.cpp")
COMPILERS = ("c++", "g++", "clang++")
FLAGS = ("-std=c++17", "-O3", "-pthread")


class Unavailable(RuntimeError):
    """The ceilings cannot be measured here; the message says why."""


@dataclass(frozen=True)
class Ceilings:
    """Peak rates with `threads` threads.

    gflops: by dtype, GFLOP/s of a bare instruction loop; float32 is FMA, bfloat16 the best of FMA and the dot products.
    bandwidth: (footprint in bytes, GB/s), ascending: the better of copy and triad over that footprint.
    raw: what the program printed for this number of threads.
    """

    threads: int
    gflops: dict[str, float]
    bandwidth: list[tuple[int, float]]
    raw: dict[str, Any]

    def bytes_per_second(self, footprint: int) -> float:
        """The rate of the largest measured footprint that is not larger: optimistic, so that a bound stays a bound."""
        fitting = [i for i, (size, _) in enumerate(self.bandwidth) if size <= footprint]
        start = fitting[-1] if fitting else 0
        return max(rate for _, rate in self.bandwidth[start:]) * 1e9

    def bound(self, work: Iterable[dict[str, int]], dtype: str) -> float:
        """Seconds that the pieces of `work` (dicts of "flops" and "bytes", as cost() gives them) take at least."""
        peak = self.gflops[dtype] * 1e9
        return sum(max(piece["flops"] / peak, piece["bytes"] / self.bytes_per_second(piece["bytes"])) for piece in work)


def read(printed: dict[str, Any], threads: int) -> Ceilings:
    """The rates for one number of threads from what the program printed."""
    raw = printed[str(threads)]
    arithmetic = {name: value for name, value in raw.items() if name.endswith("_gflops")}
    return Ceilings(
        threads,
        {"float32": arithmetic["fp32_gflops"], "bfloat16": max(arithmetic.values())},
        [(row["mib"] << 20, max(row["copy_gbs"], row["triad_gbs"])) for row in raw["memory"]],
        raw,
    )


def run(threads: Iterable[int] = (), table: str | None = None) -> dict[str, Any]:
    """Compile and run the program, with the instructions of one table or all: {threads: rates}.

    Raises Unavailable with the reason.
    """
    compiler = next((path for path in map(shutil.which, COMPILERS) if path), None)
    if compiler is None:
        raise Unavailable(f"ceilings: a C++ compiler must be on PATH, got none of {', '.join(COMPILERS)}; install g++")
    with tempfile.TemporaryDirectory(prefix="fastgan-ceilings-") as folder:
        program = str(Path(folder) / "ceilings")
        for native in (["-march=native"], []):  # some compilers for aarch64 do not know the first
            made = _run([compiler, *FLAGS, *native, str(SOURCE), "-o", program])
            if made.returncode == 0:
                break
        else:
            raise Unavailable(f"ceilings: {SOURCE.name} must compile with {compiler}, got: {_last_line(made.stderr)}")
        done = _run([program, *([table] if table else []), *map(str, threads)])
    if done.returncode != 0:
        raise Unavailable(
            f"ceilings: the program must end with code 0, got {done.returncode}: {_last_line(done.stderr)}"
        )
    printed: dict[str, Any] = json.loads(done.stdout)
    return printed


def measure(threads: int, table: str | None = None) -> Ceilings:
    """The ceilings for `threads` threads, with the instructions of one table or all.

    Raises Unavailable with the reason.
    """
    return read(run([threads], table), threads)


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, check=False)


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["no message"])[-1]


def main(arguments: list[str]) -> int:
    table = arguments.pop(0) if arguments and not arguments[0].isdigit() else None
    try:
        printed = run(map(int, arguments) if arguments else sorted({1, os.cpu_count() or 1}), table)
    except (Unavailable, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    for count in printed:
        ceiling = read(printed, int(count))
        rates = {name: value for name, value in ceiling.raw.items() if name.endswith("_gflops")}
        print(f"{count} thread{'' if count == '1' else 's'}")
        for name, value in rates.items():
            print(f"  {name.removesuffix('_gflops').replace('_', ' '):12} {value:8.0f} GFLOP/s")
        for row in ceiling.raw["memory"]:
            print(f"  {row['mib']:4} MiB     copy {row['copy_gbs']:6.1f} GB/s   triad {row['triad_gbs']:6.1f} GB/s")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
