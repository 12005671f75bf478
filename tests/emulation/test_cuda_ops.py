"""The CUDA kernels of the memory-bound ops on a machine without a GPU: csrc/cuda under the emulator, by table.

Values, first and second derivatives against float64 as for every backend (tests/checks.py); thread orders; what the
kernels fetch.
"""

import functools

import pytest
import test_nan
import torch
import torch.nn.functional as F
from checks import LAYOUTS, against_plain, clear_of

from fastgan import functional
from fastgan._native import CUDA
from fastgan._op import OPS
from fastgan.choice import watching
from fastgan.ops import adam
from fastgan.ops.gan_loss import KINDS
from fastgan.ops.gan_loss import formula as gan_formula

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ACTIVATIONS = {None: lambda t: t * 1, "relu": torch.relu, "leaky_relu": lambda t: F.leaky_relu(t, 0.2)}
ALL_ACTIVATIONS = {**ACTIVATIONS, "tanh": torch.tanh, "sigmoid": torch.sigmoid}
layouts = pytest.mark.parametrize("layout", LAYOUTS, ids=["nchw", "nhwc"])
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).partition(".")[2])


@pytest.fixture
def ran():
    """{(op, backend)} of the test so far."""
    seen = set()
    with watching(lambda op, name, why: seen.add((op.name, name))):
        yield seen


def on_cuda(ran, *ops):
    assert {op for op, name in ran if name == "cuda"} >= set(ops), ran
    assert not [op for op, name in ran if name != "cuda"], ran


def noise(*shape):
    return torch.randn(shape, dtype=torch.float64)


def affine(channels):
    return torch.rand(channels, dtype=torch.float64) + 0.5, noise(channels)


# ---- values and derivatives ------------------------------------------------------------------------------------------

# odd sizes (one element at a time), whole vectors, several blocks, several splits, one pixel, five dimensions
SHAPES = [
    ((3, 5, 7, 3), 1),
    ((4, 16, 8, 8), 2),
    ((12, 17), 3),
    ((2, 40, 33, 32), 1),
    ((2, 4, 9), 1),
    ((4, 3, 2, 3, 2), 2),
]


# bn_act's three kernels: a card whose shared memory holds no tensor at once (test_cuda_resident.py: in one)
LITTLE = {"shared": 3 << 10}


@layouts
@dtypes
@pytest.mark.parametrize(("shape", "groups"), SHAPES, ids=str)
def test_bn_act(record, ran, shape, groups, dtype, layout):
    record.card(**LITTLE)
    for seed, activation in enumerate(ACTIVATIONS):
        record.configure(seed=seed)
        ours = lambda x, w, b, a=activation: functional.bn_act(
            x, None, None, w, b, training=True, activation=a, stat_groups=groups
        )
        plain = lambda x, w, b, a=activation: ACTIVATIONS[a](
            torch.cat([F.batch_norm(p, None, None, w, b, True, 0.0, 1e-5) for p in x.chunk(groups)])
        )
        against_plain(ours, plain, (noise(*shape) * 2 + 3, *affine(shape[1])), dtype, layout, "cuda")
    on_cuda(ran, "bn_act", "bn_act_backward", "bn_act_double_backward")


@layouts
@dtypes
@pytest.mark.parametrize("with_parameters", [True, False])
def test_bn_act_in_eval_mode(record, ran, with_parameters, dtype, layout):
    mean, var = noise(24).to(dtype), (torch.rand(24).double() + 0.3).to(dtype)
    ours = lambda x, w, b: functional.bn_act(x, mean, var, w, b, training=False)
    plain = lambda x, w, b: F.leaky_relu(F.batch_norm(x, mean.to(x.dtype), var.to(x.dtype), w, b), 0.2)
    parameters = affine(24) if with_parameters else (None, None)
    against_plain(ours, plain, (noise(3, 24, 5, 8), *parameters), dtype, layout, "cuda")
    on_cuda(ran, "bn_act", "bn_act_backward", "bn_act_double_backward")


