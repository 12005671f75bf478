"""The public functions: torch.nn.functional's arguments in its order, ours keyword-only after them.

Every function is differentiable twice or more, runs on the best backend (see `fastgan.backends`), and returns tensors
of x's dtype and layout. Forward-mode AD and torch.func transforms raise NotImplementedError.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgan import _activation
from fastgan._layout import accumulation_dtype, dense, is_channels_last, planes
from fastgan.ops import bias_act as _bias_act
from fastgan.ops import bn_act as _bn_act
from fastgan.ops import conv2d as _conv2d
from fastgan.ops import conv_transpose2d as _conv_transpose2d
from fastgan.ops import gan_loss as _gan_loss
from fastgan.ops import gn_act as _gn_act
from fastgan.ops import grad_norm_penalty as _grad_norm_penalty
from fastgan.ops import interpolate as _interpolate
from fastgan.penalties import gradient_penalty

__all__ = [
    "bias_act",
    "bn_act",
    "conv2d",
    "conv2d_bias_act",
    "conv2d_bn_act",
    "conv_transpose2d",
    "conv_transpose2d_bn_act",
    "gan_loss",
    "gn_act",
    "grad_norm_penalty",
    "gradient_penalty",
    "in_act",
    "interpolate",
    "ln_act",
]

Size2 = int | Sequence[int]
Statistics = tuple[Tensor, Tensor] | None  # (mean, var) of a batch


def _pair(op: str, name: str, value: Size2, least: int) -> list[int]:
    pair = [int(v) for v in value] if isinstance(value, Sequence) else [int(value)] * 2
    pair = pair * 2 if len(pair) == 1 else pair
    if len(pair) != 2 or min(pair) < least:
        raise ValueError(f"{op}: {name} must be an int or a pair of ints >= {least}, got {value!r}")
    return pair


def _check_tensors(op: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """One clear sentence for wrong ranks, dtypes and devices (shapes are checked by the callers)."""
    if weight.dim() != 4:
        raise ValueError(f"{op}: weight must have 4 dimensions, got shape {tuple(weight.shape)}")
    if x.dim() not in (3, 4):
        raise ValueError(f"{op}: x must be [N,C,H,W] or [C,H,W], got shape {tuple(x.shape)}")
    autocast = torch.is_autocast_enabled(x.device.type)
    for name, t in (("weight", weight), ("bias", bias)):
        if t is None:
            continue
        if t.device != x.device:
            raise ValueError(f"{op}: {name} must be on x's device {x.device}, got {t.device}; move one with .to()")
        if t.dtype != x.dtype and not autocast:
            raise TypeError(f"{op}: {name} must have x's dtype {x.dtype}, got {t.dtype}; convert one with .to()")
    if not x.is_floating_point():
        raise TypeError(f"{op}: x must be a floating tensor, got {x.dtype}; convert it with .float()")


def conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Size2 = 1,
    padding: Size2 | str = 0,
    dilation: Size2 = 1,
    groups: int = 1,
    *,
    activation: str | None = None,
    negative_slope: float = 0.2,
) -> Tensor:
    """2-D convolution with bias and activation in one kernel.

    Args:
        x: [N, C, H, W] or [C, H, W], floating.
        weight: [K, C/groups, R, S], x's dtype and device.
        bias: [K] or None.
        stride, padding, dilation, groups: as `torch.nn.functional.conv2d`; padding may be "same" or "valid".
        activation: None, "identity", "relu", "leaky_relu", "tanh" or "sigmoid".
        negative_slope: of leaky_relu, >= 0.

    Returns:
        [N, K, OH, OW], x's dtype; channels_last if x or weight is.

    Raises:
        ValueError: shapes that do not fit, an unknown activation, a negative slope below 0.
        TypeError: dtypes that differ outside autocast.
    """
    activation = _activation.check("conv2d", activation, negative_slope)
    args = _conv2d_arguments(x, weight, bias, stride, padding, dilation, groups)
    y = _conv2d.op(*args, activation, float(negative_slope))
    return y if x.dim() == 4 else y.squeeze(0)


def _conv2d_arguments(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: Size2, padding: Size2 | str, dilation: Size2, groups: int
) -> tuple:
    """The op's arguments up to groups, checked."""
    name = "conv2d"
    _check_tensors(name, x, weight, bias)
    strides, dilations = _pair(name, "stride", stride, 1), _pair(name, "dilation", dilation, 1)
    if isinstance(padding, str):
        x, padding = _string_padding(x, weight, strides, padding, dilations)
    paddings = _pair(name, "padding", padding, 0)
    if groups < 1 or x.shape[-3] != weight.shape[1] * groups or weight.shape[0] % groups:
        raise ValueError(
            f"{name}: x must have weight.shape[1] * groups = {weight.shape[1] * groups} channels and weight.shape[0] "
            f"must be a multiple of groups, got x {tuple(x.shape)}, weight {tuple(weight.shape)}, groups={groups}"
        )
    _check_bias(name, bias, weight.shape[0])
    batched = x if x.dim() == 4 else x.unsqueeze(0)
    _, _, oh, ow = _conv2d.output_shape(batched, weight, strides, paddings, dilations)
    if oh < 1 or ow < 1:
        raise ValueError(
            f"{name}: the kernel must fit into the padded input, got x {tuple(x.shape)}, weight "
            f"{tuple(weight.shape)}, padding {paddings}, dilation {dilations}"
        )
    return batched, weight, bias, strides, paddings, dilations, groups


