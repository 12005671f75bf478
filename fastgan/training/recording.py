"""What a step does, op by op: the check that a CUDA graph of it, replayed, would do what the step does.

A CUDA graph replays kernels on fixed addresses with fixed constants. It cannot read a value back to the host, and it
knows nothing of Python. A number that a scheduler changes, a coin that the model flips, a tensor that an attribute is
set to anew: the graph keeps what it saw at the capture, without an error. `Recording` sees every op of a run. Two runs
of one step must read nothing back, and must be the same ops with the same constants on the same outer tensors.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["Recording", "difference"]

DATA_DEPENDENT = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)
NO_DISPATCH = torch._C._disabled_torch_dispatch_impl  # the dispatch of a tensor class that has none of its own
# these depend on values too, and no tag says so
READ_BACK = ("aten._local_scalar_dense", "aten.equal", "aten.is_nonzero", "aten._assert_async")


class Recording(TorchDispatchMode):
    """Within: every op that runs is noted. Nothing is refused, so that a step under way comes to its end.

    device: where the step runs; a copy from there to the CPU, or the other way, is a violation.

    Ops of ours are seen whole; what their launchers do inside is checked where launchers are tested.
    """

    def __init__(self, device: torch.device):
        super().__init__()
        self.device = device
        self.ops: list[tuple[str, tuple]] = []  # name, constants and, by number, the outer tensors it reads
        self.violations: list[str] = []
        self._outer: dict[int, int] = {}  # storage -> its number, for storages that were there before the run
        self._made: set[int] = set()
        self._held: list[Any] = []  # keeps the outer ones alive: a freed one's address would be given to another

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(kind is not FakeTensor and kind.__torch_dispatch__ is not NO_DISPATCH for kind in types):
            return NotImplemented  # the subclass runs first, and the ops that it makes arrive here
        kwargs = kwargs or {}
        name = str(func)
        if name.startswith(("profiler.", "prim.")):
            return func(*args, **kwargs)
        described = tuple(self._describe(a) for a in (*args, *sorted(kwargs.items())))
        self.ops.append((name, described))
        self._judge(name, func, args, kwargs)
        out = func(*args, **kwargs)
        for tensor in _tensors(out):
            memory = _memory(tensor)[0]
            if memory not in self._outer:
                self._made.add(memory)
        return out

    @property
    def outer(self) -> list[Any]:
        """The storages that the run found there, in the order of their first use."""
        return list(self._outer)

    def _judge(self, name: str, func: Any, args: Any, kwargs: Any) -> None:
        base = name.rpartition(".")[0]
        if base in READ_BACK or any(tag in func.tags for tag in DATA_DEPENDENT):
            self.violations.append(f"{base} reads a value back to the host")
        if self.device.type == "cpu":
            return
        tensors = list(_tensors((args, tuple(kwargs.values()))))
        if base in ("aten._to_copy", "aten.copy_", "aten.to"):
            to = kwargs.get("device") or (args[0].device if base == "aten.copy_" else None)
            source = tensors[-1].device
            if to is not None and torch.device(to).type != source.type:
                kind = "to the CPU" if torch.device(to).type == "cpu" else "from the host"
                self.violations.append(f"{base} copies {tuple(tensors[-1].shape)} {kind}")
        elif any(t.device.type == "cpu" and t.dim() > 0 for t in tensors):
            self.violations.append(f"{base} works on a CPU tensor")

    def _describe(self, a: Any) -> Any:
        if isinstance(a, Tensor):
            memory, owner = _memory(a)
            if memory not in self._made and memory not in self._outer:
                self._outer[memory] = len(self._outer)
                self._held.append(owner)
            outer = self._outer.get(memory)
            host = a.device.type == "cpu" and a.dim() == 0 and self.device.type != "cpu"
            value = a.item() if host and not isinstance(a, FakeTensor) else None  # a 0-dim CPU tensor is a constant
            return tuple(a.shape), a.dtype, outer, value
        if isinstance(a, list | tuple):
            return tuple(self._describe(x) for x in a)
        if isinstance(a, torch.Generator):
            return "generator", getattr(a, "_cdata", 0)  # dispatch makes a new object of it each time
        return repr(a)  # so that nan equals itself, and 1 does not equal True


def _memory(tensor: Tensor) -> tuple[int, Any]:
    """(identity of a tensor's memory, the object that owns it); a fake tensor is its own memory."""
    if isinstance(tensor, FakeTensor):
        return id(tensor), tensor
    storage = tensor.untyped_storage()
    return storage._cdata, storage


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _tensors(part)


def difference(first: Recording, second: Recording) -> str:
    """Why a replay of the first run would not do what the second did, or ""."""
    for run in (first, second):
        if run.violations:
            return run.violations[0]
    for i, ((name, a), (other, b)) in enumerate(zip(first.ops, second.ops, strict=False)):
        if name != other:
            return f"its ops change from step to step (number {i} was {name}, then {other})"
        if a != b:
            was, then = next((x, y) for x, y in zip(a, b, strict=False) if x != y) if len(a) == len(b) else (a, b)
            return f"{name} takes {was} in one step and {then} in the next"
    if len(first.ops) != len(second.ops):
        return f"it runs {len(first.ops)} ops in one step and {len(second.ops)} in the next"
    moved = [i for i, (a, b) in enumerate(zip(first.outer, second.outer, strict=True)) if a != b]
    if moved:
        user = next(name for name, a in second.ops if _reads(a, moved[0]))
        return f"{user} reads a tensor that the step before did not read: it was replaced, not changed in place"
    return ""


def _reads(described: Any, number: int) -> bool:
    """Whether an op's description names this outer storage."""
    if not isinstance(described, tuple):
        return False
    if len(described) == 4 and isinstance(described[1], torch.dtype):
        return bool(described[2] == number)
    return any(_reads(part, number) for part in described)
