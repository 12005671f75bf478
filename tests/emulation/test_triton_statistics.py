"""Batch statistics from the convolutions' epilogues, under the checker: numbers, gradients, traffic, planted faults."""

import copy
import importlib
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", "3.8", reason="triton 3.8 or newer is needed to emulate Triton kernels")
import torch.nn.functional as F
from checks import LAYOUTS, against_plain, distance
from statistics_cases import CASES, arguments, channels_of
from torch import nn

import fastgan
from fastgan import functional, testing
from fastgan._op import OPS
from fastgan.choice import watching
from fastgan.kernels.configs import APART, Config
from fastgan.ops import conv2d as card
from fastgan.penalties import linearised

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
CONVOLUTIONS = ["conv2d", "conv_transpose2d"]
STATISTICS = [f"{name}_statistics" for name in CONVOLUTIONS]
WHOLE, SPLIT = Config(64, 16, 16, 4, 2), Config(64, 16, 16, 4, 2, 2)
ROUNDING = 4e-6  # of float32 sums over a few hundred rows, one after the other as the interpreter adds; 1.4e-6 was seen


@pytest.fixture
def force(monkeypatch):
    """Run every convolution with one configuration; those without statistics have no APART."""

    def use(config):
        def tuned(op, x, product, case, run, also=()):
            return run(config if also or config != APART else WHOLE)

        for name in CONVOLUTIONS:
            monkeypatch.setattr(importlib.import_module(f"fastgan.kernels.{name}"), "tuned", tuned)

    return use


@pytest.fixture
def always(monkeypatch):
    """Take the fused route however small a layer is, as on a GPU a large one does."""
    monkeypatch.setattr(card, "LEAST_PIXELS", 0)


def of_y(y, groups):
    """(mean, var) of y itself, in float64."""
    return card.moments(y.double(), groups)


# ---- the ops ---------------------------------------------------------------------------------------------------------


WAYS = {"whole": WHOLE, "split": SPLIT, "apart": APART}
CUTS = [(name, 2, "whole") for name in CASES] + [(name, 1, "split") for name in CASES]
CUTS += [(name, g, how) for name in ("k4s2p1", "k4s2p1, by phase") for g, how in ((4, "whole"), (2, "apart"))]


@pytest.mark.parametrize(("name", "groups", "how"), CUTS)
def test_statistics_are_those_of_y_as_stored(name, groups, how, force):
    case, config = CASES[name], WAYS[how]
    op = OPS[f"{case[0]}_statistics"]
    force(config)
    for dtype in (torch.float32, torch.bfloat16) if how == "whole" else (torch.bfloat16,):
        args = *arguments(case, dtype), groups
        with testing.emulate("triton") as record:
            y, mean, var = op(*args)
        want = op.reference(*args)
        assert distance(y, want[0]) < (1e-2 if dtype == torch.bfloat16 else 1e-6)
        assert mean.shape == var.shape == (groups, y.shape[1]) and mean.dtype == var.dtype == torch.float32
        for got, exact in zip((mean, var), of_y(y, groups), strict=True):
            assert distance(got, exact) < ROUNDING
        merging = {"whole": [], "split": ["merge_splits_moments_kernel"], "apart": ["moments_kernel"]}
        last = "merge_moments_kernel" if config == APART else "finish_moments_kernel"
        assert record.kernels == [f"{case[0]}_kernel", *merging[how], last]