def conv2d_statistics(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Size2 = 1,
    padding: Size2 | str = 0,
    dilation: Size2 = 1,
    groups: int = 1,
    *,
    stat_groups: int = 1,
) -> tuple[Tensor, Statistics]:
    """`conv2d` and, where a GPU's kernel makes them in its epilogue, y's batch statistics for `bn_act`.

    Returns:
        (y, (mean, var)) with [stat_groups, K] float32 statistics of y, var biased, no gradients; (y, None) on a CPU and
        wherever `bn_act` is as fast with its own.
    """
    args = _conv2d_arguments(x, weight, bias, stride, padding, dilation, groups)
    shape = _conv2d.output_shape(args[0], weight, *args[3:6])
    if x.dim() == 4 and _conv2d.statistics_pay(shape, x.device.type, "conv2d_statistics", stat_groups):
        y, mean, var = _conv2d.statistics(*args, stat_groups)
        return y, (mean, var)
    y = _conv2d.op(*args, "identity", 0.0)
    return y if x.dim() == 4 else y.squeeze(0), None


def _string_padding(
    x: Tensor, weight: Tensor, stride: list[int], padding: str, dilation: list[int]
) -> tuple[Tensor, list[int]]:
    """torch's "valid" and "same"; an odd total puts the extra zero at the end, as torch does."""
    if padding == "valid":
        return x, [0, 0]
    if padding != "same" or max(stride) > 1:
        raise ValueError(
            f'conv2d: padding must be ints, "valid", or "same" with stride 1, got {padding!r} with stride {stride}'
        )
    total = [dilation[i] * (weight.shape[2 + i] - 1) for i in (0, 1)]
    if total[0] % 2 or total[1] % 2:
        x = F.pad(x, (0, total[1] % 2, 0, total[0] % 2))
    return x, [t // 2 for t in total]


def _check_bias(op: str, bias: Tensor | None, channels: int) -> None:
    if bias is not None and tuple(bias.shape) != (channels,):
        raise ValueError(f"{op}: bias must have shape ({channels},), got {tuple(bias.shape)}")


def conv_transpose2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Size2 = 1,
    padding: Size2 = 0,
    output_padding: Size2 = 0,
    groups: int = 1,
    dilation: Size2 = 1,
    *,
    activation: str | None = None,
    negative_slope: float = 0.2,
) -> Tensor:
    """2-D transposed convolution with bias and activation in one kernel, computed by output phase.

    Args:
        x: [N, C, H, W] or [C, H, W], floating.
        weight: [C, K/groups, R, S], x's dtype and device.
        bias: [K] or None.
        stride, padding, output_padding, groups, dilation: as `torch.nn.functional.conv_transpose2d`.
        activation: None, "identity", "relu", "leaky_relu", "tanh" or "sigmoid".
        negative_slope: of leaky_relu, >= 0.

    Returns:
        [N, K, OH, OW], x's dtype; channels_last if x or weight is.

    Raises:
        ValueError: shapes that do not fit, an unknown activation, a negative slope below 0.
        TypeError: dtypes that differ outside autocast.
    """
    activation = _activation.check("conv_transpose2d", activation, negative_slope)
    args = _conv_transpose2d_arguments(x, weight, bias, stride, padding, output_padding, groups, dilation)
    y = _conv_transpose2d.op(*args, activation, float(negative_slope))
    return y if x.dim() == 4 else y.squeeze(0)


