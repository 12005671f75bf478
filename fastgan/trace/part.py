"""A traced part of a converted model: the forward that `fastgan.convert` gives to a module it cannot see into."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import logging
import types
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils.hooks import RemovableHandle

from fastgan._forward import Forward
from fastgan._hooks import has_global_hooks, has_hooks, makes_weight
from fastgan._op import PLAIN, is_traced, is_transformed
from fastgan._parametrized import plain_class
from fastgan.choice import STATE, forced
from fastgan.trace.graphs import Graph, traced

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
# train and eval, gradients on and off, D frozen, x with and without a gradient, a second batch size, a second dtype
VARIANTS = 32


@functools.cache
def missing() -> str:
    """Why nothing can be traced on this Python and torch, or ""."""
    if importlib.util.find_spec("torch._dynamo") is None:
        return f"torch {torch.__version__} has no Dynamo"
    try:
        torch.compile(lambda x: x, backend="eager")
    except (RuntimeError, ImportError, AttributeError) as error:
        return f"torch.compile does not run here: {error}"
    return ""


@functools.cache
def _settings() -> dict[str, Any]:
    """Dynamo's switches while a part runs, those that this torch has.

    Errors of the tracer leave a frame to PyTorch; numpy's random numbers stay numpy's; a part under DDP is one graph,
    since eager autograd calls DDP's hooks as ever.
    """
    wanted = {
        "suppress_errors": True,
        "trace_numpy": False,
        "optimize_ddp": False,
        "recompile_limit": VARIANTS,
        "cache_size_limit": VARIANTS,
        "accumulated_recompile_limit": 64 * VARIANTS,
    }
    config: Any = torch._dynamo.config
    found = {name: value for name, value in wanted.items() if hasattr(config, name)}
    if "recompile_limit" in found:  # the same switch under its newer name
        found.pop("cache_size_limit", None)
    return found


UNWANTED = "The .grad attribute of a Tensor that is not", "Dynamo (does not know how|cannot trace|detected a call)"
TRACER = logging.getLogger("torch._dynamo")


def _is_wanted(record: logging.LogRecord) -> bool:
    """Whether the tracer says more than that it gave a frame up or cut it, for which it takes some 10 to 200 lines.

    What it could not follow runs as written, and who called convert has no use for advice about Dynamo's switches.
    Where the forward itself is at fault, its own error follows.
    """
    return record.levelno != logging.WARNING or "recompile_limit" in record.getMessage()


@contextlib.contextmanager
def _tracing() -> Iterator[None]:
    """Within: Dynamo may trace. What it would warn of fails where warnings raise: its own look at .grad of an input
    that is no leaf, and what it cannot follow, `Variable(x)` for one. The forward's own warnings pass (a filter by
    Dynamo's modules would take those too: it makes them in its own name)."""
    handlers = list(TRACER.handlers)
    for handler in handlers:
        handler.addFilter(_is_wanted)
    try:
        with torch._dynamo.config.patch(_settings()), warnings.catch_warnings():
            for message in UNWANTED:
                warnings.filterwarnings("ignore", message=message)
            yield
    finally:
        for handler in handlers:
            handler.removeFilter(_is_wanted)


