"""Triton kernels of `attention` and its derivatives: no more of the scores than a tile is ever in memory.

A program owns rows (forward, dq, d_q and d_dy with the row sums before them) or keys (dk and dv, d_k and d_v) and walks
over the others, so that nothing is added from two programs. Of the double backward's twelve products ten are computed
twice: 22 in all. Products of 16-bit tensors have 16-bit operands and float32 sums; those of float32 are exact.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastgan.choice import Backend
from fastgan.kernels.configs import capability
from fastgan.kernels.launching import FLOATS, declines, launch, meta, power_of_2, recorded
from fastgan.ops.attention import bias_gradient_shape, placed, whole_bias

LONGEST_BLOCK = 64  # rows or keys of a tile


# ---- device functions -----------------------------------------------------------------------------------------------


@triton.jit
def head_tile(head, rows, count, width, BLOCK: tl.constexpr):
    """Rows of a dense [count, width] head, zeros beyond it: [rows, BLOCK]."""
    c = tl.arange(0, BLOCK)
    mask = (rows < count)[:, None] & (c < width)[None, :]
    return tl.load(head + rows[:, None] * width + c[None, :], mask=mask, other=0.0)


@triton.jit
def put_tile(head, values, rows, count, width, BLOCK: tl.constexpr):
    c = tl.arange(0, BLOCK)
    mask = (rows < count)[:, None] & (c < width)[None, :]
    tl.store(head + rows[:, None] * width + c[None, :], values.to(head.dtype.element_ty), mask=mask)


@triton.jit
def square_at(z, i, j, L, S):
    """(offsets, mask) of a tile of a dense [Z, L, S] tensor."""
    at = (z.to(tl.int64) * L + i)[:, None] * S + j[None, :]
    return at, (i < L)[:, None] & (j < S)[None, :]


@triton.jit
def put_square(square, values, z, i, j, L, S):
    """Nothing where there is no such tensor. Elements that a causal row does not see are left to the launcher."""
    if square is not None:
        at, mask = square_at(z, i, j, L, S)
        tl.store(square + at, values, mask=mask)


@triton.jit
def product(a, b, PRECISION: tl.constexpr):
    """a b in float32, a rounded to b's dtype."""
    return tl.dot(a.to(b.dtype), b, input_precision=PRECISION)


@triton.jit
def scores(q, k, i, j, bias, bias_row, L, S, scale, CAUSAL: tl.constexpr, PRECISION: tl.constexpr):
    """scale q k^T + bias of rows i and keys j, -inf where a row does not see a key. bias: of the head."""
    s = product(q, tl.trans(k), PRECISION) * scale
    seen = (i < L)[:, None] & (j < S)[None, :]
    if bias is not None:
        s += tl.load(bias + i.to(tl.int64)[:, None] * bias_row + j[None, :], mask=seen, other=0.0).to(tl.float32)
    if CAUSAL:
        seen = seen & (j[None, :] <= i[:, None])
    return tl.where(seen, s, float("-inf"))


