"""Builds fastgan._C, the torch-free native core, and installs top-level kernels/ as fastgan.kernels.

Nothing here may make `pip install` fail for want of a compiler: without one the package installs with
PyTorch's own operators only, and the reason is left in fastgan/_C_build_failure.txt for `fastgan doctor`.
Two cases do fail: FASTGAN_CUDA=1 without a working nvcc, and `python setup.py build_ext`, by which
developers build.

FASTGAN_CUDA says who compiles the CUDA kernels, and when:
  auto (the default) and 0   the NVRTC that torch brings, at a kernel's first launch (csrc/cuda/nvrtc). The host's
                             compiler builds the launchers; nvcc is not called, nor looked for.
  1                          nvcc, now, for the architectures of TORCH_CUDA_ARCH_LIST ("8.0;9.0+PTX"), without it for
                             one of each generation. Wheels and `make cuda` use it.

Every file of csrc/cpu is compiled once per instruction-set table, with -DISA=<table> as its namespace. FASTGAN_TABLES
says for which:
  cpu (the default)          from AVX2 up to the best that this CPU runs: who installs on a CPU with AVX2 alone does not
                             wait for the AVX-512 tables, 60 s of 162 on 2 cores of a Zen 1, nor for the portable one.
  all                        every table of this architecture, for wheels and images that other CPUs run too.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import platform
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
CSRC = ROOT / "csrc"
NVRTC = CSRC / "cuda" / "nvrtc"
LINUX = sys.platform == "linux"
X86 = platform.machine().lower() in ("x86_64", "amd64")
FAILURE_NAME = "_C_build_failure.txt"

# gcc's own AVX-512 headers read deliberately undefined registers, and gcc 12 warns about them.
AVX512 = "-mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx2 -mfma -Wno-uninitialized -Wno-maybe-uninitialized"
# On x86 the portable table serves CPUs without AVX2 alone. -O1 takes 5 s less of the compiler's time than -O2; of the
# kernels only norms lose by it, a sixth to a third.
TABLES = {"portable": "-O1" if X86 else ""}
if X86:
    TABLES |= {
        "avx2": "-mavx2 -mfma",
        "avx512": AVX512,
        "avx512_bf16": f"{AVX512} -mavx512bf16",
        "amx": f"{AVX512} -mavx512bf16 -mamx-tile -mamx-bf16",
    }

# What /proc/cpuinfo lists where a CPU runs a table; each table needs the ones before it.
NEEDS = {
    "avx2": {"avx2", "fma"},
    "avx512": {"avx512f", "avx512bw", "avx512vl", "avx512dq"},
    "avx512_bf16": {"avx512_bf16"},
    "amx": {"amx_tile", "amx_bf16"},
}

# These stems use nothing that the last two tables have beyond AVX-512: cpu/table.cpp gives them avx512's. The small
# ones are one unit: the headers are most of what a compiler reads in them. Apart they take 8.7 s of a Zen 4 for a
# table, together 5.2 s.
NORMS_AND_BIAS = ("bias_act", "bn_act", "gn_act")
SMALL = (
    "adam",
    "bernoulli",
    "filtered_lrelu",
    "gan_loss",
    "grad_norm_penalty",
    "interpolate",
    "program",
    "sample_dot",
    "upfirdn2d",
)
# These use vdpbf16ps but no AMX: the amx table takes avx512_bf16's.
PAIRS = ("attention",)


class BuildError(RuntimeError):
    """The native core cannot be built here; the text is what a user should read."""


@dataclass
class Cuda:
    """An nvcc that was found, or the reason why the kernels are not compiled at build time."""

    absent: str = ""
    nvcc: str = ""
    top: str = ""
    version: str = ""
    archs: list[str] = field(default_factory=list)  # of machine code
    ptx: list[str] = field(default_factory=list)


def run(*command: str) -> str:
    """stdout and stderr of a command; BuildError with both if it fails."""
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    except OSError as error:
        raise BuildError(f"{command[0]} cannot be run: {error}") from error
    if done.returncode:
        raise BuildError(f"{' '.join(command)} failed with status {done.returncode}:\n{done.stdout}")
    return done.stdout


def cuda_mode() -> str:
    mode = os.environ.get("FASTGAN_CUDA", "auto")
    if mode not in ("auto", "0", "1"):
        raise SystemExit(f"FASTGAN_CUDA must be auto, 0 or 1, got {mode!r}")
    return mode


def asked_archs(known: list[str]) -> tuple[list[str], list[str]]:
    """Architectures of machine code and of PTX: what TORCH_CUDA_ARCH_LIST names, or fastgan's own choice of `known`."""
    asked = os.environ.get("TORCH_CUDA_ARCH_LIST", "")
    names = asked.replace(";", " ").replace(",", " ").split()
    if not names:
        # Machine code of x.0 runs on every x.y, so one for each generation serves all cards from 8.0 on, at half the
        # build time of the nine architectures that CUDA 13 lists. Older cards and those to come take PTX, which the
        # driver compiles once.
        codes = [a for a in known if a in ("80", "90", "100", "120")] or known[-1:]
        return codes, sorted({codes[0], codes[-1]}, key=int)
    codes, ptx = set(), set()
    for name in names:
        number = name.removesuffix("+PTX").replace(".", "")
        if number not in known:
            readable = " ".join(f"{a[:-1]}.{a[-1]}" for a in known)
            raise BuildError(
                f"TORCH_CUDA_ARCH_LIST must name architectures of {readable}, with or without +PTX, got {asked!r}"
            )
        codes.add(number)
        if name.endswith("+PTX"):
            ptx.add(number)
    return sorted(codes, key=int), sorted(ptx, key=int)


