"""Every op on its Triton kernels, under the checker: values, first and second derivatives against float64 PyTorch.

What the kernels decline runs on the reference, as on a GPU; each case says which ops must have run on Triton.
"""

import functools
import itertools

import pytest
import torch

pytest.importorskip("triton", "3.8", reason="triton 3.8 or newer is needed to emulate Triton kernels")
import test_filtered_lrelu as filtered
import test_nan
import torch.nn.functional as F
from checks import LAYOUTS, against_plain, assert_close, clear_of, distance, orders

from fastgan import functional, testing
from fastgan._op import OPS
from fastgan.choice import watching
from fastgan.functional import resampling
from fastgan.kernels import samples

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
PHI = {
    None: lambda t: t * 1,
    "relu": torch.relu,
    "leaky_relu": lambda t: F.leaky_relu(t, 0.2),
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
}


def noise(*shape):
    return torch.randn(shape, dtype=torch.float64)


def affine(shape):
    x = noise(*shape) * 2 + 3
    return x, torch.rand(shape[1], dtype=torch.float64) + 0.5, noise(shape[1])


def emulated(ours, plain, inputs, dtype, layout, ops):
    """ours equals plain to second order on emulated Triton kernels, and `ops` ran there."""
    ran = set()
    with testing.emulate("triton") as record, watching(lambda op, name, why: ran.add((op.name, name))):
        got = against_plain(ours, plain, inputs, dtype, layout, "triton")
    assert {(op, "triton") for op in ops} <= ran, ran
    assert record.launches
    return got, record


# ---- bias_act --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS, ids=["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", PHI)
def test_bias_act(activation, dtype, layout):
    ours = lambda x, b: functional.bias_act(x, b, activation=activation)
    plain = lambda x, b: PHI[activation](x + b.view(1, -1, 1, 1))
    ops = ["bias_act"] + ["bias_act_backward"] * (activation is not None)
    emulated(ours, plain, (noise(3, 5, 6, 7), noise(5)), dtype, layout, ops)


LIMITED = [("leaky_relu", 0.9), (None, 0.9), ("elu", None), ("selu", 0.9), ("softplus", None), ("swish", 0.9)]
LIMITED += [("gelu", 0.9), ("gelu_tanh", None)]


def limited(y, clamp):
    return y if clamp is None else y.clamp(-clamp, clamp)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("activation", "clamp"), LIMITED, ids=str)
def test_bias_act_with_gain_and_clamp(activation, clamp, dtype):
    phi = PHI | {"elu": F.elu, "selu": F.selu, "softplus": F.softplus, "swish": F.silu}
    phi |= {"gelu": F.gelu, "gelu_tanh": functools.partial(F.gelu, approximate="tanh")}
    ours = lambda x, b: functional.bias_act(x, b, activation=activation, gain=1.4, clamp=clamp)
    free = lambda x, b: 1.4 * phi[activation](x + b.view(1, -1, 1, 1))
    x, b = noise(2, 3, 4, 5), noise(3)
    x = x if clamp is None else clear_of(lambda x: free(x, b).abs() - clamp, x)
    emulated(
        ours, lambda x, b: limited(free(x, b), clamp), (x, b), dtype, LAYOUTS[1], ["bias_act", "bias_act_backward"]
    )


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 70, 5, 5), (65, 3), (2, 3, 33), (1, 3, 2, 3, 5)], ids=str)
def test_bias_act_shapes(shape):
    ours = lambda x, b: functional.bias_act(x, b, activation="tanh")
    plain = lambda x, b: torch.tanh(x + b.view(1, -1, *(1,) * (x.dim() - 2)))
    emulated(ours, plain, (noise(*shape), noise(shape[1])), torch.float32, LAYOUTS[0], ["bias_act"])


# ---- norms -----------------------------------------------------------------------------------------------------------

BN = ["bn_act", "bn_act_backward", "bn_act_double_backward"]
GN = ["gn_act", "gn_act_backward", "gn_act_double_backward"]
NORM_PHI = [None, "relu", "leaky_relu"]
KINDS = [("leaky_relu", dtype) for dtype in DTYPES] + [(None, torch.float32), ("relu", torch.float32)]


