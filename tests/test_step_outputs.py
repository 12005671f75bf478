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


def test_a_lazy_extra_loss_is_added_at_every_kth_step_k_times():
    generator, d = networks("features")
    mine = copy.deepcopy(generator), copy.deepcopy(d)
    seen = []
    extra = lambda o: 0.3 * matching(o.d_real, o.d_fake)

    def counted(outputs):
        seen.append(outputs)
        return extra(outputs)

    now = iter(range(STEPS))
    trained(generator, d, batches(), extra_g_loss=lambda o: 3 * extra(o) if next(now) % 3 == 0 else 0 * o.fake.sum())
    trained(*mine, batches(), extra_g_loss=counted, extra_g_every=3)
    assert_equal(mine[0], generator)
    assert len(seen) == -(-STEPS // 3)


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


# ---- several inputs, several discriminators, schedules, regularisers: the textbook over twenty steps -----------------


def softplus_step(generator, discriminators, optimizers, real, fake, extra_d=lambda: 0.0, extra_g=lambda: 0.0):
    """One update as a tutorial writes it; the extra terms are computed where they are added."""
    d_optimizer, g_optimizer = optimizers
    d_optimizer.zero_grad()
    losses = [F.softplus(-d(real)).mean() + F.softplus(d(fake.detach())).mean() for d in discriminators]
    (sum(losses) + extra_d()).backward()
    d_optimizer.step()
    g_optimizer.zero_grad()
    (sum(F.softplus(-d(fake)).mean() for d in discriminators) + extra_g()).backward()
    g_optimizer.step()


def sgd(*modules, rate=0.05):
    return torch.optim.SGD([p for m in modules for p in m.parameters()], rate)


class Two(nn.Module):
    """A generator of two latents."""

    def __init__(self):
        super().__init__()
        self.content, self.noise = nn.Linear(5, 64), nn.Linear(3, 64)

    def forward(self, z, noise):
        return torch.tanh(self.content(z) + self.noise(noise)).view(-1, 1, 8, 8)


@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_generator_of_several_latents(given, accumulate):
    torch.manual_seed(0)
    g, d = Two().double(), networks("one")[1]
    mine = copy.deepcopy(g), copy.deepcopy(d)
    data = [(real, (z, z[:, :3] * 2)) for real, z in batches()]
    optimizers = sgd(d), sgd(g)
    for real, z in data:
        softplus_step(g, [d], optimizers, real, g(*z))
    latents = iter([z for _, z in data])
    step = fastgan.GANStep(
        *mine, latent=lambda n, device, rng: next(latents), g_optimizer=sgd(mine[0]), d_optimizer=sgd(mine[1]),
        accumulate=accumulate,
    )  # fmt: skip  # a call as users write it
    for real, z in data:
        step(real, z=z if given else None)
    assert_equal(mine[0], g)
    assert_equal(mine[1], d)


@pytest.mark.parametrize("form", [list, nn.ModuleList])
def test_several_discriminators_with_a_penalty_each(form):
    g, first = networks("one")
    second = copy.deepcopy(first)
    nn.init.normal_(second.heads[0].weight)
    mine = copy.deepcopy((g, first, second))

    def r1(real):
        total = 0.0
        for d in (first, second):
            x = real.clone().requires_grad_()
            (gradient,) = torch.autograd.grad(d(x).sum(), x, create_graph=True)
            total = total + 0.5 * gradient.square().sum(dim=(1, 2, 3)).mean()
        return total

    optimizers = sgd(first, second), sgd(g)
    for real, z in batches():
        softplus_step(g, [first, second], optimizers, real, g(z), lambda real=real: r1(real))
    step = fastgan.GANStep(
        mine[0], form(mine[1:]), latent=5, penalty="r1", penalty_weight=1.0,
        g_optimizer=sgd(mine[0]), d_optimizer=sgd(*mine[1:]),
    )  # fmt: skip  # a call as users write it
    for real, z in batches():
        metrics = step(real, z=z)
    for a, b in zip(mine, (g, first, second), strict=True):
        assert_equal(a, b)
    assert metrics["penalty"] > 0 and "penalty: " in step.explain()


@pytest.mark.parametrize(
    "schedule",
    [
        lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 10),
        lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.1, total_steps=STEPS + 1),
        lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(o, patience=2),
        lambda o: torch.optim.swa_utils.SWALR(o, 0.003, anneal_epochs=5),
    ],
)
def test_a_schedule_of_torch_steps_as_it_does_in_a_loop(schedule):
    g, d = networks("one")
    mine = copy.deepcopy((g, d))
    adam = lambda m: torch.optim.Adam(m.parameters(), 1e-2, betas=(0.5, 0.9))

    def advance(schedulers, i):
        for s in schedulers:
            s.step(1.0 + i) if isinstance(s, torch.optim.lr_scheduler.ReduceLROnPlateau) else s.step()

    optimizers = adam(d), adam(g)
    schedulers = [schedule(o) for o in optimizers]
    for i, (real, z) in enumerate(batches()):
        softplus_step(g, [d], optimizers, real, g(z))
        advance(schedulers, i)
    rate = optimizers[0].param_groups[0]["lr"]
    step = fastgan.GANStep(*mine, latent=5, g_optimizer=adam(mine[0]), d_optimizer=adam(mine[1]))
    schedulers = [schedule(o) for o in (step.d_optimizer, step.g_optimizer)]
    for i, (real, z) in enumerate(batches()):
        step(real, z=z)
        advance(schedulers, i)
    assert step.d_optimizer.param_groups[0]["lr"] == rate != 1e-2
    assert_equal(mine[0], g)
    assert_equal(mine[1], d)


