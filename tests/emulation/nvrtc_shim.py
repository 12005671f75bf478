"""The CUDA launchers as an installation without nvcc builds them, over NVRTC or over a fake driver and compiler.

`load()` builds the module once (build/simt, as the emulator). `Fake()` is a library with the functions of the CUDA
driver and NVRTC that csrc/cuda/nvrtc calls; it writes down what it is asked.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import importlib.machinery
import importlib.util
import runpy
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

SHIM = importlib.util.spec_from_file_location("fastgan_cuda_shim_builder", Path(__file__).with_name("cuda_shim.py"))
shim = importlib.util.module_from_spec(SHIM)
sys.modules[SHIM.name] = shim
SHIM.loader.exec_module(shim)

NAME = "fastgan_nvrtc_shim"
HERE = Path(__file__).with_name("nvrtc")
ROOM = shim.CSRC / "cuda" / "nvrtc"


def build(library: str, make: Any, *flags: str) -> Path:
    """A shared library of the objects that make() gives, linked where it is not there yet."""
    with shim.locked():
        made = make()
        digest = hashlib.sha256("".join(made).encode()).hexdigest()[:16]
        path = shim.FOLDER / "nvrtc" / f"{digest}-{library}"
        if not path.exists():
            for stale in path.parent.glob(f"*-{library}"):
                stale.unlink()
            shim.run(shim.compiler(), "-shared", *made, *flags, "-o", f"{path}.new")
            Path(f"{path}.new").rename(path)
    return path


def objects() -> list[str]:
    """Object files of the launchers, the loader and the binding, as setup.py compiles them."""
    import pybind11

    generated = shim.FOLDER / "nvrtc" / "generated"
    generated.mkdir(parents=True, exist_ok=True)
    text = runpy.run_path(str(ROOM / "embed.py"))["device_sources"](shim.CSRC)
    header = generated / "device_sources.hpp"
    if not header.exists() or header.read_text() != text:
        header.write_text(text)
    binding = (f"-I{pybind11.get_include()}", f"-I{sysconfig.get_paths()['include']}")
    flags = ("-O1", "-fvisibility=hidden", "-DFG_NVRTC", *binding)
    sources = [*shim.LAUNCHERS, ROOM / "loader.cpp", HERE / "module.cpp"]
    return shim.objects(sources, "nvrtc", flags, (ROOM / "toolkit", generated))


@functools.cache
def load() -> Any:
    """The launchers as a module, once a process."""
    path = build(f"{NAME}{sysconfig.get_config_var('EXT_SUFFIX')}", objects, "-ldl")
    loader = importlib.machinery.ExtensionFileLoader(NAME, str(path))
    spec = importlib.util.spec_from_loader(NAME, loader)
    if spec is None:
        raise RuntimeError(f"nvrtc_shim: {path} does not load")
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


class Fake:
    """The fake driver and compiler: `text()` is what they were asked since `reset()`, a line each."""

    def __init__(self) -> None:
        self.path = str(build("libfake.so", lambda: shim.objects([HERE / "fake.cpp"], "nvrtc", ("-O1",))))
        self._library = ctypes.CDLL(self.path)
        self._library.fake_text.restype = ctypes.c_char_p
        self.reset()

    def reset(self) -> None:
        self._library.fake_reset()

    def lines(self, *verbs: str) -> list[list[str]]:
        """The words of each line that begins with one of the verbs."""
        said = [line.split() for line in self._library.fake_text().decode().splitlines()]
        return [words for words in said if words[0] in verbs]

    def fail(self, function: str) -> None:
        self._library.fake_fail(function.encode())

    def watch(self, part: str, *sizes: int) -> None:
        """Write the parameters, of so many bytes each, of kernels whose name holds `part`."""
        self._library.fake_watch(part.encode(), (ctypes.c_int * len(sizes))(*sizes), len(sizes))


class Launchers:
    """Stands in for fastgan._C.cuda: tensors lie on the CPU, and nothing but the fake driver sees their addresses."""

    def __getattr__(self, name: str) -> Any:
        return getattr(load(), name)

    def declare(self, t: torch.Tensor) -> None:
        pass

    @contextlib.contextmanager
    def running(self, function: str) -> Iterator[None]:
        yield
