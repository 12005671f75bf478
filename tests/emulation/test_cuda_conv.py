"""The CUDA convolutions under the SIMT emulator: values and derivatives to second order against float64 PyTorch."""

import copy

import pytest
import torch
import torch.nn.functional as F
from checks import LAYOUTS, against_plain, distance, leaves, orders
from torch import nn

import fastgan
from fastgan import functional, testing
from fastgan._op import OPS
from fastgan.choice import watching
from fastgan.ops import conv2d as card

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FAMILY = ("conv2d", "conv_transpose2d", "conv2d_weight")
PHI = {
    None: lambda t: t,
    "relu": torch.relu,
    "leaky_relu": lambda t: F.leaky_relu(t, 0.2),
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
}

# x, out channels, kernel, stride, padding, dilation, groups
FORWARD = {
    "k4s2p1": ((2, 16, 6, 6), 24, 4, 2, 1, 1, 1),
    "k4s2p1 of 3 channels": ((2, 3, 8, 8), 8, 4, 2, 1, 1, 1),
    "k4s2p1 of 1 channel, to more than a block's rows": ((1, 1, 6, 6), 72, 4, 2, 1, 1, 1),
    "to one logit": ((2, 16, 4, 4), 1, 4, 1, 0, 1, 1),
    "k3s1, odd": ((1, 5, 7, 9), 9, 3, 1, 1, 1, 1),
    "5x5": ((1, 8, 9, 7), 8, 5, 2, 2, 1, 1),
    "1x1 input": ((3, 24, 1, 1), 10, 1, 1, 0, 1, 1),
    "asymmetric, groups": ((2, 6, 9, 6), 4, (3, 2), (2, 1), (0, 1), 1, 2),
    "dilated, depthwise": ((1, 4, 10, 10), 8, 3, (1, 2), 2, 2, 4),
    "kernel < stride": ((1, 8, 7, 7), 8, 2, 3, 0, 1, 1),
}
# x, out channels, kernel, stride, padding, output_padding, groups, dilation
TRANSPOSED = {
    "k4s2p1": ((2, 24, 3, 4), 16, 4, 2, 1, 0, 1, 1),
    "to 3 channels": ((1, 16, 5, 5), 3, 4, 2, 1, 0, 1, 1),
    "1x1 input": ((3, 20, 1, 1), 24, 4, 1, 0, 0, 1, 1),
    "1x1 input, stride 3": ((2, 8, 1, 1), 5, (4, 5), 3, 1, 1, 1, 1),
    "5x5 with output_padding": ((1, 8, 4, 3), 6, 5, 2, 2, 1, 1, 1),
    "kernel < stride": ((1, 8, 3, 4), 8, 2, 3, 0, 0, 1, 1),
    "groups, asymmetric": ((1, 8, 4, 3), 6, (3, 2), (2, 3), (1, 0), (1, 2), 2, 1),
    "dilated": ((1, 5, 4, 4), 6, 3, 2, 2, 1, 1, 3),
    "k3s1": ((1, 8, 5, 4), 9, 3, 1, 1, 0, 1, 1),
}


def noise(*shape):
    return torch.randn(shape, dtype=torch.float64)


def pair(kernel):
    return (kernel, kernel) if isinstance(kernel, int) else kernel


