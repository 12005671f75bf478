import pytest
import torch
import torch.nn.functional as F
from checks import BACKENDS, DTYPES, LAYOUTS, against_plain, distance

import fastgan
from fastgan import functional

# The kernels' own tests: without races no small tensor goes through PyTorch's ops.
pytestmark = pytest.mark.usefixtures("unraced")

SHAPES = [
    ((4, 3, 5, 7), 1),
    ((4, 8, 4, 4), 2),
    ((12, 17), 3),
    ((2, 4, 9), 1),
    ((6, 5, 3, 3), 3),
    ((4, 3, 2, 3, 2), 2),
]
ACTIVATIONS = {None: lambda t: t * 1, "relu": torch.relu, "leaky_relu": lambda t: F.leaky_relu(t, 0.2)}


def plain(activation, groups, training=True, stats=(None, None)):
    def run(x, weight, bias):
        stats_ = [None if s is None else s.to(x.dtype) for s in stats]
        parts = [F.batch_norm(p, *stats_, weight, bias, training, 0.0, 1e-5) for p in x.chunk(groups)]
        return ACTIVATIONS[activation](torch.cat(parts))

    return run


def inputs(shape, affine=True):
    d = torch.float64
    x = torch.randn(shape, dtype=d) * 2 + 3
    return (
        x,
        torch.rand(shape[1], dtype=d) + 0.5 if affine else None,
        torch.randn(shape[1], dtype=d) if affine else None,
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS, ids=["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("shape", "groups"), SHAPES, ids=str)
def test_training_equals_torch_to_second_order(shape, groups, activation, dtype, layout, backend):
    ours = lambda x, w, b: functional.bn_act(
        x, None, None, w, b, training=True, activation=activation, stat_groups=groups
    )
    against_plain(ours, plain(activation, groups), inputs(shape), dtype, layout, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS, ids=["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("affine", [True, False])
def test_eval_equals_torch_to_second_order(affine, dtype, layout, backend):
    shape = (4, 6, 5, 3)
    mean, var = torch.randn(6).double(), torch.rand(6).double() + 0.3
    # as a model held in that dtype would have them: statistics that are representable in it
    mean, var = mean.to(dtype).double(), var.to(dtype).double()
    ours = lambda x, w, b: functional.bn_act(
        x, mean.to(x.dtype), var.to(x.dtype), w, b, training=False, activation="leaky_relu"
    )
    against_plain(ours, plain("leaky_relu", 1, False, (mean, var)), inputs(shape, affine), dtype, layout, backend)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradgradcheck(activation, groups, training):
    args = [t.requires_grad_() for t in inputs((4, 3, 2, 3))]
    stats = torch.randn(3).double(), torch.rand(3).double() + 0.5
    run = lambda x, w, b: functional.bn_act(
        x, *stats, w, b, training=training, activation=activation, stat_groups=groups, momentum=0.0
    )
    assert torch.autograd.gradcheck(run, args, fast_mode=True)
    assert torch.autograd.gradgradcheck(run, args, fast_mode=True)


def test_third_derivative_raises_instead_of_lying():
    x, w, b = (t.requires_grad_() for t in inputs((4, 3, 2, 2)))
    y = functional.bn_act(x, None, None, w, b, training=True)
    (g,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    (h,) = torch.autograd.grad(g.square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="bn_act_double_backward"):
        h.sum().backward()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("momentum", [0.1, 0.5])
def test_running_statistics_follow_torch_over_groups(momentum, backend):
    ours = [torch.zeros(5), torch.ones(5)]
    theirs = [torch.zeros(5), torch.ones(5)]
    for _ in range(4):
        x = torch.randn(6, 5, 3, 3) * 3 + 1
        with fastgan.backend(backend):
            functional.bn_act(x, *ours, training=True, momentum=momentum, stat_groups=2)
        for part in x.chunk(2):
            F.batch_norm(part, *theirs, training=True, momentum=momentum)
    for mine, other in zip(ours, theirs, strict=True):
        assert distance(mine, other) < 1e-6


@pytest.mark.parametrize("backend", BACKENDS)
def test_large_mean_keeps_its_variance(backend):
    x = torch.randn(16, 4, 8, 8) + 3e4  # E[x^2] - E[x]^2 would lose every digit
    want = F.batch_norm(x.double(), None, None, training=True)
    with fastgan.backend(backend):
        got = functional.bn_act(x, training=True, activation=None)
    assert (
        distance(got, want) < 2e-2
        and distance(got, want) < 4 * distance(F.batch_norm(x, None, None, training=True), want) + 1e-3
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_batch_mixed_dtypes_and_slices(backend):
    with fastgan.backend(backend):
        assert functional.bn_act(torch.randn(0, 3, 2, 2), training=True).shape == (0, 3, 2, 2)
        x = torch.randn(4, 8, 6, 6, dtype=torch.bfloat16)[:, ::2, 1:]
        w, b = torch.rand(4), torch.randn(4)
        y = functional.bn_act(x, None, None, w, b, training=True)
        want = F.leaky_relu(F.batch_norm(x.double(), None, None, w.double(), b.double(), True), 0.2)
    assert y.dtype == torch.bfloat16 and distance(y, want) < 1e-2


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("groups", [1, 2])
def test_an_empty_batch_has_gradients_of_zero_to_second_order(backend, training, groups):
    """A discriminator of the samples that a mask picks, none of them: torch's own kernel divided by zero, SIGFPE."""
    x, w, b = (t.requires_grad_() for t in (torch.randn(0, 3, 2, 2), torch.rand(3), torch.randn(3)))
    running = torch.rand(3), torch.rand(3)
    before = [r.clone() for r in running]
    with fastgan.backend(backend):
        y = functional.bn_act(x, *running, w, b, training=training, stat_groups=groups)
        first = torch.autograd.grad(y.square().sum(), (x, w, b), create_graph=True)
        second = torch.autograd.grad(sum(g.sum() for g in first), (x, w))
    assert [g.shape for g in (*first, *second)] == [t.shape for t in (x, w, b, x, w)]
    assert not any(g.any() for g in (*first, *second))
    assert all(map(torch.equal, running, before))


def with_given(activation, groups):
    """bn_act with the statistics that it would have computed, as constants."""

    def run(x, weight, bias):
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        grouped = x.detach().to(dtype).unflatten(0, (groups, -1))
        var, mean = torch.var_mean(grouped, [1, *range(3, grouped.dim())], correction=0)
        return functional.bn_act(
            x,
            None,
            None,
            weight,
            bias,
            training=True,
            activation=activation,
            stat_groups=groups,
            batch_statistics=(mean, var),
        )

    return run


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS, ids=["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "groups"), [SHAPES[0], SHAPES[1], SHAPES[4]], ids=str)
def test_given_batch_statistics_change_nothing(shape, groups, dtype, layout, backend):
    """Outputs, first and second derivatives: the statistics' share is in the gradient of x all the same."""
    against_plain(with_given("leaky_relu", groups), plain("leaky_relu", groups), inputs(shape), dtype, layout, backend)


@pytest.mark.parametrize("groups", [1, 2])
def test_gradgradcheck_with_given_statistics(groups):
    """As constants they would give another gradient: here they follow x from call to call."""
    args = [t.requires_grad_() for t in inputs((4, 3, 2, 3))]
    assert torch.autograd.gradcheck(with_given("leaky_relu", groups), args, fast_mode=True)
    assert torch.autograd.gradgradcheck(with_given("leaky_relu", groups), args, fast_mode=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_given_statistics_update_the_running_ones(backend):
    x = torch.randn(6, 5, 3, 3) * 3 + 1
    var, mean = torch.var_mean(x.unflatten(0, (2, 3)), [1, 3, 4], correction=0)
    ours, theirs = ([torch.zeros(5), torch.ones(5)] for _ in range(2))
    with fastgan.backend(backend):
        functional.bn_act(x, *ours, training=True, stat_groups=2, batch_statistics=(mean, var))
        functional.bn_act(x, *theirs, training=True, stat_groups=2)
    assert all(distance(a, b) < 1e-6 for a, b in zip(ours, theirs, strict=True))


def test_given_statistics_must_fit():
    x, wrong = torch.randn(4, 3, 2, 2), torch.zeros(1, 3)
    with pytest.raises(ValueError, match=r"^bn_act: batch_statistics must have shape \(2, 3\)"):
        functional.bn_act(x, training=True, stat_groups=2, batch_statistics=(wrong, wrong))


def test_errors():
    x = torch.randn(4, 3, 2, 2)
    for call, words in [
        (lambda: functional.bn_act(x[:1, :, :1, :1], training=True), "more than 1 value per channel"),
        (lambda: functional.bn_act(x, training=False), "running_mean and running_var must be given"),
        (lambda: functional.bn_act(x, training=True, stat_groups=3), "stat_groups must divide"),
        (lambda: functional.bn_act(x, training=True, activation="tanh"), "activation"),
        (lambda: functional.bn_act(x, torch.zeros(4), torch.ones(3), training=True), "running_mean"),
        (lambda: functional.bn_act(x[0, 0, 0], training=True), "at least 2 dimensions"),
    ]:
        with pytest.raises(ValueError, match=words) as raised:
            call()
        assert str(raised.value).startswith("bn_act: ")
