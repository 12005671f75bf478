"""Attention, differentiable twice in memory that is linear in the number of keys."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastgan._layout import accumulation_dtype
from fastgan.ops import attention as _attention


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """torch.nn.functional.scaled_dot_product_attention, differentiable twice; a row that sees no key gives zeros.

    Args:
        query: [N, ..., heads, L, d], floating.
        key: [N, ..., heads, S, d].
        value: [N, ..., heads, S, e].
        attn_mask: broadcast against [N, ..., heads, L, S]: bool (True: the key is seen), or floating, added to the
            scores. A floating mask may require a gradient, which takes memory of [1 or N, 1 or heads, L, S].
        dropout_p: of the probabilities. Above 0 the plain formula runs, whose memory is quadratic.
        is_causal: row i sees the keys 0 to i. Excludes attn_mask, as in torch.
        scale: of the scores; None: d^(-1/2).
        enable_gqa: key and value have fewer heads, each serving heads / their heads of query's in a row.

    Returns:
        [N, ..., heads, L, e], in query's dtype.

    Raises:
        ValueError: shapes do not fit, or is_causal comes with attn_mask.
        TypeError: dtypes differ, or attn_mask is neither bool nor floating.
        NotImplementedError: a third derivative is asked for.
    """
    _check(query, key, value, attn_mask, is_causal, enable_gqa)
    if enable_gqa:
        shared = query.shape[-3] // key.shape[-3]
        key, value = (t.repeat_interleave(shared, -3) for t in (key, value))
    scale = 1.0 / math.sqrt(max(query.shape[-1], 1)) if scale is None else float(scale)
    bias = _additive(attn_mask, query)
    if dropout_p > 0.0:
        return _plain_with_dropout(query, key, value, bias, dropout_p, is_causal, scale)
    lead = torch.broadcast_shapes(*(t.shape[:-2] for t in (query, key, value)))
    q, k, v = (_four(t.expand(*lead, *t.shape[-2:])) for t in (query, key, value))
    if bias is not None and len(lead) > 2 and bias.dim() > 3:
        bias = _four(bias.expand(*lead, *bias.shape[-2:]))
    elif bias is not None and len(lead) == 1 and bias.dim() == 3:
        bias = bias.unsqueeze(1)  # q became [N, 1, L, d]
    y, _ = _attention.op(q, k, v, bias, bool(is_causal), scale)
    return y.reshape(*lead, *y.shape[-2:])


def l2_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
    is_causal: bool = False,
) -> Tensor:
    """Attention by distance: softmax over the keys of -scale |q - k|^2, times the values.

    Its Lipschitz constant is bounded where query and key come from one projection (Kim et al., The Lipschitz Constant
    of Self-Attention, 2021), which is why the discriminators of ViTGAN and GigaGAN take it. |q|^2 is the same for all
    keys of a row, so the scores are 2 scale q k - scale |k|^2: the product of (2 q, -1) and (k, |k|^2), by the kernels
    of `scaled_dot_product_attention`, with its derivatives. Heads are longer by one element there, by two in 16 bits.
    Both are taken from the keys' mean first, which changes no distance: with an offset of 10 deviations the second
    derivatives in float32 would otherwise lose three digits.

    Args:
        query: [N, ..., heads, L, d], floating.
        key: [N, ..., heads, S, d].
        value: [N, ..., heads, S, e].
        attn_mask: as for scaled_dot_product_attention.
        scale: None: d^(-1/2).
        is_causal: row i sees the keys 0 to i. Excludes attn_mask.

    Returns:
        [N, ..., heads, L, e], in query's dtype.

    Raises:
        ValueError, TypeError, NotImplementedError: as scaled_dot_product_attention.
    """
    _check(query, key, value, attn_mask, is_causal, False)
    scale = 1.0 / math.sqrt(max(query.shape[-1], 1)) if scale is None else float(scale)
    middle = key.detach().mean(-2, keepdim=True)
    query, key = query - middle, key - middle
    norms = _in_parts(key.to(accumulation_dtype(key.dtype)).square().sum(-1, keepdim=True), key.dtype)
    longer = torch.cat([2 * query, *(-torch.ones_like(query[..., :1]) for _ in norms)], -1)
    return scaled_dot_product_attention(longer, torch.cat([key, *norms], -1), value, attn_mask, 0.0, is_causal, scale)


def _in_parts(t: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """Tensors of `dtype` whose sum is t: two of 16 bits, since one bfloat16 would lose 0.25 of a norm of 64."""
    first = t.to(dtype)
    return [first] if t.dtype == dtype else [first, (t - first).to(dtype)]


def _check(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, gqa: bool) -> None:
    """What must hold of the arguments, in one sentence each."""
    name, shapes = "scaled_dot_product_attention", [tuple(t.shape) for t in (q, k, v)]
    if min(t.dim() for t in (q, k, v)) < 2:
        raise ValueError(f"{name}: query, key and value must be [N, ..., L, d], got shapes {shapes}")
    if not q.is_floating_point() or k.dtype != q.dtype or v.dtype != q.dtype:
        raise TypeError(
            f"{name}: query, key and value must be of one floating dtype, got {q.dtype}, {k.dtype} and {v.dtype}"
        )
    if q.shape[-1] != k.shape[-1] or k.shape[-2] != v.shape[-2]:
        raise ValueError(
            f"{name}: query and key must agree in their last size, key and value in the one before it, got {shapes}"
        )
    if mask is not None and causal:
        raise ValueError(f"{name}: attn_mask must be None where is_causal is True, got both; put one into the other")
    if mask is not None and mask.dtype != torch.bool and not mask.is_floating_point():
        raise TypeError(f"{name}: attn_mask must be bool or floating, got {mask.dtype}")
    if gqa and (min(q.dim(), k.dim(), v.dim()) < 3 or k.shape[-3] != v.shape[-3] or q.shape[-3] % k.shape[-3]):
        raise ValueError(f"{name}: with enable_gqa the heads of key and value must divide query's, got {shapes}")
    try:
        lead = q.shape[:-2] if gqa else torch.broadcast_shapes(*(t.shape[:-2] for t in (q, k, v)))
    except RuntimeError as error:
        raise ValueError(f"{name}: the leading sizes must broadcast against each other, got {shapes}") from error
    scores = (*lead, q.shape[-2], k.shape[-2])
    if mask is not None and not _broadcasts(mask.shape, scores):
        raise ValueError(f"{name}: attn_mask must broadcast against {scores}, got {tuple(mask.shape)}")


def _broadcasts(shape: torch.Size, scores: tuple[int, ...]) -> bool:
    return len(shape) <= len(scores) and all(
        a in (1, b) for a, b in zip(reversed(shape), reversed(scores), strict=False)
    )


def _additive(mask: Tensor | None, query: Tensor) -> Tensor | None:
    """A bool mask as 0 and -inf, in its own shape."""
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=query.dtype).masked_fill_(~mask, float("-inf"))


def _four(t: Tensor) -> Tensor:
    """[..., L, d] as [N, heads, L, d]."""
    if t.dim() == 4:
        return t
    if t.dim() < 4:
        return t.unsqueeze(1) if t.dim() == 3 else t[None, None]
    return t.flatten(0, -4)


def _plain_with_dropout(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, p: float, causal: bool, scale: float
) -> Tensor:
    s = q @ k.mT * scale
    s = s if bias is None else s + bias
    s = s.masked_fill(torch.ones_like(s, dtype=torch.bool).triu(1), float("-inf")) if causal else s
    empty = (s == float("-inf")).all(-1, keepdim=True)
    probabilities = torch.softmax(s.masked_fill(empty, 0.0), -1).masked_fill(empty, 0.0)
    return torch.dropout(probabilities, p, True) @ v
