"""The native convolution kernels against float64 PyTorch, on every instruction-set table this CPU can run.

The AMX kernels also run where there is no AMX: their source is compiled here with the tile instructions
replaced by loops (FG_AMX_EMULATED).

Bounds are componentwise: with A = the same sum over absolute values, a sum of J products in float32 errs by
about sqrt(J) roundings of A, and a bfloat16 result adds half a unit in its last place. Nothing is compared
relative to the largest element, so a single wrong pixel cannot hide.
"""

from __future__ import annotations

import ctypes
import functools
import math
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

_C = pytest.importorskip("fastgan._C", reason="the native core is not built")

TABLES = [name for name, refusal in _C.tables().items() if not refusal]
DTYPES = {torch.float32: 0, torch.bfloat16: 1}
ACTS = {"identity": 0, "relu": 1, "leaky_relu": 2, "tanh": 3, "sigmoid": 4}
EPS32 = torch.finfo(torch.float32).eps
EPS16 = torch.finfo(torch.bfloat16).eps
GUARD = 64  # elements on either side of an output that must stay as they were
SENTINEL = 12345.0


@dataclass(frozen=True)
class Shape:
    """x[n, c, h, w] -> y[n, k, oh, ow]."""

    n: int
    c: int
    h: int
    w: int
    k: int
    r: int
    s: int
    stride: tuple[int, int] = (1, 1)
    pad: tuple[int, int] = (0, 0)
    dil: tuple[int, int] = (1, 1)
    groups: int = 1

    @property
    def oh(self) -> int:
        return (self.h + 2 * self.pad[0] - self.dil[0] * (self.r - 1) - 1) // self.stride[0] + 1

    @property
    def ow(self) -> int:
        return (self.w + 2 * self.pad[1] - self.dil[1] * (self.s - 1) - 1) // self.stride[1] + 1

    @property
    def numbers(self) -> tuple[int, ...]:
        sizes = (self.n, self.c, self.h, self.w, self.k, self.oh, self.ow, self.r, self.s)
        return (*sizes, *self.stride, *self.pad, *self.dil, self.groups)

    def __str__(self) -> str:
        return (
            f"n{self.n}c{self.c}x{self.h}x{self.w}k{self.k}r{self.r}x{self.s}s{self.stride[0]}{self.stride[1]}"
            f"p{self.pad[0]}{self.pad[1]}d{self.dil[0]}{self.dil[1]}g{self.groups}"
        )


