"""The types that choosing stands on: a backend, what backends compete for, and the registry of ops."""

from __future__ import annotations

import abc
import importlib
import inspect
from collections.abc import Callable, Iterator
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
    products   whether it multiplies matrices: in bfloat16 that takes instructions of the CPU's own.
    """

    products = False

    def __init__(self, name: str, reference: Callable[..., Any], backends: dict[str, Backend]):
        self.name, self.reference, self.names = name, reference, tuple(inspect.signature(reference).parameters)
        self.backends = {**backends, "reference": Backend(reference)}
        REGISTERED[name] = self

    def first(self, args: tuple) -> Tensor:
        """The tensor whose device and dtype a call goes by."""
        return args[0]

    def case(self, args: tuple) -> tuple:
        """What the choice of a backend depends on."""
        return tuple(
            [
                (a.shape, a.stride(), a.dtype, "cpu" if a.is_cpu else a.device.type)
                if isinstance(a, Tensor)
                else tuple(a)
                if isinstance(a, list)
                else a
                for a in args  # each call of an op looks here: a function call an argument took 0.1 us
            ]
        )

    def one_sample(self, args: tuple) -> tuple | None:
        """The call on the first sample of the batch, or None where that is no smaller call."""
        return None

    @abc.abstractmethod
    def drawn(self, args: tuple) -> tuple:
        """The case's arguments with random contents: a batch's own data may cancel to noise (a gradient of zero)."""

    def restored(self, args: tuple) -> tuple:
        """Arguments as the op takes them, of a case that went through JSON, where every tuple is a list."""
        return args

    def copies(self, args: tuple) -> tuple:
        """Arguments that a call may write to; an op writes to none."""
        return args


def _describe(a: Any) -> Any:
    if isinstance(a, Tensor):
        return a.shape, a.stride(), a.dtype, a.device.type
    return tuple(a) if isinstance(a, list) else a


def tensors(args: Any) -> Iterator[Tensor]:
    """The tensors among arguments, those in lists included."""
    for a in args:
        if isinstance(a, Tensor):
            yield a
        elif isinstance(a, list | tuple):
            yield from tensors(a)


def family(args: tuple) -> tuple:
    """A case but for the first size of each tensor: batch sizes, and a weight's output channels."""
    return tuple((a.shape[1:], a.stride(), a.dtype) if isinstance(a, Tensor) else _describe(a) for a in args)


REGISTERED: dict[str, Routine] = {}  # every one by its name


def triton(stem: str, name: str = "") -> Backend:
    """LAUNCHERS[name] of kernels/<stem>.py, imported when it is first asked: `import triton` takes half a second."""

    def found() -> Backend:
        launcher: Backend = importlib.import_module(f"fastgan.kernels.{stem}").LAUNCHERS[name or stem]
        return launcher

    return Backend(lambda *args: found().run(*args), lambda *args: found().declines(*args))
