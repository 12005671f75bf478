"""The native CPU kernels of norms, bias, losses and penalties against float64 PyTorch with autograd, by table."""

import functools
import math

import pytest
import torch
import torch.nn.functional as F

_C = pytest.importorskip("fastgan._C", reason="the native core is not built")

F32, BF16 = 0, 1
DTYPES = {F32: torch.float32, BF16: torch.bfloat16}
IDENTITY, RELU, LEAKY, TANH, SIGMOID, ELU, SELU, SOFTPLUS, SWISH, GELU, GELU_TANH = range(11)
PLAIN = 1.0, -1.0  # gain and clamp
D, G = 0, 1
KINDS = ["bce", "minimax", "lsgan", "hinge", "wasserstein", "relativistic"]
EPS, SLOPE = 1e-5, 0.2

# Error allowed beside the float64 reference on the same (rounded) inputs: a fraction of each value, which is what
# rounding the result costs, and a fraction of the tensor's largest value, which is what fp32 sums cost.
TOLERANCE = {F32: (1e-6, 2e-6), BF16: (2.0**-8, 1e-5)}


@pytest.fixture(params=list(_C.tables()))
def table(request):
    refused = _C.tables()[request.param]
    if refused:
        pytest.skip(f"{request.param}: {refused}")
    _C.use_table(request.param)
    yield request.param
    _C.use_table(None)


def check(got, want, dtype, what, sums=1.0):
    """`sums` scales the second tolerance: what a sum's terms cancel."""
    got, want = got.double().flatten(), want.double().flatten()
    assert got.isfinite().all(), f"{what}: not every element was written"
    each, whole = TOLERANCE[dtype]
    allowed = each * want.abs() + whole * sums * max(want.abs().max().item(), 1e-30)
    excess = ((got - want).abs() / allowed).max().item()
    assert excess <= 1, f"{what}: {excess:.3g} times the tolerance"


class Guarded:
    """An output of the kernel: NaN before, one element off alignment, with red zones that must stay as they are."""

    ZONE = 67

    def __init__(self, count, dtype=torch.float32):
        self.buffer = torch.full((count + 2 * self.ZONE,), torch.nan, dtype=dtype)
        self.buffer[: self.ZONE] = self.buffer[count + self.ZONE :] = 7.0
        self.inside = self.buffer[self.ZONE : self.ZONE + count]

    def data_ptr(self):
        return self.inside.data_ptr()

    def get(self):
        assert (self.buffer[: self.ZONE] == 7).all(), "wrote before the output"
        assert (self.buffer[self.ZONE + len(self.inside) :] == 7).all(), "wrote behind the output"
        return self.inside


def to_memory(x, channels_last):
    """[N, C, HW] -> what the kernel sees, one element off alignment."""
    flat = (x.transpose(1, 2) if channels_last else x).contiguous().flatten()
    return torch.cat([flat[:1], flat])[1:]


def from_memory(flat, shape, channels_last):
    n, c, hw = shape
    return flat.view(n, hw, c).transpose(1, 2) if channels_last else flat.view(n, c, hw)


def pointer(t):
    return 0 if t is None else t.data_ptr()


# ------------------------------------------------------------------------------------------------ bn_act


def activation(t, act):
    if act == RELU:
        return t.relu()
    return F.leaky_relu(t, SLOPE) if act == LEAKY else t


