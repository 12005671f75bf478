"""The native CPU kernels bn_act, bias_act and gan_loss against float64 PyTorch with autograd, by table."""

import functools
import math

import pytest
import torch
import torch.nn.functional as F

_C = pytest.importorskip("fastgan._C", reason="the native core is not built")

F32, BF16 = 0, 1
DTYPES = {F32: torch.float32, BF16: torch.bfloat16}
IDENTITY, RELU, LEAKY, TANH, SIGMOID = range(5)
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
    n, c, hw = x.shape
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


@functools.lru_cache(maxsize=None)
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
    (6, 5, 1640, 3),  # enough for three threads, by pixels or samples
    (4, 17, 1, 1),  # BatchNorm1d
    (6, 130, 9, 2),
    (3, 1, 7, 1),
    (64, 48, 16, 2),  # three threads, by channels
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
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)
configs = pytest.mark.parametrize("config", CONFIGS, ids=str)


@layouts
@dtypes
@shapes
@configs
def test_bn_act(table, shape, dtype, channels_last, config):
    *size, groups = shape
    training, act, affine = config
    n, c, hw = size
    inputs, y_want, first_want, second_want = bn_case(tuple(size), dtype, groups, training, act, affine)
    memory = {k: to_memory(inputs[k], channels_last) for k in ("x", "dy", "ddx")}
    weight, bias = inputs["weight"], inputs["bias"]
    tail = (n, c, hw, groups, channels_last, training, EPS, act, SLOPE, 3)

    def tensor_out():
        return Guarded(n * c * hw, DTYPES[dtype])

    def compare(out, want, what):
        check(from_memory(out.get(), size, channels_last), want, dtype, what)

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
        dtype, pointer(memory["dy"]), pointer(memory["x"]), pointer(weight), pointer(bias), pointer(mean),
        pointer(var), pointer(dx), pointer(dweight), pointer(dbias), *tail,
    )  # fmt: skip
    compare(dx, first_want[0], "dx")
    if affine:
        check(dweight.get(), first_want[1], F32, "dweight")
        check(dbias.get(), first_want[2], F32, "dbias")

    # double backward
    d_dy, d_x, d_weight = tensor_out(), tensor_out(), Guarded(c)
    _C.bn_act_double_backward(
        dtype, pointer(memory["ddx"]), pointer(inputs["ddweight"]) if affine else 0,
        pointer(inputs["ddbias"]) if affine else 0, pointer(memory["dy"]), pointer(memory["x"]), pointer(weight),
        pointer(bias), pointer(mean), pointer(var), pointer(d_dy), pointer(d_x), pointer(d_weight), *tail,
    )  # fmt: skip
    compare(d_dy, second_want[0], "d_dy")
    compare(d_x, second_want[1], "d_x")
    if affine:
        check(d_weight.get(), second_want[2], F32, "d_weight")
