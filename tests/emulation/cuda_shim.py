"""CUDA kernels on a machine without a GPU: csrc/cuda compiled by the host's C++ compiler against tests/emulation/simt.

`emulation()` builds the library once (build/simt, keyed by the hash of the sources), puts it in the place of
fastgan._C.cuda and yields a record of what ran. The emulator raises on accesses outside the tensors of a call, on
indices of shared memory out of range, on divergent or missed barriers and on deadlock; memory that nobody wrote is NaN.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import importlib.machinery
import importlib.util
import os
import shutil
import subprocess
import sysconfig
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from fastgan import _native

ROOT = Path(__file__).parents[2]
SIMT = Path(__file__).with_name("simt")
CSRC = ROOT / "csrc"
FOLDER = ROOT / "build" / "simt"
NAME = "fastgan_cuda_shim"
LAUNCHERS = sorted(p for p in (CSRC / "cuda").glob("*.cu") if p.stem != "device")  # device.cu asks a real runtime


# ---- the record ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Launch:
    """A kernel that ran; wavefronts of shared memory and the fewest possible only where accesses are counted."""

    function: str
    kernel: str
    blocks: int
    threads: int
    shared: int  # dynamic bytes of a block
    cooperative: bool
    shared_wavefronts: int
    shared_ideal: int
    products: int  # mma.sync instructions of its warps


@dataclass(frozen=True)
class Traffic:
    """What the kernels of one call did to one tensor, warp instruction by warp instruction: nothing is cached."""

    function: str
    bytes: int  # of the tensor
    requested: int  # distinct bytes asked for
    sectors: int  # of 32 bytes


@dataclass
class Record:
    """Launches so far, and the traffic of each tensor of each call while counting is on."""

    module: Any
    launches: list[Launch] = field(default_factory=list)
    traffic: list[Traffic] = field(default_factory=list)

    def configure(self, *, seed: int = 0, counting: bool = False) -> None:
        """seed: another order of blocks and threads for each (0: the natural one)."""
        self.module.configure(seed, counting)

    def card(self, **features: int) -> None:
        """Run as a card with so many `multiprocessors` of so many bytes of `shared` memory, that is `cooperative` or
        not; without arguments as the usual one, of 4 multiprocessors of 100 KiB."""
        self.module.card(**features)

    def sector_efficiency(self, at_least: int) -> float:
        """Share of the fetched sectors' bytes that was asked for, over tensors of at least so many bytes."""
        large = [t for t in self.traffic if t.bytes >= at_least and t.sectors]
        return sum(t.requested for t in large) / (32 * sum(t.sectors for t in large))

    def bytes(self, at_least: int) -> int:
        """Bytes asked for of tensors of at least so many bytes."""
        return sum(t.requested for t in self.traffic if t.bytes >= at_least)


class Emulator:
    """Stands in for fastgan._C.cuda."""

    def __init__(self, module: Any, record: Record):
        self._module, self._record = module, record

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)

    def declare(self, t: torch.Tensor) -> None:
        if t.numel():
            span = 1 + sum((n - 1) * abs(s) for n, s in zip(t.shape, t.stride(), strict=True))
            self._module.declare(t.data_ptr(), span * t.element_size())

    @contextlib.contextmanager
    def running(self, function: str) -> Iterator[None]:
        try:
            yield
        finally:
            counts = self._module.forget()
            self._record.traffic += [Traffic(function, *c[1:]) for c in counts]
            self._record.launches += [Launch(function, *launch) for launch in self._module.launches()]


@contextlib.contextmanager
def emulation() -> Iterator[Record]:
    """CUDA kernels on CPU tensors; torch.empty gives NaN within, so that what a kernel leaves unwritten shows."""
    module = load()
    record = Record(module)
    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with _native.CUDA.emulated(Emulator(module, record)):
            yield record
    finally:
        torch.use_deterministic_algorithms(deterministic)
        module.configure(0, False)
        module.card()


# ---- building --------------------------------------------------------------------------------------------------------


def compiler() -> str:
    """g++ or another C++20 compiler; RuntimeError where there is none."""
    for name in ("g++", "c++", "clang++"):
        if path := shutil.which(name):
            return path
    raise RuntimeError("emulate: the CUDA emulator needs a C++ compiler, found none; install g++")


def run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"emulate: {' '.join(command)} failed:\n{(done.stderr or done.stdout)[-4000:]}")


FLAGS = ("-std=c++20", "-g1", "-fPIC", "-fno-strict-aliasing", "-Wall", "-Wextra", "-Wno-unknown-pragmas")


def objects(sources: list[Path], variant: str, flags: tuple[str, ...], include: tuple[Path, ...] = ()) -> list[str]:
    """Object files of sources; each is built again when it, a header, the compiler or a flag changed."""
    include = (*include, SIMT, CSRC)
    command = [compiler(), *FLAGS, *flags, "-DFG_CUDA", *(f"-I{p}" for p in include)]
    if shutil.which("ccache"):
        command.insert(0, "ccache")
    headers = sorted(p for room in include for p in room.rglob("*") if p.suffix in (".h", ".hpp", ".cuh"))
    common = b"".join(p.read_bytes() for p in headers) + " ".join(command).encode()
    folder = FOLDER / variant
    folder.mkdir(parents=True, exist_ok=True)

    def build(source: Path) -> str:
        digest = hashlib.sha256(common + source.read_bytes()).hexdigest()[:16]
        made = folder / f"{source.stem}-{digest}.o"
        if not made.exists():
            for stale in folder.glob(f"{source.stem}-*.o"):
                stale.unlink()
            run(*command, "-x", "c++", "-c", str(source), "-o", f"{made}.new")
            Path(f"{made}.new").rename(made)
        return str(made)

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(build, sources))


