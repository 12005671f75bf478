"""Norms of small tensors go through PyTorch's own ops, where nobody asked for ours."""

import math
from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from checks import LAYOUTS, against_plain

import fastgan
from fastgan import functional
from fastgan.choice import second_order

pytestmark = pytest.mark.usefixtures("free")

ACTIVATIONS = {None: lambda t: t * 1, "relu": torch.relu, "leaky_relu": lambda t: F.leaky_relu(t, 0.2)}
SHAPES = [(6, 4, 3, 5), (1, 4, 3, 3), (3, 1, 4, 4), (6, 4, 1, 1), (7, 4), (5, 4, 9)]


def statistics(x):
    return torch.linspace(-1, 1, x.shape[1], dtype=x.dtype), torch.linspace(0.5, 2, x.shape[1], dtype=x.dtype)


OURS = {
    "batch": lambda x, w, b, a: functional.bn_act(x, None, None, w, b, training=True, activation=a),
    "running": lambda x, w, b, a: functional.bn_act(x, *statistics(x), w, b, training=False, activation=a),
    "instance, running": lambda x, w, b, a: functional.in_act(x, *statistics(x), w, b, False, activation=a),
    "instance": lambda x, w, b, a: functional.in_act(x, None, None, w, b, activation=a),
    "group": lambda x, w, b, a: functional.gn_act(x, 1, w, b, activation=a),
    "layer": lambda x, w, b, a: functional.ln_act(x.movedim(1, -1).contiguous(), w.shape, w, b, activation=a),
}
PLAIN = {
    "batch": lambda x, w, b: F.batch_norm(x, None, None, w, b, True),
    "running": lambda x, w, b: F.batch_norm(x, *statistics(x), w, b, False),
    "instance, running": lambda x, w, b: F.batch_norm(x, *statistics(x), w, b, False),
    "instance": lambda x, w, b: F.instance_norm(x, None, None, w, b),
    "group": lambda x, w, b: F.group_norm(x, 1, w, b),
    "layer": lambda x, w, b: F.layer_norm(x.movedim(1, -1).contiguous(), w.shape, w, b),
}


# The backend is set where the object is made, hence functions.
KEPT = [
    lambda: fastgan.backend("native"),
    lambda: fastgan.backend("reference"),
    lambda: fastgan.racing(False),
    second_order,
]


def node(y):
    """The autograd node that made y: one of ours is written in Python."""
    return type(y.grad_fn).__name__


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=["nchw", "nhwc"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("norm", OURS)
def test_small_norms_equal_torch_to_second_order(norm, activation, layout, dtype):
    for shape in SHAPES:
        if norm == "instance" and math.prod(shape[2:]) == 1:
            continue
        x, w, b = (torch.randn(s, dtype=torch.float64) for s in (shape, shape[1:2], shape[1:2]))
        plain = lambda x, w, b: ACTIVATIONS[activation](PLAIN[norm](x, w, b))
        ours = lambda x, w, b: OURS[norm](x, w, b, activation)
        against_plain(ours, plain, (3 * x + 1, w, b), dtype, layout, "auto")


@pytest.mark.parametrize("turned", [False, True], ids=["as x", "other layout"])
@pytest.mark.parametrize("norm", ["batch", "running", "instance", "group"])
@pytest.mark.parametrize("samples", [1, 3])
def test_cotangents_of_either_layout(samples, norm, turned):
    x, w, b = torch.randn(samples, 4, 3, 5), torch.randn(4), torch.randn(4)
    for layout, other in (LAYOUTS, LAYOUTS[::-1]):
        dy = torch.randn(x.shape).contiguous(memory_format=other if turned else layout)
        leaf, exact = x.contiguous(memory_format=layout).requires_grad_(), x.double().requires_grad_()
        (got,) = torch.autograd.grad(OURS[norm](leaf, w, b, None), leaf, dy)
        (want,) = torch.autograd.grad(PLAIN[norm](exact, w.double(), b.double()), exact, dy.double().contiguous())
        torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-5)


def test_which_norms_are_small():
    x, w = torch.randn(2, 8, 4, 4, requires_grad=True), torch.randn(8)
    for norm in OURS:
        assert node(OURS[norm](x, w, w, "leaky_relu")) == "LeakyReluBackward0", norm
        assert "Thin" not in node(OURS[norm](x, w, w, None)), norm
        for kept in KEPT:
            with kept():
                assert node(OURS[norm](x, w, w, "leaky_relu")) != "LeakyReluBackward0", norm
    batch, group = OURS["batch"], OURS["group"]
    large = torch.randn(2, 8, 80, 80, requires_grad=True)
    halves = x.detach().bfloat16().requires_grad_()
    for y in (
        batch(large, w, w, None),
        group(large.detach().repeat(1, 1, 3, 1).requires_grad_(), w, w, None),
        batch(halves, w, w, None),
        batch(x, w.double(), w.double(), None),
        batch(x[:, :, 1:], w, w, None),
        group(x.contiguous(memory_format=torch.channels_last), w, w, None),  # PyTorch's loses the variance there
        functional.bn_act(x, training=True, stat_groups=2, activation=None),
    ):
        assert "Norm" not in node(y)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("norm", OURS)
