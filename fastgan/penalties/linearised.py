"""Logits and gradient norms of a piecewise linear discriminator, from ordinary forward ops: no double backward.

With the masks of its activations held fixed, such a discriminator is a graph of maps that are linear in their input,
y = A(w) h + b. The gradient of the summed logits with respect to x is then one more ordinary pass, the adjoint g_l; the
penalty's derivative with respect to g_0 is carried forward by a third, the tangent v_l; and one weight gradient, of v_l
against g_l, finishes: four forwards' worth of work (4F), where double backward takes 6F and more. Where there is one
logit a sample, the loss's own gradient is s_n g_l, so the same weight gradient, of s_n h_l + v_l against g_l, does loss
and penalty together. Derivation and costs: docs/penalties.md.

How a discriminator is taken apart: each call runs it on a `Traced` input, a tensor without data, and its ops arrive at
`Tape.dispatch` one by one. RULES says which ops are linear. A discriminator with any other op on x takes the route of
double backward. Ops that do not touch x run as always, autograd graph included: what comes in from there (a spectrally
normalised weight, a label's embedding, a dropout mask) is a tensor of the outer graph and gets its gradient there.
Refusals are cached; nothing else is.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from fastgan._hooks import has_global_hooks, has_hooks_on_values
from fastgan.penalties.linear_rules import RULES
from fastgan.penalties.tape import Declined, Linearised, Tape, Traced

_verdicts: weakref.WeakKeyDictionary[nn.Module, tuple[Any, str]] = weakref.WeakKeyDictionary()


def logits_and_squared_norms(
    discriminator: Callable[..., Any], x: Tensor, labels: Tensor | None = None, *, loss: bool = True
) -> tuple[Tensor, Tensor] | None:
    """(logits, |d sum(logits) / dx|^2 of each sample) by forward ops, or None where the discriminator does not qualify.

    On None the discriminator's buffers and the random state are as they were, `verdict` has the reason, and the next
    call with the same modules, modes and dtypes declines at once.

    Args:
        discriminator: x -> logits (or x, labels -> logits); a function that is no module does not qualify.
        x: [N, *]; taken as a constant.
        labels: [N], the second argument, or None.
        loss: whether the logits will be differentiated; False keeps less.

    Returns:
        logits of whatever shape the discriminator gives, and [N] squared norms, float32 (float64 for float64). Both
        are differentiable once with respect to whatever the weights depend on.
    """
    if not isinstance(discriminator, nn.Module):
        return None
    compiling = torch.compiler.is_compiling()
    key = None if compiling else _fingerprint(discriminator, x, labels)
    if not compiling and _verdicts.get(discriminator, (None, ""))[0] == key and _verdicts[discriminator][1]:
        return None
    reason = _unsuited(discriminator, x)
    found = None
    if not reason:
        restore = _snapshot(discriminator, x)
        try:
            with eagerly(discriminator):
                found = _run(discriminator, x, labels, loss)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            reason = _reason(error, discriminator)
            restore()
    if not compiling:
        _verdicts[discriminator] = key, reason
    return found


def verdict(discriminator: nn.Module) -> str | None:
    """How the last penalty on this discriminator was computed: a few words, or None before the first."""
    known = _verdicts.get(discriminator)
    if known is None:
        return None
    return f"double backward: {known[1]}" if known[1] else "forward ops (4F)"


def route(discriminator: nn.Module, x: Tensor, labels: Tensor | None = None) -> str:
    """How a penalty at x would be computed; buffers and random state are left as they are."""
    restore = _snapshot(discriminator, x)
    logits_and_squared_norms(discriminator, x.detach(), labels, loss=False)
    restore()
    return str(verdict(discriminator))


def _run(discriminator: nn.Module, x: Tensor, labels: Tensor | None, loss: bool) -> tuple[Tensor, Tensor]:
    tape = Tape(x.shape[0], loss, RULES)
    start = tape.wrap(x.detach(), 0)
    with torch.enable_grad():
        out = discriminator(start) if labels is None else discriminator(start, labels)
    if not isinstance(out, Traced):
        raise Declined("its output is not one tensor that depends on x")
    logits, output = tape.read(out), out.node
    del out, start
    if not torch.compiler.is_compiling() and tape.escaped():
        raise Declined("it keeps a reference to its activations")
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        gradient = tape.linearise(logits, output)
    with torch.enable_grad():
        weights = [tape.tensors[slot] for slot in tape.learnt]
        results: tuple[Tensor, Tensor] = Linearised.apply(tape, logits, gradient, *weights)
    return results


def _fingerprint(discriminator: nn.Module, x: Tensor, labels: Tensor | None) -> tuple:
    """What a refusal depends on. A stale refusal costs time and changes no number."""
    device = x.device.type
    cast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    modules = tuple((type(m), m.training, has_hooks_on_values(m)) for m in discriminator.modules())
    return x.dtype, x.dim(), x.requires_grad, device, cast, labels is None, modules


def _unsuited(discriminator: nn.Module, x: Tensor) -> str:
    """Why a discriminator is not even tried, or ""."""
    if x.requires_grad and torch.is_grad_enabled():
        return "x itself wants a gradient"
    if x.dim() == 0 or x.numel() == 0 or not x.is_floating_point():
        return "x must be floating samples, at least one"
    if has_global_hooks():
        return "global module hooks would see values without data"
    for name, m in discriminator.named_modules():
        where = f"{name or 'the discriminator'} ({type(m).__name__})"
        if has_hooks_on_values(m):
            return f"{where} has hooks, which would see values without data"
        if isinstance(m, torch.jit.ScriptModule):
            return f"{where} is TorchScript"
    return ""


def eagerly(discriminator: Callable[..., Any]) -> contextlib.AbstractContextManager:
    """Compiled parts run as the Python that they were compiled from: a compiled graph would hide its ops."""
    modules = discriminator.modules() if isinstance(discriminator, nn.Module) else ()
    compiled = any(m._compiled_call_impl or hasattr(m, "_orig_mod") for m in modules)
    if not compiled or torch.compiler.is_compiling():
        return contextlib.nullcontext()
    manager: contextlib.AbstractContextManager = torch.compiler.set_stance("force_eager")
    return manager


def _snapshot(discriminator: nn.Module, x: Tensor) -> Callable[[], None]:
    """A function that puts buffers and random state back as they are now."""
    owners = [(m, name, b) for m in discriminator.modules() for name, b in m._buffers.items() if b is not None]
    copies = [(b._version, b.clone()) for *_, b in owners]
    compiling = torch.compiler.is_compiling()
    capturing = x.is_cuda and torch.cuda.is_current_stream_capturing()
    cpu = None if compiling else torch.get_rng_state()
    cuda = torch.cuda.get_rng_state(x.device) if x.is_cuda and not (compiling or capturing) else None

    @torch.no_grad()
    def restore() -> None:
        for (m, name, b), (version, copy) in zip(owners, copies, strict=True):
            m._buffers[name] = b
            if b._version != version:
                b.copy_(copy)
        if cpu is not None:
            torch.set_rng_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state(cuda, x.device)

    return restore


def _reason(error: Exception, discriminator: nn.Module) -> str:
    """The layer that declined, and why."""
    said = str(error)
    if not isinstance(error, Declined):
        said = f"{type(error).__name__}: {(said.splitlines() or [''])[0][:200]}"
    names = {id(m): name for name, m in discriminator.named_modules()}
    where, frame = "", error.__traceback__
    while isinstance(frame, TracebackType):
        owner = frame.tb_frame.f_locals.get("self")
        if id(owner) in names:
            where = f"{names[id(owner)] or 'the discriminator'} ({type(owner).__name__}): "
        frame = frame.tb_next
    return where + said
