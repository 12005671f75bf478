"""nvcc and NVRTC compile the CUDA kernels without a GPU: no warning, no spill. All cards: make gpu-static."""

import importlib.util
import shutil
from pathlib import Path

import pytest

spec = importlib.util.spec_from_file_location("fastgan_cuda_static", Path(__file__).with_name("cuda_static.py"))
static = importlib.util.module_from_spec(spec)
import sys  # noqa: E402

sys.modules[spec.name] = static  # dataclasses look themselves up there
spec.loader.exec_module(static)

NVCC = pytest.mark.skipif(not shutil.which("nvcc"), reason="nvcc was not found")


@NVCC
@pytest.mark.parametrize("arch", [75, 90])
@pytest.mark.parametrize("stem", ["bias_act", "gan_loss"])
def test_nvcc_compiles_without_spills(stem, arch):
    kernels = static.compile_kernels(static.CSRC / "cuda" / f"{stem}.cu", arch)
    assert kernels and not [k.name for k in kernels if k.spilled]
    assert min(static.occupancy(arch, kernels)) >= 0.25  # 512 threads a multiprocessor


def test_device_code_includes_only_what_nvrtc_has():
    """On a user's machine NVRTC has cuda_fp16.h and cuda_bf16.h at most: no <cstdint>, no cooperative_groups."""
    for path in (static.CSRC / "cuda").glob("*.cuh"):
        for line in path.read_text().splitlines():
            if line.startswith("#include <"):
                assert line in ("#include <cuda_fp16.h>", "#include <cuda_bf16.h>"), (path.name, line)


def test_nvrtc_compiles_every_device_file():
    core = pytest.importorskip("cuda.core", reason="cuda-core is not installed; pip install 'fastgan[nvrtc]'")
    include = nvrtc_headers()
    for path in sorted((static.CSRC / "cuda").glob("*.cuh")):
        source = f'#include "cuda/{path.name}"\n'
        options = core.ProgramOptions(std="c++20", arch="sm_90", include_path=[str(static.CSRC), *include])
        try:
            assert core.Program(source, "c++", options).compile("cubin").code
        except RuntimeError as error:
            if "nvrtc" in str(error).lower() and "load" in str(error).lower():
                pytest.skip(f"NVRTC does not load here ({error}); pip install nvidia-cuda-nvrtc")
            raise


def nvrtc_headers():
    """include folders of the nvidia-cuda-runtime, -crt and -cccl wheels."""
    import nvidia

    found = [str(p) for root in nvidia.__path__ for p in Path(root).rglob("include") if (p / "cuda_fp16.h").exists()]
    if not found:
        pytest.skip("cuda_fp16.h is in no installed wheel; pip install nvidia-cuda-runtime nvidia-cuda-crt")
    return found
