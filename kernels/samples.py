"""How kernels with one coefficient a sample cut an [N, *] tensor: a dense sample is one run in both layouts."""

from __future__ import annotations

import triton
import triton.language as tl

from fastgan.kernels.launching import TILE, power_of_2


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


def sample_blocks(n: int, m: int) -> tuple[int, dict[str, int]]:
    """(programs, BLOCK_N and BLOCK_M)."""
    block_m = min(power_of_2(m), TILE)
    block_n = min(power_of_2(n), TILE // block_m)
    return triton.cdiv(n, block_n) * triton.cdiv(m, block_m), {"BLOCK_N": block_n, "BLOCK_M": block_m}
