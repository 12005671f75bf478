"""A whole training step on emulated Triton kernels equals the same step on the references."""

import copy
from itertools import product

import pytest
import torch
from torch import nn

pytest.importorskip("triton", "3.8", reason="triton 3.8 or newer is needed to emulate Triton kernels")
from checks import distance

import fastgan
from fastgan import testing
from fastgan.choice import watching


def networks(norm):
    g = nn.Sequential(
        nn.ConvTranspose2d(5, 6, 4), nn.BatchNorm2d(6), nn.ReLU(), nn.ConvTranspose2d(6, 2, 4, 2, 1), nn.Tanh()
    )
    d = nn.Sequential(nn.Conv2d(2, 4, 4, 2, 1), norm(4), nn.LeakyReLU(0.2), nn.Conv2d(4, 1, 4), nn.Flatten(0))
    return g, d


NORMS = {"batch": nn.BatchNorm2d, "batch, fused": nn.BatchNorm2d, "group": lambda c: nn.GroupNorm(2, c)}


# Each norm and each penalty once; the other pairs are slow.
ONCE = [("batch", None), ("batch, fused", "r1"), ("group", "wgan-gp")]
PAIRS = [
    pair if pair in ONCE else pytest.param(*pair, marks=pytest.mark.slow)
    for pair in product(NORMS, [None, "r1", "wgan-gp"])
]


@pytest.mark.parametrize(("kind", "penalty"), PAIRS)
def test_a_step_equals_the_references(kind, penalty, monkeypatch):
    """Fused: the convolutions give their norms the statistics, as on a GPU those of large layers do."""
    norm = NORMS[kind]
    if kind == "batch, fused":
        monkeypatch.setattr(fastgan.ops.conv2d, "LEAST_PIXELS", 0)
    models = networks(norm)
    real, z = torch.randn(6, 2, 8, 8).tanh(), torch.randn(6, 5, 1, 1)
    ran = set()

    def run():
        torch.manual_seed(1)
        g, d = (fastgan.convert(copy.deepcopy(m), prove=False) for m in models)
        step = fastgan.GANStep(
            g,
            d,
            latent=(5, 1, 1),
            loss="wasserstein" if penalty == "wgan-gp" else "bce",
            penalty=penalty,
            g_optimizer=torch.optim.SGD(g.parameters(), 0.1),
            d_optimizer=torch.optim.SGD(d.parameters(), 0.1),
        )
        step(real, z=z)
        return [*g.state_dict().values(), *d.state_dict().values()]

    with fastgan.backend("reference"):
        want = run()
    with testing.emulate("triton"), watching(lambda op, name, why: ran.add((op.name, name))):
        got = run()
    for a, b in zip(got, want, strict=True):
        assert distance(a, b) < 1e-4
    wanted = {"bn_act", "bn_act_backward", "gan_loss", "gan_loss_backward", "bias_act_backward"}
    wanted |= {"gn_act", "gn_act_backward"} if norm is not nn.BatchNorm2d else set()
    wanted |= {"grad_norm_penalty"} if penalty else set()
    wanted |= {"conv2d_statistics", "conv_transpose2d_statistics"} if kind == "batch, fused" else set()
    assert wanted <= {op for op, name in ran if name == "triton"}, wanted - {op for op, name in ran if name == "triton"}
