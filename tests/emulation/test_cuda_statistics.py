"""Batch statistics from the CUDA convolutions' epilogues, under the SIMT emulator: numbers, gradients, traffic, blocks.

Planted faults and sanitizers: test_cuda_conv_faults.py.
"""

import pytest
import statistics_cases
import torch
import torch.nn.functional as F
from checks import LAYOUTS, against_plain, distance
from statistics_cases import arguments, channels_of
from torch import nn

import fastgan
from fastgan import functional, testing
from fastgan._op import OPS
from fastgan.choice import watching
from fastgan.ops import conv2d as card

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ROUNDING = 2e-6  # of float32 sums over a few hundred rows, and of __fdividef

CASES = statistics_cases.CASES | {  # larger where blocks are: more than one of them
    "k4s2p1": ("conv2d", (4, 3, 16, 14), (20, 3, 4, 4), True, [2, 2], [1, 1], [1, 1], 1),
    "a split reduction": ("conv2d", (4, 64, 9, 5), (40, 64, 3, 3), True, [1, 1], [1, 1], [1, 1], 1),
    "k4s2p1, by phase": ("conv_transpose2d", (4, 3, 7, 5), (3, 18, 4, 4), True, [2, 2], [1, 1], [0, 0], 1, [1, 1]),
    "1x1 to 4x4": ("conv_transpose2d", (4, 7, 1, 1), (7, 20, 4, 4), True, [1, 1], [0, 0], [0, 0], 1, [1, 1]),
}


def of_y(y, groups):
    """(mean, var) of y itself, in float64."""
    return card.moments(y.double(), groups)


def check(got, groups, want, dtype):
    """y is what the reference gives, and its statistics are its own."""
    y, *statistics = got
    assert distance(y, want) < 4 * torch.finfo(dtype).eps
    for value, exact in zip(statistics, of_y(y, groups), strict=True):
        assert value.dtype == torch.float32 and value.shape == (groups, y.shape[1])
        assert distance(value, exact) < ROUNDING


@pytest.fixture
def always(monkeypatch):
    """Take the fused route however small a layer is, as on a GPU a large one does."""
    monkeypatch.setattr(card, "LEAST_PIXELS", 0)


def kernels(record):
    """The launches' kernels, without their template arguments."""
    return [launch.kernel.partition("<")[0] for launch in record.launches]


# ---- the ops ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("name", CASES)
def test_statistics_are_those_of_y_as_stored(name, groups):
    case = CASES[name]
    op = OPS[f"{case[0]}_statistics"]
    for seed, dtype in enumerate(DTYPES):
        args = *arguments(case, dtype, LAYOUTS[seed % 2]), groups
        with testing.emulate("cuda") as record:
            record.configure(seed=seed)
            got = op.backends["cuda"].run(*args)
        check(got, groups, op.reference(*(a.double() if isinstance(a, torch.Tensor) else a for a in args))[0], dtype)
        stages = ["conv_reduce_moments_kernel"] if "split" in name else []
        assert kernels(record) == [f"{case[0]}_kernel", *stages, "conv_statistics_kernel"]


# op -> channels of x and y, side, samples for each size of a block; a group of samples is half of them
BLOCKS = {
    ("conv2d", "large"): (32, 136, 18, 2),
    ("conv_transpose2d", "large"): (136, 32, 18, 2),
    ("conv2d", "small"): (16, 72, 10, 2),
    ("conv_transpose2d", "small"): (72, 16, 10, 2),
    ("conv2d", "narrow"): (16, 8, 13, 2),
    ("conv_transpose2d", "narrow"): (8, 16, 13, 2),
}
PRODUCTS = [*((dtype, False) for dtype in DTYPES), (torch.float32, True)]


@pytest.mark.parametrize(("dtype", "tf32"), PRODUCTS, ids=["fp32", "bf16", "fp16", "tf32"])
@pytest.mark.parametrize(("name", "block"), BLOCKS, ids=lambda word: word)
def test_every_block(name, block, dtype, tf32, monkeypatch):
    """Bit for bit the convolution's own y where the blocks are the same, and its statistics."""
    monkeypatch.setattr(card, "tf32_allowed", lambda x: tf32)
    channels, out, side, n = BLOCKS[name, block]
    given, made = (channels, out) if name == "conv2d" else (out, channels)
    x, weight = torch.randn(n, given, side, side), torch.randn(out, channels, 3, 3) / (9 * given) ** 0.5
    x, weight = (t.to(dtype).contiguous(memory_format=torch.channels_last) for t in (x, weight))
    geometry = [[1, 1], [1, 1], [1, 1], 1] if name == "conv2d" else [[1, 1], [1, 1], [0, 0], 1, [1, 1]]
    bias = torch.randn(made).to(dtype)
    with testing.emulate("cuda") as record:
        got = OPS[f"{name}_statistics"].backends["cuda"].run(x, weight, bias, *geometry, 2)
        main = record.launches[0]
        plain = OPS[name].backends["cuda"].run(x, weight, bias, *geometry, "identity", 0.0)
    assert main.threads == (256 if block == "large" else 128) and "_statistics" in main.function
    assert torch.equal(got[0], plain)
    for value, exact in zip(got[1:], of_y(got[0], 2), strict=True):
        assert distance(value, exact) < ROUNDING


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["k4s2p1", "a split reduction", "k4s2p1, by phase"])
def test_thread_orders_change_no_bit(name, dtype):
    case, results = CASES[name], []
    args = *arguments(case, dtype), 2
    for seed in (0, 1, 77):
        with testing.emulate("cuda") as record:
            record.configure(seed=seed)
            results.append(OPS[f"{case[0]}_statistics"].backends["cuda"].run(*args))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, results[0], strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["k4s2p1", "a split reduction", "k4s2p1, by phase"])
