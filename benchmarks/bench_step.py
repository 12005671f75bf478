"""The whole training step of DCGAN-64, DCGAN-28, an MLP and DCGAN-64 with R1 at batch 64: an update of D and one of G.

Every row does the same textbook mathematics (PyTorch's DCGAN example): D on real and on fake.detach(), its Adam; G on
D(fake) with the updated D, its Adam. The rows of both dtypes are timed in one interleaved run; a row is compared with
PyTorch's rows of its own dtype.
"""

import copy
import itertools

import pytest
import torch
from layers import BATCH
from torch import nn

import fastgan
from fastgan.benchmarking import workloads
from fastgan.benchmarking.comparison import Case, Runner
from fastgan.benchmarking.textbook import textbook_step
from fastgan.ops import bn_act, conv2d, conv2d_weight, conv_transpose2d

PRESETS = {  # channels, edge, rate and betas of Adam
    "dcgan-64": (3, 64, 2e-4, (0.5, 0.999)),
    "dcgan-28": (1, 28, 1e-4, (0.9, 0.999)),
    "mlp-28": (1, 28, 2e-4, (0.5, 0.999)),
}
LATENT = 100
SECONDS = 25.0  # of rounds: a step takes about half a second, and there are seven rows
ROWS = (
    "eager",
    "eager-tuned",
    "eager-tuned-bf16",
    "compile-tuned",
    "compile-tuned-bf16",
    "fastgan",
    "fastgan-bf16",
)
RECIPE = "r1-dcgan-64"  # no norms in D; R1 in every update of D
CASES = [Case("step", name, f"batch{BATCH}") for name in (*PRESETS, RECIPE)]


def recipe_runners():
    """The rows of RECIPE: its textbook step, and GANStep as `fastgan train` runs it. No bound is known for it."""
    build = workloads.step(fastgan.recipes()[RECIPE], torch.device("cpu")).build

    def runner(name):
        bf16, ours = name.endswith("-bf16"), name.startswith("fastgan")
        row = workloads.Row(name, "bf16" if bf16 else "fp32", name != "eager", name.startswith("compile"), ours)
        return Runner(build(row)[0], dtype="bfloat16" if bf16 else "float32", ours=ours)

    return {name: runner(name) for name in ROWS}


def runners(case):
    torch._dynamo.reset()
    if case.shape == RECIPE:
        return recipe_runners()
    channels, size, rate, betas = PRESETS[case.shape]
    networks = fastgan.models.build(case.shape)
    images = torch.randn(BATCH, channels, size, size).clamp_(-1, 1)
    work = {dtype: step_work(case.shape, images.shape, getattr(torch, dtype)) for dtype in ("float32", "bfloat16")}

    def prepared(tuned):
        """(G, D, images, Adam of G, Adam of D): copies of the same networks; tuned is channels_last and fused Adam."""
        layout = torch.channels_last if tuned else torch.contiguous_format
        g, d = (copy.deepcopy(m).to(memory_format=layout) for m in networks)
        adams = [torch.optim.Adam(m.parameters(), rate, betas, fused=tuned or None) for m in (g, d)]
        return g, d, images.contiguous(memory_format=layout), *adams

    def eager(bf16=False, tuned=True, compile=False):
        g, d, real, *adams = prepared(tuned)
        dtype, precision = ("bfloat16", "bf16") if bf16 else ("float32", "fp32")
        recipe = fastgan.recipes()[case.shape].replace(precision=precision)
        step = textbook_step(recipe, g, d, *adams, compile=compile)
        return Runner(lambda: step(real), work[dtype], dtype)

    def ours(bf16=False):
        g, d, real, *_ = prepared(tuned=True)
        g_adam, d_adam = (fastgan.Adam(m.parameters(), rate, betas) for m in (g, d))
        step = fastgan.GANStep(
            fastgan.convert(g),
            fastgan.convert(d),
            latent=LATENT,
            g_optimizer=g_adam,
            d_optimizer=d_adam,
            precision="bf16" if bf16 else "fp32",
        )
        dtype = "bfloat16" if bf16 else "float32"
        return Runner(lambda: step(real), work[dtype], dtype, ours=True)

    return {
        "eager": eager(tuned=False),
        "eager-tuned": eager(),
        "eager-tuned-bf16": eager(bf16=True),
        "compile-tuned": eager(compile=True),
        "compile-tuned-bf16": eager(bf16=True, compile=True),
        "fastgan": ours(),
        "fastgan-bf16": ours(bf16=True),
    }


