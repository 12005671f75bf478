"""bn_act in one pass (csrc/cuda/resident.cuh): blocks that keep their part of the tensor in shared memory and meet.

The emulator runs as cards of a few multiprocessors, so that small tensors fit or do not. What both routes have in
common is in test_cuda_ops.py.
"""

import ctypes

import pytest
import torch
import torch.nn.functional as F
from checks import against_plain, distance

from fastgan import functional, testing
from fastgan._op import OPS

KIB = 1 << 10
NHWC = torch.channels_last
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ACTIVATIONS = {None: lambda t: t * 1, "relu": torch.relu, "leaky_relu": lambda t: F.leaky_relu(t, 0.2)}
FUNCTIONS = ("bn_act_forward", "bn_act_backward", "bn_act_double_backward")
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).partition(".")[2])


def noise(*shape):
    return torch.randn(shape, dtype=torch.float64)


def images(*shape, dtype=torch.float32):
    return torch.randn(shape).to(dtype).contiguous(memory_format=NHWC)


def resident(record):
    """{function: its one launch}; fails where a function made another one or more."""
    launches = {}
    for launch in record.launches:
        assert "resident_kernel" in launch.kernel and launches.get(launch.function, launch).blocks == launch.blocks
        launches[launch.function] = launch
    return launches


# ---- values and derivatives ------------------------------------------------------------------------------------------

# shape, statistic groups, blocks forward and backward by the bytes of an element: slices x groups x parts
CASES = {
    "a block a slice": ((4, 40, 6, 5), 1, {4: (5, 5), 2: (3, 3)}),
    "fewer channels than a sector": ((2, 4, 3, 3), 1, {4: (1, 1), 2: (1, 1)}),
    "teams": ((5, 24, 16, 16), 1, {4: (6, 9), 2: (4, 10)}),
    "teams of two groups": ((4, 8, 32, 21), 2, {4: (4, 10), 2: (2, 4)}),
    "odd channels and rows": ((5, 7, 33, 11), 1, {4: (3, 7), 2: (1, 3)}),
    "odd channels of two groups": ((6, 37, 5, 3), 2, {4: (4, 4), 2: (4, 4)}),
    "one pixel": ((12, 24), 3, {4: (9, 9), 2: (6, 6)}),
}
ALONE = ("a block a slice", "fewer channels than a sector")


@dtypes
@pytest.mark.parametrize("case", CASES)
def test_values_and_derivatives(record, case, dtype):
    shape, groups, blocks = CASES[case]
    record.card(multiprocessors=5)
    for seed, activation in enumerate(ACTIVATIONS):
        record.configure(seed=seed)
        ours = lambda x, w, b, a=activation: functional.bn_act(
            x, None, None, w, b, training=True, activation=a, stat_groups=groups
        )
        plain = lambda x, w, b, a=activation: ACTIVATIONS[a](
            torch.cat([F.batch_norm(p, None, None, w, b, True, 0.0, 1e-5) for p in x.chunk(groups)])
        )
        parameters = torch.rand(shape[1], dtype=torch.float64) + 0.5, noise(shape[1])
        against_plain(ours, plain, (noise(*shape) * 2 + 3, *parameters), dtype, NHWC, "cuda")
    launches = resident(record)
    assert tuple(launches[f].blocks for f in FUNCTIONS[:2]) == blocks[dtype.itemsize]
    assert {launches[f].cooperative for f in FUNCTIONS[1:]} == {case not in ALONE}


@dtypes
def test_absent_parameters_and_cotangents(record, dtype):
    """No weight, no bias, no ddx: as the reference in float64, in training and with statistics that are constants."""
    x, dy = images(3, 24, 9, 8, dtype=dtype), images(3, 24, 9, 8, dtype=dtype)
    mean, var = torch.randn(1, 24) / 8, torch.rand(1, 24) + 0.5
    for training in (True, False):
        rest = (x, None, None, mean, var, training, 1e-5, "leaky_relu", 0.2)
        for name, args in (
            ("bn_act_backward", (dy, *rest)),
            ("bn_act_double_backward", (dy, None, torch.randn(24), None, *rest)),
        ):
            lifted = [a.double() if isinstance(a, torch.Tensor) else a for a in args]
            got, want = OPS[name].backends["cuda"].run(*args), OPS[name].reference(*lifted)
            for g, w in zip(got, want, strict=True):
                assert distance(g, w) < 8 * torch.finfo(g.dtype).eps
    assert set(resident(record)) == set(FUNCTIONS[1:])


