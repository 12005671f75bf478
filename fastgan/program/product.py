"""Matrix products as steps of a program: torch's own, which are MKL's and oneDNN's, on memory that the plan gave them.

Between two products the native steps run as one call. So a program with linear layers is a few calls, one autograd node
and no dispatch of a norm or an activation; its numbers are nn.Linear's to the bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastgan.program.memory import BLOCKS, Arena, Place


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor) -> None:
    """y [N, K] = x [N, C] weight^T + bias, in x's type: bfloat16 casts the parameters, as autocast does."""
    if x.dtype != weight.dtype:
        weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
    torch._C._nn.linear(x, weight, bias, out=y)  # type: ignore[call-arg]  # torch's stubs hide `out`


def weight_gradient(dy: Tensor, x: Tensor, dweight: Tensor) -> None:
    """dweight [K, C] = dy^T x."""
    if x.dtype != dweight.dtype:
        dweight.copy_(torch.mm(dy.t(), x))
    else:
        torch.mm(dy.t(), x, out=dweight)


def input_gradient(dy: Tensor, weight: Tensor, dx: Tensor) -> None:
    """dx [N, C] = dy weight."""
    torch.mm(dy, weight if weight.dtype == dy.dtype else weight.to(dy.dtype), out=dx)


PRODUCTS: dict[str, Callable[..., None]] = {
    "linear": forward,
    "linear_weight": weight_gradient,
    "linear_input": input_gradient,
}

Operand = tuple[Place, tuple[int, int], torch.dtype]  # the shape and type of what lies in the arena


class Product:
    """One product; its operands are of the caller, or lie in the arena."""

    def __init__(self, kernel: str, operands: Sequence[Operand | None]):
        self.kernel = PRODUCTS[kernel]
        self.operands = [o and (o[0].slot, o[0].offset, *o[1:]) for o in operands]

    def run(self, threads: int, arena: Arena, *slots: Tensor | None) -> None:
        self.kernel(*(o and (arena.view(*o) if o[0] in BLOCKS else slots[o[0]]) for o in self.operands))


class Native:
    """Native steps that follow each other: one call."""

    def __init__(self, program: Any):
        self.program = program

    def run(self, threads: int, arena: Arena, *slots: Tensor | None) -> None:
        self.program.run(threads, *slots)


class Steps:
    """The steps of a program in order: run(threads, arena, *slots)."""

    def __init__(self, parts: Sequence[Native | Product]):
        self.parts = parts
        if len(parts) == 1:
            self.run = parts[0].run  # type: ignore[method-assign]

    def split(self, count: int, x_bytes: int, y_bytes: int) -> None:
        """From now on for `count` parts of the batch, one after the other; of native steps only."""
        (native,) = self.parts
        program = native.program  # type: ignore[union-attr]
        self.run = lambda threads, arena, *slots: program.run_parts(  # type: ignore[method-assign]
            threads, count, x_bytes, y_bytes, *slots
        )

    def run(self, threads: int, arena: Arena, *slots: Tensor | None) -> None:
        for part in self.parts:
            part.run(threads, arena, *slots)
