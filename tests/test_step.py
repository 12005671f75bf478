import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import fastgan
from fastgan.choice import watching
from fastgan.training.step import mixes_samples

SP = F.softplus
LOSSES = {
    "bce": (lambda r, f: SP(-r).mean() + SP(f).mean(), lambda r, f: SP(-f).mean()),
    "minimax": (lambda r, f: SP(-r).mean() + SP(f).mean(), lambda r, f: -SP(f).mean()),
    "lsgan": (
        lambda r, f: 0.5 * (r - 1).square().mean() + 0.5 * f.square().mean(),
        lambda r, f: 0.5 * (f - 1).square().mean(),
    ),
    "hinge": (lambda r, f: F.relu(1 - r).mean() + F.relu(1 + f).mean(), lambda r, f: -f.mean()),
    "wasserstein": (lambda r, f: f.mean() - r.mean(), lambda r, f: -f.mean()),
    "relativistic": (lambda r, f: SP(f - r).mean(), lambda r, f: SP(r - f).mean()),
}


def networks(dropout=0.0):
    g = nn.Sequential(
        nn.ConvTranspose2d(5, 8, 4),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.ConvTranspose2d(8, 6, 4, 2, 1),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.ConvTranspose2d(6, 2, 4, 2, 1),
        nn.Tanh(),
    )
    d = nn.Sequential(
        nn.Conv2d(2, 6, 4, 2, 1),
        nn.LeakyReLU(0.2),
        nn.Dropout(dropout),
        nn.Conv2d(6, 8, 4, 2, 1),
        nn.BatchNorm2d(8),
        nn.LeakyReLU(0.2),
        nn.Conv2d(8, 1, 4),
        nn.Flatten(0),
    )
    return g.double(), d.double()


def adam(module):
    return torch.optim.Adam(module.parameters(), 1e-3, betas=(0.5, 0.999), fused=True)


def textbook(g, d, g_opt, d_opt, real, z, loss):
    """The seven steps of the tutorials."""
    d_loss, g_loss = LOSSES[loss]
    fake = g(z)
    loss_d = d_loss(d(real), d(fake.detach()))
    d_opt.zero_grad()
    loss_d.backward()
    d_opt.step()
    real_logits = d(real) if loss == "relativistic" else None
    loss_g = g_loss(real_logits, d(fake))
    g_opt.zero_grad()
    loss_g.backward()
    g_opt.step()
    return loss_d, loss_g


def parity(steps, loss, dropout=0.0, convert=True):
    g, d = networks(dropout)
    g2, d2 = copy.deepcopy(g), copy.deepcopy(d)
    if convert:
        fastgan.convert(g), fastgan.convert(d)
    step = fastgan.GANStep(g, d, latent=(5, 1, 1), g_optimizer=adam(g), d_optimizer=adam(d), loss=loss)
    g_opt, d_opt = adam(g2), adam(d2)
    for i in range(steps):
        real, z = torch.randn(8, 2, 16, 16).double().tanh(), torch.randn(8, 5, 1, 1).double()
        torch.manual_seed(i)
        metrics = step(real, z=z)
        torch.manual_seed(i)
        want_d, want_g = textbook(g2, d2, g_opt, d_opt, real, z, loss)
        torch.testing.assert_close(metrics["d_loss"], want_d.detach(), rtol=1e-8, atol=1e-10)
        torch.testing.assert_close(metrics["g_loss"], want_g.detach(), rtol=1e-8, atol=1e-10)
    for ours, theirs in ((g, g2), (d, d2)):
        for (name, a), b in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9, msg=lambda m, name=name: f"{name}: {m}")
    return step


def test_fifty_steps_equal_the_textbook_loop():
    step = parity(50, "bce")
    assert mixes_samples(step.discriminator) == ""  # so the merged batch with grouped statistics is what was compared


@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_equals_the_textbook_loop(loss):
    parity(4, loss)


def test_two_passes_where_the_discriminator_mixes_samples():
    step = parity(4, "bce", convert=False)  # stock BatchNorm
    assert "BatchNorm2d" in mixes_samples(step.discriminator) and "two passes" in step.explain()
    step = parity(4, "bce", dropout=0.3)
    assert "Dropout" in mixes_samples(step.discriminator)


def test_what_counts_as_mixing_samples():
    class Own(nn.Module):
        def forward(self, x):
            return x - x.mean(0)

    class Declared(Own):
        per_sample = True

    conv = nn.Conv2d(2, 2, 3)
    assert mixes_samples(nn.Sequential(conv, nn.LeakyReLU())) == ""
    assert "forward of its own" in mixes_samples(nn.Sequential(conv, Own()))
    assert mixes_samples(Declared()) == ""
    assert "parametrized" in mixes_samples(nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Conv2d(2, 2, 3))))
    assert mixes_samples(nn.Sequential(nn.BatchNorm2d(2)).eval()) == ""
    assert mixes_samples(nn.Sequential(fastgan.nn.BatchNormAct2d(2))) == ""
    conv.register_forward_hook(lambda *a: None)
    assert "hooks" in mixes_samples(nn.Sequential(conv))