@pytest.fixture(params=["resident", "streamed"])
def route(request, monkeypatch):
    """Both routes of the norm kernels, whatever the size of the tensor would choose."""
    from fastgan.kernels import launching, normalisation

    if request.param == "streamed":
        monkeypatch.setattr(normalisation, "RESIDENT", 1)
        monkeypatch.setattr(normalisation, "LEAST_PIXELS", 1)
        monkeypatch.setattr(launching, "TILE", 128)  # several tiles and chunks of a small tensor
    return request.param


def plain_bn(activation, groups):
    def run(x, w, b):
        parts = [F.batch_norm(p, None, None, w, b, True, 0.0, 1e-5) for p in x.chunk(groups)]
        return PHI[activation](torch.cat(parts))

    return run


@pytest.mark.parametrize("layout", LAYOUTS, ids=["nchw", "nhwc"])
@pytest.mark.parametrize(("activation", "dtype"), KINDS, ids=str)
@pytest.mark.parametrize(("shape", "groups"), [((4, 5, 4, 7), 2), ((3, 10, 5, 3), 1)], ids=str)
def test_bn_act(shape, groups, activation, dtype, layout, route):
    ours = lambda x, w, b: functional.bn_act(
        x, None, None, w, b, training=True, activation=activation, stat_groups=groups
    )
    _, record = emulated(ours, plain_bn(activation, groups), affine(shape), dtype, layout, BN)
    assert (route == "resident") == ("resident_kernel" in record.kernels)


GROUPED = [((3, 6, 3, 5), 2), ((2, 4, 5, 5), 4), ((2, 8, 8, 8), 1)]
# A second a case: activations and 16-bit types are the same code for every shape.
GN_CASES = [
    pytest.param(*shape, *kind, marks=() if shape == GROUPED[0] or kind == KINDS[0] else pytest.mark.slow)
    for shape, kind in itertools.product(GROUPED, KINDS)
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=["nchw", "nhwc"])
@pytest.mark.parametrize(("shape", "groups", "activation", "dtype"), GN_CASES, ids=str)
def test_gn_act(shape, groups, activation, dtype, layout, route):
    ours = lambda x, w, b: functional.gn_act(x, groups, w, b, activation=activation)
    plain = lambda x, w, b: PHI[activation](F.group_norm(x, groups, w, b))
    _, record = emulated(ours, plain, affine(shape), dtype, layout, GN)
    if route == "streamed":
        assert "resident_kernel" not in record.kernels


@pytest.mark.parametrize("activation", NORM_PHI)
@pytest.mark.parametrize("layout", LAYOUTS, ids=["nchw", "nhwc"])
def test_bn_act_eval_without_parameters(layout, activation):
    mean, var = noise(5), torch.rand(5, dtype=torch.float64) + 0.3
    ours = lambda x: functional.bn_act(x, mean.to(x), var.to(x), training=False, activation=activation)
    plain = lambda x: PHI[activation](F.batch_norm(x, mean.to(x), var.to(x)))
    emulated(ours, plain, affine((3, 5, 3, 4))[:1], torch.float32, layout, BN)


@pytest.mark.parametrize("channels_last", [False, True])
def test_a_nan_stays_out_of_r1_where_batch_norm_has_known_statistics(channels_last):
    with testing.emulate("triton") as record:
        test_nan.check_r1_of_known_statistics(channels_last)
    assert record.launches


@pytest.mark.parametrize("shape", [(1, 3, 3, 2), (9, 5), (2, 3, 7), (2, 3, 2, 3, 2)], ids=str)
def test_bn_act_shapes(shape):
    ours = lambda x, w, b: functional.bn_act(x, None, None, w, b, training=True)
    emulated(ours, plain_bn("leaky_relu", 1), affine(shape), torch.float32, LAYOUTS[0], BN)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("given", [True, False])
def test_instance_and_layer_norm(given, dtype):
    x, w, b = affine((2, 6, 3, 5))
    ours = lambda x, w, b: functional.in_act(x, weight=w, bias=b)
    plain = lambda x, w, b: F.leaky_relu(F.instance_norm(x, weight=w, bias=b), 0.2)
    emulated(ours, plain, (x, w, b) if given else (x, None, None), dtype, LAYOUTS[1], GN)
    w, b = noise(5), noise(5)
    ours = lambda x, w, b: functional.ln_act(x, (5,), w, b, activation="relu")
    plain = lambda x, w, b: torch.relu(F.layer_norm(x, (5,), w, b))
    emulated(ours, plain, (x, w, b) if given else (x, None, None), dtype, LAYOUTS[0], GN)