@pytest.mark.parametrize("channels_last", [False, True])
def test_a_nan_stays_out_of_r1_where_batch_norm_has_known_statistics(record, ran, channels_last):
    test_nan.check_r1_of_known_statistics(channels_last)
    on_cuda(ran, "bn_act", "bn_act_backward", "bn_act_double_backward")


@layouts
@dtypes
def test_bn_act_with_given_batch_statistics(record, ran, dtype, layout):
    """Of two groups: x is read once, and the gradients are those of statistics computed here."""
    moments = lambda x: reversed(torch.var_mean(x.detach().float().unflatten(0, (2, -1)), [1, 3, 4], correction=0))
    ours = lambda x, w, b: functional.bn_act(
        x, None, None, w, b, training=True, stat_groups=2, batch_statistics=tuple(moments(x))
    )
    plain = lambda x, w, b: F.leaky_relu(
        torch.cat([F.batch_norm(p, None, None, w, b, True, 0.0, 1e-5) for p in x.chunk(2)]), 0.2
    )
    against_plain(ours, plain, (noise(4, 16, 8, 8) * 2 + 3, *affine(16)), dtype, layout, "cuda")
    on_cuda(ran, "bn_act", "bn_act_backward", "bn_act_double_backward")


@layouts
@dtypes
@pytest.mark.parametrize(
    ("shape", "groups", "activation"),
    [
        ((3, 6, 5, 7), 2, "leaky_relu"),
        ((2, 24, 16, 17), 3, "relu"),
        ((1, 72, 4, 8), 9, None),
        ((3, 8, 40, 40), 8, "relu"),
    ],
    ids=str,
)
def test_gn_act(record, ran, shape, groups, activation, dtype, layout):
    record.configure(seed=7)
    ours = lambda x, w, b: functional.gn_act(x, groups, w, b, activation=activation)
    plain = lambda x, w, b: ACTIVATIONS[activation](F.group_norm(x, groups, w, b))
    against_plain(ours, plain, (noise(*shape) * 2 + 3, *affine(shape[1])), dtype, layout, "cuda")
    on_cuda(ran, "gn_act", "gn_act_backward", "gn_act_double_backward")


@dtypes
def test_instance_norm_without_parameters(record, ran, dtype):
    plain = lambda x: F.leaky_relu(F.instance_norm(x), 0.2)
    against_plain(functional.in_act, plain, (noise(3, 8, 4, 8),), dtype, torch.contiguous_format, "cuda")
    on_cuda(ran, "gn_act", "gn_act_backward", "gn_act_double_backward")


FEW_PIXELS = [  # shape, groups: layer norm (whole vectors, odd, several splits, many rows), few pixels
    ((5, 64), 1),
    ((3, 37), 1),
    ((2, 9001), 1),
    ((600, 24), 1),
    ((4, 48), 6),
    ((2, 12, 3, 3), 2),
    ((3, 20, 3, 5), 1),
    ((2, 8, 1, 2), 8),
]


@dtypes
@pytest.mark.parametrize(("shape", "groups"), FEW_PIXELS, ids=str)
def test_gn_act_of_few_pixels(record, ran, shape, groups, dtype):
    record.configure(seed=3)
    for layout in LAYOUTS if len(shape) == 4 else [torch.contiguous_format]:
        for activation in ACTIVATIONS:
            ours = lambda x, w, b, a=activation: functional.gn_act(x, groups, w, b, activation=a)
            plain = lambda x, w, b, a=activation: ACTIVATIONS[a](F.group_norm(x, groups, w, b))
            against_plain(ours, plain, (noise(*shape) * 2 + 3, *affine(shape[1])), dtype, layout, "cuda")
    on_cuda(ran, "gn_act", "gn_act_backward", "gn_act_double_backward")


