"""Device functions that the kernels share: where an element lies, activations and their derivatives, merged moments.

Everything is computed in float32, whatever is loaded.
"""

import triton
import triton.language as tl


@triton.jit
def element_offsets(s, c, C, P, CHANNELS_LAST: tl.constexpr, WIDE: tl.constexpr):
    """Offsets [S, C'] of the elements at sample-and-pixel s [S], counted n P + p, and channel c [C'] of a dense
    [N, C, P] tensor. WIDE: in 64 bits."""
    if WIDE:
        s = s.to(tl.int64)
        c = c.to(tl.int64)
    if CHANNELS_LAST:
        at = s[:, None] * C + c[None, :]
    else:
        n = s // P
        at = (n * C * P + (s - n * P))[:, None] + (c * P)[None, :]
    return at


@triton.jit
def load_channels(vector, c, C, default):
    """vector[c] in float32, `default` beyond C and where there is no vector."""
    if vector is None:
        values = tl.full(c.shape, default, tl.float32)
    else:
        values = tl.load(vector + c, mask=c < C, other=default).to(tl.float32)
    return values


@triton.jit
def tanh(t):
    """By exp(2t), and by the odd series to t^7 below 0.15, where the difference from 1 would cancel: its next term is
    6e-9 of the value there. With |t| and its sign apart, a tile of bfloat16 spilled 8 bytes on sm_86."""
    far = 1.0 - 2.0 / (1.0 + tl.exp(2.0 * t))
    q = t * t
    near = t * (1.0 + q * (-1.0 / 3 + q * (2.0 / 15 + q * (-17.0 / 315))))
    return tl.where(q < 0.0225, near, far)


@triton.jit
def expm1_below(t):
    """exp(t) - 1 for t <= 0, by the tangent of half of it, whose digits a small t keeps."""
    half = tanh(0.5 * t)
    return 2.0 * half / (1.0 - half)


@triton.jit
def sigmoid(t):
    return 1.0 / (1.0 + tl.exp(-t))


@triton.jit
def normal(t):
    """Phi(t), the normal distribution's function."""
    return 0.5 * (1.0 + tl.math.erf(0.7071067811865476 * t))


@triton.jit
def gelu_logit(t):
    """t (1 + tanh(sqrt(2/pi) (t + 0.044715 t^3))) / 2 = t sigmoid(of this)."""
    return t * (1.5957691216057308 + 0.07135481627260025 * t * t)


@triton.jit
def log1p(e):
    """log(1 + e) for e >= 0 with every digit of a small e, after Kahan: the rounding of 1 + e is divided out again."""
    u = 1.0 + e
    return tl.where(u == 1.0, e, tl.log(u) * (e / tl.where(u == 1.0, 1.0, u - 1.0)))


@triton.jit
def softplus(t):
    return activate(t, 0.0, "relu") + log1p(tl.exp(-tl.abs(t)))


@triton.jit
def activate(t, slope, ACTIVATION: tl.constexpr):
    """phi(t). A NaN stays one, as in torch."""
    if ACTIVATION == "relu":
        y = tl.where(t <= 0, 0.0, t)
    elif ACTIVATION == "leaky_relu":
        y = tl.where(t > 0, t, t * slope)
    elif ACTIVATION == "tanh":
        y = tanh(t)
    elif ACTIVATION == "sigmoid":
        y = sigmoid(t)
    elif ACTIVATION == "elu":
        y = tl.where(t <= 0, expm1_below(t), t)
    elif ACTIVATION == "selu":
        y = tl.where(t <= 0, 1.7580993408473766 * expm1_below(t), 1.0507009873554805 * t)
    elif ACTIVATION == "softplus":
        y = softplus(t)
    elif ACTIVATION == "swish":
        y = t * sigmoid(t)
    elif ACTIVATION == "gelu":
        y = t * normal(t)
    elif ACTIVATION == "gelu_tanh":
        y = t * sigmoid(gelu_logit(t))
    else:
        y = t
    return y


@triton.jit
def activate_backward(dy, y, slope, ACTIVATION: tl.constexpr):
    """dy phi'(t) from y = phi(t), of swish and gelu from t; the piecewise linear ones take either: signs agree."""
    if ACTIVATION == "relu":
        dt = tl.where(y <= 0, 0.0, dy)
    elif ACTIVATION == "leaky_relu":
        dt = tl.where(y > 0, dy, dy * slope)
    elif ACTIVATION == "tanh":
        dt = dy * (1.0 - y * y)
    elif ACTIVATION == "sigmoid":
        dt = dy * (y * (1.0 - y))
    elif ACTIVATION == "elu":
        dt = dy * tl.where(y <= 0, y + 1.0, 1.0)
    elif ACTIVATION == "selu":
        dt = dy * tl.where(y <= 0, y + 1.7580993408473766, 1.0507009873554805)
    elif ACTIVATION == "softplus":
        dt = -dy * expm1_below(-y)
    elif ACTIVATION == "swish":
        s = sigmoid(y)
        dt = dy * (s + y * s * (1.0 - s))
    elif ACTIVATION == "gelu":
        dt = dy * (normal(y) + 0.3989422804014327 * y * tl.exp(-0.5 * y * y))
    elif ACTIVATION == "gelu_tanh":
        u = gelu_logit(y)
        dt = dy * (sigmoid(u) + y * sigmoid(u) * sigmoid(-u) * (1.5957691216057308 + 0.21406444881780073 * y * y))
    else:
        dt = dy
    return dt


@triton.jit
def merge_moments(n, mean, square, n_other, mean_other, square_other):
    """Chan's merge of (count, mean, sum of squared differences from it); counts are at least 1 together."""
    total = n + n_other
    d = mean_other - mean
    share = n_other / total
    return total, mean + d * share, square + square_other + d * d * (n * share)
