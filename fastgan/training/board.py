"""A run's numbers and pictures for TensorBoard and for Weights & Biases, beside log.jsonl."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from fastgan.data import make_grid

from .rundir import RunDirectory

__all__ = ["Board", "TensorBoard", "WandB", "boards"]


class Board(Protocol):
    """What shows a run elsewhere."""

    def log(self, record: Mapping[str, Any]) -> None:
        """A record of log.jsonl."""

    def draw(self, step: int, images: Tensor, columns: int | None) -> None:
        """The samples of a step, [N, C, H, W] in [-1, 1]."""

    def close(self) -> None:
        """Write what is left."""


def boards(out: Path, *, tensorboard: bool, wandb: str | None) -> list[Board]:
    """Those asked for; wandb: the name of a project. ImportError where a package is absent."""
    found: list[Board] = []
    if tensorboard:
        found.append(TensorBoard(out / "tensorboard"))
    if wandb is not None:
        found.append(WandB(out, wandb))
    return found


class TensorBoard:
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


class WandB:
    """A run of a Weights & Biases project, named as the run directory `out`; a resumed run goes on in the same one.

    The package's own variables decide the rest, such as WANDB_MODE=offline. Raises ValueError for a project without a
    name and ImportError where wandb is not installed.
    """

    def __init__(self, out: Path, project: str):
        if not project.strip():
            raise ValueError(f"training: --wandb must name a project, got {project!r}")
        try:
            wandb: Any = importlib.import_module("wandb")
        except ImportError as error:
            raise ImportError(
                f"training: --wandb needs the package wandb, which does not import ({error}); pip install wandb"
            ) from error
        self._out, self._project, self._wandb = out, project, wandb
        self._run: Any = None

    def _opened(self) -> Any:
        """The run; begun at the first number, when the run directory has its configuration."""
        if self._run is None:
            config = RunDirectory(self._out).read_config()
            names = dict(project=self._project, name=self._out.resolve().name, id=config["run"], resume="allow")
            self._run = self._wandb.init(dir=str(self._out), config=config["recipe"], **names)
        return self._run

    def log(self, record: Mapping[str, Any]) -> None:
        """A record of log.jsonl."""
        numbers = {name: value for name, value in record.items() if name != "step"}
        self._opened().log(numbers, step=record["step"])

    def draw(self, step: int, images: Tensor, columns: int | None) -> None:
        """The samples of a step, [N, C, H, W] in [-1, 1]."""
        sheet = make_grid(images, columns=columns).expand(3, -1, -1)  # a grey one as colours
        self._opened().log({"samples": self._wandb.Image(sheet.permute(1, 2, 0).numpy())}, step=step)

    def close(self) -> None:
        """Write what is left."""
        if self._run is not None:
            self._run.finish()
