"""Gradient penalties on the discriminator, exact to second order.

The gradient norms are per sample and accumulated in float32 or better, whatever dtype the discriminator computes in.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

KINDS = ("wgan-gp", "dragan", "r1", "r2", "r1r2")


def gradient_penalty(
    discriminator: nn.Module,
    real: Tensor,
    fake: Tensor | None = None,
    *,
    kind: str,
    weight: float,
    labels: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """The gradient penalty of a discriminator, differentiable once more.

    Args:
        discriminator: any module x -> logits (or x, labels -> logits).
        real: [N, *] real samples.
        fake: [N, *] generated samples; needed for "wgan-gp", "r2" and "r1r2".
        kind: "wgan-gp": weight mean (|g| - 1)^2 at e real + (1-e) fake, one uniform e a sample (Gulrajani et al. 2017);
            "dragan": the same at real + 0.5 std(real) u, u uniform noise in [0, 1) (Kodali et al. 2017);
            "r1" (real), "r2" (fake): weight/2 mean |g|^2 (Mescheder et al. 2018); "r1r2": their sum.
        weight: the penalty's coefficient (lambda of WGAN-GP, gamma of R1).
        labels: [N] passed to the discriminator as its second argument.
        generator: of the random numbers.

    Returns:
        The scalar penalty, float32 (float64 for float64 inputs).
    """
    if kind not in KINDS:
        raise ValueError(f"gradient_penalty: kind must be one of {', '.join(KINDS)}, got {kind!r}")
    if fake is None and kind in ("wgan-gp", "r2", "r1r2"):
        raise ValueError(f"gradient_penalty: fake must be given for kind {kind!r}, got None")
    if fake is not None and fake.shape != real.shape:
        raise ValueError(f"gradient_penalty: fake must have real's shape {tuple(real.shape)}, got {tuple(fake.shape)}")
    if kind in ("r1", "r2", "r1r2"):
        at = [x for x, kinds in ((real, ("r1", "r1r2")), (fake, ("r2", "r1r2"))) if kind in kinds and x is not None]
        norms = [_squared_norms(discriminator, x, labels).mean() for x in at]
        return 0.5 * weight * torch.stack(norms).sum()
    points = _points(real, fake, kind, generator)
    return weight * (_norm(_squared_norms(discriminator, points, labels)) - 1).square().mean()


def _points(real: Tensor, fake: Tensor | None, kind: str, generator: torch.Generator | None) -> Tensor:
    """Where wgan-gp and dragan look at the gradient."""
    real = real.detach()
    if kind == "wgan-gp" and fake is not None:
        shape = (real.shape[0], *(1,) * (real.dim() - 1))
        epsilon = torch.rand(shape, generator=generator, device=real.device, dtype=real.dtype)
        return torch.lerp(fake.detach(), real, epsilon)
    noise = torch.rand(real.shape, generator=generator, device=real.device, dtype=real.dtype)
    return real + 0.5 * real.std() * noise


def _squared_norms(discriminator: nn.Module, x: Tensor, labels: Tensor | None) -> Tensor:
    """|dD/dx|^2 of each sample, [N], as a differentiable function of the parameters."""
    x = x.detach().requires_grad_(True)
    with torch.enable_grad():
        logits = discriminator(x) if labels is None else discriminator(x, labels)
        (gradient,) = torch.autograd.grad(logits.sum(), x, create_graph=True)
        wide = gradient if gradient.dtype == torch.float64 else gradient.float()
        return wide.flatten(1).square().sum(1)


def _norm(squared: Tensor) -> Tensor:
    """sqrt with gradient 0 at 0, as torch's own norm has it."""
    positive = squared > 0
    return torch.where(positive, torch.where(positive, squared, 1.0).sqrt(), 0.0)