SHAPES = [
    # The layers of DCGAN-64 and DCGAN-28, with few images and channels.
    Shape(2, 3, 16, 16, 64, 4, 4, (2, 2), (1, 1)),
    Shape(13, 64, 8, 8, 72, 4, 4, (2, 2), (1, 1)),
    Shape(14, 40, 4, 4, 1, 4, 4),
    Shape(65, 33, 4, 4, 20, 4, 4),
    Shape(3, 1, 28, 28, 64, 5, 5, (2, 2), (2, 2)),
    Shape(13, 32, 7, 7, 64, 5, 5, (1, 1), (2, 2)),
    Shape(2, 16, 14, 14, 17, 5, 5, (2, 2), (2, 2)),
    # Minimal filtering in fp32 (conv_winograd.hpp): 2, 3 and both numbers of taps a strand, odd sizes, unequal axes.
    Shape(9, 32, 17, 15, 48, 4, 4, (2, 2), (1, 1)),
    Shape(5, 48, 11, 12, 32, 3, 3, (1, 1), (1, 1)),
    Shape(4, 32, 23, 24, 32, 5, 5, (2, 2), (2, 2)),
    Shape(5, 32, 16, 18, 112, 3, 4, (1, 2), (1, 1)),
    Shape(33, 80, 5, 5, 32, 2, 2),
    # The same with channels that fill no blocks of 16: of x and dy, of one of them.
    Shape(5, 29, 11, 13, 30, 3, 3, (1, 1), (1, 1)),
    Shape(9, 47, 17, 15, 48, 4, 4, (2, 2), (1, 1)),
    Shape(4, 32, 15, 14, 41, 3, 3, (1, 1), (1, 1)),
    Shape(9, 51, 17, 16, 73, 4, 4, (2, 2), (1, 1)),
    # 1x1 and 3x3, unit and odd channel counts.
    Shape(5, 17, 5, 7, 33, 1, 1),
    Shape(1, 64, 9, 6, 64, 3, 3, (1, 1), (1, 1)),
    Shape(3, 1, 6, 5, 1, 3, 3, (1, 1), (1, 1)),
    Shape(3, 5, 6, 5, 3, 3, 3, (1, 1), (1, 1)),
    Shape(1, 100, 1, 1, 130, 1, 1),
    # Height and width, strides, paddings, kernels all different.
    Shape(3, 5, 11, 7, 17, 3, 2, (2, 3), (0, 1)),
    Shape(2, 18, 12, 9, 5, 5, 1, (3, 1), (3, 2)),
    Shape(2, 6, 9, 14, 4, 2, 6, (1, 2), (1, 4)),
    # Kernel smaller than the stride: phases of the adjoint without taps.
    Shape(2, 16, 9, 10, 8, 2, 1, (3, 2)),
    Shape(13, 3, 7, 8, 3, 1, 1, (3, 3), (1, 1)),
    # Dilation, also one that shares factors with the stride.
    Shape(2, 8, 11, 12, 16, 3, 3, (1, 1), (2, 2), (2, 2)),
    Shape(2, 17, 13, 12, 5, 3, 4, (2, 3), (2, 3), (2, 2)),
    Shape(13, 4, 12, 9, 6, 2, 3, (3, 2), (1, 4), (3, 4)),
    # Images out of many channels: taps between source pixels, more and fewer than the stride.
    Shape(3, 3, 13, 11, 32, 2, 3, (3, 4), (1, 2)),
    Shape(2, 8, 19, 10, 32, 5, 3, (2, 2), (4, 0), (2, 1)),
    Shape(2, 2, 9, 12, 96, 4, 5, (1, 2), (0, 3)),
    Shape(1, 4, 64, 33, 32, 3, 3, (2, 2), (1, 1)),
    # Groups: two, odd ones, depthwise with multiplier 1 and 2.
    Shape(2, 32, 6, 6, 64, 3, 3, (1, 1), (1, 1), (1, 1), 2),
    Shape(13, 15, 6, 5, 10, 3, 3, (2, 2), (1, 1), (1, 1), 5),
    Shape(3, 20, 7, 6, 20, 3, 3, (1, 1), (1, 1), (1, 1), 20),
    Shape(3, 18, 7, 6, 36, 3, 4, (2, 1), (1, 2), (1, 1), 18),
    Shape(2, 64, 5, 5, 6, 3, 3, (1, 1), (1, 1), (1, 1), 2),
    # A kernel larger than the image, rows and columns that see padding alone.
    Shape(2, 3, 2, 3, 4, 5, 6, (2, 1), (3, 4)),
    Shape(13, 2, 3, 3, 5, 1, 1, (2, 2), (3, 3)),
]
SHAPE_IDS = [str(s) for s in SHAPES]


@pytest.fixture(params=TABLES)
def table(request):
    _C.use_table(request.param)
    yield request.param
    _C.use_table(None)


def rounded(t: torch.Tensor) -> torch.Tensor:
    """Random values that float32 and bfloat16 both hold, so that only the arithmetic differs."""
    return t.to(torch.bfloat16).double()


