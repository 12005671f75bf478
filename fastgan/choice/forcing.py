"""What users say about the choice: one backend for all, no races, an emulated GPU backend, a look at what runs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from fastgan.choice.availability import missing
from fastgan.choice.routine import NAMES
from fastgan.choice.state import STATE, Watch


class MissingBackendError(RuntimeError, ValueError):
    """A backend that this machine lacks was asked for."""


class backend:
    """Run every op with one backend: `with fastgan.backend("reference"): ...`, or as a plain call for good.

    name: "auto", "reference", "native", "triton" or "cuda". Process-wide, since autograd runs CUDA backwards in other
    threads. A case that the named backend declines runs on the reference.
    Raises ValueError for an unknown name, and for a backend that this machine lacks, with the reason, a RuntimeError
    that is a ValueError too.
    """

    def __init__(self, name: str):
        if name not in ("auto", *NAMES):
            raise ValueError(f"backend: name must be one of auto, {', '.join(reversed(NAMES))}, got {name!r}")
        if name != "auto" and missing(name):
            raise MissingBackendError(f"backend: {name} must be available, got none: {missing(name)}")
        self._before, STATE.forced = STATE.forced, name

    def __enter__(self) -> backend:
        return self

    def __exit__(self, *error: object) -> None:
        STATE.forced = self._before


class racing:
    """Switch racing off (or on): `with fastgan.racing(False): ...`, or as a plain call for good.

    Without racing the first backend that can run a case runs it, so a run is reproducible bit for bit without the
    winners of an earlier one.
    """

    def __init__(self, enabled: bool):
        self._before, STATE.racing = STATE.racing, enabled

    def __enter__(self) -> racing:
        return self

    def __exit__(self, *error: object) -> None:
        STATE.racing = self._before


def forced() -> tuple[str, bool]:
    """(the backend forced, or "auto"; whether backends race): where either changes, a captured step is thrown away."""
    return STATE.forced, STATE.racing


@contextlib.contextmanager
def emulated(name: str) -> Iterator[None]:
    """Within: the GPU backend `name` runs on CPU tensors, and is the one forced (`fastgan.testing.emulate`)."""
    before = set(STATE.emulated)
    STATE.emulated.add(name)
    STATE.chosen.clear()
    try:
        with backend(name):
            yield
    finally:
        STATE.emulated.intersection_update(before)
        STATE.chosen.clear()


@contextlib.contextmanager
def watching(watch: Watch) -> Iterator[None]:
    """Call watch(op, backend, reason) at every op that runs; how `explain` sees what ran."""
    STATE.watchers.append(watch)
    try:
        yield
    finally:
        STATE.watchers.remove(watch)


@contextlib.contextmanager
def second_order() -> Iterator[None]:
    """Within: second derivatives are expected, for which small tensors too go through our ops."""
    before, STATE.second_order = STATE.second_order, True
    try:
        yield
    finally:
        STATE.second_order = before