def find_cuda() -> Cuda:
    if not LINUX:
        return Cuda(absent="CUDA sources are built on Linux only")
    home = os.environ.get("CUDA_HOME", "")
    beside = os.path.join(home, "bin", "nvcc") if home else ""
    nvcc = beside if beside and os.access(beside, os.X_OK) else shutil.which("nvcc")
    if not nvcc:
        return Cuda(absent="no nvcc is on PATH or in CUDA_HOME/bin")
    # nvcc may be a wrapper script whose own path says nothing: TOP in the dry run is where the toolkit lies.
    top = re.search(r"^#\$ TOP=(.+)$", run(nvcc, "--dryrun", "x.cu"), re.MULTILINE)
    version = re.search(r"release (\d+\.\d+)", run(nvcc, "--version"))
    if not top or not version:
        raise BuildError(f"{nvcc} does not say where its toolkit lies or which release it is")
    known = sorted(set(re.findall(r"^sm_(\d+)$", run(nvcc, "--list-gpu-code"), re.MULTILINE)), key=int)
    known = [a for a in known if int(a) >= 75]  # the oldest generation that CUDA 13 still compiles for
    if not known:
        raise BuildError(f"{nvcc} lists no architecture from sm_75 on")
    codes, ptx = asked_archs(known)
    return Cuda(nvcc=nvcc, top=os.path.realpath(top[1].strip()), version=version[1], archs=codes, ptx=ptx)


def cudart(cuda: Cuda) -> str:
    for part in ("lib64", "lib", f"targets/{platform.machine()}-linux/lib", "targets/sbsa-linux/lib"):
        library = Path(cuda.top, part, "libcudart_static.a")
        if library.exists():
            return str(library)
    raise BuildError(f"libcudart_static.a is not under {cuda.top}; install the CUDA runtime's development files")


def ninja_path(path: object) -> str:
    return str(path).replace("$", "$$").replace(":", "$:").replace(" ", "$ ")


def quote(path: object) -> str:
    return '"' + str(path).replace("$", "$$").replace('"', r"\"") + '"'


