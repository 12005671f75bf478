"""What tells one training set from another: the number of its samples, their shape and content."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch

from fastgan.data.imageset import Samples

__all__ = ["difference", "fingerprint"]

# Hashed whole up to here (0.3 s); of more bytes so many images that they make as much, evenly spread, the first and
# the last among them.
WHOLE = 256 << 20
CHUNK = 1024  # images brought to main memory at once


def fingerprint(samples: Any) -> dict[str, Any]:
    """Plain values: "count", "shape" of a sample, "hashed" (how many samples) and "sha256" of them and their labels.

    samples: a `Samples`, or a set of several that are its `parts`.
    """
    digest, shapes, total = hashlib.sha256(), [], 0
    for part in getattr(samples, "parts", (samples,)):
        total += _hash(part, digest)
        shapes += part.values.shape[1:]
    return {"count": len(samples), "shape": shapes, "hashed": total, "sha256": digest.hexdigest()}


def _hash(samples: Samples, digest: Any) -> int:
    """The samples and their labels into `digest`; how many of them."""
    values, count = samples.values, len(samples)
    size = max(1, values[0].numel() * values.element_size())
    hashed = min(count, max(2, WHOLE // size))
    numbers = torch.arange(count) if hashed == count else torch.linspace(0, count - 1, hashed).round().long()
    for some in numbers.split(CHUNK):
        at = some.to(values.device)
        digest.update(values.index_select(0, at).cpu().numpy().data)
        if samples.labels is not None:
            digest.update(samples.labels.index_select(0, at).cpu().numpy().data)
    return hashed


def difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """How `now` differs from `before`, two fingerprints, in a few words; "" where they agree."""
    if before.get("count") != now["count"]:
        return f"{now['count']:,} images and there were {before.get('count'):,}"
    if before.get("shape") != now["shape"]:
        return f"images of {now['shape']} and they were {before.get('shape')}"
    if before.get("sha256") != now["sha256"]:
        return "as many images, but other pixels or labels"
    return ""