@dtypes
@pytest.mark.parametrize("with_parameters", [True, False])
def test_a_critics_layer_norm(record, ran, with_parameters, dtype):
    """Over C, H and W, as WGAN-GP's critics have it."""
    shape = (8, 12, 6)
    ours = lambda x, w=None, b=None: functional.ln_act(x, shape, w, b)
    plain = lambda x, w=None, b=None: F.leaky_relu(F.layer_norm(x, shape, w, b), 0.2)
    parameters = (torch.rand(shape, dtype=torch.float64) + 0.5, noise(*shape)) if with_parameters else ()
    against_plain(ours, plain, (noise(5, *shape) * 2 + 3, *parameters), dtype, torch.contiguous_format, "cuda")
    on_cuda(ran, "gn_act", "gn_act_backward", "gn_act_double_backward")


@layouts
@dtypes
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("activation", ALL_ACTIVATIONS)
def test_bias_act(record, ran, activation, with_bias, dtype, layout):
    def plain(x, bias=None):
        return ALL_ACTIVATIONS[activation](x * 1 if bias is None else x + bias.view(-1, 1, 1))

    ours = lambda *args: functional.bias_act(*args, activation=activation)
    for seed, shape in enumerate([(2, 5, 7, 3), (2, 48, 17, 16)]):
        record.configure(seed=seed)
        args = (noise(*shape), noise(shape[1])) if with_bias else (noise(*shape),)
        against_plain(ours, plain, args, dtype, layout, "cuda")
    on_cuda(ran, "bias_act", *([] if activation is None else ["bias_act_backward"]))


LIMITED = {"elu": F.elu, "selu": F.selu, "softplus": F.softplus, "swish": F.silu, **ALL_ACTIVATIONS}
LIMITED |= {"gelu": F.gelu, "gelu_tanh": functools.partial(F.gelu, approximate="tanh")}


@dtypes
@pytest.mark.parametrize("clamp", [None, 0.9])
@pytest.mark.parametrize("activation", LIMITED)
def test_bias_act_with_gain_and_clamp(record, ran, activation, clamp, dtype):
    limited = lambda y: y if clamp is None else y.clamp(-clamp, clamp)
    ours = lambda x, b: functional.bias_act(x, b, activation=activation, gain=1.4, clamp=clamp)
    free = lambda x, b: 1.4 * LIMITED[activation](x + b.view(-1, 1, 1))
    x, b = noise(2, 8, 3, 5), noise(8)
    x = x if clamp is None else clear_of(lambda x: free(x, b).abs() - clamp, x)
    against_plain(ours, lambda x, b: limited(free(x, b)), (x, b), dtype, LAYOUTS[1], "cuda")
    on_cuda(ran, "bias_act", *([] if activation is None and clamp is None else ["bias_act_backward"]))


@dtypes
@pytest.mark.parametrize("side", ["d", "g"])
@pytest.mark.parametrize("kind", KINDS)
def test_gan_loss(record, ran, kind, side, dtype):
    needs_real = side == "d" or kind == "relativistic"
    zero = lambda r: 0 if needs_real else 0 * r.sum()
    ours = lambda f, r: functional.gan_loss(f, r if needs_real else None, kind=kind, side=side) + zero(r)
    plain = lambda f, r: gan_formula(f, r if needs_real else None, kind, side, 0.0) + zero(r)
    for seed, n in enumerate([1, 77, 5000]):
        record.configure(seed=seed)
        against_plain(ours, plain, (noise(n) * 3, noise(n) * 3), dtype, torch.contiguous_format, "cuda")
    on_cuda(ran, "gan_loss", "gan_loss_backward", "gan_loss_double_backward")


def test_gan_loss_statistics(record):
    args = (torch.randn(3000), torch.randn(3000) + 1, "bce", "d", 0.1)
    for want_statistics in (True, False):
        got, want = (run(*args, want_statistics) for run in (OPS["gan_loss"].run, OPS["gan_loss"].reference))
        torch.testing.assert_close(got, want)
        assert got[1].shape == (6 if want_statistics else 0,)


