"""The checker of Triton kernels catches what it says it catches, counts right, and leaves Triton as it was."""

# ruff: noqa: E402 (without Triton this file is skipped before it imports it)

import pytest
import torch

triton = pytest.importorskip("triton", "3.8", reason="triton 3.8 or newer is needed to emulate Triton kernels")
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import fastgan
from fastgan import testing

checker = testing._emulator("triton")


@triton.jit
def doubled(x):
    return x + x


@triton.jit
def copy_kernel(x, y, n, BLOCK: tl.constexpr, DTYPE: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = i < n
    tl.store(y + i, tl.load(x + i, mask=mask, other=0.0).to(DTYPE), mask=mask)


@triton.jit
def doubled_kernel(x, y, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = i < n
    tl.store(y + i, doubled(tl.load(x + i, mask=mask)), mask=mask)


@triton.jit
def matmul_kernel(a, b, c, M, N, K, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr):
    m = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK, BLOCK), tl.float32)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        left = tl.load(a + m[:, None] * K + k[None, :], mask=(m < M)[:, None] & (k < K)[None, :], other=0.0)
        right = tl.load(b + k[:, None] * N + n[None, :], mask=(k < K)[:, None] & (n < N)[None, :], other=0.0)
        total = tl.dot(left, right, total, input_precision=PRECISION)
    tl.store(c + m[:, None] * N + n[None, :], total, mask=(m < M)[:, None] & (n < N)[None, :])


@triton.jit
def moments_combine(n1, m1, s1, n2, m2, s2):
    n = n1 + n2
    d = m2 - m1
    share = tl.where(n == 0, 0.0, n2 / tl.maximum(n, 1.0))
    return n, m1 + d * share, s1 + s2 + d * d * n1 * share


