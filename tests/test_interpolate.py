import pytest
import torch
from checks import BACKENDS, DTYPES, LAYOUTS, against_plain

from fastgan import functional
from fastgan.ops.interpolate import op


def inputs(shape=(4, 3, 5, 7)):
    d = torch.float64
    return torch.randn(shape, dtype=d), torch.randn(shape, dtype=d), torch.rand(shape[0], dtype=d)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS, ids=["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equals_the_formula_to_second_order(dtype, layout, backend):
    def plain(real, fake, e):
        e = e.view(-1, 1, 1, 1)
        return e * real + (1 - e) * fake

    got = against_plain(functional.interpolate, plain, inputs(), dtype, layout, backend)
    assert got[0].is_contiguous(memory_format=layout)


def test_gradgradcheck():
    args = [t.requires_grad_() for t in inputs((3, 2, 2))]
    assert torch.autograd.gradcheck(functional.interpolate, args)
    assert torch.autograd.gradgradcheck(functional.interpolate, args)


def test_two_coefficients_and_one_alone_have_every_order():
    real, fake, e = (t.requires_grad_() for t in inputs((3, 2, 2)))
    rest = torch.randn(3, dtype=torch.float64, requires_grad=True)
    for args in ((real, fake, e, rest), (real, None, e, None)):
        assert torch.autograd.gradcheck(op, args) and torch.autograd.gradgradcheck(op, args)


def test_ends_are_exact_and_only_wanted_gradients_are_made():
    real, fake, _ = (t.float() for t in inputs())
    assert torch.equal(functional.interpolate(real, fake, torch.ones(4)), real)
    assert torch.equal(functional.interpolate(real, fake, torch.zeros(4)), fake)
    fake.requires_grad_()
    y = functional.interpolate(real, fake, torch.full((4,), 0.25))
    assert torch.equal(torch.autograd.grad(y.sum(), fake)[0], torch.full_like(fake, 0.75))


def test_one_epsilon_a_sample_from_the_generator():
    real, fake = torch.ones(6, 2, 3, 3), torch.zeros(6, 2, 3, 3)
    draw = lambda: functional.interpolate(real, fake, generator=torch.Generator().manual_seed(5))
    y = draw()
    assert torch.equal(y, draw()) and torch.equal(y, y[:, :1, :1, :1].expand_as(y))
    assert torch.equal(y[:, 0, 0, 0], torch.rand(6, generator=torch.Generator().manual_seed(5)))


def test_errors():
    real = torch.randn(4, 3)
    with pytest.raises(ValueError, match="interpolate: fake must have real's shape"):
        functional.interpolate(real, real[:2])
    with pytest.raises(ValueError, match="interpolate: epsilon must have shape"):
        functional.interpolate(real, real, torch.rand(4, 1))
    with pytest.raises(TypeError, match="interpolate: real and fake must have one floating dtype"):
        functional.interpolate(real, real.double())