@layouts
@dtypes
@pytest.mark.parametrize("shape", [(3, 5, 7, 3), (2, 3, 32, 32), (70, 1)], ids=str)
def test_interpolate(record, ran, shape, dtype, layout):
    ours = lambda real, fake, e: OPS["interpolate"](real, fake, e, None)

    def plain(real, fake, e):
        e = e.view(-1, *(1,) * (real.dim() - 1))
        return e * real + (1 - e) * fake

    args = (noise(*shape), noise(*shape), torch.rand(shape[0], dtype=torch.float64))
    against_plain(ours, plain, args, dtype, layout, "cuda")
    on_cuda(ran, "interpolate", "sample_dot")
    two = lambda real, fake, e, rest: OPS["interpolate"](real, fake, e, rest)
    column = lambda v: v.view(-1, *(1,) * (len(shape) - 1))
    summed = lambda real, fake, e, rest: column(e) * real + column(rest) * fake
    against_plain(two, summed, (*args, noise(shape[0])), dtype, layout, "cuda")


@layouts
@dtypes
@pytest.mark.parametrize("shape", [(3, 5, 7, 3), (2, 3, 64, 64), (70, 1)], ids=str)
def test_sample_dot(record, ran, shape, dtype, layout):
    ours = lambda x, y: OPS["sample_dot"](x, y).to(x.dtype)
    plain = lambda x, y: (x * y).flatten(1).sum(1)
    against_plain(ours, plain, (noise(*shape), noise(*shape)), dtype, layout, "cuda")
    on_cuda(ran, "sample_dot", "interpolate")


@layouts
@dtypes
@pytest.mark.parametrize("target", [0.0, 1.0])
@pytest.mark.parametrize("shape", [(3, 5, 7, 3), (2, 3, 64, 64), (70, 1)], ids=str)
def test_grad_norm_penalty(record, ran, shape, target, dtype, layout):
    gradient = noise(*shape).to(dtype).contiguous(memory_format=layout if len(shape) == 4 else torch.contiguous_format)
    gradient[1] = 0  # the subgradient there is 0
    penalty, norm = OPS["grad_norm_penalty"].run(gradient, target)
    want_penalty, want_norm = OPS["grad_norm_penalty"].reference(gradient.double(), target)
    torch.testing.assert_close((penalty, norm), (want_penalty.float(), want_norm.float()))
    dpenalty = torch.randn(shape[0])
    got = OPS["grad_norm_penalty_backward"].run(dpenalty, gradient, norm, target)
    want = OPS["grad_norm_penalty_backward"].reference(dpenalty, gradient, norm, target)
    torch.testing.assert_close(got, want)
    assert got.stride() == want.stride() and not got[1].any()
    on_cuda(ran, "grad_norm_penalty", "grad_norm_penalty_backward")


@pytest.mark.parametrize("columns", [False, True])
def test_statistics_do_not_cancel(record, columns):
    """|mean| of 3e4 standard deviations: E[x^2] - E[x]^2 has no digit left in float32."""
    x = torch.randn(16, 6, 1600) + 3e4
    x[:, 3] = 1234.567
    x = x.unsqueeze(-1).contiguous(memory_format=torch.channels_last if columns else torch.contiguous_format)
    _, mean, var = OPS["bn_act"].run(x, None, None, None, None, True, 1e-5, "identity", 0.0, 2)
    parts = x.double().view(2, 8, 6, 1600)
    want_var, want_mean = torch.var_mean(parts, (1, 3), correction=0)
    torch.testing.assert_close(var, want_var.float(), rtol=1e-5, atol=1e-9)
    torch.testing.assert_close(mean, want_mean.float(), rtol=2e-7, atol=0)


CRITIC = (8, 8192)  # samples of a critic's layer norm
CRITIC_TRAFFIC = {
    "gn_act": (lambda x, v: (x, v, v.clone(), 1, 1e-5, "relu", 0.0), 3),
    "gn_act_backward": (
        lambda x, v: (x, x.clone(), v, v.clone(), torch.randn(8, 1), torch.rand(8, 1) + 1, 1e-5, "relu", 0.0),
        5,
    ),
    "gn_act_double_backward": (
        lambda x, v: (
            *(x, x.clone(), v, v.clone(), x.clone(), v.clone(), v.clone()),
            *(torch.randn(8, 1), torch.rand(8, 1) + 1, 1e-5, "relu", 0.0),
        ),
        8,
    ),
}