def write_if_changed(path: Path, text: str) -> None:
    if not path.exists() or path.read_text() != text:
        path.write_text(text)


def ninja(folder: Path, *arguments: str) -> None:
    import ninja as package

    beside = Path(getattr(package, "BIN_DIR", ""), "ninja")
    program = str(beside) if beside.is_file() else (shutil.which("ninja") or "ninja")
    print(run(program, "-C", str(folder), *arguments), end="", flush=True)


def replace(source: Path, target: Path) -> None:
    """A new file under the old name: a process that has the old library mapped keeps it."""
    with tempfile.NamedTemporaryFile(dir=target.parent, delete=False) as fresh:
        pass
    shutil.copy(source, fresh.name)
    os.replace(fresh.name, target)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """One build at a time in a folder: ninja itself takes no lock."""
    import fcntl

    with open(folder / "lock", "w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def chosen_tables() -> list[str]:
    """The tables to compile, worst first: what FASTGAN_TABLES asks for."""
    mode = os.environ.get("FASTGAN_TABLES", "cpu")
    if mode not in ("cpu", "all"):
        raise SystemExit(f"FASTGAN_TABLES must be cpu or all, got {mode!r}")
    with contextlib.suppress(OSError):
        found = re.search(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        if mode == "cpu" and found:
            flags = set(found[1].split())
            runs = list(itertools.takewhile(lambda table: NEEDS.get(table, set()) <= flags, TABLES))
            return runs[1:] or runs  # x86 CPUs of ten years have AVX2; with it nothing takes the portable table
    return list(TABLES)  # all, or a system that does not say what its CPU can do


def unit_flags(tables: list[str], folder: Path) -> dict[Path, list[tuple[str, str]]]:
    """Source -> [(object name, extra flags)]."""
    small = unit_of([CSRC / "cpu" / f"{stem}.cpp" for stem in SMALL], folder / "small.cpp")
    units = {}
    for source in (*sorted((CSRC / "cpu").glob("*.cpp")), small):
        if source.stem in SMALL:
            continue
        elementwise = source == small or source.stem in NORMS_AND_BIAS
        shared = ("avx512_bf16", "amx") if elementwise else ("amx",) if source.stem in PAIRS else ()
        units[source] = [
            (f"cpu/{source.stem}.{table}.o", f"-DISA={table} {TABLES[table]}")
            for table in tables
            if table not in shared
        ]
    return units


def unit_of(sources: Iterable[Path], unit: Path) -> Path:
    """A translation unit of several sources."""
    write_if_changed(unit, "".join(f'#include "{source}"\n' for source in sources))
    return unit


def first_use_unit(folder: Path) -> dict[Path, list[tuple[str, str]]]:
    """The CUDA part without nvcc: launchers whose kernels NVRTC compiles at first launch. As unit_flags."""
    header = runpy.run_path(str(NVRTC / "embed.py"))["device_sources"](CSRC)
    write_if_changed(folder / "device_sources.hpp", header)
    sources = [s for s in sorted((CSRC / "cuda").glob("*.cu")) if s.stem != "device"]  # that one asks a real runtime
    # One unit: the headers are most of what a compiler reads here. Apart they take 50 s of a Zen 1's time, together 13.
    unit = unit_of((*sources, NVRTC / "loader.cpp"), folder / "launchers.cpp")
    # They only prepare launches: -Og. The kernels' bodies are read, never compiled; their pragmas are NVRTC's.
    return {
        unit: [("launchers.o", f"-DFG_NVRTC -Og -Wno-unknown-pragmas -I{quote(NVRTC / 'toolkit')} -I{quote(folder)}")]
    }


def openmp() -> tuple[str, str]:
    """(compile flags, link flags). On Linux libgomp is not linked: torch's own is in the process already."""
    if sys.platform != "darwin":
        return "-fopenmp", ""
    # Untested: Apple's clang needs Homebrew's libomp. Without it the kernels run in one thread.
    with contextlib.suppress(BuildError):
        prefix = run("brew", "--prefix", "libomp").strip()
        if Path(prefix, "include", "omp.h").exists():
            return (
                f"-Xpreprocessor -fopenmp -I{quote(prefix + '/include')}",
                f"-L{quote(prefix + '/lib')} -lomp",
            )
    return "-Wno-unknown-pragmas", ""


def write_ninja(folder: Path, target: Path, cuda: Cuda) -> None:
    import pybind11

    cxx = os.environ.get("CXX", "c++" if sys.platform == "darwin" else "g++")
    if not shutil.which(cxx.split()[0]):
        raise BuildError(f"no C++ compiler: {cxx} is not on PATH; install g++ or set CXX, and reinstall fastgan")
    ccache = "ccache " if shutil.which("ccache") else ""
    omp_compile, omp_link = openmp()
    flags = (
        # No -ffast-math: NaN, inf and signed zeros must come out as PyTorch's do. Nobody reads errno.
        "-std=c++20 -O3 -ffp-contract=fast -fno-math-errno -fno-trapping-math -fPIC -fvisibility=hidden"
        f" -fvisibility-inlines-hidden -ffunction-sections -Wall -Wextra {omp_compile}"
        f" {'-DFG_X86' if X86 else ''} -I{quote(CSRC)} {os.environ.get('CXXFLAGS', '')}"
    )
    if sys.platform == "darwin":  # untested
        link = f"-bundle -undefined dynamic_lookup {omp_link}"
    else:
        link = "-shared -static-libstdc++ -static-libgcc -Wl,--gc-sections -Wl,--exclude-libs,ALL"
    link += " " + os.environ.get("LDFLAGS", "")
    once = f"-I{quote(folder)}"
    include = f"{once} -I{quote(pybind11.get_include())} -I{quote(sysconfig.get_paths()['include'])}"
    if LINUX:
        include += " -DFG_CUDA" if cuda.nvcc else " -DFG_CUDA -DFG_NVRTC"
    lines = [
        f"cflags = {flags}",
        f"rule cxx\n  command = {ccache}{cxx} $cflags $extra -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d\n  deps = gcc\n  description = C++ $out",
        f"rule link\n  command = {cxx} $in -o $out {link} $extra\n  description = link $out",
        f"rule nvcc\n  command = {quote(cuda.nvcc)} $extra -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d\n  deps = gcc\n  description = nvcc $out",
    ]
    # The binding is templates, called once a kernel: -Og compiles them in 8.0 s where -O1 takes 10.3 s, and makes less
    # code. It is the longest unit and comes first: last, it would keep one core busy while the other has nothing left.
    tables = chosen_tables()
    units = {CSRC / "module.cpp": [("module.o", f"-Og {include}")], **unit_flags(tables, folder)}
    units[CSRC / "dispatch.cpp"] = [("dispatch.o", quote(f"-DFG_TABLES(X)={' '.join(f'X({t})' for t in tables)}"))]
    if LINUX and not cuda.nvcc:
        units = first_use_unit(folder) | units
    objects = []
    for source, variants in units.items():
        for name, extra in variants:
            lines.append(f"build {name}: cxx {ninja_path(source)}\n  extra = {extra}")
            objects.append(name)
    extra = "-ldl" if LINUX else ""
    if cuda.nvcc:
        extra = f"{quote(cudart(cuda))} -ldl -lpthread -lrt"
        codes = " ".join(f"-gencode arch=compute_{a},code=sm_{a}" for a in cuda.archs)
        codes += "".join(f" -gencode arch=compute_{a},code=compute_{a}" for a in cuda.ptx)
        nvcc = f"-std=c++20 -O3 {codes} -Werror all-warnings -I{quote(CSRC)}"
        nvcc += " -Xcompiler -fPIC,-fvisibility=hidden"
        for source in sorted((CSRC / "cuda").glob("*.cu")):
            lines.append(f"build cuda/{source.stem}.o: nvcc {ninja_path(source)}\n  extra = {nvcc}")
            objects.append(f"cuda/{source.stem}.o")
    lines.append(f"build {ninja_path(target)}: link {' '.join(objects)}\n  extra = {extra}")
    write_if_changed(folder / "build.ninja", "\n".join(lines) + "\n")


def write_config(folder: Path, cuda: Cuda) -> None:
    def text(value: str) -> str:
        return '"' + value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'

    write_if_changed(
        folder / "build_config.hpp",
        "// Written by setup.py.\n"
        f"#define FG_CUDA_ABSENT {text(cuda.absent)}\n"
        f"#define FG_CUDA_VERSION {text(cuda.version)}\n"
        f"#define FG_CUDA_ARCHS {text(' '.join('sm_' + a for a in cuda.archs))}\n",
    )


def choose_cuda() -> Cuda:
    mode = cuda_mode()
    if not LINUX and mode != "1":
        return Cuda(absent="CUDA sources are built on Linux only")
    if mode != "1":
        return Cuda(absent="the build did not ask for nvcc (FASTGAN_CUDA=1)")
    try:
        cuda = find_cuda()
    except BuildError as error:
        raise SystemExit(f"FASTGAN_CUDA=1: {error}") from error
    if not cuda.nvcc:
        raise SystemExit(
            f"FASTGAN_CUDA=1 needs nvcc: {cuda.absent}; leave it unset to compile CUDA kernels at first use"
        )
    return cuda


def build_with_ninja(target: Path) -> None:
    folder = ROOT / "build" / "native" / f"{sys.implementation.cache_tag}-{sysconfig.get_platform()}"
    folder.mkdir(parents=True, exist_ok=True)
    linked = folder / target.name
    with locked(folder):
        cuda = choose_cuda()
        write_config(folder, cuda)
        write_ninja(folder, linked, cuda)
        ninja(folder, str(linked))
        replace(linked, target)


class BuildNative(build_ext):
    """build_ext for the one extension, by ninja."""

    def run(self) -> None:
        inplace = self.inplace or getattr(self, "editable_mode", False)
        folder = (ROOT if inplace else Path(self.build_lib)) / "fastgan"
        note = folder / FAILURE_NAME
        note.unlink(missing_ok=True)
        try:
            super().run()
        except (BuildError, ImportError) as error:
            if "build_ext" in sys.argv[1:] or cuda_mode() == "1":
                raise SystemExit(f"fastgan._C could not be built: {error}") from error
            print(f"warning: fastgan is installed without its native core: {error}", file=sys.stderr, flush=True)
            folder.mkdir(parents=True, exist_ok=True)
            for stale in folder.glob("_C.*"):  # of an earlier build: its functions may differ from the sources'
                stale.unlink()
            note.write_text(f"{error}\n")

    def build_extension(self, ext: Extension) -> None:
        if os.name == "nt":
            raise BuildError("the native core has no Windows build yet; fastgan runs on PyTorch's operators there")
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        build_with_ninja(target)

    def copy_extensions_to_source(self) -> None:
        wanted, paths = self.inplace, []
        for self.inplace in (False, True):
            paths.append(Path(self.get_ext_fullpath("fastgan._C")))
        self.inplace = wanted
        replace(*paths)


packages = find_packages(include=["fastgan", "fastgan.*"])
packages += [f"fastgan.{name}" for name in find_packages(include=["kernels", "kernels.*"])]
setup(
    packages=packages,
    package_dir={"fastgan.kernels": "kernels"},
    package_data={"fastgan": [FAILURE_NAME], "fastgan.data": ["bundled/*"], "fastgan.metrics": ["small.npz"]},
    ext_modules=[Extension("fastgan._C", sources=[], optional=True)],
    cmdclass={"build_ext": BuildNative},
)