def forward_case(name, activation="leaky_relu", bias=True):
    (n, c, h, w), k, kernel, *geometry, groups = FORWARD[name]
    r, s = pair(kernel)
    inputs = noise(n, c, h, w), noise(k, c // groups, r, s) / (c // groups * r * s) ** 0.5, noise(k) if bias else None
    ours = lambda x, w, b: functional.conv2d(x, w, b, *geometry, groups, activation=activation)
    return inputs, ours, lambda x, w, b: PHI[activation](F.conv2d(x, w, b, *geometry, groups))


def transposed_case(name, activation="leaky_relu", bias=True):
    (n, c, h, w), k, kernel, *geometry, groups, dilation = TRANSPOSED[name]
    r, s = pair(kernel)
    inputs = noise(n, c, h, w), noise(c, k // groups, r, s) / (c // groups * 4) ** 0.5, noise(k) if bias else None
    ours = lambda x, w, b: functional.conv_transpose2d(x, w, b, *geometry, groups, dilation, activation=activation)
    plain = lambda x, w, b: PHI[activation](F.conv_transpose2d(x, w, b, *geometry, groups, dilation))
    return inputs, ours, plain


def emulated(case, dtype, layout, seed, order=2, ops=FAMILY):
    """A case equals PyTorch to `order` on emulated CUDA kernels, and `ops` ran there and nowhere else."""
    ran = set()
    inputs, ours, plain = case
    with testing.emulate("cuda") as record, watching(lambda op, name, why: ran.add((op.name, name))):
        record.configure(seed=seed)
        got = against_plain(ours, plain, inputs, dtype, layout, "cuda", order)
    assert {(op, "cuda") for op in ops} == {(op, name) for op, name in ran if op in FAMILY}
    assert record.launches
    return got, record


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", FORWARD)
def test_conv2d_to_second_order(name, dtype):
    index = list(FORWARD).index(name)
    emulated(forward_case(name), dtype, LAYOUTS[index % 2], seed=index)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", TRANSPOSED)
def test_conv_transpose2d_to_second_order(name, dtype):
    index = list(TRANSPOSED).index(name)
    emulated(transposed_case(name), dtype, LAYOUTS[index % 2], seed=index)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", PHI)
def test_epilogues(activation, dtype):
    for layout in LAYOUTS:
        for bias in (True, False):
            emulated(forward_case("k4s2p1", activation, bias), dtype, layout, 3, 0, FAMILY[:1])
            emulated(transposed_case("kernel < stride", activation, bias), dtype, layout, 3, 0, FAMILY[1:2])


def test_a_phase_without_taps_is_the_bias_alone():
    x, w, bias = torch.randn(1, 8, 3, 3), torch.randn(8, 4, 1, 1), torch.randn(4)
    with testing.emulate("cuda"):
        y = functional.conv_transpose2d(x, w, bias, stride=3)
    holes = torch.ones(7, 7, dtype=torch.bool)
    holes[::3, ::3] = False
    assert torch.equal(y[0, :, holes], bias[:, None].expand(4, int(holes.sum())))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_thread_orders_change_no_bit(dtype):
    """The split weight gradient too: its parts are added in a fixed order."""
    x, dy = (torch.randn(s).to(dtype) for s in ((4, 8, 16, 16), (4, 16, 16, 16)))
    weight, geometry = torch.randn(16, 8, 3, 3).to(dtype), ([1, 1], [1, 1], [1, 1])
    results = []
    for seed in (0, 1, 2, 77):
        with testing.emulate("cuda") as record:
            record.configure(seed=seed)
            results.append(
                [
                    OPS["conv2d"](x, weight, None, *geometry, 1, "tanh", 0.0),
                    OPS["conv_transpose2d"](dy, weight, None, [1, 1], [1, 1], [0, 0], 1, [1, 1], "identity", 0.0),
                    OPS["conv2d_weight"](x, dy, [3, 3], *geometry, 1, False),
                ]
            )
        assert [launch.kernel.startswith("conv_reduce") for launch in record.launches].count(True) >= 1
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, results[0], strict=True))


# ---- blocks, TF32, traffic -------------------------------------------------------------------------------------------


