"""The adversarial losses: all logits to the loss and the statistics people log, in one pass.

Formula      r = D(real), f = D(fake), sp = softplus, s = label smoothing, mean over all logits:
             kind          side "d"                              side "g"
             bce           mean(sp(r) - (1-s) r) + mean sp(f)    mean sp(-f)
             minimax       as bce                                -mean sp(f)
             lsgan         mean (r-1+s)^2 / 2 + mean f^2 / 2     mean (f-1)^2 / 2
             hinge         mean relu(1-r) + mean relu(1+f)       -mean f
             wasserstein   mean f - mean r                       -mean f
             relativistic  mean sp(-(r-f))                       mean sp(-(f-r))
Shapes       fake, real: any (equal numbers of elements for relativistic) -> loss [], statistics [6]: mean r, mean f,
             mean sigmoid(r), mean sigmoid(f), share r > 0, share f < 0 (zeros for an absent real); [0] without
             want_statistics, which spares a CPU the sigmoids (GPUs add up what they add up, and store less)
Dtypes       computed in float32 (float64 for float64); loss in the logits' dtype, statistics in the computing one
Layout       any; read as a flat array
Autocast     float32
Derivatives  first: gan_loss_backward. second: gan_loss_double_backward (sigma' terms) in one pass. higher: the same
             formulas in differentiable torch ops. statistics are not differentiable
Saves        the logits
Traffic      1 access a logit forward, 2 backward, 3 double backward; no target tensor is made
FLOPs        about 10 a logit
Determinism  bit-equal from run to run for one thread count
Backends     cuda, triton, native, reference
Source       Goodfellow et al. (2014) bce, minimax; Mao et al. (2017) lsgan; Lim and Ye (2017) hinge; Arjovsky et al.
             (2017) wasserstein; Huang et al., R3GAN (2024) relativistic pairing
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import softplus

from fastgan import _native
from fastgan._layout import accumulation_dtype
from fastgan._op import OPS, Op, draw, first_alone
from fastgan.choice import triton

KINDS = ("bce", "minimax", "lsgan", "hinge", "wasserstein", "relativistic")
SIDES = ("d", "g")
SMOOTHED = ("bce", "minimax", "lsgan")


def cost(fake: Tensor, real: Tensor | None) -> dict[str, int]:
    """Bytes and FLOPs that a perfect kernel needs: each logit is read once."""
    n = fake.numel() + (0 if real is None else real.numel())
    return {"bytes": n * fake.element_size(), "flops": 10 * n}


def cost_backward(fake: Tensor, real: Tensor | None) -> dict[str, int]:
    n = fake.numel() + (0 if real is None else real.numel())
    return {"bytes": 2 * n * fake.element_size(), "flops": 10 * n}


def cost_double_backward(fake: Tensor, real: Tensor | None) -> dict[str, int]:
    n = fake.numel() + (0 if real is None else real.numel())
    return {"bytes": 3 * n * fake.element_size(), "flops": 15 * n}


def formula(fake: Tensor, real: Tensor | None, kind: str, side: str, smoothing: float) -> Tensor:
    """The table above, in differentiable torch ops (real may be None where the table does not use r).

    A plain mean is a sum, divided: the gradient of `mean` is divided in a pass of its own, which for 16,384 logits is a
    sixth of the time.
    """
    f, r = fake, fake if real is None else real
    if kind == "relativistic":
        return softplus(f - r if side == "d" else r - f).mean()
    if side == "d":
        if kind == "wasserstein" and f.numel() == r.numel():
            return (f.sum() - r.sum()) / f.numel()
        return real_term(r, kind, smoothing) + fake_term(f, kind)
    if kind == "bce":
        return softplus(-f).mean()
    if kind == "minimax":
        return -softplus(f).mean()
    return 0.5 * (f - 1).square().mean() if kind == "lsgan" else f.sum() / -f.numel()


def real_term(r: Tensor, kind: str, smoothing: float) -> Tensor:
    """What D's loss says of real logits alone; not for relativistic, which has no such term."""
    if kind == "lsgan":
        return 0.5 * (r - (1 - smoothing)).square().mean()
    if kind == "hinge":
        return torch.relu(1 - r).mean()
    return -r.mean() if kind == "wasserstein" else (softplus(r) - (1 - smoothing) * r).mean()


def fake_term(f: Tensor, kind: str) -> Tensor:
    """What D's loss says of fake logits alone."""
    if kind == "lsgan":
        return 0.5 * f.square().mean()
    if kind == "hinge":
        return torch.relu(1 + f).mean()
    return f.mean() if kind == "wasserstein" else softplus(f).mean()


