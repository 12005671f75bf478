"""upfirdn2d against its definition written out with loops in float64, and against PyTorch with autograd."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from checks import BACKENDS, DTYPES, LAYOUTS, against_plain

import fastgan
from fastgan import functional
from fastgan.ops.upfirdn2d import cost, op

SMOOTH = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8
LONG = torch.hann_window(14, periodic=False)[1:-1] / 6.5
ODD = torch.tensor([[1.0, -2.0, 3.0], [0.5, 4.0, -1.0], [2.0, 0.25, -3.0], [1.0, 0.0, 5.0]]) / 8  # no product
CASES = {  # f, up, down, padding
    "identity": (None, 1, 1, 0),
    "up by the 4x4": (torch.outer(SMOOTH, SMOOTH), 2, 1, (2, 1, 2, 1)),
    "down by the 4x4": (torch.outer(SMOOTH, SMOOTH), 1, 2, (1, 1, 1, 1)),
    "blur": (SMOOTH, 1, 1, (2, 1)),
    "up by 12 taps": (LONG, 2, 1, (6, 5, 6, 5)),
    "up by 4, down by 2": (LONG, 4, 2, (9, 7, 8, 6)),
    "two thirds": (SMOOTH, 2, 3, (3, 2, 1, 4)),
    "three halves, odd": (ODD, 3, 2, (2, 3, 1, 2)),
    "odd filter": (ODD, 1, 1, (1, 1, 2, 1)),
    "odd filter, up": (ODD, 2, 1, (2, 1, 2, 1)),
    "axes apart": (ODD, (1, 2), (3, 1), (1, 0, 2, 2)),
    "a filter shorter than up": (torch.tensor([2.0]), 3, 1, (0, 2, 0, 2)),
    "cropped": (SMOOTH, 2, 1, (-2, -1, -3, 1)),
    "wide padding": (ODD, 1, 2, (40, 3, 2, 37)),
    "zeros": (torch.zeros(2, 2), 2, 1, 1),
}


def written_out(x, f, up, down, padding, flip, gain):
    """The definition, a sum for each output."""
    up, down = ((v, v) if isinstance(v, int) else v for v in (up, down))
    p = (padding,) * 4 if isinstance(padding, int) else padding
    p = (p[0], p[0], p[1], p[1]) if len(p) == 2 else p
    f = torch.ones(1, 1) if f is None else f
    f = torch.outer(f.double(), f.double()) if f.dim() == 1 else f.double()
    f = f if flip else f.flip([0, 1])
    (n, c, h, w), (kh, kw) = x.shape, f.shape
    oh, ow = (h * up[1] + p[2] + p[3] - kh) // down[1] + 1, (w * up[0] + p[0] + p[1] - kw) // down[0] + 1
    y = torch.zeros(n, c, oh, ow, dtype=torch.float64)
    for oy, ox, ky, kx in itertools.product(range(oh), range(ow), range(kh), range(kw)):
        iy, ix = oy * down[1] + ky - p[2], ox * down[0] + kx - p[0]
        if iy % up[1] == 0 and ix % up[0] == 0 and 0 <= iy // up[1] < h and 0 <= ix // up[0] < w:
            y[:, :, oy, ox] += gain * f[ky, kx] * x[:, :, iy // up[1], ix // up[0]]
    return y


def plain(f, up, down, padding, flip, gain):
    """The same in PyTorch, differentiable: zeros written out, padded, a depthwise convolution, strided."""
    up, down = ((v, v) if isinstance(v, int) else v for v in (up, down))
    p = (padding,) * 4 if isinstance(padding, int) else padding
    p = (p[0], p[0], p[1], p[1]) if len(p) == 2 else p
    f = torch.ones(1, 1) if f is None else f.double()
    f = torch.outer(f, f) if f.dim() == 1 else f
    f = f if flip else f.flip([0, 1])

    def run(x):
        n, c, h, w = x.shape
        u = x.new_zeros(n, c, h, up[1], w, up[0])
        u[:, :, :, 0, :, 0] = x
        u = F.pad(u.reshape(n, c, h * up[1], w * up[0]), p)
        return F.conv2d(u, (gain * f.to(x)).expand(c, 1, *f.shape), groups=c)[:, :, :: down[1], :: down[0]]

    return run


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_equals_the_definition(case, flip, backend):
    f, *form = CASES[case]
    x = torch.randn(2, 3, 7, 5)
    with fastgan.backend(backend):
        y = functional.upfirdn2d(x, f, *form, flip_filter=flip, gain=1.5)
    want = written_out(x.double(), f, *form, flip, 1.5)
    assert y.shape == want.shape
    torch.testing.assert_close(y.double(), want, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS, ids=["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_equals_torch_to_second_order(case, dtype, layout, backend):
    f, *form = CASES[case]
    ours = lambda x: functional.upfirdn2d(x, f, *form, gain=0.7)
    for shape in [(2, 3, 9, 11), (1, 20, 6, 70), (3, 15, 6, 9)]:  # the last: VF planes side by side
        x = torch.randn(shape, dtype=torch.float64)
        against_plain(ours, plain(f, *form, False, 0.7), (x,), dtype, layout, backend)


@pytest.mark.parametrize("f", [ODD, SMOOTH], ids=["2-D", "product"])
def test_every_order_is_exact_of_the_filter_too(f):
    x = torch.randn(2, 2, 4, 5, dtype=torch.float64, requires_grad=True)
    f = f.double().requires_grad_()
    for flip in (False, True):
        run = lambda x, f, flip=flip: op(x, f, [2, 1], [1, 2], [2, 1, 1, 2], flip, 1.5)
        assert torch.autograd.gradcheck(run, (x, f)) and torch.autograd.gradgradcheck(run, (x, f))


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("layout", LAYOUTS, ids=["nchw", "nhwc"])
def test_threads_and_strides(layout, threads):
    if "native" not in BACKENDS:
        pytest.skip("fastgan._C is not built here")
    before = torch.get_num_threads()
    x = torch.randn(4, 40, 33, 38)[:, ::2, 1:, ::2]
    want = functional.upfirdn2d(x.double(), ODD.double(), 2, 1, 2)
    torch.set_num_threads(threads)
    try:
        with fastgan.backend("native"):
            y = functional.upfirdn2d(x.contiguous(memory_format=layout), ODD, 2, 1, 2)
            sliced = functional.upfirdn2d(x, ODD, 2, 1, 2)
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(y.double(), want, rtol=1e-5, atol=1e-5)
    assert y.is_contiguous(memory_format=layout) and torch.equal(sliced, y)


def test_dtypes_and_empty_batches():
    assert functional.upfirdn2d(torch.zeros(0, 3, 8, 8), SMOOTH, 2, 1, (2, 1, 2, 1)).shape == (0, 3, 16, 16)
    half = torch.randn(1, 2, 8, 8, dtype=torch.float16)
    y = functional.upfirdn2d(half, SMOOTH, 2, 1, (2, 1))
    assert y.dtype == torch.float16
    torch.testing.assert_close(
        y.float(), functional.upfirdn2d(half.float(), SMOOTH, 2, 1, (2, 1)), rtol=1e-3, atol=1e-3
    )


def test_cost_counts_the_taps_that_meet_samples():
    x = torch.empty(2, 3, 8, 8)
    assert cost(x, torch.outer(SMOOTH, SMOOTH), (2, 2), (1, 1), (2, 1, 2, 1)) == {
        "bytes": 4 * (2 * 3 * 64 + 2 * 3 * 256),
        "flops": 2 * 2 * 3 * 256 * 4,
    }


def test_errors():
    x = torch.randn(1, 2, 4, 4)
    for call, error, text in [
        (lambda: functional.upfirdn2d(x[0], SMOOTH), ValueError, r"x must be \[N,C,H,W\], got shape \(2, 4, 4\)"),
        (lambda: functional.upfirdn2d(x.int(), SMOOTH), TypeError, "floating tensor, got torch.int32"),
        (lambda: functional.upfirdn2d(x, SMOOTH.half()), TypeError, "f must be float32 or float64, got torch.float16"),
        (lambda: functional.upfirdn2d(x, torch.zeros(0)), ValueError, r"f must be None, \[K\] or \[KH,KW\]"),
        (lambda: functional.upfirdn2d(x, SMOOTH, up=0), ValueError, "up must be an int or a pair of ints >= 1, got 0"),
        (lambda: functional.upfirdn2d(x, SMOOTH, padding=(1, 2, 3)), ValueError, r"padding must be .* got \(1, 2, 3\)"),
        (lambda: functional.upfirdn2d(x, SMOOTH, up=1.9), ValueError, "up must be an int .* >= 1, got 1.9"),
        (lambda: functional.upfirdn2d(x, SMOOTH, up="2"), ValueError, "up must be an int .* >= 1, got '2'"),
        (lambda: functional.upfirdn2d(x, SMOOTH, down=(2, 1.5)), ValueError, r"down must be .* got \(2, 1.5\)"),
        (lambda: functional.upfirdn2d(x, SMOOTH, down=None), ValueError, "down must be .* got None"),
        (lambda: functional.upfirdn2d(x, SMOOTH, padding=1.9), ValueError, "padding must be .* got 1.9"),
        (lambda: functional.upfirdn2d(x, SMOOTH, padding=(1, 0.5)), ValueError, r"padding must be .* got \(1, 0.5\)"),
        (
            lambda: functional.upfirdn2d(x, SMOOTH, padding=torch.tensor([1, 1])),
            ValueError,
            r"padding must be an int, \(x, y\) or .* got tensor\(\[1, 1\]\)",
        ),
        (lambda: functional.upfirdn2d(x, [1, 3, 3, 1]), TypeError, "f must be None or a tensor, got list; convert"),
        (lambda: functional.upfirdn2d(x, torch.ones(9)), ValueError, r"f \(9,\) must fit into the padded image"),
        (lambda: functional.upfirdn2d(x, SMOOTH, gain=float("nan")), ValueError, "gain must be finite, got nan"),
    ]:
        with pytest.raises(error, match="upfirdn2d: .*" + text):
            call()
