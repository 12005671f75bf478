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


SWEEPS = {  # file -> its Bodies, and how they are walked
    "bias_act": {"BiasActForward": "apply", "BiasActBackward": "apply reduce"},
    "norm": {
        "NormStatistics": "reduce",
        "NormForward": "apply",
        "NormBackwardSums": "reduce",
        "NormBackward": "apply",
        "NormDoubleSums": "reduce",
        "NormDouble": "apply",
    },
    "interpolate": {"Interpolate<{T}, 1>": "apply", "Interpolate<{T}, 2>": "apply"},
    "sample_dot": {"SampleProducts": "reduce"},
    "grad_norm_penalty": {"GradSquares": "reduce", "GradNormBackward": "apply"},
}
OTHERS = {
    "bn_act": ["bn_act_statistics_kernel", "bn_act_backward_finish_kernel", "bn_act_double_backward_finish_kernel"],
    "gn_act": ["gn_act_statistics_kernel", "gn_act_backward_finish_kernel", "gn_act_double_backward_finish_kernel"]
    + [f"gn_act_parameters_kernel<{words}>" for words in (2, 5)],
    "gan_loss": [f"gan_loss_{part}_kernel<{{T}}>" for part in ("forward", "finish", "backward", "double_backward")]
    + ["gan_loss_double_backward_finish_kernel"],
    "sample_dot": ["sample_dot_finish_kernel"],
    "conv2d": [f"conv2d_kernel<{{T}}, fg::cuda::{block}>" for block in ("Large", "Small", "Narrow")]
    + ["conv_reduce_kernel<{T}>"],
    "conv_transpose2d": [f"conv_transpose2d_kernel<{{T}}, fg::cuda::{block}>" for block in ("Large", "Narrow")],
    "conv2d_weight": [f"conv2d_weight_kernel<{{T}}, fg::cuda::{block}>" for block in ("Large", "Small")],
}


def kernel_names(stem, element="__nv_bfloat16", vector=8):
    """Every kernel of a device file for one dtype, as NVRTC takes names."""
    names = [name.format(T=element) for name in OTHERS.get(stem, [])]
    for body, walks in SWEEPS.get(stem, {}).items():
        body = body.format(T=element) if "<" in body else f"{body}<{element}>"
        arguments = f"fg::cuda::{body}, {vector}"
        for walk in walks.split():
            names.append(f"{walk}_columns_kernel<{arguments}>")
            names.append(f"{walk}_rows_kernel<{arguments}{', 256' if walk == 'reduce' else ''}>")
    return tuple(f"fg::cuda::{name}" for name in names)


@pytest.mark.parametrize("stem", [*SWEEPS, *OTHERS])
def test_nvrtc_compiles_without_a_gpu(stem):
    core = pytest.importorskip("cuda.core", reason="cuda-core is not installed; pip install 'fastgan[nvrtc]'")
    options = core.ProgramOptions(std="c++20", arch="sm_90", include_path=[str(static.CSRC), *nvrtc_headers()])
    try:
        program = core.Program(f'#include "cuda/{stem}.cuh"\n', "c++", options)
    except RuntimeError as error:  # cuda-pathfinder's: no library
        pytest.skip(f"NVRTC does not load here ({error}); pip install 'fastgan[nvrtc]'")
    assert program.compile("cubin", name_expressions=kernel_names(stem)).code


def nvrtc_headers():
    """include folders of the nvidia-cuda-runtime, -crt and -cccl wheels."""
    nvidia = pytest.importorskip("nvidia", reason="no nvidia wheel is installed; pip install 'fastgan[nvrtc]'")
    found = [str(p) for root in nvidia.__path__ for p in Path(root).rglob("include") if (p / "cuda_fp16.h").exists()]
    if not found:
        pytest.skip("cuda_fp16.h is in no installed wheel; pip install 'fastgan[nvrtc]'")
    return found
