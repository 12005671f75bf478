import pytest
import torch
import torch.nn.functional as F
from checks import BACKENDS, DTYPES, LAYOUTS, against_plain, distance

import fastgan
from fastgan import functional
from fastgan._op import OPS

# The kernels' own tests: without races no small tensor goes through PyTorch's ops.
pytestmark = pytest.mark.usefixtures("unraced")

CASES = [  # shape, groups, activation
    ((3, 6, 5, 7), 2, "leaky_relu"),
    ((3, 6, 5, 7), 2, "relu"),
    ((3, 6, 5, 7), 2, None),
    ((2, 6, 4, 4), 1, "leaky_relu"),
    ((3, 5, 3, 3), 5, "relu"),
    ((1, 70, 3, 5), 7, "leaky_relu"),
    ((2, 24, 16, 17), 3, "relu"),
    ((5, 12), 3, "leaky_relu"),
    ((7, 37), 1, "relu"),
    ((2, 4, 9), 2, "leaky_relu"),
    ((2, 4, 2, 3, 2), 4, None),
]
ACTIVATIONS = {None: lambda t: t * 1, "relu": torch.relu, "leaky_relu": lambda t: F.leaky_relu(t, 0.2)}


def inputs(shape, affine=True, parameters=None):
    parameters = shape[1:2] if parameters is None else parameters
    x = torch.randn(shape, dtype=torch.float64) * 2 + 3
    weight, bias = torch.rand(parameters, dtype=torch.float64) + 0.5, torch.randn(parameters, dtype=torch.float64)
    return (x, weight, bias) if affine else (x, None, None)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS, ids=["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "groups", "activation"), CASES, ids=str)
def test_group_norm_equals_torch_to_second_order(shape, groups, activation, dtype, layout, backend):
    ours = lambda x, w, b: functional.gn_act(x, groups, w, b, activation=activation)
    plain = lambda x, w, b: ACTIVATIONS[activation](F.group_norm(x, groups, w, b))
    against_plain(ours, plain, inputs(shape), dtype, layout, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS, ids=["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("affine", [True, False])
def test_instance_norm_equals_torch_to_second_order(affine, dtype, layout, backend):
    ours = lambda x, w, b: functional.in_act(x, weight=w, bias=b)
    plain = lambda x, w, b: F.leaky_relu(F.instance_norm(x, weight=w, bias=b), 0.2)
    against_plain(ours, plain, inputs((3, 20, 5, 7), affine), dtype, layout, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS, ids=["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("trailing", [1, 2, 3])
def test_layer_norm_equals_torch_to_second_order(trailing, affine, dtype, layout, backend):
    shape = (3, 5, 4, 7)
    normalized = shape[-trailing:]
    ours = lambda x, w, b: functional.ln_act(x, normalized, w, b, activation="relu")
    plain = lambda x, w, b: torch.relu(F.layer_norm(x, normalized, w, b))
    got = against_plain(ours, plain, inputs(shape, affine, normalized), dtype, layout, backend)
    assert got[0].is_contiguous(memory_format=layout)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("given", [(True, False), (False, True)], ids=["weight only", "bias only"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "groups"), [((3, 6, 4, 5), 2), ((3, 6, 4, 5), 6), ((3, 6), 1)], ids=str)
def test_half_affine(shape, groups, dtype, given, backend):
    x, *parameters = inputs(shape)
    ours = lambda x, w, b: functional.gn_act(x, groups, w, b)
    plain = lambda x, w, b: F.leaky_relu(
        F.group_norm(x, groups, x.new_ones(shape[1]) if w is None else w, b), 0.2
    )  # torch's derivative fails on a bias without a weight
    args = (x, *(p if g else None for p, g in zip(parameters, given, strict=True)))
    against_plain(ours, plain, args, dtype, torch.contiguous_format, backend)


@pytest.mark.parametrize(
    ("shape", "groups", "activation", "affine"),
    [
        ((2, 4, 2, 3), 1, "leaky_relu", True),
        ((2, 4, 2, 3), 2, "relu", True),
        ((2, 4, 2, 3), 2, None, True),
        ((2, 4, 2, 3), 2, "leaky_relu", False),
        ((2, 4, 2, 3), 4, "leaky_relu", True),
        ((3, 8), 1, "leaky_relu", True),
        ((3, 8), 2, "relu", True),
    ],
)
def test_gradgradcheck(shape, groups, activation, affine):
    args = [t.requires_grad_() for t in inputs(shape, affine) if t is not None]
    run = lambda x, *wb: functional.gn_act(x, groups, *wb, activation=activation)
    assert torch.autograd.gradcheck(run, args, fast_mode=True)
    assert torch.autograd.gradgradcheck(run, args, fast_mode=True)


def test_third_derivative_raises_instead_of_lying():
    x, w, b = (t.requires_grad_() for t in inputs((4, 3, 2, 2)))
    y = functional.gn_act(x, 3, w, b)
    (g,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    (h,) = torch.autograd.grad(g.square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="gn_act_double_backward"):
        h.sum().backward()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS, ids=["nchw", "nhwc"])
@pytest.mark.parametrize("groups", [1, 4, 32])
def test_large_mean_keeps_its_variance(groups, layout, backend):
    x = (torch.randn(4, 32, 8, 8) + 3e4).contiguous(memory_format=layout)  # E[x^2] - E[x]^2 would lose every digit
    want = F.group_norm(x.double(), groups)
    with fastgan.backend(backend):
        y, mean, var = OPS["gn_act"](x, None, None, groups, 1e-5, "identity", 0.0)
    assert distance(y, want) < 4 * distance(F.group_norm(x, groups), want) + 1e-3
    parts = x.double().reshape(4, groups, -1)
    assert distance(mean, parts.mean(-1)) < 1e-6
    if backend == "native" and "native" in OPS["gn_act"].backends:
        # not so PyTorch's: four digits are lost in NCHW, all in channels_last
        assert distance(var, parts.var(-1, correction=0)) < 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS, ids=["nchw", "nhwc"])
def test_constant_samples_and_inf_stay_in_their_group(layout, backend):
    x = torch.randn(3, 8, 5, 5)
    x[0], x[1, 0, 0, 0], x[2, 4, 1, 1] = 7.25, float("inf"), float("nan")
    x = x.contiguous(memory_format=layout)
    with fastgan.backend(backend):
        y = functional.gn_act(x, 2, activation=None)
    want = F.group_norm(x, 2)
    assert y[0].abs().max() < 1e-3 and not y[1, :4].isfinite().any() and not y[2, 4:].isfinite().any()
    torch.testing.assert_close(y[1, 4:], want[1, 4:], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(y[2, :4], want[2, :4], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("momentum", [0.1, 0.5])
def test_running_statistics_follow_torch(momentum, backend):
    ours = [torch.zeros(5), torch.ones(5)]
    theirs = [torch.zeros(5), torch.ones(5)]
    for _ in range(3):
        x = torch.randn(6, 5, 3, 3) * 3 + 1
        with fastgan.backend(backend):
            functional.in_act(x, *ours, momentum=momentum)
        F.instance_norm(x, *theirs, momentum=momentum)
        for mine, other in zip(ours, theirs, strict=True):
            assert distance(mine, other) < 1e-6
    with fastgan.backend(backend):
        y = functional.in_act(x, *ours, use_input_stats=False, activation=None)
    assert distance(y, F.instance_norm(x, *theirs, use_input_stats=False)) < 1e-6


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_batch_mixed_dtypes_and_slices(backend):
    with fastgan.backend(backend):
        empty = torch.randn(0, 4, 2, 2, requires_grad=True)
        w, b = torch.rand(4, requires_grad=True), torch.randn(4)
        functional.gn_act(empty, 2, w, b).sum().backward()
        assert empty.grad.shape == (0, 4, 2, 2) and not w.grad.any()
        x = torch.randn(4, 8, 6, 6, dtype=torch.bfloat16)[:, ::2, 1:]
        y = functional.gn_act(x, 2, w, b)
        want = F.leaky_relu(F.group_norm(x.double(), 2, w.double(), b.double()), 0.2)
        rows = torch.randn(5, 9)[:, 1:].t()
        z = functional.ln_act(rows, (5,), activation=None)
    assert y.dtype == torch.bfloat16 and y.is_contiguous() and distance(y, want) < 1e-2
    assert distance(z, F.layer_norm(rows, (5,))) < 1e-6


def test_ties_with_the_siblings():
    """Batch norm over one sample is instance norm; layer norm over whole samples is group norm with one group."""
    x, w, b = (t.float() for t in inputs((1, 6, 5, 4)))
    batch = functional.bn_act(x, weight=w, bias=b, training=True)
    assert distance(functional.in_act(x, weight=w, bias=b), batch) < 1e-6
    x = torch.randn(3, 6, 5, 4)
    assert distance(functional.ln_act(x, (6, 5, 4)), functional.gn_act(x, 1)) < 1e-6


def test_errors():
    x, w = torch.randn(4, 6, 2, 2), torch.ones(6)
    for call, words in [
        (lambda: functional.gn_act(x, 4), "gn_act: num_groups must divide"),
        (lambda: functional.gn_act(x, 0), "gn_act: num_groups must divide"),
        (lambda: functional.gn_act(x, 2, w[:3]), "gn_act: weight must have shape"),
        (lambda: functional.gn_act(x, 2, w, w[:3]), "gn_act: bias must have shape"),
        (lambda: functional.gn_act(x[0, 0, 0], 2), "gn_act: x must have at least 2 dimensions"),
        (lambda: functional.gn_act(x[:1, :, :1, :1], 6), "gn_act: a batch needs more than 1 value per group"),
        (lambda: functional.gn_act(x, 2, activation="tanh"), "gn_act: activation must be"),
        (lambda: functional.gn_act(x, 2, negative_slope=-1.0), "gn_act: negative_slope must be >= 0"),
        (lambda: functional.in_act(x[:, :, :1, :1]), "in_act: a sample needs more than 1 value per channel"),
        (lambda: functional.in_act(x, w[:2], w), "in_act: running_mean must have shape"),
        (lambda: functional.in_act(x, use_input_stats=False), "in_act: running_mean and running_var must be given"),
        (lambda: functional.ln_act(x, (2, 3)), "ln_act: x must end in normalized_shape"),
        (lambda: functional.ln_act(x, ()), "ln_act: x must end in normalized_shape"),
        (lambda: functional.ln_act(x, (2, 2), torch.ones(2)), "ln_act: weight must have shape"),
    ]:
        with pytest.raises(ValueError, match=f"^{words}"):
            call()
    for call in (functional.in_act, lambda i: functional.gn_act(i, 2), lambda i: functional.ln_act(i, (2,))):
        with pytest.raises(TypeError, match="x must be a floating tensor"):
            call(x.long())