class Part(Forward):
    """The forward of a module whose own is hand-written: traced at its first call, then guarded by Dynamo.

    Where a trace would not be the same, the module's own forward runs: inside another tracer, under hooks that look at
    inner modules, for inputs that are no plain tensors. So it does where all graphs of a call were faster in PyTorch:
    such a call goes past Dynamo.
    """

    def __init__(self, owner: nn.Module):
        super().__init__(owner)
        self.left: dict[tuple[str, str], str] = {}  # groups that stay with PyTorch, and why
        self.graphs: list[Graph] = []
        self.empty = False  # whether a graph had nothing to fuse
        self._compiled: Callable[..., Any] | None = None
        self._known: dict[tuple, int] = {}  # kind of call -> how many graphs it runs through; 0: it is left to PyTorch
        self._hooks: list[dict] = []
        self._modules = -1
        self._handles = -1  # hooks made in this process when none of them was found here
        self._parameter: Tensor | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return self.plain(*args, **kwargs)
        kind = self._kind(args, kwargs)
        known = self._known.get(kind)
        if known == 0 or self.refusal(args, kwargs):
            return self.plain(*args, **kwargs)
        compiled = self._compiled or self._compile()
        graphs, before = len(self.graphs), [graph.calls for graph in self.graphs]
        inside = sum(graph.inside for graph in self.graphs)
        account = STATE.account
        with torch.compiler.set_stance("eager_on_recompile") if known else _tracing():
            begin, paid = account.clock(), account.spent
            found = compiled(*args, **kwargs)
            took = account.clock() - begin - (account.spent - paid)
        ran = [graph for graph, calls in zip(self.graphs, before, strict=False) if graph.calls != calls]
        if len(self.graphs) != graphs:  # the call's own run is a small part of what it took
            account.charge(took)
        elif known and not all(graph.last for graph in ran):
            inside = sum(graph.inside for graph in self.graphs) - inside
            for graph in ran:
                graph.measure((took - inside) / len(ran))
        self._learn(kind, known, ran, traced=len(self.graphs) != graphs)
        return found

    def _kind(self, args: tuple, kwargs: dict[str, Any]) -> tuple:
        """What decides about a call's speed. Dynamo's guards decide about its numbers."""
        modes = torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"), forced(), torch.get_num_threads()
        learns = self._parameter is not None and self._parameter.requires_grad
        inputs = (
            (a.shape, a.stride(), a.dtype, a.requires_grad) if isinstance(a, Tensor) else type(a)
            for a in (*args, *kwargs.values())
        )
        return self.owner.training, learns, *modes, *inputs

    def _learn(self, kind: tuple, known: int | None, ran: list[Graph], traced: bool) -> None:
        """What the next call of this kind needs: Dynamo and a look whether it traces, Dynamo alone, or neither.

        Tracing needs `_settings`, which cost a call 40 us and more. A call that has traced nothing before runs under a
        stance of 5 us that leaves what no trace fits to PyTorch; such a call shows by the graphs that it did not run
        through.
        """
        if known and len(ran) != known:
            del self._known[kind]
        elif not traced:
            if len(self._known) >= VARIANTS * VARIANTS:
                self._known.clear()
            self._known[kind] = 0 if all(graph.last == "plain" for graph in ran) else len(ran)

    def plain(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own forward."""
        return type(self.owner).forward(self.owner, *args, **kwargs)

    def refusal(self, args: tuple = (), kwargs: dict[str, Any] | None = None) -> str:
        """Why this call runs untraced, or ""."""
        if self._hooked():
            return "hooks look at its inner modules"
        if has_global_hooks():
            return "global hooks are set"
        if is_traced() or torch._C._get_tracing_state() is not None or torch.is_inference_mode_enabled():
            return "another tracer or inference mode looks on"
        if is_transformed():
            return "a torch.func transform or forward mode looks on"
        tensors = [a for a in (*args, *(kwargs or {}).values()) if isinstance(a, Tensor)]
        return "" if all(type(a) in PLAIN and not a.is_meta for a in tensors) else "a tensor subclass came in"

    def _hooked(self) -> bool:
        """Whether a hook of the user's is on an inner module; Dynamo itself does not look for later ones."""
        handles = RemovableHandle.next_id
        if handles == self._handles:  # 10 to 20 us less than a look at each module
            return False
        modules = list(self.owner.modules())
        if len(modules) != self._modules:
            self._modules = len(modules)
            self._hooks = [vars(m)[name] for m in modules if m is not self.owner for name in HOOKS]
        found = any(not makes_weight(h) for d in self._hooks for h in d.values())
        self._handles = -1 if found else handles
        return found

    def _compile(self) -> Callable[..., Any]:
        """Dynamo keeps its traces by code object: a copy of one gives each part a cache of its own."""
        code = _forward.__code__.replace(co_name=f"forward_of_{type(self.owner).__name__}")
        forward = types.FunctionType(code, _forward.__globals__, code.co_name)
        self._compiled = torch.compile(types.MethodType(forward, self.owner), backend=self._backend)
        self._parameter = next(self.owner.parameters(), None)
        return self._compiled

    def _backend(self, module: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        graph = traced(module, example_inputs, self.left)
        if graph is None:
            self.empty = True
            return module.forward
        graph.overhead = None
        self.graphs.append(graph)
        return graph

    # ---- what it tells ----------------------------------------------------------------------------------------------

    def groups(self) -> set[tuple[str, str]]:
        """(what runs as one, its source line) of every group in the graphs so far."""
        return {group.key for graph in self.graphs for group in graph.groups}

    def leave(self, keys: set[tuple[str, str]], why: str) -> None:
        """Leave these groups to PyTorch from now on; the module is traced again."""
        self.left = dict.fromkeys(keys, why)
        self.graphs, self.empty, self._compiled, self._known = [], False, None, {}

    def told(self, module: str) -> list[tuple[str, str, str]]:
        """(what runs it, why nothing faster does, its line) of each call that an inner module makes."""
        found: dict[tuple[str, str], tuple[str, str, str]] = {}
        for graph in self.graphs:
            won = "plain" not in graph.chosen.values()
            for group in graph.groups:
                if module not in group.modules:
                    continue
                runs = f"fastgan.{group.key[0]}" if module == group.modules[0] else "in the layer before it"
                why = "" if won else "plain PyTorch won the race of the whole part"
                found[group.where, group.key[0]] = (runs if won else "torch", why, group.where)
        found |= {(where, what): ("torch", why, where) for (what, where), why in self.left.items() if not module}
        return list(found.values())

    def unfused(self) -> str:
        """Why a layer that is in no group is not."""
        return "no pattern for what it does there" if self.graphs or self.empty else "traced at its first call"

    # ---- copies ------------------------------------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        return {"owner": self.owner}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["owner"])  # type: ignore[misc]


def _forward(owner: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return type(owner).forward(owner, *args, **kwargs)


# ---- which modules become parts -------------------------------------------------------------------------------------

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.GroupNorm, nn.LayerNorm)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.ConvTranspose1d, nn.ConvTranspose2d)
LAYERS = (*CONVOLUTIONS, *NORMS)


def parts(model: nn.Module) -> Iterator[nn.Module]:
    """The outermost modules whose layers are called in ways that no chain shows."""
    if not any(_has_unseen_layers(m) for m in model.modules()):
        return
    if _traceable(model):
        yield model
        return
    for child in model.children():
        yield from parts(child)


def has_own_forward(m: nn.Module) -> bool:
    """Whether the class's forward is a user's, not torch's or ours; that of a torch.fx graph belongs to no module."""
    return (type(m).forward.__module__ or "").partition(".")[0] not in ("torch", "fastgan")


def _has_unseen_layers(m: nn.Module) -> bool:
    children = list(m.children())
    if isinstance(m, nn.Sequential) and not has_own_forward(m):
        return any(isinstance(c, LAYERS) and _no_chain_makes_its_weight(c) for c in children)
    bare = isinstance(m, nn.ModuleList | nn.ModuleDict) or type(m) is nn.Module  # torch.fx nests by the latter
    if not has_own_forward(m) and not bare:
        return False
    layers = any(isinstance(c, LAYERS) for c in children) or sum(isinstance(c, nn.Linear) for c in children) > 1
    return layers or (has_own_forward(m) and any(p is not None for p in m._parameters.values()))


def _no_chain_makes_its_weight(m: nn.Module) -> bool:
    """Whether something makes the weight at each call that chains do not know: torch's older hooks, or a norm's."""
    if torch.nn.utils.parametrize.is_parametrized(m):
        return plain_class(m) not in CONVOLUTIONS
    return has_hooks(m) and all(makes_weight(h) for name in HOOKS for h in vars(m)[name].values())


def _traceable(m: nn.Module) -> bool:
    if isinstance(m, torch.jit.ScriptModule) or m._compiled_call_impl is not None or "forward" in m.__dict__:
        return False
    return has_own_forward(m) or (isinstance(m, nn.Sequential) and type(m).forward is nn.Sequential.forward)
