"""What autograd does for the ops, without a node for each: notes of a forward pass, and the pass back over them.

An op's derivative is its own (`Op.differentiate`), so the gradients are those of the ops to the bit. Without the nodes
a pass forward and back took 5 to 13 % less of the host's time (three small chains, one thread of an Intel Xeon, family
6 model 207; no command for it is committed).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgan import _activation
from fastgan._layout import laid_out
from fastgan._op import Op, wanted


class Rule:
    """A function of torch's with its derivative, as an op has it."""

    def __init__(self, run: Callable[..., Tensor], save: Callable[..., None], derivative: Callable[..., tuple]):
        self.run, self.save, self.derivative = run, save, derivative


class Note:
    """What a call keeps for its derivative: the part of autograd's ctx that ops use."""

    next_functions = None  # no node: what is wanted stands in needs_input_grad

    def __init__(self, call: Op | Rule, inputs: tuple[int | None, ...], output: int):
        self.call, self.inputs, self.output = call, inputs, output
        self.needs_input_grad: tuple[bool, ...] = ()
        self.saved_tensors: tuple[Tensor | None, ...] = ()
        self.others = 0  # outputs that have no gradient

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        self.saved_tensors = tensors

    def mark_non_differentiable(self, *outputs: Tensor) -> None:
        pass

    def set_materialize_grads(self, value: bool) -> None:
        pass


class Tape:
    """The notes of one forward pass over `inputs`, of which those are followed that want a gradient.

    A tensor is known by its identity, so it must reach the next call as the last one gave it.
    """

    def __init__(self, inputs: Sequence[Tensor | None], wants: Sequence[bool]):
        self.notes: list[Note] = []
        self.output: int | None = None  # the number of the result
        self.alive = [t for t, want in zip(inputs, wants, strict=True) if want and t is not None]
        self.numbers = {id(t): i for i, t in enumerate(inputs) if wants[i] and t is not None}
        self.count = len(inputs)

    def run(self, call: Op | Rule, *args: Any) -> Any:
        """call.run(*args), noted where the gradient of an argument is wanted."""
        outputs = call.run(*args)
        inputs = tuple([self.numbers.get(id(a)) for a in args])
        if inputs.count(None) < len(inputs):
            first, others = (outputs, 0) if isinstance(outputs, Tensor) else (outputs[0], len(outputs) - 1)
            note = Note(call, inputs, self.count)
            note.others = others
            if call.save is not None:
                call.save(note, args, outputs)
            self.notes.append(note)
            self.numbers[id(first)] = self.count
            self.alive.append(first)  # another tensor may take a dead one's identity
            self.count += 1
        return outputs

    def close(self, y: Tensor) -> bool:
        """Forward is over, y its result. Whether y is kept, then as a tensor of its own: y will belong to a node that
        keeps this tape."""
        self.output, self.numbers, self.alive = self.numbers.get(id(y)), {}, []
        kept = [note for note in self.notes if any(t is y for t in note.saved_tensors)]
        for note in kept:
            note.saved_tensors = tuple([y.detach() if t is y else t for t in note.saved_tensors])
        return bool(kept)

    def back(self, dy: Tensor, asked: Sequence[int]) -> dict[int, Tensor]:
        """The gradients of the inputs `asked` for, by their numbers. The notes are used up: what each keeps is freed
        when its derivative is known."""
        live = set(asked)
        for note in self.notes:
            note.needs_input_grad = tuple([i in live for i in note.inputs])
            if any(note.needs_input_grad):
                live.add(note.output)
        found = {} if self.output is None else {self.output: dy}
        while self.notes:
            note = self.notes.pop()
            gradient = found.pop(note.output, None)
            if gradient is None or note.output not in live:
                continue
            answers = note.call.derivative(note, gradient, *(None,) * note.others)
            for number, answer in zip(note.inputs, answers, strict=True):
                if number in live and answer is not None:
                    found[number] = found[number] + answer if number in found else answer
        return found


# ---- torch's own ----------------------------------------------------------------------------------------------------


def _save_dtype(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.dtype = inputs[0].dtype


def _save_layout(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.shape = inputs[0].shape


def _save_output(ctx: Any, inputs: tuple, output: Tensor) -> None:
    _, *ctx.act = inputs
    ctx.save_for_backward(output)


def _save_product(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:2])


def _linear_backward(ctx: Any, dy: Tensor) -> tuple:
    x, weight = ctx.saved_tensors
    dx = dy.mm(weight) if wanted(ctx, 0) else None
    dweight = dy.t().mm(x) if wanted(ctx, 1) else None
    return dx, dweight, dy.sum(0) if wanted(ctx, 2) else None


CAST = Rule(lambda t, dtype: t.to(dtype), _save_dtype, lambda ctx, g: (g.to(ctx.dtype), None))
ROWS = Rule(lambda t: t.flatten(1), _save_layout, lambda ctx, g: (g.reshape(ctx.shape),))
TURN = Rule(  # with channels_last's own strides where both layouts are the same memory
    lambda t: laid_out(t.contiguous(memory_format=torch.channels_last), True),
    _save_layout,
    lambda ctx, g: (laid_out(g, False),),
)
LINEAR = Rule(F.linear, _save_product, _linear_backward)
ACTIVATION = Rule(
    _activation.apply, _save_output, lambda ctx, g: (_activation.backward(g, *ctx.saved_tensors, *ctx.act), None, None)
)