@pytest.mark.parametrize("layout", LAYOUTS, ids=["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", STATISTICS)
def test_outputs_match_the_fake_and_the_proof_of_first_use_passes(name, dtype, layout):
    from fastgan.choice import proof_error

    op = OPS[name]
    args = [a.to(dtype) if isinstance(a, torch.Tensor) else a for a in op.example()]
    args[:2] = [a.contiguous(memory_format=layout) for a in args[:2]]
    with testing.emulate("triton") as record:
        assert proof_error(op, "triton", op.drawn(tuple(args))) == ""  # into memory full of NaN
        got = op.run(*args)
    promised = op.overload(*(a.to("meta") if isinstance(a, torch.Tensor) else a for a in args))
    assert record.launches
    for g, p in zip(got, promised, strict=True):
        assert (g.shape, g.stride(), g.dtype) == (p.shape, p.stride(), p.dtype)


@pytest.mark.parametrize("config", [WHOLE, SPLIT], ids=["whole", "split"])
@pytest.mark.parametrize("name", STATISTICS)
def test_results_do_not_depend_on_the_order_of_programs(name, config, force):
    force(config)
    checker, args, results = testing._emulator("triton"), OPS[name].example(), []
    for seed in range(2):
        with checker.emulation(seed):
            results.append(OPS[name].backends["triton"].run(*args))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("name", ["k4s2p1", "k4s2p1, by phase"])
def test_a_large_mean_keeps_its_variance(name, force):
    """y = 3e4 and noise: E[y^2] - E[y]^2 would lose every digit; the moments of tiles lose what a float32 mean does."""
    case = CASES[name]
    for config in (WHOLE, SPLIT):
        force(config)
        x, weight, _, *geometry = arguments(case, mean=0.0)
        bias = torch.full((channels_of(case),), 3e4)
        with testing.emulate("triton"):
            y, mean, var = OPS[f"{case[0]}_statistics"](x, weight, bias, *geometry, 2)
        for got, exact in zip((mean, var), of_y(y, 2), strict=True):
            assert distance(got, exact) < 1e-3


def test_many_parts_are_merged_block_by_block(monkeypatch, force):
    gemm = importlib.import_module("fastgan.kernels.implicit_gemm")
    monkeypatch.setattr(gemm, "FINISHED", 16)  # two parts of eight channels at a time
    force(Config(16, 16, 16, 2, 2))
    for name in ("k4s2p1", "tiles without pixels", "1x1 to 4x4"):
        case = CASES[name]
        with testing.emulate("triton"):
            y, mean, var = OPS[f"{case[0]}_statistics"](*arguments(case), 2)
        for got, exact in zip((mean, var), of_y(y, 2), strict=True):
            assert distance(got, exact) < ROUNDING


@pytest.mark.parametrize("kind", [(DTYPES[0], LAYOUTS[1]), (DTYPES[1], LAYOUTS[0])], ids=str)
@pytest.mark.parametrize("name", ["k4s2p1", "k4s2p1, by phase"])
def test_derivatives_are_the_convolutions_own(name, kind, force):
    case, dtype = CASES[name], torch.float64
    force(WHOLE)
    _, _, _, *geometry = arguments(case)
    plain = F.conv2d if case[0] == "conv2d" else F.conv_transpose2d
    inputs = [torch.randn(shape, dtype=dtype) for shape in (*case[1:3], (channels_of(case),))]
    with testing.emulate("triton"):
        against_plain(
            lambda x, w, b: OPS[f"{case[0]}_statistics"](x, w, b, *geometry, 2)[0],
            lambda x, w, b: plain(x, w, b, *geometry),
            inputs,
            *kind,
            "triton",
        )


def test_what_is_declined_says_why():
    for name in STATISTICS:
        x, weight, _, *rest = OPS[name].example()
        declines = OPS[name].backends["triton"].declines
        assert "float32, bfloat16" in declines(x.double(), weight.double(), None, *rest)
        assert "empty" in declines(x[:0], weight, None, *rest)
        assert "divide the batch" in declines(x, weight, None, *rest[:-1], 3)
        huge = torch.empty((2**10, 2**9, 2**8, 2**8), device="meta"), torch.empty((2**9, 2**9, 1, 1), device="meta")
        one, zero = [1, 1], [0, 0]
        geometry = (one, zero, one, 1) if name == "conv2d_statistics" else (one, zero, zero, 1, one)
        assert "2^33" in declines(*huge, None, *geometry, 2)


# ---- the norm that takes them ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS, ids=["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("groups", [1, 2])
def test_the_norm_with_given_statistics_reads_its_input_once(groups, dtype, layout):
    x = (torch.randn(4, 32, 12, 12) * 2 + 3).to(dtype).contiguous(memory_format=layout)
    weight, bias = torch.rand(32) + 0.5, torch.randn(32)
    mean, var = card.moments(x, groups)
    with testing.emulate("triton") as record:
        y = functional.bn_act(
            x, None, None, weight, bias, training=True, stat_groups=groups, batch_statistics=(mean, var)
        )
    (launch,) = record.launches
    assert launch.kernel == "norm_act_kernel"
    moved = launch.unique_loaded + launch.unique_stored
    cost = fastgan.ops.bn_act.cost(x, True, mean)["bytes"]
    assert cost == 2 * x.numel() * x.element_size() and abs(moved - cost) <= 0.1 * cost
    want = torch.cat(
        [F.batch_norm(p.double(), None, None, weight.double(), bias.double(), True) for p in x.chunk(groups)]
    )
    assert distance(y, F.leaky_relu(want, 0.2)) < (1e-6 if dtype == torch.float32 else 1e-2)


# ---- blocks ----------------------------------------------------------------------------------------------------------

BLOCKS = {
    "conv2d": (functional.conv2d_bn_act, F.conv2d, (4, 3, 8, 8), (6, 3, 4, 4), dict(stride=2, padding=1)),
    "conv_transpose2d": (
        functional.conv_transpose2d_bn_act,
        F.conv_transpose2d,
        (4, 3, 4, 3),
        (3, 6, 4, 4),
        dict(stride=2, padding=1),
    ),
}


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("kind", [(DTYPES[0], LAYOUTS[1]), (DTYPES[1], LAYOUTS[0])], ids=str)
@pytest.mark.parametrize("name", BLOCKS)
def test_fused_blocks_equal_plain_torch_to_second_order(name, kind, groups, always):
    fused, conv, x, weight, options = BLOCKS[name]
    ran, d = set(), torch.float64

    def ours(x, w, b, gamma, beta):
        return fused(x, w, b, bn_weight=gamma, bn_bias=beta, training=True, stat_groups=groups, **options)

    def plain(x, w, b, gamma, beta):
        y = conv(x, w, b, **options)
        return F.leaky_relu(torch.cat([F.batch_norm(p, None, None, gamma, beta, True) for p in y.chunk(groups)]), 0.2)

    inputs = [torch.randn(x, dtype=d), torch.randn(weight, dtype=d) * 0.3, None, torch.rand(6, dtype=d) + 0.5]
    inputs.append(
        torch.randn(6, dtype=d)
    )  # no bias before a norm: its gradient is 0, and noise against noise says nothing
    with testing.emulate("triton"), watching(lambda op, backend, why: ran.add((op.name, backend))):
        against_plain(ours, plain, inputs, *kind, "triton")
    assert {(f"{name}_statistics", "triton"), ("bn_act", "triton"), ("bn_act_double_backward", "triton")} <= ran


def blocks(groups=1):
    torch.manual_seed(3)
    return nn.Sequential(
        fastgan.nn.Conv2dBNAct(2, 6, 4, 2, 1, bias=False, stat_groups=groups),
        fastgan.nn.ConvTranspose2dBNAct(6, 4, 4, 2, 1, activation="relu", momentum=None, stat_groups=groups),
        fastgan.nn.Conv2dBNAct(4, 5, 3, padding=1, padding_mode="reflect", track_running_stats=False),
    )


@pytest.mark.parametrize("groups", [1, 2])
def test_modules_and_their_running_statistics(groups, always):
    """Two training passes and one in eval mode: outputs, gradients and buffers as on the reference's route."""
    x = [torch.randn(4, 2, 8, 6) for _ in range(3)]

    def run():
        model, found = blocks(groups), []
        for step in x:
            model.train(step is not x[-1])
            y = model(step)
            found += [y.detach(), *torch.autograd.grad(y.square().sum(), list(model.parameters()))]
        return [*found, *model.state_dict().values()]

    with fastgan.backend("reference"):
        want = run()
    ran = []
    with testing.emulate("triton"), watching(lambda op, backend, why: ran.append((op.name, backend))):
        got = run()
    assert ran.count(("conv2d_statistics", "triton")) >= 2 and ran.count(("conv_transpose2d_statistics", "triton")) >= 1
    scale = max(w.double().norm() for w in want)
    for g, w in zip(got, want, strict=True):
        assert (g.double() - w.double()).norm() <= 1e-4 * w.double().norm() + 1e-6 * scale


def test_one_value_per_channel_and_odd_groups_are_refused_as_ever(always):
    with testing.emulate("triton"):
        with pytest.raises(ValueError, match="more than 1 value per channel"):
            fastgan.nn.Conv2dBNAct(2, 3, 4)(torch.randn(1, 2, 4, 4))
        with pytest.raises(ValueError, match="stat_groups must divide"):
            fastgan.nn.Conv2dBNAct(2, 3, 3, stat_groups=2)(torch.randn(3, 2, 5, 5))
        with pytest.raises(ValueError, match="expected 4D input"):
            fastgan.nn.Conv2dBNAct(2, 3, 3)(torch.randn(2, 5, 5))


def test_small_groups_stay_in_the_norms_registers():
    """Up to LEAST_PIXELS bn_act reads once by itself, in one launch; above, the convolution's epilogue does it."""
    model, kernels = fastgan.nn.Conv2dBNAct(2, 3, 1, bias=False), {}
    for side in (22, 23):  # 484 and 529 pixels
        with testing.emulate("triton") as record:
            model(torch.randn(1, 2, side, side))
        kernels[side] = record.kernels
    assert kernels[22] == ["conv2d_kernel", "resident_kernel"]
    assert kernels[23] == ["conv2d_kernel", "finish_moments_kernel", "norm_act_kernel"]


def test_autocast_lowers_the_convolution_and_keeps_the_norms_parameters(always):
    model = fastgan.nn.Conv2dBNAct(2, 6, 3)
    x = torch.randn(4, 2, 8, 6)
    with torch.autocast("cpu", torch.bfloat16):
        with fastgan.backend("reference"):
            want = model(x)
        with testing.emulate("triton") as record:
            got = model(x)
            y, (mean, var) = functional.conv2d_statistics(x, model.conv.weight)
    assert "finish_moments_kernel" in record.kernels and distance(got, want) < 1e-2
    assert (got.dtype, y.dtype, mean.dtype, var.dtype) == (torch.bfloat16,) * 2 + (torch.float32,) * 2
    assert not mean.requires_grad and not var.requires_grad


def critic():
    torch.manual_seed(4)
    return nn.Sequential(fastgan.nn.Conv2dBNAct(2, 6, 4, 2, 1, bias=False), nn.Conv2d(6, 1, 4), nn.Flatten(0))


def test_a_penalty_through_a_fused_block_is_exact(always):
    model, x = critic(), torch.randn(4, 2, 8, 8)
    parameters = list(model.parameters())

    def gradients():
        value = functional.gradient_penalty(model, x, kind="r1", weight=1.0)
        return torch.autograd.grad(value, parameters, allow_unused=True)

    with fastgan.backend("reference"):
        want = gradients()
    with testing.emulate("triton") as record:
        got = gradients()
        testing.assert_penalty_complete(model, x)
        assert "batch's own statistics" in linearised.route(model, x)
    assert "finish_moments_kernel" in record.kernels
    for g, w in zip(got, want, strict=True):
        assert (g is None) == (w is None) and (w is None or distance(g, w) < 1e-4 or w.norm() < 1e-6)


def test_eval_mode_penalties_still_go_by_forward_ops(always):
    model = critic().eval()
    with testing.emulate("triton"):
        assert linearised.route(model, torch.randn(4, 2, 8, 8)) == "forward ops (4F)"


@pytest.mark.filterwarnings("ignore:.*isinstance.*LeafSpec:FutureWarning")
@pytest.mark.parametrize("make", [lambda: blocks()[:2], lambda: converted()], ids=["blocks", "converted"])
def test_fused_blocks_compile_whole(make, always):
    model, x = make(), torch.randn(4, 2, 8, 6)
    torch._dynamo.reset()
    with testing.emulate("triton") as record:
        eager = model(x)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")(x)
    fused = sum(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    assert record.kernels.count("finish_moments_kernel") == 2 * fused and distance(compiled, eager) < 1e-6


# ---- converted models ------------------------------------------------------------------------------------------------


def converted():
    torch.manual_seed(5)
    model = nn.Sequential(
        nn.Conv2d(2, 6, 4, 2, 1, bias=False),
        nn.BatchNorm2d(6),
        nn.LeakyReLU(0.2),
        nn.ConvTranspose2d(6, 4, 4, 2, 1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 3, 3),
        nn.BatchNorm2d(3),
    )
    return fastgan.convert(model)


def kernels_of(run):
    with testing.emulate("triton") as record:
        return run(), record.kernels


@pytest.mark.parametrize("groups", [1, 2])
def test_a_converted_models_convolutions_leave_their_norms_the_statistics(groups, always):
    x = torch.randn(4, 2, 8, 6)

    def run():
        model = converted()
        with fastgan.nn.stat_groups(model, groups):
            y = model(x)
        gradients = torch.autograd.grad(y.square().mean() + y[0].sum(), list(model.parameters()))
        return [y.detach(), *gradients, *model.state_dict().values()]

    with fastgan.backend("reference"):
        want = run()
    got, kernels = kernels_of(run)
    assert kernels.count("finish_moments_kernel") == kernels.count("norm_act_kernel") == 3
    assert "resident_kernel" not in kernels and "moments_kernel" not in kernels
    scale = max(w.double().norm() for w in want)
    for g, w in zip(got, want, strict=True):
        assert (g.double() - w.double()).norm() <= 1e-4 * w.double().norm() + 1e-6 * scale


def test_a_hook_between_them_and_eval_mode_need_no_statistics(always):
    x = torch.randn(4, 2, 8, 6)
    model = converted()[:3]
    fastgan.convert(model)
    model[1].register_forward_pre_hook(lambda m, args: (args[0] * 2,))
    _, kernels = kernels_of(lambda: model(x))
    assert "finish_moments_kernel" not in kernels
    _, kernels = kernels_of(lambda: converted().eval()(x))
    assert "finish_moments_kernel" not in kernels


def test_explain_names_the_fusion():
    model = converted()
    with testing.emulate("triton"):
        runs = [row.runs for row in fastgan.explain(model).rows]
    assert runs[0] == "fastgan.conv2d + statistics" and runs[1] == "fastgan.bn_act + leaky_relu"
    assert fastgan.explain(model).rows[0].runs == "fastgan.conv2d"


def test_a_converted_model_survives_copying(always):
    model, x = converted(), torch.randn(4, 2, 8, 6)
    _, kernels = kernels_of(lambda: copy.deepcopy(model)(x))
    assert kernels.count("finish_moments_kernel") == 3 and model[1].num_batches_tracked == 0


# ---- traffic ---------------------------------------------------------------------------------------------------------


def test_the_epilogue_moves_what_the_card_says(force):
    """y's statistics add nothing to the convolution's own bytes but the tiles' moments, within a tenth of the whole."""
    x, weight = (
        t.contiguous(memory_format=torch.channels_last) for t in (torch.randn(8, 64, 16, 16), torch.randn(64, 64, 3, 3))
    )
    one = [1, 1]
    force(Config(128, 64, 32, 8, 2))
    costs = {
        "conv2d_statistics": fastgan.ops.conv2d.cost_statistics(x, weight, one, one, one, 2),
        "conv_transpose2d_statistics": fastgan.ops.conv_transpose2d.cost_statistics(
            x, weight, one, one, [0, 0], 1, one, 2
        ),
    }
    for name, cost in costs.items():
        with testing.emulate("triton") as record:
            rest = (one, one, one, 1) if name == "conv2d_statistics" else (one, one, [0, 0], 1, one)
            OPS[name](x, weight, None, *rest, 2)
        assert len(record.launches) == 2
        moved = record.total("unique_loaded") + record.total("unique_stored")
        assert abs(moved - cost["bytes"]) <= 0.1 * cost["bytes"], (name, moved, cost)
        assert record.total("sectors") <= 1.1 * record.total("ideal_sectors")


# ---- planted faults --------------------------------------------------------------------------------------------------

# what: (file, what it says, what the fault makes of it, how the sum over taps and channels is cut)
FAULTS = {
    "a tile straddles two groups": ("conv2d", "inside = m < M\n", "inside = m < M * G\n", WHOLE),
    "groups begin at the first": ("conv2d", "m += part // tiles_m * M", "m += part // tiles_m * 0", WHOLE),
    "groups of an adjoint too": ("conv_transpose2d", "m += m_tile // tiles_m * M", "m += m_tile // tiles_m * 0", WHOLE),
    "lost moments": ("conv2d", "is_output, part, tiles_m * G, K,", "is_output, 0, tiles_m * G, K,", WHOLE),
    "a phase over another": (
        "conv_transpose2d",
        "(m_tile * phases_h + phase_h) * phases_w + phase_w",
        "(m_tile * phases_h + phase_w) * phases_w + phase_w",
        WHOLE,
    ),
    "rows outside counted": ("implicit_gemm", "n = tl.sum(inside.to", "n = tl.sum((inside | True).to", WHOLE),
    "rows outside summed": (
        "implicit_gemm",
        "d = tl.where(inside[:, None], v - mean[None, :], 0.0)",
        "d = v - mean[None, :]",
        WHOLE,
    ),
    "moments before rounding": (
        "implicit_gemm",
        "moments, rounded.to(tl.float32), inside, channel",
        "moments, acc, inside, channel",
        WHOLE,
    ),
    "every channel tile counts": ("conv2d", "(n_tile == 0) & (group == 0)", "(group == 0)", WHOLE),
    "nobody counts": ("conv_transpose2d", "(n_tile == 0) & (group == 0)", "(n_tile < 0) & (group == 0)", WHOLE),
    "squares over means": ("implicit_gemm", "tl.store(at + parts * columns,", "tl.store(at + 0 * columns,", WHOLE),
    "moments past the end": (
        "implicit_gemm",
        "moments + 2 * parts * columns + part",
        "moments + 2 * parts * columns + parts",
        WHOLE,
    ),
    "squares not moved to the common mean": ("implicit_gemm", "s += n[:, None] * d * d", "s += 0.0 * d", WHOLE),
    "the mean of means": ("implicit_gemm", "tl.sum(n[:, None] * m, 0)", "tl.sum(total / BLOCK_P * m, 0)", WHOLE),
    "unbiased": ("implicit_gemm", "squares / count,", "squares / (count - 1),", WHOLE),
    "the next group's parts": ("implicit_gemm", "row = g * rows + r", "row = (1 - g) * rows + r", WHOLE),
    "split rows of another group": ("implicit_gemm", "m += part // tiles_m * M", "m += part // tiles_m * 0", SPLIT),
    "split rows not counted": ("implicit_gemm", "part, parts, K, n_tile == 0", "part, parts, K, n_tile < 0", SPLIT),
    "split bias forgotten": ("implicit_gemm", "total += tl.load(bias + k,", "total += 0 * tl.load(bias + k,", SPLIT),
}


def faulty(folder, file, right, wrong, config):
    """Launchers of copies of the real kernels, one of them with a fault."""
    modules = {}
    for name in ("implicit_gemm", *CONVOLUTIONS):
        text = Path(importlib.import_module(f"fastgan.kernels.{name}").__file__).read_text()
        assert name != file or right in text
        text = text.replace(right, wrong) if name == file else text
        path = folder / f"faulty_{name}.py"
        path.write_text(text.replace("from fastgan.kernels.implicit_gemm import", "from faulty_implicit_gemm import"))
        spec = importlib.util.spec_from_file_location(path.stem, path)
        modules[name] = sys.modules[path.stem] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(modules[name])
    for name in CONVOLUTIONS:
        modules[name].tuned = lambda op, x, product, case, run, also=(): run(config)
    return {f"{name}_statistics": modules[name].LAUNCHERS[f"{name}_statistics"].run for name in CONVOLUTIONS}


def correct(launchers):
    """Whether copies of the kernels run unobjected and give the right numbers."""
    for name in ("k4s2p1", "phases of unequal size"):
        case = CASES[name]
        op = OPS[f"{case[0]}_statistics"]
        args = *arguments(case, torch.bfloat16, mean=1.0), 2
        try:
            with testing.emulate("triton"):
                y, mean, var = launchers[op.name](*args)
        except AssertionError as error:
            assert type(error).__name__ == "CheckError"
            return False
        if distance(y, op.reference(*args)[0]) > 1e-2:
            return False
        if any(not distance(got, exact) < ROUNDING for got, exact in zip((mean, var), of_y(y, 2), strict=True)):
            return False
    return True


@pytest.mark.parametrize("what", ["nothing", "nothing, split", *FAULTS])
def test_seeded_faults_are_caught(what, tmp_path):
    nothing = ("conv2d", "inside = m < M", "inside = m < M", SPLIT if "split" in what else WHOLE)
    try:
        assert correct(faulty(tmp_path, *FAULTS.get(what, nothing))) == what.startswith("nothing")
    finally:
        for name in ("implicit_gemm", *CONVOLUTIONS):
            sys.modules.pop(f"faulty_{name}", None)
