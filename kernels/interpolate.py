"""Triton kernel of `interpolate`: one pass."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastgan._layout import dense, is_channels_last
from fastgan.backends import Backend
from fastgan.kernels.launching import FLOATS, declines, launch, meta, recorded, wide
from fastgan.kernels.samples import sample_blocks, sample_tile


# Bound: 3 accesses and 3 flops an element: memory on every card.
@triton.jit
def interpolate_kernel(
    real, fake, epsilon, y, N, M, WIDE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr
):  # fmt: skip
    """y = fake + e (real - fake), from the nearer end, as torch.lerp has it."""
    n, at, mask = sample_tile(N, M, WIDE, BLOCK_N, BLOCK_M)
    e = tl.load(epsilon + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
    r = tl.load(real + at, mask=mask, other=0.0).to(tl.float32)
    f = tl.load(fake + at, mask=mask, other=0.0).to(tl.float32)
    mixed = tl.where(e < 0.5, f + e * (r - f), r - (r - f) * (1.0 - e))
    tl.store(y + at, mixed.to(y.dtype.element_ty), mask=mask)


def _forward(real, fake, epsilon):
    channels_last = is_channels_last(real)
    real, fake = dense(real, channels_last), dense(fake, channels_last)
    y = torch.empty_like(real)
    n, m = len(real), real.numel() // len(real)
    programs, blocks = sample_blocks(n, m)
    launch(interpolate_kernel, programs, real, fake, epsilon.contiguous(), y, n, m, WIDE=wide(real), **blocks)
    return y


def _declines(real, fake, epsilon):
    return declines(real, fake) or ("" if epsilon.dtype in FLOATS else f"epsilon is {epsilon.dtype}")


LAUNCHERS = {"interpolate": Backend(_forward, _declines)}


def static_cases():
    """A batch of images, and 2^31 elements."""
    return recorded(
        lambda x=x, e=e: _forward(x, x, e)
        for dtype in FLOATS
        for shape in ((64, 3, 64, 64), (4096, 3, 512, 512))
        for x, e in [(meta(shape, dtype), meta(shape[:1], torch.float32))]
    )
