"""Adaptive augmentation: its probability, its three parts against loops, its derivatives, runs that resume."""

from __future__ import annotations

import math

import pytest
import torch
from tiny_run import TINY, assert_same_state, noise, trainer

import fastgan
from fastgan.training import ada
from fastgan.training.ada import Ada
from fastgan.training.assembly import assemble
from fastgan.training.distributed import World
from fastgan.training.trainer import Trainer

LOW_PASS = torch.tensor(ada.SYM6, dtype=torch.double)


@pytest.fixture(autouse=True)
def reference():
    with fastgan.backend("reference"):
        yield


def images(*shape, **options):
    return torch.randn(*shape, dtype=torch.double, generator=torch.Generator().manual_seed(0), **options)


def always(p=1.0):
    pipe = Ada("cpu", batch=4)
    pipe.p.fill_(p)
    return pipe


# ---- the control ----------------------------------------------------------------------------------------------------


def signs(share):
    """Ten logits of which so many tenths are positive."""
    return torch.cat([torch.full((round(10 * share), 1), 3.0), torch.full((10 - round(10 * share), 1), -0.1)])


def test_p_rises_by_a_batch_s_part_after_four_sure_batches():
    pipe = Ada("cpu", batch=10, images=400)
    seen = [float(pipe.observe(signs(1.0))) for _ in range(8)]
    assert seen == pytest.approx([0, 0, 0, 0.1, 0.1, 0.1, 0.1, 0.2])  # 4 * 10 of 400 images


def test_the_mean_over_four_batches_decides():
    pipe = Ada("cpu", batch=10, images=400, target=0.6)
    for share in (1.0, 1.0, 0.7, 0.6):  # mean sign 0.65; the last alone 0.2
        pipe.observe(signs(share))
    assert float(pipe.p) == pytest.approx(0.1)
    for share in (0.6, 0.6, 0.7, 1.0):  # 0.45
        pipe.observe(signs(share))
    assert float(pipe.p) == 0.0


def test_p_stays_within_0_and_1():
    pipe = Ada("cpu", batch=10, images=100)
    for _ in range(16):
        pipe.observe([signs(1.0), signs(1.0)])  # of two scales
    assert float(pipe.p) == 1.0
    for _ in range(32):
        pipe.observe(signs(0.0))
    assert float(pipe.p) == 0.0


# ---- the images -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.double])
def test_p_0_is_the_identity(layout, dtype):
    x = images(3, 3, 5, 6).to(dtype).to(memory_format=layout)
    y = always(0.0)(x)
    assert torch.equal(y, x) and y.dtype == dtype and y.stride() == x.stride()


def test_p_is_how_many_images_change():
    x = images(4000, 1, 4, 4)
    torch.manual_seed(0)
    changed = (always(0.1)(x) != x).flatten(1).any(1).double().mean()
    # mirror 1/2, turn 3/4, no whole pixel at 4; three and two turns; brightness, contrast, luma 1/2; each with 0.1
    turns = math.sqrt(0.9)
    kept = (1 - 0.05) * (1 - 0.075) * 0.9**3 * turns**2 * 0.9**2 * (1 - 0.05)
    assert float(changed) == pytest.approx(1 - kept, abs=0.025)  # three deviations


@pytest.mark.parametrize("shape", [(2, 3, 5, 6), (2, 1, 4, 4), (3, 2, 6, 5)])
def test_derivatives_of_both_orders(shape):
    x, pipe = images(*shape, requires_grad=True), always(0.7)

    def run(x):
        torch.manual_seed(1)
        return pipe(x)

    assert not torch.equal(run(x), x)
    assert torch.autograd.gradcheck(run, x)
    assert torch.autograd.gradgradcheck(run, x)


def test_blitted_pixels_are_mirrored_and_turned_exactly():
    x = images(64, 2, 4, 4)
    torch.manual_seed(0)
    y = always()._blitted(x)
    found = set()
    for before, after in zip(x, y, strict=True):
        ways = {
            (flip, k): torch.rot90(before.flip(2) if flip else before, k, (1, 2)) for flip in (0, 1) for k in range(4)
        }
        found.add(next(way for way, want in ways.items() if torch.equal(after, want)))
    assert len(found) == 8


