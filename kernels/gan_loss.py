"""Triton kernels of `gan_loss` and its derivatives: one launch for both batches, with the statistics people log."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastgan.choice import Backend
from fastgan.kernels.launching import FLOATS, declines, launch, meta, power_of_2, recorded
from fastgan.kernels.numerics import activate, sigmoid, softplus

BLOCK = 1024
ALONE = 16384  # logits of the longer batch up to which one program does it all: 16 turns, and no second launch
SUMS = 8  # loss of f, of r, f, r, sigmoid(f), sigmoid(r), r > 0, f < 0


@triton.jit
def loss_terms(f, r, smoothing, KIND: tl.constexpr, SIDE: tl.constexpr):
    """What each fake and each real logit adds to the loss; the table of fastgan/ops/gan_loss.py."""
    of_r = tl.zeros_like(r)
    if KIND == "relativistic":
        of_f = softplus(f - r) if SIDE == "d" else softplus(r - f)
    elif SIDE == "g":
        if KIND == "bce":
            of_f = softplus(-f)
        elif KIND == "minimax":
            of_f = -softplus(f)
        elif KIND == "lsgan":
            of_f = 0.5 * (f - 1.0) * (f - 1.0)
        else:
            of_f = -f
    elif KIND == "lsgan":
        of_f = 0.5 * f * f
        of_r = 0.5 * (r - (1.0 - smoothing)) * (r - (1.0 - smoothing))
    elif KIND == "hinge":
        of_f = activate(1.0 + f, 0.0, "relu")
        of_r = activate(1.0 - r, 0.0, "relu")
    elif KIND == "wasserstein":
        of_f = f
        of_r = -r
    else:
        of_f = softplus(f)
        of_r = softplus(r) - (1.0 - smoothing) * r
    return of_f, of_r


@triton.jit
def loss_slopes(f, r, smoothing, KIND: tl.constexpr, SIDE: tl.constexpr):
    """Derivatives of `loss_terms` by f and by r."""
    to_r = tl.zeros_like(r)
    if KIND == "relativistic":
        to_f = sigmoid(f - r) if SIDE == "d" else -sigmoid(r - f)
        to_r = -to_f
    elif SIDE == "g":
        if KIND == "bce":
            to_f = -sigmoid(-f)
        elif KIND == "minimax":
            to_f = -sigmoid(f)
        elif KIND == "lsgan":
            to_f = f - 1.0
        else:
            to_f = tl.zeros_like(f) - 1.0
    elif KIND == "lsgan":
        to_f = f
        to_r = r - (1.0 - smoothing)
    elif KIND == "hinge":
        to_f = tl.where(1.0 + f > 0, 1.0, 0.0)
        to_r = tl.where(1.0 - r > 0, -1.0, 0.0)
    elif KIND == "wasserstein":
        to_f = tl.zeros_like(f) + 1.0
        to_r = tl.zeros_like(r) - 1.0
    else:
        to_f = sigmoid(f)
        to_r = sigmoid(r) - (1.0 - smoothing)
    return to_f, to_r


@triton.jit
def curve(u, KIND: tl.constexpr, SIDE: tl.constexpr):
    """L'' by a logit; L''(f - r) for the relativistic kind. sigma'(u) = e / (1 + e)^2 with e = exp(-|u|)."""
    e = tl.exp(-tl.abs(u))
    bump = e / ((1.0 + e) * (1.0 + e))
    if KIND == "lsgan":
        bump = tl.zeros_like(u) + 1.0
    elif KIND == "hinge" or KIND == "wasserstein":
        bump = tl.zeros_like(u)
    elif KIND == "minimax" and SIDE == "g":
        bump = -bump
    return bump


@triton.jit
def write_loss(loss, statistics, lf, lr, f, r, sf, sr, above, below, inv_n, inv_m):
    """From the eight sums to what the op returns; statistics may be None."""
    tl.store(loss, (lf * inv_n + lr * inv_m).to(loss.dtype.element_ty))
    if statistics is not None:
        tl.store(statistics, r * inv_m)
        tl.store(statistics + 1, f * inv_n)
        tl.store(statistics + 2, sr * inv_m)
        tl.store(statistics + 3, sf * inv_n)
        tl.store(statistics + 4, above * inv_m)
        tl.store(statistics + 5, below * inv_n)


