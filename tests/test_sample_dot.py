import pytest
import torch
from checks import BACKENDS, DTYPES, LAYOUTS, against_plain

from fastgan.ops.sample_dot import op


def plain(x, y):
    return (x * y).flatten(1).sum(1)


def inputs(*shape):
    return [torch.randn(shape, dtype=torch.float64) for _ in range(2)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS, ids=["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equals_the_formula_to_second_order(dtype, layout, backend):
    ours = lambda x, y: op(x, y).to(x.dtype)
    against_plain(ours, plain, inputs(4, 3, 5, 7), dtype, layout, backend)


def test_every_order_is_exact():
    args = [t.requires_grad_() for t in inputs(3, 4)]
    assert torch.autograd.gradcheck(op, args) and torch.autograd.gradgradcheck(op, args)
    x = args[0]
    once = lambda f: torch.autograd.grad(f(x, x.sin()).square().sum(), x, create_graph=True)[0]
    twice = lambda f: torch.autograd.grad(once(f).square().sum(), x, create_graph=True)[0]
    third = lambda f: torch.autograd.grad(twice(f).square().sum(), x)[0]
    torch.testing.assert_close(third(op), third(plain))


def test_sums_are_float32_and_layouts_meet():
    x, y = torch.full((2, 3, 64, 64), 50.0, dtype=torch.float16), torch.full((2, 3, 64, 64), 40.0, dtype=torch.float16)
    dot = op(x, y.contiguous(memory_format=torch.channels_last))
    assert dot.dtype == torch.float32 and torch.equal(dot, torch.full((2,), 3 * 64 * 64 * 2000.0))
    assert op(torch.arange(3.0), torch.arange(3.0)).tolist() == [0.0, 1.0, 4.0]  # [N]: samples of one element
