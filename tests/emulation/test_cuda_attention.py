"""Attention's CUDA C++ kernels on a machine without a GPU: results to second order, traffic and products, faults.

Results against float64 as for every backend (tests/checks.py). The products of 16-bit operands are counted in mma.sync
instructions, and what is read in bytes: both must be what the walk over tiles of 64 x 64 says.
"""

import ctypes
import math
import re
import shutil
import subprocess

import pytest
import torch
from checks import LAYOUTS, against_plain, distance

from fastgan import functional, testing
from fastgan._op import OPS
from fastgan.choice import watching
from fastgan.ops import attention

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NAMES = ("attention", "attention_backward", "attention_double_backward")
INFINITE = float("inf")
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).partition(".")[2])
HOPPER = {"shared": 228 << 10}


def noise(*shape):
    return torch.randn(shape, dtype=torch.float64)


def plain(q, k, v, bias=None, causal=False):
    s = q @ k.mT * q.shape[-1] ** -0.5
    s = s if bias is None else s + bias
    s = s.masked_fill(torch.ones(s.shape[-2:], dtype=torch.bool).triu(1), -INFINITE) if causal else s
    empty = (s == -INFINITE).all(-1, keepdim=True)
    return torch.softmax(s.masked_fill(empty, 0.0), -1).masked_fill(empty, 0.0) @ v


def emulated(ours, composite, inputs, dtype):
    ran = set()
    with watching(lambda op, name, why: ran.add((op.name, name))):
        against_plain(ours, composite, inputs, dtype, LAYOUTS[0], "cuda")
    assert {(name, "cuda") for name in NAMES} <= ran, ran


# ---- results ---------------------------------------------------------------------------------------------------------

CASES = [  # heads, rows, keys, d, e, causal: odd, whole chunks over two tiles, more keys than rows, heads of two parts
    (2, 5, 7, 7, 3, False),
    (1, 70, 65, 16, 24, True),
    (1, 3, 66, 8, 33, True),
    (1, 9, 10, 128, 72, False),
]