# ---- any order of threads gives the same bits ------------------------------------------------------------------------


@pytest.mark.parametrize("name", CRITIC_TRAFFIC)
def test_thread_orders_of_layer_norm_are_bit_equal(record, name):
    results = []
    for seed in range(4):
        record.configure(seed=seed)
        torch.manual_seed(0)
        results.append(OPS[name].run(*CRITIC_TRAFFIC[name][0](torch.randn(8, 264), torch.randn(264))))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@layouts
@pytest.mark.parametrize("name", ["bn_act", "bn_act_backward", "bn_act_double_backward", "gn_act_backward", "gan_loss"])
def test_thread_orders_are_bit_equal(record, name, layout):
    shape = (4, 24, 20, 16)
    args = [
        torch.randn(shape).contiguous(memory_format=layout) if isinstance(a, torch.Tensor) and a.dim() == 4 else a
        for a in OPS[name].example()
    ]
    for i, a in enumerate(args):
        if isinstance(a, torch.Tensor) and a.dim() == 1:
            args[i] = torch.randn(6000 if name == "gan_loss" else 24)
        if isinstance(a, torch.Tensor) and a.dim() == 2:
            args[i] = torch.rand(4 if name.startswith("gn") else 2, 2 if name.startswith("gn") else 24) + 0.5
    results = []
    for seed in range(4):
        record.configure(seed=seed)
        results.append(OPS[name].run(*args))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


# ---- what is fetched -------------------------------------------------------------------------------------------------

X = (8, 64, 16, 16)
LARGE = 8 * 64 * 16 * 16 * 2  # bytes of such a tensor in 16 bits
TRAFFIC = {  # op -> (arguments, accesses an element)
    "bias_act": (lambda x, v: (x, v, "relu", 0.0, 1.0, -1.0), 2),
    "bias_act_backward": (lambda x, v: (x, x.clone(), "leaky_relu", 0.2, 1.4, 2.0, True), 3),
    "bn_act": (lambda x, v: (x, v, v, None, None, True, 1e-5, "relu", 0.0, 1), 3),
    "bn_act_backward": (lambda x, v: (x, x.clone(), v, v, v[None], v[None] ** 2 + 1, True, 1e-5, "relu", 0.0), 5),
    "bn_act_double_backward": (
        lambda x, v: (x, x.clone(), v, v, x.clone(), v, v, v[None], v[None] ** 2 + 1, True, 1e-5, "relu", 0.0),
        8,
    ),
    "gn_act": (lambda x, v: (x, v, v, 8, 1e-5, "relu", 0.0), 3),
    "gn_act_backward": (
        lambda x, v: (x, x.clone(), v, v, torch.randn(8, 8), torch.rand(8, 8) + 1, 1e-5, "relu", 0.0),
        5,
    ),
    "gn_act_double_backward": (
        lambda x, v: (x, x.clone(), v, v, x.clone(), v, v, torch.randn(8, 8), torch.rand(8, 8) + 1, 1e-5, "relu", 0.0),
        8,
    ),
    "gan_loss": (lambda x, v: (x.flatten(), x.flatten().clone(), "bce", "d", 0.0, True), 2),  # one access of each
    "gan_loss_backward": (lambda x, v: (torch.tensor(1.0), x.flatten(), x.flatten().clone(), "lsgan", "d", 0.0), 4),
    "gan_loss_double_backward": (
        lambda x, v: (
            *(t.flatten().clone() for t in (x, x)),
            torch.tensor(1.0),
            x.flatten(),
            x.flatten().clone(),
            "bce",
            "d",
            0.0,
        ),
        6,
    ),
    "interpolate": (lambda x, v: (x, x.clone(), torch.rand(8), None), 3),
    "sample_dot": (lambda x, v: (x, x.clone()), 2),
    "grad_norm_penalty": (lambda x, v: (x, 1.0), 1),
    "grad_norm_penalty_backward": (lambda x, v: (torch.rand(8), x, torch.rand(8) + 1, 1.0), 2),
}


