"""The types that choosing stands on: a backend, what backends compete for, and the registry of ops."""

from __future__ import annotations

import abc
import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

NAMES = ("cuda", "triton", "native", "reference")
DEVICES = {"cuda": ("cuda",), "triton": ("cuda",), "native": ("cpu",), "reference": ()}  # (): every device


@dataclass(frozen=True)
class Backend:
    """A launcher with the op's arguments, and `declines(*args)`: the reason why it leaves a case to others, or ""."""

    run: Callable[..., Any]
    declines: Callable[..., str] = lambda *args: ""


class Routine(abc.ABC):
    """What backends are proved and raced for: a name, a reference in PyTorch, and kernels.

    reference  pure PyTorch: the specification, the fallback, and PyTorch's entry in the race.
    backends   name -> Backend (a launcher and a function that declines a case with its reason).
    """

    def __init__(self, name: str, reference: Callable[..., Any], backends: dict[str, Backend]):
        self.name, self.reference, self.names = name, reference, tuple(inspect.signature(reference).parameters)
        self.backends = {**backends, "reference": Backend(reference)}

    def first(self, args: tuple) -> Tensor:
        """The tensor whose device and dtype a call goes by."""
        return args[0]

    def case(self, args: tuple) -> tuple:
        """What the choice of a backend depends on."""
        return tuple(map(_describe, args))

    @abc.abstractmethod
    def drawn(self, args: tuple) -> tuple:
        """The case's arguments with random contents: a batch's own data may cancel to noise (a gradient of zero)."""

    def copies(self, args: tuple) -> tuple:
        """Arguments that a call may write to; an op writes to none."""
        return args


def _describe(a: Any) -> Any:
    if isinstance(a, Tensor):
        return a.shape, a.stride(), a.dtype, a.device.type
    return tuple(a) if isinstance(a, list) else a


REGISTERED: dict[str, Routine] = {}  # every op by its name; fastgan/_op.py enters them


def triton(stem: str, name: str = "") -> Backend:
    """LAUNCHERS[name] of kernels/<stem>.py, imported when it is first asked: `import triton` takes half a second."""

    def found() -> Backend:
        launcher: Backend = importlib.import_module(f"fastgan.kernels.{stem}").LAUNCHERS[name or stem]
        return launcher

    return Backend(lambda *args: found().run(*args), lambda *args: found().declines(*args))
