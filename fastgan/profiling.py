"""Where a training step's time goes: torch.profiler's events beside what each op's cost() says is needed.

    found = profile(fastgan.recipes()["dcgan-28"], steps=5)
    found["images_per_second"], found["rows"][0]

Ops of ours get a range each while they are profiled, and only then (`fastgan._op.around`): in plain eager they run
in a thin autograd.Function, which the profiler does not name. Every event's own time goes to the nearest range that
encloses it, so the rows divide the time, and no event is counted twice.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from fastgan._op import around
from fastgan._writing import atomic_path
from fastgan.choice import Routine, cost_of
from fastgan.domains import domain_of
from fastgan.training.assembly import assemble, precision_of
from fastgan.training.recipes import Recipe
from fastgan.training.step import GANStep

__all__ = ["ceilings", "cost_of", "op_ranges", "profile"]

PREFIX = "fastgan::"
WARM_UP = 3  # steps before the clock: races, proofs, allocator
COPY_BYTES = {"cpu": 1 << 26, "cuda": 1 << 28}  # beyond any cache
MATMUL_SIZE = {"cpu": 1024, "cuda": 8192}


# ---- what ops are asked to do ----------------------------------------------------------------------------------------


class Counts:
    """What ops did within `op_ranges`: {op: {"calls", "bytes", "flops", "backends"}}; bytes None where unknown."""

    def __init__(self) -> None:
        self.ops: dict[str, dict[str, Any]] = {}

    def add(self, op: Routine, run: Callable[..., Any], args: tuple) -> None:
        row = self.ops.setdefault(op.name, {"calls": 0, "bytes": 0, "flops": 0, "backends": {}})
        row["calls"] += 1
        needed = cost_of(op, args)
        for key in ("bytes", "flops"):
            row[key] = None if needed is None else row[key] + needed[key]
        backend = next((name for name, b in op.backends.items() if b.run is run), "?")
        row["backends"][backend] = row["backends"].get(backend, 0) + 1


@contextlib.contextmanager
def op_ranges() -> Iterator[Counts]:
    """Within: a profiler range `fastgan::<op>` around every op of ours, and counts of what they are asked to do."""
    counts = Counts()

    def wrap(op: Routine, run: Callable[..., Any]) -> Callable[..., Any]:
        def ranged(*args: Any) -> Any:
            counts.add(op, run, args)
            with torch.profiler.record_function(PREFIX + op.name):
                return run(*args)

        return ranged

    with around(wrap):
        yield counts


# ---- what the device can do ------------------------------------------------------------------------------------------


def ceilings(device: torch.device, dtype: torch.dtype, *, copy_bytes: int = 0, matmul_size: int = 0) -> dict[str, Any]:
    """Bandwidth and FLOP rate, measured here: the best of five copies and of five square matrix products by torch.

    They are what torch reaches in these two tasks, not the hardware's limits: a kernel may exceed them.
    """
    size = copy_bytes or COPY_BYTES[device.type]
    n = matmul_size or MATMUL_SIZE[device.type]
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    a = torch.ones(n, n, dtype=dtype, device=device)
    copying = min(_seconds(lambda: target.copy_(source), device) for _ in range(5))
    multiplying = min(_seconds(lambda: a @ a, device) for _ in range(5))
    return {
        "bytes_per_second": 2 * size / copying,
        "flops_per_second": 2 * n**3 / multiplying,
        "how": f"copy of {size >> 20} MiB and {n}x{n} matmul in {str(dtype).removeprefix('torch.')}, measured here",
    }


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    _wait(device)
    begin = time.perf_counter()
    run()
    _wait(device)
    return max(time.perf_counter() - begin, 1e-9)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# ---- the profile -----------------------------------------------------------------------------------------------------


def profile(
    recipe: Recipe,
    *,
    device: torch.device | str = "cpu",
    steps: int = 5,
    images: Any = None,
    trace: str | Path | None = None,
    limits: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Train `steps` steps on the clock, then as many under the profiler.

    Args:
        recipe: what to train.
        device: where.
        steps: of each of the two runs, after three to warm up.
        images: the recipe's samples (`fastgan.data.load`), or None for random ones.
        trace: file to write a Chrome trace to.
        limits: what `ceilings` returned, measured anew where None.

    Returns:
        plain values, ready for JSON: "images_per_second" and "step_ms" (median, without profiler, as a run trains),
        "wall_ms" (of the profiled steps), "rows" (name, kind, calls, ms, and for ops of ours bytes, flops, bound_ms and
        share_of_roofline), "other_ms" (outside every row: Python, waiting), "ceilings"; on a GPU "kernels" and "gaps".
    """
    place = torch.device(device)
    recipe = recipe.replace(precision=precision_of(recipe, place).name)
    following = _inputs(recipe, place, images)
    _, _, step = assemble(recipe, place)
    timed = _timed(step, following, steps, place)
    how = step.explain().partition("\n")[0]
    if place.type == "cuda":  # replays hide ops: the profiled steps run them one by one
        _, _, step = assemble(recipe, place, capture="off")
        _timed(step, following, 1, place)
    profiler, counts, wall = _profiled(step, following, steps, place)
    if trace is not None:
        with atomic_path(trace) as part:
            profiler.export_chrome_trace(str(part))
    dtype = torch.bfloat16 if recipe.precision == "bf16" else torch.float32
    limits = limits or ceilings(place, torch.float16 if recipe.precision == "fp16" else dtype)
    events = list(profiler.events() or [])
    rows = _rows(events, counts, limits, on_gpu=place.type == "cuda")
    covered = sum(row["ms"] for row in rows)
    found = {
        "recipe": recipe.name,
        "device": str(place),
        "precision": recipe.precision,
        "batch_size": recipe.batch_size,
        "steps": steps,
        "images_per_second": recipe.batch_size * recipe.d_steps / timed,
        "step_ms": timed * 1e3,
        "how": how,
        "wall_ms": wall,
        "rows": rows,
        "other_ms": max(0.0, wall - covered),
        "ceilings": limits,
        "trace": None if trace is None else str(trace),
    }
    return found | (_on_gpu(events) if place.type == "cuda" else {})


