"""Both routes of the gradient penalty against textbook double backward in plain PyTorch, float64, every parameter."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

import fastgan
from fastgan import functional
from fastgan.backends import watching
from fastgan.training import linearised
from fastgan.training.penalties import KINDS, logits_and_norms

N = 5


def mlp():
    return nn.Sequential(
        nn.Flatten(), nn.Linear(2 * 64, 16), nn.LeakyReLU(0.2), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 1)
    )


def dcgan(norm=None, activation=None, dropout=0.0):
    act = activation or (lambda: nn.LeakyReLU(0.2, inplace=True))
    middle = [norm()] if norm else []
    return nn.Sequential(
        nn.Conv2d(2, 6, 4, 2, 1, bias=False), act(), nn.Dropout(dropout), nn.Conv2d(6, 8, 4, 2, 1), *middle, act(),
        nn.Dropout2d(dropout), nn.Conv2d(8, 1, 2), nn.Flatten(0),
    )  # fmt: skip


class Residual(nn.Module):
    """SN-GAN's block: ReLU in place, average pooling, a learnt skip, spectral norm on every layer."""

    def __init__(self, norm):
        super().__init__()
        self.first, self.second, self.skip = (
            norm(nn.Conv2d(2, 6, 3, padding=1)),
            norm(nn.Conv2d(6, 6, 3, padding=1)),
            norm(nn.Conv2d(2, 6, 1)),
        )
        self.act, self.head = nn.ReLU(inplace=True), norm(nn.Linear(6, 1))

    def forward(self, x):
        h = self.act(self.second(self.act(self.first(x))) + F.avg_pool2d(self.skip(x), 3, 1, 1))
        return self.head(F.avg_pool2d(h, 2).sum((2, 3))).squeeze(1)


class Grouped(nn.Module):
    """R3GAN's block: grouped residual, no norm, learnt bias and gain, bilinear downsampling."""

    def __init__(self):
        super().__init__()
        self.narrow, self.group, self.wide = (
            nn.Conv2d(2, 8, 1),
            nn.Conv2d(8, 8, 3, padding=1, groups=4, bias=False),
            nn.Conv2d(8, 2, 1, bias=False),
        )
        self.bias, self.gain, self.basis, self.head = (
            nn.Parameter(torch.rand(s) + 0.5) for s in ((8, 1, 1), (), (2, 4, 4), (2, 3))
        )

    def forward(self, x):
        h = F.leaky_relu(self.narrow(x) + self.bias, 0.2)
        h = x + self.gain * self.wide(F.leaky_relu(self.group(h), 0.2)) / 2
        h = F.interpolate(h, scale_factor=0.5, mode="bilinear", antialias=False)
        return ((h * self.basis).sum([2, 3]) @ self.head).mean(1)


def patch():
    return nn.Sequential(nn.Conv2d(2, 6, 4, 2, 1), nn.LeakyReLU(0.2, True), nn.Conv2d(6, 8, 3, 1, 1), nn.LeakyReLU(0.2, True), nn.Conv2d(8, 1, 3, 1, 1))  # fmt: skip


class Projection(nn.Module):
    """Conditional: an inner product with the label's embedding, and a map of the label beside the image."""

    def __init__(self):
        super().__init__()
        self.plane, self.embed = nn.Embedding(3, 64), nn.Embedding(3, 6)
        self.conv, self.head = nn.Conv2d(3, 6, 4, 2, 1), nn.Linear(6, 1)

    def forward(self, x, labels):
        x = torch.cat([x, self.plane(labels).view(-1, 1, 8, 8)], 1)
        h = F.leaky_relu(self.conv(x), 0.1).sum((2, 3))
        return self.head(h).squeeze(1) + (self.embed(labels) * h).sum(1)


class Oddities(nn.Module):
    """The rest of the table: other ranks, transposed convolutions, shapes, resampling, arithmetic, views and in-place ops."""

    def __init__(self):
        super().__init__()
        self.up, self.one, self.three = (
            nn.ConvTranspose2d(2, 4, 3, 2, 1, output_padding=1, groups=2),
            nn.Conv1d(4, 3, 3, dilation=2),
            nn.Conv3d(1, 2, 3, padding=1),
        )
        self.up1 = nn.ConvTranspose1d(3, 2, 3, 2)
        self.divide, self.offset, self.more, self.mv = (
            nn.Parameter(torch.rand(s) + 0.5) for s in ((2, 1, 1), (2, 8, 8), (N, 2, 1, 8), (8,))
        )

    def forward(self, x):
        h = 1 - (x * 0.5 - self.offset) / self.divide
        h = torch.cat([h, self.more.expand(-1, -1, 8, -1)], 1)[:, ::2] + h.transpose(2, 3)
        h = F.pixel_shuffle(F.pixel_unshuffle(-h, 2), 2).contiguous(memory_format=torch.channels_last)
        u = F.interpolate(F.pad(self.up(h), (1, 1, 0, 2)), scale_factor=2)
        u = F.adaptive_avg_pool2d(u, (8, 5)).relu_()
        w = self.up1(self.one(u.flatten(2))).chunk(2, 1)[1].squeeze(1)
        z = self.three(torch.stack([h, h * 2], 1).sum(1, keepdim=True)).select(1, 1).permute(0, 2, 1, 3)
        z = F.leaky_relu(z.reshape(x.shape[0], -1), 0.3)
        z += 1.5  # in place, on what leaky_relu does not need for its backward
        return w.mean(1, keepdim=True) + (z[:, :8] @ self.mv).unsqueeze(1) * 3 + h.double().mean((1, 2, 3)).view(-1, 1)


