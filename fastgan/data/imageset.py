"""A set of training images and its endless, resumable stream of batches."""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor


class ImageSet:
    """Images for training, as bytes.

    Attributes:
        images: uint8 [M, C, H, W], on `device` or, where they are too many for it, in main memory or a
            memory-mapped file (`streamed` is True then, and each batch is copied to `device`).
        labels: int64 [M] beside the images, or None.
        classes: a name for each label number, or None.
        name: for reports.
        skipped: [(file name, reason)] of the files that could not be read.
        device: where batches come out.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor | None = None,
        classes: Sequence[str] | None = None,
        *,
        name: str = "images",
        skipped: Sequence[tuple[str, str]] = (),
        device: torch.device | str | None = None,
        mapped: Path | None = None,
    ) -> None:
        if images.dtype != torch.uint8 or images.ndim != 4 or 0 in images.shape:
            raise ValueError(
                f"ImageSet: images must be uint8 [M, C, H, W] with no dimension 0, got {images.dtype} "
                f"{list(images.shape)}; fastgan.data.load converts other arrays"
            )
        if labels is not None:
            if labels.shape != images.shape[:1] or labels.is_floating_point() or labels.dtype == torch.bool:
                raise ValueError(
                    f"ImageSet: labels must be integers [{len(images)}], one for each image, got "
                    f"{labels.dtype} {list(labels.shape)}"
                )
            low, high = int(labels.min()), int(labels.max())
            if low < 0 or (classes is not None and high >= len(classes)):
                known = "" if classes is None else f" and below the {len(classes)} classes"
                raise ValueError(f"ImageSet: labels must be at least 0{known}, got {low} to {high}")
            labels = labels.to(images.device, torch.int64)
            classes = [str(number) for number in range(high + 1)] if classes is None else list(classes)
        self.images = images
        self.labels = labels
        self.classes: list[str] | None = list(classes) if labels is not None and classes is not None else None
        self.name = name
        self.skipped = list(skipped)
        self.device = _device(device) if device is not None else images.device
        self.mapped = mapped

    def __len__(self) -> int:
        return len(self.images)

    def __repr__(self) -> str:
        _, channels, height, width = self.images.shape
        place = f"streamed to {self.device}" if self.streamed else f"on {self.device}"
        classes = f", {len(self.classes)} classes" if self.classes else ""
        skipped = f", {len(self.skipped)} files skipped" if self.skipped else ""
        shape = f"{len(self):,} images {channels}x{height}x{width}"
        return f"ImageSet({self.name}: {shape}{classes}, {place}{skipped})"

    @property
    def channels(self) -> int:
        return self.images.shape[1]

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width)"""
        return self.images.shape[2], self.images.shape[3]

    @property
    def nbytes(self) -> int:
        return self.images.numel()

    @property
    def values(self) -> Tensor:
        """The samples as they lie, whatever a set holds: here the images."""
        return self.images

    def select(self, numbers: Tensor) -> ImageSet:
        """The images of these numbers, int64 [K], as a set of their own."""
        at = numbers.to(self.images.device)
        labels = None if self.labels is None else self.labels[at]
        return ImageSet(self.images[at], labels, self.classes, name=self.name, device=self.device)

    @property
    def streamed(self) -> bool:
        """True if every batch is gathered in main memory (or from a file) and then copied to `device`."""
        return self.mapped is not None or self.images.device != self.device

    def to(self, device: torch.device | str) -> ImageSet:
        """The same set with its images on `device`; memory-mapped images stay in their file and only the
        batches go there."""
        target = _device(device)
        home = self.images.device if self.mapped else target
        return ImageSet(
            self.images.to(home),
            None if self.labels is None else self.labels.to(home),
            self.classes,
            name=self.name,
            skipped=self.skipped,
            device=target,
            mapped=self.mapped,
        )

    def pick(self, indices: Tensor, *, mirror: Tensor | None = None, channels_last: bool = False) -> Tensor:
        """Images by number, float32 [N, C, H, W] in [-1, 1] on `device`: x / 127.5 - 1.

        indices: int64 or int32 [N]; mirror: bool [N], which to flip left to right; both on `images.device`.
        Only tensor ops, and no value is read back.
        """
        x = self.images.index_select(0, indices)
        if mirror is not None:
            # While the pixels are bytes: a quarter of the traffic.
            x = torch.where(mirror.view(-1, 1, 1, 1), x.flip(-1), x)
        x = self.deliver(x)
        layout = torch.channels_last if channels_last else torch.contiguous_format
        return x.to(torch.float32, memory_format=layout).div_(127.5).sub_(1.0)

    def deliver(self, x: Tensor) -> Tensor:
        """`x`, gathered where the images lie, on `device`."""
        return delivered(x, self.device)

    def batches(
        self,
        batch_size: int,
        *,
        generator: torch.Generator | None = None,
        flip: bool = False,
        drop_last: bool = True,
        channels_last: bool = False,
        part: tuple[int, int] = (0, 1),
    ) -> Batches:
        """An endless iterator of (images float32 [N, C, H, W] in [-1, 1], labels int64 [N] or None).

        Each epoch is a fresh permutation without replacement. generator: draws the permutations and flips; on
        the CPU the same seed gives the same batches on every device. None makes one seeded from torch's
        global seed. flip: each image is mirrored left to right with probability 1/2. drop_last: every batch
        is full, and what an epoch leaves over is dropped; a set smaller than batch_size is then gone through
        as often as a batch needs, so that tiny sets train. With drop_last False an epoch ends with a smaller
        batch. part: (k, n) gives the k-th of n equal parts of every batch; generators in the same state on n
        processes give the whole batch between them, no image twice.
        """
        return Batches(
            self,
            batch_size,
            generator=generator,
            flip=flip,
            drop_last=drop_last,
            channels_last=channels_last,
            part=part,
        )


