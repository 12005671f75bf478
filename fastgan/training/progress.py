"""What a run shows while it trains: a live display on a terminal, else lines, or nothing."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TextIO

import torch

__all__ = [
    "LineProgress",
    "LiveProgress",
    "QuietProgress",
    "SafeProgress",
    "counter",
    "describe",
    "duration",
    "memory_mb",
    "progress_for",
    "silence",
]

# The values of a record that are shown, in this order; log.jsonl has the others too.
_TITLES = {
    "images_per_second": "images/s",
    "step_ms": "ms/step",
    "d_loss": "D loss",
    "g_loss": "G loss",
    "d_real": "D(x)",
    "d_fake": "D(G(z))",
    "penalty": "penalty",
    "kcd": "kcd",
    "memory_mb": "MB",
}


def duration(seconds: float) -> str:
    """61 -> "1:01", 3661 -> "1:01:01"."""
    whole = max(0, round(seconds))
    hours, minutes = whole // 3600, whole // 60 % 60
    return f"{hours}:{minutes:02d}:{whole % 60:02d}" if hours else f"{minutes}:{whole % 60:02d}"


def memory_mb(device: torch.device) -> float:
    """Memory that the run holds, in MB: the device's peak on a GPU, the process' resident set on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    statm = Path("/proc/self/statm")
    if statm.exists():
        return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6
    try:
        import resource
    except ImportError:  # Windows
        return 0.0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1e6 if sys.platform == "darwin" else 1e3)  # bytes on macOS, KB elsewhere


def _number(key: str, value: float) -> str:
    if key in ("images_per_second", "memory_mb"):
        return f"{value:,.0f}"
    return f"{value:.1f}" if key == "step_ms" else f"{value:.3f}"


def _cells(record: Mapping[str, Any]) -> dict[str, str]:
    return {title: _number(key, record[key]) for key, title in _TITLES.items() if key in record}


def describe(record: Mapping[str, Any]) -> str:
    """One line for one logged step."""
    return "  ".join(f"{title} {text}" for title, text in _cells(record).items())


class QuietProgress:
    """Shows warnings only."""

    def start(self, step: int, steps: int) -> None:
        """Training begins at `step` of `steps`."""

    def tick(self, step: int) -> None:
        """`step` steps are done. Called at every step: must cost next to nothing."""

    def log(self, record: Mapping[str, Any]) -> None:
        """A logged step: a record of log.jsonl with `seconds_left`."""

    def note(self, text: str) -> None:
        """A line worth reading."""

    def warn(self, text: str) -> None:
        """A line that should be read."""
        print(f"warning: {text}", file=sys.stderr, flush=True)

    def stop(self) -> None:
        """Training has ended, one way or another."""


class LineProgress(QuietProgress):
    """Lines for pipes and log files: a logged step each, at most one in `seconds`, and the last."""

    def __init__(self, seconds: float = 5.0):
        self._gap = seconds
        self._shown = float("-inf")
        self._steps = 0

    def start(self, step: int, steps: int) -> None:
        self._steps = steps

    def log(self, record: Mapping[str, Any]) -> None:
        now = time.monotonic()
        if now - self._shown < self._gap and record["step"] < self._steps:
            return
        self._shown = now
        left = duration(record.get("seconds_left", 0.0))
        print(f"step {record['step']}/{self._steps}  {describe(record)}  left {left}", flush=True)

    def note(self, text: str) -> None:
        print(text, flush=True)


class LiveProgress(QuietProgress):
    """A bar and a row of numbers that stay in place at the bottom of a terminal."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.live import Live
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        self._console = Console(highlight=False)
        self._bar = Progress(
            TextColumn("training"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left {task.fields[left]}"),
            console=self._console,
            expand=True,
        )
        self._live = Live(self._bar, console=self._console, refresh_per_second=4)
        self._task = self._bar.add_task("training", left="?")

    def start(self, step: int, steps: int) -> None:
        self._bar.update(self._task, total=steps, completed=step)
        self._live.start()

    def tick(self, step: int) -> None:
        self._bar.update(self._task, completed=step)

    def log(self, record: Mapping[str, Any]) -> None:
        from rich.console import Group
        from rich.table import Table

        cells = _cells(record)
        table = Table(box=None, expand=True, padding=(0, 1))
        for title in cells:
            table.add_column(title, justify="right", header_style="dim", no_wrap=True)
        table.add_row(*cells.values())
        self._bar.update(self._task, left=duration(record.get("seconds_left", 0.0)))
        self._live.update(Group(table, self._bar))

    def note(self, text: str) -> None:
        self._console.print(text, markup=False)

    def warn(self, text: str) -> None:
        self._console.print(f"warning: {text}", style="yellow", markup=False)

    def stop(self) -> None:
        self._live.stop()


class SafeProgress(QuietProgress):
    """`shown`, until showing fails: then warnings alone, and nothing where stderr is gone too.

    The terminal may be closed, the reader of a pipe gone, a disk full: the run goes on, and log.jsonl has it all.
    """

    def __init__(self, shown: QuietProgress) -> None:
        self._shown: QuietProgress | None = shown

    def _show(self, call: Callable[[QuietProgress], None]) -> None:
        while self._shown is not None:
            try:
                return call(self._shown)
            except Exception:
                plain = type(self._shown) is QuietProgress
                silence(sys.stderr if plain else sys.stdout)
                self._shown = None if plain else QuietProgress()

    def start(self, step: int, steps: int) -> None:
        self._show(lambda shown: shown.start(step, steps))

    def tick(self, step: int) -> None:
        self._show(lambda shown: shown.tick(step))

    def log(self, record: Mapping[str, Any]) -> None:
        self._show(lambda shown: shown.log(record))

    def note(self, text: str) -> None:
        self._show(lambda shown: shown.note(text))

    def warn(self, text: str) -> None:
        self._show(lambda shown: shown.warn(text))

    def stop(self) -> None:
        self._show(lambda shown: shown.stop())


def silence(stream: TextIO | None) -> None:
    """Send what `stream` still holds, and all that follows, nowhere: Python flushes it once more at its exit."""
    with contextlib.suppress(Exception):
        if stream is not None:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())
            os.close(nowhere)


def counter(noun: str) -> Callable[[int, int], None] | None:
    """A bar for (done, in all) on stderr, with the pace and the time left; None where that is no terminal."""
    if sys.stderr is None or not sys.stderr.isatty():
        return None
    start: list[float] = []  # the count and the time at the first call: an earlier process may have done a part

    def show(done: int, total: int) -> None:
        now = time.monotonic()
        start.extend((done, now) if not start else ())
        pace = (done - start[0]) / max(1e-9, now - start[1])
        bar = "#" * (30 * done // max(1, total))
        text = f"\r[{bar:<30}] {done:,} of {total:,} {noun}"
        if pace:
            text += f", {pace:,.0f} a second, {duration((total - done) / pace)} left "
        with contextlib.suppress(OSError, ValueError):  # the terminal may go away
            print(text, end="\n" if done == total else "", file=sys.stderr, flush=True)

    return show


def progress_for(*, quiet: bool) -> QuietProgress:
    """The display that suits where the output goes."""
    if quiet or sys.stdout is None:  # None: the process was started without one
        return SafeProgress(QuietProgress())
    return SafeProgress(LiveProgress() if sys.stdout.isatty() else LineProgress())
