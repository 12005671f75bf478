"""Which backends exist and why not, which one runs a call, and the race that decides it.

A call is decided once per (op, shapes, strides, dtypes, arguments, thread count) and then looked up. Among the backends
that are available and do not decline the case, each is first proved against the reference on random data of that case,
then raced against it; the winner is remembered on disk (FASTGAN_CACHE, default ~/.cache/fastgan), per machine and
version. On a GPU nothing runs unproved, not even where a backend is forced or racing is off. A kernel that fails is
switched off with one warning, and the reference takes over. Nothing is proved or raced during the capture of a CUDA
graph.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib
import importlib.metadata
import json
import os
import platform
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

if TYPE_CHECKING:
    from fastgan._op import Op, Routine

NAMES = ("cuda", "triton", "native", "reference")
DEVICES = {"cuda": ("cuda",), "triton": ("cuda",), "native": ("cpu",), "reference": ()}  # (): every device
# A proof compares norms, so that one sign flip of an activation at |t| ~ 1e-7 (1e-3 of the norm of a 1e6-element
# tensor at most) passes and a wrong tap, mask or statistic does not.
# GPU kernels have never run on the user's card before: there every case is proved at its first use. On a CPU the race
# proves, and the tests have run the same instruction tables.
PROVED_ON = {"cuda"}  # device types
PROOF_TOLERANCE = {torch.float32: 2e-3, torch.bfloat16: 2e-2, torch.float16: 5e-3}


@dataclass(frozen=True)
class Backend:
    """A launcher with the op's arguments, and `declines(*args)`: the reason why it leaves a case to others, or ""."""

    run: Callable[..., Any]
    declines: Callable[..., str] = lambda *args: ""


def triton(stem: str, name: str = "") -> Backend:
    """LAUNCHERS[name] of kernels/<stem>.py, imported when it is first asked: `import triton` takes half a second."""

    def found() -> Backend:
        launcher: Backend = importlib.import_module(f"fastgan.kernels.{stem}").LAUNCHERS[name or stem]
        return launcher

    return Backend(lambda *args: found().run(*args), lambda *args: found().declines(*args))


# ---- what exists ----------------------------------------------------------------------------------------------------


@functools.cache
def native() -> tuple[ModuleType | None, str]:
    """The compiled module fastgan._C, or None with the reason."""
    try:
        import fastgan._C as _C
    except ImportError as error:
        note = Path(__file__).with_name("_C_build_failure.txt")  # setup.py leaves the compiler's last words there
        why = note.read_text().strip() if note.exists() else str(error)
        return None, f"fastgan._C is not built or does not load here ({why}); reinstall with a C++20 compiler on PATH"
    return _C, ""


def missing(name: str) -> str:
    """Why a backend cannot run on this machine at all, or ""; an emulated one can."""
    return "" if name in _emulated else _missing(name)


@functools.cache
def _missing(name: str) -> str:
    if name == "native":
        return native()[1]
    if name == "cuda" and (reason := _cuda_missing()):
        return reason
    if name == "triton":
        try:
            import triton
        except ImportError as error:
            return f"triton does not import ({error})"
        if tuple(int(p) for p in triton.__version__.split(".")[:2]) < (3, 8):
            return f"triton {triton.__version__} is too old: 3.8 or newer is needed"
    if name in ("cuda", "triton") and not torch.cuda.is_available():
        return "no CUDA device is visible to torch"
    return ""