def slopes(f: Tensor, r: Tensor | None, kind: str, side: str, smoothing: float) -> tuple[Tensor, Tensor | None]:
    """(dL/df, dL/dr) elementwise, the 1/n of the mean included; dL/dr is None where r is not used."""
    n = f.numel()
    if kind == "relativistic" and r is not None:
        u = torch.sigmoid(f - r) / n if side == "d" else -torch.sigmoid(r - f) / n
        return u, -u
    if side == "g" or r is None:
        return {
            "bce": lambda: -torch.sigmoid(-f),
            "minimax": lambda: -torch.sigmoid(f),
            "lsgan": lambda: f - 1,
            "hinge": lambda: -torch.ones_like(f),
            "wasserstein": lambda: -torch.ones_like(f),
        }[kind]() / n, None
    m = r.numel()
    if kind == "lsgan":
        return f / n, (r - (1 - smoothing)) / m
    if kind == "hinge":
        return (1 + f > 0).to(f.dtype) / n, -(1 - r > 0).to(r.dtype) / m
    if kind == "wasserstein":
        return torch.ones_like(f) / n, -torch.ones_like(r) / m
    return torch.sigmoid(f) / n, (torch.sigmoid(r) - (1 - smoothing)) / m


def curvatures(f: Tensor, r: Tensor | None, kind: str, side: str) -> tuple[Tensor, Tensor | None]:
    """(d2L/df2, d2L/dr2) elementwise, None as in `slopes`; for the relativistic kind both are L''(f - r)."""

    def bump(u: Tensor) -> Tensor:  # sigma'(u) / n
        return torch.sigmoid(u) * torch.sigmoid(-u) / u.numel()

    if kind == "relativistic" and r is not None:
        return bump(f - r), bump(f - r)
    of = {
        "minimax": lambda u: bump(u) if side == "d" else -bump(u),
        "lsgan": lambda u: torch.full_like(u, 1 / u.numel()),
        "hinge": torch.zeros_like,
        "wasserstein": torch.zeros_like,
    }.get(kind, bump)
    return of(f), None if side == "g" or r is None else of(r)


# ---- forward --------------------------------------------------------------------------------------------------------


def reference(fake, real, kind, side, smoothing, want_statistics):
    dtype = accumulation_dtype(fake.dtype)
    f, r = fake.to(dtype), None if real is None else real.to(dtype)
    loss, zero = formula(f, r, kind, side, smoothing).to(fake.dtype), f.new_zeros(())
    if not want_statistics:
        return loss, f.new_empty(0)
    statistics = [
        zero if r is None else r.mean(),
        f.mean(),
        zero if r is None else torch.sigmoid(r).mean(),
        torch.sigmoid(f).mean(),
        zero if r is None else (r > 0).to(dtype).mean(),
        (f < 0).to(dtype).mean(),
    ]
    return loss, torch.stack(statistics)


def _shape(fake, real, kind, side, smoothing):
    """The kernels' GanLossShape behind the dtype."""
    return fake.numel(), 0 if real is None else real.numel(), KINDS.index(kind), SIDES.index(side), smoothing


def launch(core, fake, real, kind, side, smoothing, want_statistics):
    fake, real = fake.contiguous(), None if real is None else real.contiguous()
    loss = fake.new_empty((), dtype=torch.float32)
    statistics = fake.new_empty(6 if want_statistics else 0, dtype=torch.float32)
    tensors = fake, real, loss, statistics if want_statistics else None
    shape = _shape(fake, real, kind, side, smoothing)
    core.call("gan_loss_forward", fake, _native.DTYPE_CODES[fake.dtype], *tensors, *shape)
    return loss if fake.dtype is torch.float32 else loss.to(fake.dtype), statistics  # `to` takes 2 us to do nothing


def fake_shapes(fake, real, kind, side, smoothing, want_statistics):
    return fake.new_empty(()), fake.new_empty(6 if want_statistics else 0, dtype=accumulation_dtype(fake.dtype))


op = Op(
    "gan_loss(Tensor fake, Tensor? real, str kind, str side, float smoothing, bool want_statistics)"
    " -> (Tensor, Tensor)",
    reference=reference,
    fake=fake_shapes,
    backends={**_native.backends(launch, lambda fake, real, *rest: (fake, real)), "triton": triton("gan_loss")},
    autocast="float32",
    example=lambda: (*draw((7,), (7,)), "bce", "d", 0.1, True),
)


def _save(ctx, inputs, output):
    fake, real, ctx.kind, ctx.side, ctx.smoothing, _ = inputs
    first_alone(ctx, output)
    ctx.save_for_backward(fake, real)


def _backward(ctx, dloss, _dstatistics):
    fake, real = ctx.saved_tensors
    dfake, dreal = OPS["gan_loss_backward"](dloss, fake, real, ctx.kind, ctx.side, ctx.smoothing)
    return dfake, None if real is None else dreal, None, None, None, None


op.differentiate(_save, _backward)


# ---- backward -------------------------------------------------------------------------------------------------------


def reference_backward(dloss, fake, real, kind, side, smoothing):
    dtype = accumulation_dtype(fake.dtype)
    f, r = fake.to(dtype), None if real is None else real.to(dtype)
    dfake, dreal = slopes(f, r, kind, side, smoothing)
    dreal = fake.new_zeros(0 if real is None else real.shape) if dreal is None else dloss * dreal
    return (dloss * dfake).to(fake.dtype).contiguous(), dreal.to(fake.dtype).contiguous()