def test_misaligned_tensors_go_one_element_at_a_time(record):
    x = images(3, 16, 12, 16)
    shifted = torch.empty(x.numel() + 1)[1:].view(3, 12, 16, 16).permute(0, 3, 1, 2).copy_(x)
    assert shifted.data_ptr() % 16 and shifted.is_contiguous(memory_format=NHWC)
    for a, b in zip(forward(x), forward(shifted), strict=True):
        torch.testing.assert_close(a, b)
    aligned, single = record.launches
    assert (aligned.kernel, aligned.blocks) == (single.kernel, single.blocks)
    assert not aligned.cooperative and single.cooperative  # two slices of 8 channels; two parts of one of 16


def test_statistics_do_not_cancel(record):
    """|mean| of 3e4 standard deviations, in a team of eight blocks."""
    record.card(shared=228 * KIB)
    x = (torch.randn(8, 6, 1600, 1) + 3e4).contiguous(memory_format=NHWC)
    x[:, 3] = 1234.567
    _, mean, var = OPS["bn_act"].run(x, None, None, None, None, True, 1e-5, "identity", 0.0, 1)
    want_var, want_mean = torch.var_mean(x.double(), (0, 2, 3), correction=0)
    torch.testing.assert_close(var[0], want_var.float(), rtol=1e-5, atol=1e-9)
    torch.testing.assert_close(mean[0], want_mean.float(), rtol=2e-7, atol=0)
    assert resident(record)["bn_act_forward"].blocks == 8


# ---- which route -----------------------------------------------------------------------------------------------------


def forward(x, groups=1):
    return OPS["bn_act"].run(x, None, None, None, None, True, 1e-5, "relu", 0.0, groups)


def kernels(record):
    made = [launch.kernel.partition("<")[0] for launch in record.launches]
    record.launches.clear()
    return made


ONE, THREE = ["resident_kernel"], ["reduce_columns_kernel", "bn_act_statistics_kernel", "apply_columns_kernel"]


def test_the_card_decides(record):
    """8 channels of 40 KiB, for one or two multiprocessors: two blocks of 20."""
    x = images(1, 8, 40, 32)
    for card, want in [
        ({"multiprocessors": 1, "shared": 100 * KIB}, ONE),
        ({"multiprocessors": 1, "shared": 64 * KIB}, ONE),
        ({"multiprocessors": 1, "shared": 40 * KIB}, THREE),
        ({"multiprocessors": 2, "shared": 40 * KIB}, THREE),  # parts of less than 16 KiB are not made
        ({"multiprocessors": 1, "shared": 100 * KIB, "cooperative": False}, THREE),
    ]:
        record.card(**card)
        want_y = OPS["bn_act"].reference(x, None, None, None, None, True, 1e-5, "relu", 0.0, 1)
        assert distance(forward(x)[0], want_y[0]) < 1e-6
        assert kernels(record) == want, card


def test_a_team_of_one_needs_no_cooperative_launch(record):
    """However many there are: they wait for nobody."""
    record.card(multiprocessors=1, cooperative=False)
    forward(images(1, 200, 8, 4))
    (launch,) = record.launches
    assert launch.blocks == 7 and not launch.cooperative


def test_nchw_takes_three_kernels(record):
    forward(torch.randn(2, 8, 4, 4))
    assert kernels(record)[1] == "bn_act_statistics_kernel"


def test_a_block_may_have_more_than_48_kib(record):
    record.card(multiprocessors=1, shared=228 * KIB)
    forward(images(2, 8, 75, 45))
    (launch,) = record.launches
    assert launch.blocks == 2 and launch.shared == 3375 * 32 > 48 * KIB