@pytest.mark.parametrize("groups", [1, 4, 8])
@pytest.mark.parametrize("layout", LAYOUTS, ids=["nchw", "nhwc"])
def test_a_large_mean_keeps_its_variance(layout, groups, route):
    x = (torch.randn(2, 8, 6, 6) + 3e4).contiguous(memory_format=layout)  # E[x^2] - E[x]^2 would lose every digit
    with testing.emulate("triton"):
        y, mean, var = OPS["gn_act"](x, None, None, groups, 1e-5, "identity", 0.0)
        z = functional.bn_act(x, training=True, activation=None)
    parts = x.double().reshape(2, groups, -1)
    # a float32 mean is rounded to 2e-3 of a standard deviation here, each chunk's and the whole's
    assert distance(mean, parts.mean(-1)) < 1e-6 and distance(var, parts.var(-1, correction=0)) < 1e-3
    assert distance(y, F.group_norm(x.double(), groups)) < 4e-3
    assert distance(z, F.batch_norm(x.double(), None, None, training=True)) < 4e-3


def test_more_samples_than_programs_share_their_sums(monkeypatch):
    """Group norm's weight gradient adds over samples: several to a program, and a merge of the programs."""
    from fastgan.kernels import normalisation

    monkeypatch.setattr(normalisation, "_parts", lambda p: (2, 3))
    ours = lambda x, w, b: functional.gn_act(x, 2, w, b)
    plain = lambda x, w, b: F.leaky_relu(F.group_norm(x, 2, w, b), 0.2)
    _, record = emulated(ours, plain, affine((5, 4, 3, 3)), torch.float32, LAYOUTS[0], GN)
    assert record.kernels.count("column_sums_kernel") == 2


# ---- losses and penalties --------------------------------------------------------------------------------------------

SP = F.softplus
LOSSES = {
    ("bce", "d"): lambda f, r: SP(-r).mean() + SP(f).mean(),
    ("bce", "g"): lambda f, r: SP(-f).mean(),
    ("minimax", "g"): lambda f, r: -SP(f).mean(),
    ("lsgan", "d"): lambda f, r: 0.5 * ((r - 1) ** 2).mean() + 0.5 * (f**2).mean(),
    ("lsgan", "g"): lambda f, r: 0.5 * ((f - 1) ** 2).mean(),
    ("hinge", "d"): lambda f, r: F.relu(1 - r).mean() + F.relu(1 + f).mean(),
    ("hinge", "g"): lambda f, r: -f.mean(),
    ("wasserstein", "d"): lambda f, r: f.mean() - r.mean(),
    ("relativistic", "d"): lambda f, r: SP(-(r - f)).mean(),
    ("relativistic", "g"): lambda f, r: SP(-(f - r)).mean(),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("kind", "side"), LOSSES, ids=str)
def test_gan_loss(kind, side, dtype):
    needs_real = side == "d" or kind == "relativistic"
    ours = lambda f, *r: functional.gan_loss(f, *r, kind=kind, side=side)
    plain = lambda f, *r: LOSSES[kind, side](f, *(r or (None,)))
    inputs = tuple(noise(3, 1, 5, 5) * 3 for _ in range(2 if needs_real else 1))
    emulated(ours, plain, inputs, dtype, LAYOUTS[0], ["gan_loss", "gan_loss_backward"])


