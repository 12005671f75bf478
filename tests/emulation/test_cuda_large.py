"""Offsets beyond 2^31: the convolutions' last blocks over tensors of more elements than an int counts.

The tensors are sparse: memory that nobody touched is zero and takes none. Only the last images hold values, and only
the last blocks of the grids run.
"""

import mmap
import sys

import pytest
import torch
import torch.nn.functional as F

from fastgan import testing

if sys.platform != "linux":
    pytest.skip("sparse memory is mapped as Linux does it", allow_module_level=True)
BF16 = 1


@pytest.fixture
def module():
    try:
        with testing.emulate("cuda") as record:
            yield record.module
            record.module.last_blocks(0)
    except RuntimeError as error:
        if "the CUDA emulator needs" not in str(error):
            raise
        pytest.skip(str(error))


def sparse(*shape):
    """A zero tensor [N, ...] in bfloat16 without memory of its own."""
    count = torch.Size(shape).numel()
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
    return torch.frombuffer(mmap.mmap(-1, 2 * count, flags=flags), dtype=torch.bfloat16).view(shape)


def values(*shape):
    return torch.randn(shape).to(torch.bfloat16)


def nchw(x):
    return x.float().permute(0, 3, 1, 2)


def agree(got, want):
    torch.testing.assert_close(got.float(), want, rtol=2e-2, atol=2e-2)
    assert got.count_nonzero() > 0.9 * got.numel()


@pytest.mark.parametrize(("channels", "out"), [(64, 8), (8, 64)], ids=["x", "y"])
def test_conv2d(module, channels, out):
    n, side, last = 2**21 + 8, 4, 8  # 2^31 + 2^13 elements in the larger of x and y
    x, y, w = sparse(n, side, side, channels), sparse(n, side, side, out), values(out, 3, 3, channels)
    x[-last:] = values(last, side, side, channels)
    conv = module.Conv(n, channels, side, side, out, side, side, 3, 3, 1, 1, 1, 1, 1, 1, 1)
    module.last_blocks(2)  # 128 or 256 pixels
    strides = (9 * channels, 1, 3 * channels, channels)
    done = module.conv2d(conv, BF16, x.data_ptr(), w.data_ptr(), BF16, strides, 0, y.data_ptr(), 0, 0.0, 0, 0)
    assert done == 0
    agree(y[-last:], F.conv2d(nchw(x[-last:]), nchw(w), padding=1).permute(0, 2, 3, 1))


@pytest.mark.parametrize(("channels", "out"), [(64, 8), (16, 256)], ids=["x", "y"])
def test_conv_transpose2d(module, channels, out):
    """x [N, 4, 4, C] from y [N, 2, 2, K]."""
    n, last = 2**21 + 8, 8
    x, y, w = sparse(n, 4, 4, channels), sparse(n, 2, 2, out), values(out, 4, 4, channels)
    assert max(x.numel(), y.numel()) > 2**31
    y[-last:] = values(last, 2, 2, out)
    conv = module.Conv(n, channels, 4, 4, out, 2, 2, 4, 4, 2, 2, 1, 1, 1, 1, 1)
    module.last_blocks(1)  # of the last phase: odd rows and columns
    strides = (16 * channels, 1, 4 * channels, channels)
    done = module.conv_transpose2d(conv, BF16, y.data_ptr(), w.data_ptr(), BF16, strides, 0, x.data_ptr(), 0, 0.0, 0, 0)
    assert done == 0
    want = F.conv_transpose2d(nchw(y[-last:]), nchw(w), stride=2, padding=1).permute(0, 2, 3, 1)
    agree(x[-last:, 1::2, 1::2], want[:, 1::2, 1::2])


@pytest.mark.parametrize(("channels", "out"), [(32768, 8), (8, 32768)], ids=["x", "dy"])
def test_conv2d_weight(module, channels, out):
    n, last = 2**16 + 40, 24  # the reduction over all pixels ends behind 2^31 elements
    x, dy, dw = sparse(n, 1, 1, channels), sparse(n, 1, 1, out), sparse(out, 1, 1, channels)
    x[-last:, :, :, -64:], dy[-last:, :, :, -64:] = (values(last, 1, 1, min(64, c)) for c in (channels, out))
    conv = module.Conv(n, channels, 1, 1, out, 1, 1, 1, 1, 1, 1, 0, 0, 1, 1, 1)
    module.last_blocks(1)  # the last 64 rows and columns
    done = module.conv2d_weight(
        conv, BF16, x.data_ptr(), dy.data_ptr(), dw.data_ptr(), BF16, (channels, 1, channels, channels), 0, 0
    )
    assert done == 0
    want = torch.einsum("nk,nc->kc", dy[-last:, 0, 0, -64:].float(), x[-last:, 0, 0, -64:].float())
    agree(dw[-64:, 0, 0, -64:], want)
