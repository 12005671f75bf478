"""Which backends exist on this machine, and why the others do not."""

from __future__ import annotations

import functools
import importlib

import torch

from fastgan import _nvrtc
from fastgan.choice.cache import cache_dir
from fastgan.choice.native import native
from fastgan.choice.routine import DEVICES, NAMES, REGISTERED, Routine
from fastgan.choice.state import STATE, State


def missing(name: str) -> str:
    """Why a backend cannot run on this machine at all, or ""; an emulated one can."""
    return "" if name in STATE.emulated else absent(name)


@functools.cache
def absent(name: str) -> str:
    """Why this machine lacks a backend, or ""."""
    if name == "native":
        return native()[1]
    if name == "cuda" and (reason := _cuda_missing()):
        return reason
    if name == "triton":
        try:
            triton = importlib.import_module("triton")
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
        reason = _nvrtc.prepare(module.cuda, cache_dir() / "kernels")
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

    def found(op: Routine, name: str) -> tuple[bool, str]:
        if name not in op.backends:
            return False, f"{op.name} has no {name} kernel"
        reason = missing(name) or STATE.disabled.get((op.name, name), "")
        return not reason, reason

    return {op.name: {name: found(op, name) for name in NAMES} for op in REGISTERED.values()}


def refusal(state: State, op: Routine, name: str, args: tuple) -> str:
    """Why `name` cannot run this call, or ""."""
    device = op.first(args).device.type
    if DEVICES[name] and device not in (("cpu",) if name in state.emulated else DEVICES[name]):
        return f"{name} does not run on {device}"
    return missing(name) or state.disabled.get((op.name, name), "") or op.backends[name].declines(*args)


@torch.compiler.assume_constant_result
def has_kernel(op: str, device: str) -> bool:
    """Whether a kernel of this op may run on this type of device: else a fused op is better run as its parts.

    Not whether it takes a certain case: then the reference does.
    """

    def may_run(name: str) -> bool:
        runs_on = ("cpu",) if name in STATE.emulated else DEVICES[name]
        return device in runs_on and not missing(name) and (op, name) not in STATE.disabled

    return any(STATE.forced in ("auto", name) and may_run(name) for name in REGISTERED[op].backends)
