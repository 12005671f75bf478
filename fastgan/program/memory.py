"""Where a program's tensors lie: in a tensor of the caller's, or in the arena that all the others share.

A program's steps are known before it runs, so the life of each tensor is known too, from the step that writes it to the
last that reads it. Two tensors whose lives do not meet may lie at the same place. Forward and backward are planned as
one list of steps: the gradients of a layer lie where tensors lay that only later layers' gradients needed.

A large arena is three blocks: what backward needs of forward waits in one, and the other two exist during one pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastgan import _native

ALIGNMENT = 64  # bytes: a cache line, and a whole AVX-512 register
ARENA = 0  # the slot of the arena, or of the block that lives from forward to backward
FORWARD, BACKWARD = 3, 4  # the slots of the blocks of one pass; 1 and 2 are the input's and the output's
BLOCKS = ARENA, FORWARD, BACKWARD
WHOLE = 1 << 20  # bytes up to which an arena is one block: a block costs an allocation, 1 us
HUGE = 4 << 20  # bytes from which a block asks for huge pages, as the kernels' scratch does


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


def arrange(places: Sequence[Place], backward: int) -> dict[int, int]:
    """Give every place of the arena its slot and offset; the bytes of each block. backward: the first step of it.

    Largest first, each at the lowest offset that is free for its whole life: within 1 % of the largest sum of bytes
    alive at once for the DCGANs' steps.
    """
    inside = sorted((p for p in places if p.slot == ARENA and p.first >= 0), key=lambda p: (-p.bytes, -p.last))
    size = _lay(inside, [])
    if size <= WHOLE or all(p.last < backward for p in inside):
        return {ARENA: size, FORWARD: 0, BACKWARD: 0}
    # A stack: what backward reads last lies lowest, so that what it has read leaves one free stretch.
    waiting = sorted((p for p in inside if p.first < backward <= p.last), key=lambda p: -p.last)
    sizes = {ARENA: _lay(waiting, [])}
    for slot, of_pass in ((FORWARD, lambda p: p.last < backward), (BACKWARD, lambda p: p.first >= backward)):
        sizes[ARENA], sizes[slot] = _lay_beside(waiting, sizes[ARENA], [p for p in inside if of_pass(p)], slot)
    return sizes


def _lay(places: Sequence[Place], placed: list[Place]) -> int:
    """Offsets for places of one block beside those `placed` before; the bytes that they reach to."""
    for place in places:
        place.offset = _free(place, placed)
        placed.append(place)
    return max((p.offset + p.bytes for p in placed), default=0)


def _lay_beside(waiting: Sequence[Place], size: int, places: Sequence[Place], slot: int) -> tuple[int, int]:
    """Offsets for the places of one pass: where something waits later or waited before, or in a block of their own.

    size: of the block of `waiting`, which may grow by a quarter of a place to spare the rest of it: DCGAN-64's largest
    gradient takes 34 MB, where 29 MB are free. The bytes of both blocks.
    """
    there, own, own_size = list(waiting), list[Place](), 0
    for place in places:
        among, alone = _free(place, there), _free(place, own)
        if alone + place.bytes > own_size and among + place.bytes - size <= place.bytes // 4:
            place.offset = among
            there.append(place)
            size = max(size, among + place.bytes)
        else:
            place.slot, place.offset = slot, alone
            own.append(place)
            own_size = max(own_size, alone + place.bytes)
    return size, own_size


def _free(place: Place, placed: Sequence[Place]) -> int:
    """The lowest offset that is free for the place's whole life."""
    offset = 0
    for other in sorted((p for p in placed if p.meets(place)), key=lambda p: p.offset):
        if place.bytes + offset <= other.offset:
            break
        offset = max(offset, _aligned(other.offset + other.bytes))
    return offset


class Arena:
    """The memory of one run of a program, with the views that its products have asked for."""

    __slots__ = ("blocks", "sizes", "views")

    def __init__(self, sizes: dict[int, int]):
        self.sizes = sizes
        self.blocks: dict[int, Any] = {FORWARD: None, BACKWARD: None}
        self.views: dict[tuple, Tensor] = {}
        self.open(ARENA)

    def open(self, slot: int) -> None:
        """Make a block, unless it is empty."""
        size = self.sizes[slot]
        if size or slot == ARENA:
            self.blocks[slot] = block = torch.empty(size, dtype=torch.uint8)
            if size >= HUGE:
                _native.CPU.module().prefer_huge_pages(block.data_ptr(), size)

    def close(self, slot: int) -> None:
        """Free a block."""
        self.blocks[slot] = None
        self.views = {at: view for at, view in self.views.items() if at[0] != slot}

    def slots(self, x: Tensor, y: Tensor | None) -> tuple[Tensor | None, ...]:
        """The first slots of a run."""
        return self.blocks[ARENA], x, y, self.blocks[FORWARD], self.blocks[BACKWARD]

    def view(self, slot: int, offset: int, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        """A matrix at `offset`; made once, since a view costs as much as a small product (3 us)."""
        found = self.views.get((slot, offset, shape, dtype))
        if found is None:
            block, size = self.blocks[slot], shape[0] * shape[1] * dtype.itemsize
            found = self.views[slot, offset, shape, dtype] = block[offset : offset + size].view(dtype).view(shape)
        return found


class Spares:
    """Arenas that wait for the next run of their program: views that need not be made, pages that are mapped.

    Those above WHOLE go back to torch's allocator: others may need the memory, and there the views are small change.
    """

    COUNT = 2  # a discriminator's real and fake pass before their backward

    def __init__(self, sizes: dict[int, int]):
        self.sizes, self.arenas = sizes, list[Arena]()
        self.whole = not (sizes[FORWARD] or sizes[BACKWARD])

    def take(self) -> Arena:
        try:
            return self.arenas.pop()
        except IndexError:
            return Arena(self.sizes)

    def give(self, arena: Arena) -> None:
        # a tensor of inference mode may not be written to outside of it
        small = self.whole and self.sizes[ARENA] <= WHOLE
        if small and len(self.arenas) < self.COUNT and not arena.blocks[ARENA].is_inference():
            self.arenas.append(arena)


def _aligned(offset: int) -> int:
    return -(-offset // ALIGNMENT) * ALIGNMENT