@layouts
@dtypes
@pytest.mark.parametrize("name", TRAFFIC)
def test_traffic(record, name, dtype, layout):
    """Every element moves as often as the card says, in whole sectors, and shared memory without bank conflicts."""
    arguments, accesses = TRAFFIC[name]
    x = torch.randn(X).to(dtype).contiguous(memory_format=layout)
    record.configure(counting=True)
    record.card(**LITTLE)
    OPS[name].run(*arguments(x, torch.randn(64)))
    least = accesses * x.numel() * x.element_size()
    assert least <= record.bytes(LARGE) <= 1.05 * least  # statistics look at each channel's first element once more
    assert record.sector_efficiency(LARGE) >= 0.9
    assert record.sector_efficiency(1024) >= 0.9  # the partial sums too
    wavefronts = sum(launch.shared_wavefronts for launch in record.launches)
    ideal = sum(launch.shared_ideal for launch in record.launches)
    assert wavefronts <= 1.1 * ideal


@dtypes
@pytest.mark.parametrize("name", CRITIC_TRAFFIC)
def test_traffic_of_layer_norm(record, name, dtype):
    """As other norms. The parameters' vectors, as long as a sample, come on top: once a sample for the sums along the
    rows, and for the columns once a warp of the block that shares them, from the cache."""
    arguments, accesses = CRITIC_TRAFFIC[name]
    x = torch.randn(CRITIC).to(dtype)
    record.configure(counting=True)
    OPS[name].run(*arguments(x, torch.randn(CRITIC[1])))
    size = x.numel() * x.element_size()
    images = [t for t in record.traffic if t.bytes == size]
    assert accesses * size <= sum(t.requested for t in images) <= 1.05 * accesses * size
    assert sum(t.requested for t in images) >= 0.9 * 32 * sum(t.sectors for t in images)
    vectors = [t for t in record.traffic if t.bytes == 4 * CRITIC[1]]
    assert vectors and all(t.requested <= (CRITIC[0] + 8) * t.bytes for t in vectors)
    assert sum(n.shared_wavefronts for n in record.launches) <= 1.1 * sum(n.shared_ideal for n in record.launches)


@layouts
def test_odd_rows_still_use_their_sectors(record, layout):
    """49 pixels, 33 channels: one element at a time; what is lost are the ends of rows, a third at most."""
    record.configure(counting=True)
    record.card(**LITTLE)
    x = torch.randn(8, 33, 7, 7).contiguous(memory_format=layout)
    OPS["bn_act"].run(x, None, None, None, None, True, 1e-5, "relu", 0.0, 1)
    assert 3 * x.numel() * 4 <= record.bytes(x.numel() * 4) <= 3.4 * x.numel() * 4
    assert record.sector_efficiency(x.numel() * 4) >= 0.6


# ---- the optimiser ---------------------------------------------------------------------------------------------------


def tensors(*shapes):
    return [torch.randn(shape) for shape in shapes]


def adam_arguments(shapes, averages, **changed):
    """Lists for one step at the third count; a shape's tensors are each other's neighbours in nothing."""
    squares = [t.square() for t in tensors(*shapes)]
    numbers = adam.Numbers(0.05, 0.5, 0.999, 1e-8, 0.1, False, False, 0.01)._replace(**changed)
    steps = [torch.full((), 2.0) for _ in shapes]
    return *(tensors(*shapes) for _ in range(3)), squares, steps, tensors(*shapes) if averages else [], numbers


ADAM_SHAPES = {
    "one launch": ((64, 32, 4, 4), (5,), (1,), (4097,)),
    "40 tensors": tuple((3 + i,) for i in range(40)),
}


