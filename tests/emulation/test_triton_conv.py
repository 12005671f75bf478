"""The convolutions on their Triton kernels, under the checker: values, first and second derivatives against float64."""

import importlib
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", "3.8", reason="triton 3.8 or newer is needed to emulate Triton kernels")
import torch.nn.functional as F
from checks import LAYOUTS, against_plain, distance

import fastgan
from fastgan import functional, testing
from fastgan._op import OPS
from fastgan.choice import watching
from fastgan.kernels.configs import Config

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
KINDS = [(torch.float32, LAYOUTS[1]), (torch.bfloat16, LAYOUTS[0])]  # and float16 with the activations
CONVOLUTIONS = {"conv2d", "conv_transpose2d", "conv2d_weight"}
PHI = {
    None: lambda t: t * 1,
    "relu": torch.relu,
    "leaky_relu": lambda t: F.leaky_relu(t, 0.2),
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
}


def emulated(ours, plain, inputs, dtype, layout, ops=CONVOLUTIONS, order=2):
    """ours equals plain on emulated Triton kernels, and `ops` ran there and nowhere else."""
    ran = set()
    with testing.emulate("triton") as record, watching(lambda op, name, why: ran.add((op.name, name))):
        against_plain(ours, plain, inputs, dtype, layout, "triton", order)
    assert {pair for pair in ran if pair[0] in CONVOLUTIONS} == {(op, "triton") for op in ops}, ran
    return record


# ---- conv2d ----------------------------------------------------------------------------------------------------------

# what it is: x, K, kernel, stride, padding, dilation, groups, bias
FORWARD = {
    "k4s2p1": ((2, 3, 8, 8), 8, 4, 2, 1, 1, 1, True),
    "k5s2p2 odd": ((1, 5, 7, 9), 4, 5, 2, 2, 1, 1, True),
    "k3s1p1": ((1, 18, 4, 3), 17, 3, 1, 1, 1, 1, False),
    "asymmetric, groups": ((2, 4, 9, 6), 6, (3, 2), (2, 1), (0, 1), 1, 2, True),
    "depthwise, dilated": ((1, 4, 9, 9), 4, 3, 2, 2, 2, 4, True),
    "stride over kernel": ((2, 3, 7, 6), 5, 2, 3, 0, 1, 1, True),
    "1x1": ((2, 20, 4, 3), 33, 1, 1, 0, 1, 1, True),
    "to 1x1": ((2, 6, 4, 4), 1, 4, 1, 0, 1, 1, False),
    "1x1 input": ((3, 5, 1, 1), 4, 3, 2, 1, 1, 1, True),
    "dilation over stride": ((1, 2, 11, 8), 3, 3, (2, 3), 1, (3, 2), 1, True),
}


