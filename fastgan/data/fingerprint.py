"""What tells one set of training images from another: their number, size and content."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch

from fastgan.data.imageset import ImageSet

__all__ = ["difference", "fingerprint"]

# Hashed whole up to here (0.3 s); of more bytes so many images that they make as much, evenly spread, the first and
# the last among them.
WHOLE = 256 << 20
CHUNK = 1024  # images brought to main memory at once


def fingerprint(images: ImageSet) -> dict[str, Any]:
    """Plain values: "count", "shape" [C, H, W], "hashed" (how many images) and "sha256" of the pixels and labels."""
    pixels, count = images.images, len(images)
    size = max(1, pixels[0].numel())
    hashed = min(count, max(2, WHOLE // size))
    numbers = torch.arange(count) if hashed == count else torch.linspace(0, count - 1, hashed).round().long()
    digest = hashlib.sha256()
    for part in numbers.split(CHUNK):
        at = part.to(pixels.device)
        digest.update(pixels.index_select(0, at).cpu().numpy().data)
        if images.labels is not None:
            digest.update(images.labels.index_select(0, at).cpu().numpy().data)
    return {"count": count, "shape": list(pixels.shape[1:]), "hashed": hashed, "sha256": digest.hexdigest()}


def difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """How `now` differs from `before`, two fingerprints, in a few words; "" where they agree."""
    if before.get("count") != now["count"]:
        return f"{now['count']:,} images and there were {before.get('count'):,}"
    if before.get("shape") != now["shape"]:
        return f"images of {now['shape']} and they were {before.get('shape')}"
    if before.get("sha256") != now["sha256"]:
        return "as many images, but other pixels or labels"
    return ""
