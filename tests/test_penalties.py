import collections
import copy
import functools

import pytest
import torch
from torch import nn

import fastgan
from fastgan import functional
from fastgan.choice import watching
from fastgan.testing import assert_penalty_complete


def critic(norm=None):
    layers = [nn.Conv2d(2, 6, 4, 2, 1), nn.LeakyReLU(0.2), nn.Conv2d(6, 8, 4, 2, 1)]
    layers += [norm(8)] if norm else []
    return nn.Sequential(*layers, nn.LeakyReLU(0.2), nn.Flatten(), nn.Linear(8 * 16, 1))


def plain(d, real, fake, kind, weight, epsilon=None, noise=None):
    def norms(x):
        x = x.detach().requires_grad_()
        (g,) = torch.autograd.grad(d(x).sum(), x, create_graph=True)
        return g.flatten(1).square().sum(1)

    if kind == "wgan-gp":
        return weight * ((norms(epsilon * real + (1 - epsilon) * fake).sqrt() - 1) ** 2).mean()
    if kind == "dragan":
        return weight * ((norms(real + 0.5 * real.std() * noise).sqrt() - 1) ** 2).mean()
    return weight / 2 * sum(norms(x).mean() for x in {"r1": [real], "r2": [fake], "r1r2": [real, fake]}[kind])


@pytest.mark.parametrize("norm", [None, nn.BatchNorm2d, nn.InstanceNorm2d])
@pytest.mark.parametrize("kind", ["wgan-gp", "dragan", "r1", "r2", "r1r2"])
def test_equals_plain_torch_for_every_parameter(kind, norm):
    ours = critic(norm).double()
    theirs = copy.deepcopy(ours)
    fastgan.convert(ours)
    real, fake = torch.randn(2, 5, 2, 16, 16).double()
    got = functional.gradient_penalty(
        ours, real, fake, kind=kind, weight=3.0, generator=torch.Generator().manual_seed(7)
    )
    rng = torch.Generator().manual_seed(7)
    draw = {"wgan-gp": (5, 1, 1, 1), "dragan": real.shape}.get(kind, (1,))
    u = torch.rand(draw, generator=rng, dtype=torch.float64)
    want = plain(theirs, real, fake, kind, 3.0, u, u)
    torch.testing.assert_close(got, want)
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        a, b = (torch.autograd.grad(v, w, retain_graph=True, allow_unused=True)[0] for v, w in ((got, p), (want, q)))
        a, b = (torch.zeros_like(p) if g is None else g for g in (a, b))
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


def counted(run):
    """How often each op ran."""
    ran = []
    with watching(lambda op, backend, reason: ran.append(op.name)):
        run()
    return collections.Counter(ran)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("spectral", [False, True])
def test_double_backward_makes_no_weight_gradient_that_nobody_reads(spectral, autocast):
    d, x = fastgan.convert(critic(nn.BatchNorm2d)), torch.randn(4, 2, 16, 16)
    if spectral:
        d[0] = fastgan.nn.Conv2dBiasAct(2, 6, 4, 2, 1)
        nn.utils.parametrizations.spectral_norm(d[0].conv)

    def forward():
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return functional.gradient_penalty(d, x, kind="r1", weight=1.0)

    first = counted(lambda: forward())
    assert first["conv_transpose2d"] == 2 and "conv2d_weight" not in first
    assert counted(lambda: forward().backward())["conv2d_weight"] >= 2
    assert all(p.grad is not None for p in d[0].parameters() if p.dim() > 1)


def test_a_backward_pass_makes_the_gradients_that_it_is_asked_for():
    d, x = fastgan.convert(critic()), torch.randn(4, 2, 16, 16, requires_grad=True)
    weights = [p for p in d.parameters() if p.dim() == 4]
    loss = d(x).square().sum()
    everything = torch.autograd.grad(loss, [x, *weights], retain_graph=True)
    for whole, part in zip([x, *weights], everything, strict=True):
        assert torch.equal(torch.autograd.grad(loss, whole, retain_graph=True)[0], part)
    last = counted(lambda: torch.autograd.grad(loss, weights[1], retain_graph=True))
    assert last["conv2d_weight"] == 1 and "conv_transpose2d" not in last
    loss.backward()
    for whole, part in zip([x, *weights], everything, strict=True):
        assert torch.equal(whole.grad, part)


def test_zero_gradient_has_a_finite_penalty_gradient():
    d = nn.Sequential(nn.Flatten(), nn.Linear(4, 1))
    nn.init.zeros_(d[1].weight)
    value = functional.gradient_penalty(d, torch.randn(3, 1, 2, 2), torch.randn(3, 1, 2, 2), kind="wgan-gp", weight=1.0)
    value.backward()
    assert value == 1.0 and d[1].weight.grad.isfinite().all()


def test_errors():
    d, x = critic(), torch.randn(2, 2, 16, 16)
    for kwargs, words in [
        (dict(kind="gp"), "kind must be one of"),
        (dict(kind="wgan-gp"), "fake must be given"),
        (dict(kind="r2", fake=x[:1]), "fake must have real's shape"),
    ]:
        with pytest.raises(ValueError, match=words):
            functional.gradient_penalty(d, x, **kwargs, weight=1.0)


