"""The choice of a call's backend, made once a case and then looked up."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fastgan.choice.availability import refusal
from fastgan.choice.cache import digest
from fastgan.choice.proof import is_due, prove
from fastgan.choice.race import race
from fastgan.choice.routine import NAMES, Routine
from fastgan.choice.state import STATE, State


def choose(op: Routine, args: tuple) -> Callable[..., Any]:
    """The launcher that runs this call."""
    state = STATE
    key = (op.name, state.forced, state.racing, torch.get_num_threads(), *op.case(args))
    run = state.chosen.get(key)
    if run is None or state.watchers:
        name, reason = _decide(state, op, args, key)
        run = op.backends[name].run
        for watch in state.watchers:
            watch(op, name, reason)
        if len(state.chosen) >= state.MAX_CHOSEN:
            state.chosen.clear()
        if not capturing():  # what was left to the reference there may be proved later
            state.chosen[key] = run
    return run


def _decide(state: State, op: Routine, args: tuple, key: tuple) -> tuple[str, str]:
    """(backend, why no faster one)."""
    reasons = {name: refusal(state, op, name, args) for name in op.backends}
    told = "; ".join(f"{name}: {reason}" for name, reason in reasons.items() if reason)
    if state.forced != "auto":
        name = "reference" if reasons.get(state.forced, "no kernel") else state.forced
        return _proved_or_reference(state, op, name, args, "" if name == state.forced else told)
    able = [name for name in NAMES if name in reasons and not reasons[name]]
    if len(able) == 1 or not state.racing:
        return _proved_or_reference(state, op, able[0], args, told)
    case = digest(key)
    winner = state.cache.winners.get(case)
    if winner not in able:
        told = ""
        if capturing():
            return "reference", "a CUDA graph is being captured, and this case has not been raced before"
        try:
            winner = race(state, op, args, able)
        except torch.OutOfMemoryError:
            return "reference", "there is too little memory to race on this case"
        state.cache.remember(case, winner)
    return winner, told or ("raced" if winner != "reference" else "PyTorch's own op won the race")


def _proved_or_reference(state: State, op: Routine, name: str, args: tuple, told: str) -> tuple[str, str]:
    """`name`, proved on this case where its device asks for it; else the reference, and why."""
    if not is_due(state, op, name, args):
        return name, told
    if capturing():
        return "reference", f"a CUDA graph is being captured, and {name} has not been proved on this case before"
    try:
        proved = prove(state, op, name, args, op.drawn(args))
    except torch.OutOfMemoryError:
        return "reference", f"there is too little memory to prove {name} on this case"
    return (name, told) if proved else ("reference", f"{name}: {state.disabled[op.name, name]}")


def capturing() -> bool:
    """Whether a CUDA graph is being captured: nothing is proved or raced meanwhile."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


# ---- for what is raced elsewhere ------------------------------------------------------------------------------------


def may_race(device: torch.device) -> bool:
    """Whether a kernel may try its configurations now: on a real GPU, racing on, no graph being captured."""
    return STATE.racing and device.type == "cuda" and not capturing()


def remembered(case: tuple) -> str | None:
    """What won a kernel's own race, over its configurations: "config ...", as `remember` was given it."""
    return STATE.cache.winners.get(digest(case))


def remember(case: tuple, config: str) -> None:
    """Keep the winner of a kernel's own race; it starts with "config "."""
    STATE.cache.remember(digest(case), config)


def winners() -> dict[str, str]:
    """Races won so far on this machine and version: {digest of (op, case): backend, or configuration of a kernel}; put
    into checkpoints."""
    return STATE.cache.winners


def load_winners(known: dict[str, str]) -> None:
    """Take over the winners of an earlier run, so that a resumed run takes the same kernels."""
    STATE.cache.winners.update(known)
    STATE.chosen.clear()
