"""The signals that end a run in good order."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

__all__ = ["Signals"]

# SIGHUP comes when the terminal goes away; Windows has none.
_NAMES = ("SIGINT", "SIGTERM", "SIGHUP")


class Signals:
    """Notes SIGINT, SIGTERM and SIGHUP for as long as it is entered; a second SIGINT or SIGTERM of the same kind raises
    KeyboardInterrupt.

    A signal that the process ignores stays ignored: so nohup and a shell's background jobs mean it. Outside the main
    thread Python allows no handlers: then the process' own handling stays as it is.
    """

    def __init__(self) -> None:
        self.received: set[int] = set()
        self._before: dict[signal.Signals, Any] = {}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        # A terminal that closes may send SIGHUP more than once, and SIGTERM after it: nobody there asks for haste.
        if number in self.received and number in (signal.SIGINT, signal.SIGTERM):
            raise KeyboardInterrupt
        self.received.add(number)

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            for name in _NAMES:
                number = getattr(signal, name, None)
                if number is not None and signal.getsignal(number) is not signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
