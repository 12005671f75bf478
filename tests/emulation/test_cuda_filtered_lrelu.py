"""The CUDA kernel of filtered_lrelu under the emulator: strips, bands, planes side by side, signs, what it fetches."""

import pytest
import torch
from checks import LAYOUTS, against_plain, assert_close, clear_of, distance
from test_filtered_lrelu import CASES, composed, ours
from test_upfirdn2d import LONG, ODD, SMOOTH

from fastgan._op import OPS
from fastgan.choice import watching
from fastgan.functional import resampling
from fastgan.ops.filtered_lrelu import adjoint_pads, cost, fake, middle

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
layouts = pytest.mark.parametrize("layout", LAYOUTS, ids=["nchw", "nhwc"])
STYLEGAN3 = (LONG, LONG, 2, 2, [10, 11, 10, 11], False, 1.4, 0.2, 0.9)  # all but x and bias


@pytest.fixture(autouse=True)
def every_case_in_one_pass(monkeypatch):
    monkeypatch.setattr(resampling, "FEWEST_PLANES", 1)


def drawn(shape, dtype, layout):
    return torch.randn(shape).to(dtype).contiguous(memory_format=layout)


def backward_arguments(x, signs, y, case):
    """Of filtered_lrelu_backward, behind a forward call of x, bias and `case`."""
    fu, fd, up, down, pad, flip, gain, slope, clamp = case
    pads = adjoint_pads(x.shape[2:], middle(x, fu, up, pad), y.shape[2:], (fu, fd), up, down, pad, [0] * 4)
    return torch.randn_like(y), signs, fd, fu, down, up, *pads, not flip, gain * up**2, slope, clamp, None


def close(got, op, args):
    """The house's bound in float32; in 16 bits what one rounding of a sum in float32 makes."""
    want = op.reference(*(a.double() if isinstance(a, torch.Tensor) and a.dtype == got.dtype else a for a in args))
    theirs = op.reference(*args)
    want, theirs = (t[0] if isinstance(t, tuple) else t for t in (want, theirs))
    if got.dtype == torch.float32:
        assert_close(got, want, got.dtype, distance(theirs, want))
    else:
        assert distance(got, want) <= torch.finfo(got.dtype).eps


def as_the_reference(x, bias, case):
    """y, signs and dx by the kernel, checked."""
    op, backward = OPS["filtered_lrelu"], OPS["filtered_lrelu_backward"]
    assert not op.backends["cuda"].declines(x, bias, *case)
    y, signs, _ = op.backends["cuda"].run(x, bias, *case)
    kept = op.reference(x, bias, *case)[1]
    close(y, op, (x, bias, *case))
    assert y.stride() == fake(x, bias, *case)[0].stride()
    assert signs.shape == kept.shape and (signs != kept).sum() <= 1 + signs.numel() // 1000
    args = backward_arguments(x, kept, y, case)
    dx = backward.backends["cuda"].run(*args)
    close(dx, backward, args)
    assert dx.shape == x.shape


