"""The only file that talks to torch.library: an `Op` is a schema with interchangeable backends and one derivative.

Two routes lead to the same kernels. Plain eager tensors take a thin `autograd.Function` (about 9 us a call with
gradients); whatever traces or transforms (torch.compile, fake tensors, dispatch modes, autocast, subclasses) takes the
registered library op (about 20 us), which carries the schema, the shapes and the autocast rule. tests/test_op.py holds
both to the same numbers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

from fastgan._forward import is_exported
from fastgan.choice import Backend, Routine, choose, reaches

LIBRARY = torch.library.Library("fastgan", "FRAGMENT")
PLAIN = (Tensor, torch.nn.Parameter)  # tensors of other classes may see ops, so that they take the library op

# What each call of an op asks torch.
_dispatch_modes = torch._C._len_torch_dispatch_stack
_functorch_level = torch._C._functorch.peek_interpreter_stack
_is_compiling = torch.compiler.is_compiling
_tracing = torch._C._get_tracing_state
is_batched = torch._C._functorch.is_legacy_batchedtensor  # a cotangent of autograd.grad(..., is_grads_batched=True)


class Chosen(Routine):
    """A Routine that runs on the backend chosen for the call."""

    def run(self, *args: Any) -> Any:
        """Run the chosen backend; no autograd, no tracing."""
        launch = choose(self, args)
        return launch(*args) if _around is None else _around(self, launch)(*args)


class Op(Chosen):
    """One operator: `torch.ops.fastgan.<name>`.

    schema     as torch.library takes it; its first argument is a tensor and decides the device.
    fake       shapes, dtypes and strides of the outputs, for tracing.
    autocast   "lower": every floating tensor goes to the autocast dtype, as for torch's own convolutions;
               "first": the first tensor keeps its dtype, as for torch's batch norm (the kernels take mixed types);
               "float32": every floating tensor goes to float32, as for torch's losses.
    example    small arguments, for tests and for `fastgan doctor --prove`.
    """

    def __init__(
        self,
        schema: str,
        *,
        reference: Callable[..., Any],
        fake: Callable[..., Any],
        backends: dict[str, Backend] | None = None,
        autocast: str = "first",
        example: Callable[[], tuple],
    ):
        super().__init__(schema.partition("(")[0], reference, backends or {})
        self.example, self.autocast = example, autocast
        self.products = autocast == "lower"  # as torch's own list of what runs in lower precision
        self.save: Callable[..., None] | None = None
        self.derivative: Callable[..., Any] = self._refuse
        LIBRARY.define(schema)
        LIBRARY.impl(self.name, self.run, "CompositeExplicitAutograd")
        torch.library.register_fake(f"fastgan::{self.name}", fake, lib=LIBRARY)
        self.overload = getattr(torch.ops.fastgan, self.name).default
        for device, key in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA")):
            LIBRARY.impl(self.name, _autocast(self.overload, autocast, device), key)
        self._thin = self._thin_function()
        OPS[self.name] = self

    # ---- calling ------------------------------------------------------------------------------------------------

    def __call__(self, *args: Any) -> Any:
        if is_exported():
            return self.reference(*args)
        if _is_compiling():
            return self.overload(*args)
        needs_grad = elsewhere = False
        here = args[0].is_cpu
        device = None if here else args[0].device  # each question to torch takes 0.2 to 1 us of a call's 20
        traced = _batches or _dispatch_modes() > 0 or (not here and args[0].is_meta)
        for a in args:
            if isinstance(a, Tensor):
                needs_grad |= a.requires_grad
                traced |= type(a) not in PLAIN
                elsewhere |= not a.is_cpu if here else a.device != device
        if elsewhere:
            self._check_devices(args)
        if forward_ad._current_level >= 0 or _functorch_level() is not None:  # is_transformed(), a call less
            self._refuse_transforms(args)
        # is_autocast_enabled raises for the meta device
        if traced or torch.is_autocast_enabled("cpu" if here else device.type):  # type: ignore[union-attr]
            return self.overload(*args)
        if needs_grad and torch.is_grad_enabled():
            return self._thin.apply(*args)
        return self.run(*args)

    def _check_devices(self, args: tuple) -> None:
        """ValueError where an argument lies on another device than the first: a kernel would read foreign memory."""
        home = args[0].device
        for name, a in zip(self.names, args, strict=True):
            if isinstance(a, Tensor) and a.device != home:
                raise ValueError(
                    f"{self.name}: {name} must be on {home}, as {self.names[0]} is, got {a.device}; move one with .to()"
                )

    def drawn(self, args: tuple) -> tuple:
        rng = torch.Generator(self.first(args).device).manual_seed(0)

        def draw(name: str, a: Any) -> Any:
            if not isinstance(a, Tensor) or not a.is_floating_point():
                return a
            noise = _noise(a, rng)
            # exp(score - lse) of a few dozen keys then sums to about 1: a float16 proof of attention must not overflow
            least = 0.5 if name.endswith("var") else 4.0 if name == "lse" else None
            return noise if least is None else noise.abs_().add_(least)

        return tuple(draw(name, a) for name, a in zip(self.names, args, strict=True))

    def one_sample(self, args: tuple) -> tuple | None:
        if not self.products or len(self.first(args)) == 1:
            return None
        batched = zip(self.names, args, strict=True)
        return tuple(a[:1] if name in ("x", "dy") else a for name, a in batched)

    def _refuse_transforms(self, args: tuple) -> None:
        """torch.func and forward mode would silently see derivatives of zero: raise instead."""
        if _functorch_level() is not None:
            raise NotImplementedError(
                f"{self.name}: torch.func transforms (grad, vmap, jvp) are not supported, got one; "
                "use torch.autograd.grad"
            )
        if any(isinstance(a, Tensor) and forward_ad.unpack_dual(a).tangent is not None for a in args):
            raise NotImplementedError(
                f"{self.name}: forward-mode derivatives are not supported, got a dual tensor; use torch.autograd.grad"
            )

    # ---- derivatives --------------------------------------------------------------------------------------------

    def differentiate(self, save: Callable[..., None], backward: Callable[..., Any]) -> None:
        """save(ctx, inputs, output) keeps what `backward(ctx, *output_cotangents)` needs; backward calls ops."""
        nothing = (None,) * len(self.names)

        def answer(ctx: Any, *cotangents: Any) -> Any:  # None: see `first_alone`
            if cotangents[0] is None and all(c is None for c in cotangents):
                return nothing
            for c in cotangents:
                if c is not None and is_batched(c):
                    with _one_by_one():
                        return backward(ctx, *cotangents)
            return backward(ctx, *cotangents)

        self.save, self.derivative = save, backward
        self._thin.backward = staticmethod(answer)  # type: ignore[method-assign]
        torch.library.register_autograd(f"fastgan::{self.name}", answer, setup_context=save, lib=LIBRARY)

    def not_differentiable(self) -> None:
        """This op is the last derivative that we have: a request for its own derivative raises."""
        self.differentiate(lambda ctx, inputs, output: None, self._refuse)

    def _refuse(self, ctx: Any, *cotangents: Any) -> Any:
        raise NotImplementedError(
            f"{self.name}: derivatives of this order are not implemented, got a request for one; "
            "run the model in plain PyTorch for it"
        )

    def _thin_function(self) -> type[torch.autograd.Function]:
        op = self

        class Thin(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, *args: Any) -> Any:
                output = owned(op.run(*args))
                if op.save is not None:
                    op.save(ctx, args, output)
                return output

        Thin.__name__ = Thin.__qualname__ = self.name
        return Thin


def owned(output: Any) -> Any:
    """An op's results as tensors of their own: autograd refuses to change a view in place that such a node returns.

    An image of one channel is a view: its strides were set after its memory was (`fastgan._layout.laid_out`).
    """
    if isinstance(output, Tensor):
        return output.data if output._is_view() else output
    return tuple([t.data if t._is_view() else t for t in output])


OPS: dict[str, Op] = {}

Launcher = Callable[..., Any]
_around: Callable[[Routine, Launcher], Launcher] | None = None


@contextlib.contextmanager
def around(wrap: Callable[[Routine, Launcher], Launcher]) -> Iterator[None]:
    """Within: every op runs wrap(op, launcher) in the place of its launcher; how `fastgan profile` sees ops."""
    global _around
    before, _around = _around, wrap
    try:
        yield
    finally:
        _around = before


_batches = False


@contextlib.contextmanager
def _one_by_one() -> Iterator[None]:
    """Within: every op is called as a library op, which torch runs once for each entry of a batch of cotangents."""
    global _batches
    before, _batches = _batches, True
    try:
        yield
    finally:
        _batches = before


PERIOD = 65_521  # a prime: no stride of a kernel meets the same number again and again


def _noise(like: Tensor, rng: torch.Generator) -> Tensor:
    """Normal noise of like's layout, repeated from PERIOD numbers on: drawing all was a quarter of a first step."""
    noise = torch.empty_like(like, requires_grad=False)
    if noise.numel() <= PERIOD:
        return noise.normal_(generator=rng)
    period = torch.empty(PERIOD, dtype=noise.dtype, device=noise.device).normal_(generator=rng)
    times, rest = divmod(noise.numel(), PERIOD)
    memory = noise.as_strided((noise.numel(),), (1,))  # empty_like is dense
    memory[: times * PERIOD].view(times, PERIOD).copy_(period)
    memory[times * PERIOD :].copy_(period[:rest])
    return noise