def test_a_result_may_be_overwritten(norm, activation):
    """As that of our kernels, of which nothing is kept."""
    x, w = torch.randn(2, 8, 4, 4, requires_grad=True), torch.randn(8)
    want = torch.autograd.grad(3 * OURS[norm](x, w, w, activation).sum(), x)
    got = torch.autograd.grad(OURS[norm](x, w, w, activation).mul_(3).sum(), x)
    torch.testing.assert_close(got, want)


def test_running_statistics_of_a_small_batch():
    x, w = torch.randn(5, 8, 3, 3), torch.randn(8)
    found = [(torch.zeros(8), torch.ones(8)) for _ in range(3)]
    want = F.batch_norm(x, *found[0], w, w, True, 0.3)
    torch.testing.assert_close(
        functional.bn_act(x, *found[1], w, w, training=True, momentum=0.3, activation=None), want
    )
    with fastgan.racing(False):
        functional.bn_act(x, *found[2], w, w, training=True, momentum=0.3, activation=None)
    for mean, var in found[1:]:
        torch.testing.assert_close(mean, found[0][0])
        torch.testing.assert_close(var, found[0][1])


def test_a_penalty_keeps_our_norms():
    """PyTorch's second derivatives of a norm are dozens of kernels, whatever its size."""
    seen = []

    def critic(x):
        y = functional.gn_act(x, 2, activation="leaky_relu")
        seen.append(node(y))
        return y.flatten(1).square().sum(1)

    fastgan.functional.gradient_penalty(critic, torch.randn(2, 4, 3, 3), kind="r1", weight=1.0)
    assert seen == ["ThinBackward"]


def test_a_penalty_through_a_checkpointed_norm():
    """The second run of the norm comes in a backward pass that no longer expects second derivatives."""
    norm = lambda x: functional.gn_act(x, 2, activation="leaky_relu")
    x, found = torch.randn(2, 4, 3, 3), []
    for run in (norm, lambda x: torch.utils.checkpoint.checkpoint(norm, x, use_reentrant=False)):
        w = torch.linspace(0.5, 2, 4).view(4, 1, 1).requires_grad_()
        critic = lambda x, run=run, w=w: run(x * w).flatten(1).square().sum(1)
        loss = functional.gradient_penalty(critic, x, kind="r1", weight=1.0)
        found.append(torch.autograd.grad(loss, w)[0])
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("backend", ["auto", "reference", "native"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=["nchw", "nhwc"])
@pytest.mark.parametrize("norm", ["batch", "running", "instance", "group"])
def test_parameters_with_gaps_and_a_bias_alone(norm, layout, backend):
    """PyTorch's kernels read past the first, and its group norm has no derivative for the second."""
    x, full = torch.randn(3, 4, 5, 5), torch.randn(8)
    for w, b in ((full[::2], full[1::2]), (None, full[1::2].clone())):
        leaves = [t.detach().requires_grad_() for t in (x.contiguous(memory_format=layout), b)]
        with fastgan.backend(backend):
            found = OURS[norm](leaves[0], w, leaves[1], "leaky_relu")
            gradients = torch.autograd.grad(found.square().sum(), leaves)
        exact = [t.detach().double().contiguous().requires_grad_() for t in (x, b)]
        scale = torch.ones(4).double() if w is None else w.double()
        want = F.leaky_relu(PLAIN[norm](exact[0], scale, exact[1]), 0.2)
        torch.testing.assert_close(found.double(), want, rtol=1e-4, atol=1e-5)
        for got, wanted in zip(gradients, torch.autograd.grad(want.square().sum(), exact), strict=True):
            torch.testing.assert_close(got.double(), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("training", [False, True])
def test_running_statistics_written_before_the_backward_pass(training):
    """By a training pass, of which PyTorch counts no version, or by the caller; and as parameters."""
    found = []
    for written in (False, True):
        x, (mean, var) = torch.linspace(-1, 1, 48).view(3, 4, 2, 2).requires_grad_(), statistics(torch.ones(1, 4))
        y = functional.bn_act(x, mean, var, training=training)
        if written:
            functional.bn_act(3 * x.detach() + 1, mean, var, training=True)
            mean.add_(1)
        found.append(torch.autograd.grad(y.square().sum(), x)[0])
    torch.testing.assert_close(*found, rtol=0, atol=0)
    parameters = [torch.nn.Parameter(t) for t in statistics(x)]
    torch.testing.assert_close(functional.bn_act(x, *parameters, training=training), y)


def test_numbers_of_other_types():
    x = torch.randn(3, 4, 5, 5)
    for norm in (
        lambda eps: functional.bn_act(x, training=True, eps=eps),
        lambda eps: functional.gn_act(x, 2.0, eps=eps),
        lambda eps: functional.in_act(x, eps=eps),
        lambda eps: functional.ln_act(x, (5,), eps=eps),
    ):
        torch.testing.assert_close(norm(Fraction(1, 100_000)), norm(1e-5))


@pytest.mark.parametrize("activation", ["tanh", "sigmoid", "relu", "identity"])
def test_integers_give_the_same_type_at_every_size(activation):
    bias = torch.ones(5, dtype=torch.long)
    small, large = (
        functional.bias_act(torch.arange(n).remainder(5).view(-1, 5), bias, activation=activation) for n in (10, 10**6)
    )
    torch.testing.assert_close(small, large[:2], rtol=0, atol=0)
