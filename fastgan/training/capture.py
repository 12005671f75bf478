"""A training step as CUDA graphs: recorded once, then replayed with one launch instead of hundreds.

Which graph a step takes is decided by its key: which of its updates carry a penalty or G's extra loss (so a lazy one is
two graphs, with and without) and the shapes, types and strides of what it is given. A key's first three steps are real
steps, run eagerly in a side stream: they compile, prove, race and allocate, and the last two are compared op by op
(`fastgan.training.recording`). Only then the step is captured. A replay cannot follow every change: when a mode, a
setting, a hyperparameter or the place of a parameter changes, all graphs are thrown away and the warm-up begins anew.
Learning rates live in device scalars and may change at every step.

Whatever cannot be captured runs eagerly, with one line that says why. A capture executes nothing, so a failed one
leaves the parameters as they were, and the step is then run eagerly.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from fastgan._hooks import has_hooks, has_hooks_on_values
from fastgan.choice import forced
from fastgan.program import switched_off
from fastgan.training.recording import Recording, difference

__all__ = ["CUDAGraphs", "Capturable", "Capture", "Graphs"]

WARM_UP = 3  # eager steps of a key before its capture: one that may compile and race, two that are compared
# Captures of one step object, and keys at a time. Graphs share one memory pool, but each keeps its gradients; lazy
# penalties with d_steps > 1 have up to penalty_every keys, 16 by custom.
MAX_CAPTURES = 32

Metrics = dict[str, Tensor]


class Graphs(Protocol):
    """What a device offers: a side stream to warm up in, and graphs. Tests put one in the place of CUDA's."""

    def busy(self) -> bool:
        """Whether somebody else is capturing."""
        ...

    def warm_up(self, run: Callable[[], Metrics]) -> Metrics:
        """Run where a capture will later run."""
        ...

    def capture(self, run: Callable[[], Any], rng: torch.Generator | None) -> tuple[Callable[[], object], Any]:
        """(replay, what run returned: tensors that every replay writes); run is recorded and not executed."""
        ...


class CUDAGraphs:
    """`Graphs` by torch.cuda.CUDAGraph, one memory pool for all of them."""

    def __init__(self, device: torch.device):
        self.device = device
        self.index = torch.cuda.current_device() if device.index is None else device.index
        self.stream = torch.cuda.Stream(device)
        self.pool = torch.cuda.graph_pool_handle()

    def busy(self) -> bool:
        return torch.cuda.is_current_stream_capturing()

    def warm_up(self, run: Callable[[], Metrics]) -> Metrics:
        current = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            metrics = run()
        current.wait_stream(self.stream)
        return metrics

    def capture(self, run: Callable[[], Any], rng: torch.Generator | None) -> tuple[Callable[[], object], Any]:
        graph = torch.cuda.CUDAGraph()
        generators = [torch.cuda.default_generators[self.index]]
        if rng is not None:  # torch registers the default generator itself
            graph.register_generator_state(rng)
            generators.append(rng)
        before = [g.clone_state() for g in generators]
        try:
            # the outer context gives the stream back when an invalidated capture raises on its way out
            with (
                torch.cuda.device(self.device),
                torch.cuda.stream(torch.cuda.current_stream(self.device)),
                # thread_local: a DataLoader's thread that pins memory just now must not spoil the capture
                torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"),
            ):
                outputs = run()
        except Exception:
            for generator, state in zip(generators, before, strict=True):
                generator.graphsafe_set_state(state)  # a broken-off capture leaves it expecting to be captured
            raise
        return graph.replay, outputs


def capturable_device(device: torch.device) -> str:
    """Why steps on a device are not captured, or ""."""
    return "" if device.type == "cuda" else f"CUDA graphs need a GPU, the networks are on {device}"


def graphs_of(device: torch.device) -> Graphs:
    return CUDAGraphs(device)


@dataclass
class _Entry:
    """One key: its static inputs, what its warm-up saw and, later, its graph."""

    inputs: tuple[Any, Any, Any]
    steps: int = 0
    recordings: list[Recording] = field(default_factory=list)
    replay: Callable[[], object] | None = None
    names: tuple[str, ...] = ()
    values: Any = None  # of the metrics: [len(names)], or a list where their dtypes differ
    gradients: list[tuple[Tensor, Tensor | None]] = field(default_factory=list)


