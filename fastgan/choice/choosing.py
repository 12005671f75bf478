"""The choice of a call's backend, made once a case and then looked up."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from fastgan.choice.availability import refusal
from fastgan.choice.budget import unlimited
from fastgan.choice.cache import digest
from fastgan.choice.proof import is_due, prove
from fastgan.choice.race import Verdict, race
from fastgan.choice.routine import NAMES, REGISTERED, Routine
from fastgan.choice.sketch import drawn_from, sketch
from fastgan.choice.state import STATE, State


def choose(op: Routine, args: tuple) -> Callable[..., Any]:
    """The launcher that runs this call."""
    state = STATE
    key = (op.name, state.mode, torch.get_num_threads(), *op.case(args))
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
    winner = state.verdicts.get(case) or state.cache.winner(case)
    if case in state.open:
        told = state.open[case]["why"]
    if winner not in able:
        if capturing():
            return "reference", "a CUDA graph is being captured, and this case has not been raced before"
        try:
            verdict = race(state, op, args, able, state.account)
        except torch.OutOfMemoryError:
            return "reference", "there is too little memory to race on this case"
        if verdict.settled:
            _remember(state, case, verdict)
        else:  # to be settled at the end of the run
            _note_open(state, case, {"op": op.name, "args": sketch(args), "why": verdict.why})
        winner, told = verdict.winner, verdict.why if verdict.why != "raced" else ""
    state.verdicts[case] = winner
    return winner, told or ("raced" if winner != "reference" else "PyTorch's own op won the race")


def _note_open(state: State, case: str, found: dict[str, Any]) -> None:
    state.open[case] = {**found, "threads": torch.get_num_threads()}
    state.cache.note_open({case: state.open[case]})


def _remember(state: State, case: str, verdict: Verdict) -> None:
    numbers = {"ahead": round(verdict.ahead, 3), "spread": round(verdict.spread, 3)}
    state.cache.remember(case, {"winner": verdict.winner, **numbers})


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


# ---- runs -----------------------------------------------------------------------------------------------------------


def remembered_fact(case: tuple) -> str | None:
    """A measured fact about this machine that is no choice of a run: it goes into no checkpoint."""
    found = STATE.cache.winner(digest(case))
    return found.removeprefix("config ") if found else None


def remember_fact(case: tuple, fact: str) -> None:
    """Keep it beside the winners."""
    STATE.cache.remember(digest(case), f"config {fact}")


def winners() -> dict[str, str]:
    """The verdicts of this run: {digest of (op, case): backend, or configuration of a kernel}; put into checkpoints."""
    return STATE.verdicts


def begin_run(verdicts: dict[str, str] | None = None) -> None:
    """Start a run with the verdicts of the cache, or go on with one that had these: it takes the same kernels.

    A verdict never changes within a run, so equal seeds and equal caches give equal bits.
    """
    STATE.begin_run(verdicts or {})


def end_run() -> None:
    """From here on a race that goes on over several calls may change what runs (`Contest`)."""
    STATE.in_run = False


def settle(cases: dict[str, dict[str, Any]] | None = None, seconds: float = 30.0) -> dict[str, str]:
    """Race the open cases of this run, or the given ones, without a budget; {digest: winner} of those settled.

    What is settled counts from the next run on. No further case is begun after `seconds`; what is still open then stays
    written down for `fastgan doctor --race`.
    """
    settled: dict[str, str] = {}
    end = time.perf_counter() + seconds
    for case, found in dict(STATE.open if cases is None else cases).items():
        if found["threads"] != torch.get_num_threads() or time.perf_counter() >= end:
            continue
        if found["op"] in SETTLED_BY:
            config = SETTLED_BY[found["op"]](case, found["args"])
            if config is not None:
                STATE.cache.remember(case, config)
                settled[case] = config.removeprefix("config ")
        elif (verdict := _settled(STATE, found)) is not None:
            _remember(STATE, case, verdict)
            settled[case] = verdict.winner
    STATE.cache.note_open({}, closed=settled)
    STATE.open = {case: found for case, found in STATE.open.items() if case not in settled}
    return settled


def _settled(state: State, found: dict[str, Any]) -> Verdict | None:
    """The verdict of an open case, or None where it stays open: no memory, a noisy machine."""
    op = REGISTERED.get(found["op"])
    if op is None:
        return None
    args = op.restored(drawn_from(found["args"]))
    able = [name for name in NAMES if name in op.backends and not refusal(state, op, name, args)]
    for _ in range(3):  # a noisy moment passes
        try:
            verdict = race(state, op, args, able, unlimited())
        except torch.OutOfMemoryError:
            return None
        if verdict.settled:
            return verdict
    return None


# ---- for what is raced elsewhere ------------------------------------------------------------------------------------


def may_race(device: torch.device) -> bool:
    """Whether a kernel may try its configurations now: on a real GPU, racing on, no graph being captured."""
    return STATE.racing and device.type == "cuda" and not capturing()


def remembered(case: tuple) -> str | None:
    """What won a kernel's own race, over its configurations: "config ...", as `remember` was given it."""
    key = digest(case)
    found = STATE.verdicts.get(key) or STATE.cache.winner(key)
    if found:
        STATE.verdicts[key] = found
    return found


def remember(case: tuple, config: str) -> None:
    """Keep the winner of a kernel's own race; it starts with "config "."""
    STATE.verdicts[digest(case)] = config
    STATE.cache.remember(digest(case), config)


# What is raced elsewhere and may stay open: kind -> function(digest, sketch) -> the winner, "config ...", or None.
SETTLED_BY: dict[str, Callable[[str, dict[str, Any]], str | None]] = {}


def keep_to(case: tuple, config: str, found: dict[str, Any] | None = None) -> None:
    """Take this winner for the run and remember it no longer than that; found: what `settle` may race it by.

    found has the keys op, a kind of SETTLED_BY; args, the sketch; why, the reason.
    """
    key = digest(case)
    STATE.verdicts[key] = config
    if found is not None:
        _note_open(STATE, key, found)