@functools.cache
def reference(shape: Shape) -> dict[str, torch.Tensor]:
    """Inputs, the three results in float64, and (`*_abs`) the same sums over absolute values."""
    g = torch.Generator().manual_seed(sum(map(ord, str(shape))))
    x = rounded(torch.randn(shape.n, shape.c, shape.h, shape.w, generator=g))
    w = rounded(torch.randn(shape.k, shape.c // shape.groups, shape.r, shape.s, generator=g) / 4)
    y = rounded(torch.randn(shape.n, shape.k, shape.oh, shape.ow, generator=g))
    geometry = {"stride": shape.stride, "padding": shape.pad, "dilation": shape.dil, "groups": shape.groups}
    out = {"x": x, "w": w, "y": y}
    for suffix, f in (("", lambda t: t), ("_abs", torch.abs)):
        out["conv2d" + suffix] = F.conv2d(f(x), f(w), **geometry)
        out["conv_transpose2d" + suffix] = torch.nn.grad.conv2d_input(x.shape, f(w), f(y), **geometry)
        out["conv2d_weight" + suffix] = torch.nn.grad.conv2d_weight(f(x), w.shape, f(y), **geometry)
    return out


def activate(t: torch.Tensor, act: str, slope: float) -> torch.Tensor:
    return {
        "identity": lambda: t,
        "relu": t.relu,
        "leaky_relu": lambda: F.leaky_relu(t, slope),
        "tanh": t.tanh,
        "sigmoid": t.sigmoid,
    }[act]()


def bound(absolute: torch.Tensor, result: torch.Tensor, terms: int, dtype: torch.dtype) -> torch.Tensor:
    # 4 + 2 sqrt(J) roundings of the absolute sum; 2e-7: one of the activation's.
    limit = EPS32 * (4 + 2 * math.sqrt(terms)) * absolute + 2e-7 * (1 + result.abs())
    return limit + 0.501 * EPS16 * result.abs() if dtype == torch.bfloat16 else limit


class Guarded:
    """An output buffer of NaN between two red zones."""

    def __init__(self, elements: int, dtype: torch.dtype) -> None:
        self.memory = torch.full((elements + 2 * GUARD,), float("nan"), dtype=dtype)
        self.memory[:GUARD] = self.memory[GUARD + elements :] = SENTINEL
        self.inside = self.memory[GUARD : GUARD + elements]

    def check(self) -> torch.Tensor:
        want = torch.full((GUARD,), SENTINEL, dtype=self.memory.dtype)
        assert torch.equal(self.memory[:GUARD], want), "written before the output"
        assert torch.equal(self.memory[-GUARD:], want), "written past the output"
        assert not self.inside.isnan().any(), "elements left unwritten"
        return self.inside


def nhwc(t: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Channels-last memory with a NaN before and behind it: a read outside shows in the result."""
    dense = t.permute(0, 2, 3, 1).reshape(-1)
    memory = torch.full((dense.numel() + 64,), float("nan"), dtype=dtype)
    memory[32 : 32 + dense.numel()] = dense.to(dtype)
    return memory[32 : 32 + dense.numel()]


def strided(w: torch.Tensor, order: tuple[int, ...], dtype: torch.dtype, step: int = 1) -> torch.Tensor:
    """w with its dimensions laid out in memory in `order`, every `step`-th element used, NaN between."""
    sizes = [w.shape[d] for d in order]
    memory = torch.full((math.prod(sizes) * step + 8,), float("nan"), dtype=dtype)
    view = memory[4:].as_strided(sizes, [math.prod(sizes[i + 1 :]) * step for i in range(4)])
    view.copy_(w.permute(order))
    return view.permute(tuple(order.index(d) for d in range(4)))


def run(
    op: str,
    shape: Shape,
    dtype: torch.dtype,
    w_dtype: torch.dtype | None = None,
    order: tuple[int, ...] = (0, 1, 2, 3),
    step: int = 1,
    bias: torch.Tensor | None = None,
    act: str = "identity",
    slope: float = 0.2,
    threads: int = 2,
    library: object = _C,
) -> torch.Tensor:
    """One native call; the result as NCHW (or KCRS) in the call's dtype, after the guards were checked."""
    data = reference(shape)
    w = strided(data["w"], order, w_dtype or dtype, step)
    code, w_code = DTYPES[dtype], DTYPES[w_dtype or dtype]
    plan = library.Conv(*shape.numbers)
    x, y = nhwc(data["x"], dtype), nhwc(data["y"], dtype)
    if op == "conv2d_weight":
        dw = Guarded(w.numel() * step, w_dtype or dtype)
        dw.inside.fill_(SENTINEL)
        sizes = [w.shape[d] for d in order]
        view = dw.inside.as_strided(sizes, [math.prod(sizes[i + 1 :]) * step for i in range(4)])
        view.fill_(float("nan"))
        out = view.permute(tuple(order.index(d) for d in range(4)))
        library.conv2d_weight(plan, code, x.data_ptr(), y.data_ptr(), out.data_ptr(), w_code, out.stride(), threads)
        inside = dw.check()
        assert step == 1 or (inside.reshape(-1, step)[:, 1:] == inside.new_tensor(SENTINEL)).all()
        return out
    source, sizes = (
        (x, (shape.n, shape.oh, shape.ow, shape.k)) if op == "conv2d" else (y, (shape.n, shape.h, shape.w, shape.c))
    )
    out = Guarded(math.prod(sizes), dtype)
    getattr(library, op)(
        plan,
        code,
        source.data_ptr(),
        w.data_ptr(),
        w_code,
        w.stride(),
        0 if bias is None else bias.data_ptr(),
        out.inside.data_ptr(),
        ACTS[act],
        slope,
        threads,
    )
    return out.check().reshape(sizes).permute(0, 3, 1, 2)


def terms(op: str, shape: Shape) -> int:
    if op == "conv2d_weight":
        return shape.n * shape.oh * shape.ow
    return shape.r * shape.s * (shape.c if op == "conv2d" else shape.k) // shape.groups


def check(got: torch.Tensor, op: str, shape: Shape, dtype: torch.dtype) -> None:
    want = reference(shape)[op]
    error = (got.double() - want).abs()
    limit = bound(reference(shape)[op + "_abs"], want, terms(op, shape), dtype)
    worst = (error / limit).max().item() if error.numel() else 0.0
    assert worst <= 1.0, f"{op} {shape}: error is {worst:.3g} of the bound"


OPS = ("conv2d", "conv_transpose2d", "conv2d_weight")


@pytest.mark.parametrize("shape", SHAPES, ids=SHAPE_IDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=("fp32", "bf16"))
def test_every_op_matches_float64(table, shape, dtype):
    for op in OPS:
        check(run(op, shape, dtype), op, shape, dtype)


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 3, 1), (2, 3, 0, 1), (3, 1, 2, 0), (1, 0, 3, 2), (1, 2, 3, 0)])
@pytest.mark.parametrize("step", [1, 3])
def test_any_weight_strides_and_fp32_master_weights(table, order, step):
    for shape in (SHAPES[1], SHAPES[6], SHAPES[16], SHAPES[21], SHAPES[26]):
        for op in OPS:
            for w_dtype in DTYPES:
                got = run(op, shape, torch.bfloat16, w_dtype, order, step)
                check(got, op, shape, w_dtype if op == "conv2d_weight" else torch.bfloat16)
            check(run(op, shape, torch.float32, None, order, step), op, shape, torch.float32)


