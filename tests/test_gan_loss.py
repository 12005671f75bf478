import pytest
import torch
import torch.nn.functional as F
from checks import BACKENDS, DTYPES, against_plain

import fastgan
from fastgan import functional
from fastgan._op import around
from fastgan.functional.losses import SMALL
from fastgan.ops.gan_loss import KINDS

# The kernels' own tests: without races no loss goes through PyTorch's ops.
pytestmark = pytest.mark.usefixtures("unraced")

SP = F.softplus
PLAIN = {
    ("bce", "d"): lambda f, r: SP(-r).mean() + SP(f).mean(),
    ("bce", "g"): lambda f, r: SP(-f).mean(),
    ("minimax", "d"): lambda f, r: SP(-r).mean() + SP(f).mean(),
    ("minimax", "g"): lambda f, r: -SP(f).mean(),
    ("lsgan", "d"): lambda f, r: 0.5 * ((r - 1) ** 2).mean() + 0.5 * (f**2).mean(),
    ("lsgan", "g"): lambda f, r: 0.5 * ((f - 1) ** 2).mean(),
    ("hinge", "d"): lambda f, r: F.relu(1 - r).mean() + F.relu(1 + f).mean(),
    ("hinge", "g"): lambda f, r: -f.mean(),
    ("wasserstein", "d"): lambda f, r: f.mean() - r.mean(),
    ("wasserstein", "g"): lambda f, r: -f.mean(),
    ("relativistic", "d"): lambda f, r: SP(-(r - f)).mean(),
    ("relativistic", "g"): lambda f, r: SP(-(f - r)).mean(),
}
SHAPES = [(1,), (7,), (5, 1), (3, 1, 6, 6), (1000,)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("kind", "side"), PLAIN)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_table_to_second_order(shape, kind, side, dtype, backend):
    f, r = (torch.randn(shape, dtype=torch.float64) * 3 for _ in range(2))
    needs_real = side == "d" or kind == "relativistic"

    def ours(f, r):
        return functional.gan_loss(f, r if needs_real else None, kind=kind, side=side) + (
            0 if needs_real else 0 * r.sum()
        )

    def plain(f, r):
        return PLAIN[kind, side](f, r) + (0 if needs_real else 0 * r.sum())

    against_plain(ours, plain, (f, r), dtype, torch.contiguous_format, backend)


@pytest.mark.parametrize(("kind", "side"), PLAIN)
def test_gradgradcheck(kind, side):
    f, r = (torch.randn(6, dtype=torch.float64).requires_grad_() for _ in range(2))
    args = (f, r) if side == "d" or kind == "relativistic" else (f,)
    run = lambda *a: functional.gan_loss(*a, kind=kind, side=side)
    assert torch.autograd.gradcheck(run, args)
    assert torch.autograd.gradgradcheck(run, args)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_extreme_logits_stay_finite(kind, backend):
    logits = torch.tensor([-1e4, -50.0, 0.0, 50.0, 1e4], requires_grad=True)
    with fastgan.backend(backend):
        for side in ("d", "g"):
            loss = functional.gan_loss(logits, logits.detach().flip(0), kind=kind, side=side)
            assert loss.isfinite() and torch.autograd.grad(loss, logits)[0].isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_smoothing_and_statistics(backend):
    f, r = torch.randn(50), torch.randn(50) + 1
    with fastgan.backend(backend):
        loss, stats = functional.gan_loss_statistics(f, r, kind="bce", side="d", label_smoothing=0.1)
    target = torch.full_like(r, 0.9)
    want = F.binary_cross_entropy_with_logits(r, target) + F.binary_cross_entropy_with_logits(f, torch.zeros_like(f))
    torch.testing.assert_close(loss, want)
    expected = [
        r.mean(),
        f.mean(),
        r.sigmoid().mean(),
        f.sigmoid().mean(),
        (r > 0).float().mean(),
        (f < 0).float().mean(),
    ]
    torch.testing.assert_close(stats, torch.stack(expected))


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_statistics_are_made_where_they_are_asked_for(backend):
    """The last argument of the op tells a kernel; the loss is the same with and without."""
    f, r, asked = torch.randn(50), torch.randn(70), []

    def heard(routine, launcher):
        return lambda *args: asked.append(args[-1]) or launcher(*args)

    with fastgan.backend(backend), around(heard):
        loss, _ = functional.gan_loss_statistics(f, r, kind="bce", side="d")
        alone = functional.gan_loss(f, r, kind="bce", side="d")
        functional.gan_loss([f, f], [r, r], kind="relativistic-average", side="g")
    assert asked == [True, False, False, False]
    torch.testing.assert_close(alone, loss)


