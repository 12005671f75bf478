"""Finds what compiles the CUDA kernels at their first launch: NVRTC, which torch's CUDA builds bring, and the driver.

What is compiled when: building fastgan compiles the CPU kernels and the CUDA launchers by the C++ compiler; the first
launch of a CUDA kernel compiles that kernel for the card, in 0.1 to 1.5 s, and keeps it in FASTGAN_CACHE/kernels.
An import compiles nothing, nor does this module: csrc/cuda/nvrtc does. An installation built with FASTGAN_CUDA=1 has
its kernels from nvcc and needs none of this.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import torch

DRIVERS = ["libcuda.so.1"]
REMEDY = (
    "install NVIDIA's package of NVRTC (pip install nvidia-cuda-nvrtc, for CUDA 12 nvidia-cuda-nvrtc-cu12), "
    "or reinstall fastgan with FASTGAN_CUDA=1, which compiles them by nvcc"
)


def prepare(cuda: ModuleType, folder: Path) -> str:
    """Open both libraries for fastgan._C.cuda, which keeps compiled kernels in `folder`.

    Returns "" or why its kernels cannot be compiled, and the remedy.
    """
    version = torch.version.cuda
    if version is None:
        return "this PyTorch is built without CUDA"
    major = int(version.partition(".")[0])
    if major < 12:
        return f"compiling CUDA kernels at first use needs a PyTorch for CUDA 12 or newer, got {version}"
    reason: str = cuda.prepare(DRIVERS, [*compilers(major)], str(folder))
    return f"its kernels cannot be compiled at first use: {reason}; {REMEDY}" if reason else ""


def compilers(major: int) -> Iterator[str]:
    """Where NVRTC of torch's CUDA version may lie: NVIDIA's wheels, torch's own folder, the loader's search path."""
    nvidia = importlib.util.find_spec("nvidia")
    roots = [Path(p) for p in (nvidia.submodule_search_locations or [])] if nvidia else []
    folders = [f for root in roots for f in sorted(root.glob("*/lib"))]
    for folder in (*folders, Path(torch.__file__).parent / "lib"):
        yield from (str(p) for p in sorted(folder.glob(f"libnvrtc*.so.{major}*")) if _is_compiler(p.name))
    yield f"libnvrtc.so.{major}"


def _is_compiler(name: str) -> bool:
    """Not libnvrtc-builtins, which NVRTC opens itself, nor its variant for old kernels of Linux, "alt"."""
    return "builtins" not in name and ".alt." not in name