class Capturable(Protocol):
    """A step that `Capture` may run as a graph."""

    @property
    def device(self) -> torch.device: ...

    @property
    def rng(self) -> torch.Generator | None:
        """What the step draws from, or None for torch's own generator."""

    def run(self, due: tuple[bool, ...], real: Any, labels: Any, z: Any) -> Metrics:
        """The whole step on tensors; due: which of its D updates carry the penalty, and whether G's has its extra."""

    def modules(self) -> Sequence[nn.Module]:
        """Everything with parameters, buffers and modes that the step reads or writes."""

    def optimizers(self) -> Sequence[torch.optim.Optimizer]:
        """The optimisers that it steps."""

    def settings(self) -> tuple:
        """Every number of the step that a user may change between two calls."""

    def uncapturable(self) -> str:
        """Why the step as it is now cannot be captured, or ""."""

    def recover(self) -> None:
        """Put Python-side state right after a capture that broke off."""


class Capture:
    """Runs a step as a graph where that gives the step's numbers, and as it is everywhere else.

    step: what is run. graphs: of its device. insist: raise where the step would run eagerly.
    """

    def __init__(self, step: Capturable, graphs: Graphs, *, insist: bool = False):
        self.step, self.graphs, self.insist = step, graphs, insist
        self.rates = _Rates(step)
        self.captures = self.replays = 0
        self.declined = ""  # why every later step runs eagerly
        self._entries: dict[tuple, _Entry] = {}
        self._valid: tuple | None = None  # the state that the entries were made in
        self._reason = ""  # why the valid state cannot be captured
        self._said: set[str] = set()

    def __call__(self, due: tuple[bool, ...], real: Any, labels: Any, z: Any) -> Metrics:
        inputs = (real, labels, z)
        if self.graphs.busy() or torch._C._len_torch_dispatch_stack() > 0:
            return self.step.run(due, *inputs)  # a capture or a dispatch mode around the step must see its ops
        reason = self.declined or self._refresh() or _unfit(inputs, self.step.device)
        if reason:
            return self._eagerly(reason, due, inputs)
        key = (due, *map(_signature, inputs))
        entry = self._entries.get(key)
        if entry is None and len(self._entries) >= MAX_CAPTURES:
            self._give_up(f"more than {MAX_CAPTURES} kinds of steps (shapes, types, penalties due) take turns")
            return self._eagerly(self.declined, due, inputs)
        if entry is None:
            entry = self._entries[key] = _Entry((_buffers(real), _buffers(labels), _buffers(z)))
        for buffer, given in zip(entry.inputs, inputs, strict=True):
            _load(buffer, given)
        if entry.steps < WARM_UP:
            return self._warm_up(entry, due)
        if entry.replay is None:
            reason = self._capture(entry, due)
            if reason:
                self._give_up(reason)
                return self._eagerly(reason, due, inputs)
        return self._replay(entry)

    def explain(self) -> str:
        """How steps run now, in a few words."""
        if self.declined:
            return f"eager ({self.declined})"
        reason = self.step.uncapturable()
        if reason:
            return f"eager ({reason})"
        graphs = sum(e.replay is not None for e in self._entries.values())
        return f"{graphs} CUDA graph{'s' * (graphs != 1)}, {self.replays} replays" if graphs else "eager, warming up"

    # ---- the three ways to run ------------------------------------------------------------------------------------

    def _eagerly(self, reason: str, due: tuple[bool, ...], inputs: tuple) -> Metrics:
        if self.insist:
            raise RuntimeError(f"GANStep: capture='on' must be possible, got {reason}; capture='auto' runs eagerly")
        if reason not in self._said:
            self._said.add(reason)
            warnings.warn(f"GANStep: runs eagerly, without CUDA graphs: {reason}", RuntimeWarning, stacklevel=4)
        return self.step.run(due, *inputs)

    def _warm_up(self, entry: _Entry, due: tuple[bool, ...]) -> Metrics:
        with self.rates.on_device(), switched_off():  # as the capture runs them
            if entry.steps == 0:
                metrics = self.graphs.warm_up(lambda: self.step.run(due, *entry.inputs))
            else:
                with Recording(self.step.device) as recording:
                    metrics = self.graphs.warm_up(lambda: self.step.run(due, *entry.inputs))
                entry.recordings.append(recording)
        entry.steps += 1  # a step that raised does not count
        if len(entry.recordings) == 2:
            reason = difference(*entry.recordings)
            entry.recordings.clear()
            if reason:
                self._give_up(reason)
        self._valid = self._state()  # the first step makes the optimisers' state
        return metrics

    def _capture(self, entry: _Entry, due: tuple[bool, ...]) -> str:
        """Capture the entry's step; the reason where it failed."""
        if self.captures >= MAX_CAPTURES:
            return f"shapes, settings or parameters changed {MAX_CAPTURES} times"

        def packed() -> tuple[tuple[str, ...], Any]:
            metrics = self.step.run(due, *entry.inputs)
            values = list(metrics.values())
            alike = len({v.dtype for v in values}) == 1
            return tuple(metrics), torch.stack(values) if alike else values

        self.captures += 1
        try:
            with self.rates.on_device(capturing=True), switched_off():
                entry.replay, (entry.names, entry.values) = self.graphs.capture(packed, self.step.rng)
        except Exception as error:
            for optimizer in self.step.optimizers():
                optimizer.zero_grad(set_to_none=True)
            self.step.recover()
            first = next((line for line in str(error).splitlines() if line.strip()), "no message")
            return f"its capture failed with {type(error).__name__}: {first.strip()}"
        entry.gradients = [(p, p.grad) for p in _learnt(self.step.optimizers())]
        return ""

    def _replay(self, entry: _Entry) -> Metrics:
        self.rates.refresh()
        if entry.replay is not None:
            entry.replay()
        for p, gradient in entry.gradients:  # another graph's gradient may be there
            p.grad = gradient
        self.replays += 1
        # copies: the next replay writes over the values
        copies = entry.values.clone().unbind() if isinstance(entry.values, Tensor) else map(torch.clone, entry.values)
        return dict(zip(entry.names, copies, strict=True))

    def _give_up(self, reason: str) -> None:
        self.declined = reason
        self._entries.clear()

    # ---- what a replay cannot follow --------------------------------------------------------------------------------

    def _refresh(self) -> str:
        """Drop the graphs if the state changed since; why the present state cannot be captured, or ""."""
        state = self._state()
        if state != self._valid:
            self._entries.clear()
            self._valid = state
            self._reason = self.step.uncapturable()
        return self._reason

    def _state(self) -> tuple:
        """Everything outside the inputs that decides what the step does and where its tensors lie.

        It is asked for at every step: module dictionaries are walked by hand, at a third of parameters()'s cost.
        """
        state: list[Any] = [self.step.settings(), _process(self.step.device.type)]
        for m in (m for module in self.step.modules() for m in module.modules()):
            state.append(m.training)
            if has_hooks(m):
                state.append(has_hooks_on_values(m))
            for p in m._parameters.values():
                state += () if p is None else (p.data_ptr(), p.requires_grad)
            state += [b.data_ptr() for b in m._buffers.values() if b is not None]
        for optimizer in self.step.optimizers():
            state += [_hyperparameters(group) for group in optimizer.param_groups]
            state += [_place(v) for values in optimizer.state.values() for v in values.values()]
        return tuple(state)


