"""Attention that can be differentiated twice, with memory linear in the number of keys at every order.

Formula      s = scale q k^T + bias, p = softmax over the keys of s, y = p v; lse = log of each row's sum of exp(s).
             causal: row i sees the keys 0 to i. A row that sees no key gives y = 0 and lse = 0
Shapes       q [N,H,L,d], k [N,H,S,d], v [N,H,S,e], bias broadcast against [N,H,L,S] or None -> y [N,H,L,e], lse [N,H,L]
Dtypes       float32, bfloat16 and float16 natively, every floating dtype through the reference; sums are float32,
             products of 16 bits take scores rounded to them (on a CPU: bfloat16 where it has vdpbf16ps, else float32).
             bias may be float32 beside a 16-bit q; lse is float32 (float64 for float64)
Layout       heads by their strides, the last of 1; y, dq, dk and dv lie as q, k and v do, as [N,L,H,d] or [N,H,L,d]
Autocast     lower: q, k, v and bias go to the autocast dtype, as for torch's scaled_dot_product_attention
Derivatives  first: attention_backward. second: attention_double_backward, closed form by two row sums. third: raises.
             lse is no differentiable output
Saves        q, k, v, bias, y, lse
Traffic      each of q, k, v, y once forward; the natively computed scores stay in the caches. PyTorch's plain form: 6
             accesses an element of [N,H,L,S] forward, about 12 backward and 60 in the double backward
FLOPs        2 N H L S (d + e) forward, 2 N H L S (3 d + 2 e) backward, 2 N H L S (7 d + 5 e) double backward
Determinism  bit-equal from run to run for one thread count
Backends     cuda (d and e to 256, double backward to 128), triton (to 128; float32 to 64, its double backward to 32),
             native, reference. A bias' gradient takes memory of [N,H,L,S] on a GPU
Source       Dao et al., FlashAttention (2022), for the first derivative; the second derived in docs/maths.md, section 6
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from fastgan import _native
from fastgan._layout import accumulation_dtype
from fastgan._op import OPS, Op, draw, first_alone, wanted
from fastgan.choice import Backend, triton


def _products(q: Tensor, k: Tensor, of_d: int, v: Tensor, of_e: int) -> int:
    """FLOPs of that many products of [L,S] with q's d and with v's e."""
    n, heads, rows, d = q.shape
    return 2 * n * heads * rows * k.shape[2] * (of_d * d + of_e * v.shape[3])


def cost(q: Tensor, k: Tensor, v: Tensor) -> dict[str, int]:
    """Bytes and FLOPs that a perfect kernel needs: each tensor crosses memory once."""
    y = q.numel() // max(q.shape[3], 1) * v.shape[3]
    return {
        "bytes": (q.numel() + k.numel() + v.numel() + y) * q.element_size(),
        "flops": _products(q, k, 1, v, 1),
    }


def cost_backward(q: Tensor, k: Tensor, v: Tensor) -> dict[str, int]:
    once = cost(q, k, v)["bytes"]
    return {"bytes": 2 * once, "flops": _products(q, k, 3, v, 2)}


def cost_double_backward(q: Tensor, k: Tensor, v: Tensor) -> dict[str, int]:
    once = cost(q, k, v)["bytes"]
    return {"bytes": 3 * once, "flops": _products(q, k, 7, v, 5)}


# ---- layout ---------------------------------------------------------------------------------------------------------


def empty_like_heads(shape: Any, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """A new [N,H,L,d] tensor whose memory is [N,L,H,d] where `like`'s is."""
    n, heads, rows, d = shape
    if like.stride(1) < like.stride(2):
        return like.new_empty((n, rows, heads, d), dtype=dtype).transpose(1, 2)
    return like.new_empty(shape, dtype=dtype)


def placed(t: Tensor, like: Tensor) -> Tensor:
    """t's values in `like`'s dtype and in a new tensor of `like`'s layout."""
    return empty_like_heads(t.shape, like).copy_(t)


def bias_gradient_shape(q: Tensor, k: Tensor, bias: Tensor | None, asked: bool) -> tuple[int, ...]:
    """[1 or N, 1 or H, L, S]: summed over the batch or the heads that share the bias; (0,) where none is asked for."""
    if bias is None or not asked:
        return (0,)
    lead = (1,) * (4 - bias.dim()) + tuple(bias.shape)
    return lead[0], lead[1], q.shape[2], k.shape[2]


# ---- the reference --------------------------------------------------------------------------------------------------


def _wide(*tensors: Tensor | None) -> list[Any]:
    return [None if t is None else t.to(accumulation_dtype(t.dtype)) for t in tensors]