def forward_inputs(case, dtype=torch.float64):
    (n, c, h, w), k, kernel, *_, groups, bias = case
    r, s = (kernel, kernel) if isinstance(kernel, int) else kernel
    weight = torch.randn(k, c // groups, r, s, dtype=dtype) / (c // groups * r * s) ** 0.5
    return torch.randn(n, c, h, w, dtype=dtype), weight, torch.randn(k, dtype=dtype) if bias else None


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("name", FORWARD)
def test_conv2d(name, kind):
    case = FORWARD[name]
    rest = case[3:-1]
    ours = lambda x, w, b: functional.conv2d(x, w, b, *rest, activation="tanh")
    plain = lambda x, w, b: torch.tanh(F.conv2d(x, w, b, *rest))
    emulated(ours, plain, forward_inputs(case), *kind)


# ---- conv_transpose2d ------------------------------------------------------------------------------------------------

# what it is: x, K, kernel, stride, padding, output_padding, groups, dilation, bias
ADJOINT = {
    "k4s2p1": ((2, 3, 4, 4), 8, 4, 2, 1, 0, 1, 1, True),
    "k5s2p2 op1": ((1, 5, 4, 3), 3, 5, 2, 2, 1, 1, 1, True),
    "k3s1p1": ((1, 18, 4, 3), 17, 3, 1, 1, 0, 1, 1, False),
    "1x1 to 4x4": ((3, 7, 1, 1), 5, 4, 1, 0, 0, 1, 1, True),
    "asymmetric, groups": ((2, 4, 5, 3), 6, (3, 2), (2, 1), (0, 1), 0, 2, 1, True),
    "stride over kernel": ((2, 3, 3, 4), 5, 2, 3, 0, 2, 1, 1, True),
    "dilation and stride share 2": ((1, 2, 4, 5), 3, 3, (4, 2), 1, 1, 1, (6, 2), True),
    "output_padding over stride": ((1, 2, 4, 3), 3, 3, 1, 1, 1, 1, 2, False),
    "depthwise": ((1, 3, 4, 4), 3, 4, 2, 1, 0, 3, 1, True),
}


def adjoint_inputs(case, dtype=torch.float64):
    (n, c, h, w), k, kernel, *_, groups, _, bias = case
    r, s = (kernel, kernel) if isinstance(kernel, int) else kernel
    weight = torch.randn(c, k // groups, r, s, dtype=dtype) / (c // groups * r * s) ** 0.5
    return torch.randn(n, c, h, w, dtype=dtype), weight, torch.randn(k, dtype=dtype) if bias else None


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("name", ADJOINT)
def test_conv_transpose2d(name, kind):
    case = ADJOINT[name]
    rest = case[3:-1]
    ours = lambda x, w, b: functional.conv_transpose2d(x, w, b, *rest, activation="leaky_relu")
    plain = lambda x, w, b: F.leaky_relu(F.conv_transpose2d(x, w, b, *rest), 0.2)
    emulated(ours, plain, adjoint_inputs(case), *kind)


# ---- epilogues, configurations, offsets ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", PHI)
def test_every_activation_in_both_epilogues(activation, dtype):
    x, w, b = forward_inputs(((2, 3, 5, 4), 6, 2, 2, 0, 1, 1, True))
    ours = lambda x, w, b: functional.conv2d(x, w, b, 2, activation=activation)
    plain = lambda x, w, b: PHI[activation](F.conv2d(x, w, b, 2))
    emulated(ours, plain, (x, w, b), dtype, LAYOUTS[1], {"conv2d"}, order=0)
    ours = lambda x, w, b: functional.conv_transpose2d(x, w, b, 2, activation=activation)
    plain = lambda x, w, b: PHI[activation](F.conv_transpose2d(x, w, b, 2))
    emulated(ours, plain, (x, w.transpose(0, 1).contiguous(), b), dtype, LAYOUTS[1], {"conv_transpose2d"}, order=0)


def run_all(x, w, launchers=None):
    """The three ops on one geometry (k4 s2 p1): [got], and what PyTorch gives in float64."""
    run = {name: OPS[name].backends["triton"].run for name in CONVOLUTIONS} | (launchers or {})
    two, one = [2, 2], [1, 1]
    with testing.emulate("triton") as record:
        y = run["conv2d"](x, w, None, two, one, one, 1, "identity", 0.0)
        dx = run["conv_transpose2d"](y, w, None, two, one, [0, 0], 1, one, "identity", 0.0)
        dweight = run["conv2d_weight"](x, y, [4, 4], two, one, one, 1, False)
    want = [F.conv2d(x.double(), w.double(), None, 2, 1)]
    want.append(F.conv_transpose2d(y.double(), w.double(), None, 2, 1))
    want.append(torch.nn.grad.conv2d_weight(x.double(), w.shape, y.double(), 2, 1))
    return [y, dx, dweight], want, record


@pytest.fixture
def force(monkeypatch):
    """Run every convolution with one configuration."""

    def use(config):
        for name in CONVOLUTIONS:
            module = importlib.import_module(f"fastgan.kernels.{name}")
            monkeypatch.setattr(module, "tuned", lambda op, x, product, case, run: run(config))

    return use


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("tile", [(16, 32, 16), (64, 16, 32)], ids=str)
@pytest.mark.parametrize("channels", [(3, 20), (24, 5)], ids=str)
def test_every_kind_of_tile(channels, tile, splits, force):
    force(Config(*tile, 4, 2, splits))
    c, k = channels
    got, want, record = run_all(torch.randn(2, c, 8, 6), torch.randn(k, c, 4, 4))
    for g, w in zip(got, want, strict=True):
        assert distance(g, w) < 1e-6
    assert record.kernels.count("merge_splits_kernel") == (3 if splits > 1 else 0)


def test_offsets_past_32_bits_are_computed_in_64(monkeypatch, force):
    """A sample's place is taken in 64 bits where a tensor passes the limit; lowered here to 100 elements."""
    force(Config(32, 32, 16, 4, 2))
    monkeypatch.setattr(importlib.import_module("fastgan.kernels.launching"), "WIDE_FROM", 100)
    got, want, record = run_all(torch.randn(2, 3, 8, 6), torch.randn(5, 3, 4, 4))
    assert all(launch.arguments["WIDE"] for launch in record.launches)
    assert all(distance(g, w) < 1e-6 for g, w in zip(got, want, strict=True))


def test_outputs_are_written_in_full(force):
    """torch fills what it allocates with NaN here: a lane that no program writes would show."""
    torch.use_deterministic_algorithms(True)
    try:
        for splits in (1, 2):
            force(Config(32, 16, 16, 4, 2, splits))
            got, want, _ = run_all(torch.randn(1, 5, 8, 6).bfloat16(), torch.randn(18, 5, 4, 4).bfloat16())
            assert all(distance(g, w) < 1e-2 for g, w in zip(got, want, strict=True))
    finally:
        torch.use_deterministic_algorithms(False)


def test_tf32_rounds_only_where_asked_for(monkeypatch, force):
    force(Config(32, 32, 16, 4, 2))
    x, w = torch.randn(1, 16, 8, 8), torch.randn(16, 16, 4, 4)
    exact, want, _ = run_all(x, w)
    for name in CONVOLUTIONS:
        monkeypatch.setattr(importlib.import_module(f"fastgan.kernels.{name}"), "precision", lambda x: "tf32")
    rounded, again, record = run_all(x, w)
    assert all(launch.arguments["PRECISION"] == "tf32" for launch in record.launches)
    for e, r, a, b in zip(exact, rounded, want, again, strict=True):
        assert distance(e, a) < 1e-6 and 1e-5 < distance(r, b) < 2e-3


def test_dots_cost_what_the_card_says(force):
    """On sizes that fill their tiles: no multiplication more than cost(), so no zero insertion in the adjoint."""
    force(Config(16, 16, 16, 2, 2))
    x, w = torch.randn(2, 16, 8, 8), torch.randn(16, 16, 4, 4)
    _, _, record = run_all(x, w)
    y = torch.empty(2, 16, 4, 4)
    two, one = (2, 2), (1, 1)
    costs = {
        "conv2d_kernel": fastgan.ops.conv2d.cost(x, w, two, one, one),
        "conv_transpose2d_kernel": fastgan.ops.conv_transpose2d.cost(y, w, two, one, (0, 0), 1, one),
        "conv2d_weight_kernel": fastgan.ops.conv2d_weight.cost(x, y, (4, 4), 1),
    }
    assert {launch.kernel: launch.dot_flops for launch in record.launches} == {k: v["flops"] for k, v in costs.items()}
    for launch in record.launches:
        assert launch.unique_loaded + launch.unique_stored == costs[launch.kernel]["bytes"]
    five = torch.randn(16, 16, 5, 5)
    with testing.emulate("triton") as record:
        functional.conv_transpose2d(y, five, None, 2, 2, 1)
    assert record.total("dot_flops") == fastgan.ops.conv_transpose2d.cost(y, five, two, two, one, 1, one)["flops"]


def test_a_1x1_input_is_one_product():
    x, w = torch.randn(16, 32, 1, 1), torch.randn(32, 8, 4, 4)
    with testing.emulate("triton") as record:
        y = functional.conv_transpose2d(x, w)
    assert distance(y, F.conv_transpose2d(x.double(), w.double())) < 1e-6
    assert record.total("dot_flops") == 2 * 16 * 32 * 8 * 16


@pytest.mark.parametrize("layout", LAYOUTS, ids=["nchw", "nhwc"])
@pytest.mark.parametrize("name", sorted(CONVOLUTIONS))
def test_strides_are_those_that_the_fake_promises(name, layout):
    def twin(a):
        return torch.empty_strided(a.shape, a.stride(), device="meta") if isinstance(a, torch.Tensor) else a

    op, one = OPS[name], name == "conv2d"  # [N, 1, H, W] is contiguous in both layouts; its strides say which it was
    with testing.emulate("triton"):
        for channels in (1, 3) if one else (3,):
            args = list(op.example())
            args[:2] = [
                a[:, :channels].contiguous(memory_format=layout) if one else a.contiguous(memory_format=layout)
                for a in args[:2]
            ]
            got, promised = op.run(*args), op.overload(*map(twin, args))
            assert (got.shape, got.stride(), got.dtype) == (promised.shape, promised.stride(), promised.dtype)


def test_what_is_declined_says_why():
    for op, args, words in [
        ("conv2d", (torch.randn(1, 1, 4, 4).double(), torch.randn(1, 1, 1, 1).double(), None), "float32, bfloat16"),
        ("conv2d", (torch.randn(0, 1, 4, 4), torch.randn(1, 1, 1, 1), None), "empty"),
        ("conv_transpose2d", (torch.randn(1, 4, 4), torch.randn(1, 1, 1, 1), None), "4-D"),
        ("conv2d_weight", (torch.randn(1, 1, 4, 4), torch.randn(1, 1, 4, 4).half()), "one dtype"),
        (
            "conv2d",
            (torch.empty(1, 2**15, 2**8, 2**8, device="meta"), torch.empty(1, 2**15, 1, 1, device="meta"), None),
            "2^31",
        ),
    ]:
        assert words in OPS[op].backends["triton"].declines(*args)


# ---- seeded faults ---------------------------------------------------------------------------------------------------

# what: (file, what it says, what the fault makes of it)
FAULTS = {
    "wrong phase": ("conv_transpose2d", "reach = phase + pad", "reach = phase + pad + 1"),
    "wrong tap of a phase": ("conv_transpose2d", "(first_h * S + first_w) * KG", "(first_w * S + first_h + 1) * KG"),
    "a phase loses a tap": ("conv_transpose2d", "kernel - first + step - 1", "kernel - first - 1"),
    "no mask of the last rows": ("conv2d", "inside = m < M", "inside = m >= 0"),
    "no mask of the channels": ("conv2d", "is_output = k < KG", "is_output = k >= 0"),
    "no mask at the image's edge": ("implicit_gemm", "there = inside & (h >= 0)", "there = inside"),
    "edge off by one": ("implicit_gemm", "(h >= 0) & (h < H) & (w >= 0)", "(h >= 0) & (h <= H) & (w >= 0)"),
    "one step too few": ("implicit_gemm", "tl.minimum(first + part, steps)", "tl.minimum(first + part, steps - 1)"),
    "taps out of step": ("implicit_gemm", "row_ends = tw == TW", "row_ends = tw > TW"),
    "lost update": ("implicit_gemm", "y + split.to(tl.int64) * size + where", "y + where"),
    "lost update of the weight": ("conv2d_weight", "dweight + split.to(tl.int64) * size + at", "dweight + at"),
    "a part summed twice": ("conv2d_weight", "begin + part, pixels", "begin + part + BLOCK_K, pixels"),
    "one part forgotten": ("implicit_gemm", "in tl.static_range(SPLITS)", "in tl.static_range(SPLITS - 1)"),
    "pixel off by one": ("conv2d_weight", "is_pixel = p < pixels", "is_pixel = p < pixels - 1"),
}


def faulty(folder, file, right, wrong):
    """Launchers of copies of the real kernels, one of them with a fault."""
    sources = {
        name: Path(importlib.import_module(f"fastgan.kernels.{name}").__file__).read_text()
        for name in ("implicit_gemm", *CONVOLUTIONS)
    }
    assert right in sources[file]
    sources[file] = sources[file].replace(right, wrong)
    modules = {}
    for name, text in sources.items():
        path = folder / f"faulty_{name}.py"
        path.write_text(text.replace("from fastgan.kernels.implicit_gemm import", "from faulty_implicit_gemm import"))
        spec = importlib.util.spec_from_file_location(path.stem, path)
        modules[name] = sys.modules[path.stem] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(modules[name])
    for name in CONVOLUTIONS:
        modules[name].tuned = lambda op, x, product, case, run: run(Config(32, 32, 16, 4, 2, 2))
    return {name: modules[name].LAUNCHERS[name].run for name in CONVOLUTIONS}


def correct(launchers):
    """Whether copies of the kernels run unobjected and give the right numbers."""
    try:
        got, want, _ = run_all(torch.randn(3, 17, 8, 6), torch.randn(18, 17, 4, 4), launchers)
    except AssertionError as error:
        assert type(error).__name__ == "CheckError"
        return False
    return all(distance(g, w) < 1e-5 for g, w in zip(got, want, strict=True))


@pytest.mark.parametrize("what", ["nothing", *FAULTS])
def test_seeded_faults_are_caught(what, tmp_path):
    fault = FAULTS.get(what, ("conv2d", "inside = m < M", "inside = m < M"))
    try:
        assert correct(faulty(tmp_path, *fault)) == (what == "nothing")
    finally:
        for name in ("implicit_gemm", *CONVOLUTIONS):
            sys.modules.pop(f"faulty_{name}", None)