@pytest.mark.parametrize("programs", [1, 3])
@pytest.mark.parametrize("side", ["d", "g"])
def test_gan_loss_of_unequal_batches_with_statistics(side, programs, monkeypatch):
    from fastgan.kernels import gan_loss

    if programs > 1:
        monkeypatch.setattr(gan_loss, "ALONE", 64)
        monkeypatch.setattr(gan_loss, "BLOCK", 32)
    f, r = torch.randn(40).requires_grad_(), (torch.randn(70) * 20).requires_grad_()
    with testing.emulate("triton") as record:
        alone, none = OPS["gan_loss"](f, r, "bce", side, 0.1, False)
        loss, statistics = OPS["gan_loss"](f, r, "bce", side, 0.1, True)
        got = torch.autograd.grad(loss, (f, r))
    assert record.launches[0].grid == (programs, 1, 1)
    assert torch.equal(alone, loss) and none.shape == (0,)
    want_loss, want = OPS["gan_loss"].reference(f.double(), r.double(), "bce", side, 0.1, True)
    assert distance(loss, want_loss) < 1e-6 and distance(statistics, want) < 1e-6
    slopes = OPS["gan_loss_backward"].reference(
        torch.ones((), dtype=torch.float64), f.double(), r.double(), "bce", side, 0.1
    )
    assert all(distance(a, b) < 1e-6 for a, b in zip(got, slopes, strict=True))
    args = (torch.randn(40), torch.randn(70), torch.tensor(0.7), f.detach(), r.detach())
    with testing.emulate("triton") as record:
        bent = OPS["gan_loss_double_backward"](*args, "bce", side, 0.1)
    assert record.launches[0].grid == (programs, 1, 1)
    want = OPS["gan_loss_double_backward"].reference(*(a.double() for a in args), "bce", side, 0.1)
    assert all(distance(a, b) < 1e-5 for a, b in zip(bent, want, strict=True))


def test_softplus_of_a_confident_discriminator_keeps_its_digits():
    f, r = torch.full((8,), -20.0), torch.full((8,), 20.0)
    with testing.emulate("triton"):
        loss = functional.gan_loss(f, r, kind="bce", side="d")
    want = SP(f.double()).mean() + (SP(r.double()) - r.double()).mean()
    assert distance(loss, want) < 0.5 and distance(loss - 0, SP(f.double()).mean()) < 1e-5


