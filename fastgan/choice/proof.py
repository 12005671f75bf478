"""The proof: a backend's outputs beside the reference's, on random data of the case.

On a GPU nothing runs unproved, not even where a backend is forced, racing is off or the account is empty: its kernels
have never run on the user's card before. On a CPU the tests have run the same instruction tables, so a proof waits for
the account. A kernel that fails is switched off with one warning, and the reference takes over.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastgan.choice.hardware import lacks_products
from fastgan.choice.routine import Routine
from fastgan.choice.state import State

PROVED_ON = {"cuda"}  # device types on which every case is proved at its first use
# A proof compares norms, so that one sign flip of an activation at |t| ~ 1e-7 (1e-3 of the norm of a 1e6-element
# tensor at most) passes and a wrong tap, mask or statistic does not.
TOLERANCE = {torch.float32: 2e-3, torch.bfloat16: 2e-2, torch.float16: 5e-3}

Timed = Callable[[str, Callable[[], Any]], Any]  # (backend, run) -> what run() returns


def prove(state: State, op: Routine, name: str, case: tuple, args: tuple, timed: Timed = lambda _, run: run()) -> bool:
    """Whether `name` agrees with the reference on `args`, random numbers for `case`; where not, it is switched off."""
    error = proof_error(op, name, args, timed)
    if not error:
        state.proved.add((op.name, name, *op.case(case)))
        return True
    state.disabled[op.name, name] = error
    state.chosen.clear()
    warnings.warn(f"fastgan: {op.name} on {name} is switched off: {error}", RuntimeWarning, stacklevel=8)
    return False


def is_due(state: State, op: Routine, name: str, args: tuple) -> bool:
    """Whether `name` must be proved on this case before it runs."""
    if name == "reference" or op.first(args).device.type not in PROVED_ON:
        return False
    return (op.name, name, *op.case(args)) not in state.proved


class _Poisoned(TorchDispatchMode):
    """Within: fresh tensors hold NaN, so that an element which a kernel forgets to write shows."""

    paused = False  # while a kernel races its configurations: one with more scratch memory must not pay for the filling
    fresh = ("aten::empty", "aten::empty_like", "aten::empty_strided", "aten::new_empty", "aten::new_empty_strided")

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func._schema.name in self.fresh and out.is_floating_point() and not _Poisoned.paused:
            out.fill_(float("nan"))
        return out


@contextlib.contextmanager
def timing() -> Iterator[None]:
    """Within: fresh tensors are as they come, also during a proof, so that what is timed is what users run."""
    before, _Poisoned.paused = _Poisoned.paused, True
    try:
        yield
    finally:
        _Poisoned.paused = before


def proof_error(op: Routine, name: str, args: tuple, timed: Timed = lambda _, run: run()) -> str:
    """Compare a backend with the reference on `args`; the sentence that says how it failed, or ""."""
    try:
        with _Poisoned():
            got = timed(name, lambda: op.backends[name].run(*op.copies(args)))
        narrow = lacks_products(op, args)
        want = _in_float32(op, args) if narrow else timed("reference", lambda: op.reference(*op.copies(args)))
        fault = _difference(op, args, got, want)
        if fault and not narrow and op.first(args).dtype in (torch.bfloat16, torch.float16):
            # A reference of 16 bits rounds what it sums: a bias' gradient that cancels out is 10 % off and more.
            fault = _difference(op, args, got, _in_float32(op, args))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        return f"it raised {type(error).__name__}: {error}"
    return fault


def _difference(op: Routine, args: tuple, got: Any, want: Any) -> str:
    """How the outputs differ from what they should be, or ""."""
    pairs = zip(got, want, strict=True) if isinstance(want, tuple) else [(got, want)]
    for index, (g, w) in enumerate(pairs):
        if g.shape != w.shape or g.dtype != w.dtype:
            return f"output {index} must be {tuple(w.shape)} {w.dtype}, got {tuple(g.shape)} {g.dtype}"
        distance, limit = _distance(g, w, op.first(args).dtype)
        if not distance <= limit:
            return f"output {index} must be within {limit:.3g} of the reference, got an error of {distance:.3g}"
    return ""


def _distance(got: Tensor, want: Tensor, dtype: torch.dtype) -> tuple[float, float]:
    """How far apart two outputs are, and may be, for a case of `dtype`."""
    if want.dtype == torch.uint8:  # bits of comparisons: a sample in 10^7 is within a rounding of the edge
        return (got != want).sum().item(), 1 + 1e-3 * want.numel()
    got, want = (t if t.dtype == torch.float64 else t.float() for t in (got, want))
    return torch.dist(got, want).item(), TOLERANCE.get(dtype, 1e-9) * want.norm().item()


def _in_float32(op: Routine, args: tuple) -> Any:
    """The reference's outputs, computed in float32 and each rounded at the end to its own dtype: attention's row sums
    stay float32. Also where PyTorch has no instructions for the dtype."""
    dtype = op.first(args).dtype
    wide = tuple(a.float() if isinstance(a, Tensor) and a.dtype == dtype else a for a in args)
    y = op.reference(*wide)
    if not isinstance(y, tuple):
        return y.to(dtype)
    dtypes = [t.dtype for t in op.reference(*(a.to("meta") if isinstance(a, Tensor) else a for a in args))]
    return tuple(t.to(dtype) for t, dtype in zip(y, dtypes, strict=True))
