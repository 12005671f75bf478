"""The build of the native core: what it says of itself, and that its instruction-set tables stay apart."""

import platform
import runpy
import shutil
import subprocess
import sys
import sysconfig
from collections import defaultdict
from pathlib import Path

import pytest
import torch  # noqa: F401  first: it brings the OpenMP runtime

from fastgan.choice import native

_C = pytest.importorskip("fastgan._C", reason="the native core is not built")

ROOT = Path(__file__).parents[1]


def test_build_info():
    info = _C.build_info()
    assert info["compiler"] and info["standard"] >= 202002
    left_out = [name for name, why in _C.tables().items() if "FASTGAN_TABLES" in why]
    assert info["tables"] and not set(left_out) & set(info["tables"])
    if info["cuda"] is None or info["cuda"]["compiler"] == "nvrtc":
        assert info["nvcc_absent"]
    else:
        assert info["cuda"]["version"] and all(a.startswith("sm_") for a in info["cuda"]["archs"])


def test_the_library_holds_the_header_of_every_cuda_kernel():
    """What NVRTC is asked to include at a kernel's first launch: what is missing switches the kernel off."""
    if not hasattr(_C.cuda, "kernels") or not (ROOT / "csrc").is_dir():
        pytest.skip("the CUDA kernels are not compiled at first use here, or the sources are not")
    text = runpy.run_path(str(ROOT / "csrc" / "cuda" / "nvrtc" / "embed.py"))["device_sources"](ROOT / "csrc")
    names = text.partition("DEVICE_SOURCE_NAMES[] = {")[2].partition("}")[0]
    includes = [line for lines, _ in _C.cuda.kernels() for line in lines.splitlines()]
    assert includes and not [line for line in includes if line.removeprefix("#include ") not in names]
    assert all(lines for lines, _ in _C.cuda.kernels())


def test_tables_are_chosen_best_first():
    usable = [name for name, why in _C.tables().items() if not why]
    assert usable
    try:
        for name in usable:
            _C.use_table(name)
            assert _C.table() == name
        for name, why in _C.tables().items():
            if why:
                with pytest.raises(ValueError, match=name) as refusal:
                    _C.use_table(name)
                assert why in str(refusal.value)
                assert _C.table() == usable[-1]  # a refusal changes nothing
    finally:
        _C.use_table(None)
    assert _C.table() == usable[-1]


@pytest.fixture
def tables(monkeypatch):
    """setup.py's choice of tables on x86 under FASTGAN_TABLES and a CPU's flags."""
    setuptools = pytest.importorskip("setuptools")
    monkeypatch.setattr(setuptools, "setup", lambda **arguments: None)
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    chosen = runpy.run_path(str(ROOT / "setup.py"))["chosen_tables"]

    def under(mode, flags):
        monkeypatch.setenv("FASTGAN_TABLES", mode)
        monkeypatch.setattr(Path, "read_text", lambda self: f"processor\t: 0\nflags\t\t: fpu {flags}\nbugs\t\t:\n")
        return chosen()

    return under


AVX512_FLAGS = "avx2 fma avx512f avx512bw avx512vl avx512dq"


@pytest.mark.parametrize(
    "mode, flags, best",
    [
        ("cpu", "sse4_2", "portable"),
        ("cpu", "avx2 fma", "avx2"),
        ("cpu", "avx2 fma avx512f", "avx2"),  # AVX-512 of the first kind, without the instructions on bytes and words
        ("cpu", AVX512_FLAGS, "avx512"),
        ("cpu", f"{AVX512_FLAGS} avx512_bf16", "avx512_bf16"),
        ("cpu", f"{AVX512_FLAGS} avx512_bf16 amx_tile amx_bf16", "amx"),
        ("all", "sse4_2", "all"),
    ],
)
def test_a_build_holds_the_tables_that_its_cpu_runs(tables, mode, flags, best):
    assert (
        tables(mode, flags)
        == {
            "portable": ["portable"],
            "avx2": ["avx2"],
            "avx512": ["avx2", "avx512"],
            "avx512_bf16": ["avx2", "avx512", "avx512_bf16"],
            "amx": ["avx2", "avx512", "avx512_bf16", "amx"],
            "all": ["portable", "avx2", "avx512", "avx512_bf16", "amx"],
        }[best]
    )


def test_a_build_without_a_table_for_this_cpu_counts_as_absent(monkeypatch):
    tables = {"portable": "this build left it out", "avx2": "the CPU has no AVX2 with FMA"}
    monkeypatch.setattr(_C, "tables", lambda: tables)
    module, why = native.__wrapped__()
    assert module is None and why == (
        "fastgan._C must have kernels that this CPU runs, got none "
        "(portable: this build left it out; avx2: the CPU has no AVX2 with FMA)"
    )