@triton.jit
def bias_of(bias, z, H, bias_n, bias_h):
    """The bias of head z, counted n H + h, or None."""
    if bias is None:
        head = None
    else:
        head = bias + (z // H).to(tl.int64) * bias_n + (z % H).to(tl.int64) * bias_h
    return head


@triton.jit
def block_of(count, BLOCK: tl.constexpr):
    """(head, the block's rows or keys) of this program."""
    blocks = tl.cdiv(count, BLOCK)
    return tl.program_id(0) // blocks, (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)


# ---- forward --------------------------------------------------------------------------------------------------------


# Bound: 2 (d + e) flops an element of [N, H, L, S]: the tensor cores from a few dozen keys on.
@triton.jit
def attention_kernel(
    q, k, v, bias, y, lse, H, L, S, d, e, bias_n, bias_h, bias_row, scale,
    CAUSAL: tl.constexpr, PRECISION: tl.constexpr, BLOCK: tl.constexpr, D: tl.constexpr, E: tl.constexpr,
):  # fmt: skip  # the arguments by kind
    z, i = block_of(L, BLOCK)
    at = z.to(tl.int64)
    q_tile = head_tile(q + at * L * d, i, L, d, D)
    bias = bias_of(bias, z, H, bias_n, bias_h)
    highest = tl.full((BLOCK,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    acc = tl.zeros((BLOCK, E), tl.float32)
    end = tl.minimum(S, tl.max(i, 0) + 1) if CAUSAL else S
    for start in range(0, end, BLOCK):
        j = start + tl.arange(0, BLOCK)
        s = scores(q_tile, head_tile(k + at * S * d, j, S, d, D), i, j, bias, bias_row, L, S, scale, CAUSAL, PRECISION)
        above = tl.maximum(highest, tl.max(s, 1))
        origin = tl.where(above == float("-inf"), 0.0, above)
        p = tl.exp(s - origin[:, None])
        shrink = tl.exp(highest - origin)
        total = total * shrink + tl.sum(p, 1)
        acc = acc * shrink[:, None] + product(p, head_tile(v + at * S * e, j, S, e, E), PRECISION)
        highest = above
    empty = total == 0.0
    put_tile(y + at * L * e, acc / tl.where(empty, 1.0, total)[:, None], i, L, e, E)
    tl.store(lse + at * L + i, tl.where(empty, 0.0, highest + tl.log(tl.where(empty, 1.0, total))), mask=i < L)


# ---- backward -------------------------------------------------------------------------------------------------------


@triton.jit
def probabilities(q, k, i, j, bias, bias_row, lse, L, S, scale, CAUSAL: tl.constexpr, PRECISION: tl.constexpr):
    return tl.exp(scores(q, k, i, j, bias, bias_row, L, S, scale, CAUSAL, PRECISION) - lse[:, None])


# Bound: as attention_kernel's, 3 products of the backward's 7 here and 4 in the next.
@triton.jit
def attention_rows_kernel(
    dy, q, k, v, bias, y, lse, dq, delta, dbias, H, L, S, d, e, bias_n, bias_h, bias_row, scale,
    CAUSAL: tl.constexpr, PRECISION: tl.constexpr, BLOCK: tl.constexpr, D: tl.constexpr, E: tl.constexpr,
):  # fmt: skip  # the arguments by kind
    """dq, and delta = <dy, y> of each row for the keys' kernel."""
    z, i = block_of(L, BLOCK)
    at = z.to(tl.int64)
    q_tile, dy_tile = head_tile(q + at * L * d, i, L, d, D), head_tile(dy + at * L * e, i, L, e, E)
    y_tile = head_tile(y + at * L * e, i, L, e, E)
    row_delta = tl.sum(dy_tile.to(tl.float32) * y_tile.to(tl.float32), 1)
    tl.store(delta + at * L + i, row_delta, mask=i < L)
    row_lse = tl.load(lse + at * L + i, mask=i < L, other=0.0)
    bias = bias_of(bias, z, H, bias_n, bias_h)
    acc = tl.zeros((BLOCK, D), tl.float32)
    end = tl.minimum(S, tl.max(i, 0) + 1) if CAUSAL else S
    for start in range(0, end, BLOCK):
        j = start + tl.arange(0, BLOCK)
        k_tile = head_tile(k + at * S * d, j, S, d, D)
        p = probabilities(q_tile, k_tile, i, j, bias, bias_row, row_lse, L, S, scale, CAUSAL, PRECISION)
        dp = product(dy_tile, tl.trans(head_tile(v + at * S * e, j, S, e, E)), PRECISION)
        ds = p * (dp - row_delta[:, None])
        put_square(dbias, ds, z, i, j, L, S)
        acc += product(ds, k_tile, PRECISION)
    put_tile(dq + at * L * d, acc * scale, i, L, d, D)


@triton.jit
def attention_keys_kernel(
    dy, q, k, v, bias, lse, delta, dk, dv, H, L, S, d, e, bias_n, bias_h, bias_row, scale,
    CAUSAL: tl.constexpr, PRECISION: tl.constexpr, BLOCK: tl.constexpr, D: tl.constexpr, E: tl.constexpr,
):  # fmt: skip  # the arguments by kind
    z, j = block_of(S, BLOCK)
    at = z.to(tl.int64)
    k_tile, v_tile = head_tile(k + at * S * d, j, S, d, D), head_tile(v + at * S * e, j, S, e, E)
    bias = bias_of(bias, z, H, bias_n, bias_h)
    of_k, of_v = tl.zeros((BLOCK, D), tl.float32), tl.zeros((BLOCK, E), tl.float32)
    begin = tl.min(j, 0) // BLOCK * BLOCK if CAUSAL else 0
    for start in range(begin, L, BLOCK):
        i = start + tl.arange(0, BLOCK)
        q_tile, dy_tile = head_tile(q + at * L * d, i, L, d, D), head_tile(dy + at * L * e, i, L, e, E)
        row_lse = tl.load(lse + at * L + i, mask=i < L, other=0.0)
        row_delta = tl.load(delta + at * L + i, mask=i < L, other=0.0)
        p = probabilities(q_tile, k_tile, i, j, bias, bias_row, row_lse, L, S, scale, CAUSAL, PRECISION)
        ds = p * (product(dy_tile, tl.trans(v_tile), PRECISION) - row_delta[:, None])
        of_v += product(tl.trans(p), dy_tile, PRECISION)
        of_k += product(tl.trans(ds), q_tile, PRECISION)
    put_tile(dk + at * S * d, of_k * scale, j, S, d, D)
    put_tile(dv + at * S * e, of_v, j, S, e, E)


# ---- double backward ------------------------------------------------------------------------------------------------


@triton.jit
def cotangents(q, ddq, dy, k, ddk, v, ddv, ddbias, z, i, j, L, S, scale, PRECISION: tl.constexpr):
    """(dp, a, c) of a tile, as docs/maths.md names them."""
    dp, c = product(dy, tl.trans(v), PRECISION), product(dy, tl.trans(ddv), PRECISION)
    a = (product(ddq, tl.trans(k), PRECISION) + product(q, tl.trans(ddk), PRECISION)) * scale
    if ddbias is not None:
        at, mask = square_at(z, i, j, L, S)
        a += tl.load(ddbias + at, mask=mask, other=0.0)
    return dp, a, c


# Bound: as attention_kernel's: 5 products for the row sums, then 9.
@triton.jit
def attention_double_rows_kernel(
    dy, ddq, ddk, ddv, q, k, v, bias, ddbias, lse, d_dy, d_q, sums, d_bias,
    H, L, S, d, e, bias_n, bias_h, bias_row, scale,
    CAUSAL: tl.constexpr, PRECISION: tl.constexpr, BLOCK: tl.constexpr, D: tl.constexpr, E: tl.constexpr,
):  # fmt: skip  # the arguments by kind
    """d_dy and d_q, and the rows' alpha, delta and alpha delta - gamma, [Z, 3, L], for the keys' kernel."""
    z, i = block_of(L, BLOCK)
    at = z.to(tl.int64)
    q_tile, ddq_tile = head_tile(q + at * L * d, i, L, d, D), head_tile(ddq + at * L * d, i, L, d, D)
    dy_tile = head_tile(dy + at * L * e, i, L, e, E)
    row_lse = tl.load(lse + at * L + i, mask=i < L, other=0.0)
    bias = bias_of(bias, z, H, bias_n, bias_h)
    alpha, delta = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    gamma = tl.zeros((BLOCK,), tl.float32)
    end = tl.minimum(S, tl.max(i, 0) + 1) if CAUSAL else S
    for start in range(0, end, BLOCK):
        j = start + tl.arange(0, BLOCK)
        k_tile, ddk_tile = head_tile(k + at * S * d, j, S, d, D), head_tile(ddk + at * S * d, j, S, d, D)
        v_tile, ddv_tile = head_tile(v + at * S * e, j, S, e, E), head_tile(ddv + at * S * e, j, S, e, E)
        p = probabilities(q_tile, k_tile, i, j, bias, bias_row, row_lse, L, S, scale, CAUSAL, PRECISION)
        dp, a, c = cotangents(
            q_tile, ddq_tile, dy_tile, k_tile, ddk_tile, v_tile, ddv_tile, ddbias, z, i, j, L, S, scale, PRECISION
        )
        alpha += tl.sum(p * a, 1)
        delta += tl.sum(p * dp, 1)
        gamma += tl.sum(p * (a * dp + c), 1)
    shift = alpha * delta - gamma
    tl.store(sums + at * 3 * L + i, alpha, mask=i < L)
    tl.store(sums + at * 3 * L + L + i, delta, mask=i < L)
    tl.store(sums + at * 3 * L + 2 * L + i, shift, mask=i < L)
    of_q, of_dy = tl.zeros((BLOCK, D), tl.float32), tl.zeros((BLOCK, E), tl.float32)
    for start in range(0, end, BLOCK):
        j = start + tl.arange(0, BLOCK)
        k_tile, ddk_tile = head_tile(k + at * S * d, j, S, d, D), head_tile(ddk + at * S * d, j, S, d, D)
        v_tile, ddv_tile = head_tile(v + at * S * e, j, S, e, E), head_tile(ddv + at * S * e, j, S, e, E)
        p = probabilities(q_tile, k_tile, i, j, bias, bias_row, row_lse, L, S, scale, CAUSAL, PRECISION)
        dp, a, c = cotangents(
            q_tile, ddq_tile, dy_tile, k_tile, ddk_tile, v_tile, ddv_tile, ddbias, z, i, j, L, S, scale, PRECISION
        )
        a, dp = a - alpha[:, None], dp - delta[:, None]
        of_dy += product(p * a, v_tile, PRECISION) + product(p, ddv_tile, PRECISION)
        r = p * (a * dp + c + shift[:, None])
        put_square(d_bias, r, z, i, j, L, S)
        of_q += product(r, k_tile, PRECISION) + product(p * dp, ddk_tile, PRECISION)
    put_tile(d_dy + at * L * e, of_dy, i, L, e, E)
    put_tile(d_q + at * L * d, of_q * scale, i, L, d, D)


@triton.jit
def attention_double_keys_kernel(
    dy, ddq, ddk, ddv, q, k, v, bias, ddbias, lse, sums, d_k, d_v, H, L, S, d, e, bias_n, bias_h, bias_row, scale,
    CAUSAL: tl.constexpr, PRECISION: tl.constexpr, BLOCK: tl.constexpr, D: tl.constexpr, E: tl.constexpr,
):  # fmt: skip  # the arguments by kind
    z, j = block_of(S, BLOCK)
    at = z.to(tl.int64)
    k_tile, ddk_tile = head_tile(k + at * S * d, j, S, d, D), head_tile(ddk + at * S * d, j, S, d, D)
    v_tile, ddv_tile = head_tile(v + at * S * e, j, S, e, E), head_tile(ddv + at * S * e, j, S, e, E)
    bias = bias_of(bias, z, H, bias_n, bias_h)
    of_k, of_v = tl.zeros((BLOCK, D), tl.float32), tl.zeros((BLOCK, E), tl.float32)
    begin = tl.min(j, 0) // BLOCK * BLOCK if CAUSAL else 0
    for start in range(begin, L, BLOCK):
        i = start + tl.arange(0, BLOCK)
        q_tile, ddq_tile = head_tile(q + at * L * d, i, L, d, D), head_tile(ddq + at * L * d, i, L, d, D)
        dy_tile = head_tile(dy + at * L * e, i, L, e, E)
        row_lse = tl.load(lse + at * L + i, mask=i < L, other=0.0)
        alpha = tl.load(sums + at * 3 * L + i, mask=i < L, other=0.0)
        delta = tl.load(sums + at * 3 * L + L + i, mask=i < L, other=0.0)
        shift = tl.load(sums + at * 3 * L + 2 * L + i, mask=i < L, other=0.0)
        p = probabilities(q_tile, k_tile, i, j, bias, bias_row, row_lse, L, S, scale, CAUSAL, PRECISION)
        dp, a, c = cotangents(
            q_tile, ddq_tile, dy_tile, k_tile, ddk_tile, v_tile, ddv_tile, ddbias, z, i, j, L, S, scale, PRECISION
        )
        a, dp = a - alpha[:, None], dp - delta[:, None]
        of_v += product(tl.trans(p * a), dy_tile, PRECISION)
        r = p * (a * dp + c + shift[:, None])
        of_k += product(tl.trans(r), q_tile, PRECISION) + product(tl.trans(p * dp), ddq_tile, PRECISION)
    put_tile(d_k + at * S * d, of_k * scale, j, S, d, D)
    put_tile(d_v + at * S * e, of_v, j, S, e, E)


# ---- launchers ------------------------------------------------------------------------------------------------------


def _geometry(q, k, v, bias, causal, scale, tiles):
    """(numbers, constants and options) of a launch; tiles: [BLOCK, d] operands that a program holds, which bound BLOCK.

    float32 is multiplied in three TF32 products, which keep its digits and four times bfloat16's registers: as FMAs a
    tile spilled 6 KB a thread on sm_80. No tile of a case that `_refuses` lets through spills there. Forward of heads
    of 128 has eight warps: with four, causal and with a bias, it spilled 24 bytes on sm_120, and a multiprocessor of
    sm_89 and sm_120 held four warps in place of eight. On AMD four warps of 64 lanes are 256 threads too: eight spilled
    28 bytes for heads of 128 on gfx942, and a multiprocessor held half as many programs.
    """
    d, e = power_of_2(max(q.shape[3], 16)), power_of_2(max(v.shape[3], 16))
    size = 8 if q.dtype == torch.float32 else 2
    block = min(LONGEST_BLOCK, power_of_2(max(q.shape[2], k.shape[2])), 32768 // (tiles * max(d, e) * size))
    strides = (0, 0, 0) if bias is None else bias.stride()[:3]
    numbers = q.shape[1], q.shape[2], k.shape[2], q.shape[3], v.shape[3], *strides, scale
    constants = {"CAUSAL": causal, "PRECISION": _precision(q), "BLOCK": max(16, block), "D": d, "E": e}
    few = block <= 16 or _on_amd(q) or (tiles == 2 and max(d, e) <= 64)
    return numbers, constants | {"num_warps": 4 if few else 8, "num_stages": 2 if tiles == 2 else 1}


def _on_amd(q):
    return capability(q.device).startswith("gfx")


def _precision(q):
    """Of float32's products; of no consequence for 16-bit operands, whose fragments "ieee" names."""
    return "ieee" if q.dtype != torch.float32 or _on_amd(q) else "tf32x3"


def _dense(*tensors):
    return [t.contiguous() for t in tensors]


def _programs(t, block):
    return t.shape[0] * t.shape[1] * triton.cdiv(t.shape[2], block)


def _placed(values, likes):
    """In the layouts of others, as the op's fake says."""
    return tuple(placed(t, like) for t, like in zip(values, likes, strict=True))


def _forward(q, k, v, bias, causal, scale):
    q_, k_, v_ = _dense(q, k, v)
    bias = whole_bias(bias, q, k)
    y, lse = q_.new_empty(*q.shape[:3], v.shape[3]), q_.new_empty(q.shape[:3], dtype=torch.float32)
    numbers, constants = _geometry(q, k, v, bias, causal, scale, 2)
    launch(attention_kernel, _programs(q, constants["BLOCK"]), q_, k_, v_, bias, y, lse, *numbers, **constants)
    return *_placed((y,), (q,)), lse


def _square(q, k, bias, asked):
    """[N,H,L,S] of zeros for a bias' gradient before it is summed, or None."""
    return q.new_zeros(*q.shape[:3], k.shape[2], dtype=torch.float32) if bias is not None and asked else None


def _summed(square, q, k, bias, asked):
    shape = bias_gradient_shape(q, k, bias, asked)
    return q.new_empty(shape, dtype=torch.float32) if square is None else square.sum_to_size(shape)


def _backward(dy, q, k, v, bias, y, lse, causal, scale, bias_gradient):
    dy_, q_, k_, v_, y_ = _dense(dy, q, k, v, y)
    whole, lse, square = whole_bias(bias, q, k), lse.contiguous(), _square(q, k, bias, bias_gradient)
    dq, dk, dv, delta = (torch.empty_like(t) for t in (q_, k_, v_, lse))
    numbers, constants = _geometry(q, k, v, whole, causal, scale, 4)
    programs = [_programs(t, constants["BLOCK"]) for t in (q, k)]
    rows = dy_, q_, k_, v_, whole, y_, lse, dq, delta, square
    launch(attention_rows_kernel, programs[0], *rows, *numbers, **constants)
    launch(attention_keys_kernel, programs[1], dy_, q_, k_, v_, whole, lse, delta, dk, dv, *numbers, **constants)
    return *_placed((dq, dk, dv), (q, k, v)), _summed(square, q, k, bias, bias_gradient)


def _double_backward(dy, ddq, ddk, ddv, ddbias, q, k, v, bias, lse, causal, scale, bias_gradient):
    given = [torch.zeros_like(t) if dd is None else dd for dd, t in ((ddq, q), (ddk, k), (ddv, v))]
    inputs = _dense(dy, *given, q, k, v)
    whole, lse, square = whole_bias(bias, q, k), lse.contiguous(), _square(q, k, bias, bias_gradient)
    if ddbias is not None:
        ddbias = ddbias.float().expand(*q.shape[:3], k.shape[2]).contiguous()
    d_dy, d_q, d_k, d_v = (torch.empty_like(inputs[n]) for n in (0, 4, 5, 6))
    sums = lse.new_empty(*q.shape[:2], 3, q.shape[2])
    numbers, constants = _geometry(q, k, v, whole, causal, scale, 8)
    programs = [_programs(t, constants["BLOCK"]) for t in (q, k)]
    inputs = *inputs, whole, ddbias, lse
    launch(attention_double_rows_kernel, programs[0], *inputs, d_dy, d_q, sums, square, *numbers, **constants)
    launch(attention_double_keys_kernel, programs[1], *inputs, sums, d_k, d_v, *numbers, **constants)
    return *_placed((d_dy, d_q, d_k, d_v), (dy, q, k, v)), _summed(square, q, k, bias, bias_gradient)


def _refuses(*tensors, float32=64):
    """float32: the longest heads of that type that do not spill."""
    longest = float32 if tensors[0].dtype == torch.float32 else 128
    if max(t.shape[3] for t in tensors) > longest:
        return f"triton kernels hold heads of at most {longest} elements of {tensors[0].dtype}"
    return declines(*tensors)


def _refuses_double(dy, ddq, ddk, ddv, ddbias, q, k, v, *rest):
    return _refuses(dy, *(t for t in (ddq, ddk, ddv) if t is not None), q, k, v, float32=32)


LAUNCHERS = {
    "attention": Backend(_forward, lambda q, k, v, *rest: _refuses(q, k, v)),
    "attention_backward": Backend(_backward, lambda dy, q, k, v, bias, y, *rest: _refuses(dy, q, k, v, y)),
    "attention_double_backward": Backend(_double_backward, _refuses_double),
}


def static_cases():
    """A discriminator's heads, and the longest ones, causal with a bias."""

    def runs(dtype, d, double, causal):
        x, u = (meta((8, 4, 1024, size), dtype) for size in (d, double))
        lse = meta((8, 4, 1024), torch.float32)
        bias = meta((4, 1024, 1024), dtype) if causal else None
        ddbias = meta((1, 4, 1024, 1024), torch.float32) if causal else None
        yield lambda: _forward(x, x, x, bias, causal, 0.125)
        yield lambda: _backward(x, x, x, x, bias, x, lse, causal, 0.125, causal)
        yield lambda: _double_backward(u, u, u, u, ddbias, u, u, u, bias, lse, causal, 0.125, causal)

    heads = {torch.float32: ((64, 32, False), (64, 32, True))}
    return recorded(
        run
        for dtype in FLOATS
        for d, double, causal in heads.get(dtype, ((64, 64, False), (128, 128, True)))
        for run in runs(dtype, d, double, causal)
    )
