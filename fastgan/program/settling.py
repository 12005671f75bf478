"""The race of a program at leisure: at the end of the run that had no time for it, or in another process."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from fastgan.choice import SETTLED_BY, Contest, finished
from fastgan.choice.cache import digest
from fastgan.program.layer import hold_constant
from fastgan.program.plan import Unfit
from fastgan.program.run import KIND, Run
from fastgan.program.written import restored


def race(case: str, found: dict[str, Any]) -> str | None:
    """The winner, "config ...", or None where it stays open: a noisy machine, too little memory, another case by now.

    case: the digest of the call that `found` was written of.
    """
    dtype, wants = getattr(torch, found["dtype"]), found["wants"]

    def made() -> tuple[Contest, Sequence[Any]]:
        layers, x = restored(found)
        run = Run(layers)
        if found.get("constant"):
            hold_constant(t for layer in layers for t in (*layer.parameters(), *layer.buffers()))
        for tensor, wanted in zip((x, *run.tensors()), wants or (), strict=False):
            if tensor is not None:
                tensor.requires_grad_(wanted)
        return run.contest(x, dtype)

    device = found["x"]["device"]
    lowered = torch.autocast(device, dtype, enabled=dtype != torch.float32)
    try:
        with (
            torch.random.fork_rng([] if device == "cpu" else [device]),
            lowered,
            torch.set_grad_enabled(wants is not None),
        ):
            return finished(made) if digest(made()[0].case) == case else None
    except (torch.OutOfMemoryError, Unfit):
        return None


SETTLED_BY[KIND] = race
