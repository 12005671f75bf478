"""Dropout: torch's own numbers, with the mask drawn many numbers at once."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from fastgan import _native
from fastgan._op import is_observed
from fastgan.choice import STATE, absent

FEW = 1000  # elements: torch draws so many while the generator's state is handed over and back


def dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """torch.nn.functional.dropout: the same elements are dropped under the same seed, in less time on many CPUs.

    On CPUs that are not Intel's PyTorch draws a mask one number after another: 18 ns an element on a Zen 1, an eighth
    of a DCGAN-28 step. Vector instructions make the same draws of the same generator in 3 ns. The first call proves
    that this PyTorch draws so on this CPU.

    Args:
        input: any shape and layout. float32 and bfloat16 on a CPU; everything else goes to torch.nn.functional.dropout,
            which also says what is wrong.
        p: the probability that an element becomes 0; the others are divided by 1 - p.
        training: without it `input` is returned.
        inplace: write the result over `input`.

    Returns:
        a tensor of `input`'s shape, dtype and strides, differentiable in every order.

    Source: Srivastava et al., Dropout (2014).
    """
    if torch.compiler.is_compiling() or not (training and 0.0 < p < 1.0 and input.numel() > FEW and _applies(input)):
        return torch.nn.functional.dropout(input, p, training, inplace)
    noise = torch.empty_like(input)
    _bernoulli(noise, 1 - p, _kept(p, input.dtype))
    return input.mul_(noise) if inplace else input * noise


def _applies(x: Tensor) -> bool:
    return (
        type(x) is Tensor
        and x.is_cpu
        and x.dtype in _native.CPU.dtypes
        and STATE.forced in ("auto", "native")
        and not absent("native")
        and not is_observed()
        and _draws_as_torch(x.dtype)
    )


@functools.lru_cache(64)  # a probability may be annealed
def _kept(p: float, dtype: torch.dtype) -> float:
    """What torch multiplies a kept element by, to the bit."""
    return torch.ones((), dtype=dtype).div_(1 - p).item()


def _bernoulli(y: Tensor, p: float, value: float) -> None:
    """y.bernoulli_(p), with `value` in the place of 1. y is new and dense: its draws follow its memory."""
    state = torch.get_rng_state()
    _native.CPU.call("bernoulli", y, _native.DTYPE_CODES[y.dtype], y, state, y.numel(), p, value)
    torch.set_rng_state(state)


@functools.cache
def _draws_as_torch(dtype: torch.dtype) -> bool:
    """Whether this PyTorch on this CPU draws as the kernel does; on Intel's CPUs it asks MKL for another stream."""
    before = torch.get_rng_state()
    drawn = []
    for draw in (lambda y: y.bernoulli_(0.7), lambda y: _bernoulli(y, 0.7, 1.0)):
        torch.set_rng_state(before)
        y = torch.empty(2001, dtype=dtype)  # so many draws refill the generator's block of words three to six times
        draw(y)
        drawn.append((y, torch.get_rng_state()))
    torch.set_rng_state(before)
    return all(torch.equal(*pair) for pair in zip(*drawn, strict=True))