class Samples(Protocol):
    """A set to train on: what `Batches` and a run ask of one.

    labels: int64 [M] or None, with their `classes`. skipped: [(file name, reason)]. device: where batches come out.
    mapped: the file that the samples stay in, or None.
    """

    name: str
    labels: Tensor | None
    classes: list[str] | None
    skipped: list[tuple[str, str]]
    device: torch.device
    mapped: Path | None

    def __len__(self) -> int: ...

    @property
    def values(self) -> Tensor:
        """[M, ...] as they lie."""

    def pick(self, indices: Tensor, *, mirror: Tensor | None = None, channels_last: bool = False) -> Tensor:
        """Samples by number, float32 [N, ...] on `device`."""

    def deliver(self, x: Tensor) -> Tensor:
        """`x`, gathered where the samples lie, on `device`."""

    def select(self, numbers: Tensor) -> Samples:
        """The samples of these numbers as a set of their own."""


class Batches(Iterator[tuple[Tensor, Tensor | None]]):
    """See `ImageSet.batches`. `epoch` counts the permutations begun, `position` the samples of this one used.

    All random numbers of an epoch are drawn at its start and moved to the images' device once, so a step
    needs no transfer and no synchronisation, and `state_dict` between any two batches is exact.
    """

    def __init__(
        self,
        source: Samples,
        batch_size: int,
        *,
        generator: torch.Generator | None = None,
        flip: bool = False,
        drop_last: bool = True,
        channels_last: bool = False,
        part: tuple[int, int] = (0, 1),
    ) -> None:
        if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(f"batches: batch_size must be an integer of at least 1, got {batch_size!r}")
        share, parts = part
        if not 0 <= share < parts or batch_size % parts or (parts > 1 and not drop_last):
            raise ValueError(
                f"batches: part must be (k, n) with 0 <= k < n, n a divisor of batch_size={batch_size}, and with n > 1 "
                f"drop_last must be True, got {part}"
            )
        if generator is None:
            generator = torch.Generator()
            # Drawn as DataLoader does: torch.manual_seed decides, and two iterators differ.
            generator.manual_seed(int(torch.empty((), dtype=torch.int64).random_()))
        self.source = source
        self.batch_size = batch_size
        self.flip = flip
        self.drop_last = drop_last
        self._part = slice(share * batch_size // parts, (share + 1) * batch_size // parts)
        self.channels_last = channels_last
        self.generator = generator
        self._ahead = None if source.mapped is None else ReadAhead(source.mapped, source.values)
        self.epoch = 0
        self.position = len(source)
        self._order = torch.empty(0, dtype=torch.int32)
        self._mirror = torch.empty(0, dtype=torch.bool)

    def __iter__(self) -> Batches:
        return self

    def _begin_epoch(self) -> None:
        count, where = len(self.source), self.generator.device
        order = torch.randperm(count, generator=self.generator, device=where, dtype=torch.int64)
        # Drawn also without flip: switching flips on leaves the order of the images as it was.
        mirror = torch.randint(0, 2, (count,), generator=self.generator, device=where, dtype=torch.uint8)
        self._set_epoch(order.to(torch.int32), mirror.to(torch.bool))
        self.epoch += 1
        self.position = 0

    def _set_epoch(self, order: Tensor, mirror: Tensor) -> None:
        home = self.source.values.device
        self._order, self._mirror = order.to(home), mirror.to(home)

    def _next_numbers(self) -> tuple[Tensor, Tensor]:
        """Image numbers and mirror flags of the next batch."""
        count = len(self.source)
        left = count - self.position
        if left == 0 or (self.drop_last and left < self.batch_size <= count):
            self._begin_epoch()
        orders, mirrors, missing = [], [], self.batch_size
        while missing:
            if self.position == count:
                self._begin_epoch()
            taken = slice(self.position, min(self.position + missing, count))
            orders.append(self._order[taken])
            mirrors.append(self._mirror[taken])
            self.position = taken.stop
            missing -= taken.stop - taken.start
            if not self.drop_last:
                break
        return (orders[0], mirrors[0]) if len(orders) == 1 else (torch.cat(orders), torch.cat(mirrors))

    def __next__(self) -> tuple[Tensor, Tensor | None]:
        source = self.source
        order, mirror = (numbers[self._part] for numbers in self._next_numbers())
        x = source.pick(order, mirror=mirror if self.flip else None, channels_last=self.channels_last)
        if self._ahead is not None:
            coming = self._order[self.position : self.position + self.batch_size][self._part]
            self._ahead.expect(coming)
        return x, None if source.labels is None else source.deliver(source.labels.index_select(0, order))

    def state_dict(self) -> dict[str, Any]:
        """All that the next batch depends on, as CPU tensors and numbers (loads with weights_only=True)."""
        return {
            "images": len(self.source),
            "epoch": self.epoch,
            "position": self.position,
            "order": self._order.cpu().clone(),
            "mirror": self._mirror.cpu().clone(),
            "generator": self.generator.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any], *, changed: bool = False) -> None:
        """Continue where `state` was taken: the same batches, bit for bit, on the same kind of generator.

        changed: the images are others than then, so the generator goes on and a new epoch begins. ValueError if the
        set has another number of images than then and `changed` does not say so.
        """
        if changed:
            self.generator.set_state(state["generator"].cpu())
            self.epoch, self.position = int(state["epoch"]), len(self.source)
            return
        if state["images"] != len(self.source):
            raise ValueError(
                f"batches: a resumed run must see the same images, the saved state has {state['images']:,} "
                f"and {self.source.name} has {len(self.source):,}; restore the data or start a new run"
            )
        self.generator.set_state(state["generator"].cpu())
        self._set_epoch(state["order"], state["mirror"])
        self.epoch, self.position = int(state["epoch"]), int(state["position"])


