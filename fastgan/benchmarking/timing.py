"""The interleaved runner: several callables that do the same work, timed in turns in one process.

    from fastgan.benchmarking.timing import interleave, ratios

    timings = interleave({"eager": f, "fastgan": g}, seconds=2)
    timings["fastgan"].median, ratios(timings, baseline="eager")

Each callable is called until it is warm (compiling and racing happen there), then rounds follow: in every round each
runs once, and each round starts with another one, so that a slow moment of the machine or a neighbour's cache contents
hit all alike. A callable that raises is kept, with its reason. On CUDA the clock is a pair of events and the memory is
torch's own peak; that path has not run on a GPU yet.
"""

from __future__ import annotations

import contextlib
import gc
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch

SAMPLE = 0.010  # seconds of work in one sample: a clock read (50 ns) and a call's jitter (1 us) vanish in it
MAX_ITERATIONS = 10_000
MIN_ROUNDS, MAX_ROUNDS = 5, 60

Stopwatch = Callable[[Callable[[], object], int], float]  # (run, iterations) -> seconds in all


@dataclass
class Timing:
    """One callable's samples, in seconds a call."""

    samples: list[float] = field(default_factory=list)
    iterations: int = 1  # calls in one sample
    first_call: float = 0.0  # seconds: compiling, proving and racing are in it
    peak_bytes: int | None = None  # extra memory at the worst moment of a call; see peak_memory
    failed: str = ""  # why it has no samples

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    @property
    def min(self) -> float:
        return min(self.samples)

    @property
    def quartiles(self) -> tuple[float, float]:
        """(lower, upper); both the sample where there is only one."""
        if len(self.samples) < 2:
            return self.samples[0], self.samples[0]
        low, _, high = statistics.quantiles(self.samples, n=4, method="inclusive")
        return low, high


def interleave(
    runners: Mapping[str, Callable[[], object]],
    *,
    seconds: float = 1.0,
    warmup: int = 2,
    rounds: int = MIN_ROUNDS,
    stopwatch: Stopwatch | None = None,
    device: str = "cpu",
    progress: Callable[[str], None] = lambda doing: None,
) -> dict[str, Timing]:
    """Time the callables in turns.

    Args:
        runners: name -> callable without arguments; each leaves the world as it found it.
        seconds: wall time of the rounds (not of the warm-up); at least `rounds` are run whatever they take.
        warmup: calls before the first sample, the first one included.
        rounds: the least number of rounds.
        stopwatch: how a sample is taken; None takes the one of `device`.
        device: "cpu" or "cuda".
        progress: called between samples with what comes next.

    Returns:
        A Timing for every name, in the order given, also for those that failed.
    """
    watch = stopwatch or STOPWATCHES[device]
    timings = {name: Timing() for name in runners}
    alive = []
    for name, run in runners.items():
        progress(f"first calls of {name}")
        with _failing(timings[name]):
            timings[name].first_call = watch(run, 1)
            once = _once(run, warmup - 1, watch)
            timings[name].iterations = min(MAX_ITERATIONS, max(1, round(SAMPLE / max(once, 1e-9))))
            alive.append(name)
    spent = 0.0
    with _without_collector():
        for turn in range(MAX_ROUNDS):
            if not alive or (turn >= rounds and spent >= seconds):
                break
            progress(f"round {turn + 1}, {spent:.0f} of {seconds:g} s")
            start = turn % len(alive)
            for name in alive[start:] + alive[:start]:
                timing = timings[name]
                with _failing(timing):
                    took = watch(runners[name], timing.iterations)
                    timing.samples.append(took / timing.iterations)
                    spent += took
            alive = [name for name in alive if not timings[name].failed]
    return timings


def _once(run: Callable[[], object], calls: int, watch: Stopwatch) -> float:
    """The quickest of `calls` calls, and of more for what is quick: one call alone may be a noisy moment."""
    quickest, spent, made = float("inf"), 0.0, 0
    while made < calls or spent < SAMPLE or (made < 5 and quickest < 5 * SAMPLE):
        took = watch(run, 1)
        quickest, spent, made = min(quickest, took), spent + max(took, 1e-6), made + 1
    return quickest


def ratios(timings: Mapping[str, Timing], baseline: str) -> dict[str, float | None]:
    """The baseline's median over each one's: above 1 is faster than the baseline. None where either failed."""
    base = timings[baseline]
    return {name: None if t.failed or base.failed else base.median / t.median for name, t in timings.items()}


@contextlib.contextmanager
def _failing(timing: Timing) -> Iterator[None]:
    """Keep what a runner raises as its reason: the others go on, and its row stays in the table."""
    try:
        yield
    except Exception as error:
        timing.failed = f"{type(error).__name__}: {_first_line(error)}"
        timing.samples.clear()


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "no message")[:200]


@contextlib.contextmanager
def _without_collector() -> Iterator[None]:
    """Python's cycle collector would run in whoever is at work at that moment."""
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


# ---- clocks ---------------------------------------------------------------------------------------------------------


def cpu_stopwatch(run: Callable[[], object], iterations: int) -> float:
    start = time.perf_counter()
    for _ in range(iterations):
        run()
    return time.perf_counter() - start


def cuda_stopwatch(run: Callable[[], object], iterations: int) -> float:
    """Seconds between two events of the current stream: kernels and the gaps between them."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    for _ in range(iterations):
        run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


STOPWATCHES: dict[str, Stopwatch] = {"cpu": cpu_stopwatch, "cuda": cuda_stopwatch}


# ---- memory ---------------------------------------------------------------------------------------------------------


def peak_memory(run: Callable[[], object], device: str = "cpu") -> int:
    """Bytes that one call has live at its worst moment beyond what was live before it.

    CPU: the profiler's record of every allocation and release of torch's allocator, summed in order of time. That is
    exact and repeats to the byte, which the resident set does not. It covers tensors and oneDNN's scratch (torch
    allocates it), not the scratch blocks that fastgan's kernels recycle among themselves (packed weights, partial
    sums). CUDA: torch.cuda.max_memory_allocated.
    """
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    cpu = [torch.profiler.ProfilerActivity.CPU]
    with _quiet(), torch.profiler.profile(activities=cpu, profile_memory=True, acc_events=True) as profile:
        run()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    return highest(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns()))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Within: nothing on the process's stderr, where the profiler logs its start and stop."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def highest(changes: Iterator[int]) -> int:
    """The highest running sum of a sequence of allocations (+) and releases (-), at least 0."""
    live = top = 0
    for change in changes:
        live += change
        top = max(top, live)
    return top
