"""A forward that lies in a module's __dict__, in the place of its class's."""

from __future__ import annotations

import inspect
import types
from typing import Any

import torch
from torch import fx, nn

from fastgan._hooks import has_hooks

_tracing, _compiler = torch._C._get_tracing_state, torch.compiler
_HAS_FLAG = hasattr(_compiler, "_is_exporting_flag")  # torch 2.6 has none; looked up once, since every op asks


def is_exported() -> bool:
    """Whether torch.export or torch.jit.trace writes the model down: in torch's own ops, to run without fastgan."""
    # The flag behind torch.compiler.is_exporting(), from torch 2.7 on: in torch 2.8 that function is True under
    # torch.compile too.
    return _tracing() is not None or (_HAS_FLAG and _compiler._is_exporting_flag)


def is_symbolic(*values: Any) -> bool:
    """Whether torch.fx traces: its proxies come in."""
    return any(isinstance(value, fx.Proxy) for value in values)


def written_call(layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The call of a converted layer as torch.fx writes down that of torch's own: a call of the module.

    fx asks a class for its Python module before it follows a call, and takes none but torch's for whole.
    """
    if has_hooks(layer):  # they would run on proxies now, and again at each call of the graph
        raise TypeError(
            f"torch.fx: a converted layer must have no hooks, got {type(layer).__name__} with some; "
            "pass fastgan.revert(model)"
        )
    tracer: Any = next(value.tracer for value in (*args, *kwargs.values()) if isinstance(value, fx.Proxy))
    return tracer.create_proxy("call_module", tracer.path_of_module(layer), args, kwargs)


class Forward:
    """A module's forward while it is converted.

    The module keeps its class, and what is built from its children (a slice, say) does not inherit the forward.
    Subclasses implement __call__, and `twin`, the forward of a replica that nn.DataParallel makes.
    """

    NAMES = ("forward", "_replicate_for_data_parallel", "__prepare_scriptable__")

    def __init__(self, owner: nn.Module):
        self.owner = owner

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError

    def install(self) -> None:
        self.owner.__dict__ |= dict(zip(self.NAMES, (self, self.replicate, self.refuse_script), strict=True))

    def remove(self) -> None:
        for name in self.NAMES:
            self.owner.__dict__.pop(name, None)

    def replicate(self) -> nn.Module:
        """nn.DataParallel's copy of the module; the copy gets other children, so it needs a forward of its own."""
        replica: nn.Module = nn.Module._replicate_for_data_parallel(self.owner)
        for name in self.NAMES:
            replica.__dict__.pop(name, None)
        return replica

    def refuse_script(self) -> nn.Module:
        """torch.jit.script calls this. It compiles source code, and a converted forward has none."""
        raise TypeError(
            f"torch.jit.script: the model must be plain PyTorch, got a converted {type(self.owner).__name__}; "
            "pass fastgan.revert(model), or use torch.jit.trace or torch.export"
        )

    @property
    def __code__(self) -> types.CodeType:
        """torch.export reads the names of the arguments from it."""
        return type(self.owner).forward.__code__

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(types.MethodType(type(self.owner).forward, self.owner))