@pytest.mark.parametrize("layout", LAYOUTS, ids=["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_interpolate(dtype, layout):
    plain = lambda real, fake, e: e.view(-1, 1, 1, 1) * real + (1 - e.view(-1, 1, 1, 1)) * fake
    inputs = (noise(3, 3, 5, 7), noise(3, 3, 5, 7), torch.rand(3, dtype=torch.float64))
    emulated(functional.interpolate, plain, inputs, dtype, layout, ["interpolate", "sample_dot"])


@pytest.mark.parametrize("layout", LAYOUTS, ids=["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_two_coefficients(dtype, layout):
    plain = lambda real, fake, e, rest: e.view(-1, 1, 1, 1) * real + rest.view(-1, 1, 1, 1) * fake
    inputs = (noise(3, 3, 5, 7), noise(3, 3, 5, 7), noise(3), noise(3))
    emulated(OPS["interpolate"], plain, inputs, dtype, layout, ["interpolate", "sample_dot"])


@pytest.mark.parametrize("chunks", [1, 3])
@pytest.mark.parametrize("layout", LAYOUTS, ids=["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sample_dot(dtype, layout, chunks, monkeypatch):
    if chunks > 1:
        monkeypatch.setattr(samples, "BLOCK", 32)
    ours = lambda x, y: OPS["sample_dot"](x, y).to(x.dtype)
    _, record = emulated(
        ours,
        lambda x, y: (x * y).flatten(1).sum(1),
        (noise(5, 3, 4, 7), noise(5, 3, 4, 7)),
        dtype,
        layout,
        ["sample_dot", "interpolate"],
    )
    assert record.launches[0].grid == (5 * chunks, 1, 1)


@pytest.mark.parametrize("chunks", [1, 3])
@pytest.mark.parametrize("layout", LAYOUTS, ids=["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("target", [0.0, 1.0])
def test_grad_norm_penalty(target, dtype, layout, chunks, monkeypatch):
    if chunks > 1:
        monkeypatch.setattr(samples, "BLOCK", 32)
    g = (torch.randn(5, 3, 4, 7) * 0.3).to(dtype)
    g[3] = 0  # the subgradient there is 0
    ours = lambda g: functional.grad_norm_penalty(g, target).to(g.dtype)
    plain = lambda g: (g.flatten(1).norm(dim=1) - target).square()
    want = orders(plain, [g.double().requires_grad_()], 1)
    theirs = orders(plain, [g.clone().requires_grad_()], 1)
    with testing.emulate("triton") as record:
        got = orders(ours, [g.contiguous(memory_format=layout).requires_grad_()], 1)
    for i, (o, w, t) in enumerate(zip(got, want, theirs, strict=True)):
        assert_close(o, w, dtype, distance(t, w), f"result {i}")
    assert record.launches[0].grid == (5 * chunks, 1, 1)
    assert "grad_norm_penalty_backward_kernel" in record.kernels


@pytest.mark.parametrize("target", [0.0, 1.0])
def test_grad_norm_penalty_to_second_order(target):
    ours = lambda g: functional.grad_norm_penalty(g, target)
    plain = lambda g: (g.flatten(1).norm(dim=1) - target).square()
    ops = ["grad_norm_penalty", "grad_norm_penalty_backward", "sample_dot", "interpolate"]
    emulated(ours, plain, (noise(4, 3, 5) * 0.3,), torch.float32, LAYOUTS[0], ops)


# ---- every op --------------------------------------------------------------------------------------------------------

TRITON_OPS = [name for name, op in OPS.items() if "triton" in op.backends and "conv" not in name]


def flat(out):
    return list(out) if isinstance(out, tuple) else [out]


def example(name, dtype=torch.float32, layout=torch.contiguous_format):
    """The op's example; parameters and statistics stay in float32 beside a 16-bit x."""
    op = OPS[name]

    def given(a):
        if not isinstance(a, torch.Tensor) or not a.is_floating_point():
            return a
        a = a.contiguous(memory_format=layout) if a.dim() == 4 else a
        return a if op.autocast == "first" and a.dim() < 4 else a.to(dtype)

    return tuple(given(a) for a in op.example())


@pytest.mark.parametrize("layout", LAYOUTS, ids=["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", TRITON_OPS)
def test_outputs_match_the_fake_and_are_written_completely(name, dtype, layout, monkeypatch):
    """What torch.compile believes of shapes, dtypes and strides is what comes back, and every element is written."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    args, op = example(name, dtype, layout), OPS[name]
    with FakeTensorMode() as mode:
        fakes = flat(op(*(mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in args)))
    want = flat(op.reference(*args))
    poison_allocations(monkeypatch)
    with testing.emulate("triton") as record:
        got = flat(op(*args))
    assert record.launches
    for g, f, w in zip(got, fakes, want, strict=True):
        assert (g.shape, g.stride(), g.dtype) == (f.shape, f.stride(), f.dtype) == (w.shape, w.stride(), w.dtype)
        assert g.isfinite().all()


def poison_allocations(monkeypatch):
    real_empty, real_like, real_new = torch.empty, torch.empty_like, torch.Tensor.new_empty
    poison = lambda t: t.fill_(float("nan")) if t.is_floating_point() else t
    monkeypatch.setattr(torch, "empty", lambda *a, **k: poison(real_empty(*a, **k)))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: poison(real_like(*a, **k)))
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **k: poison(real_new(*a, **k)))


@pytest.mark.parametrize("layout", LAYOUTS, ids=["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", TRITON_OPS)
def test_the_proof_of_first_use_passes(name, dtype, layout):
    """The comparison that a user's card makes before it runs a kernel: random arguments, poisoned outputs."""
    from fastgan.choice import proof_error

    with testing.emulate("triton") as record:
        assert proof_error(OPS[name], "triton", OPS[name].drawn(example(name, dtype, layout))) == ""
    assert record.launches


@pytest.mark.parametrize("name", TRITON_OPS)
def test_wide_offsets_and_slices_change_nothing(name, monkeypatch):
    """The variant for 2^31 elements and more, here on a small tensor; and inputs that are views with gaps."""
    from fastgan.kernels import launching

    args = example(name)
    with testing.emulate("triton"):
        want = flat(OPS[name](*args))
        monkeypatch.setattr(launching, "WIDE_FROM", 1)
        wide = flat(OPS[name](*args))
        gaps = (torch.stack([a, a + 1], -1)[..., 0] if isinstance(a, torch.Tensor) else a for a in args)
        sliced = flat(OPS[name](*gaps))
    for a, b, c in zip(want, wide, sliced, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)


@pytest.mark.parametrize("name", TRITON_OPS)
def test_results_do_not_depend_on_the_order_of_programs(name, route):
    checker, args, results = testing._emulator("triton"), example(name), []
    for seed in range(2):
        with checker.emulation(seed):
            results.append(flat(OPS[name].backends["triton"].run(*args)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("name", TRITON_OPS)
def test_declined_cases_say_why(name):
    args = [a.double() if isinstance(a, torch.Tensor) else a for a in OPS[name].example()]
    empty = [a[:0] if isinstance(a, torch.Tensor) and a.dim() == 4 else a for a in OPS[name].example()]
    declines = OPS[name].backends["triton"].declines
    assert "float64" in declines(*args)
    if any(isinstance(a, torch.Tensor) and a.dim() == 4 for a in args):
        assert declines(*empty) == "an empty tensor"


# ---- upfirdn2d -------------------------------------------------------------------------------------------------------

FIR = torch.tensor([[1.0, -2.0, 3.0], [0.5, 4.0, -1.0], [2.0, 0.25, -3.0], [1.0, 0.0, 5.0]]) / 8
FIRS = [(FIR, (1, 2), (3, 1), (1, 0, 2, 2)), (FIR[:, 0], 2, 1, (-1, 2, 3, -2)), (FIR, 3, 2, (2, 3, 1, 2))]


def plain_upfirdn2d(f, up, down, padding):
    """Zeros written out, a depthwise convolution, strided."""
    up, down = ((v, v) if isinstance(v, int) else v for v in (up, down))
    f = (torch.outer(f, f) if f.dim() == 1 else f).flip([0, 1])

    def run(x):
        n, c, h, w = x.shape
        u = x.new_zeros(n, c, h, up[1], w, up[0])
        u[:, :, :, 0, :, 0] = x
        u = F.pad(u.reshape(n, c, h * up[1], w * up[0]), padding)
        return F.conv2d(u, f.to(x).expand(c, 1, *f.shape), groups=c)[:, :, :: down[1], :: down[0]]

    return run


@pytest.mark.parametrize("layout", LAYOUTS, ids=["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("f", "up", "down", "padding"), FIRS, ids=["axes apart", "cropped", "three halves"])
def test_upfirdn2d(f, up, down, padding, dtype, layout):
    ours = lambda x: functional.upfirdn2d(x, f, up, down, padding)
    emulated(ours, plain_upfirdn2d(f, up, down, padding), (noise(2, 3, 7, 5),), dtype, layout, ["upfirdn2d"])


# ---- filtered_lrelu --------------------------------------------------------------------------------------------------

LRELU = ["filtered_lrelu", "filtered_lrelu_backward"]


@pytest.fixture
def every_case_in_one_pass(monkeypatch):
    monkeypatch.setattr(resampling, "FEWEST_PLANES", 1)


@pytest.mark.usefixtures("every_case_in_one_pass")
@pytest.mark.parametrize("case", filtered.CASES)
def test_filtered_lrelu(case):
    layout = LAYOUTS[list(filtered.CASES).index(case) % 2]
    plain, ours = filtered.composed(*filtered.CASES[case]), filtered.ours(*filtered.CASES[case])
    emulated(ours, plain, (noise(1, 2, 4, 5), noise(2)), torch.float32, layout, LRELU)


@pytest.mark.usefixtures("every_case_in_one_pass")
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_filtered_lrelu_in_16_bits(dtype):
    """Where no sample of the upsampled image is within a rounding of 0 or of the clamp."""
    case = (None, filtered.SMOOTH, 1, 2, 0, 1.0)
    b = noise(3).to(dtype).double()
    edges = lambda x: ((x + b.view(1, -1, 1, 1)) * torch.where(x + b.view(1, -1, 1, 1) > 0, 1.3, 0.13)).abs()
    x = clear_of(lambda x: torch.minimum(edges(x), (edges(x) - 1).abs()), noise(1, 3, 7, 10).to(dtype).double())
    emulated(filtered.ours(*case), filtered.composed(*case), (x, b), dtype, LAYOUTS[1], LRELU)


@pytest.mark.parametrize("width", [9, 33, 75])
def test_filtered_lrelus_signs_are_the_references(width):
    """Up to 149 samples a row in up to seven tiles: words that are full, and one that is not."""
    args = torch.randn(1, 2, 5, width), torch.randn(2), filtered.SMOOTH, filtered.LONG[:3], 2, 1, [2, 1, 2, 1]
    with testing.emulate("triton") as record:
        signs = OPS["filtered_lrelu"].backends["triton"].run(*args, False, 1.3, 0.1, 0.7)[1]
    want = OPS["filtered_lrelu"].reference(*args, False, 1.3, 0.1, 0.7)[1]
    assert record.kernels == ["filtered_lrelu_kernel"] and signs.shape == want.shape
    assert (signs != want).sum() <= 1 and want.float().mean() > 10  # float32 may round over an edge


def test_filtered_lrelus_tiles_fit_every_filter():
    """Powers of two, no more than registers hold; one program makes an image that fits a tile."""
    from fastgan.kernels.filtered_lrelu import LARGEST, tile

    for taps, down, forward in itertools.product(((1, 1), (12, 12), (32, 32)), (1, 2, 31, 32), (True, False)):
        t = tile((100, 100), taps, down, forward)
        assert t.fine_rows * t.fine_columns <= LARGEST and t.rows >= 1 and t.columns >= 1
        assert t.rows * down + taps[0] - 1 <= t.fine_rows and t.columns * down + taps[1] - 1 <= t.fine_columns
    assert tile((10, 26), (12, 12), 2, True)[:2] == (10, 26)


# ---- attention -------------------------------------------------------------------------------------------------------

ATTENTION = ["attention", "attention_backward", "attention_double_backward"]


def plain_attention(q, k, v, bias=None, causal=False):
    s = q @ k.mT * q.shape[-1] ** -0.5
    s = s if bias is None else s + bias
    s = s.masked_fill(torch.ones(s.shape[-2:], dtype=torch.bool).triu(1), float("-inf")) if causal else s
    empty = (s == float("-inf")).all(-1, keepdim=True)
    return torch.softmax(s.masked_fill(empty, 0.0), -1).masked_fill(empty, 0.0) @ v


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("rows", "keys", "d", "e", "causal"), [(19, 37, 5, 5, False), (37, 19, 20, 3, True), (1, 1, 1, 1, False)]
)
def test_attention(rows, keys, d, e, causal, dtype, monkeypatch):
    from fastgan.kernels import attention

    monkeypatch.setattr(attention, "LONGEST_BLOCK", 16)  # several tiles of a small case
    ours = lambda q, k, v: functional.scaled_dot_product_attention(q, k, v, is_causal=causal)
    plain = lambda q, k, v: plain_attention(q, k, v, causal=causal)
    emulated(
        ours, plain, (noise(1, 2, rows, d), noise(1, 2, keys, d), noise(1, 2, keys, e)), dtype, LAYOUTS[0], ATTENTION
    )


@pytest.mark.parametrize("shape", [(17, 20), (2, 1, 1, 20), (3, 17, 1)], ids=str)
def test_attention_with_a_bias_and_rows_without_keys(shape):
    bias = noise(*shape)
    bias = bias.masked_fill(torch.rand(shape) > 0.7, float("-inf"))
    bias[..., 0, :] = float("-inf")
    inputs = noise(2, 3, 17, 8), noise(2, 3, 20, 8), noise(2, 3, 20, 6)
    ours = lambda q, k, v: functional.scaled_dot_product_attention(q, k, v, bias.to(q))
    emulated(ours, lambda q, k, v: plain_attention(q, k, v, bias.to(q)), inputs, torch.float32, LAYOUTS[0], ATTENTION)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("shape", [(17, 20), (2, 1, 17, 20)], ids=str)
def test_the_gradient_of_an_attentions_bias(shape, causal):
    inputs = noise(2, 3, 17, 8), noise(2, 3, 20, 8), noise(2, 3, 20, 6), noise(*shape)
    ours = lambda q, k, v, b: OPS["attention"](q, k, v, b, causal, 8**-0.5)[0]
    emulated(ours, lambda *t: plain_attention(*t, causal=causal), inputs, torch.float32, LAYOUTS[0], ATTENTION)
