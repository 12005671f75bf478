"""The run directory: every file of a run, who may write it, and what is left of it after a crash.

    config.json  skipped.txt  log.jsonl  samples/  checkpoints/  best/  pictures/  tensorboard/  wandb/  report.html
    ending.json
    and, while a process trains in it, lock

Whole files appear whole or not at all; the log grows by a line at a time, and a torn last line is cut when the run
goes on.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fastgan import _writing
from fastgan.data.files import plural
from fastgan.data.remarks import listed

from . import checkpoint
from .lock import RunLock
from .recipes import Recipe
from .thinning import kept

__all__ = ["RunDirectory", "read_log"]

# What a run directory holds; --overwrite deletes these names and nothing else. The configuration goes first: a
# directory without one is no run that could be resumed by mistake.
CONTENTS = (
    "config.json",
    "skipped.txt",
    "log.jsonl",
    "samples",
    "checkpoints",
    "best",
    "pictures",
    "tensorboard",
    "wandb",
    "ending.json",
    "report.html",
)
_LOCK = "lock"


def read_log(path: str | Path) -> list[dict[str, Any]]:
    """The records of a log.jsonl in the order of their steps, the last one of each step.

    Lines that are no record, such as a last one that was cut off, are left out. Empty where there is no file.
    """
    records: dict[int, dict[str, Any]] = {}
    try:
        text = Path(path).read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return []
    for line in text.split("\n"):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue
        step = record.get("step") if isinstance(record, dict) else None
        if isinstance(step, int) and not isinstance(step, bool) and 0 <= step < 1 << 53:
            records[step] = record
    return [records[step] for step in sorted(records)]


class RunDirectory:
    """The files of the run at `path`."""

    def __init__(self, path: str | Path):
        text = str(path)
        if not text or "\0" in text:
            raise ValueError(f"run: a directory must be neither empty nor hold a NUL character, got {text!r}")
        self.path = Path(path)
        self.checkpoints = self.path / "checkpoints"
        self.samples = self.path / "samples"
        self.log = self.path / "log.jsonl"
        self.pictures = self.path / "pictures"
        self.ending = self.path / "ending.json"
        self.report = self.path / "report.html"
        self.skipped = self.path / "skipped.txt"
        self._config = self.path / "config.json"
        self._lock = RunLock(self.path / _LOCK)
        self._records = 0  # in the log

    # ---- who may write --------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Within: this process alone trains here. Raises `LockedError` where another does; makes the directory."""
        with _writing.told(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock.acquire()
        try:
            yield
        finally:
            self._lock.release()

    def check_free(self) -> None:
        """Raise `LockedError` if another process trains here just now."""
        self._lock.check()

    def check_new(self, *, overwrite: bool) -> None:
        """Raise ValueError unless a new run may begin here: new, empty, or with `overwrite` any folder."""
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"training: out must be a directory, {self.path} is a file")
        if not self.path.is_dir():
            return
        self.check_free()
        if not overwrite and not all(map(self._is_scaffold, self.path.iterdir())):
            raise ValueError(
                f"training: {self.path} must be new or empty, it holds files; resume the run in it "
                f"(--resume {self.path}), replace it (--overwrite) or choose another directory"
            )

    def _is_scaffold(self, entry: Path) -> bool:
        """What a run leaves that was killed before it wrote its configuration: nothing worth keeping."""
        if entry.name in ("samples", "checkpoints", "pictures"):
            return not any(entry.iterdir())
        return entry.name == _LOCK or _writing.is_part(entry)

    # ---- its beginning --------------------------------------------------------------------------------------------

    def clear(self) -> None:
        """Delete the run in this directory, and nothing else that lies there."""
        for path in (self.path / name for name in CONTENTS):
            with _writing.told(path):
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                else:
                    path.unlink(missing_ok=True)

    def begin(self, config: Mapping[str, Any], step: int) -> None:
        """Write the configuration, and make the rest what it was at `step`: no torn files, no later records."""
        for folder in (self.path, self.samples, self.checkpoints, self.pictures):
            with _writing.told(folder):
                folder.mkdir(exist_ok=True)
                for path in filter(_writing.is_part, list(folder.iterdir())):
                    path.unlink(missing_ok=True)
        # The configuration first: without one nothing else may lie here, or the run could neither go on nor begin.
        _writing.write(self._config, json.dumps(config, indent=2) + "\n")
        for path in (self.ending, self.report):
            path.unlink(missing_ok=True)
        self._write_log([record for record in read_log(self.log) if record["step"] <= step] if step else [])

    def name_files(self, remarks: Sequence[tuple[str, str]]) -> str:
        """Write skipped.txt: all that is wrong with files of the data, a line each. Says so; "" where nothing is."""
        if not remarks:
            self.skipped.unlink(missing_ok=True)
            return ""
        _writing.write(self.skipped, listed(remarks))
        count = len({file for file, _ in remarks})
        what = "is not as it should be" if count == 1 else "are not as they should be"
        return f"{plural(count, 'file')} of the data {what}: {self.skipped} says why"

    @property
    def finished(self) -> bool:
        """Whether the run came to its end: ending.json is the last file that it writes, and the first to go."""
        return self.ending.exists()

    def read_config(self) -> dict[str, Any]:
        """config.json, its recipe checked. Raises ValueError where there is none."""
        try:
            config = json.loads(self._config.read_text(encoding="utf-8"))
            Recipe.from_dict(config["recipe"])
            missing = [key for key in ("device", "backend", "models", "started") if key not in config]
            if missing:
                raise ValueError(f"{missing[0]} must be in it")
        except OSError as error:
            raise ValueError(f"run: {self.path} must be a run directory, it holds no readable config.json") from error
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            raise ValueError(
                f"run: {self._config} must be the configuration of a run, reading it gave: {error}"
            ) from error
        return dict(config)

    def read_ending(self) -> dict[str, Any]:
        """How the run ended: "status", "notes" and "explanation"; of a run under way, that it is."""
        found: Any = None
        with contextlib.suppress(OSError, ValueError, RecursionError):
            found = json.loads(self.ending.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            found = {}
        notes = found.get("notes", [])
        return {
            "status": str(found.get("status", "not yet")),
            "notes": [str(note) for note in notes] if isinstance(notes, list) else [],
            "explanation": str(found.get("explanation", "")),
        }

    # ---- its way --------------------------------------------------------------------------------------------------

    def append(self, record: Mapping[str, Any], *, keep: int = 0, best: int = 0) -> None:
        """Add a record to the log; above `keep` of them it is thinned out evenly over the run. keep 0: no limit.

        The record of the step `best` stays, and in each part of the run the one with the most numbers.
        """
        _writing.append(self.log, json.dumps(record) + "\n")
        self._records += 1
        if keep and self._records > keep:
            records = read_log(self.log)
            steps = kept({r["step"]: len(r) for r in records}, keep, [best])
            self._write_log([r for r in records if r["step"] in steps])

    def _write_log(self, records: Sequence[Mapping[str, Any]]) -> None:
        _writing.write(self.log, "".join(json.dumps(record) + "\n" for record in records))
        self._records = len(records)

    def grid(self, step: int) -> Path:
        """Where the sample grid of `step` lies."""
        return self.samples / f"step-{step:07d}.png"

    def thin_samples(self, keep: int, step: int) -> None:
        """Above `keep` sample grids delete some, with what lies beside them, evenly over the run. keep 0: no limit.

        That of `step` stays: where a run went back it is not the last one.
        """
        files: dict[int, list[Path]] = {}
        for path in self.samples.glob("step-*.*") if keep else ():
            if (number := path.stem.removeprefix("step-")).isdecimal():
                files.setdefault(int(number), []).append(path)
        for old in files.keys() - kept(dict.fromkeys(files, 0), keep, [step]):
            for path in files[old]:
                path.unlink(missing_ok=True)

    def save(self, state: dict[str, Any], *, keep: int) -> Path:
        """Write the checkpoint of ``state["step"]``, then delete all but the `keep` newest."""
        path = checkpoint.path_of(self.checkpoints, state["step"])
        checkpoint.save(state, path)
        checkpoint.prune(self.checkpoints, keep)
        return path

    def save_best(self, state: dict[str, Any]) -> Path:
        """Write the best generator so far, in place of the one before."""
        path = self.path / "best" / "generator.pt"
        with _writing.told(path):
            path.parent.mkdir(exist_ok=True)
            for part in filter(_writing.is_part, list(path.parent.iterdir())):  # of a process that was killed
                part.unlink(missing_ok=True)
        checkpoint.save(state, path)
        return path

    def newest(self) -> checkpoint.Found | None:
        """The newest sound checkpoint; see `checkpoint.newest`."""
        return checkpoint.newest(self.checkpoints)

    def best(self) -> checkpoint.Found:
        """The best generator that the run's evaluations found. Raises ValueError where there is none."""
        path = self.path / "best" / "generator.pt"
        try:
            return checkpoint.Found(path, checkpoint.load(path), {})
        except FileNotFoundError as error:
            raise ValueError(
                f"run: {self.path} must hold best/generator.pt, it does not; train with --eval-every STEPS, "
                "or leave --best out"
            ) from error

    def last_step(self) -> int:
        """The step of the newest checkpoint by its name, 0 where there is none."""
        return max(checkpoint.list_steps(self.checkpoints), default=0)

    def set_aside(self, path: Path, why: str = "damaged") -> None:
        """Rename a damaged or collapsed checkpoint, so that it is neither counted nor tried again."""
        with contextlib.suppress(FileNotFoundError):
            path.replace(path.with_suffix(f".{why}"))
