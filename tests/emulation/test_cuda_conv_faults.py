"""Faults planted in copies of the CUDA convolutions: each must be caught by the emulator or by the comparison.

The sources are compiled once, with every fault behind a number that the test sets; 0 is the kernels as they are.
"""

import ctypes
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from checks import distance

from fastgan import testing

CSRC = Path(__file__).parents[2] / "csrc"

# (name, file, as it is, with the fault)
FAULTS = [
    (
        "wrong phase",
        "conv_transpose2d.cuh",
        "(phase + a.pad - a.dilation * *first) % a.stride",
        "(phase + a.pad + PLANTED - a.dilation * *first) % a.stride",
    ),
    ("source of a phase off by one", "conv_transpose2d.cuh", "axis.base = (", "axis.base = PLANTED + ("),
    (
        "no barrier between the stages",
        "conv_gemm.cuh",
        "      __syncthreads();",
        "      if (!PLANTED) __syncthreads();",
    ),
    (
        "a wait that lets the slab itself be in flight",
        "conv_gemm.cuh",
        "cp_async_wait<STAGES - 2>();",
        "if (PLANTED) cp_async_wait<STAGES - 1>(); else cp_async_wait<STAGES - 2>();",
    ),
    (
        "a copy into the stage in use",
        "conv_gemm.cuh",
        "tile_a(slab % STAGES), tile_b",
        "tile_a((slab + PLANTED * 2) % STAGES), tile_b",
    ),
    (
        "no mask at the image's edge",
        "conv_tile.cuh",
        "static_cast<u32>(w) < static_cast<u32>(image.w)",
        "(PLANTED || static_cast<u32>(w) < static_cast<u32>(image.w))",
    ),
    (
        "no mask behind the last weight row",
        "conv_tile.cuh",
        "row < plane.rows && first_column + j",
        "(PLANTED || row < plane.rows) && first_column + j",
    ),
    ("off by one in a carry", "conv_tile.cuh", "i2 >= s.size2", "i2 >= s.size2 + PLANTED"),
    (
        "off by one at the last row",
        "conv_gemm.cuh",
        "live = first_row + r < rows",
        "live = first_row + r < rows - PLANTED",
    ),
    (
        "one output too many",
        "conv_gemm.cuh",
        "if (column + i < columns) store",
        "if (column + i < columns + PLANTED) store",
    ),
    (
        "swizzle of the reader",
        "conv_compute.cuh",
        "Tile::at(tile, output + 8 * outputs + low, 2 * step + chunks)",
        "Tile::at(tile, output + 8 * outputs + low, (2 * step + chunks) ^ PLANTED)",
    ),
    (
        "fragments of b out of order",
        "conv_compute.cuh",
        "const int outputs = PAIRS ? second : first",
        "const int outputs = PAIRS != PLANTED ? second : first",
    ),
    (
        "parts of a split on one place",
        "conv_gemm.cuh",
        "place.split * output.size",
        "(1 - PLANTED) * place.split * output.size",
    ),
    (
        "a group's channels",
        "conv2d.cuh",
        "x.first_channel = place.group",
        "x.first_channel = (1 - PLANTED) * place.group",
    ),
    (
        "a barrier in a branch",
        "conv_gemm.cuh",
        "    cp_async_commit();  //",
        "    if (PLANTED && threadIdx.x % 2) __syncthreads();\n    cp_async_commit();  //",
    ),
    (
        "a lost part",
        "conv_moments.cuh",
        "(tile / tiles * phases + phase) * tiles + tile % tiles",
        "(tile / tiles * phases + phase) * tiles + (PLANTED ? 0 : tile % tiles)",
    ),
    (
        "rows past the end in the moments",
        "conv_moments.cuh",
        "live[i] = rows.first + compute.row(i) < rows.end",
        "live[i] = PLANTED || rows.first + compute.row(i) < rows.end",
    ),
    (
        "a block with the rows of two statistic groups",
        "conv_moments.cuh",
        "ROWS, (group + 1) * rows}",
        "ROWS, (group + 1 + PLANTED) * rows}",
    ),
    (
        "moments before rounding",
        "conv_moments.cuh",
        "to_float(from_float<typename G::T>(compute.value(i, j) + added))",
        "PLANTED ? compute.value(i, j) + added : to_float(from_float<typename G::T>(compute.value(i, j) + added))",
    ),
    (
        "a part without rows that has some",
        "conv_transpose2d.cuh",
        "place.phase), 0.0f)",
        "place.phase), PLANTED * 1.0f)",
    ),
    (
        "another warp's moments read before they are there",
        "conv_moments.cuh",
        "  __syncthreads();\n  const int column",
        "  if (!PLANTED) __syncthreads();\n  const int column",
    ),
    (
        "the next group's parts",
        "conv_moments.cuh",
        "parts.take(group * parts.of_group() + i, channel)",
        "parts.take((group ^ PLANTED) * parts.of_group() + i, channel)",
    ),
    (
        "the rows of a split sum not counted",
        "conv_gemm.cuh",
        "    held = i + 1;",
        "    held = i + 1 - PLANTED;",
    ),
]