def not_capturable(optimizer: torch.optim.Optimizer) -> str:
    """Why an optimiser's step cannot be captured, or ""."""
    for group in optimizer.param_groups:
        # fused Adam keeps its step count on the device, and needs the flag only for torch's own check
        fused = group.get("fused") and "capturable" in group
        if not (group.get("capturable") or fused):
            name = type(optimizer).__name__
            return f"{name} is not capturable: make it with fused=True or capturable=True where it has them"
    return ""


def _hyperparameters(group: dict[str, Any]) -> list[Any]:
    """A group without its learning rate (a device scalar); a tensor on the device is used where it lies."""
    lr = group["lr"]
    place = _place(lr) if isinstance(lr, Tensor) and lr.device.type != "cpu" else None
    return [place, *map(id, group["params"]), *((k, _place(v)) for k, v in group.items() if k not in ("params", "lr"))]


def _place(value: Any) -> Any:
    return ("at", value.data_ptr()) if isinstance(value, Tensor) else value


def _process(device: str) -> tuple:
    """Switches of the process that decide which kernels run."""
    cudnn = torch.backends.cudnn
    autograd = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
    dtypes = torch.get_default_dtype(), torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    exact = torch.are_deterministic_algorithms_enabled(), cudnn.enabled, cudnn.deterministic, cudnn.benchmark
    return forced(), *autograd, *dtypes, *exact, *_float32_precision()


