"""Gradient penalties: their kinds, and the two routes to them, by forward ops or by double backward."""

from fastgan.penalties.gradient import (
    KINDS,
    SQUARED,
    forward_logits_and_norms,
    gradient_penalty,
    logits_and_norms,
    squared_penalty,
    verdict,
)

__all__ = [
    "KINDS",
    "SQUARED",
    "forward_logits_and_norms",
    "gradient_penalty",
    "logits_and_norms",
    "squared_penalty",
    "verdict",
]