def _scores(q: Tensor, k: Tensor, bias: Tensor | None, causal: bool, scale: float) -> Tensor:
    s = (q @ k.mT) * scale
    s = s if bias is None else s + bias
    return s.masked_fill(torch.ones_like(s, dtype=torch.bool).triu(1), float("-inf")) if causal else s


def _rows_summed(dbias: Tensor, shape: tuple[int, ...]) -> Tensor:
    return dbias.sum_to_size(shape) if len(shape) == 4 else dbias.new_empty(shape)


def _fused(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> bool:
    """Whether PyTorch's fused CPU kernels take this case: they are its entry in the race, as they are what its
    scaled_dot_product_attention runs."""
    alike = q.device.type == "cpu" and q.shape[3] == v.shape[3] and min(q.numel(), k.numel()) > 0
    return alike and all(t.stride(-1) == 1 for t in (q, k, v)) and (bias is None or bias.dtype == q.dtype)


def reference(q, k, v, bias, causal, scale):
    if _fused(q, k, v, bias):
        y, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, causal, attn_mask=_four(bias), scale=scale
        )
        return placed(y, q), lse.contiguous()
    wq, wk, wv, wbias = _wide(q, k, v, bias)
    s = _scores(wq, wk, wbias, causal, scale)
    lse = torch.logsumexp(s, -1)
    lse = torch.where(lse == float("-inf"), 0.0, lse)
    return placed((s - lse.unsqueeze(-1)).exp() @ wv, q), lse


def _four(bias: Tensor | None) -> Tensor | None:
    """With four dimensions, as the fused kernels take it."""
    return None if bias is None else bias[(None,) * (4 - bias.dim())]


def reference_backward(dy, q, k, v, bias, y, lse, causal, scale, bias_gradient):
    shape = bias_gradient_shape(q, k, bias, bias_gradient)
    if _fused(q, k, v, bias) and len(shape) < 4 and dy.stride(-1) == 1:
        grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            dy, q, k, v, y, lse, 0.0, causal, attn_mask=_four(bias), scale=scale
        )
        return *(placed(g, t) for g, t in zip(grads, (q, k, v), strict=True)), lse.new_empty(shape)
    wdy, wq, wk, wv, wbias, wy = _wide(dy, q, k, v, bias, y)
    p = (_scores(wq, wk, wbias, causal, scale) - lse.unsqueeze(-1)).exp()
    ds = p * (wdy @ wv.mT - (wdy * wy).sum(-1, keepdim=True))
    dq, dk, dv = ds @ wk * scale, ds.mT @ wq * scale, p.mT @ wdy
    return placed(dq, q), placed(dk, k), placed(dv, v), _rows_summed(ds, shape)


def reference_double_backward(dy, ddq, ddk, ddv, ddbias, q, k, v, bias, lse, causal, scale, bias_gradient):
    """MATHS of docs/maths.md, section 6."""
    shape = bias_gradient_shape(q, k, bias, bias_gradient)
    wdy, wq, wk, wv, wbias = _wide(dy, q, k, v, bias)
    uq, uk, uv = (torch.zeros_like(t) if u is None else u.to(t.dtype) for u, t in ((ddq, wq), (ddk, wk), (ddv, wv)))
    p = (_scores(wq, wk, wbias, causal, scale) - lse.unsqueeze(-1)).exp()
    dp, c = wdy @ wv.mT, wdy @ uv.mT
    a = (uq @ wk.mT + wq @ uk.mT) * scale
    a = a if ddbias is None else a + ddbias
    alpha, delta = ((p * t).sum(-1, keepdim=True) for t in (a, dp))
    shift = alpha * delta - (p * (a * dp + c)).sum(-1, keepdim=True)
    a, dp = a - alpha, dp - delta
    ds, g, r = p * dp, p * a, p * (a * dp + c + shift)
    d_q, d_k = (r @ wk + ds @ uk) * scale, (r.mT @ wq + ds.mT @ uq) * scale
    d_dy, d_v = g @ wv + p @ uv, g.mT @ wdy
    return placed(d_dy, dy), placed(d_q, q), placed(d_k, k), placed(d_v, v), _rows_summed(r, shape)


# ---- the native kernels ---------------------------------------------------------------------------------------------


def _rows(core: _native.Core, *tensors: Tensor | None) -> list[Tensor | None]:
    """As the kernels read heads: in a dtype that they know, the last stride 1."""

    def one(t: Tensor) -> Tensor:
        t = t.to(_computed(core, t.dtype))
        return t if t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous()

    return [None if t is None else one(t) for t in tensors]


