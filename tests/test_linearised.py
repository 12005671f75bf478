"""Both routes of the gradient penalty against textbook double backward in plain PyTorch, float64, every parameter."""

import copy
import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm
from torch.utils._python_dispatch import TorchDispatchMode

import fastgan
from fastgan import functional, penalties
from fastgan.choice import watching
from fastgan.penalties import KINDS, gradient, linearised, logits_and_norms

EXACT = [kind for kind in KINDS if kind not in gradient.APPROXIMATE]
N = 5


def mlp():
    return nn.Sequential(
        nn.Flatten(), nn.Linear(2 * 64, 16), nn.LeakyReLU(0.2), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 1)
    )


def dcgan(norm=None, activation=None, dropout=0.0):
    act = activation or (lambda: nn.LeakyReLU(0.2, inplace=True))
    middle = [norm()] if norm else []
    return nn.Sequential(
        nn.Conv2d(2, 6, 4, 2, 1, bias=False),
        act(),
        nn.Dropout(dropout),
        nn.Conv2d(6, 8, 4, 2, 1, bias=not norm),
        *middle,
        act(),
        nn.Dropout2d(dropout),
        nn.Conv2d(8, 1, 2),
        nn.Flatten(0),
    )


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
    act = lambda: nn.LeakyReLU(0.2, inplace=True)
    return nn.Sequential(nn.Conv2d(2, 6, 4, 2, 1), act(), nn.Conv2d(6, 8, 3, 1, 1), act(), nn.Conv2d(8, 1, 3, 1, 1))


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
    """The rest of the table: other ranks, transposed convolutions, shapes, resampling, arithmetic, in-place ops."""

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
class Filtered(nn.Module):
    """StyleGAN2's residual block and R3GAN's downsampling: filters of any shape, a strided convolution behind one."""

    def __init__(self):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(4, 2, 3, 3) / 4), nn.Parameter(torch.randn(4))
        self.skip, self.head = nn.Conv2d(2, 4, 1, bias=False), nn.Linear(4 * 4 * 4, 1)
        self.register_buffer("taps", torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8)
        self.register_buffer("plane", torch.randn(3, 2))

    def forward(self, x):
        h = functional.upfirdn2d(x, self.plane, padding=(1, 0, 3, -1), flip_filter=True, gain=1.5)
        h = functional.upfirdn2d(h, self.taps, up=(2, 1), down=(2, 1), padding=(2, 1, 1, 2))
        h = functional.conv2d_resample(h, self.weight, self.taps, down=2, padding=1)
        h = functional.bias_act(h, self.bias, gain=2**0.5, clamp=1.5)
        h = functional.filtered_lrelu(h, self.taps, self.plane, self.bias, 2, 2, (2, 2, 2, 3), 1.3, 0.1, 0.9)
        skip = functional.upfirdn2d(self.skip(x), self.taps, down=2, padding=1)
        return self.head((h + skip).flatten(1)).squeeze(1)


ZOO = {
    "filtered": (Filtered, ""),
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
}
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
@pytest.mark.parametrize("kind", EXACT)
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


# ---- GANStep --------------------------------------------------------------------------------------------------------


def networks(kind):
    torch.manual_seed(5)
    g = nn.Sequential(nn.Linear(4, 2 * 64), nn.Tanh(), nn.Unflatten(1, (2, 8, 8)))
    d = {"scalar": dcgan, "map": patch, "double backward": lambda: dcgan(lambda: fastgan.nn.BatchNormAct2d(8))}[kind]()
    return g.double(), d.double()


def adam(module):
    return torch.optim.Adam(module.parameters(), 1e-3, betas=(0.5, 0.999))