def test_errors():
    x = torch.randn(4)
    for call, words in [
        (lambda: functional.gan_loss(x, x, kind="gan", side="d"), "kind must be one of"),
        (lambda: functional.gan_loss(x, x, kind="bce", side="x"), "side must be"),
        (lambda: functional.gan_loss(x, kind="bce", side="d"), "logits_real must be given"),
        (lambda: functional.gan_loss(x, x[:2], kind="relativistic", side="g"), "equal shapes"),
        (lambda: functional.gan_loss(x, x, kind="hinge", side="d", label_smoothing=0.1), "label_smoothing"),
    ]:
        with pytest.raises(ValueError, match=words):
            call()


# ---- scales, averages, two-sided smoothing ---------------------------------------------------------------------------


def average(f, r, side):
    if side == "d":
        return SP(-(r - f.mean())).mean() + SP(f - r.mean()).mean()
    return SP(-(f - r.mean())).mean() + SP(r - f.mean()).mean()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("side", ["d", "g"])
def test_the_average_form_equals_its_formula_to_second_order(side, dtype, backend):
    f, r = torch.randn(3, 1, 5, 6, dtype=torch.float64), torch.randn(4, 1, 5, 6, dtype=torch.float64)
    ours = lambda f, r: functional.gan_loss(f, r, kind="relativistic-average", side=side)
    against_plain(ours, lambda f, r: average(f, r, side), (f, r), dtype, torch.contiguous_format, backend)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("side", ["d", "g"])
def test_scales_are_summed_with_their_weights_to_second_order(side, kind):
    shapes, weights = [(3, 1, 7, 5), (3, 1, 3, 2), (3, 1)], [1.0, 0.5, 2.0]
    logits = [torch.randn(s, dtype=torch.float64).requires_grad_() for s in shapes + shapes]
    ours = lambda *t: functional.gan_loss(list(t[:3]), tuple(t[3:]), kind=kind, side=side, weights=weights)

    def plain(*t):
        used = [PLAIN[kind, side](f, r) for f, r in zip(t[:3], t[3:], strict=True)]
        return sum(w * loss for w, loss in zip(weights, used, strict=True))

    needed = logits if side == "d" or kind == "relativistic" else logits[:3]
    results = []
    for run in (ours, plain):
        loss = run(*logits)
        first = torch.autograd.grad(loss, needed, create_graph=True)
        second = torch.autograd.grad(
            sum(g.pow(2).sum() + 0 * t.sum() for g, t in zip(first, needed, strict=True)), needed
        )
        results.append([loss, *first, *second])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)
    unweighted = functional.gan_loss(logits[:3], logits[3:], kind=kind, side=side)
    one = [functional.gan_loss(f, r, kind=kind, side=side) for f, r in zip(logits[:3], logits[3:], strict=True)]
    torch.testing.assert_close(unweighted, sum(one))


