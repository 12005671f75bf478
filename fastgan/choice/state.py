"""What this process has chosen so far, in one object that proof, race and choice are given."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastgan.choice.budget import Account
from fastgan.choice.cache import Cache
from fastgan.choice.routine import Routine

Watch = Callable[[Routine, str, str], None]


FREE = "auto True"  # the mode in which no backend is forced and races decide


class State:
    """The choices of a process.

    forced     the backend forced, or "auto"; racing: whether backends race
    mode       both in one text, whose hash Python keeps: `choose` looks up by it at each call
    chosen     (mode, case) -> launcher; bounded by MAX_CHOSEN
    disabled   (op, backend) that failed its proof -> the reason
    proved     (op, backend, case) that passed it
    emulated   GPU backends that run on CPU tensors just now
    watchers   called at every op that runs
    second_order  whether derivatives of derivatives are expected of what runs just now
    verdicts   of this run: {digest of a case: backend}; a checkpoint carries them
    in_run     whether a run goes on that keeps its verdicts to its end
    open       cases of this run that its verdicts leave open: {digest: (op, sketch of the arguments)}
    families   (op, family) -> (bound, verdict) of the last clear race in it
    account    what proofs and races may take
    cache      races won on this machine
    """

    MAX_CHOSEN = 4096

    def __init__(self) -> None:
        self._forced, self._racing, self.mode = "auto", True, FREE
        self.chosen: dict[tuple, Callable[..., Any]] = {}
        self.disabled: dict[tuple[str, str], str] = {}
        self.proved: set[tuple] = set()
        self.emulated: set[str] = set()
        self.watchers: list[Watch] = []
        self.second_order = False
        self.verdicts: dict[str, str] = {}
        self.in_run = False
        self.open: dict[str, dict[str, Any]] = {}
        self.families: dict[tuple, tuple[float, Any]] = {}
        self.account = Account()
        self.cache = Cache()

    @property
    def forced(self) -> str:
        return self._forced

    @forced.setter
    def forced(self, name: str) -> None:
        self._forced, self.mode = name, f"{name} {self._racing}"

    @property
    def racing(self) -> bool:
        return self._racing

    @racing.setter
    def racing(self, enabled: bool) -> None:
        self._racing, self.mode = enabled, f"{self._forced} {enabled}"

    def begin_run(self, verdicts: dict[str, str]) -> None:
        """Start a run, or go on with one that had these verdicts; nothing changes them before the next."""
        self.verdicts, self.open, self.in_run = dict(verdicts), {}, True
        self.chosen.clear()


STATE = State()  # one a process, not one a thread: autograd runs backward passes in threads of its own
