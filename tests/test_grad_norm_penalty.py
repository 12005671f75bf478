import pytest
import torch
from checks import BACKENDS, DTYPES, LAYOUTS, assert_close, distance, orders

import fastgan
from fastgan import functional

TARGETS = [0.0, 1.0, 2.5]


def plain(target):
    return lambda g: (g.flatten(1).norm(dim=1) - target).square()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS, ids=["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("target", TARGETS)
def test_equals_the_formula_to_second_order(target, dtype, layout, backend):
    g = (torch.randn(5, 3, 4, 7) * 0.3).to(dtype)
    ours = lambda g: functional.grad_norm_penalty(g, target).to(g.dtype)
    want = orders(plain(target), [g.double().requires_grad_()])
    theirs = orders(plain(target), [g.clone().requires_grad_()])
    with fastgan.backend(backend):
        got = orders(ours, [g.contiguous(memory_format=layout).requires_grad_()])
    for i, (o, w, t) in enumerate(zip(got, want, theirs, strict=True)):
        assert_close(o, w, dtype, distance(t, w), f"result {i}")


@pytest.mark.parametrize("target", TARGETS)
def test_gradgradcheck(target):
    g = torch.randn(3, 2, 3, dtype=torch.float64, requires_grad=True)
    run = lambda g: functional.grad_norm_penalty(g, target)
    assert torch.autograd.gradcheck(run, g) and torch.autograd.gradgradcheck(run, g)


@pytest.mark.parametrize("target", TARGETS)
def test_third_derivative_equals_autograd(target):
    def third(f):
        g = torch.arange(1.0, 13, dtype=torch.float64).view(2, 6).sin().requires_grad_()
        y = f(g)
        for _ in range(3):
            (y,) = torch.autograd.grad(y.square().sum() + y.sum(), g, create_graph=True)
        return y

    ours = third(lambda g: functional.grad_norm_penalty(g, target))
    assert distance(ours.detach(), third(plain(target)).detach()) < 1e-10


@pytest.mark.parametrize("target", TARGETS)
def test_a_zero_gradient_has_derivative_zero_to_second_order(target):
    g = torch.randn(3, 4, 5)
    g[1] = 0
    g.requires_grad_()
    p = functional.grad_norm_penalty(g, target)
    assert p[1] == target**2
    (first,) = torch.autograd.grad(p.sum(), g, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), g)
    assert first[1].abs().max() == 0 and second.isfinite().all() and second[1].abs().max() == 0
    assert first[0].abs().max() > 0


def test_sums_are_float32_for_16_bit_gradients():
    g = torch.full((2, 3, 64, 64), 0.01, dtype=torch.bfloat16)
    p = functional.grad_norm_penalty(g, 0.0)
    assert p.dtype == torch.float32 and p.shape == (2,)
    assert distance(p, g.double().square().flatten(1).sum(1)) < 1e-5
    h = torch.full((2, 3, 64, 64), 50.0, dtype=torch.float16)  # the sum of squares exceeds float16's range
    assert distance(functional.grad_norm_penalty(h, 0.0), h.double().square().flatten(1).sum(1)) < 1e-5


def test_errors():
    for call, words in [
        (lambda: functional.grad_norm_penalty(torch.randn(4)), "gradient must have at least 2 dimensions"),
        (lambda: functional.grad_norm_penalty(torch.randn(4, 2), -1.0), "target must be >= 0"),
    ]:
        with pytest.raises(ValueError, match=f"grad_norm_penalty: {words}"):
            call()
    with pytest.raises(TypeError, match="grad_norm_penalty: gradient must be a floating tensor"):
        functional.grad_norm_penalty(torch.ones(4, 2).long())