def _conv_transpose2d_arguments(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Size2,
    padding: Size2,
    output_padding: Size2,
    groups: int,
    dilation: Size2,
) -> tuple:
    """The op's arguments up to dilation, checked."""
    name = "conv_transpose2d"
    _check_tensors(name, x, weight, bias)
    strides, dilations = _pair(name, "stride", stride, 1), _pair(name, "dilation", dilation, 1)
    paddings, extra = _pair(name, "padding", padding, 0), _pair(name, "output_padding", output_padding, 0)
    if groups < 1 or x.shape[-3] != weight.shape[0] or weight.shape[0] % groups:
        raise ValueError(
            f"{name}: x must have weight.shape[0] = {weight.shape[0]} channels, a multiple of groups, "
            f"got x {tuple(x.shape)}, weight {tuple(weight.shape)}, groups={groups}"
        )
    if any(extra[i] >= max(strides[i], dilations[i]) for i in (0, 1)):
        raise ValueError(
            f"{name}: output_padding must be smaller than stride or dilation, got {extra} with stride {strides} "
            f"and dilation {dilations}"
        )
    _check_bias(name, bias, weight.shape[1] * groups)
    batched = x if x.dim() == 4 else x.unsqueeze(0)
    shape = _conv_transpose2d.output_shape(batched, weight, strides, paddings, extra, groups, dilations)
    if min(shape[2:]) < 1:
        raise ValueError(f"{name}: the output must not be empty, got x {tuple(x.shape)}, padding {paddings}")
    return batched, weight, bias, strides, paddings, extra, groups, dilations


def conv_transpose2d_statistics(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Size2 = 1,
    padding: Size2 = 0,
    output_padding: Size2 = 0,
    groups: int = 1,
    dilation: Size2 = 1,
    *,
    stat_groups: int = 1,
) -> tuple[Tensor, Statistics]:
    """`conv_transpose2d` with batch statistics, as `conv2d_statistics`."""
    args = _conv_transpose2d_arguments(x, weight, bias, stride, padding, output_padding, groups, dilation)
    shape = _conv_transpose2d.output_shape(args[0], weight, *args[3:])
    if x.dim() == 4 and _conv2d.statistics_pay(shape, x.device.type, "conv_transpose2d_statistics", stat_groups):
        y, mean, var = _conv_transpose2d.statistics(*args, stat_groups)
        return y, (mean, var)
    y = _conv_transpose2d.op(*args, "identity", 0.0)
    return y if x.dim() == 4 else y.squeeze(0), None


def bias_act(
    x: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = "leaky_relu",
    negative_slope: float = 0.2,
) -> Tensor:
    """activation(x + bias) with bias along dimension 1.

    Args:
        x: [N, C, *], floating.
        bias: [C] or None.
        activation: None, "identity", "relu", "leaky_relu", "tanh" or "sigmoid".
        negative_slope: of leaky_relu, >= 0.

    Returns:
        x's shape, dtype and layout.
    """
    activation = _activation.check("bias_act", activation, negative_slope)
    if x.dim() < 2:
        raise ValueError(f"bias_act: x must have at least 2 dimensions [N, C, *], got shape {tuple(x.shape)}")
    _check_bias("bias_act", bias, x.shape[1])
    return _bias_act.op(x, bias, activation, float(negative_slope))


