"""Puts fastgan's ops in the place of a project's `torch_utils.ops`."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from dataclasses import dataclass
from types import ModuleType

OPS = (
    "bias_act",
    "conv2d_gradfix",
    "conv2d_resample",
    "filtered_lrelu",
    "fma",
    "grid_sample_gradfix",
    "upfirdn2d",
)


@dataclass(frozen=True)
class Installation:
    """What `install` did: modules that it put in place, and functions that it changed in modules imported before."""

    modules: tuple[str, ...]
    functions: tuple[str, ...]

    def __str__(self) -> str:
        lines = [f"fastgan.compat.stylegan in the place of: {', '.join(self.modules)}"]
        if self.functions:
            lines.append(f"and in modules that were imported before: {', '.join(self.functions)}")
        return "\n".join(lines)


def install(package: str = "torch_utils.ops") -> Installation:
    """Make `from torch_utils.ops import bias_act` and its like give fastgan's ops, and say what was replaced.

    Call it before or after the project's modules are imported. Modules that were imported get fastgan's functions in
    the place of their own. A project's own sources, `torch_utils.persistence` and the source that a pickled network
    carries find the ops by this name; nothing is compiled.

    Args:
        package: where the project keeps its ops.

    Returns:
        What was replaced; `print` it.
    """
    parent = _package(package)
    modules, functions = [], []
    for name in OPS:
        ours = importlib.import_module(f"fastgan.compat.stylegan.{name}")
        full = f"{package}.{name}"
        theirs = sys.modules.get(full)
        if theirs is not None and theirs is not ours:
            functions += _replace(theirs, ours)
        sys.modules[full] = ours
        setattr(parent, name, ours)
        modules.append(full)
    return Installation(tuple(modules), tuple(functions))


def _replace(theirs: ModuleType, ours: ModuleType) -> list[str]:
    """Our public functions in a module that others hold already, and its flag where ours has one."""
    theirs.__class__ = type(ours)
    replaced = [name for name in ours.__all__ if callable(getattr(theirs, name, None))]
    for name in replaced:
        setattr(theirs, name, getattr(ours, name))
    return [f"{theirs.__name__}.{name}" for name in replaced]


def _package(name: str) -> ModuleType:
    """The project's package, or an empty one where there is none."""
    if name in sys.modules:
        return sys.modules[name]
    parent, _, last = name.rpartition(".")
    holder = _package(parent) if parent else None
    if importlib.util.find_spec(name) is not None:
        return importlib.import_module(name)
    made = ModuleType(name, "An empty package that holds fastgan's ops.")
    made.__path__ = []
    sys.modules[name] = made
    if holder is not None:
        setattr(holder, last, made)
    return made