@layouts
@pytest.mark.parametrize("case", CASES)
def test_to_second_order(record, case, layout):
    record.configure(seed=2)
    x, b = torch.randn(2, 5, 6, 9, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
    ran = set()
    with watching(lambda op, name, why: ran.add((op.name, name))):
        against_plain(ours(*CASES[case]), composed(*CASES[case]), (x, b), torch.float32, layout, "cuda")
    assert ran == {("filtered_lrelu", "cuda"), ("filtered_lrelu_backward", "cuda")}


@layouts
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_16_bits_round_once_to_second_order(record, dtype, layout):
    """Where no sample of the upsampled image is within a rounding of 0 or of the clamp."""
    case = (None, SMOOTH, 1, 2, 0, 1.0)
    b = torch.randn(19, dtype=torch.float64).to(dtype).double()
    shifted = lambda x: x + b.view(1, -1, 1, 1)
    edges = lambda x: (shifted(x) * torch.where(shifted(x) > 0, 1.3, 0.13)).abs()
    near = lambda x: torch.minimum(edges(x), (edges(x) - 1).abs())
    x = clear_of(near, torch.randn(1, 19, 7, 10, dtype=torch.float64).to(dtype).double())
    against_plain(ours(*case), composed(*case), (x, b), dtype, layout, "cuda")


@layouts
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_values_and_signs_are_the_references(record, case, flip, dtype, layout):
    """20 channels: in channels_last groups of 8 or 16, of which the last lacks some."""
    record.configure(seed=1)
    fu, fd, up, down, padding, clamp = CASES[case]
    fu, fd = (torch.ones(1, 1) if f is None else f for f in (fu, fd))
    x0, x1, y0, y1 = (padding,) * 4 if isinstance(padding, int) else padding
    form = (fu, fd, up, down, [y0, y1, x0, x1], flip, -1.3 if flip else 1.3, 0.1, -1.0 if clamp is None else clamp)
    as_the_reference(drawn((1, 20, 7, 8), dtype, layout), torch.randn(20), form)
    assert len(record.launches) == 2  # a pass each


@layouts
def test_strips_and_bands(record, layout):
    """Wide rows are cut into strips, few planes on a large card into bands; each owns the signs of its own samples."""
    record.configure(seed=3)
    record.card(multiprocessors=64)
    for fd, down in ((LONG, 2), (ODD, 3), (SMOOTH, 5)):
        before = len(record.launches)
        case = (LONG, fd, 2, down, [3, 2, 4, -1], False, 1.4, 0.2, 0.9)
        as_the_reference(drawn((1, 3, 64, 250), torch.float32, layout), None, case)
        planes_apart = 3 if layout == LAYOUTS[0] else 1
        assert record.launches[before].blocks >= planes_apart * 2 * (2 if len(fd) > 4 else 1)


def test_results_do_not_depend_on_the_card_or_the_order_of_threads(record):
    x, bias = torch.randn(2, 3, 100, 20), torch.randn(3)
    results = []
    for seed, multiprocessors in enumerate((4, 200, 1)):
        record.configure(seed=seed)
        record.card(multiprocessors=multiprocessors)
        results.append(OPS["filtered_lrelu"].backends["cuda"].run(x, bias, *STYLEGAN3))
    assert len({launch.blocks for launch in record.launches}) > 1
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@layouts
@pytest.mark.parametrize(("up", "down"), [(31, 32), (32, 31), (1, 32), (32, 1), (1, 1)])
def test_the_longest_filters_fit(record, up, down, layout):
    for fu, fd in ((torch.randn(32, 32), torch.randn(32)), (torch.randn(32), torch.randn(32, 32))):
        case = (fu, fd, up, down, [40, 40, 41, 43], False, 0.02, 0.2, 1.0)
        as_the_reference(drawn((1, 2, 3, 4), torch.float32, layout), None, case)


def test_what_does_not_fit_is_declined_with_its_reason_and_composed():
    x, long = torch.empty(1, 8, 40, 40, device="meta"), torch.ones(33)
    for case in ((long, LONG, 1, 1), (LONG, torch.ones(3, 33), 1, 1), (LONG, LONG, 33, 1), (LONG, LONG, 1, 33)):
        for name in ("cuda", "triton"):
            said = (
                OPS["filtered_lrelu"]
                .backends[name]
                .declines(torch.zeros(1, 8, 40, 40), None, *case, [40] * 4, False, 1.0, 0.2, -1.0)
            )
            assert said == "GPU kernels take at most 32 taps a side and factors of 32, got 33"
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(resampling, "has_kernel", lambda op, device: True)
            assert not resampling._in_one_pass(x, *case)
            assert resampling._in_one_pass(x, LONG, LONG, 2, 2)
            assert resampling._in_one_pass(torch.zeros(1, 8, 40, 40), *case)  # a CPU's kernel takes any filter
    far = (LONG, LONG, 2, 2, [2**29, 0, 0, 0], False, 1.0, 0.2, -1.0)
    assert "32 bits" in OPS["filtered_lrelu"].backends["cuda"].declines(torch.zeros(1, 8, 40, 40), None, *far)


# ---- what is fetched -------------------------------------------------------------------------------------------------


def moved(record):
    """{bytes of a tensor: (bytes asked for, bytes of the sectors)} of the last call's images and signs."""
    found = {}
    for t in record.traffic:
        asked, sectors = found.get(t.bytes, (0, 0))
        found[t.bytes] = asked + t.requested, sectors + 32 * t.sectors
    return found


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_nchw_moves_x_y_and_the_signs_once(record, dtype):
    """One strip and one band a plane; rows of 36 pixels and of three words of signs."""
    x = drawn((2, 4, 36, 36), dtype, LAYOUTS[0])
    record.configure(counting=True)
    record.card(multiprocessors=1)
    y, signs, _ = OPS["filtered_lrelu"].backends["cuda"].run(x, torch.randn(4), *STYLEGAN3)
    image, found = x.numel() * x.element_size(), moved(record)
    assert y.shape == x.shape and signs.numel() != image
    assert found[image][0] == 2 * image and found[image][1] <= (2.8 if dtype == DTYPES[0] else 3.9) * image
    assert found[signs.numel()][0] == signs.numel()  # a lane writes a word: a sector for each
    assert found[image][0] + found[signs.numel()][0] == cost(x, LONG, LONG, 2, 2, STYLEGAN3[4], 0.9)["bytes"]
    (launch,) = record.launches
    assert launch.shared_wavefronts <= 1.4 * launch.shared_ideal  # every other column: two to a bank


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_channels_last_moves_whole_sectors(record, dtype):
    """8 channels a block and 16 columns a strip, whose windows of 27 columns of x overlap; y is written once."""
    x = drawn((1, 16, 32, 32), dtype, LAYOUTS[1])
    record.configure(counting=True)
    record.card(multiprocessors=1)
    y, *_ = OPS["filtered_lrelu"].backends["cuda"].run(x, torch.randn(16), *STYLEGAN3)
    image = x.numel() * x.element_size()
    assert y.shape == x.shape
    asked, sectors = moved(record)[image]
    assert 2 * image <= asked <= 2.5 * image
    assert sectors <= (1.01 if dtype == torch.float32 else 2.01) * asked
