"""Gradient penalties on the discriminator, exact to second order.

The gradient norms are per sample and accumulated in float32 or better, whatever dtype the discriminator computes in.
Two routes give them, chosen by what the discriminator is made of: forward ops alone where it is piecewise linear
(`fastgan.penalties.linearised`), else double backward through our ops. The numbers are the same to rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastgan import _ranks
from fastgan._layout import accumulation_dtype
from fastgan._logits import logits_of
from fastgan._ranks import Sync
from fastgan.choice import second_order
from fastgan.ops import interpolate
from fastgan.ops.grad_norm_penalty import root
from fastgan.penalties import linearised, tape

APPROXIMATE = ("r1-approximate", "r2-approximate")  # of the first order alone
KINDS = ("wgan-gp", "dragan", "r1", "r2", "r1r2", *APPROXIMATE)
SQUARED = ("r1", "r2", "r1r2")  # weight/2 mean |g|^2, at the loss's own samples


def gradient_penalty(
    discriminator: Callable[..., Any],
    real: Tensor,
    fake: Tensor | None = None,
    *,
    kind: str,
    weight: float,
    labels: Tensor | None = None,
    generator: torch.Generator | None = None,
    sigma: float = 0.01,
    sync: Sync = False,
) -> Tensor:
    """The gradient penalty of a discriminator, differentiable once more.

    Args:
        discriminator: any module or function x -> logits (or x, labels -> logits). Of several logits, in a list, tuple
            or dict or beside features (`fastgan._logits.logits_of`), the gradient is that of their sum.
        real: [N, *] real samples.
        fake: [N, *] generated samples; needed for "wgan-gp", "r2", "r1r2" and "r2-approximate".
        kind: "wgan-gp": weight mean (|g| - 1)^2 at e real + (1-e) fake, one uniform e a sample (Gulrajani et al. 2017);
            "dragan": the same at real + 0.5 std(real) u, u uniform noise in [0, 1) (Kodali et al. 2017);
            "r1" (real), "r2" (fake): weight/2 mean |g|^2 (Mescheder et al. 2018); "r1r2": their sum;
            "r1-approximate" (real), "r2-approximate" (fake): weight/2 mean ((D(x + sigma n) - D(x)) / sigma)^2, n
            normal noise, which needs no second derivative (Lin et al., arXiv 2501.08316, whose lambda is weight / (2
            sigma^2)). Its mean over n is R1 but for terms of sigma^2; docs/attention.md compares both.
        weight: the penalty's coefficient (lambda of WGAN-GP, gamma of R1).
        labels: [N] passed to the discriminator as its second argument.
        generator: of the random numbers.
        sigma: the standard deviation of the noise of the approximate kinds, > 0.
        sync: "dragan" takes std(real) over the batches of all processes (True) or of a process group.

    Returns:
        The scalar penalty, float32 (float64 for float64 inputs).
    """
    if kind not in KINDS:
        raise ValueError(f"gradient_penalty: kind must be one of {', '.join(KINDS)}, got {kind!r}")
    if fake is None and kind in ("wgan-gp", "r2", "r1r2", "r2-approximate"):
        raise ValueError(f"gradient_penalty: fake must be given for kind {kind!r}, got None")
    if fake is not None and fake.shape != real.shape:
        raise ValueError(f"gradient_penalty: fake must have real's shape {tuple(real.shape)}, got {tuple(fake.shape)}")
    if kind in SQUARED:
        at: dict[str, list[Tensor | None]] = {"r1": [real], "r2": [fake], "r1r2": [real, fake]}
        return squared_penalty([_squared_norms(discriminator, x, labels) for x in at[kind] if x is not None], weight)
    if kind in APPROXIMATE:
        x = fake if kind == "r2-approximate" and fake is not None else real
        return 0.5 * weight * _squared_differences(discriminator, x.detach(), labels, generator, sigma).mean()
    points = _points(real, fake, kind, generator, sync)
    return weight * (root(_squared_norms(discriminator, points, labels)) - 1).square().mean()


def _squared_differences(
    discriminator: Callable[..., Any], x: Tensor, labels: Tensor | None, generator: torch.Generator | None, sigma: float
) -> Tensor:
    """((D(x + sigma n) - D(x)) / sigma)^2 of each sample, [N], D the sum of a sample's logits."""
    if not 0 < sigma < float("inf"):
        raise ValueError(f"gradient_penalty: sigma must be finite and above 0, got {sigma}")

    def total(x: Tensor) -> Tensor:
        output = discriminator(x) if labels is None else discriminator(x, labels)
        wide = [logits.to(accumulation_dtype(logits.dtype)).flatten(1).sum(1) for logits in _columns(output)]
        return torch.stack(wide).sum(0)

    noise = torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)
    return ((total(x + sigma * noise) - total(x)) / sigma).square()