@dtypes
@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_the_composite_to_second_order(record, case, dtype):
    h, rows, keys, d, e, causal = case
    record.card(**HOPPER)
    record.configure(seed=rows)
    ours = lambda q, k, v: functional.scaled_dot_product_attention(q, k, v, is_causal=causal)
    inputs = noise(1, h, rows, d), noise(1, h, keys, d), noise(1, h, keys, e)
    emulated(ours, lambda q, k, v: plain(q, k, v, causal=causal), inputs, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_longest_heads_to_first_order(record, dtype):
    """Four parts of 64 of q and k, three of v."""
    record.card(**HOPPER)
    inputs = noise(1, 1, 9, 250), noise(1, 1, 10, 250), noise(1, 1, 10, 136)
    against_plain(functional.scaled_dot_product_attention, plain, inputs, dtype, LAYOUTS[0], "cuda", order=1)
    assert {launch.kernel.partition("<")[0] for launch in record.launches} == {
        f"attention_{kernel}_kernel" for kernel in ("forward", "rows", "keys")
    }


@pytest.mark.parametrize("shape", [(17, 20), (2, 1, 1, 20), (3, 17, 1)], ids=str)
def test_a_bias_and_rows_without_keys(record, shape):
    bias = noise(*shape)
    bias = bias.masked_fill(torch.rand(shape) > 0.7, -INFINITE)
    bias[..., 0, :] = -INFINITE
    inputs = noise(2, 3, 17, 8), noise(2, 3, 20, 8), noise(2, 3, 20, 6)
    ours = lambda q, k, v: functional.scaled_dot_product_attention(q, k, v, bias.to(q))
    emulated(ours, lambda q, k, v: plain(q, k, v, bias.to(q)), inputs, torch.float32)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("shape", [(17, 20), (2, 1, 17, 20)], ids=str)
def test_the_gradient_of_a_bias(record, shape, causal):
    inputs = noise(2, 3, 17, 8), noise(2, 3, 20, 8), noise(2, 3, 20, 6), noise(*shape)
    ours = lambda q, k, v, b: OPS["attention"](q, k, v, b, causal, 8**-0.5)[0]
    emulated(ours, lambda *t: plain(*t, causal=causal), inputs, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_heads_that_lie_apart(record, dtype):
    """Slices of one projection, [N, L, 3, heads, d], whose rows are whole chunks or, with heads of 5, are not."""
    for d in (8, 5):
        qkv = torch.randn(2, 9, 3, 2, d).to(dtype)
        q, k, v = (t.transpose(1, 2) for t in qkv.unbind(2))
        y, lse = OPS["attention"].run(q, k, v, None, False, 0.3)
        want, want_lse = OPS["attention"].reference(*(t.double() for t in (q, k, v)), None, False, 0.3)
        assert y.transpose(1, 2).is_contiguous() and distance(y, want) < 8 * torch.finfo(dtype).eps
        assert distance(lse, want_lse) < 8 * torch.finfo(dtype).eps


@pytest.mark.parametrize("bad", [float("nan"), INFINITE, -INFINITE])
def test_what_is_not_finite_stays_in_its_rows(record, bad):
    q, k, v = torch.randn(1, 1, 3, 8), torch.randn(1, 1, 70, 8), torch.randn(1, 1, 70, 8)
    q[0, 0, 1, 2] = bad
    got, want = OPS["attention"].run(q, k, v, None, False, 0.3)[0], plain(q, k, v)
    assert torch.equal(got.isnan().any(-1), want.isnan().any(-1)) and got[0, 0, 1].isnan().all()


def arguments(name, q, k, v, dy):
    """Of an op without a bias."""
    y, lse = OPS["attention"].reference(q, k, v, None, False, 0.25)
    backward = (dy, q, k, v, None, y, lse, False, 0.25, False)
    double = (dy, q + 1, k - 1, v + 1, None, q, k, v, None, lse, False, 0.25, False)
    return dict(zip(NAMES, ((q, k, v, None, False, 0.25), backward, double), strict=True))[name]


@pytest.mark.parametrize("name", NAMES)
def test_thread_orders_are_bit_equal(record, name):
    q, k, v, dy = (torch.randn(1, 1, rows, 16) for rows in (66, 70, 70, 66))
    given, results = arguments(name, q, k, v, dy), []
    for seed in range(3):
        record.configure(seed=seed)
        results.append(OPS[name].run(*given))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(("sanitizer", "race"), [("address", "within"), ("thread", "within"), ("thread", "between")])
def test_sanitizers_find_nothing(sanitizer, race, seed):
    shim = testing._emulator("cuda")
    sources = [p for p in shim.LAUNCHERS if p.stem == "attention"]
    try:
        said = shim.run_sanitized(shim.sanitized(sanitizer, sources, f"{sanitizer}-attention"), seed, race)
    except RuntimeError as error:
        pytest.skip(str(error))
    assert said == ""


# ---- traffic, products, resources ------------------------------------------------------------------------------------

ROWS, KEYS = 128, 64  # two tiles of rows by one of keys
# of each kernel: its tiles, and products of 64 x 64 x 64 a pair of tiles. By the rows' blocks: q (and dy, ddq), then k
# and v (and their cotangents) as often as they pass by
WALKS = {
    "attention": [("rows", 1, 2, 2)],
    "attention_backward": [("rows", 2, 3, 3), ("keys", 2, 4, 4)],
    "attention_double_backward": [("rows", 3, 12, 14), ("keys", 4, 6, 8)],
}


@pytest.mark.parametrize("name", NAMES)
def test_traffic_and_products_are_those_of_the_walk(record, name):
    """bfloat16, heads of 64: every tile of 8 KiB that a block asks for, in whole sectors; products by mma.sync."""
    q, k, v, dy = (torch.randn(1, 1, rows, 64).to(torch.bfloat16) for rows in (ROWS, KEYS, KEYS, ROWS))
    given = arguments(name, q, k, v, dy)
    record.configure(counting=True)
    OPS[name].run(*given)
    tile, pairs = 64 * 64 * 2, 2
    blocks = {"rows": 2, "keys": 1}
    read = sum(blocks[side] * own + pairs * passing for side, own, passing, _ in WALKS[name]) * tile
    outputs = {"attention": 2, "attention_backward": 4, "attention_double_backward": 6}[name] * tile
    dots = 2 * 2 * tile if name == "attention_backward" else 0  # dy and y for delta
    asked = sum(t.requested for t in record.traffic if t.bytes >= tile)
    assert asked == read + outputs + dots
    assert record.sector_efficiency(tile) == 1.0
    counted = [launch.products * 16 * 8 * 16 * 2 for launch in record.launches]
    assert counted == [products * pairs * 2 * 64**3 for *_, products in WALKS[name]]
    costs = (attention.cost, attention.cost_backward, attention.cost_double_backward)
    least = dict(zip(NAMES, costs, strict=True))[name](q, k, v)["flops"]
    assert (
        sum(counted) / least == {"attention": 1.0, "attention_backward": 1.4, "attention_double_backward": 11 / 6}[name]
    )
    wavefronts = sum(launch.shared_wavefronts for launch in record.launches)
    assert wavefronts <= 1.1 * sum(launch.shared_ideal for launch in record.launches)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_shared_memory_is_what_the_op_reckons_with(record, name, dtype):
    """So that a card without it declines. Heads of 64 take at most 96 KiB, what every card from sm_80 on has."""
    record.card(**HOPPER)
    for d, e in ((64, 64), (7, 100)):
        q, k, v, dy = (torch.randn(1, 1, 2, width).to(dtype) for width in (d, d, e, e))
        wanted = attention.shared_bytes(name, q, v)
        before = len(record.launches)
        OPS[name].run(*arguments(name, q, k, v, dy))
        assert max(launch.shared for launch in record.launches[before:]) == wanted
        assert wanted <= 96 << 10 or e == 100


def test_what_is_declined(record):
    declines = lambda name, *given: OPS[name].backends["cuda"].declines(*given)
    q = torch.randn(1, 1, 2, 257)
    assert "at most 256 elements" in declines("attention", q, q, q, None, False, 1.0)
    q = torch.randn(1, 1, 2, 129)
    assert not declines("attention", q, q, q, None, False, 1.0)
    double = arguments("attention_double_backward", q, q, q, q)
    assert "at most 128 elements" in declines("attention_double_backward", *double)
    assert "compute in" in declines("attention", q.double(), q.double(), q.double(), None, False, 1.0)


KERNELS = ("forward", "rows", "keys", "double_rows", "double_keys")
ARGUMENTS = ("Forward", "Backward", "Backward", "DoubleBackward", "DoubleBackward")


@pytest.mark.skipif(not shutil.which("nvcc"), reason="nvcc is not on PATH")
def test_nvcc_multiplies_on_tensor_cores_without_spills(tmp_path):
    """bfloat16, heads of up to 64, sm_80; all: make gpu-static."""
    shim = testing._emulator("cuda")
    lines = ['#include "cuda/attention.cuh"', "namespace fg::cuda {"]
    for kernel, given in zip(KERNELS, ARGUMENTS, strict=True):
        lines.append(f"template __global__ void attention_{kernel}_kernel<__nv_bfloat16, 1>(Attention{given});")
    (tmp_path / "some.cu").write_text("\n".join([*lines, "}"]))
    command = ["nvcc", "-std=c++20", "-O3", "-arch=sm_80", "-Werror", "all-warnings", f"-I{shim.CSRC}", "-cubin"]
    command += ["--keep", "--keep-dir", str(tmp_path), "-Xptxas", "-v", "-o", "some.cubin", "some.cu"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    spills = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", done.stderr)
    assert len(spills) == len(KERNELS) and set(spills) == {("0", "0", "0")}
    bodies = re.split(r"\.entry (\w+)", (tmp_path / "some.ptx").read_text())[1:]
    for name, body in zip(bodies[::2], bodies[1::2], strict=True):
        assert "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32" in body, name
        assert "ldmatrix.sync.aligned.m8n8.x4" in body and "cp.async.cg.shared.global" in body, name


# ---- faults ----------------------------------------------------------------------------------------------------------

TILES, KERNEL, TERMS = "attention_tiles.cuh", "attention.cuh", "../common/attention_derivatives.hpp"
FAULTS = [  # (name, file, as it is, with the fault)
    ("a key past the end", TILES, "key < keys &&", "key < keys + PLANTED &&"),
    ("a key of the future", TILES, "key <= row)", "key <= row + PLANTED)"),
    ("a sum keeps its old maximum", KERNEL, "total[i] *= shrink[i];", "if (!PLANTED) total[i] *= shrink[i];"),
    ("an output keeps its old maximum", KERNEL, ".value(i, j) *= shrink[i]", ".value(i, j) *= PLANTED ? 1 : shrink[i]"),
    ("delta is forgotten", KERNEL, "ds.value(i, j), delta[i])", "ds.value(i, j), PLANTED ? 0.0f : delta[i])"),
    ("the row sums of half a row", TILES, "share < S::ROW_SHARES;", "share < S::ROW_SHARES - PLANTED;"),
    (
        "scores replaced while they are read",
        TILES,
        "  __syncthreads();\n  put",
        "  if (!PLANTED) __syncthreads();\n  put",
    ),
    ("a buffer that is being filled", TILES, "return buffers + next %", "return buffers + (next + PLANTED) %"),
    ("a tile before it has come", TILES, "    cp_async_wait<0>();", "    if (!PLANTED) cp_async_wait<0>();"),
    (
        "the writer's swizzle",
        TILES,
        "column / Along<T>::PER_CHUNK) + column % Along<T>::PER_CHUNK, pair);",
        "column / Along<T>::PER_CHUNK ^ PLANTED) + column % Along<T>::PER_CHUNK, pair);",
    ),
    ("another head's rows", TILES, "+ of_sample * t.h, t.present", "+ (1 - PLANTED) * of_sample * t.h, t.present"),
    (
        "shift without alpha delta",
        KERNEL,
        "+ at, row[0][i] * row[1][i] -",
        "+ at, (1 - PLANTED) * row[0][i] * row[1][i] -",
    ),
    (
        "a cotangent in the place of its tensor",
        KERNEL,
        "{of_v, behind % 2 == 1,",
        "{of_v, (behind % 2 == 1) != PLANTED,",
    ),
    ("a row past the end", TILES, "live = first_row + r < head.rows;", "live = first_row + r < head.rows + PLANTED;"),
    ("the first tile of rows", KERNEL, "s.causal ? first / SIDE : 0;", "s.causal ? first / SIDE + PLANTED : 0;"),
    (
        "a row sum of the element",
        TERMS,
        "gamma += p * (a * dp + c);",
        "gamma += p * (a * dp + (PLANTED ? 0.0f : 1.0f) * c);",
    ),
]

DRIVER = r"""
#include <cstring>

#include "cuda/attention.cuh"
#include "cuda/launch.hpp"
int planted = 0;
static char message[1000];
using namespace fg::cuda;

// One sample of two dense heads. t: q k v dy ddq ddk ddv bias, y lse, dq dk dv delta, d_dy d_q d_k d_v sums.
template <class T>
static void run(const int* size, bool causal, void** t) {
  const AttentionSizes s{2, size[0], size[1], size[2], size[3], causal, 0.25f};
  const auto heads = [&](int i, int rows, int width) {
    return Heads{t[i], 0, i64{rows} * width, width, width % VECTOR<T> == 0, true};
  };
  const auto rows = [&](int i) { return heads(i, s.rows, s.d); };
  const auto rows_v = [&](int i) { return heads(i, s.rows, s.dv); };
  const auto keys = [&](int i) { return heads(i, s.keys, s.d); };
  const auto keys_v = [&](int i) { return heads(i, s.keys, s.dv); };
  const HeadSquares bias{static_cast<float*>(t[7]), 0, 0, s.keys};
  auto* lse = static_cast<float*>(t[9]);
  const int by_rows = 2 * tiles_of(s.rows), by_keys = 2 * tiles_of(s.keys), d = tiles_of(s.d), dv = tiles_of(s.dv);
  const auto bytes = [](int own) { return static_cast<size_t>(shared_tiles<T>(own)) * SQUARE * sizeof(T); };
#define RUN(kernel, blocks, own, arguments)                  \
  FG_ALLOW_SHARED(FG_KERNEL(kernel, T, 1), bytes(own)); \
  FG_LAUNCH(FG_KERNEL(kernel, T, 1), blocks, ATTENTION_THREADS, bytes(own), nullptr, arguments)
  const AttentionForward f{s, rows(0), keys(1), keys_v(2), rows_v(8), bias, lse};
  RUN(attention_forward_kernel, by_rows, d, f);
  const AttentionBackward b{s,       rows_v(3), rows(0),   keys(1), keys_v(2), rows_v(8), rows(10),
                            keys(11), keys_v(12), bias, {}, lse, static_cast<float*>(t[13])};
  RUN(attention_rows_kernel, by_rows, d + dv, b);
  RUN(attention_keys_kernel, by_keys, d + dv, b);
  const AttentionDoubleBackward w{s, rows_v(3), rows(4), keys(5), keys_v(6), rows(0), keys(1), keys_v(2), rows_v(14),
                                  rows(15), keys(16), keys_v(17), bias, {}, {}, lse, static_cast<float*>(t[18])};
  RUN(attention_double_rows_kernel, by_rows, 2 * d + dv, w);
  RUN(attention_double_keys_kernel, by_keys, 2 * (d + dv), w);
}

extern "C" const char* attend(int fault, unsigned seed, int half, int causal, const int* size, void** t,
                              const int64_t* tensors) {
  simt::regions.clear();
  for (; tensors[0]; tensors += 2) simt::regions.push_back({uintptr_t(tensors[0]), uintptr_t(tensors[1])});
  planted = fault;
  simt::settings.seed = seed;
  try {
    half ? run<__nv_bfloat16>(size, causal, t) : run<float>(size, causal, t);
    return "";
  } catch (const std::exception& error) {
    std::strncpy(message, error.what(), sizeof message - 1);
    return message;
  }
}
"""


@pytest.fixture(scope="module")
def attend(tmp_path_factory):
    """The C function of DRIVER over the faulty copies."""
    try:
        shim = testing._emulator("cuda")
        function = shim.planted(FAULTS, (), DRIVER, tmp_path_factory.mktemp("faults")).attend
    except RuntimeError as error:
        if "the CUDA emulator needs" not in str(error):
            raise
        pytest.skip(str(error))
    function.restype = ctypes.c_char_p
    return function


def outcome(attend, fault, dtype, causal, seed):
    """How the five kernels fail: the emulator's words, "wrong ...", or ""."""
    torch.manual_seed(0)
    rows, keys, d, e = size = (65, 70, 16, 24)
    draw = lambda *shape: torch.randn(1, 2, *shape).to(dtype)
    new = lambda *shape, of=dtype: torch.full((1, 2, *shape), math.nan, dtype=of)
    q, k, v, dy = draw(rows, d), draw(keys, d), draw(keys, e), draw(rows, e)
    given = [q, k, v, dy, draw(rows, d), draw(keys, d), draw(keys, e), torch.randn(rows, keys)]
    floats = lambda *shape: new(*shape, of=torch.float32)
    outputs = [*map(torch.full_like, (dy, q, k, v), (math.nan,) * 4)]
    made = [new(rows, e), floats(rows), *(new(n, w) for n, w in ((rows, d), (keys, d), (keys, e))), floats(rows)]
    tensors = [*given, *made, *outputs, floats(3, rows)]
    addresses = (ctypes.c_void_p * len(tensors))(*(t.data_ptr() for t in tensors))
    regions = [v for t in tensors for v in (t.data_ptr(), t.numel() * t.element_size())]
    said = attend(
        fault, seed, dtype == torch.bfloat16, causal, (ctypes.c_int * 4)(*size), addresses,
        (ctypes.c_int64 * (len(regions) + 2))(*regions, 0, 0),
    ).decode()  # fmt: skip  # the arguments by kind
    if said:
        return said
    wide = [t.double() for t in given]
    y, lse = OPS["attention"].reference(*wide[:3], wide[7], causal, 0.25)
    first = OPS["attention_backward"].reference(wide[3], *wide[:3], wide[7], y, lse, causal, 0.25, False)
    second = OPS["attention_double_backward"].reference(
        wide[3], *wide[4:7], None, *wide[:3], wide[7], lse, causal, 0.25, False
    )
    checked = [*zip(made[:2], (y, lse), strict=True), *zip(made[2:5], first[:3], strict=True)]
    for number, (got, want) in enumerate([*checked, *zip(outputs, second[:4], strict=True)]):
        if not distance(got, want) < 8 * torch.finfo(dtype).eps:
            return f"wrong result {number}"
    return ""


def outcomes(attend, fault):
    for dtype, causal, seed in ((torch.float32, False, 1), (torch.bfloat16, True, 2), (torch.float32, True, 3)):
        yield outcome(attend, fault, dtype, causal, seed)


def test_without_a_fault_all_is_well(attend):
    assert set(outcomes(attend, 0)) == {""}


@pytest.mark.parametrize("fault", range(1, len(FAULTS) + 1), ids=[name for name, *_ in FAULTS])
def test_a_planted_fault_is_caught(attend, fault):
    assert any(outcomes(attend, fault))
