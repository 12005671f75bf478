"""Output strides are plain torch's, also where one channel or one pixel makes both layouts the same memory."""

import contextlib
import copy
import functools
import itertools

import pytest
import torch
import torch.nn.functional as F
from checks import BACKENDS, LAYOUTS
from torch import nn

import fastgan
from fastgan import functional
from fastgan._layout import laid_out
from fastgan.program import run, switched_off

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


def composed(op, **options):
    """torch's op and the activation after it."""
    return lambda *args, **kwargs: torch.tanh(op(*args, **kwargs, **options))


def pointwise(x):
    c = x.shape[1]
    yield lambda t: functional.bias_act(t, torch.ones(c)), F.leaky_relu, (x,), {}
    yield lambda t: functional.interpolate(t, t), lambda t: t * 0.5, (x,), {}
    for act in (None, "relu"):
        then = (lambda op: op) if act is None else (lambda op: lambda *a, **k: torch.relu(op(*a, **k)))
        eval_norm = {"running_mean": torch.zeros(c), "running_var": torch.ones(c), "training": False}
        norm = functools.partial(functional.bn_act, activation=act)
        yield norm, then(F.batch_norm), (x,), eval_norm
        if x.numel() > c:
            yield norm, then(lambda t, **k: F.batch_norm(t, None, None, **k)), (x,), {"training": True}
        if x.numel() > 1:
            yield functools.partial(functional.gn_act, activation=act), then(F.group_norm), (x, 1), {}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_strides_are_those_of_torch(backend, shape):
    with fastgan.backend(backend):
        for layout in LAYOUTS:
            x = laid_out(torch.randn(shape), layout == torch.channels_last)
            for weights in LAYOUTS:
                for ours, plain, args, kwargs in (*convolutions(x, weights), *pointwise(x)):
                    a, b = ours(*args, **kwargs), plain(*args, **kwargs)
                    assert a.stride() == b.stride(), (layout, weights, kwargs, a.shape, a.stride(), b.stride())


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_dropout_after_a_generator_of_one_channel_draws_the_same_mask(backend):
    x, weight = torch.randn(2, 4, 14, 14), torch.randn(4, 1, 4, 4)
    for layout in LAYOUTS:
        weight = laid_out(weight, layout == torch.channels_last)
        for ours, plain in (
            (functional.conv_transpose2d, F.conv_transpose2d),
            (functools.partial(functional.conv_transpose2d, activation="tanh"), composed(F.conv_transpose2d)),
        ):
            masks = []
            with fastgan.backend(backend):
                for run in (ours, plain):
                    y = run(x, weight, stride=2, padding=1)
                    torch.manual_seed(0)
                    masks.append(F.dropout(y, 0.3) == 0)
            assert torch.equal(*masks)


def norms(affine):
    """Chains whose norms' results are contiguous in torch, whatever they take."""
    norm = nn.InstanceNorm2d(4, affine=affine)
    yield nn.Sequential(nn.Conv2d(3, 4, 3), norm, nn.LeakyReLU(0.2, inplace=True))
    yield nn.Sequential(nn.Conv2d(3, 4, 3), norm)
    yield nn.Sequential(nn.Conv2d(3, 4, 3), norm, nn.ReLU(), nn.ReflectionPad2d(1), nn.Conv2d(4, 2, 3))
    yield nn.Sequential(nn.Conv2d(3, 4, 3), norm, nn.ReLU(), nn.Dropout(0.5), nn.Conv2d(4, 2, 3))
    yield nn.Sequential(nn.Conv2d(3, 4, 3), nn.LayerNorm([4, 6, 6], elementwise_affine=affine), nn.ReLU())
    yield nn.Sequential(nn.Conv2d(3, 1, 8), nn.LeakyReLU(0.2, inplace=True))
    yield nn.Sequential(nn.Conv2d(3, 1, 3), nn.Sigmoid())


class HandWritten(nn.Module):
    def __init__(self, chain):
        super().__init__()
        self.layers = nn.ModuleList(chain)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


@pytest.mark.parametrize("written", [lambda chain: chain, HandWritten], ids=["chain", "hand-written"])
@pytest.mark.parametrize("program", [True, False], ids=["program", "ops"])
def test_a_view_after_a_converted_chain_works_where_it_does_in_torch(written, program):
    """A channels_last instance norm that stayed channels_last broke `.view`, and drew another dropout mask."""
    switch = contextlib.nullcontext if program else switched_off
    for chain in (chain for affine in (True, False) for chain in norms(affine)):
        for weights, images in itertools.product(LAYOUTS, LAYOUTS):
            plain = written(chain).to(memory_format=weights)
            ours = fastgan.convert(copy.deepcopy(plain))
            x = laid_out(torch.randn(2, 3, 8, 8), images == torch.channels_last)
            results = []
            for model in (ours, plain):
                torch.manual_seed(1)
                with fastgan.racing(False), switch():
                    results.append(model(x))
            torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)
            assert results[0].stride() == results[1].stride(), (chain, weights, images)


@pytest.mark.parametrize("way", ["program", "plain", "channels_last", "ops", "traced"])
def test_the_gradient_of_one_sample_through_an_instance_norm_is_that_of_nchw(way, monkeypatch):
    """PyTorch 2.13 reads the channels_last cotangent of one sample as NCHW: its own gradient is wrong by 1.4."""
    chain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.InstanceNorm2d(4), nn.Conv2d(4, 5, 3))
    ours = fastgan.convert(copy.deepcopy(HandWritten(chain) if way == "traced" else chain))
    ours.to(memory_format=torch.channels_last)
    if way in ("plain", "channels_last"):
        ways = run.Run._ways
        monkeypatch.setattr(run.Run, "_ways", lambda *args: {way: ways(*args)[way]})
    x, dy = torch.randn(1, 3, 9, 9), torch.randn(1, 5, 5, 5)
    want = torch.autograd.grad(chain(x), list(chain.parameters()), dy)
    x, dy = (t.contiguous(memory_format=torch.channels_last) for t in (x, dy))
    with switched_off() if way == "ops" else contextlib.nullcontext():
        got = torch.autograd.grad(ours(x), list(ours.parameters()), dy)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


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
        got = _native.CPU.image(last, channels_last, False)
        assert torch.equal(got, x) and got.stride() == laid_out(last, channels_last).stride()