def _columns(output: Any) -> list[Tensor]:
    """Every logit as [N, *]."""
    return [logits.unsqueeze(1) if logits.dim() == 1 else logits for logits in logits_of(output)]


def squared_penalty(squared_norms: list[Tensor], weight: float) -> Tensor:
    """r1, r2 (one [N] of squared norms) or r1r2 (two of them)."""
    return 0.5 * weight * torch.stack([q.mean() for q in squared_norms]).sum()


def logits_and_norms(discriminator: Callable[..., Any], x: Tensor, labels: Tensor | None = None) -> tuple[Any, Tensor]:
    """A discriminator's logits and, from the same pass, the squared norm of each sample's gradient.

    Args:
        discriminator: any module or function x -> logits (or x, labels -> logits), as `gradient_penalty` takes it.
        x: [N, *] samples, floating.
        labels: [N] passed to the discriminator as its second argument, or None.

    Returns:
        logits as the discriminator gives them, and [N] squared norms |d sum(logits) / dx|^2 in float32 (float64 for
        float64). A loss of both is differentiable once; by double backward (see `fastgan.explain`) more often.
    """
    found = linearised.logits_and_squared_norms(discriminator, x, labels)
    return _double_backward(discriminator, x, labels) if found is None else found


def _points(real: Tensor, fake: Tensor | None, kind: str, generator: torch.Generator | None, sync: Sync) -> Tensor:
    """The points at which wgan-gp and dragan take the gradient."""
    real = real.detach()
    if kind == "wgan-gp" and fake is not None:
        epsilon = torch.rand(len(real), generator=generator, device=real.device, dtype=accumulation_dtype(real.dtype))
        # under autocast G gives 16-bit images beside float32 ones
        mixed: Tensor = interpolate.op(real, fake.detach().to(real.dtype), epsilon, None)
        return mixed
    noise = torch.rand(real.shape, generator=generator, device=real.device, dtype=real.dtype)
    return real + 0.5 * _deviation(real, sync) * noise


def _deviation(x: Tensor, sync: Sync) -> Tensor:
    """std(x), unbiased, of all ranks' values."""
    if _ranks.size(sync) == 1:
        return x.std()
    var, mean = torch.var_mean(x.to(accumulation_dtype(x.dtype)), correction=0)
    _, var, count = _ranks.merged(mean, var, x.numel(), sync)
    return (var * count / (count - 1)).sqrt().to(x.dtype)


def _squared_norms(discriminator: Callable[..., Any], x: Tensor, labels: Tensor | None) -> Tensor:
    """|dD/dx|^2 of each sample, [N], as a differentiable function of the parameters."""
    if not torch.compiler.is_dynamo_compiling():
        return _norms_alone(discriminator, x, labels)
    if not hasattr(torch._dynamo, "nonstrict_trace") or _version() < (2, 13):
        raise NotImplementedError(
            f"gradient_penalty: torch.compile of a penalty needs torch >= 2.13, got {torch.__version__}; "
            "call it outside the compiled function"
        )
    # Dynamo leaves the function whole, and AOTAutograd runs it on its tracing tensors.
    rest = () if labels is None else (labels,)  # nonstrict_trace takes no None
    # Dynamo reads the training modes here, so the compiled code is guarded by them: `modes` is an argument for that.
    modes = [m.training for m in discriminator.modules()] if isinstance(discriminator, nn.Module) else []
    norms: Tensor = torch._dynamo.nonstrict_trace(_norms_in_modes)(discriminator, modes, x, *rest)
    return norms


def _version() -> tuple[int, ...]:
    return tuple(int(part) for part in torch.__version__.split(".")[:2])


def _norms_in_modes(
    discriminator: Callable[..., Any], modes: list[bool], x: Tensor, labels: Tensor | None = None
) -> Tensor:
    return _norms_alone(discriminator, x, labels)


def _norms_alone(discriminator: Callable[..., Any], x: Tensor, labels: Tensor | None) -> Tensor:
    x = x.detach()
    found = linearised.logits_and_squared_norms(discriminator, x, labels, loss=False)
    return (_double_backward(discriminator, x, labels) if found is None else found)[1]


def _double_backward(discriminator: Callable[..., Any], x: Tensor, labels: Tensor | None) -> tuple[Any, Tensor]:
    """(output, squared norms) by autograd, for any discriminator."""
    x = x if x.requires_grad else x.detach().requires_grad_(True)
    with torch.enable_grad(), second_order(), linearised.eagerly(discriminator):
        output = discriminator(x) if labels is None else discriminator(x, labels)
        total = torch.stack([logits.sum() for logits in logits_of(output)]).sum()
        (gradient,) = torch.autograd.grad(total, x, create_graph=True)
        return output, tape.squared_norms(gradient)
