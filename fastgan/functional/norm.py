"""Batch, group, instance and layer norm, each with an activation in the same pass.

Dense float32 or float64 tensors of few elements on a CPU go through PyTorch's own ops (`SMALL`, `functional.small`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgan import _activation, _ranks
from fastgan._layout import dense, is_channels_last, is_dense, planes
from fastgan._op import PLAIN
from fastgan.functional import synchronised
from fastgan.functional.checks import check_channels
from fastgan.functional.small import is_small, learns
from fastgan.ops import bn_act as _bn_act
from fastgan.ops import gn_act as _gn_act
from fastgan.ops.bn_act import moments

Statistics = tuple[Tensor, Tensor] | None  # (mean, var) of a batch

# Elements up to which PyTorch's norm and activation are faster, without and with gradients; twice as many without an
# activation. PyTorch's batch norm of images reads its input twice in training, so there ours is ahead sooner.
SMALL = {
    "batch of images": (8_192, 32_768),
    "batch of rows": (131_072, 131_072),
    "running statistics": (262_144, 262_144),
    "group": (65_536, 131_072),
    "layer": (131_072, 131_072),
}


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
    sync: _ranks.Sync = False,
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
        sync: in training, statistics over the batches of all processes of torch.distributed (True) or of a process
            group, as if one process had them all; exact to second order, all must call (docs/scaling.md).

    Returns:
        x's shape, dtype and layout.

    Raises:
        ValueError: shapes that do not fit, a batch that stat_groups does not divide, one value per channel in
            training, running statistics missing in eval.
    """
    name = "bn_act"
    activation = _activation.check(name, activation, negative_slope, _bn_act.ACTIVATIONS)
    check_channels(name, x, running_mean=running_mean, running_var=running_var, weight=weight, bias=bias)
    act = activation, float(negative_slope)
    if not training:
        if running_mean is None or running_var is None:
            raise ValueError(f"{name}: running_mean and running_var must be given when training=False, got None")
        return _by_running_statistics(x, running_mean, running_var, weight, bias, float(eps), act)
    count = _values_a_statistic(x, stat_groups, _ranks.size(sync))
    if stat_groups == 1 and batch_statistics is None and sync is False and isinstance(momentum, float):
        kind, running = "batch of rows" if x.dim() == 2 else "batch of images", (running_mean, running_var)
        known = (running_mean is None) == (running_var is None)
        if known and _is_small(kind, x, act, weight, bias, *running) and is_dense(x):
            return _by_torch(x, weight, bias, running, momentum, float(eps), act)
    y, mean, var, total = _in_training(x, weight, bias, batch_statistics, float(eps), act, stat_groups, sync)
    if count and (running_mean is not None or running_var is not None):
        update_running(running_mean, running_var, mean, var, count if total is None else total, momentum)
    return y


def _is_small(kind: str, x: Tensor, act: tuple[str, float], *others: Tensor | None) -> bool:
    """Whether PyTorch's own norm takes the call: x is small, and of one dtype with its parameters and statistics.

    16-bit tensors stay ours: without float32 parameters PyTorch rounds their statistics to 16 bits. So do parameters
    with gaps: torch 2.13 reads past them in its batch norm of channels_last.
    """
    largest, dtype = SMALL[kind][learns(x, *others[:2])], x.dtype
    if not is_small(x, 2 * largest if act[0] == "identity" else largest):
        return False
    for t in others:
        if t is not None and (t.dtype != dtype or type(t) not in PLAIN or not t.is_contiguous()):
            return False
    return dtype in (torch.float32, torch.float64)


def _is_group_norm(x: Tensor, act: tuple[str, float], weight: Tensor | None, bias: Tensor | None) -> bool:
    """Whether PyTorch's group norm takes the call; torch 2.13 has no derivative of it for a bias without a weight."""
    return (weight is not None or bias is None) and _is_small("group", x, act, weight, bias) and x.is_contiguous()


