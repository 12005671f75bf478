"""Hand-written forwards on our ops: a Dynamo backend that keeps eager autograd.

`torch.compile(model, backend="fastgan")` hands every graph of a model to `backend`, which puts the convolutions, norms
and activations in it on our ops (`fastgan.trace.rewrite`) and leaves the rest to PyTorch, call by call. Nothing is
compiled further: autograd records what runs, so second derivatives are as exact as without.
"""

from fastgan.trace.graphs import backend
from fastgan.trace.part import Part, missing, parts
from fastgan.trace.proof import Proof

__all__ = ["Part", "Proof", "backend", "missing", "parts"]