@pytest.mark.parametrize("loss", ["bce", "relativistic"])
@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("penalty", ["r1", "r2", "r1r2", "wgan-gp"])
@pytest.mark.parametrize("kind", ["scalar", "map", "double backward"])
def test_ten_steps_equal_the_textbook_loop(kind, penalty, every, loss):
    g, d = networks(kind)
    g2, d2 = copy.deepcopy(g), copy.deepcopy(d)
    opts = [adam(m) for m in (g, d, g2, d2)]
    step = fastgan.GANStep(
        g,
        d,
        latent=4,
        g_optimizer=opts[0],
        d_optimizer=opts[1],
        loss=loss,
        penalty=penalty,
        penalty_weight=2.0,
        penalty_every=every,
    )
    sp = F.softplus
    d_side = {"bce": lambda r, f: sp(-r).mean() + sp(f).mean(), "relativistic": lambda r, f: sp(f - r).mean()}[loss]
    for i in range(10):
        real, z = torch.randn(N, 2, 8, 8).double(), torch.randn(N, 4).double()
        torch.manual_seed(i)
        metrics = step(real, z=z)
        torch.manual_seed(i)
        fake = g2(z)
        d_loss = d_side(d2(real), d2(fake.detach()))
        assert ("penalty" in metrics) == (i % every == 0)
        if i % every == 0:  # lazily: every k-th update, with k times the weight
            value = textbook(d2, real, fake.detach(), penalty, 2.0 * every, ())
            torch.testing.assert_close(metrics["penalty"], value.detach())
            d_loss = d_loss + value
        opts[3].zero_grad()
        d_loss.backward()
        opts[3].step()
        f = d2(fake)
        g_loss = sp(-f).mean() if loss == "bce" else sp(d2(real).detach() - f).mean()
        opts[2].zero_grad()
        g_loss.backward()
        opts[2].step()
    for ours, theirs in ((g, g2), (d, d2)):
        for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}")
    said = step.explain()
    assert ("penalty: forward ops (4F)" in said) == (kind != "double backward") or "own statistics" in said, said
    assert ("together with the loss" in said) == (kind != "double backward" and penalty != "wgan-gp"), said


def test_steps_with_spectral_norm_or_dropout_are_not_merged():
    for make in (lambda: Residual(spectral_norm), lambda: dcgan(dropout=0.3)):
        g, d = networks("scalar")[0], make().double()
        d2 = copy.deepcopy(d)
        step = fastgan.GANStep(g, d, latent=4, g_optimizer=adam(g), d_optimizer=adam(d), penalty="r1")
        real, z = torch.randn(N, 2, 8, 8).double(), torch.randn(N, 4).double()
        torch.manual_seed(0)
        metrics = step(real, z=z)
        torch.manual_seed(0)
        with torch.no_grad():
            fake = networks("scalar")[0](z)
        torch.manual_seed(0)
        want = F.softplus(-d2(real)).mean() + F.softplus(d2(fake)).mean()
        torch.testing.assert_close(metrics["d_loss"], want.detach())
        torch.testing.assert_close(metrics["penalty"], textbook(d2, real, fake, "r1", 10.0, ()).detach())
        assert "forward ops (4F)" in step.explain() and "together" not in step.explain()


class Conditional(Projection):
    per_sample = True  # so that GANStep may run both halves as one batch


