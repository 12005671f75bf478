"""Programs: a run of fused layers as one native call, one autograd node and one backward call."""

from fastgan.program.layer import Layer, hold_constant, plain
from fastgan.program.run import Run, applies, switched_off
from fastgan.program.settling import race

__all__ = ["Layer", "Run", "applies", "hold_constant", "plain", "race", "switched_off"]