# ---- what a perfect step would have to do ---------------------------------------------------------------------------


def step_work(preset, images, dtype):
    """cost() of every op of the step; activations, dropout and the loss are taken to cost nothing.

    D sees real and fake as one batch of 2N, G's update has no weight gradients of D, and no gradient is taken for z or
    for the real images. Adam reads four and writes three float32 numbers a parameter.
    """
    with torch.device("meta"):
        g, d = (m.to(dtype) for m in fastgan.models.build(preset))
        g_layers = layers(g, torch.empty(BATCH, LATENT, dtype=dtype))
        d_both = layers(d, torch.empty(2 * BATCH, *images[1:], dtype=dtype))
        d_fake = layers(d, torch.empty(BATCH, *images[1:], dtype=dtype))
    work = [forward(*layer) for layer in g_layers + d_both + d_fake]
    work += [weight_gradient(*layer) for layer in d_both + g_layers]
    work += [input_gradient(*layer) for layer in d_both[1:] + d_fake + g_layers[1:]]
    parameters = [p.numel() for p in itertools.chain(g.parameters(), d.parameters())]
    return [piece for piece in work if piece] + [{"flops": 12 * n, "bytes": 7 * 4 * n} for n in parameters]


def layers(network, x):
    """(module, its input, its output) of every layer that computes, in order."""
    seen = []
    kinds = (nn.Conv2d, nn.ConvTranspose2d, nn.BatchNorm2d, nn.BatchNorm1d, nn.Linear)
    hooks = [
        m.register_forward_hook(lambda m, inputs, output: seen.append((m, inputs[0], output)))
        for m in network.modules()
        if isinstance(m, kinds)
    ]
    network(x)
    for hook in hooks:
        hook.remove()
    return seen


def linear_work(m, x):
    size = x.numel() + m.weight.numel() + len(x) * m.out_features
    return {"flops": 2 * len(x) * m.weight.numel(), "bytes": size * x.element_size()}


def geometry(m):
    return list(m.stride), list(m.padding), list(m.dilation)


def forward(m, x, y):
    if isinstance(m, nn.Conv2d):
        return conv2d.cost(x, m.weight, *geometry(m))
    if isinstance(m, nn.ConvTranspose2d):
        stride, padding, dilation = geometry(m)
        return conv_transpose2d.cost(x, m.weight, stride, padding, list(m.output_padding), m.groups, dilation)
    return linear_work(m, x) if isinstance(m, nn.Linear) else bn_act.cost(x)


def input_gradient(m, x, y):
    if isinstance(m, nn.Conv2d):
        stride, padding, dilation = geometry(m)
        extra = conv2d.input_padding(x.shape, y.shape, m.weight.shape, stride, padding, dilation)
        return conv_transpose2d.cost(y, m.weight, stride, padding, extra, m.groups, dilation)
    if isinstance(m, nn.ConvTranspose2d):
        return conv2d.cost(y, m.weight, *geometry(m))
    return linear_work(m, x) if isinstance(m, nn.Linear) else bn_act.cost_backward(x)


def weight_gradient(m, x, y):
    if isinstance(m, nn.Conv2d):
        return conv2d_weight.cost(x, y, m.kernel_size, m.groups)
    if isinstance(m, nn.ConvTranspose2d):
        return conv2d_weight.cost(y, x, m.kernel_size, m.groups)
    return linear_work(m, x) if isinstance(m, nn.Linear) else None  # batch norm's is in its input gradient


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_step(case, row, compare):
    compare(case, row, runners, seconds=SECONDS)
