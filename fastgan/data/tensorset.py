"""Sets of training samples that are a tensor: what they have in common, and floats of any shape."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from fastgan.data.imageset import delivered

_Set = TypeVar("_Set", bound="Held")


class Held:
    """What a `fastgan.data.Samples` is where its samples are a tensor; a subclass says what `pick` makes of them.

    values: [M, ...], in main memory or on the training device.
    """

    labels: Tensor | None = None
    classes: list[str] | None = None
    mapped: Path | None = None

    def __init__(
        self,
        values: Tensor,
        *,
        name: str = "samples",
        skipped: Sequence[tuple[str, str]] = (),
        device: torch.device | str | None = None,
    ) -> None:
        self.values, self.name, self.skipped = values, name, list(skipped)
        self.device = torch.device(device) if device is not None else values.device

    def __len__(self) -> int:
        return len(self.values)

    def deliver(self, x: Tensor) -> Tensor:
        """`x`, gathered where the samples lie, on `device`."""
        return delivered(x, self.device)

    def select(self: _Set, numbers: Tensor) -> _Set:
        """The samples of these numbers, int64 [K], as a set of their own."""
        at = numbers.to(self.values.device)
        chosen = copy.copy(self)
        chosen.values, chosen.skipped = self.values[at], []
        chosen.labels = None if self.labels is None else self.labels[at]
        return chosen


class TensorSet(Held):
    """Floats ``[M, *shape]`` for training, in main memory or on the training device.

    Attributes are those of `Samples`; what they mean is up to the domain. Raises ValueError for values that are no
    floats, not finite or none at all, and for labels that are not one integer a sample.
    """

    def __init__(
        self,
        values: Tensor,
        labels: Tensor | None = None,
        classes: Sequence[str] | None = None,
        *,
        name: str = "samples",
        skipped: Sequence[tuple[str, str]] = (),
        device: torch.device | str | None = None,
    ) -> None:
        if not values.is_floating_point() or values.dim() < 2 or 0 in values.shape or not values.isfinite().all():
            raise ValueError(
                "TensorSet: values must be finite floats [M, ...] with no dimension 0, got "
                f"{values.dtype} {list(values.shape)}"
            )
        if labels is not None and (labels.shape != values.shape[:1] or labels.is_floating_point()):
            raise ValueError(
                f"TensorSet: labels must be integers [{len(values)}], one a sample, got {labels.dtype} "
                f"{list(labels.shape)}"
            )
        super().__init__(values.float(), name=name, skipped=skipped, device=device)
        self.labels = None if labels is None else labels.to(values.device, torch.int64)
        self.classes = None if labels is None or classes is None else list(classes)

    def pick(self, indices: Tensor, *, mirror: Tensor | None = None, channels_last: bool = False) -> Tensor:
        """Samples by number, float32 ``[N, *shape]`` on `device`; mirror: bool [N], which to turn around."""
        x = self.values.index_select(0, indices)
        if mirror is not None:
            x = torch.where(mirror.view(-1, *[1] * (x.dim() - 1)), x.flip(-1), x)
        return self.deliver(x)
