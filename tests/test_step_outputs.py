"""GANStep with discriminators of several outputs, extra losses, clipping and parts: the textbook loop's numbers."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastgan
import fastgan._logits

STEPS, N = 20, 8


class Scales(nn.Module):
    """Logits of two scales, and the features before them."""

    per_sample = True

    def __init__(self, output="features"):
        super().__init__()
        self.output = output
        self.fine, self.coarse = nn.Conv2d(1, 4, 3, 2, 1), nn.Conv2d(1, 4, 3, 2, 1)
        self.heads = nn.ModuleList(nn.Conv2d(4, 1, 1) for _ in range(2))

    def forward(self, x):
        features = [F.leaky_relu(self.fine(x), 0.2), F.leaky_relu(self.coarse(F.avg_pool2d(x, 2)), 0.2)]
        logits = [head(f) for head, f in zip(self.heads, features, strict=True)]
        return {"features": (logits, features), "list": logits, "one": logits[0], "dict": {"logits": logits[0]}}[
            self.output
        ]


def networks(output):
    torch.manual_seed(0)
    generator = nn.Sequential(nn.Linear(5, 64), nn.Tanh(), nn.Unflatten(1, (1, 8, 8)))
    return generator.double(), Scales(output).double()


def logits_of(out):
    logits = out[0] if isinstance(out, tuple) else out["logits"] if isinstance(out, dict) else out
    return logits if isinstance(logits, list) else [logits]


def matching(d_real, d_fake):
    return sum(F.l1_loss(f, r.detach()) for f, r in zip(d_fake[1], d_real[1], strict=True))


def textbook(generator, d, batches, *, clip=None, weight_clip=None, matched=False):
    """The loop as a tutorial writes it; returns nothing: it trains the networks."""
    g_optimizer, d_optimizer = (torch.optim.SGD(m.parameters(), 0.05) for m in (generator, d))

    def update(loss, optimizer, module):
        optimizer.zero_grad()
        loss.backward()
        if clip and clip[0] == "norm":
            torch.nn.utils.clip_grad_norm_(module.parameters(), clip[1])
        elif clip:
            torch.nn.utils.clip_grad_value_(module.parameters(), clip[1])
        optimizer.step()

    for real, z in batches:
        fake = generator(z)
        pairs = zip(logits_of(d(real)), logits_of(d(fake.detach())), strict=True)
        update(sum(F.softplus(-r).mean() + F.softplus(f).mean() for r, f in pairs), d_optimizer, d)
        if weight_clip:
            for p in d.parameters():
                p.data.clamp_(-weight_clip, weight_clip)
        out = d(fake)
        loss = sum(F.softplus(-f).mean() for f in logits_of(out))
        if matched:
            loss = loss + 0.3 * matching(d(real), out)
        update(loss, g_optimizer, generator)


def trained(generator, d, batches, **options):
    step = fastgan.GANStep(
        generator, d, latent=5, loss="bce", capture="off",
        g_optimizer=torch.optim.SGD(generator.parameters(), 0.05), d_optimizer=torch.optim.SGD(d.parameters(), 0.05),
        **options,
    )  # fmt: skip  # a call as users write it
    for real, z in batches:
        metrics = step(real, z=z)
    return metrics


def batches():
    rng = torch.Generator().manual_seed(1)
    draw = lambda *shape: torch.randn(*shape, generator=rng, dtype=torch.float64)
    return [(draw(N, 1, 8, 8), draw(N, 5)) for _ in range(STEPS)]


def assert_equal(a, b):
    for name, p in a.state_dict().items():
        torch.testing.assert_close(p, b.state_dict()[name], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(
    ("output", "ours", "theirs"),
    [
        ("one", {}, {}),
        ("list", {}, {}),
        ("dict", {}, {}),
        ("features", {}, {}),
        ("list", {"grad_clip": 0.1}, {"clip": ("norm", 0.1)}),
        ("list", {"grad_clip": ("value", 0.01)}, {"clip": ("value", 0.01)}),
        ("one", {"weight_clip": 0.05}, {"weight_clip": 0.05}),
        ("one", {"accumulate": 4}, {}),
        ("list", {"accumulate": 2, "grad_clip": 0.1}, {"clip": ("norm", 0.1)}),
    ],
)
def test_twenty_steps_are_the_textbooks(output, ours, theirs):
    generator, d = networks(output)
    mine = copy.deepcopy(generator), copy.deepcopy(d)
    textbook(generator, d, batches(), **theirs)
    trained(*mine, batches(), **ours)
    assert_equal(mine[0], generator)
    assert_equal(mine[1], d)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_feature_matching_is_the_textbooks(accumulate):
    generator, d = networks("features")
    mine = copy.deepcopy(generator), copy.deepcopy(d)
    textbook(generator, d, batches(), matched=True)
    seen = []

    def extra(outputs):
        seen.append(outputs)
        return 0.3 * matching(outputs.d_real, outputs.d_fake)

    metrics = trained(*mine, batches(), extra_g_loss=extra, accumulate=accumulate)
    assert_equal(mine[0], generator)
    assert_equal(mine[1], d)
    assert len(seen) == STEPS * accumulate and seen[0].real.shape == (N // accumulate, 1, 8, 8)
    assert metrics["extra_g_loss"] > 0 and not seen[0].d_real[1][0].requires_grad and seen[0].z.shape[1] == 5


def test_an_extra_loss_of_the_discriminator_trains_it():
    """A drift term, as progressive GANs have it: 0.01 mean D(real)^2."""
    generator, d = networks("one")
    plain = copy.deepcopy(generator), copy.deepcopy(d)
    metrics = trained(generator, d, batches(), extra_d_loss=lambda o: 0.01 * o.d_real.square().mean())
    trained(*plain, batches())
    assert metrics["extra_d_loss"] > 0
    assert not torch.equal(d.heads[0].weight, plain[1].heads[0].weight)


def test_penalties_beside_extra_losses_and_parts():
    generator, d = networks("one")
    whole = copy.deepcopy(generator), copy.deepcopy(d)
    options = dict(penalty="r1", penalty_weight=1.0, extra_d_loss=lambda o: 0.01 * o.d_real.square().mean())
    trained(generator, d, batches(), **options)
    metrics = trained(*whole, batches(), **options, accumulate=2)
    assert metrics["penalty"] > 0
    assert_equal(whole[1], d)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"grad_clip": 0.0}, "grad_clip must be"),
        ({"grad_clip": ("l1", 1.0)}, "grad_clip must be"),
        ({"weight_clip": -1.0}, "weight_clip must be positive"),
        ({"accumulate": 0}, "accumulate must be >= 1"),
        ({"accumulate": 2, "penalty": "dragan"}, "accumulate must be 1 with dragan"),
    ],
)
def test_wrong_values_get_one_sentence(options, sentence):
    generator, d = networks("one")
    with pytest.raises(ValueError, match=sentence):
        trained(generator, d, [], **options)


def test_an_optimiser_that_needs_a_closure_is_refused():
    generator, d = networks("one")
    lbfgs, sgd = torch.optim.LBFGS(d.parameters()), torch.optim.SGD(generator.parameters(), 0.1)
    with pytest.raises(ValueError, match="must step without a closure, got LBFGS"):
        fastgan.GANStep(generator, d, latent=5, g_optimizer=sgd, d_optimizer=lbfgs)


def test_a_batch_that_parts_do_not_divide():
    generator, d = networks("one")
    with pytest.raises(ValueError, match="accumulate must divide the batch, got 3 and 8"):
        trained(generator, d, batches(), accumulate=3)


def test_a_final_sigmoid_of_a_converted_chain_is_folded():
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 4, 4, 2, 1), nn.LeakyReLU(0.2), nn.Conv2d(4, 1, 4), nn.Sigmoid()]
    d = fastgan.convert(nn.Sequential(*layers))
    generator = nn.Sequential(nn.Linear(5, 64), nn.Unflatten(1, (1, 8, 8)))
    step = fastgan.GANStep(
        generator, d, latent=5, g_optimizer=torch.optim.SGD(generator.parameters(), 0.1),
        d_optimizer=torch.optim.SGD(d.parameters(), 0.1),
    )  # fmt: skip  # a call as users write it
    with pytest.warns(UserWarning, match="final sigmoid"):
        step(torch.randn(4, 1, 8, 8))
    assert d(torch.randn(4, 1, 8, 8)).min() < 0


def test_flat_logits_beside_lists_of_features_are_the_logits():
    """HiFi-GAN's discriminators: [N, L] logits a scale, and a list of maps a scale."""
    logits = [torch.zeros(2, 7), torch.zeros(2, 5)]
    features = [[torch.zeros(2, 4, 7), torch.zeros(2, 1, 7)], [torch.zeros(2, 4, 5)]]
    assert fastgan._logits.logits_of((logits, features)) == logits
    assert fastgan._logits.logits_of(features) == [features[0][1], features[1][0]]  # pix2pixHD's: the last of each
