"""Gradient penalties on the norm-free critic of DCGAN-64 (64 x 64, batch 64): the penalty alone, and updates of D.

Every row computes the same loss and the same gradients. PyTorch's rows are the textbook: autograd.grad(create_graph)
and a backward through it, in both layouts; and, since torch 2.13 can (with trace_autograd_ops), the whole of that under
torch.compile. fastgan-algebra is the route by forward ops with our convolutions switched off: PyTorch's run in their
place, and what is left is what the mathematics gives. "plain" cases have no penalty: what the others are compared with.
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from layers import BATCH, D_LAYERS, KERNEL
from torch import nn

import fastgan
from fastgan import functional
from fastgan._op import around
from fastgan.benchmarking.comparison import Case, Runner
from fastgan.benchmarking.textbook import SLOPE, compiled_double_backward
from fastgan.benchmarking.textbook import logits_and_norms as textbook
from fastgan.ops import conv2d, conv2d_weight, conv_transpose2d
from fastgan.penalties import logits_and_norms

ROWS = ("eager", "eager-tuned", "compile-tuned", "fastgan-algebra", "fastgan")
# case -> passes over N samples: (forward, adjoint to x, adjoint to the first layer's output, tangent, weight gradient)
PASSES = {
    "wgan-gp": (1, 1, 0, 1, 1),  # the penalty alone
    "loss+r1": (1, 1, 0, 1, 1),  # D(real)'s loss and its R1: one pass does both
    "d-plain": (2, 0, 2, 0, 2),  # an update of D on real and fake
    "d-r1": (2, 1, 1, 1, 2),  # the same with R1 on real
    "d-wgan-gp": (3, 1, 2, 1, 3),  # an update of a WGAN-GP critic
}
CASES = [Case("penalty", name, f"batch{BATCH}", "float32") for name in PASSES]
SECONDS = 6.0


def critic():
    """The discriminator of DCGAN-64 without batch norm."""
    modules = []
    for layer in D_LAYERS:
        conv = nn.Conv2d(layer.channels, layer.filters, KERNEL, layer.stride, layer.padding)
        nn.init.normal_(conv.weight, 0, 0.02)
        modules += [conv, nn.LeakyReLU(SLOPE, inplace=True)]
    return nn.Sequential(*modules[:-1], nn.Flatten(0))


def loss(name, d, real, fake, norms):
    """The case's loss; `norms(d, x)` gives logits and squared norms."""
    if name == "loss+r1":
        logits, squared = norms(d, real)
        return F.softplus(-logits).mean() + 5 * squared.mean()
    if name == "d-r1":
        logits, squared = norms(d, real)
        return F.softplus(-logits).mean() + F.softplus(d(fake)).mean() + 5 * squared.mean()
    if name == "d-plain":
        logits_real, logits_fake = d(torch.cat([real, fake])).chunk(2)
        return F.softplus(-logits_real).mean() + F.softplus(logits_fake).mean()
    points = torch.lerp(fake, real, torch.rand(BATCH, 1, 1, 1))
    penalty = 10 * (norms(d, points)[1].sqrt() - 1).square().mean()
    if name == "wgan-gp":
        return penalty
    logits_real, logits_fake = d(torch.cat([real, fake])).chunk(2)
    return logits_fake.mean() - logits_real.mean() + penalty


def ours(name, d, real, fake):
    if name != "wgan-gp":
        return loss(name, d, real, fake, logits_and_norms)
    return functional.gradient_penalty(d, real, fake, kind="wgan-gp", weight=10.0)


def runners(case):
    torch._dynamo.reset()
    network, images = critic(), torch.randn(2, BATCH, 3, 64, 64)
    work = needed(*PASSES[case.shape])

    def prepared(layout):
        d = copy.deepcopy(network).to(memory_format=layout)
        return d, *(x.contiguous(memory_format=layout) for x in images)

    def eager(layout):
        d, real, fake = prepared(layout)
        return Runner(update(d, lambda: loss(case.shape, d, real, fake, textbook)), work)

    def compiled():
        d, real, fake = prepared(torch.channels_last)
        function = compiled_double_backward(lambda real, fake: loss(case.shape, d, real, fake, textbook))
        return Runner(update(d, lambda: function(real, fake)), work)

    def fast(convolutions):
        d, real, fake = prepared(torch.channels_last)
        fastgan.convert(d)
        once = update(d, lambda: ours(case.shape, d, real, fake))

        def run():
            with around(convolutions):
                once()

        return Runner(run, work, ours=True)

    return {
        "eager": eager(torch.contiguous_format),
        "eager-tuned": eager(torch.channels_last),
        "compile-tuned": compiled(),
        "fastgan-algebra": fast(lambda op, launch: op.reference if op.name.startswith("conv") else launch),
        "fastgan": fast(lambda op, launch: launch),
    }


def update(d, value):
    """The loss and its gradients; the optimiser, the same for all, is left out."""

    def run():
        d.zero_grad()
        value().backward()

    return run


def needed(forward, to_x, to_first, tangent, weight):
    """cost() of the convolutions that cannot be left out, over PASSES; activations are taken to cost nothing."""
    work = []
    for i, layer in enumerate(D_LAYERS):
        with torch.device("meta"):
            x = torch.empty(BATCH, layer.channels, layer.size, layer.size)
            y = torch.empty(BATCH, layer.filters, layer.out, layer.out)
            w = torch.empty(layer.filters, layer.channels, *KERNEL)
        geometry = [layer.stride] * 2, [layer.padding] * 2, [1, 1]
        extra = conv2d.input_padding(x.shape, y.shape, w.shape, *geometry)
        adjoints = to_x + (to_first if i else 0)
        tangents = tangent if i + 1 < len(D_LAYERS) else 0
        work += (forward + tangents) * [conv2d.cost(x, w, *geometry)]
        work += adjoints * [conv_transpose2d.cost(y, w, *geometry[:2], extra, 1, geometry[2])]
        work += weight * [conv2d_weight.cost(x, y, list(KERNEL), 1)]
    return work


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_penalty(case, row, compare):
    compare(case, row, runners, seconds=SECONDS)