def smoothed(f, r, kind):
    targets = torch.full_like(r, 0.9), torch.full_like(f, 0.2)
    loss = (lambda a, t: 0.5 * F.mse_loss(a, t)) if kind == "lsgan" else F.binary_cross_entropy_with_logits
    return sum(loss(a, t) for a, t in zip((r, f), targets, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["bce", "minimax", "lsgan"])
def test_two_sided_smoothing_has_both_targets(kind, backend):
    f, r = torch.randn(50, dtype=torch.float64), torch.randn(50, dtype=torch.float64) + 1
    ours = lambda f, r: functional.gan_loss(f, r, kind=kind, side="d", label_smoothing=(0.1, 0.2))
    for dtype in DTYPES:
        against_plain(ours, lambda f, r: smoothed(f, r, kind), (f, r), dtype, torch.contiguous_format, backend)


def test_what_scales_must_be():
    x = torch.randn(4)
    with pytest.raises(ValueError, match="as many scales"):
        functional.gan_loss([x, x], [x], kind="bce", side="d")
    with pytest.raises(ValueError, match="one number a scale"):
        functional.gan_loss([x, x], [x, x], kind="bce", side="d", weights=[1.0])
    with pytest.raises(TypeError, match="tensors or lists"):
        functional.gan_loss([[x]], [[x]], kind="bce", side="d")


# ---- around the loss -------------------------------------------------------------------------------------------------


def test_lecam_is_the_papers_formula():
    fake, real = torch.randn(5, 1, dtype=torch.float64), torch.randn(7, 1, dtype=torch.float64, requires_grad=True)
    a_fake, a_real = torch.tensor(-0.3, dtype=torch.float64), torch.tensor([0.8], dtype=torch.float64)
    got = functional.lecam_regularization(fake, real, a_fake, a_real)
    torch.testing.assert_close(got, ((real + 0.3) ** 2).mean() + ((fake - 0.8) ** 2).mean())
    got.backward()
    torch.testing.assert_close(real.grad, 2 * (real.detach() + 0.3) / 7)
    with pytest.raises(ValueError, match="one value each, got 5 and 1"):
        functional.lecam_regularization(fake, real, fake, a_real)


def test_the_adaptive_weight_levels_the_pulls():
    w = torch.randn(3, 4, requires_grad=True)
    reconstruction, adversarial = (w * 2).square().sum(), w.sum()
    got = functional.adaptive_weight(reconstruction, adversarial, w)
    want = 8 * w.detach().norm() / (12**0.5 + 1e-4)
    torch.testing.assert_close(got, want)
    assert not got.requires_grad
    (reconstruction + got * adversarial).backward()  # both graphs are still there
    assert functional.adaptive_weight((w * 2).sum() * 1e9, (w * 0).sum(), w) == 1e4
    with pytest.raises(ValueError, match="must require a gradient"):
        functional.adaptive_weight(reconstruction, adversarial, w.detach())
    with pytest.raises(ValueError, match="must be scalars"):
        functional.adaptive_weight(w, adversarial, w)


# ---- losses of few terms go through PyTorch's own ops --------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize(("kind", "side"), SMALL)
def test_by_torch_it_is_the_same_loss_to_second_order(kind, side, dtype, free):
    f, r = (torch.randn(n, dtype=torch.float64) * 3 for n in (7, 7 if kind == "relativistic" else 5))
    ours = lambda f, r: functional.gan_loss(f, r, kind=kind, side=side) + 0 * r.sum()
    plain = lambda f, r: PLAIN[kind, side](f, r) + 0 * r.sum()
    against_plain(ours, plain, (f, r), dtype, torch.contiguous_format, "auto")


def test_no_logits_make_nan(free):
    none, some = torch.zeros(0), torch.zeros(3)
    for fakes, reals in ((none, some), (some, none)):
        assert functional.gan_loss(fakes, reals, kind="bce", side="d").isnan()


def test_which_losses_go_through_torch(free):
    """The graph tells: an op of ours is a node of Python."""
    f = torch.randn(8, requires_grad=True)
    ours = lambda f, r=None, kind="bce", side="g", **form: (
        type(functional.gan_loss(f, r, kind=kind, side=side, **form).grad_fn).__name__ == "ThinBackward"
    )
    assert not any(ours(f, f, *case) for case in SMALL) and ours(f, f, "bce", "d")
    assert ours(f.detach().bfloat16().requires_grad_())
    large = torch.randn(100_000).requires_grad_()
    assert ours(large) and ours(f, large, "bce", "d") and not ours(large, kind="hinge")
    with fastgan.backend("native"):
        assert ours(f)
    with pytest.raises(ValueError, match="relativistic pairing needs equal shapes"):
        functional.gan_loss(f, f[:3], kind="relativistic", side="d")
