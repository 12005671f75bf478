"""The adversarial losses."""

from __future__ import annotations

from torch import Tensor

from fastgan.ops import gan_loss as _gan_loss


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
