"""A run's time: what it has trained in all, and its pace, off which pictures, checkpoints and evaluations are kept."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

import torch

__all__ = ["Clock"]


class Clock:
    """seconds: of training in all, earlier processes included. Work done `aside` counts in them, and not in `pace`."""

    def __init__(self, device: torch.device):
        self.seconds = 0.0
        self._device = device
        self._began = self._mark = 0.0
        self._before = 0.0
        self._step = 0

    def start(self, step: int) -> None:
        """Training begins, after `step` steps."""
        self._began = self._mark = time.perf_counter()
        self._before, self._step = self.seconds, step

    def tick(self) -> None:
        """A step is done."""
        self.seconds = self._before + self.elapsed

    def rewind(self, step: int) -> None:
        """The run goes on from `step`, an earlier one."""
        self._mark, self._step = time.perf_counter(), step

    @property
    def elapsed(self) -> float:
        """Seconds since `start`."""
        return time.perf_counter() - self._began

    def pace(self, step: int) -> float:
        """Seconds a step since this was last asked."""
        now = time.perf_counter()
        found = (now - self._mark) / max(1, step - self._step)
        self._mark, self._step = now, step
        return found

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """Within: the pace stands still."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        begin = time.perf_counter()
        yield
        self._mark += time.perf_counter() - begin