def bn_act(
    x: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    training: bool,
    momentum: float | Sequence[float | Tensor] = 0.1,
    eps: float = 1e-5,
    activation: str | None = "leaky_relu",
    negative_slope: float = 0.2,
    stat_groups: int = 1,
    batch_statistics: Statistics = None,
) -> Tensor:
    """Batch norm followed by an activation, with statistics over `stat_groups` equal parts of the batch.

    Equals `torch.nn.functional.batch_norm` and the activation on each part in turn, running statistics included.

    Args:
        x: [N, C, *], floating.
        running_mean, running_var: [C] or None; updated in place in training (unbiased variance), needed in eval.
        weight, bias: [C] or None.
        training: statistics of the batch (True) or the running ones (False).
        momentum: of the running statistics; a sequence gives each stat group its own.
        eps: added to the variance.
        activation: None, "identity", "relu" or "leaky_relu".
        negative_slope: of leaky_relu, >= 0.
        stat_groups: number of equal parts of the batch; in eval mode it has no effect.
        batch_statistics: in training, x's own (mean, biased var), [stat_groups, C] each, where they are known already
            (`conv2d_statistics`): x is then read once. Gradients are those of statistics computed here.

    Returns:
        x's shape, dtype and layout.

    Raises:
        ValueError: shapes that do not fit, a batch that stat_groups does not divide, one value per channel in
            training, running statistics missing in eval.
    """
    name = "bn_act"
    activation = _activation.check(name, activation, negative_slope, _bn_act.ACTIVATIONS)
    _check_norm(name, x, running_mean=running_mean, running_var=running_var, weight=weight, bias=bias)
    n, _, pixels = planes(x)
    if not training:
        if running_mean is None or running_var is None:
            raise ValueError(f"{name}: running_mean and running_var must be given when training=False, got None")
        return _bn_act.op(
            x,
            weight,
            bias,
            running_mean,
            running_var,
            False,
            float(eps),
            activation,
            float(negative_slope),
            1,
        )[0]
    if stat_groups < 1 or n % stat_groups:
        raise ValueError(f"{name}: stat_groups must divide the batch, got batch {n} and stat_groups={stat_groups}")
    count = n // stat_groups * pixels
    if n and pixels and count == 1:
        raise ValueError(
            f"{name}: training needs more than 1 value per channel and stat group, got x {tuple(x.shape)}; "
            "use a larger batch or call .eval()"
        )
    if batch_statistics is None:
        y, mean, var = _bn_act.op(
            x, weight, bias, None, None, True, float(eps), activation, float(negative_slope), stat_groups
        )
    else:
        mean, var = batch_statistics
        shape = (stat_groups, x.shape[1])
        if mean.shape != shape or var.shape != shape or mean.device != x.device or var.device != x.device:
            raise ValueError(
                f"{name}: batch_statistics must have shape {shape} on {x.device}, "
                f"got {tuple(mean.shape)} on {mean.device} and {tuple(var.shape)} on {var.device}"
            )
        y = _bn_act.op(x, weight, bias, mean, var, True, float(eps), activation, float(negative_slope), stat_groups)[0]
    if count:
        _update(running_mean, running_var, mean, var, count, momentum)
    return y


@torch.no_grad()
def _update(
    running_mean: Tensor | None,
    running_var: Tensor | None,
    mean: Tensor,
    var: Tensor,
    count: int,
    momentum: float | Sequence[float | Tensor],
) -> None:
    """running <- (1 - momentum) running + momentum batch, group after group, as plain PyTorch sees the batches."""
    steps = momentum if isinstance(momentum, Sequence) else [momentum] * len(mean)
    for g, step in enumerate(steps):
        for running, batch in ((running_mean, mean[g]), (running_var, var[g] * (count / (count - 1)))):
            if running is not None:
                running.lerp_(batch.to(running.dtype), step.to(running.dtype) if isinstance(step, Tensor) else step)