@pytest.mark.parametrize("norm", [None, nn.BatchNorm2d, nn.InstanceNorm2d])
def test_our_ops_are_complete(norm):
    assert_penalty_complete(fastgan.convert(critic(norm)), torch.randn(4, 2, 16, 16))


class Opaque(torch.autograd.Function):
    """A fused op as many libraries ship it: right gradient, but a backward that autograd cannot see through."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return nn.functional.linear(x, weight)

    @staticmethod
    def backward(ctx, dy):
        x, weight = (t.detach() for t in ctx.saved_tensors)
        return (dy.detach() @ weight), dy.detach().t() @ x


class OpaqueLayer(nn.Linear):
    def forward(self, x):
        return Opaque.apply(x, self.weight)


def test_an_opaque_backward_is_caught_and_named():
    d = nn.Sequential(
        nn.Flatten(), nn.Linear(8, 6), nn.LeakyReLU(0.2), OpaqueLayer(6, 5, bias=False), nn.Tanh(), nn.Linear(5, 1)
    )
    with pytest.raises(AssertionError, match=r"3\.weight: (missing|wrong)"):
        assert_penalty_complete(d, torch.randn(4, 2, 2, 2))


class Reversed(torch.autograd.Function):
    """An exact first derivative whose own derivative is off by one percent."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return torch.tanh(x)

    @staticmethod
    def backward(ctx, dy):
        (x,) = ctx.saved_tensors
        slope = 1 - torch.tanh(x) ** 2
        return dy * (1.01 * slope - 0.01 * slope.detach())


class AlmostTanh(nn.Module):
    def forward(self, x):
        return Reversed.apply(x)


def test_a_second_derivative_off_by_one_percent_is_caught():
    d = nn.Sequential(nn.Flatten(), nn.Linear(8, 6), AlmostTanh(), nn.Linear(6, 1))
    with pytest.raises(AssertionError, match=r"1\.(weight|bias): wrong"):
        assert_penalty_complete(d, torch.randn(4, 2, 2, 2))
    d[2] = nn.Tanh()
    assert_penalty_complete(d, torch.randn(4, 2, 2, 2))


class Untidy(nn.Module):
    """Unused, frozen and empty parameters, labels, batch norm in training, both spectral norms, dropout."""

    def __init__(self):
        super().__init__()
        self.unused, self.empty = nn.Linear(3, 3), nn.Parameter(torch.zeros(0))
        self.first = nn.utils.parametrizations.spectral_norm(nn.Conv2d(2, 6, 4, 2, 1))
        self.norm, self.dropout = nn.BatchNorm2d(6), nn.Dropout(0.5)
        self.second = nn.utils.spectral_norm(nn.Linear(6 * 16, 4))
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.embed = nn.Embedding(3, 4)

    def forward(self, x, labels):
        h = nn.functional.leaky_relu(self.norm(self.first(x)), 0.2)
        h = self.frozen(nn.functional.silu(self.second(self.dropout(h).flatten(1))))
        return (h * self.embed(labels)).sum(1)


def test_untidy_discriminators_pass_and_stay_as_they_are():
    d, x, labels = Untidy(), torch.randn(6, 2, 8, 8), torch.arange(6) % 3
    d(x, labels)  # the older spectral norm leaves a computed weight behind, which deepcopy refuses
    before = {name: v.clone() for name, v in d.state_dict().items()}
    state = torch.get_rng_state()
    assert_penalty_complete(d, x, labels=labels)
    assert all(torch.equal(v, before[name]) for name, v in d.state_dict().items())
    assert torch.equal(state, torch.get_rng_state()) and d.training and d.dropout.training
    assert_penalty_complete(nn.Sequential(nn.Flatten(), nn.Linear(128, 1)).requires_grad_(False), x)


# ---- whatever a discriminator is and returns --------------------------------------------------------------------


class Scales(nn.Module):
    """Logits at two scales and features, in whatever form is asked for."""

    def __init__(self, form):
        super().__init__()
        self.body, self.head = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 1, 3)
        self.form = form

    def forward(self, x):
        h = torch.tanh(self.body(x))
        a, b = self.head(h), self.head(torch.nn.functional.avg_pool2d(h, 2))
        forms = {
            "list": [a, b],
            "tuple": (a, b),
            "logits, features": (a, [h, h]),
            "logits, feature": (a, h),
            "lists of both": ([a, b], [[h], [h]]),
            "dict": {"features": h, "logits": a},
            "feature lists": [[h, a], [h, b]],
            "logits, nothing": (a, None),
            "one in a dict": {"score": a},
        }
        return forms[self.form]


BOTH = ("list", "tuple", "lists of both", "feature lists")


