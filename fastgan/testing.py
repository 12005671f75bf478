"""Checks: does every parameter get its exact second-order gradient, and do GPU kernels run right, without a GPU?"""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.nn.utils.spectral_norm import SpectralNorm

from fastgan.choice import emulated
from fastgan.penalties import gradient_penalty

PACKAGE = Path(__file__).parent
EMULATORS = {"triton": "triton_checker", "cuda": "cuda_shim"}  # backend -> module of tests/emulation

# Relative errors allowed. Central differences at h = 1e-6 in float64 are good to about 1e-6 of the gradient's norm; a
# float32 run may differ from the float64 one by flipped activation signs, about 1e-3.
DIFFERENCE_TOLERANCE = 1e-4
DTYPE_TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-2, torch.bfloat16: 0.1, torch.float16: 0.05}
# A step that carries one activation across its kink makes the penalty jump, and the difference meaningless: with 1e6
# activations one in three does. Another length then decides; a gradient that is wrong agrees with none.
STEPS = (1e-6, 1e-7, 3e-7, 1e-8)


def assert_penalty_complete(
    discriminator: nn.Module, real: Tensor, *, labels: Tensor | None = None, seed: int = 0
) -> None:
    """Assert that a gradient penalty reaches every parameter of `discriminator` exactly.

    An op whose backward is opaque to autograd gives the right penalty value and, silently, no or wrong gradients. Three
    values are compared for each parameter: the penalty gradient in the model's dtype, the same in a float64 copy, and
    central differences of the float64 penalty itself, which need no second derivative and so cannot be fooled.

    Parameters that the discriminator does not use, or that want no gradient, are no error. Batch norm is checked in the
    mode that it is in.

    Args:
        discriminator: any module x -> logits; it is copied, not changed. Dropout is put into eval mode, and so is
            spectral norm: its power iteration moves the penalty by steps that autograd, rightly, takes as constant.
        real: [N, *] samples.
        labels: passed as the second argument where given.
        seed: of the random directions along which the differences are taken.

    Raises:
        AssertionError: names every parameter whose gradient is missing or wrong.
    """
    exact, own = _copy(discriminator).double(), _copy(discriminator)
    wide = real.double()
    wide_labels = labels.double() if labels is not None and labels.is_floating_point() else labels
    gradients = _penalty_gradients(exact, wide, wide_labels)
    found = _penalty_gradients(own, real, labels)
    rng = torch.Generator().manual_seed(seed)
    scale = max((g.norm().item() for g in gradients.values() if g is not None), default=0.0)
    dtypes = {name: p.dtype for name, p in own.named_parameters()}
    wrong = []
    for name, p in exact.named_parameters():
        if not p.requires_grad or not p.numel():
            continue
        got, ours = gradients[name], found[name]
        said = _by_differences(exact, p, got, wide, wide_labels, scale, rng)
        if not said and got is not None:
            error, size = (got if ours is None else ours.double() - got).norm().item(), got.norm().item()
            if not error <= DTYPE_TOLERANCE[dtypes[name]] * max(size, 1e-3 * scale):
                said = f"wrong in {dtypes[name]} (error {error:.3g}, norm {size:.3g})"
        if said:
            wrong.append(f"{name}: {said}")
    if wrong:
        raise AssertionError("penalty gradients must be complete, got:\n  " + "\n  ".join(wrong))


def _by_differences(
    module: nn.Module,
    p: Tensor,
    got: Tensor | None,
    real: Tensor,
    labels: Tensor | None,
    scale: float,
    rng: torch.Generator,
) -> str:
    """What central differences say against a gradient, or ""; half along it, half at random."""
    direction = torch.randn(p.shape, generator=rng, dtype=torch.float64).to(p.device)
    direction /= direction.norm().clamp_min(1e-30)
    along, size = 0.0, 0.0
    if got is not None:
        size = got.norm().item()
        direction += got / max(size, 1e-30)
        direction /= direction.norm().clamp_min(1e-30)
        along = (got * direction).sum().item()
    slopes = []
    for step in STEPS:
        slope = _difference(module, p, direction, step, real, labels)
        if abs(slope - along) <= DIFFERENCE_TOLERANCE * max(abs(slope), size, 1e-3 * scale):
            return ""
        slopes.append(slope)
    state = "missing" if size == 0 else "wrong"
    return f"{state} (slope {along:.4g}, by differences {slopes[0]:.4g})"


