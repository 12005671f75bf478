"""The adversarial losses."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastgan._layout import accumulation_dtype
from fastgan.functional.small import is_small, learns
from fastgan.ops import gan_loss as _gan_loss

KINDS = (*_gan_loss.KINDS, "relativistic-average")
RELATIVE = ("relativistic", "relativistic-average")  # these compare real with fake logits, on both sides

Logits = Tensor | Sequence[Tensor]

# Logits of a side up to which PyTorch's ops are faster, without and with gradients; a mean alone is one read. The kinds
# that are missing have three ops or more on each side.
ALL = 2**62
SMALL = {
    ("wasserstein", "d"): (ALL, ALL),
    ("wasserstein", "g"): (ALL, ALL),
    ("hinge", "g"): (ALL, ALL),
    ("lsgan", "g"): (ALL, 8_192),
    ("bce", "g"): (16_384, 16_384),
    ("minimax", "g"): (16_384, 16_384),
    ("relativistic", "d"): (65_536, 32_768),
    ("relativistic", "g"): (65_536, 32_768),
}


def gan_loss(
    logits_fake: Logits,
    logits_real: Logits | None = None,
    *,
    kind: str,
    side: str,
    label_smoothing: float | tuple[float, float] = 0.0,
    weights: Sequence[float] | None = None,
) -> Tensor:
    """An adversarial loss of discriminator logits (before any sigmoid), differentiable twice.

    Args:
        logits_fake: D(fake), any shape, floating; or a list or tuple of them, one for each scale.
        logits_real: D(real), likewise; needed for side "d" and for the relativistic kinds (for "relativistic", which
            pairs sample with sample, of logits_fake's shape).
        kind: "bce" (non-saturating), "minimax", "lsgan", "hinge", "wasserstein" or "relativistic"; the formulas are in
            `fastgan.ops.gan_loss`. lsgan carries the factor 1/2 of Mao et al.; twice the loss is the plain square.
            "relativistic-average" compares each logit with the other kind's mean (Jolicoeur-Martineau 2018), sp the
            softplus: D mean sp(-(r - mean f)) + mean sp(f - mean r), G mean sp(-(f - mean r)) + mean sp(r - mean f).
        side: "d" for the discriminator's loss, "g" for the generator's.
        label_smoothing: the target of real logits is 1 - label_smoothing (bce, minimax, lsgan on side "d"); a pair
            (s, t) smooths both sides: real logits' target is 1 - s, fake logits' is t.
        weights: of the scales; None: 1 each. The loss is the weighted sum of the scales' losses.

    Returns:
        The scalar loss in the logits' dtype.

    Raises:
        ValueError: an unknown kind or side, logits missing, shapes or numbers of scales that do not fit.
        TypeError: dtypes that differ, logits that are not floating.
    """
    return _of_scales(logits_fake, logits_real, weights, (kind, side, label_smoothing, False))[0]


def gan_loss_statistics(
    logits_fake: Logits,
    logits_real: Logits | None = None,
    *,
    kind: str,
    side: str,
    label_smoothing: float | tuple[float, float] = 0.0,
    weights: Sequence[float] | None = None,
) -> tuple[Tensor, Tensor]:
    """`gan_loss` and, from the same pass, [6] statistics: mean logit, mean sigmoid, accuracy, each real then fake.

    Those of several scales are averaged.
    """
    form = kind, side, label_smoothing, True
    return _of_scales(logits_fake, logits_real, weights, form)  # type: ignore[return-value]


def gan_loss_terms(logits: Logits, *, of: str, kind: str, label_smoothing: float | tuple[float, float] = 0.0) -> Tensor:
    """The part of D's `gan_loss` that real logits (of="real") or fake ones (of="fake") have alone; both add up to it.

    So each may be differentiated before the other's logits exist. Not for the kinds in RELATIVE.
    """
    of_real, of_fake = _smoothing(label_smoothing)
    scales = [logits] if isinstance(logits, Tensor) else list(logits)
    terms = []
    for t in scales:
        _check(t, t, kind, "d", bool(of_real or of_fake))
        if of == "real":
            terms.append(_gan_loss.real_term(t, kind, float(of_real)))
        else:
            term = _gan_loss.fake_term(t, kind)
            terms.append(term + _smoothed_fakes(t, kind, of_fake) if of_fake else term)
    return terms[0] if len(terms) == 1 else torch.stack(terms).sum()


def _smoothing(value: float | tuple[float, float]) -> tuple[float, float]:
    """(of real logits, of fake ones)."""
    return (value[0], value[1]) if isinstance(value, tuple | list) else (value, 0.0)


def _smoothed_fakes(fake: Tensor, kind: str, target: float) -> Tensor:
    """A target t of the fake logits takes t mean f away from bce, minimax and lsgan alike; lsgan gains t^2 / 2 too."""
    square = target**2 / 2 if kind == "lsgan" else 0.0
    return square - target * fake.to(accumulation_dtype(fake.dtype)).mean()


def _scales(fake: Logits, real: Logits | None) -> tuple[list[Tensor], list[Tensor | None]]:
    fakes = [fake] if isinstance(fake, Tensor) else list(fake)
    reals: list[Tensor | None] = (
        [None] * len(fakes) if real is None else list([real] if torch.is_tensor(real) else real)
    )
    if not fakes or len(fakes) != len(reals):
        raise ValueError(f"gan_loss: fake and real logits must have as many scales, got {len(fakes)} and {len(reals)}")
    return fakes, reals


def _weights(weights: Sequence[float] | None, scales: int) -> list[float]:
    factors = [1.0] * scales if weights is None else [float(w) for w in weights]
    if len(factors) != scales:
        raise ValueError(f"gan_loss: weights must have one number a scale, got {len(factors)} for {scales} scales")
    return factors


def _of_scales(
    logits_fake: Logits, logits_real: Logits | None, weights: Sequence[float] | None, form: tuple
) -> tuple[Tensor, Tensor | None]:
    """The weighted sum of `_of_one(fake, real, *form)` over the scales, and the mean of their statistics."""
    if isinstance(logits_fake, Tensor) and not isinstance(logits_real, list | tuple):
        factor = 1.0 if weights is None else _weights(weights, 1)[0]
        loss, statistics = _of_one(logits_fake, logits_real, *form)  # type: ignore[arg-type]  # `_check` looks
        return (loss if factor == 1.0 else factor * loss), statistics
    fakes, reals = _scales(logits_fake, logits_real)
    factors = _weights(weights, len(fakes))
    parts = [_of_one(f, r, *form) for f, r in zip(fakes, reals, strict=True)]
    loss = torch.stack([factor * part[0] for factor, part in zip(factors, parts, strict=True)]).sum()
    made = [part[1] for part in parts if part[1] is not None]
    return loss, torch.stack(made).mean(0) if made else None


def _of_one(
    fake: Tensor, real: Tensor | None, kind: str, side: str, smoothing: float | tuple[float, float], reported: bool
) -> tuple[Tensor, Tensor | None]:
    """The loss of one scale; reported: and its statistics."""
    of_real, of_fake = _smoothing(smoothing)
    _check(fake, real, kind, side, bool(of_real or of_fake))
    if kind == "relativistic-average" and real is not None:
        return _relative_to_the_mean(fake, real, side, reported)
    loss, statistics = _made(fake, real, kind, side, float(of_real), reported)
    if of_fake and side == "d":
        loss = loss + _smoothed_fakes(fake, kind, of_fake).to(loss.dtype)
    return loss, statistics


def _made(
    fake: Tensor, real: Tensor | None, kind: str, side: str, smoothing: float, reported: bool
) -> tuple[Tensor, Tensor | None]:
    """By PyTorch's ops where they are faster, else by the kernel. 16-bit logits stay ours: our means are float32."""
    if reported:
        return _gan_loss.op(fake, real, kind, side, smoothing, True)
    if side == "g" and kind != "relativistic":
        real = None  # the statistics alone would read it
    if (kind, side) in SMALL and (fake.dtype is torch.float32 or fake.dtype is torch.float64):
        largest = SMALL[kind, side][learns(fake, real)]
        alike = real is None or (real.is_cpu and 0 < real.numel() <= largest)  # is_small takes 2 to 12 us
        if alike and is_small(fake, largest):
            return _gan_loss.formula(fake, real, kind, side, smoothing), None
    return _gan_loss.op(fake, real, kind, side, smoothing, False)[0], None


def _relative_to_the_mean(fake: Tensor, real: Tensor, side: str, reported: bool) -> tuple[Tensor, Tensor | None]:
    """The average form is bce of the logits, each less the other kind's mean; for G the two kinds are exchanged."""
    f, r = (t.to(accumulation_dtype(t.dtype)) for t in (fake, real))
    less_f, less_r = f - r.mean(), r - f.mean()
    false, true = (less_f, less_r) if side == "d" else (less_r, less_f)
    loss = _made(false, true, "bce", "d", 0.0, False)[0].to(fake.dtype)
    if not reported:
        return loss, None
    with torch.no_grad():
        return loss, _made(fake, real, "bce", "d", 0.0, True)[1]


def _check(fake: Tensor, real: Tensor | None, kind: str, side: str, smoothed: bool) -> None:
    """One clear sentence for what does not fit."""
    name = "gan_loss"
    if kind not in KINDS:
        raise ValueError(f"{name}: kind must be one of {', '.join(KINDS)}, got {kind!r}")
    if side not in _gan_loss.SIDES:
        raise ValueError(f'{name}: side must be "d" or "g", got {side!r}')
    if not isinstance(fake, Tensor) or not isinstance(real, Tensor | None):
        kinds = f"{type(fake).__name__} and {type(real).__name__}"
        raise TypeError(f"{name}: logits must be tensors or lists of tensors, got {kinds}")
    if real is None and (side == "d" or kind in RELATIVE):
        raise ValueError(f"{name}: logits_real must be given for kind {kind!r} on side {side!r}, got None")
    if real is not None and kind == "relativistic" and real.shape != fake.shape:
        raise ValueError(
            f"{name}: relativistic pairing needs equal shapes, got fake {tuple(fake.shape)} and real "
            f"{tuple(real.shape)}"
        )
    if real is not None and real.dtype != fake.dtype:
        raise TypeError(f"{name}: logits must have one dtype, got {fake.dtype} and {real.dtype}")
    if not fake.is_floating_point():
        raise TypeError(f"{name}: logits must be floating tensors, got {fake.dtype}")
    if smoothed and kind not in _gan_loss.SMOOTHED:
        raise ValueError(f"{name}: label_smoothing needs one of {', '.join(_gan_loss.SMOOTHED)}, got kind {kind!r}")


# ---- around a loss ---------------------------------------------------------------------------------------------------


def lecam_regularization(
    logits_fake: Tensor, logits_real: Tensor, average_fake: Tensor, average_real: Tensor
) -> Tensor:
    """mean (D(real) - average_fake)^2 + mean (D(fake) - average_real)^2, for discriminators of few data.

    Tseng et al., Regularizing Generative Adversarial Networks under Limited Data (2021), equation 4; it is added to D's
    loss with a weight (0.3 there for few data). The averages are moving averages of the logits of earlier steps, which
    the caller keeps: `average_real.lerp_(logits_real.detach().mean(), 0.01)` after each step.

    Args:
        logits_fake, logits_real: D(fake) and D(real), any shape, floating.
        average_fake, average_real: one value each, without gradient.

    Returns:
        A scalar, float32 (float64 for float64 logits).

    Raises:
        ValueError: an average of more than one value.
    """
    if average_fake.numel() != 1 or average_real.numel() != 1:
        raise ValueError(
            "lecam_regularization: average_fake and average_real must have one value each, got "
            f"{average_fake.numel()} and {average_real.numel()}"
        )
    fake, real = (t.to(accumulation_dtype(t.dtype)) for t in (logits_fake, logits_real))
    toward_fake = (real - average_fake.detach().reshape(())).square().mean()
    return toward_fake + (fake - average_real.detach().reshape(())).square().mean()


def adaptive_weight(
    reconstruction: Tensor, adversarial: Tensor, last_layer: Tensor, *, delta: float = 1e-4, highest: float = 1e4
) -> Tensor:
    """VQGAN's weight of the adversarial loss: |d reconstruction / d w| / (|d adversarial / d w| + delta).

    Esser et al., Taming Transformers for High-Resolution Image Synthesis (2021), equation 7, w the last layer's weight
    of the generator (decoder): so that both losses pull equally hard there. Both graphs are kept for the backward pass.

    Args:
        reconstruction, adversarial: scalar losses that depend on last_layer.
        last_layer: a parameter that requires a gradient.
        delta: added to the adversarial norm, > 0.
        highest: the largest weight.

    Returns:
        A scalar without gradient, in [0, highest], to multiply the adversarial loss with.

    Raises:
        ValueError: a loss is no scalar, or last_layer requires no gradient.
    """
    if reconstruction.numel() != 1 or adversarial.numel() != 1:
        raise ValueError(
            "adaptive_weight: the losses must be scalars, got shapes "
            f"{tuple(reconstruction.shape)} and {tuple(adversarial.shape)}"
        )
    if not last_layer.requires_grad:
        raise ValueError("adaptive_weight: last_layer must require a gradient, got one that does not")
    norms = [
        torch.linalg.vector_norm(torch.autograd.grad(loss, last_layer, retain_graph=True)[0], dtype=torch.float32)
        for loss in (reconstruction, adversarial)
    ]
    return (norms[0] / (norms[1] + delta)).clamp(0.0, highest)
