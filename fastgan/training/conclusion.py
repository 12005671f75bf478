"""How a run ends: its last checkpoint, its last pictures, its report, and what is said of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fastgan.choice import end_run, settle
from fastgan.convert import explain

from . import checkpoint, report

if TYPE_CHECKING:
    from .trainer import Trainer

__all__ = ["Result", "conclude"]


@dataclass(frozen=True)
class Result:
    """How a run ended. `reason`: "steps", "time", "target", "patience", "plateau", "collapse" or
    "interrupted"."""

    out: Path
    step: int
    reason: str
    seconds: float
    metrics: dict[str, float]
    checkpoint: Path


def conclude(run: Trainer, reason: str) -> Result:
    """Save, draw, report, and say so."""
    path = run.save()
    run.rng = checkpoint.rng_state()
    if not run.world.first:
        return Result(run.out, run.step, reason, run.seconds, dict(run.metrics), path)
    made = run.draw()
    words = run.stop.in_words(reason, run.evaluation)
    if said := run.stop.explain(reason, run.evaluation):
        run.notes.append(said)
        run.progress.note(said)
    if run.evaluation.best is not None:
        run.notes.append(_evaluated(run))
        run.progress.note(run.notes[-1])
    try:
        if reason != "interrupted":  # a user who interrupts is in haste
            said = run.domain.compare(run.directory, run.samples, made, run.columns)
            run.notes += [said] if said else []
        page = report.write_report(run.directory, status=words, notes=run.notes, explanation=_explanation(run))
    except Exception as error:  # the run is saved; its report can be made again
        page = None
        run.progress.warn(f"the report could not be written: {error}")
    if reason != "interrupted" and (settled := settle()):  # what the first steps had no time to race
        run.progress.note(f"kernels chosen for the next run: {len(settled)} cases that the first steps left open")
    end_run()
    run.progress.stop()
    where = f"; report: {page}" if page else ""
    run.progress.note(f"{words}: step {run.step}, {run.seconds:.0f} s of training{where}")
    if reason in ("interrupted", "time"):
        run.progress.note(f"go on with: {run.world.command(run.out)}")
    return Result(run.out, run.step, reason, run.seconds, dict(run.metrics), path)


def _evaluated(run: Trainer) -> str:
    """What the evaluations found, how, and what they cost."""
    found = run.evaluation
    return (
        f"best {found.words} {found.best:.4f} at step {found.best_step}, kept in best/generator.pt: "
        f"{found.count} samples of either kind, {found.judge.identity if found.judge else ''}; "
        f"evaluation took {100 * found.seconds / max(run.seconds, found.seconds):.1f} % of the time"
    )


def _explanation(run: Trainer) -> str:
    lines = [run.train_step.explain()]
    for name, network in (("generator", run.generator), ("discriminator", run.discriminator)):
        lines += ["", name, str(explain(network))]
    return "\n".join(lines)