# Few pixels: weights are read in place where output channels lie next to each other.
FEW_PIXELS = [
    Shape(1, 64, 8, 8, 96, 4, 4, (2, 2), (1, 1)),
    Shape(3, 48, 4, 4, 100, 4, 4),
    Shape(2, 128, 5, 7, 64, 5, 3, (2, 1), (2, 1), (1, 1), 2),
    Shape(1, 80, 9, 6, 64, 3, 3, (1, 1), (2, 2), (2, 2)),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=("fp32", "bf16"))
@pytest.mark.parametrize("shape", FEW_PIXELS, ids=str)
def test_weights_of_few_pixels_are_read_in_place(table, shape, dtype):
    for op, order in (("conv2d", (2, 3, 1, 0)), ("conv_transpose2d", (0, 2, 3, 1))):
        check(run(op, shape, dtype, order=order), op, shape, dtype)
        check(run(op, shape, dtype, order=order, threads=1), op, shape, dtype)


def test_fp32_master_weights_are_rounded_to_bf16(table):
    """The result must be that of bf16 weights, bit for bit, although the master weights differ."""
    shape = SHAPES[1]
    w16 = reference(shape)["w"].to(torch.bfloat16)
    master = (w16.float() * (1 + EPS16 / 8)).contiguous()
    assert not torch.equal(master, w16.float())
    assert torch.equal(master.to(torch.bfloat16), w16)
    x = nhwc(reference(shape)["x"], torch.bfloat16)
    outs = []
    for w in (w16.contiguous(), master):
        y = torch.empty(shape.n, shape.oh, shape.ow, shape.k, dtype=torch.bfloat16)
        _C.conv2d(
            _C.Conv(*shape.numbers),
            1,
            x.data_ptr(),
            w.data_ptr(),
            DTYPES[w.dtype],
            w.stride(),
            0,
            y.data_ptr(),
            0,
            0.0,
            2,
        )
        outs.append(y)
    assert torch.equal(*outs)


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=("fp32", "bf16"))
def test_epilogue(table, act, dtype):
    for shape in (SHAPES[0], SHAPES[2], SHAPES[12], SHAPES[15], SHAPES[21], SHAPES[26]):
        for op, channels in (("conv2d", shape.k), ("conv_transpose2d", shape.c)):
            bias = torch.linspace(-2, 2, channels)
            got = run(op, shape, dtype, bias=bias, act=act).double()
            linear = reference(shape)[op] + bias.double().reshape(1, -1, 1, 1)
            absolute = reference(shape)[op + "_abs"] + bias.double().abs().reshape(1, -1, 1, 1)
            want = activate(linear, act, 0.2)
            limit = bound(absolute, want, terms(op, shape), dtype)
            assert ((got - want).abs() <= limit).all(), f"{op} {act} {shape}"