DRIVER = r"""
#include <cstring>
#include "cuda/kernels.hpp"
#include "simt.hpp"
int planted = 0;
static char message[1000];
using Int = const int64_t*;
template <class F>
static const char* run(Int tensors, const F& f) {
  simt::regions.clear();
  for (; tensors[0]; tensors += 2) simt::regions.push_back({uintptr_t(tensors[0]), uintptr_t(tensors[1])});
  try {
    f();
    return "";
  } catch (const std::exception& error) {
    std::strncpy(message, error.what(), sizeof message - 1);
    return message;
  }
}
using namespace fg;
extern "C" const char* convolve(int which, int fault, unsigned seed, Int v, int dtype, void* x, void* w, void* y,
                                void* workspace, float* mean, float* var, Int tensors) {
  ConvShape s;
  std::memcpy(&s, v, sizeof s);
  planted = fault;
  simt::settings.seed = seed;
  const auto d = DType(dtype);
  const cuda::Target target{workspace, nullptr};
  return run(tensors, [&] {
    if (which == 0) cuda::conv2d(s, {d, x, w, d, {}, nullptr, y, ACT_IDENTITY, 0, 1}, target);
    if (which == 1) cuda::conv_transpose2d(s, {d, y, w, d, {}, nullptr, x, ACT_IDENTITY, 0, 1}, target);
    if (which == 2) cuda::conv2d_weight(s, {d, x, y, w, d, {0, 1, 0, 0}, 1}, target);
    const cuda::StatisticsArgs of{s.N, mean, var};  // each sample a group
    if (which == 3) cuda::conv2d_statistics(s, {d, x, w, d, {}, nullptr, y, ACT_IDENTITY, 0, 1}, of, target);
    if (which == 4) cuda::conv_transpose2d_statistics(s, {d, y, w, d, {}, nullptr, x, ACT_IDENTITY, 0, 1}, of, target);
  });
}
"""


@pytest.fixture(scope="module")
def convolve(tmp_path_factory):
    """The C function of DRIVER over the faulty copies."""
    stems = ("conv2d", "conv_transpose2d", "conv2d_weight")
    function = testing._emulator("cuda").planted(FAULTS, stems, DRIVER, tmp_path_factory.mktemp("faults")).convolve
    function.restype = ctypes.c_char_p
    return function


CASES = {  # N, C, H, W, K, OH, OW, R, S, strides, pads, dilations, groups
    "vectors": (1, 64, 6, 6, 40, 3, 3, 4, 4, 2, 2, 1, 1, 1, 1, 1),
    "values": (1, 6, 7, 5, 10, 4, 2, 3, 4, 2, 2, 1, 1, 1, 1, 2),
    "split": (2, 16, 16, 16, 8, 16, 16, 3, 3, 1, 1, 1, 1, 1, 1, 1),
    "two tiles a sample": (2, 20, 20, 18, 24, 10, 9, 4, 4, 2, 2, 1, 1, 1, 1, 1),
    "a tile without rows": (2, 20, 1, 129, 8, 1, 65, 1, 3, 1, 2, 0, 1, 1, 1, 1),
}
PLAIN, WITH_STATISTICS = range(3), (3, 4)  # op numbers: conv2d, conv_transpose2d, conv2d_weight; the first two again