def test_a_wrong_choice_of_tables_is_refused(tables):
    with pytest.raises(SystemExit, match="FASTGAN_TABLES must be cpu or all, got 'avx2'"):
        tables("avx2", "avx2 fma")


def test_cuda_devices():
    """Without a driver the CUDA runtime answers with a reason, not with a crash."""
    if _C.build_info()["cuda"] is None:
        pytest.skip(_C.build_info()["nvcc_absent"])
    found = _C.cuda_devices()
    if _C.build_info()["cuda"]["compiler"] == "nvcc":
        assert found["runtime"] >= 11000
    assert bool(found["devices"]) != bool(found["reason"])


NVCC = """#!/bin/sh
touch "$0.called"
case "$1" in
--dryrun) echo '#$ TOP=/opt/cuda' ;;
--version) echo 'Cuda compilation tools, release 13.0, V13.0.88' ;;
--list-gpu-code) printf 'sm_75\\nsm_80\\nsm_86\\nsm_90\\nsm_100\\nsm_120\\n' ;;
esac
"""


@pytest.fixture
def choose(monkeypatch, tmp_path):
    """setup.py's choose_cuda under two variables, and the file that the nvcc on PATH leaves when it is called."""
    setuptools = pytest.importorskip("setuptools")
    if not sys.platform.startswith("linux"):
        pytest.skip("CUDA sources are built on Linux only")
    nvcc = tmp_path / "nvcc"
    nvcc.write_text(NVCC)
    nvcc.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.setattr(setuptools, "setup", lambda **arguments: None)
    choose_cuda = runpy.run_path(str(ROOT / "setup.py"))["choose_cuda"]

    def under(cuda, archs=""):
        monkeypatch.setenv("FASTGAN_CUDA", cuda)
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", archs)
        return choose_cuda()

    return under, tmp_path / "nvcc.called"


@pytest.mark.parametrize("mode", ["auto", "0"])
def test_nvcc_is_called_only_when_asked_for(choose, mode):
    under, called = choose
    assert not under(mode).nvcc and "FASTGAN_CUDA=1" in under(mode).absent
    assert not called.exists()
    assert under("1").nvcc and called.exists()


@pytest.mark.parametrize(
    "asked, archs, ptx",
    [
        ("", ["80", "90", "100", "120"], ["80", "120"]),
        ("8.6", ["86"], []),
        ("9.0+PTX 7.5", ["75", "90"], ["90"]),
        ("8.0;8.6,12.0+PTX", ["80", "86", "120"], ["120"]),
    ],
)
def test_architectures_are_torchs_variable(choose, asked, archs, ptx):
    cuda = choose[0]("1", asked)
    assert (cuda.archs, cuda.ptx) == (archs, ptx)


@pytest.mark.parametrize("asked", ["Ampere", "8.1", "5.0", "sm_80"])
def test_unknown_architectures_are_refused(choose, asked):
    with pytest.raises(SystemExit, match=r"TORCH_CUDA_ARCH_LIST must name architectures of 7\.5 8\.0"):
        choose[0]("1", asked)


def test_no_torch_library_is_linked():
    """One binary for every torch: nothing of torch, and no OpenMP runtime of our own."""
    tool = shutil.which("readelf")
    if tool is None or not sys.platform.startswith("linux"):
        pytest.skip("no readelf here")
    dynamic = subprocess.run([tool, "-d", _C.__file__], capture_output=True, text=True, check=True).stdout
    needed = [line for line in dynamic.splitlines() if "(NEEDED)" in line]
    assert needed and not [line for line in needed if "torch" in line or "c10" in line or "gomp" in line]


def test_tables_share_no_weak_code():
    """An inline function that two tables emit under one name would be kept once, maybe in its AVX-512 version."""
    tool = shutil.which("nm")
    folder = ROOT / "build" / "native" / f"{sys.implementation.cache_tag}-{sysconfig.get_platform()}"
    listed = (folder / "build.ninja").read_text() if (folder / "build.ninja").is_file() else ""
    objects = [p for p in sorted((folder / "cpu").glob("*.o")) if f"build cpu/{p.name}:" in listed]
    if tool is None or not objects:
        pytest.skip("no nm or no object files of a build in this checkout")
    holders = defaultdict(set)
    for path in objects:
        table = path.name.split(".")[1]
        symbols = subprocess.run([tool, "--defined-only", path], capture_output=True, text=True, check=True).stdout
        for line in symbols.splitlines():
            kind, name = line.split(" ", 2)[1:]
            if kind in "WwVvu":
                holders[name].add(table)
    holders.pop("DW.ref.__gxx_personality_v0", None)  # data: the address of the C++ runtime's personality routine
    shared = {name: sorted(tables) for name, tables in holders.items() if len(tables) > 1}
    assert not shared
