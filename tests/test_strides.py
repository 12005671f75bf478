"""Output strides are plain torch's, also where one channel or one pixel makes both layouts the same memory."""

import pytest
import torch
import torch.nn.functional as F
from checks import BACKENDS, LAYOUTS

import fastgan
from fastgan import functional
from fastgan._layout import laid_out

SHAPES = [
    (3, 4, 5, 6),
    (3, 1, 5, 6),
    (3, 4, 1, 1),
    (3, 1, 1, 1),
    (1, 4, 5, 6),
    (1, 1, 5, 6),
    (1, 4, 1, 1),
    (3, 4, 1, 6),
    (3, 4, 5, 1),
    (1, 1, 1, 5),
    (1, 1, 1, 1),
]


def convolutions(x, layout):
    for out in (1, 5):
        for k, stride in ((1, 1), (1, 2), (3, 1), (3, 2)):
            weight = torch.randn(out, x.shape[1], k, k).contiguous(memory_format=layout)
            arguments = {"stride": stride, "padding": k // 2}
            yield functional.conv2d, F.conv2d, (x, weight), arguments
            back = torch.randn(x.shape[1], out, k, k).contiguous(memory_format=layout)
            yield functional.conv_transpose2d, F.conv_transpose2d, (x, back), arguments


def pointwise(x):
    c = x.shape[1]
    yield lambda t: functional.bias_act(t, torch.ones(c)), F.leaky_relu, (x,), {}
    yield lambda t: functional.interpolate(t, t), lambda t: t * 0.5, (x,), {}
    eval_norm = {"running_mean": torch.zeros(c), "running_var": torch.ones(c), "training": False}
    yield functional.bn_act, F.batch_norm, (x,), eval_norm
    if x.numel() > c:
        yield functional.bn_act, lambda t, **k: F.batch_norm(t, None, None, **k), (x,), {"training": True}
    if x.numel() > 1:
        yield functional.gn_act, F.group_norm, (x, 1), {}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_strides_are_those_of_torch(backend, shape):
    with fastgan.backend(backend):
        for layout in LAYOUTS:
            x = torch.randn(shape).contiguous(memory_format=layout)
            for weights in LAYOUTS:
                for ours, plain, args, kwargs in (*convolutions(x, weights), *pointwise(x)):
                    a, b = ours(*args, **kwargs), plain(*args, **kwargs)
                    assert a.stride() == b.stride(), (layout, weights, kwargs, a.shape, a.stride(), b.stride())


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_dropout_after_a_generator_of_one_channel_draws_the_same_mask(backend):
    weight, x = torch.randn(4, 1, 4, 4), torch.randn(2, 4, 14, 14)
    masks = []
    with fastgan.backend(backend):
        for run in (functional.conv_transpose2d, F.conv_transpose2d):
            y = run(x, weight, stride=2, padding=1)
            torch.manual_seed(0)
            masks.append(F.dropout(y, 0.3) == 0)
    assert torch.equal(*masks)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(2, 5, 7, 3), (1, 64, 16, 16), (3, 1, 4, 4), (2, 8, 1, 1), (2, 17, 1, 33)], ids=str)
def test_the_native_core_changes_layouts_as_torch_does(shape, dtype):
    """NCHW images to channels_last and back by a kernel of ours: values and strides are those of torch's copies."""
    from fastgan import _native

    if not fastgan.backends()["conv2d"]["native"][0]:
        pytest.skip("fastgan._C is not built here")
    x = torch.randn(shape).to(dtype)
    last = x.contiguous(memory_format=torch.channels_last)
    for given in (x, last, torch.randn(*shape[:3], 2 * shape[3]).to(dtype)[..., ::2]):
        got = _native.CPU.pixels(given)
        assert torch.equal(got, given) and got.is_contiguous(memory_format=torch.channels_last)
    assert _native.CPU.pixels(last) is last
    for channels_last in (False, True):
        got = _native.CPU.image(last, channels_last)
        assert torch.equal(got, x) and got.stride() == laid_out(last, channels_last).stride()
