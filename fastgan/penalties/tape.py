"""The record of one run of a discriminator, and the passes over it: the gradient's norms and the weights' gradients.

`Traced` stands for a value that depends on x while the discriminator's own code runs. Every op on it arrives at
`Tape.dispatch`, which runs the op and records it as a `LinearStep`, or raises `Declined`. The tape is given the table
of rules: which ops are linear, and how each is recorded.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastgan.ops import grad_norm_penalty
from fastgan.penalties.linear_steps import LinearStep, scaled

Rule = Callable[..., Any]  # rule(tape, *args, **kwargs): runs an op on the values behind its operands and records it


class Declined(Exception):
    """The discriminator, or this use of it, does not qualify; str() is the reason."""


# ---- values ---------------------------------------------------------------------------------------------------------


class Alias:
    """What a value and its views share: how often it was changed in place."""

    version = 0


class Traced(Tensor):
    """A value that depends on x, as the discriminator's code sees it: shape, dtype and layout, but no data to reach.

    Ops reach `tape.dispatch` with it (below autograd and autocast, so in canonical form and with their casts visible);
    what goes around them, a kernel launched on a pointer or a C++ extension, finds no storage and raises.
    """

    tape: Tape
    data_of: Tensor  # the value itself
    node: int
    alias: Alias
    version: int  # alias.version when this view of it was made
    detached: bool

    @staticmethod
    def __new__(cls, tape: Tape, value: Tensor, node: int) -> Traced:
        self: Traced = Tensor._make_wrapper_subclass(
            cls, value.shape, strides=value.stride(), dtype=value.dtype, device=value.device
        )
        self.tape, self.data_of, self.node = tape, value, node
        self.alias, self.version, self.detached = Alias(), 0, False
        return self

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # autograd.Function.forward runs without grad mode too: its own backward would be missed
        if not torch.is_grad_enabled():
            raise Declined("it runs under torch.no_grad or inside an autograd.Function")
        return super().__torch_function__(func, types, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        leaves = torch.utils._pytree.tree_leaves((args, kwargs))
        tape = next(a.tape for a in leaves if isinstance(a, cls))
        return tape.dispatch(func, args, kwargs or {})


# ---- the tape -------------------------------------------------------------------------------------------------------


class Tape:
    """One run of a discriminator on x: its steps, and the tensors that the passes need.

    samples: N, the rows of x.
    loss: whether the logits will be differentiated too, so that the layers' inputs are kept.
    rules: by the name of an op, what runs and records it; an op without a rule is declined.
    """

    def __init__(self, samples: int, loss: bool, rules: Mapping[str, Rule]):
        self.samples, self.loss, self.rules = samples, loss, rules
        self.steps: list[LinearStep] = []
        self.tensors: list[Tensor] = []  # what steps refer to by slot
        self.learnt: list[int] = []  # slots of the weights that want a gradient
        self.apart = [True]  # for each value: whether row n depends on sample n alone
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
        step: LinearStep,
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

    def record(self, step: LinearStep, y: Tensor, apart: bool = True) -> Traced:
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
        if h.version != h.alias.version:
            raise Declined("it reads a view of a value that was changed in place")
        value: Tensor = h.data_of
        return value

    def value(self, operand: Any) -> Any:
        return self.read(operand) if isinstance(operand, Traced) else operand

    def dispatch(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run and record one op."""
        name = str(func)
        if name == "aten.detach.default":  # autograd detaches outputs that it saves: only a use of the copy is refused
            copy = self.wrap(args[0].data_of, args[0].node)
            copy.detached = True
            return copy
        changes = func._schema.is_mutable
        known = self.rules.get(_functional(name) if changes else name)
        if known is None or (changes and not isinstance(args[0], Traced)):
            raise Declined(f"{name.rpartition('.')[0].replace('aten.', '')} is not known to be piecewise linear in x")
        with torch.no_grad():
            out = known(self, *args, **kwargs)
        if changes:
            return self._move(args[0], out)
        if func.is_view:
            for view in out if isinstance(out, list) else [out]:
                view.alias, view.version = args[0].alias, args[0].version
        return out

    def _move(self, target: Traced, result: Traced) -> Traced:
        """Run an in-place op out of place: its target stands for the result from now on."""
        if result.shape != target.shape or result.dtype != target.dtype:
            raise Declined("an in-place op that changes shape or dtype has no rule")
        target.data_of, target.node = result.data_of, result.node
        target.alias.version += 1
        target.version = target.alias.version
        return target

    def escaped(self) -> bool:
        """Whether the discriminator's code still holds one of the dataless values it was given."""
        return any(wrapper() is not None for wrapper in self._wrappers)

    # ---- passes -----------------------------------------------------------------------------------------------------

    def linearise(self, logits: Tensor, output: int) -> Tensor:
        """The gradient of the summed logits with respect to x; steps keep the cotangents that `gradients` needs."""
        self.output = output
        self.separate = self.apart[output] and logits.numel() == self.samples

        def keep(step: LinearStep, g: Tensor) -> None:
            if step.factors or (step.terms and self.loss and self.separate):
                step.cotangent = self.hold(g)

        gradient = self._adjoint(self.tensors, torch.ones_like(logits), keep, [True] * (len(self.steps) + 1))
        if gradient is None:
            raise Declined("its output does not depend on x")
        return gradient

    def _adjoint(
        self, t: list[Tensor], seed: Tensor, visit: Callable[[LinearStep, Tensor], None], wanted: Sequence[bool]
    ) -> Tensor | None:
        """Carry a cotangent of the logits back to x; `visit` sees each step's. wanted: the values that need one."""
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
        """For each value: whether the gradient of a later factor needs its tangent, and the last step that reads it."""
        useful, last = [False] * (len(self.steps) + 1), [-1] * (len(self.steps) + 1)
        for i in reversed(range(len(self.steps))):
            step = self.steps[i]
            for j in step.inputs:
                last[j] = max(last[j], i)
                useful[j] |= useful[i + 1] or bool(step.factors and step.cotangent is not None)
        return useful, last

    def _loss_gradients(self, t: list[Tensor], dlogits: Tensor, found: dict[int, Tensor]) -> None:
        """The loss's own backward pass, for a discriminator that gives a sample several logits."""
        learns = [False] * (len(self.steps) + 1)  # of each value: whether a step up to it learns
        for i, step in enumerate(self.steps):
            learns[i + 1] = bool(step.factors or step.terms) or any(learns[j] for j in step.inputs)

        def visit(step: LinearStep, g: Tensor) -> None:
            if step.factors and step.primal is not None:
                _add(found, step.factor_gradients(t, t[step.primal], g))
            if step.terms:
                _add(found, step.term_gradients(t, g, None))

        self._adjoint(t, dlogits, visit, learns)


