"""A run's numbers and pictures for TensorBoard, beside log.jsonl."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from fastgan.data import make_grid

__all__ = ["Board"]


class Board:
    """Event files in `folder`. Raises ImportError where tensorboard is not installed."""

    def __init__(self, folder: Path):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ImportError(
                f"training: --tensorboard needs the package tensorboard, which does not import ({error}); "
                "pip install tensorboard"
            ) from error
        self._folder, self._make = folder, SummaryWriter
        self._writer: Any = None

    def _opened(self) -> Any:
        """The writer; made at the first number, so that nothing is written before the run begins."""
        self._writer = self._writer or self._make(str(self._folder))
        return self._writer

    def log(self, record: Mapping[str, Any]) -> None:
        """A record of log.jsonl."""
        for name, value in record.items():
            if name != "step":
                self._opened().add_scalar(name, value, record["step"])

    def draw(self, step: int, images: Tensor, columns: int | None) -> None:
        """The samples of a step, [N, C, H, W] in [-1, 1]."""
        self._opened().add_image("samples", make_grid(images, columns=columns), step)

    def close(self) -> None:
        """Write what is left."""
        if self._writer is not None:
            self._writer.close()
