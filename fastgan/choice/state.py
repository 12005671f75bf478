"""What this process has chosen so far, in one object that proof, race and choice are given."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastgan.choice.cache import Cache
from fastgan.choice.routine import Routine

Watch = Callable[[Routine, str, str], None]


class State:
    """The choices of a process.

    forced     the backend forced, or "auto"; racing: whether backends race
    chosen     (mode, case) -> launcher; bounded by MAX_CHOSEN
    disabled   (op, backend) that failed its proof -> the reason
    proved     (op, backend, case) that passed it
    emulated   GPU backends that run on CPU tensors just now
    watchers   called at every op that runs
    cache      races won on this machine
    """

    MAX_CHOSEN = 4096

    def __init__(self) -> None:
        self.forced, self.racing = "auto", True
        self.chosen: dict[tuple, Callable[..., Any]] = {}
        self.disabled: dict[tuple[str, str], str] = {}
        self.proved: set[tuple] = set()
        self.emulated: set[str] = set()
        self.watchers: list[Watch] = []
        self.cache = Cache()


STATE = State()  # of this process; autograd runs backwards in other threads, so it is not a thread's