NORM = "own statistics"
# name -> (builder, why not by forward ops ("": by forward ops))
ZOO = {
    "mlp": (mlp, ""),
    "dcgan": (dcgan, ""),
    "dcgan-bn": (lambda: dcgan(lambda: nn.BatchNorm2d(8)), NORM),
    "dcgan-in": (lambda: dcgan(lambda: nn.InstanceNorm2d(8, affine=True)), NORM),
    "dcgan-ln": (lambda: dcgan(lambda: nn.LayerNorm([8, 2, 2])), NORM),
    "dcgan-gn": (lambda: dcgan(lambda: nn.GroupNorm(2, 8)), NORM),
    "dcgan-bn-eval": (lambda: warm(dcgan(lambda: nn.BatchNorm2d(8))), ""),
    "resnet-sn": (lambda: Residual(spectral_norm), ""),
    "resnet-sn-hooks": (lambda: Residual(nn.utils.spectral_norm), ""),
    "resnet-wn": (lambda: Residual(weight_norm), ""),
    "grouped": (Grouped, ""),
    "patch": (patch, ""),
    "projection": (Projection, ""),
    "dropout": (lambda: dcgan(dropout=0.4), ""),
    "silu": (lambda: dcgan(activation=nn.SiLU), "silu"),
    "oddities": (Oddities, ""),
}  # fmt: skip
LABELS = torch.arange(N) % 3


def warm(d):
    """Eval mode, with running statistics that are not 0 and 1."""
    d(3 * torch.randn(20, 2, 8, 8) + 1)
    return d.eval()


def build(name):
    torch.manual_seed(3)
    d = ZOO[name][0]().double()
    for p in d.parameters():  # away from zero, so that no gradient is small by accident
        p.data += 0.05 * torch.randn_like(p)
    return d, (LABELS,) if name == "projection" else ()


def inputs():
    torch.manual_seed(4)
    return torch.randn(2, N, 2, 8, 8, dtype=torch.float64)


def textbook_norms(d, x, args):
    x = x.detach().requires_grad_()
    logits = d(x, *args)
    (g,) = torch.autograd.grad(logits.sum(), x, create_graph=True)
    return logits, g.flatten(1).square().sum(1)


def textbook(d, real, fake, kind, weight, args):
    if kind in ("r1", "r2", "r1r2"):
        at = {"r1": [real], "r2": [fake], "r1r2": [real, fake]}[kind]
        return sum(weight / 2 * textbook_norms(d, x, args)[1].mean() for x in at)
    if kind == "wgan-gp":
        e = torch.rand(N, 1, 1, 1, dtype=real.dtype)
        x = e * real + (1 - e) * fake
    else:
        x = real + 0.5 * real.std() * torch.rand_like(real)
    return weight * ((textbook_norms(d, x, args)[1].sqrt() - 1) ** 2).mean()


def assert_same(ours, theirs, got, want, rtol=1e-9, keep=False):
    """Equal values, gradients of every parameter, and buffers."""
    torch.testing.assert_close(got, want, rtol=rtol, atol=1e-12)
    a, b = (
        torch.autograd.grad(v, list(d.parameters()), allow_unused=True, retain_graph=keep)
        for v, d in ((got, ours), (want, theirs))
    )
    scale = max(g.norm() for g in b if g is not None)
    for (name, p), x, y in zip(ours.named_parameters(), a, b, strict=True):
        x, y = (torch.zeros_like(p) if g is None else g for g in (x, y))
        assert (x - y).norm() <= rtol * y.norm() + 1e-3 * rtol * scale, (name, x.norm(), y.norm())
    for (name, x), y in zip(ours.named_buffers(), theirs.buffers(), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-12, msg=lambda m, name=name: f"{name}: {m}")


def assert_route(d, name):
    why = ZOO[name][1]
    said = linearised.verdict(d)
    assert said == "forward ops (4F)" if not why else said.startswith("double backward: ") and why in said, said


@pytest.mark.parametrize("convert", [False, True], ids=["plain", "converted"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ZOO)
def test_penalty_equals_textbook_double_backward(name, kind, convert):
    ours, args = build(name)
    theirs = copy.deepcopy(ours)
    ours = fastgan.convert(ours) if convert else ours
    real, fake = inputs()
    for step in range(2):  # the second call meets what the first left: buffers, a cached refusal
        torch.manual_seed(step)
        got = functional.gradient_penalty(ours, real, fake, kind=kind, weight=3.0, labels=args[0] if args else None)
        torch.manual_seed(step)
        want = textbook(theirs, real, fake, kind, 3.0, args)
        assert_same(ours, theirs, got, want)
        assert_route(ours, name)


@pytest.mark.parametrize("name", ZOO)
def test_loss_and_penalty_from_one_pass(name):
    ours, args = build(name)
    theirs = copy.deepcopy(ours)
    x, _ = inputs()
    torch.manual_seed(1)
    logits, norms = logits_and_norms(ours, x, *args)
    torch.manual_seed(1)
    want, their_norms = textbook_norms(theirs, x, args)
    torch.testing.assert_close(logits, want)
    torch.testing.assert_close(norms, their_norms)
    rows, results = torch.arange(1.0, N + 1), ((logits, norms), (want, their_norms))
    for loss, penalty in ((1, 1), (1, 0), (0, 1)):  # both cotangents, then one at a time
        terms = [[F.softplus(-v).mean()] * loss + [(q * rows).mean()] * penalty for v, q in results]
        assert_same(ours, theirs, *(sum(t) for t in terms), keep=True)
