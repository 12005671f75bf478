"""Gradient penalties: their kinds, and the two routes to them, by forward ops or by double backward."""

from fastgan.penalties.gradient import KINDS, SQUARED, gradient_penalty, logits_and_norms, squared_penalty
from fastgan.penalties.linearised import logits_and_squared_norms as forward_logits_and_norms
from fastgan.penalties.linearised import verdict
from fastgan.penalties.path_length import path_lengths

__all__ = [
    "KINDS",
    "SQUARED",
    "forward_logits_and_norms",
    "gradient_penalty",
    "logits_and_norms",
    "path_lengths",
    "squared_penalty",
    "verdict",
]
