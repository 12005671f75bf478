"""torch's multi-head attention around attention that can be differentiated twice."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgan._op import is_observed
from fastgan.functional.attention import scaled_dot_product_attention
from fastgan.ops import attention as _attention


def multi_head_attention_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim_to_check: int,
    num_heads: int,
    in_proj_weight: Tensor | None,
    in_proj_bias: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    training: bool = True,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    use_separate_proj_weight: bool = False,
    q_proj_weight: Tensor | None = None,
    k_proj_weight: Tensor | None = None,
    v_proj_weight: Tensor | None = None,
    static_k: Tensor | None = None,
    static_v: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """torch.nn.functional.multi_head_attention_forward, what nn.MultiheadAttention calls, differentiable twice.

    torch's own raises at the second derivative with need_weights=False, and holds the scores of every head with True.
    Here the derivatives are those of the op `attention` in both cases. Memory is linear in the number of keys but for
    weights that are asked for. A row that sees no key gives zeros, and NaN as its weights, as torch has them. The
    arguments that are not listed are torch's; `left_to_torch` names what is left to torch's function.

    Args:
        query, key, value: [L, N, E], or [L, E] of one sample; key and value may have another L.

    Returns:
        ([L, N, E], weights [N, L, S], of each head [N, heads, L, S] without average_attn_weights, or None).

    Raises:
        As torch's function; NotImplementedError: a third derivative is asked for.
    """
    given = dict(locals())
    if left_to_torch(given):
        return F.multi_head_attention_forward(**given)
    batched = query.dim() == 3
    q, k, v = _projected(given, num_heads, batched)
    bias = _bias(given, q, batched)
    if need_weights:
        y, weights = _with_weights(q, k, v, bias, average_attn_weights)
    else:
        causal = is_causal and key_padding_mask is None
        y, weights = scaled_dot_product_attention(q, k, v, None if causal else bias, is_causal=causal), None
    joined = F.linear(y.permute(2, 0, 1, 3).flatten(2), out_proj_weight, out_proj_bias)
    if batched:
        return joined, weights
    return joined.squeeze(1), None if weights is None else weights.squeeze(0)


def left_to_torch(given: dict[str, Any]) -> str:
    """Why a call with these arguments of multi_head_attention_forward is left to torch's function, or "".

    Such arguments are either not used by discriminators whose gradient is penalised, or an error that torch reports.
    """
    q, heads = given["query"], given["num_heads"]
    if given["dropout_p"] > 0.0 and given["training"]:
        return "its probabilities have a dropout"
    if any(given[name] is not None for name in ("bias_k", "bias_v", "static_k", "static_v")) or given["add_zero_attn"]:
        return "it has keys of its own (bias_k, add_zero_attn or static_k)"
    if given["is_causal"] and given["attn_mask"] is None:
        return "is_causal needs attn_mask"
    if q.is_nested or q.dim() not in (2, 3) or q.dim() != given["key"].dim():
        return "not [L, N, E] or [L, E]"
    if given["embed_dim_to_check"] != q.shape[-1] or q.shape[-1] % heads:
        return "the heads do not divide the width"
    tensors = q, given["key"], given["value"], given["out_proj_weight"]
    return "" if len({t.dtype for t in tensors}) == 1 or torch.is_autocast_enabled(q.device.type) else "mixed dtypes"


def _projected(given: dict[str, Any], heads: int, batched: bool) -> list[Tensor]:
    """q, k and v as [N, heads, L, d], one product for those that come from one tensor."""
    inputs = [given["query"], given["key"], given["value"]]
    bias = given["in_proj_bias"]
    if given["use_separate_proj_weight"]:
        weights = [given[f"{name}_proj_weight"] for name in "qkv"]
        biases = [None] * 3 if bias is None else bias.chunk(3)
        rows = [F.linear(x, w, b) for x, w, b in zip(inputs, weights, biases, strict=True)]
    elif inputs[0] is inputs[1] and inputs[1] is inputs[2]:
        rows = list(F.linear(inputs[0], given["in_proj_weight"], bias).chunk(3, -1))
    else:
        weights, biases = given["in_proj_weight"].chunk(3), [None] * 3 if bias is None else bias.chunk(3)
        rows = [F.linear(x, w, b) for x, w, b in zip(inputs, weights, biases, strict=True)]
    rows = rows if batched else [t.unsqueeze(1) for t in rows]
    return [t.unflatten(-1, (heads, -1)).permute(1, 2, 0, 3) for t in rows]


def _bias(given: dict[str, Any], q: Tensor, batched: bool) -> Tensor | None:
    """Both masks as one bias of the scores [N, heads, L, S], or None. In torch's bool masks True hides a key."""
    mask, padding = given["attn_mask"], given["key_padding_mask"]
    if mask is not None:
        mask = _additive(mask, q)
        if mask.dim() == 3:
            mask = mask.view(q.shape[0], -1, *mask.shape[1:])
    if padding is None:
        return mask
    padding = _additive(padding if batched else padding.unsqueeze(0), q)[:, None, None]
    return padding if mask is None else mask + padding


def _additive(mask: Tensor, q: Tensor) -> Tensor:
    if mask.dtype != torch.bool:
        return mask.to(q.dtype)
    return torch.zeros_like(mask, dtype=q.dtype).masked_fill_(mask, float("-inf"))


def _with_weights(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, average: bool) -> tuple[Tensor, Tensor]:
    scale = q.shape[-1] ** -0.5
    if q.dtype in (torch.float32, torch.float64) and k.shape[2] > 0 and not is_observed():
        y, weights = _attention.with_weights(q, k, v, bias, scale)
    else:  # scores of 16 bits hold 8 to 11 bits of the log-sum-exp that the derivatives need
        y, scores = scaled_dot_product_attention(q, k, v, bias), (q * scale) @ k.mT
        weights = torch.softmax(scores if bias is None else scores + bias, -1)
    return y, weights.mean(1) if average else weights