def _float32_precision() -> tuple:
    """Whether products of float32 may take TF32; torch 2.9 renamed the switch, and refuses a mixture of names."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    if hasattr(cudnn, "conv"):
        return matmul.fp32_precision, cudnn.conv.fp32_precision
    return matmul.allow_tf32, cudnn.allow_tf32


def _learnt(optimizers: Sequence[torch.optim.Optimizer]) -> Iterator[Tensor]:
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            yield from group["params"]


# ---- learning rates as device scalars --------------------------------------------------------------------------------


class _Rates:
    """A float32 scalar on the device for every group whose learning rate is a Python number.

    The groups keep their numbers: schedulers, checkpoints and users see what they always saw. The scalar takes the
    number's place only while a step is warmed up or captured; before a replay it is filled with the present number.
    """

    def __init__(self, step: Capturable):
        self.step = step
        self._scalars: list[Tensor] = []
        self._values: list[float] = []

    def _groups(self) -> list[dict[str, Any]]:
        groups = [g for optimizer in self.step.optimizers() for g in optimizer.param_groups]
        return [g for g in groups if not isinstance(g["lr"], Tensor) or g["lr"].device.type == "cpu"]

    def refresh(self) -> None:
        """Bring the scalars up to date, in the current stream."""
        for i, group in enumerate(self._groups()):
            value = float(group["lr"])
            if i == len(self._scalars):
                self._scalars.append(torch.full((), value, dtype=torch.float32, device=self.step.device))
                self._values.append(value)
            elif value != self._values[i]:
                self._scalars[i].fill_(value)
                self._values[i] = value

    @contextlib.contextmanager
    def on_device(self, *, capturing: bool = False) -> Iterator[None]:
        """Within: the optimisers read the scalars; `capturing` also tells them that their step is being captured."""
        self.refresh()
        groups, every = self._groups(), [g for o in self.step.optimizers() for g in o.param_groups]
        numbers, flags = [g["lr"] for g in groups], [g["capturable"] for g in every]
        for group, scalar in zip(groups, self._scalars, strict=False):
            group["lr"] = scalar
        for group in every:
            group["capturable"] = group["capturable"] or capturing
        for optimizer in self.step.optimizers():
            # torch warns once of a capturable optimiser that runs uncaptured, which is what a warm-up does
            optimizer._warned_capturable_if_run_uncaptured = True
        try:
            yield
        finally:
            for group, number in zip(groups, numbers, strict=True):
                group["lr"] = number
            for group, flag in zip(every, flags, strict=True):
                group["capturable"] = flag


# ---- inputs: None, a tensor, or a sequence of these, one for each D update; of latents, also a tuple of tensors ------


def _parts(value: Any) -> list[Any]:
    return [leaf for part in value for leaf in _parts(part)] if isinstance(value, list | tuple) else [value]


def _nesting(value: Any) -> Any:
    return tuple(map(_nesting, value)) if isinstance(value, list | tuple) else None


def _unfit(inputs: tuple, device: torch.device) -> str:
    for part in (p for value in inputs for p in _parts(value) if p is not None):
        if type(part) not in (Tensor, nn.Parameter):
            return f"images, labels and latents must be plain tensors, got {type(part).__name__}"
        if part.device.type != device.type or part.requires_grad:
            return f"images, labels and latents must be on {device} and want no gradient"
    return ""


def _signature(value: Any) -> tuple:
    parts = [None if p is None else (p.shape, p.stride(), p.dtype) for p in _parts(value)]
    return (_nesting(value), *parts)


def _buffers(value: Any) -> Any:
    return tree_map(lambda part: None if part is None else torch.empty_like(part), value)


def _load(buffers: Any, given: Any) -> None:
    for buffer, part in zip(_parts(buffers), _parts(given), strict=True):
        if buffer is not None:
            buffer.copy_(part, non_blocking=True)
