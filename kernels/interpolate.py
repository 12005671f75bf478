"""Triton kernel of `interpolate`: one pass, with one coefficient a sample or two."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastgan._layout import dense, is_channels_last
from fastgan.choice import Backend
from fastgan.kernels.launching import FLOATS, declines, launch, meta, recorded, wide
from fastgan.kernels.samples import sample_blocks, sample_tile


# Bound: 3 accesses and 3 flops an element: memory on every card.
@triton.jit
def interpolate_kernel(
    real, fake, epsilon, rest, y, N, M, WIDE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr
):  # fmt: skip  # by kind: tensors, sizes, constants
    """y = fake + e (real - fake), from the nearer end, as torch.lerp; or e real + rest fake, or e real alone."""
    n, at, mask = sample_tile(N, M, WIDE, BLOCK_N, BLOCK_M)
    e = tl.load(epsilon + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
    r = tl.load(real + at, mask=mask, other=0.0).to(tl.float32)
    mixed = e * r
    if fake is not None:
        f = tl.load(fake + at, mask=mask, other=0.0).to(tl.float32)
        if rest is not None:
            mixed += tl.load(rest + n, mask=n < N, other=0.0).to(tl.float32)[:, None] * f
        else:
            mixed = tl.where(e < 0.5, f + e * (r - f), r - (r - f) * (1.0 - e))
    tl.store(y + at, mixed.to(y.dtype.element_ty), mask=mask)


def _forward(real, fake, epsilon, rest):
    channels_last = is_channels_last(real)
    real, fake = dense(real, channels_last), None if fake is None else dense(fake, channels_last)
    y = torch.empty_like(real)
    n, m = len(real), real.numel() // len(real)
    programs, blocks = sample_blocks(n, m)
    epsilon, rest = epsilon.contiguous(), None if rest is None else rest.contiguous()
    launch(interpolate_kernel, programs, real, fake, epsilon, rest, y, n, m, WIDE=wide(real), **blocks)
    return y


def _declines(real, fake, epsilon, rest):
    odd = [str(c.dtype) for c in (epsilon, rest) if c is not None and c.dtype not in FLOATS]
    return declines(real, fake) or (f"a coefficient is {odd[0]}" if odd else "")


LAUNCHERS = {"interpolate": Backend(_forward, _declines)}


def static_cases():
    """A batch of images and 2^31 elements: mixed, summed with two coefficients, scaled."""
    return recorded(
        lambda x=x, e=e, fake=fake, rest=rest: _forward(x, x if fake else None, e, e if rest else None)
        for dtype in FLOATS
        for shape in ((64, 3, 64, 64), (4096, 3, 512, 512))
        for x, e in [(meta(shape, dtype), meta(shape[:1], torch.float32))]
        for fake, rest in ((True, False), (True, True), (False, False))
    )