def test_blitted_pixels_move_by_an_eighth_and_are_reflected():
    n = 9
    one, zero = torch.ones(n).double(), torch.zeros(n).double()
    x, shift = images(n, 1, 8, 16), (torch.arange(-4.0, 5).double(), torch.arange(n).double() % 3 - 1)
    y = ada.blit(x, (one, zero, zero, one), shift)
    for k in range(n):
        for i in range(8):
            for j in range(16):
                a, b = i - int(shift[1][k]), j - int(shift[0][k])
                a, b = (min(abs(v), 2 * (side - 1) - abs(v)) for v, side in ((a, 8), (b, 16)))
                assert y[k, 0, i, j] == x[k, 0, a, b]
    torch.manual_seed(0)
    columns = torch.arange(16.0).double().expand(300, 1, 8, 16)
    moved = (always()._blitted(columns)[:, 0, 4] - columns[:, 0, 4])[:, 8].round()
    assert set(range(-2, 3)) <= {int(m) for m in moved}


def test_the_filter_s_even_shifts_are_orthonormal_and_it_keeps_polynomials():
    for k in range(6):
        assert float((LOW_PASS[2 * k :] * LOW_PASS[: 12 - 2 * k]).sum()) == pytest.approx(float(k == 0), abs=1e-11)
    place = torch.arange(12.0).double()
    for power in range(4):  # vanishing moments of the high-pass filter
        assert float(((-1) ** place * place**power * LOW_PASS).sum()) == pytest.approx(0, abs=1e-9)


def test_transforming_by_nothing_keeps_the_image():
    x = images(2, 3, 12, 14)
    one, zero = torch.ones(2).double(), torch.zeros(2).double()
    y = ada.transform(x, (one, zero, zero, one), (zero, zero), LOW_PASS)
    inside = (slice(None), slice(None), slice(3, -3), slice(3, -3))  # at the border the filter sees the reflection
    assert torch.allclose(y[inside], x[inside], atol=1e-9)


def test_transformed_images_are_the_function_at_the_places_that_they_come_from():
    height, width, angle = 40, 44, torch.tensor([0.5, -2.0]).double()
    ys, xs = torch.meshgrid(
        torch.arange(height).double() - (height - 1) / 2, torch.arange(width).double() - (width - 1) / 2, indexing="ij"
    )
    picture = lambda x, y: torch.sin(x / 3) + torch.cos(y / 4 + 0.3)
    scale, stretch, shift = torch.tensor([0.3, -0.2]).double(), torch.tensor([-0.2, 0.25]).double(), (angle, -2 * angle)
    matrix = ada.affine(scale, stretch, angle, 0.3 * angle)
    found = ada.transform(picture(xs, ys).expand(2, 1, height, width), matrix, shift, LOW_PASS)[:, 0]
    for k in range(2):
        turn = lambda t: torch.tensor([[math.cos(t), -math.sin(t)], [math.sin(t), math.cos(t)]]).double()
        stretched = torch.diag(2.0 ** torch.stack([stretch[k], -stretch[k]])) * 2.0 ** scale[k]
        whole = turn(float(angle[k])) @ stretched @ turn(0.3 * float(angle[k]))
        place = torch.stack([xs - shift[0][k], ys - shift[1][k]])
        x, y = torch.einsum("ij,jhw->ihw", whole, place)
        inside = (x.abs() < width / 2 - 4) & (y.abs() < height / 2 - 4)
        assert int(inside.sum()) > 500
        assert float((found[k] - picture(x, y))[inside].abs().max()) < 0.006  # linear between half pixels: 1/8 (1/6)^2


def test_colours_are_the_paper_s_matrices():
    drawn = [torch.rand(5, generator=torch.Generator().manual_seed(k)).double() + 0.3 for k in range(5)]
    drawn[2] = torch.tensor([1.0, -1.0, 1.0, -1.0, -1.0]).double()
    x = images(5, 3, 4, 6)
    v, eye = torch.ones(4).double() / math.sqrt(3), torch.eye(4).double()
    v[3] = 0
    grey = torch.outer(v, v)
    for k, (brightness, contrast, flip, hue, saturation) in enumerate(zip(*drawn, strict=True)):
        bright = eye.clone()
        bright[:3, 3] = brightness
        contrasted = torch.diag(torch.tensor([float(contrast)] * 3 + [1.0]).double())
        mirrored = eye - (2 * grey if flip < 0 else 0)
        cross = torch.zeros(4, 4).double()
        cross[:3, :3] = torch.linalg.cross(v[:3].expand(3, 3), torch.eye(3).double()).T
        turned = torch.matrix_exp(hue * cross)
        saturated = grey + saturation * (eye - grey)
        saturated[3, 3] = 1
        whole = saturated @ turned @ mirrored @ contrasted @ bright
        want = torch.einsum("ij,jhw->ihw", whole, torch.cat([x[k], torch.ones(1, 4, 6).double()]))[:3]
        assert torch.allclose(ada.recolour(x, *drawn)[k], want)
    alone = ada.recolour(x[:, :1], *drawn)
    as_colours = ada.recolour(x[:, :1].expand(-1, 3, -1, -1), *drawn).mean(1, keepdim=True)
    assert torch.allclose(alone, as_colours)


