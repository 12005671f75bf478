"""Dropout: torch's own masks, drawn many numbers at once."""

import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fastgan
from fastgan.functional import dropout as public
from fastgan.functional.dropout import FEW, _draws_as_torch, dropout

CORE = pytest.mark.skipif(fastgan.choice.absent("native") != "", reason="the native core is not built")
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture
def drawn(monkeypatch):
    """The sizes that the kernel drew."""
    from fastgan import _native

    call, sizes = _native.Core.call, []
    monkeypatch.setattr(
        _native.Core, "call", lambda self, kernel, x, *a: (sizes.append(x.numel()), call(self, kernel, x, *a))[1]
    )
    return sizes


def both(x, p, before=0, **options):
    """torch's result and ours after as many earlier draws, and what each generator draws next."""
    for f in (F.dropout, dropout):
        torch.manual_seed(5)
        torch.rand(before)
        torch.randn(3)
        y = f(x.clone(memory_format=torch.preserve_format), p, True, **options)
        yield y, f(y, p), torch.rand(3), torch.randn(2)


def test_the_public_name():
    assert public is dropout and fastgan.functional.dropout is dropout


@CORE
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("p", [0.3, 0.5, 0.999, 1e-9])
@pytest.mark.parametrize("before", [0, 1, 2, 621, 622, 623, 624, 625])
def test_the_same_elements_are_dropped(dtype, p, before, drawn):
    if not _draws_as_torch(dtype):
        pytest.skip("PyTorch draws another stream on this CPU: torch's own dropout runs")
    drawn.clear()
    theirs, ours = both(torch.randn(1501, dtype=dtype), p, before)
    for a, b in zip(theirs, ours, strict=True):
        assert torch.equal(a, b)
    assert drawn == [1501, 1501]


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("shape", [(3, 7, 13, 11), (64, 1, 28, 28), (4, 600, 1, 1), (2, 3, 1, 400)])
def test_every_layout(shape, layout, inplace):
    theirs, ours = both(torch.randn(shape).to(memory_format=layout), 0.4, inplace=inplace)
    assert all(torch.equal(a, b) for a, b in zip(theirs, ours, strict=True))
    assert theirs[0].stride() == ours[0].stride()


def test_slices_and_permutations():
    x = torch.randn(9, 33, 14, 10)
    for view in (x[:, ::2], x[..., 3:], x.permute(3, 0, 2, 1), x[:1].expand(5, 33, 14, 10)):
        torch.manual_seed(1)
        theirs = F.dropout(view, 0.2)
        torch.manual_seed(1)
        ours = dropout(view, 0.2)
        assert torch.equal(theirs, ours) and theirs.stride() == ours.stride()


def test_gradients_of_every_order():
    x = torch.randn(40, 50, requires_grad=True)
    found = []
    for f in (F.dropout, dropout):
        torch.manual_seed(2)
        y = f(x, 0.3)
        (g,) = torch.autograd.grad((y * y).sum(), x, create_graph=True)
        found.append((y, g, *torch.autograd.grad(g.pow(3).sum(), x)))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_what_is_not_drawn_here():
    """Other dtypes, few elements, probabilities at the ends, eval mode: torch's own results and errors."""
    for x, p, training in itertools.product(
        (torch.randn(2000, dtype=torch.float64), torch.randn(FEW), torch.randn(2000)), (0.0, 0.5, 1.0), (True, False)
    ):
        torch.manual_seed(3)
        theirs = F.dropout(x, p, training)
        torch.manual_seed(3)
        assert torch.equal(dropout(x, p, training), theirs)
    with pytest.raises(ValueError, match="between 0 and 1"):
        dropout(torch.randn(2000), 1.5)
    assert dropout(torch.randn(2000, device="meta"), 0.5).is_meta


def test_transforms_and_tracers_see_torchs_op():
    x = torch.randn(2000)
    torch.manual_seed(4)
    theirs = torch.vmap(F.dropout, randomness="different")(x.expand(2, 2000))
    torch.manual_seed(4)
    assert torch.equal(torch.vmap(dropout, randomness="different")(x.expand(2, 2000)), theirs)
    graph = torch.fx.experimental.proxy_tensor.make_fx(lambda x: dropout(x))(x)
    assert any("bernoulli" in str(node.target) for node in graph.graph.nodes)


@CORE
def test_another_stream_is_left_to_torch(monkeypatch, drawn):
    """Where PyTorch asks MKL, as on Intel's CPUs, its own dropout runs."""
    drawing = torch.Tensor.bernoulli_

    def another(self, *args, **options):
        torch.rand(1)
        return drawing(self, *args, **options)

    monkeypatch.setattr(torch.Tensor, "bernoulli_", another)
    _draws_as_torch.cache_clear()
    try:
        before = torch.get_rng_state()
        assert not _draws_as_torch(torch.float32)
        assert torch.equal(before, torch.get_rng_state())
        drawn.clear()
        dropout(torch.randn(2000), 0.5)
        assert not drawn
    finally:
        _draws_as_torch.cache_clear()


class Written(nn.Module):
    """A forward that calls the function, not the module."""

    def __init__(self):
        super().__init__()
        self.conv, self.last = nn.Conv2d(3, 16, 4, 2, 1), nn.Linear(16 * 64, 1)

    def forward(self, x):
        x = F.dropout(F.leaky_relu(self.conv(x), 0.2), 0.3, self.training)
        return self.last(x.flatten(1))


def _chain():
    return nn.Sequential(
        nn.Conv2d(3, 16, 4, 2, 1), nn.LeakyReLU(0.2), nn.Dropout(0.3), nn.Flatten(), nn.Linear(16 * 64, 1)
    )


@CORE
@pytest.mark.usefixtures("unraced")
@pytest.mark.parametrize("make", [_chain, Written])
def test_converted_models_draw_the_same_masks(make, drawn):
    torch.manual_seed(0)
    plain = make()
    converted = fastgan.convert(make())
    converted.load_state_dict(plain.state_dict())
    x, outputs = torch.randn(8, 3, 16, 16), []
    for model in (plain, converted):
        model(x)
        torch.manual_seed(7)
        y = model(x)
        y.sum().backward()
        outputs.append((y, model.get_parameter("conv.weight" if make is Written else "0.weight").grad))
    for a, b in zip(*outputs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    if _draws_as_torch(torch.float32):
        assert 8 * 16 * 64 in drawn
    fastgan.revert(converted)
    assert not any(type(m).__name__.startswith("Fused") for m in converted.modules())