def outcome(convolve, fault, case, which, dtype, seed):
    """How op number `which` fails on a case: the emulator's words, "wrong result", or ""."""
    torch.manual_seed(0)
    n, c, h, w, k, oh, ow, r, s, *rest = CASES[case]
    stride, padding, dilation, groups = rest[0:2], rest[2:4], rest[4:6], rest[6]
    nhwc = lambda *shape: torch.randn(shape).to(dtype).contiguous(memory_format=torch.channels_last)
    x, weight, y = nhwc(n, c, h, w), nhwc(k, c // groups, r, s), nhwc(n, k, oh, ow)
    a, b = x.double().requires_grad_(), weight.double().requires_grad_()
    forward = F.conv2d(a, b, None, stride, padding, dilation, groups)
    want = (forward.detach(), *torch.autograd.grad(forward, (a, b), y.double()))[which % 3]
    out = (y, x, weight)[which % 3].fill_(float("nan"))
    workspace, mean, var = (torch.full(size, float("nan")) for size in ((1 << 18,), *((n, out.shape[1]),) * 2))
    tensors = [v for t in (x, weight, y, workspace, mean, var) for v in (t.data_ptr(), t.numel() * t.element_size())]
    array = lambda values: (ctypes.c_int64 * len(values))(*values)
    code = {torch.float32: 0, torch.bfloat16: 1}[dtype]
    addresses = [ctypes.c_void_p(t.data_ptr()) for t in (x, weight, y, workspace, mean, var)]
    said = convolve(which, fault, seed, array(CASES[case]), code, *addresses, array([*tensors, 0, 0])).decode()
    if said:
        return said
    if not distance(out, want) < 8 * torch.finfo(dtype).eps:
        return "wrong result"
    if which in WITH_STATISTICS:
        exact = torch.var_mean(out.double(), (2, 3), correction=0)  # of y as it is stored
        if not all(distance(got, of_y) < 4e-6 for got, of_y in zip((var, mean), exact, strict=True)):
            return "wrong statistics"
    return ""


def outcomes(convolve, fault):
    for case in CASES:
        for which in (*PLAIN, *WITH_STATISTICS):
            for dtype, seed in ((torch.bfloat16, 1), (torch.float32, 2)):
                yield outcome(convolve, fault, case, which, dtype, seed)


def test_without_a_fault_all_is_well(convolve):
    assert set(outcomes(convolve, 0)) == {""}


@pytest.mark.parametrize("fault", range(1, len(FAULTS) + 1), ids=[name for name, *_ in FAULTS])
def test_a_planted_fault_is_caught(convolve, fault):
    assert any(outcomes(convolve, fault))


# ---- sanitizers ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize(("sanitizer", "race"), [("address", "within"), ("thread", "within"), ("thread", "between")])
def test_sanitizers_find_nothing(sanitizer, race, seed):
    shim = testing._emulator("cuda")
    sources = [p for p in shim.LAUNCHERS if p.stem in ("conv2d", "conv_transpose2d", "conv2d_weight")]
    try:
        said = shim.run_sanitized(shim.sanitized(sanitizer, sources, f"{sanitizer}-convolutions"), seed, race)
    except RuntimeError as error:
        pytest.skip(str(error))
    assert said == ""


@pytest.mark.slow
def test_moments_over_a_stage_in_use_are_a_race(tmp_path):
    """The barrier between the last slab and the moments: in step as the emulator's threads go, results show nothing."""
    shim = testing._emulator("cuda")
    right = "  __syncthreads();\n#pragma unroll\n  for (int j"
    shutil.copytree(CSRC / "cuda", tmp_path / "cuda")
    moments = tmp_path / "cuda" / "conv_moments.cuh"
    text = moments.read_text()
    assert text.count(right) == 1, "conv_moments.cuh has changed: plant the fault anew"
    moments.write_text(text.replace(right, right.removeprefix("  __syncthreads();\n")))
    sources = [tmp_path / "cuda" / f"{stem}.cu" for stem in ("conv2d", "conv_transpose2d", "conv2d_weight")]
    program = shim.sanitized("thread", sources, "planted-moments-race", (tmp_path,))
    try:
        reports = [shim.run_sanitized(program, seed) for seed in (0, 1)]
    except RuntimeError as error:
        pytest.skip(str(error))
    assert any("data race" in said for said in reports), reports
