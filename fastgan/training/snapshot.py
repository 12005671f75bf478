"""A run's state: everything that its next step depends on, taken and put back."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastgan.choice import begin_run, winners

from . import checkpoint
from .sampling import fill

if TYPE_CHECKING:
    from .trainer import Trainer

__all__ = ["restore", "take"]

# What a checkpoint must hold.
KEYS = (
    *("step", "images", "seconds", "generator", "discriminator", "sampler", "g_optimizer", "d_optimizer"),
    *("training", "data", "rng", "noise", "winners", "config"),
)


def take(run: Trainer) -> dict[str, Any]:
    """Tensors and plain values."""
    step = run.train_step
    own = {"rng": checkpoint.rng_state(), "winners": dict(winners())}
    return {
        "step": run.step,
        "images": run.images_seen,
        "seconds": run.seconds,
        "generator": run.generator.state_dict(),
        "discriminator": run.discriminator.state_dict(),
        "sampler": step.ema.state_dict() if step.ema is not None else None,
        "g_optimizer": step.g_optimizer.state_dict(),
        "d_optimizer": step.d_optimizer.state_dict(),
        "training": step.state_dict(),
        "data": run.batches.state_dict(),
        **own,
        **({"ranks": run.world.gather(own)} if run.world.size > 1 else {}),
        "noise": run.noise,
        "evaluation": run.evaluation.state_dict(),
        "seconds_evaluating": run.evaluation.seconds,
        "guard": run.guard.state_dict(),
        "leaps": run.leaps.state_dict() if run.leaps is not None else None,
        "slowed": run.schedules.slowed,
        "rollbacks": run.rollbacks,
        "config": run.config,
    }


def restore(run: Trainer, state: dict[str, Any], path: Path, changed: bool) -> None:
    """Take over `state`, which `path` holds; `changed`: the images are others, so a new epoch begins."""
    missing = [key for key in KEYS if key not in state]
    if missing:
        raise ValueError(f"resume: {path} must hold {', '.join(KEYS)}, it lacks {', '.join(missing)}")
    steps = run.recipe.steps
    if steps < state["step"] or (steps == state["step"] and run.directory.finished):
        raise ValueError(f"resume: steps must be above the {state['step']} that {run.out} has, got {steps}")
    run.step, run.images_seen, run.clock.seconds = state["step"], state["images"], state["seconds"]
    fill(run.generator, state["generator"], f"{path}: generator")
    fill(run.discriminator, state["discriminator"], f"{path}: discriminator")
    run.train_step.g_optimizer.load_state_dict(state["g_optimizer"])
    run.train_step.d_optimizer.load_state_dict(state["d_optimizer"])
    run.train_step.load_state_dict(state["training"])
    run.batches.load_state_dict(state["data"], changed=changed)
    run.noise = state["noise"]
    if "evaluation" in state:  # checkpoints of earlier versions have none
        run.evaluation.load_state_dict(state["evaluation"])
        run.evaluation.seconds = state["seconds_evaluating"]
    if "guard" in state:
        run.guard.load_state_dict(state["guard"])
        run.schedules.slowed, run.rollbacks = state["slowed"], state["rollbacks"]
    if run.leaps is not None and state.get("leaps"):
        run.leaps.load_state_dict(state["leaps"])
    ranks = state.get("ranks", [state])
    own = ranks[run.world.rank] if len(ranks) == run.world.size else {}  # with another number of ranks each draws anew
    begin_run(own.get("winners", state["winners"]))
    if not own:
        run.world.seed(run.recipe.seed + 1 + run.step)
        now = f"{run.world.size} rank{'s' * (run.world.size > 1)}"
        run.notes.append(
            f"the run goes on with {now}, {len(ranks)} saved step {run.step}: networks, optimisers and place in the "
            "data are the same, random numbers are drawn anew"
        )
        run.progress.note(run.notes[-1])
    run.rng = own["rng"] if own else checkpoint.rng_state()
