import pytest
import torch
import torch.nn.functional as F
from checks import BACKENDS, DTYPES, against_plain

import fastgan
from fastgan import functional
from fastgan.ops.gan_loss import KINDS

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
