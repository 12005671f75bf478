"""Which backends exist and why not, which one runs a call, and the race that decides it.

A call is decided once per (op, shapes, strides, dtypes, arguments, thread count) and then looked up. Among the backends
that are available and do not decline the case, each is first proved against the reference on random data of that case,
then raced against it; the winner is remembered on disk (FASTGAN_CACHE, default ~/.cache/fastgan), per machine and
version. Nothing is proved or raced during the capture of a CUDA graph.

One file a job: `routine` the types, `native` and `availability` what exists, `state` what was chosen so far, `cache`
what the disk knows, `proof`, `race`, `choosing`, and `forcing` for what users ask.
"""

from fastgan.choice.availability import absent, backends, has_kernel, missing, refusal
from fastgan.choice.cache import cache_dir, fingerprint
from fastgan.choice.choosing import choose, load_winners, may_race, remember, remembered, winners
from fastgan.choice.forcing import backend, emulated, forced, racing, watching
from fastgan.choice.native import native
from fastgan.choice.proof import proof_error, timing
from fastgan.choice.routine import NAMES, REGISTERED, Backend, Routine, triton
from fastgan.choice.state import STATE

__all__ = [
    "NAMES",
    "REGISTERED",
    "STATE",
    "Backend",
    "Routine",
    "absent",
    "backend",
    "backends",
    "cache_dir",
    "choose",
    "emulated",
    "fingerprint",
    "forced",
    "has_kernel",
    "load_winners",
    "may_race",
    "missing",
    "native",
    "proof_error",
    "racing",
    "refusal",
    "remember",
    "remembered",
    "timing",
    "triton",
    "watching",
    "winners",
]