@contextlib.contextmanager
def locked() -> Iterator[None]:
    """One build at a time; the kernel drops the lock of a process that dies."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    with open(FOLDER / "lock", "w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def build() -> Path:
    """The library, built where it is not there yet."""
    try:
        import pybind11
    except ImportError:
        raise RuntimeError("emulate: the CUDA emulator needs pybind11; install fastgan[dev]") from None
    with locked():
        binding = (f"-I{pybind11.get_include()}", f"-I{sysconfig.get_paths()['include']}", "-fvisibility=hidden", "-O1")
        made = objects(LAUNCHERS, "kernels", ("-O1",))
        made += objects([SIMT / "simt.cpp"], "scheduler", ("-O2",))
        made += objects([SIMT / "module.cpp"], "binding", binding)
        digest = hashlib.sha256("".join(made).encode()).hexdigest()[:16]
        library = FOLDER / digest / f"{NAME}{sysconfig.get_config_var('EXT_SUFFIX')}"
        if not library.exists():
            for stale in FOLDER.glob(f"*/{NAME}*"):
                shutil.rmtree(stale.parent)
            library.parent.mkdir(parents=True, exist_ok=True)
            run(compiler(), "-shared", *made, "-o", f"{library}.new")
            Path(f"{library}.new").rename(library)
    return library


@functools.cache
def load() -> Any:
    """The library as a module, once a process."""
    loader = importlib.machinery.ExtensionFileLoader(NAME, str(build()))
    spec = importlib.util.spec_from_loader(NAME, loader)
    if spec is None:
        raise RuntimeError(f"emulate: {loader.path} does not load")
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


# ---- planted faults --------------------------------------------------------------------------------------------------


def planted(faults: list[tuple[str, str, str, str]], stems: tuple[str, ...], driver: str, folder: Path) -> Any:
    """A library of launchers whose copies of the kernels hold every fault, each behind `planted == its number`.

    faults: (name, file, text, its replacement, in which PLANTED is 1 where the fault is on), numbered from 1; driver: a
    .cu with the C functions that a test calls, which set `planted`.
    """
    import ctypes

    shutil.copytree(CSRC, folder / "csrc")
    cuda = folder / "csrc" / "cuda"
    for number, (name, file, right, wrong) in enumerate(faults, 1):
        text = (cuda / file).read_text()
        if text.count(right) != 1:
            raise AssertionError(f"{name}: {file} must have {right!r} once, has it {text.count(right)} times")
        (cuda / file).write_text(text.replace(right, wrong.replace("PLANTED", f"(planted == {number})")))
    prelude = cuda / "prelude.cuh"
    prelude.write_text(prelude.read_text().replace("#pragma once", "#pragma once\nextern int planted;", 1))
    (cuda / "driver.cu").write_text(driver)
    with locked():
        made = objects([cuda / f"{stem}.cu" for stem in (*stems, "driver")], "faults", ("-O1",), (folder / "csrc",))
        made += objects([SIMT / "simt.cpp"], "scheduler", ("-O2",))
        library = folder / "faults.so"
        run(compiler(), "-shared", *made, "-o", str(library))  # locked: another process's build removes these objects
    return ctypes.CDLL(str(library))


# ---- sanitizers ------------------------------------------------------------------------------------------------------

SANITIZERS = {
    "address": ("-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"),
    "thread": ("-O1", "-fsanitize=thread"),
}


def sanitized(sanitizer: str, launchers: list[Path], variant: str = "", include: tuple[Path, ...] = ()) -> Path:
    """tests/emulation/simt/sanitize.cpp with the kernels, built with a sanitizer.

    launchers: the .cu files; include: searched before csrc, for copies of kernels with a fault planted.
    """
    flags, variant = SANITIZERS[sanitizer], variant or sanitizer
    with locked():
        made = objects([*launchers, SIMT / "sanitize.cpp"], variant, flags, include)
        made += objects([SIMT / "simt.cpp"], "scheduler", ("-O2",))
        digest = hashlib.sha256("".join(made).encode()).hexdigest()[:16]
        program = FOLDER / variant / f"sanitize-{digest}"
        if not program.exists():
            for stale in (FOLDER / variant).glob("sanitize-*"):
                if not stale.name.endswith(".o"):
                    stale.unlink()
            run(compiler(), *flags, *made, "-o", str(program))
    return program


def run_sanitized(program: Path, seed: int, race: str = "within", function: str = "") -> str:
    """What the program reported, or ""; RuntimeError where the machine refuses the sanitizer's memory map."""
    command = [str(program), str(seed), race, *([function] if function else [])]
    environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0", "TSAN_OPTIONS": "exitcode=66 halt_on_error=1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if "unexpected memory mapping" in done.stderr:
        raise RuntimeError("emulate: the thread sanitizer needs fewer random bits of addresses than this kernel uses")
    return "" if done.returncode == 0 else f"status {done.returncode}: {done.stderr[-3000:]}"