def test_autocast_changes_no_bit():
    x = images(2, 3, 8, 8).float()
    torch.manual_seed(2)
    want = always()(x)
    torch.manual_seed(2)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(always()(x), want)


def test_small_images_are_refused():
    with pytest.raises(ValueError, match=r"of 4 pixels a side or more, got \(1, 1, 3, 8\)"):
        always()(torch.zeros(1, 1, 3, 8))


# ---- the run --------------------------------------------------------------------------------------------------------

ADAPTIVE = TINY.replace(augment="ada", ada_images=64.0, ada_target=-0.5, model_options={"dropout": 0.0})


def test_r1_is_that_of_the_augmented_images():
    _, discriminator, step = assemble(ADAPTIVE.replace(penalty="r1"), torch.device("cpu"))
    step.augment.ada.p.fill_(0.8)
    real, z = torch.randn(4, 1, 8, 8), torch.randn(4, 5)
    torch.manual_seed(3)
    seen = step.augment(real).requires_grad_()
    want = 10 / 2 * torch.autograd.grad(discriminator(seen).sum(), seen)[0].square().sum((1, 2, 3)).mean()
    torch.manual_seed(3)
    metrics = step(real, z=z)
    assert float(metrics["penalty"]) == pytest.approx(float(want), rel=1e-4)
    assert float(metrics["augment_p"]) == pytest.approx(0.8)


def test_r1_of_the_images_themselves_reaches_the_weights():
    """The penalty by a double backward through the augmentation, against finite differences."""
    pipe, x = always(0.9), images(3, 3, 8, 8)
    weight = torch.randn(3, 8, 8, dtype=torch.double, generator=torch.Generator().manual_seed(1)).requires_grad_()

    def penalty(weight):
        torch.manual_seed(5)
        real = x.clone().requires_grad_()
        logits = (torch.tanh(pipe(real)) * weight).sum((1, 2, 3))
        return torch.autograd.grad(logits.sum(), real, create_graph=True)[0].square().sum()

    assert torch.autograd.gradcheck(penalty, weight)


def test_resuming_is_exact_while_p_moves(tmp_path):
    recipe = ADAPTIVE.replace(steps=10, checkpoint_every=3)
    whole = trainer(noise(), tmp_path / "whole", recipe)
    whole.fit()
    first = trainer(noise(), tmp_path / "parts", recipe, target=lambda run: run.step == 6)
    assert first.fit().step == 6
    saved = float(first.train_step.augment.ada.p)
    torch.manual_seed(999)
    parts = Trainer(recipe, resume=tmp_path / "parts", images=noise(), quiet=True)
    assert float(parts.train_step.augment.ada.p) == saved > 0
    parts.fit()
    assert_same_state(whole, parts)
    assert float(whole.train_step.augment.ada.p) != saved
    assert "<h2>Augmentation</h2>" in (tmp_path / "whole/report.html").read_text()


def test_several_ranks_are_refused():
    with pytest.raises(ValueError, match="augment must not be ada on 2 ranks"):
        World(0, 2).check_augment("ada")
    World(0, 2).check_augment("colour")


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("augment=ada,cutout", "augment must be none, ada or some of colour,translation,cutout, got 'ada,cutout'"),
        ("ada_target=1", r"ada_target must be in \(-1, 1\), got 1"),
        ("ada_target=nan", "ada_target must be a number, got 'nan'"),
        ("ada_images=0", "ada_images must be none or finite and above 0, got 0"),
    ],
)
def test_wrong_settings(setting, message):
    with pytest.raises((ValueError, TypeError), match=message):
        TINY.with_settings([setting])
