import pytest
import torch
from checks import BACKENDS, DTYPES, LAYOUTS, against_plain

from fastgan.ops.conv2d_weight import op

# x (N, C, H, W), dy (K, OH, OW), kernel, stride, padding, dilation, groups
SAMPLES = [
    ((2, 3, 8, 8), (8, 4, 4), (4, 4), (2, 2), (1, 1), (1, 1), 1),
    ((3, 8, 7, 5), (16, 7, 5), (3, 3), (1, 1), (1, 1), (1, 1), 1),
    ((2, 6, 9, 9), (4, 4, 4), (3, 2), (2, 2), (0, 0), (1, 1), 2),
    ((2, 4, 10, 10), (4, 10, 10), (3, 3), (1, 1), (2, 2), (2, 2), 4),
    ((2, 4, 10, 10), (4, 3, 4), (3, 3), (2, 2), (1, 1), (1, 1), 1),  # dy smaller than x would give
]


def plain(sample):
    """The gradient of a convolution by its weight, through autograd, so that it is differentiable itself."""
    (_, c, _, _), (k, oh, ow), kernel, stride, padding, dilation, groups = sample

    def run(x, dy):
        w = torch.zeros(k, c // groups, *kernel, dtype=x.dtype, requires_grad=True)
        y = torch.nn.functional.conv2d(x, w, None, stride, padding, dilation, groups)[:, :, :oh, :ow]
        return torch.autograd.grad(y, w, dy, create_graph=True)[0]

    return run


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS, ids=["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sample", SAMPLES, ids=str)
def test_equals_autograd_to_second_order(sample, dtype, layout, backend):
    shape, (k, oh, ow), *geometry = sample
    x, dy = torch.randn(shape, dtype=torch.float64), torch.randn(shape[0], k, oh, ow, dtype=torch.float64)

    def ours(x, dy):
        return op(x, dy, *map(list, geometry[:4]), geometry[4], layout == torch.channels_last)

    against_plain(ours, plain(sample), (x, dy), dtype, layout, backend)


@pytest.mark.parametrize("sample", SAMPLES, ids=str)
def test_gradgradcheck(sample):
    shape, (k, oh, ow), *geometry = sample
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    dy = torch.randn(shape[0], k, oh, ow, dtype=torch.float64, requires_grad=True)
    run = lambda x, dy: op(x, dy, *map(list, geometry[:4]), geometry[4], False)
    assert torch.autograd.gradcheck(run, (x, dy), fast_mode=True)
    assert torch.autograd.gradgradcheck(run, (x, dy), fast_mode=True)
