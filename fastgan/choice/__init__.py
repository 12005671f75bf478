"""Which backends exist and why not, which one runs a call, and the race that decides it.

A call is decided once per (op, shapes, strides, dtypes, arguments, thread count) and then looked up. Among the backends
that are available and do not decline the case, each is first proved against the reference on random data of that case,
then raced against it. The verdict is remembered on disk (FASTGAN_CACHE, default ~/.cache/fastgan), per machine and
version. Proofs and races have a budget (`budget`); a case that it leaves open runs on our kernel for the whole run and
is settled after it. Nothing is proved or raced during the capture of a CUDA graph.

One file a job: `routine` the types, `native`, `hardware` and `availability` what exists, `state` what was chosen so
far, `cache` and `sketch` what the disk knows, `budget`, `proof`, `race`, `choosing`, `whole` for parts of many ops and
`calls` for the seconds of a call of the user's, and `forcing` for what users ask.
"""

from fastgan.choice.availability import absent, backends, has_kernel, missing, refusal
from fastgan.choice.budget import bound, cost_of
from fastgan.choice.cache import cache_dir, fingerprint
from fastgan.choice.calls import clocked, is_repacked, reaches
from fastgan.choice.choosing import (
    SETTLED_BY,
    begin_run,
    capturing,
    choose,
    end_run,
    may_race,
    remember,
    remember_fact,
    remembered,
    remembered_fact,
    settle,
    winners,
)
from fastgan.choice.forcing import backend, emulated, forced, racing, second_order, watching
from fastgan.choice.native import native
from fastgan.choice.proof import proof_error, timing
from fastgan.choice.routine import NAMES, REGISTERED, Backend, Routine, triton
from fastgan.choice.state import FREE, STATE
from fastgan.choice.whole import Contest, fastest, finished

__all__ = [
    "FREE",
    "NAMES",
    "REGISTERED",
    "SETTLED_BY",
    "STATE",
    "Backend",
    "Contest",
    "Routine",
    "absent",
    "backend",
    "backends",
    "begin_run",
    "bound",
    "cache_dir",
    "capturing",
    "choose",
    "clocked",
    "cost_of",
    "emulated",
    "end_run",
    "fastest",
    "fingerprint",
    "finished",
    "forced",
    "has_kernel",
    "is_repacked",
    "may_race",
    "missing",
    "native",
    "proof_error",
    "racing",
    "reaches",
    "refusal",
    "remember",
    "remember_fact",
    "remembered",
    "remembered_fact",
    "second_order",
    "settle",
    "timing",
    "triton",
    "watching",
    "winners",
]
