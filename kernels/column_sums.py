"""Sums over the rows of small matrices of partial sums: the last step of every reduction over the batch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgan.kernels.launching import launch, tile


# Bound: R C reads, one flop each; R is at most a few hundred, so the launch is what it costs.
@triton.jit
def column_sums_kernel(partial, other, total, other_total, R, C, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """total[c] = sum over r of partial[r, c], in the order of r; the same of `other`, where there is one."""
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    sums = tl.zeros((BLOCK_C,), tl.float32)
    other_sums = tl.zeros((BLOCK_C,), tl.float32)
    for start in range(0, R, BLOCK_R):
        r = start + tl.arange(0, BLOCK_R)
        at = r[:, None] * C + c[None, :]
        mask = (r < R)[:, None] & (c < C)[None, :]
        sums += tl.sum(tl.load(partial + at, mask=mask, other=0.0), 0)
        if other is not None:
            other_sums += tl.sum(tl.load(other + at, mask=mask, other=0.0), 0)
    tl.store(total + c, sums, mask=c < C)
    if other is not None:
        tl.store(other_total + c, other_sums, mask=c < C)


def column_sums(partial: Tensor, other: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """[R, C] -> [C], of one float32 matrix or of two of one shape; a single row is its own sum."""
    rows, c = partial.shape
    if rows == 1:
        return partial.squeeze(0), None if other is None else other.squeeze(0)
    total = partial.new_empty(c)
    other_total = None if other is None else torch.empty_like(total)
    block_r, block_c = tile(rows, c, 1, True)
    tensors, constants = (partial, other, total, other_total), {"BLOCK_R": block_r, "BLOCK_C": block_c}
    launch(column_sums_kernel, triton.cdiv(c, block_c), *tensors, rows, c, **constants)
    return total, other_total
