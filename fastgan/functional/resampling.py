"""Images resampled through filters: StyleGAN's up- and downsampling, and its activation between the two."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fastgan._layout import is_channels_last
from fastgan.choice import has_kernel
from fastgan.functional.checks import Size2, check_bias, ints, pair
from fastgan.functional.convolution import conv2d, conv_transpose2d
from fastgan.functional.elementwise import bias_act, check_form
from fastgan.ops import filtered_lrelu as _filtered_lrelu
from fastgan.ops import upfirdn2d as _upfirdn2d

# The kernel has a plane in each lane of a vector. In NCHW 3 planes of 68x68, 12 taps, up 2 and down 2, took 0.17 ms
# forward and the composition 0.11; 8 planes 0.18 and 0.20; in channels_last 3 planes 0.17 and 0.19 (one thread, AMD
# EPYC Zen 5, AVX-512).
FEWEST_PLANES = 6


def upfirdn2d(
    x: Tensor,
    f: Tensor | None,
    up: Size2 = 1,
    down: Size2 = 1,
    padding: int | Sequence[int] = 0,
    flip_filter: bool = False,
    gain: float = 1.0,
) -> Tensor:
    """Upsample by zeros, pad, filter, downsample: in one pass.

    `up - 1` zeros are put behind every sample, `padding` zeros around the image, every position is convolved with f,
    and every `down`-th result is kept. The derivative is the same op with `up` and `down` exchanged.

    Args:
        x: [N, C, H, W], floating.
        f: [KH, KW], or [K] for the filter f f^T, float32 (float64 beside a float64 x); None is the filter 1.
        up, down: an int, or (x, y).
        padding: an int, (x, y) or (x before, x after, y before, y after), of the upsampled image; negative crops.
        flip_filter: False: convolution; True: correlation.
        gain: multiplies the result.

    Returns:
        [N, C, (H up + padding before and after - KH) // down + 1, ...], x's dtype and layout.

    Raises:
        ValueError, TypeError: a shape, a factor or a dtype is not as above, or f does not fit into the padded image.
    """
    check_image("upfirdn2d", x)
    f = filter_of("upfirdn2d", "f", f, x)
    up_x, up_y = pair("upfirdn2d", "up", up, 1)
    down_x, down_y = pair("upfirdn2d", "down", down, 1)
    before_x, after_x, before_y, after_y = pads("upfirdn2d", padding)
    if not math.isfinite(gain):
        raise ValueError(f"upfirdn2d: gain must be finite, got {gain}")
    geometry = [up_y, up_x], [down_y, down_x], [before_y, after_y, before_x, after_x]
    size = _upfirdn2d.output_size(x.shape[2:], _upfirdn2d.taps_of(f), *geometry)
    if min(size) < 1:
        raise ValueError(
            f"upfirdn2d: f {tuple(f.shape)} must fit into the padded image, got x {tuple(x.shape)}, up {up}, "
            f"padding {padding}"
        )
    return _upfirdn2d.op(x, f, *geometry, bool(flip_filter), float(gain))


def check_image(op: str, x: Tensor) -> None:
    if x.dim() != 4:
        raise ValueError(f"{op}: x must be [N,C,H,W], got shape {tuple(x.shape)}")
    if not x.is_floating_point():
        raise TypeError(f"{op}: x must be a floating tensor, got {x.dtype}; convert it with .float()")


def filter_of(op: str, name: str, f: Tensor | None, x: Tensor) -> Tensor:
    """A filter as the op takes it; None is the filter 1."""
    if f is None:
        return torch.ones(1, dtype=torch.float64 if x.dtype == torch.float64 else torch.float32, device=x.device)
    if not isinstance(f, Tensor):
        raise TypeError(
            f"{op}: {name} must be None or a tensor, got {type(f).__name__}; convert it with torch.tensor()"
        )
    if f.dim() not in (1, 2) or f.numel() == 0:
        raise ValueError(f"{op}: {name} must be None, [K] or [KH,KW] with an element, got shape {tuple(f.shape)}")
    if f.device != x.device:
        raise ValueError(f"{op}: {name} must be on x's device {x.device}, got {f.device}; move it with .to()")
    if f.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{op}: {name} must be float32 or float64, got {f.dtype}; convert it with .float()")
    return f


def pads(op: str, padding: int | Sequence[int]) -> list[int]:
    """(x before, x after, y before, y after) of an int, (x, y), or those four."""
    found = ints(padding) * (1 if isinstance(padding, Sequence) else 2)
    if len(found) == 2:
        found = [found[0], found[0], found[1], found[1]]
    if len(found) != 4:
        raise ValueError(
            f"{op}: padding must be an int, (x, y) or (x before, x after, y before, y after), got {padding!r}"
        )
    return found


def filtered_lrelu(
    x: Tensor,
    fu: Tensor | None = None,
    fd: Tensor | None = None,
    bias: Tensor | None = None,
    up: int = 1,
    down: int = 1,
    padding: int | Sequence[int] = 0,
    gain: float = math.sqrt(2),
    negative_slope: float = 0.2,
    clamp: float | None = None,
    flip_filter: bool = False,
) -> Tensor:
    """StyleGAN3's activation: bias, upsampling by fu, leaky ReLU with gain and clamp, downsampling by fd.

    One pass: the upsampled image stays in cache or on chip, and a bit for each of its samples (two with a clamp) is
    kept for the derivatives. `upfirdn2d` and `bias_act` compute the same for fewer than 6 planes in NCHW, where a
    filter requires gradients, and on a GPU with more than 32 taps a side or a factor above 32.

    Args:
        x: [N, C, H, W], floating.
        fu, fd: filters as `upfirdn2d` takes them; fu's result is multiplied by up^2, which keeps the magnitude.
        bias: [C] or None, added before the upsampling.
        up, down: factors of both axes, ints >= 1.
        padding: as `upfirdn2d`, of the upsampled image.
        gain: of the leaky ReLU; finite and not 0.
        negative_slope: of the leaky ReLU, >= 0.
        clamp: None, or the largest absolute value behind the leaky ReLU, >= 0. What it holds has the derivative 0.
        flip_filter: False: convolution; True: correlation; of both filters.

    Returns:
        [N, C, (H up + padding - (KH of fu - 1) - (KH of fd - 1) + down - 1) // down, ...], x's dtype and layout.

    Raises:
        ValueError, TypeError: as `upfirdn2d` and `bias_act`.
    """
    name = "filtered_lrelu"
    check_image(name, x)
    fu, fd = filter_of(name, "fu", fu, x), filter_of(name, "fd", fd, x)
    check_bias(name, bias, x.shape[1])
    for factor, value in (("up", up), ("down", down)):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}: {factor} must be an int >= 1, got {value!r}")
    limit = check_form(name, "leaky_relu", negative_slope, gain, clamp)[1]
    before_x, after_x, before_y, after_y = pads(name, padding)
    pad = [before_y, after_y, before_x, after_x]
    inner = _filtered_lrelu.middle(x, fu, up, pad)
    if any(size < taps for size, taps in zip(inner, _upfirdn2d.taps_of(fd), strict=True)):
        raise ValueError(
            f"{name}: the filters must fit into the padded image, got fu {tuple(fu.shape)} and fd {tuple(fd.shape)} "
            f"for x {tuple(x.shape)}, up {up}, padding {padding}"
        )
    if not _in_one_pass(x, fu, fd, up, down):
        x = x if bias is None else bias_act(x, bias, activation=None)
        x = upfirdn2d(x, fu, up, 1, padding, flip_filter, float(up) ** 2)
        x = bias_act(x, activation="leaky_relu", negative_slope=negative_slope, gain=gain, clamp=clamp)
        return upfirdn2d(x, fd, 1, down, 0, flip_filter)
    form = bool(flip_filter), float(gain), float(negative_slope), limit
    y: Tensor = _filtered_lrelu.op(x, bias, fu, fd, up, down, pad, *form)[0]
    return y


def _in_one_pass(x: Tensor, fu: Tensor, fd: Tensor, up: int, down: int) -> bool:
    """Whether `filtered_lrelu`'s kernel takes x: there is one, it is worth it, and no filter requires gradients."""
    learns = torch.is_grad_enabled() and (fu.requires_grad or fd.requires_grad)
    few = x.shape[0] * x.shape[1] < FEWEST_PLANES and not is_channels_last(x)
    fits = x.device.type == "cpu" or not _filtered_lrelu.does_not_fit(fu, fd, up, down)
    return not learns and not few and fits and has_kernel("filtered_lrelu", x.device.type)


def conv2d_resample(
    x: Tensor,
    weight: Tensor,
    f: Tensor | None = None,
    up: int = 1,
    down: int = 1,
    padding: int | Sequence[int] = 0,
    groups: int = 1,
    flip_weight: bool = True,
    flip_filter: bool = False,
) -> Tensor:
    """A convolution between upsampling and downsampling by f, in the order that takes the fewest multiplications.

    The definition: `upfirdn2d` by f with `up` and the padding, a convolution by weight, `upfirdn2d` by f with `down`.
    Filters commute, so a convolution of an upsampled image is a transposed one of the small image with the filter
    behind it, and one that is downsampled a strided one with the filter before it.

    Args:
        x: [N, C, H, W], floating.
        weight: [K, C/groups, R, S], x's dtype and device.
        f: filter as `upfirdn2d` takes it.
        up, down: factors of both axes.
        padding: as `upfirdn2d`, of the upsampled image; what keeps f centred is added.
        groups: of the convolution.
        flip_weight: True: correlation, as torch's convolutions; False: convolution.
        flip_filter: as `upfirdn2d`.

    Returns:
        [N, K, OH, OW], x's dtype.

    Raises:
        ValueError, TypeError: as `upfirdn2d` and `conv2d`.
    """
    name = "conv2d_resample"
    check_image(name, x)
    _check_weight(name, x, weight, groups)
    for factor, value in (("up", up), ("down", down)):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}: {factor} must be an int >= 1, got {value!r}")
    f = filter_of(name, "f", f, x)
    around, gain = _centred(pads(name, padding), f, up, down), float(up) ** 2
    x0, x1, y0, y1 = around
    kernel = weight if flip_weight else weight.flip([2, 3])
    pointwise = weight.shape[2] == weight.shape[3] == 1
    if pointwise and up == 1 and down > 1:  # on the few pixels that are kept
        return conv2d(upfirdn2d(x, f, 1, down, around, flip_filter), kernel, groups=groups)
    if pointwise and up > 1 and down == 1:  # on the few pixels that there are
        return upfirdn2d(conv2d(x, kernel, groups=groups), f, up, 1, around, flip_filter, gain)
    if up == 1 and down > 1:
        return conv2d(upfirdn2d(x, f, 1, 1, around, flip_filter), kernel, stride=down, groups=groups)
    if up > 1:
        y = _transposed(x, weight, f, up, around, groups, flip_weight, flip_filter, gain)
        return upfirdn2d(y, f, 1, down, 0, flip_filter) if down > 1 else y
    if x0 == x1 >= 0 and y0 == y1 >= 0:
        return conv2d(x, kernel, padding=[y0, x0], groups=groups)
    return conv2d(upfirdn2d(x, None, 1, 1, around), kernel, groups=groups)


def _check_weight(op: str, x: Tensor, weight: Tensor, groups: int) -> None:
    if weight.dim() != 4:
        raise ValueError(f"{op}: weight must have 4 dimensions, got shape {tuple(weight.shape)}")
    if groups < 1 or x.shape[1] != weight.shape[1] * groups or weight.shape[0] % groups:
        raise ValueError(
            f"{op}: x must have weight.shape[1] * groups channels and weight.shape[0] must be a multiple of groups, "
            f"got x {tuple(x.shape)}, weight {tuple(weight.shape)}, groups={groups}"
        )


def _centred(around: list[int], f: Tensor, up: int, down: int) -> list[int]:
    """The padding with what keeps f centred on the pixels that are upsampled and on those that are kept."""
    kh, kw = _upfirdn2d.taps_of(f)
    for side, taps in enumerate((kw, kw, kh, kh)):
        before = 1 - side % 2
        if up > 1:
            around[side] += (taps + up - 1) // 2 if before else (taps - up) // 2
        if down > 1:
            around[side] += (taps - down + 1) // 2 if before else (taps - down) // 2
    return around


def _transposed(
    x: Tensor,
    weight: Tensor,
    f: Tensor,
    up: int,
    around: list[int],
    groups: int,
    flip_weight: bool,
    flip_filter: bool,
    gain: float,
) -> Tensor:
    """f of (weight of the zero-stuffed x). A transposed convolution turns its weight by 180 degrees, so the weight of a
    correlation is turned first."""
    k, c, r, s = weight.shape
    if groups > 1:
        weight = weight.reshape(groups, k // groups, c, r, s).transpose(1, 2).reshape(groups * c, k // groups, r, s)
    else:
        weight = weight.transpose(0, 1)
    weight = weight.flip([2, 3]) if flip_weight else weight
    # The transposed convolution pads by R - 1 before and R - up behind; what would be cropped again is not computed.
    x0, x1, y0, y1 = (p - lost for p, lost in zip(around, (s - 1, s - up, r - 1, r - up), strict=True))
    cut_x, cut_y = max(min(-x0, -x1), 0), max(min(-y0, -y1), 0)
    y = conv_transpose2d(x, weight, stride=up, padding=[cut_y, cut_x], groups=groups)
    return upfirdn2d(y, f, 1, 1, [x0 + cut_x, x1 + cut_x, y0 + cut_y, y1 + cut_y], flip_filter, gain)