def test_activations_are_accurate_over_their_range(table):
    """A 1x1 convolution by one over a line of arguments, relative to the value itself."""
    x = torch.cat([-torch.logspace(-30, 2, 400), torch.zeros(1), torch.logspace(-30, 2, 399)])
    plan = _C.Conv(1, 1, 1, x.numel(), 1, 1, x.numel(), 1, 1, 1, 1, 0, 0, 1, 1, 1)
    one = torch.ones(1)
    for act in ("tanh", "sigmoid"):
        y = torch.full_like(x, float("nan"))
        _C.conv2d(plan, 0, x.data_ptr(), one.data_ptr(), 0, (1, 1, 1, 1), 0, y.data_ptr(), ACTS[act], 0.0, 1)
        want = activate(x.double(), act, 0.0)
        # 3e-45: two steps of the smallest numbers, which have no more digits than that.
        assert ((y.double() - want).abs() <= 4 * EPS32 * want.abs() + 3e-45).all(), act


@pytest.mark.parametrize("act", ACTS)
def test_an_activation_has_the_same_bits_in_every_kernel(table, act):
    x = torch.linspace(-110, 110, 10007)
    plan = _C.Conv(1, 1, 1, x.numel(), 1, 1, x.numel(), 1, 1, 1, 1, 0, 0, 1, 1, 1)
    one = torch.ones(1)
    fused, alone = torch.empty_like(x), torch.empty_like(x)
    _C.conv2d(plan, 0, x.data_ptr(), one.data_ptr(), 0, (1, 1, 1, 1), 0, fused.data_ptr(), ACTS[act], 0.2, 1)
    _C.bias_act_forward(0, x.data_ptr(), 0, alone.data_ptr(), 1, 1, x.numel(), False, ACTS[act], 0.2, 1.0, -1.0, 1)
    assert torch.equal(fused, alone)


