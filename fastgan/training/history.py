"""Earlier fakes for the discriminator's update, so that it does not forget what it has seen."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["History"]


class History:
    """A buffer of `size` fakes: each new one is judged itself or, half of the time, changes places with an earlier one.

    Until the buffer is full each fake enters it and is judged itself. Only tensor ops, so that a captured step has it
    too; drawn from torch's global generator of the fakes' device.

    Sources: Shrivastava et al. 2017 (arXiv:1612.07828), section 2.3; Zhu et al. 2017 (arXiv:1703.10593), section 4,
    where it is of 50.
    """

    def __init__(self, size: int = 50):
        if size < 1:
            raise ValueError(f"History: size must be at least 1, got {size}")
        self.size = size
        self._kept: Tensor | None = None
        self._count: Tensor | None = None

    def __call__(self, fake: Tensor) -> Tensor:
        """[N, ...] fakes without gradients to as many that are judged."""
        if self._kept is None or self._count is None:
            self._kept = fake.new_zeros(self.size, *fake.shape[1:])
            self._count = torch.zeros((), dtype=torch.long, device=fake.device)
        judged = []
        for one in fake.unbind():
            full = self._count >= self.size
            at = torch.where(full, torch.randint(self.size, (), device=fake.device), self._count).view(1)
            swap = full & (torch.rand((), device=fake.device) < 0.5)
            old = self._kept.index_select(0, at)[0]
            judged.append(torch.where(swap, old, one))
            self._kept.index_copy_(0, at, torch.where(swap | ~full, one, old)[None])
            self._count += ~full
        made = torch.stack(judged)
        channels_last = fake.dim() == 4 and fake.is_contiguous(memory_format=torch.channels_last)
        return made.contiguous(memory_format=torch.channels_last) if channels_last else made

    def state_dict(self) -> dict[str, Any]:
        """Tensors on the CPU, or None before the first fake."""
        kept, count = self._kept, self._count
        return {"kept": None if kept is None else kept.cpu(), "count": None if count is None else count.cpu()}

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        """The inverse of `state_dict`, onto `device`."""
        kept, count = state["kept"], state["count"]
        self._kept = None if kept is None else kept.to(device, copy=True)
        self._count = None if count is None else count.to(device, copy=True)