def gn_act(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    activation: str | None = "leaky_relu",
    negative_slope: float = 0.2,
) -> Tensor:
    """Group norm followed by an activation.

    Args:
        x: [N, C, *], floating.
        num_groups: C must be a multiple of it; each group of C/num_groups channels of a sample has its own statistics.
        weight, bias: [C] or None.
        eps: added to the variance.
        activation: None, "identity", "relu" or "leaky_relu".
        negative_slope: of leaky_relu, >= 0.

    Returns:
        x's shape, dtype and layout.

    Raises:
        ValueError: shapes that do not fit, channels that num_groups does not divide, a single value per group.
        TypeError: x is not floating.
    """
    name = "gn_act"
    activation = _activation.check(name, activation, negative_slope, _gn_act.ACTIVATIONS)
    _check_norm(name, x, weight=weight, bias=bias)
    if num_groups < 1 or x.shape[1] % num_groups:
        raise ValueError(f"{name}: num_groups must divide the channels, got x {tuple(x.shape)} and {num_groups} groups")
    if x.numel() == num_groups:
        raise ValueError(f"{name}: a batch needs more than 1 value per group, got x {tuple(x.shape)}")
    return _gn_act.op(x, weight, bias, int(num_groups), float(eps), activation, float(negative_slope))[0]


def _check_norm(op: str, x: Tensor, **vectors: Tensor | None) -> None:
    """One clear sentence for an x that is not [N, C, *] floating, or vectors that are not [C] beside it."""
    if x.dim() < 2:
        raise ValueError(f"{op}: x must have at least 2 dimensions [N, C, *], got shape {tuple(x.shape)}")
    if not x.is_floating_point():
        raise TypeError(f"{op}: x must be a floating tensor, got {x.dtype}; convert it with .float()")
    for what, v in vectors.items():
        if v is not None and (tuple(v.shape) != (x.shape[1],) or v.device != x.device):
            raise ValueError(
                f"{op}: {what} must have shape ({x.shape[1]},) on {x.device}, got {tuple(v.shape)} on {v.device}"
            )


def in_act(
    x: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    activation: str | None = "leaky_relu",
    negative_slope: float = 0.2,
) -> Tensor:
    """Instance norm followed by an activation: `gn_act` with a group a channel.

    Args:
        x: [N, C, *] with more than one value per channel, floating.
        running_mean, running_var: [C] or None; updated in place with the batch's average where use_input_stats, and
            needed where not.
        weight, bias: [C] or None.
        use_input_stats: statistics of each sample (True) or the running ones (False), which is eval-mode batch norm.
        momentum: of the running statistics.
        eps: added to the variance.
        activation: None, "identity", "relu" or "leaky_relu".
        negative_slope: of leaky_relu, >= 0.

    Returns:
        x's shape, dtype and layout.

    Raises:
        ValueError: shapes that do not fit, one value per channel, running statistics missing where they are needed.
        TypeError: x is not floating.
    """
    name = "in_act"
    activation = _activation.check(name, activation, negative_slope, _gn_act.ACTIVATIONS)
    _check_norm(name, x, running_mean=running_mean, running_var=running_var, weight=weight, bias=bias)
    if not use_input_stats:
        if running_mean is None or running_var is None:
            raise ValueError(f"{name}: running_mean and running_var must be given when use_input_stats=False, got None")
        return bn_act(
            x, running_mean, running_var, weight, bias, training=False, eps=eps,
            activation=activation, negative_slope=negative_slope,
        )  # fmt: skip
    n, channels, pixels = planes(x)
    if pixels == 1:
        raise ValueError(f"{name}: a sample needs more than 1 value per channel, got x {tuple(x.shape)}")
    y, mean, var = _gn_act.op(x, weight, bias, channels, float(eps), activation, float(negative_slope))
    if n and pixels and (running_mean is not None or running_var is not None):
        # torch's rule: the running statistics follow the samples' average
        mean, var = mean.mean(0, keepdim=True), var.mean(0, keepdim=True)
        _update(running_mean, running_var, mean, var, pixels, momentum)
    return y