def test_any_order_of_threads_gives_the_same_bits(record):
    record.card(multiprocessors=12)
    x, dy, ddx = (images(4, 24, 32, 24) for _ in range(3))
    mean, var, v = torch.randn(2, 24), torch.rand(2, 24) + 0.5, torch.randn(24)
    scalars = (True, 1e-5, "leaky_relu", 0.2)
    results = []
    for seed in range(4):
        record.configure(seed=seed)
        results.append(
            [
                *OPS["bn_act"].run(x, v, v, None, None, *scalars, 2),
                *OPS["bn_act_backward"].run(dy, x, v, v, mean, var, *scalars),
                *OPS["bn_act_double_backward"].run(dy, ddx, v, v, x, v, v, mean, var, *scalars),
            ]
        )
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


# ---- what is fetched -------------------------------------------------------------------------------------------------

X = (8, 64, 16, 16)
TRAFFIC = {  # op -> (arguments, accesses an element)
    "bn_act": (lambda x, v: (x, v, v, None, None, True, 1e-5, "relu", 0.0, 1), 2),
    "bn_act_backward": (lambda x, v: (x, x.clone(), v, v, v[None], v[None] ** 2 + 1, True, 1e-5, "relu", 0.0), 3),
    "bn_act_double_backward": (
        lambda x, v: (x, x.clone(), v, v, x.clone(), v, v, v[None], v[None] ** 2 + 1, True, 1e-5, "relu", 0.0),
        5,
    ),
}


@dtypes
@pytest.mark.parametrize("name", TRAFFIC)
def test_traffic(record, name, dtype):
    """Each tensor moves once, in whole sectors, and shared memory is free of bank conflicts."""
    arguments, accesses = TRAFFIC[name]
    x = images(*X, dtype=dtype)
    record.card(multiprocessors=8, shared=228 * KIB)
    record.configure(counting=True)
    OPS[name].run(*arguments(x, torch.randn(64)))
    size = x.numel() * x.element_size()
    assert accesses * size <= record.bytes(size) <= 1.1 * accesses * size
    assert record.sector_efficiency(size) >= 0.9
    assert record.sector_efficiency(KIB) >= 0.9  # the partial sums too
    (launch,) = record.launches
    assert launch.cooperative and launch.blocks > 8
    assert launch.shared_wavefronts <= 1.1 * launch.shared_ideal


# ---- faults ----------------------------------------------------------------------------------------------------------

# (name, file, as it is, with the fault): a copy of the sources has all of them, behind a number; 0 is none
FAULTS = [
    ("a barrier skipped", "resident.cuh", "  meet_team(r.arrived", "  if (!PLANTED) meet_team(r.arrived"),
    (
        "a partial lost",
        "resident.cuh",
        "group, r.parts, channel, p.channels)",
        "group, r.parts - PLANTED, channel, p.channels)",
    ),
    ("two partials on one place", "resident.cuh", "t.split, Acc::WORDS, k", "PLANTED ? 0 : t.split, Acc::WORDS, k"),
    ("a block too many awaited", "resident.cuh", "arrived, 0u) < blocks", "arrived, 0u) < blocks + PLANTED"),
    (
        "more blocks than the card holds",
        "resident.hpp",
        "device_attribute(cudaDevAttrMultiProcessorCount),",
        "device_attribute(cudaDevAttrMultiProcessorCount) * (PLANTED ? 64 : 1),",
    ),
    ("counters as they were", "resident.hpp", "counters * sizeof(u32)", "PLANTED ? 0 : counters * sizeof(u32)"),
    ("one input kept over another", "resident.cuh", "k * static_cast<int>", "(PLANTED ? 0 : k) * static_cast<int>"),
    ("a row too many", "resident.cuh", "row < t.end; row += t.lanes_y)", "row < t.end + PLANTED; row += t.lanes_y)"),
    ("a group's gradient left out", "resident.cuh", "group < (all ? p.groups", "group < (all ? p.groups - PLANTED"),
]

