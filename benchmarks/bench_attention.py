"""attention: heads of 64 as transformer discriminators have them, against PyTorch's plain form and its fused kernel.

The fused kernel has no second derivative: its rows fail there. Memory is attention_memory.py's.
"""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from layers import DTYPES, forced, noise

import fastgan
from fastgan import functional
from fastgan.benchmarking.comparison import Case, Runner
from fastgan.ops import attention

ROWS = ("eager", "eager-fused", "fastgan", "fastgan-native")
SHAPES = {"8x4x256x64": (8, 4, 256, 64), "2x4x1024x64": (2, 4, 1024, 64), "1x4x4096x64": (1, 4, 4096, 64)}
SECOND = "forward+double backward"
CASES = [
    Case("attention", shape, direction, dtype)
    for shape in SHAPES
    for direction in ("forward", "forward+backward", SECOND)
    for dtype in DTYPES
    if not (shape.startswith("1x") and direction == "forward")
]

MODULES = {"32x64x256": (32, 64), "8x256x256": (8, 256), "2x1024x256": (2, 1024)}  # batch, tokens; 4 heads of 64
MODULE_CASES = [
    Case("multi_head_attention" + weights, shape, direction, "float32")
    for weights in ("", "_with_weights")
    for shape in MODULES
    for direction in ("forward", "forward+backward", SECOND)
]


def plain(q, k, v):
    return torch.softmax(q @ k.mT / math.sqrt(q.shape[-1]), -1) @ v


def runners(case):
    inputs = [noise(*SHAPES[case.shape], dtype=case.torch_dtype).requires_grad_() for _ in range(3)]
    dy, *w = (torch.randn_like(inputs[0]) for _ in range(4))
    dy.requires_grad_(case.direction == SECOND)

    def run(function):
        if case.direction == "forward":
            return lambda: function(*inputs)
        if case.direction == "forward+backward":
            return lambda: torch.autograd.grad(function(*inputs), inputs, dy)

        def second():
            first = torch.autograd.grad(function(*inputs), inputs, dy, create_graph=True)
            return torch.autograd.grad(first, [*inputs, dy], w)

        return second

    costs = [attention.cost(*inputs), attention.cost_backward(*inputs), attention.cost_double_backward(*inputs)]
    work = costs[: 1 + ("forward", "forward+backward", SECOND).index(case.direction)]
    ours = functional.scaled_dot_product_attention
    return {
        "eager": Runner(run(plain), work, case.dtype),
        "eager-fused": Runner(run(F.scaled_dot_product_attention), work, case.dtype),
        "fastgan": Runner(run(ours), work, case.dtype, ours=True),
        "fastgan-native": Runner(forced(run(ours)), work, case.dtype, ours=True),
    }


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_attention(case, row, compare):
    compare(case, row, runners)


def module_runners(case):
    """nn.MultiheadAttention as it is and converted. Without weights its fused kernel runs, which fails at SECOND."""
    n, rows = MODULES[case.shape]
    x, dy = (noise(n, rows, 256).requires_grad_() for _ in range(2))
    plain_module = torch.nn.MultiheadAttention(256, 4, batch_first=True)
    need_weights = case.op.endswith("weights")

    def run(module):
        inputs = [x, *module.parameters()]
        forward = lambda: module(x, x, x, need_weights=need_weights)[0]
        if case.direction == "forward":
            return forward
        if case.direction == "forward+backward":
            return lambda: torch.autograd.grad(forward(), inputs, dy.detach())

        def second():
            (first,) = torch.autograd.grad(forward(), x, dy, create_graph=True)
            return torch.autograd.grad(first.square().sum(), inputs, allow_unused=True)

        return second

    converted = fastgan.convert(copy.deepcopy(plain_module), trace="off")
    return {
        "eager": Runner(run(plain_module), [], case.dtype),
        "fastgan": Runner(run(converted), [], case.dtype, ours=True),
    }


@pytest.mark.parametrize("row", ("eager", "fastgan"))
@pytest.mark.parametrize("case", MODULE_CASES, ids=str)
def test_multi_head_attention(case, row, compare):
    compare(case, row, module_runners)
