"""csrc/cpu/simd.hpp: bfloat16 rounding on all bit patterns of the upper half, tails, sums, by instruction set."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

_C = pytest.importorskip("fastgan._C", reason="the native core is not built")

CSRC = Path(__file__).parent.parent / "csrc"
TABLES = [name for name, refusal in _C.tables().items() if not refusal]
INSTRUCTIONS = {
    "portable": (),
    "avx2": ("-mavx2", "-mfma"),
    "avx512": ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma"),
}
INSTRUCTIONS["avx512_bf16"] = INSTRUCTIONS["amx"] = (*INSTRUCTIONS["avx512"], "-mavx512bf16")

# whole: 1 stores and loads whole vectors, 0 tails of every length in turn.
SOURCE = r"""
#include "cpu/simd.hpp"
using namespace fg::ISA;
template <class From, class To>
static void convert(const From* from, To* to, int64_t count, int whole) {
  if (whole) return each(0, count, [&](int64_t i, int n) { store_some(to + i, load_some(from + i, n), n); });
  int n = 1;
  for (int64_t i = 0; i < count; i += n, n = n % VF + 1) {
    if (n > count - i) n = int(count - i);
    store_tail(to + i, load_tail(from + i, n), n);
  }
}
extern "C" {
int lanes() { return VF; }
void round_to_bf16(const float* from, bf16* to, int64_t count, int whole) { convert(from, to, count, whole); }
void widen_bf16(const bf16* from, float* to, int64_t count, int whole) { convert(from, to, count, whole); }
void scalar_round(const float* from, bf16* to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] = to_bf16(from[i]);
}
float sum_lanes(const float* from, int n) { return sum(load_tail(from, n)); }
void transpose_lanes(const float* from, float* to) {
  vf v[VF];
  for (int i = 0; i < VF; ++i) v[i] = load(from + i * VF);
  transpose(v);
  for (int i = 0; i < VF; ++i) store(to + i * VF, v[i]);
}
}
"""


@pytest.fixture(scope="module", params=TABLES)
def simd(request, tmp_path_factory):
    """simd.hpp compiled for one table, as its kernels are."""
    if not shutil.which("g++"):
        pytest.skip("no g++ to compile simd.hpp with")
    folder = tmp_path_factory.mktemp("simd")
    (folder / "simd.cpp").write_text(SOURCE)
    flags = ("-std=c++20", "-O3", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math", "-fPIC", "-shared")
    subprocess.run(
        ["g++", *flags, *INSTRUCTIONS[request.param], f"-DISA={request.param}", "-Wall", "-Wextra", "-Werror"]
        + ["-Wno-uninitialized", "-Wno-maybe-uninitialized", f"-I{CSRC}", "simd.cpp", "-o", "simd.so"],
        check=True,
        cwd=folder,
    )
    library = ctypes.CDLL(str(folder / "simd.so"))
    library.sum_lanes.restype = ctypes.c_float
    return library


def convert(function, source: torch.Tensor, dtype: torch.dtype, *flags: int) -> torch.Tensor:
    """function(source) one element off alignment; what lies on either side must stay as it was."""
    shifted = torch.empty(len(source) + 1, dtype=source.dtype)
    shifted[1:] = source
    made = torch.full((len(source) + 2,), 7.0, dtype=dtype)
    pointer = ctypes.c_void_p
    count = ctypes.c_int64(len(source))
    function(pointer(shifted[1:].data_ptr()), pointer(made[1:].data_ptr()), count, *flags)
    assert made[0] == 7 and made[-1] == 7
    return made[1:-1]


def patterns(low: int) -> torch.Tensor:
    """float32 of all 2^16 upper halves with one lower half."""
    return ((torch.arange(2**16) << 16) | low).to(torch.int32).view(torch.float32)


def bits(t: torch.Tensor) -> torch.Tensor:
    return t.view(torch.int16 if t.dtype == torch.bfloat16 else torch.int32)


def nearest(values: torch.Tensor) -> torch.Tensor:
    """bfloat16 bits: round to nearest even, on integers; a NaN keeps its sign and upper bits and becomes quiet."""
    u = bits(values).long() & 0xFFFFFFFF
    rounded = (u + 0x7FFF + (u >> 16 & 1)) >> 16
    return torch.where(values.isnan(), u >> 16 | 0x40, rounded).to(torch.int16)


# Below, at and above the middle between two neighbours, and both ends. Upper half 0 and 0x8000 are the denormals that
# round to 0 or to the smallest bfloat16, 1 to 0x7f the bfloat16 denormals, 0x7f7f with 0x8000 rounds to infinity.
@pytest.mark.parametrize("low", [0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
def test_rounding_on_all_upper_halves(simd, low):
    values = patterns(low)
    want = nearest(values)
    for whole in (1, 0):
        assert torch.equal(bits(convert(simd.round_to_bf16, values, torch.bfloat16, whole)), want)
    assert torch.equal(bits(convert(simd.scalar_round, values, torch.bfloat16)), want)
    numbers = ~values.isnan()
    assert torch.equal(want[numbers], bits(values.to(torch.bfloat16))[numbers])  # and PyTorch's


def test_denormals_round_as_numbers(simd):
    """All float32 denormals with a step of 61: none may be flushed to zero."""
    magnitudes = torch.arange(1, 2**23, 61, dtype=torch.int32)
    for values in (magnitudes.view(torch.float32), -magnitudes.view(torch.float32)):
        made = convert(simd.round_to_bf16, values, torch.bfloat16, 1)
        assert torch.equal(bits(made), nearest(values))
        assert bool((made[magnitudes > 0x8000] != 0).all())


def test_widening_is_exact(simd):
    values = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    for whole in (1, 0):
        made = convert(simd.widen_bf16, values, torch.float32, whole)
        assert torch.equal(bits(made), bits(values).to(torch.int32) << 16)
        assert torch.equal(
            bits(convert(simd.round_to_bf16, made, torch.bfloat16, whole))[~made.isnan()], bits(values)[~made.isnan()]
        )


def test_lanes(simd):
    """Sums of n lanes, and a transposition."""
    width = simd.lanes()
    values = torch.arange(1.0, width * width + 1)
    for n in range(1, width + 1):
        assert simd.sum_lanes(ctypes.c_void_p(values.data_ptr()), n) == n * (n + 1) / 2
    turned = torch.empty(width, width)
    simd.transpose_lanes(ctypes.c_void_p(values.data_ptr()), ctypes.c_void_p(turned.data_ptr()))
    assert torch.equal(turned, values.reshape(width, width).T)


def test_flags_are_those_of_the_build():
    """What is tested here is what the kernels are compiled with."""
    setup = CSRC.parent / "setup.py"
    if not setup.exists():
        pytest.skip("setup.py is not beside the tests")
    text = setup.read_text()
    for table in TABLES:
        for flag in INSTRUCTIONS[table]:
            assert flag in text, f"{table}: {flag} must be in setup.py's TABLES"