def first_alone(ctx: Any, output: tuple[Tensor, ...]) -> None:
    """Of the outputs the first alone has a gradient, as their cotangents the others get None.

    Autograd would make zeros for each, unasked: 15 us of the 180 that a loss of 64 logits takes with its gradients.
    """
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def wanted(ctx: Any, index: int) -> bool:
    """Whether the running backward pass uses the gradient of input `index` (the inputs before it are tensors too).

    autograd asks this for its own nodes before they compute, but not for nodes written in Python. Without the question
    each convolution in `autograd.grad(y, x)` would make a whole weight gradient for nothing: one sixth of a penalty's
    double backward.
    """
    if not ctx.needs_input_grad[index]:
        return False
    edges = ctx.next_functions
    return edges is None or reaches(edges[index][0])  # a program's tape has asked for all of its notes


def is_traced() -> bool:
    """Whether torch.compile or a dispatch mode (fake tensors, a recorder) looks on."""
    return bool(_is_compiling() or _dispatch_modes() > 0)


def is_transformed() -> bool:
    """Whether a torch.func transform or forward mode looks on, for which our ops have no rules.

    Not while Dynamo compiles: it finds an object where functorch's stack is empty, and would write plain PyTorch down.
    """
    return not _is_compiling() and (forward_ad._current_level >= 0 or _functorch_level() is not None)