# Bound: 1 access a logit, about 40 flops with the sigmoids: memory; a discriminator's 128 logits are one launch.
@triton.jit
def gan_loss_kernel(
    fake, real, loss, statistics, partial, n, m, each, programs, smoothing, inv_n, inv_m,
    KIND: tl.constexpr, SIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip  # by kind: tensors, sizes, constants
    """Sums over `each` logits of either batch; an only program writes the loss, several write partial [8, programs]."""
    first = tl.program_id(0) * each
    lf = tl.zeros((BLOCK,), tl.float32)
    lr = tl.zeros((BLOCK,), tl.float32)
    sum_f = tl.zeros((BLOCK,), tl.float32)
    sum_r = tl.zeros((BLOCK,), tl.float32)
    sf = tl.zeros((BLOCK,), tl.float32)
    sr = tl.zeros((BLOCK,), tl.float32)
    above = tl.zeros((BLOCK,), tl.float32)
    below = tl.zeros((BLOCK,), tl.float32)
    for start in range(first, tl.minimum(first + each, tl.maximum(n, m)), BLOCK):
        i = start + tl.arange(0, BLOCK)
        f = tl.load(fake + i, mask=i < n, other=0.0).to(tl.float32)
        r = tl.zeros((BLOCK,), tl.float32)
        if real is not None:
            r = tl.load(real + i, mask=i < m, other=0.0).to(tl.float32)
            sr += tl.where(i < m, sigmoid(r), 0.0)
            above += tl.where((i < m) & (r > 0), 1.0, 0.0)
        of_f, of_r = loss_terms(f, r, smoothing, KIND, SIDE)
        lf += tl.where(i < n, of_f, 0.0)
        lr += tl.where(i < m, of_r, 0.0)
        sum_f += f
        sum_r += r
        sf += tl.where(i < n, sigmoid(f), 0.0)
        below += tl.where((i < n) & (f < 0), 1.0, 0.0)
    if partial is None:
        write_loss(
            loss, statistics, tl.sum(lf, 0), tl.sum(lr, 0), tl.sum(sum_f, 0), tl.sum(sum_r, 0), tl.sum(sf, 0),
            tl.sum(sr, 0), tl.sum(above, 0), tl.sum(below, 0), inv_n, inv_m,
        )  # fmt: skip  # by kind, and Triton takes no *arguments
    else:
        at = partial + tl.program_id(0)
        tl.store(at, tl.sum(lf, 0))
        tl.store(at + programs, tl.sum(lr, 0))
        tl.store(at + 2 * programs, tl.sum(sum_f, 0))
        tl.store(at + 3 * programs, tl.sum(sum_r, 0))
        tl.store(at + 4 * programs, tl.sum(sf, 0))
        tl.store(at + 5 * programs, tl.sum(sr, 0))
        tl.store(at + 6 * programs, tl.sum(above, 0))
        tl.store(at + 7 * programs, tl.sum(below, 0))


@triton.jit
def sum_of(partial, row, programs, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    return tl.sum(tl.load(partial + row * programs + i, mask=i < programs, other=0.0), 0)


# Bound: 32 bytes a program of the first launch: a launch.
@triton.jit
def gan_loss_merge_kernel(partial, loss, statistics, programs, inv_n, inv_m, BLOCK: tl.constexpr):
    write_loss(
        loss, statistics, sum_of(partial, 0, programs, BLOCK), sum_of(partial, 1, programs, BLOCK),
        sum_of(partial, 2, programs, BLOCK), sum_of(partial, 3, programs, BLOCK), sum_of(partial, 4, programs, BLOCK),
        sum_of(partial, 5, programs, BLOCK), sum_of(partial, 6, programs, BLOCK), sum_of(partial, 7, programs, BLOCK),
        inv_n, inv_m,
    )  # fmt: skip  # by kind, and Triton takes no *arguments


# Bound: 2 accesses a logit.
@triton.jit
def gan_loss_backward_kernel(
    dloss, fake, real, dfake, dreal, n, m, smoothing, inv_n, inv_m,
    KIND: tl.constexpr, SIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip  # by kind: tensors, sizes, constants
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    scale = tl.load(dloss).to(tl.float32)
    f = tl.load(fake + i, mask=i < n, other=0.0).to(tl.float32)
    r = tl.zeros((BLOCK,), tl.float32)
    if real is not None:
        r = tl.load(real + i, mask=i < m, other=0.0).to(tl.float32)
    to_f, to_r = loss_slopes(f, r, smoothing, KIND, SIDE)
    tl.store(dfake + i, (scale * (to_f * inv_n)).to(dfake.dtype.element_ty), mask=i < n)
    if real is not None:
        tl.store(dreal + i, (scale * (to_r * inv_m)).to(dreal.dtype.element_ty), mask=i < m)


# Bound: 3 accesses a logit.
@triton.jit
def gan_loss_double_backward_kernel(
    ddfake, ddreal, dloss, fake, real, out, d_fake, d_real, n, m, each, smoothing, inv_n, inv_m,
    KIND: tl.constexpr, SIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip  # by kind: tensors, sizes, constants
    """From the cotangents of dfake and dreal, `each` logits a program: out [programs] sums dd L', the rest dd L''."""
    first = tl.program_id(0) * each
    scale = tl.load(dloss).to(tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(first, tl.minimum(first + each, tl.maximum(n, m)), BLOCK):
        i = start + tl.arange(0, BLOCK)
        f = tl.load(fake + i, mask=i < n, other=0.0).to(tl.float32)
        u = tl.load(ddfake + i, mask=i < n, other=0.0).to(tl.float32)
        r = tl.zeros((BLOCK,), tl.float32)
        v = tl.zeros((BLOCK,), tl.float32)
        if real is not None and (SIDE == "d" or KIND == "relativistic"):
            r = tl.load(real + i, mask=i < m, other=0.0).to(tl.float32)
            v = tl.load(ddreal + i, mask=i < m, other=0.0).to(tl.float32)
        to_f, to_r = loss_slopes(f, r, smoothing, KIND, SIDE)
        total += u * to_f * inv_n + v * to_r * inv_m
        if KIND == "relativistic":
            bent_f = (u - v) * curve(f - r, KIND, SIDE) * inv_n
            bent_r = -bent_f
        else:
            bent_f = u * curve(f, KIND, SIDE) * inv_n
            bent_r = v * curve(r, KIND, SIDE) * inv_m
        tl.store(d_fake + i, (scale * bent_f).to(d_fake.dtype.element_ty), mask=i < n)
        if real is not None:
            tl.store(d_real + i, (scale * bent_r).to(d_real.dtype.element_ty), mask=i < m)
    tl.store(out + tl.program_id(0), tl.sum(total, 0))


# Bound: 4 bytes a program of the first launch: a launch.
@triton.jit
def gan_loss_double_backward_merge_kernel(partial, d_dloss, programs, BLOCK: tl.constexpr):
    tl.store(d_dloss, sum_of(partial, 0, programs, BLOCK))


def _programs(n, m):
    """(programs, logits of each): as many programs as the merging one can sum at once."""
    longer = max(n, m)
    each = ALONE if longer <= ALONE else triton.cdiv(triton.cdiv(longer, BLOCK), 512) * BLOCK
    return triton.cdiv(longer, each), each


def _counts(fake, real):
    n, m = fake.numel(), 0 if real is None else real.numel()
    return n, m, 1.0 / n, 1.0 / max(m, 1)


def _forward(fake, real, kind, side, smoothing, want_statistics):
    fake, real = fake.contiguous(), None if real is None else real.contiguous()
    n, m, inv_n, inv_m = _counts(fake, real)
    loss, statistics = fake.new_empty(()), fake.new_empty(6 if want_statistics else 0, dtype=torch.float32)
    made = loss, statistics if want_statistics else None
    programs, each = _programs(n, m)
    partial = None if programs == 1 else fake.new_empty(SUMS, programs, dtype=torch.float32)
    sizes, factors = (n, m, each, programs), (float(smoothing), inv_n, inv_m)
    tensors, constants = (fake, real, *made, partial), {"KIND": kind, "SIDE": side, "BLOCK": BLOCK}
    launch(gan_loss_kernel, programs, *tensors, *sizes, *factors, **constants)
    if partial is not None:
        block = power_of_2(programs)
        launch(gan_loss_merge_kernel, 1, partial, *made, programs, inv_n, inv_m, BLOCK=block)
    return loss, statistics


def _backward(dloss, fake, real, kind, side, smoothing):
    fake, real = fake.contiguous(), None if real is None else real.contiguous()
    n, m, inv_n, inv_m = _counts(fake, real)
    dfake = torch.empty_like(fake)
    dreal = fake.new_empty(0) if real is None else torch.empty_like(real)
    tensors, constants = (dloss, fake, real, dfake, dreal), {"KIND": kind, "SIDE": side, "BLOCK": BLOCK}
    programs, factors = triton.cdiv(max(n, m), BLOCK), (float(smoothing), inv_n, inv_m)
    launch(gan_loss_backward_kernel, programs, *tensors, n, m, *factors, **constants)
    return dfake, dreal


def _double_backward(ddfake, ddreal, dloss, fake, real, kind, side, smoothing):
    ddfake, fake = ddfake.contiguous(), fake.contiguous()
    ddreal, real = (None if t is None else t.contiguous() for t in (ddreal, real))
    n, m, inv_n, inv_m = _counts(fake, real)
    d_dloss, d_fake = fake.new_empty((), dtype=torch.float32), torch.empty_like(fake)
    d_real = fake.new_empty(0) if real is None else torch.empty_like(real)
    programs, each = _programs(n, m)
    out = d_dloss if programs == 1 else fake.new_empty(programs, dtype=torch.float32)
    tensors = ddfake, ddreal, dloss, fake, real, out, d_fake, d_real
    factors, constants = (float(smoothing), inv_n, inv_m), {"KIND": kind, "SIDE": side, "BLOCK": BLOCK}
    launch(gan_loss_double_backward_kernel, programs, *tensors, n, m, each, *factors, **constants)
    if programs > 1:
        launch(gan_loss_double_backward_merge_kernel, 1, out, d_dloss, programs, BLOCK=power_of_2(programs))
    return d_dloss, d_fake, d_real


def _declines(fake, real, kind, side):
    if real is None and (side == "d" or kind == "relativistic"):
        return "triton kernels take this loss with real logits only"
    if max(fake.numel(), 0 if real is None else real.numel()) > 2**30:
        return "triton kernels count logits in 32 bits, got more than 2^30"
    return declines(fake, real)


LAUNCHERS = {
    "gan_loss": Backend(_forward, lambda fake, real, kind, side, *rest: _declines(fake, real, kind, side)),
    "gan_loss_backward": Backend(
        _backward, lambda dloss, fake, real, kind, side, smoothing: _declines(fake, real, kind, side)
    ),
    "gan_loss_double_backward": Backend(
        _double_backward,
        lambda ddfake, ddreal, dloss, fake, real, kind, side, smoothing: (
            _declines(fake, real, kind, side) or declines(ddfake, ddreal)
        ),
    ),
}


def static_cases():
    """One launch, two launches (a PatchGAN's logits), hinge's without statistics, the backward and its own."""
    return recorded(
        run
        for dtype in FLOATS
        for shape in ((128,), (128, 1, 30, 30))
        for kind, side in (("bce", "d"), ("bce", "g"), ("hinge", "d"), ("relativistic", "d"))
        for x, one in [(meta(shape, dtype), meta((), dtype))]
        for run in (
            lambda x=x, kind=kind, side=side: _forward(x, x, kind, side, 0.1, kind != "hinge"),
            lambda x=x, one=one, kind=kind, side=side: _backward(one, x, x, kind, side, 0.1),
            lambda x=x, one=one, kind=kind, side=side: _double_backward(x, x, one, x, x, kind, side, 0.1),
        )
    )