def bn_reference(x, weight, bias, mean, var, groups, training, act):
    n = len(x)
    parts = []
    for g in range(groups):
        part = x[g * n // groups : (g + 1) * n // groups]
        if training:
            m = part.mean(dim=(0, 2))
            v = (part - m[:, None]).square().mean(dim=(0, 2))
        else:
            m, v = mean[g], var[g]
        parts.append((part - m[:, None]) / (v[:, None] + EPS).sqrt())
    t = torch.cat(parts)
    if weight is not None:
        t = t * weight[:, None]
    if bias is not None:
        t = t + bias[:, None]
    return activation(t, act)


def statistics(x, groups):
    n, c, hw = x.shape
    by_group = x.view(groups, n // groups, c, hw)
    mean = by_group.mean(dim=(1, 3))
    return mean, (by_group - mean[:, None, :, None]).square().mean(dim=(1, 3))


@functools.cache
def bn_case(shape, dtype, groups, training, act, affine):
    """Inputs in the kernel's dtypes and every derivative in float64."""
    n, c, hw = shape
    gen = torch.Generator().manual_seed(hash((shape, groups, training, act)) % 1000)

    def draw(*size):
        return torch.randn(*size, generator=gen)

    x = (draw(n, c, hw) * 2 + 3 * draw(1, c, 1)).to(DTYPES[dtype])
    dy, ddx = (draw(n, c, hw).to(DTYPES[dtype]) for _ in range(2))
    weight, bias = (draw(c) + 1, draw(c)) if affine else (None, None)
    ddweight, ddbias = draw(c), draw(c)
    x64, dy64 = x.double().requires_grad_(), dy.double().requires_grad_()
    w64, b64 = (None, None) if weight is None else (weight.double().requires_grad_(), bias.double().requires_grad_())
    if training:
        mean, var = statistics(x.double(), groups)
    else:
        mean, var = draw(groups, c) + 1, draw(groups, c).square() + 0.5
    mean, var = mean.float(), var.float()
    y = bn_reference(x64, w64, b64, mean.double(), var.double(), groups, training, act)
    leaves = [x64] + ([w64, b64] if affine else [])
    first = torch.autograd.grad(y, leaves, dy64, create_graph=True)
    cotangents = [ddx.double()] + ([ddweight.double(), ddbias.double()] if affine else [])
    objective = sum((a * b).sum() for a, b in zip(first, cotangents, strict=True))
    second = torch.autograd.grad(objective, [dy64, x64] + ([w64] if affine else []), allow_unused=True)
    zero = [torch.zeros_like(dy64), torch.zeros_like(x64)] + ([torch.zeros_like(w64)] if affine else [])
    second = [z if s is None else s for s, z in zip(second, zero, strict=True)]
    inputs = dict(x=x, dy=dy, ddx=ddx, weight=weight, bias=bias, ddweight=ddweight, ddbias=ddbias, mean=mean, var=var)
    return inputs, y.detach(), [f.detach() for f in first], [s.detach() for s in second]


SHAPES = [  # N, C, HW, groups
    (2, 64, 16, 1),
    (2, 3, 49, 2),
    (6, 5, 1640, 3),  # enough for two threads, by pixels or samples
    (4, 17, 1, 1),  # BatchNorm1d
    (6, 130, 9, 2),
    (3, 1, 7, 1),
    (64, 48, 16, 2),  # two threads, by channels
    (1, 2, 30011, 1),  # one sample: pixels are what threads can share
    (9, 100, 81, 3),
]
CONFIGS = [  # training, act, affine
    (True, LEAKY, True),
    (True, RELU, True),
    (True, IDENTITY, False),
    (False, LEAKY, True),
    (False, RELU, False),
]

layouts = pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
dtypes = pytest.mark.parametrize("dtype", [F32, BF16], ids=["fp32", "bf16"])


@layouts
@dtypes
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bn_act(table, shape, dtype, channels_last):
    *size, groups = shape
    for config in CONFIGS:
        run_bn_act(tuple(size), groups, dtype, channels_last, *config)


def run_bn_act(size, groups, dtype, channels_last, training, act, affine):
    """Forward, backward and double backward of one case."""
    n, c, hw = size
    inputs, y_want, first_want, second_want = bn_case(size, dtype, groups, training, act, affine)
    memory = {k: to_memory(inputs[k], channels_last) for k in ("x", "dy", "ddx")}
    weight, bias = inputs["weight"], inputs["bias"]
    tail = (n, c, hw, groups, channels_last, training, EPS, act, SLOPE, 2)

    def tensor_out():
        return Guarded(n * c * hw, DTYPES[dtype])

    def compare(out, want, what):
        case = f"{what} (training={training}, act={act}, affine={affine})"
        check(from_memory(out.get(), size, channels_last), want, dtype, case)

    # forward
    y, mean, var = tensor_out(), Guarded(groups * c), Guarded(groups * c)
    if not training:
        mean.inside.copy_(inputs["mean"].flatten())
        var.inside.copy_(inputs["var"].flatten())
    _C.bn_act_forward(
        dtype, pointer(memory["x"]), pointer(weight), pointer(bias), pointer(mean), pointer(var), pointer(y), *tail
    )
    check(mean.get(), inputs["mean"], F32, "mean")
    check(var.get(), inputs["var"], F32, "var")
    compare(y, y_want, "y")

    # backward, from the statistics that the forward wrote
    dx, dweight, dbias = tensor_out(), Guarded(c), Guarded(c)
    _C.bn_act_backward(
        dtype,
        pointer(memory["dy"]),
        pointer(memory["x"]),
        pointer(weight),
        pointer(bias),
        pointer(mean),
        pointer(var),
        pointer(dx),
        pointer(dweight),
        pointer(dbias),
        *tail,
    )
    compare(dx, first_want[0], "dx")
    if affine:
        check(dweight.get(), first_want[1], F32, "dweight")
        check(dbias.get(), first_want[2], F32, "dbias")

    # double backward
    d_dy, d_x, d_weight = tensor_out(), tensor_out(), Guarded(c)
    _C.bn_act_double_backward(
        dtype,
        pointer(memory["ddx"]),
        pointer(inputs["ddweight"]) if affine else 0,
        pointer(inputs["ddbias"]) if affine else 0,
        pointer(memory["dy"]),
        pointer(memory["x"]),
        pointer(weight),
        pointer(bias),
        pointer(mean),
        pointer(var),
        pointer(d_dy),
        pointer(d_x),
        pointer(d_weight),
        *tail,
    )
    compare(d_dy, second_want[0], "d_dy")
    compare(d_x, second_want[1], "d_x")
    if affine:
        check(d_weight.get(), second_want[2], F32, "d_weight")


def run_statistics(x, channels_last, groups=1, threads=2):
    """mean, var [G, C] as bn_act_forward computes them in training."""
    n, c, hw = x.shape
    code = BF16 if x.dtype == torch.bfloat16 else F32
    memory, y, mean, var = to_memory(x, channels_last), torch.empty_like(x), Guarded(groups * c), Guarded(groups * c)
    _C.bn_act_forward(
        code,
        pointer(memory),
        0,
        0,
        pointer(mean),
        pointer(var),
        pointer(y),
        n,
        c,
        hw,
        groups,
        channels_last,
        True,
        EPS,
        IDENTITY,
        0.0,
        threads,
    )
    return mean.get().view(groups, c), var.get().view(groups, c)


@layouts
@pytest.mark.parametrize("kind", ["large mean", "outlier first", "two levels", "constant"])
def test_statistics_do_not_cancel(table, channels_last, kind):
    x = torch.randn(16, 6, 1600, generator=torch.Generator().manual_seed(1))
    if kind == "large mean":
        x += 3e4  # mean / std = 3e4: E[x²] - E[x]² in fp32 has no digit left
    elif kind == "outlier first":
        x[0, :, 0] = 300.0
    elif kind == "two levels":
        x[8:] += 2000.0
    else:
        x = torch.full_like(x, 1234.567)
    mean, var = run_statistics(x, channels_last)
    want_mean, want_var = statistics(x.double(), 1)
    # The mean to its own rounding, or to a millionth of the standard deviation.
    assert ((mean - want_mean).abs() <= 2e-7 * want_mean.abs() + 1e-6 * want_var.sqrt()).all()
    torch.testing.assert_close(var, want_var.float(), rtol=1e-5, atol=0)


@layouts
def test_bn_act_propagates_nan_and_inf(table, channels_last):
    x = torch.randn(4, 5, 70, generator=torch.Generator().manual_seed(2))
    x[1, 2, 3], x[2, 4, 5] = torch.nan, torch.inf
    mean, var = run_statistics(x, channels_last)
    finite = torch.tensor([True, True, False, True, False])
    assert mean[0].isfinite().equal(finite) and var[0].isfinite().equal(finite)
    assert mean[0, 2].isnan() and mean[0, 4] == torch.inf and var[0, 4].isnan()


@layouts
@pytest.mark.parametrize("n, hw", [(0, 4), (2, 0)])
def test_empty(table, channels_last, n, hw):
    """No pointer is touched but those of the parameters' gradients, which are 0: every other address is a trap."""
    trap = 8
    dweight, dbias, d_weight, dbias_act = (Guarded(3) for _ in range(4))
    tail = (n, 3, hw, 1, channels_last, True, EPS, LEAKY, SLOPE, 2)
    _C.bn_act_forward(F32, trap, trap, trap, trap, trap, trap, *tail)
    _C.bn_act_backward(F32, trap, trap, trap, trap, trap, trap, trap, pointer(dweight), pointer(dbias), *tail)
    _C.bn_act_double_backward(
        F32, trap, trap, trap, trap, trap, trap, trap, trap, trap, trap, trap, pointer(d_weight), *tail
    )
    _C.bias_act_forward(F32, trap, trap, trap, n, 3, hw, channels_last, TANH, 0.0, *PLAIN, 2)
    _C.bias_act_backward(F32, trap, trap, trap, pointer(dbias_act), n, 3, hw, channels_last, TANH, 0.0, *PLAIN, 2)
    for out in (dweight, dbias, d_weight, dbias_act):
        assert out.get().eq(0).all()


@layouts
@dtypes
def test_absent_outputs(table, dtype, channels_last):
    """What is not asked for is not needed, and what is asked for does not change."""
    n, c, hw = size = (3, 20, 37)
    inputs, _, first_want, _ = bn_case(size, dtype, 1, True, LEAKY, True)
    memory = {k: to_memory(inputs[k], channels_last) for k in ("x", "dy", "ddx")}
    w, b, mean, var = (pointer(inputs[k]) for k in ("weight", "bias", "mean", "var"))
    dy, x = pointer(memory["dy"]), pointer(memory["x"])
    tail = (n, c, hw, 1, channels_last, True, EPS, LEAKY, SLOPE, 2)
    dx, dbias, d_x = Guarded(n * c * hw, DTYPES[dtype]), Guarded(c), Guarded(n * c * hw, DTYPES[dtype])
    _C.bn_act_backward(dtype, dy, x, w, b, mean, var, pointer(dx), 0, 0, *tail)
    check(from_memory(dx.get(), size, channels_last), first_want[0], dtype, "dx alone")
    _C.bn_act_backward(dtype, dy, x, w, b, mean, var, 0, 0, pointer(dbias), *tail)
    check(dbias.get(), first_want[2], F32, "dbias alone")
    # Only the cotangent of dbias, by autograd: d(dbias)/d(dy) = mask, nothing flows to x.
    d_dy, d_weight = Guarded(n * c * hw, DTYPES[dtype]), Guarded(c)
    cotangent = pointer(inputs["ddbias"])
    _C.bn_act_double_backward(
        dtype, 0, 0, cotangent, dy, x, w, b, mean, var, pointer(d_dy), pointer(d_x), pointer(d_weight), *tail
    )
    t = bn_reference(inputs["x"].double(), inputs["weight"].double(), inputs["bias"].double(), None, None, 1, True, 0)
    want = inputs["ddbias"].double()[:, None] * torch.where(t > 0, 1.0, torch.tensor(SLOPE, dtype=torch.float64))
    check(from_memory(d_dy.get(), size, channels_last), want, dtype, "d_dy of dbias alone")
    assert d_x.get().eq(0).all() and d_weight.get().eq(0).all()


# ------------------------------------------------------------------------------------------------ gn_act


@functools.cache
def gn_case(shape, dtype, groups, act, affine):
    """Inputs in the kernel's dtypes and every derivative in float64."""
    n, c, hw = shape
    for seed in range(20):
        gen = torch.Generator().manual_seed(seed)

        def draw(*size):
            return torch.randn(*size, generator=gen)  # noqa: B023  called in this turn of the loop only

        x = (draw(n, c, hw) * 2 + 3 * draw(1, c, 1)).to(DTYPES[dtype])
        dy, ddx = (draw(n, c, hw).to(DTYPES[dtype]) for _ in range(2))
        weight, bias = (draw(c) + 1, draw(c)) if affine else (None, None)
        ddweight, ddbias = (draw(c), draw(c)) if affine else (None, None)
        x64, dy64 = x.double().requires_grad_(), dy.double().requires_grad_()
        w64, b64 = (weight.double().requires_grad_(), bias.double().requires_grad_()) if affine else (None, None)
        t = F.group_norm(x64, groups, w64, b64, EPS)
        if act == IDENTITY or t.abs().min() > 1e-6:  # no element so near the kink that rounding decides on its side
            break
    y = activation(t, act)
    leaves = [x64, *([w64, b64] if affine else [])]
    first = torch.autograd.grad(y, leaves, dy64, create_graph=True)
    cotangents = [ddx.double(), *([ddweight.double(), ddbias.double()] if affine else [])]
    objective = sum((a * b).sum() for a, b in zip(first, cotangents, strict=True))
    second = torch.autograd.grad(objective, [dy64, x64, *([w64] if affine else [])])
    parts = x.double().view(n, groups, -1)
    inputs = dict(x=x, dy=dy, ddx=ddx, weight=weight, bias=bias, ddweight=ddweight, ddbias=ddbias)
    inputs |= dict(mean=parts.mean(2), var=parts.var(2, correction=0))
    return inputs, y.detach(), [f.detach() for f in first], [s.detach() for s in second]


def assert_statistics(mean, var, want_mean, want_var):
    """The mean to its own rounding, or to a millionth of the standard deviation."""
    want_mean, want_var = want_mean.flatten(), want_var.flatten()
    assert ((mean.get() - want_mean).abs() <= 2e-7 * want_mean.abs() + 1e-6 * want_var.sqrt()).all()
    torch.testing.assert_close(var.get(), want_var.float(), rtol=1e-5, atol=0)


@layouts
@dtypes
@pytest.mark.parametrize(
    "shape",  # N, C, HW, groups
    [
        (3, 24, 49, 4),
        (2, 3, 49, 3),
        (64, 48, 16, 6),  # two threads, each with its own samples or groups
        (1, 40, 900, 5),  # two threads on one sample (channels_last)
        (3, 20, 1100, 20),
        (2, 6, 5003, 2),  # sums of more than one run
        (5, 130, 1, 1),  # rows
        (40, 24, 1, 3),
        (3, 9001, 1, 1),
        (400, 100, 1, 2),  # more rows than are added up in fp32
        (6, 1, 9, 1),
    ],
    ids=str,
)
def test_gn_act(table, shape, dtype, channels_last):
    *size, groups = shape
    for act, affine in [(LEAKY, True), (RELU, True), (IDENTITY, False)]:
        run_gn_act(tuple(size), groups, dtype, channels_last, act, affine)


def run_gn_act(size, groups, dtype, channels_last, act, affine):
    """Forward, backward and double backward of one case."""
    n, c, hw = size
    inputs, y_want, first_want, second_want = gn_case(size, dtype, groups, act, affine)
    memory = {k: to_memory(inputs[k], channels_last) for k in ("x", "dy", "ddx")}
    dy, x = pointer(memory["dy"]), pointer(memory["x"])
    weight, bias = pointer(inputs["weight"]), pointer(inputs["bias"])
    tail = (n, c, hw, groups, channels_last, EPS, act, SLOPE, 2)

    def tensor_out():
        return Guarded(n * c * hw, DTYPES[dtype])

    def compare(out, want, what):
        check(from_memory(out.get(), size, channels_last), want, dtype, what)

    y, mean, var = tensor_out(), Guarded(n * groups), Guarded(n * groups)
    _C.gn_act_forward(dtype, x, weight, bias, pointer(mean), pointer(var), pointer(y), *tail)
    assert_statistics(mean, var, inputs["mean"], inputs["var"])
    compare(y, y_want, "y")

    # from the statistics that the forward wrote
    dx, dweight, dbias = tensor_out(), Guarded(c), Guarded(c)
    _C.gn_act_backward(
        dtype,
        dy,
        x,
        weight,
        bias,
        pointer(mean),
        pointer(var),
        pointer(dx),
        pointer(dweight) if affine else 0,
        pointer(dbias) if affine else 0,
        *tail,
    )
    compare(dx, first_want[0], "dx")
    d_dy, d_x, d_weight = tensor_out(), tensor_out(), Guarded(c)
    _C.gn_act_double_backward(
        dtype,
        pointer(memory["ddx"]),
        pointer(inputs["ddweight"]),
        pointer(inputs["ddbias"]),
        dy,
        x,
        weight,
        bias,
        pointer(mean),
        pointer(var),
        pointer(d_dy),
        pointer(d_x),
        pointer(d_weight) if affine else 0,
        *tail,
    )
    compare(d_dy, second_want[0], "d_dy")
    compare(d_x, second_want[1], "d_x")
    if affine:
        check(dweight.get(), first_want[1], F32, "dweight")
        check(dbias.get(), first_want[2], F32, "dbias")
        check(d_weight.get(), second_want[2], F32, "d_weight")


@layouts
@pytest.mark.parametrize("shape", [(2, 8, 4000, 2), (3, 8000, 1, 1)], ids=str)
@pytest.mark.parametrize("kind", ["large mean", "outlier first", "two levels", "constant"])
def test_gn_statistics_do_not_cancel(table, channels_last, shape, kind):
    *size, groups = shape
    n, c, hw = size
    x = torch.randn(size, generator=torch.Generator().manual_seed(1))
    if kind == "large mean":
        x += 3e4
    elif kind == "outlier first":
        x[:, 0, 0] = 300.0
    elif kind == "two levels":
        x[:, c // 2 + 1 :] += 2000.0
    else:
        x = torch.full_like(x, 1234.567)
    memory, y, mean, var = to_memory(x, channels_last), Guarded(x.numel()), Guarded(n * groups), Guarded(n * groups)
    tail = (n, c, hw, groups, channels_last, EPS, IDENTITY, 0.0, 2)
    _C.gn_act_forward(F32, pointer(memory), 0, 0, pointer(mean), pointer(var), pointer(y), *tail)
    parts = x.double().view(n * groups, -1)
    want_mean, want_var = parts.mean(1), parts.var(1, correction=0)
    assert_statistics(mean, var, want_mean, want_var)


@layouts
@pytest.mark.parametrize("n, hw", [(0, 4), (2, 0)])
def test_gn_empty_and_absent_outputs(table, channels_last, n, hw):
    """Empty: no pointer is touched but those of the parameters' gradients, which are 0. Absent: not needed."""
    trap = 8
    dweight, dbias, d_weight = (Guarded(4) for _ in range(3))
    tail = (n, 4, hw, 2, channels_last, EPS, LEAKY, SLOPE, 2)
    _C.gn_act_forward(F32, trap, trap, trap, trap, trap, trap, *tail)
    _C.gn_act_backward(F32, trap, trap, trap, trap, trap, trap, trap, pointer(dweight), pointer(dbias), *tail)
    _C.gn_act_double_backward(
        F32, trap, trap, trap, trap, trap, trap, trap, trap, trap, trap, trap, pointer(d_weight), *tail
    )
    for out in (dweight, dbias, d_weight):
        assert out.get().eq(0).all()
    for size, groups in [((3, 20, 37), 4), ((3, 40, 1), 2)]:
        inputs, _, first_want, _ = gn_case(size, F32, groups, LEAKY, True)
        dy, x = (to_memory(inputs[k], channels_last) for k in ("dy", "x"))
        w, b = pointer(inputs["weight"]), pointer(inputs["bias"])
        mean, var, dbias = inputs["mean"].float(), inputs["var"].float(), Guarded(size[1])
        tail = (*size, groups, channels_last, EPS, LEAKY, SLOPE, 2)
        statistics = pointer(mean), pointer(var)
        _C.gn_act_backward(F32, pointer(dy), pointer(x), w, b, *statistics, 0, 0, pointer(dbias), *tail)
        check(dbias.get(), first_want[2], F32, "dbias alone")


# ------------------------------------------------------------------------------------------------ bias_act


@layouts
@dtypes
@pytest.mark.parametrize("act", range(11))
def test_bias_act(table, dtype, channels_last, act):
    for size in [(2, 3, 49), (3, 100, 171), (5, 17, 1), (1, 1, 3), (40, 64, 16)]:
        for with_bias, form in ((True, (1.5, 1.0)), (False, PLAIN), (True, (-0.7, -1.0))):
            run_bias_act(size, dtype, channels_last, act, with_bias, *form)


PHI = [
    lambda t: t,
    torch.relu,
    lambda t: F.leaky_relu(t, SLOPE),
    torch.tanh,
    torch.sigmoid,
    F.elu,
    F.selu,
    F.softplus,
    F.silu,
    F.gelu,
    lambda t: F.gelu(t, approximate="tanh"),
]
# from the output, of swish and gelu from the input
SLOPES = [
    torch.ones_like,
    lambda y: (y > 0).double(),
    lambda y: torch.where(y > 0, 1.0, torch.tensor(SLOPE, dtype=torch.float64)),
    lambda y: 1 - y * y,
    lambda y: y * (1 - y),
    lambda y: torch.where(y > 0, 1.0, y + 1),
    lambda y: torch.where(y > 0, 1.0507009873554805, y + 1.7580993408473766),
    lambda y: -torch.expm1(-y),
    lambda t: torch.sigmoid(t) * (1 + t * (1 - torch.sigmoid(t))),
    lambda t: torch.ops.aten.gelu_backward(torch.ones_like(t), t, approximate="none"),
    lambda t: torch.ops.aten.gelu_backward(torch.ones_like(t), t, approximate="tanh"),
]


def run_bias_act(size, dtype, channels_last, act, with_bias, gain, clamp):
    n, c, hw = size
    gen = torch.Generator().manual_seed(3)
    x, dy = ((torch.randn(size, generator=gen) * 2).to(DTYPES[dtype]) for _ in range(2))
    bias = torch.randn(c, generator=gen) if with_bias else None
    x64 = x.double() if bias is None else x.double() + bias.double()[:, None]
    y = Guarded(n * c * hw, DTYPES[dtype])
    tail = (n, c, hw, channels_last, act, SLOPE, gain, clamp, 2)
    x_memory, dy_memory = to_memory(x, channels_last), to_memory(dy, channels_last)
    _C.bias_act_forward(dtype, pointer(x_memory), pointer(bias), pointer(y), *tail)
    got = from_memory(y.get(), size, channels_last)
    check(got, limited(gain * PHI[act](x64), clamp), dtype, "y")

    # the contract: from the output as stored
    source = x if act >= SWISH else got
    out = gain * PHI[act](x.double()) if act >= SWISH else got.double()
    memory = to_memory(source, channels_last)
    want = dy.double() * gain * SLOPES[act](source.double() if act >= SWISH else source.double() / gain)
    want = want.masked_fill(out.abs() >= clamp, 0) if clamp >= 0 else want
    for dbias in (Guarded(c), None):
        dx = Guarded(n * c * hw, DTYPES[dtype])
        _C.bias_act_backward(dtype, pointer(dy_memory), pointer(memory), pointer(dx), pointer(dbias), *tail)
        check(from_memory(dx.get(), size, channels_last), want, dtype, "dx")
        if dbias is not None:
            check(dbias.get(), want.sum(dim=(0, 2)), F32, "dbias")


def limited(y, clamp):
    return y.clamp(-clamp, clamp) if clamp >= 0 else y


@pytest.mark.parametrize("act", [TANH, SIGMOID])
def test_tanh_and_sigmoid_to_three_ulp(table, act):
    near = torch.linspace(-20, 20, 40001)
    small = torch.logspace(-38, 0, 5000)
    edges = torch.tensor([0.0, -0.0, 88.0, 88.73, 104.0, 1e4, 3e38, torch.inf, 0.625, 0.62499994])
    x = torch.cat([near, small, -small, edges, -edges])
    y = Guarded(len(x))
    _C.bias_act_forward(F32, pointer(x), 0, pointer(y), 1, 1, len(x), False, act, 0.0, *PLAIN, 1)
    want = (torch.tanh if act == TANH else torch.sigmoid)(x.double())
    normal = torch.finfo(torch.float32).tiny
    ulp = torch.finfo(torch.float32).eps * 2.0 ** want.abs().clamp(min=normal).log2().floor()
    assert ((y.get().double() - want).abs() / ulp).max() <= 3
    nan = torch.full((3,), torch.nan)
    _C.bias_act_forward(F32, pointer(nan), 0, pointer(nan), 1, 1, 3, False, act, 0.0, *PLAIN, 1)
    assert nan.isnan().all()


def test_gelu_and_its_gradient_over_the_whole_range(table):
    """Its lower tail keeps its digits, but for what rounding does to the exponents, which grow with x^2."""
    x = torch.cat([torch.linspace(-10, 10, 40001), torch.logspace(-38, 1, 3000), -torch.logspace(-38, 1, 3000)])
    y, dx, one = Guarded(len(x)), Guarded(len(x)), torch.ones(len(x))
    for act in (GELU, GELU_TANH):
        tail = (1, 1, len(x), False, act, 0.0, *PLAIN, 1)
        _C.bias_act_forward(F32, pointer(x), 0, pointer(y), *tail)
        _C.bias_act_backward(F32, pointer(one), pointer(x), pointer(dx), 0, *tail)
        t, slope = x.double(), SLOPES[act](x.double())
        logit = 2 * (2 / torch.pi) ** 0.5 * (t + 0.044715 * t**3)
        # F.gelu cancels in its lower tail, in float64 too
        want = t * (torch.special.erfc(-t / 2**0.5) / 2 if act == GELU else torch.sigmoid(logit))
        bound = want.abs().clamp(min=1e-30) * (8 + 2 * t * t) * 2.0**-23
        assert ((y.get().double() - want).abs() <= bound).all()
        assert (dx.get().double() - slope).abs().max() < 4e-7
    special = torch.tensor([torch.nan, torch.inf, 1e30, -1e30])
    _C.bias_act_forward(F32, pointer(special), 0, pointer(special), 1, 1, 4, False, GELU, 0.0, *PLAIN, 1)
    assert special[0].isnan() and special[1:].tolist() == [torch.inf, special[2].item(), 0.0] and special[2] > 9e29


@dtypes
def test_special_values(table, dtype):
    """relu and leaky_relu of NaN and inf, and their gradients, as torch has them; bf16 rounds as torch does."""
    inf, nan = torch.inf, torch.nan
    x = torch.tensor([-inf, inf, nan, -0.0, 0.0, 1.0, -1.0, 3.4e38, 1e-40, 1.00390625, 1.01171875]).to(DTYPES[dtype])
    dy = torch.tensor([nan, inf, 2.0, inf, 5.0, nan, -inf, 1.0, 1.0, 1.0, 1.0]).to(DTYPES[dtype])
    for act, forward in ((RELU, F.relu), (LEAKY, lambda t: F.leaky_relu(t, SLOPE)), (IDENTITY, lambda t: t)):
        for bias in (0.0, 1.0):
            shift, y, dx = torch.tensor([bias]), torch.empty_like(x), torch.empty_like(x)
            tail = (1, 1, len(x), False, act, SLOPE, *PLAIN, 1)
            _C.bias_act_forward(dtype, pointer(x), pointer(shift), pointer(y), *tail)
            want = forward(x.float() + bias).to(DTYPES[dtype])
            torch.testing.assert_close(y, want, rtol=0, atol=0, equal_nan=True)
        _C.bias_act_backward(dtype, pointer(dy), pointer(x), pointer(dx), 0, *tail)
        leaf = x.float().requires_grad_()
        (want,) = torch.autograd.grad(forward(leaf), leaf, dy.float())
        torch.testing.assert_close(dx, want.to(DTYPES[dtype]), rtol=0, atol=0, equal_nan=True)


# ------------------------------------------------------------------------------------------------ gan_loss


def loss_reference(fake, real, kind, side, s):
    sp = F.softplus
    if kind == "relativistic":
        return sp(fake - real).mean() if side == D else sp(real - fake).mean()
    if side == G:
        return {
            "bce": lambda: sp(-fake).mean(),
            "minimax": lambda: -sp(fake).mean(),
            "lsgan": lambda: 0.5 * (fake - 1).square().mean(),
        }.get(kind, lambda: -fake.mean())()
    return {
        "bce": lambda: (sp(real) - (1 - s) * real).mean() + sp(fake).mean(),
        "minimax": lambda: (sp(real) - (1 - s) * real).mean() + sp(fake).mean(),
        "lsgan": lambda: 0.5 * (real - (1 - s)).square().mean() + 0.5 * fake.square().mean(),
        "hinge": lambda: (1 - real).relu().mean() + (1 + fake).relu().mean(),
        "wasserstein": lambda: fake.mean() - real.mean(),
    }[kind]()


@dtypes
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("side", [D, G], ids=["d", "g"])
def test_gan_loss(table, kind, side, dtype):
    for counts in [(1, 1), (64, 64), (37, 75), (9000, 9000), (17, 0)]:
        for smoothing in (0.0, 0.1):
            run_gan_loss(counts, kind, side, dtype, smoothing)


def run_gan_loss(counts, kind, side, dtype, smoothing):
    n_fake, n_real = counts
    if (kind == "relativistic" and n_fake != n_real) or (side == D and not n_real):
        with pytest.raises(ValueError, match="gan_loss_forward"):
            _C.gan_loss_forward(dtype, 8, 8, 8, 8, n_fake, n_real, KINDS.index(kind), side, smoothing, 1)
        return
    gen = torch.Generator().manual_seed(4)
    fake, real = ((torch.randn(n, generator=gen) * 3).to(DTYPES[dtype]) for n in counts)
    fake64, real64 = fake.double().requires_grad_(), real.double().requires_grad_()
    loss = loss_reference(fake64, real64, kind, side, smoothing)
    tail = (n_fake, n_real, KINDS.index(kind), side, smoothing)
    loss_out, statistics = Guarded(1), Guarded(6)
    logits = (pointer(fake), pointer(real) if n_real else 0)
    _C.gan_loss_forward(dtype, *logits, pointer(loss_out), pointer(statistics), *tail, 2)
    r, f = (real64.detach(), fake64.detach()) if n_real else (torch.zeros(1).double() - 1e30, fake64.detach())
    want = [loss, r.mean(), f.mean(), r.sigmoid().mean(), f.sigmoid().mean(), (r > 0).double().mean()]
    want.append((f < 0).double().mean())
    want = torch.stack([torch.as_tensor(v) for v in want]).detach()
    if not n_real:
        want[1] = 0
    torch.testing.assert_close(torch.cat([loss_out.get(), statistics.get()]).double(), want, rtol=2e-6, atol=2e-6)
    alone = Guarded(1)
    _C.gan_loss_forward(dtype, *logits, pointer(alone), 0, *tail, 2)  # no statistics wanted
    torch.testing.assert_close(alone.get().double(), want[:1], rtol=2e-6, atol=2e-6)

    dloss = torch.tensor([1.75])
    dfake, dreal = torch.autograd.grad(loss, [fake64, real64], dloss.double()[0], allow_unused=True)
    got_fake, got_real = Guarded(n_fake, DTYPES[dtype]), Guarded(n_real, DTYPES[dtype])
    _C.gan_loss_backward(dtype, pointer(dloss), *logits, pointer(got_fake), pointer(got_real), *tail, 2)
    check(got_fake.get(), dfake, dtype, "dfake")
    if n_real:
        check(got_real.get(), torch.zeros_like(real64) if dreal is None else dreal, dtype, "dreal")
    _C.gan_loss_backward(dtype, pointer(dloss), *logits, 0, 0, *tail, 3)  # neither gradient wanted


def test_softplus_over_the_whole_range(table):
    """Through the minimax G loss of one logit, -softplus(f): relative accuracy for tiny results, too."""
    for x in [-1e4, -104.0, -88.0, -30.0, -5.0, -1.0, -1e-3, 0.0, 1e-3, 1.0, 17.0, 88.0, 1e4, math.inf, -math.inf]:
        logit, out, statistics = torch.tensor([x]), Guarded(1), Guarded(6)
        _C.gan_loss_forward(
            F32, pointer(logit), 0, pointer(out), pointer(statistics), 1, 0, KINDS.index("minimax"), G, 0.0, 1
        )
        want = -torch.logaddexp(torch.zeros(1).double(), logit.double())
        torch.testing.assert_close(out.get().double(), want, rtol=5e-7, atol=1e-44)


# ------------------------------------------------------------------------------------------------ penalties


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n, m", [(3, 5), (1, 12289), (7, 4096), (65, 33)])
def test_interpolate(table, n, m, dtype):
    real, fake = (torch.randn(n * m + 1).to(DTYPES[dtype])[1:] for _ in range(2))
    epsilon, y = torch.rand(n), Guarded(n * m, DTYPES[dtype])
    epsilon[0] = 1.0
    _C.interpolate_forward(dtype, pointer(real), pointer(fake), pointer(epsilon), 0, pointer(y), n, m, 2)
    e = epsilon.double().repeat_interleave(m)
    check(y.get(), e * real.double() + (1 - e) * fake.double(), dtype, "y")
    assert torch.equal(y.get()[:m], real[:m])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n, m", [(3, 5), (1, 12289), (7, 4096), (65, 33)])
def test_two_coefficients_and_one_alone(table, n, m, dtype):
    real, fake = (torch.randn(n * m + 1).to(DTYPES[dtype])[1:] for _ in range(2))
    epsilon, rest = torch.randn(n), torch.randn(n)
    e, other = (v.double().repeat_interleave(m) for v in (epsilon, rest))
    y, alone = (Guarded(n * m, DTYPES[dtype]) for _ in range(2))
    ends = pointer(real), pointer(fake), pointer(epsilon), pointer(rest)
    _C.interpolate_forward(dtype, *ends, pointer(y), n, m, 2)
    _C.interpolate_forward(dtype, pointer(real), 0, pointer(epsilon), 0, pointer(alone), n, m, 2)
    check(y.get(), e * real.double() + other * fake.double(), dtype, "y")
    check(alone.get(), e * real.double(), dtype, "alone")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n, m", [(3, 5), (1, 12289), (7, 4096), (65, 33)])
def test_sample_dot(table, n, m, dtype):
    x, y = (torch.randn(n * m + 1).to(DTYPES[dtype])[1:] + 1 for _ in range(2))
    dot = Guarded(n)
    _C.sample_dot(dtype, pointer(x), pointer(y), pointer(dot), n, m, 2)
    check(dot.get(), (x.double() * y.double()).view(n, m).sum(1), F32, "dot")


@pytest.mark.parametrize("target", [0.0, 1.0])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n, m", [(3, 5), (1, 12289), (7, 4096), (65, 33)])
def test_grad_norm_penalty(table, n, m, dtype, target):
    g = torch.randn(n * m + 1).to(DTYPES[dtype])[1:]
    if n > 1:
        g[:m] = 0  # a sample whose gradient vanishes
    penalty, norm, dg = Guarded(n), Guarded(n), Guarded(n * m, DTYPES[dtype])
    _C.grad_norm_penalty_forward(dtype, pointer(g), pointer(penalty), pointer(norm), n, m, target, 2)
    rows = g.double().view(n, m)
    want = rows.norm(dim=1)
    check(norm.get(), want, F32, "norm")
    check(penalty.get(), (want - target).square(), F32, "penalty")
    slope = torch.where(want > 0, 2 - 2 * target / want, 2.0 if target == 0 else 0.0)
    dpenalty = torch.randn(n)
    norm = norm.get().clone()
    _C.grad_norm_penalty_backward(dtype, pointer(dpenalty), pointer(g), pointer(norm), pointer(dg), n, m, target, 2)
    check(dg.get(), (dpenalty.double() * slope)[:, None] * rows, dtype, "dg")


# ------------------------------------------------------------------------------------------------ threads, refusals


@layouts
@pytest.mark.parametrize("shape", [(8, 64, 300), (2, 5, 16411), (300, 513, 1), (9, 12, 1600)], ids=str)
def test_eight_threads_are_deterministic(table, shape, channels_last):
    n, c, hw = shape
    gen = torch.Generator().manual_seed(5)
    x, dy = (torch.randn(n * c * hw, generator=gen) for _ in range(2))
    weight, bias = torch.randn(c, generator=gen), torch.randn(c, generator=gen)

    def run(threads):
        out = [torch.full((n * c * hw,), torch.nan) for _ in range(4)]
        small = [torch.full((c,), torch.nan) for _ in range(6)]
        tail = (n, c, hw, 1, channels_last, True, EPS, LEAKY, SLOPE, threads)
        p = [pointer(t) for t in (weight, bias, small[0], small[1])]
        _C.bn_act_forward(F32, pointer(x), *p, pointer(out[0]), *tail)
        _C.bn_act_backward(
            F32, pointer(dy), pointer(x), *p, pointer(out[1]), pointer(small[2]), pointer(small[3]), *tail
        )
        _C.bn_act_double_backward(
            F32,
            pointer(out[1]),
            pointer(weight),
            pointer(bias),
            pointer(dy),
            pointer(x),
            *p,
            pointer(out[2]),
            pointer(out[3]),
            pointer(small[4]),
            *tail,
        )
        _C.bias_act_backward(
            F32,
            pointer(dy),
            pointer(out[0]),
            pointer(out[1]),
            pointer(small[5]),
            n,
            c,
            hw,
            channels_last,
            LEAKY,
            SLOPE,
            *PLAIN,
            threads,
        )
        more = [torch.full((n,), torch.nan), torch.full((n,), torch.nan)]
        _C.grad_norm_penalty_forward(F32, pointer(x), pointer(more[0]), pointer(more[1]), n, c * hw, 1.0, threads)
        return out + small + more

    first, again, alone = run(8), run(8), run(1)
    for a, b, one in zip(first, again, alone, strict=True):
        assert torch.equal(a, b)  # bit for bit, and no NaN is left
        torch.testing.assert_close(a, one, rtol=1e-5, atol=1e-5 * one.abs().max().item())


@pytest.mark.parametrize(
    "call, text",
    [
        (lambda: _C.bn_act_forward(2, 8, 0, 0, 8, 8, 8, 2, 3, 4, 1, True, True, EPS, 0, 0.0, 1), "dtype must be"),
        (lambda: _C.bn_act_forward(0, 8, 0, 0, 8, 8, 8, 3, 3, 4, 2, True, True, EPS, 0, 0.0, 1), "G must divide N"),
        (lambda: _C.bn_act_forward(0, 8, 0, 0, 8, 8, 8, 2, 3, 4, 1, True, True, EPS, TANH, 0.0, 1), "act must be"),
        (lambda: _C.gn_act_forward(0, 8, 0, 0, 8, 8, 8, 2, 3, 4, 2, True, EPS, 0, 0.0, 1), "groups must divide C"),
        (lambda: _C.gn_act_forward(0, 8, 0, 0, 8, 8, 8, 2, 3, 4, 1, True, EPS, TANH, 0.0, 1), "act must be"),
        (lambda: _C.bias_act_forward(0, 8, 0, 8, 2, 3, 4, True, 11, 0.0, *PLAIN, 1), "act must be"),
        (lambda: _C.bias_act_forward(0, 8, 0, 8, 2, 3, 4, True, 5, 0.0, 0.0, -1.0, 1), "gain must not be 0"),
        (lambda: _C.bias_act_forward(0, 8, 0, 8, 2, 3, 4, True, 0, 0.0, *PLAIN, 0), "threads must be"),
        (lambda: _C.bias_act_forward(0, 8, 0, 8, -2, 3, 4, True, 0, 0.0, *PLAIN, 1), "must not be negative"),
        (lambda: _C.gan_loss_forward(0, 8, 8, 8, 8, 2, 2, 6, 0, 0.0, 1), "kind must be"),
        (lambda: _C.gan_loss_forward(0, 8, 8, 8, 8, 2, 2, 0, 2, 0.0, 1), "side must be"),
        (lambda: _C.interpolate_forward(0, 8, 8, 8, 0, 8, 2, 0, 1), "N and E must be at least 1, got 2 and 0"),
        (lambda: _C.grad_norm_penalty_forward(0, 8, 8, 8, -1, 4, 1.0, 1), "N and E must be at least 1"),
        (lambda: _C.use_table("sse9"), "sse9"),
    ],
)
def test_refusals(call, text):
    with pytest.raises(ValueError, match=text):
        call()