def _activated(x: Tensor, t: Tensor, act: tuple[str, float]) -> Tensor:
    """phi(t) of the norm t of x, in the strides that PyTorch's own activation gives it.

    Under gradients the activation keeps t, not its result, so that the caller may overwrite the result as with our
    kernels.
    """
    if not t.requires_grad and x.is_contiguous():
        return _activation.overwrite(t, *act)
    return F.threshold(t, 0.0, 0.0) if act[0] == "relu" else _activation.apply(t, *act)


def _by_torch(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running: Sequence[Tensor | None],
    momentum: float | None,
    eps: float,
    act: tuple[str, float],
) -> Tensor:
    """PyTorch's batch norm, in eval mode where momentum is None.

    It keeps the running statistics for its backward pass. After a training pass that would use the updated ones, unseen
    (`update_running`), hence copies in eval mode; after a write of the caller's it would be refused, hence .data.
    """
    training = momentum is not None
    copied = not training and learns(x, weight, bias)
    mean, var = (None if r is None else r.detach().clone() if copied else r.data for r in running)
    return _activated(x, torch.batch_norm(x, weight, bias, mean, var, training, momentum or 0.0, eps, False), act)


def _by_running_statistics(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    act: tuple[str, float],
) -> Tensor:
    """Batch norm in eval mode."""
    if _is_small("running statistics", x, act, weight, bias, mean, var) and is_dense(x):
        return _by_torch(x, weight, bias, (mean, var), None, eps, act)
    return _bn_act.op(x, weight, bias, mean, var, False, eps, *act, 1)[0]


