"""Calling programs: which plan serves a call, its autograd node, and when the layers run op by op instead.

A program runs where it is known to give the ops' numbers: plain tensors, in float32 or under autocast, no tracing. On a
CPU it is a `Plan`, on a GPU `Launches`. None is made while a CUDA graph is captured, and none runs where hooks take
from a GPU's memory what autograd saves (torch.utils.checkpoint). An input that is a leaf and wants a gradient (a
penalty's images) is left to the ops, since second derivatives are wanted of it. A backward pass that must itself be
differentiable (create_graph=True), or that runs a second time over the same forward (retain_graph=True), replays the
layers op by op from what the node saved.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fastgan._layout import image, is_dense, laid_out
from fastgan._op import is_aside, is_observed
from fastgan.choice import STATE, Contest, absent, capturing, fastest, forced, is_repacked, reaches
from fastgan.program.launches import Launches
from fastgan.program.layer import Layer, are_constant, gradients_by_ops, plain, reached, versions, written_to
from fastgan.program.memory import BACKWARD, FORWARD, Arena, Spares
from fastgan.program.plan import COTANGENT, Plan, Unfit
from fastgan.program.product import Steps
from fastgan.program.written import written

FLOATS = (torch.float32, torch.bfloat16)
KIND = "program"  # what its races are remembered under
MAX_WAYS = 64  # of one run of layers: another batch size needs another
MAX_KEPT = 8  # ways of constants that hold them folded and packed: 28 MB each for DCGAN-64's generator

Way = Callable[[Tensor, Sequence[Any], Sequence[Any]], Tensor]  # x, parameters, buffers -> y

_off = False


@contextlib.contextmanager
def switched_off() -> Iterator[None]:
    """Within: every layer runs op by op, which is what a program must equal."""
    global _off
    before, _off = _off, True
    try:
        yield
    finally:
        _off = before


def applies(x: Any) -> bool:
    """Whether a program may run on x at all: a plain tensor, and nobody who looks on sees ops."""
    if type(x) is not Tensor or _off or STATE.watchers or is_observed():
        return False
    if x.is_cuda or STATE.emulated:  # here and in a run's key no call more: a small chain's ceiling counts them
        return STATE.forced != "reference" and not is_repacked()
    return x.is_cpu and STATE.forced in ("auto", "native") and not absent("native")


class Compiled:
    """A plan with its native programs; packed: of constants, the list of those that hold them packed."""

    def __init__(
        self,
        layers: Sequence[Layer],
        x: Tensor,
        dtype: torch.dtype,
        wants: Sequence[bool],
        packed: list[Compiled] | None = None,
    ):
        constant = packed is not None
        plan = Plan(layers, x, dtype, wants, constant)
        self.parts = 1 if plan.gradients else plan.useful_parts()
        if self.parts > 1:
            plan = Plan(layers, x[: len(x) // self.parts], dtype, wants, constant)
        self.plan, self.constant, self.output_channels_last = plan, plan.constant, plan.output_channels_last
        self.packed: list[Compiled] = [] if packed is None else packed
        self.kept: Kept | None = None
        self.layers = [layer.frozen() for layer in layers]  # a backward may come when the modules are set otherwise
        self.part_bytes = len(x) // self.parts * x.stride(0) * x.element_size()
        self.forward = None if plan.constant else self._forward()  # of constants, `kept` has it
        self.spares = Spares(plan.blocks)
        self.backwards: dict[frozenset[int], Steps] = {}
        self.updates = any(layer.is_batch_norm() and layer.norm.training for layer in layers)
        self.activation = layers[-1].activation
        slots = [x, *(p for layer in layers for p in layer.parameters())]
        edges = itertools.count()  # of the node: one for each tensor among the inputs
        edge_of = [None if t is None else next(edges) for t in slots]
        self.asked = [(i, edge_of[i]) for i in sorted(plan.asked)]

    def _forward(self) -> Steps:
        forward = self.plan.program(0, self.plan.forward_steps)
        if self.parts > 1:
            forward.split(self.parts, self.part_bytes, self.plan.bytes())
        return forward

    def _kept(self, tensors: list[Tensor | None], arena: Arena, slots: tuple) -> Kept:
        """What was made of these parameters and buffers; made anew where they are others, or were written to."""
        kept = self.kept
        if kept is None or not kept.is_of(tensors):
            block = torch.empty(self.plan.constant_bytes, dtype=torch.uint8)
            self.plan.setup_program().run(torch.get_num_threads(), arena, *slots, block)
            kept = self.kept = Kept(tensors, block, self._forward())
            self._drop_others()
        return kept

    def _drop_others(self) -> None:
        """Of the ways of these layers the last MAX_KEPT ones that were packed stay so."""
        with contextlib.suppress(ValueError):
            self.packed.remove(self)
        self.packed.append(self)
        for other in self.packed[:-MAX_KEPT]:
            other.kept = None
        del self.packed[:-MAX_KEPT]

    def backward(self, unwanted: frozenset[int]) -> Steps:
        program = self.backwards.get(unwanted)
        if program is None:
            plan = self.plan
            program = self.backwards[unwanted] = plan.program(plan.forward_steps, len(plan.steps), unwanted)
        return program

    def run(self, x: Tensor, parameters: Sequence[Any], buffers: Sequence[Any]) -> tuple[Tensor, Arena]:
        """(y, arena)."""
        plan = self.plan
        y = torch.empty_strided((len(x), *plan.shape[1:]), plan.strides, dtype=plan.dtype)
        arena = self.spares.take()
        if not self.spares.whole:
            arena.open(FORWARD)
        forward, slots = self.forward, (*arena.slots(x, y), *parameters, *buffers)
        if forward is None:
            kept = self._kept([*parameters, *buffers], arena, slots)
            forward, slots = kept.forward, (*slots, kept.block)
        forward.run(torch.get_num_threads(), arena, *slots)
        if not self.spares.whole:
            arena.close(FORWARD)
        return y, arena

    def __call__(self, x: Tensor, parameters: Sequence[Any], buffers: Sequence[Any]) -> Tensor:
        if self.plan.gradients:
            y = Node.apply(self, buffers, x, *parameters)
        else:
            y, arena = self.run(x, parameters, buffers)
            self.spares.give(arena)
        if self.updates:  # as in PyTorch, the count of batches alone has another version (`update_running`)
            torch.autograd.graph.increment_version([b for b in buffers[2::3] if b is not None])
        return y


class Kept:
    """Constants of a program, and the forward program whose first run packs its weights for all later ones."""

    def __init__(self, tensors: list[Tensor | None], block: Tensor, forward: Steps):
        self.tensors, self.block, self.forward = tensors, block, forward
        self.states = _states(tensors)

    def is_of(self, tensors: list[Tensor | None]) -> bool:
        return all(map(operator.is_, tensors, self.tensors)) and _states(tensors) == self.states


def _states(tensors: Sequence[Tensor | None]) -> list[tuple[int, int]]:
    """Where each tensor lies, and how often it was written to."""
    return [(t.data_ptr(), 0 if t.is_inference() else t._version) for t in tensors if t is not None]


class Node(torch.autograd.Function):
    """The one autograd node of a program: apply(compiled, buffers, x, *parameters)."""

    @staticmethod
    def forward(ctx: Any, compiled: Compiled, buffers: list, x: Tensor, *parameters: Any) -> Tensor:
        y, ctx.arena = compiled.run(x, parameters, buffers)
        ctx.compiled, ctx.buffers = compiled, len(buffers)
        ctx.activation = compiled.activation  # who looks for a final sigmoid reads it off the graph
        # Parameters outlive the graph as it is; to save them as autograd does costs 0.6 us each, their versions 0.1.
        ctx.parameters, ctx.versions = parameters, versions(parameters)
        ctx.save_for_backward(x, y if compiled.plan.reads_output else None)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        (x, y), parameters = ctx.saved_tensors, ctx.parameters
        if ctx.versions != versions(parameters):
            raise written_to()
        compiled, plan = ctx.compiled, ctx.compiled.plan
        if torch.is_grad_enabled() or ctx.arena is None or is_aside(dy):
            tensors = (x, *parameters)
            return None, None, *gradients_by_ops(compiled.layers, plan.dtype, reached(ctx, tensors), dy, tensors)
        arena, ctx.arena = ctx.arena, None  # the gradients take the place of what was kept
        if not compiled.spares.whole:
            arena.open(BACKWARD)
        left_out = []
        if plan.turned_cotangent is not None and not any(dy.stride()):  # of sum() and mean(): one number
            place = plan.turned_cotangent
            arena.view(place.slot, place.offset, (1, dy.numel()), dy.dtype).fill_(dy.as_strided((), ()))
            left_out.append(COTANGENT)
        else:
            dy = _turned_to(dy, plan.output_channels_last)
        tensors = (x, *parameters)
        found: list[Tensor | None] = [None] * len(tensors)
        for i in plan.gradients:
            found[i] = torch.empty_like(tensors[i])
        edges = ctx.next_functions
        left_out += [i for i, edge in compiled.asked if not reaches(edges[edge][0])]
        made = [found[i] for i in plan.gradients]
        slots = *arena.slots(x, y), *parameters, *(None,) * ctx.buffers, dy, *made
        compiled.backward(frozenset(left_out)).run(torch.get_num_threads(), arena, *slots)
        compiled.spares.give(arena)
        for i in left_out:
            if i != COTANGENT:
                found[i] = None
        return None, None, *found


def _turned_to(t: Tensor, channels_last: bool) -> Tensor:
    """t itself or its copy; a matrix has one layout only."""
    if t.dim() == 3 and channels_last:
        return image(t).contiguous(memory_format=torch.channels_last).squeeze(2)
    turned = channels_last and t.dim() == 4
    return t.contiguous(memory_format=torch.channels_last if turned else torch.contiguous_format)


class Run:
    """Neighbouring layers of a chain, called as one."""

    def __init__(self, layers: list[Layer]):
        self.layers = layers
        self.kinds = tuple(layer.kinds() for layer in layers)
        self.parameters = [place for layer in layers for place in layer.parameter_places()]
        self.buffers = [place for layer in layers for place in layer.buffer_places()]
        self.facts = [fact for layer in layers for fact in layer.fact_readers()]
        self.packed: list[Compiled] = []  # those of constants that hold them, the last one packed last
        self.ways: dict[tuple, Way | None] = {}
        self.last: tuple[tuple, Way | None] = (), None  # comparing with it is half the cost of hashing

    def __call__(self, x: Tensor) -> Tensor | None:
        """y, or None: run the layers op by op."""
        if x.requires_grad and x.is_leaf and torch.is_grad_enabled():
            return None
        device = "cpu" if x.is_cpu else x.device.type
        autocast = torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if autocast else x.dtype
        parameters = [owner[name] for owner, name in self.parameters]
        buffers = [owner[name] for owner, name in self.buffers]
        key = self._key(x, (dtype, autocast), parameters, buffers)
        before, way = self.last
        if key != before:
            try:
                way = self.ways[key]
            except KeyError:
                if (x.is_cuda or STATE.emulated) and capturing():
                    return None
                way = self._chosen(key, x, dtype, parameters, buffers)
            self.last = key, way
        return None if way is None else way(x, parameters, buffers)

    def _key(self, x: Tensor, computes: tuple[torch.dtype, bool], parameters: list, buffers: list) -> tuple:
        """What the choice of a way depends on; the fifth is which of x and the parameters get gradients, if any.

        computes: the dtype, and whether autocast asks for it.
        """
        grad = torch.is_grad_enabled()
        return (
            x.shape,
            x.stride(),
            x.dtype,
            computes,
            (x.requires_grad, *[p is not None and p.requires_grad for p in parameters]) if grad else None,
            (*[(p.shape, p.stride(), p.dtype, p.device) if p is not None else None for p in parameters],),
            (*[b.shape if b is not None else None for b in buffers],),
            (*[read(module) for read, module in self.facts],),
            self.kinds,
            torch.get_num_threads(),
            forced(),
            *(("gpu",) if x.is_cuda or STATE.emulated else ()),
        )

    def _chosen(self, key: tuple, x: Tensor, dtype: torch.dtype, parameters: list, buffers: list) -> Way | None:
        """The fastest of a program and plain PyTorch, or None where no program is known to give the ops' numbers."""
        if len(self.ways) >= MAX_WAYS:
            self.ways.clear()
        compiled = self._compiled(x, dtype, key[4] or (False,) * (1 + len(parameters)))
        way: Way | None = compiled
        self.ways[key] = way
        if compiled is not None:
            ways, constant = self._ways(compiled, x), compiled.constant
            contest, arguments = self._contest(key, ways, x, parameters, buffers, constant)
            of = lambda: written(self.layers, x, dtype, key[4], constant)
            found = lambda: {"op": KIND, "args": of(), "why": "open: the budget"}
            self.ways[key] = way = ways[fastest(contest, arguments, found)]
        return way  # another thread may have cleared the dictionary by now

    def runs(self) -> tuple[str, str]:
        """What runs the layers in the calls so far, and why it is no program."""
        if not self.ways or any(isinstance(way, Compiled | Launches) for way in self.ways.values()):
            return "fastgan program", "" if self.ways else "from its first call on, unless plain PyTorch wins the race"
        lost = any(way is not None for way in self.ways.values())
        return "torch", "plain PyTorch won the race of its stretch" if lost else "no program for such a call"

    def tensors(self) -> list[Tensor | None]:
        """The parameters as they are now."""
        return [owner[name] for owner, name in self.parameters]

    def contest(self, x: Tensor, dtype: torch.dtype) -> tuple[Contest, Sequence[Any]]:
        """A new race of the ways that a call can take, and its arguments."""
        parameters = self.tensors()
        buffers = [owner[name] for owner, name in self.buffers]
        key = self._key(x, (dtype, torch.is_autocast_enabled(x.device.type)), parameters, buffers)
        compiled = self._compiled(x, dtype, key[4] or (False,) * (1 + len(parameters)))
        if compiled is None:
            raise Unfit
        return self._contest(key, self._ways(compiled, x), x, parameters, buffers, compiled.constant)

    def _ways(self, compiled: Compiled | Launches, x: Tensor) -> dict[str, Way]:
        ways: dict[str, Way] = {"program": compiled, "plain": functools.partial(plain, self.layers)}
        if x.dim() == 4:
            ways["channels_last"] = functools.partial(_turned, self.layers, compiled.output_channels_last)
        return ways

    def _contest(
        self, key: tuple, ways: dict[str, Way], x: Tensor, parameters: list, buffers: list, constant: bool
    ) -> tuple[Contest, Sequence[Any]]:
        """The race of the ways, and its arguments: each run gets copies of them, so constants are none."""
        plain = "plain", "channels_last"
        if constant:
            kept: dict[str, Any] = {name: lambda x, w=way: w(x, parameters, buffers) for name, way in ways.items()}
            return Contest((KIND, "constant", *key), kept, plain), [x]
        count = len(parameters)
        apart = {name: lambda x, *rest, w=way: w(x, rest[:count], rest[count:]) for name, way in ways.items()}
        return Contest((KIND, *key), apart, plain), [x, *parameters, *buffers]

    def _compiled(self, x: Tensor, dtype: torch.dtype, wants: Sequence[bool]) -> Compiled | Launches | None:
        if x.is_cuda or STATE.emulated:
            return Launches.made(self.layers, x, dtype, wants)
        fits = x.dim() in (2, 3, 4) and x.numel() > 0 and is_dense(image(x)) and x.dtype in FLOATS and dtype in FLOATS
        if not torch.is_autocast_enabled("cpu"):  # float32 parameters take no other input
            fits = fits and dtype == torch.float32
        if self.layers[0].conv is None:  # a norm under autocast computes in its input's type
            fits = fits and x.dtype == dtype
        if fits and not any(layer.refusal(any(wants), x.device) for layer in self.layers):
            tensors = (owner[name] for owner, name in (*self.parameters, *self.buffers))
            with contextlib.suppress(Unfit):  # the ops say what is wrong
                constant = not any(wants) and are_constant(tensors)
                return Compiled(self.layers, x, dtype, wants, self.packed if constant else None)
        return None


def _turned(layers: Sequence[Layer], channels_last: bool, x: Tensor, parameters: Any, buffers: Any) -> Tensor:
    """Plain PyTorch in channels_last, whatever the input's layout."""
    y = plain(layers, x.contiguous(memory_format=torch.channels_last), parameters, buffers)
    return y if y.dim() == 2 else laid_out(y, channels_last, layers[-1].makes_strides_plain())