def consistency(d, real, on_real):
    """bCR (Zhao et al. 2020) on a flip: D says the same of a picture and of its mirror image."""
    return 10 * (d(real.flip(-1)) - on_real).square().mean()


def path_length(generator, z, mean):
    """StyleGAN2's: |J^T y| stays near a constant, y noise of the image's shape; here y is fixed."""
    z = z.detach().requires_grad_()
    images = generator(z)
    noise = torch.linspace(-1, 1, images.numel(), dtype=images.dtype).view_as(images) / 8
    (gradient,) = torch.autograd.grad((images * noise).sum(), z, create_graph=True)
    return 2 * (gradient.square().sum(1).sqrt() - mean).square().mean()


@pytest.mark.parametrize("converted", [False, True])
def test_path_length_and_consistency_are_plain_callables(converted):
    g, d = networks("one")
    mine = copy.deepcopy((g, d))
    if converted:
        mine = fastgan.convert(mine[0]), fastgan.convert(mine[1])
    optimizers = sgd(d), sgd(g)
    for real, z in batches():
        extra_d = lambda real=real: consistency(d, real, d(real))
        softplus_step(g, [d], optimizers, real, g(z), extra_d, lambda z=z: path_length(g, z, 0.3))
    trained(
        *mine, batches(), extra_d_loss=lambda o: consistency(mine[1], o.real, o.d_real),
        extra_g_loss=lambda o: path_length(mine[0], o.z, 0.3),
    )  # fmt: skip  # a call as users write it
    assert_equal(mine[0], g)
    assert_equal(mine[1], d)


def test_an_extra_loss_beside_a_penalty_stays_on_the_merged_route(monkeypatch):
    """R1 and the loss come from the same passes, with a drift term on their logits, as without one."""
    torch.manual_seed(0)
    g = nn.Sequential(nn.Linear(5, 64), nn.Tanh(), nn.Unflatten(1, (1, 8, 8))).double()
    d = nn.Sequential(nn.Conv2d(1, 4, 3, 2, 1), nn.LeakyReLU(0.2), nn.Flatten(), nn.Linear(64, 1)).double()
    mine = copy.deepcopy((g, d))
    fastgan.convert(mine[1])

    def extra(real):
        x = real.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(d(x).sum(), x, create_graph=True)
        return 0.5 * gradient.square().sum(dim=(1, 2, 3)).mean() + 0.01 * d(real).square().mean()

    optimizers = sgd(d), sgd(g)
    for real, z in batches():
        softplus_step(g, [d], optimizers, real, g(z), lambda real=real: extra(real))
    monkeypatch.setattr(fastgan.GANStep, "_penalise", lambda *args: pytest.fail("passes of its own"))
    drift = lambda o: 0.01 * o.d_real.square().mean()
    trained(*mine, batches(), penalty="r1", penalty_weight=1.0, extra_d_loss=drift)
    assert_equal(mine[0], g)
    assert_equal(mine[1], d)


@pytest.mark.parametrize("side", ["d", "g"])
@pytest.mark.parametrize(("value", "found"), [(torch.ones(3), r"shape \(3,\)"), (None, "NoneType")])
def test_an_extra_loss_that_is_no_scalar_gets_one_sentence(side, value, found):
    with pytest.raises(ValueError, match=f"extra_{side}_loss must return a scalar tensor, got {found}"):
        trained(*networks("one"), batches()[:1], **{f"extra_{side}_loss": lambda o: value})


def test_labels_for_a_network_that_takes_none_get_one_sentence():
    class Labelled(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = networks("one")[0]

        def forward(self, z, labels):
            return self.net(z)

    g, d = Labelled(), networks("one")[1]
    real, z = batches()[0]
    for networks_, name in (((g, d), "discriminator"), ((g.net, d), "generator"), ((g, [d, d]), "discriminator")):
        step = fastgan.GANStep(*networks_, latent=5, g_optimizer=sgd(g), d_optimizer=sgd(d))
        with pytest.raises(ValueError, match=f"the {name} must take labels after its input"):
            step(real, torch.zeros(N, dtype=torch.long), z)


def test_a_sigmoid_in_one_of_several_discriminators_is_not_applied_twice():
    g, d = networks("one")
    probable = nn.Sequential(copy.deepcopy(d), nn.Sigmoid())
    step = fastgan.GANStep(g, [probable, d], latent=5, g_optimizer=sgd(g), d_optimizer=sgd(probable, d))
    with pytest.raises(ValueError, match="must return logits, got the output of a sigmoid"):
        step(batches()[0][0])
