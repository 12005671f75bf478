"""filtered_lrelu against its definition in PyTorch, values and derivatives, and the signs that it keeps for them."""

import contextlib

import pytest
import torch
import torch.nn.functional as F
from checks import BACKENDS, LAYOUTS, against_plain, clear_of
from test_upfirdn2d import LONG, ODD, SMOOTH, plain
from torch.autograd import grad

import fastgan
from fastgan import functional
from fastgan._op import around
from fastgan.functional import resampling
from fastgan.ops.filtered_lrelu import backward, cost, op

SQUARE = torch.outer(SMOOTH, SMOOTH)
CASES = {  # fu, fd, up, down, padding, clamp
    "StyleGAN3's": (LONG, LONG, 2, 2, (10, 11, 9, 12), 0.7),
    "up alone": (SMOOTH, None, 2, 1, 2, None),
    "no products": (ODD, ODD, 4, 2, (5, 4, 3, 6), 0.5),
    "a square that is a product": (None, SQUARE, 1, 3, (2, 1, -1, 3), None),
    "filters shorter than the factors": (None, torch.tensor([2.0]), 3, 5, (4, 7, 1, 0), 1.0),
    "cropped": (LONG, SMOOTH, 4, 1, (-3, -2, -1, 3), None),
    "wide padding": (ODD, LONG, 1, 2, (50, 40, 3, 33), 0.3),
}
FORM = {"gain": 1.3, "negative_slope": 0.1}


@pytest.fixture(autouse=True)
def every_case_in_one_pass(monkeypatch):
    monkeypatch.setattr(resampling, "FEWEST_PLANES", 1)


def composed(fu, fd, up, down, padding, clamp, gain=1.3, slope=0.1):
    def run(x, b):
        t = plain(fu, up, 1, padding, False, up**2)(x + b.view(1, -1, 1, 1))
        t = F.leaky_relu(t, slope) * gain
        return plain(fd, 1, down, 0, False, 1.0)(t if clamp is None else t.clamp(-clamp, clamp))

    return run