@pytest.mark.parametrize(
    "changed", [{}, {"decoupled": True}, {"maximize": True}, {"beta1": 0.0}, {"lr": None}], ids=str
)
@pytest.mark.parametrize("averages", [False, True])
@pytest.mark.parametrize("shapes", ADAM_SHAPES.values(), ids=ADAM_SHAPES)
def test_adam(record, shapes, averages, changed):
    args = adam_arguments(shapes, averages, **({"lr": torch.tensor(0.05)} if "lr" in changed else changed))
    plain = adam.op.copies(args)
    want = adam.reference(*plain[:6], plain[6]._replace(lr=float(plain[6].lr)))
    for got, w in zip(adam.op.backends["cuda"].run(*args), want, strict=True):
        torch.testing.assert_close(got, w, rtol=1e-5, atol=1e-6)
    assert all(step == 3.0 for step in args[4])
    assert len(record.launches) == -(-len(shapes) // 32)


def test_adam_on_addresses_that_are_no_multiples_of_16(record):
    args = adam_arguments(((1001,),), averages=True)
    want = adam.reference(*adam.op.copies(args))
    args[0][0] = torch.cat([torch.zeros(1), args[0][0]])[1:]
    for got, w in zip(adam.op.backends["cuda"].run(*args), want, strict=True):
        torch.testing.assert_close(got, w, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("averages", [False, True])
def test_traffic_of_adam(record, averages):
    """7 or 9 accesses an element, where PyTorch's two passes make 10; whole sectors."""
    args = adam_arguments(((128, 64, 4, 4), (100,)), averages)
    size = args[0][0].numel() * 4
    record.configure(counting=True)
    adam.op.backends["cuda"].run(*args)
    assert record.bytes(size) == (9 if averages else 7) * size and record.sector_efficiency(size) == 1.0


# ---- the emulator's own reports --------------------------------------------------------------------------------------


def test_an_access_outside_the_tensors_is_reported(record):
    x, y = torch.randn(2, 3, 4), torch.empty(2, 3, 3)
    with pytest.raises(RuntimeError, match=r"simt: global memory in .*writes 16 bytes outside every tensor"):
        CUDA.call("bias_act_forward", x, 0, x, None, y, 2, 3, 4, False, 0, 0.0, 1.0, -1.0)
    assert functional.bias_act(x, activation=None).equal(x)  # and the next launch is unharmed


def test_launch_errors_name_the_op(record):
    with pytest.raises(ValueError, match=r"bias_act_forward: dtype must be in 0\.\.2, got 9"):
        CUDA.call("bias_act_forward", torch.zeros(1), 9, None, None, None, 1, 1, 1, False, 0, 0.0, 1.0, -1.0)


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


@layouts
@dtypes
@pytest.mark.parametrize(("f", "up", "down", "padding"), FIRS, ids=["axes apart", "cropped", "three halves"])
def test_upfirdn2d(record, ran, f, up, down, padding, dtype, layout):
    record.configure(seed=5)
    ours = lambda x: functional.upfirdn2d(x, f, up, down, padding)
    for shape in [(2, 3, 7, 5), (1, 20, 9, 8)]:
        against_plain(ours, plain_upfirdn2d(f, up, down, padding), (noise(*shape),), dtype, layout, "cuda")
    on_cuda(ran, "upfirdn2d")


@layouts
@pytest.mark.parametrize(("up", "down"), [(2, 1), (1, 2)])
def test_upfirdn2d_asks_for_the_taps_that_meet_samples(record, up, down, layout):
    """A thread an output: y is written once; what of x neighbours share comes from the cache."""
    x = torch.randn(2, 16, 12, 12).contiguous(memory_format=layout)
    record.configure(counting=True)
    y = OPS["upfirdn2d"].run(x, torch.rand(4, 4), [up, up], [down, down], [2, 1, 2, 1], False, 1.0)
    size = lambda t: t.numel() * t.element_size()
    written = [t for t in record.traffic if t.bytes == size(y)]
    assert sum(t.requested for t in written) == size(y) and sum(t.sectors for t in written) * 32 == size(y)