@pytest.mark.parametrize("act", ACTS)
def test_nan_and_inf_propagate(table, act):
    values = torch.tensor([float("nan"), float("inf"), -float("inf"), 1.0])
    plan = _C.Conv(1, 1, 1, 4, 1, 1, 4, 1, 1, 1, 1, 0, 0, 1, 1, 1)
    for dtype, code in DTYPES.items():
        x, one = values.to(dtype), torch.ones(1, dtype=dtype)
        y = torch.zeros(4, dtype=dtype)
        _C.conv2d(plan, code, x.data_ptr(), one.data_ptr(), code, (1, 1, 1, 1), 0, y.data_ptr(), ACTS[act], 0.2, 1)
        want = activate(values.double(), act, 0.2)
        assert torch.allclose(y.double(), want, rtol=EPS16, atol=1e-30, equal_nan=True), act


@pytest.mark.parametrize("op", OPS)
def test_empty(table, op):
    empty = Shape(0, 3, 8, 8, 5, 3, 3, (1, 1), (1, 1))
    run(op, empty, torch.float32) if op != "conv2d_weight" else None
    if op == "conv2d_weight":
        got = run(op, empty, torch.bfloat16)
        assert (got == 0).all()


def test_adjoint_of_no_outputs_is_the_bias(table):
    """OH = OW = 0: every element of x is bias alone."""
    plan = _C.Conv(2, 3, 2, 2, 4, 0, 0, 3, 3, 1, 1, 0, 0, 1, 1, 1)
    w, bias = torch.randn(4, 3, 3, 3), torch.tensor([1.0, 2.0, 3.0])
    x = torch.full((2, 2, 2, 3), float("nan"))
    _C.conv_transpose2d(plan, 0, w.data_ptr(), w.data_ptr(), 0, w.stride(), bias.data_ptr(), x.data_ptr(), 0, 0.0, 2)
    assert torch.equal(x, bias.expand(2, 2, 2, 3))


def test_output_padding(table):
    """H and W of the adjoint are free between the smallest and stride - 1 above it."""
    for extra in ((0, 0), (1, 0), (0, 2), (1, 2)):
        h, w = 2 * 4 + 3 - 2 + extra[0] - 1, 3 * 3 + 4 - 2 + extra[1] - 2
        shape = Shape(2, 5, h, w, 7, 3, 4, (2, 3), (1, 1))
        for op in OPS:
            check(run(op, shape, torch.float32), op, shape, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=("fp32", "bf16"))
def test_the_same_bits_every_time(table, dtype):
    for shape in (SHAPES[0], SHAPES[1], SHAPES[2], SHAPES[5]):
        for op in OPS:
            first = run(op, shape, dtype, threads=8)
            for _ in range(3):
                assert torch.equal(run(op, shape, dtype, threads=8), first), f"{op} {shape}"


LAYERS = """
import hashlib, torch
from fastgan import backend, functional as f
torch.set_num_threads(8)
torch.manual_seed(0)
digest = hashlib.sha256()
with backend("native"):
    for dtype in (torch.float32, torch.bfloat16):
        for op, x, w, *geometry in (
            (f.conv2d, (6, 32, 16, 16), (64, 32, 4, 4), 2, 1),  # minimal filtering in float32
            (f.conv2d, (6, 32, 8, 8), (32, 32, 3, 3), 1, 1),
            (f.conv_transpose2d, (6, 64, 8, 8), (64, 32, 4, 4), 2, 1),
            (f.conv_transpose2d, (6, 64, 16, 16), (64, 3, 4, 4), 2, 1),
        ):
            leaves = [torch.randn(s).to(dtype).requires_grad_() for s in (x, w)]
            runs = []
            for _ in range(3):
                y = op(*leaves, None, *geometry)
                runs.append([y, *torch.autograd.grad(y.square().sum(), leaves)])
            for results in runs:
                assert all(torch.equal(a, b) for a, b in zip(results, runs[0]))
            for t in runs[0]:
                digest.update(t.detach().contiguous().view(torch.uint8).numpy().tobytes())
print(digest.hexdigest())
"""