DRIVER = r"""
#include <cstring>
#include "cuda/kernels.hpp"
#include "simt.hpp"
int planted = 0;
using namespace fg;
extern "C" const char* backward(int fault, unsigned seed, int64_t N, int64_t C, int64_t HW, int64_t G, void** t,
                                const int64_t* tensors) {
  static char message[1000];
  simt::regions.clear();
  for (; tensors[0]; tensors += 2) simt::regions.push_back({uintptr_t(tensors[0]), uintptr_t(tensors[1])});
  planted = fault;
  simt::settings.seed = seed;
  const auto f = [&](int i) { return static_cast<float*>(t[i]); };
  const BnShape s{F32, N, C, HW, G, true, true, 1e-5f, ACT_RELU, 0.0f, 1};
  const NormBackwardArgs a{t[0], t[1], nullptr, nullptr, f(2), f(3), t[4], f(5), f(6)};
  try {
    cuda::bn_act_backward(s, a, {t[7], nullptr});
    return simt::launches.back().cooperative ? "" : "another kernel ran";
  } catch (const std::exception& error) {
    return std::strncpy(message, error.what(), sizeof message - 1);
  }
}
"""


@pytest.fixture(scope="module")
def backward(tmp_path_factory):
    """The C function of DRIVER over the faulty copies."""
    try:
        shim = testing._emulator("cuda")
        function = shim.planted(FAULTS, ("bn_act", "norm"), DRIVER, tmp_path_factory.mktemp("faults")).backward
    except RuntimeError as error:
        if "the CUDA emulator needs" not in str(error):
            raise
        pytest.skip(str(error))
    function.restype = ctypes.c_char_p
    return function


def outcome(backward, fault, groups, seed):
    """How bn_act_backward fails on a team of several blocks: the emulator's words, "wrong result", or ""."""
    torch.manual_seed(seed)
    n, c, pixels = 6, 16, 384
    dy, x = torch.randn(n, pixels, c), torch.randn(n, pixels, c)
    mean, var = torch.randn(groups, c) / 8, torch.rand(groups, c) + 0.5
    nan = lambda *shape: torch.full(shape, float("nan"))
    outputs = nan(n, pixels, c), nan(c), nan(c)
    tensors = (dy, x, mean, var, *outputs, nan(1 << 12))
    nchw = lambda t: t.transpose(1, 2).unsqueeze(3)
    args = (nchw(dy), nchw(x), None, None, mean, var, True, 1e-5, "relu", 0.0)
    want = OPS["bn_act_backward"].reference(*args)
    addresses = (ctypes.c_void_p * 8)(*(t.data_ptr() for t in tensors))
    declared = [v for t in tensors for v in (t.data_ptr(), t.numel() * 4)]
    said = backward(
        fault,
        seed,
        *(ctypes.c_int64(v) for v in (n, c, pixels, groups)),
        addresses,
        (ctypes.c_int64 * (len(declared) + 2))(*declared, 0, 0),
    )
    if said:
        return said.decode()
    got = (nchw(outputs[0]), *outputs[1:])
    close = all(distance(g, w) < 1e-5 for g, w in zip(got, want, strict=True))
    return "" if close else "wrong result"


@pytest.mark.parametrize("groups", [1, 2])
def test_without_a_fault_all_is_well(backward, groups):
    assert [outcome(backward, 0, groups, seed) for seed in range(3)] == [""] * 3


@pytest.mark.parametrize("fault", range(1, len(FAULTS) + 1), ids=[name for name, *_ in FAULTS])
def test_a_planted_fault_is_caught(backward, fault):
    caught = {outcome(backward, fault, groups, seed) for groups in (1, 2) for seed in (1, 2)} - {""}
    assert caught
    words = {
        "a block too many awaited": "simt: deadlock",
        "more blocks than the card holds": "simt: cooperative launch",
    }
    assert all(words.get(FAULTS[fault - 1][0], "") in text for text in caught), caught
