"""What this installation can do, and for everything that it cannot: why, and what would help.

`doctor()` returns plain values; ``fastgan doctor`` prints them as tables, ``--json`` as JSON. It never raises
because something is missing: reporting that is its purpose.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import sys
from typing import Any

import torch
from torch import Tensor

from fastgan._op import OPS, Op
from fastgan._version import __version__
from fastgan.choice import STATE, absent, backends, cache_dir, missing, native, proof_error, refusal, settle
from fastgan.choice.cache import cpu_name

__all__ = ["doctor", "machine"]

# What each optional package is for, and how to get it.
EXTRAS = {
    "triton": ("Triton kernels on a GPU", "PyTorch's builds with CUDA bring it"),
    "PIL": ("image folders and sample grids", "pip install pillow"),
    "rich": ("the live display and these tables", "pip install rich"),
    "onnx": ("fastgan export --format onnx, with onnxscript", "pip install onnx onnxscript"),
    "safetensors": ("fastgan export --format safetensors", "pip install safetensors"),
    "matplotlib": ("fastgan bench --plot", "pip install matplotlib"),
    "imageio_ffmpeg": ("films of clips, mp4 output of fastgan interpolate", "pip install imageio-ffmpeg"),
}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def machine(device: torch.device | str = "cpu") -> dict[str, Any]:
    """The machine and the versions that a measurement depends on; `device` adds its GPU."""
    device = torch.device(device)
    facts: dict[str, Any] = {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "os": platform.platform(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
    }
    if device.type == "cuda":
        facts["gpu"] = torch.cuda.get_device_name(device)
        facts["cuda"] = torch.version.cuda
    return facts


def _native() -> dict[str, Any]:
    module, reason = native()
    if module is None:
        return {"available": False, "reason": reason}
    return {
        "available": True,
        "reason": "",
        "build": module.build_info(),
        "table": module.table(),
        "tables": {name: why or "usable" for name, why in module.tables().items()},
    }


def _cuda() -> dict[str, Any]:
    facts: dict[str, Any] = {
        "available": torch.cuda.is_available(),
        "torch_cuda": torch.version.cuda,
        "kernels": _cuda_kernels(),
        "devices": [],
    }
    if facts["available"]:
        for index in range(torch.cuda.device_count()):
            p = torch.cuda.get_device_properties(index)
            facts["devices"].append(
                {
                    "name": p.name,
                    "capability": f"{p.major}.{p.minor}",
                    "memory_mb": round(p.total_memory / 1e6),
                }
            )
        facts["reason"] = ""
    elif torch.version.cuda is None and torch.version.hip is None:
        facts["reason"] = "this PyTorch is built for CPUs only; pytorch.org lists the builds with CUDA"
    else:
        facts["reason"] = "PyTorch finds no usable GPU; see what nvidia-smi says about the driver"
    return facts


def _cuda_kernels() -> str:
    """Who compiles the CUDA C++ kernels, and when."""
    module, _ = native()
    build = module.build_info() if module else {}
    if not build.get("cuda"):
        return "none in this build"
    if build["cuda"]["compiler"] == "nvcc":
        return f"compiled at build time by nvcc {build['cuda']['version']} for {', '.join(build['cuda']['archs'])}"
    kept = "compiled by NVRTC, each at its first launch, and kept in FASTGAN_CACHE/kernels"
    return f"{kept}; not by nvcc: {build['nvcc_absent']}"


def _extra(module: str) -> dict[str, Any]:
    package = {"PIL": "pillow", "imageio_ffmpeg": "imageio-ffmpeg"}.get(module, module)
    purpose, remedy = EXTRAS[module]
    try:
        importlib.import_module(module)
    except Exception as error:  # a broken package raises anything
        return {"available": False, "version": None, "for": purpose, "reason": f"{error}; {remedy}"}
    return {"available": True, "version": _version(package), "for": purpose, "reason": ""}


def _guarded(part: Any) -> Any:
    """What `part()` returns, or how it failed: one broken part must not hide the others."""
    try:
        return part()
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}


def _backends() -> dict[str, dict[str, dict[str, Any]]]:
    return {
        op: {name: {"available": ok, "reason": reason} for name, (ok, reason) in states.items()}
        for op, states in backends().items()
    }


def _cache() -> dict[str, Any]:
    folder = cache_dir()
    parent = next((p for p in (folder, *folder.parents) if p.exists()), folder)
    return {
        "path": str(folder),
        "writable": os.access(parent, os.W_OK),
        "races_won": len(STATE.cache.winners),
        "open": len(STATE.cache.open_cases()),
    }


def _data() -> Any:
    from fastgan import data

    return data.available()


def prove_all() -> list[dict[str, str]]:
    """Every available backend of every op against its reference: rows of op, backend, dtype, layout, error."""
    rows = []
    if not absent("triton"):
        importlib.import_module("fastgan.kernels.configs").race_ahead(torch.device("cuda"))
    for op in OPS.values():
        for name in op.backends:
            if name == "reference" or missing(name):
                continue
            for dtype in (torch.float32, torch.bfloat16):
                for layout in (torch.contiguous_format, torch.channels_last):
                    args = tuple(_example(a, op, name, dtype, layout) for a in op.example())
                    error = refusal(STATE, op, name, args) or proof_error(op, name, op.drawn(args))
                    kinds = {"dtype": str(dtype).partition(".")[2], "layout": str(layout).partition(".")[2]}
                    rows.append({"op": op.name, "backend": name, **kinds, "error": error})
    return rows


def _example(a: Any, op: Op, name: str, dtype: torch.dtype, layout: torch.memory_format) -> Any:
    """An example's tensor as a case; ops of mixed types ("first") keep their per-channel vectors in float32."""
    if not isinstance(a, Tensor):
        return a
    a = a.to("cpu" if name == "native" else "cuda")
    a = a.contiguous(memory_format=layout) if a.dim() == 4 else a
    vector = op.autocast == "first" and a.dim() < 4
    return a if vector or not a.is_floating_point() else a.to(dtype)


def _race_open() -> dict[str, Any]:
    cases = STATE.cache.open_cases()
    settled = settle(cases, seconds=float("inf"))
    return {**settled, "open": len(cases) - len(settled)}


def doctor(prove: bool = False, race: bool = False) -> dict[str, Any]:
    """Facts about this installation by topic; see the module's text.

    prove: also run every available backend of every op against its reference on small random inputs; the rows under
        "proofs" have the keys op, backend, dtype, layout and error, which is "" where they agree.
    race: also race the cases that earlier runs had no time for; "races" holds {case: winner} and "open", how many the
        machine was too busy to settle.
    """
    found = {
        "versions": {
            "fastgan": __version__,
            "python": platform.python_version(),
            "torch": str(torch.__version__),
            "triton": _version("triton"),
            "numpy": _version("numpy"),
            "executable": sys.executable,
        },
        "machine": _guarded(machine),
        "native": _guarded(_native),
        "cuda": _guarded(_cuda),
        "backends": _guarded(_backends),
        "extras": {module: _extra(module) for module in EXTRAS},
        "cache": _guarded(_cache),
        "data": _guarded(_data),
    }
    if prove:
        found["proofs"] = _guarded(prove_all)
    if race:
        found["races"] = _guarded(_race_open)
    return found