class ReadAhead:
    """Has the system read samples of a mapped file before they are asked for, while the step computes.

    A random 64 x 64 image is three pages of the file: without it a batch waits for each of them in turn.
    """

    def __init__(self, path: Path, values: Tensor) -> None:
        self._size = values[0].numel() * values.element_size()
        self._file = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._file)
        self._begin = max(0, path.stat().st_size - len(values) * self._size)  # samples are the last thing in the file

    def expect(self, numbers: Tensor) -> None:
        """Samples that are wanted soon; returns at once. Systems without such advice read when asked."""
        if hasattr(os, "posix_fadvise"):
            for number in numbers.tolist():
                at = self._begin + number * self._size
                os.posix_fadvise(self._file, at, self._size, os.POSIX_FADV_WILLNEED)


def delivered(x: Tensor, device: torch.device) -> Tensor:
    """`x` on `device`; to a GPU by way of pinned memory, without waiting."""
    if x.device == device:
        return x
    pinned = x.pin_memory() if device.type == "cuda" and x.device.type == "cpu" else x
    return pinned.to(device, non_blocking=True)


def _device(device: torch.device | str) -> torch.device:
    """The device with its number, since a tensor's device has one: "cuda" is cuda:<current>."""
    target = torch.device(device)
    if target.type == "cuda" and target.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return target
