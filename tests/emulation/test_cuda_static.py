"""nvcc compiles the CUDA kernels without a GPU: no warning, no spill. All cards: make gpu-static."""

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
@pytest.mark.parametrize(("stem", "arch"), [("bias_act", 90), ("gan_loss", 75)])
def test_nvcc_compiles_without_spills(stem, arch):
    kernels = static.compile_kernels(static.CSRC / "cuda" / f"{stem}.cu", arch)
    assert kernels and not [k.name for k in kernels if k.spilled]
    assert min(static.occupancy(arch, kernels)) >= 0.25  # 512 threads a multiprocessor


def test_device_code_includes_only_what_nvrtc_has():
    """NVRTC gets cuda_fp16.h and cuda_bf16.h from csrc/cuda/nvrtc, and nothing else: no <cstdint>."""
    for path in (static.CSRC / "cuda").glob("*.cuh"):
        for line in path.read_text().splitlines():
            if line.startswith("#include <"):
                assert line in ("#include <cuda_fp16.h>", "#include <cuda_bf16.h>"), (path.name, line)