@triton.jit
def moments_kernel(x, out, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    v = tl.load(x + i, mask=i < n, other=0.0)
    count, mean, square = tl.reduce(((i < n).to(tl.float32), v, v * 0), 0, moments_combine)
    tl.store(out, mean)
    tl.store(out + 1, square / count)


@triton.jit
def descriptor_kernel(x, y, M, N, BLOCK: tl.constexpr):
    source = tl.make_tensor_descriptor(x, shape=[M, N], strides=[N, 1], block_shape=[BLOCK, BLOCK])
    target = tl.make_tensor_descriptor(y, shape=[M, N], strides=[N, 1], block_shape=[BLOCK, BLOCK])
    at = [tl.program_id(0) * BLOCK, tl.program_id(1) * BLOCK]
    target.store(at, source.load(at) * 2)


@triton.jit
def column_kernel(x, y, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(y + i, tl.load(x + i * BLOCK))


@triton.jit
def atomic_kernel(x, total, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.atomic_add(total + i % 3, tl.load(x + i, mask=i < n, other=0.0), mask=i < n)


# ---- planted faults


@triton.jit
def unmasked_kernel(x, y, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(y + i, tl.load(x + i), mask=i < n)


@triton.jit
def off_by_one_kernel(x, y, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(y + i, tl.load(x + i, mask=i < n, other=0.0), mask=i <= n)


@triton.jit
def holes_kernel(x, y, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(y + i, tl.load(x + i, mask=i < n, other=0.0), mask=i < n)  # x is a strided view


@triton.jit
def undefined_kernel(x, y, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(y + i, tl.load(x + i, mask=i < n))


@triton.jit
def undefined_choice_kernel(x, y, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(y, tl.sum((tl.load(x + i, mask=i < n) < 0).to(tl.int32), 0).to(tl.float32))  # no NaN gets out


@triton.jit
def lost_update_kernel(y, BLOCK: tl.constexpr):
    tl.store(y, tl.load(y) + 1)


@triton.jit
def overlapping_kernel(x, y, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * (BLOCK - 1) + tl.arange(0, BLOCK)
    tl.store(y + i, tl.load(x + i, mask=i < n, other=0.0), mask=i < n)


@triton.jit
def reads_neighbour_kernel(x, y, BLOCK: tl.constexpr):
    p = tl.program_id(0)
    tl.store(x + p, tl.load(x + (p + 1) % BLOCK) + 1)


@triton.jit
def turned_round_kernel(x, y, BLOCK: tl.constexpr, BARRIER: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(y + i, tl.load(x + i))
    if BARRIER:
        tl.debug_barrier()
    tl.store(x + i, tl.load(y + BLOCK - 1 - i))


@triton.jit
def atomic_and_read_kernel(x, y, BLOCK: tl.constexpr):
    tl.atomic_add(y, 1.0)
    tl.store(x + tl.program_id(0), tl.load(y))


@triton.jit
def one_address_kernel(x, y, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(y + i % 4, tl.load(x + i))


@triton.jit
def raw_bfloat16_kernel(x, y, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    v = tl.load(x + i, mask=i < n, other=0.0)
    tl.store(y + i, v + v, mask=i < n)


@triton.jit
def raw_bfloat16_sum_kernel(x, y, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(y, tl.sum(tl.load(x + i, mask=i < n, other=0.0), 0))


def run_checked(launch):
    with testing.emulate("triton") as record:
        launch()
    return record.launches[-1]


N, BLOCK = 100, 128
FAULTS = {
    "out of bounds read": (lambda x, y: unmasked_kernel[(1,)](x, y, N, BLOCK), r"28 lanes are outside .* \+400 bytes"),
    "off by one": (lambda x, y: off_by_one_kernel[(1,)](x, y[:N], N, BLOCK), "1 lanes are outside every argument"),
    "hole of a view": (lambda x, y: holes_kernel[(1,)](x[::2], y, 50, BLOCK), "lanes are outside every argument"),
    "undefined lanes": (lambda x, y: undefined_kernel[(1,)](x, y, N, BLOCK), "'y' depends on lanes that a load"),
    "undefined choice": (lambda x, y: undefined_choice_kernel[(1,)](x, y, N, BLOCK), "'y' depends on lanes that"),
    "lost update": (lambda x, y: lost_update_kernel[(9,)](y, BLOCK), "race: it .* bytes of 'y' that another program"),
    "two writers": (lambda x, y: overlapping_kernel[(2,)](x, y, N, 32), "race: it writes bytes of 'y'"),
    "reads a neighbour's": (lambda x, y: reads_neighbour_kernel[(8,)](x, y, 8), "race: it .* bytes of 'x'"),
    "its own store": (lambda x, y: turned_round_kernel[(1,)](x, y, 64, False), "reads bytes of 'y' that it stored"),
    "atomic and plain": (lambda x, y: atomic_and_read_kernel[(8,)](x, y, 8), "race: it .* bytes of 'y'"),
    "one address": (lambda x, y: one_address_kernel[(1,)](x, y, 64), "different values to one address"),
    "raw bfloat16": (
        lambda x, y: raw_bfloat16_kernel[(1,)](x.bfloat16(), y.bfloat16(), N, BLOCK),
        r"bfloat16 arithmetic \(add\)",
    ),
    "raw bfloat16 sum": (
        lambda x, y: raw_bfloat16_sum_kernel[(1,)](x.bfloat16(), y.bfloat16(), N, BLOCK),
        "bfloat16 reduction",
    ),
    "small dot": (lambda x, y: matmul_kernel[(1, 1)](x, x, y, 8, 8, 4, 16, 4, "ieee"), "tl.dot over K = 4"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_caught(fault):
    launch, words = FAULTS[fault]
    x, y = torch.randn(N), torch.zeros(BLOCK)
    with pytest.raises(checker.CheckError, match=f"_kernel: program .*{words}"):
        run_checked(lambda: launch(x, y))
    assert torch.equal(y, torch.zeros(BLOCK))  # a launch that failed leaves its arguments alone


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_casts_round_to_nearest_even(dtype):
    x = torch.cat([torch.randn(990) * 100, torch.tensor([1 + 2.0**-8, 1 + 3 * 2.0**-8, 0.0, -0.0, 1e-40, 7e37])])
    y = torch.empty(x.shape, dtype=dtype)
    kinds = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
    launch = run_checked(lambda: copy_kernel[(8,)](x, y, len(x), 128, kinds[dtype]))
    assert torch.equal(y, x.to(dtype))
    size = y.element_size()
    assert (launch.loaded, launch.stored, launch.unique_loaded) == (4 * len(x), size * len(x), 4 * len(x))
    assert launch.grid == (8, 1, 1) and launch.sectors == launch.ideal_sectors


@pytest.mark.parametrize(
    ("dtype", "precision", "error"),
    [
        (torch.float32, "ieee", 1e-5),
        (torch.float32, "tf32", 2e-2),
        (torch.float16, "ieee", 1e-5),
        (torch.bfloat16, "ieee", 1e-5),
    ],
)
def test_dots(dtype, precision, error):
    a, b, c = torch.randn(20, 35).to(dtype), torch.randn(35, 18).to(dtype), torch.empty(20, 18)
    launch = run_checked(lambda: matmul_kernel[(2, 2)](a, b, c, 20, 18, 35, 16, 16, precision))
    difference = (c.double() - a.double() @ b.double()).abs().max().item()
    assert difference < error and (precision == "ieee" or difference > 1e-5)  # TF32's ten bits must be felt
    assert launch.dot_flops == 2 * 32 * 32 * 48 and launch.unique_loaded == (a.numel() + b.numel()) * a.element_size()
    assert launch.kernel == "matmul_kernel" and launch.arguments["K"] == 35


def test_device_functions_reductions_descriptors_and_atomics():
    x, y = torch.randn(N), torch.empty(N)
    assert run_checked(lambda: doubled_kernel[(1,)](x, y, N, BLOCK)).kernel == "doubled_kernel"
    assert torch.equal(y, 2 * x)
    out = torch.empty(2)
    run_checked(lambda: moments_kernel[(1,)](x, out, N, BLOCK))
    torch.testing.assert_close(out, torch.stack([x.mean(), x.var(correction=0)]))
    square, copy = torch.randn(20, 20), torch.zeros(20, 20)
    run_checked(lambda: descriptor_kernel[(2, 2)](square, copy, 20, 20, 16))
    assert torch.equal(copy, 2 * square)
    total = torch.zeros(3)
    launch = run_checked(lambda: atomic_kernel[(4,)](x.abs(), total, N, 32))
    torch.testing.assert_close(total.sum(), x.abs().sum())
    assert launch.atomic == 4 * N and launch.unique_stored == 12


def test_a_barrier_lets_a_program_read_what_it_stored():
    x, y = torch.arange(64.0), torch.empty(64)
    run_checked(lambda: turned_round_kernel[(1,)](x, y, 64, True))
    assert torch.equal(x, torch.arange(63.0, -1, -1))


def test_strided_access_costs_sectors():
    x, y = torch.randn(64, 64), torch.empty(64)
    across = run_checked(lambda: copy_kernel[(1,)](x, y, 64, 64, tl.float32))
    assert across.sectors == across.ideal_sectors == 16
    down = run_checked(lambda: column_kernel[(1,)](x, y, 64))
    assert (down.loaded, down.sectors, down.ideal_sectors) == (256, 64 + 8, 8 + 8)


def test_programs_run_in_another_order_for_another_seed():
    seen = []
    for seed in range(2):
        y = torch.zeros(N)
        with pytest.raises(checker.CheckError) as raised, checker.emulation(seed):
            lost_update_kernel[(50,)](y, 1)
        seen.append(str(raised.value))
    assert seen[0] != seen[1]


def compiled():
    signature = {"x": "*fp32", "y": "*fp32", "n": "i32", "BLOCK": "constexpr"}
    source = ASTSource(doubled_kernel, signature, {(3,): 128})
    return triton.compile(source, target=GPUTarget("cuda", 80, 32), options={"enable_fp_fusion": True}).asm["ptx"]


def test_triton_is_left_as_it_was(tmp_path, monkeypatch):
    from triton.runtime.interpreter import InterpreterBuilder
    from triton.runtime.jit import JITFunction

    watched = [InterpreterBuilder, JITFunction, tl, tl.core, tl.tensor, tl.math]
    before = [dict(vars(owner)) for owner in watched], set(globals())
    ptx = []
    for i in range(2):
        monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / str(i)))  # nothing is taken from a cache
        x, y = torch.randn(N), torch.empty(N)
        run_checked(lambda x=x, y=y: doubled_kernel[(1,)](x, y, N, BLOCK))
        with pytest.raises(checker.CheckError):
            run_checked(lambda y=y: lost_update_kernel[(9,)](y, 1))
        ptx.append(compiled())
    assert ptx[0] == ptx[1] and ".target sm_80" in ptx[0]
    assert [dict(vars(owner)) for owner in watched] == before[0] and set(globals()) == before[1]


def test_emulation_refuses_to_nest_and_restores_the_backend():
    with testing.emulate("triton"):
        with pytest.raises(RuntimeError, match="must not be nested"), checker.emulation():
            pass
        assert fastgan.backends()["bias_act"]["reference"][0]
    assert "fastgan: " not in str(fastgan.backends())