def _copy(module: nn.Module) -> nn.Module:
    # torch's older weight hooks leave the computed weight on the module: not a leaf, so deepcopy refuses it
    kept = [v for m in module.modules() for v in m.__dict__.values() if isinstance(v, Tensor) and v.grad_fn is not None]
    module = copy.deepcopy(module, {id(v): v.detach().clone() for v in kept})
    for m in module.modules():
        if isinstance(m, _DropoutNd | _SpectralNorm):
            m.eval()
        if any(isinstance(h, SpectralNorm) for h in m._forward_pre_hooks.values()):
            m.training = False
    return module


def _penalty(module: nn.Module, real: Tensor, labels: Tensor | None) -> Tensor:
    """The penalty on a copy, since a forward pass may move buffers; with the same random numbers each time."""
    devices = [real.device] if real.is_cuda else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(0)
        return gradient_penalty(module, real, kind="r1", weight=2.0, labels=labels)


def _penalty_gradients(module: nn.Module, real: Tensor, labels: Tensor | None) -> dict[str, Tensor | None]:
    module = _copy(module)
    learning = {name: p for name, p in module.named_parameters() if p.requires_grad}
    value = _penalty(module, real, labels)
    if not learning or not value.requires_grad:
        return dict.fromkeys(learning)
    return dict(zip(learning, torch.autograd.grad(value, list(learning.values()), allow_unused=True), strict=True))


@torch.no_grad()
def _difference(
    module: nn.Module, p: Tensor, direction: Tensor, step: float, real: Tensor, labels: Tensor | None
) -> float:
    """Central difference of the penalty along `direction` in parameter p; step: relative to p's size."""
    h = step * max(p.norm().item() / p.numel() ** 0.5, 1e-3)
    before, values = p.clone(), []
    for sign in (1, -1):
        p.copy_(before + sign * h * direction)
        values.append(_penalty(_copy(module), real, labels).item())
    p.copy_(before)
    return (values[0] - values[1]) / (2 * h)


# ---- GPU kernels on a machine without a GPU --------------------------------------------------------------------------


@contextlib.contextmanager
def emulate(name: str) -> Iterator[Any]:
    """Within: every op runs its `name` kernels ("triton" or "cuda") on CPU tensors, checked as they run.

    Needs a source checkout's tests/emulation, the package's own or that of the current folder. Triton kernels run in
    an instrumented interpreter, CUDA kernels compiled by the host's compiler against a shim; both raise on
    out-of-bounds accesses and races, and are slow: keep tensors small.
    A case that the backend declines runs on the reference, as on a GPU.

    Args:
        name: "triton" or "cuda".

    Yields:
        The emulator's record of what ran: launches and the bytes that they moved.

    Raises:
        ValueError: another name.
        RuntimeError: outside a source checkout, or where the emulator cannot be built; says why.
    """
    if name not in EMULATORS:
        raise ValueError(f"emulate: name must be one of {', '.join(EMULATORS)}, got {name!r}")
    with _emulator(name).emulation() as record, emulated(name):
        yield record


def _emulator(name: str) -> Any:
    """The module of tests/emulation, loaded by its path: tests are no package. An installed wheel has none."""
    module = f"fastgan_{EMULATORS[name]}"
    if module not in sys.modules:
        places = [root / "tests" / "emulation" / f"{EMULATORS[name]}.py" for root in (PACKAGE.parent, Path.cwd())]
        path = next(filter(Path.exists, places), None)
        spec = None if path is None else importlib.util.spec_from_file_location(module, path)
        if spec is None or spec.loader is None:
            raise RuntimeError(
                "emulate: tests/emulation of a source checkout must lie beside the package or in the current folder, "
                f"got neither {places[0]} nor {places[1]}; run it in a checkout"
            )
        sys.modules[module] = loaded = importlib.util.module_from_spec(spec)  # dataclasses look themselves up there
        try:
            spec.loader.exec_module(loaded)
        except BaseException:
            del sys.modules[module]
            raise
    return sys.modules[module]
