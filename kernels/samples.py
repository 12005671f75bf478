"""How kernels with one coefficient a sample cut an [N, *] tensor: a dense sample is one run in both layouts."""

from __future__ import annotations

import triton
import triton.language as tl

from fastgan.kernels.launching import PROGRAMS, TILE, power_of_2

BLOCK = 2048  # elements that a reduction loads at once


@triton.jit
def sample_tile(N, M, WIDE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr):
    """(samples, offsets [BLOCK_N, BLOCK_M], mask) of this program's tile of an [N, M] matrix."""
    blocks = tl.cdiv(M, BLOCK_M)
    n = (tl.program_id(0) // blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    j = (tl.program_id(0) % blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask = (n < N)[:, None] & (j < M)[None, :]
    if WIDE:
        at = n.to(tl.int64)[:, None] * M + j[None, :]
    else:
        at = n[:, None] * M + j[None, :]
    return n, at, mask


@triton.jit
def sample_sum(x, y, n, chunk, M, each, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    """The sum of x y, or of x^2 where y is None, over elements [chunk each, (chunk + 1) each) of sample n of [N, M]."""
    start_of = n.to(tl.int64) * M if WIDE else n * M
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(chunk * each, tl.minimum((chunk + 1) * each, M), BLOCK):
        j = start + tl.arange(0, BLOCK)
        v = tl.load(x + start_of + j, mask=j < M, other=0.0).to(tl.float32)
        if y is None:
            total += v * v
        else:
            total += v * tl.load(y + start_of + j, mask=j < M, other=0.0).to(tl.float32)
    return tl.sum(total, 0)


@triton.jit
def merged_sum(partial, n, chunks, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    return tl.sum(tl.load(partial + n * chunks + i, mask=i < chunks, other=0.0), 0)


def sample_chunks(n: int, m: int) -> tuple[int, int, int]:
    """(chunks, elements of each, BLOCK) of a sample's sum: enough programs for a card, at most 1024 to merge."""
    each = triton.cdiv(triton.cdiv(m, BLOCK), min(triton.cdiv(PROGRAMS, n), 1024)) * BLOCK
    return triton.cdiv(m, each), each, BLOCK


def sample_blocks(n: int, m: int) -> tuple[int, dict[str, int]]:
    """(programs, BLOCK_N and BLOCK_M)."""
    block_m = min(power_of_2(m), TILE)
    block_n = min(power_of_2(n), TILE // block_m)
    return triton.cdiv(n, block_n) * triton.cdiv(m, block_m), {"BLOCK_N": block_n, "BLOCK_M": block_m}