def test_the_same_bits_in_every_process_at_eight_threads():
    def digest() -> str:
        done = subprocess.run(
            [sys.executable, "-c", LAYERS],
            capture_output=True,
            text=True,
            timeout=120,
            env={**os.environ, "OMP_NUM_THREADS": "8"},
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert digest() == digest() != ""


def test_scratch_memory_is_counted_and_kept():
    _C.scratch_highest(True)
    held = _C.scratch_highest(True)
    for _ in range(2):
        run("conv2d", SHAPES[0], torch.float32)
    first = _C.scratch_highest(True)
    run("conv2d", SHAPES[0], torch.float32)
    assert first >= held and _C.scratch_highest() <= first  # the third call took what the first left


@pytest.mark.parametrize("threads", [1, 3, 8])
def test_any_number_of_threads(table, threads):
    for shape in (SHAPES[1], SHAPES[4], SHAPES[21]):
        for op in OPS:
            check(run(op, shape, torch.bfloat16, threads=threads), op, shape, torch.bfloat16)


# The six tile instructions as loops; everything else as in the amx table. Without OpenMP: one thread.
EMULATED = r"""
#include <cstdlib>
#include "cpu/conv_compute.cpp"
#include "cpu/conv2d.cpp"
#include "cpu/conv_transpose2d.cpp"
#include "cpu/conv2d_weight.cpp"
namespace fg {
void* scratch_acquire(size_t bytes) { return std::aligned_alloc(64, (bytes + 127) / 64 * 64); }
void scratch_release(void* block) noexcept { std::free(block); }
bool translates_many_pages() noexcept { return true; }
Kept*& kept_of_step() noexcept {
  static Kept* none = nullptr;
  return none;
}
}
using namespace fg;
using Int = const int64_t*;
static ConvShape shape_of(Int v) {
  ConvShape s;
  static_assert(sizeof s == 16 * sizeof *v);
  std::memcpy(&s, v, sizeof s);
  return s;
}
extern "C" void emulated_conv2d(Int v, int dtype, void* x, void* w, int w_dtype, Int s, float* bias, void* y,
                                int act, float slope) {
  const DType d = DType(dtype), e = DType(w_dtype);
  amx::conv2d(shape_of(v), {d, x, w, e, {s[0], s[1], s[2], s[3]}, bias, y, Act(act), slope, 1});
}
extern "C" void emulated_conv_transpose2d(Int v, int dtype, void* y, void* w, int w_dtype, Int s, float* bias,
                                          void* x, int act, float slope) {
  const DType d = DType(dtype), e = DType(w_dtype);
  amx::conv_transpose2d(shape_of(v), {d, y, w, e, {s[0], s[1], s[2], s[3]}, bias, x, Act(act), slope, 1});
}
extern "C" void emulated_conv2d_weight(Int v, int dtype, void* x, void* dy, void* dw, int w_dtype, Int s) {
  const DType d = DType(dtype), e = DType(w_dtype);
  amx::conv2d_weight(shape_of(v), {d, x, dy, dw, e, {s[0], s[1], s[2], s[3]}, 1});
}
"""

# The table to which amx leaves what is no tile, without bf16 instructions, so that every CPU runs it, and without the
# tiles of a CPU that has them, with which it would leave work to itself without end.
BELOW = r"""
#include "cpu/conv_compute.cpp"
#include "cpu/conv_transpose2d.cpp"
#include "cpu/conv2d_weight.cpp"
"""


class Emulated:
    """The emulated library behind the signatures of fastgan._C."""

    def __init__(self, path: Path) -> None:
        self.library = ctypes.CDLL(str(path))
        pointer, integer = ctypes.c_void_p, ctypes.c_int
        numbers = ctypes.POINTER(ctypes.c_int64)
        convolve = [
            numbers,
            integer,
            pointer,
            pointer,
            integer,
            numbers,
            pointer,
            pointer,
            integer,
            ctypes.c_float,
        ]
        self.library.emulated_conv2d.argtypes = convolve
        self.library.emulated_conv_transpose2d.argtypes = convolve
        self.library.emulated_conv2d_weight.argtypes = [numbers, integer, *[pointer] * 3, integer, numbers]

    @staticmethod
    def Conv(*numbers: int) -> ctypes.Array[ctypes.c_int64]:
        return (ctypes.c_int64 * len(numbers))(*numbers)

    def conv2d(self, plan, dtype, x, w, w_dtype, strides, *rest) -> None:
        self.library.emulated_conv2d(plan, dtype, x, w, w_dtype, self.Conv(*strides), *rest[:-1])

    def conv_transpose2d(self, plan, dtype, y, w, w_dtype, strides, *rest) -> None:
        self.library.emulated_conv_transpose2d(plan, dtype, y, w, w_dtype, self.Conv(*strides), *rest[:-1])

    def conv2d_weight(self, plan, dtype, x, dy, dw, dw_dtype, strides, threads) -> None:
        self.library.emulated_conv2d_weight(plan, dtype, x, dy, dw, dw_dtype, self.Conv(*strides))


@pytest.fixture(scope="session")
def emulated(tmp_path_factory):
    csrc = Path(__file__).parent.parent / "csrc"
    if not shutil.which("g++"):
        pytest.skip("no g++ to compile the emulated AMX kernels with")
    if not csrc.is_dir():
        pytest.skip("the C++ sources are not beside the tests")
    if "avx512" not in TABLES:
        pytest.skip("every CPU with AMX has AVX-512, and the kernels count on its 16 lanes; this one has fewer")
    folder = tmp_path_factory.mktemp("amx")
    (folder / "emulated.cpp").write_text(EMULATED)
    (folder / "below.cpp").write_text(BELOW)
    compiler = ["g++", "-std=c++20", "-O1", "-march=native", "-ffp-contract=fast", "-fPIC", "-w", f"-I{csrc}"]
    tables = {
        "emulated": ["-DISA=amx", "-DFG_AMX_EMULATED"],
        "below": ["-DISA=avx512_bf16", "-U__AVX512BF16__", "-U__AMX_BF16__"],
    }
    for name, flags in tables.items():
        subprocess.run([*compiler, *flags, "-c", folder / f"{name}.cpp", "-o", folder / f"{name}.o"], check=True)
    objects = [folder / f"{name}.o" for name in tables]
    subprocess.run([*compiler, "-shared", *objects, "-o", folder / "emulated.so"], check=True)
    return Emulated(folder / "emulated.so")


AMX_SHAPES = [
    *SHAPES,
    # Whole runs of 32 channels, read in place: equally spaced rows, broken rows, several images.
    Shape(3, 64, 8, 8, 48, 4, 4, (2, 2), (1, 1)),
    Shape(70, 32, 4, 4, 80, 4, 4, (2, 2), (1, 1)),
    Shape(2, 96, 5, 9, 32, 3, 3, (1, 1), (1, 1)),
    Shape(40, 128, 1, 1, 64, 1, 1),
]


@pytest.mark.parametrize("shape", AMX_SHAPES, ids=map(str, AMX_SHAPES))
def test_emulated_amx(emulated, shape):
    for op in OPS:
        check(run(op, shape, torch.bfloat16, library=emulated), op, shape, torch.bfloat16)
        got = run(op, shape, torch.bfloat16, torch.float32, (0, 2, 3, 1), library=emulated)
        check(got, op, shape, torch.float32 if op == "conv2d_weight" else torch.bfloat16)
    channels = shape.c
    bias = torch.linspace(-1, 1, channels)
    got = run("conv_transpose2d", shape, torch.bfloat16, bias=bias, act="tanh", library=emulated)
    want = (reference(shape)["conv_transpose2d"] + bias.double().reshape(1, -1, 1, 1)).tanh()
    absolute = reference(shape)["conv_transpose2d_abs"] + bias.double().abs().reshape(1, -1, 1, 1)
    limit = bound(absolute, want, terms("conv_transpose2d", shape), torch.bfloat16)
    assert ((got.double() - want).abs() <= limit).all()