def _profiled(step: GANStep, following: Callable[[], tuple[Any, Any, Any]], steps: int, place: torch.device) -> tuple:
    """(the profiler, what `op_ranges` counted, milliseconds in all) of `steps` steps."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if place.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with op_ranges() as counts, torch.profiler.profile(activities=activities, acc_events=True) as profiler:
        begin = time.perf_counter()
        for _ in range(steps):
            with torch.profiler.record_function("data"):
                batch = following()
            step(*batch)
        _wait(place)
        wall = (time.perf_counter() - begin) * 1e3
    return profiler, counts, wall


def _inputs(recipe: Recipe, device: torch.device, images: Any) -> Callable[[], tuple[Any, Any, Any]]:
    """A function that gives what the next step is called with."""
    if recipe.conditional:
        raise ValueError(f"profile: the recipe must be unconditional, {recipe.name} takes labels")
    domain = domain_of(recipe)
    if images is None:
        drawn = [domain.probe(device)] * recipe.d_steps
        return lambda: domain.inputs(drawn)
    batches = domain.batches(images)
    return lambda: domain.inputs([next(batches) for _ in range(recipe.d_steps)])


def _timed(step: Any, following: Callable[[], tuple[Any, Any, Any]], steps: int, device: torch.device) -> float:
    """Median seconds a step, the data included."""
    for _ in range(WARM_UP * 2 if device.type == "cuda" else WARM_UP):  # on a GPU the capture is among them
        step(*following())
    return statistics.median(_seconds(lambda: step(*following()), device) for _ in range(steps))


def _rows(events: list[Any], counts: Counts, limits: dict[str, Any], *, on_gpu: bool) -> list[dict[str, Any]]:
    """One row a name, by time; events of the device itself are left to `_on_gpu`."""
    times: dict[str, float] = {}
    calls: dict[str, int] = {}
    for event in events:
        if event.device_type != torch.autograd.DeviceType.CPU:
            continue
        name = _owner(event, counts)
        own = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        times[name] = times.get(name, 0.0) + own / 1e3
        calls[name] = calls.get(name, 0) + (event.name == name or name == "autograd")
    rows = []
    for name, ms in times.items():
        row: dict[str, Any] = {"name": name, "kind": "torch", "calls": calls[name], "ms": ms}
        op = counts.ops.get(name.removeprefix(PREFIX)) if name.startswith(PREFIX) else None
        if op is not None:
            row |= {"kind": "fastgan", "bytes": op["bytes"], "flops": op["flops"], "backends": op["backends"]}
            row["bound_ms"] = row["share_of_roofline"] = None
            if op["bytes"] is not None:
                needed = (op["bytes"] / limits["bytes_per_second"], op["flops"] / limits["flops_per_second"])
                row["bound_ms"] = max(needed) * 1e3
                row["share_of_roofline"] = row["bound_ms"] / ms if ms else None
        rows.append(row)
    return sorted((r for r in rows if r["ms"] > 0 or r["kind"] == "fastgan"), key=lambda r: -r["ms"])


def _owner(event: Any, counts: Counts) -> str:
    """The nearest enclosing range of ours, "autograd" for its nodes and their calls, else the event itself."""
    at = event
    while at is not None:
        if at.name.startswith(PREFIX):
            return str(at.name)
        at = at.cpu_parent
    # a thin autograd.Function carries its op's name, and its backward node the class's
    node = event.name in counts.ops or event.name == "ThinBackward" or event.name.startswith("autograd::")
    return "autograd" if node else str(event.name)


def _on_gpu(events: list[Any]) -> dict[str, Any]:
    """Kernels by time, and the gaps between one kernel's end and the next one's start."""
    on_device = [e for e in events if e.device_type == torch.autograd.DeviceType.CUDA and not e.is_user_annotation]
    kernels: dict[str, dict[str, Any]] = {}
    for e in on_device:
        row = kernels.setdefault(e.name, {"name": e.name, "calls": 0, "ms": 0.0})
        row["calls"] += 1
        row["ms"] += e.time_range.elapsed_us() / 1e3
    spans = sorted((e.time_range.start, e.time_range.end) for e in on_device)
    return {"kernels": sorted(kernels.values(), key=lambda r: -r["ms"]), "gaps": gaps(spans)}


def gaps(spans: list[tuple[float, float]]) -> dict[str, float]:
    """Idle time between spans in microseconds, sorted by their start: {"count", "ms", "longest_us"}."""
    idle, end = [], spans[0][1] if spans else 0.0
    for begin, finish in spans[1:]:
        if begin > end:
            idle.append(begin - end)
        end = max(end, finish)
    return {"count": len(idle), "ms": sum(idle) / 1e3, "longest_us": max(idle, default=0.0)}