def _in_training(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    known: Statistics,
    eps: float,
    act: tuple[str, float],
    stat_groups: int,
    sync: _ranks.Sync,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """y, the batch's mean and biased variance, and the number of values behind each; None where one rank takes part."""
    if known is not None:
        _check_statistics(x, *known, stat_groups)
    if _ranks.size(sync) > 1:
        mean, var, total = synchronised.moments(x, *(known or moments(x, stat_groups)), sync)
        return synchronised.normalise(x, weight, bias, mean, var, eps, *act), mean, var, total
    if known is None:
        return *_bn_act.op(x, weight, bias, None, None, True, eps, *act, stat_groups), None
    y = _bn_act.op(x, weight, bias, *known, True, eps, *act, stat_groups)[0]
    return y, *known, None


def _values_a_statistic(x: Tensor, stat_groups: int, ranks: int) -> int:
    """How many values of x each of bn_act's statistics in training is made of."""
    n, _, pixels = planes(x)
    if stat_groups < 1 or n % stat_groups:
        raise ValueError(f"bn_act: stat_groups must divide the batch, got batch {n} and stat_groups={stat_groups}")
    count = n // stat_groups * pixels
    if count == 1 and ranks == 1:
        raise ValueError(
            f"bn_act: training needs more than 1 value per channel and stat group, got x {tuple(x.shape)}; "
            "use a larger batch or call .eval()"
        )
    return count


def _check_statistics(x: Tensor, mean: Tensor, var: Tensor, stat_groups: int) -> None:
    """Statistics that are given must be [stat_groups, C] on x's device."""
    shape = (stat_groups, x.shape[1])
    for v in (mean, var):
        if v.shape != shape or v.device != x.device:
            raise ValueError(
                f"bn_act: batch_statistics must have shape {shape} on {x.device}, got {tuple(v.shape)} on {v.device}"
            )


@torch.no_grad()
def update_running(
    running_mean: Tensor | None,
    running_var: Tensor | None,
    mean: Tensor,
    var: Tensor,
    count: int | Tensor,
    momentum: float | Sequence[float | Tensor],
) -> None:
    """running <- (1 - momentum) running + momentum batch, group after group, as plain PyTorch sees the batches.

    Through .data, which counts no version: nor does PyTorch's batch norm, and one that ran before in the same graph has
    saved these for a backward pass that is still to come. Ours keep copies.
    """
    steps = momentum if isinstance(momentum, Sequence) else [momentum] * len(mean)
    for g, step in enumerate(steps):
        for running, batch in ((running_mean, mean[g]), (running_var, var[g] * (count / (count - 1)))):
            if running is not None:
                running.data.lerp_(
                    batch.to(running.dtype), step.to(running.dtype) if isinstance(step, Tensor) else step
                )


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
        eps, activation, negative_slope: as `bn_act`.

    Returns:
        x's shape, dtype and layout.

    Raises:
        ValueError: shapes that do not fit, channels that num_groups does not divide, a single value per group.
        TypeError: x is not floating.
    """
    name = "gn_act"
    activation = _activation.check(name, activation, negative_slope, _gn_act.ACTIVATIONS)
    check_channels(name, x, weight=weight, bias=bias)
    if num_groups < 1 or x.shape[1] % num_groups:
        raise ValueError(f"{name}: num_groups must divide the channels, got x {tuple(x.shape)} and {num_groups} groups")
    if x.numel() == num_groups:
        raise ValueError(f"{name}: a batch needs more than 1 value per group, got x {tuple(x.shape)}")
    act = activation, float(negative_slope)
    if _is_group_norm(x, act, weight, bias):
        return _activated(x, torch.group_norm(x, int(num_groups), weight, bias, float(eps)), act)
    return _gn_act.op(x, weight, bias, int(num_groups), float(eps), *act)[0]


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
        eps, activation, negative_slope: as `bn_act`.

    Returns:
        x's shape, dtype and layout.

    Raises:
        ValueError: shapes that do not fit, one value per channel, running statistics missing where they are needed.
        TypeError: x is not floating.
    """
    name = "in_act"
    activation = _activation.check(name, activation, negative_slope, _gn_act.ACTIVATIONS)
    check_channels(name, x, running_mean=running_mean, running_var=running_var, weight=weight, bias=bias)
    act = activation, float(negative_slope)
    if not use_input_stats:
        if running_mean is None or running_var is None:
            raise ValueError(f"{name}: running_mean and running_var must be given when use_input_stats=False, got None")
        return _by_running_statistics(x, running_mean, running_var, weight, bias, float(eps), act)
    n, channels, pixels = planes(x)
    if pixels == 1:
        raise ValueError(f"{name}: a sample needs more than 1 value per channel, got x {tuple(x.shape)}")
    if running_mean is None and running_var is None and _is_group_norm(x, act, weight, bias):
        # PyTorch's own instance norm views x as one sample, and takes 43 us where its group norm takes 23
        return _activated(x, torch.group_norm(x, channels, weight, bias, float(eps)), act)
    y, mean, var = _gn_act.op(x, weight, bias, channels, float(eps), *act)
    if n and pixels and (running_mean is not None or running_var is not None):
        # torch's rule: the running statistics follow the samples' average
        mean, var = mean.mean(0, keepdim=True), var.mean(0, keepdim=True)
        update_running(running_mean, running_var, mean, var, pixels, momentum)
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
        eps, activation, negative_slope: as `bn_act`.

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
    act = activation, float(negative_slope)
    if _is_small("layer", x, act, weight, bias) and x.is_contiguous():
        return _activated(x, torch.layer_norm(x, shape, weight, bias, float(eps)), act)
    # whole samples in channels_last: the parameters follow x's memory order, so that x is not copied
    turned = is_channels_last(x) and len(shape) == 3
    image = x.movedim(1, 3) if turned else x
    weight, bias = (None if v is None else (v.movedim(0, 2) if turned else v).reshape(-1) for v in (weight, bias))
    rows = image.reshape(-1, math.prod(shape))
    y = _gn_act.op(rows, weight, bias, 1, float(eps), *act)[0].view(image.shape)
    return y.movedim(3, 1) if turned else dense(y, is_channels_last(x))