class NoReadBack(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
            raise AssertionError(f"{func} reads a value back to the host")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_step_reads_nothing_back(precision):
    g, d = (fastgan.convert(m.float()) for m in networks())
    step = fastgan.GANStep(
        g,
        d,
        latent=(5, 1, 1),
        g_optimizer=adam(g),
        d_optimizer=adam(d),
        ema=0.9,
        penalty="r1",
        precision=precision,
    )
    real = torch.randn(8, 2, 16, 16)
    step(real)
    with NoReadBack():
        metrics = step(real)
        with pytest.raises(AssertionError, match="reads a value back"):
            metrics["d_loss"].item()
    assert all(v.dim() == 0 and not v.requires_grad for v in metrics.values())


def test_no_discriminator_weight_gradients_in_the_generator_step():
    g, d = (fastgan.convert(m) for m in networks())
    step = fastgan.GANStep(g, d, latent=(5, 1, 1), g_optimizer=adam(g), d_optimizer=adam(d))
    calls = []
    with fastgan.backend("reference"), watching(lambda op, name, why: calls.append(op.name)):
        step(torch.randn(4, 2, 16, 16).double())
    # D's update: 3 weight gradients on the merged batch (2 N); G's update: 3 for G and none for D
    assert calls.count("conv2d_weight") == 6
    assert all(p.requires_grad for p in d.parameters())


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_reduced_precision_stays_close(precision):
    torch.manual_seed(3)
    g, d = (fastgan.convert(m.float()) for m in networks())
    g2, d2 = copy.deepcopy(g), copy.deepcopy(d)
    real, z = torch.randn(8, 2, 16, 16), torch.randn(8, 5, 1, 1)
    full = fastgan.GANStep(g, d, latent=(5, 1, 1), g_optimizer=adam(g), d_optimizer=adam(d))
    half = fastgan.GANStep(g2, d2, latent=(5, 1, 1), g_optimizer=adam(g2), d_optimizer=adam(d2), precision=precision)
    for _ in range(3):
        a, b = full(real, z=z), half(real, z=z)
    assert b["d_loss"].dtype == torch.float32 and all(p.dtype == torch.float32 for p in g2.parameters())
    torch.testing.assert_close(a["d_loss"], b["d_loss"], rtol=2e-2, atol=2e-2)


def test_d_steps_labels_latents_ema_and_state():
    class G(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.net = nn.Embedding(3, 4), nn.Linear(4, 6)

        def forward(self, z, labels):
            return self.net(z + self.embed(labels))

    class D(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.net = nn.Embedding(3, 6), nn.Linear(6, 1)

        def forward(self, x, labels):
            return self.net(x + self.embed(labels))

    def build():
        torch.manual_seed(0)
        g, d = G(), D()
        return fastgan.GANStep(
            g,
            d,
            latent=lambda n, device, rng: torch.rand(n, 4, device=device, generator=rng),
            g_optimizer=adam(g),
            d_optimizer=adam(d),
            d_steps=2,
            ema=0.5,
            penalty="r1",
            penalty_every=3,
            rng=torch.Generator().manual_seed(1),
        )

    step = build()
    real, labels = [torch.randn(5, 6), torch.randn(5, 6)], [torch.arange(5) % 3] * 2
    first = step(real, labels)
    second = step(real, labels)
    assert "penalty" in first and "penalty" in second and step.d_updates == 4  # updates 0 and 3 carry it
    before = step.ema.net.weight.clone()
    step(real, labels)
    expected = before.lerp(step.generator.net.weight, 0.5)
    torch.testing.assert_close(step.ema.net.weight, expected)
    other = build()
    other.load_state_dict(step.state_dict())
    assert other.d_updates == 6
    torch.testing.assert_close(other.ema.net.weight, step.ema.net.weight)
    with pytest.raises(ValueError, match="d_steps=2 batches, got 3"):
        step([torch.randn(5, 6)] * 3, labels)


def test_bad_arguments():
    g, d = networks()
    make = lambda **k: fastgan.GANStep(g, d, latent=5, g_optimizer=adam(g), d_optimizer=adam(d), **k)
    for kwargs, words in [
        (dict(loss="gan"), "loss must be one of"),
        (dict(penalty="gp"), "penalty must be one of"),
        (dict(penalty_sigma=0.0), "penalty_sigma must be finite and above 0, got 0.0"),
        (dict(precision="int8"), "precision must be one of"),
        (dict(capture="always"), "capture must be one of"),
        (dict(d_steps=0), "d_steps must be >= 1, got 0"),
    ]:
        with pytest.raises(ValueError, match=words):
            make(**kwargs)
