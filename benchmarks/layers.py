"""The shapes that the op benchmarks share (DCGAN-64 at batch 64), and the six rows of an op.

Every op is timed on tensors that are in the dtype already (bf16 weights too), so that the kernels are compared and not
autocast's casts; bench_step.py is the place of autocast. Every leaf wants its gradient, so "forward" is a training
forward, which records its graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import fastgan
from fastgan.benchmarking.comparison import Case, Runner, Work
from fastgan.benchmarking.textbook import compiled

BATCH = 64
DTYPES = ("float32", "bfloat16")
DIRECTIONS = ("forward", "forward+backward")
ROWS = (
    "eager",
    "eager-channels_last",
    "compile-channels_last",
    "fastgan",
    "fastgan-channels_last",
    "fastgan-native-channels_last",
)


@dataclass(frozen=True)
class Layer:
    """A 4x4 convolution of the DCGAN-64 networks: x [BATCH, channels, size, size] -> [BATCH, filters, out, out].

    first: x is data, which wants no gradient.
    """

    name: str
    channels: int
    filters: int
    size: int
    out: int
    stride: int
    padding: int
    activation: str = "identity"
    first: bool = False


D_LAYERS = (
    Layer("d1", 3, 64, 64, 32, 2, 1, "leaky_relu"),
    Layer("d2", 64, 128, 32, 16, 2, 1),
    Layer("d3", 128, 256, 16, 8, 2, 1),
    Layer("d4", 256, 512, 8, 4, 2, 1),
    Layer("d5", 512, 1, 4, 1, 1, 0),
)
G_LAYERS = (
    Layer("g1", 100, 512, 1, 4, 1, 0, first=True),
    Layer("g2", 512, 256, 4, 8, 2, 1),
    Layer("g3", 256, 128, 8, 16, 2, 1),
    Layer("g4", 128, 64, 16, 32, 2, 1),
    Layer("g5", 64, 3, 32, 64, 2, 1, "tanh"),
)
KERNEL = (4, 4)


def cases(op: str, shapes: Iterable[str], forward_too: tuple[str, ...]) -> list[Case]:
    """Every shape forward and backward in both dtypes; shapes that start with one of `forward_too` also forward."""
    return [
        Case(op, shape, direction, dtype)
        for shape in shapes
        for direction in DIRECTIONS
        if direction != "forward" or shape.startswith(forward_too)
        for dtype in DTYPES
    ]


def noise(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    """Normal noise; weights take the scale 0.02 of the DCGAN initialisation."""
    return (torch.randn(shape) * scale).to(dtype)


def rows(
    plain: Callable[..., Tensor],
    ours: Callable[..., Tensor],
    inputs: list[Tensor],
    case: Case,
    work: Work,
    constant: int = 0,
) -> dict[str, Runner]:
    """ROWS for plain(*inputs) in PyTorch and ours(*inputs) in fastgan, in both layouts.

    The first `constant` inputs want no gradient. The cotangent is fixed noise in the output's layout.
    """
    torch._dynamo.reset()  # or the cases of one function would count as its recompilations, of which 8 are allowed

    def in_layout(layout: torch.memory_format) -> tuple[list[Tensor], list[Tensor]]:
        """(inputs, those that want gradients)."""
        made = [t.detach().clone(memory_format=layout if t.dim() == 4 else torch.preserve_format) for t in inputs]
        return made, [t.requires_grad_() for t in made[constant:]]

    with torch.no_grad():
        like = plain(*(t.clone() for t in inputs))
    cotangent = torch.randn(like.shape).to(like.dtype)
    nchw, nhwc = in_layout(torch.contiguous_format), in_layout(torch.channels_last)

    def run(function: Callable[..., Tensor], made: tuple[list[Tensor], list[Tensor]]) -> Callable[[], object]:
        arguments, leaves = made
        last = made is nhwc and cotangent.dim() == 4
        dy = cotangent.contiguous(memory_format=torch.channels_last) if last else cotangent
        return DIRECTION[case.direction](function, arguments, leaves, dy)

    return {
        "eager": Runner(run(plain, nchw), work, case.dtype),
        "eager-channels_last": Runner(run(plain, nhwc), work, case.dtype),
        "compile-channels_last": Runner(run(compiled(plain), nhwc), work, case.dtype),
        "fastgan": Runner(run(ours, nchw), work, case.dtype, ours=True),
        "fastgan-channels_last": Runner(run(ours, nhwc), work, case.dtype, ours=True),
        "fastgan-native-channels_last": Runner(forced(run(ours, nhwc)), work, case.dtype, ours=True),
    }


def forced(run: Callable[[], object]) -> Callable[[], object]:
    """Our native kernels whether or not they win their race (1 us for the switch is in the time)."""

    def native() -> object:
        with fastgan.backend("native"):
            return run()

    return native


# ---- directions -----------------------------------------------------------------------------------------------------


def _forward(f: Callable[..., Tensor], arguments: list[Tensor], leaves: list[Tensor], dy: Tensor) -> Any:
    return lambda: f(*arguments)


def _backward(f: Callable[..., Tensor], arguments: list[Tensor], leaves: list[Tensor], dy: Tensor) -> Any:
    return lambda: torch.autograd.grad(f(*arguments), leaves, dy)


def _to_second_order(f: Callable[..., Tensor], arguments: list[Tensor], leaves: list[Tensor], dy: Tensor) -> Any:
    """Forward, backward, and the gradient of a fixed combination of dx for every leaf: what a penalty needs."""
    v = _like(arguments[0])

    def run() -> object:
        (dx,) = torch.autograd.grad(f(*arguments), leaves[:1], dy, create_graph=True)
        return torch.autograd.grad(dx, leaves, v, allow_unused=True)

    return run


def _double_backward(f: Callable[..., Tensor], arguments: list[Tensor], leaves: list[Tensor], dy: Tensor) -> Any:
    """The last of the three passes alone: the graph of dx is made at the first call and kept."""
    v, dy = _like(arguments[0]), dy.detach().requires_grad_()
    made: list[Tensor] = []

    def run() -> object:
        if not made:
            made.extend(torch.autograd.grad(f(*arguments), leaves[:1], dy, create_graph=True))
        return torch.autograd.grad(made[0], [*leaves, dy], v, allow_unused=True, retain_graph=True)

    return run


def _like(x: Tensor) -> Tensor:
    """Noise of x's shape, dtype and layout."""
    return torch.empty_like(x.detach()).normal_()


SECOND, DOUBLE = "forward+double backward", "double backward"
DIRECTION = {
    "forward": _forward,
    "forward+backward": _backward,
    SECOND: _to_second_order,
    DOUBLE: _double_backward,
}
