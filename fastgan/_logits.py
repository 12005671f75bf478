"""The logits in what a discriminator returns."""

from __future__ import annotations

from typing import Any

from torch import Tensor

KEYS = ("logits", "logit", "output", "out")


def logits_of(output: Any) -> list[Tensor]:
    """The logits in a discriminator's output, one tensor a scale.

    A tensor is the logits. A list or tuple of tensors holds the logits of several scales. Of a pair (logits, features)
    the first counts: the features are a list, a tuple, a dict, None, or a tensor of more than one channel beside logits
    of one. Of a list of lists, as feature-matching networks return, each one's last tensor counts. Of a dict, the value
    under "logits" (or "logit", "output", "out", or its only value).

    Raises:
        TypeError: no logits are found.
    """
    if isinstance(output, Tensor):
        return [output]
    if isinstance(output, dict):
        found = [output[key] for key in KEYS if key in output] or list(output.values())
        if len(found) == 1 or any(key in output for key in KEYS):
            return logits_of(found[0])
    elif isinstance(output, list | tuple) and output:
        if len(output) == 2 and _are_features(*output):
            return logits_of(output[0])
        last = [part[-1] if isinstance(part, list | tuple) and part else part for part in output]
        if all(isinstance(part, Tensor) for part in last):
            return last
    raise TypeError(
        'discriminator: its output must be logits, a list of logits, (logits, features), or a dict with "logits", '
        f"got {type(output).__name__}"
    )


def _are_features(first: Any, second: Any) -> bool:
    """Whether `second` is what a discriminator gives beside its logits."""
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        return _channels(first) == 1 and _channels(second) > 1
    if isinstance(first, list | tuple) and isinstance(second, list | tuple):
        if not all(isinstance(part, Tensor) for part in first) or len(second) != len(first):
            return False
        # A list of features for each scale is no list of logits. A single map a scale could be the logits of further
        # scales: there the first list's channels decide.
        nested = all(isinstance(part, list | tuple) for part in second)
        return nested or all(_channels(part) == 1 for part in first)
    return isinstance(second, list | tuple | dict | None)


def _channels(logits: Tensor) -> int:
    return int(logits.shape[1]) if logits.dim() > 1 else 1
