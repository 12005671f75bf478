"""Does a converted model give the original's numbers: outputs, gradients, and the gradients of an R1 penalty?"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastgan.trace.part import Part

# of the original's norm; second derivatives see the sign of every activation twice
TOLERANCE = {"output": 1e-4, "gradient": 1e-3, "R1 gradient": 1e-2}


class Proof:
    """The numbers of a model on an example, taken before it is converted."""

    def __init__(self, model: nn.Module, example: Any):
        self.model = model
        self.example = example if isinstance(example, tuple) else (example,)
        self.modes = {False, model.training}
        self.want = {training: self._numbers(training) for training in self.modes}

    def difference(self, parts: Sequence[Part] = ()) -> str:
        """How the model's numbers differ from those now, or "". Traced groups at fault are left to PyTorch first."""
        said = self._compared()
        if not said or not parts:
            return said
        groups = {key for part in parts for key in part.groups()}
        faulty = {key for key in groups if self._with_only(parts, groups - {key})}
        for part in parts:
            part.leave(faulty, f"left to PyTorch: its numbers differ ({said})")
        for _, where in sorted(faulty):
            warnings.warn(f"convert: the group at {where} is left to PyTorch: its numbers differ", stacklevel=3)
        return self._compared()

    def _with_only(self, parts: Sequence[Part], left: set) -> str:
        """The difference with all groups but one left to PyTorch."""
        for part in parts:
            part.leave(left, "being proved")
        return self._compared()

    def _compared(self) -> str:
        for training, want in self.want.items():
            for (what, b), (_, a) in zip(want, self._numbers(training), strict=True):
                limit = TOLERANCE[what] * b.norm().item() + 1e-6
                error = (a - b).norm().item() if a.shape == b.shape else float("inf")
                if not error <= limit:
                    return f"an error of {error:.3g} in the {what} where {limit:.3g} is allowed"
        return ""

    def _numbers(self, training: bool) -> list[tuple[str, Tensor]]:
        """(kind, values in float64); buffers, modes, gradients and random state are left as found."""
        x = [a.detach().clone().requires_grad_() if _floating(a) else a for a in self.example]
        leaves = [p for p in self.model.parameters() if p.requires_grad]
        inputs = [a for a in x if _floating(a)]
        with _as_found(self.model, training), torch.enable_grad():
            leaf_outputs = torch.utils._pytree.tree_leaves(self.model(*x))
            outputs = [y for y in leaf_outputs if _floating(y)]
            found = [("output", y) for y in outputs]
            total = sum((y.double().square().sum() for y in outputs if y.requires_grad), torch.zeros(()))
            if total.requires_grad:
                first = torch.autograd.grad(total, leaves + inputs, create_graph=bool(inputs), allow_unused=True)
                found += [("gradient", g) for g in first if g is not None]
                penalty = sum((g.double().square().sum() for g in first[len(leaves) :] if g is not None), total * 0)
                with contextlib.suppress(RuntimeError):  # a model that is differentiable once
                    second = torch.autograd.grad(penalty, leaves, allow_unused=True) if leaves and inputs else ()
                    found += [("R1 gradient", g) for g in second if g is not None]
        return [(what, t.detach().double().clone()) for what, t in found]


def _floating(a: Any) -> bool:
    return isinstance(a, Tensor) and a.is_floating_point()


@contextlib.contextmanager
def _as_found(model: nn.Module, training: bool) -> Iterator[None]:
    """Within: the model in train or eval mode, under one seed."""
    modes = [(m, m.training) for m in model.modules()]
    buffers = [(b, b.detach().clone()) for b in model.buffers()]
    devices = sorted({p.device.index for p in model.parameters() if p.is_cuda})
    with torch.random.fork_rng(devices):
        torch.manual_seed(0)
        try:
            if training is not model.training:
                model.train(training)
            yield
        finally:
            for m, mode in modes:
                m.training = mode
            with torch.no_grad():
                for buffer, before in buffers:
                    buffer.copy_(before)