def product(op, dtype, channels, out, side, batch, kernel=3):
    """(got, want) of one op, all operands whole chunks unless the channels say otherwise."""
    x, weight = noise(batch, channels, side, side), noise(out, channels, kernel, kernel) / (channels * kernel**2) ** 0.5
    y = noise(batch, out, side, side)
    x, weight, y = (t.to(dtype).contiguous(memory_format=torch.channels_last) for t in (x, weight, y))
    pad = [kernel // 2] * 2
    arguments = {
        "conv2d": (x, weight, None, [1, 1], pad, [1, 1], 1, "identity", 0.0),
        "conv_transpose2d": (y, weight, None, [1, 1], pad, [0, 0], 1, [1, 1], "identity", 0.0),
        "conv2d_weight": (x, y, [kernel] * 2, [1, 1], pad, [1, 1], 1, True),
    }[op]
    wide = [a.double() if isinstance(a, torch.Tensor) else a for a in arguments]
    return OPS[op](*arguments), OPS[op].reference(*wide)


# op -> channels, out, side, batch of x: large blocks have 256 threads; narrow ones serve up to 16 columns
LARGE = {
    "conv2d": (32, 256, 16, 1),
    "conv_transpose2d": (256, 32, 16, 1),
    "conv2d_weight": (32, 256, 16, 1),
}
NARROW = {"conv2d": (16, 8, 8, 2), "conv_transpose2d": (8, 16, 8, 2), "conv2d_weight": (8, 16, 8, 2)}
SMALL = {"conv2d": (16, 48, 6, 2), "conv_transpose2d": (48, 16, 6, 2), "conv2d_weight": (16, 48, 6, 2)}


PRODUCTS = [*((dtype, False) for dtype in DTYPES), (torch.float32, True)]


@pytest.mark.parametrize(("dtype", "tf32"), PRODUCTS, ids=["fp32", "bf16", "fp16", "tf32"])
@pytest.mark.parametrize("op", FAMILY)
def test_every_block_and_its_shared_memory(op, dtype, tf32, monkeypatch):
    """Right in each block size, at the fewest wavefronts of shared memory that its accesses allow: no bank conflict."""
    monkeypatch.setattr(card, "tf32_allowed", lambda x: tf32)
    limit = 1e-3 if tf32 else 4 * torch.finfo(dtype).eps
    for sizes, threads in ((LARGE, 256), (SMALL, 128), (NARROW, 128)):
        with testing.emulate("cuda") as record:
            record.configure(counting=True)  # in the natural order: the lanes of a phase are neighbours
            got, want = product(op, dtype, *sizes[op])
        assert distance(got, want) < limit
        main = record.launches[0]
        assert main.threads == threads and main.shared_ideal > 0
        assert main.shared_wavefronts == main.shared_ideal, main
        assert record.sector_efficiency(at_least=4096) >= 0.9, record.traffic
    if tf32:
        assert distance(got, want) > 1e-5  # it did round


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_operands_come_in_16_bytes(dtype):
    """Each operand is asked for once for every block that needs it: whole chunks, no more."""
    with testing.emulate("cuda") as record:
        record.configure(counting=True)
        product("conv2d", dtype, 16, 64, 8, 1, kernel=1)
    size = torch.tensor([], dtype=dtype).element_size()
    asked = {t.bytes: t.requested for t in record.traffic}
    assert asked == {64 * 16 * size: 64 * 16 * size, 64 * 64 * size: 64 * 64 * size}  # x and weight are of one size


# ---- what is not served ----------------------------------------------------------------------------------------------


def test_cases_not_served_are_declined_with_a_reason():
    x, w = torch.randn(1, 3, 8, 8), torch.randn(4, 3, 3, 3)
    declines = OPS["conv2d"].backends["cuda"].declines
    rest = [1, 1], [0, 0], [1, 1], 1, "identity", 0.0
    assert "got torch.float64" in declines(x.double(), w.double(), None, *rest)
    assert "one dtype" in declines(x, w.half(), None, *rest)
    assert declines(x[:0], w, None, *rest) == "an empty tensor"
    assert "below 2^30" in declines(torch.empty(1, 1, 1, 1).expand(1, 1, 2**15, 2**15), w[:1, :1], None, *rest)
    huge = torch.empty(1, 1, 1, 1).expand(1, 1, 2**14, 2**14)
    transposed = OPS["conv_transpose2d"].backends["cuda"].declines
    assert "below 2^30" in transposed(huge, w[:1, :1], None, [2, 2], [0, 0], [0, 0], 1, [1, 1], "identity", 0.0)
    weight = OPS["conv2d_weight"].backends["cuda"].declines
    assert "one dtype" in weight(x, x.half(), [1, 1], [1, 1], [0, 0], [1, 1], 1, False)
    wide = torch.empty(1, 1, 1, 1).expand(1, 2**15, 1, 1)
    assert "weights below 2^30" in weight(wide, wide, [1, 1], [1, 1], [0, 0], [1, 1], 1, False)


# ---- a whole step ----------------------------------------------------------------------------------------------------


def networks():
    torch.manual_seed(3)
    g = nn.Sequential(
        nn.ConvTranspose2d(10, 16, 4, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.ConvTranspose2d(16, 3, 4, 2, 1),
        nn.Tanh(),
    )
    d = nn.Sequential(
        nn.Conv2d(3, 8, 4, 2, 1),
        nn.LeakyReLU(0.2),
        nn.Conv2d(8, 16, 3, 1, 1, bias=False),
        nn.BatchNorm2d(16),
        nn.LeakyReLU(0.2),
        nn.Conv2d(16, 1, 4),
        nn.Flatten(0),
    )
    return fastgan.convert(g, prove=False), fastgan.convert(d, prove=False)


def trained(context):
    """Parameters and metrics after two steps of a small DCGAN within a context."""
    g, d = networks()
    optimizers = [torch.optim.Adam(m.parameters(), 1e-3, betas=(0.5, 0.999)) for m in (g, d)]
    step = fastgan.GANStep(g, d, latent=(10, 1, 1), g_optimizer=optimizers[0], d_optimizer=optimizers[1])
    rng = torch.Generator().manual_seed(1)
    with context as record:
        for _ in range(2):
            real, z = torch.rand(4, 3, 8, 8, generator=rng) * 2 - 1, torch.randn(4, 10, 1, 1, generator=rng)
            metrics = step(real, z=z)
        values = {name: float(metrics[name]) for name in ("d_loss", "g_loss")}
    return values, copy.deepcopy([*g.parameters(), *d.parameters()]), record


def test_a_dcgan_step_equals_the_reference():
    ran = set()
    with watching(lambda op, name, why: ran.add((op.name, name))):
        values, parameters, record = trained(testing.emulate("cuda"))
    assert {(op, "cuda") for op in FAMILY} == {(op, name) for op, name in ran if op in FAMILY}
    want_values, want, _ = trained(fastgan.backend("reference"))
    assert values == pytest.approx(want_values, rel=1e-4)
    # Adam's first steps are lr times a sign: where a gradient is rounding noise, 2 lr = 2e-3 would be the difference
    for got, expected in zip(parameters, want, strict=True):
        assert distance(got, expected) < 1e-2
    assert len(record.launches) > 20


def test_a_penalty_reaches_every_parameter():
    """R1 of a convolutional discriminator: the double backward is made of the same three kernels."""
    d = fastgan.convert(
        nn.Sequential(nn.Conv2d(3, 8, 4, 2, 1), nn.LeakyReLU(0.2), nn.Conv2d(8, 1, 4), nn.Flatten(0)), prove=False
    )
    penalty = lambda real: functional.gradient_penalty(d, real, kind="r1", weight=2.0)
    real = torch.randn(2, 3, 8, 8)
    with testing.emulate("cuda"):
        got = torch.autograd.grad(penalty(real), [p for p in d.parameters() if p.dim() > 1])
    with fastgan.backend("reference"):
        want = torch.autograd.grad(penalty(real), [p for p in d.parameters() if p.dim() > 1])
    assert all(distance(a, b) < 1e-5 for a, b in zip(got, want, strict=True))


def test_sliced_and_misaligned_inputs():
    """A view that starts off a 16-byte boundary goes value by value; the result is the same."""
    memory = torch.randn(2 * 8 * 6 * 6 + 1)
    x = memory[1:].as_strided((2, 8, 6, 6), (288, 1, 48, 8))
    w = torch.randn(8, 16, 3, 3)[:, ::2]
    with testing.emulate("cuda"):
        got = orders(lambda x, w: functional.conv2d(x, w, padding=1), leaves((x, w), torch.float32, LAYOUTS[1]), 1)
        y = functional.conv2d(x, w, padding=1)
    want = orders(lambda x, w: F.conv2d(x, w, padding=1), leaves((x, w), torch.float64, LAYOUTS[0]), 1)
    assert all(distance(a, b) < 1e-6 for a, b in zip(got, want, strict=True))
    assert distance(y, want[0]) < 1e-6
