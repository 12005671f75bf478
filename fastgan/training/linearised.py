"""Logits and gradient norms of a piecewise linear discriminator, from ordinary forward ops: no double backward.

With the masks of its activations held fixed, such a discriminator is a graph of maps that are linear in their input,
y = A(w) h + b. The gradient of the summed logits with respect to x is then one more ordinary pass, the adjoint g_l; the
penalty's derivative with respect to g_0 is carried forward by a third, the tangent v_l; and one weight gradient, of v_l
against g_l, finishes: four forwards' worth of work (4F), where double backward takes 6F and more. Where there is one
logit a sample, the loss's own gradient is s_n g_l, so the same weight gradient, of s_n h_l + v_l against g_l, does loss
and penalty together. Derivation and costs: docs/penalties.md.

How a discriminator is taken apart: it is run, each time, on a `Traced` input, a tensor without data whose ops arrive at
`Tape.dispatch` one by one. RULES says which are linear; any other op declines, so whatever is not known to qualify does
not. Ops that do not touch x run as always, autograd graph included: what comes in from there (a spectrally normalised
weight, a label's embedding, a dropout mask) is a tensor of the outer graph and gets its gradient there. Nothing is
cached but refusals.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from fastgan.ops import grad_norm_penalty
from fastgan.training.linear_rules import RULES
from fastgan.training.linear_steps import Declined, Step, Traced, scaled

WEIGHT_HOOKS = (SpectralNorm, WeightNorm)  # torch's older weight hooks: they look at the module, never at its input


class Tape:
    """One run of a discriminator on x: its steps, and the tensors that the passes need.

    loss: whether the logits will be differentiated too, so that the layers' inputs are kept.
    """

    def __init__(self, samples: int, loss: bool):
        self.samples, self.loss = samples, loss
        self.steps: list[Step] = []
        self.tensors: list[Tensor] = []  # what steps refer to by slot
        self.learnt: list[int] = []  # slots of the weights that want a gradient
        self.apart = [True]  # of each value: row n depends on sample n alone
        self.output = 0  # the logits' index
        self._slots: dict[int, int] = {}
        self._wrappers: list[weakref.ref[Traced]] = []

    # ---- recording --------------------------------------------------------------------------------------------------

    def hold(self, tensor: Tensor | None) -> Any:
        """The slot of a tensor (None for None); one slot for one tensor."""
        if tensor is None:
            return None
        if id(tensor) not in self._slots:
            self._slots[id(tensor)] = len(self.tensors)
            self.tensors.append(tensor)
        return self._slots[id(tensor)]

    def learn(
        self,
        step: Step,
        *,
        factors: Sequence[Tensor | None] = (),
        terms: Sequence[Tensor | None] = (),
        primal: Tensor | None = None,
    ) -> None:
        """Note which weights of a step want a gradient, and keep its input where the loss's gradient needs it."""
        step.factors, step.terms = (
            tuple(self.hold(w) for w in weights if w is not None and w.requires_grad) for weights in (factors, terms)
        )
        self.learnt += [slot for slot in step.factors + step.terms if slot not in self.learnt]
        if step.factors and self.loss:
            step.primal = self.hold(primal)

    def record(self, step: Step, y: Tensor, apart: bool = True) -> Traced:
        """Append a step whose output is y; `apart`: whether it leaves row n to sample n."""
        self.steps.append(step)
        rows = y.dim() > 0 and y.shape[0] == self.samples
        self.apart.append(apart and rows and all(self.apart[i] for i in step.inputs))
        return self.wrap(y, len(self.steps))

    def wrap(self, value: Tensor, index: int) -> Traced:
        wrapper = Traced(self, value, index)
        self._wrappers.append(weakref.ref(wrapper))
        return wrapper

    def read(self, h: Any) -> Tensor:
        """The value behind an operand of a rule."""
        if h.tape is not self:
            raise Declined("it uses a value of another run")
        if h.detached:
            raise Declined("it uses a detached value")
        if h.seen != h.alias.changes:
            raise Declined("it reads a view of a value that was changed in place")
        value: Tensor = h.data_of
        return value

    def value(self, operand: Any) -> Any:
        return self.read(operand) if isinstance(operand, Traced) else operand

    def dispatch(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run and record one op."""
        name = str(func)
        if name == "aten.detach.default":  # autograd's saved outputs come this way too: refuse only its use
            copy = self.wrap(args[0].data_of, args[0].node)
            copy.detached = True
            return copy
        changes = func._schema.is_mutable
        known = RULES.get(_functional(name) if changes else name)
        if known is None or (changes and not isinstance(args[0], Traced)):
            raise Declined(f"{name.rpartition('.')[0].replace('aten.', '')} is not known to be piecewise linear in x")
        with torch.no_grad():
            out = known(self, *args, **kwargs)
        if changes:
            return self._move(args[0], out)
        if func.is_view:
            for view in out if isinstance(out, list) else [out]:
                view.alias, view.seen = args[0].alias, args[0].seen
        return out

    def _move(self, target: Traced, result: Traced) -> Traced:
        """An in-place op was run out of place: let its target stand for the result from now on."""
        if result.shape != target.shape or result.dtype != target.dtype:
            raise Declined("an in-place op that changes shape or dtype has no rule")
        target.data_of, target.node = result.data_of, result.node
        target.alias.changes += 1
        target.seen = target.alias.changes
        return target

    def escaped(self) -> bool:
        """Whether the discriminator's code still holds one of the dataless values it was given."""
        return any(wrapper() is not None for wrapper in self._wrappers)

    # ---- passes -----------------------------------------------------------------------------------------------------

    def linearise(self, logits: Tensor, output: int) -> Tensor:
        """The gradient of the summed logits with respect to x; steps keep the cotangents that `gradients` needs."""
        self.output = output
        self.separate = self.apart[output] and logits.numel() == self.samples

        def keep(step: Step, g: Tensor) -> None:
            if step.factors or (step.terms and self.loss and self.separate):
                step.cotangent = self.hold(g)

        gradient = self._adjoint(self.tensors, torch.ones_like(logits), keep, [True] * (len(self.steps) + 1))
        if gradient is None:
            raise Declined("its output does not depend on x")
        return gradient

    def _adjoint(
        self, t: list[Tensor], seed: Tensor, visit: Callable[[Step, Tensor], None], wanted: Sequence[bool]
    ) -> Tensor | None:
        """Send a cotangent of the logits back to x; `visit` sees each step's. wanted: the values that need theirs."""
        at: list[Tensor | None] = [None] * (len(self.steps) + 1)
        at[self.output] = seed
        for i in reversed(range(len(self.steps))):
            step, g, at[i + 1] = self.steps[i], at[i + 1], None
            if g is None:
                continue
            visit(step, g)
            if any(wanted[j] for j in step.inputs):
                for j, part in zip(step.inputs, step.adjoint(t, g), strict=True):
                    before = at[j]
                    at[j] = part if before is None else before + part
        return at[0]

    def gradients(
        self, t: list[Tensor], gradient: Tensor, dlogits: Tensor | None, dsquared: Tensor | None
    ) -> dict[int, Tensor]:
        """Gradients by slot of <dlogits, logits> + <dsquared, |gradient|^2> with respect to the learnt weights."""
        found: dict[int, Tensor] = {}
        if dlogits is not None and not self.separate:
            self._loss_gradients(t, dlogits, found)
            dlogits = None
        scale = None if dlogits is None else dlogits.reshape(self.samples)
        useful, last = self._useful_tangents()
        moving: list[Tensor | None] = [None] * (len(self.steps) + 1)
        if dsquared is not None:
            moving[0] = scaled(gradient, 2 * dsquared)
        for i, step in enumerate(self.steps):
            v = [moving[j] for j in step.inputs]
            if step.cotangent is not None:
                _learn(step, t, v, scale, found)
            if useful[i + 1] and any(x is not None for x in v):
                moving[i + 1] = step.tangent(t, v)
            for j in step.inputs:
                if last[j] == i:
                    moving[j] = None
        return found

    def _useful_tangents(self) -> tuple[list[bool], list[int]]:
        """Of each value: whether a step after it has a factor whose gradient needs its tangent, and its last reader."""
        useful, last = [False] * (len(self.steps) + 1), [-1] * (len(self.steps) + 1)
        for i in reversed(range(len(self.steps))):
            step = self.steps[i]
            for j in step.inputs:
                last[j] = max(last[j], i)
                useful[j] |= useful[i + 1] or bool(step.factors and step.cotangent is not None)
        return useful, last

    def _loss_gradients(self, t: list[Tensor], dlogits: Tensor, found: dict[int, Tensor]) -> None:
        """The loss's own backward pass, for logits that are not one a sample (a map of them)."""
        learns = [False] * (len(self.steps) + 1)  # of each value: whether a step up to it learns
        for i, step in enumerate(self.steps):
            learns[i + 1] = bool(step.factors or step.terms) or any(learns[j] for j in step.inputs)

        def visit(step: Step, g: Tensor) -> None:
            if step.factors and step.primal is not None:
                _add(found, step.factor_gradients(t, t[step.primal], g))
            if step.terms:
                _add(found, step.term_gradients(t, g, None))

        self._adjoint(t, dlogits, visit, learns)


def _learn(
    step: Step, t: list[Tensor], v: Sequence[Tensor | None], scale: Tensor | None, found: dict[int, Tensor]
) -> None:
    """Add a step's weight gradients: of scale_n h_n + v_n against its cotangent; terms see the loss alone."""
    g = t[step.cotangent]  # type: ignore[index]
    if step.factors:
        (u,) = v
        if scale is not None and step.primal is not None:
            primal = t[step.primal]
            rows = scale.to(primal.dtype).view(-1, *(1,) * (primal.dim() - 1))
            u = primal * rows if u is None else torch.addcmul(u, primal, rows)
        if u is not None:
            _add(found, step.factor_gradients(t, u, g))
    if step.terms and scale is not None:
        _add(found, step.term_gradients(t, g, scale))


def _add(found: dict[int, Tensor], gradients: Any) -> None:
    for slot, g in gradients:
        found[slot] = found[slot] + g if slot in found else g


def _functional(name: str) -> str:
    """aten.relu_.default -> aten.relu.default."""
    namespace, packet, overload = name.split(".")
    return f"{namespace}.{packet.removesuffix('_')}.{overload}"


def squared_norms(gradient: Tensor) -> Tensor:
    """|g|^2 of each sample, [N], float32 (float64 for float64), by the op, differentiable."""
    squared: Tensor = grad_norm_penalty.op(gradient if gradient.dim() > 1 else gradient[:, None], 0.0)[0]
    return squared


class Linearised(torch.autograd.Function):
    """(logits, |gradient|^2 of each sample) as functions of the learnt weights; differentiable once."""

    @staticmethod
    def forward(ctx: Any, tape: Tape, logits: Tensor, gradient: Tensor, *weights: Tensor) -> tuple[Tensor, Tensor]:
        squared = squared_norms(gradient)
        ctx.tape = tape
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(gradient, *tape.tensors)  # so that autograd frees them, and sees a weight changed
        tape.tensors = []
        return logits.view_as(logits), squared

    @staticmethod
    def backward(ctx: Any, dlogits: Tensor | None, dsquared: Tensor | None) -> tuple[Tensor | None, ...]:
        gradient, *tensors = ctx.saved_tensors
        with torch.no_grad(), torch.autocast(gradient.device.type, enabled=False):
            found = ctx.tape.gradients(tensors, gradient, dlogits, dsquared)
        if torch.is_grad_enabled():  # create_graph=True: these gradients must not pass for constants
            found = {slot: Last.apply(g.detach().requires_grad_()) for slot, g in found.items()}
        return (None, None, None, *(found.get(slot) for slot in ctx.tape.learnt))


class Last(torch.autograd.Function):
    """The identity, on what cannot be differentiated again."""

    @staticmethod
    def forward(ctx: Any, g: Tensor) -> Tensor:
        return g.view_as(g)

    @staticmethod
    def backward(ctx: Any, dg: Tensor) -> Tensor:
        raise NotImplementedError(
            "gradient_penalty: its gradient cannot be differentiated again on the route by forward ops, got a request "
            "for it; use torch.autograd.grad(..., create_graph=True) on the discriminator itself"
        )


# ---- the route ------------------------------------------------------------------------------------------------------

_verdicts: weakref.WeakKeyDictionary[nn.Module, tuple[Any, str]] = weakref.WeakKeyDictionary()


def logits_and_squared_norms(
    discriminator: nn.Module, x: Tensor, labels: Tensor | None = None, *, loss: bool = True
) -> tuple[Tensor, Tensor] | None:
    """(logits, |d sum(logits) / dx|^2 of each sample) by forward ops, or None where the discriminator does not qualify.

    On None the discriminator's buffers and the random state are as they were, `verdict` has the reason, and the next
    call with the same modules, modes and dtypes declines at once.

    Args:
        discriminator: any module x -> logits (or x, labels -> logits).
        x: [N, *]; taken as a constant.
        labels: [N], the second argument, or None.
        loss: whether the logits will be differentiated; False keeps less.

    Returns:
        logits of whatever shape the discriminator gives, and [N] squared norms, float32 (float64 for float64). Both
        are differentiable once with respect to whatever the weights depend on.
    """
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
    tape = Tape(x.shape[0], loss)
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
    """What a refusal depends on, cheaply; a stale one costs time, never a number."""
    device = x.device.type
    cast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    modules = tuple((type(m), m.training, _hooks(m)) for m in discriminator.modules())
    return x.dtype, x.dim(), x.requires_grad, device, cast, labels is None, modules


def _hooks(m: nn.Module) -> bool:
    """Whether calling the module does more than its forward and torch's weight hooks."""
    before = any(not isinstance(h, WEIGHT_HOOKS) for h in m._forward_pre_hooks.values())
    return bool(before or m._forward_hooks or m._backward_hooks or m._backward_pre_hooks)


def _unsuited(discriminator: nn.Module, x: Tensor) -> str:
    """Why a discriminator is not even tried, or ""."""
    if x.requires_grad and torch.is_grad_enabled():
        return "x itself wants a gradient"
    if x.dim() == 0 or x.numel() == 0 or not x.is_floating_point():
        return "x must be floating samples, at least one"
    if nn.modules.module._has_any_global_hook():
        return "global module hooks would see values without data"
    for name, m in discriminator.named_modules():
        where = f"{name or 'the discriminator'} ({type(m).__name__})"
        if _hooks(m):
            return f"{where} has hooks, which would see values without data"
        if isinstance(m, torch.jit.ScriptModule):
            return f"{where} is TorchScript"
    return ""


def eagerly(discriminator: nn.Module) -> contextlib.AbstractContextManager:
    """Compiled parts run as the Python that they were compiled from: a compiled graph would hide its ops."""
    compiled = any(m._compiled_call_impl or hasattr(m, "_orig_mod") for m in discriminator.modules())
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
    """What declined, in which layer."""
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
