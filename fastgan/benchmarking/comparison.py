"""What a benchmark file describes: a case, and the runners that do its work; and the record that is made of them.

A case is one op (or a whole step), one shape, one direction and one dtype. Its runners are timed interleaved; every one
of them becomes a row, also those that fail and those that lose.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from fastgan.benchmarking import timing
from fastgan.choice import watching

Work = list[dict[str, int]]  # pieces as cost() gives them: {"flops": .., "bytes": ..}


class Ceilings(Protocol):
    """What the machine can do at best (benchmarks/ceilings.py)."""

    def bound(self, work: Work, dtype: str) -> float:
        """The least seconds for the work."""


@dataclass(frozen=True)
class Case:
    """What one comparison does; str() is its id. A step has the rows of both dtypes, and no dtype of its own."""

    op: str
    shape: str
    direction: str
    dtype: str = ""

    def __str__(self) -> str:
        return "-".join(part for part in (self.shape, self.direction, self.dtype) if part)

    @property
    def torch_dtype(self) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype


@dataclass(frozen=True)
class Runner:
    """One way to do a case's work.

    run: does it once.
    work: what a perfect kernel would have to do; the bound of the row comes from it.
    dtype: "float32" or "bfloat16": whose ceiling applies; rows are compared within a dtype.
    ours: fastgan's rows; PyTorch's are what they are compared with.
    pytorch: False for another library, which is compared with PyTorch's rows as ours are.
    """

    run: Callable[[], object]
    work: Work = field(default_factory=list)
    dtype: str = "float32"
    ours: bool = False
    pytorch: bool = True


def measure(
    runners: Mapping[str, Runner],
    *,
    seconds: float,
    ceilings: Ceilings | None,
    device: str = "cpu",
    stopwatch: timing.Stopwatch | None = None,
    peak: Callable[[Callable[[], object], str], int] = timing.peak_memory,
    **further: Any,
) -> list[dict[str, Any]]:
    """Time the runners interleaved: one record a runner, ready for JSON (`record` names the keys).

    further: `timing.interleave`'s warmup, rounds and progress.
    """
    calls = {name: r.run for name, r in runners.items()}
    timings = timing.interleave(calls, seconds=seconds, stopwatch=stopwatch, device=device, **further)
    for name, runner in runners.items():
        if not timings[name].failed and runner.pytorch:  # another library's memory is not in torch's allocator
            timings[name].peak_bytes = peak(runner.run, device)
    return [record(name, r, timings, runners, ceilings) for name, r in runners.items()]


def record(
    name: str,
    runner: Runner,
    timings: Mapping[str, timing.Timing],
    runners: Mapping[str, Runner],
    ceilings: Ceilings | None,
) -> dict[str, Any]:
    """A row: times in seconds, memory in bytes, share and ratio as fractions; None where there is nothing to say."""
    t = timings[name]
    bound = ceilings.bound(runner.work, runner.dtype) if ceilings and runner.work else None
    rivals = [n for n, r in runners.items() if r.pytorch and not r.ours and r.dtype == runner.dtype]
    rivals = [n for n in rivals if not timings[n].failed]
    best = min(rivals, key=lambda n: timings[n].median, default=None)
    row: dict[str, Any] = {
        "row": name,
        "ours": runner.ours,
        "dtype": runner.dtype,
        "failed": t.failed,
        "rounds": len(t.samples),
        "iterations": t.iterations,
        "first_call_s": t.first_call,
        "median_s": None,
        "min_s": None,
        "q1_s": None,
        "q3_s": None,
        "samples_s": t.samples,
        "peak_bytes": t.peak_bytes,
        "flops": sum(piece["flops"] for piece in runner.work),
        "bytes": sum(piece["bytes"] for piece in runner.work),
        "bound_s": bound,
        "share_of_bound": None,
        "best_pytorch": best,
        "speedup": None,
        "backends": "",
    }
    if not t.failed:
        low, high = t.quartiles
        row |= {"median_s": t.median, "min_s": t.min, "q1_s": low, "q3_s": high}
        row["share_of_bound"] = bound / t.median if bound is not None else None
        row["speedup"] = timing.ratios(timings, best)[name] if best is not None else None
        row["backends"] = backends_of(runner.run) if runner.ours else ""
    return row


def backends_of(run: Callable[[], object]) -> str:
    """Which backends ran the op calls of one run: "native", or "native 41, reference 2 (conv2d 1, gan_loss 1)"."""
    seen: dict[str, Counter[str]] = {}
    with watching(lambda op, backend, reason: seen.setdefault(backend, Counter()).update([op.name])):
        run()
    if len(seen) < 2:
        return next(iter(seen), "")
    first, *rest = sorted(seen, key=lambda backend: -seen[backend].total())
    told = [f"{b} {seen[b].total()} ({', '.join(f'{op} {n}' for op, n in sorted(seen[b].items()))})" for b in rest]
    return ", ".join([f"{first} {seen[first].total()}", *told])


def wanted(runners: Mapping[str, Runner], names: Collection[str]) -> dict[str, Runner]:
    """The runners that were asked for, in their own order. Raises KeyError for a name that has no runner."""
    missing = [name for name in names if name not in runners]
    if missing:
        raise KeyError(f"comparison: every row must have a runner, got none for {', '.join(missing)}")
    return {name: runner for name, runner in runners.items() if name in names}


# ---- the same results -----------------------------------------------------------------------------------------------


def checked(
    run: Callable[[], Any], want: Mapping[str, Tensor], tolerance: float, answer: Callable[[], Mapping[str, Any]]
) -> Callable[[], Any]:
    """`run`, whose first call is answer() instead: it must give the tensors of `want`, each within a share of its norm.

    What fails here has no samples: results that differ are not raced.
    """
    agreed = False

    def call() -> Any:
        nonlocal agreed
        if agreed:
            return run()
        got = answer()
        for name, expected in want.items():
            error = difference(got[name], expected)
            if not error <= tolerance:
                raise RuntimeError(f"{name} must be eager float32's within {tolerance:g}, got an error of {error:.2g}")
        agreed = True
        return got

    return call


def difference(got: Any, want: Tensor) -> float:
    """|got - want| as a share of |want|."""
    want = want.double()
    error = (torch.as_tensor(got).double() - want).norm() / want.norm().clamp_min(1e-30)
    return error.item()


# ---- how its numbers read -------------------------------------------------------------------------------------------


def milliseconds(seconds: float) -> str:
    return digits(1e3 * seconds)


def digits(value: float) -> str:
    """Three significant digits down to 0.01, no exponent."""
    if 0 < value < 0.0005:
        return "<0.001"
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}" if value >= 1 else f"{value:.3f}"


def versus(row: dict[str, Any]) -> str:
    """How many times as fast as the best PyTorch row of its dtype; our losses say so."""
    if row["speedup"] is None:
        return "-"
    if not row["ours"]:
        return "best" if row["best_pytorch"] == row["row"] else f"{row['speedup']:.2f}"
    return f"{row['speedup']:.2f}" + (" (slower)" if row["speedup"] < 1 else "")