def test_a_large_mean_keeps_its_variance(name, dtype):
    """y = 1000 and noise of about 1: E[y^2] - E[y]^2 would be off by a tenth of the variance."""
    case = CASES[name]
    x, weight, _, *geometry = arguments(case, dtype, mean=0.0)
    weight = weight / weight[0].numel() ** 0.5
    bias = torch.full((channels_of(case),), 1000.0).to(dtype)
    with testing.emulate("cuda"):
        y, mean, var = OPS[f"{case[0]}_statistics"].backends["cuda"].run(x, weight, bias, *geometry, 2)
    exact_mean, exact_var = of_y(y, 2)
    assert distance(mean, exact_mean) < 1e-6
    scale = exact_var.clamp_min(0.1)  # in 16 bits few values are left: some channels hold one only
    assert ((var.double() - exact_var) / scale).abs().max() < 1e-4


@pytest.mark.parametrize("kind", [(DTYPES[0], LAYOUTS[1]), (DTYPES[1], LAYOUTS[0])], ids=str)
@pytest.mark.parametrize("name", ["k4s2p1", "k4s2p1, by phase"])
def test_derivatives_are_the_convolutions_own(name, kind):
    case, dtype = CASES[name], torch.float64
    _, _, _, *geometry = arguments(case)
    plain = F.conv2d if case[0] == "conv2d" else F.conv_transpose2d
    inputs = [torch.randn(shape, dtype=dtype) for shape in (*case[1:3], (channels_of(case),))]
    with testing.emulate("cuda"):
        against_plain(
            lambda x, w, b: OPS[f"{case[0]}_statistics"](x, w, b, *geometry, 2)[0],
            lambda x, w, b: plain(x, w, b, *geometry),
            inputs,
            *kind,
            "cuda",
        )


@pytest.mark.parametrize("layout", LAYOUTS, ids=["nchw", "nhwc"])
@pytest.mark.parametrize("name", ["conv2d_statistics", "conv_transpose2d_statistics"])
def test_outputs_match_the_fake_and_the_proof_of_first_use_passes(name, layout):
    from fastgan.choice import proof_error

    op = OPS[name]
    for dtype in DTYPES:
        args = [a.to(dtype) if isinstance(a, torch.Tensor) else a for a in op.example()]
        args[:2] = [a.contiguous(memory_format=layout) for a in args[:2]]
        with testing.emulate("cuda"):
            assert proof_error(op, "cuda", op.drawn(tuple(args))) == ""
            got = op.backends["cuda"].run(*args)
        promised = op.overload(*(a.to("meta") if isinstance(a, torch.Tensor) else a for a in args))
        for g, p in zip(got, promised, strict=True):
            assert (g.shape, g.stride(), g.dtype) == (p.shape, p.stride(), p.dtype)


def test_what_is_declined_says_why():
    for name in ("conv2d_statistics", "conv_transpose2d_statistics"):
        x, weight, _, *rest = OPS[name].example()
        declines = OPS[name].backends["cuda"].declines
        assert declines(x, weight, None, *rest) == ""
        assert "got torch.float64" in declines(x.double(), weight.double(), None, *rest)
        assert declines(x[:0], weight, None, *rest) == "an empty tensor"
        assert "divide the batch, got 3 and 4" in declines(x, weight, None, *rest[:-1], 3)
        with testing.emulate("cuda") as record, pytest.raises(ValueError, match=f"^{name}: stat_groups must divide N"):
            module, zeros = record.module, (0,) * 4
            conv = module.Conv(4, 3, 8, 8, 5, 8, 8, 3, 3, 1, 1, 1, 1, 1, 1, 1)
            getattr(module, name)(conv, 0, 0, 0, 0, zeros, 0, 0, 0, 0.0, 3, 0, 0, 0, 0)


# ---- blocks ----------------------------------------------------------------------------------------------------------

