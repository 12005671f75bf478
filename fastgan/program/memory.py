"""Where a program's tensors lie: in a tensor of the caller's, or in one arena that all the others share.

A program's steps are known before it runs, so the life of each tensor is known too, from the step that writes it to the
last that reads it. Two tensors whose lives do not meet may lie at the same place. Forward and backward are planned as
one list of steps: the gradients of a layer lie where tensors lay that only later layers' gradients needed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

ALIGNMENT = 64  # bytes: a cache line, and a whole AVX-512 register
ARENA = 0  # the slot of the arena


class Place:
    """A tensor of a program: a slot of the caller's list (bytes 0), or `bytes` in the arena."""

    __slots__ = ("bytes", "first", "last", "offset", "slot")

    def __init__(self, slot: int, size: int = 0):
        self.slot, self.bytes, self.offset = slot, size, 0
        self.first, self.last = -1, -1  # steps that touch it

    def touch(self, step: int) -> None:
        if self.first < 0:
            self.first = step
        self.last = step

    def pointer(self) -> tuple[int, int]:
        """(slot, byte offset), as the native program takes it."""
        return self.slot, self.offset

    def meets(self, other: Place) -> bool:
        """Whether both are alive at some step."""
        return self.first <= other.last and other.first <= self.last


def arrange(places: Sequence[Place]) -> int:
    """Give every place of the arena its offset; the bytes of the arena.

    Largest first, each at the lowest offset that is free for its whole life: within 1 % of the largest sum of bytes
    alive at once for the DCGANs' steps.
    """
    placed: list[Place] = []
    size = 0
    for place in sorted((p for p in places if p.slot == ARENA and p.first >= 0), key=lambda p: -p.bytes):
        place.offset = 0
        for other in sorted((p for p in placed if p.meets(place)), key=lambda p: p.offset):
            if place.offset + place.bytes <= other.offset:
                break
            place.offset = max(place.offset, _aligned(other.offset + other.bytes))
        placed.append(place)
        size = max(size, place.offset + place.bytes)
    return size


class Arena:
    """The memory of one run of a program, with the views that its products have asked for."""

    __slots__ = ("tensor", "views")

    def __init__(self, size: int):
        self.tensor = torch.empty(size, dtype=torch.uint8)
        self.views: dict[tuple, Tensor] = {}

    def view(self, offset: int, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        """A matrix at `offset`; made once, since a view costs as much as a small product (3 us)."""
        found = self.views.get((offset, shape, dtype))
        if found is None:
            size = shape[0] * shape[1] * dtype.itemsize
            found = self.views[offset, shape, dtype] = self.tensor[offset : offset + size].view(dtype).view(shape)
        return found


class Spares:
    """Arenas that wait for the next run of their program: views that need not be made, pages that are mapped.

    Those above LARGEST go back to torch's allocator: others may need the memory, and there the views are small change.
    """

    LARGEST = 1 << 20  # bytes
    COUNT = 2  # a discriminator's real and fake pass before their backward

    def __init__(self, size: int):
        self.size, self.arenas = size, list[Arena]()

    def take(self) -> Arena:
        try:
            return self.arenas.pop()
        except IndexError:
            return Arena(self.size)

    def give(self, arena: Arena) -> None:
        # a tensor of inference mode may not be written to outside of it
        if self.size <= self.LARGEST and len(self.arenas) < self.COUNT and not arena.tensor.is_inference():
            self.arenas.append(arena)


def _aligned(offset: int) -> int:
    return -(-offset // ALIGNMENT) * ALIGNMENT
