"""What follows a collapse: a warning, an end, or the last good checkpoint at lower rates."""

from __future__ import annotations

from typing import TYPE_CHECKING

from . import checkpoint, snapshot
from .guard import Collapse, DivergedError

if TYPE_CHECKING:
    from .trainer import Trainer

__all__ = ["ACTIONS", "check_action", "recover"]

ACTIONS = ("warn", "rollback", "stop")
SLOWER = 0.5  # factor of both rates at each rollback
MOST = 3  # rollbacks of a run: an eighth of the rates did not help


def check_action(action: str, ranks: int) -> None:
    """Raise ValueError for an action that is none, or that several ranks cannot take: rank 0 alone sees a collapse."""
    if action not in ACTIONS:
        raise ValueError(f"training: on_collapse must be one of {', '.join(ACTIONS)}, got {action!r}")
    if ranks > 1 and action != "warn":
        raise ValueError(f"training: on_collapse must be warn on several ranks, got {action!r}")


def recover(run: Trainer, seen: Collapse | DivergedError) -> str:
    """Act on a collapse as the run was told to; the reason why it ends, or "" where it goes on."""
    if run.on_collapse == "warn":
        if isinstance(seen, DivergedError):
            raise seen
        return ""
    found = _last_good(run) if run.on_collapse == "rollback" and run.rollbacks < MOST else None
    if found is None:
        if run.on_collapse == "rollback":
            why = f"{MOST} rollbacks did not help" if run.rollbacks >= MOST else "no checkpoint is older than it"
            run.warn(f"step {run.step}: the run cannot go back: {why}")
        if isinstance(seen, DivergedError):
            raise seen
        return "collapse"
    _go_back(run, found)
    return ""


def _last_good(run: Trainer) -> checkpoint.Found | None:
    """The newest sound checkpoint from before the last look at which nothing was wrong."""
    folder = run.directory.checkpoints
    for step in reversed(checkpoint.list_steps(folder)):
        if 0 < step <= run.guard.healthy:
            path = checkpoint.path_of(folder, step)
            try:
                return checkpoint.Found(path, checkpoint.load(path), {})
            except checkpoint.DamagedError:
                continue
    return None


def _go_back(run: Trainer, found: checkpoint.Found) -> None:
    """Take over `found` at lower rates, and put newer checkpoints aside: a resumed run begins from here too."""
    reached, slowed, rollbacks = run.step, run.schedules.slowed * SLOWER, run.rollbacks + 1
    best, best_step = run.evaluation.best, run.evaluation.best_step
    seconds = run.clock.seconds, run.evaluation.seconds
    snapshot.restore(run, found.state, found.path, changed=False)
    checkpoint.set_rng_state(run.rng)
    run.clock.seconds, run.evaluation.seconds = seconds
    run.schedules.slowed, run.rollbacks = slowed, rollbacks
    if best is not None and (run.evaluation.best is None or best < run.evaluation.best):
        run.evaluation.best, run.evaluation.best_step = best, best_step  # best/ holds it
    for step in checkpoint.list_steps(run.directory.checkpoints):
        if step > run.step:
            run.directory.set_aside(checkpoint.path_of(run.directory.checkpoints, step), "collapsed")
    run.directory.begin(run.config, run.step)
    run.save()
    run.clock.rewind(run.step)
    run.warn(
        f"step {reached}: gone back to step {run.step} with {slowed:g} of the rates (rollback {rollbacks} of {MOST})"
    )