def ours(fu, fd, up, down, padding, clamp):
    return lambda x, b: functional.filtered_lrelu(x, fu, fd, b, up, down, padding, clamp=clamp, **FORM)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS, ids=["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_to_second_order(case, dtype, layout, backend):
    """5 planes in one block of lanes; 40 in blocks that lie across samples, and in the last one some lanes are idle."""
    for shape in [(1, 5, 9, 11), (2, 20, 6, 13)]:
        x, b = torch.randn(shape, dtype=torch.float64), torch.randn(shape[1], dtype=torch.float64)
        against_plain(ours(*CASES[case]), composed(*CASES[case]), (x, b), dtype, layout, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS, ids=["nchw", "nhwc"])
def test_bfloat16_rounds_once(layout, backend):
    """Where no sample of the upsampled image is within a rounding of 0 or of the clamp."""
    case = (None, SMOOTH, 1, 2, 0, 1.0)
    b = torch.randn(19, dtype=torch.float64).bfloat16().double()
    edges = lambda x: ((x + b.view(1, -1, 1, 1)) * torch.where(x + b.view(1, -1, 1, 1) > 0, 1.3, 0.13)).abs()
    near = lambda x: torch.minimum(edges(x), (edges(x) - 1).abs())
    x = clear_of(near, torch.randn(3, 19, 7, 10, dtype=torch.float64).bfloat16().double())
    against_plain(ours(*case), composed(*case), (x, b), torch.bfloat16, layout, backend)


@pytest.mark.parametrize("layout", LAYOUTS, ids=["nchw", "nhwc"])
@pytest.mark.parametrize("case", CASES)
def test_every_order_is_exact(case, layout):
    x = torch.randn(1, 2, 4, 5, dtype=torch.float64).contiguous(memory_format=layout).requires_grad_()
    b = torch.randn(2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(ours(*CASES[case]), (x, b))
    assert torch.autograd.gradgradcheck(ours(*CASES[case]), (x, b))


ROUTES = {"thin": contextlib.nullcontext, "library": lambda: torch.autocast("cpu", torch.bfloat16)}


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("planes", [2, 20])
@pytest.mark.parametrize("wants", [(True, True), (True, False), (False, True)], ids=["both", "x", "bias"])
def test_a_derivative_requires_gradients_as_torchs_does_and_gives_zeros(wants, planes, route, monkeypatch):
    """Below 6 planes other ops, from there on the kernel; under autocast the op that torch.library knows."""
    monkeypatch.setattr(resampling, "FEWEST_PLANES", 6)
    case = CASES["StyleGAN3's"]
    x, b = torch.randn(1, planes, 9, 11), torch.randn(planes)
    for run in (composed(*case), ours(*case)):
        leaves = [t.clone().requires_grad_(want) for t, want in zip((x, b), wants, strict=True)]
        asked = [leaf for leaf in leaves if leaf.requires_grad]
        with ROUTES[route]():
            first = grad(run(*leaves).sum(), asked, create_graph=True)
            assert all(g.requires_grad for g in first)
            sum(g.square().sum() for g in first).backward()
        for leaf in asked:
            assert leaf.grad.dtype == leaf.dtype and torch.equal(leaf.grad, torch.zeros_like(leaf))


@pytest.mark.parametrize("planes", [2, 20])
def test_a_third_derivative_requires_gradients_too(planes, monkeypatch):
    monkeypatch.setattr(resampling, "FEWEST_PLANES", 6)
    x, b = torch.randn(1, planes, 9, 11, requires_grad=True), torch.randn(planes)
    for run in (composed(*CASES["up alone"]), ours(*CASES["up alone"])):
        y = run(x, b)
        dy, v = torch.randn_like(y).requires_grad_(), torch.randn_like(x)
        (first,) = grad(y, x, dy, create_graph=True)
        (second,) = grad(first, dy, v, create_graph=True)
        assert second.requires_grad
        (zeros,) = grad(second.sum(), x)
        assert torch.equal(zeros, torch.zeros_like(x))


def test_a_derivative_that_is_not_differentiated_runs_no_other_kernel_and_keeps_neither_x_nor_y():
    x, ran = torch.randn(1, 8, 9, 11, requires_grad=True), []
    with around(lambda op, launch: ran.append(op.name) or launch):
        y = functional.filtered_lrelu(x * 1, SMOOTH, SMOOTH, None, 2, 2, 3)
        kept = [t for t in y.grad_fn.saved_tensors if t is not None and t.is_floating_point()]
        (dx,) = grad(y.sum(), x)
    assert ran == ["filtered_lrelu", "filtered_lrelu_backward"] and not dx.requires_grad
    assert sum(t.numel() for t in kept) == 2 * len(SMOOTH)


@pytest.mark.parametrize("layout", LAYOUTS, ids=["nchw", "nhwc"])
@pytest.mark.parametrize("width", [9, 16, 40])
def test_signs_are_the_references(width, layout):
    """Up to 79 samples a row: words that are full, and one that is not."""
    if "native" not in BACKENDS:
        pytest.skip("fastgan._C is not built here")
    x, b = torch.randn(3, 7, 5, width).contiguous(memory_format=layout), torch.randn(7)
    args = (b, SMOOTH, LONG[:3], 2, 1, [2, 1, 2, 1], False, 1.3, 0.1, 0.7)
    with fastgan.backend("native"):
        signs = op(x, *args)[1]
    want = op.reference(x, *args)[1]
    assert signs.shape == want.shape == (2, 3, 7, 10, 4 * -(-2 * width // 32))
    assert (signs != want).float().mean() < 1e-3 and want.float().mean() > 10  # float32 may round over an edge


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("layout", LAYOUTS, ids=["nchw", "nhwc"])
def test_bands_and_strides(layout, threads):
    """Few planes of many rows are cut into bands; each of them writes the signs of its own rows."""
    if "native" not in BACKENDS:
        pytest.skip("fastgan._C is not built here")
    before = torch.get_num_threads()
    x = torch.randn(2, 6, 131, 58)[:, ::2, 1:, ::2]
    args = (None, SMOOTH, LONG, 2, 2, [3, 2, 3, 2], False, 1.3, 0.1, 0.7)
    torch.set_num_threads(threads)
    try:
        with fastgan.backend("native"):
            y, signs, _ = op(x.contiguous(memory_format=layout), *args)
            sliced, others, _ = op(x, *args)
    finally:
        torch.set_num_threads(before)
    want, kept, _ = op.reference(x.double(), *args)
    torch.testing.assert_close(y.double(), want, rtol=1e-5, atol=1e-5)
    assert (signs != kept).float().mean() < 1e-3
    assert y.is_contiguous(memory_format=layout) and torch.equal(sliced, y) and torch.equal(signs, others)


def test_what_is_not_a_number_stays_so():
    x = torch.zeros(1, 2, 4, 4)
    x[0, 0, 1, 1] = float("nan")
    for backend in BACKENDS:
        with fastgan.backend(backend):
            y = functional.filtered_lrelu(x, SMOOTH, SMOOTH, None, 2, 2, (3, 3, 3, 3), clamp=0.5)
        assert y[0, 0].isnan().any() and not y[0, 1].any()


def test_filters_that_learn_take_the_composition_and_the_op_refuses_them():
    x = torch.randn(1, 2, 5, 4, dtype=torch.float64, requires_grad=True)
    fu, fd = SMOOTH.double().requires_grad_(), ODD.double().requires_grad_()
    run = lambda x, fu, fd: functional.filtered_lrelu(x, fu, fd, None, 2, 2, 3, clamp=0.5)
    assert torch.autograd.gradcheck(run, (x, fu, fd))
    torch.testing.assert_close(run(x, fu, fd), run(x, fu.detach(), fd.detach()))
    y, signs, tie = op(x, None, fu, fd, 2, 2, [3] * 4, False, 1.0, 0.1, 0.5)
    with pytest.raises(NotImplementedError, match="filtered_lrelu: the filters must not require gradients"):
        y.sum().backward()
    pad_out = [0, 0, 0, 0]
    again = backward(x, signs, fu, fd, 2, 2, [3] * 4, pad_out, False, 1.0, 0.1, 0.5, tie)
    with pytest.raises(NotImplementedError, match="filtered_lrelu: the filters must not require gradients"):
        again.sum().backward()


def test_few_planes_take_the_composition(monkeypatch):
    if "native" not in BACKENDS:
        pytest.skip("fastgan._C is not built here")
    monkeypatch.setattr(resampling, "FEWEST_PLANES", 6)
    ran = []
    note = lambda op, launch: ran.append(op.name) or launch
    with around(note):
        few = functional.filtered_lrelu(torch.randn(1, 5, 5, 4), SMOOTH, SMOOTH, torch.randn(5), 2, 2, 3)
        enough = functional.filtered_lrelu(torch.randn(1, 6, 5, 4), SMOOTH, SMOOTH, torch.randn(6), 2, 2, 3)
    assert few.shape[2:] == enough.shape[2:]
    assert ran == ["bias_act", "upfirdn2d", "bias_act", "upfirdn2d", "filtered_lrelu"]


def test_empty_batches_and_half():
    assert functional.filtered_lrelu(torch.zeros(0, 3, 8, 8), LONG, LONG, None, 2, 2, 11).shape == (0, 3, 8, 8)
    x = torch.randn(1, 2, 8, 8, dtype=torch.float16)
    y = functional.filtered_lrelu(x, SMOOTH, SMOOTH, None, 2, 2, 3)
    want = functional.filtered_lrelu(x.float(), SMOOTH, SMOOTH, None, 2, 2, 3)
    assert y.dtype == torch.float16
    torch.testing.assert_close(y.float(), want, rtol=2e-3, atol=2e-3)


def test_cost_leaves_the_upsampled_image_out():
    """82x82 of it, whose rows of signs take three words."""
    x = torch.empty(8, 64, 36, 36)
    found = cost(x, LONG, LONG, 2, 2, [11, 10, 11, 10], 256.0)
    assert found["bytes"] == 2 * 4 * x.numel() + 2 * 8 * 64 * 82 * 12


def test_errors():
    x = torch.randn(1, 2, 4, 4)
    for call, error, text in [
        (lambda: functional.filtered_lrelu(x[0]), ValueError, r"x must be \[N,C,H,W\]"),
        (lambda: functional.filtered_lrelu(x.int()), TypeError, "floating tensor, got torch.int32"),
        (lambda: functional.filtered_lrelu(x, fd=SMOOTH.half()), TypeError, "fd must be float32 or float64"),
        (lambda: functional.filtered_lrelu(x, bias=torch.ones(3)), ValueError, r"bias must have shape \(2,\)"),
        (lambda: functional.filtered_lrelu(x, up=(1, 2)), ValueError, r"up must be an int >= 1, got \(1, 2\)"),
        (lambda: functional.filtered_lrelu(x, down=0), ValueError, "down must be an int >= 1, got 0"),
        (lambda: functional.filtered_lrelu(x, clamp=-1.0), ValueError, "clamp must be None or >= 0, got -1"),
        (lambda: functional.filtered_lrelu(x, gain=0.0), ValueError, "gain must be finite and not 0, got 0"),
        (
            lambda: functional.filtered_lrelu(x, LONG),
            ValueError,
            r"filters must fit into the padded image, got fu \(12,\)",
        ),
        (
            lambda: functional.filtered_lrelu(x, fd=LONG),
            ValueError,
            r"filters must fit into the padded image, got .* fd \(12,\)",
        ),
    ]:
        with pytest.raises(error, match="filtered_lrelu: .*" + text):
            call()