FUSED = {
    "conv2d": (functional.conv2d_bn_act, F.conv2d, (4, 3, 8, 8), (6, 3, 4, 4)),
    "conv_transpose2d": (functional.conv_transpose2d_bn_act, F.conv_transpose2d, (4, 3, 4, 3), (3, 6, 4, 4)),
}


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("kind", [(DTYPES[0], LAYOUTS[1]), (DTYPES[1], LAYOUTS[0])], ids=str)
@pytest.mark.parametrize("name", FUSED)
def test_fused_blocks_equal_plain_torch_to_second_order(name, kind, groups, always):
    fused, conv, x, weight = FUSED[name]
    ran, d, geometry = set(), torch.float64, {"stride": 2, "padding": 1}

    def ours(x, w, b, gamma, beta):
        return fused(x, w, b, bn_weight=gamma, bn_bias=beta, training=True, stat_groups=groups, **geometry)

    def plain(x, w, b, gamma, beta):
        y = conv(x, w, b, **geometry)
        return F.leaky_relu(torch.cat([F.batch_norm(p, None, None, gamma, beta, True) for p in y.chunk(groups)]), 0.2)

    # no bias before a norm: its gradient is 0, and noise against noise says nothing
    inputs = [torch.randn(x, dtype=d), torch.randn(weight, dtype=d) * 0.3, None, torch.rand(6, dtype=d) + 0.5]
    inputs.append(torch.randn(6, dtype=d))
    with testing.emulate("cuda"), watching(lambda op, backend, why: ran.add((op.name, backend))):
        against_plain(ours, plain, inputs, *kind, "cuda")
    assert {(f"{name}_statistics", "cuda"), ("bn_act", "cuda"), ("bn_act_double_backward", "cuda")} <= ran


def test_a_large_layer_takes_the_route_by_itself():
    """Above LEAST_PIXELS: the convolution, the merge, the elements; below, the norm makes its own."""
    found = {}
    for side in (22, 23):  # 484 and 529 pixels
        model = fastgan.nn.Conv2dBNAct(8, 24, 1, bias=False)
        x = torch.randn(1, 8, side, side).contiguous(memory_format=torch.channels_last)
        with testing.emulate("cuda") as record:
            model(x)
        found[side] = kernels(record)
    assert found[22][0] == "conv2d_kernel" and "conv_statistics_kernel" not in found[22]
    assert found[23] == ["conv2d_kernel", "conv_statistics_kernel", "apply_columns_kernel"]


@pytest.mark.parametrize("groups", [1, 2])
def test_a_converted_models_convolutions_leave_their_norms_the_statistics(groups, always):
    """Outputs, gradients and running statistics as on the reference's route."""
    x = torch.randn(4, 2, 8, 6)

    def run():
        torch.manual_seed(5)
        model = fastgan.convert(
            nn.Sequential(
                nn.Conv2d(2, 6, 4, 2, 1, bias=False),
                nn.BatchNorm2d(6),
                nn.LeakyReLU(0.2),
                nn.ConvTranspose2d(6, 4, 4, 2, 1),
                nn.BatchNorm2d(4),
                nn.ReLU(),
                nn.Conv2d(4, 3, 3),
                nn.BatchNorm2d(3),
            )
        )
        with fastgan.nn.stat_groups(model, groups):
            y = model(x)
        gradients = torch.autograd.grad(y.square().mean() + y[0].sum(), list(model.parameters()))
        return [y.detach(), *gradients, *model.state_dict().values()]

    with fastgan.backend("reference"):
        want = run()
    with testing.emulate("cuda") as record:
        got = run()
    assert kernels(record).count("conv_statistics_kernel") == 3
    assert "bn_act_statistics_kernel" not in kernels(record)
    scale = max(w.double().norm() for w in want)
    for g, w in zip(got, want, strict=True):
        assert (g.double() - w.double()).norm() <= 1e-4 * w.double().norm() + 1e-6 * scale


# ---- traffic ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["conv2d", "conv_transpose2d"])
def test_the_epilogue_moves_what_the_card_says(name):
    """y is written once and never read; the parts' moments keep the whole within a tenth of the card's bytes."""
    nhwc = lambda *shape: torch.randn(shape).bfloat16().contiguous(memory_format=torch.channels_last)
    x, one, zero = nhwc(8, 64, 16, 16), [1, 1], [0, 0]
    if name == "conv2d":
        weight, rest = nhwc(128, 64, 1, 1), (one, zero, one, 1)
        cost = card.cost_statistics(x, weight, one, zero, one, 2)
    else:
        weight, rest = nhwc(64, 128, 1, 1), (one, zero, zero, 1, one)
        cost = fastgan.ops.conv_transpose2d.cost_statistics(x, weight, *rest, 2)
    with testing.emulate("cuda") as record:
        record.configure(counting=True)
        y, mean, var = OPS[f"{name}_statistics"].backends["cuda"].run(x, weight, None, *rest, 2)
    assert record.launches[0].threads == 256
    size = {"x": x.nbytes, "weight": weight.nbytes, "y": y.nbytes}
    requested = {t.bytes: t.requested for t in record.traffic}
    assert requested[size["y"]] == size["y"]
    small = sum(t.requested for t in record.traffic if t.bytes not in size.values())  # parts, mean and var
    moved = small + sum(min(requested[n], n) for n in size.values())
    assert mean.nbytes + var.nbytes < small and moved <= 1.1 * cost["bytes"], (moved, cost)
    assert record.sector_efficiency(at_least=4096) >= 0.9, record.traffic