def ln_act(
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    activation: str | None = "leaky_relu",
    negative_slope: float = 0.2,
) -> Tensor:
    """Layer norm over the trailing dimensions followed by an activation: `gn_act` on x viewed as rows.

    Args:
        x: [*, *normalized_shape], floating.
        normalized_shape: the trailing dimensions that share statistics.
        weight, bias: of normalized_shape, or None.
        eps: added to the variance.
        activation: None, "identity", "relu" or "leaky_relu".
        negative_slope: of leaky_relu, >= 0.

    Returns:
        x's shape, dtype and layout.

    Raises:
        ValueError: shapes that do not fit.
        TypeError: x is not floating.
    """
    name, shape = "ln_act", tuple(normalized_shape)
    activation = _activation.check(name, activation, negative_slope, _gn_act.ACTIVATIONS)
    if not x.is_floating_point():
        raise TypeError(f"{name}: x must be a floating tensor, got {x.dtype}; convert it with .float()")
    if not shape or tuple(x.shape[-len(shape) :]) != shape:
        raise ValueError(f"{name}: x must end in normalized_shape {shape}, got x {tuple(x.shape)}")
    for what, v in (("weight", weight), ("bias", bias)):
        if v is not None and (tuple(v.shape) != shape or v.device != x.device):
            raise ValueError(
                f"{name}: {what} must have shape {shape} on {x.device}, got {tuple(v.shape)} on {v.device}"
            )
    # whole samples in channels_last: the parameters follow x's memory order, so that x is not copied
    turned = is_channels_last(x) and len(shape) == 3
    image = x.movedim(1, 3) if turned else x
    weight, bias = (None if v is None else (v.movedim(0, 2) if turned else v).reshape(-1) for v in (weight, bias))
    rows = image.reshape(-1, math.prod(shape))
    y = _gn_act.op(rows, weight, bias, 1, float(eps), activation, float(negative_slope))[0].view(image.shape)
    return y.movedim(3, 1) if turned else dense(y, is_channels_last(x))


def gan_loss(
    logits_fake: Tensor,
    logits_real: Tensor | None = None,
    *,
    kind: str,
    side: str,
    label_smoothing: float = 0.0,
) -> Tensor:
    """An adversarial loss of discriminator logits (before any sigmoid).

    Args:
        logits_fake: D(fake), any shape, floating.
        logits_real: D(real); needed for side "d" and for kind "relativistic" (then of logits_fake's shape).
        kind: "bce" (non-saturating), "minimax", "lsgan", "hinge", "wasserstein" or "relativistic"; the formulas are in
            `fastgan.ops.gan_loss`. lsgan carries the factor 1/2 of Mao et al.; twice the loss is the plain square.
        side: "d" for the discriminator's loss, "g" for the generator's.
        label_smoothing: the target of real logits is 1 - label_smoothing (bce, minimax, lsgan on side "d").

    Returns:
        The scalar loss in the logits' dtype.
    """
    return gan_loss_statistics(logits_fake, logits_real, kind=kind, side=side, label_smoothing=label_smoothing)[0]