@pytest.mark.parametrize(
    "form",
    [*BOTH, "logits, features", "logits, feature", "dict", "logits, nothing", "one in a dict"],
)
@pytest.mark.parametrize("kind", ["r1", "wgan-gp"])
def test_outputs_of_every_form(form, kind):
    torch.manual_seed(0)
    d = Scales(form).double()
    real, fake = torch.randn(2, 3, 3, 8, 8, dtype=torch.float64)
    plain = Scales("list").double()
    plain.load_state_dict(d.state_dict())

    def logits(x):
        a, b = plain(x)
        return torch.cat([a.flatten(1), b.flatten(1)], 1) if form in BOTH else a

    found = []
    for model, parameters in ((d, d.parameters()), (logits, plain.parameters())):
        rng = torch.Generator().manual_seed(1)
        penalty = functional.gradient_penalty(model, real, fake, kind=kind, weight=10.0, generator=rng)
        found.append([penalty, *torch.autograd.grad(penalty, list(parameters), allow_unused=True)])
    for a, b in zip(*found, strict=True):
        assert (a is None) == (b is None) and (a is None or torch.allclose(a, b, rtol=1e-10))


def test_a_function_a_method_and_a_partial_are_discriminators_too():
    d = Scales("tuple").double()
    real = torch.randn(3, 3, 8, 8, dtype=torch.float64)
    want = functional.gradient_penalty(d, real, kind="r1", weight=1.0)
    for call in (lambda x: d(x), d.forward, functools.partial(d.__call__)):
        torch.testing.assert_close(functional.gradient_penalty(call, real, kind="r1", weight=1.0), want)


def test_an_output_without_logits_gets_one_sentence():
    with pytest.raises(TypeError, match="output must be logits"):
        functional.gradient_penalty(lambda x: {"a": x, "b": x}, torch.randn(2, 3), kind="r1", weight=1.0)


# ---- approximate R1 --------------------------------------------------------------------------------------------------


def test_approximate_r1_has_the_mean_of_r1():
    """Of a linear discriminator the estimate is without bias: its mean over 20,000 samples of noise is |w|^2."""
    w = torch.randn(5, dtype=torch.float64)
    x = torch.zeros(20000, 5, dtype=torch.float64)
    exact = functional.gradient_penalty(lambda x: x @ w, x, kind="r1", weight=3.0)
    got = functional.gradient_penalty(lambda x: x @ w, x, kind="r1-approximate", weight=3.0, sigma=0.1)
    assert abs(got / exact - 1) < 0.05  # a standard deviation of (w n)^2 is sqrt(2) of its mean, 0.01 here
    other = functional.gradient_penalty(lambda x: x @ w, x + 1, x, kind="r2-approximate", weight=3.0, sigma=0.1)
    assert abs(other / exact - 1) < 0.05


def test_approximate_r1_is_the_papers_formula():
    net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1)).double()
    x, sigma = torch.randn(6, 4, dtype=torch.float64), 0.03
    got = functional.gradient_penalty(
        net, x, kind="r1-approximate", weight=2.0, sigma=sigma, generator=torch.Generator().manual_seed(5)
    )
    noise = torch.randn(6, 4, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    want = 2.0 / (2 * sigma**2) * (net(x) - net(x + sigma * noise)).square().mean()
    torch.testing.assert_close(got, want)
    got.backward()
    assert net[0].weight.grad.abs().sum() > 0
    with pytest.raises(ValueError, match="sigma must be finite and above 0, got 0"):
        functional.gradient_penalty(net, x, kind="r1-approximate", weight=1.0, sigma=0)


# ---- path lengths ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layers", [None, 3])
def test_path_lengths_are_their_formula(layers):
    """|J^T y| from whole Jacobians, and its gradient, in float64."""
    torch.manual_seed(0)
    weight = torch.randn(2 * 3 * 5, 4, dtype=torch.double, requires_grad=True)
    w = torch.randn(3, *([layers] if layers else []), 4, dtype=torch.double, requires_grad=True)
    synthesise = lambda w: torch.tanh((w.sum(1) if layers else w) @ weight.t()).view(-1, 2, 3, 5)
    images = synthesise(w)
    found = functional.path_lengths(images, w, generator=torch.Generator().manual_seed(7))
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(7), dtype=torch.double) / 15**0.5
    for n in range(3):
        jacobian = torch.autograd.functional.jacobian(lambda v: synthesise(v[None])[0], w[n])
        pulled = torch.einsum("chw,chw...->...", noise[n], jacobian).reshape(-1, 4)
        torch.testing.assert_close(found[n], pulled.square().sum(1).mean().sqrt())
    step, direction = 1e-6, torch.randn_like(weight)
    (gradient,) = torch.autograd.grad(found.sum(), weight)
    moved = []
    for sign in (1, -1):
        weight.data.add_(direction, alpha=sign * step)
        again = functional.path_lengths(synthesise(w), w, generator=torch.Generator().manual_seed(7)).sum()
        moved.append(again.item())
        weight.data.sub_(direction, alpha=sign * step)
    assert abs((moved[0] - moved[1]) / (2 * step) - (gradient * direction).sum().item()) < 1e-6


def test_path_lengths_refuse_other_shapes():
    with pytest.raises(ValueError, match=r"images must be \[N, C, H, W\] and w .*, got \(3, 2\) and \(3, 2\)"):
        functional.path_lengths(torch.ones(3, 2), torch.ones(3, 2))
