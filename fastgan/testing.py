"""Checks for users' models: does every parameter get its exact second-order gradient?"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from fastgan.training.penalties import gradient_penalty

# Relative errors allowed. Central differences at h = 1e-6 in float64 are good to about 1e-6 of the gradient's norm; a
# float32 run may differ from the float64 one by flipped activation signs, about 1e-3.
DIFFERENCE_TOLERANCE = 1e-4
DTYPE_TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-2, torch.bfloat16: 0.1, torch.float16: 0.05}


def assert_penalty_complete(
    discriminator: nn.Module, real: Tensor, *, labels: Tensor | None = None, seed: int = 0
) -> None:
    """Assert that a gradient penalty reaches every parameter of `discriminator` exactly.

    An op whose backward is opaque to autograd gives the right penalty value and, silently, no or wrong gradients. Three
    values are compared for each parameter: the penalty gradient in the model's dtype, the same in a float64 copy, and
    central differences of the float64 penalty itself, which need no second derivative and so cannot be fooled.

    Args:
        discriminator: any module x -> logits; it is copied, not changed. Dropout is put into eval mode.
        real: [N, *] samples.
        labels: passed as the second argument where given.
        seed: of the random directions along which the differences are taken.

    Raises:
        AssertionError: names every parameter whose gradient is missing or wrong.
    """
    exact = _copy(discriminator).double()
    own = _copy(discriminator)
    wide = real.double()
    gradients = _penalty_gradients(exact, wide, labels)
    found = _penalty_gradients(own, real, labels)
    rng = torch.Generator().manual_seed(seed)
    scale = max((g.norm().item() for g in gradients.values() if g is not None), default=0.0)
    wrong = []
    for name, p in exact.named_parameters():
        if not p.requires_grad:
            continue
        direction = torch.randn(p.shape, generator=rng, dtype=torch.float64).to(p.device)
        direction /= direction.norm().clamp_min(1e-30)
        slope = _difference(exact, p, direction, wide, labels)
        got = gradients[name]
        along = 0.0 if got is None else (got * direction).sum().item()
        size = 0.0 if got is None else got.norm().item()
        limit = DIFFERENCE_TOLERANCE * max(abs(slope), size, 1e-3 * scale)
        if not abs(slope - along) <= limit:
            state = "missing" if got is None or size == 0 else "wrong"
            wrong.append(f"{name}: {state} (slope {along:.4g}, by differences {slope:.4g})")
        elif got is not None:
            ours = found[name]
            error = (got if ours is None else ours.double() - got).norm().item()
            if not error <= DTYPE_TOLERANCE[_dtype(discriminator)] * max(size, 1e-3 * scale):
                wrong.append(f"{name}: wrong in {_dtype(discriminator)} (error {error:.3g}, norm {size:.3g})")
    if wrong:
        raise AssertionError("penalty gradients must be complete, got:\n  " + "\n  ".join(wrong))


def _dtype(module: nn.Module) -> torch.dtype:
    return next(module.parameters()).dtype


def _copy(module: nn.Module) -> nn.Module:
    module = copy.deepcopy(module)
    for m in module.modules():
        if isinstance(m, _DropoutNd):
            m.eval()
    return module


def _penalty(module: nn.Module, real: Tensor, labels: Tensor | None) -> Tensor:
    return gradient_penalty(module, real, kind="r1", weight=2.0, labels=labels)


def _penalty_gradients(module: nn.Module, real: Tensor, labels: Tensor | None) -> dict[str, Tensor | None]:
    # a copy each time: forward passes may move buffers (running statistics, spectral norm's vectors)
    module = copy.deepcopy(module)
    names, parameters = zip(*((n, p) for n, p in module.named_parameters() if p.requires_grad), strict=True)
    value = _penalty(module, real, labels)
    return dict(zip(names, torch.autograd.grad(value, parameters, allow_unused=True), strict=True))


@torch.no_grad()
def _difference(module: nn.Module, p: Tensor, direction: Tensor, real: Tensor, labels: Tensor | None) -> float:
    """Central difference of the penalty along `direction` in parameter p."""
    h = 1e-6 * max(p.norm().item() / p.numel() ** 0.5, 1e-3)
    before, values = p.clone(), []
    for sign in (1, -1):
        p.copy_(before + sign * h * direction)
        values.append(_penalty(copy.deepcopy(module), real, labels).item())
    p.copy_(before)
    return (values[0] - values[1]) / (2 * h)