def whole_bias(bias: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
    """[N,H,L,S], shared dimensions with a stride of 0, the last with 1."""
    if bias is None:
        return None
    bias = bias.detach()
    if bias.shape[-1] != k.shape[2] or bias.stride(-1) != 1:
        bias = bias.expand(*bias.shape[:-1], k.shape[2]).contiguous()
    return bias.expand(*q.shape[:3], k.shape[2])


def _floats(bias: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
    return whole_bias(None if bias is None else bias.float(), q, k)


def _strides(t: Tensor | None) -> tuple[int, ...]:
    """The strides; those of a bias gradient are 0 in its shared dimensions, whose size is 1."""
    if t is None or t.dim() < 4:
        return (0, 0, 0, 0)
    return tuple(0 if size == 1 else step for size, step in zip(t.shape, t.stride(), strict=True))


def _call(core, direction, q, k, v, causal, scale, inputs, outputs):
    """The kernel over inputs and outputs, pointers first and then the strides of those that have four."""
    shape = *q.shape[:3], k.shape[2], q.shape[3], v.shape[3]
    code = _native.DTYPE_CODES[q.dtype]
    tensors = *inputs, *outputs
    strides = [_strides(t) for t, strided in tensors if strided]
    core.call(f"attention_{direction}", q, code, *(t for t, _ in tensors), *strides, *shape, causal, scale)


def _computed(core: _native.Core, dtype: torch.dtype) -> torch.dtype:
    """What the kernels read and write: float16 goes through float32 on a CPU."""
    return dtype if dtype in core.dtypes else torch.float32


def _outputs(core: _native.Core, *likes: tuple[Any, Tensor]) -> list[Tensor]:
    """New tensors of shapes in the layouts of others."""
    return [empty_like_heads(shape, like, _computed(core, like.dtype)) for shape, like in likes]


def _back(t: Tensor, like: Tensor) -> Tensor:
    return t if t.dtype == like.dtype else placed(t, like)


def launch(core, q, k, v, bias, causal, scale):
    (y,) = _outputs(core, ((*q.shape[:3], v.shape[3]), q))
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    q_, k_, v_ = _rows(core, q, k, v)
    inputs = [(t, True) for t in (q_, k_, v_, _floats(bias, q, k))]
    _call(core, "forward", q_, k_, v_, causal, scale, inputs, [(y, True), (lse, False)])
    return _back(y, q), lse


def _new_bias_gradient(core: _native.Core, q: Tensor, k: Tensor, bias: Tensor | None, asked: bool) -> Tensor:
    """float32; a CPU's kernels add to it, a GPU's write a square for each head."""
    shape = bias_gradient_shape(q, k, bias, asked)
    whole = (*q.shape[:3], k.shape[2]) if core is _native.CUDA and len(shape) == 4 else shape
    return q.new_zeros(whole, dtype=torch.float32)


def launch_backward(core, dy, q, k, v, bias, y, lse, causal, scale, bias_gradient):
    grads = _outputs(core, (q.shape, q), (k.shape, k), (v.shape, v))
    dbias = _new_bias_gradient(core, q, k, bias, bias_gradient)
    dy_, q_, k_, v_, y_ = _rows(core, dy, q, k, v, y)
    inputs = [(t, True) for t in (dy_, q_, k_, v_, _floats(bias, q, k), y_)]
    outputs = [*((g, True) for g in grads), (dbias if dbias.dim() == 4 else None, True)]
    _call(core, "backward", q_, k_, v_, causal, scale, [*inputs, (lse.contiguous(), False)], outputs)
    dbias = _rows_summed(dbias, bias_gradient_shape(q, k, bias, bias_gradient))
    return *(_back(g, t) for g, t in zip(grads, (q, k, v), strict=True)), dbias


def launch_double_backward(core, dy, ddq, ddk, ddv, ddbias, q, k, v, bias, lse, causal, scale, bias_gradient):
    grads = _outputs(core, (dy.shape, dy), (q.shape, q), (k.shape, k), (v.shape, v))
    d_bias = _new_bias_gradient(core, q, k, bias, bias_gradient)
    dy_, ddq_, ddk_, ddv_, q_, k_, v_ = _rows(core, dy, ddq, ddk, ddv, q, k, v)
    ddbias = None if ddbias is None else ddbias.float().contiguous()
    inputs = [(t, True) for t in (dy_, ddq_, ddk_, ddv_, ddbias, q_, k_, v_, _floats(bias, q, k))]
    outputs = [*((g, True) for g in grads), (d_bias if d_bias.dim() == 4 else None, True)]
    _call(core, "double_backward", q_, k_, v_, causal, scale, [*inputs, (lse.contiguous(), False)], outputs)
    d_bias = _rows_summed(d_bias, bias_gradient_shape(q, k, bias, bias_gradient))
    return *(_back(g, t) for g, t in zip(grads, (dy, q, k, v), strict=True)), d_bias


LONGEST = {"attention": 256, "attention_backward": 256, "attention_double_backward": 128}  # elements of CUDA's heads
OWN_TILES = {  # of 64 x 64 elements that a block of the CUDA kernels keeps, of heads of p and r parts of 64
    "attention": lambda p, r: p,
    "attention_backward": lambda p, r: p + r,
    "attention_double_backward": lambda p, r: 2 * (p + r),
}


def shared_bytes(name: str, q: Tensor, v: Tensor) -> int:
    """The most shared memory that a block of the CUDA kernels asks for, but for 2 KiB of row sums.

    Its own tiles, one of scores, and one, or in 16 bits two, through which others pass.
    """
    own = OWN_TILES[name](*(-(-t.shape[3] // 64) for t in (q, v)))
    return (own + 1 + (1 if q.element_size() == 4 else 2)) * 64 * 64 * q.element_size()


def _cuda_declines(name: str, q: Tensor, v: Tensor) -> str:
    longest = LONGEST[name]
    if max(q.shape[3], v.shape[3]) > longest:
        return f"cuda kernels of {name} hold heads of at most {longest} elements"
    if not q.is_cuda:
        return ""
    card = torch.cuda.get_device_properties(q.device)
    if q.dtype == torch.bfloat16 and card.major < 8:
        return "cuda kernels multiply bfloat16 on tensor cores of compute capability 8.0 and newer"
    wanted = shared_bytes(name, q, v) + 2048
    most: int = getattr(card, "shared_memory_per_block_optin", 48 << 10)  # what every card has without being asked
    if wanted > most:
        return f"a block needs {wanted} bytes of shared memory, the card has {most}"
    return ""


def _backends(name: str, launcher: Any, activations: Any, q: int) -> dict[str, Backend]:
    """q: the number of that argument; v is the second behind it."""

    def declines(*args: Any) -> str:
        return _native.CPU.declines(*activations(*args), also=(torch.float16,))

    def cuda_declines(*args: Any) -> str:
        return _native.CUDA.declines(*activations(*args)) or _cuda_declines(name, args[q], args[q + 2])

    cuda = Backend(functools.partial(launcher, _native.CUDA), cuda_declines)
    native = Backend(functools.partial(launcher, _native.CPU), declines)
    return {"cuda": cuda, "native": native, "triton": triton("attention", name)}


# ---- shapes and ops -------------------------------------------------------------------------------------------------


def fake(q, k, v, bias, causal, scale):
    lse = q.new_empty(q.shape[:3], dtype=accumulation_dtype(q.dtype))
    return empty_like_heads((*q.shape[:3], v.shape[3]), q), lse


def fake_backward(dy, q, k, v, bias, y, lse, causal, scale, bias_gradient):
    dbias = lse.new_empty(bias_gradient_shape(q, k, bias, bias_gradient))
    return *(empty_like_heads(t.shape, t) for t in (q, k, v)), dbias


def fake_double_backward(dy, ddq, ddk, ddv, ddbias, q, k, v, bias, lse, causal, scale, bias_gradient):
    d_bias = lse.new_empty(bias_gradient_shape(q, k, bias, bias_gradient))
    return *(empty_like_heads(t.shape, t) for t in (dy, q, k, v)), d_bias


SHAPES = (2, 3, 5, 4), (2, 3, 7, 4), (2, 3, 7, 6)  # q, k, v of the examples
OUT, BIAS, LSE = (2, 3, 5, 6), (3, 5, 7), (2, 3, 5)

op = Op(
    "attention(Tensor q, Tensor k, Tensor v, Tensor? bias, bool causal, float scale) -> (Tensor, Tensor)",
    reference=reference,
    fake=fake,
    backends=_backends("attention", launch, lambda q, k, v, *rest: (q, k, v), 0),
    autocast="lower",
    example=lambda: (*draw(*SHAPES, BIAS), False, 0.5),
)

backward = Op(
    "attention_backward(Tensor dy, Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor y, Tensor lse, bool causal,"
    " float scale, bool bias_gradient) -> (Tensor, Tensor, Tensor, Tensor)",
    reference=reference_backward,
    fake=fake_backward,
    backends=_backends("attention_backward", launch_backward, lambda dy, q, k, v, bias, y, *rest: (dy, q, k, v, y), 1),
    example=lambda: (*draw(OUT, *SHAPES, BIAS, OUT), draw(LSE)[0].abs() + 2, False, 0.5, True),
)

double_backward = Op(
    "attention_double_backward(Tensor dy, Tensor? ddq, Tensor? ddk, Tensor? ddv, Tensor? ddbias, Tensor q, Tensor k,"
    " Tensor v, Tensor? bias, Tensor lse, bool causal, float scale, bool bias_gradient)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference=reference_double_backward,
    fake=fake_double_backward,
    backends=_backends(
        "attention_double_backward",
        launch_double_backward,
        lambda dy, ddq, ddk, ddv, ddbias, q, k, v, *rest: (dy, ddq, ddk, ddv, q, k, v),
        5,
    ),
    example=lambda: (*draw(OUT, *SHAPES, (1, *BIAS), *SHAPES, BIAS), draw(LSE)[0].abs() + 2, False, 0.5, True),
)


# ---- derivatives ----------------------------------------------------------------------------------------------------


def _bias_gradient(dbias: Tensor, bias: Tensor | None) -> Tensor | None:
    """Summed over what a broadcast bias shares beyond the batch and the heads."""
    return None if bias is None or dbias.dim() < 4 else dbias.sum_to_size(bias.shape).to(bias.dtype)


def _save(ctx, inputs, output):
    q, k, v, bias, ctx.causal, ctx.scale = inputs
    first_alone(ctx, output)
    ctx.save_for_backward(q, k, v, bias, *output)


def _backward(ctx, dy, _dlse):
    q, k, v, bias, y, lse = ctx.saved_tensors
    asked = bias is not None and wanted(ctx, 3)
    dq, dk, dv, dbias = OPS["attention_backward"](dy, q, k, v, bias, y, lse, ctx.causal, ctx.scale, asked)
    return dq, dk, dv, _bias_gradient(dbias, bias), None, None


op.differentiate(_save, _backward)


class _Computed(torch.autograd.Function):
    """The op where y and lse are known already: its derivatives alone."""

    @staticmethod
    def forward(ctx, q, k, v, bias, causal, scale, y, lse):
        y = placed(y, q)
        ctx.causal, ctx.scale = causal, scale
        ctx.save_for_backward(q, k, v, bias, y, lse)
        return y

    @staticmethod
    def backward(ctx, dy):
        return *_backward(ctx, dy, None), None, None


def with_weights(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """y and the weights softmax(scale q k^T + bias) [N,H,L,S] of float32 or float64 heads; not for calls that somebody
    observes (`fastgan._op.is_observed`).

    Who asks for the weights pays for the matrix of scores. Then y and lse come from it, as the kernel would make the
    same products again (0.63 to 0.84 of the speed of PyTorch's multi-head attention). The derivatives of y are the
    op's; the matrix is kept for those of the weights alone. A row that sees no key has y = 0 and weights of NaN.
    """
    scores = (q * scale) @ k.mT
    scores = scores if bias is None else scores + bias
    weights = torch.softmax(scores, -1)
    with torch.no_grad():
        top = scores.amax(-1)
        empty = top == float("-inf")
        lse = (top - weights.amax(-1).log()).masked_fill_(empty, 0.0)
        y = (weights @ v).masked_fill_(empty.unsqueeze(-1), 0.0)
    return _Computed.apply(q, k, v, bias, False, scale, y, lse), weights


def _save_backward(ctx, inputs, output):
    dy, q, k, v, bias, _, lse, ctx.causal, ctx.scale, ctx.asked = inputs
    ctx.save_for_backward(dy, q, k, v, bias, lse)


def _double_backward(ctx, ddq, ddk, ddv, ddbias):
    dy, q, k, v, bias, lse = ctx.saved_tensors
    ddbias = ddbias if ctx.asked else None
    asked = bias is not None and ctx.needs_input_grad[4]
    d_dy, d_q, d_k, d_v, d_bias = OPS["attention_double_backward"](
        dy, ddq, ddk, ddv, ddbias, q, k, v, bias, lse, ctx.causal, ctx.scale, asked
    )
    # y and lse are functions of q, k, v and bias: their share is in those
    return d_dy, d_q, d_k, d_v, _bias_gradient(d_bias, bias), *(None,) * 5


backward.differentiate(_save_backward, _double_backward)
double_backward.not_differentiable()