def _cuda_missing() -> str:
    """What the CUDA C++ kernels lack here, but for a device."""
    module, reason = native()
    if module is None:
        return reason
    build = module.build_info()
    if not build["cuda"]:
        return f"fastgan._C was built without CUDA: {build['nvcc_absent']}"
    if build["cuda"]["compiler"] == "nvrtc":  # at first use
        if not torch.cuda.is_available():
            return "no CUDA device is visible to torch"
        reason = importlib.import_module("fastgan._nvrtc").prepare(module.cuda)
        return f"fastgan._C was built without nvcc, and {reason}" if reason else ""
    facts = module.cuda_devices()
    runtime, driver = (facts[name] // 1000 for name in ("runtime", "driver"))
    if 0 < driver < runtime:
        return (
            f"fastgan._C was built with CUDA {runtime}, and the driver knows CUDA {driver} at most; "
            f"update the driver or reinstall fastgan with the toolkit of CUDA {driver}"
        )
    return ""


def backends() -> dict[str, dict[str, tuple[bool, str]]]:
    """{op: {backend: (available, reason why not)}} for this machine."""
    from fastgan._op import OPS

    def state(op: Routine, name: str) -> tuple[bool, str]:
        if name not in op.backends:
            return False, f"{op.name} has no {name} kernel"
        reason = missing(name) or _disabled.get((op.name, name), "")
        return not reason, reason

    return {op.name: {name: state(op, name) for name in NAMES} for op in OPS.values()}


# ---- forcing one ----------------------------------------------------------------------------------------------------


class backend:
    """Run every op with one backend: `with fastgan.backend("reference"): ...`, or as a plain call for good.

    name: "auto", "reference", "native", "triton" or "cuda". Process-wide, since autograd runs CUDA backwards in other
    threads. A case that the named backend declines runs on the reference.
    Raises ValueError for an unknown name and RuntimeError, with the reason, for a backend that this machine lacks.
    """

    def __init__(self, name: str):
        global _forced
        if name not in ("auto", *NAMES):
            raise ValueError(f"backend: name must be one of auto, {', '.join(reversed(NAMES))}, got {name!r}")
        if name != "auto" and missing(name):
            raise RuntimeError(f"backend: {name} must be available, got none: {missing(name)}")
        self._before, _forced = _forced, name

    def __enter__(self) -> backend:
        return self

    def __exit__(self, *error: object) -> None:
        global _forced
        _forced = self._before


@contextlib.contextmanager
def emulated(name: str) -> Iterator[None]:
    """Within: the GPU backend `name` runs on CPU tensors, and is the one forced (`fastgan.testing.emulate`)."""
    before = set(_emulated)
    _emulated.add(name)
    _chosen.clear()
    try:
        with backend(name):
            yield
    finally:
        _emulated.intersection_update(before)
        _chosen.clear()


class racing:
    """Switch racing off (or on): `with fastgan.racing(False): ...`, or as a plain call for good.

    Without racing the first backend that can run a case runs it, so a run is reproducible bit for bit without the
    winners of an earlier one.
    """

    def __init__(self, enabled: bool):
        global _racing
        self._before, _racing = _racing, enabled

    def __enter__(self) -> racing:
        return self

    def __exit__(self, *error: object) -> None:
        global _racing
        _racing = self._before


def forced() -> tuple[str, bool]:
    """(the backend forced, or "auto"; whether backends race): what a captured step must not outlive."""
    return _forced, _racing


@torch.compiler.assume_constant_result
def has_kernel(op: str, device: str) -> bool:
    """Whether a kernel of this op may run on this type of device: else a fused op is better run as its parts.

    Not whether it takes a certain case: then the reference does.
    """
    if device == "cpu" and not _emulated:  # no fused op has a kernel there
        return False
    from fastgan._op import OPS

    def may_run(name: str) -> bool:
        runs_on = ("cpu",) if name in _emulated else DEVICES[name]
        return device in runs_on and not missing(name) and (op, name) not in _disabled

    return any(_forced in ("auto", name) and may_run(name) for name in OPS[op].backends)


# ---- choosing -------------------------------------------------------------------------------------------------------

_forced = "auto"
_racing = True
_chosen: dict[tuple, Callable[..., Any]] = {}  # decisions of this process; bounded by MAX_CHOSEN
_winners: dict[str, str] | None = None  # races won on this machine: loaded from disk at the first race
_disabled: dict[tuple[str, str], str] = {}  # (op, backend) that failed its proof -> the reason
_proved: set[tuple] = set()  # (op, backend, case) that passed it
_emulated: set[str] = set()  # GPU backends that run on CPU tensors just now
_watchers: list[Callable[[Routine, str, str], None]] = []
MAX_CHOSEN = 4096


def choose(op: Routine, args: tuple) -> Callable[..., Any]:
    """The launcher that runs this call."""
    key = (op.name, _forced, _racing, torch.get_num_threads(), *op.case(args))
    run = _chosen.get(key)
    if run is None or _watchers:
        name, reason = _decide(op, args, key)
        run = op.backends[name].run
        for watch in _watchers:
            watch(op, name, reason)
        if len(_chosen) >= MAX_CHOSEN:
            _chosen.clear()
        if not _capturing():  # what was left to the reference there may be proved later
            _chosen[key] = run
    return run


def _decide(op: Routine, args: tuple, key: tuple) -> tuple[str, str]:
    """(backend, why no faster one)."""
    reasons = {name: refusal(op, name, args) for name in op.backends}
    if _forced != "auto":
        name = "reference" if reasons.get(_forced, "no kernel") else _forced
        return _proved_or_reference(op, name, args, "" if name == _forced else _told(reasons))
    able = [name for name in NAMES if name in reasons and not reasons[name]]
    if len(able) == 1 or not _racing:
        return _proved_or_reference(op, able[0], args, _told(reasons))
    digest = _digest(key)
    winner, told = winners().get(digest), _told(reasons)
    if winner not in able:
        if _capturing():
            return "reference", "a CUDA graph is being captured, and this case has not been raced before"
        try:
            winner, told = _race(op, args, able)
        except torch.OutOfMemoryError:
            return "reference", "there is too little memory to race on this case"
        _remember(digest, winner)
    return winner, told or ("raced" if winner != "reference" else "PyTorch's own op won the race")


def _told(reasons: dict[str, str]) -> str:
    return "; ".join(f"{name}: {reason}" for name, reason in reasons.items() if reason)


def _capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def may_race(device: torch.device) -> bool:
    """Whether a kernel may try its configurations now: on a real GPU, racing on, no graph being captured."""
    return _racing and device.type == "cuda" and not _capturing()


def _proved_or_reference(op: Routine, name: str, args: tuple, told: str) -> tuple[str, str]:
    """`name`, proved on this case where its device asks for it; else the reference, and why."""
    if name == "reference" or op.first(args).device.type not in PROVED_ON or _case(op, name, args) in _proved:
        return name, told
    if _capturing():
        return "reference", f"a CUDA graph is being captured, and {name} has not been proved on this case before"
    try:
        proved = _prove(op, name, args, op.drawn(args))
    except torch.OutOfMemoryError:
        return "reference", f"there is too little memory to prove {name} on this case"
    return (name, told) if proved else ("reference", f"{name}: {_disabled[op.name, name]}")


def _case(op: Routine, name: str, args: tuple) -> tuple:
    return (op.name, name, *op.case(args))


def refusal(op: Routine, name: str, args: tuple) -> str:
    """Why `name` cannot run this call, or ""."""
    device = op.first(args).device.type
    if DEVICES[name] and device not in (("cpu",) if name in _emulated else DEVICES[name]):
        return f"{name} does not run on {device}"
    return missing(name) or _disabled.get((op.name, name), "") or op.backends[name].declines(*args)


# ---- proof and race -------------------------------------------------------------------------------------------------


def _race(op: Routine, args: tuple, able: list[str]) -> tuple[str, str]:
    """Prove each backend against the reference on random data of this case, then time the survivors in turns."""
    case, args = args, op.drawn(args)
    able = [name for name in able if name == "reference" or _prove(op, name, case, args)]
    best = dict.fromkeys(able, float("inf"))
    begin = time.perf_counter()
    for _ in range(5):  # interleaved, so that a noisy moment hits every runner
        for name in able:
            best[name] = min(best[name], _seconds(op, name, args))
        if time.perf_counter() - begin > 0.5:
            break
    return min(able, key=best.__getitem__), ""


def _seconds(op: Routine, name: str, args: tuple) -> float:
    cuda = op.first(args).device.type == "cuda"
    if cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    op.backends[name].run(*args)
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _prove(op: Routine, name: str, case: tuple, args: tuple) -> bool:
    """Whether `name` agrees with the reference on `args`, random numbers for `case`; where not, it is switched off."""
    error = proof_error(op, name, args)
    if not error:
        _proved.add(_case(op, name, case))
        return True
    _disabled[op.name, name] = error
    _chosen.clear()
    warnings.warn(f"fastgan: {op.name} on {name} is switched off: {error}", RuntimeWarning, stacklevel=6)
    return False


class _Poisoned(TorchDispatchMode):
    """Within: fresh tensors hold NaN, so that an element which a kernel forgets to write shows."""

    paused = False  # while a kernel races its configurations: one with more scratch memory must not pay for the filling
    fresh = ("aten::empty", "aten::empty_like", "aten::empty_strided", "aten::new_empty", "aten::new_empty_strided")

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func._schema.name in self.fresh and out.is_floating_point() and not _Poisoned.paused:
            out.fill_(float("nan"))
        return out


def proof_error(op: Routine, name: str, args: tuple) -> str:
    """Compare a backend with the reference on `args`; the sentence that says how it failed, or ""."""
    try:
        want = op.reference(*op.copies(args))
        with _Poisoned():
            got = op.backends[name].run(*op.copies(args))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        return f"it raised {type(error).__name__}: {error}"
    pairs = zip(got, want, strict=True) if isinstance(want, tuple) else [(got, want)]
    for index, (g, w) in enumerate(pairs):
        if g.shape != w.shape or g.dtype != w.dtype:
            return f"output {index} must be {tuple(w.shape)} {w.dtype}, got {tuple(g.shape)} {g.dtype}"
        distance = (g.double() - w.double()).norm().item()
        limit = PROOF_TOLERANCE.get(op.first(args).dtype, 1e-9) * w.double().norm().item()
        if not distance <= limit:
            return f"output {index} must be within {limit:.3g} of the reference, got an error of {distance:.3g}"
    return ""


def prove_all() -> list[dict[str, str]]:
    """Every available backend of every op against its reference: rows of op, backend, dtype, layout, error."""
    from fastgan._op import OPS

    rows = []
    if not _missing("triton"):
        importlib.import_module("fastgan.kernels.configs").race_ahead(torch.device("cuda"))
    for op in OPS.values():
        for name in op.backends:
            if name == "reference" or missing(name):
                continue
            for dtype in (torch.float32, torch.bfloat16):
                for layout in (torch.contiguous_format, torch.channels_last):
                    args = tuple(_example(a, op, name, dtype, layout) for a in op.example())
                    error = refusal(op, name, args) or proof_error(op, name, op.drawn(args))
                    kinds = {"dtype": str(dtype).partition(".")[2], "layout": str(layout).partition(".")[2]}
                    rows.append({"op": op.name, "backend": name, **kinds, "error": error})
    return rows


def _example(a: Any, op: Op, name: str, dtype: torch.dtype, layout: torch.memory_format) -> Any:
    """An example's tensor as a case; ops of mixed types ("first") keep their per-channel vectors in float32."""
    if not isinstance(a, Tensor):
        return a
    a = a.to("cpu" if name == "native" else "cuda")
    a = a.contiguous(memory_format=layout) if a.dim() == 4 else a
    return a if op.autocast == "first" and a.dim() < 4 else a.to(dtype)


@functools.cache
def fingerprint() -> str:
    """What a race depends on: machine, instruction table, versions."""
    from fastgan import __version__

    module, _ = native()
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    compiler = ""  # Triton's version, by its metadata: importing it takes half a second
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        compiler = importlib.metadata.version("triton")
    table = module.table() if module else ""
    return "|".join([_cpu_name(), gpu, table, torch.__version__, compiler, __version__, sys.platform])


def _cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip() + f" x{os.cpu_count()}"
    return f"{platform.processor() or platform.machine()} x{os.cpu_count()}"


def _digest(key: tuple) -> str:
    return hashlib.sha256(f"{fingerprint()}|{key}".encode()).hexdigest()[:24]


def cache_dir() -> Path:
    """Where proofs and races are kept: FASTGAN_CACHE or ~/.cache/fastgan."""
    return Path(os.environ.get("FASTGAN_CACHE") or Path.home() / ".cache" / "fastgan")


def winners() -> dict[str, str]:
    """Races won so far on this machine and version: {digest of (op, case): backend, or configuration of a kernel}; put
    into checkpoints."""
    global _winners
    if _winners is None:
        _winners = _read_winners()
    return _winners


def load_winners(known: dict[str, str]) -> None:
    """Take over the winners of an earlier run, so that a resumed run takes the same kernels."""
    winners().update(known)
    _chosen.clear()


@contextlib.contextmanager
def timing() -> Iterator[None]:
    """Within: fresh tensors are as they come, also during a proof, so that what is timed is what users run."""
    before, _Poisoned.paused = _Poisoned.paused, True
    try:
        yield
    finally:
        _Poisoned.paused = before


def remembered(case: tuple) -> str | None:
    """What won a kernel's own race, over its configurations: "config ...", as `remember` was given it."""
    return winners().get(_digest(case))


def remember(case: tuple, config: str) -> None:
    """Keep the winner of a kernel's own race; it starts with "config "."""
    _remember(_digest(case), config)


def _read_winners() -> dict[str, str]:
    """The cache file; one that is missing, unreadable or damaged counts as empty (the races are run again)."""
    try:
        read = json.loads((cache_dir() / "winners.json").read_text())
        return {str(k): v for k, v in read.items() if v in NAMES or str(v).startswith("config ")}
    except (OSError, ValueError, AttributeError):
        return {}


def _remember(digest: str, winner: str) -> None:
    """Add a winner to the cache file: merged with what other processes wrote, replaced in one step."""
    winners()[digest] = winner
    folder = cache_dir()
    with contextlib.suppress(OSError):  # a read-only home costs a race per process, nothing else
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=folder, suffix=".tmp", delete=False) as file:
            json.dump({**_read_winners(), **winners()}, file)
        os.replace(file.name, folder / "winners.json")


@contextlib.contextmanager
def watching(watch: Callable[[Routine, str, str], None]) -> Iterator[None]:
    """Call watch(op, backend, reason) at every op that runs; how `explain` sees what ran."""
    _watchers.append(watch)
    try:
        yield
    finally:
        _watchers.remove(watch)