def _learn(
    step: LinearStep, t: list[Tensor], v: Sequence[Tensor | None], scale: Tensor | None, found: dict[int, Tensor]
) -> None:
    """Add a step's weight gradients: factors by scale_n h_n + v_n against its cotangent, terms by the loss alone."""
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
        ctx.save_for_backward(gradient, *tape.tensors)  # autograd frees them and notices a weight that changed
        tape.tensors = []
        return logits.view_as(logits), squared

    @staticmethod
    def backward(ctx: Any, dlogits: Tensor | None, dsquared: Tensor | None) -> tuple[Tensor | None, ...]:
        gradient, *tensors = ctx.saved_tensors
        with torch.no_grad(), torch.autocast(gradient.device.type, enabled=False):
            found = ctx.tape.gradients(tensors, gradient, dlogits, dsquared)
        if torch.is_grad_enabled():  # create_graph=True: a second derivative must raise, not be zero
            found = {slot: DifferentiableOnce.apply(g.detach().requires_grad_()) for slot, g in found.items()}
        return (None, None, None, *(found.get(slot) for slot in ctx.tape.learnt))


class DifferentiableOnce(torch.autograd.Function):
    """The identity on a gradient that cannot be differentiated again: a request for it raises."""

    @staticmethod
    def forward(ctx: Any, g: Tensor) -> Tensor:
        return g.view_as(g)

    @staticmethod
    def backward(ctx: Any, dg: Tensor) -> Tensor:
        raise NotImplementedError(
            "gradient_penalty: its gradient cannot be differentiated again on the route by forward ops, got a request "
            "for it; use torch.autograd.grad(..., create_graph=True) on the discriminator itself"
        )