class Labelled(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.net = nn.Embedding(3, 4), nn.Linear(4, 2 * 64)

    def forward(self, z, labels):
        return self.net(z + self.embed(labels)).view(-1, 2, 8, 8)


@pytest.mark.parametrize("penalty", ["r1", "r2", "r1r2"])
def test_merged_steps_pass_labels(penalty, monkeypatch):
    torch.manual_seed(2)
    nets = [(Labelled().double(), Conditional().double())]
    nets.append(copy.deepcopy(nets[0]))
    steps = [
        fastgan.GANStep(g, d, latent=4, g_optimizer=adam(g), d_optimizer=adam(d), penalty=penalty) for g, d in nets
    ]
    for _ in range(10):
        real, z = torch.randn(N, 2, 8, 8).double(), torch.randn(N, 4).double()
        merged = steps[0](real, labels=LABELS, z=z)
        with monkeypatch.context() as patch:
            patch.setattr(penalties, "forward_logits_and_norms", lambda *a, **k: None)
            patch.setattr(linearised, "logits_and_squared_norms", lambda *a, **k: None)
            apart = steps[1](real, labels=LABELS, z=z)
        torch.testing.assert_close(merged, apart)
    assert "together with the loss" in steps[0].explain()
    for a, b in zip(nets[0][1].parameters(), nets[1][1].parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


class NoReadBack(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func not in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default), func
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("penalty", ["r1", "r1r2", "wgan-gp"])
def test_the_penalised_step_reads_nothing_back(penalty, precision):
    g, d = (m.float() for m in networks("scalar"))
    step = fastgan.GANStep(
        g, d, latent=4, g_optimizer=adam(g), d_optimizer=adam(d), penalty=penalty, precision=precision
    )
    real = torch.randn(N, 2, 8, 8)
    step(real)
    before = [p.clone() for p in d.parameters()]
    for optimizer in (step.g_optimizer, step.d_optimizer):  # Adam itself reads its step counter
        optimizer.step = lambda *args, **kwargs: None
    with NoReadBack():
        metrics = step(real)
    assert metrics["penalty"].dtype == torch.float32 and "forward ops (4F)" in step.explain()
    assert all(torch.equal(p, q) for p, q in zip(d.parameters(), before, strict=True))


# ---- what it costs --------------------------------------------------------------------------------------------------


def calls(d, run):
    """Convolutions by op name, as they ran."""
    seen = []
    with fastgan.backend("reference"), watching(lambda op, name, why: seen.append(op.name)):
        run(d).backward()
    return {name: seen.count(name) for name in ("conv2d", "conv_transpose2d", "conv2d_weight")}


def test_loss_and_r1_take_four_convolutions_a_layer():
    d, _ = build("dcgan")  # three convolutions
    x, fake = inputs()

    def both(d):
        logits, norms = logits_and_norms(d, x)
        return F.softplus(-logits).mean() + norms.mean()

    # forward 3, tangent 2 (the last layer's tangent moves nothing that is learnt); adjoint 3; weight gradients 3
    assert calls(d, both) == {"conv2d": 5, "conv_transpose2d": 3, "conv2d_weight": 3}
    # the logits alone: nothing is carried forward
    assert calls(d, lambda d: logits_and_norms(d, x)[0].mean()) == {
        "conv2d": 3,
        "conv_transpose2d": 3,
        "conv2d_weight": 3,
    }
    penalty = lambda d: functional.gradient_penalty(d, x, fake, kind="wgan-gp", weight=1.0)
    assert calls(d, penalty) == {"conv2d": 5, "conv_transpose2d": 3, "conv2d_weight": 3}
    # nothing below the first weight that wants a gradient is carried either: the tangent stops at the last such layer
    d[3].requires_grad_(False), d[6].requires_grad_(False)
    assert calls(d, penalty) == {"conv2d": 3, "conv_transpose2d": 3, "conv2d_weight": 1}


def test_a_map_of_logits_adds_one_backward_pass_for_the_loss():
    d, _ = build("patch")  # three convolutions
    x, _ = inputs()

    def both(d):
        logits, norms = logits_and_norms(d, x)
        return F.softplus(-logits).mean() + norms.mean()

    # two more adjoints (not the first layer's, which nobody asks for) and three more weight gradients
    assert calls(d, both) == {"conv2d": 5, "conv_transpose2d": 5, "conv2d_weight": 6}


# ---- what declines, and leaves no trace -----------------------------------------------------------------------------


class Reverse(torch.autograd.Function):
    """Gradient reversal: linear in its forward, and not what its forward says in its backward."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, g):
        return -g


class With(nn.Module):
    """A discriminator with one line of a user's own in the middle."""

    def __init__(self, line):
        super().__init__()
        self.line = line
        self.first, self.second = nn.Linear(2 * 64, 6), nn.Linear(6, 1)

    def forward(self, x):
        return self.second(F.leaky_relu(self.line(self.first(x.flatten(1)), self), 0.2))


def no_grad(h, d):
    with torch.no_grad():
        mean = h.mean(1, keepdim=True)
    return h - mean


def stale_view(h, d):
    first = h[:, :3]
    h = h.mul_(2.0)
    return torch.cat([first, h[:, 3:]], 1)


def keep(h, d):
    d.features = h
    return h


LINES = {
    "gradient reversal": (lambda h, d: h + 0.5 * Reverse.apply(h), "autograd.Function"),
    "no_grad": (no_grad, "no_grad"),
    "detach": (lambda h, d: h + h.detach(), "detached"),
    "data": (lambda h, d: h * 2 + h.data, "detached"),
    "item": (lambda h, d: h * h.sum().item(), "local_scalar"),
    "numpy": (lambda h, d: h + torch.from_numpy(h.detach().numpy()).sum(), ""),
    "control flow": (lambda h, d: h * 2 if h.mean() > 0 else h * 3, "not known to be piecewise linear"),
    "own square": (lambda h, d: h * h, "not linear"),
    "view of a value changed in place": (stale_view, "changed in place"),
    "keeps its features": (keep, "keeps a reference"),
    "batch statistics": (lambda h, d: h - h.std(0), "std"),
    "max": (lambda h, d: F.max_pool1d(h.unsqueeze(1), 2).squeeze(1).repeat(1, 2), "max_pool"),
    "prelu": (lambda h, d: F.prelu(h, torch.tensor(0.1).double()), "prelu"),
    "leaky slope below 0": (lambda h, d: F.leaky_relu(h, -0.2), "negative slope"),
    "where": (lambda h, d: torch.where(h > 0, h, 0.5 * h), "not known"),
    "written into a buffer": (lambda h, d: torch.zeros(N, 6).double().copy_(h), "not known"),
    "sorted": (lambda h, d: h.sort(1)[0], "sort"),
    "tanh": (lambda h, d: torch.tanh(h), "tanh"),
}


@pytest.mark.parametrize("name", LINES)
def test_lines_that_decline_are_still_exact(name):
    line, why = LINES[name]
    ours = With(line).double()
    theirs = copy.deepcopy(ours)
    x, _ = inputs()
    for _ in range(2):
        got = functional.gradient_penalty(ours, x, kind="r1", weight=2.0)
        assert_same(ours, theirs, got, textbook(theirs, x, x, "r1", 2.0, ()))
        said = linearised.verdict(ours)
        assert said.startswith("double backward: ") and why in said, said
    assert name != "keeps its features" or (ours.features.shape == (N, 6) and type(ours.features) is torch.Tensor)


def test_a_value_that_changes_between_calls_is_seen():
    """Nothing of a run is kept for the next: a fading coefficient, another branch, a replaced layer."""
    ours = With(lambda h, d: h * d.alpha if d.alpha < 1 else torch.relu(h)).double()
    ours.alpha = 0.0
    theirs = copy.deepcopy(ours)
    x, _ = inputs()
    for alpha in (0.1, 0.7, 1.0, 0.3):
        ours.alpha = theirs.alpha = alpha
        got = functional.gradient_penalty(ours, x, kind="r1", weight=2.0)
        assert_same(ours, theirs, got, textbook(theirs, x, x, "r1", 2.0, ()))
        assert linearised.verdict(ours) == "forward ops (4F)"
    for d in (ours, theirs):
        d.eval()
    ours.second, theirs.second = (nn.Sequential(nn.SiLU(), d.second) for d in (ours, theirs))
    got = functional.gradient_penalty(ours, x, kind="r1", weight=2.0)
    assert_same(ours, theirs, got, textbook(theirs, x, x, "r1", 2.0, ()))


def test_a_refusal_leaves_buffers_and_random_state_as_they_were():
    """The refused run has drawn a mask, moved statistics and iterated a spectral norm before it meets SiLU."""
    ours = nn.Sequential(
        spectral_norm(nn.Conv2d(2, 4, 3)),
        nn.Dropout(0.5),
        nn.utils.spectral_norm(nn.Conv2d(4, 4, 3)),
        nn.Flatten(),
        nn.SiLU(),
        nn.Linear(4 * 16, 1),
    ).double()
    theirs = copy.deepcopy(ours)
    x, _ = inputs()
    torch.manual_seed(0)
    got = functional.gradient_penalty(ours, x, kind="r1", weight=2.0)
    torch.manual_seed(0)
    assert_same(ours, theirs, got, textbook(theirs, x, x, "r1", 2.0, ()))
    before = {n: b.clone() for n, b in ours.named_buffers()}
    d, _ = build("resnet-sn")
    state = torch.get_rng_state()
    assert linearised.route(ours, x) == "double backward: 4 (SiLU): silu is not known to be piecewise linear in x"
    before |= {n: b.clone() for n, b in d.named_buffers()}
    assert linearised.route(d, x) == "forward ops (4F)"
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(b, before[n]) for m in (ours, d) for n, b in m.named_buffers())


def test_hooks_and_torchscript_decline():
    x, _ = inputs()
    d = mlp().double()
    seen = []
    handle = d[2].register_forward_hook(lambda m, args, out: seen.append(out.detach().sum().item()))
    assert "2 (LeakyReLU) has hooks" in linearised.route(d, x) and not seen
    handle.remove()
    assert linearised.route(d, x) == "forward ops (4F)"
    handle = nn.modules.module.register_module_forward_hook(lambda *a: None)
    try:
        assert "global" in linearised.route(d, x)
    finally:
        handle.remove()


def test_x_that_wants_a_gradient_goes_by_double_backward():
    d, _ = build("dcgan")
    x, _ = inputs()
    x.requires_grad_()
    logits, norms = logits_and_norms(d, x)
    (got,) = torch.autograd.grad(logits.sum() + norms.sum(), x)
    assert got.norm() > 0 and "x itself" in linearised.verdict(d)


def test_what_it_cannot_do_raises():
    d, _ = build("dcgan")
    x, _ = inputs()
    weight = d[0].weight
    (first,) = torch.autograd.grad(logits_and_norms(d, x)[1].sum(), weight, create_graph=True)
    with pytest.raises(NotImplementedError, match="cannot be differentiated again"):
        (weight.sum() + first.sum()).backward()
    value = functional.gradient_penalty(d, x, kind="r1", weight=1.0)
    with torch.no_grad():
        weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()


def test_a_penalty_leaves_nothing_behind():
    """No reference cycle: the activations go with the penalty, not with the next garbage collection."""
    d, _ = build("dcgan")
    x, _ = inputs()
    gc.collect()
    gc.disable()
    try:
        kept = []
        original = linearised.Tape.__init__

        def watched(self, *args):
            original(self, *args)
            kept.append(weakref.ref(self))

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(linearised.Tape, "__init__", watched)
            functional.gradient_penalty(d, x, kind="r1", weight=1.0).backward()
            value = functional.gradient_penalty(d, x, kind="r1", weight=1.0)
            del value
        assert len(kept) == 2 and all(ref() is None for ref in kept)
    finally:
        gc.enable()


# ---- dtypes, layouts, compile, explain ------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("name", ["dcgan", "grouped", "patch", "projection", "resnet-sn"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_single_and_half_precision(name, dtype, layout):
    """Errors at most three times those of double backward in the same precision, against float64."""
    exact, args = build(name)
    x = inputs()[0]
    runs = []
    for route in ("forward", "double"):
        d = fastgan.convert(copy.deepcopy(exact).float().to(memory_format=layout))
        y = x.float().to(memory_format=layout)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"), pytest.MonkeyPatch.context() as patch:
            if route == "double":
                patch.setattr(linearised, "logits_and_squared_norms", lambda *a, **k: None)
            logits, norms = logits_and_norms(d, y, *args)
        assert norms.dtype == torch.float32
        (F.softplus(-logits.float()).mean() + norms.mean()).backward()
        assert all(p.grad.dtype == torch.float32 for p in d.parameters())
        runs.append([norms, *(p.grad for p in d.parameters())])
    logits, norms = logits_and_norms(exact, x, *args)
    (F.softplus(-logits).mean() + norms.mean()).backward()
    want = [norms, *(p.grad for p in exact.parameters())]
    scale = max(w.norm() for w in want)
    eps = torch.finfo(getattr(torch, dtype)).eps
    for ours, theirs, w in zip(*runs, want, strict=True):
        error, other = ((r.double() - w).norm() for r in (ours, theirs))
        assert error <= 3 * other + 2 * eps * w.norm() + eps / 10 * scale


@pytest.mark.parametrize("name", ["dcgan", "projection", "resnet-sn", "dcgan-bn", "silu"])
def test_compiled_whole(name, monkeypatch):
    ours, args = build(name)
    theirs = copy.deepcopy(ours)
    fastgan.convert(ours)
    x, _ = inputs()
    labels = args[0] if args else None
    if not ZOO[name][1]:
        monkeypatch.setattr(gradient, "_double_backward", None)  # so that the fast route it is
    penalty = lambda d, x: functional.gradient_penalty(d, x, kind="r1", weight=3.0, labels=labels)
    torch._dynamo.reset()
    compiled = torch.compile(penalty, fullgraph=True, backend="aot_eager")
    for training in (True, True, False):
        ours.train(training), theirs.train(training)
        assert_same(ours, theirs, compiled(ours, x), textbook(theirs, x, x, "r1", 3.0, args))


@pytest.mark.parametrize("name", ["dcgan", "silu"])
def test_a_compiled_discriminator_is_penalised_as_the_module_that_it_is(name):
    """torch refuses double backward of a compiled module: its Python is run instead."""
    ours, _ = build(name)
    theirs = copy.deepcopy(ours)
    x, _ = inputs()
    compiled = torch.compile(ours, backend="aot_eager")
    compiled(x)
    got = functional.gradient_penalty(compiled, x, kind="r1", weight=3.0)
    assert_same(ours, theirs, got, textbook(theirs, x, x, "r1", 3.0, ()))


def test_explain_says_by_which_route():
    d, _ = build("dcgan")
    x, _ = inputs()
    assert str(fastgan.explain(d, x)).endswith("\npenalty: forward ops (4F)")
    d[1] = nn.SiLU()
    assert fastgan.explain(d, x).penalty == "double backward: 1 (SiLU): silu is not known to be piecewise linear in x"
    assert "penalty" not in str(fastgan.explain(d)) and not fastgan.explain(nn.Linear(2, 4), torch.randn(3, 2)).penalty
    d, args = build("projection")
    assert fastgan.explain(d, (x, *args)).penalty == "forward ops (4F)"


class ViewsSignals(nn.Module):
    """A critic of signals that views maps as rows, as PyTorch's own layout allows, and adds a skip."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv1d(2, 4, 5, padding=2), nn.Conv1d(4, 4, 3, padding=1, groups=2)
        self.up, self.head = nn.ConvTranspose1d(4, 3, 4, 2, 1), nn.Linear(3 * 18, 1)

    def forward(self, x):
        x = F.leaky_relu(self.first(x), 0.2)
        x = torch.relu(self.up(x + 0.3 * self.second(torch.relu(x))))
        return self.head(x.view(len(x), -1))


@pytest.mark.parametrize("converted", [False, True])
def test_signals_keep_their_channels_innermost_and_may_be_viewed(converted):
    torch.manual_seed(0)
    plain = ViewsSignals().double()
    critic = copy.deepcopy(plain)
    if converted:
        critic = nn.Sequential(fastgan.convert(nn.Sequential(critic.first, nn.LeakyReLU(0.2))), Rest(critic))
    x = torch.randn(3, 2, 9, dtype=torch.float64)
    logits, squared = linearised.logits_and_squared_norms(critic, x)
    assert linearised.verdict(critic) == "forward ops (4F)"
    (logits.sum() + squared.sum()).backward()
    leaf = x.clone().requires_grad_()
    want = plain(leaf)
    (gradient,) = torch.autograd.grad(want.sum(), leaf, create_graph=True)
    norms = gradient.flatten(1).square().sum(1)
    (want.sum() + norms.sum()).backward()
    torch.testing.assert_close(logits, want)
    torch.testing.assert_close(squared, norms)
    given = dict(critic[1].critic.named_parameters() if converted else critic.named_parameters())
    for name, p in plain.named_parameters():
        torch.testing.assert_close(given[name].grad, p.grad)


class Rest(nn.Module):
    """What `ViewsSignals` does behind its first layer."""

    def __init__(self, critic):
        super().__init__()
        self.critic = critic

    def forward(self, x):
        c = self.critic
        return c.head(torch.relu(c.up(x + 0.3 * c.second(torch.relu(x)))).view(len(x), -1))