def gan_loss_statistics(
    logits_fake: Tensor,
    logits_real: Tensor | None = None,
    *,
    kind: str,
    side: str,
    label_smoothing: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """`gan_loss` and, from the same pass, [6] statistics: mean logit, mean sigmoid, accuracy, each real then fake."""
    name = "gan_loss"
    if kind not in _gan_loss.KINDS:
        raise ValueError(f"{name}: kind must be one of {', '.join(_gan_loss.KINDS)}, got {kind!r}")
    if side not in _gan_loss.SIDES:
        raise ValueError(f'{name}: side must be "d" or "g", got {side!r}')
    if logits_real is None and (side == "d" or kind == "relativistic"):
        raise ValueError(f"{name}: logits_real must be given for kind {kind!r} on side {side!r}, got None")
    if logits_real is not None and kind == "relativistic" and logits_real.shape != logits_fake.shape:
        raise ValueError(
            f"{name}: relativistic pairing needs equal shapes, got fake {tuple(logits_fake.shape)} and real "
            f"{tuple(logits_real.shape)}"
        )
    if logits_real is not None and logits_real.dtype != logits_fake.dtype:
        raise TypeError(f"{name}: logits must have one dtype, got {logits_fake.dtype} and {logits_real.dtype}")
    if not logits_fake.is_floating_point():
        raise TypeError(f"{name}: logits must be floating tensors, got {logits_fake.dtype}")
    if label_smoothing and kind not in _gan_loss.SMOOTHED:
        raise ValueError(f"{name}: label_smoothing needs one of {', '.join(_gan_loss.SMOOTHED)}, got kind {kind!r}")
    return _gan_loss.op(logits_fake, logits_real, kind, side, float(label_smoothing))


def interpolate(
    real: Tensor,
    fake: Tensor,
    epsilon: Tensor | None = None,
    *,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Points between samples, epsilon real + (1 - epsilon) fake, one epsilon a sample (WGAN-GP); no resizing.

    Args:
        real, fake: [N, *], one shape, dtype and device, floating.
        epsilon: [N]; None draws it uniformly from [0, 1).
        generator: of the random numbers.

    Returns:
        real's shape, dtype and layout.

    Raises:
        ValueError: shapes or devices that differ.
        TypeError: dtypes that differ or are not floating.
    """
    name = "interpolate"
    if real.dim() < 1 or fake.shape != real.shape or fake.device != real.device:
        raise ValueError(
            f"{name}: fake must have real's shape [N, *] {tuple(real.shape)} on {real.device}, "
            f"got {tuple(fake.shape)} on {fake.device}"
        )
    if fake.dtype != real.dtype or not real.is_floating_point():
        raise TypeError(f"{name}: real and fake must have one floating dtype, got {real.dtype} and {fake.dtype}")
    if epsilon is None:
        dtype = accumulation_dtype(real.dtype)
        epsilon = torch.rand(len(real), generator=generator, device=real.device, dtype=dtype)
    elif tuple(epsilon.shape) != (len(real),) or epsilon.device != real.device:
        raise ValueError(
            f"{name}: epsilon must have shape ({len(real)},) on {real.device}, "
            f"got {tuple(epsilon.shape)} on {epsilon.device}"
        )
    return _interpolate.op(real, fake, epsilon, None)


def grad_norm_penalty(gradient: Tensor, target: float = 1.0) -> Tensor:
    """(|g| - target)^2 of each sample's gradient g, with derivative 0 where |g| = 0.

    Args:
        gradient: [N, *], floating; norms are over everything but the first dimension, summed in float32 or better.
        target: 1 for WGAN-GP and DRAGAN; 0 gives |g|^2, the penalty of R1 and R2.

    Returns:
        [N], float32 (float64 for float64).

    Raises:
        ValueError: gradient has fewer than 2 dimensions, or target is negative.
        TypeError: gradient is not floating.
    """
    name = "grad_norm_penalty"
    if gradient.dim() < 2:
        raise ValueError(f"{name}: gradient must have at least 2 dimensions [N, *], got {tuple(gradient.shape)}")
    if not gradient.is_floating_point():
        raise TypeError(f"{name}: gradient must be a floating tensor, got {gradient.dtype}")
    if not target >= 0:
        raise ValueError(f"{name}: target must be >= 0, got {target}")
    return _grad_norm_penalty.op(gradient, float(target))[0]


def conv2d_bias_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Size2 = 1,
    padding: Size2 | str = 0,
    dilation: Size2 = 1,
    groups: int = 1,
    *,
    activation: str | None = "leaky_relu",
    negative_slope: float = 0.2,
) -> Tensor:
    """`conv2d` whose activation defaults to leaky ReLU: the critic's block."""
    return conv2d(
        x,
        weight,
        bias,
        stride,
        padding,
        dilation,
        groups,
        activation=activation,
        negative_slope=negative_slope,
    )


def conv2d_bn_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Size2 = 1,
    padding: Size2 | str = 0,
    dilation: Size2 = 1,
    groups: int = 1,
    *,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    bn_weight: Tensor | None = None,
    bn_bias: Tensor | None = None,
    training: bool,
    momentum: float | Sequence[float | Tensor] = 0.1,
    eps: float = 1e-5,
    activation: str | None = "leaky_relu",
    negative_slope: float = 0.2,
    stat_groups: int = 1,
) -> Tensor:
    """Convolution, batch norm and activation; arguments as `conv2d` and `bn_act`.

    In training on a GPU the statistics come out of the convolution's epilogue, and the norm reads its input once. In
    eval mode the norm folds into the convolution's weight and bias where that is less work (there are about as many
    output pixels as taps, or more): one kernel, equal to rounding.
    """
    pays = _pixels(x) >= weight[0].numel() * math.prod(_pair("conv2d", "stride", stride, 1))
    if pays and not training and running_mean is not None and running_var is not None:
        weight, bias = _fold(weight, bias, running_mean, running_var, bn_weight, bn_bias, eps, channel_dim=0)
        return conv2d(
            x,
            weight,
            bias,
            stride,
            padding,
            dilation,
            groups,
            activation=activation,
            negative_slope=negative_slope,
        )
    known: Statistics = None
    if training:
        y, known = conv2d_statistics(x, weight, bias, stride, padding, dilation, groups, stat_groups=stat_groups)
    else:
        y = conv2d(x, weight, bias, stride, padding, dilation, groups)
    return bn_act(
        y, running_mean, running_var, bn_weight, bn_bias, training=training, momentum=momentum, eps=eps,
        activation=activation, negative_slope=negative_slope, stat_groups=stat_groups, batch_statistics=known,
    )  # fmt: skip


def conv_transpose2d_bn_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Size2 = 1,
    padding: Size2 = 0,
    output_padding: Size2 = 0,
    groups: int = 1,
    dilation: Size2 = 1,
    *,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    bn_weight: Tensor | None = None,
    bn_bias: Tensor | None = None,
    training: bool,
    momentum: float | Sequence[float | Tensor] = 0.1,
    eps: float = 1e-5,
    activation: str | None = "leaky_relu",
    negative_slope: float = 0.2,
    stat_groups: int = 1,
) -> Tensor:
    """Transposed convolution, batch norm and activation; arguments as `conv_transpose2d` and `bn_act`.

    In training as `conv2d_bn_act`. In eval mode (groups = 1) the norm folds into the convolution's weight and bias
    where that is less work (there are about as many output pixels as weights of an output channel, or more).
    """
    pays = _pixels(x) * math.prod(_pair("conv_transpose2d", "stride", stride, 1)) >= weight[:, 0].numel()
    if pays and not training and groups == 1 and running_mean is not None and running_var is not None:
        weight, bias = _fold(weight, bias, running_mean, running_var, bn_weight, bn_bias, eps, channel_dim=1)
        return conv_transpose2d(
            x, weight, bias, stride, padding, output_padding, groups, dilation,
            activation=activation, negative_slope=negative_slope,
        )  # fmt: skip
    known: Statistics = None
    if training:
        y, known = conv_transpose2d_statistics(
            x, weight, bias, stride, padding, output_padding, groups, dilation, stat_groups=stat_groups
        )
    else:
        y = conv_transpose2d(x, weight, bias, stride, padding, output_padding, groups, dilation)
    return bn_act(
        y, running_mean, running_var, bn_weight, bn_bias, training=training, momentum=momentum, eps=eps,
        activation=activation, negative_slope=negative_slope, stat_groups=stat_groups, batch_statistics=known,
    )  # fmt: skip


def _pixels(x: Tensor) -> int:
    return x.numel() // max(x.shape[-3], 1)


def _fold(
    weight: Tensor,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    eps: float,
    channel_dim: int,
) -> tuple[Tensor, Tensor]:
    """(weight, bias) of the convolution that does its own eval-mode batch norm; differentiable, computed in float32.

    Anew at each call, weight.numel() multiplications: nothing tells reliably that weights or statistics changed
    (`_version` does not move under fused optimisers, numpy views or `.data`). The pass that it saves reads and writes
    output.numel() elements, so callers fold where that is about the larger number.
    """
    scale = (var.to(accumulation_dtype(var.dtype)) + eps).rsqrt()
    scale = scale if gamma is None else gamma * scale
    shape = [1] * 4
    shape[channel_dim] = -1
    shift = -mean * scale if bias is None else (bias - mean) * scale
    shift = shift if beta is None else shift + beta
    folded = weight.to(scale.dtype) * scale.view(shape)
    return folded.to(weight.dtype), shift.to(weight.dtype)