def launch_backward(core, dloss, fake, real, kind, side, smoothing):
    fake, real = fake.contiguous(), None if real is None else real.contiguous()
    dloss = dloss.to(torch.float32)
    dfake = torch.empty_like(fake)
    dreal = fake.new_empty(0) if real is None else torch.empty_like(real)
    tensors = dloss, fake, real, dfake, None if real is None else dreal
    shape = _shape(fake, real, kind, side, smoothing)
    core.call("gan_loss_backward", fake, _native.DTYPE_CODES[fake.dtype], *tensors, *shape)
    return dfake, dreal


def fake_backward_shapes(dloss, fake, real, kind, side, smoothing):
    dfake = fake.new_empty(fake.shape)
    return dfake, fake.new_empty(0 if real is None else real.shape)


backward = Op(
    "gan_loss_backward(Tensor dloss, Tensor fake, Tensor? real, str kind, str side, float smoothing)"
    " -> (Tensor, Tensor)",
    reference=reference_backward,
    fake=fake_backward_shapes,
    backends={
        **_native.backends(launch_backward, lambda dloss, fake, real, *rest: (fake, real)),
        "triton": triton("gan_loss", "gan_loss_backward"),
    },
    autocast="float32",
    example=lambda: (*draw((), (7,), (7,)), "lsgan", "d", 0.0),
)


def _save_backward(ctx, inputs, output):
    dloss, fake, real, ctx.kind, ctx.side, ctx.smoothing = inputs
    ctx.save_for_backward(dloss, fake, real)


def _double_backward(ctx, ddfake, ddreal):
    dloss, fake, real = ctx.saved_tensors
    scalars = ctx.kind, ctx.side, ctx.smoothing
    # someone who records this pass wants a third derivative: torch's own ops then, which have every order
    run = reference_double_backward if torch.is_grad_enabled() else OPS["gan_loss_double_backward"]
    d_dloss, d_fake, d_real = run(ddfake, None if real is None else ddreal, dloss, fake, real, *scalars)
    return d_dloss.to(dloss.dtype), d_fake, None if real is None else d_real, None, None, None


backward.differentiate(_save_backward, _double_backward)


# ---- double backward ------------------------------------------------------------------------------------------------


def reference_double_backward(ddfake, ddreal, dloss, fake, real, kind, side, smoothing):
    """dfake = dloss L'(f), dreal = dloss L'(r), L the sum of both: every factor a differentiable torch op."""
    dtype = accumulation_dtype(fake.dtype)
    u, f = ddfake.to(dtype), fake.to(dtype)
    v: Any = None if real is None else ddreal.to(dtype)
    r = None if real is None else real.to(dtype)
    slope_f, slope_r = slopes(f, r, kind, side, smoothing)
    curve_f, curve_r = curvatures(f, r, kind, side)
    d_real: Any = fake.new_zeros(0 if real is None else real.shape)
    if kind == "relativistic":
        u = u - v
        d_fake = dloss * u * curve_f
        d_dloss, d_real = (u * slope_f).sum(), -d_fake
    else:
        d_dloss, d_fake = (u * slope_f).sum(), dloss * u * curve_f
        if slope_r is not None:
            d_dloss, d_real = d_dloss + (v * slope_r).sum(), dloss * v * curve_r
    return d_dloss, d_fake.to(fake.dtype).contiguous(), d_real.to(fake.dtype).contiguous()


def launch_double_backward(core, ddfake, ddreal, dloss, fake, real, kind, side, smoothing):
    ddfake, fake = ddfake.contiguous(), fake.contiguous()
    ddreal, real = (None if t is None else t.contiguous() for t in (ddreal, real))
    d_dloss, d_fake, d_real = fake_double_backward_shapes(ddfake, ddreal, dloss, fake, real, kind, side, smoothing)
    given = ddfake, ddreal, dloss.to(torch.float32), fake, real
    made = d_dloss, d_fake, None if real is None else d_real
    shape = _shape(fake, real, kind, side, smoothing)
    core.call("gan_loss_double_backward", fake, _native.DTYPE_CODES[fake.dtype], *given, *made, *shape)
    return d_dloss, d_fake, d_real


def fake_double_backward_shapes(ddfake, ddreal, dloss, fake, real, kind, side, smoothing):
    d_real = fake.new_empty(0 if real is None else real.shape)
    return fake.new_empty((), dtype=accumulation_dtype(fake.dtype)), fake.new_empty(fake.shape), d_real


double_backward = Op(
    "gan_loss_double_backward(Tensor ddfake, Tensor? ddreal, Tensor dloss, Tensor fake, Tensor? real, str kind,"
    " str side, float smoothing) -> (Tensor, Tensor, Tensor)",
    reference=reference_double_backward,
    fake=fake_double_backward_shapes,
    backends={
        **_native.backends(launch_double_backward, lambda u, v, dloss, fake, real, *rest: (fake, real, u, v)),
        "triton": triton("gan_loss", "gan_loss_double_backward"),
    },
    autocast="float32",
    example=lambda: (*draw((7,), (7,), (), (7,), (7,)), "bce", "d", 0.1),
)
double_backward.not_differentiable()