def is_retold(compiling: bool) -> bool:
    """Whether a model's calls are to be torch's own: it is exported (`is_exported`) or transformed."""
    return is_exported() or (not compiling and (forward_ad._current_level >= 0 or _functorch_level() is not None))


def is_aside(cotangent: Tensor) -> bool:
    """Whether what comes back is none that a kernel could read: a batch of cotangents, or one under a transform."""
    return is_batched(cotangent) or forward_ad._current_level >= 0 or _functorch_level() is not None


def is_observed() -> bool:
    """Whether anybody looks at single ops: what is_traced names, torch.jit's tracer, torch.func, forward mode, or
    `around`."""
    return bool(
        _is_compiling()
        or _dispatch_modes() > 0
        or _around is not None
        or _tracing() is not None
        or forward_ad._current_level >= 0
        or _functorch_level() is not None
    )


def draw(*shapes: tuple[int, ...]) -> list[Tensor]:
    """Normal noise of these shapes, for examples."""
    return [torch.randn(shape) for shape in shapes]


def _autocast(overload: Any, rule: str, device: str) -> Callable[..., Any]:
    def cast(a: Any, dtype: torch.dtype | None) -> Any:
        # float64 is left alone, as torch's own lower-precision list leaves it
        floating = isinstance(a, Tensor) and a.is_floating_point() and a.dtype != torch.float64
        return a.to(dtype) if floating and dtype is not None else a

    def call(*args: Any) -> Any:
        dtype = {"lower": torch.get_autocast_dtype(device), "float32": torch.float32, "first": None}[rule]
        with torch.autocast(device, enabled=False):
            return overload(*(cast(a, dtype) for a in args))

    return call
